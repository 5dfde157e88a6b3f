"""Tests of losses."""

import itertools
import math
import subprocess
import sys
import unittest
import unittest.mock
import warnings

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import losses
from tests.helpers import (
    assert_near, folder, HERE, near, raises, same_bits, seeded)


def value_and_gradient(loss_fn, logits):
    logits = logits.detach().clone().requires_grad_()
    loss = loss_fn(logits)
    loss.sum().backward()
    return loss.detach(), logits.grad


def test_losses_focal_gamma_zero_equals_cross_entropy_in_value_and_gradient():
    torch.manual_seed(0)
    for shape in (7, 4), (3, 5, 2, 3):
        logits, weights = 3 * torch.randn(shape), torch.rand(shape[1]) + 0.1
        indices, probabilities = torch.randint(0, shape[1], shape[:1] + shape[2:]), torch.randn(shape).softmax(1)
        kinds = [(indices, -100), (indices, 2), (indices.masked_fill(indices == 0, 255), 255), (probabilities, -100)]
        for (targets, ignore_index), w, e, reduction in itertools.product(
                kinds, (None, weights), (0.0, 0.1, 1.0), ("none", "sum", "mean")):
            want = value_and_gradient(lambda z: F.cross_entropy(z, targets, w, ignore_index=ignore_index, label_smoothing=e,
                                                                reduction=reduction), logits)
            got = value_and_gradient(lambda z: losses.focal_label_smooth_ce(
                z, targets, gamma=0, smoothing=e, class_weights=w, ignore_index=ignore_index, reduction=reduction), logits)
            assert_near(got, want)


def test_losses_focal_equals_the_written_sum():
    logits = torch.tensor([[0.3, -1.2, 2.0], [4.0, 0.1, -0.5]], dtype=torch.float64)
    weights, e = [0.5, 2.0, 1.0], 0.2
    for gamma, targets in itertools.product((0.5, 1, 2, 3.7), ([[0, 0, 1], [0, 1, 0]], [[0.2, 0.3, 0.5], [0.9, 0.1, 0]])):
        rows = []
        for z, t in zip(logits.tolist(), targets):
            p = [math.exp(a) / sum(math.exp(b) for b in z) for a in z]
            rows.append(-sum(w * ((1 - e) * tc + e / 3) * (1 - pc) ** gamma * math.log(pc)
                             for w, tc, pc in zip(weights, t, p)))
        want, t = torch.tensor(rows, dtype=torch.float64), torch.tensor(targets, dtype=torch.float64)
        for given in (t, t.argmax(1)) if t.max() == 1 else (t,):
            got = losses.focal_label_smooth_ce(logits, given, gamma=gamma, smoothing=e, class_weights=weights, reduction="none")
            assert_near(got, want)


def test_losses_focal_gradient_equals_finite_differences():
    torch.manual_seed(0)
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    for gamma in (0.3, 1, 2.5):
        assert torch.autograd.gradcheck(
            lambda z: losses.focal_label_smooth_ce(z, torch.tensor([0, 1, 2, 2]), gamma=gamma, smoothing=0.1), logits)


def test_losses_focal_binary_is_the_two_class_case_for_labels_of_any_dtype():
    z, y = torch.tensor([-2.0, 0.3, 1.5, 4.0]), torch.tensor([0, 1, 0, 1])
    two_logits = torch.stack([torch.zeros(4), z], 1)
    for w, reduction in itertools.product((None, [0.5, 3.0]), ("none", "sum", "mean")):
        options = dict(class_weights=w, reduction=reduction)
        want = losses.focal_label_smooth_ce(two_logits, y, **options)
        for dtype in (torch.int64, torch.uint8, torch.bool, torch.float32, torch.float64, torch.bfloat16):
            for logits, labels in (z, y), (z[:, None], y), (z, y[:, None]), (z[:, None], y[:, None]):
                got = losses.focal_label_smooth_ce(logits, labels.to(dtype), **options)
                assert_near(got, want)


def test_losses_focal_binary_without_focus_is_bce_with_logits_also_for_soft_labels():
    z, y = torch.tensor([-2.0, 0.3, 1.5, 4.0]), torch.tensor([0.0, 1.0, 0.3, 0.9])
    want = value_and_gradient(lambda z: F.binary_cross_entropy_with_logits(z, 0.9 * y + 0.05), z)
    got = value_and_gradient(lambda z: losses.focal_label_smooth_ce(z, y, gamma=0, smoothing=0.1), z)
    assert_near(got, want)


def test_losses_focal_gradient_is_finite_and_right_at_saturation():
    for gamma, e, size in itertools.product((0, 0.01, 0.5, 1, 2, 5), (0.0, 0.05), (10.0, 17.0, 50.0, 200.0, 1e4)):
        z = torch.tensor([size, -size, size, -size], requires_grad=True)
        rows = torch.tensor([[size, 0.0, 1.0], [-size, 0.0, 1.0]], requires_grad=True)
        (losses.focal_label_smooth_ce(z, torch.tensor([1, 1, 0, 0]), gamma=gamma, smoothing=e, reduction="sum")
         + losses.focal_label_smooth_ce(rows, torch.tensor([0, 0]), gamma=gamma, smoothing=e)).backward()
        assert z.grad.isfinite().all() and rows.grad.isfinite().all(), (gamma, e, size)
        if size >= 50:  # correct and certain: smoothing pulls back by e / 2; wrong and certain: the full slope of 1
            assert_near(z.grad, torch.tensor([e / 2, e / 2 - 1, 1 - e / 2, -e / 2]))


def test_losses_focal_equals_its_logarithmic_form_at_every_confidence():
    z = torch.linspace(-30, 30, 61, dtype=torch.float64)
    for gamma in (0.1, 0.5, 1, 2):  # 1 - sigmoid(z) = sigmoid(-z), so nothing is lost to rounding near p = 1
        want = value_and_gradient(lambda z: -(gamma * F.logsigmoid(-z)).exp() * F.logsigmoid(z), z)
        got = value_and_gradient(lambda z: losses.focal_label_smooth_ce(
            z, torch.ones(61), gamma=gamma, smoothing=0, reduction="none"), z)
        assert_near(got, want, 1e-6)


def test_losses_focal_with_everything_ignored_is_zero_and_connected():
    logits = torch.randn(3, 4, requires_grad=True)
    for call in (lambda: losses.focal_label_smooth_ce(logits, torch.full((3,), -100), class_weights=[1.0, 2, 3, 4]),
                 lambda: losses.focal_label_smooth_ce(logits[:, 0], torch.full((3,), 255.0), ignore_index=255),
                 lambda: losses.focal_label_smooth_ce(logits[:0, 0], torch.zeros(0)),
                 lambda: losses.focal_label_smooth_ce(logits[:0], torch.zeros(0, dtype=torch.long))):
        loss = call()
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss == 0 and torch.equal(gradient, torch.zeros(3, 4))


def test_losses_focal_ignored_samples_leave_the_rest_as_if_alone():
    z, y, w = torch.tensor([-2.0, 0.3, 1.5, 4.0]), torch.tensor([0.0, -100.0, 0.3, 1.0]), [1.0, 2.0]
    kept = torch.tensor([0, 2, 3])
    want = losses.focal_label_smooth_ce(z[kept], y[kept], class_weights=w)
    assert_near(losses.focal_label_smooth_ce(z, y, class_weights=w), want)
    logits = torch.stack([z, -z, z + 1], 1)
    want = losses.focal_label_smooth_ce(logits[kept], torch.tensor([0, 2, 1]))
    assert_near(losses.focal_label_smooth_ce(logits, torch.tensor([0, 255, 2, 1]), ignore_index=255), want)


def test_losses_focal_indices_may_be_of_any_integer_type():
    logits = torch.randn(1, 160, generator=torch.Generator().manual_seed(0))
    want = losses.focal_label_smooth_ce(logits, torch.tensor([156]))
    got = losses.focal_label_smooth_ce(logits, torch.tensor([156], dtype=torch.uint8))  # -100 as uint8 is 156
    assert torch.equal(got, want) and want > 0


def test_losses_focal_accepts_masked_classes():
    logits = torch.tensor([[1.0, -math.inf, 0.0]], requires_grad=True)
    losses.focal_label_smooth_ce(logits, torch.tensor([0]), smoothing=0).backward()
    assert logits.grad.isfinite().all()


def test_losses_focal_computes_half_precision_in_float32_and_keeps_float64():
    logits, targets = torch.randn(64, 5, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 5
    for dtype, (x, t, w) in itertools.product((torch.bfloat16, torch.float16), (
            (logits, targets, [1.1, 2.3, 0.7, 1.0, 3.3]), (logits[:, 0], targets % 2, [1.1, 2.3]))):
        want = losses.focal_label_smooth_ce(x.to(dtype).float(), t, class_weights=w)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = losses.focal_label_smooth_ce(x.to(dtype), t, class_weights=w)
        assert want == losses.focal_label_smooth_ce(x.to(dtype), t, class_weights=w) == inside
        assert inside.dtype == torch.float32
    assert losses.focal_label_smooth_ce(logits.double(), targets).dtype == torch.float64


def test_losses_focal_takes_one_hot_targets_of_any_dtype_as_the_indices_they_are():
    logits, targets = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3
    want = losses.focal_label_smooth_ce(logits, targets)
    for dtype in (torch.int64, torch.bool, torch.bfloat16, torch.float64):
        assert_near(losses.focal_label_smooth_ce(logits, F.one_hot(targets).to(dtype)), want)


def test_losses_focal_refuses_what_does_not_fit():
    ce, zeros = losses.focal_label_smooth_ce, torch.zeros
    long = lambda *shape: zeros(shape, dtype=torch.long)
    for logits, targets in ((zeros(4), long(3)), (zeros(4, 1), long(4, 2)), (zeros(4, 3), long(4, 1)),
                            (zeros(4, 3), zeros(4)), (zeros(4, 3), long(5)), (zeros(2, 1, 5), long(2, 5)), (zeros(()), long(1)),
                            (zeros(2, 3, 5, 5), long(2, 3, 5))):
        for shape in logits.shape, targets.shape:
            raises(ValueError, str(tuple(shape)), lambda: ce(logits, targets))
    raises(ValueError, "[0, 1], got 0 to 2", lambda: ce(zeros(2), torch.tensor([0, 2])))
    raises(ValueError, "got -1 to 0", lambda: ce(zeros(2), torch.tensor([0, -1])))
    raises(ValueError, "[0, 1]", lambda: ce(zeros(2), torch.tensor([0.0, math.nan])))
    raises(ValueError, "(2,)", lambda: ce(zeros(2), zeros(2), class_weights=[1.0, 1.0, 1.0]))
    raises(ValueError, "gamma=-1", lambda: ce(zeros(2), zeros(2), gamma=-1))
    raises(ValueError, "smoothing=1.5", lambda: ce(zeros(2), zeros(2), smoothing=1.5))
    raises(ValueError, "'average'", lambda: ce(zeros(2), zeros(2), reduction="average"))


def test_losses_focal_of_equal_logits_is_the_number_in_its_docstring():
    for targets in torch.tensor([3]), torch.tensor([[0.1, 0.2, 0.3, 0.4]]):
        assert near(losses.focal_label_smooth_ce(torch.zeros(1, 4), targets).item(), 0.75 ** 2 * math.log(4), 1e-6)
    assert round(0.75 ** 2 * math.log(4), 4) == 0.7798


def test_losses_focal_module_is_the_function_with_weights_as_a_buffer():
    logits, targets = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 2, 9, 0])
    options = dict(class_weights=[1.0, 2.0, 3.0], ignore_index=9, reduction="sum")
    module = losses.FocalLabelSmoothCE(0.1, 1.5, **options)
    want = losses.focal_label_smooth_ce(logits, targets, smoothing=0.1, gamma=1.5, **options)
    assert torch.equal(module(logits, targets), want)
    assert module.double().class_weights.dtype == torch.float64 and not list(module.parameters())
    default = losses.FocalLabelSmoothCE()
    assert torch.equal(default(logits[:4], targets[:4]), losses.focal_label_smooth_ce(logits[:4], targets[:4]))


def slow_dice(logits, one_hot, kept, *, per, absent, smooth, weights):
    """The definition, one class of one image (or of the batch) at a time, on selected pixels of (b, c, n) and (b, n)."""
    p, images = logits.softmax(1), []
    for rows in [[b] for b in range(len(p))] if per == "image" else [list(range(len(p)))]:
        terms, share = [], []
        for c, weight in enumerate(weights):
            p_c, t_c = p[rows, c][kept[rows]], one_hot[rows, c][kept[rows]]
            term = 1 - (2 * torch.minimum(p_c, t_c).sum() + smooth) / (p_c.sum() + t_c.sum() + smooth)
            counts = len(t_c) and (absent != "skip" or t_c.sum() > 0)
            terms.append(0 * term if absent == "zero" and t_c.sum() == 0 else term)
            share.append(weight if counts else 0.0)
        if sum(share):
            images.append(sum(w * term for w, term in zip(share, terms)) / sum(share))
    return sum(images) / len(images) if images else 0 * p.sum()


def segmentation_cases(dtype=torch.float64):
    """Logits and targets of every kind with gaps in the classes: (logits, targets, ignore_index, one_hot (b, c, n), kept (b, n))."""
    g = torch.Generator().manual_seed(0)
    for shape in (3, 4), (2, 4, 6), (3, 4, 2, 5):
        logits = 2 * torch.randn(shape, generator=g, dtype=dtype)
        indices = torch.randint(0, 3, shape[:1] + shape[2:], generator=g)  # class 3 is absent
        void = indices.masked_fill(torch.rand(indices.shape, generator=g) < 0.3, 255)
        void[0] = 255  # an image with nothing to learn from
        soft = torch.randn(shape, generator=g, dtype=dtype).softmax(1)
        for targets, ignore_index in (indices, None), (void, 255), (indices, 1), (soft, None):
            flat = targets.reshape(shape[0], 4, -1) if targets is soft else targets.reshape(shape[0], -1)
            kept = torch.ones_like(logits[:, 0], dtype=torch.bool).reshape(shape[0], -1) if targets is soft or ignore_index is None \
                else flat != ignore_index
            one_hot = flat if targets is soft else F.one_hot(flat.masked_fill(~kept, 0), 4).transpose(1, 2).to(dtype)
            yield logits, targets, ignore_index, one_hot, kept


def test_losses_dice_equals_the_definition_in_value_and_gradient():
    for logits, targets, ignore_index, one_hot, kept in segmentation_cases():
        for per, absent, smooth, weights in itertools.product(
                ("image", "batch"), ("skip", "count", "zero"), (1e-5, 1.0), (None, [1.0, 2.0, 0.5, 3.0], [0.0, 0.0, 2.0, 0.0])):
            options = dict(per=per, absent=absent, smooth=smooth)
            want = value_and_gradient(lambda z: slow_dice(
                z.reshape(len(z), 4, -1), one_hot, kept, weights=weights or [1.0] * 4, **options), logits)
            got = value_and_gradient(lambda z: losses.dice_loss(
                z, targets, class_weights=weights, ignore_index=ignore_index, **options), logits)
            assert_near(got, want, 1e-10)


def test_losses_dice_gradient_equals_finite_differences():
    logits = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets = torch.tensor([[0, 1, 9, 0], [2, 2, 2, 9]])
    for per, absent in itertools.product(("image", "batch"), ("skip", "count", "zero")):
        assert torch.autograd.gradcheck(lambda z: losses.dice_loss(z, targets, per=per, absent=absent, ignore_index=9), logits)


def test_losses_ce_dice_in_many_chunks_equals_the_definition_in_value_and_gradient():
    g, n = seeded(), torch.get_num_threads() * 2**17  # a chunk holds threads * 2^18 numbers: five of them, the last one short
    targets = torch.randint(0, 4, (3, n), generator=g).masked_fill(torch.rand(3, n, generator=g) < 0.2, 255)
    targets[0, n // 3 : n // 2] = targets[0, -5:] = 255
    logits = 2 * torch.randn(3, 3, n, generator=g, dtype=torch.float64)
    targets, kept = targets.masked_fill(targets == 3, 255), (targets < 3)
    one_hot = F.one_hot(targets.masked_fill(~kept, 0), 3).transpose(1, 2).double()
    weights, void = [1.0, 2.0, 0.5], ~kept.unsqueeze(1).expand_as(logits)
    for per, smoothing in ("image", 0.0), ("batch", 0.1):
        dice = lambda z: slow_dice(z, one_hot, kept, per=per, absent="skip", smooth=1e-5, weights=weights)
        ce = lambda z: F.cross_entropy(z, targets, torch.tensor(weights).double(), ignore_index=255, label_smoothing=smoothing)
        want, gradient = value_and_gradient(lambda z: ce(z) + 1.5 * dice(z), logits)
        got, full = value_and_gradient(lambda z: losses.ce_dice_loss(z, targets, per=per, label_smoothing=smoothing, class_weights=weights,
                                                                     ignore_index=255)[0], logits.masked_fill(void, math.nan))
        assert abs(got - want) < 1e-10 * want and (full - gradient).abs().max() < 1e-9 * gradient.abs().max()
        assert (full[void] == 0).all()


def test_losses_ce_dice_keeps_nothing_of_the_size_of_the_logits_but_the_logits_and_can_be_passed_twice():
    logits, targets = torch.randn(2, 5, 40, generator=seeded(), requires_grad=True), torch.arange(80).reshape(2, 40) % 5
    for smoothing in 0.0, 0.1:
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
            loss = losses.ce_dice_loss(logits, targets, label_smoothing=smoothing)[0]
        assert {each.data_ptr() for each in kept if each.numel() >= logits.numel()} == {logits.data_ptr()}
        first, again = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, again)
        raises(RuntimeError, "once_differentiable",
               lambda: torch.autograd.grad(loss, logits, create_graph=True)[0].sum().backward())


def test_losses_ce_dice_gradient_keeps_the_memory_format_of_the_logits():
    logits, targets = torch.randn(2, 3, 4, 5, generator=seeded(), requires_grad=True), torch.arange(40).reshape(2, 4, 5) % 3
    last = logits.detach().to(memory_format=torch.channels_last).requires_grad_()
    want, got = (torch.autograd.grad(losses.ce_dice_loss(z, targets)[0], z)[0] for z in (logits, last))
    assert_near(got, want)
    assert want.is_contiguous() and got.is_contiguous(memory_format=torch.channels_last)


def confident(targets, classes):
    """Logits of a perfect prediction."""
    return 100 * F.one_hot(targets, classes).movedim(-1, 1).float()


def test_losses_dice_of_a_perfect_prediction_is_zero_also_with_absent_classes():
    targets = torch.tensor([[[0, 0], [1, 4]], [[4, 4], [4, 4]]])
    for per, absent in itertools.product(("image", "batch"), ("skip", "count", "zero")):
        assert losses.dice_loss(confident(targets, 6), targets, per=per, absent=absent) == 0
        assert abs(losses.ce_dice_loss(confident(targets, 6), targets, per=per, absent=absent)[0]) < 1e-6


def test_losses_dice_absent_class_is_skipped_counted_or_zero():
    targets = torch.zeros(1, 10, dtype=torch.long)  # class 1 has one false positive, class 2 is nowhere
    logits = confident(torch.tensor([[0] * 9 + [1]]), 3)
    for absent, want in ("skip", 1 / 19), ("count", (1 / 19 + 1 + 0) / 3), ("zero", 1 / 57):
        assert near(losses.dice_loss(logits, targets, absent=absent).item(), want, 2e-5), absent
    pair = torch.stack([targets[0], torch.ones(10, dtype=torch.long)])  # pooled over the batch, class 1 is there
    logits = logits.expand(2, -1, -1)
    assert near(losses.dice_loss(logits, pair, per="batch").item(), ((1 - 18 / 28) + (1 - 2 / 12)) / 2, 2e-6)


def test_losses_dice_per_image_is_independent_of_the_rest_of_the_batch():
    g = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(3, 5, 8, 8, generator=g), torch.randint(0, 4, (3, 8, 8), generator=g)
    logits[0] *= 4
    alone = torch.stack([losses.dice_loss(logits[i:i + 1], targets[i:i + 1]) for i in range(3)])
    assert_near(losses.dice_loss(logits, targets), alone.mean())
    assert abs(losses.dice_loss(logits, targets, per="batch") - alone.mean()) > 1e-3
    for i in range(3):
        assert torch.equal(losses.dice_loss(logits[i:i + 1], targets[i:i + 1], per="batch"), alone[i])
    one = losses.dice_loss(logits.requires_grad_(), targets.where(torch.tensor([True, False, False])[:, None, None], 255),
                           ignore_index=255)  # two images all void: left out, not scored 0
    assert torch.equal(one, alone[0])


def test_losses_dice_of_soft_targets_is_least_at_the_targets_themselves():
    q = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0)).softmax(1)
    logits = q.log()
    for per, absent in itertools.product(("image", "batch"), ("skip", "count", "zero")):
        assert losses.dice_loss(logits, logits.softmax(1), per=per, absent=absent) == 0
        assert losses.dice_loss(logits, q, per=per, absent=absent) < 1e-6 < losses.dice_loss(2 * logits, q, per=per, absent=absent)


def test_losses_dice_takes_one_hot_targets_of_any_dtype_as_the_indices_they_are():
    logits, targets = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16).reshape(2, 8) % 3
    want = losses.dice_loss(logits, targets)
    for dtype in (torch.int64, torch.bool, torch.bfloat16, torch.float64):
        assert_near(losses.dice_loss(logits, F.one_hot(targets).transpose(1, 2).to(dtype)), want)
    for dtype in (torch.uint8, torch.int32, torch.int16):
        assert torch.equal(losses.dice_loss(logits, targets.to(dtype), ignore_index=-100), want)
    wide = torch.randn(1, 160, 1, generator=torch.Generator().manual_seed(0))  # -100 as uint8 is 156
    for loss in losses.ce_dice_loss, lambda z, t: [losses.dice_loss(z, t, ignore_index=-100)]:
        assert loss(wide, torch.full((1, 1), 156, dtype=torch.uint8))[0] == loss(wide, torch.full((1, 1), 156))[0]


def test_losses_dice_ignored_pixels_may_hold_nan_and_get_zero_gradient():
    g = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 4, (2, 6, 6), generator=g)
    logits = torch.randn(2, 4, 6, 6, generator=g)
    targets[:, 2:4], void = 255, torch.zeros(2, 4, 6, 6, dtype=torch.bool).index_fill_(2, torch.tensor([2, 3]), True)
    kept = [0, 1, 4, 5]
    for per, smoothing, gamma in itertools.product(("image", "batch"), (0.0, 0.1), (0.0, 2.0)):
        for call in (lambda z, t: losses.dice_loss(z, t, per=per, ignore_index=255),
                     lambda z, t: losses.ce_dice_loss(z, t, per=per, label_smoothing=smoothing, gamma=gamma, ignore_index=255)[0]):
            want, gradient = value_and_gradient(lambda z: call(z, targets[:, kept]), logits[:, :, kept])
            for garbage in math.nan, math.inf, -math.inf:
                got, full = value_and_gradient(lambda z: call(z, targets), logits.masked_fill(void, garbage))
                assert_near((got, full[:, :, kept]), (want, gradient))
                assert (full[void] == 0).all()


def test_losses_dice_with_nothing_that_counts_is_zero_and_connected():
    logits, void = torch.randn(2, 4, 3, requires_grad=True), torch.full((2, 3), 255)
    nan = torch.full((2, 4, 3), math.nan, requires_grad=True)

    def check(loss, z):
        (gradient,) = torch.autograd.grad(loss, z)
        assert loss == 0 and torch.equal(gradient, torch.zeros(2, 4, 3))

    for z in logits, nan:
        for per, absent in itertools.product(("image", "batch"), ("skip", "count", "zero")):
            check(losses.dice_loss(z, void, per=per, absent=absent, ignore_index=255), z)
        for gamma, weights in itertools.product((0.0, 2.0), (None, [1.0, 2.0, 3.0, 4.0])):
            check(losses.ce_dice_loss(z, void, gamma=gamma, label_smoothing=0.1, class_weights=weights, ignore_index=255)[0], z)
    check(losses.dice_loss(logits, torch.zeros(2, 3, dtype=torch.long), class_weights=[0, 1, 1, 1]), logits)
    for empty in void[:0], torch.zeros(0, 4, 3):
        check(losses.dice_loss(logits[:0], empty), logits)
        check(losses.ce_dice_loss(logits[:0], empty)[0], logits)


def test_losses_dice_sums_large_images_in_half_precision_and_loses_no_small_terms():
    targets = (torch.arange(512 * 512).reshape(1, 512, 512) % 512 < 300).long()
    logits = torch.stack([torch.zeros_like(targets), torch.full_like(targets, 3)], 1).half()
    p = 1 / (1 + math.exp(-3))  # of class 1, everywhere: 157,286 pixels of it lie beyond the range of float16
    want = 1 - ((2 * (1 - p) * 212) / ((1 - p) * 512 + 212) + (2 * p * 300) / (p * 512 + 300)) / 2
    for dtype in (torch.float16, torch.bfloat16):
        got, gradient = value_and_gradient(lambda z: losses.dice_loss(z, targets), logits.to(dtype))
        assert near(got.item(), want, 1e-6) and got.dtype == torch.float32 and gradient.isfinite().all()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert losses.dice_loss(logits.to(dtype), targets) == got
        soft = losses.dice_loss(logits.to(dtype), F.one_hot(targets).movedim(-1, 1).to(dtype))
        assert near(soft.item(), want, 1e-6) and soft.dtype == torch.float32
    assert losses.dice_loss(logits.double(), targets).dtype == torch.float64


def test_losses_ce_dice_is_cross_entropy_plus_dice_in_value_and_gradient():
    for logits, targets, ignore_index, *_ in segmentation_cases():
        options = dict(ignore_index=-100 if ignore_index is None else ignore_index, class_weights=[1.0, 2.0, 0.5, 3.0])
        weights = torch.tensor(options["class_weights"], dtype=torch.float64)
        for e, gamma, per, absent in itertools.product((0.0, 0.1), (0.0, 2.0), ("image", "batch"), ("skip", "count")):
            def parts(z):
                ce = (losses.focal_label_smooth_ce(z, targets, gamma=gamma, smoothing=e, **options) if gamma else
                      F.cross_entropy(z, targets, weights, ignore_index=options["ignore_index"], label_smoothing=e))
                return ce, losses.dice_loss(z, targets, per=per, absent=absent, smooth=0.1, **options)

            want = value_and_gradient(lambda z: torch.dot(torch.stack(parts(z)), torch.tensor([0.7, 2.5], dtype=torch.float64)), logits)
            keywords = dict(ce_weight=0.7, dice_weight=2.5, label_smoothing=e, gamma=gamma, per=per, absent=absent, smooth=0.1, **options)
            got = value_and_gradient(lambda z: losses.ce_dice_loss(z, targets, **keywords)[0], logits)
            assert_near(got, want, 1e-10)
            named = losses.ce_dice_loss(logits.requires_grad_(), targets, **keywords)[1]
            assert_near(named, dict(zip(("ce", "dice"), parts(logits))), 1e-10)
            assert not any(part.requires_grad for part in named.values())
            module = losses.CEDiceLoss(**keywords)
            assert torch.equal(module(logits, targets), losses.ce_dice_loss(logits, targets, **keywords)[0])


def test_losses_dice_modules_are_the_functions_with_weights_as_a_buffer():
    logits = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    targets = (torch.arange(16).reshape(2, 8) % 2).index_fill(1, torch.tensor([3]), 9)
    for options in (dict(per="batch", absent="count", smooth=1.0, class_weights=[1.0, 2.0, 3.0], ignore_index=9),
                    dict(ignore_index=9)):
        dice, both = losses.DiceLoss(**options), losses.CEDiceLoss(0.5, 2.0, 0.1, **options)
        assert torch.equal(dice(logits, targets), losses.dice_loss(logits, targets, **options))
        want = losses.ce_dice_loss(logits, targets, ce_weight=0.5, dice_weight=2.0, label_smoothing=0.1, **options)[0]
        assert torch.equal(both(logits, targets), want)
        assert not list(both.parameters()) and not list(dice.parameters())
        for module in dice, both:
            assert "class_weights" not in options or module.double().class_weights.dtype == torch.float64
    default = targets.masked_fill(targets == 9, -100)
    assert torch.equal(losses.CEDiceLoss()(logits, default), losses.ce_dice_loss(logits, default)[0])
    assert torch.equal(losses.DiceLoss()(logits, default.clamp_min(0)), losses.dice_loss(logits, default.clamp_min(0)))


def test_losses_dice_refuses_what_does_not_fit():
    zeros = torch.zeros
    long = lambda *shape: zeros(shape, dtype=torch.long)
    for loss in losses.dice_loss, losses.ce_dice_loss:
        for logits, targets in ((zeros(2, 3, 5, 5), long(2, 1, 5, 5)), (zeros(2, 3, 5, 5), long(2, 5)), (zeros(2, 3, 5), zeros(2, 5)),
                                (zeros(2, 3, 4, 4), long(2, 8, 8)), (zeros(2, 1, 5), long(2, 5)), (zeros(4), long(4)),
                                (long(2, 3, 5), long(2, 5))):
            for text in (*(str(tuple(each.shape)) for each in (logits, targets)), *(str(each.dtype) for each in (logits, targets))):
                raises(ValueError, text, lambda: loss(logits, targets))
        raises(ValueError, "0..2 or ignore_index=7, got -1 to 255 in 3 pixels; for void pixels",
               lambda: loss(zeros(1, 3, 5), torch.tensor([[0, 255, -1, 3, 7]]), ignore_index=7))
        raises(ValueError, "got 255 to 255 in 2 pixels", lambda: loss(zeros(1, 3, 2), torch.tensor([[255, 255]])))
        raises(ValueError, "class_weights must be (3,), one for each class, got (2,)",
               lambda: loss(zeros(1, 3, 2), long(1, 2), class_weights=[1.0, 2.0]))
        for option, text in ((dict(per="pixel"), "per='pixel'"), (dict(absent="drop"), "absent='drop'"), (dict(smooth=0), "smooth=0"),
                             (dict(smooth=math.nan), "smooth=nan")):
            raises(ValueError, text, lambda: loss(zeros(1, 3, 2), long(1, 2), **option))
    for option, text in ((dict(ce_weight=-1), "ce_weight=-1"), (dict(dice_weight=-1), "dice_weight=-1"), (dict(gamma=-1), "gamma=-1"),
                         (dict(label_smoothing=1.5), "label_smoothing=1.5")):
        raises(ValueError, text, lambda: losses.ce_dice_loss(zeros(1, 3, 2), long(1, 2), **option))


def test_losses_dice_of_one_pixel_is_the_number_in_its_docstring():
    logits, targets = torch.zeros(1, 2, 1, 1), torch.zeros(1, 1, 1, dtype=torch.long)
    assert near(losses.dice_loss(logits, targets).item(), 1 / 3, 2e-5)
    loss, parts = losses.ce_dice_loss(logits, targets)
    assert round(loss.item(), 4) == round(math.log(2) + 0.5, 4) == 1.1931
    loss, parts = losses.ce_dice_loss(torch.zeros(1, 2, 8, 8), torch.ones(1, 8, 8).long())
    assert [round(each.item(), 3) for each in (loss, parts["ce"], parts["dice"])] == [1.193, 0.693, 0.333]


def test_losses_auto_pos_weight_is_negatives_over_positives_for_any_container():
    labels = [0, 0, 1, 0, 0, 1, 0]
    for given in (labels, np.array(labels), np.array(labels, dtype=bool), np.array(labels)[::-1], np.array(labels)[:, None],
                  torch.tensor(labels), torch.tensor(labels, dtype=torch.bfloat16), torch.tensor(labels).bool()):
        assert losses.auto_pos_weight(given) == 2.5
    raises(ValueError, "0 or 1, got [0 2]", lambda: losses.auto_pos_weight([0, 2]))
    raises(ValueError, "0 or 1", lambda: losses.auto_pos_weight([0.0, math.nan]))
    raises(ValueError, "(2, 2)", lambda: losses.auto_pos_weight(np.eye(2)))


def test_losses_auto_pos_weight_of_one_class_is_finite_with_a_warning():
    for labels in [1, 1, 1], [0, 0], []:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert losses.auto_pos_weight(labels) == 1.0
        assert f"{labels.count(0)} negatives, {labels.count(1)} positives" in str(caught[0].message)


def test_losses_dice_and_cross_entropy_leave_out_pixels_whose_probabilities_are_all_zero():
    logits = torch.randn(2, 4, 3, 5, generator=seeded())
    targets = torch.rand(2, 4, 3, 5, generator=seeded(1)).softmax(1)
    targets[:, :, 1:] = 0
    logits[0, :, 1] = math.nan
    logits.requires_grad_()
    for options in ({"ignore_index": 255}, {"label_smoothing": 0.2}, {"gamma": 2.0, "label_smoothing": 0.2},
                    {"class_weights": torch.tensor([1.0, 2, 3, 4])}):
        got, parts = losses.ce_dice_loss(logits, targets, **options)
        want, known = losses.ce_dice_loss(logits[:, :, :1], targets[:, :, :1], **options)
        assert torch.isfinite(got) and near(got, want, 1e-5) and all(near(parts[name], known[name], 1e-5) for name in known)
        gradient = torch.autograd.grad(got, logits)[0]
        assert (gradient[:, :, 1:] == 0).all() and near(gradient[:, :, :1], torch.autograd.grad(want, logits)[0][:, :, :1], 1e-6)
    nothing = losses.ce_dice_loss(logits, torch.zeros_like(targets))[0]
    assert nothing == 0 and (torch.autograd.grad(nothing, logits)[0] == 0).all()


COMPOSITIONS = [0, 0, 1, 1], [0] * 6, [3, 1, 3, 3, 2, 1, 7], [0] * 7 + [1] * 2 + [2], [0, 1, 2, 3] * 3


def slow_supcon(features, labels, temperature):
    z = [row / np.linalg.norm(row) if row.any() else row for row in np.asarray(features, dtype=np.float64)]
    anchors = []
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        below = sum(math.exp(z[i] @ z[a] / temperature) for a in others)
        terms = [math.log(math.exp(z[i] @ z[p] / temperature) / below) for p in others if labels[p] == labels[i]]
        if terms:
            anchors.append(-sum(terms) / len(terms))
    return sum(anchors) / len(anchors)


def test_losses_supcon_equals_the_double_loop_whatever_the_lengths_of_the_features():
    for seed, labels in enumerate(COMPOSITIONS):
        features = torch.randn(len(labels), 5, generator=seeded(seed)) * torch.rand(len(labels), 1, generator=seeded(seed)) * 9
        for temperature in (0.07, 0.5, 2.0):
            got = losses.supcon_loss(features, torch.tensor(labels), temperature=temperature)
            assert got.dtype == torch.float32 and near(got, slow_supcon(features, labels, temperature), 2e-5)
        default = losses.supcon_loss(features, labels)
        assert default == losses.supcon_loss(features, torch.tensor(labels), temperature=0.07)
        assert near(losses.supcon_loss(1e-6 * features, labels), default, 1e-5)


def test_losses_supcon_gradient_equals_finite_differences():
    for labels in COMPOSITIONS[1:4]:
        features = torch.randn(len(labels), 3, dtype=torch.float64, generator=seeded(), requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: losses.supcon_loss(x, torch.tensor(labels), temperature=0.3), features)


def test_losses_supcon_leaves_anchors_without_positives_out_of_the_mean_and_keeps_them_as_negatives():
    features, labels = torch.randn(5, 4, generator=seeded()), torch.tensor([0, 0, 1, 2, 3])
    pair = features[:2].double() / features[:2].double().norm(dim=1, keepdim=True)
    unit = features.double() / features.double().norm(dim=1, keepdim=True)
    s = (pair @ unit.T / 0.5).exp()
    want = -(math.log(s[0, 1] / (s[0].sum() - s[0, 0])) + math.log(s[1, 0] / (s[1].sum() - s[1, 1]))) / 2
    assert near(losses.supcon_loss(features, labels, temperature=0.5), want, 1e-5)
    assert losses.supcon_loss(features, labels, temperature=2) > losses.supcon_loss(features[:3], labels[:3], temperature=2) + 0.1


def test_losses_supcon_of_one_class_is_never_below_ln_of_the_others_and_equal_there_at_both_ends():
    for n in (2, 5, 32):
        labels, floor = torch.zeros(n, dtype=torch.long), math.log(n - 1)
        simplex = torch.eye(n) - 1 / n  # every pair has the same cosine, -1 / (n - 1): as far apart as they can be
        for ends in torch.ones(n, 3), simplex:
            assert near(losses.supcon_loss(ends, labels), floor, 2e-6)
        for seed in range(20):
            scattered = torch.randn(n, 6, generator=seeded(seed))
            assert losses.supcon_loss(scattered, labels) > floor - 1e-6 and (n == 2 or losses.supcon_loss(scattered, labels) > floor + 0.01)
    assert round(losses.supcon_loss(torch.ones(32, 8), torch.zeros(32).long()).item(), 4) == 3.4340


def test_losses_supcon_of_equal_features_is_ln_of_the_others_whatever_the_labels():
    for labels in COMPOSITIONS:
        for row in torch.ones(1, 4), torch.zeros(1, 4), torch.randn(1, 4, generator=seeded()):
            got = losses.supcon_loss(row.expand(len(labels), 4), labels)
            assert near(got, math.log(len(labels) - 1), 2e-6) and near(losses.supcon_bounds(labels)[1], math.log(len(labels) - 1), 1e-12)


def test_losses_supcon_computes_in_float32_for_half_inputs_and_under_autocast_and_keeps_float64():
    features, labels = torch.randn(9, 6, generator=seeded()), torch.arange(9) % 3
    want = losses.supcon_loss(features, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same_bits(losses.supcon_loss(features, labels), want)
    for kind in torch.float16, torch.bfloat16:
        half = features.to(kind)
        got, gradient = value_and_gradient(lambda x: losses.supcon_loss(x, labels), half)
        assert got.dtype == torch.float32 and same_bits(got, losses.supcon_loss(half.float(), labels)) and gradient.dtype == kind
    double = losses.supcon_loss(features.double(), labels)
    assert double.dtype == torch.float64 and near(double, slow_supcon(features, labels.tolist(), 0.07), 1e-12)


def test_losses_supcon_is_finite_for_zero_vectors_and_low_temperatures():
    features, labels = torch.randn(6, 4, generator=seeded()), torch.tensor([0, 0, 1, 1, 0, 1])
    features[0] = 0
    loss, gradient = value_and_gradient(lambda x: losses.supcon_loss(x, labels), features)
    assert near(loss, slow_supcon(features, labels.tolist(), 0.07), 1e-5)
    assert 0 < gradient[0].abs().max() < 100  # F.normalize has 10^12 there
    loss, gradient = value_and_gradient(lambda x: losses.supcon_loss(x, labels, temperature=1e-4), features)  # exp(10^4) overflows
    assert 1000 < loss < 30000 and torch.isfinite(gradient).all()


def test_losses_supcon_takes_integer_labels_of_any_type_and_does_not_depend_on_the_order():
    features, labels = torch.randn(8, 4, generator=seeded()), [0, 1, 1, 0, 1, 0, 0, 1]
    want = losses.supcon_loss(features, labels)
    for given in torch.tensor(labels, dtype=torch.uint8), torch.tensor(labels).bool(), np.array(labels), 7 - 3 * torch.tensor(labels):
        assert same_bits(losses.supcon_loss(features, given), want)
    order = torch.randperm(8, generator=seeded())
    assert near(losses.supcon_loss(features[order], torch.tensor(labels)[order]), want, 1e-5)


def test_losses_supcon_refuses_what_it_cannot_compare():
    x, supcon = torch.randn(4, 3), losses.supcon_loss
    raises(ValueError, "no two of 4 samples share a class (4 classes)", lambda: supcon(x, [3, 1, 2, 0]))
    raises(ValueError, "stratified batches", lambda: supcon(x, [3, 1, 2, 0]))
    raises(ValueError, "no two of 1 samples", lambda: supcon(x[:1], [3]))
    raises(ValueError, "no two of 0 samples", lambda: supcon(x[:0], torch.zeros(0).long()))
    raises(ValueError, "got (4, 3) of torch.float32, labels (3,)", lambda: supcon(x, [0, 0, 1]))
    raises(ValueError, "labels (4,) of torch.float32", lambda: supcon(x, torch.zeros(4)))
    raises(ValueError, "got (4, 2, 3)", lambda: supcon(torch.randn(4, 2, 3), [0, 0, 1, 1]))
    raises(ValueError, "(4, 3) of torch.int64", lambda: supcon(x.long(), [0, 0, 1, 1]))
    for temperature in (0, -1, math.nan):
        raises(ValueError, f"temperature > 0, got {temperature}", lambda: supcon(x, [0, 0, 1, 1], temperature=temperature))
        raises(ValueError, f"temperature > 0, got (2,) and {temperature}", lambda: losses.supcon_bounds([0, 0], temperature=temperature))
    raises(ValueError, "(2, 2)", lambda: losses.supcon_bounds(np.zeros((2, 2))))


TWO_PROCESSES = """
import os, sys, time, torch, losses
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
given = torch.load(f"{folder}/given.pt", weights_only=True)
own = slice(4 * rank, 4 * rank + 4)
torch.manual_seed(0)
net = torch.nn.parallel.DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)))
loss = losses.supcon_loss(net(given["x"][own]), given["labels"][own].short(), temperature=0.3)
loss.backward()
try:
    losses.supcon_loss(given["x"][: 2 + rank], given["labels"][: 2 + rank])
except ValueError as error:
    refused = str(error)
torch.save({"loss": loss.detach(), "gradients": [p.grad for p in net.parameters()], "refused": refused}, f"{folder}/rank{rank}.pt")
open(f"{folder}/done{rank}", "w").close()
while not os.path.exists(f"{folder}/done{1 - rank}"):  # the other may still be reading from this one
    time.sleep(0.05)
os._exit(0)  # gloo's threads may abort the process when they are taken down ("terminate called without an active exception")
"""


def test_losses_supcon_over_two_processes_equals_one_with_the_whole_batch_in_value_and_gradient():
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        raise unittest.SkipTest("needs torch with gloo")
    x, labels = torch.randn(8, 6, generator=seeded()), torch.tensor([0, 1, 2, 3, 0, 1, 2, 0])  # rank 0 alone has no positive pair
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    want = losses.supcon_loss(net(x), labels, temperature=0.3)
    want.backward()
    with folder() as f:
        torch.save({"x": x, "labels": labels}, f / "given.pt")
        both = [subprocess.Popen([sys.executable, "-c", TWO_PROCESSES, str(rank), str(f)], cwd=HERE, stdout=subprocess.PIPE,
                                 stderr=subprocess.STDOUT, text=True) for rank in range(2)]
        try:
            printed = [each.communicate(timeout=120)[0] for each in both]
        finally:
            for each in both:
                each.kill()
        assert not any(each.returncode for each in both), printed
        for rank in range(2):
            got = torch.load(f / f"rank{rank}.pt", weights_only=True)
            assert near(got["loss"], want, 1e-6)
            for gradient, parameter in zip(got["gradients"], net.parameters(), strict=True):
                assert_near(gradient, parameter.grad)
            assert "got [[2, 6], [3, 6]]" in got["refused"]


def test_losses_supcon_is_never_below_its_bound_for_random_and_for_trained_features():
    for labels, temperature in itertools.product(COMPOSITIONS, (0.07, 0.5, 2.0)):
        low, collapsed = losses.supcon_bounds(labels, temperature=temperature)
        assert low <= collapsed + 1e-12
        for seed in range(30):
            features = torch.randn(len(labels), 2 + seed % 7, generator=seeded(seed), dtype=torch.float64)
            assert losses.supcon_loss(features, labels, temperature=temperature) > low - 1e-12
        features = features.requires_grad_()
        optimizer = torch.optim.Adam([features], lr=0.2)
        for _ in range(150):
            loss = losses.supcon_loss(features, labels, temperature=temperature)
            assert loss > low - 1e-12
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert len(set(labels)) == 1 or loss < collapsed - 0.3  # trained, so the bound was put to the test
        assert len(set(labels)) != 2 or loss < low + 1e-3


def test_losses_supcon_bound_is_what_two_opposite_classes_have_and_equals_ln_of_the_others_for_one():
    for rare, temperature in itertools.product((1, 2, 5), (0.07, 0.5, 2.0)):
        labels = [0] * 6 + [1] * rare
        opposite = torch.tensor([[1.0, 2.0]] * 6 + [[-1.0, -2.0]] * rare, dtype=torch.float64)
        low, collapsed = losses.supcon_bounds(labels, temperature=temperature)
        assert near(losses.supcon_loss(opposite, labels, temperature=temperature), low, 1e-12) and low < collapsed - 0.05
    for n in (2, 3, 32):
        np.testing.assert_allclose(losses.supcon_bounds(["a"] * n), [math.log(n - 1)] * 2, rtol=1e-12)
    np.testing.assert_allclose(losses.supcon_bounds(torch.arange(32) % 4), [math.log(7), math.log(31)], rtol=1e-9)
    for nothing in [], [0], [2, 0, 1]:
        assert all(map(math.isnan, losses.supcon_bounds(nothing)))


def test_losses_kl_equals_torch_distributions_in_value_and_gradient():
    for shape in (5,), (3, 4), (2, 3, 7), (0, 4), (2, 0):
        both = torch.randn(2, *shape, generator=seeded(), dtype=torch.float64) * 2
        normal = torch.distributions.Normal
        got = value_and_gradient(lambda z: losses.kl_to_standard_normal(*z), both)
        want = value_and_gradient(lambda z: torch.distributions.kl_divergence(normal(z[0], (z[1] / 2).exp()), normal(0, 1)).sum(-1), both)
        assert_near(got, want, 1e-12)
        assert got[0].shape == shape[:-1]
    for mu, logvar, want in (1.0, 0.0, 0.5), (0.0, math.log(4), 0.8069):  # the numbers in the docstring
        assert near(losses.kl_to_standard_normal(torch.tensor([mu]), torch.tensor([logvar])).item(), want, 2e-4)
    tiny = losses.kl_to_standard_normal(torch.zeros(1), torch.tensor([1e-3])).item()
    assert near(tiny / 2.5e-7, 1, 1e-2)  # logvar^2 / 4: exp(logvar) - 1 in float32 would be off by half of it


def test_losses_kl_free_bits_cost_the_same_and_have_no_gradient_in_each_row_and_dimension():
    assert near(losses.kl_to_standard_normal(torch.zeros(3, 5), torch.zeros(3, 5), free_bits=0.03), torch.tensor(0.03 * 5), 1e-5)
    mu = torch.tensor([[0.1, 2.0], [1.0, 0.1]], requires_grad=True)  # the mean over the rows is above 0.03 in both dimensions
    logvar = torch.zeros(2, 2, requires_grad=True)
    got = losses.kl_to_standard_normal(mu, logvar + 0.01, free_bits=0.03)
    free = losses.kl_to_standard_normal(mu, logvar + 0.01)
    got.sum().backward()
    assert (mu.grad == 0).tolist() == (logvar.grad == 0).tolist() == [[True, False], [False, True]]
    assert_near(mu.grad[0, 1], mu[0, 1].detach())
    assert near(got, free + 0.03 - (0.01 + (math.exp(0.01) - 1.01)) / 2, 1e-6)
    alone = [losses.kl_to_standard_normal(mu[i], logvar[i] + 0.01, free_bits=0.03) for i in range(2)]
    assert torch.equal(got, torch.stack(alone))  # adds up: nothing hangs on what else is in the batch


def test_losses_kl_computes_half_precision_in_float32_and_keeps_float64():
    mu, logvar = torch.randn(2, 4, 64, generator=seeded()).bfloat16() * 0.1
    want = losses.kl_to_standard_normal(mu.float(), logvar.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = losses.kl_to_standard_normal(mu, logvar)
    assert torch.equal(losses.kl_to_standard_normal(mu, logvar), want) and torch.equal(inside, want) and want.dtype == torch.float32
    assert torch.equal(losses.kl_to_standard_normal(mu.float(), logvar), want)
    assert losses.kl_to_standard_normal(mu.double(), logvar).dtype == torch.float64


def test_losses_kl_refuses_what_does_not_fit():
    kl, zeros = losses.kl_to_standard_normal, torch.zeros
    for mu, logvar in (zeros(3, 2), zeros(2)), (zeros(3), zeros(3).long()), (zeros(()), zeros(())), (zeros(2, 3), zeros(3, 2)):
        raises(ValueError, f"got {tuple(mu.shape)} of torch.float32 and {tuple(logvar.shape)}", lambda: kl(mu, logvar))
    for bits in -0.01, math.nan, math.inf:
        raises(ValueError, f"got {bits}; 0 is", lambda: kl(zeros(2), zeros(2), free_bits=bits))


def slow_chamfer(x, y, direction=1.0, magnitude=1.0, distance=3.0):
    """Of two lists of vectors, pair by pair."""
    def cost(a, b):
        lengths = np.linalg.norm(a), np.linalg.norm(b)
        cosine = a @ b / (lengths[0] * lengths[1]) if min(lengths) else 0.0
        return direction * (1 - cosine) + magnitude * abs(lengths[0] - lengths[1]) + distance * ((a - b) ** 2).sum()

    if not len(x) or not len(y):
        return 0.0
    return np.mean([min(cost(a, b) for b in y) for a in x]) + np.mean([min(cost(a, b) for a in x) for b in y])


def ragged_sets(seed=0, sets=7, n=5, m=6, width=4, dtype=torch.float64):
    """x, y and their masks, of any sizes from 0, in any places; some vectors are zero."""
    g = seeded(seed)
    x, y = (torch.randn(sets, size, width, generator=g, dtype=dtype) * (torch.rand(sets, size, 1, generator=g) < 0.9) for size in (n, m))
    x_mask, y_mask = (torch.rand(sets, size, generator=g) < torch.rand(sets, 1, generator=g) for size in (n, m))
    x_mask[:3], y_mask[:3] = torch.tensor([False, True, False])[:, None], torch.tensor([True, False, False])[:, None]
    return x, y, x_mask, y_mask


def test_losses_chamfer_equals_the_loop_over_pairs():
    for seed, weights in itertools.product(range(5), (dict(), dict(direction=0.0, magnitude=2.0, distance=0.5), dict(direction=4))):
        x, y, x_mask, y_mask = ragged_sets(seed)
        want = [slow_chamfer(a[p].numpy(), b[q].numpy(), **weights) for a, b, p, q in zip(x, y, x_mask, y_mask)]
        got = losses.chamfer(x, y, x_mask=x_mask, y_mask=y_mask, **weights)
        assert near(got, want, 1e-10)
        assert got[:3].tolist() == [0, 0, 0] and got[3:].max() > 1
        single = losses.chamfer(x.float(), y.float(), x_mask=x_mask, y_mask=y_mask, **weights)
        assert single.dtype == torch.float32
        assert near(single, want, 1e-4)
        np.testing.assert_allclose(losses.chamfer(x, y, y_mask=y_mask), [slow_chamfer(a.numpy(), b[q].numpy()) for a, b, q in
                                                                         zip(x, y, y_mask)], rtol=1e-10)
    costs = losses.set_costs(x, y)
    assert costs.shape == (7, 5, 6) and costs.min() >= 0
    pair = lambda a, b: losses.chamfer(torch.tensor([[a]]), torch.tensor([[b]])).item()
    assert near(pair([1.0, 0], [2.0, 0]), 8, 1e-5) and near(pair([1.0, 0], [0, 1.0]), 14, 1e-5)  # the numbers in the docstrings
    for shape in (0, 3, 4), (2, 0, 4):
        assert losses.chamfer(torch.zeros(shape), torch.zeros(shape[0], 3, 4)).tolist() == [0] * shape[0]


def test_losses_chamfer_gradient_equals_finite_differences_for_both_sides():
    x, y, x_mask, y_mask = ragged_sets(1, sets=5, n=3, m=4, width=3)
    x, y = (each.where(each != 0, 0.5 + torch.rand(each.shape, generator=seeded(2), dtype=each.dtype)).requires_grad_() for each in (x, y))
    assert torch.autograd.gradcheck(lambda *z: losses.chamfer(*z, x_mask=x_mask, y_mask=y_mask), (x, y))
    assert torch.autograd.gradcheck(lambda *z: losses.set_costs(*z, direction=0.3, magnitude=2, distance=0.7), (x, y))


def test_losses_chamfer_does_not_depend_on_order_or_padding():
    x, y, x_mask, y_mask = ragged_sets(3)
    found = []
    for change in "none", "order", "more padding", "broken padding":
        a, b, p, q = (each.clone() for each in (x, y, x_mask, y_mask))
        if change == "order":
            i, j = torch.randperm(5, generator=seeded()), torch.randperm(6, generator=seeded())
            a, b, p, q = a[:, i], b[:, j], p[:, i], q[:, j]
        if change == "more padding":
            a, b, p, q = F.pad(a, (0, 0, 2, 1), value=9.0), F.pad(b, (0, 0, 0, 4)), F.pad(p, (2, 1)), F.pad(q, (0, 4))
        if change == "broken padding":
            a[~p], b[~q] = math.nan, math.inf
        a, b = a.requires_grad_(), b.requires_grad_()
        loss = losses.chamfer(a, b, x_mask=p, y_mask=q)
        loss.sum().backward()
        assert (a.grad[~p] == 0).all() and (b.grad[~q] == 0).all() and a.grad.isfinite().all() and b.grad.isfinite().all(), change
        assert a.grad[3:].any() and b.grad[3:].any() and not a.grad[:3].any() and not b.grad[:3].any()
        found.append(loss)
    for loss in found[1:]:
        assert_near(loss, found[0], 1e-12)
    swapped = losses.chamfer(y, x, x_mask=y_mask, y_mask=x_mask)
    assert_near(swapped, found[0].detach(), 1e-12)


def test_losses_chamfer_is_zero_for_equal_sets_and_has_finite_gradients_at_zero_vectors():
    x = F.normalize(torch.randn(50, 8, 80, generator=seeded()), dim=2) * 2
    got, gradient = value_and_gradient(lambda z: losses.chamfer(z, x[:, torch.randperm(8, generator=seeded())]), x)
    assert (got >= 0).all() and got.max() < 1e-5 and gradient.abs().max() < 0.01
    for scale in 0.0, 1e-30, 1e-21, 1e-13, 1e-11:
        for other in torch.zeros(1, 2, 3), torch.ones(1, 2, 3), scale * torch.ones(1, 2, 3):
            a = torch.full((1, 2, 3), scale).requires_grad_()
            b = other.clone().requires_grad_()
            losses.chamfer(a, b).sum().backward()
            assert a.grad.isfinite().all() and b.grad.isfinite().all(), (scale, other)
    tiny, long = torch.tensor([[[1e-13, 0]], [[1e-11, 0]]]), torch.ones(2, 1, 1) * torch.tensor([3.0, 0])
    for pair in (tiny, long), (long, tiny):
        across = losses.set_costs(*pair, magnitude=0, distance=0).flatten().tolist()
        assert across[0] == 1 and across[1] < 1e-6  # no direction, the same direction
    a = torch.zeros(1, 1, 2, requires_grad=True)
    costs = losses.set_costs(a, torch.tensor([[[3.0, 4.0]]]))
    assert costs.item() == 1 + 5 + 75
    losses.set_costs(a, torch.tensor([[[3.0, 4.0]]]), direction=0).sum().backward()
    assert a.grad.flatten().tolist() == [-18, -24]  # a guess at zero is still drawn to its target, by 3 * 2 * (3, 4)


def test_losses_chamfer_computes_half_precision_in_float32():
    x, y = torch.randn(2, 3, 5, 16, generator=seeded())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(losses.chamfer(x, y), losses.chamfer(x.clone(), y)) and (x @ y.transpose(1, 2)).dtype == torch.bfloat16
        inside = losses.chamfer(x, y)
    assert torch.equal(inside, losses.chamfer(x, y)) and inside.dtype == torch.float32
    got = losses.chamfer(x.bfloat16(), y.bfloat16())
    assert torch.equal(got, losses.chamfer(x.bfloat16().float(), y.bfloat16().float())) and got.dtype == torch.float32


def test_losses_chamfer_needs_targets_that_do_not_train():
    """A constant guess, which knows nothing: the loss of fixed targets shows it, targets that train come to meet it."""
    for trains in False, True:
        guess = torch.ones(1, 1, 4, requires_grad=True)
        table = torch.randn(6, 1, 4, generator=seeded()).requires_grad_()  # a direction for each of 6 variables, one in each set
        optimizer = torch.optim.SGD([guess, table] if trains else [guess], lr=0.05)
        for _ in range(200):
            loss = losses.chamfer(guess.expand(6, 1, 4), F.normalize(table, dim=2)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        cosine = losses.mean_cosine(table[:, 0])
        assert (loss < 0.5 and cosine > 0.98) if trains else (loss > 4 and cosine < 0.5), (trains, loss, cosine)


def test_losses_chamfer_makes_no_tensor_of_all_pairs_and_features():
    shapes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, kinds, args=(), options=None):
            out = function(*args, **(options or {}))
            shapes.extend(each.numel() for each in (out if isinstance(out, (list, tuple)) else [out]) if torch.is_tensor(each))
            return out

    x = torch.randn(3, 20, 16, requires_grad=True)
    with Watch():
        losses.chamfer(x, torch.randn(3, 30, 16)).sum().backward()
    assert len(shapes) > 20 and max(shapes) <= 3 * 30 * 20


def test_losses_chamfer_refuses_what_does_not_fit():
    zeros = torch.zeros
    for x, y in ((zeros(2, 3), zeros(2, 3)), (zeros(2, 3, 4), zeros(2, 3, 5)), (zeros(2, 3, 4), zeros(1, 3, 4)),
                 (zeros(1, 1, 1).long(), zeros(1, 1, 1)), (zeros(2, 3, 4), zeros(2, 4))):
        for call in losses.chamfer, losses.set_costs:
            raises(ValueError, f"got {tuple(x.shape)} of {x.dtype} and {tuple(y.shape)}", lambda: call(x, y))
    x, y = zeros(2, 3, 4), zeros(2, 5, 4)
    raises(ValueError, "got y (2, 5, 4) and y_mask (2, 3) of torch.bool", lambda: losses.chamfer(x, y, y_mask=torch.ones(2, 3).bool()))
    raises(ValueError, "x_mask (2, 3) of torch.float32", lambda: losses.chamfer(x, y, x_mask=torch.ones(2, 3)))
    raises(ValueError, "got x (2, 3) and", lambda: losses.chamfer(x[:, :, 0], y, x_mask=torch.ones(2, 3).bool()))
    for name in "direction", "magnitude", "distance":
        for wrong in -1.0, math.nan:
            raises(ValueError, f"{wrong}", lambda: losses.chamfer(x, y, **{name: wrong}))
