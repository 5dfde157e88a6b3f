"""Tests of losses."""

import math
import subprocess
import sys
import unittest
from itertools import product

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import losses
from losses import focal_label_smooth_ce as focal
from losses import ce_dice_loss, dice_loss, supcon_bounds, supcon_loss
from tests.helpers import (
    assert_near, check_precision, folder, HERE, near, raises, refuses, same_bits, seeded, warned,
    with_gradient)

PER, ABSENT = ("image", "batch"), ("skip", "count", "zero")


def long_zeros(*shape):
    return torch.zeros(shape, dtype=torch.long)


def test_losses_focal_gamma_zero_equals_cross_entropy_in_value_and_gradient():
    torch.manual_seed(0)
    for shape in (7, 4), (3, 5, 2, 3):
        logits, weights = 3 * torch.randn(shape), torch.rand(shape[1]) + 0.1
        indices = torch.randint(0, shape[1], shape[:1] + shape[2:])
        probabilities, void = torch.randn(shape).softmax(1), indices.masked_fill(indices == 0, 255)
        kinds = [(indices, -100), (indices, 2), (void, 255), (probabilities, -100)]
        for (targets, ignored), w, e, reduction in product(
                kinds, (None, weights), (0.0, 0.1, 1.0), ("none", "sum", "mean")):
            shared = dict(ignore_index=ignored, reduction=reduction)
            want = with_gradient(F.cross_entropy, logits, targets, w, label_smoothing=e, **shared)
            shared["class_weights"] = w
            got = with_gradient(focal, logits, targets, gamma=0, smoothing=e, **shared)
            assert_near(got, want)


def test_losses_focal_equals_the_written_sum():
    logits = torch.tensor([[0.3, -1.2, 2.0], [4.0, 0.1, -0.5]], dtype=torch.float64)
    weights, e = [0.5, 2.0, 1.0], 0.2
    one_hot, soft = [[0, 0, 1], [0, 1, 0]], [[0.2, 0.3, 0.5], [0.9, 0.1, 0]]
    for gamma, targets in product((0.5, 1, 2, 3.7), (one_hot, soft)):
        rows = []
        for z, t in zip(logits.tolist(), targets):
            p = [math.exp(a) / sum(math.exp(b) for b in z) for a in z]
            rows.append(-sum(w * ((1 - e) * tc + e / 3) * (1 - pc) ** gamma * math.log(pc)
                             for w, tc, pc in zip(weights, t, p)))
        want, t = torch.tensor(rows, dtype=logits.dtype), torch.tensor(targets, dtype=logits.dtype)
        for given in (t, t.argmax(1)) if t.max() == 1 else (t,):
            assert_near(focal(logits, given, gamma=gamma, smoothing=e, class_weights=weights,
                              reduction="none"), want)


def test_losses_focal_gradient_equals_finite_differences():
    torch.manual_seed(0)
    logits, targets = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 2])
    logits.requires_grad_()
    for gamma in (0.3, 1, 2.5):
        assert gradcheck(lambda z: focal(z, targets, gamma=gamma, smoothing=0.1), logits)


def test_losses_focal_binary_is_the_two_class_case_for_labels_of_any_dtype():
    z, y = torch.tensor([-2.0, 0.3, 1.5, 4.0]), torch.tensor([0, 1, 0, 1])
    two_logits = torch.stack([torch.zeros(4), z], 1)
    dtypes = (torch.int64, torch.uint8, torch.bool, torch.float32, torch.float64, torch.bfloat16)
    for w, reduction in product((None, [0.5, 3.0]), ("none", "sum", "mean")):
        options = dict(class_weights=w, reduction=reduction)
        want = focal(two_logits, y, **options)
        for dtype, x, labels in product(dtypes, (z, z[:, None]), (y, y[:, None])):
            assert_near(focal(x, labels.to(dtype), **options), want)


def test_losses_focal_binary_without_focus_is_bce_with_logits_also_for_soft_labels():
    z, y = torch.tensor([-2.0, 0.3, 1.5, 4.0]), torch.tensor([0.0, 1.0, 0.3, 0.9])
    want = with_gradient(F.binary_cross_entropy_with_logits, z, 0.9 * y + 0.05)
    got = with_gradient(focal, z, y, gamma=0, smoothing=0.1)
    assert_near(got, want)


def test_losses_focal_gradient_is_finite_and_right_at_saturation():
    gammas, sizes = (0, 0.01, 0.5, 1, 2, 5), (10.0, 17.0, 50.0, 200.0, 1e4)
    for gamma, e, size in product(gammas, (0.0, 0.05), sizes):
        z = torch.tensor([size, -size, size, -size], requires_grad=True)
        rows = torch.tensor([[size, 0.0, 1.0], [-size, 0.0, 1.0]], requires_grad=True)
        options = dict(gamma=gamma, smoothing=e)
        binary = focal(z, torch.tensor([1, 1, 0, 0]), reduction="sum", **options)
        (binary + focal(rows, torch.tensor([0, 0]), **options)).backward()
        assert z.grad.isfinite().all() and rows.grad.isfinite().all(), (gamma, e, size)
        if size >= 50:  # certain: right is pulled back by e / 2, wrong has the full slope of 1
            assert_near(z.grad, torch.tensor([e / 2, e / 2 - 1, 1 - e / 2, -e / 2]))


def test_losses_focal_equals_its_logarithmic_form_at_every_confidence():
    z = torch.linspace(-30, 30, 61, dtype=torch.float64)
    for gamma in (0.1, 0.5, 1, 2):  # 1 - sigmoid(z) = sigmoid(-z): no rounding near p = 1
        want = with_gradient(lambda z: -(gamma * F.logsigmoid(-z)).exp() * F.logsigmoid(z), z)
        got = with_gradient(focal, z, torch.ones(61), gamma=gamma, smoothing=0, reduction="none")
        assert_near(got, want, 1e-6)


def test_losses_focal_with_everything_ignored_is_zero_and_connected():
    logits = torch.randn(3, 4, requires_grad=True)
    all_void, weights = torch.full((3,), -100), [1.0, 2, 3, 4]
    for loss in (focal(logits, all_void, class_weights=weights),
                 focal(logits[:, 0], torch.full((3,), 255.0), ignore_index=255),
                 focal(logits[:0, 0], torch.zeros(0)),
                 focal(logits[:0], long_zeros(0))):
        (gradient,) = grad(loss, logits)
        assert loss == 0 and torch.equal(gradient, torch.zeros(3, 4))


def test_losses_focal_ignored_samples_leave_the_rest_as_if_alone():
    z, y = torch.tensor([-2.0, 0.3, 1.5, 4.0]), torch.tensor([0.0, -100.0, 0.3, 1.0])
    rows, w = torch.tensor([0, 2, 3]), [1.0, 2.0]
    assert_near(focal(z, y, class_weights=w), focal(z[rows], y[rows], class_weights=w))
    logits, indices = torch.stack([z, -z, z + 1], 1), torch.tensor([0, 255, 2, 1])
    assert_near(focal(logits, indices, ignore_index=255), focal(logits[rows], indices[rows]))


def test_losses_focal_indices_may_be_of_any_integer_type():
    logits = torch.randn(1, 160, generator=seeded())
    want = focal(logits, torch.tensor([156]))
    small = torch.tensor([156], dtype=torch.uint8)  # -100 as uint8 is 156
    assert torch.equal(focal(logits, small), want) and want > 0


def test_losses_focal_accepts_masked_classes():
    logits = torch.tensor([[1.0, -math.inf, 0.0]], requires_grad=True)
    focal(logits, torch.tensor([0]), smoothing=0).backward()
    assert logits.grad.isfinite().all()


def test_losses_focal_computes_half_precision_in_float32_and_keeps_float64():
    logits, targets = torch.randn(64, 5, generator=seeded()), torch.arange(64) % 5
    check_precision(focal, logits, targets, class_weights=[1.1, 2.3, 0.7, 1.0, 3.3])
    check_precision(focal, logits[:, 0], targets % 2, class_weights=[1.1, 2.3])


def test_losses_focal_takes_one_hot_targets_of_any_dtype_as_the_indices_they_are():
    logits, targets = torch.randn(6, 3, generator=seeded()), torch.arange(6) % 3
    want = focal(logits, targets)
    for dtype in (torch.int64, torch.bool, torch.bfloat16, torch.float64):
        assert_near(focal(logits, F.one_hot(targets).to(dtype)), want)


def test_losses_focal_refuses_what_does_not_fit():
    zeros, long = torch.zeros, long_zeros
    for logits, targets in ((zeros(4), long(3)), (zeros(4, 1), long(4, 2)),
                            (zeros(4, 3), long(4, 1)), (zeros(4, 3), zeros(4)),
                            (zeros(4, 3), long(5)), (zeros(()), long(1)),
                            (zeros(2, 3, 5, 5), long(2, 3, 5))):
        for shape in logits.shape, targets.shape:
            refuses(focal, str(tuple(shape)), logits, targets)
    for labels, options, text in (
            ([0, 2], {}, "[0, 1] or ignore_index=-100, got 0 to 2"), ([0, -1], {}, "got -1 to 0"),
            ([0.0, math.nan], {}, "[0, 1]"), ([0, 0], {"class_weights": [1.0] * 3}, "(2,)"),
            ([0, 0], {"gamma": -1}, "gamma=-1"), ([0, 0], {"smoothing": 1.5}, "smoothing=1.5"),
            ([0, 0], {"reduction": "average"}, "'average'")):
        refuses(focal, text, zeros(2), torch.tensor(labels), **options)


def test_losses_focal_of_equal_logits_is_the_number_in_its_docstring():
    for targets in torch.tensor([3]), torch.tensor([[0.1, 0.2, 0.3, 0.4]]):
        got = focal(torch.zeros(1, 4), targets).item()
        assert near(got, 0.75 ** 2 * math.log(4), 1e-6)
    assert round(0.75 ** 2 * math.log(4), 4) == 0.7798


def test_losses_focal_module_is_the_function_with_weights_as_a_buffer():
    logits, targets = torch.randn(6, 3, generator=seeded()), torch.tensor([0, 1, 2, 2, 9, 0])
    options = dict(class_weights=[1.0, 2.0, 3.0], ignore_index=9, reduction="sum")
    module = losses.FocalLabelSmoothCE(smoothing=0.1, gamma=1.5, **options)
    want = focal(logits, targets, smoothing=0.1, gamma=1.5, **options)
    assert torch.equal(module(logits, targets), want)
    assert module.double().class_weights.dtype == torch.float64
    assert not list(module.parameters())
    default = losses.FocalLabelSmoothCE()(logits[:4], targets[:4])
    assert torch.equal(default, focal(logits[:4], targets[:4]))


def slow_dice(logits, one_hot, kept, *, per, absent, smooth, weights):
    """The definition, class by class, of every image or of the batch; (b, c, n) and (b, n)."""
    p, terms_of_images = logits.softmax(1), []
    batch = list(range(len(p)))
    for rows in [[image] for image in batch] if per == "image" else [batch]:
        terms, shares = [], []
        for c, weight in enumerate(weights):
            p_c, t_c = p[rows, c][kept[rows]], one_hot[rows, c][kept[rows]]
            overlap = torch.minimum(p_c, t_c).sum()
            term = 1 - (2 * overlap + smooth) / (p_c.sum() + t_c.sum() + smooth)
            counts = len(t_c) and (absent != "skip" or t_c.sum() > 0)
            terms.append(0 * term if absent == "zero" and t_c.sum() == 0 else term)
            shares.append(weight if counts else 0.0)
        if sum(shares):
            weighted = sum(w * term for w, term in zip(shares, terms))
            terms_of_images.append(weighted / sum(shares))
    return sum(terms_of_images) / len(terms_of_images) if terms_of_images else 0 * p.sum()


def segmentation_cases(dtype=torch.float64):
    """(logits, targets, ignore_index, one_hot (b, c, n), kept (b, n)): classes are absent."""
    g = seeded()
    for shape in (3, 4), (2, 4, 6), (3, 4, 2, 5):
        logits = 2 * torch.randn(shape, generator=g, dtype=dtype)
        indices = torch.randint(0, 3, shape[:1] + shape[2:], generator=g)  # class 3 is absent
        void = indices.masked_fill(torch.rand(indices.shape, generator=g) < 0.3, 255)
        void[0] = 255  # an image with nothing to learn from
        soft = torch.randn(shape, generator=g, dtype=dtype).softmax(1)
        for targets, ignored in (indices, None), (void, 255), (indices, 1), (soft, None):
            if targets is soft:
                one_hot = targets.reshape(shape[0], 4, -1)
                kept = torch.ones_like(one_hot[:, 0], dtype=torch.bool)
            else:
                flat = targets.reshape(shape[0], -1)
                kept = torch.ones_like(flat).bool() if ignored is None else flat != ignored
                one_hot = F.one_hot(flat.masked_fill(~kept, 0), 4).transpose(1, 2).to(dtype)
            yield logits, targets, ignored, one_hot, kept


def test_losses_dice_equals_the_definition_in_value_and_gradient():
    class_weights = (None, [1.0, 2.0, 0.5, 3.0], [0.0, 0.0, 2.0, 0.0])
    for logits, targets, ignore_index, one_hot, kept in segmentation_cases():
        for per, absent, smooth, weights in product(PER, ABSENT, (1e-5, 1.0), class_weights):
            options = dict(per=per, absent=absent, smooth=smooth)
            want = with_gradient(
                lambda z: slow_dice(z.reshape(len(z), 4, -1), one_hot, kept, **options,
                                    weights=weights or [1.0] * 4), logits)
            got = with_gradient(dice_loss, logits, targets, class_weights=weights,
                                ignore_index=ignore_index, **options)
            assert_near(got, want, 1e-10)


def test_losses_dice_gradient_equals_finite_differences():
    logits = torch.randn(2, 3, 4, dtype=torch.float64, generator=seeded()).requires_grad_()
    targets = torch.tensor([[0, 1, 9, 0], [2, 2, 2, 9]])
    for per, absent in product(PER, ABSENT):
        options = dict(per=per, absent=absent, ignore_index=9)
        assert gradcheck(lambda z: dice_loss(z, targets, **options), logits)


def test_losses_dice_of_large_images_in_float32_is_the_one_in_float64():
    targets = torch.arange(2**21).reshape(1, 2**21) % 5 % 2
    logits = torch.randn(1, 2, 2**21, generator=seeded())
    for pixels in 2**21, 2**21 - 5:  # rows of 64, the last one short
        given = logits[..., :pixels], targets[:, :pixels]
        for loss in dice_loss, lambda z, t: ce_dice_loss(z, t)[0]:
            want, gradient = with_gradient(loss, given[0].double(), given[1])
            got, single = with_gradient(loss, *given)
            assert near(got, want, 1e-6) and near(single, gradient, 1e-5)


def test_losses_of_pixels_are_plain_torch_without_float64_and_with_a_second_derivative():
    made = set()

    class Dtypes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), options=None):
            result = function(*args, **options or {})
            made.update(leaf.dtype for leaf in tree_leaves(result) if torch.is_tensor(leaf))
            return result

    logits, targets = torch.randn(2, 3, 4, generator=seeded()), torch.arange(8).view(2, 4) % 3
    for loss in dice_loss, lambda z, t: ce_dice_loss(z, t, label_smoothing=0.1)[0], focal:
        with Dtypes():
            with_gradient(loss, logits, targets)
        assert torch.float32 in made and torch.float64 not in made
        assert gradgradcheck(lambda z: loss(z, targets), logits.double().requires_grad_())


def test_losses_ce_dice_gradient_does_not_depend_on_the_memory_format():
    logits = torch.randn(2, 3, 4, 5, generator=seeded())
    targets = torch.arange(40).reshape(2, 4, 5) % 3
    last = logits.to(memory_format=torch.channels_last).requires_grad_()
    want, got = (grad(ce_dice_loss(z, targets)[0], z)[0] for z in (logits.requires_grad_(), last))
    assert_near(got, want)


def confident(targets, classes):
    """Logits of a perfect prediction."""
    return 100 * F.one_hot(targets, classes).movedim(-1, 1).float()


def test_losses_dice_of_a_perfect_prediction_is_zero_also_with_absent_classes():
    targets = torch.tensor([[[0, 0], [1, 4]], [[4, 4], [4, 4]]])
    logits = confident(targets, 6)
    for per, absent in product(PER, ABSENT):
        assert dice_loss(logits, targets, per=per, absent=absent) == 0
        assert abs(ce_dice_loss(logits, targets, per=per, absent=absent)[0]) < 1e-6


def test_losses_dice_absent_class_is_skipped_counted_or_zero():
    targets = long_zeros(1, 10)  # class 1 has one false positive, class 2 is nowhere
    logits = confident(torch.tensor([[0] * 9 + [1]]), 3)
    for absent, want in ("skip", 1 / 19), ("count", (1 / 19 + 1 + 0) / 3), ("zero", 1 / 57):
        assert near(dice_loss(logits, targets, absent=absent).item(), want, 2e-5), absent
    pair = torch.cat([targets, targets + 1])  # pooled over the batch, class 1 is there
    got = dice_loss(logits.expand(2, -1, -1), pair, per="batch").item()
    assert near(got, ((1 - 18 / 28) + (1 - 2 / 12)) / 2, 2e-6)


def test_losses_dice_per_image_is_independent_of_the_rest_of_the_batch():
    g = seeded()
    logits = torch.randn(3, 5, 8, 8, generator=g)
    targets = torch.randint(0, 4, (3, 8, 8), generator=g)
    logits[0] *= 4
    alone = torch.stack([dice_loss(logits[i:i + 1], targets[i:i + 1]) for i in range(3)])
    assert_near(dice_loss(logits, targets), alone.mean())
    assert abs(dice_loss(logits, targets, per="batch") - alone.mean()) > 1e-3
    for i in range(3):
        assert torch.equal(dice_loss(logits[i:i + 1], targets[i:i + 1], per="batch"), alone[i])
    targets[1:] = 255  # two images all void: left out, not scored 0
    one = dice_loss(logits.requires_grad_(), targets, ignore_index=255)
    assert torch.equal(one, alone[0])


def test_losses_dice_of_soft_targets_is_least_at_the_targets_themselves():
    q = torch.randn(2, 4, 6, 6, generator=seeded()).softmax(1)
    logits = q.log()
    for per, absent in product(PER, ABSENT):
        options = dict(per=per, absent=absent)
        assert dice_loss(logits, logits.softmax(1), **options) == 0
        assert dice_loss(logits, q, **options) < 1e-6 < dice_loss(2 * logits, q, **options)


def test_losses_dice_takes_one_hot_targets_of_any_dtype_as_the_indices_they_are():
    logits = torch.randn(2, 3, 8, generator=seeded())
    targets = torch.arange(16).reshape(2, 8) % 3
    want = dice_loss(logits, targets)
    for dtype in (torch.int64, torch.bool, torch.bfloat16, torch.float64):
        assert_near(dice_loss(logits, F.one_hot(targets).transpose(1, 2).to(dtype)), want)
    for dtype in (torch.uint8, torch.int32, torch.int16):
        assert torch.equal(dice_loss(logits, targets.to(dtype), ignore_index=-100), want)
    wide = torch.randn(1, 160, 1, generator=seeded())  # -100 as uint8 is 156
    index = torch.full((1, 1), 156)
    for loss in ce_dice_loss, lambda z, t: [dice_loss(z, t, ignore_index=-100)]:
        assert loss(wide, index.to(torch.uint8))[0] == loss(wide, index)[0]


def test_losses_dice_ignored_pixels_may_hold_nan_and_get_zero_gradient():
    g = seeded()
    targets = torch.randint(0, 4, (2, 6, 6), generator=g)
    logits = torch.randn(2, 4, 6, 6, generator=g)
    void, rows = torch.zeros(2, 4, 6, 6, dtype=torch.bool), [0, 1, 4, 5]
    targets[:, 2:4], void[:, :, 2:4] = 255, True
    for per, smoothing, gamma in product(PER, (0.0, 0.1), (0.0, 2.0)):
        shared = dict(per=per, ignore_index=255)
        ce = dict(label_smoothing=smoothing, gamma=gamma)
        for loss in (lambda z, t: dice_loss(z, t, **shared),
                     lambda z, t: ce_dice_loss(z, t, **ce, **shared)[0]):
            want, gradient = with_gradient(loss, logits[:, :, rows], targets[:, rows])
            for garbage in math.nan, math.inf, -math.inf:
                got, full = with_gradient(loss, logits.masked_fill(void, garbage), targets)
                assert_near((got, full[:, :, rows]), (want, gradient))
                assert (full[void] == 0).all()


def test_losses_dice_with_nothing_that_counts_is_zero_and_connected():
    logits, void = torch.randn(2, 4, 3, requires_grad=True), torch.full((2, 3), 255)
    nan = torch.full((2, 4, 3), math.nan, requires_grad=True)

    def check(loss, z):
        (gradient,) = grad(loss, z)
        assert loss == 0 and torch.equal(gradient, torch.zeros(2, 4, 3))

    for z in logits, nan:
        for per, absent in product(PER, ABSENT):
            check(dice_loss(z, void, per=per, absent=absent, ignore_index=255), z)
        for gamma, weights in product((0.0, 2.0), (None, [1.0, 2.0, 3.0, 4.0])):
            check(ce_dice_loss(z, void, gamma=gamma, label_smoothing=0.1, class_weights=weights,
                               ignore_index=255)[0], z)
    check(dice_loss(logits, long_zeros(2, 3), class_weights=[0, 1, 1, 1]), logits)
    for empty in void[:0], torch.zeros(0, 4, 3):
        check(dice_loss(logits[:0], empty), logits)
        check(ce_dice_loss(logits[:0], empty)[0], logits)


def test_losses_dice_sums_large_images_in_half_precision_and_loses_no_small_terms():
    targets = (torch.arange(512 * 512).reshape(1, 512, 512) % 512 < 300).long()
    logits = torch.stack([torch.zeros_like(targets), torch.full_like(targets, 3)], 1).half()
    p = 1 / (1 + math.exp(-3))  # class 1 is true in 157,286 pixels: float16 cannot hold that sum
    overlap_0, overlap_1 = (1 - p) * 212, p * 300
    want = 1 - (2 * overlap_0 / ((1 - p) * 512 + 212) + 2 * overlap_1 / (p * 512 + 300)) / 2
    for dtype in (torch.float16, torch.bfloat16):
        got, gradient = with_gradient(dice_loss, logits.to(dtype), targets)
        assert gradient.isfinite().all()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert dice_loss(logits.to(dtype), targets) == got
        soft = dice_loss(logits.to(dtype), F.one_hot(targets).movedim(-1, 1).to(dtype))
        for loss in got, soft:
            assert near(loss.item(), want, 1e-6) and loss.dtype == torch.float32
    assert dice_loss(logits.double(), targets).dtype == torch.float64


def test_losses_ce_dice_is_cross_entropy_plus_dice_in_value_and_gradient():
    for logits, targets, ignore_index, *_ in segmentation_cases():
        ignore_index = -100 if ignore_index is None else ignore_index
        options = dict(ignore_index=ignore_index, class_weights=[1.0, 2.0, 0.5, 3.0])
        weights = torch.tensor(options["class_weights"], dtype=torch.float64)
        for e, gamma, per, absent in product((0.0, 0.1), (0.0, 2.0), PER, ("skip", "count")):
            dice_options = dict(per=per, absent=absent, smooth=0.1)

            def parts(z):
                dice = dice_loss(z, targets, **dice_options, **options)
                if gamma:
                    ce = focal(z, targets, gamma=gamma, smoothing=e, **options)
                else:
                    ce = F.cross_entropy(z, targets, weights, ignore_index=ignore_index,
                                         label_smoothing=e)
                return {"ce": ce, "dice": dice}

            want = with_gradient(lambda z: 0.7 * parts(z)["ce"] + 2.5 * parts(z)["dice"], logits)
            keywords = dict(ce_weight=0.7, dice_weight=2.5, label_smoothing=e, gamma=gamma,
                            **dice_options, **options)
            got = with_gradient(lambda z: ce_dice_loss(z, targets, **keywords)[0], logits)
            assert_near(got, want, 1e-10)
            loss, got_parts = ce_dice_loss(logits.requires_grad_(), targets, **keywords)
            assert_near(got_parts, parts(logits), 1e-10)
            assert not any(part.requires_grad for part in got_parts.values())
            assert torch.equal(losses.CEDiceLoss(**keywords)(logits, targets), loss)


def test_losses_dice_modules_are_the_functions_with_weights_as_a_buffer():
    logits = torch.randn(2, 3, 8, generator=seeded())
    targets = (torch.arange(16).reshape(2, 8) % 2).index_fill(1, torch.tensor([3]), 9)
    full = dict(per="batch", absent="count", smooth=1.0, class_weights=[1.0, 2.0, 3.0])
    for options in full, {}:
        options = dict(ignore_index=9, **options)
        ce = dict(ce_weight=0.5, dice_weight=2.0, label_smoothing=0.1)
        dice, both = losses.DiceLoss(**options), losses.CEDiceLoss(**ce, **options)
        assert torch.equal(dice(logits, targets), dice_loss(logits, targets, **options))
        assert torch.equal(both(logits, targets), ce_dice_loss(logits, targets, **ce, **options)[0])
        for module in dice, both:
            assert not list(module.parameters())
            if "class_weights" in options:
                assert module.double().class_weights.dtype == torch.float64
    targets = targets.masked_fill(targets == 9, -100)
    assert torch.equal(losses.CEDiceLoss()(logits, targets), ce_dice_loss(logits, targets)[0])
    targets = targets.clamp_min(0)
    assert torch.equal(losses.DiceLoss()(logits, targets), dice_loss(logits, targets))


def test_losses_dice_refuses_what_does_not_fit():
    zeros, long = torch.zeros, long_zeros
    small = (zeros(1, 3, 2), long(1, 2))
    for loss in dice_loss, ce_dice_loss:
        for logits, targets in ((zeros(2, 3, 5, 5), long(2, 1, 5, 5)),
                                (zeros(2, 3, 5, 5), long(2, 5)), (zeros(2, 3, 5), zeros(2, 5)),
                                (zeros(2, 3, 4, 4), long(2, 8, 8)), (long(2, 3, 5), long(2, 5))):
            for tensor in logits, targets:
                for text in str(tuple(tensor.shape)), str(tensor.dtype):
                    refuses(loss, text, logits, targets)
        for logits in zeros(4), zeros(4, 1):
            refuses(loss, "(1, 1, n)", logits, long(4))
        targets = torch.tensor([[0, 255, -1, 3, 7]])
        refuses(loss, "0..2 or ignore_index=7, got -1 to 255; for void pixels",
                zeros(1, 3, 5), targets, ignore_index=7)
        refuses(loss, "got 255 to 255", small[0], small[1] + 255)
        for option, text in ((dict(per="pixel"), "per='pixel'"),
                             (dict(absent="drop"), "absent='drop'"), (dict(smooth=0), "smooth=0"),
                             (dict(smooth=math.nan), "smooth=nan"),
                             (dict(class_weights=[1.0, 2.0]),
                              "class_weights must be (3,), one for each class, got (2,)")):
            refuses(loss, text, *small, **option)
    for name, value in (("ce_weight", -1), ("dice_weight", -1), ("gamma", -1),
                        ("label_smoothing", 1.5)):
        refuses(ce_dice_loss, f"{name}={value}", *small, **{name: value})


def test_losses_dice_of_one_pixel_is_the_number_in_its_docstring():
    logits, targets = torch.zeros(1, 2, 1, 1), long_zeros(1, 1, 1)
    assert near(dice_loss(logits, targets).item(), 1 / 3, 2e-5)
    loss, parts = ce_dice_loss(logits, targets)
    assert round(loss.item(), 4) == round(math.log(2) + 0.5, 4) == 1.1931
    loss, parts = ce_dice_loss(torch.zeros(1, 2, 8, 8), torch.ones(1, 8, 8).long())
    rounded = [round(value.item(), 3) for value in (loss, parts["ce"], parts["dice"])]
    assert rounded == [1.193, 0.693, 0.333]


def test_losses_one_logit_is_a_mask_of_the_foreground():
    g = seeded()
    z, masks = 2 * torch.randn(3, 1, 6, 7, generator=g), torch.rand(3, 6, 7, generator=g) < 0.4
    masks[2], soft = False, torch.rand(3, 6, 7, generator=g)  # no foreground in the last image

    def foreground_dice(z, t, absent="skip"):
        p = torch.sigmoid(z[:, 0]).flatten(1)
        t = t.float().flatten(1)
        dice = (2 * torch.minimum(p, t).sum(1) + 1e-5) / (p.sum(1) + t.sum(1) + 1e-5)
        present = t.sum(1) > 0
        if absent == "skip":
            dice = dice[present]
        return 1 - dice.where(present, 1).mean() if absent == "zero" else 1 - dice.mean()

    def bce(z, t):
        return F.binary_cross_entropy_with_logits(z[:, 0], t.float())

    for absent, t in product(ABSENT, (masks, masks.long(), soft)):
        want = with_gradient(foreground_dice, z, t, absent)
        both = with_gradient(lambda z: bce(z, t) + 1.5 * foreground_dice(z, t, absent), z)
        for given in t, t.unsqueeze(1):
            assert_near(with_gradient(dice_loss, z, given, absent=absent), want)
            got = with_gradient(lambda z: ce_dice_loss(z, given, absent=absent)[0], z)
            assert_near(got, both)
            got = with_gradient(focal, z, given, gamma=0, smoothing=0)
            assert_near(got, with_gradient(bce, z, t))
    for value, want in (9.0, 0.0), (-9.0, 1.0):
        got = dice_loss(torch.full((2, 1, 48, 48), value), torch.ones(2, 48, 48))
        assert abs(got - want) < 1e-3
    void = masks.long().masked_fill(masks, 255)
    assert dice_loss(z, void, ignore_index=255) == 0 == dice_loss(z, void, ignore_index=255).dim()
    for loss, t in product((dice_loss, ce_dice_loss, focal), (torch.ones, torch.zeros)):
        refuses(loss, "no channel: pass logits.unsqueeze(1)", z[:, 0], t(3, 6, 7))


def test_losses_probabilities_sum_to_one_or_are_refused_with_the_loss_that_fits():
    several, nothing = torch.tensor([[1.0, 1, 0]]), torch.zeros(1, 3)
    halves = torch.full((2, 3, 4, 4), 0.5)
    for loss, t in (focal, several), (focal, nothing), (dice_loss, halves), (ce_dice_loss, halves):
        refuses(loss, "F.binary_cross_entropy_with_logits", torch.zeros(t.shape), t)
    rounded = torch.randn(2, 19, 8, 8, generator=seeded()).softmax(1).bfloat16()
    for loss in focal, dice_loss, lambda z, t: ce_dice_loss(z, t)[0]:
        assert loss(torch.zeros(rounded.shape), rounded).isfinite()


def test_losses_options_are_keywords_checked_when_the_module_is_built():
    modules = losses.FocalLabelSmoothCE, losses.DiceLoss, losses.CEDiceLoss
    for module in modules:
        raises(TypeError, "positional", lambda: module(1.0))
        refuses(module, "class_weights", class_weights=[1.0, -1.0])
    for module, options in (
            (modules[0], dict(gamma=-1)), (modules[0], dict(smoothing=2)),
            (modules[0], dict(reduction="average")), (modules[1], dict(per="pixel")),
            (modules[1], dict(smooth=0)), (modules[2], dict(absent="drop")),
            (modules[2], dict(ce_weight=-1)), (modules[2], dict(label_smoothing=1.5))):
        [(name, value)] = options.items()
        refuses(module, f"{name}={value!r}", **options)


def test_losses_focal_names_an_index_out_of_range_and_is_zero_without_weight():
    for targets in torch.tensor([0, 3]), torch.tensor([-1, 2]):
        text = f"0..2 or ignore_index=-100, got {targets.min()} to {targets.max()}"
        refuses(focal, text, torch.zeros(2, 3), targets)
    logits = torch.randn(2, 3, generator=seeded()).requires_grad_()
    for loss in (focal(logits, torch.tensor([1, 1]), class_weights=[1.0, 0, 1]),
                 focal(logits[:, 0], torch.tensor([1, 1]), class_weights=[1.0, 0])):
        assert loss == 0 and (grad(loss, logits)[0] == 0).all()


def test_losses_focal_is_the_loss_of_lin_by_the_calls_in_its_docstring():
    z, y, alpha = torch.linspace(-4, 4, 9), torch.arange(9) % 2, 0.25
    weights = torch.where(y == 1, alpha, 1 - alpha)

    def lin(z):  # times alpha as torchvision.ops.sigmoid_focal_loss
        p_t = torch.sigmoid(torch.where(y == 1, z, -z))
        return -(1 - p_t) ** 2 * p_t.log()

    calls = {"focal_label_smooth_ce(logits, targets, smoothing=0.0)": lambda z: lin(z).mean(),
             "focal_label_smooth_ce(logits, targets, smoothing=0.0, class_weights=[1 - alpha, "
             'alpha], reduction="none").mean()': lambda z: (weights * lin(z)).mean()}
    for call, want in calls.items():
        assert call in " ".join(focal.__doc__.split())
        names = {"focal_label_smooth_ce": focal, "targets": y, "alpha": alpha}
        got = with_gradient(lambda z: eval(call, names | {"logits": z}), z)
        assert_near(got, with_gradient(want, z))


def test_losses_dice_without_the_background_is_the_mean_of_the_other_classes():
    g = seeded()
    logits, targets = torch.randn(2, 3, 8, 8, generator=g), torch.arange(128).view(2, 8, 8) % 3
    targets[1] = 0  # an image of background alone
    without = dict(include_background=False)
    for absent in ABSENT:
        options = dict(absent=absent)
        want = dice_loss(logits, targets, class_weights=[0.0, 1, 1], **options)
        assert dice_loss(logits, targets, **without, **options) == want
        assert losses.DiceLoss(**without, **options)(logits, targets) == want
        loss, parts = ce_dice_loss(logits, targets, **without, **options)
        assert_near(parts, {"ce": F.cross_entropy(logits, targets), "dice": want})
        assert losses.CEDiceLoss(**without, **options)(logits, targets) == loss


def test_losses_auto_pos_weight_is_negatives_over_positives_for_any_container():
    labels = [0, 0, 1, 0, 0, 1, 0]
    array, tensor = np.array(labels), torch.tensor(labels)
    for given in (labels, array, array.astype(bool), array[::-1], array[:, None],
                  tensor, tensor.bfloat16(), tensor.bool()):
        assert losses.auto_pos_weight(given) == 2.5
    refuses(losses.auto_pos_weight, "0 or 1, got [0 2]", [0, 2])
    refuses(losses.auto_pos_weight, "0 or 1", [0.0, math.nan])
    refuses(losses.auto_pos_weight, "(2, 2)", np.eye(2))


def test_losses_auto_pos_weight_of_one_class_is_finite_with_a_warning():
    for labels in [1, 1, 1], [0, 0], []:
        weight, message = warned(lambda: losses.auto_pos_weight(labels))
        assert weight == 1.0
        assert f"{labels.count(0)} negatives, {labels.count(1)} positives" in message


def test_losses_dice_and_cross_entropy_leave_out_pixels_whose_probabilities_are_all_zero():
    logits = torch.randn(2, 4, 3, 5, generator=seeded())
    targets = torch.rand(2, 4, 3, 5, generator=seeded(1)).softmax(1)
    targets[:, :, 1:] = 0
    logits[0, :, 1] = math.nan
    logits.requires_grad_()
    first = (slice(None), slice(None), slice(1))  # the row of pixels that counts
    for options in (dict(ignore_index=255), dict(label_smoothing=0.2),
                    dict(gamma=2.0, label_smoothing=0.2), dict(class_weights=[1.0, 2, 3, 4])):
        got, parts = ce_dice_loss(logits, targets, **options)
        want, want_parts = ce_dice_loss(logits[first], targets[first], **options)
        assert torch.isfinite(got) and near(got, want, 1e-5)
        assert all(near(parts[name], value, 1e-5) for name, value in want_parts.items())
        gradient, expected = (grad(loss, logits)[0] for loss in (got, want))
        assert (gradient[:, :, 1:] == 0).all() and near(gradient[first], expected[first], 1e-6)
    nothing = ce_dice_loss(logits, torch.zeros_like(targets))[0]
    assert nothing == 0 and (grad(nothing, logits)[0] == 0).all()


COMPOSITIONS = [
    [0, 0, 1, 1], [0] * 6, [3, 1, 3, 3, 2, 1, 7], [0] * 7 + [1] * 2 + [2], [0, 1, 2, 3] * 3]


def slow_supcon(features, labels, temperature):
    """Row by row, in float64."""
    features = np.asarray(features, dtype=np.float64)
    z = [row / np.linalg.norm(row) if row.any() else row for row in features]
    anchors = []
    for i in range(len(z)):
        weights = {a: math.exp(z[i] @ z[a] / temperature) for a in range(len(z)) if a != i}
        positives = [p for p in weights if labels[p] == labels[i]]
        terms = [math.log(weights[p] / sum(weights.values())) for p in positives]
        if terms:
            anchors.append(-sum(terms) / len(terms))
    return sum(anchors) / len(anchors)


def test_losses_supcon_equals_the_double_loop_whatever_the_lengths_of_the_features():
    for seed, labels in enumerate(COMPOSITIONS):
        directions = torch.randn(len(labels), 5, generator=seeded(seed))
        features = directions * torch.rand(len(labels), 1, generator=seeded(seed)) * 9
        for temperature in (0.07, 0.5, 2.0):
            got = supcon_loss(features, torch.tensor(labels), temperature=temperature)
            assert got.dtype == torch.float32
            assert near(got, slow_supcon(features, labels, temperature), 2e-5)
        default = supcon_loss(features, labels)
        assert default == supcon_loss(features, torch.tensor(labels), temperature=0.07)
        assert near(supcon_loss(1e-6 * features, labels), default, 1e-5)


def test_losses_supcon_gradient_equals_finite_differences():
    for labels in COMPOSITIONS[1:4]:
        features = torch.randn(len(labels), 3, dtype=torch.float64, generator=seeded())
        features.requires_grad_()
        assert gradcheck(lambda x: supcon_loss(x, labels, temperature=0.3), features)


def test_losses_supcon_leaves_anchors_without_positives_out_of_the_mean_but_not_as_negatives():
    features, labels = torch.randn(5, 4, generator=seeded()), torch.tensor([0, 0, 1, 2, 3])
    unit = F.normalize(features.double())
    s = (unit[:2] @ unit.T / 0.5).exp()
    shares = s[0, 1] / (s[0].sum() - s[0, 0]), s[1, 0] / (s[1].sum() - s[1, 1])
    want = -(math.log(shares[0]) + math.log(shares[1])) / 2
    assert near(supcon_loss(features, labels, temperature=0.5), want, 1e-5)
    fewer_negatives = supcon_loss(features[:3], labels[:3], temperature=2)
    assert supcon_loss(features, labels, temperature=2) > fewer_negatives + 0.1


def test_losses_supcon_of_one_class_is_never_below_ln_of_the_others_and_equal_there_at_both_ends():
    for n in (2, 5, 32):
        labels, floor = torch.zeros(n, dtype=torch.long), math.log(n - 1)
        simplex = torch.eye(n) - 1 / n  # every cosine is -1 / (n - 1): as far apart as possible
        for ends in torch.ones(n, 3), simplex:
            assert near(supcon_loss(ends, labels), floor, 2e-6)
        for seed in range(20):
            scattered = supcon_loss(torch.randn(n, 6, generator=seeded(seed)), labels)
            assert scattered > floor - 1e-6 and (n == 2 or scattered > floor + 0.01)
    assert round(supcon_loss(torch.ones(32, 8), long_zeros(32)).item(), 4) == 3.4340


def test_losses_supcon_of_equal_features_is_ln_of_the_others_whatever_the_labels():
    for labels in COMPOSITIONS:
        want = math.log(len(labels) - 1)
        assert near(supcon_bounds(labels)[1], want, 1e-12)
        for row in torch.ones(1, 4), torch.zeros(1, 4), torch.randn(1, 4, generator=seeded()):
            assert near(supcon_loss(row.expand(len(labels), 4), labels), want, 2e-6)


def test_losses_supcon_computes_in_float32_for_half_inputs_and_under_autocast_and_keeps_float64():
    features, labels = torch.randn(9, 6, generator=seeded()), torch.arange(9) % 3
    check_precision(supcon_loss, features, labels)
    for dtype in torch.float16, torch.bfloat16:
        assert with_gradient(supcon_loss, features.to(dtype), labels)[1].dtype == dtype
    double = supcon_loss(features.double(), labels)
    assert near(double, slow_supcon(features, labels.tolist(), 0.07), 1e-12)


def test_losses_supcon_is_finite_for_zero_vectors_and_low_temperatures():
    features, labels = torch.randn(6, 4, generator=seeded()), torch.tensor([0, 0, 1, 1, 0, 1])
    features[0] = 0
    loss, gradient = with_gradient(supcon_loss, features, labels)
    assert near(loss, slow_supcon(features, labels.tolist(), 0.07), 1e-5)
    assert 0 < gradient[0].abs().max() < 100  # F.normalize has 10^12 there
    # exp(1 / temperature) = exp(10^4) overflows
    loss, gradient = with_gradient(supcon_loss, features, labels, temperature=1e-4)
    assert 1000 < loss < 30000 and torch.isfinite(gradient).all()


def test_losses_supcon_takes_integer_labels_of_any_type_and_does_not_depend_on_the_order():
    features, labels = torch.randn(8, 4, generator=seeded()), torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])
    want = supcon_loss(features, labels.tolist())
    for given in labels.to(torch.uint8), labels.bool(), labels.numpy(), 7 - 3 * labels:
        assert same_bits(supcon_loss(features, given), want)
    order = torch.randperm(8, generator=seeded())
    assert near(supcon_loss(features[order], labels[order]), want, 1e-5)


def test_losses_supcon_refuses_what_it_cannot_compare():
    x, y = torch.randn(4, 3), [0, 0, 1, 1]
    for features, labels, text in (
            (x, [0, 0, 1], "got (4, 3) of torch.float32, labels (3,)"),
            (x, torch.zeros(4), "labels (4,) of torch.float32"),
            (torch.randn(4, 2, 3, 1), y, "got (4, 2, 3, 1)"), (x, None, "labels None"),
            (x.long(), y, "(4, 3) of torch.int64")):
        refuses(supcon_loss, text, features, labels)
    for temperature in (0, -1, math.nan):
        refuses(supcon_loss, f"temperature > 0, got {temperature}", x, y, temperature=temperature)
        refuses(supcon_bounds, f"temperature > 0, got (2,) and {temperature}",
                [0, 0], temperature=temperature)
    refuses(supcon_bounds, "(2, 2)", np.zeros((2, 2)))


def test_losses_supcon_without_a_positive_pair_is_zero_and_connected_with_a_warning():
    for features, labels in ((torch.randn(4, 3), [3, 1, 2, 0]), (torch.randn(1, 3), [3]),
                             (torch.zeros(0, 3), long_zeros(0)), (torch.randn(4, 1, 3), None)):
        features.requires_grad_()
        loss, message = warned(lambda: supcon_loss(features, labels))
        assert f"no two of {len(features)} samples share a class" in message
        assert loss == 0 and (grad(loss, features)[0] == 0).all()


def test_losses_supcon_views_are_rows_with_the_label_of_their_sample_or_simclr_without_labels():
    views, labels = torch.randn(5, 2, 4, generator=seeded()), torch.tensor([0, 1, 0, 2, 1])
    rows = views.transpose(0, 1).flatten(0, 1)  # all first views, then all second views
    want = with_gradient(supcon_loss, rows, labels.repeat(2))
    loss, gradient = with_gradient(supcon_loss, views, labels)
    assert_near((loss, gradient.transpose(0, 1).flatten(0, 1)), want)
    unit = F.normalize(rows, dim=1)
    s = (unit @ unit.T / 0.5).masked_fill(torch.eye(10).bool(), -math.inf)
    nt_xent = F.cross_entropy(s, (torch.arange(10) + 5) % 10)
    assert_near(supcon_loss(views, temperature=0.5), nt_xent)


TWO_PROCESSES = """
import os, sys, time, torch
from losses import supcon_loss
rank, folder = int(sys.argv[1]), sys.argv[2]
meet = f"file://{folder}/meet"
torch.distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
given = torch.load(f"{folder}/given.pt", weights_only=True)
own = slice(4 * rank, 4 * rank + 4)
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
net = torch.nn.parallel.DistributedDataParallel(net)
loss = supcon_loss(net(given["x"][own]), given["labels"][own].short(), temperature=0.3)
loss.backward()
try:
    supcon_loss(given["x"][: 2 + rank], given["labels"][: 2 + rank])
except ValueError as error:
    refused = str(error)
gradients = [p.grad for p in net.parameters()]
torch.save({"loss": loss.detach(), "gradients": gradients, "refused": refused},
           f"{folder}/rank{rank}.pt")
open(f"{folder}/done{rank}", "w").close()
while not os.path.exists(f"{folder}/done{1 - rank}"):  # the other may still read from this one
    time.sleep(0.05)
os._exit(0)  # a normal exit may abort in gloo's threads ("terminate called without ...")
"""


def test_losses_supcon_over_two_processes_equals_one_with_the_whole_batch_in_value_and_gradient():
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        raise unittest.SkipTest("needs torch with gloo")
    x = torch.randn(8, 6, generator=seeded())
    labels = torch.tensor([0, 1, 2, 3, 0, 1, 2, 0])  # rank 0 alone has no positive pair
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    want = supcon_loss(net(x), labels, temperature=0.3)
    want.backward()
    with folder() as f:
        torch.save({"x": x, "labels": labels}, f / "given.pt")
        processes = []
        for rank in range(2):
            words = [sys.executable, "-c", TWO_PROCESSES, str(rank), str(f)]
            processes.append(subprocess.Popen(
                words, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        try:
            printed = [process.communicate(timeout=120)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert not any(process.returncode for process in processes), printed
        for rank in range(2):
            got = torch.load(f / f"rank{rank}.pt", weights_only=True)
            assert near(got["loss"], want, 1e-6)
            for gradient, parameter in zip(got["gradients"], net.parameters(), strict=True):
                assert_near(gradient, parameter.grad)
            assert "got [[2, 6], [3, 6]]" in got["refused"]


def test_losses_supcon_is_never_below_its_bound_for_random_and_for_trained_features():
    for labels, temperature in product(COMPOSITIONS, (0.07, 0.5, 2.0)):
        low, collapsed = supcon_bounds(labels, temperature=temperature)
        assert low <= collapsed + 1e-12
        for seed in range(30):
            shape = len(labels), 2 + seed % 7
            features = torch.randn(shape, generator=seeded(seed), dtype=torch.float64)
            assert supcon_loss(features, labels, temperature=temperature) > low - 1e-12
        features = features.requires_grad_()
        optimizer = torch.optim.Adam([features], lr=0.2)
        for _ in range(150):
            loss = supcon_loss(features, labels, temperature=temperature)
            assert loss > low - 1e-12
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        # The features are trained, so that the loss comes near the bound.
        assert len(set(labels)) == 1 or loss < collapsed - 0.3
        assert len(set(labels)) != 2 or loss < low + 1e-3


def test_losses_supcon_bound_is_reached_by_two_opposite_classes_and_is_ln_of_the_others_for_one():
    for rare, temperature in product((1, 2, 5), (0.07, 0.5, 2.0)):
        labels = [0] * 6 + [1] * rare
        opposite = torch.tensor([[1.0, 2.0]] * 6 + [[-1.0, -2.0]] * rare, dtype=torch.float64)
        low, collapsed = supcon_bounds(labels, temperature=temperature)
        loss = supcon_loss(opposite, labels, temperature=temperature)
        assert near(loss, low, 1e-12) and low < collapsed - 0.05
    for n in (2, 3, 32):
        assert near(supcon_bounds(["a"] * n), [math.log(n - 1)] * 2, 1e-12)
    assert near(supcon_bounds(torch.arange(32) % 4), [math.log(7), math.log(31)], 1e-9)
    for nothing in [], [0], [2, 0, 1]:
        assert all(map(math.isnan, supcon_bounds(nothing)))
