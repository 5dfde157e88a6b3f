"""Losses on logits or features, metrics on raw scores, and baselines for both.

Losses take logits, never probabilities. Metrics take the raw scores of a whole split at once, so
they do not depend on the batch size; an undefined value is NaN, never 0.

Dimensions: b batch, c class, d feature, n flattened (all samples of a split); of sets: s set, n and
            m elements, f feature

    >>> scores, labels = [2.0, 0.5, 0.5, -1.0], [1, 1, 0, 0]    # logits: 0 is P = 0.5
    >>> binary_report(scores, labels)["f1"], binary_floor(labels)["f1"]
    (0.8, 0.6666666666666666)
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
    """Cross-entropy with smoothed targets and a focal factor on the term of each class.

        loss = -sum_c w_c q_c (1 - p_c)^gamma log p_c
        p = softmax(logits), q = (1 - smoothing) * t + smoothing / C

    Binary logits z are the case C = 2 with P(1) = sigmoid(z). gamma = 0 is F.cross_entropy, in
    value and gradient. The usual single factor (1 - p_target)^gamma takes the loss to 0 as p_target
    goes to 1 and so cancels the smoothing; here an overconfident prediction is still pulled back.

    "mean" divides by the weights of the targets, sum_c t_c w_c of each; as in torch, class
    probabilities by their number. Class indices and binary labels equal to ignore_index are left
    out; if none remains the mean is 0, connected to the graph, where torch has NaN. Half-precision
    logits are computed, and the loss returned, in float32.

    Shape:  logits (B, C, ...), targets (B, ...) class indices or (B, C, ...) probabilities  ->
            scalar, or "none": (B, ...)
            binary logits (B,) or (B, 1), targets (B,) or (B, 1) of any dtype in [0, 1]      ->
            scalar, or "none": (B,)
    Errors: ValueError for other shapes, a binary label outside [0, 1], an option out of range
    Source: Lin et al. 2017, arXiv:1708.02002, eq. 4; Szegedy et al. 2016, arXiv:1512.00567, sec. 7
    Needs:  _weights_of_classes
    Check:  equal logits cost (1 - 1/C)^gamma * ln C: 0.7798 for C = 4, gamma = 2, any target
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
            raise ValueError(f"binary labels must be in [0, 1], got {labels.min():g} to "
                             f"{labels.max():g}")
        logits = F.pad(logits.reshape(-1, 1), (1, 0))  # softmax([0, z])[1] is sigmoid(z)
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
        raise ValueError("logits (B, C, ...) need integer targets (B, ...) or probabilities (B, "
                         f"C, ...); {got}")

    classes, weights = logits.shape[1], _weights_of_classes(class_weights, logits)
    weights_c = weights.view(-1, *[1] * (logits.ndim - 2))  # broadcasts over (b, c, ...)

    def focal(log_p):
        # for gamma < 1 the slope of (1 - p)^gamma is infinite at p = 1; the clamp makes it 0 there
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
    if reduction != "mean":
        return loss.sum() if reduction == "sum" else loss
    share = share.masked_fill(~kept, 0).sum()
    return loss.sum() / torch.where(kept.any(), share, 1)


def _weights_of_classes(class_weights, logits):
    """class_weights as a checked tensor (C,) of the type and device of the logits; None: ones."""
    classes = logits.shape[1]
    if class_weights is None:
        return logits.new_ones(classes)
    weights = torch.as_tensor(class_weights).to(logits)
    if weights.shape != (classes,):
        raise ValueError(f"class_weights must be ({classes},), one for each class, got "
                         f"{tuple(weights.shape)}")
    return weights


class FocalLabelSmoothCE(nn.Module):
    """focal_label_smooth_ce with its options fixed; class_weights is a buffer.

    Needs:  focal_label_smooth_ce
    """

    def __init__(self, smoothing=0.05, gamma=2.0, *, class_weights=None, ignore_index=-100,
                 reduction="mean"):
        super().__init__()
        self.smoothing, self.gamma = smoothing, gamma
        self.ignore_index, self.reduction = ignore_index, reduction
        self.register_buffer("class_weights", None if class_weights is None
                             else torch.as_tensor(class_weights))

    def forward(self, logits, targets):
        return focal_label_smooth_ce(logits, targets, gamma=self.gamma, smoothing=self.smoothing,
                                     reduction=self.reduction, class_weights=self.class_weights,
                                     ignore_index=self.ignore_index)


def dice_loss(logits, targets, *, per="image", absent="skip", smooth=1e-5, class_weights=None,
              ignore_index=None):
    """One minus the overlap of prediction and truth, a mean over classes: small ones count as much.

        dice_c = (2 sum min(p_c, t_c) + smooth) / (sum p_c + sum t_c + smooth)
        loss = 1 - mean_c dice_c

    p = softmax(logits); the sums run over the pixels. For hard targets min(p, t) is the usual p *
    t; for soft ones it makes p = t the minimum, 0; a pixel whose probabilities are all 0 is left
    out. per "image" takes the mean of the images' losses, "batch" pools the sums of all images
    first.

    A class without target pixels (in the image, or in the batch): "skip" leaves it out of the mean
    over classes; "count" keeps its term, close to 1 for the least probability on it; "zero" takes
    its loss as 0, which only dilutes the others. class_weights weigh the classes in that mean.
    Pixels whose class index is ignore_index are left out and may hold NaN logits. An image in which
    nothing counts is left out of the mean over images; if none is left the loss is 0, connected to
    the graph. Half-precision logits are computed, and the loss returned, in float32. Index targets
    are never expanded to one-hot.

    Shape:  logits (B, C, ...), targets (B, ...) class indices or (B, C, ...) probabilities  ->
            scalar in [0, 1]
    Errors: ValueError for other shapes or types, an index outside 0..C-1, an option out of range.
            Probabilities passed as logits look like logits and cannot be refused: their softmax is
            nearly flat, and so is the loss.
    Source: Sudre et al. 2017, arXiv:1707.03237; min for soft targets: Wang et al. 2023,
            arXiv:2303.16296
    Needs:  _dice_and_sums, _flat_pixels, _ClassSums, _weights_of_classes
    Check:  one pixel, two equal logits: dice of its class is 2 * 0.5 / (0.5 + 1), the loss 1/3
    """
    return _dice_and_sums(*_flat_pixels(logits, targets, ignore_index), per, absent, smooth,
                          class_weights)[0]


def _dice_and_sums(logits, targets, kept, per, absent, smooth, class_weights):
    """dice_loss of flat pixels; for class indices also the last three sums of _ClassSums.

    ce_dice_loss takes its cross-entropy from them, without a second softmax.
    """
    if per not in ("image", "batch") or absent not in ("skip", "count", "zero") or not smooth > 0:
        raise ValueError("need per image or batch, absent skip, count or zero, and smooth > 0; "
                         f"got per={per!r}, absent={absent!r}, smooth={smooth}")
    weights = _weights_of_classes(class_weights, logits)
    if targets.shape == logits.shape:
        p = logits.masked_fill(~kept.unsqueeze(1), 0).softmax(1) * kept.unsqueeze(1)
        sums, for_ce = (torch.minimum(p, targets).sum(2), p.sum(2), targets.sum(2)), None
    else:
        overlap, sum_p, *for_ce = _ClassSums.apply(logits, targets, kept)
        sums = overlap, sum_p, for_ce[0]
    if per == "batch":
        sums = [image_sums.sum(0, keepdim=True) for image_sums in sums]
    overlap, sum_p, sum_t = sums

    dice = (2 * overlap + smooth) / (sum_p + sum_t + smooth)
    present = sum_t > 0
    if absent == "zero":
        dice = dice.masked_fill(~present, 1)
    share = weights * (present if absent == "skip" else present.any(1, keepdim=True))
    total = share.sum(1)
    loss = (share * (1 - dice)).sum(1) / total.masked_fill(total == 0, 1)
    return loss.sum() / (total > 0).sum().clamp_min(1), for_ce


class _ClassSums(torch.autograd.Function):
    """Five sums over the kept pixels of an image, each (b, c), for class indices t.

        of p_c and of log p_c, over all pixels; of p_c, of log p_c and of 1, where t = c
        p = softmax(logits)

    Dice and cross-entropy, with weights and smoothing, are functions of these. Let o, a, -, l, h be
    their gradients. Of a pixel it is

        grad_k = p_k (a_k - sum_j a_j p_j - sum_j h_j - u) + h_k + [k = t] u      u = o_t p_t + l_t

    By hand because autograd passes and keeps several arrays of the size of the logits. This goes
    through the pixels in chunks that stay in the cache, and takes the softmax a second time in
    backward, so that the gradient is the only such array. The definition in plain torch is its
    oracle in the tests. Differentiable once; a second time is an error.
    """

    @staticmethod
    def forward(ctx, logits, targets, kept):
        ctx.save_for_backward(logits, targets, kept)
        ctx.set_materialize_grads(False)
        # float64: a running float32 sum of 2^18 terms rounds the last ones off
        sums = logits.new_zeros(5, *logits.shape[:2], dtype=torch.float64)
        overlap, sum_p, sum_t, log_p_t, log_p_all = sums
        for _, index, keep, p, log_p in _ClassSums.chunks(logits, targets, kept):
            overlap.scatter_add_(1, index, p.gather(1, index.unsqueeze(1)).squeeze(1).double())
            sum_p += p.sum(2)
            sum_t.scatter_add_(1, index, keep.double())
            log_p_t.scatter_add_(1, index, log_p.gather(1, index.unsqueeze(1)).squeeze(1).double())
            log_p_all += log_p.sum(2)
        return sums.to(logits.dtype).unbind()

    @staticmethod
    def chunks(logits, targets, kept):
        """Slices of the pixels (m), and there index and kept (b, m), p and log p (b, c, m).

        p and log p are 0 where a pixel is not kept.
        """
        numbers = torch.get_num_threads() * 2**18 if logits.device.type == "cpu" else 2**24
        step = max(1, numbers // max(1, logits.shape[0] * logits.shape[1]))
        for start in range(0, logits.shape[2], step):
            pixels = slice(start, start + step)
            z, keep = logits[:, :, pixels], kept[:, pixels]
            log_p = z - z.amax(1, keepdim=True)
            p = log_p.exp()
            total = p.sum(1, keepdim=True)
            p, log_p = p.div_(total), log_p.sub_(total.log())
            image, pixel = (~keep).nonzero(as_tuple=True)
            p[image, :, pixel] = log_p[image, :, pixel] = 0  # many times faster than masked_fill
            yield pixels, targets[:, pixels].masked_fill(~keep, 0), keep, p, log_p

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, o, a, _, l, h):
        logits, targets, kept = ctx.saved_tensors
        smoothed, zeros = h is not None, logits.new_zeros(logits.shape[:2])
        o, a, l, h = (zeros if gradient is None else gradient for gradient in (o, a, l, h))
        a, h, sum_h = a.unsqueeze(2), h.unsqueeze(2), h.sum(1)[:, None, None]
        grad = torch.empty_like(logits)
        for pixels, index, keep, p, _ in _ClassSums.chunks(logits, targets, kept):
            u = (p.gather(1, index.unsqueeze(1)).squeeze(1) * o.gather(1, index)
                 + keep * l.gather(1, index)).unsqueeze(1)
            part = (a - ((a * p).sum(1, keepdim=True) + sum_h + u)).mul_(p)
            part = part.scatter_add_(1, index.unsqueeze(1), u)
            grad[:, :, pixels] = part.add_(h * keep.unsqueeze(1)) if smoothed else part
        return grad, None, None


class DiceLoss(nn.Module):
    """dice_loss with its options fixed; class_weights is a buffer.

    Needs:  dice_loss
    """

    def __init__(self, *, per="image", absent="skip", smooth=1e-5, class_weights=None,
                 ignore_index=None):
        super().__init__()
        self.per, self.absent, self.smooth, self.ignore_index = per, absent, smooth, ignore_index
        self.register_buffer("class_weights", None if class_weights is None
                             else torch.as_tensor(class_weights))

    def forward(self, logits, targets):
        return dice_loss(logits, targets, per=self.per, absent=self.absent, smooth=self.smooth,
                         class_weights=self.class_weights, ignore_index=self.ignore_index)


def ce_dice_loss(logits, targets, *, ce_weight=1.0, dice_weight=1.5, label_smoothing=0.0, gamma=0.0,
                 class_weights=None, ignore_index=-100, per="image", absent="skip", smooth=1e-5):
    """Cross-entropy, which judges every pixel, plus Dice, which judges every class.

        loss = ce_weight * CE + dice_weight * Dice

    CE is F.cross_entropy, or with gamma > 0 focal_label_smooth_ce; label_smoothing is its own, Dice
    sees the targets as they are. class_weights and ignore_index hold for both, and probabilities
    that are all 0 are an ignored pixel too. Ignored pixels may hold NaN logits; with all of them
    ignored the loss is 0, connected to the graph, where torch has NaN. Computed and returned in
    float32, or float64 for such logits.

    Shape:  logits (B, C, ...), targets (B, ...) class indices or (B, C, ...) probabilities
            ->  scalar, and for the log its parts without weights or graph, {"ce", "dice"}
    Errors: ValueError for other shapes or types, an index outside 0..C-1, an option out of range
    Needs:  focal_label_smooth_ce, _dice_and_sums, _flat_pixels, _ClassSums, _weights_of_classes
    Check:  one pixel, two equal logits: ln 2 + 1.5 / 3 = 1.1931
    """
    weights_ok = ce_weight >= 0 and dice_weight >= 0
    if not (weights_ok and 0 <= label_smoothing <= 1 and gamma >= 0):
        raise ValueError("need ce_weight, dice_weight, gamma >= 0 and label_smoothing in [0, 1]; "
                         f"got ce_weight={ce_weight}, dice_weight={dice_weight}, gamma={gamma}, "
                         f"label_smoothing={label_smoothing}")
    logits, targets, kept = _flat_pixels(logits, targets, ignore_index)
    dice, for_ce = _dice_and_sums(logits, targets, kept, per, absent, smooth, class_weights)
    soft = targets.shape == logits.shape
    weights = _weights_of_classes(class_weights, logits)
    if for_ce and not gamma:  # the softmax of Dice serves it
        sum_t, log_p_t, log_p = for_ce
        ce = -(1 - label_smoothing) * (weights * log_p_t).sum()
        if label_smoothing:
            ce = ce - label_smoothing * (weights * log_p).sum() / logits.shape[1]
        ce = ce / torch.where(kept.any(), (weights * sum_t).sum(), 1)
    elif not kept.any():
        ce = 0 * dice
    else:  # the kept pixels alone, in one row: NaN elsewhere would reach the gradient
        logits = logits.movedim(1, 2)[kept]
        targets = targets.movedim(1, 2)[kept] if soft else targets[kept]
        if gamma:
            ce = focal_label_smooth_ce(logits, targets, gamma=gamma, smoothing=label_smoothing,
                                       class_weights=class_weights)
        else:
            ce = F.cross_entropy(logits, targets, weights, label_smoothing=label_smoothing)
    return ce_weight * ce + dice_weight * dice, {"ce": ce.detach(), "dice": dice.detach()}


class CEDiceLoss(nn.Module):
    """The scalar of ce_dice_loss with its options fixed; class_weights is a buffer.

    Needs:  ce_dice_loss
    """

    def __init__(self, ce_weight=1.0, dice_weight=1.5, label_smoothing=0.0, *, gamma=0.0,
                 class_weights=None, ignore_index=-100, per="image", absent="skip", smooth=1e-5):
        super().__init__()
        self.ce_weight, self.dice_weight = ce_weight, dice_weight
        self.label_smoothing, self.gamma = label_smoothing, gamma
        self.ignore_index, self.per, self.absent, self.smooth = ignore_index, per, absent, smooth
        self.register_buffer("class_weights", None if class_weights is None
                             else torch.as_tensor(class_weights))

    def forward(self, logits, targets):
        return ce_dice_loss(logits, targets, ce_weight=self.ce_weight, dice_weight=self.dice_weight,
                            gamma=self.gamma, label_smoothing=self.label_smoothing,
                            class_weights=self.class_weights, ignore_index=self.ignore_index,
                            per=self.per, absent=self.absent, smooth=self.smooth)[0]


def _flat_pixels(logits, targets, ignore_index):
    """Checked and flattened: logits (b, c, n) float32 or 64, targets, and which pixels are kept.

    targets int64 (b, n) or probabilities (b, c, n); kept bool (b, n)
    """
    got = (f"got logits {tuple(logits.shape)} of {logits.dtype}, targets {tuple(targets.shape)} of "
           f"{targets.dtype}")
    if logits.ndim < 2 or logits.shape[1] < 2 or not logits.is_floating_point():
        raise ValueError(f"logits must be real (B, C, ...) with C > 1; {got}")
    if targets.shape != logits.shape and (targets.shape != logits[:, 0].shape
                                          or targets.is_floating_point()):
        raise ValueError("logits (B, C, ...) need integer targets (B, ...) or probabilities (B, "
                         f"C, ...); {got}")
    soft, classes = targets.shape == logits.shape, logits.shape[1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).unsqueeze(-1).flatten(2)
    if soft:
        targets = targets.to(logits.dtype).unsqueeze(-1).flatten(2)
        return logits, targets, targets.sum(1) > 0
    # before the comparison: -100 as uint8 would be class 156
    targets = targets.long().unsqueeze(-1).flatten(1)
    kept = torch.ones_like(targets, dtype=torch.bool)
    if ignore_index is not None:
        kept = targets != ignore_index
    wrong = targets[kept & ((targets < 0) | (targets >= classes))]
    if len(wrong):
        raise ValueError(f"class indices must be in 0..{classes - 1} or "
                         f"ignore_index={ignore_index}, got {wrong.min()} to {wrong.max()} in "
                         f"{len(wrong)} pixels; for void pixels pass their value as ignore_index")
    return logits, targets, kept


def supcon_loss(features, labels, *, temperature=0.07, gather=True):
    """Supervised contrastive loss: pull the samples of a class together, push the others away.

        loss = mean_i  mean_{p in P_i}  -log( exp(s_ip / T) / sum_{a != i} exp(s_ia / T) )

    s = cosine of two features, normalised here; P_i = the other samples of the class of i; T =
    temperature. A sample without others of its class is left out of the mean and stays a negative
    for the rest. A zero vector has cosine 0 with all and a finite gradient. Two views of a sample
    are two rows with one label. The value tells nothing alone: see supcon_bounds.

    With torch.distributed initialised the batch is that of all processes, and all of them must call
    it. Each returns the loss of the whole batch; their gradients, averaged as DDP does, are those
    of one process that holds the whole batch. gather=False takes these rows alone, for scoring rows
    that every process holds. Computed and returned in float32, also under autocast, or in float64
    for such features.

    Shape:  features (B, D), labels (B,) integers  ->  scalar
    Errors: ValueError for other shapes or types, no two samples of one class, temperature <= 0,
            processes with unequal shapes
    Source: Khosla et al. 2020, arXiv:2004.11362, eq. 2 (L_out)
    Needs:  all_rows
    Check:  equal features cost ln(B - 1) whatever their labels, 3.4340 for B = 32; one class never
            less
    """
    labels = torch.as_tensor(labels, device=features.device)
    real = features.is_floating_point() and not labels.is_floating_point()
    if not real or features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError("need real features (B, D) and integer labels (B,); got "
                         f"{tuple(features.shape)} of {features.dtype}, labels "
                         f"{tuple(labels.shape)} of {labels.dtype}")
    if not temperature > 0:
        raise ValueError(f"need temperature > 0, got {temperature}")
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    labels, processes = labels.long(), 1
    if gather:
        features, labels, processes = all_rows(features, labels)

    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    positive = (labels.unsqueeze(1) == labels) & ~itself
    positives = positive.sum(1)
    anchor = positives > 0
    if not anchor.any():
        raise ValueError(f"no two of {len(labels)} samples share a class ({len(labels.unique())} "
                         "classes), so there is no positive pair; draw batches that hold at least "
                         "two samples of a class (stratified batches, or larger ones)")
    with torch.autocast(features.device.type, enabled=False):
        length = features.norm(dim=1, keepdim=True)
        # F.normalize would give a zero vector 10^12 times its gradient
        unit = features / length.masked_fill(length == 0, 1)
        logits = (unit @ unit.T / temperature).masked_fill(itself, -math.inf)
        # log_softmax subtracts the maximum: any temperature is stable
        log_p = logits.log_softmax(1).masked_fill(~positive, 0)
        loss = -(log_p.sum(1) / positives.clamp_min(1)).sum() / anchor.sum()
    # Each process has the gradient through its own rows alone. Their sum is needed, and DDP takes
    # their mean.
    return loss if processes == 1 else loss.detach() + processes * (loss - loss.detach())


def all_rows(features, labels):
    """Features and labels of all processes, in the order of the ranks, and the number of processes.

    This process's own rows keep their graph.
    """
    dist = torch.distributed
    processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if processes == 1:
        return features, labels, 1

    def gather(x):
        parts = [torch.empty_like(x) for _ in range(processes)]
        dist.all_gather(parts, x)
        return parts

    # unequal ones would hang, or worse
    shapes = torch.stack(gather(torch.tensor(features.shape, device=features.device))).tolist()
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"every process needs features of the same shape, got {shapes} in the "
                         "order of the ranks; give each rank as many rows, for instance by "
                         "leaving out the last batch")
    parts = gather(features.detach().contiguous())
    parts[dist.get_rank()] = features
    return torch.cat(parts), torch.cat(gather(labels.contiguous())), processes


def supcon_bounds(labels, *, temperature=0.07):
    """Bounds of supcon_loss from the labels alone: print both beside the loss.

        lower = mean_i ln((n_i - 1) + (B - n_i) exp(-2 / T))      collapsed = ln(B - 1)

    i runs over the samples that share their class, n_i of them with i itself; T = temperature.
    lower is what features would have that coincide within each class and lie opposite all others:
    no features have less, two classes can have it, more come close at a low temperature. collapsed
    is what equal features have, so a network that stays there has learnt nothing. With one class
    both are ln(B - 1) and there is nothing to learn. NaN if no two samples share a class.

    Shape:  labels (B,) of any type, over several processes those of all  ->  (lower, collapsed)
            floats
    Errors: ValueError for other shapes, temperature <= 0
    Source: Jensen on the sum over positives, and every cosine in [-1, 1]
    Check:  32 samples of one class: 3.4340, 3.4340; of four classes with 8 each: ln 7 = 1.9459,
            3.4340
    """
    labels = np.asarray(labels.detach().cpu() if torch.is_tensor(labels) else labels)
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
    """KL divergence of a diagonal Gaussian from N(0, I) in nats, one number per row.

        KL = sum_d max(free_bits, (mu_d^2 + exp(logvar_d) - 1 - logvar_d) / 2)

    A dimension of a row that costs less than free_bits costs free_bits and has no gradient: that
    much of a code is free, so that it is not given up before the decoder has learnt to use it. The
    maximum is taken of every row by itself, so the loss of a batch is the sum over its rows,
    whichever rows, or processes, share a batch. Kingma et al. take it of the mean over the batch,
    which does not add up over batches; theirs is never larger than the mean of this one. logvar is
    not clamped: in float32 exp overflows above 88.7. Computed and returned in float32, or in
    float64 for such inputs.

    Shape:  mu, logvar real (..., D)  ->  (...)
    Errors: ValueError for unequal shapes or other types, free_bits < 0
    Source: Kingma and Welling 2014, arXiv:1312.6114, appendix B; free bits: Kingma et al. 2016,
            arXiv:1606.04934, eq. 15
    Check:  mu = 1, logvar = 0 cost 0.5 for each dimension; mu = 0, logvar = ln 4 cost 0.8069; the
            prior costs free_bits * D
    """
    if mu.shape != logvar.shape or not mu.ndim or not (mu.is_floating_point()
                                                       and logvar.is_floating_point()):
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
    """Cost of taking each vector of one set for each vector of another.

        cost_ij = direction * (1 - cos(x_i, y_j)) + magnitude * | |x_i| - |y_j| |
                  + distance * |x_i - y_j|^2

    argmin(1) is the nearest x of each y, argmin(2) the nearest y of each x. Padding is for the
    caller to mask, as chamfer does. A vector shorter than 1e-12 has no direction: cosine 0 with
    all. The gradient is finite everywhere.

    One matrix product serves cosine and distance, |x - y|^2 = |x|^2 + |y|^2 - 2 x.y, clamped at 0;
    no (S, N, M, F) tensor is made. The price: distances are good to about 1e-7 of the squared
    lengths (float32; with TF32 allowed only to 1e-3). Computed and returned in float32, also under
    autocast, or in float64 for such vectors.

    Shape:  x real (S, N, F), y real (S, M, F)  ->  (S, N, M), all >= 0
    Errors: ValueError for other shapes or types, a weight < 0
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
        squared = (x.square().sum(2).unsqueeze(2) + y.square().sum(2).unsqueeze(1)
                   - 2 * product).clamp_min(0)
        divisor = length_x.masked_fill(length_x < 1e-12, 1)
        divisor = divisor * length_y.masked_fill(length_y < 1e-12, 1)
        across = (1 - product / divisor).clamp_min(0)  # rounding may take a cosine beyond 1
        return direction * across + magnitude * (length_x - length_y).abs() + distance * squared


def chamfer(x, y, *, x_mask=None, y_mask=None, direction=1.0, magnitude=1.0, distance=3.0):
    """Symmetric Chamfer distance of padded sets: each element pays for its nearest in the other.

        loss = mean_i min_j cost_ij + mean_j min_i cost_ij
        cost as in set_costs; i, j run over the elements, not the padding

    The order of elements does not matter, nor the padding, which may hold NaN and gets gradient 0.
    Small and large sets weigh the same. Several elements may share one nearest: it is no matching.
    Tied nearest elements share the gradient evenly. A set without elements on one side or on both
    has nothing to compare: 0, with gradient 0; so average over the sets that hold elements, not
    over all. The masks are not looked at for it, which would wait for the device.

    The gradient goes to both sides, so pass targets fixed or detached. With targets that train (an
    embedding of the variable, say) the cheapest solution is one direction for all of them: the loss
    goes to 0 and the sets no longer tell anything. Computed and returned in float32, also under
    autocast, or in float64 for such vectors.

    Shape:  x real (S, N, F), y real (S, M, F), masks bool (S, N), (S, M), True is an element, None:
            all are  ->  (S,)
    Errors: ValueError for other shapes or types, a weight < 0
    Source: Fan et al. 2017, arXiv:1612.00603, section 4.2, there with the distance alone
    Needs:  set_costs
    Check:  the sets {(1, 0)} and {(2, 0)} have 4 + 4 = 8; a set and itself 0
    """

    def checked(name, sets, mask):
        if mask is None:
            return sets, torch.ones(sets.shape[:2], dtype=torch.bool, device=sets.device)
        if sets.ndim != 3 or mask.shape != sets.shape[:2] or mask.dtype != torch.bool:
            raise ValueError(f"{name} (S, N, F) needs a mask (S, N) of bool, True where it holds "
                             f"an element (of a padding mask take its ~); got {name} "
                             f"{tuple(sets.shape)} and {name}_mask {tuple(mask.shape)} of "
                             f"{mask.dtype}")
        # before use: in a gradient 0 * NaN is NaN
        return sets.masked_fill(~mask.unsqueeze(2), 0), mask

    (x, x_mask), (y, y_mask) = checked("x", x, x_mask), checked("y", y, y_mask)
    costs = set_costs(x, y, direction=direction, magnitude=magnitude, distance=distance)
    if 0 in costs.shape:
        return costs.sum((1, 2))

    # costs (s, own, other); without others the minimum is inf, and not counted
    def one_way(costs, own, other):
        nearest = costs.masked_fill(~other.unsqueeze(1), math.inf).amin(2)
        counted = own & other.any(1, keepdim=True)
        return nearest.masked_fill(~counted, 0).sum(1) / counted.sum(1).clamp_min(1)

    return one_way(costs, x_mask, y_mask) + one_way(costs.transpose(1, 2), y_mask, x_mask)


def auto_pos_weight(labels):
    """pos_weight of F.binary_cross_entropy_with_logits that balances binary labels.

        pos_weight = negatives / positives

    Count the training labels only. With one class there is nothing to balance: 1.0, with a warning.
    The weight moves the optimum: the logits then stand for log-odds + ln(pos_weight), and
    sigmoid(logit) is no longer the frequency.

    Shape:  labels 0 / 1 of any type, (n,) or (n, 1)  ->  float
    Errors: ValueError for other labels or shapes
    Needs:  _is_positive
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
    """Class weights that lift rare classes, the square root of median frequency balancing.

        weight_c = sqrt(median(counts) / counts_c)

    The root keeps a class 10,000 times rarer from weighing 10,000 times more. Count the pixels of
    the training masks only. A class without pixels is left out of the median and weighs 1.0, as the
    median class does, with a warning.

    Shape:  counts (C,), tensor, array or list  ->  float32 tensor (C,), for class_weights=...
    Errors: ValueError for other shapes, negative or non-finite counts
    Source: Eigen and Fergus 2015, arXiv:1411.4734; there without the root, and counting only images
            that hold the class
    Check:  counts 1, 4, 16 give 2, 1, 0.5
    """
    counts = np.asarray(counts.detach().cpu() if torch.is_tensor(counts) else counts,
                        dtype=np.float64)
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
# Metrics, and baselines on the same rows


def auroc(scores, labels):
    """Probability that a random positive scores above a random negative; a tie counts half.

        AUROC = (pairs in order + pairs tied / 2) / (positives * negatives)

    NaN when either class is missing. Any increasing function of the scores gives the same, so pass
    logits: a sigmoid in float32 is 1 from 17 on and makes ties of different scores.

    Shape:  scores real, labels 0 / 1, both (n,) or (n, 1), tensor, array or list  ->  float
    Errors: ValueError for NaN scores, other labels, unequal lengths
    Source: Hanley and McNeil 1982; equal to sklearn.metrics.roc_auc_score
    Needs:  _counts_by_score, _scores_and_labels, _is_positive
    Check:  chance is 0.5; scores 2, 0.5, 0.5, -1 of labels 1, 1, 0, 0 give 0.875
    """
    tied, below, not_above, negatives = _counts_by_score(scores, labels)
    if not tied.size or not negatives:
        return math.nan
    return float((tied * (below + not_above)).sum() / (2 * tied.sum() * negatives))


def average_precision(scores, labels):
    """Area under the precision-recall curve (AUPRC): mean precision at the scores of the positives.

        AP = mean over positives i of  TP_i / (TP_i + FP_i)
        TP_i, FP_i count the samples that score at least s_i

    Tied scores share one threshold, so their order does not matter, and nothing is interpolated
    between thresholds. NaN without positives.

    Shape:  scores real, labels 0 / 1, both (n,) or (n, 1), tensor, array or list  ->  float
    Errors: ValueError for NaN scores, other labels, unequal lengths
    Source: equal to sklearn.metrics.average_precision_score
    Needs:  _counts_by_score, _scores_and_labels, _is_positive
    Check:  chance is the share of positives; scores 2, 0.5, 0.5, -1 of labels 1, 1, 0, 0 give 5/6
    """
    tied, below, _, negatives = _counts_by_score(scores, labels)
    if not tied.size:
        return math.nan
    tp, fp = tied[::-1].cumsum()[::-1], negatives - below
    return float((tied * (tp / (tp + fp))).sum() / tied.sum())


def binary_report(scores, labels, *, threshold=0.0):
    """Scores of a binary classifier over a whole split.

        precision = TP / (TP + FP)        recall = TP / (TP + FN)
        F1 = 2 TP / (2 TP + FP + FN)      accuracy = (TP + TN) / n

    A score equal to the threshold is a positive: 0.0 on logits is P >= 0.5, and probabilities take
    threshold=0.5. Undefined is NaN: precision without predicted positives; recall, F1, AUPRC
    without positives; AUROC with one class.

    Shape:  scores real, labels 0 / 1, both (n,) or (n, 1), tensor, array or list
            ->  {"accuracy", "precision", "recall", "f1", "auroc", "auprc"} floats, {"tp", "fp",
                "fn", "tn"} ints
    Errors: ValueError for NaN scores, other labels, unequal lengths
    Needs:  auroc, average_precision, _counts_by_score, _scores_and_labels, _is_positive
    Check:  scores 2, 0.5, 0.5, -1 of labels 1, 1, 0, 0 have precision 2/3, recall 1, F1 0.8
    """
    checked_scores, positive = _scores_and_labels(scores, labels)
    predicted = checked_scores >= threshold
    tp, fp = int((predicted & positive).sum()), int((predicted & ~positive).sum())
    fn, tn = int(positive.sum()) - tp, int((~positive).sum()) - fp

    def ratio(part, whole):
        return part / whole if whole else math.nan

    return {"accuracy": ratio(tp + tn, tp + tn + fp + fn),
            "precision": ratio(tp, tp + fp),
            "recall": ratio(tp, tp + fn),
            "f1": ratio(2 * tp, 2 * tp + fp + fn) if tp + fn else math.nan,
            "auroc": auroc(scores, labels), "auprc": average_precision(scores, labels),
            "tp": tp, "fp": fp, "fn": fn, "tn": tn}


def binary_floor(labels):
    """Scores of the best constant classifiers: print them beside binary_report.

        F1 = 2 pi / (1 + pi)   of "always 1"; pi is the share of positives
        accuracy = max(pi, 1 - pi)   of the majority        AUROC = 0.5        AUPRC = pi

    NaN where binary_report has NaN.

    Shape:  labels 0 / 1 of any type, (n,) or (n, 1)  ->  {"accuracy", "f1", "auroc", "auprc"}
            floats
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
    """Scores of a regressor over a whole split, in the unit of the labels.

        MAE = mean |p - t|        RMSE = sqrt(mean (p - t)^2)
        R2 = 1 - sum (p - t)^2 / sum (t - mean t)^2

    R2 has no unit, so different labels compare; the mean of these very targets scores 0, and below
    0 is worse than it. None of the three follows from another: an MAE cannot be had from a squared
    loss. Undo the scaling of labels first. With groups (patients): the MAE of each, then their mean
    and sd (ddof 1), so that nobody counts more for having more rows. NaN where undefined:
    everything without rows, R2 of constant targets, the sd of one group.

    Shape:  predictions, targets real (n,) or (n, 1), tensor, array or list; groups (n,)
            ->  {"mae", "rmse", "r2"} floats, with groups also {"group_mae", "group_sd"}
    Errors: ValueError for NaN or infinite values, unequal lengths
    Source: equal to sklearn.metrics.mean_absolute_error, root_mean_squared_error, r2_score
    Check:  predictions 12, 20 of targets 14, 18 have MAE 2, RMSE 2, R2 0
    """
    n = targets.numel() if torch.is_tensor(targets) else np.size(targets)
    flat = []
    for name, values in ("predictions", predictions), ("targets", targets):
        values = np.asarray(values.detach().cpu().double() if torch.is_tensor(values) else values,
                            dtype=np.float64)
        if values.shape not in [(n,), (n, 1)]:
            raise ValueError(f"{name} must be ({n},) or ({n}, 1), got {values.shape}")
        if not np.isfinite(values).all():
            raise ValueError(f"{(~np.isfinite(values)).sum()} of {n} {name} are NaN or infinite")
        flat.append(values.reshape(-1))
    prediction, target = flat
    error = prediction - target

    def mean(x):
        return float(x.mean()) if x.size else math.nan

    spread = mean(np.square(target - target.mean())) if n and target.min() < target.max() else 0.0
    square = mean(np.square(error))
    report = {"mae": mean(np.abs(error)), "rmse": math.sqrt(square),
              "r2": 1 - square / (spread or math.nan)}
    if groups is None:
        return report
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    if member.size != n:
        raise ValueError(f"{n} targets need one group each, got {member.size}")
    counts = np.bincount(member, minlength=len(names))
    group_mae = np.bincount(member, np.abs(error), len(names)) / counts
    group_sd = float(group_mae.std(ddof=1)) if len(names) > 1 else math.nan
    return report | {"group_mae": mean(group_mae), "group_sd": group_sd}


def confusion_matrix(predictions, targets, classes, *, ignore_index=255):
    """Number of pixels of each true class (row) that were predicted as each class (column).

        confusion[t, p] = number of kept pixels with target t and prediction p

    Counts add up: one matrix per image, stacked, serves f_score_per_image; their sum serves
    f_score_pooled and mean_iou, the same for any batch size and number of processes. Pixels whose
    target is ignore_index are left out, whatever was predicted.

    Shape:  predictions, targets integer, any equal shapes, tensor, array or list  ->  int64 array
            (classes, classes)
    Errors: ValueError for unequal shapes, values that are no integers or outside 0..classes-1
    Source: equal to sklearn.metrics.confusion_matrix(targets, predictions, labels=range(classes))
    Check:  predictions 0, 1, 1, 1 of targets 0, 0, 1, 255 with 2 classes give [[1, 1], [0, 1]]
    """
    predictions, targets = (np.asarray(ids.detach().cpu() if torch.is_tensor(ids) else ids)
                            for ids in (predictions, targets))
    whole = {predictions.dtype.kind, targets.dtype.kind} <= set("biu")
    if predictions.shape != targets.shape or predictions.size and not whole:
        raise ValueError("predictions and targets must be class indices of equal shapes (of "
                         f"logits take argmax(1)); got predictions {predictions.shape} of "
                         f"{predictions.dtype}, targets {targets.shape} of {targets.dtype}")
    kept = targets != ignore_index
    # ignored pixels go to cell 0: faster than to leave them out
    predictions, targets = predictions * kept, targets * kept
    for name, ids in ("predictions", predictions), ("targets", targets):
        if ids.size and not 0 <= ids.min() <= ids.max() < classes:
            raise ValueError(f"{name} must be in 0..{classes - 1}, got {ids[kept].min()} to "
                             f"{ids[kept].max()}; ignore_index is {ignore_index}")
    # the smallest signed type that numbers the cells: 2 bytes move faster than 8
    cell = np.min_scalar_type(-classes * classes)
    cells = targets.astype(cell) * cell.type(classes) + predictions.astype(cell)
    counts = np.bincount(cells.ravel(), minlength=classes * classes)
    counts[0] -= kept.size - np.count_nonzero(kept)  # and are taken out of it here
    return counts.reshape(classes, classes)


def f_score_per_image(confusions):
    """The face-parsing challenge's own score: per image, the mean F over the classes of the truth.

        P = TP / (TP + FP + e)   R = TP / (TP + FN + e)   F_c = 2 P R / (P + R + e)   e = 1e-7
        score = mean of F_c over the classes with target pixels

    A class that is only predicted is skipped: it costs just what it takes from the others. The
    official number is the mean over images; the scores are returned singly, so that an interval can
    be had too. NaN for an image without target pixels.

    Shape:  confusions (n, C, C) counts, rows the truth, one per image  ->  float64 array (n,)
    Errors: ValueError for other shapes
    Source: scoring program of the NTU CE7454 / AI6126 face-parsing challenge
    Needs:  _counts
    Check:  [[3, 1], [0, 4]] scores (6/7 + 8/9) / 2 = 0.8730
    """
    tp, predicted, truth = _counts(confusions, 3)
    precision, recall = tp / (predicted + 1e-7), tp / (truth + 1e-7)
    f = 2 * precision * recall / (precision + recall + 1e-7)
    with np.errstate(invalid="ignore"):  # 0 / 0 is the NaN that is meant
        return np.where(truth > 0, f, 0).sum(1) / (truth > 0).sum(1)


def f_score_pooled(confusion):
    """F of each class over a whole split, from one pooled confusion matrix.

        F_c = 2 TP / (2 TP + FP + FN)

    NaN for a class that neither truth nor prediction holds; 0 if only one of them does. np.nanmean
    of it is the macro F. Large objects dominate here, each image counts the same in
    f_score_per_image: say which one is meant.

    Shape:  confusion (C, C) counts, rows the truth  ->  float64 array (C,)
    Errors: ValueError for other shapes
    Source: equal to sklearn.metrics.f1_score(average=None) but for the NaN
    Needs:  _counts
    Check:  [[3, 1], [0, 4]] gives 6/7, 8/9
    """
    tp, predicted, truth = _counts(confusion, 2)
    with np.errstate(invalid="ignore"):
        return 2 * tp / (predicted + truth)


def mean_iou(confusion):
    """Mean intersection over union of the classes that occur, from one pooled confusion matrix.

        IoU_c = TP / (TP + FP + FN) = F_c / (2 - F_c)

    NaN for a matrix without counts.

    Shape:  confusion (C, C) counts, rows the truth  ->  float in [0, 1]
    Errors: ValueError for other shapes
    Needs:  _counts
    Check:  [[3, 1], [0, 4]] gives (3/4 + 4/5) / 2 = 0.775
    """
    tp, predicted, truth = _counts(confusion, 2)
    union = predicted + truth - tp
    occurs = union > 0
    return float((tp[occurs] / union[occurs]).mean()) if occurs.any() else math.nan


def class_report(predictions, labels, classes):
    """Scores of a classifier of several classes over a whole split, also class by class.

        accuracy = share of right rows        macro_f1 = mean of F1_c over the classes in labels
        F1_c = 2 TP / (2 TP + FP + FN)        recall_c = TP / (TP + FN)

    Macro F1 counts a class of 5 rows as much as one of 500. NaN where undefined: recall of a class
    without rows, F1 of a class that is neither there nor predicted, accuracy and macro F1 without
    rows. F1 of a class that is only predicted is 0, as in f_score_pooled, and does not count in the
    macro F1.

    Shape:  predictions, labels integers in 0..classes-1, (n,), tensor, array or list
            ->  {"accuracy", "macro_f1"} floats, {"classes"} a list of {"rows": int, "f1": float,
                "recall": float}
    Errors: ValueError for unequal shapes, values that are no integers or outside 0..classes-1
    Source: equal to sklearn.metrics.f1_score(average="macro", labels=np.unique(labels)),
            recall_score, accuracy_score
    Needs:  confusion_matrix, f_score_pooled, _counts
    Check:  predictions 0, 1, 1 of labels 0, 0, 1 have accuracy 2/3, macro F1 2/3, recalls 1/2 and 1
    """
    confusion = confusion_matrix(predictions, labels, classes, ignore_index=None)
    tp, _, rows = _counts(confusion, 2)
    f1, occurs = f_score_pooled(confusion), rows > 0
    with np.errstate(invalid="ignore"):  # 0 / 0 is the NaN that is meant
        recall = tp / rows
    return {"accuracy": float(tp.sum() / rows.sum()) if occurs.any() else math.nan,
            "macro_f1": float(f1[occurs].mean()) if occurs.any() else math.nan,
            "classes": [{"rows": int(n), "f1": float(f), "recall": float(r)}
                        for n, f, r in zip(rows, f1, recall)]}


def mean_cosine(features):
    """Mean cosine of all pairs of different rows: 1 if collapsed, near 0 if well spread.

        mean_{i != j} u_i . u_j = (|sum_i u_i|^2 - n) / (n (n - 1))      u_i = x_i / |x_i|

    A zero row has no direction and is left out; NaN with fewer than two others. Never less than -1
    / (n - 1).

    Shape:  features (n, D), tensor, array or list  ->  float
    Errors: ValueError for other shapes, NaN or infinite features
    Needs:  _unit_rows, _finite_rows
    Check:  rows (1, 0), (2, 0), (0, 3) have (1 + 0 + 0) / 3
    """
    unit = _unit_rows(features, "features")
    unit = unit[unit.any(1)]
    n = len(unit)
    return float((np.square(unit.sum(0)).sum() - n) / (n * (n - 1))) if n > 1 else math.nan


def knn_predict(train_features, train_labels, features, *, k=5):
    """Class of each row by the vote of the k training rows with the largest cosine.

    It judges an embedding without training on it.

    The class with most votes wins; of several, the one whose votes have the largest sum of cosines;
    then the smallest label. Training rows tied with the k-th all vote, so the order of the rows
    does not matter, and collapsed features, or a zero vector, get the most frequent class: the
    floor, not a random class. Cosines closer than 1e-12 are tied. Works through the rows in chunks
    of about a million cosines, in float64.

    Shape:  train_features (n, D), train_labels (n,) integers, features (m, D), tensors, arrays or
            lists  ->  int64 array (m,)
    Errors: ValueError for other shapes or types, NaN or infinite features, k < 1 or k > n
    Needs:  _unit_rows, _finite_rows, _integer_labels
    Check:  rows (1, 0), (0, 1), (1, 1) of classes 7, 9, 9 give (3, 1) the class 7 with k = 1 or 2,
            9 with k = 3
    """
    train, features = _unit_rows(train_features, "train_features"), _unit_rows(features, "features")
    names, member = np.unique(_integer_labels(train_labels, len(train), "train_labels"),
                              return_inverse=True)
    if features.shape[1] != train.shape[1]:
        raise ValueError(f"train_features and features need the same columns, got {train.shape} "
                         f"and {features.shape}")
    if not 1 <= k <= len(train):
        raise ValueError(f"need 1 <= k <= {len(train)}, the number of training rows; got k={k}")
    predicted, step = np.empty(len(features), dtype=np.int64), max(1, 2**20 // len(train))
    for start in range(0, len(features), step):
        # the last bits depend on the shape of the product
        cosine = np.round(features[start : start + step] @ train.T, 12)
        near = cosine >= np.partition(cosine, -k, axis=1)[:, -k, None]
        row, column = near.nonzero()
        cell, cells = row * len(names) + member[column], len(cosine) * len(names)
        votes = np.bincount(cell, minlength=cells).reshape(-1, len(names))
        summed = np.bincount(cell, cosine[near], cells).reshape(-1, len(names)).round(9)
        best = np.where(votes == votes.max(1, keepdims=True), summed, -np.inf).argmax(1)
        predicted[start : start + step] = names[best]
    return predicted


def knn_accuracy(train_features, train_labels, features, labels, *, k=5):
    """Share of the rows whose class knn_predict finds. NaN without rows.

    Its floor is the share of the most frequent class; for F1 and single classes pass knn_predict to
    class_report.

    Shape:  as knn_predict, and labels (m,) integers  ->  float in [0, 1]
    Errors: as knn_predict
    Needs:  knn_predict, _unit_rows, _finite_rows, _integer_labels
    Check:  training rows asked for themselves with k = 1 score 1, if no two of different classes
            point the same way
    """
    predicted = knn_predict(train_features, train_labels, features, k=k)
    right = predicted == _integer_labels(labels, len(predicted), "labels")
    return float(right.mean()) if right.size else math.nan


def ridge_predict(train_x, train_labels, x, *, penalty=1.0):
    """Class of each row by ridge regression of one target per class: a baseline of several classes.

        W = (Z^T Z + penalty I)^-1 Z^T Y     class = argmax_c (z W + mean Y)_c

    Z = the columns standardised by mean and sd of the training rows, Y = 1 for the class of a row
    and 0 else; the intercept is not penalised. Columns that are constant in training are left out.
    Of equal scores the smallest label wins; without any column that is the most frequent class.
    Meant for some hundred columns: time grows with their cube.

    Shape:  train_x (n, D), train_labels (n,) integers, x (m, D), tensors, arrays or lists  ->
            int64 array (m,)
    Errors: ValueError for other shapes or types, no training rows, NaN or infinite values, penalty
            <= 0
    Source: Hoerl and Kennard 1970; equal to sklearn's StandardScaler followed by
            RidgeClassifier(alpha=penalty)
    Needs:  _finite_rows, _integer_labels
    Check:  x = 0, 1, 2, 9 of classes 3, 3, 3, 5 give 5 the class 3 and 6 the class 5
    """
    train, x = _finite_rows(train_x, "train_x"), _finite_rows(x, "x")
    names, member = np.unique(_integer_labels(train_labels, len(train), "train_labels"),
                              return_inverse=True)
    if not len(train) or x.shape[1] != train.shape[1] or not penalty > 0:
        raise ValueError("need training rows, the same columns in both and penalty > 0; got "
                         f"train_x {train.shape}, x {x.shape}, penalty={penalty}")
    # not sd > 0: the mean of equal numbers may differ from them in the last bit
    varies = train.min(0) < train.max(0)
    train, x = train[:, varies], x[:, varies]
    mean, sd = train.mean(0), train.std(0)
    z, y = (train - mean) / sd, np.eye(len(names))[member]
    weights = np.linalg.solve(z.T @ z + penalty * np.eye(z.shape[1]), z.T @ y)
    return names[((x - mean) / sd @ weights + y.mean(0)).argmax(1)]


def logistic_predict(train_x, train_labels, x, *, penalty=1.0):
    """Logit of each row by logistic regression with an L2 penalty: a baseline of a binary task.

        minimise  sum_i ln(1 + exp(-s_i (z_i . w + b))) + penalty / 2 |w|^2
        s = 1 for label 1, -1 for label 0

    z = the columns standardised by mean and sd of the training rows; the intercept b is not
    penalised. Columns that are constant in training are left out; without any other the logit is
    the log-odds of the training labels. By Newton's method in float64, the step halved while the
    loss does not fall; the penalty keeps separable data finite. Exact to the last digits, so no
    tolerance to choose. Meant for some hundred columns: time grows with their square, times the
    rows.

    Shape:  train_x (n, D), train_labels 0 / 1 of any type (n,), x (m, D), tensors, arrays or lists
            ->  float64 logits (m,)
    Errors: ValueError for other shapes or labels, labels of one class, NaN or infinite values,
            penalty <= 0
    Source: Hastie et al. 2009, section 4.4.1; equal to sklearn's StandardScaler and
            LogisticRegression(C=1 / penalty)
    Needs:  _finite_rows, _is_positive
    Check:  x = 0, 1 of labels 0, 1 gives w with w (1 + exp(w)) = 2 on z = -1, 1: x = 1 has the
            logit 0.675
    """
    train, x = _finite_rows(train_x, "train_x"), _finite_rows(x, "x")
    positive = _is_positive(train_labels)
    n = len(train)
    if positive.size != n or x.shape[1] != train.shape[1] or not 0 < penalty < math.inf:
        raise ValueError("need one label for each training row, the same columns in both and "
                         f"penalty > 0; got train_x {train.shape}, {positive.size} labels, x "
                         f"{x.shape}, penalty={penalty}")
    if positive.all() or not positive.any():
        raise ValueError(f"training labels must hold both classes, got {positive.sum()} ones among "
                         f"{n} rows; split the rows so that each part has both (stratified), or "
                         "report binary_floor instead")
    # not sd > 0: the mean of equal numbers may differ from them in the last bit
    varies = train.min(0) < train.max(0)
    train, x = train[:, varies], x[:, varies]
    mean, sd = train.mean(0), train.std(0)

    def scaled(columns):  # and a last column for the intercept
        return np.hstack([(columns - mean) / sd, np.ones((len(columns), 1))])

    z, rows = scaled(train), scaled(x)
    sign, ridge = np.where(positive, 1.0, -1.0), np.append(np.full(len(mean), float(penalty)), 0.0)

    def objective(weights):
        return np.logaddexp(0, -sign * (z @ weights)).sum() + (ridge * weights**2).sum() / 2

    weights = np.append(np.zeros(len(mean)), math.log(positive.sum() / (~positive).sum()))
    for _ in range(200):
        # 1 - P of the label, without overflow
        miss = np.exp(-np.logaddexp(0, sign * (z @ weights)))
        gradient = ridge * weights - z.T @ (sign * miss)
        if np.abs(gradient).max() <= 1e-13 * n:
            break
        step = np.linalg.solve((z.T * (miss * (1 - miss))) @ z + np.diag(ridge), gradient)
        size, loss, slope = 1.0, objective(weights), gradient @ step
        rounding = 1e-13 * loss
        while objective(weights - size * step) > loss - 1e-4 * size * slope + rounding:
            size /= 2
            if size <= 1e-9:
                break
        weights = weights - size * step
    else:
        warnings.warn(f"logistic_predict: the gradient is still {np.abs(gradient).max():.2g} after "
                      f"200 steps; raise penalty={penalty}", stacklevel=2)
    return rows @ weights


def bootstrap_interval(values, *, level=0.95, resamples=1000, seed=0):
    """Percentile bootstrap interval of the mean of n values, such as one score per image.

    Draws n of the n values with replacement, `resamples` times, and takes the middle `level` of the
    means. NaN are left out.

    Shape:  values (n,)  ->  (low, high) floats; NaN for fewer than two values, which tell nothing
            of their spread
    Source: Efron 1979; Efron and Tibshirani 1993, chapter 13
    Check:  equal values give that value twice
    """
    values = np.asarray(values, dtype=np.float64)
    values = values[~np.isnan(values)]
    if len(values) < 2:
        return math.nan, math.nan
    drawn = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[drawn].mean(1), ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)


def bootstrap_ranking(scores, labels, *, resamples=1000, seed=0):
    """AUROC and average precision of bootstrap samples of the rows.

    Each resample draws n of the n rows with replacement. The draws depend on n and seed alone, so
    two models scored on the same rows are resampled alike, and the difference of their arrays is
    the paired bootstrap: it leaves out how hard the rows drawn are, which both share. Ties count as
    in auroc and average_precision. A resample without one of the classes is NaN in both. Scores are
    ranked once; works through the resamples in chunks of about a million rows.

    Shape:  scores real, labels 0 / 1, both (n,) or (n, 1), tensor, array or list
            ->  {"auroc", "auprc"} float64 arrays (resamples,)
    Errors: ValueError for NaN scores, other labels, unequal lengths, resamples < 1
    Source: Efron 1979; equal to auroc and average_precision of the rows drawn
    Needs:  _scores_and_labels, _is_positive
    Check:  scores in the right order have 1 in every resample, constant scores AUROC 0.5 and AP the
            share of positives drawn
    """
    scores, positive = _scores_and_labels(scores, labels)
    if resamples < 1:
        raise ValueError(f"need resamples >= 1, got {resamples}; 1000 for an interval")
    n, rng = scores.size, np.random.default_rng(seed)
    aurocs, auprcs = np.full(resamples, math.nan), np.full(resamples, math.nan)
    if not n:
        return {"auroc": aurocs, "auprc": auprcs}
    # tied scores are one group; the largest come first
    distinct, group = np.unique(-scores, return_inverse=True)
    cell, cells, step = 2 * group + positive, 2 * distinct.size, max(1, 2**20 // n)
    for start in range(0, resamples, step):
        drawn = cell[rng.integers(n, size=(min(step, resamples - start), n))]
        drawn += cells * np.arange(len(drawn))[:, None]
        counts = np.bincount(drawn.reshape(-1), minlength=cells * len(drawn))
        counts = counts.reshape(len(drawn), distinct.size, 2)
        negatives, positives = counts[:, :, 0], counts[:, :, 1]
        fp, tp = negatives.cumsum(1), positives.cumsum(1)
        n_negative, n_positive = fp[:, -1], tp[:, -1]
        # twice the pairs, a tie counts half
        in_order = (positives * (2 * n_negative[:, None] - 2 * fp + negatives)).sum(1)
        precision = (positives * tp / (tp + fp).clip(1)).sum(1)
        with np.errstate(invalid="ignore"):  # 0 / 0 is the NaN that is meant
            aurocs[start : start + step] = in_order / (2 * n_negative * n_positive)
            precision = np.where(n_negative > 0, precision, math.nan)
            auprcs[start : start + step] = precision / n_positive
    return {"auroc": aurocs, "auprc": auprcs}


def ranking_interval(scores, labels, *, versus=None, level=0.95, resamples=1000, seed=0):
    """Percentile bootstrap intervals of AUROC and average precision, or of a paired difference.

    With versus, the scores of the other model, the interval is that of the difference, scores minus
    versus, by resampling rows in pairs: if it leaves out 0, the models differ by more than the
    choice of test rows explains. Two single intervals that overlap do not say that they are equal.
    Resamples without one of the classes are left out; NaN if all are. What another seed of training
    would change is not in it.

    Shape:  scores, versus real, labels 0 / 1, all (n,) or (n, 1), tensor, array or list
            ->  {"auroc_low", "auroc_high", "auprc_low", "auprc_high"} floats
    Errors: ValueError for NaN scores, other labels, unequal lengths, level outside (0, 1),
            resamples < 1
    Source: Efron and Tibshirani 1993, chapter 13
    Needs:  bootstrap_ranking, _scores_and_labels, _is_positive
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
        values = values[~np.isnan(values)]
        ends = (math.nan, math.nan)
        if values.size:
            ends = np.quantile(values, ((1 - level) / 2, (1 + level) / 2))
        interval |= {f"{name}_low": float(ends[0]), f"{name}_high": float(ends[1])}
    return interval


def _counts(confusion, ndim):
    """True positives, predicted pixels and true pixels of each class of (..., C, C) counts."""
    confusion = np.asarray(confusion, dtype=np.float64)
    if confusion.ndim != ndim or confusion.shape[-1] != confusion.shape[-2]:
        needed = "(n, C, C), one per image" if ndim == 3 else "(C, C)"
        raise ValueError(f"confusion counts must be {needed}; got {confusion.shape}")
    return np.diagonal(confusion, axis1=-2, axis2=-1), confusion.sum(-2), confusion.sum(-1)


def _finite_rows(x, name):
    """Features (n, D), tensor, array or list, as float64 without NaN."""
    x = np.asarray(x.detach().cpu().double() if torch.is_tensor(x) else x, dtype=np.float64)
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


def _integer_labels(labels, n, name):
    """Integer or bool labels (n,), tensor, array or list, as int64."""
    labels = np.asarray(labels.detach().cpu() if torch.is_tensor(labels) else labels)
    if labels.shape != (n,) or labels.size and labels.dtype.kind not in "biu":
        raise ValueError(f"{name} must be ({n},) integers, one for each row; got {labels.shape} of "
                         f"{labels.dtype}")
    return labels.astype(np.int64)


def _is_positive(labels):
    """Labels 0 / 1 of any type, (n,) or (n, 1), as a flat bool array."""
    labels = np.asarray(labels.detach().cpu().double() if torch.is_tensor(labels) else labels)
    if labels.shape not in [(labels.size,), (labels.size, 1)]:
        raise ValueError(f"labels must be (n,) or (n, 1), got {labels.shape}")
    if not ((labels == 0) | (labels == 1)).all():  # 25 times faster than np.isin
        raise ValueError(f"labels must be 0 or 1, got {np.unique(labels)[:5]}")
    return labels.reshape(-1) == 1


def _scores_and_labels(scores, labels):
    """Checked scores as float64 (n,), and which of them are positives, bool (n,)."""
    scores = np.asarray(scores.detach().cpu().double() if torch.is_tensor(scores) else scores,
                        dtype=np.float64)
    positive = _is_positive(labels)
    if scores.shape not in [positive.shape, (positive.size, 1)]:
        raise ValueError(f"{positive.size} labels need one score each, (n,) or (n, 1), got "
                         f"{scores.shape}")
    if np.isnan(scores).any():
        raise ValueError(f"{np.isnan(scores).sum()} of {scores.size} scores are NaN")
    return scores.reshape(-1), positive


def _counts_by_score(scores, labels):
    """Counts at each distinct score of a positive, ascending, and the number of all negatives.

    Three arrays int64 (m,): positives with that score, negatives below it, negatives not above it.
    """
    scores, positive = _scores_and_labels(scores, labels)
    distinct, tied = np.unique(scores[positive], return_counts=True)
    negatives = np.sort(scores[~positive])
    below = np.searchsorted(negatives, distinct)
    not_above = np.searchsorted(negatives, distinct, side="right")
    return tied, below, not_above, negatives.size
