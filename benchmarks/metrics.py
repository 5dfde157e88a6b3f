"""Metrics of a whole split: AUROC and average precision of 10 million scores with ties beside scikit-learn and torchmetrics (exact, without
thresholds), and confusion matrices with their F of 100 masks of 512 x 512 pixels and 19 classes beside torchmetrics.

    $ pip install scikit-learn torchmetrics
    $ OMP_NUM_THREADS=1 python benchmarks/metrics.py            # the allocator as glibc has it
    $ OMP_NUM_THREADS=1 python benchmarks/metrics.py tuned      # with train.tune_allocator, as train.py runs; for all of them alike

All take turns in one process; medians of the rounds are printed, of the ratios too, which are taken within a round. Scores are float32 in
[0, 1], rounded to 5 digits (torchmetrics puts others through a sigmoid), 27 % positives. Equal means: to 1e-9 for scikit-learn, to 1e-5 for
torchmetrics, which sums in float32; each count of the confusion matrices and each F to 1e-5. Anything else ends the script.

Masks are blocks of 16 x 16 pixels with 10 % of the predictions drawn at random and 1 % of the targets ignored: uint8, as train.py has them,
and int64, as torchmetrics documents them. pooled: the confusion matrix and F of each class over all masks, which torchmetrics counts twice,
mask after mask. per image: one F per class and image (its multidim_average="samplewise"), from one confusion matrix per image.

Last result, torch 2.13.0+cpu, scikit-learn 1.9.1, torchmetrics 1.9.0, 2 cores, 1 thread, others at work beside it (load 2 to 4): ratios of
two runs with the default allocator, and of two with the tuned one. Fresh pages are half of our time with the default one.

                                                    scikit-learn                          torchmetrics
    AUROC                                      8.1, 9.0     12.3, 13.3             3.8, 4.8        7.4, 7.8
    average precision                          4.0, 7.1      9.2, 9.3              3.7, 6.4        7.6, 7.8
    confusion matrix and F pooled, uint8                                           9.2, 9.4        8.9, 9.8
    the same, int64                                                                4.7, 5.1        4.9, 5.9
    F per image, uint8                                                             256, 295        148, 166
    the same, int64                                                                 85, 115          56, 61

What is left of AUROC, tuned, 0.23 s: two sorts of the classes' scores 0.09 (numpy, AVX-512), picking them out 0.09, checks 0.04.
Of one uint8 mask, 0.61 ms alone on a core: np.bincount 0.39 (0.37 if it need not widen the cells; torch.bincount 0.33), zeros under ignored
pixels 0.05, cells 0.05, checks 0.03. Counting two pixels at once, cells of one half of the mask times 361 plus those of the other, takes
0.28 with the sums of its table of 361 x 361: it would make 9 to about 11, only for few classes and large masks. int64 masks are eight
times the memory to read.
"""

import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torchmetrics.functional.classification as peer
from sklearn.metrics import average_precision_score, roc_auc_score
from torchmetrics.classification import MulticlassF1Score

import losses
import train


def compare(title, contestants, rounds, tolerances):
    """Run the contestants in turn, check each against the first, print medians."""
    seconds = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, work in contestants.items():
            start = time.perf_counter()
            found = work()
            seconds[name].append(time.perf_counter() - start)
            if name == "ours":
                ours = found
            elif (worst := max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in zip(ours, found))) > tolerances[name]:
                sys.exit(f"{title}: {name} differs by {worst:.1e}")
    print(title)
    for name, taken in seconds.items():
        ratio = statistics.median(its / our for its, our in zip(taken, seconds["ours"]))
        print(f"    {name:<13} {statistics.median(taken):8.3f} s   {ratio:6.1f} x", flush=True)


def compare_rankings(n=10_000_000):
    rng = np.random.default_rng(0)
    labels = (rng.random(n) < 0.27).astype(np.int64)
    scores = np.round(1 / (1 + np.exp(-rng.normal(size=n) - labels)), 5).astype(np.float32)
    s, y = torch.from_numpy(scores), torch.from_numpy(labels)
    for title, our, sklearns, torchs in (("AUROC", losses.auroc, roc_auc_score, peer.binary_auroc),
                                         ("average precision", losses.average_precision, average_precision_score,
                                          peer.binary_average_precision)):
        compare(f"{title} of {n:,} scores, {len(np.unique(scores)):,} of them distinct",
                {"ours": lambda: [our(scores, labels)], "scikit-learn": lambda: [sklearns(labels, scores)],
                 "torchmetrics": lambda: [torchs(s, y)]}, 5, {"scikit-learn": 1e-9, "torchmetrics": 1e-5})


def f_by_class(confusion):
    """F of each class, 0 where neither truth nor prediction holds it, as torchmetrics says."""
    return np.nan_to_num(losses.f_score_pooled(confusion))


def compare_masks(dtype, n=100, classes=19):
    rng = np.random.default_rng(0)
    targets = rng.integers(0, classes, (n, 32, 32)).repeat(16, 1).repeat(16, 2).astype(dtype)
    predictions = np.where(rng.random(targets.shape) < 0.1, rng.integers(0, classes, targets.shape), targets).astype(dtype)
    targets[rng.random(targets.shape) < 0.01] = 255
    pairs = list(zip(torch.from_numpy(predictions), torch.from_numpy(targets)))
    options = dict(num_classes=classes, ignore_index=255, validate_args=False)
    confusions = lambda: np.stack([losses.confusion_matrix(p, t, classes) for p, t in pairs])

    def pooled():
        confusion = confusions().sum(0)
        return confusion, f_by_class(confusion)

    def peer_pooled():
        f = MulticlassF1Score(average="none", **options)
        for p, t in pairs:
            f.update(p[None], t[None])
        return sum(peer.multiclass_confusion_matrix(p, t, **options) for p, t in pairs), f.compute()

    def peer_per_image():
        f = [peer.multiclass_f1_score(p[None], t[None], average="none", multidim_average="samplewise", **options)[0] for p, t in pairs]
        return [np.stack(f)]

    name = f"{n} masks of 512 x 512, {classes} classes, {np.dtype(dtype)}"
    compare(f"confusion matrix and F pooled, {name}", {"ours": pooled, "torchmetrics": peer_pooled}, 7, {"torchmetrics": 1e-5})
    compare(f"F per image, {name}", {"ours": lambda: [np.stack([f_by_class(each) for each in confusions()])],
                                     "torchmetrics": peer_per_image}, 2, {"torchmetrics": 1e-5})


if __name__ == "__main__":
    tuned = sys.argv[1:] == ["tuned"]
    if tuned:
        train.tune_allocator()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), allocator {'tuned' if tuned else 'default'} on all sides, load "
          f"{os.getloadavg()[0]:.1f}")
    compare_rankings()
    for dtype in (np.uint8, np.int64):
        compare_masks(dtype)
