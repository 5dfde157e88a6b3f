"""Losses on logits or features, metrics on raw scores, and simple models as baselines.

Losses take logits, never probabilities. Metrics take the raw scores of a whole split at once, so
they do not depend on the batch size. An undefined metric is NaN, never 0. Metrics and simple models
take tensors, arrays and lists.

    scores, labels = [2.0, 0.5, 0.5, -1.0], [1, 1, 0, 0]    # logits: 0 is P = 0.5
    binary_report(scores, labels)["f1"]                     # 0.8
    binary_floor(labels)["f1"]                              # 0.667, the F1 of "always 1"

Dimensions: b batch, c class, d feature, n all pixels of an image or all samples of a split.
            Of sets: s set, n and m elements, f feature.
"""

import math
import warnings

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


# --------------------------------------------------------------------------------------------------
# Losses


def focal_label_smooth_ce(logits, targets, *, gamma=2.0, smoothing=0.05, class_weights=None,
                          ignore_index=-100, reduction="mean"):
    """Cross-entropy with smoothed targets and a focal factor on the term of every class.

        loss = -sum_c w_c q_c (1 - p_c)^gamma log p_c
        p = softmax(logits)        q = (1 - smoothing) * t + smoothing / C

    Without smoothing this is Lin's focal loss, -w_t (1 - p_t)^gamma log p_t. His alpha is the
    weight of class 1 of two. torchvision's sigmoid_focal_loss divides by the number of samples:

        focal_label_smooth_ce(logits, targets, smoothing=0.0)
        focal_label_smooth_ce(logits, targets, smoothing=0.0, class_weights=[1 - alpha, alpha],
                              reduction="none").mean()

    With smoothing his single factor (1 - p_t)^gamma would cancel it: the loss goes to 0 as p_t goes
    to 1. Here an overconfident prediction is still pulled back. gamma=0.0, smoothing=0.0 is
    F.cross_entropy in value and gradient. smoothing is its label_smoothing, there 0.0 by default.

    A single logit z means two classes, P(1) = sigmoid(z). "mean" divides by the weights of the
    targets, sum_c t_c w_c; for class probabilities by their number, as in torch. Class indices and
    binary labels equal to ignore_index are left out, and so is a pixel (B, C, H, W) whose
    probabilities are all 0; their logits may be NaN. Without any weight the mean is 0, connected to
    the graph; torch has NaN. Half precision is computed and returned in float32.

    Shape:  logits (B, C, ...), targets (B, ...) class indices or (B, C, ...) probabilities
            ->  scalar, or "none": (B, ...)
            binary logits (B,) or (B, 1, ...), targets with or without the 1, of any dtype in [0, 1]
            ->  scalar, or "none": (B, ...)
    Errors: ValueError for other shapes, an index outside 0..C-1, a binary label outside [0, 1],
            probabilities that do not sum to 1, an option out of range. Masks (B, H, W) have no
            channel: pass logits.unsqueeze(1).
    Source: Lin et al. 2017, arXiv:1708.02002, eq. 4 and 5
            Szegedy et al. 2016, arXiv:1512.00567, section 7
    Needs:  math, torch, _check_focal, _as_classes, _two_classes, _probabilities,
            _class_weights
    Check:  equal logits cost (1 - 1/C)^gamma * ln C for any target: 0.7798 for C = 4, gamma = 2
    """
    _check_focal(gamma, smoothing, reduction)
    binary = logits.ndim == 1 or logits.shape[1:2] == (1,)
    logits, targets, counted = _as_classes(logits, targets, ignore_index)
    weights = _class_weights(class_weights, logits)
    weights_c = weights.view([-1] + [1] * (logits.ndim - 2))  # broadcasts over (b, c, ...)

    def focal(log_p):
        if not gamma:
            return -log_p
        # for gamma < 1 the slope of (1 - p)^gamma is infinite at p = 1; the clamp makes it 0 there
        return -(1 - log_p.exp()).clamp_min(torch.finfo(log_p.dtype).tiny) ** gamma * log_p

    log_p = logits.log_softmax(1)
    if targets.shape == logits.shape:
        q = (1 - smoothing) * targets + smoothing / logits.shape[1]
        loss = (weights_c * q * focal(log_p)).sum(1)
        share = (weights_c * targets).sum(1) if binary else torch.ones_like(loss)
    else:
        share = weights[targets]
        loss = (1 - smoothing) * share * focal(log_p.gather(1, targets.unsqueeze(1))).squeeze(1)
        if smoothing:
            loss = loss + smoothing * (weights_c * focal(log_p)).mean(1)

    loss = loss * counted
    if reduction != "mean":
        return loss.sum() if reduction == "sum" else loss
    share = (share * counted).sum()
    return loss.sum() / share.masked_fill(share == 0, math.inf)


class FocalLabelSmoothCE(nn.Module):
    """focal_label_smooth_ce with fixed options; class_weights is a buffer and follows .to(device).

    Needs:  nn, focal_label_smooth_ce, _check_focal, _weights_buffer
    """

    def __init__(self, *, gamma=2.0, smoothing=0.05, class_weights=None, ignore_index=-100,
                 reduction="mean"):
        super().__init__()
        _check_focal(gamma, smoothing, reduction)
        self.gamma, self.smoothing = gamma, smoothing
        self.ignore_index, self.reduction = ignore_index, reduction
        self.register_buffer("class_weights", _weights_buffer(class_weights))

    def forward(self, logits, targets):
        return focal_label_smooth_ce(logits, targets, gamma=self.gamma, smoothing=self.smoothing,
                                     reduction=self.reduction, class_weights=self.class_weights,
                                     ignore_index=self.ignore_index)


def dice_loss(logits, targets, *, per="image", absent="skip", smooth=1e-5, class_weights=None,
              include_background=True, ignore_index=None):
    """One minus the overlap of prediction and truth, a mean in which all classes count the same.

        dice_c = (2 sum min(p_c, t_c) + smooth) / (sum p_c + sum t_c + smooth)
        loss = 1 - mean_c dice_c

    p = softmax(logits); the sums run over the pixels. For hard targets min(p, t) equals p * t. For
    soft targets it makes p = t the minimum, 0. A pixel (B, C, H, W) whose probabilities are all 0
    is left out. per="image" is the mean of the images' losses, "batch" pools the sums first.

    absent says how a class without target pixels (in the image, or in the batch) counts. "skip"
    leaves it out of the mean over classes, and an image without any other out of the mean over
    images. "count" keeps its term, which is close to 1 for the least probability on it. "zero"
    takes its loss as 0, which only dilutes the others.

    A single logit z is the foreground of a mask: p = sigmoid(z), and only its Dice counts. An image
    without foreground follows absent.

    class_weights weigh the classes in that mean; include_background=False leaves class 0 out of it.
    Pixels whose class index is ignore_index are left out and may hold NaN logits. An image without
    counted pixels is left out of the mean over images; if none is left, the loss is 0, connected to
    the graph. Half precision is computed and returned in float32. Index targets are never expanded
    to one-hot.

    Shape:  logits (B, C, ...), targets (B, ...) class indices or (B, C, ...) probabilities
            ->  scalar in [0, 1]
            logits (B, 1, ...), targets with or without the 1, of any dtype in [0, 1]  ->  scalar
    Errors: ValueError for other shapes or types, an index outside 0..C-1, a mask outside [0, 1],
            probabilities that do not sum to 1, an option out of range. Masks (B, H, W) have no
            channel: pass logits.unsqueeze(1).
            Probabilities passed as logits cannot be refused: their softmax is nearly flat, and so
            is the loss.
    Source: Sudre et al. 2017, arXiv:1707.03237
            min for soft targets: Wang et al. 2023, arXiv:2303.16296
    Needs:  _check_dice, _as_classes, _two_classes, _probabilities, _at_target, _dice_sums,
            _sum_by_class, _class_weights, _mean_over_classes, torch, F
    Check:  one pixel, two equal logits: dice of its class is 2 * 0.5 / (0.5 + 1), the loss 1/3
    """
    _check_dice(per, absent, smooth, logits)
    include_background = include_background and logits.shape[1] > 1  # one logit: foreground alone
    logits, targets, counted = _as_classes(logits, targets, ignore_index)
    p = logits.softmax(1)
    overlap, sum_p, sum_t = _dice_sums(p, _at_target(p, targets), targets, counted, per)
    dice = (2 * overlap + smooth) / (sum_p + sum_t + smooth)
    weights = _class_weights(class_weights, logits, include_background)
    return _mean_over_classes(1 - dice, sum_t > 0, absent, weights)


class DiceLoss(nn.Module):
    """dice_loss with fixed options; class_weights is a buffer and follows .to(device).

    Needs:  nn, dice_loss, _check_dice, _weights_buffer
    """

    def __init__(self, *, per="image", absent="skip", smooth=1e-5, class_weights=None,
                 include_background=True, ignore_index=None):
        super().__init__()
        _check_dice(per, absent, smooth)
        self.per, self.absent, self.smooth = per, absent, smooth
        self.include_background, self.ignore_index = include_background, ignore_index
        self.register_buffer("class_weights", _weights_buffer(class_weights))

    def forward(self, logits, targets):
        return dice_loss(logits, targets, per=self.per, absent=self.absent, smooth=self.smooth,
                         class_weights=self.class_weights, ignore_index=self.ignore_index,
                         include_background=self.include_background)


def ce_dice_loss(logits, targets, *, ce_weight=1.0, dice_weight=1.5, label_smoothing=0.0, gamma=0.0,
                 class_weights=None, include_background=True, ignore_index=-100, per="image",
                 absent="skip", smooth=1e-5):
    """Cross-entropy, a mean over pixels, plus Dice, a mean over classes.

        loss = ce_weight * CE + dice_weight * Dice        Dice as in dice_loss
        CE = -sum_c w_c q_c log p_c / w_t        q = (1 - label_smoothing) * t + label_smoothing / C

    CE is F.cross_entropy with the same defaults. For a single logit it is
    F.binary_cross_entropy_with_logits, with gamma > 0 focal_label_smooth_ce. label_smoothing
    applies to CE alone, include_background to Dice alone, class_weights and ignore_index to both.
    A pixel whose probabilities are all 0 is ignored too. Ignored pixels may hold NaN logits; if all
    are ignored, the loss is 0, connected to the graph, where torch has NaN. Computed and returned
    in float32, or float64 for such logits.

    Shape:  logits and targets as in dice_loss
            ->  scalar, and for the log its parts without weights or graph, {"ce", "dice"}
    Errors: ValueError as in dice_loss
    Needs:  focal_label_smooth_ce, _check_ce_dice, _check_dice, _as_classes, _two_classes,
            _probabilities, _at_target, _dice_sums, _sum_by_class, _class_weights,
            _mean_over_classes, _cross_entropy, math, torch, F
    Check:  one pixel, two equal logits: ln 2 + 1.5 / 3 = 1.1931
    """
    _check_ce_dice(ce_weight, dice_weight, label_smoothing, gamma)
    _check_dice(per, absent, smooth, logits)
    given, binary = (logits, targets), logits.shape[1] == 1
    logits, targets, counted = _as_classes(logits, targets, ignore_index)
    log_p = logits.log_softmax(1)
    log_p_t = _at_target(log_p, targets)
    overlap, sum_p, sum_t = _dice_sums(log_p.exp(), log_p_t.exp(), targets, counted, per)
    dice = (2 * overlap + smooth) / (sum_p + sum_t + smooth)
    weights = _class_weights(class_weights, logits, include_background and not binary)
    dice = _mean_over_classes(1 - dice, sum_t > 0, absent, weights)

    weights = _class_weights(class_weights, logits)
    if gamma:
        ce = focal_label_smooth_ce(*given, gamma=gamma, smoothing=label_smoothing,
                                   class_weights=class_weights, ignore_index=ignore_index)
    else:
        ce = _cross_entropy(log_p, log_p_t, targets, counted, weights, label_smoothing, binary)
    return ce_weight * ce + dice_weight * dice, {"ce": ce.detach(), "dice": dice.detach()}


class CEDiceLoss(nn.Module):
    """Scalar of ce_dice_loss with fixed options; class_weights is a buffer, follows .to(device).

    Needs:  nn, ce_dice_loss, _check_ce_dice, _check_dice, _weights_buffer
    """

    def __init__(self, *, ce_weight=1.0, dice_weight=1.5, label_smoothing=0.0, gamma=0.0,
                 class_weights=None, include_background=True, ignore_index=-100, per="image",
                 absent="skip", smooth=1e-5):
        super().__init__()
        _check_ce_dice(ce_weight, dice_weight, label_smoothing, gamma)
        _check_dice(per, absent, smooth)
        self.ce_weight, self.dice_weight = ce_weight, dice_weight
        self.label_smoothing, self.gamma = label_smoothing, gamma
        self.include_background, self.ignore_index = include_background, ignore_index
        self.per, self.absent, self.smooth = per, absent, smooth
        self.register_buffer("class_weights", _weights_buffer(class_weights))

    def forward(self, logits, targets):
        return ce_dice_loss(logits, targets, ce_weight=self.ce_weight, dice_weight=self.dice_weight,
                            gamma=self.gamma, label_smoothing=self.label_smoothing,
                            class_weights=self.class_weights, ignore_index=self.ignore_index,
                            include_background=self.include_background, per=self.per,
                            absent=self.absent, smooth=self.smooth)[0]


def _at_target(values, targets):
    """Values (b, c, ...) of the class that the target names, (b, ...); all for probabilities."""
    if targets.shape == values.shape:
        return values
    return values.gather(1, targets.unsqueeze(1)).squeeze(1)


def _dice_sums(p, p_t, targets, counted, per):
    """Sums of min(p, t), p and t over the pixels of every image (b, c), or of the batch (1, c)."""
    if not counted.all():
        p = p * counted.unsqueeze(1)
    if targets.shape == p.shape:
        sums = torch.minimum(p_t, targets), p, targets
        sums = [values.unsqueeze(-1).flatten(2).sum(2) for values in sums]
    else:
        inside, classes = counted.to(p.dtype), p.shape[1]
        sums = [_sum_by_class(p_t * inside, targets, classes), p.unsqueeze(-1).flatten(2).sum(2),
                _sum_by_class(inside, targets, classes)]
    return [values.sum(0, keepdim=True) for values in sums] if per == "batch" else sums


def _cross_entropy(log_p, log_p_t, targets, counted, weights, smoothing, binary):
    """Mean of F.cross_entropy over the counted pixels, from log p that is already there."""
    weights_c = weights.view([-1] + [1] * (log_p.ndim - 2))
    soft = targets.shape == log_p.shape
    weights_t = weights_c * targets if soft else weights[targets] * counted
    loss = (1 - smoothing) * (weights_t * log_p_t).sum()
    if smoothing:
        loss = loss + smoothing * (weights_c * log_p * counted.unsqueeze(1)).sum() / len(weights)
    share = counted.sum() if soft and not binary else weights_t.sum()
    return -loss / torch.where(share > 0, share, math.inf)


def _sum_by_class(values, index, classes):
    """Sums (b, c) of the values (b, ...) whose index is the class.

    In rows of 64: scatter_add adds one by one, which in float32 is off by 1e-2 after 2^21 pixels.
    """
    values, index = values.unsqueeze(-1).flatten(1), index.unsqueeze(-1).flatten(1)
    rest = -values.shape[1] % 64
    if rest:
        values, index = F.pad(values, (0, rest)), F.pad(index, (0, rest))
    rows = len(values), values.shape[1] // 64
    table = values.new_zeros(*rows, classes)
    return table.scatter_add(2, index.view(*rows, 64), values.view(*rows, 64)).sum(1)


def _mean_over_classes(loss, present, absent, weights):
    """Mean of the classes' losses (b, c), then of the images that have any; 0 without one."""
    if absent == "zero":
        loss = loss.masked_fill(~present, 0)
    in_mean = present if absent == "skip" else present.any(1, keepdim=True)
    weights = weights * in_mean
    total = weights.sum(1)
    loss = (weights * loss).sum(1) / total.masked_fill(total == 0, 1)
    return loss.sum() / (total > 0).sum().clamp_min(1)


def _check_focal(gamma, smoothing, reduction):
    if not gamma >= 0 or not 0 <= smoothing <= 1 or reduction not in ("mean", "sum", "none"):
        raise ValueError("need gamma >= 0, smoothing in [0, 1] and reduction mean, sum or none; "
                         f"got gamma={gamma}, smoothing={smoothing}, reduction={reduction!r}")


def _check_ce_dice(ce_weight, dice_weight, label_smoothing, gamma):
    weights_ok = ce_weight >= 0 and dice_weight >= 0
    if not (weights_ok and 0 <= label_smoothing <= 1 and gamma >= 0):
        raise ValueError("need ce_weight, dice_weight, gamma >= 0 and label_smoothing in [0, 1]; "
                         f"got ce_weight={ce_weight}, dice_weight={dice_weight}, gamma={gamma}, "
                         f"label_smoothing={label_smoothing}")


def _check_dice(per, absent, smooth, logits=None):
    """Of the options, and that the logits, where there are any, have pixels of an image."""
    if per not in ("image", "batch") or absent not in ("skip", "count", "zero") or not smooth > 0:
        raise ValueError("need per image or batch, absent skip, count or zero, and smooth > 0; "
                         f"got per={per!r}, absent={absent!r}, smooth={smooth}")
    if logits is not None and (logits.ndim < 2 or logits.shape[1:] == (1,)):
        raise ValueError(f"Dice needs logits (B, C, ...) or (B, 1, ...) with pixels, got "
                         f"{tuple(logits.shape)}; the pixels of one image are (1, 1, n)")


def _weights_buffer(class_weights):
    """class_weights as a tensor (C,), or None."""
    if class_weights is None:
        return None
    weights = torch.as_tensor(class_weights)
    if weights.ndim != 1 or not (weights >= 0).all():
        raise ValueError(f"class_weights must be (C,) and >= 0, one for each class; got {weights}")
    return weights


def _class_weights(class_weights, logits, include_background=True):
    """class_weights as a checked tensor (C,) of the type and device of the logits; None: ones."""
    classes = logits.shape[1]
    weights = torch.ones(classes) if class_weights is None else torch.as_tensor(class_weights)
    if weights.shape != (classes,):
        raise ValueError(f"class_weights must be ({classes},), one for each class, got "
                         f"{tuple(weights.shape)}")
    weights = weights.to(logits)
    return weights if include_background else torch.cat([0 * weights[:1], weights[1:]])


def _as_classes(logits, targets, ignore_index):
    """Checked logits (b, c, ...), targets, and which targets count, bool (b, ...).

    Targets are int64 class indices (b, ...), 0 where they do not count, or probabilities of the
    shape of the logits. Where a target does not count, the logits are 0 and have no gradient.
    """
    got = (f"got logits {tuple(logits.shape)} of {logits.dtype}, targets {tuple(targets.shape)} of "
           f"{targets.dtype}")
    if not logits.is_floating_point() or not logits.ndim or 0 in logits.shape[1:2]:
        raise ValueError(f"logits must be real (B, C, ...); {got}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if logits.ndim == 1:
        logits = logits.unsqueeze(1)
    classes, without_c = logits.shape[1], logits[:, 0].shape
    if classes == 1 and targets.shape in (without_c, logits.shape):
        logits, targets, counted = _two_classes(logits, targets.reshape(without_c), ignore_index)
    elif classes > 1 and targets.shape == logits.shape:
        targets, counted = _probabilities(targets.to(logits.dtype))
    elif classes > 1 and targets.shape == without_c and not targets.is_floating_point():
        targets = targets.long()  # before the comparison: -100 as uint8 would be class 156
        counted = torch.ones_like(targets, dtype=torch.bool)
        if ignore_index is not None:
            counted = targets != ignore_index
        targets = targets.masked_fill(~counted, 0)
        if targets.numel() and not 0 <= targets.min() <= targets.max() < classes:
            raise ValueError(f"class indices must be in 0..{classes - 1} or "
                             f"ignore_index={ignore_index}, got {targets.min()} to "
                             f"{targets.max()}; for void pixels pass their value as ignore_index")
    else:
        raise ValueError("logits (B, C, ...) need integer targets (B, ...) or probabilities "
                         "(B, C, ...), and binary logits (B, 1, ...) need targets (B, ...) or "
                         f"(B, 1, ...); {got}")
    if not counted.all():
        logits = logits.masked_fill(~counted.unsqueeze(1), 0)
    return logits, targets, counted


def _two_classes(logits, labels, ignore_index):
    """Logits 0 and z, whose softmax is 1 - sigmoid(z), sigmoid(z), and probabilities 1 - t, t."""
    labels = labels.to(logits.dtype)
    counted = torch.ones_like(labels, dtype=torch.bool)
    if ignore_index is not None:
        counted = labels != ignore_index
    labels = labels.masked_fill(~counted, 0)
    if not ((labels >= 0) & (labels <= 1)).all():
        raise ValueError(f"binary labels must be in [0, 1] or ignore_index={ignore_index}, got "
                         f"{labels.min():g} to {labels.max():g}")
    targets = torch.stack([counted.to(labels) - labels, labels], 1)
    return torch.cat([torch.zeros_like(logits), logits], 1), targets, counted


def _probabilities(targets):
    """Targets that sum to 1 over the classes, and which count: a pixel of zeros does not.

    In (b, c, n) zeros are refused: it may be a mask (b, h, w) without foreground.
    """
    total = targets.sum(1)
    counted = total != 0 if targets.ndim > 3 else torch.ones_like(total, dtype=torch.bool)
    wrong = total[counted & ~((total - 1).abs() <= 1e-2)]  # what bfloat16 rounds off
    if len(wrong):
        raise ValueError(
            f"class probabilities {tuple(targets.shape)} must sum to 1 over the classes, got "
            f"{wrong.min():g} to {wrong.max():g} in {len(wrong)} targets; for several labels at "
            "once use F.binary_cross_entropy_with_logits; masks (B, H, W) have no channel: pass "
            "logits.unsqueeze(1); ignored pixels of (B, C, n): pass both .unsqueeze(-1)")
    return targets, counted


def supcon_loss(features, labels=None, *, temperature=0.07, gather=True):
    """Supervised contrastive loss: samples of one class should be more similar than all others.

        loss = mean_i  mean_{p in P_i}  -log( exp(s_ip / T) / sum_{a != i} exp(s_ia / T) )

    s = cosine of two features, normalised here; P_i = the other samples of the class of i; T =
    temperature. A sample that is alone in its class is left out of the mean and is still a negative
    for the others. A batch without a positive pair has the loss 0, connected to the graph, with a
    warning. A zero vector has cosine 0 with all and a finite gradient.

    With features (B, V, D) the V views of a sample share its label; without labels they are its
    only positives, which is SimCLR's loss. The authors' code multiplies by T / 0.07 (temperature /
    base_temperature), which is 1 at their default; this function does not. For the scale of the
    value see supcon_bounds.

    With torch.distributed initialised the batch is that of all processes, and all of them must call
    this function. All return the loss of the whole batch. The mean of their gradients, which DDP
    takes, is the gradient of one process with the whole batch. gather=False uses only these rows,
    for scoring rows that every process has. Computed and returned in float32, also under autocast,
    or in float64 for such features.

    Shape:  features (B, D) or (B, V, D), labels (B,) integers; None with (B, V, D)  ->  scalar
    Errors: ValueError for other shapes or types, temperature <= 0, processes with unequal shapes
    Source: Khosla et al. 2020, arXiv:2004.11362, eq. 2 (L_out)
            Chen et al. 2020, arXiv:2002.05709, eq. 1 (without labels)
    Needs:  math, warnings, _rows_of_views, all_rows
    Check:  equal features cost ln(B - 1) for any labels, 3.4340 for B = 32; one class never less
    """
    features, labels = _rows_of_views(features, labels, temperature)
    processes = 1
    if gather:
        features, labels, processes = all_rows(features, labels)

    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    positive = (labels.unsqueeze(1) == labels) & ~itself
    positives = positive.sum(1)
    anchor = positives > 0
    if not anchor.any():
        warnings.warn(f"supcon_loss: no two of {len(labels)} samples share a class, so there is no "
                      "positive pair and the loss is 0; draw batches that hold at least two "
                      "samples of a class (stratified batches, or larger ones)", stacklevel=2)
        return features[:0].sum()  # not 0 * sum: that is NaN for infinite features
    with torch.autocast(features.device.type, enabled=False):
        length = features.norm(dim=1, keepdim=True)
        # F.normalize would give a zero vector 10^12 times its gradient
        unit = features / length.masked_fill(length == 0, 1)
        logits = (unit @ unit.T / temperature).masked_fill(itself, -math.inf)
        # log_softmax subtracts the maximum: any temperature is stable
        log_p = logits.log_softmax(1).masked_fill(~positive, 0)
        loss = -(log_p.sum(1) / positives.clamp_min(1)).sum() / anchor.sum()
    if processes == 1:
        return loss
    # A process has the gradient through its own rows. The gradient of the loss is the sum of
    # these; DDP takes their mean.
    return loss.detach() + processes * (loss - loss.detach())


def _rows_of_views(features, labels, temperature):
    """Checked features (n, D) as float32 or float64, labels int64 (n,); the views are rows.

    Without labels the number of the sample, over all processes, is the label.
    """
    views = features.shape[1] if features.ndim == 3 else 1
    given = "None"
    if labels is not None:
        labels = torch.as_tensor(labels, device=features.device)
        given = f"{tuple(labels.shape)} of {labels.dtype}"
    elif features.ndim == 3:
        dist = torch.distributed
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        labels = torch.arange(len(features), device=features.device) + rank * len(features)
    fits = labels is not None and labels.shape == features.shape[:1]
    if not fits or features.ndim not in (2, 3) or labels.is_floating_point() or (
            not features.is_floating_point()):
        raise ValueError("need real features (B, D) and integer labels (B,), or (B, V, D) and "
                         "labels (B,) or None; got "
                         f"{tuple(features.shape)} of {features.dtype}, labels {given}")
    if not temperature > 0:
        raise ValueError(f"need temperature > 0, got {temperature}")
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    if features.ndim == 3:
        features = features.flatten(0, 1)
    return features, labels.long().repeat_interleave(views)


def all_rows(features, labels):
    """Features and labels of all processes in the order of the ranks, and the number of processes.

    Only the own rows of a process keep their graph.

    Needs:  torch
    """
    dist = torch.distributed
    processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if processes == 1:
        return features, labels, 1

    def gather(x):
        parts = [torch.empty_like(x) for _ in range(processes)]
        dist.all_gather(parts, x)
        return parts

    # unequal shapes would hang all_gather, or worse
    shapes = torch.stack(gather(torch.tensor(features.shape, device=features.device))).tolist()
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"every process needs features of the same shape, got {shapes} in the "
                         "order of the ranks; give each rank as many rows, for instance by "
                         "leaving out the last batch")
    parts = gather(features.detach().contiguous())
    parts[dist.get_rank()] = features
    return torch.cat(parts), torch.cat(gather(labels.contiguous())), processes


def supcon_bounds(labels, *, temperature=0.07):
    """Lower bound of supcon_loss and its value for equal features, from the labels of a batch.

        lower = mean_i ln((n_i - 1) + (B - n_i) exp(-2 / T))
        collapsed = ln(B - 1)

    i runs over the samples that share their class; n_i = number of samples in the class of i; T =
    temperature. lower belongs to features that are equal within a class and opposite to all
    others. No features have less, two classes can reach it, more classes come close at a low
    temperature. A network whose loss stays at collapsed has learned nothing. With one class both
    are ln(B - 1) and there is nothing to learn. NaN if no two samples share a class.

    Shape:  labels (B,) of any type, those of all processes  ->  (lower, collapsed) floats
    Errors: ValueError for other shapes, temperature <= 0
    Source: Jensen on the sum over positives, and every cosine in [-1, 1]
    Needs:  math, np, torch, _array
    Check:  32 samples of one class: 3.4340, 3.4340; four classes of 8: ln 7 = 1.9459, 3.4340
    """
    labels = _array(labels)
    if labels.ndim != 1 or not temperature > 0:
        raise ValueError(f"need labels (B,) and temperature > 0, got {labels.shape} and "
                         f"{temperature}")
    n = np.unique(labels, return_counts=True)[1]
    n = n[n > 1]
    if not n.size:
        return math.nan, math.nan
    lower = np.log(n - 1 + (labels.size - n) * math.exp(-2 / temperature))
    return float((n * lower).sum() / n.sum()), math.log(labels.size - 1)


def kl_to_standard_normal(mu, logvar, *, free_bits=0.0):
    """KL divergence in nats of a diagonal Gaussian from N(0, I), one number per row.

        KL = sum_d max(free_bits, (mu_d^2 + exp(logvar_d) - 1 - logvar_d) / 2)

    A dimension that costs less than free_bits costs free_bits and has no gradient. So a VAE does
    not give up its code before the decoder has learned to use it. The maximum is taken for every
    row, so the loss of a batch is the sum over its rows, for any batches and processes. Kingma et
    al. take it of the mean over the batch, which does not add up over batches; theirs is never
    larger than the mean of this one. logvar is not clamped: in float32 exp overflows above 88.7.
    Computed and returned in float32, or in float64 for such inputs.

    Shape:  mu, logvar real (..., D)  ->  (...)
    Errors: ValueError for unequal shapes or other types, free_bits < 0
    Source: Kingma and Welling 2014, arXiv:1312.6114, appendix B
            free bits: Kingma et al. 2016, arXiv:1606.04934, eq. 15
    Needs:  math, torch
    Check:  mu = 1, logvar = 0 cost 0.5 per dimension; mu = 0, logvar = ln 4 cost 0.8069;
            the prior costs free_bits * D
    """
    real = mu.is_floating_point() and logvar.is_floating_point()
    if mu.shape != logvar.shape or not mu.ndim or not real:
        raise ValueError(f"need real mu and logvar of one shape (..., D); got {tuple(mu.shape)} of "
                         f"{mu.dtype} and {tuple(logvar.shape)} of {logvar.dtype}; for one "
                         "variance of all dimensions use logvar.expand_as(mu)")
    if not 0 <= free_bits < math.inf:
        raise ValueError(f"need free_bits >= 0 and finite, got {free_bits}; 0 is the plain "
                         "divergence")
    dtype = torch.promote_types(torch.promote_types(mu.dtype, logvar.dtype), torch.float32)
    mu, logvar = mu.to(dtype), logvar.to(dtype)
    # expm1: near the prior exp(logvar) - 1 would lose its digits
    kl = (mu.square() + torch.expm1(logvar) - logvar) / 2
    return kl.clamp_min(free_bits).sum(-1)


def set_costs(x, y, *, direction=1.0, magnitude=1.0, distance=3.0):
    """Cost of matching every vector of one set with every vector of another.

        cost_ij = direction * (1 - cos(x_i, y_j)) + magnitude * | |x_i| - |y_j| |
                  + distance * |x_i - y_j|^2

    argmin(1) is the nearest x of every y, argmin(2) the nearest y of every x. The caller masks the
    padding, as chamfer does. A vector shorter than 1e-12 has no direction: cosine 0 with all. The
    gradient is finite everywhere.

    One matrix product serves cosine and distance, |x - y|^2 = |x|^2 + |y|^2 - 2 x.y, clamped at 0;
    no (S, N, M, F) tensor is made. The price: distances are good to about 1e-7 of the squared
    lengths (float32; with TF32 allowed only to 1e-3). Computed and returned in float32, also under
    autocast, or in float64 for such vectors.

    Shape:  x real (S, N, F), y real (S, M, F)  ->  (S, N, M), all >= 0
    Errors: ValueError for other shapes or types, a weight < 0
    Needs:  math, torch
    Check:  (1, 0) costs 0 + 1 + 3 * 1 = 4 to (2, 0), and 1 + 0 + 3 * 2 = 7 to (0, 1)
    """
    fits = x.ndim == y.ndim == 3 and (len(x), x.shape[2]) == (len(y), y.shape[2])
    if not fits or not (x.is_floating_point() and y.is_floating_point()):
        raise ValueError("need real x (S, N, F) and y (S, M, F), as many sets of equally wide "
                         f"vectors; got {tuple(x.shape)} of {x.dtype} and {tuple(y.shape)} of "
                         f"{y.dtype}; a single set is x.unsqueeze(0)")
    if not all(0 <= weight < math.inf for weight in (direction, magnitude, distance)):
        raise ValueError("need direction, magnitude and distance >= 0 and finite, 0 to leave one "
                         f"out; got {direction}, {magnitude}, {distance}")
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    x, y = x.to(dtype), y.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        product = x @ y.transpose(1, 2)
        # torch has gradient 0 for the norm of 0
        length_x, length_y = x.norm(dim=2).unsqueeze(2), y.norm(dim=2).unsqueeze(1)
        squared_x, squared_y = x.square().sum(2).unsqueeze(2), y.square().sum(2).unsqueeze(1)
        squared = (squared_x + squared_y - 2 * product).clamp_min(0)
        divisor_x = length_x.masked_fill(length_x < 1e-12, 1)
        divisor_y = length_y.masked_fill(length_y < 1e-12, 1)
        # rounding may take a cosine beyond 1
        one_minus_cosine = (1 - product / (divisor_x * divisor_y)).clamp_min(0)
        difference = (length_x - length_y).abs()
        return direction * one_minus_cosine + magnitude * difference + distance * squared


def chamfer(x, y, *, x_mask=None, y_mask=None, direction=1.0, magnitude=1.0, distance=3.0):
    """Symmetric Chamfer distance of padded sets: mean cost to the nearest element, in both ways.

        loss = mean_i min_j cost_ij + mean_j min_i cost_ij      cost as in set_costs

    i, j run over the elements, not the padding. The order of elements does not matter. The padding
    may hold NaN and gets gradient 0. Small and large sets weigh the same. Several elements may have
    the same nearest one: it is no matching. Tied nearest elements share the gradient evenly. A pair
    in which a set has no elements has the loss 0 and the gradient 0; so average over the pairs with
    elements, not over all. The masks are not checked for this: that would wait for the device.

    The gradient goes to both sides, so pass targets fixed or detached. With targets that train (an
    embedding of the variable, say) the cheapest solution is one direction for all of them: the loss
    goes to 0 and the sets carry no information. Computed and returned in float32, also under
    autocast, or in float64 for such vectors.

    Shape:  x real (S, N, F), y real (S, M, F), masks bool (S, N), (S, M) with True for an element;
            None: all are elements  ->  (S,)
    Errors: ValueError for other shapes or types, a weight < 0
    Source: Fan et al. 2017, arXiv:1612.00603, section 4.2, there with the distance alone
    Needs:  set_costs
    Check:  the sets {(1, 0)} and {(2, 0)} have 4 + 4 = 8; a set and itself 0
    """

    def without_padding(name, vectors, mask):
        if mask is None:
            return vectors, torch.ones(vectors.shape[:2], dtype=torch.bool, device=vectors.device)
        if vectors.ndim != 3 or mask.shape != vectors.shape[:2] or mask.dtype != torch.bool:
            raise ValueError(f"{name} (S, N, F) needs a mask (S, N) of bool, True where it holds "
                             f"an element (of a padding mask take its ~); got {name} "
                             f"{tuple(vectors.shape)} and {name}_mask {tuple(mask.shape)} of "
                             f"{mask.dtype}")
        # before use: in a gradient 0 * NaN is NaN
        return vectors.masked_fill(~mask.unsqueeze(2), 0), mask

    x, x_mask = without_padding("x", x, x_mask)
    y, y_mask = without_padding("y", y, y_mask)
    costs = set_costs(x, y, direction=direction, magnitude=magnitude, distance=distance)
    if 0 in costs.shape:
        return costs.sum((1, 2))

    def one_way(costs, own, other):
        # costs (s, own, other); without others the minimum is inf and is not counted
        nearest = costs.masked_fill(~other.unsqueeze(1), math.inf).amin(2)
        counted = own & other.any(1, keepdim=True)
        return nearest.masked_fill(~counted, 0).sum(1) / counted.sum(1).clamp_min(1)

    return one_way(costs, x_mask, y_mask) + one_way(costs.transpose(1, 2), y_mask, x_mask)


def auto_pos_weight(labels):
    """Weight of the positive class that balances binary labels.

        pos_weight = negatives / positives

    For F.binary_cross_entropy_with_logits(pos_weight=...). Count the training labels only. With one
    class there is nothing to balance: 1.0, with a warning. The weight moves the optimum: the logits
    are then log-odds + ln(pos_weight), and sigmoid(logit) is no longer the frequency.

    Shape:  labels 0 / 1 of any type, (n,) or (n, 1)  ->  float
    Errors: ValueError for other labels or shapes
    Needs:  warnings, np, torch, _is_positive, _array
    Check:  labels 0, 0, 0, 1 give 3.0
    """
    labels = _is_positive(labels)
    positives = int(labels.sum())
    negatives = labels.size - positives
    if not positives or not negatives:
        warnings.warn(f"auto_pos_weight: {negatives} negatives, {positives} positives; using 1.0",
                      stacklevel=2)
        return 1.0
    return negatives / positives


def median_frequency_weights(counts):
    """Class weights that lift rare classes: the square root of median frequency balancing.

        weight_c = sqrt(median(counts) / counts_c)

    With the root a class 10,000 times rarer weighs 100 times more, not 10,000 times. Count the
    pixels of the training masks only. A class without pixels is left out of the median and weighs
    1.0, as the median class does, with a warning.

    Shape:  counts (C,)  ->  float32 tensor (C,), for class_weights=...
    Errors: ValueError for other shapes, negative or non-finite counts
    Source: Eigen and Fergus 2015, arXiv:1411.4734; there without the root, and counting only the
            images that hold the class
    Needs:  warnings, np, torch, _array
    Check:  counts 1, 4, 16 give 2, 1, 0.5
    """
    counts = _array(counts, np.float64)
    if counts.ndim != 1 or not counts.size or not (np.isfinite(counts) & (counts >= 0)).all():
        raise ValueError("counts must be (C,), finite and >= 0, one for each class; got "
                         f"{counts.shape}: {counts.reshape(-1)[:5]}")
    present = counts > 0
    if not present.all():
        warnings.warn(f"median_frequency_weights: classes {np.flatnonzero(~present).tolist()} have "
                      "no pixels; using 1.0", stacklevel=2)
    weights = np.ones(counts.size)
    if present.any():
        weights[present] = np.sqrt(np.median(counts[present]) / counts[present])
    return torch.tensor(weights, dtype=torch.float32)


# --------------------------------------------------------------------------------------------------
# Metrics, and simple models on the same rows


def auroc(scores, labels):
    """Probability that a random positive scores above a random negative; a tie counts half.

        AUROC = (pairs in order + pairs tied / 2) / (positives * negatives)

    NaN when either class is missing. Any increasing function of the scores gives the same, so pass
    logits: a sigmoid in float32 is 1 from 17 on and makes ties of different scores.

    Shape:  scores real, labels 0 / 1, both (n,) or (n, 1)  ->  float in [0, 1]
    Errors: ValueError for NaN scores, other labels, unequal lengths
    Source: Hanley and McNeil 1982; equal to sklearn.metrics.roc_auc_score
    Needs:  math, np, torch, _counts_by_score, _scores_and_labels,
            _is_positive, _array
    Check:  chance is 0.5; scores 2, 0.5, 0.5, -1 of labels 1, 1, 0, 0 give 0.875
    """
    tied, below, not_above, negatives = _counts_by_score(scores, labels)
    if not tied.size or not negatives:
        return math.nan
    return float((tied * (below + not_above)).sum() / (2 * tied.sum() * negatives))


def average_precision(scores, labels):
    """Area under the precision-recall curve (AUPRC).

        AP = mean over positives i of  TP_i / (TP_i + FP_i)

    TP_i and FP_i are counted among the samples that score at least s_i. Tied scores share one
    threshold, so their order does not matter. Nothing is interpolated between thresholds. NaN
    without positives.

    Shape:  scores real, labels 0 / 1, both (n,) or (n, 1)  ->  float in [0, 1]
    Errors: ValueError for NaN scores, other labels, unequal lengths
    Source: equal to sklearn.metrics.average_precision_score
    Needs:  math, np, torch, _counts_by_score, _scores_and_labels,
            _is_positive, _array
    Check:  chance is the share of positives; scores 2, 0.5, 0.5, -1 of labels 1, 1, 0, 0 give
            (1 + 2/3) / 2
    """
    tied, below, _, negatives = _counts_by_score(scores, labels)
    if not tied.size:
        return math.nan
    tp, fp = tied[::-1].cumsum()[::-1], negatives - below
    return float((tied * (tp / (tp + fp))).sum() / tied.sum())


def binary_report(scores, labels, *, threshold=0.0):
    """Scores and counts of a binary classifier over a whole split.

        precision = TP / (TP + FP)            recall = TP / (TP + FN)
        F1 = 2 TP / (2 TP + FP + FN)          accuracy = (TP + TN) / n
        specificity = TN / (TN + FP)          balanced accuracy = (recall + specificity) / 2

    A score equal to the threshold is a positive: 0.0 on logits is P >= 0.5, and probabilities need
    threshold=0.5. Undefined is NaN: precision without predicted positives; recall, F1, AUPRC
    without positives; specificity without negatives; AUROC, balanced accuracy with one class.

    Shape:  scores real, labels 0 / 1, both (n,) or (n, 1)
            ->  {"accuracy", "balanced_accuracy", "precision", "recall", "specificity", "f1",
                 "auroc", "auprc"} floats, {"tp", "fp", "fn", "tn"} ints
    Errors: ValueError for NaN scores, other labels, unequal lengths
    Needs:  auroc, average_precision, _counts_by_score, _scores_and_labels, _is_positive, _array
    Check:  scores 2, 0.5, 0.5, -1 of labels 1, 1, 0, 0 have precision 2/3, recall 1, F1 0.8
    """
    flat_scores, positive = _scores_and_labels(scores, labels)
    predicted = flat_scores >= threshold
    tp, fp = int((predicted & positive).sum()), int((predicted & ~positive).sum())
    fn, tn = int(positive.sum()) - tp, int((~positive).sum()) - fp

    def ratio(part, whole):
        return part / whole if whole else math.nan

    recall, specificity = ratio(tp, tp + fn), ratio(tn, tn + fp)
    return {"accuracy": ratio(tp + tn, tp + tn + fp + fn),
            "balanced_accuracy": (recall + specificity) / 2,
            "precision": ratio(tp, tp + fp),
            "recall": recall, "specificity": specificity,
            "f1": ratio(2 * tp, 2 * tp + fp + fn) if tp + fn else math.nan,
            "auroc": auroc(scores, labels), "auprc": average_precision(scores, labels),
            "tp": tp, "fp": fp, "fn": fn, "tn": tn}


def binary_floor(labels):
    """Scores of a constant classifier, to print beside binary_report.

        F1 = 2 pi / (1 + pi) of "always 1"      accuracy = max(pi, 1 - pi) of the majority
        AUROC = 0.5                             AUPRC = pi

    pi = share of positives. NaN where binary_report has NaN.

    Shape:  labels 0 / 1 of any type, (n,) or (n, 1)
            ->  {"accuracy", "f1", "auroc", "auprc"} floats
    Errors: ValueError for other labels or shapes
    Needs:  math, np, torch, _is_positive, _array
    Check:  with 53 % positives F1 is 0.693: a model that reports it may have learned nothing
    """
    labels = _is_positive(labels)
    pi = float(labels.mean()) if labels.size else math.nan
    return {"accuracy": max(pi, 1 - pi),
            "f1": 2 * pi / (1 + pi) if pi > 0 else math.nan,
            "auroc": 0.5 if 0 < pi < 1 else math.nan,
            "auprc": pi if pi > 0 else math.nan}


def regression_report(predictions, targets, groups=None):
    """Errors of a regressor over a whole split, in the unit of the labels.

        MAE = mean |p - t|        RMSE = sqrt(mean (p - t)^2)
        R2 = 1 - sum (p - t)^2 / sum (t - mean t)^2

    R2 has no unit, so it compares different labels. The mean of these targets scores 0, and below 0
    is worse than that mean. None of the three follows from another: a squared loss does not give
    the MAE. Undo the scaling of labels first. With groups (patients): mean and sd (ddof 1) of the
    groups' MAEs, so that a group with more rows does not count more. NaN where undefined:
    everything without rows, R2 of constant targets, the sd of one group.

    Shape:  predictions, targets real (n,) or (n, 1); groups (n,)
            ->  {"mae", "rmse", "r2"} floats, with groups also {"group_mae", "group_sd"}
    Errors: ValueError for NaN or infinite values, unequal lengths
    Source: equal to sklearn.metrics.mean_absolute_error, root_mean_squared_error, r2_score
    Needs:  math, np, torch, _array
    Check:  predictions 12, 20 of targets 14, 18 have MAE 2, RMSE 2, R2 0
    """
    predictions, targets = _array(predictions, np.float64), _array(targets, np.float64)
    n = targets.size
    for name, values in ("predictions", predictions), ("targets", targets):
        if values.shape not in [(n,), (n, 1)]:
            raise ValueError(f"{name} must be ({n},) or ({n}, 1), got {values.shape}")
        if not np.isfinite(values).all():
            raise ValueError(f"{(~np.isfinite(values)).sum()} of {n} {name} are NaN or infinite")
    predictions, targets = predictions.reshape(-1), targets.reshape(-1)
    error = predictions - targets

    def mean(x):
        return float(x.mean()) if x.size else math.nan

    squared_error, variance = mean(np.square(error)), 0.0
    if n and targets.min() < targets.max():
        variance = mean(np.square(targets - targets.mean()))
    report = {"mae": mean(np.abs(error)), "rmse": math.sqrt(squared_error),
              "r2": 1 - squared_error / variance if variance > 0 else math.nan}
    if groups is None:
        return report
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    if member.size != n:
        raise ValueError(f"{n} targets need one group each, got {member.size}")
    counts = np.bincount(member, minlength=len(names))
    group_mae = np.bincount(member, np.abs(error), len(names)) / counts
    report["group_mae"] = mean(group_mae)
    report["group_sd"] = float(group_mae.std(ddof=1)) if len(names) > 1 else math.nan
    return report


def confusion_matrix(predictions, targets, classes, *, ignore_index=255):
    """Number of pixels of a true class (row) that were predicted as every class (column).

        confusion[t, p] = number of counted pixels with target t and prediction p

    Counts add up, for any batch size and number of processes. The matrices of the images, stacked,
    are for f_score_per_image; their sum is for f_score_pooled and mean_iou. Pixels whose target is
    ignore_index are left out, whatever was predicted.

    Shape:  predictions, targets integer, any equal shapes  ->  int64 array (classes, classes)
    Errors: ValueError for unequal shapes, values that are no integers or outside 0..classes-1
    Source: equal to sklearn.metrics.confusion_matrix(targets, predictions, labels=range(classes))
    Needs:  np, torch, _array
    Check:  predictions 0, 1, 1, 1 of targets 0, 0, 1, 255 with 2 classes give [[1, 1], [0, 1]]
    """
    predictions, targets = _array(predictions), _array(targets)
    integer = predictions.dtype.kind in "biu" and targets.dtype.kind in "biu"
    if predictions.shape != targets.shape or predictions.size and not integer:
        raise ValueError("predictions and targets must be class indices of equal shapes (of "
                         f"logits take argmax(1)); got predictions {predictions.shape} of "
                         f"{predictions.dtype}, targets {targets.shape} of {targets.dtype}")
    counted = targets != ignore_index
    # ignored pixels go to cell 0, which is faster than leaving them out
    predictions, targets = predictions * counted, targets * counted
    for name, values in ("predictions", predictions), ("targets", targets):
        if values.size and not 0 <= values.min() <= values.max() < classes:
            raise ValueError(f"{name} must be in 0..{classes - 1}, got {values[counted].min()} to "
                             f"{values[counted].max()}; ignore_index is {ignore_index}")
    # the smallest signed type that numbers the cells: 2 bytes move faster than 8
    cell = np.min_scalar_type(-classes * classes)
    cells = targets.astype(cell) * cell.type(classes) + predictions.astype(cell)
    counts = np.bincount(cells.ravel(), minlength=classes * classes)
    counts[0] -= counted.size - np.count_nonzero(counted)  # take the ignored pixels out again
    return counts.reshape(classes, classes)


def f_score_per_image(confusions):
    """Score of the face-parsing challenge, per image: mean F over the classes in the truth.

        P = TP / (TP + FP + e)      R = TP / (TP + FN + e)      F_c = 2 P R / (P + R + e)
        score = mean of F_c over the classes with target pixels        e = 1e-7

    A class that is only predicted is skipped: it costs only the pixels it takes from the others.
    The official number is the mean over images. The scores are returned one by one, so that an
    interval can be computed too. NaN for an image without target pixels.

    Shape:  confusions (n, C, C) counts, rows the truth, one per image  ->  float64 (n,), in [0, 1)
    Errors: ValueError for other shapes
    Source: scoring program of the NTU CE7454 / AI6126 face-parsing challenge
    Needs:  np, _counts
    Check:  [[3, 1], [0, 4]] scores (6/7 + 8/9) / 2 = 0.8730
    """
    tp, predicted, truth = _counts(confusions, 3)
    precision, recall = tp / (predicted + 1e-7), tp / (truth + 1e-7)
    f = 2 * precision * recall / (precision + recall + 1e-7)
    with np.errstate(invalid="ignore"):  # 0 / 0 is the NaN that is meant
        return np.where(truth > 0, f, 0).sum(1) / (truth > 0).sum(1)


def f_score_pooled(confusion):
    """F of every class over a whole split, from one pooled confusion matrix.

        F_c = 2 TP / (2 TP + FP + FN)

    NaN for a class that neither truth nor prediction has; 0 if only one of them has it. np.nanmean
    of the result is the macro F. Large objects dominate here; in f_score_per_image every image
    counts the same. Say which of the two is reported.

    Shape:  confusion (C, C) counts, rows the truth  ->  float64 array (C,)
    Errors: ValueError for other shapes
    Source: equal to sklearn.metrics.f1_score(average=None) but for the NaN
    Needs:  np, _counts
    Check:  [[3, 1], [0, 4]] gives 6/7, 8/9
    """
    tp, predicted, truth = _counts(confusion, 2)
    with np.errstate(invalid="ignore"):  # 0 / 0 is the NaN that is meant
        return 2 * tp / (predicted + truth)


def mean_iou(confusion):
    """Mean intersection over union of a whole split, from one pooled confusion matrix.

        IoU_c = TP / (TP + FP + FN) = F_c / (2 - F_c)

    The mean is over the classes that truth or prediction has. NaN for a matrix without counts.

    Shape:  confusion (C, C) counts, rows the truth  ->  float in [0, 1]
    Errors: ValueError for other shapes
    Needs:  math, np, _counts
    Check:  [[3, 1], [0, 4]] gives (3/4 + 4/5) / 2 = 0.775
    """
    tp, predicted, truth = _counts(confusion, 2)
    union = predicted + truth - tp
    present = union > 0
    return float((tp[present] / union[present]).mean()) if present.any() else math.nan


def class_report(predictions, labels, classes):
    """Scores of a classifier of several classes over a whole split, in total and by class.

        accuracy = share of right rows
        F1_c = 2 TP / (2 TP + FP + FN)        recall_c = TP / (TP + FN)
        balanced_accuracy, macro_f1 = means of recall_c, F1_c over the classes that labels have
        weighted_f1 = mean of F1_c over the rows, c the class of the row

    Macro F1 counts a class of 5 rows as much as one of 500. NaN where undefined: recall of a class
    without rows, F1 of a class that has no rows and is not predicted, the four totals without
    rows. F1 of a class that is only predicted is 0, as in f_score_pooled, and counts in no mean.

    Shape:  predictions, labels integers in 0..classes-1, (n,)
            ->  {"accuracy", "balanced_accuracy", "macro_f1", "weighted_f1"} floats,
                {"classes"} a list of {"rows": int, "f1": float, "recall": float}
    Errors: ValueError for unequal shapes, values that are no integers or outside 0..classes-1
    Source: equal to sklearn.metrics.f1_score(average="macro", labels=np.unique(labels)), and
            average="weighted"; recall_score, accuracy_score, balanced_accuracy_score
    Needs:  math, confusion_matrix, f_score_pooled, _counts, _array
    Check:  predictions 0, 1, 1 of labels 0, 0, 1 have accuracy 2/3, macro F1 2/3, recalls 1/2 and 1
    """
    confusion = confusion_matrix(predictions, labels, classes, ignore_index=None)
    tp, _, rows = _counts(confusion, 2)
    f1, present = f_score_pooled(confusion), rows > 0
    with np.errstate(invalid="ignore"):  # 0 / 0 is the NaN that is meant
        recall, share = tp / rows, rows[present] / rows.sum()
        accuracy = tp.sum() / rows.sum()

    def mean(values):
        return float(values[present].mean()) if present.any() else math.nan

    return {"accuracy": float(accuracy), "balanced_accuracy": mean(recall), "macro_f1": mean(f1),
            "weighted_f1": float((share * f1[present]).sum()) if present.any() else math.nan,
            "classes": [{"rows": int(n), "f1": float(f), "recall": float(r)}
                        for n, f, r in zip(rows, f1, recall)]}


def mean_cosine(features):
    """Mean cosine of all pairs of rows: 1 for collapsed features, near 0 for well spread ones.

        mean_{i != j} u_i . u_j = (|sum_i u_i|^2 - n) / (n (n - 1))        u_i = x_i / |x_i|

    A zero row has no direction and is left out; NaN with fewer than two others. Never less than
    -1 / (n - 1).

    Shape:  features (n, D)  ->  float
    Errors: ValueError for other shapes, NaN or infinite features
    Needs:  math, np, torch, _unit_rows, _finite_rows, _array
    Check:  rows (1, 0), (2, 0), (0, 3) have (1 + 0 + 0) / 3
    """
    unit = _unit_rows(features, "features")
    unit = unit[unit.any(1)]
    n = len(unit)
    if n < 2:
        return math.nan
    return float((np.square(unit.sum(0)).sum() - n) / (n * (n - 1)))


def knn_predict(train_features, train_labels, features, *, k=5):
    """Class of every row by the vote of the k training rows with the largest cosine.

    It judges an embedding without training on it. The class with most votes wins; of several, the
    one whose votes have the largest sum of cosines; then the smallest label. Training rows tied
    with the k-th all vote, so the order of the rows does not matter. Collapsed features, or a zero
    vector, get the most frequent class: the floor, not a random class. Cosines closer than 1e-12
    are tied. Works in float64, in chunks of about a million cosines.

    Shape:  train_features (n, D), train_labels (n,) integers, features (m, D)
            ->  int64 array (m,)
    Errors: ValueError for other shapes or types, NaN or infinite features, k < 1 or k > n
    Needs:  np, torch, _unit_rows, _finite_rows, _integer_labels, _array
    Check:  rows (1, 0), (0, 1), (1, 1) of classes 7, 9, 9 give (3, 1) the class 7 with k = 1 or 2,
            9 with k = 3
    """
    train, features = _unit_rows(train_features, "train_features"), _unit_rows(features, "features")
    train_labels = _integer_labels(train_labels, len(train), "train_labels")
    classes, member = np.unique(train_labels, return_inverse=True)
    if features.shape[1] != train.shape[1]:
        raise ValueError(f"train_features and features need the same columns, got {train.shape} "
                         f"and {features.shape}")
    if not 1 <= k <= len(train):
        raise ValueError(f"need 1 <= k <= {len(train)}, the number of training rows; got k={k}")
    predictions = np.empty(len(features), dtype=np.int64)
    step = max(1, 2**20 // len(train))
    for start in range(0, len(features), step):
        # rounded: the last bits depend on the shape of the product
        cosine = np.round(features[start : start + step] @ train.T, 12)
        near = cosine >= np.partition(cosine, -k, axis=1)[:, -k, None]
        row, column = near.nonzero()
        cell, cells = row * len(classes) + member[column], len(cosine) * len(classes)
        votes = np.bincount(cell, minlength=cells).reshape(-1, len(classes))
        summed = np.bincount(cell, cosine[near], cells).reshape(-1, len(classes)).round(9)
        best = np.where(votes == votes.max(1, keepdims=True), summed, -np.inf).argmax(1)
        predictions[start : start + step] = classes[best]
    return predictions


def knn_accuracy(train_features, train_labels, features, labels, *, k=5):
    """Share of the rows whose class knn_predict finds. NaN without rows.

    Its floor is the share of the most frequent class. For F1 and single classes pass knn_predict to
    class_report.

    Shape:  as knn_predict, and labels (m,) integers  ->  float in [0, 1]
    Errors: as knn_predict
    Needs:  math, knn_predict, _unit_rows, _finite_rows, _integer_labels, _array
    Check:  training rows predicted from themselves with k = 1 score 1, if no two of different
            classes have the same direction
    """
    predictions = knn_predict(train_features, train_labels, features, k=k)
    right = predictions == _integer_labels(labels, len(predictions), "labels")
    return float(right.mean()) if right.size else math.nan


def linear_scores(fit, x):
    """Scores of a fitted linear model: (x - mean) / sd @ weights + intercept.

    fit     what ridge_fit, lda_fit or logistic_fit return, or the same read from a file
    Shape:  x (m, D)  ->  float64 (m,), or (m, K) of a model with K targets
    Errors: ValueError for other shapes, NaN or infinite features
    Needs:  np, torch, _finite_rows, _array
    Check:  mean 1, sd 2, weight 3 and intercept 4 give 5 the score 10
    """
    x = _finite_rows(x, "x")
    if x.shape[1] != len(fit["mean"]):
        raise ValueError(f"the model was fitted on {len(fit['mean'])} columns, got x {x.shape}")
    z = (x - np.array(fit["mean"])) / np.array(fit["sd"])
    return z @ np.array(fit["weights"]) + np.array(fit["intercept"])


def ridge_fit(train_x, targets, *, penalty=1.0):
    """Ridge regression on real-valued targets, one or several at once.

        W = (Z^T Z + penalty I)^-1 Z^T Y     score = z W + mean Y

    Z = the columns standardised by mean and sd of the training rows; the intercept is not
    penalised. A column that is constant in training has weight 0. Meant for some hundred columns:
    time grows with their cube.

    Shape:  train_x (n, D), targets (n,) or (n, K)
            ->  {"mean", "sd": D numbers, "weights": (D,) or (D, K), "intercept": 1 or K numbers},
            plain lists that a checkpoint or JSON can hold; score by linear_scores
    Errors: ValueError for other shapes, no training rows, NaN or infinite values, penalty <= 0
    Source: Hoerl and Kennard 1970; equal to sklearn's StandardScaler followed by
            Ridge(alpha=penalty)
    Needs:  np, torch, _finite_rows, _array, _scale_of
    Check:  x = 0, 2 with targets 0, 2 and penalty 2 give weight 0.5 on z = -1, 1, and intercept 1
    """
    train, y = _finite_rows(train_x, "train_x"), _array(targets, np.float64)
    if not len(train) or len(y) != len(train) or not np.isfinite(y).all() or not penalty > 0:
        raise ValueError("need training rows, one finite target for each and penalty > 0; got "
                         f"train_x {train.shape}, targets {y.shape}, penalty={penalty}")
    mean, sd = _scale_of(train)
    z = (train - mean) / sd
    weights = np.linalg.solve(z.T @ z + penalty * np.eye(z.shape[1]), z.T @ (y - y.mean(0)))
    return {"mean": mean.tolist(), "sd": sd.tolist(), "weights": weights.tolist(),
            "intercept": y.mean(0).tolist()}


def ridge_predict(train_x, train_labels, x, *, penalty=1.0):
    """Class of every row by ridge regression with one target per class: a simple baseline.

        class = argmax_c of the scores of ridge_fit, whose targets are 1 for the class of a row and
        0 else

    Of equal scores the smallest label wins; without any column that varies, that is the most
    frequent class.

    Shape:  train_x (n, D), train_labels (n,) integers, x (m, D)  ->  int64 array (m,)
    Errors: ValueError for other shapes or types, no training rows, NaN or infinite values,
            penalty <= 0
    Source: equal to sklearn's StandardScaler followed by RidgeClassifier(alpha=penalty)
    Needs:  np, torch, ridge_fit, linear_scores, _finite_rows, _integer_labels, _array, _scale_of
    Check:  x = 0, 1, 2, 9 of classes 3, 3, 3, 5 give 5 the class 3 and 6 the class 5
    """
    train, x = _finite_rows(train_x, "train_x"), _finite_rows(x, "x")
    train_labels = _integer_labels(train_labels, len(train), "train_labels")
    if not len(train) or x.shape[1] != train.shape[1] or not penalty > 0:
        raise ValueError("need training rows, the same columns in both and penalty > 0; got "
                         f"train_x {train.shape}, x {x.shape}, penalty={penalty}")
    classes, member = np.unique(train_labels, return_inverse=True)
    fit = ridge_fit(train, np.eye(len(classes))[member], penalty=penalty)
    return classes[linear_scores(fit, x).argmax(1)]


def lda_fit(train_x, train_labels, *, penalty=1.0):
    """Linear discriminant analysis: the few directions in which classes differ most.

        S = sum_i (z_i - m_c(i)) (z_i - m_c(i))^T + penalty I     within the classes
        B = sum_c n_c (m_c - m) (m_c - m)^T                       between them
        maximise w^T B w where w^T S w = 1, all w orthogonal in S

    z = the columns standardised by mean and sd of the training rows, m their mean, m_c that of a
    class. Rows of a class lie in a round cloud afterwards, so nearest neighbours can be asked.
    Meant for some hundred columns: time grows with their cube.

    Shape:  train_x (n, D), train_labels (n,) integers of C classes
            ->  a fit of at most C - 1 columns, as of ridge_fit, the best first; use linear_scores
    Errors: ValueError for other shapes or types, no training rows, NaN or infinite values,
            penalty <= 0
    Source: Fisher 1936; Hastie et al. 2009, section 4.3.3
    Needs:  np, torch, _finite_rows, _integer_labels, _array, _scale_of
    Check:  classes that differ in the first column alone have one weight that is not 0
    """
    train = _finite_rows(train_x, "train_x")
    labels = _integer_labels(train_labels, len(train), "train_labels")
    if not len(train) or not penalty > 0:
        raise ValueError(f"need training rows and penalty > 0; got train_x {train.shape}, "
                         f"penalty={penalty}")
    mean, sd = _scale_of(train)
    z = (train - mean) / sd
    _, member, counts = np.unique(labels, return_inverse=True, return_counts=True)
    centres = np.stack([z[member == c].mean(0) for c in range(len(counts))])
    within = z - centres[member]
    root = np.linalg.cholesky(within.T @ within + penalty * np.eye(z.shape[1]))
    between = np.linalg.solve(root, (np.sqrt(counts)[:, None] * centres).T)
    directions, sizes, _ = np.linalg.svd(between, full_matrices=False)
    kept = (sizes > 1e-9 * sizes.max(initial=0)) & (np.arange(len(sizes)) < len(counts) - 1)
    weights = np.linalg.solve(root.T, directions[:, kept])
    return {"mean": mean.tolist(), "sd": sd.tolist(), "weights": weights.tolist(),
            "intercept": [0.0] * int(kept.sum())}


def logistic_fit(train_x, train_labels, *, penalty=1.0):
    """Logistic regression with an L2 penalty.

        minimise  sum_i ln(1 + exp(-s_i (z_i . w + b))) + penalty / 2 |w|^2
        s = 1 for label 1, -1 for label 0

    z = the columns standardised by mean and sd of the training rows; the intercept b is not
    penalised. A column that is constant in training has weight 0; without any other the logit is
    the log-odds of the training labels. Newton's method in float64; the step is halved while the
    loss does not fall. The penalty keeps separable data finite. The result is exact to the last
    digits, so there is no tolerance to choose. Meant for some hundred columns: time grows with
    their square, times the rows.

    Shape:  train_x (n, D), train_labels 0 / 1 of any type (n,)
            ->  {"mean", "sd", "weights": lists of D numbers, "intercept": number}, which a
            checkpoint or JSON can hold; logits by linear_scores
    Errors: ValueError for other shapes or labels, labels of one class, NaN or infinite values,
            penalty <= 0
    Source: Hastie et al. 2009, section 4.4.1; equal to sklearn's StandardScaler and
            LogisticRegression(C=1 / penalty)
    Needs:  math, warnings, np, torch, _finite_rows, _is_positive, _array, _scale_of
    Check:  x = 0, 1 of labels 0, 1 gives w with w (1 + exp(w)) = 2 on z = -1, 1: 0.675
    """
    train, positive = _finite_rows(train_x, "train_x"), _is_positive(train_labels)
    n = len(train)
    if positive.size != n or not 0 < penalty < math.inf:
        raise ValueError("need one label for each training row and penalty > 0; got train_x "
                         f"{train.shape}, {positive.size} labels, penalty={penalty}")
    if positive.all() or not positive.any():
        raise ValueError(f"training labels must hold both classes, got {positive.sum()} ones among "
                         f"{n} rows; split the rows so that each part has both (stratified), or "
                         "report binary_floor instead")
    mean, sd = _scale_of(train)
    # the last column is the intercept
    z = np.hstack([(train - mean) / sd, np.ones((n, 1))])
    sign = np.where(positive, 1.0, -1.0)
    ridge = np.append(np.full(train.shape[1], float(penalty)), 0.0)

    def objective(weights):
        return np.logaddexp(0, -sign * (z @ weights)).sum() + (ridge * weights**2).sum() / 2

    log_odds = math.log(positive.sum() / (~positive).sum())
    weights = np.append(np.zeros(train.shape[1]), log_odds)
    for _ in range(200):
        # 1 - P of the label, without overflow
        miss = np.exp(-np.logaddexp(0, sign * (z @ weights)))
        gradient = ridge * weights - z.T @ (sign * miss)
        if np.abs(gradient).max() <= 1e-13 * n:
            break
        step = np.linalg.solve((z.T * (miss * (1 - miss))) @ z + np.diag(ridge), gradient)
        size, loss, slope = 1.0, objective(weights), gradient @ step
        while size > 1e-9:
            enough = loss - 1e-4 * size * slope + 1e-13 * loss  # the last term allows for rounding
            if objective(weights - size * step) <= enough:
                break
            size /= 2
        weights = weights - size * step
    else:
        warnings.warn(f"logistic_fit: the gradient is still {np.abs(gradient).max():.2g} after 200 "
                      f"steps; raise penalty={penalty}", stacklevel=2)
    return {"mean": mean.tolist(), "sd": sd.tolist(), "weights": weights[:-1].tolist(),
            "intercept": float(weights[-1])}


def logistic_predict(train_x, train_labels, x, *, penalty=1.0):
    """Logit of every row by logistic_fit on the training rows: a simple binary baseline.

    Shape:  train_x (n, D), train_labels 0 / 1 of any type (n,), x (m, D)
            ->  float64 logits (m,)
    Errors: as logistic_fit and linear_scores
    Needs:  math, warnings, np, torch, logistic_fit, linear_scores,
            _finite_rows, _is_positive, _array, _scale_of
    Check:  x = 0, 1 of labels 0, 1 gives x = 1 the logit 0.675
    """
    return linear_scores(logistic_fit(train_x, train_labels, penalty=penalty), x)


def bootstrap_interval(values, *, level=0.95, resamples=1000, seed=0):
    """Percentile bootstrap interval of the mean of n values, such as one score per image.

    Draws n of the n values with replacement, `resamples` times, and takes the middle `level` of the
    means. NaN are left out.

    Shape:  values (n,)  ->  (low, high) floats; NaN for fewer than two values, which have no spread
    Source: Efron 1979; Efron and Tibshirani 1993, chapter 13
    Needs:  math, np, _middle
    Check:  equal values give that value twice
    """
    values = np.asarray(values, dtype=np.float64)
    values = values[~np.isnan(values)]
    if len(values) < 2:
        return math.nan, math.nan
    drawn = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    return _middle(values[drawn].mean(1), level)


def paired_bootstrap(a, b, groups, *, draws=2000, level=0.95, seed=0):
    """Interval of the difference of two models' scores on the same rows, drawn by group.

    A draw takes g of the g groups with replacement, with all of their rows: windows of one
    patient, or the eyes of one person, are one unit. Both models are scored on the same draw, so
    that its difficulty cancels. Draws in which a score is not defined are left out. With few
    groups, below about eight, the interval is too narrow: say how many there are.

    a, b    functions that score the rows of a draw: weights (k, n), how often each row is in it,
            -> (k,)
    groups  (n,) of any values; np.arange(n) if every row is a unit of its own
    returns (low, high) of a minus b; NaN if no draw is defined
    Source: Efron and Tibshirani 1993, chapter 13; by group: Field and Welsh 2007, doi
            10.1111/j.1467-9868.2007.00593.x
    Needs:  math, np, _middle
    Check:  a model against itself has (0, 0)
    """
    group_of_row = np.unique(np.asarray(groups), return_inverse=True)[1]
    n_groups, rng = group_of_row.max() + 1, np.random.default_rng(seed)
    step = max(1, 2**19 // len(group_of_row))  # half a million rows at a time
    differences = []
    for start in range(0, draws, step):
        size = min(step, draws - start)
        times = rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=size)
        weights = times[:, group_of_row].astype(np.float64)
        differences.append(a(weights) - b(weights))
    return _middle(np.concatenate(differences), level)


def weighted_ranking(scores, labels, weights):
    """AUROC and average precision when row i counts weights[i] times, as in a resample of the rows.

    A row has k weights, one for every resample. Ties count as in auroc and average_precision.
    NaN in both where all the weight is on one class.

    Shape:  scores real, labels 0 / 1, both (n,) or (n, 1); weights (k, n) >= 0
            ->  {"auroc", "auprc"} float64 arrays (k,)
    Errors: ValueError for NaN scores, other labels, unequal lengths
    Source: equal to auroc and average_precision of the rows, repeated by their weights
    Needs:  np, torch, _scores_and_labels, _is_positive, _array
    Check:  scores in the right order have 1, 1 for any weights
    """
    scores, positive = _scores_and_labels(scores, labels)
    weights = np.asarray(weights, dtype=np.float64)
    if weights.ndim != 2 or weights.shape[1] != scores.size:
        raise ValueError(f"weights must be (k, {scores.size}), got {weights.shape}")
    if not scores.size:
        return {name: np.full(len(weights), np.nan) for name in ("auroc", "auprc")}
    order = np.argsort(-scores, kind="stable")
    # tied scores are one step; the largest come first
    starts = np.flatnonzero(np.append(True, np.diff(scores[order]) != 0))
    positives = np.add.reduceat((weights * positive)[:, order], starts, axis=1)
    negatives = np.add.reduceat((weights * ~positive)[:, order], starts, axis=1)
    tp, fp = positives.cumsum(1), negatives.cumsum(1)
    n_positive, n_negative = tp[:, -1], fp[:, -1]
    # the negatives below, and half of those with the same score
    in_order = (positives * (n_negative[:, None] - fp + negatives / 2)).sum(1)
    precision = (positives * tp / np.maximum(tp + fp, 1e-300)).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):  # 0 / 0 is the NaN that is meant
        return {"auroc": in_order / (n_positive * n_negative),
                "auprc": np.where(n_negative > 0, precision / n_positive, np.nan)}


def bootstrap_ranking(scores, labels, *, resamples=1000, seed=0):
    """AUROC and average precision of bootstrap samples of the rows.

    A resample draws n of the n rows with replacement. The draws depend only on n and seed. So
    two models scored on the same rows get the same resamples, and the difference of their arrays is
    the paired bootstrap: the difficulty of the drawn rows cancels. A resample without one of the
    classes is NaN in both. The resamples are processed in chunks of half a million rows.

    Shape:  scores real, labels 0 / 1, both (n,) or (n, 1)
            ->  {"auroc", "auprc"} float64 arrays (resamples,)
    Errors: ValueError for NaN scores, other labels, unequal lengths, resamples < 1
    Source: Efron 1979; equal to auroc and average_precision of the drawn rows
    Needs:  math, np, torch, weighted_ranking, _scores_and_labels, _is_positive, _array
    Check:  scores in the right order have 1 in every resample; constant scores have AUROC 0.5 and
            AP the share of positives drawn
    """
    scores, positive = _scores_and_labels(scores, labels)
    if resamples < 1:
        raise ValueError(f"need resamples >= 1, got {resamples}; 1000 for an interval")
    n, rng = scores.size, np.random.default_rng(seed)
    samples = {name: np.full(resamples, math.nan) for name in ("auroc", "auprc")}
    step = max(1, 2**19 // max(n, 1))
    for start in range(0, resamples if n else 0, step):
        drawn = rng.integers(n, size=(min(step, resamples - start), n))
        drawn += n * np.arange(len(drawn))[:, None]
        weights = np.bincount(drawn.reshape(-1), minlength=n * len(drawn)).reshape(-1, n)
        for name, values in weighted_ranking(scores, positive, weights).items():
            samples[name][start : start + step] = values
    return samples


def ranking_interval(scores, labels, *, versus=None, level=0.95, resamples=1000, seed=0):
    """Percentile bootstrap intervals of AUROC and average precision, or of their differences.

    With versus, the scores of another model on the same rows, the interval is that of the
    difference, scores minus versus, with the rows resampled in pairs. If it leaves out 0, the
    models differ by more than the choice of test rows explains. Two overlapping single intervals do
    not show that two models are equal. Resamples without one of the classes are left out; NaN if
    all are. The interval does not include the effect of another training seed.

    Shape:  scores, versus real, labels 0 / 1, all (n,) or (n, 1)
            ->  {"auroc_low", "auroc_high", "auprc_low", "auprc_high"} floats
    Errors: ValueError for NaN scores, other labels, unequal lengths, level outside (0, 1),
            resamples < 1
    Source: Efron and Tibshirani 1993, chapter 13
    Needs:  math, np, torch, bootstrap_ranking, weighted_ranking, _middle, _scores_and_labels,
            _is_positive, _array
    Check:  scores in the right order give 1, 1, 1, 1; versus themselves 0, 0, 0, 0
    """
    if not 0 < level < 1:
        raise ValueError(f"need 0 < level < 1, got {level}; 0.95 leaves out 2.5 % on either side")
    samples = bootstrap_ranking(scores, labels, resamples=resamples, seed=seed)
    if versus is not None:
        other = bootstrap_ranking(versus, labels, resamples=resamples, seed=seed)
        samples = {name: samples[name] - other[name] for name in samples}
    interval = {}
    for name, values in samples.items():
        interval[f"{name}_low"], interval[f"{name}_high"] = _middle(values, level)
    return interval


def _middle(values, level):
    """The middle `level` of the values (n,), as (low, high); NaN are left out. Needs: math, np"""
    values = values[~np.isnan(values)]
    if not len(values):
        return math.nan, math.nan
    low, high = np.quantile(values, ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)


def _counts(confusion, ndim):
    """True positives, predicted pixels and true pixels by class, float64, of (..., C, C) counts."""
    confusion = np.asarray(confusion, dtype=np.float64)
    if confusion.ndim != ndim or confusion.shape[-1] != confusion.shape[-2]:
        need = "(n, C, C), one per image" if ndim == 3 else "(C, C)"
        raise ValueError(f"confusion counts must be {need}; got {confusion.shape}")
    return np.diagonal(confusion, axis1=-2, axis2=-1), confusion.sum(-2), confusion.sum(-1)


def _array(values, dtype=None):
    """A tensor, array or list as an array; float32 for bfloat16, which numpy does not have."""
    if torch.is_tensor(values):
        values = values.detach().cpu()
        if values.dtype == torch.bfloat16:
            values = values.float()
    return np.asarray(values, dtype=dtype)


def _finite_rows(x, name):
    """Features (n, D), tensor, array or list, as float64 without NaN."""
    x = _array(x, np.float64)
    if x.ndim != 2:
        raise ValueError(f"{name} must be (n, D), got {x.shape}")
    broken = ~np.isfinite(x).all(1)
    if broken.any():
        raise ValueError(f"{broken.sum()} of {len(x)} rows of {name} hold NaN or infinite values")
    return x


def _unit_rows(x, name):
    """Rows of _finite_rows at length 1; a zero row stays zero."""
    x = _finite_rows(x, name)
    length = np.sqrt(np.square(x).sum(1, keepdims=True))
    return x / np.where(length > 0, length, 1)


def _scale_of(x):
    """Mean and sd of the columns; a constant column gets its value and 1, so that it becomes 0."""
    # not sd > 0: the mean of equal numbers may differ from them in the last bit
    varies = x.min(0) < x.max(0)
    return np.where(varies, x.mean(0), x[0]), np.where(varies, x.std(0), 1.0)


def _integer_labels(labels, n, name):
    """Integer or bool labels (n,), tensor, array or list, as int64."""
    labels = _array(labels)
    if labels.shape != (n,) or labels.size and labels.dtype.kind not in "biu":
        raise ValueError(f"{name} must be ({n},) integers, one for each row; got {labels.shape} of "
                         f"{labels.dtype}")
    return labels.astype(np.int64)


def _is_positive(labels):
    """Labels 0 / 1 of any type, (n,) or (n, 1), as a flat bool array."""
    labels = _array(labels)
    if labels.shape not in [(labels.size,), (labels.size, 1)]:
        raise ValueError(f"labels must be (n,) or (n, 1), got {labels.shape}")
    if not ((labels == 0) | (labels == 1)).all():  # 25 times faster than np.isin
        raise ValueError(f"labels must be 0 or 1, got {np.unique(labels)[:5]}")
    return labels.reshape(-1) == 1


def _scores_and_labels(scores, labels):
    """Checked scores as float64 (n,), and which of them are positives, bool (n,)."""
    scores = _array(scores, np.float64)
    positive = _is_positive(labels)
    if scores.shape not in [positive.shape, (positive.size, 1)]:
        raise ValueError(f"{positive.size} labels need one score each, (n,) or (n, 1), got "
                         f"{scores.shape}")
    if np.isnan(scores).any():
        raise ValueError(f"{np.isnan(scores).sum()} of {scores.size} scores are NaN")
    return scores.reshape(-1), positive


def _counts_by_score(scores, labels):
    """Counts at the distinct scores of the positives, ascending, and the number of negatives.

    Three int64 arrays (m,): positives with the score, negatives below it, negatives not above it.
    """
    scores, positive = _scores_and_labels(scores, labels)
    distinct, tied = np.unique(scores[positive], return_counts=True)
    negatives = np.sort(scores[~positive])
    below = np.searchsorted(negatives, distinct)
    not_above = np.searchsorted(negatives, distinct, side="right")
    return tied, below, not_above, negatives.size
