"""What is minimised and what is reported: a loss on logits, metrics on raw scores, and the floor under every metric.

Losses take logits, never probabilities. Metrics take the raw scores of a whole split at once, so they do not depend on the
batch size; what is undefined is NaN, never 0.

Dimensions: b batch, c class, n flattened (all samples of a split)

    scores, labels = [2.0, 0.5, 0.5, -1.0], [1, 1, 0, 0]      # raw logits: 0 stands for P = 0.5
    auroc(scores, labels)                                     # 0.875: of 4 pairs 3 are in order and 1 is tied
    binary_report(scores, labels)["f1"]                       # 0.8
    binary_floor(labels)["f1"]                                # 0.667: what "always 1" scores, having learnt nothing
    regression_report([12, 20], [14, 18])["mae"]              # 2.0, in the unit of the labels
"""

import math
import warnings

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


# Losses


def focal_label_smooth_ce(logits, targets, *, gamma=2.0, smoothing=0.05, class_weights=None, ignore_index=-100,
                          reduction="mean"):
    """Cross-entropy with smoothed targets and a focal factor on the term of each class.

        loss = -sum_c w_c q_c (1 - p_c)^gamma log p_c      p = softmax(logits), q = (1 - smoothing) * t + smoothing / C

    Binary logits z are the case C = 2 with P(1) = sigmoid(z). gamma = 0 is F.cross_entropy, in value and gradient.
    The usual single factor (1 - p_target)^gamma takes the loss to 0 as p_target goes to 1 and so cancels the smoothing;
    here an overconfident prediction is still pulled back.

    "mean" divides by the weights of the targets, sum_c t_c w_c of each; as in torch, class probabilities by their number.
    Class indices and binary labels equal to ignore_index are left out; if none remains the mean is 0, connected to the
    graph, where torch has NaN. Half-precision logits are computed, and the loss returned, in float32.

    Shape:  logits (B, C, ...), targets (B, ...) class indices or (B, C, ...) probabilities  ->  scalar, or "none": (B, ...)
            binary logits (B,) or (B, 1), targets (B,) or (B, 1) of any dtype in [0, 1]      ->  scalar, or "none": (B,)
    Errors: ValueError for other shapes, a binary label outside [0, 1], an option out of range
    Source: Lin et al. 2017, arXiv:1708.02002, eq. 4; Szegedy et al. 2016, arXiv:1512.00567, section 7
    Check:  equal logits cost (1 - 1/C)^gamma * ln C whatever the target: 0.7798 for C = 4, gamma = 2
    """
    if gamma < 0 or not 0 <= smoothing <= 1 or reduction not in ("mean", "sum", "none"):
        raise ValueError("need gamma >= 0, smoothing in [0, 1] and reduction mean, sum or none; "
                         f"got gamma={gamma}, smoothing={smoothing}, reduction={reduction!r}")
    got = f"got logits {tuple(logits.shape)}, targets {tuple(targets.shape)} of {targets.dtype}"
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))

    binary = logits.ndim == 1 or logits.shape[1:] == (1,)
    if binary:
        if targets.shape not in [(len(logits),), (len(logits), 1)]:
            raise ValueError(f"binary logits (B,) or (B, 1) need targets (B,) or (B, 1); {got}")
        labels = targets.flatten().to(logits.dtype)
        kept = labels != ignore_index
        labels = labels.masked_fill(~kept, 0)
        if not ((labels >= 0) & (labels <= 1)).all():
            raise ValueError(f"binary labels must be in [0, 1], got {labels.min():g} to {labels.max():g}")
        logits = F.pad(logits.reshape(-1, 1), (1, 0))  # softmax([0, z]) is [1 - sigmoid(z), sigmoid(z)]
        targets = torch.stack([1 - labels, labels], 1)
    elif logits.ndim < 2 or logits.shape[1] < 2:
        raise ValueError(f"logits must be (B, C, ...) with C > 1, or binary (B,) or (B, 1); {got}")
    elif targets.shape == logits.shape:
        targets = targets.to(logits.dtype)
        kept = torch.ones_like(logits[:, 0], dtype=torch.bool)
    elif targets.shape == logits[:, 0].shape and not targets.is_floating_point():
        targets = targets.long()  # before the comparison: -100 as uint8 would be class 156
        kept = targets != ignore_index
        targets = targets.masked_fill(~kept, 0)
    else:
        raise ValueError(f"logits (B, C, ...) need integer targets (B, ...) or probabilities (B, C, ...); {got}")

    classes = logits.shape[1]
    weights = torch.ones(classes) if class_weights is None else torch.as_tensor(class_weights)
    if weights.shape != (classes,):
        raise ValueError(f"class_weights must be ({classes},), one for each class, got {tuple(weights.shape)}")
    weights = weights.to(logits)
    weights_c = weights.view(-1, *[1] * (logits.ndim - 2))  # broadcasts over (b, c, ...)

    def focal(log_p):  # for gamma < 1 the slope of (1 - p)^gamma is infinite at p = 1; the clamp makes it 0 there
        return -(1 - log_p.exp()).clamp_min(torch.finfo(log_p.dtype).tiny) ** gamma * log_p

    log_p = F.log_softmax(logits, 1)
    if targets.shape == logits.shape:
        q = (1 - smoothing) * targets + smoothing / classes
        loss = (weights_c * q * focal(log_p)).sum(1)
        share = (weights_c * targets).sum(1) if binary else torch.ones_like(loss)
    else:
        share = weights[targets]
        loss = (1 - smoothing) * share * focal(log_p.gather(1, targets.unsqueeze(1))).squeeze(1)
        if smoothing:
            loss = loss + smoothing * (weights_c * focal(log_p)).mean(1)

    loss = loss.masked_fill(~kept, 0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    share = share.masked_fill(~kept, 0).sum()
    return loss.sum() / torch.where(kept.any(), share, 1)


class FocalLabelSmoothCE(nn.Module):
    """focal_label_smooth_ce with its options fixed; class_weights is a buffer and follows .to(device).

    Needs:  focal_label_smooth_ce
    """

    def __init__(self, smoothing=0.05, gamma=2.0, *, class_weights=None, ignore_index=-100, reduction="mean"):
        super().__init__()
        self.smoothing, self.gamma, self.ignore_index, self.reduction = smoothing, gamma, ignore_index, reduction
        self.register_buffer("class_weights", None if class_weights is None else torch.as_tensor(class_weights))

    def forward(self, logits, targets):
        return focal_label_smooth_ce(logits, targets, gamma=self.gamma, smoothing=self.smoothing, reduction=self.reduction,
                                     class_weights=self.class_weights, ignore_index=self.ignore_index)


def auto_pos_weight(labels):
    """Weight of the positive class that balances binary labels, for F.binary_cross_entropy_with_logits(pos_weight=...).

        pos_weight = negatives / positives

    Count the training labels only. With one class there is nothing to balance: 1.0, with a warning. The weight moves the
    optimum: the logits then stand for log-odds + ln(pos_weight), and sigmoid(logit) is no longer the frequency.

    Shape:  labels 0 / 1 of any type, (n,) or (n, 1)  ->  float
    Errors: ValueError for other labels or shapes
    Needs:  _is_positive
    Check:  labels 0, 0, 0, 1 give 3.0
    """
    labels = _is_positive(labels)
    positives = int(labels.sum())
    negatives = labels.size - positives
    if not positives or not negatives:
        warnings.warn(f"auto_pos_weight: {negatives} negatives, {positives} positives; using 1.0", stacklevel=2)
        return 1.0
    return negatives / positives


# Metrics


def auroc(scores, labels):
    """Probability that a random positive scores above a random negative; a tie counts half.

        AUROC = (pairs in order + pairs tied / 2) / (positives * negatives)

    NaN when either class is missing. Any increasing function of the scores gives the same, so pass logits: a sigmoid in
    float32 is 1 from 17 on and makes ties of different scores.

    Shape:  scores real, labels 0 / 1, both (n,) or (n, 1), tensor, array or list  ->  float in [0, 1]
    Errors: ValueError for NaN scores, other labels, unequal lengths
    Source: Hanley and McNeil 1982; equal to sklearn.metrics.roc_auc_score
    Needs:  _scores_by_class, _is_positive
    Check:  chance is 0.5; scores 2, 0.5, 0.5, -1 of labels 1, 1, 0, 0 give 0.875
    """
    negatives, positives = _scores_by_class(scores, labels)
    if not positives.size or not negatives.size:
        return math.nan
    below = np.searchsorted(negatives, positives, side="left").sum()
    not_above = np.searchsorted(negatives, positives, side="right").sum()
    return float((below + not_above) / (2 * positives.size * negatives.size))


def average_precision(scores, labels):
    """Area under the precision-recall curve (AUPRC): precision at the score of each positive, averaged over the positives.

        AP = mean over positives i of  TP_i / (TP_i + FP_i),   counted among the samples that score at least s_i

    Tied scores share one threshold, so their order does not matter, and nothing is interpolated between thresholds.
    NaN without positives.

    Shape:  scores real, labels 0 / 1, both (n,) or (n, 1), tensor, array or list  ->  float in [0, 1]
    Errors: ValueError for NaN scores, other labels, unequal lengths
    Source: equal to sklearn.metrics.average_precision_score
    Needs:  _scores_by_class, _is_positive
    Check:  chance is the share of positives; scores 2, 0.5, 0.5, -1 of labels 1, 1, 0, 0 give (1 + 2/3) / 2
    """
    negatives, positives = _scores_by_class(scores, labels)
    if not positives.size:
        return math.nan
    tp = positives.size - np.searchsorted(positives, positives, side="left")
    fp = negatives.size - np.searchsorted(negatives, positives, side="left")
    return float((tp / (tp + fp)).mean())


def binary_report(scores, labels, *, threshold=0.0):
    """What a binary classifier is judged by, over a whole split.

        precision = TP / (TP + FP)   recall = TP / (TP + FN)   F1 = 2 TP / (2 TP + FP + FN)   accuracy = (TP + TN) / n

    A score equal to the threshold is a positive: 0.0 on logits is P >= 0.5, and probabilities take threshold=0.5.
    Undefined is NaN: precision without predicted positives; recall, F1, AUPRC without positives; AUROC with one class.

    Shape:  scores real, labels 0 / 1, both (n,) or (n, 1), tensor, array or list
            ->  {"accuracy", "precision", "recall", "f1", "auroc", "auprc"} floats, {"tp", "fp", "fn", "tn"} ints
    Errors: ValueError for NaN scores, other labels, unequal lengths
    Needs:  auroc, average_precision, _scores_by_class, _is_positive
    Check:  scores 2, 0.5, 0.5, -1 of labels 1, 1, 0, 0 have precision 2/3, recall 1, F1 0.8
    """
    negatives, positives = _scores_by_class(scores, labels)
    tp, fp = int((positives >= threshold).sum()), int((negatives >= threshold).sum())
    fn, tn = positives.size - tp, negatives.size - fp

    def ratio(part, whole):
        return part / whole if whole else math.nan

    return {"accuracy": ratio(tp + tn, tp + tn + fp + fn),
            "precision": ratio(tp, tp + fp),
            "recall": ratio(tp, tp + fn),
            "f1": ratio(2 * tp, 2 * tp + fp + fn) if tp + fn else math.nan,
            "auroc": auroc(scores, labels), "auprc": average_precision(scores, labels),
            "tp": tp, "fp": fp, "fn": fn, "tn": tn}


def binary_floor(labels):
    """What a constant classifier scores, having learnt nothing: print it beside binary_report.

        F1 = 2 pi / (1 + pi) of "always 1"   accuracy = max(pi, 1 - pi) of the majority   AUROC = 0.5   AUPRC = pi

    with pi the share of positives. NaN where binary_report has NaN.

    Shape:  labels 0 / 1 of any type, (n,) or (n, 1)  ->  {"accuracy", "f1", "auroc", "auprc"} floats
    Errors: ValueError for other labels or shapes
    Needs:  _is_positive
    Check:  with 53 % positives F1 is 0.693: a model that reports it may have learnt nothing
    """
    labels = _is_positive(labels)
    pi = float(labels.mean()) if labels.size else math.nan
    return {"accuracy": max(pi, 1 - pi),
            "f1": 2 * pi / (1 + pi) if pi > 0 else math.nan,
            "auroc": 0.5 if 0 < pi < 1 else math.nan,
            "auprc": pi if pi > 0 else math.nan}


def regression_report(predictions, targets, groups=None):
    """What a regressor is judged by, over a whole split, in the unit of the labels.

        MAE = mean |p - t|   RMSE = sqrt(mean (p - t)^2)   R2 = 1 - sum (p - t)^2 / sum (t - mean t)^2

    R2 has no unit, so different labels compare; the mean of these very targets scores 0, and below 0 is worse than it. None of
    the three follows from another: an MAE cannot be had from a squared loss. Undo the scaling of labels first.
    With groups (patients): the MAE of each, then their mean and sd (ddof 1), so that nobody counts more for having more rows.
    NaN where undefined: everything without rows, R2 of constant targets, the sd of one group.

    Shape:  predictions, targets real (n,) or (n, 1), tensor, array or list; groups (n,)
            ->  {"mae", "rmse", "r2"} floats, with groups also {"group_mae", "group_sd"}
    Errors: ValueError for NaN or infinite values, unequal lengths
    Source: equal to sklearn.metrics.mean_absolute_error, root_mean_squared_error, r2_score
    Check:  predictions 12, 20 of targets 14, 18 have MAE 2, RMSE 2, R2 0
    """
    values = [np.asarray(each.detach().cpu().double() if torch.is_tensor(each) else each, dtype=np.float64)
              for each in (predictions, targets)]
    n = values[1].size
    for name, each in zip(("predictions", "targets"), values):
        if each.shape not in [(n,), (n, 1)]:
            raise ValueError(f"{name} must be ({n},) or ({n}, 1), got {each.shape}")
        if not np.isfinite(each).all():
            raise ValueError(f"{(~np.isfinite(each)).sum()} of {n} {name} are NaN or infinite")
    prediction, target = (each.reshape(-1) for each in values)
    error = prediction - target

    def mean(x):
        return float(x.mean()) if x.size else math.nan

    spread = mean(np.square(target - target.mean())) if n and target.min() < target.max() else math.nan
    report = {"mae": mean(np.abs(error)), "rmse": math.sqrt(mean(np.square(error))), "r2": 1 - mean(np.square(error)) / spread}
    if groups is None:
        return report
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    if member.size != n:
        raise ValueError(f"{n} targets need one group each, got {member.size}")
    group_mae = np.bincount(member, np.abs(error), len(names)) / np.bincount(member, minlength=len(names))
    return report | {"group_mae": mean(group_mae), "group_sd": float(group_mae.std(ddof=1)) if len(names) > 1 else math.nan}


def _is_positive(labels):
    """Labels 0 / 1 of any type, (n,) or (n, 1), as a flat bool array."""
    labels = np.asarray(labels.detach().cpu().double() if torch.is_tensor(labels) else labels)
    if labels.shape not in [(labels.size,), (labels.size, 1)]:
        raise ValueError(f"labels must be (n,) or (n, 1), got {labels.shape}")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError(f"labels must be 0 or 1, got {np.unique(labels)[:5]}")
    return labels.reshape(-1) == 1


def _scores_by_class(scores, labels):
    """Scores of the negatives and of the positives, each in float64 and ascending."""
    scores = np.asarray(scores.detach().cpu().double() if torch.is_tensor(scores) else scores, dtype=np.float64)
    positive = _is_positive(labels)
    if scores.shape not in [positive.shape, (positive.size, 1)]:
        raise ValueError(f"{positive.size} labels need one score each, (n,) or (n, 1), got {scores.shape}")
    if np.isnan(scores).any():
        raise ValueError(f"{np.isnan(scores).sum()} of {scores.size} scores are NaN")
    scores = scores.reshape(-1)
    return np.sort(scores[~positive]), np.sort(scores[positive])
