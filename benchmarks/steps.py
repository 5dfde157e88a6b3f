"""One training step of ocec, and one update of the average of its weights, against peers.

    $ pip install timm ema-pytorch
    $ OMP_NUM_THREADS=1 python benchmarks/steps.py
    $ python benchmarks/steps.py step    # or ema; step alone, on all cores
    $ python benchmarks/steps.py --quick

Network: baseline, 64 channels, 8 blocks. The time before the first step is in start.py.

EMA: in turns in one process, tuned allocator, 200 updates each in a round. The averaged parameters
must agree to 1e-4 (timm copies the buffers, the others average them as well).

Step: batch 256 of 32 x 64, float32 except --amp bf16, BCE, no dropout. Processes of their own, in
turns; the median of 6 steps after 4, in which the heap grows. The first losses must agree to 1e-3,
bf16 to 1e-2. plain: the loop of a tutorial, AdamW(), with glibc's allocator or tuned. ours: a step
of train.train_epoch, always tuned, AdamW(fused=True); clipping, the check for NaN, schedule and EMA
included, which plain does not have.

Last result of EMA, torch 2.13.0+cpu, timm 1.0.31, ema-pytorch 0.8.3, AMD EPYC, 2 cores, 1 thread;
two runs, and the ratios of the other in brackets:

    EMA of 547,713 parameters
        ours                           1.116 ms    1.00 x
        timm ModelEmaV3                0.960 ms    0.86 x (0.87)
        timm, foreach=False            1.228 ms    1.10 x (1.13)
        torch AveragedModel, foreach   1.483 ms    1.31 x (1.36)
        torch AveragedModel            3.748 ms    3.35 x (3.21)
        ema-pytorch                    1.309 ms    1.18 x (1.20)

Last result of the step, 2 threads, load 1 to 2, two runs: milliseconds, how many times longer plain
takes with glibc's allocator, and tuned. The first step of --compile takes 41 to 43 s with g++ 12.

                                       first run                    second run
    plain, glibc's allocator   1168.8   1.00 x   0.47 x    1265.7   1.00 x   0.47 x
    plain, tuned                554.0   2.11 x   1.00 x     591.5   2.15 x   1.00 x
    ours, --no-channels-last    492.1   2.37 x   1.13 x     597.9   2.12 x   0.99 x
    ours                        354.4   3.31 x   1.57 x     353.7   3.58 x   1.67 x
    ours, --amp bf16            462.7   2.53 x   1.20 x     525.9   2.44 x   1.13 x
    ours, --compile             440.6   2.65 x   1.25 x     431.2   2.96 x   1.39 x
"""

import importlib.util
import os
import statistics
import sys
import tempfile
import time
import types

import torch
import torch.nn.functional as F

from _quick import median_ratio, new_parser, parse, require, run_python
import ema
import models
import train
from runtime import processes
from tasks import ocec
from tasks.common import seed_of


def network(channels, blocks):
    torch.manual_seed(0)
    return models.EyeNet((32, 64), block="baseline", channels=channels, blocks=blocks)


def averages_of_torch(model):
    """{name: (function(model) that updates the average, averaged module)}."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    foreach = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True)
    plain = AveragedModel(model, avg_fn=lambda a, p, n: 0.99 * a + 0.01 * p, use_buffers=True)
    return {"torch AveragedModel, foreach": (foreach.update_parameters, foreach.module),
            "torch AveragedModel": (plain.update_parameters, plain.module)}


def averages_of_peers(model):
    """The same of timm and ema-pytorch."""
    # The packages are registered without running their __init__: that imports torchvision, which
    # must fit the build of torch. The average does not need it.
    for name in ("timm", "timm.utils"):
        spec = importlib.util.find_spec(name)
        sys.modules[name] = importlib.util.module_from_spec(spec)
    from ema_pytorch import EMA as EMAPytorch
    from timm.utils.model_ema import ModelEmaV3

    timm = ModelEmaV3(model, decay=0.99)
    slow_timm = ModelEmaV3(model, decay=0.99, foreach=False)
    pytorch = EMAPytorch(model, beta=0.99, update_every=1, update_after_step=-1,
                         inv_gamma=1e-9, power=100.0)
    return {"timm ModelEmaV3": (timm.update, timm.module),
            "timm, foreach=False": (slow_timm.update, slow_timm.module),
            "ema-pytorch": (lambda model: pytorch.update(), pytorch.ema_model)}


def parameters_of(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def compare_averages(quick):
    """Time an update of every average in turn; end if an average differs from ours."""
    processes.tune_allocator()
    model = network(8, 1) if quick else network(64, 8)
    ours = ema.EMA(model, 0.99, warmup=False)
    averages = {"ours": (ours.update, ours.module)}
    averages |= averages_of_torch(model)
    if not quick:
        averages |= averages_of_peers(model)
    for update, _ in averages.values():
        update(model)  # the first update of some only copies the weights
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    rounds = {name: [] for name in averages}
    times = 5 if quick else 200
    for i in range(2 if quick else 6):
        for name, (update, _) in averages.items():
            start = time.perf_counter()
            for _ in range(times):
                update(model)
            rounds[name].append((time.perf_counter() - start) / times)
        if i == 0:
            for name, (_, module) in averages.items():
                off = float((parameters_of(module) - parameters_of(ours.module)).abs().max())
                if off > 1e-4:
                    sys.exit(f"{name}: not the average of ours, off by {off}")
    print(f"EMA of {models.count_parameters(model):,} parameters")
    for name, seconds in rounds.items():
        ratio = median_ratio(seconds, rounds["ours"])
        print(f"    {name:<26} {statistics.median(seconds) * 1000:9.3f} ms   {ratio:5.2f} x",
              flush=True)


CONTESTANTS = {"plain, glibc's allocator": ["plain"],
               "plain, tuned": ["plain", "tuned"],
               "ours, --no-channels-last": ["--no-channels-last"],
               "ours": [],
               "ours, --amp bf16": ["--amp", "bf16"],
               "ours, --compile": ["--compile"]}
FULL = types.SimpleNamespace(channels=64, blocks=8, batch=256, steps=10, warm_up=4, rounds=2,
                             contestants=CONTESTANTS)
QUICK = types.SimpleNamespace(channels=8, blocks=1, batch=16, steps=2, warm_up=0, rounds=1,
                              contestants={"plain, glibc's allocator": ["plain"], "ours": []})


def plain_steps(inputs, targets, size, tuned):
    """The loop of a tutorial; returns the seconds of each step and the first loss."""
    if tuned:
        processes.tune_allocator()
    torch.manual_seed(seed_of(0))
    model = models.EyeNet((32, 64), block="baseline", channels=size.channels, blocks=size.blocks,
                          dropout=0.0).train()
    optimizer = torch.optim.AdamW(model.parameters())
    seconds, losses = [], []
    for _ in range(size.steps):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    return seconds, losses[0]


class SameBatch:
    """A split that returns one batch again and again; a step lasts from one call to the next."""

    def __init__(self, inputs, targets, count):
        self.inputs, self.targets, self.count, self.times = inputs, targets, count, []

    def __len__(self):
        return len(self.inputs) * self.count

    def batch(self, rows, generator):
        self.times.append(time.perf_counter())
        return {"inputs": self.inputs, "targets": self.targets}


def our_steps(inputs, targets, size, flags):
    """train.py's own loop; returns the seconds of each step and the first loss."""
    processes.tune_allocator()
    words = f"--channels {size.channels} --blocks {size.blocks} --batch-size {size.batch}"
    words += " --size 32x64 --inputs images --block baseline --device cpu --dropout 0"
    args = train.parse_args(["--task", "ocec", *words.split(), *flags])
    run = train.build(args, {"pos_weight": 1.0}, size.steps)
    split = SameBatch(inputs, targets, size.steps + 1)
    losses = []

    def append_loss(module, batch, output):
        losses.append(float(output[0].detach()))

    run.loss.register_forward_hook(append_loss)
    train.train_epoch(run, split, 1, types.SimpleNamespace(check=lambda: None))
    seconds = [after - before for before, after in zip(split.times, split.times[1:])]
    return seconds, losses[0]


def child(size, words):
    """In a process of its own: print median seconds, seconds of the first step, first loss."""
    images, labels, _, _ = ocec.synthetic_eyes(size.batch, size=(32, 64))
    inputs, targets = (images.float() - 127.5) / 127.5, torch.from_numpy(labels).float()
    if "plain" in words:
        seconds, loss = plain_steps(inputs, targets, size, "tuned" in words)
    else:
        seconds, loss = our_steps(inputs, targets, size, words)
    print(statistics.median(seconds[size.warm_up :]), seconds[0], loss)


def compare_steps(size):
    """Time the contestants in turn, in a process each; end if a first loss differs from plain."""
    rounds = {name: [] for name in size.contestants}
    mode = "child-quick" if size is QUICK else "child"
    with tempfile.TemporaryDirectory() as folder:  # an empty cache for the compiler
        for _ in range(size.rounds):
            for name, words in size.contestants.items():
                printed = run_python("-W", "ignore", __file__, mode, *words,
                                     TORCHINDUCTOR_CACHE_DIR=folder)
                seconds, first_seconds, loss = [float(word) for word in printed.split()]
                rounds[name].append((seconds, loss))
                print(f"    {name:<26} {seconds * 1000:9.1f} ms, "
                      f"the first step {first_seconds:.1f} s", flush=True)
                plain_loss = rounds["plain, glibc's allocator"][0][1]
                tolerance = 1e-2 if "bf16" in words else 1e-3
                if abs(loss / plain_loss - 1) > tolerance:
                    sys.exit(f"{name}: loss {loss}, plain {plain_loss}")
    plain = [name for name in rounds if name.startswith("plain")]
    print(f"step of ocec, {size.channels} x {size.blocks}, batch {size.batch}: "
          f"how many times longer these take: {'; '.join(plain)}")
    for name, values in rounds.items():
        ratios = ""
        for slower in plain:
            pairs = zip(rounds[slower], values)  # of a round
            ratio = statistics.median(other[0] / own[0] for other, own in pairs)
            ratios += f"   {ratio:5.2f} x"
        seconds = statistics.median(value[0] for value in values)
        print(f"    {name:<26} {seconds * 1000:9.1f} ms{ratios}", flush=True)


def main():
    parser = new_parser(__doc__)
    parser.add_argument("part", nargs="?", choices=["ema", "step"], help="(default: both)")
    args = parse(parser)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), "
          f"load {os.getloadavg()[0]:.1f}")
    if args.part != "step":
        if not args.quick:
            require("pip install timm ema-pytorch", "timm", "ema_pytorch")
        compare_averages(args.quick)
    if args.part != "ema":
        compare_steps(QUICK if args.quick else FULL)


if __name__ == "__main__":
    if sys.argv[1:2] in (["child"], ["child-quick"]):
        child(FULL if sys.argv[1] == "child" else QUICK, sys.argv[2:])
    else:
        main()
