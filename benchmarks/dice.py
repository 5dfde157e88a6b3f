"""Time and memory of cross-entropy plus Dice with gradient: ce_dice_loss and its peers.

    $ pip install monai
    $ pip install --no-deps segmentation-models-pytorch    # its torchvision would replace torch
    $ OMP_NUM_THREADS=1 python benchmarks/dice.py          # 8 x 19 x 512 x 512
    $ OMP_NUM_THREADS=1 python benchmarks/dice.py 2 19 256 256
    $ python benchmarks/dice.py --quick                    # tiny; one-hot version only

Each contestant has a process of its own; the second of two passes is timed. Memory: peak minus the
peak before the loss, over the size of the logits; their gradient (1.0) is part of it. They take
turns, three rounds; a ratio is taken within a round. Allocators, the same for all:
    returned   freed memory goes back at once (MALLOC_MMAP_THRESHOLD_): the peak is the need
    default    glibc's default
    tuned      processes.tune_allocator, as in train.py

The losses agree, except smp's: its Dice pools the batch (5e-7 here) and takes the overlap from
differences of float32 sums (4e-5); in float64 it equals dice_loss(per="batch").

Last result, torch 2.13.0+cpu, MONAI 1.6.1, smp 0.6.0, 2 cores, 1 thread, load 1: seconds, ratio to
ce_dice_loss, peak over the logits.

                    returned                 default                  tuned
    ce_dice_loss    0.510 s  1.00 x  1.09    0.381 s  1.00 x  1.10    0.335 s  1.00 x   1.09
    monai           1.102 s  1.89 x  5.00    1.008 s  2.85 x  5.00    1.033 s  3.08 x   9.00
    smp             1.714 s  3.32 x  7.00    1.854 s  4.66 x  7.00    1.109 s  3.25 x  11.00
    one-hot         1.953 s  3.21 x  5.00    1.857 s  4.26 x  5.00    1.141 s  3.45 x   9.00
"""

import importlib.util
import os
import resource
import statistics
import sys
import time

import torch
import torch.nn.functional as F

from _quick import new_parser, parse, require, run_python
import losses
from runtime import processes

TOLERANCES = {"ce_dice_loss": 0.0, "monai": 1e-5, "smp": 1e-4, "one-hot": 1e-5}  # of the loss


def our_loss(logits, targets):
    return losses.ce_dice_loss(logits, targets, absent="count")[0]


def one_hot_loss(logits, targets):
    p = logits.softmax(1)
    t = F.one_hot(targets, logits.shape[1]).movedim(-1, 1).float()
    dice = (2 * (p * t).sum((2, 3)) + 1e-5) / (p.sum((2, 3)) + t.sum((2, 3)) + 1e-5)
    return F.cross_entropy(logits, targets) + 1.5 * (1 - dice).mean()


def monai_loss():
    from monai.losses import DiceCELoss

    dice_ce = DiceCELoss(softmax=True, to_onehot_y=True, lambda_ce=1.0, lambda_dice=1.5,
                         smooth_nr=1e-5, smooth_dr=1e-5)
    return lambda logits, targets: dice_ce(logits, targets.unsqueeze(1))


def smp_loss():
    # The package is registered without running its __init__: that imports timm and torchvision,
    # which must fit the build of torch. The losses need torch and numpy alone.
    spec = importlib.util.find_spec("segmentation_models_pytorch")
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    from segmentation_models_pytorch.losses import DiceLoss

    dice = DiceLoss("multiclass", smooth=5e-6)  # it halves the sums, hence half the smoothing
    return lambda logits, targets: F.cross_entropy(logits, targets) + 1.5 * dice(logits, targets)


def contestant(name):
    """function(logits, targets) of a name; a peer is imported only in the process that needs it."""
    if name == "monai":
        return monai_loss()
    if name == "smp":
        return smp_loss()
    return one_hot_loss if name == "one-hot" else our_loss


def peak_memory():
    """Peak resident memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(name, allocator, shape):
    """In a process of its own: print loss, seconds of the second pass, memory over the logits."""
    if allocator == "tuned":
        processes.tune_allocator()
    loss_fn = contestant(name)
    generator = torch.Generator().manual_seed(0)
    small = torch.randn(2, shape[1], 16, 16, generator=generator, requires_grad=True)
    # loads the libraries and starts the threads
    loss_fn(small, torch.zeros(2, 16, 16, dtype=torch.long)).backward()
    logits = torch.randn(shape, generator=generator, requires_grad=True)
    targets = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
    before = peak_memory()
    for _ in range(2):
        logits.grad = None
        start = time.perf_counter()
        loss = loss_fn(logits, targets)
        loss.backward()
        seconds = time.perf_counter() - start
    print(float(loss), seconds, (peak_memory() - before) / (logits.numel() * 4))


def compare(allocator, names, shape, rounds):
    """Measure the named losses in turn, in a process each; print medians."""
    values = {name: [] for name in names}
    settings = {"MALLOC_MMAP_THRESHOLD_": "4000000"} if allocator == "returned" else {}
    for _ in range(rounds):
        for name in names:
            words = ["measure", name, allocator, *map(str, shape)]
            printed = run_python(__file__, *words, **settings)
            values[name].append([float(word) for word in printed.split()])
            loss, ours = values[name][-1][0], values["ce_dice_loss"][-1][0]
            if not abs(loss / ours - 1) <= TOLERANCES[name]:
                sys.exit(f"{name}: loss {loss}, ce_dice_loss {ours}")
    print(f"allocator {allocator}")
    for name in names:
        loss, seconds, memory = (statistics.median(column) for column in zip(*values[name]))
        pairs = zip(values[name], values["ce_dice_loss"])  # of a round
        ratio = statistics.median(peer[1] / ours[1] for peer, ours in pairs)
        print(f"    {name:<13} loss {loss:.5f}   {seconds:6.3f} s   {ratio:5.2f} x ce_dice_loss   "
              f"peak {memory:5.2f} x logits", flush=True)


def main():
    parser = new_parser(__doc__)
    parser.add_argument("shape", nargs="*", type=int, default=[8, 19, 512, 512],
                        help="images, classes, rows, columns (default: 8 19 512 512)")
    args = parse(parser)
    names, shape, rounds = ("ce_dice_loss", "monai", "smp", "one-hot"), args.shape, 3
    if args.quick:
        names, shape, rounds = ("ce_dice_loss", "one-hot"), [2, 19, 64, 64], 1
    elif len(shape) != 4:
        parser.error(f"{len(shape)} numbers: give images, classes, rows and columns")
    else:
        require("pip install monai && pip install --no-deps segmentation-models-pytorch",
                "monai", "segmentation_models_pytorch")
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    print(f"{' x '.join(map(str, shape))}, {threads} thread(s), median of {rounds}, "
          f"load {os.getloadavg()[0]:.1f}")
    allocators = ("tuned",) if args.quick else ("returned", "default", "tuned")
    for allocator in allocators:
        compare(allocator, names, shape, rounds)


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(*sys.argv[2:4], [int(word) for word in sys.argv[4:]])
    else:
        main()
