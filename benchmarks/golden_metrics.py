"""Golden values of the metrics: scikit-learn on raw logits full of ties, built from integers so that no RNG is involved.

    pip install scikit-learn && python benchmarks/golden_metrics.py

The numbers stand in test_losses_metrics_equal_scikit_learn_on_tied_logits and test_losses_regression_report_equals_scikit_learn.
"""

import numpy as np
import sklearn
from sklearn import metrics

i = np.arange(2000)
labels = (37 * i * i + 11 * i) % 101 < 30                              # 30 % positive
scores = ((7919 * i) % 61 - 40 + 20 * labels) / 8.0                    # 61 + 20 distinct logits, each tied many times
predicted = scores >= 0

print("scikit-learn", sklearn.__version__)
print("auroc    ", repr(float(metrics.roc_auc_score(labels, scores))))
print("auprc    ", repr(float(metrics.average_precision_score(labels, scores))))
print("accuracy ", repr(float(metrics.accuracy_score(labels, predicted))))
print("precision", repr(float(metrics.precision_score(labels, predicted))))
print("recall   ", repr(float(metrics.recall_score(labels, predicted))))
print("f1       ", repr(float(metrics.f1_score(labels, predicted))))
print("tn fp fn tp", metrics.confusion_matrix(labels, predicted).ravel().tolist())
print("distinct scores", len(np.unique(scores)), "at the threshold", int((scores == 0).sum()))

targets = 10 + (7 * i % 13) / 4                                        # a regression with errors of both signs
predictions = targets + ((5 * i * i) % 17 - 7) / 8
print("mae ", repr(float(metrics.mean_absolute_error(targets, predictions))))
print("rmse", repr(float(metrics.root_mean_squared_error(targets, predictions))))
print("r2  ", repr(float(metrics.r2_score(targets, predictions))))
