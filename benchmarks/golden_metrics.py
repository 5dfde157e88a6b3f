"""Golden values of the metrics, by scikit-learn, on raw logits full of ties.

    $ pip install scikit-learn && python benchmarks/golden_metrics.py
    $ python benchmarks/golden_metrics.py --quick     # losses.py against the plain versions below

The inputs are built from integers, without a random generator. The numbers are stored in two tests
of tests/test_metrics.py.
"""

import sys
from pathlib import Path

import numpy as np

from _quick import new_parser, parse, require

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import losses

i = np.arange(2000)
labels = (37 * i * i + 11 * i) % 101 < 30            # 30 % positive
scores = ((7919 * i) % 61 - 40 + 20 * labels) / 8.0  # 61 + 20 distinct logits with many ties each
predicted = scores >= 0

targets = 10 + (7 * i % 13) / 4                      # a regression with errors of both signs
predictions = targets + ((5 * i * i) % 17 - 7) / 8


def plain_auroc(scores, labels):
    """Share of the pairs (positive, negative) in the right order; a tie counts one half."""
    positive, negative = scores[labels == 1][:, None], scores[labels == 0]
    return ((positive > negative) + 0.5 * (positive == negative)).mean()


def plain_average_precision(scores, labels):
    """Sum of the precision at each threshold times the recall that it adds."""
    total, recall = 0.0, 0.0
    for threshold in np.unique(scores)[::-1]:
        chosen = scores >= threshold
        hits = np.sum(labels[chosen])
        total += (hits / np.sum(labels) - recall) * hits / np.sum(chosen)
        recall = hits / np.sum(labels)
    return total


def print_golden():
    import sklearn
    from sklearn import metrics

    print("scikit-learn", sklearn.__version__)
    print("auroc    ", repr(float(metrics.roc_auc_score(labels, scores))))
    print("auprc    ", repr(float(metrics.average_precision_score(labels, scores))))
    print("accuracy ", repr(float(metrics.accuracy_score(labels, predicted))))
    print("precision", repr(float(metrics.precision_score(labels, predicted))))
    print("recall   ", repr(float(metrics.recall_score(labels, predicted))))
    print("f1       ", repr(float(metrics.f1_score(labels, predicted))))
    print("tn fp fn tp", metrics.confusion_matrix(labels, predicted).ravel().tolist())
    print("distinct scores", len(np.unique(scores)), "at the threshold", int((scores == 0).sum()))

    print("mae ", repr(float(metrics.mean_absolute_error(targets, predictions))))
    print("rmse", repr(float(metrics.root_mean_squared_error(targets, predictions))))
    print("r2  ", repr(float(metrics.r2_score(targets, predictions))))


def check_against_plain():
    tp, fp = np.sum(predicted & labels), np.sum(predicted & ~labels)
    fn, tn = np.sum(~predicted & labels), np.sum(~predicted & ~labels)
    error = predictions - targets
    plain = {"auroc": plain_auroc(scores, labels), "auprc": plain_average_precision(scores, labels),
             "accuracy": (tp + tn) / len(i), "precision": tp / (tp + fp), "recall": tp / (tp + fn),
             "f1": 2 * tp / (2 * tp + fp + fn), "tp": tp, "fp": fp, "fn": fn, "tn": tn,
             "mae": np.abs(error).mean(), "rmse": np.sqrt((error**2).mean()),
             "r2": 1 - (error**2).mean() / targets.var()}
    ours = losses.binary_report(scores, labels) | losses.regression_report(predictions, targets)
    if ours.keys() != plain.keys():
        sys.exit(f"not the same metrics: {sorted(ours)} and {sorted(plain)}")
    for name, value in plain.items():
        if abs(ours[name] - value) > 1e-12 * abs(value):
            sys.exit(f"{name}: {ours[name]}, the plain version has {value}")
        print(f"{name:<9} {value}")


def main():
    if parse(new_parser(__doc__)).quick:
        check_against_plain()
    else:
        require("pip install scikit-learn", "sklearn")
        print_golden()


if __name__ == "__main__":
    main()
