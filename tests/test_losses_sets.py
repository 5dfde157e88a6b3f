"""Tests of the losses of sets and of latent variables: chamfer, KL divergence."""

import math
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

import losses
from losses import chamfer, set_costs
from losses import kl_to_standard_normal as kl
from tests.helpers import assert_near, check_precision, near, refuses, seeded, with_gradient


def test_losses_kl_equals_torch_distributions_in_value_and_gradient():
    def divergence(z):
        normal = torch.distributions.Normal(z[0], (z[1] / 2).exp())
        return torch.distributions.kl_divergence(normal, torch.distributions.Normal(0, 1)).sum(-1)

    for shape in (5,), (3, 4), (2, 3, 7), (0, 4), (2, 0):
        both = torch.randn(2, *shape, generator=seeded(), dtype=torch.float64) * 2
        got = with_gradient(lambda z: kl(*z), both)
        assert_near(got, with_gradient(divergence, both), 1e-12)
        assert got[0].shape == shape[:-1]
    for mu, logvar, want, within in (
            (1.0, 0.0, 0.5, 2e-4), (0.0, math.log(4), 0.8069, 2e-4),  # numbers of the docstring
            (0.0, 1e-3, 2.5e-7, 1e-2)):  # logvar^2 / 4: exp(logvar) - 1 in float32 is off by half
        got = kl(torch.tensor([mu]), torch.tensor([logvar])).item()
        assert near(got, want, within)


def test_losses_kl_free_bits_cost_the_same_and_have_no_gradient_in_each_row_and_dimension():
    zero = torch.zeros(3, 5)
    assert near(kl(zero, zero, free_bits=0.03), torch.full((3,), 0.15), 1e-5)
    # The mean over the rows is above 0.03 in both dimensions.
    mu = torch.tensor([[0.1, 2.0], [1.0, 0.1]], requires_grad=True)
    logvar = torch.zeros(2, 2, requires_grad=True)
    got = kl(mu, logvar + 0.01, free_bits=0.03)
    free = kl(mu, logvar + 0.01)
    got.sum().backward()
    for tensor in mu, logvar:
        assert (tensor.grad == 0).tolist() == [[True, False], [False, True]]
    assert_near(mu.grad[0, 1], mu[0, 1].detach())
    assert near(got, free + 0.03 - (0.01 + (math.exp(0.01) - 1.01)) / 2, 1e-6)
    alone = [kl(m, v + 0.01, free_bits=0.03) for m, v in zip(mu, logvar)]
    assert torch.equal(got, torch.stack(alone))  # no row depends on the others


def test_losses_kl_computes_half_precision_in_float32_and_keeps_float64():
    mu, logvar = torch.randn(2, 4, 64, generator=seeded()).bfloat16() * 0.1
    check_precision(lambda z: kl(*z), torch.stack([mu, logvar]))
    assert torch.equal(kl(mu.float(), logvar), kl(mu.float(), logvar.float()))
    assert kl(mu.double(), logvar).dtype == torch.float64


def test_losses_kl_refuses_what_does_not_fit():
    zeros = torch.zeros
    for mu, logvar in ((zeros(3, 2), zeros(2)), (zeros(3), zeros(3).long()),
                       (zeros(()), zeros(())), (zeros(2, 3), zeros(3, 2))):
        text = f"got {tuple(mu.shape)} of torch.float32 and {tuple(logvar.shape)}"
        refuses(kl, text, mu, logvar)
    for bits in -0.01, math.nan, math.inf:
        refuses(kl, f"got {bits}; 0 is", zeros(2), zeros(2), free_bits=bits)


def slow_chamfer(x, y, direction=1.0, magnitude=1.0, distance=3.0):
    """Of two lists of vectors, pair by pair."""
    def cost(a, b):
        length_a, length_b = np.linalg.norm(a), np.linalg.norm(b)
        cosine = a @ b / (length_a * length_b) if min(length_a, length_b) else 0.0
        angle, length = direction * (1 - cosine), magnitude * abs(length_a - length_b)
        return angle + length + distance * ((a - b) ** 2).sum()

    if not len(x) or not len(y):
        return 0.0
    costs = np.array([[cost(a, b) for b in y] for a in x])
    return costs.min(1).mean() + costs.min(0).mean()


def ragged_sets(seed=0, sets=7, n=5, m=6, width=4, dtype=torch.float64):
    """x, y and their masks, of any sizes from 0, in any places; some vectors are zero."""
    g, vectors, masks = seeded(seed), [], []
    for size in n, m:
        drawn = torch.randn(sets, size, width, generator=g, dtype=dtype)
        vectors.append(drawn * (torch.rand(sets, size, 1, generator=g) < 0.9))
    for size, ends in (n, (False, True, False)), (m, (True, False, False)):
        mask = torch.rand(sets, size, generator=g) < torch.rand(sets, 1, generator=g)
        mask[:3] = torch.tensor(ends)[:, None]
        masks.append(mask)
    return *vectors, *masks


def test_losses_chamfer_equals_the_loop_over_pairs():
    options = (dict(), dict(direction=0.0, magnitude=2.0, distance=0.5), dict(direction=4))
    for seed, weights in product(range(5), options):
        x, y, x_mask, y_mask = ragged_sets(seed)
        rows = [(a.numpy(), b.numpy(), p.numpy(), q.numpy())
                for a, b, p, q in zip(x, y, x_mask, y_mask)]
        want = [slow_chamfer(a[p], b[q], **weights) for a, b, p, q in rows]
        masks = dict(x_mask=x_mask, y_mask=y_mask)
        got = chamfer(x, y, **masks, **weights)
        assert near(got, want, 1e-10)
        assert got[:3].tolist() == [0, 0, 0] and got[3:].max() > 1
        single = chamfer(x.float(), y.float(), **masks, **weights)
        assert single.dtype == torch.float32
        assert near(single, want, 1e-4)
        want = [slow_chamfer(a, b[q]) for a, b, _, q in rows]
        np.testing.assert_allclose(chamfer(x, y, y_mask=y_mask), want, rtol=1e-10)
    costs = set_costs(x, y)
    assert costs.shape == (7, 5, 6) and costs.min() >= 0
    for a, b, want in ([1.0, 0], [2.0, 0], 8), ([1.0, 0], [0, 1.0], 14):  # of the docstrings
        assert near(chamfer(torch.tensor([[a]]), torch.tensor([[b]])).item(), want, 1e-5)
    for shape in (0, 3, 4), (2, 0, 4):
        assert chamfer(torch.zeros(shape), torch.zeros(shape[0], 3, 4)).tolist() == [0] * shape[0]


def test_losses_chamfer_gradient_equals_finite_differences_for_both_sides():
    x, y, x_mask, y_mask = ragged_sets(1, sets=5, n=3, m=4, width=3)
    x, y = (v.where(v != 0, 0.5 + torch.rand(v.shape, generator=seeded(2), dtype=v.dtype))
            for v in (x, y))
    both = x.requires_grad_(), y.requires_grad_()
    assert gradcheck(lambda *z: chamfer(*z, x_mask=x_mask, y_mask=y_mask), both)
    weights = dict(direction=0.3, magnitude=2, distance=0.7)
    assert gradcheck(lambda *z: set_costs(*z, **weights), both)


def test_losses_chamfer_does_not_depend_on_order_or_padding():
    x, y, x_mask, y_mask = ragged_sets(3)
    want = chamfer(x, y, x_mask=x_mask, y_mask=y_mask)
    for change in "none", "order", "more padding", "broken padding":
        a, b, p, q = (tensor.clone() for tensor in (x, y, x_mask, y_mask))
        if change == "order":
            i, j = torch.randperm(5, generator=seeded()), torch.randperm(6, generator=seeded())
            a, b, p, q = a[:, i], b[:, j], p[:, i], q[:, j]
        if change == "more padding":
            a, p = F.pad(a, (0, 0, 2, 1), value=9.0), F.pad(p, (2, 1))
            b, q = F.pad(b, (0, 0, 0, 4)), F.pad(q, (0, 4))
        if change == "broken padding":
            a[~p], b[~q] = math.nan, math.inf
        a, b = a.requires_grad_(), b.requires_grad_()
        loss = chamfer(a, b, x_mask=p, y_mask=q)
        loss.sum().backward()
        for gradient, mask in (a.grad, p), (b.grad, q):
            assert (gradient[~mask] == 0).all() and gradient.isfinite().all(), change
            assert gradient[3:].any() and not gradient[:3].any()
        assert_near(loss.detach(), want, 1e-12)
    assert_near(chamfer(y, x, x_mask=y_mask, y_mask=x_mask), want, 1e-12)


def test_losses_chamfer_is_zero_for_equal_sets_and_has_finite_gradients_at_zero_vectors():
    x = F.normalize(torch.randn(50, 8, 80, generator=seeded()), dim=2) * 2
    order = torch.randperm(8, generator=seeded())
    got, gradient = with_gradient(chamfer, x, x[:, order])
    assert (got >= 0).all() and got.max() < 1e-5 and gradient.abs().max() < 0.01
    for scale in 0.0, 1e-30, 1e-21, 1e-13, 1e-11:
        for other in torch.zeros(1, 2, 3), torch.ones(1, 2, 3), scale * torch.ones(1, 2, 3):
            a = torch.full((1, 2, 3), scale).requires_grad_()
            b = other.clone().requires_grad_()
            chamfer(a, b).sum().backward()
            assert a.grad.isfinite().all() and b.grad.isfinite().all(), (scale, other)
    tiny = torch.tensor([[[1e-13, 0]], [[1e-11, 0]]])
    long = torch.tensor([3.0, 0]).expand(2, 1, 2)
    for pair in (tiny, long), (long, tiny):
        across = set_costs(*pair, magnitude=0, distance=0).flatten().tolist()
        assert across[0] == 1 and across[1] < 1e-6  # no direction, the same direction
    a = torch.zeros(1, 1, 2, requires_grad=True)
    target = torch.tensor([[[3.0, 4.0]]])
    assert set_costs(a, target).item() == 1 + 5 + 75
    set_costs(a, target, direction=0).sum().backward()
    assert a.grad.flatten().tolist() == [-18, -24]  # 3 * 2 * (3, 4): zero is drawn to its target


def test_losses_chamfer_computes_half_precision_in_float32():
    check_precision(lambda z: chamfer(*z), torch.randn(2, 3, 5, 16, generator=seeded()))


def test_losses_chamfer_needs_targets_that_do_not_train():
    """The loss of fixed targets exposes a constant guess; targets that train come to meet it."""
    for trains in False, True:
        guess = torch.ones(1, 1, 4, requires_grad=True)
        table = torch.randn(6, 1, 4, generator=seeded()).requires_grad_()  # a vector per variable
        optimizer = torch.optim.SGD([guess, table] if trains else [guess], lr=0.05)
        for _ in range(200):
            loss = chamfer(guess.expand(6, 1, 4), F.normalize(table, dim=2)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        cosine = losses.mean_cosine(table[:, 0])
        fits = (loss < 0.5 and cosine > 0.98) if trains else (loss > 4 and cosine < 0.5)
        assert fits, (trains, loss, cosine)


def test_losses_chamfer_makes_no_tensor_of_all_pairs_and_features():
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, kinds, args=(), options=None):
            out = function(*args, **(options or {}))
            outputs = out if isinstance(out, (list, tuple)) else [out]
            sizes.extend(output.numel() for output in outputs if torch.is_tensor(output))
            return out

    x = torch.randn(3, 20, 16, requires_grad=True)
    with Watch():
        chamfer(x, torch.randn(3, 30, 16)).sum().backward()
    assert len(sizes) > 20 and max(sizes) <= 3 * 30 * 20


def test_losses_chamfer_refuses_what_does_not_fit():
    zeros = torch.zeros
    for x, y in ((zeros(2, 3), zeros(2, 3)), (zeros(2, 3, 4), zeros(2, 3, 5)),
                 (zeros(2, 3, 4), zeros(1, 3, 4)), (zeros(1, 1, 1).long(), zeros(1, 1, 1)),
                 (zeros(2, 3, 4), zeros(2, 4))):
        for call in chamfer, set_costs:
            text = f"got {tuple(x.shape)} of {x.dtype} and {tuple(y.shape)}"
            refuses(call, text, x, y)
    x, y, mask = zeros(2, 3, 4), zeros(2, 5, 4), torch.ones(2, 3)
    for points, options, text in (
            (x, {"y_mask": mask.bool()}, "got y (2, 5, 4) and y_mask (2, 3) of torch.bool"),
            (x, {"x_mask": mask}, "x_mask (2, 3) of torch.float32"),
            (x[:, :, 0], {"x_mask": mask.bool()}, "got x (2, 3) and")):
        refuses(chamfer, text, points, y, **options)
    for name, wrong in product(("direction", "magnitude", "distance"), (-1.0, math.nan)):
        refuses(chamfer, f"{wrong}", x, y, **{name: wrong})
