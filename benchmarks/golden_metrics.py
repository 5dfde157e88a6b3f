"""Golden values of the metrics, by scikit-learn, on raw logits full of ties.

    $ pip install scikit-learn && python benchmarks/golden_metrics.py
    $ python benchmarks/golden_metrics.py --quick     # losses.py against the plain versions below

The inputs are built from integers, without a random generator. The numbers are stored in two tests
of tests/test_metrics.py.
"""

import sys

import numpy as np

from _quick import new_parser, parse, require
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
    for metric in (metrics.roc_auc_score, metrics.average_precision_score):
        print(metric.__name__, float(metric(labels, scores)))
    for metric in (metrics.accuracy_score, metrics.precision_score, metrics.recall_score,
                   metrics.f1_score, metrics.balanced_accuracy_score):
        print(metric.__name__, float(metric(labels, predicted)))
    print("tn fp fn tp", metrics.confusion_matrix(labels, predicted).ravel().tolist())
    print("distinct scores", len(np.unique(scores)), "at the threshold", int((scores == 0).sum()))
    for metric in (metrics.mean_absolute_error, metrics.root_mean_squared_error, metrics.r2_score):
        print(metric.__name__, float(metric(targets, predictions)))


def check_against_plain():
    tp, fp = np.sum(predicted & labels), np.sum(predicted & ~labels)
    fn, tn = np.sum(~predicted & labels), np.sum(~predicted & ~labels)
    error = predictions - targets
    plain = {"auroc": plain_auroc(scores, labels), "auprc": plain_average_precision(scores, labels),
             "accuracy": (tp + tn) / len(i), "precision": tp / (tp + fp), "recall": tp / (tp + fn),
             "f1": 2 * tp / (2 * tp + fp + fn), "specificity": tn / (tn + fp),
             "balanced_accuracy": (tp / (tp + fn) + tn / (tn + fp)) / 2,
             "tp": tp, "fp": fp, "fn": fn, "tn": tn,
             "mae": np.abs(error).mean(), "rmse": np.sqrt((error**2).mean()),
             "r2": 1 - (error**2).mean() / targets.var()}
    ours = losses.binary_report(scores, labels) | losses.regression_report(predictions, targets)
    if ours.keys() != plain.keys():
        sys.exit(f"not the same metrics: {sorted(ours)} and {sorted(plain)}")
    for name, value in plain.items():
        if abs(ours[name] - value) > 1e-12 * abs(value):
            sys.exit(f"{name}: {ours[name]}, the plain version has {value}")
        print(f"{name:<17} {value}")


def main():
    if parse(new_parser(__doc__)).quick:
        check_against_plain()
    else:
        require("pip install scikit-learn", "sklearn")
        print_golden()


if __name__ == "__main__":
    main()
