"""One training step: the average of the weights, the whole step of ocec, and the wait before the first one.

    $ pip install timm ema-pytorch
    $ OMP_NUM_THREADS=1 python benchmarks/steps.py

EMA: one update of the baseline network of 64 channels and 8 blocks, 0.55 M parameters. All take turns in one process, after
train.tune_allocator, 200 updates each in a round. The averaged parameters must agree to 1e-4 (timm copies the buffers, the others
average them as well).

Step: the same network, batch 256 of 32 x 64, float32, BCE: forward, backward, AdamW. Each in a process of its own, in turns, the median
of 6 steps after 2. ours: channels_last, train.tune_allocator, AdamW(fused=True); plain: the loop of a tutorial, AdamW(), the allocator as
glibc has it; the others change one thing of plain. The first loss must agree to 1e-3 of itself; later ones drift apart by rounding.

Start: from the start of the process's own code to the first optimizer step of `train.py --task ocec` on 100 eyes of an .npz, in a new
process each, seven in turns, in times of `import torch` in the same process; beside it one linear layer and AdamW, the least there can be.

Last result, torch 2.13.0+cpu, timm 1.0.31, ema-pytorch 0.8.3, 2 cores, 1 thread, others at work beside it (load 1 to 4): EMA the second of
two runs, the first had 3.16 x of timm; step and start of an earlier and only whole run, noisy: medians and ratios of three rounds need
not fit.

    EMA of 547,713 parameters
        ours                           0.223 ms    1.00 x
        timm ModelEmaV3                0.697 ms    3.06 x
        timm, foreach=False            0.855 ms    3.88 x
        torch AveragedModel, foreach   0.998 ms    4.47 x
        torch AveragedModel            2.498 ms   11.11 x
        ema-pytorch                    0.887 ms    3.98 x
    step of ocec, 64 x 8, batch 256, float32
        ours                         682.263 ms    1.00 x
        plain                       1802.580 ms    2.64 x
        plain, allocator tuned      1144.836 ms    1.59 x
        plain, channels_last        1547.596 ms    1.76 x
        plain, AdamW fused          2522.956 ms    2.63 x
    first step, of import torch: train.py 2.29, one linear layer and AdamW 1.91

Of an EMA update 0.10 ms are the arithmetic, one foreach lerp over 91 tensors, which timm does as well; 0.04 `to`, for a model whose
type or device changed in place; 0.03 to see that nothing was replaced; 0.02 shapes; 0.01 counters. Copying a flat array of that size takes
0.05, but the weights do not lie in one: gathering them takes 0.06 and a lerp of the flat arrays 0.05, no less than the foreach.
The start: `python -X importtime` counts 1.0 s for torch; 0.88 s for torch._dynamo, which every torch.optim optimizer imports when it is
built (Optimizer.add_param_group, through torch._compile); 0.1 to 0.2 s for these modules. Only an optimizer of our own would avoid it.
"""

import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

if sys.argv[1:2] == ["start"]:  # before anything imports torch
    began = time.perf_counter()
    import torch
    after_torch = time.perf_counter()
    from torch.optim.optimizer import register_optimizer_step_post_hook

    def stop(*_):
        print((time.perf_counter() - began) / (after_torch - began), flush=True)
        os._exit(0)

    register_optimizer_step_post_hook(stop)
    if len(sys.argv) == 2:
        layer = torch.nn.Linear(4, 1)
        optimizer = torch.optim.AdamW(layer.parameters())
        layer(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    sys.stdout, stdout = open(os.devnull, "w"), sys.stdout
    import train
    print = lambda *words, **_: stdout.write(f"{words[0]}\n") and stdout.flush()
    train.main(["--task", "ocec", "--lr", "2e-4", "--epochs", "1", "--data", sys.argv[2], "--out", sys.argv[3]])

import numpy as np
import torch
import torch.nn.functional as F

import data
import ema
import models
import train


def network():
    torch.manual_seed(0)
    return models.EyeNet((32, 64), block="baseline", channels=64, blocks=8)


def compare(title, rounds, unit):
    """Medians of {name: [values]}, and of their ratios to the first within a round."""
    print(title)
    first = next(iter(rounds.values()))
    for name, values in rounds.items():
        ratio = statistics.median(its / our for its, our in zip(values, first))
        print(f"    {name:<26} {statistics.median(values) * 1000:9.3f} {unit}   {ratio:5.2f} x", flush=True)


def compare_averages():
    for name in "timm", "timm.utils":  # their __init__ import torchvision, which must fit the build of torch; the average does not need it
        sys.modules[name] = importlib.util.module_from_spec(importlib.util.find_spec(name))
    from ema_pytorch import EMA as EMAPytorch
    from timm.utils.model_ema import ModelEmaV3
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    train.tune_allocator()
    model = network()
    averages = {"ours": ema.EMA(model, 0.99, warmup=False), "timm ModelEmaV3": ModelEmaV3(model, decay=0.99),
                "timm, foreach=False": ModelEmaV3(model, decay=0.99, foreach=False),
                "torch AveragedModel, foreach": AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True),
                "torch AveragedModel": AveragedModel(model, avg_fn=lambda a, p, n: 0.99 * a + 0.01 * p, use_buffers=True),
                "ema-pytorch": EMAPytorch(model, beta=0.99, update_every=1, update_after_step=-1, inv_gamma=1e-9, power=100.0)}
    updates = {name: (each.update_parameters if "Averaged" in name else each.update) if name != "ema-pytorch" else
               lambda model, each=each: each.update() for name, each in averages.items()}
    for update in updates.values():
        update(model)  # some take their first copy here
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    rounds = {name: [] for name in averages}
    for i in range(6):
        for name, update in updates.items():
            start = time.perf_counter()
            for _ in range(200):
                update(model)
            rounds[name].append((time.perf_counter() - start) / 200)
        if i == 0:
            found = {name: torch.cat([p.detach().flatten() for p in (each.ema_model if name == "ema-pytorch" else
                                                                     each.module).parameters()])
                     for name, each in averages.items()}
            if worst := [name for name, p in found.items() if (p - found["ours"]).abs().max() > 1e-4]:
                sys.exit(f"not the average of ours: {worst}")
    compare(f"EMA of {models.count_parameters(model):,} parameters", rounds, "ms")


KINDS = {"ours": "channels_last tuned fused", "plain": "", "plain, allocator tuned": "tuned", "plain, channels_last": "channels_last",
         "plain, AdamW fused": "fused"}


def train_steps(settings):
    """Prints the median seconds of a step and the first loss."""
    if "tuned" in settings:
        train.tune_allocator()
    model = network().train()
    if "channels_last" in settings:
        model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, **({"fused": True} if "fused" in settings else {}))
    images, labels, _, _ = data.synthetic_eyes(256, size=(32, 64))
    inputs, targets, seconds, losses = (images.float() - 127.5) / 127.5, torch.from_numpy(labels).float(), [], []
    for _ in range(8):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(model(inputs), targets)
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        losses.append(float(loss.detach()))
    print(statistics.median(seconds[2:]), losses[0])


def child(*words):
    done = subprocess.run([sys.executable, "-W", "ignore", __file__, *words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return [float(word) for word in done.stdout.split()]


def compare_steps():
    rounds = {name: [] for name in KINDS}
    for _ in range(3):
        found = {name: child("steps", settings) for name, settings in KINDS.items()}
        for name, (seconds, loss) in found.items():
            rounds[name].append(seconds)
            if abs(loss / found["ours"][1] - 1) > 1e-3:
                sys.exit(f"{name}: loss {loss}, ours {found['ours'][1]}")
    compare("step of ocec, 64 x 8, batch 256, float32", rounds, "ms")


def compare_starts():
    with tempfile.TemporaryDirectory() as folder:
        images, labels, _, _ = data.synthetic_eyes(100)
        np.savez(f"{folder}/eyes.npz", images=images.permute(0, 2, 3, 1).numpy(), labels=labels)
        found = [(child("start", f"{folder}/eyes.npz", f"{folder}/{i}")[0], child("start")[0]) for i in range(7)]
    ours, least = (statistics.median(column) for column in zip(*found))
    print(f"first step, of import torch: train.py {ours:.2f}, one linear layer and AdamW {least:.2f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["steps"]:
        train_steps(sys.argv[2])
    else:
        print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), load {os.getloadavg()[0]:.1f}")
        compare_averages()
        compare_steps()
        compare_starts()
