"""One training step: the average of the weights, and the whole step of ocec. The wait before the first one is in start.py.

    $ pip install timm ema-pytorch
    $ OMP_NUM_THREADS=1 python benchmarks/steps.py

EMA: one update of the baseline network of 64 channels and 8 blocks, 0.55 M parameters. All take turns in one process, after
train.tune_allocator, 200 updates each in a round. The averaged parameters must agree to 1e-4 (timm copies the buffers, the others
average them as well).

Step: the same network, batch 256 of 32 x 64, float32 but for the row of --amp bf16, BCE, no dropout. Each in a process of its own, in
turns, the median of 6 steps after 4: a heap that keeps what is freed grows for some steps. plain: the loop of a tutorial, AdamW(), with the
allocator as glibc has it or after train.tune_allocator; ours: a step of train.train_epoch, always tuned, with the clipping, the check for
NaN, the schedule and the EMA that plain has not, and AdamW(fused=True). The first loss must agree to 1e-3 of itself, that of bf16 to 1e-2.

    $ python benchmarks/steps.py step    # or ema; the rows of the step alone, on all cores
    $ python benchmarks/steps.py --quick

Last result, torch 2.13.0+cpu, timm 1.0.31, ema-pytorch 0.8.3, 2 cores, 1 thread, others on the machine beside it (load 2): EMA the third
of three runs, the others had 3.06 and 3.16 x of timm.

    EMA of 547,713 parameters
        ours                           0.280 ms    1.00 x
        timm ModelEmaV3                1.035 ms    3.23 x
        timm, foreach=False            1.235 ms    4.28 x
        torch AveragedModel, foreach   1.365 ms    4.57 x
        torch AveragedModel            3.395 ms   11.59 x
        ema-pytorch                    1.244 ms    4.31 x

Of an EMA update of 0.22 ms, alone on a core, 0.10 are the arithmetic, one foreach lerp over 91 tensors, which timm does as well; 0.04 `to`,
for a model whose type or device changed in place; 0.03 to see that nothing was replaced; 0.02 shapes; 0.01 counters. Copying a flat array
of that size takes 0.05, but the weights do not lie in one: gathering them takes 0.06 and a lerp of the flat arrays 0.05, no less than the
foreach.

Step, 2 threads on 2 cores, load 1 to 2, two runs (the ratio to a plain loop with glibc's allocator, and tuned); two before had 3.9 and 3.7,
1.7 and 1.7 x for `ours`, 3.1 and 1.5 x for bf16. --compile with g++ 12; its first step takes 41 to 43 s, with its code cached 4.

                                               first run                            second run
    plain, glibc's allocator      1168.8 ms    1.00 x    0.47 x          1265.7 ms    1.00 x    0.47 x
    plain, tuned                   554.0 ms    2.11 x    1.00 x           591.5 ms    2.15 x    1.00 x
    ours, --no-channels-last       492.1 ms    2.37 x    1.13 x           597.9 ms    2.12 x    0.99 x
    ours                           354.4 ms    3.31 x    1.57 x           353.7 ms    3.58 x    1.67 x
    ours, --amp bf16               462.7 ms    2.53 x    1.20 x           525.9 ms    2.44 x    1.13 x
    ours, --compile                440.6 ms    2.65 x    1.25 x           431.2 ms    2.96 x    1.39 x

Where a step of `plain, tuned` goes (torch.profiler, 1 thread, 0.74 s): backward of the convolutions 40 %, of batch norm 19, of ReLU 12;
forward of the convolutions 15, of batch norm 6, of ReLU 3. With glibc's allocator a plain step takes 420,000 to 520,000 page faults, half
of its time in the kernel; tuned, few or none once the heap has grown. bf16 is no faster although the processor has it: the backward of the
three first depthwise convolutions of stride 2 takes 100 ms each in oneDNN, 40 % of the step, against 22 at most in float32.
"""

import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F

import data
import ema
import models
import train
from _quick import new_parser, parse, require


def network(channels, blocks):
    torch.manual_seed(0)
    return models.EyeNet((32, 64), block="baseline", channels=channels, blocks=blocks)


def compare(title, rounds, unit):
    """Medians of {name: [values]}, and of their ratios to the first within a round."""
    print(title)
    first = next(iter(rounds.values()))
    for name, values in rounds.items():
        ratio = statistics.median(its / our for its, our in zip(values, first))
        print(f"    {name:<26} {statistics.median(values) * 1000:9.3f} {unit}   {ratio:5.2f} x", flush=True)


def averages_of_torch(model):
    """{name: (function(model) that updates the average, averaged module)}"""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    foreach = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True)
    plain = AveragedModel(model, avg_fn=lambda a, p, n: 0.99 * a + 0.01 * p, use_buffers=True)
    return {"torch AveragedModel, foreach": (foreach.update_parameters, foreach.module),
            "torch AveragedModel": (plain.update_parameters, plain.module)}


def averages_of_peers(model):
    for name in "timm", "timm.utils":  # their __init__ import torchvision, which must fit the build of torch; the average does not need it
        sys.modules[name] = importlib.util.module_from_spec(importlib.util.find_spec(name))
    from ema_pytorch import EMA as EMAPytorch
    from timm.utils.model_ema import ModelEmaV3

    timm, slow_timm = ModelEmaV3(model, decay=0.99), ModelEmaV3(model, decay=0.99, foreach=False)
    pytorch = EMAPytorch(model, beta=0.99, update_every=1, update_after_step=-1,
                         inv_gamma=1e-9, power=100.0)
    return {"timm ModelEmaV3": (timm.update, timm.module),
            "timm, foreach=False": (slow_timm.update, slow_timm.module),
            "ema-pytorch": (lambda model: pytorch.update(), pytorch.ema_model)}


def parameters_of(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def compare_averages(quick):
    train.tune_allocator()
    model = network(8, 1) if quick else network(64, 8)
    ours = ema.EMA(model, 0.99, warmup=False)
    averages = {"ours": (ours.update, ours.module)}
    averages |= averages_of_torch(model)
    if not quick:
        averages |= averages_of_peers(model)
    for update, _ in averages.values():
        update(model)  # some take their first copy here
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
                if not off <= 1e-4:
                    sys.exit(f"{name}: not the average of ours, off by {off}")
    compare(f"EMA of {models.count_parameters(model):,} parameters", rounds, "ms")


CONTESTANTS = {"plain, glibc's allocator": ["plain"], "plain, tuned": ["plain", "tuned"],
               "ours, --no-channels-last": ["--no-channels-last"], "ours": [], "ours, --amp bf16": ["--amp", "bf16"],
               "ours, --compile": ["--compile"]}
FULL = types.SimpleNamespace(channels=64, blocks=8, batch=256, steps=10, warm_up=4, rounds=2,
                             contestants=CONTESTANTS)
QUICK = types.SimpleNamespace(channels=8, blocks=1, batch=16, steps=2, warm_up=0, rounds=1,
                              contestants={"plain, glibc's allocator": ["plain"], "ours": []})


def plain_steps(inputs, targets, size, tuned):
    """The loop of a tutorial; returns the seconds of each step and the first loss."""
    if tuned:
        train.tune_allocator()
    torch.manual_seed(train.seed_of(0))
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
    """A split that hands out one batch again and again, and notes when: a step is what lies between two of them."""

    def __init__(self, inputs, targets, count):
        self.inputs, self.targets, self.count, self.times = inputs, targets, count, []

    def __len__(self):
        return len(self.inputs) * self.count

    def batch(self, rows, generator):
        self.times.append(time.perf_counter())
        return {"inputs": self.inputs, "targets": self.targets}


def our_steps(inputs, targets, size, flags):
    """train.py's own loop; returns the seconds of each step and the first loss."""
    train.tune_allocator()
    words = f"--channels {size.channels} --blocks {size.blocks} --batch-size {size.batch}"
    args = train.parse_args(["--task", "ocec", "--dropout", "0", *words.split(), *flags])
    losses = []
    args.device, args.facts = "cpu", {"pos_weight": 1.0}
    run, split = train.build(args, size.steps), SameBatch(inputs, targets, size.steps + 1)
    run.loss.register_forward_hook(lambda module, batch, output: losses.append(float(output[0].detach())))
    train.train_epoch(run, split, 1, args, types.SimpleNamespace(check=lambda: None))
    return [after - before for before, after in zip(split.times, split.times[1:])], losses[0]


def child(size, words):
    """In a process of its own: prints the median seconds of the steps after the warm-up, those of
    the first, and the first loss."""
    images, labels, _, _ = data.synthetic_eyes(size.batch, size=(32, 64))
    inputs, targets = (images.float() - 127.5) / 127.5, torch.from_numpy(labels).float()
    if "plain" in words:
        seconds, loss = plain_steps(inputs, targets, size, "tuned" in words)
    else:
        seconds, loss = our_steps(inputs, targets, size, words)
    print(statistics.median(seconds[size.warm_up :]), seconds[0], loss)


def compare_steps(size):
    rounds = {name: [] for name in size.contestants}
    mode = "child-quick" if size is QUICK else "child"
    with tempfile.TemporaryDirectory() as folder:  # the compiler's cache: the first round is that of a first run
        for _ in range(size.rounds):
            for name, words in size.contestants.items():
                done = subprocess.run([sys.executable, "-W", "ignore", __file__, mode, *words],
                                      capture_output=True, text=True,
                                      env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder})
                if done.returncode:
                    sys.exit(done.stderr)
                rounds[name].append([float(word) for word in done.stdout.split()])
                print(f"    {name:<26} {rounds[name][-1][0] * 1000:9.1f} ms, the first step {rounds[name][-1][1]:.1f} s", flush=True)
                loss, plain = rounds[name][-1][2], rounds["plain, glibc's allocator"][0][2]
                if abs(loss / plain - 1) > (1e-2 if "bf16" in words else 1e-3):
                    sys.exit(f"{name}: loss {loss}, plain {plain}")
    plain = [name for name in rounds if name.startswith("plain")]
    print(f"step of ocec, {size.channels} x {size.blocks}, batch {size.batch}: "
          f"how many times longer these take: {'; '.join(plain)}")
    for name, values in rounds.items():
        ratios = ""
        for slower in plain:
            ratio = statistics.median(its[0] / our[0] for its, our in zip(rounds[slower], values))
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
