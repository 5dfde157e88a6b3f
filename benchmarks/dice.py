"""Time and memory of cross-entropy plus Dice with gradient: ce_dice_loss, MONAI, Pytorch-UNet.

    $ pip install monai
    $ OMP_NUM_THREADS=1 python benchmarks/dice.py    # 14 minutes
    $ python benchmarks/dice.py --quick              # tiny, without MONAI

Every time is that of forward and backward. Each contestant has a process of its own and times the
median of three passes after one; they take turns, three rounds; a ratio is taken within a round.
All have the same allocator: glibc's default, or tuned by processes.tune_allocator as in train.py.
Memory: peak minus the peak before the loss, over the size of the logits; their gradient (1.0) is
part of it. The losses must agree. Pytorch-UNet's Dice pools images and classes, which hardly
changes it on these targets, where all classes are equally frequent.

Last result, torch 2.13.0+cpu, MONAI 1.6.1, 2 cores of an AMD EPYC with AVX2, 1 thread, load 0.5 at
the start and 1 to 2 later:

                                                    ours      MONAI   Pytorch-UNet   memory
    default  8 x 19 x 512 x 512  contiguous       0.791 s    1.86 x         2.43 x    3.6  5.0   5.0
    default  8 x 19 x 512 x 512  channels_last    1.389 s    1.51 x         1.97 x    2.7  4.1   4.1
    default  8 x 2 x 512 x 512   contiguous       0.103 s    0.91 x         1.25 x    8.5  9.0  10.0
    default  8 x 2 x 512 x 512   channels_last    0.115 s    0.84 x         0.93 x    8.1  8.0  13.0
    default  8 x 4 x 512 x 512   contiguous       0.275 s    1.48 x         2.06 x    5.8  5.0   5.0
    default  8 x 4 x 512 x 512   channels_last    0.219 s    1.98 x         2.08 x    5.5  4.5   4.5
    tuned    8 x 19 x 512 x 512  contiguous       0.296 s    1.75 x         2.87 x    5.6 10.0  11.0
    tuned    8 x 19 x 512 x 512  channels_last    0.646 s    1.53 x         2.30 x    7.0 10.0  13.0
    tuned    8 x 2 x 512 x 512   contiguous       0.101 s    0.89 x         0.92 x    8.4  9.0  11.0
    tuned    8 x 2 x 512 x 512   channels_last    0.107 s    0.88 x         1.23 x    8.5 10.0  12.0
    tuned    8 x 4 x 512 x 512   contiguous       0.116 s    1.09 x         1.54 x    7.4  8.0  11.0
    tuned    8 x 4 x 512 x 512   channels_last    0.135 s    1.16 x         1.74 x    7.2 10.0  11.0
"""

import importlib.metadata
import os
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from _quick import median_ratio, new_parser, parse, processor, require, run_python
import losses
from runtime import processes

TOLERANCES = {"ours": 0.0, "MONAI": 1e-5, "Pytorch-UNet": 1e-2}  # of the loss
SHAPES = (8, 19, 512, 512), (8, 2, 512, 512), (8, 4, 512, 512)
LAYOUTS = "contiguous", "channels_last"


def our_loss(logits, targets):
    return losses.ce_dice_loss(logits, targets, absent="count")[0]


def unet_loss(logits, targets):
    p = logits.softmax(1).flatten(0, 1)
    t = F.one_hot(targets, logits.shape[1]).permute(0, 3, 1, 2).float().flatten(0, 1)
    dice = (2 * (p * t).sum() + 1e-6) / (p.sum() + t.sum() + 1e-6)
    return F.cross_entropy(logits, targets) + 1.5 * (1 - dice)


def monai_loss():
    from monai.losses import DiceCELoss

    loss_fn = DiceCELoss(softmax=True, to_onehot_y=True, lambda_dice=1.5, lambda_ce=1.0,
                         smooth_nr=1e-5, smooth_dr=1e-5)
    return lambda logits, targets: loss_fn(logits, targets.unsqueeze(1))


def peak_memory():
    """Peak resident memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(name, allocator, layout, shape):
    """In a process of its own: print loss, seconds, memory over the logits."""
    if allocator == "tuned":
        processes.tune_allocator()
    loss_fn = monai_loss() if name == "MONAI" else our_loss if name == "ours" else unet_loss
    generator = torch.Generator().manual_seed(0)
    small = torch.randn(2, shape[1], 16, 16, generator=generator, requires_grad=True)
    # loads the libraries and starts the threads
    loss_fn(small, torch.zeros(2, 16, 16, dtype=torch.long)).backward()
    logits = torch.randn(shape, generator=generator)
    if layout == "channels_last":
        logits = logits.to(memory_format=torch.channels_last)
    logits.requires_grad_()
    targets = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
    before, seconds = peak_memory(), []
    for _ in range(4):
        logits.grad = None
        start = time.perf_counter()
        loss = loss_fn(logits, targets)
        loss.backward()
        seconds.append(time.perf_counter() - start)
    memory = (peak_memory() - before) / (logits.numel() * 4)
    print(loss.item(), statistics.median(seconds[1:]), memory)


def compare(allocator, layout, shape, names, rounds):
    """Measure the named losses in turn, in a process each; print a line of medians."""
    values = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            printed = run_python(__file__, "measure", name, allocator, layout, *map(str, shape))
            values[name].append([float(word) for word in printed.split()])
            loss, ours = values[name][-1][0], values["ours"][-1][0]
            if not abs(loss / ours - 1) <= TOLERANCES[name]:
                sys.exit(f"{name}: loss {loss}, ours {ours}")
    columns = {name: list(zip(*values[name])) for name in names}
    ours = columns["ours"][1]
    cells = [f"{statistics.median(ours):8.3f} s"]
    cells += [f"{median_ratio(columns[name][1], ours):12.2f} x" for name in names[1:]]
    cells += [f"{statistics.median(columns[name][2]):6.1f}" for name in names]
    print(f"{allocator:<9}{' x '.join(map(str, shape)):<20}{layout:<13}", *cells, flush=True)


def main():
    args = parse(new_parser(__doc__))
    names, shapes, rounds = ("ours", "MONAI", "Pytorch-UNet"), SHAPES, 3
    if args.quick:
        names, shapes, rounds = ("ours", "Pytorch-UNet"), [(2, 4, 64, 64)], 1
        print("skipped: MONAI")
    else:
        require("pip install monai", "monai")
        print(f"MONAI {importlib.metadata.version('monai')}", end=", ")
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {processor()}, "
          f"{os.environ.get('OMP_NUM_THREADS', 'all')} thread(s), load {os.getloadavg()[0]:.1f}")
    print(f"{'':42}{names[0]:>10}", *(f"{name:>14}" for name in names[1:]), "  memory, same order")
    for allocator in ("tuned",) if args.quick else ("default", "tuned"):
        for shape in shapes:
            for layout in LAYOUTS:
                compare(allocator, layout, shape, names, rounds)


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(*sys.argv[2:5], [int(word) for word in sys.argv[5:]])
    else:
        main()
