"""Cross-entropy plus Dice, forward and backward: time and memory of ce_dice_loss beside MONAI's DiceCELoss, F.cross_entropy with the
DiceLoss of segmentation-models-pytorch (smp), and a one-hot version.

    $ pip install monai && pip install --no-deps segmentation-models-pytorch    # its torchvision would replace torch by a newer one
    $ OMP_NUM_THREADS=1 python benchmarks/dice.py                               # 8 x 19 x 512 x 512
    $ OMP_NUM_THREADS=1 python benchmarks/dice.py 2 19 256 256
    $ python benchmarks/dice.py --quick         # tiny, beside the one-hot version alone

Each contestant runs in a process of its own: the second of two passes is timed, memory is the peak of the whole process minus its
peak before the loss, as a multiple of the logits (their gradient, 1.0, is part of it). The contestants take turns, three rounds;
the median is printed, of the ratios too, which are taken within a round. All this with three allocators, the same for all of them:
returned, where freed memory goes back at once (MALLOC_MMAP_THRESHOLD_), so that the peak is what is needed at one time; default, as
glibc has it; and tuned, as train.py runs (train.tune_allocator).

The losses agree but for smp's: its Dice pools the batch, which is 5e-7 here, and takes the overlap from differences of float32 sums,
which is 4e-5; in float64 it equals dice_loss(per="batch").

Last result, torch 2.13.0+cpu, MONAI 1.6.1, smp 0.6.0, 2 cores, 1 thread, a machine that others use as well (load 1). A run on another day
(load 3) gave 2.8, 2.6 and 2.7 x of MONAI, 4.4, 4.5 and 5.4 x of smp; with 2 threads 1.9, 2.2 and 4.3 x, and 1.1 in memory but 2.1 tuned.

    allocator returned
        ce_dice_loss  loss 4.82372    0.510 s    1.00 x ce_dice_loss   peak  1.09 x logits
        monai         loss 4.82372    1.102 s    1.89 x ce_dice_loss   peak  5.00 x logits
        smp           loss 4.82366    1.714 s    3.32 x ce_dice_loss   peak  7.00 x logits
        one-hot       loss 4.82372    1.953 s    3.21 x ce_dice_loss   peak  5.00 x logits
    allocator default
        ce_dice_loss  loss 4.82372    0.381 s    1.00 x ce_dice_loss   peak  1.10 x logits
        monai         loss 4.82372    1.008 s    2.85 x ce_dice_loss   peak  5.00 x logits
        smp           loss 4.82366    1.854 s    4.66 x ce_dice_loss   peak  7.00 x logits
        one-hot       loss 4.82372    1.857 s    4.26 x ce_dice_loss   peak  5.00 x logits
    allocator tuned
        ce_dice_loss  loss 4.82372    0.335 s    1.00 x ce_dice_loss   peak  1.09 x logits
        monai         loss 4.82372    1.033 s    3.08 x ce_dice_loss   peak  9.00 x logits
        smp           loss 4.82366    1.109 s    3.25 x ce_dice_loss   peak 11.00 x logits
        one-hot       loss 4.82372    1.141 s    3.45 x ce_dice_loss   peak  9.00 x logits

What is left, tuned, about 0.24 s alone on a core: exp 0.08, twice as the softmax is not kept; maximum, difference and sum 0.07;
gathers and sums by class 0.05; the gradient written 0.03. Default: 0.08 more, in which the kernel hands out its pages.
"""

import importlib.util
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from _quick import new_parser, parse, require

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
TOLERANCES = {"ce_dice_loss": 0.0, "monai": 1e-5, "smp": 1e-4, "one-hot": 1e-5}  # of the loss


def contestant(name):
    import torch
    import torch.nn.functional as F

    import losses

    def one_hot(logits, targets):
        p, t = logits.softmax(1), F.one_hot(targets, logits.shape[1]).movedim(-1, 1).float()
        dice = (2 * (p * t).sum((2, 3)) + 1e-5) / (p.sum((2, 3)) + t.sum((2, 3)) + 1e-5)
        return F.cross_entropy(logits, targets) + 1.5 * (1 - dice).mean()

    if name == "monai":
        from monai.losses import DiceCELoss
        monai = DiceCELoss(softmax=True, to_onehot_y=True, lambda_ce=1.0, lambda_dice=1.5, smooth_nr=1e-5, smooth_dr=1e-5)
    if name == "smp":
        # Its __init__ imports timm and torchvision, which must fit the build of torch; the losses need torch and numpy alone.
        # So the package stands here without having been run. Its Dice halves the sums, hence half the smoothing.
        package = importlib.util.module_from_spec(importlib.util.find_spec("segmentation_models_pytorch"))
        sys.modules[package.__name__] = package
        from segmentation_models_pytorch.losses import DiceLoss
        smp = DiceLoss("multiclass", smooth=5e-6)
    return {"ce_dice_loss": lambda logits, targets: losses.ce_dice_loss(logits, targets, absent="count")[0], "one-hot": one_hot,
            "monai": lambda logits, targets: monai(logits, targets.unsqueeze(1)),
            "smp": lambda logits, targets: F.cross_entropy(logits, targets) + 1.5 * smp(logits, targets)}[name]


def measure(name, allocator, shape):
    """Prints loss, seconds of the second pass, peak memory over the logits; run in a process of its own."""
    import torch

    if allocator == "tuned":
        import train
        train.tune_allocator()
    loss_fn = contestant(name)
    generator = torch.Generator().manual_seed(0)
    small = torch.randn(2, shape[1], 16, 16, generator=generator, requires_grad=True)
    loss_fn(small, torch.zeros(2, 16, 16, dtype=torch.long)).backward()  # libraries and thread pools are loaded
    logits = torch.randn(shape, generator=generator, requires_grad=True)
    targets = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    before = peak()
    for _ in range(2):
        logits.grad = None
        start = time.perf_counter()
        loss = loss_fn(logits, targets)
        loss.backward()
        seconds = time.perf_counter() - start
    print(float(loss), seconds, (peak() - before) / (logits.numel() * 4))


def compare(allocator, names, shape, rounds):
    """Each of the names in turn in a process of its own; prints medians."""
    values = {name: [] for name in names}
    settings = {"MALLOC_MMAP_THRESHOLD_": "4000000"} if allocator == "returned" else {}
    for _ in range(rounds):
        for name in names:
            words = ["measure", name, allocator, *map(str, shape)]
            done = subprocess.run([sys.executable, __file__, *words], capture_output=True,
                                  text=True, env=os.environ | settings)
            if done.returncode:
                sys.exit(done.stderr)
            values[name].append([float(word) for word in done.stdout.split()])
            loss, ours = values[name][-1][0], values["ce_dice_loss"][-1][0]
            if not abs(loss / ours - 1) <= TOLERANCES[name]:
                sys.exit(f"{name}: loss {loss}, ce_dice_loss {ours}")
    print(f"allocator {allocator}")
    for name in names:
        loss, seconds, memory = (statistics.median(column) for column in zip(*values[name]))
        ratio = statistics.median(its[1] / ours[1] for its, ours in  # within a round
                                  zip(values[name], values["ce_dice_loss"]))
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
    for allocator in ("tuned",) if args.quick else ("returned", "default", "tuned"):
        compare(allocator, names, shape, rounds)


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(*sys.argv[2:4], [int(word) for word in sys.argv[4:]])
    else:
        main()
