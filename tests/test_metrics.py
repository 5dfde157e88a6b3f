"""Tests of metrics."""

import json
import math
import tracemalloc
import warnings
from itertools import combinations, product

import numpy as np
import torch
import torch.nn.functional as F
from numpy.testing import assert_allclose

from losses import (
    auroc, auto_pos_weight, average_precision, binary_floor, binary_report, bootstrap_interval,
    bootstrap_ranking, class_report, confusion_matrix, f_score_per_image, f_score_pooled,
    knn_accuracy, knn_predict, lda_fit, linear_scores, logistic_predict, mean_cosine, mean_iou,
    median_frequency_weights, paired_bootstrap, ranking_interval, regression_report, ridge_fit,
    ridge_predict, weighted_ranking)
from tests.helpers import near, refuses, warned


def all_nan(values):
    return all(map(math.isnan, values))


def test_losses_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        low, high = bootstrap_interval(rng.normal(0.7, 0.1, 60), resamples=300)
        hits += low <= 0.7 <= high
    assert 0.91 < hits / 400 < 0.98
    values = rng.normal(0.7, 0.1, 90)
    low, high = bootstrap_interval(values)
    assert near(high - low, 2 * 1.96 * values.std() / math.sqrt(90), 0.1)
    assert low < values.mean() < high and bootstrap_interval(values) == (low, high)
    assert bootstrap_interval([0.3, math.nan, 0.3]) == (0.3, 0.3)
    assert all_nan(bootstrap_interval([math.nan, 0.4]))
    narrow = bootstrap_interval(values, level=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_losses_median_frequency_weights_are_the_root_of_median_over_count():
    for counts in [1, 4, 16], np.array([100, 400, 1600]), torch.tensor([3, 12, 48]):
        weights = median_frequency_weights(counts)
        assert weights.dtype == torch.float32 and weights.tolist() == [2, 1, 0.5]
    weights = median_frequency_weights([1, 4, 12, 16])
    assert_allclose(weights, np.sqrt([8, 2, 8 / 12, 0.5]), rtol=1e-6)


def test_losses_median_frequency_weights_of_a_class_without_pixels_are_one_with_a_warning():
    for counts, missing, want in ([1, 0, 4, 16], [1], [2, 1, 1, 0.5]), ([0, 0], [0, 1], [1, 1]):
        weights, message = warned(lambda: median_frequency_weights(counts))
        assert weights.tolist() == want
        assert message.count("have no pixels") == 1 and f"classes {missing} have" in message
    for counts, text in (([1, -1], "[ 1. -1.]"), ([1, math.nan], "nan"), ([[1, 2]], "(1, 2)"),
                         ([], "(0,)"), (3, "()")):
        refuses(median_frequency_weights, text, counts)


def test_losses_metrics_equal_scikit_learn_on_tied_logits():
    i = np.arange(2000)  # numbers by benchmarks/golden_metrics.py, scikit-learn 1.9.1
    labels = (37 * i * i + 11 * i) % 101 < 30
    scores = ((7919 * i) % 61 - 40 + 20 * labels) / 8.0
    golden = {"accuracy": 0.6565, "balanced_accuracy": 0.6576512592137592,
              "specificity": 922 / 1408, "precision": 0.44583808437856326,
              "recall": 0.660472972972973, "f1": 0.5323349217154527,
              "auroc": 0.7698155808507371, "auprc": 0.6591635468547066,
              "tp": 391, "fp": 486, "fn": 201, "tn": 922}
    report = binary_report(scores, labels)
    assert report.keys() == golden.keys()
    assert all(near(report[key], golden[key], 1e-12) for key in golden)


def tied_scores(seed):
    rng = np.random.default_rng(seed)
    labels = np.append(rng.integers(0, 2, 40), [0, 1])
    return rng.integers(-5, 6, 42) / 4 + labels, labels


def test_losses_auroc_equals_counting_pairs_with_half_for_ties():
    for seed in range(20):
        scores, labels = tied_scores(seed)
        pairs = [(p > n) + 0.5 * (p == n) for p in scores[labels == 1] for n in scores[labels == 0]]
        assert near(auroc(scores, labels), sum(pairs) / len(pairs), 1e-12)


def test_losses_average_precision_equals_the_sum_over_distinct_thresholds():
    for seed in range(20):
        scores, labels = tied_scores(seed)
        area = recall = 0.0
        for threshold in sorted(set(scores), reverse=True):
            picked = labels[scores >= threshold]
            area += (picked.sum() / labels.sum() - recall) * picked.mean()
            recall = picked.sum() / labels.sum()
        assert near(average_precision(scores, labels), area, 1e-12)


def test_losses_metrics_do_not_depend_on_order_container_or_dtype():
    scores, labels = tied_scores(0)  # quarters, exact in every dtype below
    want = binary_report(scores, labels)
    order = np.random.default_rng(1).permutation(len(labels))
    s, y = torch.tensor(scores), torch.tensor(labels)
    for given in ((scores[order], labels[order]), (scores.tolist(), labels.tolist()),
                  (scores[:, None], labels.astype(bool)), (s.float().requires_grad_(), y),
                  (s.bfloat16(), y.bfloat16()), (s[:, None], y[:, None].bool())):
        assert binary_report(*given) == want


def test_losses_auroc_and_ap_keep_apart_what_a_sigmoid_would_tie():
    scores, labels = [40.0, 30.0, 20.0, -math.inf, math.inf], [1, 0, 1, 0, 1]
    assert near(auroc(scores, labels), 5 / 6, 1e-12)
    assert near(average_precision(scores, labels), (1 + 1 + 3 / 4) / 3, 1e-12)
    close = [1.0, 1.0 + 1e-12]  # equal in float32
    assert auroc(close, [0, 1]) == 1.0 and auroc(close, [1, 0]) == 0.0


def test_losses_binary_report_counts_a_score_at_the_threshold_as_positive():
    report = binary_report([0.0, -0.0, -1e-30, 2.0], [1, 0, 1, 1])
    assert [report[key] for key in ("tp", "fp", "fn", "tn")] == [2, 1, 1, 0]
    report = binary_report([0.5, 0.4], [1, 0], threshold=0.5)
    assert report["accuracy"] == report["f1"] == 1.0


def undefined(report):
    return {key for key, value in report.items() if math.isnan(value)}


def test_losses_undefined_metrics_are_nan_and_never_zero():
    everything = {"accuracy", "balanced_accuracy", "specificity", "precision", "recall", "f1",
                  "auroc", "auprc"}
    with warnings.catch_warnings(action="error"):  # NaN is a decision, not a division by zero
        assert undefined(binary_report([-1.0, -2.0], [1, 0])) == {"precision"}
        assert undefined(binary_report([1.0, -2.0], [0, 0])) == {
            "recall", "f1", "auroc", "auprc", "balanced_accuracy"}
        assert undefined(binary_report([1.0, -2.0], [1, 1])) == {
            "specificity", "auroc", "balanced_accuracy"}
        assert undefined(binary_report([], [])) == everything
        assert undefined(binary_floor([0, 0])) == {"f1", "auroc", "auprc"}
        assert undefined(binary_floor([1])) == {"auroc"}
        assert undefined(binary_floor([])) == {"accuracy", "f1", "auroc", "auprc"}
    assert binary_report([-1.0, -2.0], [1, 0])["f1"] == 0  # defined: a positive was missed


def test_losses_metrics_refuse_nan_scores_other_labels_and_other_shapes():
    for metric in auroc, average_precision, binary_report:
        refuses(metric, "2 of 3 scores are NaN", [math.nan, 1.0, math.nan], [0, 1, 1])
        refuses(metric, "0 or 1, got [-1  1]", [0.5, 1.0], [-1, 1])
        refuses(metric, "2 labels", [1.0, 2.0, 3.0], [0, 1])
        refuses(metric, "(2, 2)", np.ones((2, 2)), [0, 1, 0, 1])


def test_losses_binary_floor_is_the_report_of_a_constant_score():
    for positives in range(0, 8):
        labels = np.arange(7) < positives
        floor, always = binary_floor(labels), binary_report(np.zeros(7), labels)
        never = binary_report(np.full(7, -1.0), labels)
        for key in "f1", "auroc", "auprc":
            assert_allclose(floor[key], always[key], rtol=1e-12)
        assert near(floor["accuracy"], max(always["accuracy"], never["accuracy"]), 1e-12)
    assert round(binary_floor([1] * 53 + [0] * 47)["f1"], 3) == 0.693


def test_losses_regression_report_equals_scikit_learn():
    i = np.arange(2000)  # numbers by benchmarks/golden_metrics.py, scikit-learn 1.9.1
    targets = 10 + (7 * i % 13) / 4
    predictions = targets + ((5 * i * i) % 17 - 7) / 8
    report = regression_report(torch.from_numpy(predictions), targets[:, None].tolist())
    assert list(report) == ["mae", "rmse", "r2"]
    for value, golden in zip(report.values(), (0.4339375, 0.5156231060571277, 0.6960647516849647)):
        assert near(value, golden, 1e-12)


def test_losses_regression_report_counts_each_group_once():
    report = regression_report([1.0, 1.0, 1.0, 5.0], [0.0, 0.0, 0.0, 0.0], ["a", "a", "a", "b"])
    assert report["mae"] == 2 and report["group_mae"] == 3
    assert math.isclose(report["group_sd"], math.sqrt(8))
    assert math.isnan(report["r2"])  # constant targets
    assert math.isnan(regression_report([1.0, 2.0], [1.0, 3.0], ["a", "a"])["group_sd"])
    assert all(math.isnan(value) for value in regression_report([], []).values())


def test_losses_regression_report_of_constants_is_what_the_docstring_says():
    targets = np.random.default_rng(0).normal(17, 3, 101)
    mean = regression_report(np.full(101, targets.mean()), targets)
    median = regression_report(np.full(101, np.median(targets)), targets)
    assert abs(mean["r2"]) < 1e-12 and mean["rmse"] < median["rmse"]
    assert median["r2"] < 0 and median["mae"] < mean["mae"]
    assert regression_report([12, 20], [14, 18]) == {"mae": 2, "rmse": 2, "r2": 0}
    tiny = regression_report([0.0, 0.0], [0.0, 1e-200])  # their variance is 0 in float64
    assert math.isnan(tiny["r2"])


def test_losses_regression_report_refuses_what_it_cannot_score():
    refuses(regression_report, "1 of 2 predictions are NaN", [1.0, math.nan], [1.0, 2.0])
    refuses(regression_report, "1 of 2 targets are NaN or inf", [1.0, 1.0], [1.0, math.inf])
    refuses(regression_report, "predictions must be (2,) or (2, 1), got (3,)", [1, 2, 3], [1, 2])
    refuses(regression_report, "predictions must be (2,) or (2, 1), got (2, 2)",
            np.zeros((2, 2)), [1, 2])
    refuses(regression_report, "2 targets need one group each, got 3",
            [1, 2], [1, 2], ["a", "b", "c"])


def label_maps(n=4, classes=5, seed=0):
    """Predictions and targets with void pixels; class 4 is nowhere, others miss on one side."""
    rng = np.random.default_rng(seed)
    predictions, targets = rng.integers(0, classes - 1, (2, n, 8, 9))
    targets[rng.random(targets.shape) < 0.2] = 255
    targets[0][targets[0] == 1] = 0
    predictions[1][predictions[1] == 2] = 0
    return predictions, targets


def slow_scores(prediction, target, classes):
    """The challenge's loop for one image, and (tp, fp, fn) of every class."""
    counts = []
    for c in range(classes):
        pairs = [(p == c, t == c) for p, t in zip(prediction.flat, target.flat) if t != 255]
        counts.append([pairs.count(kind) for kind in ((True, True), (True, False), (False, True))])
    scores = []
    for tp, fp, fn in counts:
        if tp + fn:
            precision, recall = tp / (tp + fp + 1e-7), tp / (tp + fn + 1e-7)
            scores.append(2 * precision * recall / (precision + recall + 1e-7))
    return sum(scores) / len(scores), counts


def test_losses_segmentation_metrics_equal_the_slow_loop():
    for seed in range(5):
        predictions, targets = label_maps(seed=seed)
        stack = np.stack([confusion_matrix(p, t, 5) for p, t in zip(predictions, targets)])
        want = [slow_scores(p, t, 5)[0] for p, t in zip(predictions, targets)]
        assert_allclose(f_score_per_image(stack), want, rtol=1e-12)
        pooled = slow_scores(predictions, targets, 5)[1]
        f = [2 * tp / (2 * tp + fp + fn) if tp + fp + fn else math.nan for tp, fp, fn in pooled]
        assert_allclose(f_score_pooled(stack.sum(0)), f, rtol=1e-12)
        assert math.isnan(f[4]) and not any(map(math.isnan, f[:4]))
        iou = [tp / (tp + fp + fn) for tp, fp, fn in pooled if tp + fp + fn]
        assert near(mean_iou(stack.sum(0)), sum(iou) / len(iou), 1e-12)


def test_losses_confusion_matrix_counts_pairs_with_the_truth_in_rows():
    predictions, targets = label_maps()
    want = np.zeros((5, 5), dtype=np.int64)
    for p, t in zip(predictions.flat, targets.flat):
        if t != 255:
            want[t, p] += 1
    torch_maps = torch.from_numpy(predictions), torch.from_numpy(targets)
    for given in ((predictions, targets), torch_maps, (predictions.tolist(), targets.tolist()),
                  [tensor.to(torch.uint8) for tensor in torch_maps],
                  (predictions[:, ::-1], targets[:, ::-1])):
        got = confusion_matrix(*given, 5)
        assert got.dtype == np.int64 and np.array_equal(got, want)
    assert confusion_matrix([0, 1, 1, 1], [0, 0, 1, 255], 2).tolist() == [[1, 1], [0, 1]]
    void = confusion_matrix([7, 1], [1, 0], 2, ignore_index=1)  # under void: any number
    assert void.tolist() == [[0, 1], [0, 0]]
    assert confusion_matrix([1], [0], 2, ignore_index=None).tolist() == [[0, 1], [0, 0]]
    many = np.full(1000, 299, np.uint16)
    many = confusion_matrix(many, many, 300, ignore_index=None)
    assert many[299, 299] == many.sum() == 1000
    for empty in np.zeros(0, int), []:
        assert not confusion_matrix(empty, empty, 2).any()


def test_losses_confusion_matrix_is_the_same_at_every_number_of_classes_and_type_of_integer():
    rng = np.random.default_rng(0)
    for classes in (1, 2, 19, 127, 181, 182, 250):  # cells of 182 classes do not fit 16 bits
        predictions, targets = rng.integers(0, classes, (2, 500))
        predictions[:9], targets[:9], targets[-50:] = classes - 1, classes - 1, 255
        want = np.zeros((classes, classes), dtype=np.int64)
        np.add.at(want, (targets[:-50], predictions[:-50]), 1)
        for kind in (np.uint8, np.int16, np.uint16, np.int64, np.uint64):
            got = confusion_matrix(predictions.astype(kind), targets.astype(kind), classes)
            assert np.array_equal(got, want), (classes, kind)
    flags = np.array([True, False, True])
    assert confusion_matrix(flags, flags, 2).tolist() == [[1, 0], [0, 2]]
    refuses(confusion_matrix, "targets must be in 0..2, got 3 to 4", [1, 1, 9], [3, 4, 255], 3)


def test_losses_segmentation_scores_by_hand():
    confusion = [[3, 1], [0, 4]]
    assert_allclose(f_score_pooled(confusion), [6 / 7, 8 / 9])
    assert near(mean_iou(confusion), 0.775, 1e-12)
    assert_allclose(f_score_per_image([confusion]), [(6 / 7 + 8 / 9) / 2], rtol=1e-6)
    assert f_score_per_image([confusion])[0] < (6 / 7 + 8 / 9) / 2  # by the challenge's eps
    only_predicted = [[3, 0, 1], [0, 4, 0], [0, 0, 0]]  # class 2: skipped per image, 0 when pooled
    assert_allclose(f_score_per_image([only_predicted]), [(6 / 7 + 1) / 2], rtol=1e-6)
    assert_allclose(f_score_pooled(only_predicted), [6 / 7, 1, 0])
    missed = [[3, 0], [2, 0]]
    assert_allclose(f_score_per_image([missed]), [(6 / 8 + 0) / 2], rtol=1e-6)
    assert mean_iou([[1, 0], [0, 0]]) == 1


def test_losses_segmentation_scores_are_nan_where_undefined_and_never_zero():
    zeros = np.zeros((2, 2))
    with warnings.catch_warnings(action="error"):
        assert (f_score_per_image([zeros, np.eye(2)]) > 0.99).tolist() == [False, True]
        assert np.isnan(f_score_per_image([zeros])).all()
        assert f_score_per_image(np.zeros((0, 2, 2))).shape == (0,)
        assert np.isnan(f_score_pooled(zeros)).all() and math.isnan(mean_iou(zeros))


def test_losses_segmentation_metrics_do_not_depend_on_the_batch_size():
    predictions, targets = label_maps(n=7)
    whole = confusion_matrix(predictions, targets, 5)
    for size in 1, 2, 3, 7:
        starts = range(0, 7, size)
        parts = [confusion_matrix(predictions[i:i + size], targets[i:i + size], 5) for i in starts]
        assert np.array_equal(sum(parts), whole)
    stack = np.stack([confusion_matrix(p, t, 5) for p, t in zip(predictions, targets)])
    alone = np.concatenate([f_score_per_image(stack[i:i + 1]) for i in range(7)])
    assert np.array_equal(f_score_per_image(stack), alone)
    assert np.array_equal(f_score_per_image(torch.from_numpy(stack)), alone)


def test_losses_segmentation_metrics_refuse_what_they_cannot_count():
    matrix = confusion_matrix
    refuses(matrix, "(2, 3) of float32, targets (2, 3) of int64",
            torch.zeros(2, 3), torch.zeros(2, 3).long(), 2)
    refuses(matrix, "predictions (2,) of int64, targets (3,)", [0, 1], [0, 1, 1], 2)
    refuses(matrix, "predictions must be in 0..1, got 0 to 2; ignore_index is 255",
            [0, 2], [0, 1], 2)
    refuses(matrix, "targets must be in 0..1, got -1 to 1", [0, 1], [-1, 1], 2)
    refuses(matrix, "targets must be in 0..1, got 0 to 255; ignore_index is None",
            [0, 1], [0, 255], 2, ignore_index=None)
    shapes = (f_score_per_image, (3, 3)), (f_score_pooled, (4, 3, 3)), (mean_iou, (2, 3))
    for score, shape in shapes:
        refuses(score, str(shape), np.zeros(shape))


def test_losses_class_report_equals_the_slow_loop():
    for seed in range(10):
        rng = np.random.default_rng(seed)
        # Class 4 is predicted and never true, class 5 is neither.
        labels, predictions = rng.integers(0, 4, 50), rng.integers(0, 5, 50)
        report, f1s = class_report(predictions, torch.tensor(labels), 6), []
        for c, got in enumerate(report["classes"]):
            tp, rows = sum((predictions == c) & (labels == c)), sum(labels == c)
            precision, recall = tp / max(sum(predictions == c), 1), tp / rows if rows else math.nan
            f1s.append(2 * precision * recall / (precision + recall) if tp else 0.0)
            assert got["rows"] == rows
            assert near(got["recall"], recall, 1e-12) if rows else math.isnan(got["recall"])
            assert near(got["f1"], f1s[c], 1e-12) if c < 5 else math.isnan(got["f1"])
        assert near(report["accuracy"], np.mean(predictions == labels), 1e-12)
        assert near(report["macro_f1"], np.mean(f1s[:4]), 1e-12)
        assert near(report["weighted_f1"], np.mean([f1s[c] for c in labels]), 1e-12)
        recalls = [row["recall"] for row in report["classes"][:4]]
        assert near(report["balanced_accuracy"], np.mean(recalls), 1e-12)


def test_losses_class_report_by_hand_and_nan_where_undefined():
    report = class_report([0, 1, 1], [0, 0, 1], 2)
    classes = [{"rows": 2, "f1": 2 / 3, "recall": 0.5}, {"rows": 1, "f1": 2 / 3, "recall": 1.0}]
    assert report == {"accuracy": 2 / 3, "balanced_accuracy": 0.75, "macro_f1": 2 / 3,
                      "weighted_f1": 2 / 3, "classes": classes}
    with warnings.catch_warnings(action="error"):
        report = class_report([0, 0, 0, 2], [0, 0, 1, 0], 4)
        classes = report["classes"]
        assert report["macro_f1"] == (2 / 3 + 0) / 2  # class 1 was missed: 0; class 2 is not true
        assert [c["f1"] for c in classes[:3]] == [2 / 3, 0, 0] and classes[3]["rows"] == 0
        assert undefined(classes[2]) == {"recall"} and undefined(classes[3]) == {"f1", "recall"}
        empty = class_report(np.zeros(0, int), np.zeros(0, int), 2)
        assert undefined({key: empty[key] for key in report if key != "classes"}) == {
            "accuracy", "balanced_accuracy", "macro_f1", "weighted_f1"}
    assert class_report([255], [255], 256)["accuracy"] == 1  # no class is ignored
    refuses(class_report, "predictions must be in 0..1, got 0 to 2", [0, 2], [0, 1], 2)
    refuses(class_report, "targets (3,)", [0, 1], [0, 1, 1], 2)


def test_losses_mean_cosine_equals_the_mean_over_pairs():
    for seed in range(5):
        x = np.random.default_rng(seed).normal(size=(7, 3)) + seed
        pairs = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in combinations(x, 2)]
        assert near(mean_cosine(x), np.mean(pairs), 1e-12)
        longer = np.concatenate([x * np.arange(1, 8)[:, None], np.zeros((2, 3))])
        assert near(mean_cosine(longer), np.mean(pairs), 1e-12)
    assert near(mean_cosine([[1, 0], [2, 0], [0, 3]]), 1 / 3, 1e-12)
    assert near(mean_cosine(torch.full((5, 3), 0.1, requires_grad=True)), 1, 1e-12)
    for spread, within in (np.eye(6) - 1 / 6, 1e-12), (torch.eye(6).bfloat16() - 1 / 6, 1e-2):
        assert abs(mean_cosine(spread) + 1 / 5) < within  # the least of 6 rows
    undefined_rows = np.zeros((4, 3)), np.ones((1, 3)), np.zeros((0, 3)), [[0, 0], [1, 1]]
    assert all_nan(map(mean_cosine, undefined_rows))
    refuses(mean_cosine, "2 of 3 rows of features hold NaN", [[1, math.nan], [math.inf, 1], [0, 1]])
    refuses(mean_cosine, "(3,)", [1, 2, 3])


def slow_knn(train, labels, row, k):
    cosines = [float(a @ row / np.linalg.norm(a) / np.linalg.norm(row)) for a in train]
    votes = {}
    for cosine, label in sorted(zip(cosines, labels), reverse=True)[:k]:
        votes.setdefault(label, []).append(cosine)
    return max(votes, key=lambda label: (len(votes[label]), sum(votes[label])))


def test_losses_knn_equals_the_slow_loop():
    seen = 0
    for seed, k in product(range(5), (1, 2, 5, 30)):
        rng = np.random.default_rng(seed)
        train, labels = rng.normal(size=(30, 4)), rng.integers(0, 6, 30) * 3 - 4
        rows = rng.normal(size=(40, 4)) * 7
        want = [slow_knn(train, labels, row, k) for row in rows]
        tensors = [torch.tensor(array) for array in (train, labels, rows)]
        tensors[2].requires_grad_()
        for given in (train, labels, rows), tensors:
            got = knn_predict(*given, k=k)
            assert got.dtype == np.int64 and got.tolist() == want
        truth = rng.integers(0, 6, 40) * 3 - 4
        assert knn_accuracy(train, labels, rows, truth, k=k) == np.mean(truth == want)
        if k == 5:
            assert knn_predict(train, labels, rows).tolist() == want
            assert knn_accuracy(train, labels, rows, want) == 1
        seen += len(set(want))
    assert seen > 60


def test_losses_knn_breaks_ties_by_the_sum_of_cosines_and_then_by_the_smallest_label():
    angles = np.radians([5, 50, 10, 30, 90])  # classes 1, 1, 0, 0, 2 around the query at 0 degrees
    train, labels = np.stack([np.cos(angles), np.sin(angles)], 1), np.array([1, 1, 0, 0, 2])
    # k = 4: two votes each; cos 10 + cos 30 > cos 5 + cos 50
    assert [knn_predict(train, labels, [[2, 0]], k=k).item() for k in (1, 2, 4)] == [1, 1, 0]
    assert knn_predict([[1, 0], [0, 1]], [8, 5], [[1, 1]], k=2) == 5
    tenths = np.array([0.1, 0.2, 0.3, 0.3, 0.2, 0.1])  # summed backwards they differ in a bit
    train = np.stack([tenths, np.sqrt(1 - tenths**2)], 1)
    assert knn_predict(train, [8] * 3 + [5] * 3, [[1, 0]], k=6) == 5
    for k, want in (2, 7), (3, 9):  # of the docstring
        assert knn_predict([[1, 0], [0, 1], [1, 1]], [7, 9, 9], [[3, 1]], k=k) == want


def test_losses_knn_of_collapsed_or_zero_features_gives_the_most_frequent_class():
    labels = np.array([4, 1, 1, 4, 4, 0, 4, 2, 2])
    row = np.random.default_rng(0).normal(size=(1, 13))
    same = row * np.ones((9, 1)) * np.arange(1, 10)[:, None]
    assert (knn_predict(same, labels, 0.3 * same, k=1) == 4).all()
    train = np.random.default_rng(1).normal(size=(9, 3))
    assert (knn_predict(train, labels, np.zeros((2, 3)), k=3) == 4).all()


def test_losses_knn_does_not_depend_on_order_batch_or_chunk_and_its_memory_is_bounded():
    rng = np.random.default_rng(0)
    train, labels = rng.integers(-2, 3, (3000, 3)), rng.integers(0, 4, 3000)  # ties everywhere
    rows = rng.integers(-2, 3, (1500, 3))
    tracemalloc.start()
    want = knn_predict(train, labels, rows, k=7)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    order = rng.permutation(3000)
    assert (knn_predict(train[order], labels[order], rows, k=7) == want).all()
    alone = [knn_predict(train, labels, row[None], k=7)[0] for row in rows[::100]]
    assert alone == want[::100].tolist()
    assert peak < 3000 * 1500 * 8, peak  # less than the table of all cosines, once
    nothing = np.zeros((0, 3))
    assert knn_predict(train, labels, nothing).shape == (0,)
    assert math.isnan(knn_accuracy(train, labels, nothing, []))


def test_losses_knn_and_ridge_refuse_what_they_cannot_compare():
    x, y, knn, ridge = np.eye(3), [0, 1, 2], knn_predict, ridge_predict
    for k in (0, 4):
        refuses(knn, f"1 <= k <= 3, the number of training rows; got k={k}", x, y, x, k=k)
    refuses(knn, "need 1 <= k <= 0", np.zeros((0, 3)), [], x)
    refuses(knn, "got (3, 3) and (2, 4)", x, y, np.ones((2, 4)), k=1)
    refuses(knn_accuracy, "labels must be (3,) integers, one for each row; got (2,)",
            x, y, x, [0, 1], k=1)
    refuses(ridge, "train_x (3, 3), x (2, 4)", x, y, np.ones((2, 4)))
    refuses(ridge, "train_x (0, 3)", np.zeros((0, 3)), [], x)
    for penalty in (0, -1, math.nan):
        refuses(ridge, f"penalty={penalty}", x, y, x, penalty=penalty)
    for predict in knn, ridge:
        refuses(predict, "train_labels must be (3,) integers", x, [0, 1], x)
        refuses(predict, "(3,) of float64", x, [0.0, 1, 2], x)
        refuses(predict, "must be (n, D), got (3,)", x, y, [1, 2, 3])
        refuses(predict, "1 of 2 rows of", x, y, [[1, 2, math.nan], [1, 2, 3]])
        refuses(predict, "1 of 3 rows of train_", [[math.inf, 0, 0], [0, 1, 0], [0, 0, 1]], y, x)


def ridge_case(seed, classes):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, 40)
    train, x = rng.normal(size=(40, 6)) * 3, rng.normal(size=(200, 6)) * 3
    return train + np.eye(classes, 6)[labels] * 4, labels * 2 + 5, x


def test_losses_ridge_equals_least_squares_with_the_penalty_as_rows_and_a_free_intercept():
    for seed, (classes, penalty) in enumerate(product((2, 3, 5), (0.01, 1.0, 100.0))):
        train, labels, x = ridge_case(seed, classes)
        mean, sd = train.mean(0), train.std(0)
        penalty_rows = [math.sqrt(penalty) * np.eye(6), np.zeros((6, 1))]
        rows = np.block([[(train - mean) / sd, np.ones((40, 1))], penalty_rows])
        scores = []
        for c in np.unique(labels):
            target = np.append(2.0 * (labels == c) - 1, np.zeros(6))
            w = np.linalg.lstsq(rows, target, rcond=None)[0]
            scores.append((x - mean) / sd @ w[:6] + w[6])
        want = np.unique(labels)[np.argmax(scores, 0)]
        tensors = [torch.tensor(array) for array in (train, labels, x)]
        got = ridge_predict(*tensors, penalty=penalty)
        assert got.dtype == np.int64 and (got == want).all() and len(set(want)) >= 2
        assert penalty != 1 or (ridge_predict(train, labels, x) == want).all()


def test_losses_ridge_forgets_units_and_constant_columns_and_uses_training_statistics_only():
    train, labels, x = ridge_case(0, 3)
    want = ridge_predict(train, labels, x)
    scale, shift = np.array([1e-6, 1, 1e6, 3, 0.1, 1e3]), np.array([5, -1e3, 0, 1, 7, 2])
    assert (ridge_predict(train * scale + shift, labels, x * scale + shift) == want).all()
    wider = np.hstack([np.full((40, 1), 0.1), train])
    assert 0 < wider.std(0)[0] < 1e-15  # by the last bit of the mean: 40 times 0.1 is no 4
    wider_x = np.hstack([np.linspace(-1e9, 1e9, 200)[:, None], x])
    assert (ridge_predict(wider, labels, wider_x) == want).all()
    for rows in slice(1), slice(50, None), slice(0):
        assert np.array_equal(ridge_predict(train, labels, x[rows]), want[rows])
    # Without anything to learn from, the most frequent class.
    frequent = ridge_predict(np.ones((5, 2)), [3, 1, 1, 3, 1], np.zeros((4, 2)))
    assert frequent.tolist() == [1] * 4 and ridge_predict(np.ones((2, 2)), [3, 3], [[0, 9]]) == 3
    got = ridge_predict([[0], [1], [2], [9]], [3, 3, 3, 5], [[5], [6]])
    assert got.tolist() == [3, 5]  # the number in the docstring


def test_losses_ridge_fit_of_real_targets_equals_least_squares_and_scores_equal_a_loop():
    for seed, (penalty, targets) in enumerate(product((0.01, 1.0, 100.0), (1, 3))):
        x, _, new = ridge_case(seed, 3)
        x[:, 2] = 7  # a constant column has weight 0
        y = 50 + 20 * np.random.default_rng(seed).normal(size=(40, targets)) + x[:, :1] * 5
        fit = ridge_fit(torch.tensor(x), y if targets > 1 else y[:, 0], penalty=penalty)
        assert json.loads(json.dumps(fit)) == fit  # a plain content, for a checkpoint
        got = linear_scores(fit, new).reshape(200, targets)
        varies = [0, 1, 3, 4, 5]
        mean, sd = x[:, varies].mean(0), x[:, varies].std(0)
        penalty_rows = [math.sqrt(penalty) * np.eye(5), np.zeros((5, 1))]
        rows = np.block([[(x[:, varies] - mean) / sd, np.ones((40, 1))], penalty_rows])
        for k in range(targets):
            w = np.linalg.lstsq(rows, np.append(y[:, k], np.zeros(5)), rcond=None)[0]
            for i in range(200):
                want = w[5]
                for j, column in enumerate(varies):
                    want += w[j] * (new[i, column] - mean[j]) / sd[j]
                assert math.isclose(got[i, k], want, rel_tol=1e-8), (seed, i, k)
    fit = ridge_fit([[0], [2]], [0, 2], penalty=2)
    assert fit["weights"] == [0.5] and fit["intercept"] == 1  # the numbers in the docstring
    refuses(ridge_fit, "targets (2,)", np.eye(3), [1, 2])
    refuses(ridge_fit, "targets (3,)", np.eye(3), [1, 2, math.nan])


def test_losses_lda_fit_solves_the_generalised_eigenvalue_problem():
    for seed, (classes, penalty) in enumerate(product((2, 3, 5), (0.01, 10.0))):
        x, labels, new = ridge_case(seed, classes)
        fit = lda_fit(torch.tensor(x), labels, penalty=penalty)
        z, weights = (x - x.mean(0)) / x.std(0), np.array(fit["weights"])
        within, between = penalty * np.eye(6), np.zeros((6, 6))
        for c in np.unique(labels):
            centre = z[labels == c].mean(0)
            between += (labels == c).sum() * np.outer(centre, centre)
            for row in z[labels == c]:
                within += np.outer(row - centre, row - centre)
        values = np.sort(np.linalg.eigvals(np.linalg.solve(within, between)).real)[::-1]
        assert weights.shape == (6, classes - 1)
        assert near(weights.T @ within @ weights, np.eye(classes - 1), 1e-9)
        assert near(weights.T @ between @ weights, np.diag(values[: classes - 1]), 1e-8)
        assert near(linear_scores(fit, new), (new - x.mean(0)) / x.std(0) @ weights, 1e-9)
    one = lda_fit([[0, 1], [1, 1], [8, 1], [9, 1]], [0, 0, 1, 1])
    assert [bool(weight) for [weight] in one["weights"]] == [True, False]
    assert np.shape(lda_fit(x, np.zeros(40, int))["weights"]) == (6, 0)
    refuses(lda_fit, "penalty=0", x, labels, penalty=0)
    refuses(lda_fit, "train_labels must be (40,) integers", x, labels[:3])


def logistic_case(seed, n=80, d=6):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) * 10.0 ** rng.integers(-2, 3, d) + rng.normal(size=d)
    z = (x - x.mean(0)) / x.std(0)
    return x, (rng.random(n) < 1 / (1 + np.exp(1 - 2 * z[:, 0] + z[:, 1]))).astype(int), z


def logistic_weights(x, labels, z, penalty):
    """Weights and intercept behind the logits of the training rows themselves."""
    logits = logistic_predict(x, labels, x, penalty=penalty)
    weights = np.linalg.lstsq(np.hstack([z, np.ones((len(z), 1))]), logits, rcond=None)[0]
    return logits, weights[:-1], weights[-1]


def test_losses_logistic_solution_has_gradient_zero_and_equals_lbfgs():
    for seed, penalty in enumerate((1e-3, 0.1, 1.0, 30.0, 1e4)):
        x, labels, z = logistic_case(seed)
        logits, w, _ = logistic_weights(x, labels, z, penalty)
        miss = 1 / (1 + np.exp(-logits)) - labels
        assert np.abs(z.T @ miss + penalty * w).max() < 1e-8 and abs(miss.sum()) < 1e-8
        free = torch.zeros(7, dtype=torch.float64, requires_grad=True)
        rows, y = torch.tensor(z), torch.tensor(labels, dtype=torch.float64)
        lbfgs = torch.optim.LBFGS([free], max_iter=500, tolerance_grad=1e-10,
                                  tolerance_change=1e-16, line_search_fn="strong_wolfe")

        def objective():
            lbfgs.zero_grad()
            loss = F.binary_cross_entropy_with_logits(rows @ free[:6] + free[6], y, reduction="sum")
            loss = loss + penalty / 2 * free[:6].square().sum()
            loss.backward()
            return loss

        lbfgs.step(objective)
        assert near(logits, (rows @ free[:6] + free[6]).detach(), 1e-5)
        if penalty == 1:
            new = torch.tensor(x[:5] + 1, requires_grad=True)
            got = logistic_predict(torch.tensor(x), torch.tensor(labels), new)
            want = ((x[:5] + 1 - x.mean(0)) / x.std(0)) @ w + logits.mean() - (z @ w).mean()
            assert near(got, want, 1e-8)
            assert got.dtype == np.float64


def test_losses_logistic_converges_for_separable_lopsided_and_doubled_columns():
    for seed, penalty in product(range(12), (1e-10, 1e-4, 1.0, 1e6)):
        rng = np.random.default_rng(seed)
        x = rng.standard_t(1.2, size=(50, 8))  # far outliers
        x[:, 1] = x[:, 0]
        # Separable; for even seeds one positive of 50.
        labels = x[:, 0] > (np.median(x[:, 0]) if seed % 2 else np.sort(x[:, 0])[-2])
        with warnings.catch_warnings(action="error"):
            logits = logistic_predict(x, labels, x, penalty=penalty)
        assert np.isfinite(logits).all()
        sign, z = np.where(labels, 1, -1), (x - x.mean(0)) / x.std(0)
        residual = sign * np.exp(-np.logaddexp(0, sign * logits))
        # Gradient 0 gives these weights; the logits are theirs, up to the intercept.
        offset = logits - z @ (z.T @ residual / penalty)
        assert abs(residual.sum()) < 1e-8, (seed, penalty)
        assert penalty < 1e-4 or np.ptp(offset) < 1e-3 * (1 + np.ptp(logits)), (seed, penalty)
        assert penalty > 1e-4 or ((logits > 0) == labels).all()


def test_losses_logistic_halves_the_step_where_newton_alone_diverges():
    x, labels = np.append(np.linspace(-1, 1, 40), [10, 5])[:, None], np.append(np.zeros(41), 1)
    z, ridge = (x - x.mean(0)) / x.std(0), np.array([1e-3, 0])
    logits, w, _ = logistic_weights(x, labels, z, 1e-3)
    miss = 1 / (1 + np.exp(-logits)) - labels
    assert max(np.abs(z.T @ miss + 1e-3 * w).max(), abs(miss.sum())) < 1e-8
    rows, full, values = np.hstack([z, np.ones((42, 1))]), np.array([0, math.log(1 / 41)]), []
    for _ in range(4):
        loss = np.logaddexp(0, (1 - 2 * labels) * (rows @ full)).sum()
        values.append(loss + (ridge * full**2).sum() / 2)
        p = 1 / (1 + np.exp(-rows @ full))
        hessian = (rows.T * (p * (1 - p))) @ rows + np.diag(ridge)
        full = full - np.linalg.solve(hessian, rows.T @ (p - labels) + ridge * full)
    assert values[0] * 100 < values[3], values  # 4.7, 11.5, 129, 2315


def test_losses_logistic_forgets_units_and_constant_columns_and_uses_training_statistics_only():
    x, labels, _ = logistic_case(1)
    want = logistic_predict(x, labels, x)
    scale, shift = np.array([1e-6, 1, -1e6, 3, 0.1, 1e3]), np.array([5, -1e3, 0, 1, 7, 2])
    assert near(logistic_predict(x * scale + shift, labels, x * scale + shift), want, 1e-6)
    wider = np.hstack([np.full((80, 1), 0.1), x])
    assert 0 < wider.std(0)[0] < 1e-15
    wider_x = np.hstack([np.linspace(-1e9, 1e9, 80)[:, None], x])
    assert near(logistic_predict(wider, labels, wider_x), want, 1e-9)
    assert_allclose(logistic_predict(x, labels, x[3:4]), want[3:4], rtol=1e-12)
    assert near(logistic_predict(x, 1 - labels, x), -want, 1e-9)
    odds = logistic_predict(np.ones((5, 2)), [1, 0, 0, 0, 1], np.zeros((3, 2)))
    assert_allclose(odds, [math.log(2 / 3)] * 3, rtol=1e-12)
    assert logistic_predict(x, labels, x[:0]).shape == (0,)
    # The numbers in the docstrings.
    assert round(logistic_predict([[0], [1]], [0, 1], [[1]])[0], 3) == 0.675
    assert round(logistic_predict([[0], [1], [2], [9]], [0, 0, 0, 1], [[4.5]])[0], 2) == -0.89


def test_losses_logistic_refuses_what_it_cannot_fit():
    x, y, fit = np.eye(3), [0, 1, 1], logistic_predict
    for labels in [0, 0, 0], [1, 1, 1]:
        refuses(fit, f"got {sum(labels)} ones among 3 rows; split the rows so", x, labels, x)
    refuses(fit, "got 0 ones among 0 rows", np.zeros((0, 3)), [], x)
    refuses(fit, "labels must be 0 or 1, got [0 2]", x, [0, 2, 2], x)
    refuses(fit, "train_x (3, 3), 2 labels, penalty", x, [0, 1], x)
    refuses(fit, "fitted on 3 columns, got x (2, 4)", x, y, np.ones((2, 4)))
    for penalty in (0, -1, math.nan, math.inf):
        refuses(fit, f"penalty={penalty}", x, y, x, penalty=penalty)
    refuses(fit, "1 of 2 rows of x hold NaN", x, y, [[1, 2, math.nan], [1, 2, 3]])


def test_losses_bootstrap_ranking_equals_the_metrics_of_the_rows_drawn():
    seen = 0
    for seed in range(6):
        scores, labels = tied_scores(seed)
        if seed >= 4:  # few positives: some resamples have none; then few rows
            labels = np.arange(42) < 2
        if seed == 5:
            scores, labels = scores[:3], np.array([1, 0, 0])
        got = bootstrap_ranking(scores, labels, resamples=50, seed=seed)
        drawn = np.random.default_rng(seed).integers(len(labels), size=(50, len(labels)))
        for name, metric in ("auroc", auroc), ("auprc", average_precision):
            want = np.full(50, math.nan)
            for i, rows in enumerate(drawn):
                if len(set(labels[rows])) == 2:
                    want[i] = metric(scores[rows], labels[rows])
            assert_allclose(got[name], want, rtol=1e-12)
            assert got[name].dtype == np.float64 and got[name].shape == (50,)
            seen += np.isnan(want).sum()
    assert seen > 10


def test_losses_weighted_ranking_equals_the_metrics_of_repeated_rows():
    for seed in range(4):
        scores, labels = tied_scores(seed)
        weights = np.random.default_rng(seed).integers(0, 4, (20, len(labels)))
        weights[0, labels == 1] = 0  # one class is left
        got = weighted_ranking(scores, labels, weights)
        for i, times in enumerate(weights):
            rows = np.repeat(np.arange(len(labels)), times)
            for name, metric in ("auroc", auroc), ("auprc", average_precision):
                if i == 0:
                    assert math.isnan(got[name][0])
                else:
                    assert near(got[name][i], metric(scores[rows], labels[rows]), 1e-12)
        halves = weighted_ranking(scores, labels, weights[1:] / 2)  # shares count as well
        assert_allclose(halves["auprc"], got["auprc"][1:], rtol=1e-12)
    refuses(weighted_ranking, "weights must be (k, 2), got (2,)", [1, 2], [0, 1], [1, 1])


def test_losses_paired_bootstrap_equals_scoring_the_rows_of_the_groups_drawn():
    rng = np.random.default_rng(1)
    labels, groups = rng.integers(0, 2, 60), rng.choice(["a", "b", "c", "d", "e"], 60)
    first = rng.normal(size=60).round(1) + labels
    second = rng.normal(size=60).round(1) + 0.5 * labels

    def score(scores):
        return lambda weights: weighted_ranking(scores, labels, weights)["auroc"]

    low, high = paired_bootstrap(score(first), score(second), groups, draws=200, seed=4)
    drawn = np.random.default_rng(4).multinomial(5, np.full(5, 0.2), size=200)
    differences = []
    for times in drawn:
        rows = np.concatenate([np.flatnonzero(groups == name) for name, count in
                               zip("abcde", times) for _ in range(count)])
        differences.append(auroc(first[rows], labels[rows]) - auroc(second[rows], labels[rows]))
    assert_allclose([low, high], np.quantile(differences, (0.025, 0.975)), rtol=1e-9)
    by_row = paired_bootstrap(score(first), score(second), np.arange(60), draws=200)
    assert by_row[0] < by_row[1] and by_row != (low, high)
    assert paired_bootstrap(score(first), score(first), groups) == (0, 0)
    one_class = paired_bootstrap(lambda weights: weights[:, 0] * math.nan, score(first), groups)
    assert all(map(math.isnan, one_class))
    # draws that lack a class are left out
    rare = np.where(np.arange(60) < 1, 1, 0)
    low, high = paired_bootstrap(
        lambda weights: weighted_ranking(first, rare, weights)["auroc"],
        lambda weights: weighted_ranking(second, rare, weights)["auroc"], np.arange(60), draws=50)
    assert math.isfinite(low) and math.isfinite(high)


def test_losses_bootstrap_ranking_draws_by_number_of_rows_and_seed_alone():
    scores, labels = tied_scores(0)
    want = bootstrap_ranking(scores, labels)
    assert want["auroc"].shape == (1000,) and min(want["auroc"].std(), want["auprc"].std()) > 0.01
    for given in np.arctan(scores) * 7 + 1, torch.tensor(scores)[:, None], scores.tolist():
        got = bootstrap_ranking(given, labels)
        assert all(np.array_equal(got[name], want[name]) for name in want)
    few = bootstrap_ranking(scores, labels, resamples=10)
    other = bootstrap_ranking(scores, labels, seed=1)
    assert np.array_equal(few["auroc"], want["auroc"][:10])
    assert not np.array_equal(other["auroc"], want["auroc"])
    turned = bootstrap_ranking(-scores, labels)  # other scores, the same rows
    assert_allclose(turned["auroc"], 1 - want["auroc"], rtol=1e-9)


def test_losses_bootstrap_ranking_works_in_chunks_that_change_nothing():
    rng = np.random.default_rng(0)
    labels = rng.random(60_000) < 0.1
    scores = rng.normal(size=60_000).round(2) + labels
    tracemalloc.start()
    got = bootstrap_ranking(scores, labels, resamples=40, seed=3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60_000 * 40 * 8 * 2, peak  # 8 resamples at a time
    drawn = np.random.default_rng(3).integers(60_000, size=(40, 60_000))
    for i in (0, 7, 8, 39):
        rows = drawn[i]
        assert near(got["auroc"][i], auroc(scores[rows], labels[rows]), 1e-12)
        assert near(got["auprc"][i], average_precision(scores[rows], labels[rows]), 1e-12)


def test_losses_ranking_interval_is_the_middle_of_the_resamples_and_pairs_two_models():
    scores, labels = tied_scores(1)
    resamples, single = bootstrap_ranking(scores, labels), ranking_interval(scores, labels)
    assert list(single) == ["auroc_low", "auroc_high", "auprc_low", "auprc_high"]
    quantiles = np.quantile(list(resamples.values()), (0.025, 0.975), axis=1).T.reshape(-1)
    assert_allclose(list(single.values()), quantiles, rtol=1e-12)
    assert single["auprc_low"] < average_precision(scores, labels) < single["auprc_high"] <= 1
    assert list(ranking_interval(scores, labels, versus=scores).values()) == [0, 0, 0, 0]
    worse = scores - 0.2 * labels + np.random.default_rng(0).normal(size=42) / 10
    other = bootstrap_ranking(worse, labels, resamples=300, seed=5)
    mine = bootstrap_ranking(scores, labels, resamples=300, seed=5)
    got = ranking_interval(scores, labels, versus=worse, level=0.5, resamples=300, seed=5)
    for name in mine:
        want = np.quantile(mine[name] - other[name], (0.25, 0.75))
        assert_allclose([got[f"{name}_low"], got[f"{name}_high"]], want, rtol=1e-12)
    paired = ranking_interval(scores, labels, versus=worse)
    wide = single["auroc_high"] - single["auroc_low"]
    assert paired["auroc_high"] - paired["auroc_low"] < wide / 2 and paired["auroc_high"] > 0


def test_losses_ranking_bootstrap_is_nan_for_one_class_and_refuses_what_it_cannot_rank():
    with warnings.catch_warnings(action="error"):
        for labels in [0, 0, 0], [1, 1, 1], []:
            scores = np.arange(len(labels))
            got = bootstrap_ranking(scores, labels, resamples=7)
            assert all(values.shape == (7,) and np.isnan(values).all() for values in got.values())
            for versus in None, scores:
                assert all_nan(ranking_interval(scores, labels, versus=versus).values())
        # Half of the resamples hold one class, the others are in order.
        got = ranking_interval([2.0, 1.0], [1, 0])
    assert list(got.values()) == [1, 1, 1, 1]
    refuses(bootstrap_ranking, "resamples >= 1, got 0", [1.0], [1], resamples=0)
    for level in 0, 1, 95, math.nan:
        refuses(ranking_interval, f"level < 1, got {level}", [1.0], [1], level=level)
    refuses(bootstrap_ranking, "1 of 2 scores are NaN", [1, math.nan], [0, 1])
    refuses(ranking_interval, "2 labels need one score each", [1, 2], [0, 1], versus=[1, 2, 3])


def test_losses_numbers_in_the_docstrings_are_right():
    scores, labels = [2.0, 0.5, 0.5, -1.0], [1, 1, 0, 0]
    report = binary_report(scores, labels)
    assert report["auroc"] == auroc(scores, labels) == 0.875 and report["f1"] == 0.8
    assert report["precision"] == 2 / 3 and report["recall"] == 1
    assert near(average_precision(scores, labels), (1 + 2 / 3) / 2, 1e-12)
    assert round(binary_floor(labels)["f1"], 3) == 0.667 and auto_pos_weight([0, 0, 0, 1]) == 3.0
    assert torch.sigmoid(torch.tensor(17.0)) == 1
