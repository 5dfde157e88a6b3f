"""Tests of models_sequences."""

import copy
import functools
import itertools
import math
import unittest.mock

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import losses
import models
from tests.helpers import (
    draw_sets, lived_in, near, packed_sets, quad, QUAD, quad_rows, raises, same_bits, set_encoder,
    STAY_LENGTHS, warned)

refuses = functools.partial(raises, ValueError)


def test_models_sinusoidal_positions_are_the_formula():
    table = models.sinusoidal_positions(9, 6)
    for t in range(9):
        for i in range(3):
            angle = t / 10000 ** (2 * i / 6)
            assert near(table[t, 2 * i], math.sin(angle), 1e-5)
            assert near(table[t, 2 * i + 1], math.cos(angle), 1e-5)
    refuses("channels must be even, got 5", lambda: models.sinusoidal_positions(3, 5))


def test_models_grid_positions_are_the_code_of_the_row_and_of_the_column():
    table = models.grid_positions(3, 5, 8)
    rows, columns = models.sinusoidal_positions(3, 4), models.sinusoidal_positions(5, 4)
    for r, c in itertools.product(range(3), range(5)):
        assert torch.equal(table[5 * r + c], torch.cat([rows[r], columns[c]]))
    assert len(table.unique(dim=0)) == 15
    refuses("channels must be a multiple of 4, got 6", lambda: models.grid_positions(2, 2, 6))


def test_models_modality_encoders_are_their_formulas():
    def norm(x, module):
        return F.layer_norm(x, (16,), module.weight, module.bias)

    nets = {}
    for name, shape in QUAD.items():
        net = models.modality_encoder(shape, width=16, heads=4, depth=2, patch=4)
        nets[name] = lived_in(net)
    x = quad_rows(2)
    net, p = nets["text"], nets["text"].state_dict()
    tokens = (x["text"] @ p["embed.0.weight"].T + p["embed.0.bias"]).view(2, 4, 16)
    assert near(net(x["text"]), norm(tokens, net.norm), 1e-5)

    net = nets["motion"]
    patches = x["motion"][:, :20].reshape(2, 5, 4, 3).transpose(2, 3).flatten(2)  # step 21: a rest
    tokens = net.layers(net.embed(patches) + models.sinusoidal_positions(5, 16))
    assert len(net.layers) == 2 and near(net(x["motion"]), norm(tokens, net.norm), 1e-5)

    net, tokens = nets["photo"], []
    for r, c in itertools.product(range(2), range(2)):
        tokens.append(net.cnn(x["photo"])[:, :, r, c] + models.grid_positions(2, 2, 16)[2 * r + c])
    assert near(net(x["photo"]), norm(torch.stack(tokens, 1), net.norm), 1e-5)

    net = nets["film"]
    frames = torch.stack([net.cnn(x["film"][:, t]).mean(3).mean(2) for t in range(5)], 1)
    tokens = net.frames.layers(net.frames.embed(frames) + models.sinusoidal_positions(5, 16))
    assert len(net.frames.layers) == 2 and near(net(x["film"]), norm(tokens, net.frames.norm), 1e-5)


def test_models_quadmodal_has_the_encoder_and_the_tokens_of_every_shape():
    for shape, kind, tokens in (
            ((1,), models.VectorTokens, 4), ((300,), models.VectorTokens, 4),
            ((4, 1), models.SequenceTokens, 1), ((23, 5), models.SequenceTokens, 5),
            ((1, 64, 50), models.ImageTokens, 56), ((3, 5, 3), models.ImageTokens, 6),
            ((1, 1, 2), models.ImageTokens, 2),
            ((1, 3, 5, 3), models.VideoTokens, 1), ((7, 1, 9, 16), models.VideoTokens, 7)):
        net = quad({"x": shape})
        assert type(net.encoders["x"]) is kind
        assert net.encode("x", torch.randn(3, *shape)).shape == (3, tokens, 16), shape
        for n in (1, 0):  # training, a single row and none
            assert net({"x": torch.randn(n, *shape)}).shape == (n, 12), shape
    net = quad().eval()
    whole = net(quad_rows(3))
    assert whole.shape == (3, 12) and near(whole.norm(dim=1), torch.ones(3), 1e-6)
    for m in range(1, 8):
        shapes = {f"m{i}": (8, 2) for i in range(m)}
        assert quad(shapes, tokens=3, depth=0)(quad_rows(2, shapes)).shape == (2, 12)


def test_models_modality_readout_is_the_formula_head_by_head():
    readout = lived_in(models.ModalityReadout(8, heads=2))
    tokens, x, p = torch.randn(3, 8), torch.randn(2, 5, 8), readout.state_dict()
    weights = p["attention.in_proj_weight"].chunk(3)
    biases = p["attention.in_proj_bias"].chunk(3)
    q, k, v = (y @ w.T + b for y, w, b in zip((tokens, x, x), weights, biases))
    y = readout(tokens, x, torch.tensor([True, False]))
    for token in range(3):
        read = []
        for h in (slice(0, 4), slice(4, 8)):
            read.append((k[0, :, h] @ q[token, h] / 2).softmax(0) @ v[0, :, h])
        read = p["attention.out_proj.weight"] @ torch.cat(read) + p["attention.out_proj.bias"]
        read = read + tokens[token]
        assert near(y[0, token], F.layer_norm(read, (8,), p["norm.weight"], p["norm.bias"]), 1e-5)
        assert torch.equal(y[1, token], p["missing"])


def test_models_quadmodal_is_encoders_readouts_and_head_in_the_order_of_the_names():
    net, x = lived_in(quad(tokens=3)), quad_rows(2)
    present, both = {"photo": torch.tensor([True, False])}, torch.tensor([True, True])
    fused = []
    for name in sorted(x):
        tokens = net.encode(name, x[name])
        fused.append(net.readouts[name](net.tokens, tokens, present.get(name, both)))
    flat = torch.cat([f[:, i] for f in fused for i in range(3)], 1)
    p = net.head.state_dict()
    hidden = flat @ p["0.weight"].T + p["0.bias"]
    hidden = F.gelu(F.layer_norm(hidden, (24,), p["1.weight"], p["1.bias"]))
    expected = hidden @ p["4.weight"].T + p["4.bias"]
    expected = F.layer_norm(expected, (12,), p["5.weight"], p["5.bias"])
    assert flat.shape == (2, 4 * 3 * 16) and near(net.features(x, present), expected, 1e-5)
    assert near(net(x, present), expected / expected.square().sum(1, keepdim=True).sqrt(), 1e-5)
    backwards = lived_in(quad(dict(reversed(QUAD.items())), tokens=3))
    backwards.load_state_dict(net.state_dict())
    assert torch.equal(backwards(dict(reversed(x.items())), present), net(x, present))
    assert net(x).std() > 1e-2


def test_models_quadmodal_has_the_parameters_counted_by_hand():
    cnn = 9 * (3 * 4 + 4 * 8 + 8 * 16) + 2 * (4 + 8 + 16)  # three convolutions, three batch norms
    encoders = {
        "text": 7 * 3 * 16 + 3 * 16 + 2 * 16,  # one linear layer for all tokens, norm
        "motion": 12 * 16 + 16 + 2 * 16,  # linear layer for a patch of 4 steps by 3 channels, norm
        "photo": cnn + 2 * 16,  # and norm
        "film": cnn + 16 * 16 + 16 + 2 * 16}  # and a linear layer, norm
    # a transformer layer (motion, film): two norms, four linear layers 16 to 16, MLP 16, 64, 16
    layer = 2 * 2 * 16 + 4 * (16 * 16 + 16) + 16 * 64 + 64 + 64 * 16 + 16
    readout = 4 * (16 * 16 + 16) + 2 * 16 + 16  # attention, norm, missing
    head = 4 * 3 * 16 * 24 + 24 + 2 * 24 + 24 * 12 + 12 + 2 * 12
    count = sum(encoders.values()) + 2 * layer + 4 * readout + 3 * 16 + head
    assert models.count_parameters(quad(tokens=3)) == count
    assert models.count_parameters(quad(depth=3)) - models.count_parameters(quad()) == 2 * 2 * layer


def masks_of(**rows):
    """name="1010" -> {name: tensor([True, False, True, False])}"""
    return {name: torch.tensor([digit == "1" for digit in text]) for name, text in rows.items()}


def test_models_quadmodal_never_sees_an_absent_value_nor_lets_it_into_gradients_or_statistics():
    present = masks_of(film="10101", photo="01110", motion="11011", text="00000")
    results = []
    for value in (0.0, 1e30, float("nan"), float("inf")):
        net, x = quad(dropout=0.0), quad_rows(5)
        for name, v in x.items():
            mask = present[name].view(5, *[1] * (v.ndim - 1))
            x[name] = torch.where(mask, v, value).requires_grad_()
        y = net(x, present)
        (y * torch.arange(12)).sum().backward()
        for name, mask in present.items():
            assert (x[name].grad[~mask] == 0).all()
            assert (x[name].grad[mask] != 0).any() or not mask.any()
        gradients = {name: p.grad for name, p in net.named_parameters()}
        results.append({"y": y.detach()} | dict(net.named_buffers()) | gradients)
    assert all(same_bits(results[0], other) for other in results[1:])
    assert all(v.isfinite().all() for v in results[0].values())

    net, x = quad(dropout=0.0), quad_rows(5)  # tokens that were made before are masked as well
    tokens = {name: net.encode(name, v).detach() for name, v in x.items()}
    broken = {}
    for name, v in tokens.items():
        broken[name] = torch.where(present[name][:, None, None], v, math.nan).requires_grad_()
    y = net.fuse(broken, present)
    y[:, 0].sum().backward()
    assert torch.equal(y, net.fuse(tokens, present))
    assert all(v.grad.isfinite().all() for v in broken.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


def test_models_quadmodal_rows_are_independent_of_each_other_and_of_what_others_lack():
    net, x = lived_in(quad(dropout=0.5, modality_dropout=0.5)), quad_rows(6)
    present = masks_of(photo="101101", text="111001")
    order = torch.tensor([3, 0, 5, 1, 4, 2])

    def pick(values, rows):
        return {name: v[rows] for name, v in values.items()}

    with torch.no_grad():
        whole, full = net(x, present), net(x)
        alone = torch.cat([net(pick(x, [i]), pick(present, [i])) for i in range(6)])
        with torch.autocast("cpu", torch.bfloat16):
            half = net(x, present)
        assert near(net(pick(x, order), pick(present, order)), whole[order], 1e-5)
    assert near(alone, whole, 1e-5) and (half - whole).abs().max() < 0.1
    complete = present["photo"] & present["text"]
    assert near(whole[complete], full[complete], 1e-5)
    changed = (whole - full).abs().amax(1) > 1e-2
    assert torch.equal(changed, ~complete)
    assert (whole - whole[:1]).abs().amax(1)[1:].min() > 1e-2

    trained = quad(dropout=0.0).train()  # with batch norm: rows that lack a photo count in no mean
    lacks = masks_of(photo="111000", film="111000")
    few = trained(pick(x, slice(3)))
    assert near(trained(x, lacks)[:3], few, 1e-5) and not near(trained(x)[:3], few, 1e-3)


def test_models_quadmodal_rows_without_any_modality_share_one_embedding():
    net, x = lived_in(quad()), quad_rows(3)
    present = {name: torch.tensor([False, True, False]) for name in QUAD}
    y = net(x, present)
    assert torch.equal(y[0], y[2]) and not near(y[0], y[1], 1e-2) and y.isfinite().all()


def test_models_drop_modalities_drops_at_its_rate_and_never_all():
    torch.manual_seed(0)
    present = torch.ones(40000, 4, dtype=torch.bool)
    for rate in (0.1, 0.5, 0.9):
        kept = models.drop_modalities(present, rate)
        assert kept.any(1).all() and near(1 - kept.float().mean(0), rate - rate ** 4 / 4, 0.03)
        alone = 4 * (1 - rate) * rate ** 3 + rate ** 4  # four draws, independent of each other
        assert near((kept.sum(1) == 1).float().mean(), alone, 0.15)
    two = models.drop_modalities(present[:, :2], 0.5)
    assert near((~two).any(1).float().mean(), 2 * 3 / 8, 0.01)
    present = torch.rand(40000, 4) < 0.5
    kept = models.drop_modalities(present, 0.7)
    assert not (kept & ~present).any() and torch.equal(kept.any(1), present.any(1))
    alone = present.sum(1) == 1
    assert torch.equal(kept[alone], present[alone])
    assert torch.equal(models.drop_modalities(present, 0.0), present)


def test_models_quadmodal_drops_modalities_in_training_only():
    shapes = {"a": (3,), "b": (8, 2), "c": (5,)}
    net, x = quad(shapes, dropout=0.0, modality_dropout=0.999), quad_rows(32, shapes)
    torch.manual_seed(0)
    y = net(x)
    only = []
    with torch.no_grad():
        for kept in x:
            present = {name: torch.full((32,), name == kept) for name in x}
            only.append(net.eval()(x, present))

    def kept_alone(y):
        return torch.stack([(y - z).abs().amax(1) < 1e-5 * y.abs().max() for z in only])

    kept = kept_alone(y)
    assert (kept.sum(0) == 1).all() and (kept.sum(1) >= 4).all()
    without_b = {"b": torch.zeros(32, dtype=torch.bool)}
    kept = kept_alone(net.train()(x, without_b))  # a row never keeps what it lacks
    assert (kept.sum(0) == 1).all() and (kept.sum(1) >= 8).tolist() == [True, False, True]
    torch.manual_seed(0)
    tokens = {name: net.encode(name, v) for name, v in x.items()}
    assert near(net.train().fuse(tokens), y, 1e-6)  # the same draws for ready tokens
    state = torch.get_rng_state()
    assert torch.equal(net.eval()(x), net(x)) and torch.equal(state, torch.get_rng_state())
    whole = quad({"a": (3,)}, dropout=0.0)
    state = torch.get_rng_state()
    whole({"a": x["a"]})
    assert torch.equal(state, torch.get_rng_state())  # no modality dropout, no draw


def test_models_quadmodal_dropout_has_its_rate_and_acts_in_training_only():
    net, x = quad(dropout=0.25), quad_rows(4)
    rates = [m.p for m in net.modules() if isinstance(m, nn.Dropout)]
    kinds = (models.TransformerLayer, nn.MultiheadAttention)
    attention = [part.dropout for part in net.modules() if isinstance(part, kinds)]
    assert rates == [0.25] * (2 * 3 + 1) and attention == [0.25] * (2 + 4)
    assert not torch.equal(net(x), net(x)) and torch.equal(net.eval()(x), net(x))


def test_models_quadmodal_from_encoded_tokens_equals_from_inputs():
    net, x = lived_in(quad(modality_dropout=0.5)), quad_rows(4)
    present = {"film": torch.tensor([True, False, True, True])}
    tokens = {name: net.encode(name, v) for name, v in x.items()}
    assert torch.equal(net.fuse(tokens), net(x))
    assert torch.equal(net.fuse(tokens, present), net(x, present))
    for names in (["film"], ["motion", "text"]):
        rest = {name: v for name, v in x.items() if name not in names}
        encoded = {name: tokens[name] for name in names}
        assert torch.equal(net(rest, present, encoded=encoded), net(x, present))
        features = net.features(rest, present, encoded=encoded)
        assert torch.equal(F.normalize(features), net(x, present))


def test_models_frozen_encoders_stay_bit_equal_in_training_and_the_rest_moves():
    net, x = quad(dropout=0.5), quad_rows(8)
    models.freeze_encoders(net, ["photo", "film"])
    for name in ("photo", "film"):
        assert not any(m.training for m in net.encoders[name].modules())
    models.train_mode(net)
    assert torch.equal(net.encode("film", x["film"]), net.encode("film", x["film"]))
    before = copy.deepcopy(net.state_dict())
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.1)
    lacks = {name: torch.arange(8) != i for i, name in enumerate(QUAD)}
    (net(x, lacks) * torch.randn(8, 12)).sum().backward(), optimizer.step()
    for name, value in net.state_dict().items():
        frozen = name.startswith(("encoders.photo.", "encoders.film."))
        assert torch.equal(value, before[name]) == frozen, name
    assert net.training and net.encoders["motion"].training
    assert net.head.training and net.readouts["photo"].training


def test_models_freeze_encoders_refuses_unknown_names_and_warns_when_none_is_left():
    net = quad()
    refuses("cannot freeze 'vidoe': the modalities are film, motion, photo, text",
            lambda: models.freeze_encoders(net, ["film", "vidoe"]))
    assert all(p.requires_grad for p in net.parameters()) and all(m.training for m in net.modules())
    for names in (["film", "motion"], []):
        assert warned(lambda: models.freeze_encoders(net, names)) == (None, "")
    message = "all 4 encoders are frozen: only the fusion and the head are trained"
    assert warned(lambda: models.freeze_encoders(net, ["photo", "text"]))[1] == message
    trained = {name.split(".")[0] for name, p in net.named_parameters() if p.requires_grad}
    assert trained == {"readouts", "tokens", "head"}


def test_models_quadmodal_refuses_what_does_not_fit_when_built():
    def refused(message, shapes=None, **changes):
        refuses(message, lambda: quad(shapes, **changes))

    refused("at least one modality, got none", {})
    x = "modality 'x'"
    for message, shape in (
            (f"{x}: a sequence must have at least one patch of 4 steps, got 3: "
             "use a patch of 3 or less", (3, 2)),
            (f"{x}: an image must have more than one pixel, got 1x1", (2, 5, 1, 1))):
        refused(message, {"x": shape})
    ranks = "(F,), (T, C), (C, H, W) or (T, C, H, W)"
    for shape in ((), (1, 2, 3, 4, 5), (0, 3), (3, 0, 4)):
        refused(f"{x}: a sample must be {ranks}, no side 0, got {shape}", {"x": shape})
    quad({"x": (3, 2)}, patch=3)
    for width, heads, fits in ((18, 3, 24), (20, 8, 24), (12, 8, 16), (30, 5, 40)):
        refused(f"multiple of heads and of 4, got width {width} with {heads} heads: "
                f"the next width that fits is {fits}", width=width, heads=heads)
        quad(width=fits, heads=heads)
    for name in ("", "a.b", "values", "training"):
        refused(f"cannot be called {name!r}", {name: (3,)})
    for name in ("width", "tokens", "heads", "hidden", "embed", "patch", "depth"):
        bad = -1 if name == "depth" else 0
        refused("must be at least 1 and depth at least 0", **{name: bad})
    for name, bad in itertools.product(("dropout", "modality_dropout"), (1.0, -0.1)):
        refused("dropout and modality_dropout must be in [0, 1)", **{name: bad})


def test_models_quadmodal_refuses_inputs_that_do_not_fit():
    shapes = {"a": (3,), "b": (8, 2)}
    net, x, yes = quad(shapes), quad_rows(2, shapes), torch.ones(2, dtype=torch.bool)
    a, b, tokens = x["a"], x["b"], net.encode("b", x["b"])

    def refused(message, *args, **options):
        refuses(message, lambda: net(*args, **options))

    for message, inputs in (
            ("each of a, b is needed once, in inputs or encoded, but missing: b.", {"a": a}),
            ("missing: a, b.", {}),
            ("unknown: c.", x | {"c": a}),
            ("missing: b; unknown: c.", {"a": a, "c": a}),
            ("same number of rows, got {'a': 1, 'b': 2}", {"a": a[:1], "b": b}),
            ("modality 'b' must be (B, 8, 2), got (2, 9, 2): cut or pad it",
             x | {"b": torch.zeros(2, 9, 2)})):
        refused(message, inputs)
    refused("unknown: c.", x, {"c": yes})
    refused("given twice: b.", x, encoded={"b": tokens})
    refuses("missing: b.", lambda: net.fuse({"a": net.encode("a", a)}))
    refuses("unknown modality 'c': there are a, b", lambda: net.encode("c", a))
    for bad in (tokens[:, 0], torch.zeros(2, 2, 8)):
        refused(f"encoded 'b' must be (B, T, 16), as encode returns it, got {tuple(bad.shape)}",
                {"a": a}, encoded={"b": bad})
    for bad in (yes[:1], yes[:, None], yes.float()):
        refused(f"present 'a' must be a bool tensor of shape (2,), got {bad.dtype} of "
                f"{tuple(bad.shape)}", x, {"a": bad})


def test_models_quadmodal_learns_a_class_that_takes_two_modalities_to_tell():
    shapes, generator = {"a": (6,), "b": (16, 2)}, torch.Generator().manual_seed(0)
    net = quad(shapes, dropout=0.0)
    side = torch.randint(0, 2, (64, 2), generator=generator)
    x = quad_rows(64, shapes)
    sign = 2 * side - 1
    x = {"a": x["a"] + sign[:, :1], "b": x["b"] + sign[:, 1, None, None]}
    agree = side[:, :1] ^ side[:, 1:]  # the class: do the two sides agree?
    same = agree == agree.T
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(60):
        z = net(x)
        cosine = z @ z.T
        loss = (1 - cosine)[same].mean() + cosine[~same].mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert loss < -0.5, loss  # -1 is the minimum; equal embeddings score 1


def packed_doubles(stays):
    return packed_sets(stays, torch.float64)


def loop_attention(q, k, v, heads, bias=None):
    """Plain attention of q (N, C) to k and v (M, C), head by head."""
    size, parts = q.shape[1] // heads, []
    for head in range(heads):
        at = slice(head * size, (head + 1) * size)
        scores = q[:, at] @ k[:, at].T / math.sqrt(size) + (0 if bias is None else bias[head])
        weights = scores.exp() / scores.exp().sum(1, keepdim=True)
        parts.append(weights @ v[:, at])
    return torch.cat(parts, 1)


def loop_linear(x, layer):
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def loop_norm(x, layer):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias


def loop_mlp(x, layers):
    """The first and the last linear layer of an MLP, between them GELU."""
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    return loop_linear(F.gelu(loop_linear(x, linear[0])), linear[1])


def loop_block(block, q, x):
    k, v = loop_linear(loop_norm(x, block.key_norm), block.key_value).chunk(2, 1)
    x = loop_linear(loop_norm(q, block.query_norm), block.query)
    h = q + loop_linear(loop_attention(x, k, v, block.heads), block.out)
    return h + loop_mlp(loop_norm(h, block.mlp_norm), block.mlp)


def loop_events(encoder, events):
    rows = torch.zeros(len(events), 2 * encoder.variables)
    for row, (variable, value) in zip(rows, events):
        row[variable], row[encoder.variables + variable] = value, 1.0
    return rows


def loop_set(encoder, events):
    """The vector (1, width) of one set, alone: no padding, no mask."""
    linear, norm = encoder.sets.embed[:2]
    x = F.gelu(loop_norm(loop_linear(loop_events(encoder, events), linear), norm))
    for level in encoder.sets.levels:
        x = loop_block(level.spread, x, loop_block(level.gather, level.points, x))
    return loop_norm(x.mean(0, keepdim=True), encoder.sets.norm)


def loop_stay(encoder, stay):
    """The hidden states (T, width) of one stay, alone, its sets encoded one at a time."""
    minutes, x = [minute for minute, _ in stay], []
    for i, (minute, events) in enumerate(stay):
        gap = minute - (minutes[i - 1] if i else 0)
        bucket = min(63, int(64 * math.log1p(gap) / math.log1p(2880)))
        place = []
        for c in range(0, encoder.width, 2):
            angle = i / 10000 ** (c / encoder.width)
            place += [math.sin(angle), math.cos(angle)]
        latent = loop_linear(loop_set(encoder, events), encoder.mu)
        x.append(latent + torch.tensor(place) + encoder.gap.weight[bucket])
    x = torch.cat(x)
    bias = torch.full((len(encoder.time_bias.log_tau), len(stay), len(stay)), -math.inf)
    for h, (s, t) in enumerate(zip(encoder.time_bias.log_slope, encoder.time_bias.log_tau)):
        for i, j in itertools.combinations_with_replacement(range(len(stay)), 2):
            bias[h, j, i] = -s.exp() * math.log(1 + (minutes[j] - minutes[i]) / t.exp())
    for layer in encoder.layers:
        q, k, v = loop_linear(loop_norm(x, layer.attention_norm), layer.qkv).chunk(3, 1)
        x = x + loop_linear(loop_attention(q, k, v, layer.heads, bias), layer.out[0])
        x = x + loop_mlp(loop_norm(x, layer.mlp_norm), layer.mlp)
    return loop_norm(x, encoder.norm)


def settled(model):
    """lived_in with attention that reaches hours back: drawn slopes and tau reach one set back."""
    model = lived_in(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, models.TimeBias):
                module.log_slope.sub_(1.0), module.log_tau.add_(3.0)
    return model


def test_models_transformer_layer_asks_no_attention_of_a_batch_without_rows():
    """Flash attention on CUDA refuses it before torch 2.10, as the stand-in does here."""
    attention = F.scaled_dot_product_attention

    def flash(q, *rest, **options):
        assert len(q), "batch size must be positive"
        return attention(q, *rest, **options)

    layer = models.TransformerLayer(12, heads=3, hidden=20)
    with unittest.mock.patch.object(F, "scaled_dot_product_attention", flash):
        assert layer(torch.randn(2, 6, 12)).shape == (2, 6, 12)
        y = layer(torch.zeros(0, 6, 12))
        y.sum().backward()
    assert y.shape == (0, 6, 12)
    assert all((p.grad == 0).all() for p in layer.parameters())  # DDP waits for every gradient


@torch.no_grad()
def test_models_seqset_hidden_states_equal_one_set_and_one_stay_at_a_time():
    encoder, stays = settled(set_encoder()), draw_sets(STAY_LENGTHS)
    sizes = [len(events) for stay in stays for _, events in stay]
    assert set(sizes) == set(range(1, 13))
    # One variable three times, at the minute of the set before.
    stays[1][7] = (stays[1][6][0], [(2, 0.5), (2, -1.5), (2, 0.5)])
    hidden = encoder(packed_sets(stays))
    assert hidden.shape == (5, 40, 16)
    for row, stay in zip(hidden, stays):
        expected = loop_stay(encoder, stay)
        assert near(row[: len(stay)], expected, 1e-5), (row[: len(stay)] - expected).abs().max()
    assert hidden[1].std(0).min() > 0.1
    assert abs(set_encoder(width=64).gap.weight.std() / 0.02 - 1) < 0.05
    heads = [m.heads for m in set_encoder(set_heads=8).modules() if hasattr(m, "heads")]
    assert heads == [8] * 4 + [4] * 2  # two levels of two blocks, two layers
    big = settled(set_encoder(variables=41, width=64, depth=2, heads=8, hidden=128, points=16))
    stays = draw_sets((4, 9), variables=41, seed=1)
    for row, stay in zip(big(packed_sets(stays)), stays):
        assert near(row[: len(stay)], loop_stay(big, stay), 1e-5)


@torch.no_grad()
def test_models_seqset_classifier_is_the_head_on_the_mean_and_the_last_state():
    net = settled(models.SeqSetClassifier(set_encoder(), layers=3, hidden=10))
    stays = draw_sets(STAY_LENGTHS)
    inputs, logits = packed_sets(stays), net(packed_sets(stays))
    linear = [layer for layer in net.head.modules() if isinstance(layer, nn.Linear)]
    assert [layer.weight.shape for layer in linear] == [(10, 32), (10, 10), (1, 10)]
    assert logits.shape == (5,) and logits.std() > 0.01
    for logit, features, stay in zip(logits, net.features(inputs), stays):
        hidden = loop_stay(net.encoder, stay)
        x = torch.cat([sum(hidden) / len(stay), hidden[len(stay) - 1]])
        assert near(features, x, 1e-5)
        for layer in linear[:-1]:
            x = loop_linear(x, layer).relu()
        x = loop_linear(x, linear[-1])
        assert near(logit, x[0], 1e-4)
    [head] = models.SeqSetClassifier(set_encoder(), layers=1).head
    assert isinstance(head, nn.Linear) and head.in_features == 32


@torch.no_grad()
def test_models_strongest_events_are_the_largest_of_each_channel_one_event_at_a_time():
    block, counts = lived_in(models.StrongestEvents(6, width=8, longest=100.0)), (4, 1, 9)
    events, minutes = torch.randn(14, 6), 100 * torch.rand(14)
    first, middle, _, last = block.embed
    x = torch.cat([events, minutes[:, None] / 100], 1)
    x = loop_linear(F.gelu(loop_norm(loop_linear(x, first), middle)), last)
    y = block(events, minutes, torch.tensor(counts))
    for row, end, count in zip(y, np.cumsum(counts), counts):
        assert near(row, loop_norm(x[end - count : end].amax(0), block.norm), 1e-5)
    order = torch.cat([torch.randperm(4), torch.tensor([4]), 5 + torch.randperm(9)])
    assert near(block(events[order], minutes[order], torch.tensor(counts)), y, 1e-6)
    other_times = block(events, minutes.flip(0), torch.tensor(counts))
    assert (other_times - y).abs().amax(1).min() > 1e-3


@torch.no_grad()
def test_models_seqset_classifier_reads_the_strongest_events_beside_its_scaled_down_states():
    net = settled(models.SeqSetClassifier(set_encoder(), events=True))
    stays, strongest = draw_sets(STAY_LENGTHS, largest=7), []
    inputs = packed_sets(stays)
    for stay in stays:
        minutes = torch.tensor([minute for minute, events in stay for _ in events])
        events = torch.cat([loop_events(net.encoder, events) for _, events in stay])
        strongest.append(net.strongest(events, minutes, torch.tensor([len(events)])))
    strongest = torch.cat(strongest)
    logits = net.head(torch.cat([net.scale * net.features(inputs), strongest], 1)).squeeze(1)
    assert near(net(inputs), logits, 1e-5) and net.head[0][0].in_features == 48
    assert net.scale == 0.1 and net.strongest.longest == 2880
    net.scale = 1.0
    assert (net(inputs) - logits).abs().min() > 1e-4


@torch.no_grad()
def test_models_seqset_vae_equals_one_set_and_one_stay_at_a_time():
    net, stays = settled(models.SeqSetVAE(set_encoder(), seeds=14)), draw_sets(STAY_LENGTHS)
    encoder, decoder, output = net.encoder, net.decoder, net(packed_sets(stays))
    sets = [events for stay in stays for _, events in stay]
    encoded = torch.cat([loop_set(encoder, events) for events in sets])
    assert near(output["mu"], loop_linear(encoded, encoder.mu), 3e-5)
    assert near(output["logvar"], loop_linear(encoded, net.logvar), 1e-5)
    hidden, seen = torch.cat([loop_stay(encoder, stay) for stay in stays]), []
    for chunk in output["sets"]:
        rows = zip(chunk["sets"].tolist(), chunk["guess"], chunk["target"], chunk["mask"])
        for i, guess, target, mask in rows:
            n, x = len(sets[i]), decoder.seeds[: len(sets[i])]
            x = x * (1 + loop_linear(hidden[i], decoder.scale))
            x = x + loop_linear(hidden[i], decoder.shift)
            expected = loop_norm(loop_block(decoder.block, x, x), decoder.out[0])
            expected = loop_linear(expected, decoder.out[1])
            assert mask.tolist() == [True] * n + [False] * (len(mask) - n)
            assert near(guess[:n], expected, 3e-5), (guess[:n] - expected).abs().max()
            assert torch.equal(target[:n], loop_events(encoder, sets[i]))
            seen.append(i)
    assert sorted(seen) == list(range(63)) and output["mu"].std() > 0.1


def test_models_sets_by_size_reads_every_element_once_and_pads_to_the_largest_of_a_chunk():
    sizes = torch.tensor([5, 1, 3, 3, 8, 1, 2])
    first = [0, 5, 6, 9, 12, 20, 21]  # the place of the first element of every set
    for chunk, widths in (
            (1, [1, 1, 2, 3, 3, 5, 8]), (2, [1, 3, 5, 8]), (3, [2, 5, 8]), (7, [8]), (256, [8])):
        chunks, seen = models.sets_by_size(sizes, chunk=chunk), []
        assert [index.shape[1] for _, index, _ in chunks] == widths
        for sets, index, mask in chunks:
            assert len(sets) <= chunk and torch.equal(mask.sum(1), sizes[sets])
            for i, places, true in zip(sets.tolist(), index, mask):
                assert places[true].tolist() == list(range(first[i], first[i] + sizes[i]))
                assert (places[~true] == first[i]).all()  # padding leaks from no other set
                seen.append(i)
        assert sorted(seen) == list(range(7))
    (sets, _, mask), (last, index, _) = models.sets_by_size(torch.tensor([1, 3, 1]), chunk=2)
    assert sets.tolist() == [0, 2] and mask.shape == (2, 1)
    assert last.tolist() == [1] and index.tolist() == [[1, 2, 3]]


@torch.no_grad()
def test_models_seqset_is_blind_to_the_order_of_events_the_company_and_the_chunks():
    net = settled(models.SeqSetVAE(set_encoder(), seeds=40)).double()
    encoder, stays = net.encoder, draw_sets(STAY_LENGTHS)
    whole = encoder(packed_doubles(stays))
    rng, mixed = np.random.default_rng(1), []
    for stay in stays:
        order = [rng.permutation(len(events)) for _, events in stay]
        mixed.append([(m, [events[i] for i in at]) for (m, events), at in zip(stay, order)])
    assert mixed != stays
    for row, shuffled, stay in zip(whole, encoder(packed_doubles(mixed)), stays):
        assert near(row[: len(stay)], shuffled[: len(stay)], 1e-10)
    wide = draw_sets((50, 3), largest=30, seed=2)  # a company of larger sets and longer stays
    for row, stay in zip(whole, stays):
        alone = encoder(packed_doubles([stay]))[0]
        assert alone.shape == (len(stay), 16) and near(row[: len(stay)], alone, 1e-10)
        assert near(encoder(packed_doubles([wide[0], stay, wide[1]]))[1, : len(stay)], alone, 1e-10)
    inputs, original = packed_doubles(stays), models.sets_by_size
    try:
        for chunk in (1, 3, 16):
            models.sets_by_size = functools.partial(original, chunk=chunk)
            output = net(inputs)
            assert len(output["sets"]) == -(-63 // chunk)
            for row, again, stay in zip(whole, encoder(inputs), stays):
                assert near(row[: len(stay)], again[: len(stay)], 1e-10)
    finally:
        models.sets_by_size = original


@torch.no_grad()
def test_models_seqset_hidden_states_know_only_the_past():
    net, (stay,) = settled(models.SeqSetVAE(set_encoder(), seeds=20)).double(), draw_sets((12,))
    encoder, (other,) = net.encoder, draw_sets((12,), seed=1)
    hidden = encoder(packed_doubles([stay]))[0]
    far = [(minute + 2880, events) for minute, events in other]
    same_times = [(minute, events) for (minute, _), (_, events) in zip(stay, other)]
    for known in (1, 5, 11):
        for later in ([], far, far[:1], same_times[known:]):
            changed = encoder(packed_doubles([stay[:known] + later]))[0]
            assert near(changed[:known], hidden[:known], 1e-10)
            if later and known < 11:
                assert (changed[known] - hidden[known]).abs().max() > 1e-2  # known from there on
    earlier = encoder(packed_doubles([[(stay[0][0], other[0][1])] + stay[1:]]))[0]
    assert (earlier - hidden).abs().amax(1).min() > 1e-4  # every later state knows the first set

    def guesses(stay):
        by_set = {}
        for chunk in net(packed_doubles([stay]))["sets"]:
            by_set |= dict(zip(chunk["sets"].tolist(), chunk["guess"]))
        return by_set

    before, after = guesses(stay), guesses(stay[:5] + far)
    for i in range(5):
        n = len(stay[i][1])
        assert near(before[i][:n], after[i][:n], 1e-10)


def test_models_time_bias_is_the_formula_causal_and_learns():
    bias = models.TimeBias(3)
    # The last minute of the second row is padding.
    start = bias(torch.tensor([[0.0, 60.0, 60.0], [7.0, 7.0, 0.0]]))
    assert start.shape == (2, 3, 3, 3) and (start[0, :, 2, 1] == 0).all()
    assert near(start[0, :, 1, 0], torch.tensor(-0.693147), 1e-5)
    minutes = torch.tensor([[0.0, 5.0, 65.0, 65.0, 900.0]])
    with torch.no_grad():
        bias.log_slope.copy_(torch.tensor([0.0, 0.5, -1.0]))
        bias.log_tau.copy_(torch.tensor([1.0, 3.0, 6.0]))
    table = bias(minutes)
    for h, i, j in itertools.product(range(3), range(5), range(5)):
        slope, tau = math.exp((0, 0.5, -1)[h]), math.exp((1, 3, 6)[h])
        span = float(minutes[0, i] - minutes[0, j])
        expected = -slope * math.log(1 + span / tau) if j <= i else -math.inf
        assert table[0, h, i, j] == expected or near(table[0, h, i, j], expected, 1e-5), (h, i, j)
    future = torch.ones(4, 4).triu(1) > 0
    expected = torch.zeros(1, 3, 4, 4).masked_fill(future, -math.inf)
    assert torch.equal(bias(torch.full((1, 4), 33.0)), expected)

    encoder, stays = settled(set_encoder()), draw_sets((12, 3))
    (encoder(packed_sets(stays)) * torch.randn(16)).sum().backward()
    for p in (encoder.time_bias.log_slope, encoder.time_bias.log_tau):
        assert p.shape == (4,) and (p.grad.abs() > 1e-6).all()
    nn.init.zeros_(encoder.gap.weight)  # only the bias knows the time now
    with torch.no_grad():
        hidden = encoder(packed_sets(stays))[0]
        slower = [(3 * minute, events) for minute, events in stays[0]]
        later = [(minute + 100, events) for minute, events in stays[0]]
        apart, moved = encoder(packed_sets([slower]))[0], encoder(packed_sets([later]))[0]
    assert near(apart[0], hidden[0], 1e-6) and (apart - hidden)[1:].abs().amax(1).min() > 1e-3
    assert near(moved, hidden, 1e-5)  # only spans of time matter to it


def test_models_induced_set_attention_is_equivariant_and_reads_no_padding():
    layer, x = lived_in(models.InducedSetAttention(12, heads=3, points=5)), torch.randn(3, 7, 12)
    order, mask = torch.randperm(7), torch.arange(7) < torch.tensor([3, 7, 1])[:, None]
    assert near(layer(x[:, order], mask[:, order]), layer(x, mask)[:, order], 1e-5)
    for row, n in enumerate((3, 7, 1)):
        h = loop_block(layer.gather, layer.points, x[row, :n])
        spread = loop_block(layer.spread, x[row, :n], h)
        assert h.shape == (5, 12) and near(layer(x, mask)[row, :n], spread, 1e-5)
    assert not near(layer(x, mask)[0], layer(x)[0], 1e-2)
    assert abs(models.InducedSetAttention(64, points=256).points.std() / 0.125 - 1) < 0.05


def test_models_seqset_dropout_has_its_rate_and_acts_in_training_only():
    net = models.SeqSetClassifier(set_encoder(dropout=0.25), layers=3, dropout=0.5)
    inputs = packed_sets(draw_sets((4, 9)))
    assert [m.p for m in net.encoder.modules() if isinstance(m, nn.Dropout)] == [0.25] * (1 + 2 * 3)
    assert [m.p for m in net.head.modules() if isinstance(m, nn.Dropout)] == [0.5, 0.5]
    assert [layer.dropout for layer in net.encoder.layers] == [0.25, 0.25]
    assert not torch.equal(net(inputs), net(inputs))
    assert torch.equal(net.eval()(inputs), net(inputs))
    encoder = set_encoder(dropout=0.25)
    encoder.layers.eval()  # only the sum of latent, position and time drops
    assert not torch.equal(encoder(inputs), encoder(inputs))
    layer = models.TransformerLayer(8, heads=2, hidden=16, dropout=0.5, qkv_bias=False)
    x, bias = torch.randn(1, 6, 8), torch.zeros(1, 2, 6, 6)
    for module in layer.modules():
        module.p = 0.0  # only the attention still drops
    assert not torch.equal(layer(x, bias), layer(x, bias))
    assert torch.equal(layer.eval()(x, bias), layer(x, bias))


def test_models_seqset_vae_is_noisy_by_its_logvar_in_training_only():
    torch.manual_seed(0)
    net = models.SeqSetVAE(set_encoder(dropout=0.0), seeds=12)
    inputs, latents = packed_sets(draw_sets((40, 40, 40))), []
    original = net.encoder.sequence

    def record(latent, inputs):
        latents.append(latent)
        return original(latent, inputs)

    net.encoder.sequence = record
    output = net(inputs)
    assert (output["logvar"] + 5).abs().max() < 2.5 and abs(output["logvar"].mean() + 5) < 0.3
    for shift in (0.0, 4.0):
        nn.init.constant_(net.logvar.bias, -5.0 + shift)
        output = net(inputs)
        noise = (latents[-1] - output["mu"]) / (output["logvar"] / 2).exp()
        assert abs(noise.std() - 1) < 0.05 and abs(noise.mean()) < 0.05  # 1,920 draws
        rows = (noise - noise.mean(0)) / noise.std(0)
        assert (rows.T @ rows / len(rows) - torch.eye(16)).abs().max() < 0.5
        assert (noise[1:] * noise[:-1]).mean().abs() < 0.1

    def guess():
        return net(inputs)["sets"][0]["guess"]

    assert not torch.equal(guess(), guess())
    net.eval()
    assert torch.equal(guess(), guess()) and torch.equal(latents[-1], net(inputs)["mu"])
    classifier = models.SeqSetClassifier(net.encoder, dropout=0.0).train()  # mu also in training
    assert torch.equal(classifier(inputs), classifier(inputs))
    assert torch.equal(latents[-1], output["mu"])


def test_models_seqset_refuses_what_does_not_fit():
    for width, heads, set_heads in ((18, 4, 2), (16, 4, 3), (16, 3, 2)):
        wrong = heads if width % heads else set_heads
        refuses(f"heads must divide channels, got {wrong} heads for {width} channels",
                lambda: set_encoder(width=width, heads=heads, set_heads=set_heads))
    refuses("channels must be even, got 15", lambda: set_encoder(width=15, heads=3, set_heads=3))
    for layer in (models.AttentionBlock, models.TransformerLayer):
        refuses("heads must divide channels, got 5 heads for 16 channels",
                lambda: layer(16, heads=5, hidden=8))
    decoder, y = models.SetDecoder(6, width=8, seeds=5), torch.zeros(2, 8)
    assert decoder(y, torch.ones(2, 5, dtype=torch.bool)).shape == (2, 5, 6)
    refuses("a set of 6 elements needs as many seeds, there are 5: build it with more",
            lambda: decoder(y, torch.ones(2, 6, dtype=torch.bool)))
    refuses("a set of 12 elements needs as many seeds, there are 11",
            lambda: models.SeqSetVAE(set_encoder(), seeds=11)(packed_sets(draw_sets((3,)))))


def test_models_set_decoder_starts_near_zero_and_reads_the_set_only_through_the_vector_and_size():
    torch.manual_seed(0)
    decoder = models.SetDecoder(82, width=64, seeds=40)
    assert abs(decoder.out[1].weight.std() / 0.02 - 1) < 0.05
    assert abs(decoder.seeds.std() - 1) < 0.05 and decoder.block.heads == 2
    assert models.SetDecoder(6, width=8, seeds=2, heads=4).block.heads == 4
    decoder = lived_in(models.SetDecoder(12, width=16, seeds=9))
    y, mask = torch.randn(3, 16), torch.arange(9) < torch.tensor([2, 9, 5])[:, None]
    guess = decoder(y, mask)
    for row, n in enumerate((2, 9, 5)):
        alone = decoder(y[row : row + 1], torch.ones(1, n, dtype=torch.bool))[0]
        assert near(guess[row, :n], alone, 1e-6)
        assert (alone[1:] - alone[:1]).abs().amax(1).min() > 1e-2  # all differ
    swapped = decoder(y.flip(0), mask)
    assert near(swapped[1], guess[1], 1e-5) and not near(swapped[0, :2], guess[0, :2], 1e-3)


def test_models_seqset_targets_are_the_events_and_no_parameter_moves_them():
    net, stays = models.SeqSetVAE(set_encoder(), seeds=12), draw_sets((5, 9))
    stays[0][2] = (stays[0][2][0], [(3, 0.0), (1, -2.0), (3, 0.0)])
    inputs = packed_sets(stays)
    events = net.encoder.events(inputs)
    assert torch.equal(events[:, 6:].argmax(1), inputs["variables"])
    assert (events[:, 6:].sum(1) == 1).all()
    assert torch.equal(events[:, :6], inputs["values"][:, None] * events[:, 6:])
    place = int(inputs["sizes"][:2].sum())
    assert events[place].nonzero().tolist() == [[9]] and events[place, 9] == 1
    assert events[place + 1].nonzero().tolist() == [[1], [7]]
    assert events[place + 1, [1, 7]].tolist() == [-2.0, 1.0]
    targets = [chunk["target"] for chunk in net(inputs)["sets"]]
    assert not events.requires_grad and not any(target.requires_grad for target in targets)
    others = [chunk["target"] for chunk in settled(net)(inputs)["sets"]]
    assert all(map(torch.equal, targets, others))
    zero, other = (packed_sets([[(0, [(variable, 0.0)])]]) for variable in (3, 1))
    difference = net.encoder(zero) - net.encoder(other)
    assert difference.abs().max() > 1e-2  # a value of 0 keeps its variable
    again = models.SeqSetVAE(set_encoder(), seeds=12)
    assert len(again.state_dict()) == len(dict(again.named_parameters()))  # no buffer either


def test_models_log_time_buckets_are_even_in_the_logarithm_and_rise():
    for minutes, places in (
            ([0.0, 1, 60, 1440, 2880], [0, 5, 33, 58, 63]), ([-5.0, 2879.0, 1e9], [0, 63, 63])):
        assert models.log_time_buckets(torch.tensor(minutes)).tolist() == places
    spans = torch.arange(0, 2881, dtype=torch.float32)
    for buckets, longest in ((64, 2880.0), (16, 600.0)):
        places = models.log_time_buckets(spans, buckets=buckets, longest=longest)
        assert places.dtype == torch.int64
        bounds = [math.expm1(math.log1p(longest) * k / buckets) for k in range(1, buckets)]
        expected = [sum(span >= bound for bound in bounds) for span in spans.tolist()]
        assert places.tolist() == expected
    assert models.log_time_buckets(torch.zeros(2, 3)).shape == (2, 3)
    assert set_encoder(buckets=16).gap.num_embeddings == 16
    set_encoder(buckets=16)(packed_sets(draw_sets((9,))))  # long spans stay inside a smaller table


def test_models_seqset_networks_run_forward_and_backward_under_bf16_autocast():
    inputs = packed_sets(draw_sets(STAY_LENGTHS))
    vae = models.SeqSetVAE(set_encoder(dropout=0.0), seeds=12)
    classifier = models.SeqSetClassifier(set_encoder(), dropout=0.0, events=True)
    with torch.autocast("cpu", torch.bfloat16):
        output, recon = vae(inputs), []
        for chunk in output["sets"]:
            mask = chunk["mask"]
            recon.append(losses.chamfer(chunk["guess"], chunk["target"], x_mask=mask, y_mask=mask))
        kl = losses.kl_to_standard_normal(output["mu"], output["logvar"]).mean()
        logits = classifier(inputs)
    assert output["sets"][0]["guess"].dtype == torch.bfloat16
    (torch.cat(recon).mean() + 0.01 * kl).backward(), logits.float().square().sum().backward()
    for model in (vae, classifier):
        assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in model.parameters())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = settled(classifier)(inputs)
    full = classifier(inputs)
    assert half.isfinite().all() and (half - full).abs().max() < 0.1 * full.abs().max()


def test_models_load_backbone_moves_the_encoder_of_a_seqset_vae_into_a_classifier_or_refuses():
    source = settled(models.SeqSetVAE(set_encoder(), seeds=12))
    target = models.SeqSetClassifier(set_encoder())
    state, inputs = source.state_dict(), packed_sets(draw_sets((4, 9)))
    tensors = len(target.encoder.state_dict())
    report = models.load_backbone(target.encoder, state)
    assert report == {
        "tensors": tensors, "scalars": models.count_parameters(target.encoder),
        "missing": 0, "unexpected": 0,
        "left_out": [name for name in state if name.startswith(("logvar.", "decoder."))]}
    assert tensors + len(report["left_out"]) == len(state)
    assert torch.equal(target.eval().encoder(inputs), source.encoder(inputs))
    before = copy.deepcopy(target.state_dict())
    for name in ("time_bias.log_tau", "gap.weight", "layers.1.qkv.weight", "sets.levels.0.points"):
        lacking = {key: value for key, value in state.items() if key != f"encoder.{name}"}
        refuses(f"{tensors - 1} of {tensors} tensors fit under 'encoder.': missing 1 ({name})",
                lambda: models.load_backbone(target.encoder, lacking))
        assert same_bits(before, target.state_dict())
    models.freeze_backbone(target.encoder, unfreeze_last=1)
    trained = [name for name, p in target.encoder.named_parameters() if p.requires_grad]
    assert {name.split(".")[0] for name in trained} == {"layers", "norm"}
    assert not any("layers.0." in name for name in trained)
