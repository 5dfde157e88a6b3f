"""Time of metrics over a whole split, against scikit-learn and torchmetrics.

    $ pip install scikit-learn torchmetrics
    $ OMP_NUM_THREADS=1 python benchmarks/metrics.py            # glibc's default allocator
    $ OMP_NUM_THREADS=1 python benchmarks/metrics.py tuned      # processes.tune_allocator, for all
    $ python benchmarks/metrics.py --quick      # few scores and masks, against plain versions

Rankings: 10 million float32 scores in [0, 1], rounded to 5 digits, 27 % positives; exact, without
thresholds. Masks: 100 of 512 x 512, 19 classes, blocks of 16 x 16, 10 % of the predictions random,
1 % of the targets ignored; uint8 as in train.py, int64 as torchmetrics documents. pooled: confusion
matrix and F over all masks (torchmetrics counts twice). per image: F per class and image.

All take turns in one process; a ratio is taken within a round. Results must agree to 1e-9 with
scikit-learn and to 1e-5 with torchmetrics, which sums in float32.

Last result, torch 2.13.0+cpu, scikit-learn 1.9.1, torchmetrics 1.9.0, 2 cores, 1 thread, others at
work (load 2 to 4): time over ours, two runs with each allocator.

                                         scikit-learn                 torchmetrics
                                     default       tuned          default      tuned
    AUROC                            8.1, 9.0   12.3, 13.3       3.8, 4.8     7.4, 7.8
    average precision                4.0, 7.1     9.2, 9.3       3.7, 6.4     7.6, 7.8
    confusion and F pooled, uint8                                9.2, 9.4     8.9, 9.8
    the same, int64                                              4.7, 5.1     4.9, 5.9
    F per image, uint8                                           256, 295     148, 166
    the same, int64                                               85, 115       56, 61
"""

import os
import statistics
import sys
import time

import numpy as np
import torch

from _quick import median_ratio, new_parser, parse, require
import losses
from golden_metrics import plain_auroc, plain_average_precision
from runtime import processes


def largest_difference(a, b):
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


def compare(title, contestants, rounds, tolerances):
    """Run the contestants in turn, check their results against ours, print medians."""
    seconds = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, work in contestants.items():
            start = time.perf_counter()
            results = work()
            seconds[name].append(time.perf_counter() - start)
            if name == "ours":
                ours = results
                continue
            worst = max(largest_difference(a, b) for a, b in zip(ours, results))
            if worst > tolerances[name]:
                sys.exit(f"{title}: {name} differs by {worst:.1e}")
    print(title)
    for name, taken in seconds.items():
        ratio = median_ratio(taken, seconds["ours"])
        print(f"    {name:<13} {statistics.median(taken):8.3f} s   {ratio:6.1f} x", flush=True)


def rankings_of_peers():
    """{metric: {library: function(scores, labels)}}."""
    import torchmetrics.functional.classification as peer
    from sklearn.metrics import average_precision_score, roc_auc_score

    def labels_first(metric):
        return lambda scores, labels: metric(labels, scores)

    def on_tensors(metric):
        return lambda scores, labels: metric(torch.from_numpy(scores), torch.from_numpy(labels))

    return {"AUROC": {"scikit-learn": labels_first(roc_auc_score),
                      "torchmetrics": on_tensors(peer.binary_auroc)},
            "average precision": {"scikit-learn": labels_first(average_precision_score),
                                  "torchmetrics": on_tensors(peer.binary_average_precision)}}


def compare_rankings(others, n=10_000_000):
    """Compare ours with `others`: {metric: {name: function(scores, labels)}}."""
    rng = np.random.default_rng(0)
    labels = (rng.random(n) < 0.27).astype(np.int64)
    scores = np.round(1 / (1 + np.exp(-rng.normal(size=n) - labels)), 5).astype(np.float32)
    ours = {"AUROC": losses.auroc, "average precision": losses.average_precision}
    tolerances = {"scikit-learn": 1e-9, "torchmetrics": 1e-5, "plain": 1e-9}

    def call(function):
        return lambda: [function(scores, labels)]

    for metric, our_function in ours.items():
        contestants = {"ours": call(our_function)}
        for name, function in others[metric].items():
            contestants[name] = call(function)
        compare(f"{metric} of {n:,} scores, {len(np.unique(scores)):,} of them distinct",
                contestants, 5, tolerances)


def f_by_class(confusion):
    """F of each class; as in torchmetrics, 0 if neither targets nor predictions contain it."""
    return np.nan_to_num(losses.f_score_pooled(confusion))


def pooled_and_per_image_of_peer(pairs, classes):
    """pooled() and per_image() of torchmetrics, for pairs of prediction and target."""
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
        scores = [peer.multiclass_f1_score(p[None], t[None], **by_class)[0] for p, t in pairs]
        return [np.stack(scores)]

    return pooled, per_image


def pooled_and_per_image_plainly(pairs, classes):
    """The same two functions in plain numpy."""

    def confusion_of(p, t):
        counts = np.zeros((classes, classes))
        np.add.at(counts, (t[t != 255], p[t != 255]), 1)
        return counts

    def f_of(counts):
        correct = counts.diagonal()
        pixels = counts.sum(0) + counts.sum(1)  # predicted and true pixels of each class
        return np.divide(2 * correct, pixels, out=np.zeros(classes), where=pixels > 0)

    def confusions():
        return [confusion_of(p.numpy(), t.numpy()) for p, t in pairs]

    def pooled():
        counts = sum(confusions())
        return counts, f_of(counts)

    def per_image():
        return [np.stack([f_of(counts) for counts in confusions()])]

    return pooled, per_image


def compare_masks(other, functions_of, dtype, n=100, classes=19):
    """Compare ours with `other`; functions_of(pairs, classes) returns its pooled, per_image."""
    rng = np.random.default_rng(0)
    targets = rng.integers(0, classes, (n, 32, 32)).repeat(16, 1).repeat(16, 2).astype(dtype)
    is_random = rng.random(targets.shape) < 0.1
    random_classes = rng.integers(0, classes, targets.shape)
    predictions = np.where(is_random, random_classes, targets).astype(dtype)
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
            rounds=7, tolerances={other: 1e-5})
    compare(f"F per image, {name}", {"ours": per_image, other: other_per_image},
            rounds=2, tolerances={other: 1e-5})


def main():
    parser = new_parser(__doc__)
    parser.add_argument("allocator", nargs="?", choices=["tuned"], help="tuned: as train.py runs")
    args = parse(parser)
    if args.allocator:
        processes.tune_allocator()
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
