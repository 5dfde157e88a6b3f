"""Metrics of a whole split: AUROC and average precision of 10 million scores with ties beside scikit-learn and torchmetrics (exact, without
thresholds), and confusion matrices with their F of 100 masks of 512 x 512 pixels and 19 classes beside torchmetrics.

    $ pip install scikit-learn torchmetrics
    $ OMP_NUM_THREADS=1 python benchmarks/metrics.py            # the allocator as glibc has it
    $ OMP_NUM_THREADS=1 python benchmarks/metrics.py tuned      # with train.tune_allocator, as train.py runs; for all of them alike
    $ python benchmarks/metrics.py --quick      # few scores and masks, beside plain versions

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

import losses
import train
from _quick import new_parser, parse, require
from golden_metrics import plain_auroc, plain_average_precision


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


def rankings_of_peers():
    """{metric: {library: function(scores, labels)}}"""
    import torchmetrics.functional.classification as peer
    from sklearn.metrics import average_precision_score, roc_auc_score

    def sklearns(metric):
        return lambda scores, labels: metric(labels, scores)

    def torchs(metric):
        return lambda scores, labels: metric(torch.from_numpy(scores), torch.from_numpy(labels))

    return {"AUROC": {"scikit-learn": sklearns(roc_auc_score),
                      "torchmetrics": torchs(peer.binary_auroc)},
            "average precision": {"scikit-learn": sklearns(average_precision_score),
                                  "torchmetrics": torchs(peer.binary_average_precision)}}


def compare_rankings(others, n=10_000_000):
    """`others`: {metric: {name: function(scores, labels)}}."""
    rng = np.random.default_rng(0)
    labels = (rng.random(n) < 0.27).astype(np.int64)
    scores = np.round(1 / (1 + np.exp(-rng.normal(size=n) - labels)), 5).astype(np.float32)
    ours = {"AUROC": losses.auroc, "average precision": losses.average_precision}
    tolerances = {"scikit-learn": 1e-9, "torchmetrics": 1e-5, "plain": 1e-9}
    for metric, our in ours.items():
        contestants = {"ours": lambda our=our: [our(scores, labels)]}
        for name, other in others[metric].items():
            contestants[name] = lambda other=other: [other(scores, labels)]
        compare(f"{metric} of {n:,} scores, {len(np.unique(scores)):,} of them distinct",
                contestants, 5, tolerances)


def f_by_class(confusion):
    """F of each class, 0 where neither truth nor prediction holds it, as torchmetrics says."""
    return np.nan_to_num(losses.f_score_pooled(confusion))


def pooled_and_per_image_of_peer(pairs, classes):
    """What torchmetrics needs for the two comparisons below."""
    import torchmetrics.functional.classification as peer
    from torchmetrics.classification import MulticlassF1Score

    options = dict(num_classes=classes, ignore_index=255, validate_args=False)

    def pooled():
        f = MulticlassF1Score(average="none", **options)
        for p, t in pairs:
            f.update(p[None], t[None])
        return sum(peer.multiclass_confusion_matrix(p, t, **options) for p, t in pairs), f.compute()

    def per_image():
        by_class = dict(average="none", multidim_average="samplewise", **options)
        return [np.stack([peer.multiclass_f1_score(p[None], t[None], **by_class)[0]
                          for p, t in pairs])]

    return pooled, per_image


def pooled_and_per_image_plainly(pairs, classes):
    """The same in numpy, and class by class."""

    def confusion_of(p, t):
        counts = np.zeros((classes, classes))
        np.add.at(counts, (t[t != 255], p[t != 255]), 1)
        return counts

    def f_of(counts):
        right = counts.diagonal()
        both = counts.sum(0) + counts.sum(1)  # predicted and true pixels of each class
        return np.divide(2 * right, both, out=np.zeros(classes), where=both > 0)

    def confusions():
        return [confusion_of(p.numpy(), t.numpy()) for p, t in pairs]

    def pooled():
        counts = sum(confusions())
        return counts, f_of(counts)

    def per_image():
        return [np.stack([f_of(counts) for counts in confusions()])]

    return pooled, per_image


def compare_masks(other, functions_of, dtype, n=100, classes=19):
    """`functions_of` gives the two functions of the `other`, for pairs of prediction and target."""
    rng = np.random.default_rng(0)
    targets = rng.integers(0, classes, (n, 32, 32)).repeat(16, 1).repeat(16, 2).astype(dtype)
    predictions = np.where(rng.random(targets.shape) < 0.1, rng.integers(0, classes, targets.shape), targets).astype(dtype)
    targets[rng.random(targets.shape) < 0.01] = 255
    pairs = list(zip(torch.from_numpy(predictions), torch.from_numpy(targets)))

    def confusions():
        return np.stack([losses.confusion_matrix(p, t, classes) for p, t in pairs])

    def pooled():
        confusion = confusions().sum(0)
        return confusion, f_by_class(confusion)

    def per_image():
        return [np.stack([f_by_class(confusion) for confusion in confusions()])]

    other_pooled, other_per_image = functions_of(pairs, classes)
    name = f"{n} masks of 512 x 512, {classes} classes, {np.dtype(dtype)}"
    compare(f"confusion matrix and F pooled, {name}", {"ours": pooled, other: other_pooled},
            7, {other: 1e-5})
    compare(f"F per image, {name}", {"ours": per_image, other: other_per_image},
            2, {other: 1e-5})


def main():
    parser = new_parser(__doc__)
    parser.add_argument("allocator", nargs="?", choices=["tuned"], help="tuned: as train.py runs")
    args = parse(parser)
    if args.allocator:
        train.tune_allocator()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), "
          f"allocator {args.allocator or 'default'} on all sides, load {os.getloadavg()[0]:.1f}")
    if args.quick:
        compare_rankings({"AUROC": {"plain": plain_auroc},
                          "average precision": {"plain": plain_average_precision}}, n=2000)
        compare_masks("plain", pooled_and_per_image_plainly, np.uint8, n=2)
    else:
        require("pip install scikit-learn torchmetrics", "sklearn", "torchmetrics")
        compare_rankings(rankings_of_peers())
        for dtype in (np.uint8, np.int64):
            compare_masks("torchmetrics", pooled_and_per_image_of_peer, dtype)


if __name__ == "__main__":
    main()
