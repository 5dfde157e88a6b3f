"""Tests of models_sequences."""

import copy
import itertools
import math
import unittest.mock
import warnings

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import losses
import models
from tests.helpers import (
    draw_sets, lived_in, near, packed_sets, quad, QUAD, quad_rows, raises, same_bits, set_encoder,
    signals_of, small_encoder, STAY_LENGTHS)


def test_models_what_does_not_fit_is_refused_when_built_and_the_remedy_it_names_fits():
    net = lambda size=(24, 40), **options: lambda: models.EyeNet(size, channels=4, **options)
    raises(ValueError, "8 convnext blocks do not fit a size of 24x40: a stride of 2 meets a map of 1x2; 1 to 6 blocks "
           "fit", net(block="convnext", blocks=8))
    net(block="convnext", blocks=6)()
    raises(ValueError, "1 to 6 blocks fit", net(block="convnext", blocks=7))
    raises(ValueError, "1 to 10 blocks fit", net((32, 64), blocks=11))
    net((32, 64), blocks=10)()
    raises(ValueError, "a stride of 4 meets a map of 3x9; the smallest size is 4x4",
           net((3, 9), block="convnext", blocks=1))
    raises(ValueError, "at least 2 tokens, got 1x1 from token_grid 2x3 on a map of 1x1", net((8, 8), block="convnext"))
    net((8, 8), block="convnext", head="avg")()
    raises(ValueError, "at least 2 tokens, got 1x1", net(head="mlp_mixer", token_grid=(1, 1)))
    raises(ValueError, "at least 2 tokens, got -1x-2", net(head="mlp_mixer", token_grid=(-1, -2)))
    raises(ValueError, "block must be one of baseline, inverted_se, convnext, got 'resnet'", net(block="resnet"))
    raises(ValueError, "head must be one of auto, avg, avgmax_mlp, transformer, mlp_mixer, got 'max'", net(head="max"))
    raises(ValueError, "blocks must be at least 1, got 0", net(blocks=0))
    raises(ValueError, "got 4 and 0", net(token_layers=0))
    raises(ValueError, "got 0 and 2", lambda: models.EyeNet(channels=0))
    raises(ValueError, "must be in [0, 1), got 1.0", net(stochastic_depth=1.0))
    raises(ValueError, "heads must divide channels", lambda: models.TransformerLayer(6, heads=4, hidden=8))
    raises(ValueError, "mixer must be", lambda: models.TokenHead(4, mixer="avg"))


def test_models_channel_layer_norm_is_the_formula():
    norm, x = lived_in(models.ChannelLayerNorm(5)), torch.randn(2, 5, 3, 4)
    mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, correction=0)
    slow = (x - mean) / (var + 1e-6).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]
    assert near(norm(x), slow, 1e-6)
    assert norm(x).is_contiguous(memory_format=torch.channels_last)


def test_models_sinusoidal_positions_are_the_formula():
    table = models.sinusoidal_positions(9, 6)
    for t in range(9):
        for i in range(3):
            angle = t / 10000 ** (2 * i / 6)
            assert near(table[t, 2 * i], math.sin(angle), 1e-5) and near(table[t, 2 * i + 1], math.cos(angle), 1e-5)
    raises(ValueError, "channels must be even, got 5", lambda: models.sinusoidal_positions(3, 5))


def test_models_ppg_encoder_is_patches_linear_positions_layers_norm():
    encoder, x = small_encoder().eval(), signals_of(2, length=27)  # 27: three samples more than six patches
    tokens = torch.stack([encoder.embed(x[:, :, 4 * i : 4 * i + 4].reshape(2, 12)) for i in range(6)], 1)
    tokens = tokens + models.sinusoidal_positions(6, 16)
    for layer in encoder.layers:
        tokens = layer(tokens)
    assert near(encoder(x), F.layer_norm(tokens, (16,), encoder.norm.weight, encoder.norm.bias), 1e-5)
    assert not near(encoder(x)[:, :1], encoder(x.flip(-1))[:, -1:], 1e-2)  # it knows where a patch lies
    for bad in (torch.zeros(2, 24), torch.zeros(2, 1, 24), torch.zeros(2, 3, 3)):
        raises(ValueError, f"signals must be (B, 3, at least 4), got {tuple(bad.shape)}", lambda: encoder(bad))
    raises(ValueError, "channels must be even", lambda: small_encoder(width=15, heads=3))
    raises(ValueError, "heads must divide channels", lambda: small_encoder(width=18))


def test_models_ppg_regressor_is_a_linear_head_on_the_mean_token():
    model, x = models.PPGRegressor(small_encoder()).eval(), signals_of(3)
    assert torch.equal(model.features(x), model.encoder(x).mean(1))
    assert near(model(x), model.encoder(x).mean(1) @ model.head.weight[0] + model.head.bias, 1e-6)
    assert near(model(x)[1], model(x[1:2])[0], 1e-6)  # whatever else is in the batch


def test_models_masked_patch_model_does_not_see_what_is_hidden():
    model, x = models.MaskedPatchModel(small_encoder()).eval(), signals_of(2)
    mask = torch.tensor([[True, False, False, True, False, False], [False, True, True, True, False, False]])
    other = x.clone()
    other.view(2, 3, 6, 4)[mask[:, None].expand(2, 3, 6)] = 100.0
    assert torch.equal(model(x, mask), model(other, mask)) and not near(model(x, ~mask), model(other, ~mask), 1e-5)
    assert model(x, mask).shape == model.encoder.patches(x).shape == (2, 6, 12)


def test_models_masked_patch_model_learns_to_fill_in_a_sine():
    torch.manual_seed(0)
    model = models.MaskedPatchModel(small_encoder(channels=1, patch=2, dropout=0.0))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        x = torch.sin(torch.arange(24) * 0.5 + 6.28 * torch.rand(32, 1))[:, None]
        mask = models.random_patch_mask(32, 12, 0.3)
        loss = F.mse_loss(model(x, mask)[mask], model.encoder.patches(x)[mask])
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert loss < 0.1, loss  # the mean of a sine scores 0.5


def test_models_random_patch_mask_hides_the_same_number_in_every_row_at_random_places():
    generator = torch.Generator().manual_seed(0)
    mask = models.random_patch_mask(4000, 10, 0.35, generator=generator)
    assert (mask.sum(1) == 4).all() and (mask.float().mean(0) - 0.4).abs().max() < 0.04
    assert (models.random_patch_mask(5, 10, 0.01).sum(1) == 1).all() and (models.random_patch_mask(5, 10, 0.99).sum(1) == 9).all()
    raises(ValueError, "at least 2 patches", lambda: models.random_patch_mask(5, 1, 0.5))
    raises(ValueError, "a ratio between 0 and 1", lambda: models.random_patch_mask(5, 4, 1.0))


def test_models_load_backbone_takes_the_whole_encoder_or_nothing():
    source, target = models.MaskedPatchModel(small_encoder()), models.PPGRegressor(small_encoder())
    source.encoder.apply(lambda module: [nn.init.normal_(p) for p in module.parameters(recurse=False)])
    state = source.state_dict()
    assert models.load_backbone(target.encoder, state) == {
        "tensors": 28, "scalars": models.count_parameters(target.encoder), "missing": 0, "unexpected": 0,
        "left_out": ["mask_token", "decoder.weight", "decoder.bias"]}
    assert all(torch.equal(value, state[f"encoder.{name}"]) for name, value in target.encoder.state_dict().items())
    before = copy.deepcopy(target.state_dict())
    lacking = {name: value for name, value in state.items() if name != "encoder.layers.1.qkv.bias"}
    for damaged, message in (
            (lacking, "27 of 28 tensors fit under 'encoder.': missing 1 (layers.1.qkv.bias)"),
            (state | {"encoder.extra": torch.zeros(1)}, "28 of 28 tensors fit under 'encoder.': unexpected 1 (extra)"),
            (models.MaskedPatchModel(small_encoder(width=32)).state_dict(),
             "of another shape 28 (embed.weight is (32, 12) there and (16, 12) here"),
            (models.MaskedPatchModel(small_encoder(depth=1)).state_dict(), "missing 12 (layers.1.attention_norm.bias"),
            ({}, "0 of 28 tensors fit")):
        raises(ValueError, message, lambda: models.load_backbone(target.encoder, damaged))
        assert same_bits(before, target.state_dict())
    raises(ValueError, "there is nothing to load", lambda: models.load_backbone(nn.Identity(), {}))


def test_models_frozen_backbone_has_no_dropout_and_no_gradient_in_training():
    model = models.PPGRegressor(small_encoder(dropout=0.5))
    models.freeze_backbone(model.encoder)
    models.train_mode(model)
    assert model.training and model.head.training and not any(module.training for module in model.encoder.modules())
    assert torch.equal(model.features(signals_of(4)), model.features(signals_of(4)))
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
    models.freeze_backbone(model.encoder, unfreeze_last=1)
    models.train_mode(model)
    trained = {name.rpartition(".")[0].removeprefix("encoder.") for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"layers", "norm", "head"}
    assert "layers.1.qkv" in trained and "layers.0.qkv" not in trained
    assert model.encoder.layers[1].mlp[2].training and not model.encoder.layers[0].mlp[2].training
    for bad in (-1, 3):
        raises(ValueError, f"unfreeze_last {bad} must be between 0 and 2", lambda: models.freeze_backbone(model.encoder, unfreeze_last=bad))
    norm = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
    norm[0].requires_grad_(False)
    models.train_mode(norm)
    norm(torch.randn(8, 4))
    assert norm[0].num_batches_tracked == 0 and norm[1].training


def test_models_grid_positions_are_the_code_of_the_row_and_of_the_column():
    table = models.grid_positions(3, 5, 8)
    rows, columns = models.sinusoidal_positions(3, 4), models.sinusoidal_positions(5, 4)
    for r, c in itertools.product(range(3), range(5)):
        assert torch.equal(table[5 * r + c], torch.cat([rows[r], columns[c]]))
    assert len(table.unique(dim=0)) == 15
    raises(ValueError, "channels must be a multiple of 4, got 6", lambda: models.grid_positions(2, 2, 6))


def test_models_strided_cnn_halves_while_four_pixels_are_left():
    for size, strides, map_size in (((32, 32), [2, 2, 2], (4, 4)), ((64, 100), [2, 2, 2], (8, 13)), ((9, 7), [2, 2, 1], (3, 2)),
                                    ((8, 8), [2, 2, 1], (2, 2)), ((1, 16), [2, 2, 1], (1, 4)), ((2, 3), [1, 1, 1], (2, 3)),
                                    ((1, 2), [1, 1, 1], (1, 2))):
        cnn = models.strided_cnn(2, size, width=8)
        assert [part[0].stride[0] for part in cnn] == strides and [part[0].out_channels for part in cnn] == [2, 4, 8]
        assert cnn(torch.randn(1, 2, *size)).shape == (1, 8, *map_size)  # training, with a single image
    raises(ValueError, "more than one pixel, got 1x1", lambda: models.strided_cnn(2, (1, 1), width=8))
    cnn, x = lived_in(models.strided_cnn(2, (9, 7), width=8)), torch.randn(2, 2, 9, 7)
    p, y = cnn.state_dict(), x
    for i, stride in enumerate((2, 2, 1)):
        y = F.conv2d(y, p[f"{i}.0.weight"], stride=stride, padding=1)
        y = F.batch_norm(y, *(p[f"{i}.1.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))).relu()
    assert near(cnn(x), y, 1e-5)


def test_models_modality_encoders_are_their_formulas():
    def norm(x, module):
        return F.layer_norm(x, (16,), module.weight, module.bias)

    nets = {name: lived_in(models.modality_encoder(shape, width=16, heads=4, depth=2, patch=4)) for name, shape in QUAD.items()}
    x = quad_rows(2)
    net, p = nets["text"], nets["text"].state_dict()
    each = [x["text"] @ p["embed.0.weight"][16 * i : 16 * i + 16].T + p["embed.0.bias"][16 * i : 16 * i + 16] for i in range(4)]
    assert near(net(x["text"]), norm(torch.stack(each, 1), net.norm), 1e-5)

    net = nets["motion"]
    patches = [torch.cat([x["motion"][:, t, c : c + 1] for c in range(3) for t in range(i, i + 4)], 1) for i in range(0, 20, 4)]
    tokens = net.layers(net.embed(torch.stack(patches, 1)) + models.sinusoidal_positions(5, 16))  # the 21st step is a rest
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
            ((1, 64, 50), models.ImageTokens, 56), ((3, 5, 3), models.ImageTokens, 6), ((1, 1, 2), models.ImageTokens, 2),
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
    q, k, v = (y @ w.T + b for y, w, b in zip((tokens, x, x), p["attention.in_proj_weight"].chunk(3), p["attention.in_proj_bias"].chunk(3)))
    y = readout(tokens, x, torch.tensor([True, False]))
    for token in range(3):
        read = [(k[0, :, h] @ q[token, h] / 2).softmax(0) @ v[0, :, h] for h in (slice(0, 4), slice(4, 8))]
        read = p["attention.out_proj.weight"] @ torch.cat(read) + p["attention.out_proj.bias"] + tokens[token]
        assert near(y[0, token], F.layer_norm(read, (8,), p["norm.weight"], p["norm.bias"]), 1e-5)
        assert torch.equal(y[1, token], p["missing"])


def test_models_quadmodal_is_encoders_readouts_and_head_in_the_order_of_the_names():
    net, x = lived_in(quad(tokens=3)), quad_rows(2)
    present, both = {"photo": torch.tensor([True, False])}, torch.tensor([True, True])
    fused = [net.readouts[name](net.tokens, net.encode(name, x[name]), present.get(name, both)) for name in sorted(x)]
    flat = torch.cat([f[:, i] for f in fused for i in range(3)], 1)
    p = net.head.state_dict()
    hidden = F.gelu(F.layer_norm(flat @ p["0.weight"].T + p["0.bias"], (24,), p["1.weight"], p["1.bias"]))
    expected = F.layer_norm(hidden @ p["4.weight"].T + p["4.bias"], (12,), p["5.weight"], p["5.bias"])
    assert flat.shape == (2, 4 * 3 * 16) and near(net.features(x, present), expected, 1e-5)
    assert near(net(x, present), expected / expected.square().sum(1, keepdim=True).sqrt(), 1e-5)
    backwards = lived_in(quad(dict(reversed(QUAD.items())), tokens=3))
    backwards.load_state_dict(net.state_dict())
    assert torch.equal(backwards(dict(reversed(x.items())), present), net(x, present)) and net(x).std() > 1e-2


def test_models_quadmodal_has_the_parameters_counted_by_hand():
    encoders = {
        "text": 7 * 3 * 16 + 3 * 16 + 2 * 16,  # one linear layer for all tokens, norm
        "motion": 12 * 16 + 16 + 2 * 16,  # linear layer for a patch of 4 steps by 3 channels, norm; and a transformer layer
        "photo": 9 * (3 * 4 + 4 * 8 + 8 * 16) + 2 * (4 + 8 + 16) + 2 * 16,  # three convolutions, three batch norms, norm
        "film": 9 * (3 * 4 + 4 * 8 + 8 * 16) + 2 * (4 + 8 + 16) + 16 * 16 + 16 + 2 * 16}  # and a linear layer; and a transformer layer
    layer = 2 * 2 * 16 + 4 * (16 * 16 + 16) + 16 * 64 + 64 + 64 * 16 + 16  # two norms, four linear layers 16 to 16, MLP 16, 64, 16
    readout = 4 * (16 * 16 + 16) + 2 * 16 + 16  # attention, norm, missing
    head = 4 * 3 * 16 * 24 + 24 + 2 * 24 + 24 * 12 + 12 + 2 * 12
    net = quad(tokens=3)
    assert models.count_parameters(net) == sum(encoders.values()) + 2 * layer + 4 * readout + 3 * 16 + head
    assert models.count_parameters(quad(depth=3)) - models.count_parameters(quad()) == 2 * 2 * layer


def test_models_quadmodal_never_sees_an_absent_value_nor_lets_it_into_gradients_or_statistics():
    present = {"film": torch.tensor([True, False, True, False, True]), "photo": torch.tensor([False, True, True, True, False]),
               "motion": torch.tensor([True, True, False, True, True]), "text": torch.zeros(5, dtype=torch.bool)}
    seen = []
    for value in (0.0, 1e30, float("nan"), float("inf")):
        net, x = quad(dropout=0.0), quad_rows(5)
        x = {name: torch.where(present[name].view(5, *[1] * (v.ndim - 1)), v, value).requires_grad_() for name, v in x.items()}
        y = net(x, present)
        (y * torch.arange(12)).sum().backward()
        assert all((x[name].grad[~mask] == 0).all() for name, mask in present.items())
        assert all((x[name].grad[mask] != 0).any() for name, mask in present.items() if mask.any())
        seen.append({"y": y.detach(), "buffers": dict(net.named_buffers()), "gradients": {n: p.grad for n, p in net.named_parameters()}})
    assert all(same_bits(seen[0], other) for other in seen[1:])
    assert all(v.isfinite().all() for part in ("buffers", "gradients") for v in seen[0][part].values()) and seen[0]["y"].isfinite().all()

    net, x = quad(dropout=0.0), quad_rows(5)  # tokens that were made before are masked as well
    tokens = {name: net.encode(name, v).detach() for name, v in x.items()}
    broken = {name: torch.where(present[name][:, None, None], v, math.nan).requires_grad_() for name, v in tokens.items()}
    y = net.fuse(broken, present)
    y[:, 0].sum().backward()
    assert torch.equal(y, net.fuse(tokens, present)) and all(v.grad.isfinite().all() for v in broken.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


def test_models_quadmodal_rows_are_independent_of_each_other_and_of_what_others_lack():
    net, x = lived_in(quad(dropout=0.5, modality_dropout=0.5)), quad_rows(6)
    present = {"photo": torch.tensor([True, False, True, True, False, True]), "text": torch.tensor([True, True, True, False, False, True])}
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    pick = lambda values, rows: {name: v[rows] for name, v in values.items()}
    with torch.no_grad():
        whole, full = net(x, present), net(x)
        alone = torch.cat([net(pick(x, [i]), pick(present, [i])) for i in range(6)])
        with torch.autocast("cpu", torch.bfloat16):
            half = net(x, present)
        assert near(net(pick(x, order), pick(present, order)), whole[order], 1e-5)
    assert near(alone, whole, 1e-5) and (half - whole).abs().max() < 0.1
    complete = present["photo"] & present["text"]
    assert near(whole[complete], full[complete], 1e-5)
    changed = ((whole - full).abs().amax(1) > 1e-2)
    assert torch.equal(changed, ~complete) and (whole - whole[:1]).abs().amax(1)[1:].min() > 1e-2

    trained = quad(dropout=0.0).train()  # with batch norm: rows that lack a photo count in no mean
    lacks = {"photo": torch.tensor([True, True, True, False, False, False]), "film": torch.arange(6) < 3}
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
        assert near((kept.sum(1) == 1).float().mean(), 4 * (1 - rate) * rate ** 3 + rate ** 4, 0.15)  # four draws, each on its own
    two = models.drop_modalities(present[:, :2], 0.5)
    assert near((~two).any(1).float().mean(), 2 * 3 / 8, 0.01)
    some = torch.rand(40000, 4) < 0.5
    kept = models.drop_modalities(some, 0.7)
    assert not (kept & ~some).any() and torch.equal(kept.any(1), some.any(1))
    assert torch.equal(kept[some.sum(1) == 1], some[some.sum(1) == 1])
    assert torch.equal(models.drop_modalities(some, 0.0), some)


def test_models_quadmodal_drops_modalities_in_training_only():
    shapes = {"a": (3,), "b": (8, 2), "c": (5,)}
    net, x = quad(shapes, dropout=0.0, modality_dropout=0.999), quad_rows(32, shapes)
    torch.manual_seed(0)
    y = net(x)
    with torch.no_grad():
        only = [net.eval()(x, {name: torch.full((32,), name == kept) for name in x}) for kept in x]
    kept = torch.stack([(y - each).abs().amax(1) < 1e-5 * y.abs().max() for each in only])
    assert (kept.sum(0) == 1).all() and (kept.sum(1) >= 4).all()
    z = net.train()(x, {"b": torch.zeros(32, dtype=torch.bool)})  # what a row lacks is not what it keeps
    kept = torch.stack([(z - each).abs().amax(1) < 1e-5 * z.abs().max() for each in only])
    assert (kept.sum(0) == 1).all() and (kept.sum(1) >= 8).tolist() == [True, False, True]
    torch.manual_seed(0)
    tokens = {name: net.encode(name, v) for name, v in x.items()}
    assert near(net.train().fuse(tokens), y, 1e-6)  # the same draws for tokens that were made before
    state = torch.get_rng_state()
    assert torch.equal(net.eval()(x), net(x)) and torch.equal(state, torch.get_rng_state())
    whole = quad({"a": (3,)}, dropout=0.0)
    state = torch.get_rng_state()
    whole({"a": x["a"]})
    assert torch.equal(state, torch.get_rng_state())  # no modality dropout, no draw


def test_models_quadmodal_dropout_has_its_rate_and_acts_in_training_only():
    net, x = quad(dropout=0.25), quad_rows(4)
    rates = [m.p for m in net.modules() if isinstance(m, nn.Dropout)]
    attention = [part.dropout for part in net.modules() if isinstance(part, (models.TransformerLayer, nn.MultiheadAttention))]
    assert rates == [0.25] * (2 * 3 + 1) and attention == [0.25] * (2 + 4)
    assert not torch.equal(net(x), net(x)) and torch.equal(net.eval()(x), net(x))


def test_models_quadmodal_from_encoded_tokens_equals_from_inputs():
    net, x = lived_in(quad(modality_dropout=0.5)), quad_rows(4)
    present = {"film": torch.tensor([True, False, True, True])}
    tokens = {name: net.encode(name, v) for name, v in x.items()}
    assert torch.equal(net.fuse(tokens), net(x)) and torch.equal(net.fuse(tokens, present), net(x, present))
    for names in (["film"], ["motion", "text"]):
        mixed = {name: v for name, v in x.items() if name not in names}, present
        assert torch.equal(net(*mixed, encoded={name: tokens[name] for name in names}), net(x, present))
        assert torch.equal(F.normalize(net.features(*mixed, encoded={name: tokens[name] for name in names})), net(x, present))


def test_models_frozen_encoders_stay_bit_equal_in_training_and_the_rest_moves():
    net, x = quad(dropout=0.5), quad_rows(8)
    models.freeze_encoders(net, ["photo", "film"])
    assert not any(m.training for name in ("photo", "film") for m in net.encoders[name].modules())
    models.train_mode(net)
    assert torch.equal(net.encode("film", x["film"]), net.encode("film", x["film"]))
    before = copy.deepcopy(net.state_dict())
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.1)
    lacks = {name: torch.arange(8) != i for i, name in enumerate(QUAD)}
    (net(x, lacks) * torch.randn(8, 12)).sum().backward(), optimizer.step()
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith(("encoders.photo.", "encoders.film.")), name
    assert net.training and net.encoders["motion"].training and net.head.training and net.readouts["photo"].training


def test_models_freeze_encoders_refuses_unknown_names_and_warns_when_none_is_left():
    net = quad()
    raises(ValueError, "cannot freeze 'vidoe': the modalities are film, motion, photo, text",
           lambda: models.freeze_encoders(net, ["film", "vidoe"]))
    assert all(p.requires_grad for p in net.parameters()) and all(m.training for m in net.modules())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert models.freeze_encoders(net, ["film", "motion"]) is None and models.freeze_encoders(net, []) is None
        assert not caught
        models.freeze_encoders(net, ["photo", "text"])
    assert [str(w.message) for w in caught] == ["all 4 encoders are frozen: only the fusion and the head are trained"]
    assert {name.split(".")[0] for name, p in net.named_parameters() if p.requires_grad} == {"readouts", "tokens", "head"}


def test_models_quadmodal_refuses_what_does_not_fit_when_built():
    build = lambda shapes=None, **changes: lambda: quad(shapes, **changes)
    raises(ValueError, "at least one modality, got none", build({}))
    for shape in ((), (1, 2, 3, 4, 5), (0, 3), (3, 0, 4)):
        raises(ValueError, f"modality 'x': a sample must be (F,), (T, C), (C, H, W) or (T, C, H, W), no side 0, got {shape}",
               build({"x": shape}))
    raises(ValueError, "modality 'x': a sequence must have at least one patch of 4 steps, got 3: use a patch of 3 or less",
           build({"x": (3, 2)}))
    build({"x": (3, 2)}, patch=3)()
    raises(ValueError, "modality 'x': an image must have more than one pixel, got 1x1", build({"x": (2, 5, 1, 1)}))
    for width, heads, fits in ((18, 3, 24), (20, 8, 24), (12, 8, 16), (30, 5, 40)):
        raises(ValueError, f"multiple of heads and of 4, got width {width} with {heads} heads: the next width that fits is {fits}",
               build(width=width, heads=heads))
        build(width=fits, heads=heads)()
    for name in ("", "a.b", "values", "training"):
        raises(ValueError, f"cannot be called {name!r}", build({name: (3,)}))
    for bad in (dict(width=0), dict(tokens=0), dict(heads=0), dict(hidden=0), dict(embed=0), dict(patch=0), dict(depth=-1)):
        raises(ValueError, "must be at least 1 and depth at least 0", build(**bad))
    for bad in (dict(dropout=1.0), dict(modality_dropout=1.0), dict(modality_dropout=-0.1), dict(dropout=-0.1)):
        raises(ValueError, "dropout and modality_dropout must be in [0, 1)", build(**bad))


def test_models_quadmodal_refuses_inputs_that_do_not_fit():
    net, x, yes = quad({"a": (3,), "b": (8, 2)}), quad_rows(2, {"a": (3,), "b": (8, 2)}), torch.ones(2, dtype=torch.bool)
    tokens = net.encode("b", x["b"])
    call = lambda *args, **options: lambda: net(*args, **options)
    raises(ValueError, "each of a, b is needed once, in inputs or encoded, but missing: b.", call({"a": x["a"]}))
    raises(ValueError, "missing: a, b.", call({}))
    raises(ValueError, "unknown: c.", call(x | {"c": x["a"]}))
    raises(ValueError, "missing: b; unknown: c.", call({"a": x["a"], "c": x["a"]}))
    raises(ValueError, "unknown: c.", call(x, {"c": yes}))
    raises(ValueError, "given twice: b.", call(x, encoded={"b": tokens}))
    raises(ValueError, "missing: b.", lambda: net.fuse({"a": net.encode("a", x["a"])}))
    raises(ValueError, "same number of rows, got {'a': 1, 'b': 2}", call({"a": x["a"][:1], "b": x["b"]}))
    raises(ValueError, "modality 'b' must be (B, 8, 2), got (2, 9, 2): cut or pad it", call(x | {"b": torch.zeros(2, 9, 2)}))
    raises(ValueError, "unknown modality 'c': there are a, b", lambda: net.encode("c", x["a"]))
    for bad in (tokens[:, 0], torch.zeros(2, 2, 8)):
        raises(ValueError, f"encoded 'b' must be (B, T, 16), as encode returns it, got {tuple(bad.shape)}",
               call({"a": x["a"]}, encoded={"b": bad}))
    for bad in (yes[:1], yes[:, None], yes.float()):
        raises(ValueError, f"present 'a' must be a bool tensor of shape (2,), got {bad.dtype} of {tuple(bad.shape)}", call(x, {"a": bad}))


def test_models_quadmodal_learns_a_class_that_takes_two_modalities_to_tell():
    shapes, generator = {"a": (6,), "b": (16, 2)}, torch.Generator().manual_seed(0)
    net = quad(shapes, dropout=0.0)
    side = torch.randint(0, 2, (64, 2), generator=generator)
    x = quad_rows(64, shapes)
    x = {"a": x["a"] + 2 * side[:, :1] - 1, "b": x["b"] + (2 * side[:, 1] - 1)[:, None, None]}
    same = (side[:, :1] ^ side[:, 1:]) == (side[:, :1] ^ side[:, 1:]).T  # one class: the two sides agree, the other: they do not
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(60):
        z = net(x)
        cosine = z @ z.T
        loss = (1 - cosine)[same].mean() + cosine[~same].mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert loss < -0.5, loss  # -1 is the minimum, 1 what equal embeddings score


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
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias


def loop_mlp(x, layers):
    """The first and the last linear layer of an MLP, between them GELU."""
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    return loop_linear(F.gelu(loop_linear(x, linear[0])), linear[1])


def loop_block(block, q, x):
    k, v = loop_linear(loop_norm(x, block.key_norm), block.key_value).chunk(2, 1)
    h = q + loop_linear(loop_attention(loop_linear(loop_norm(q, block.query_norm), block.query), k, v, block.heads), block.out)
    return h + loop_mlp(loop_norm(h, block.mlp_norm), block.mlp)


def loop_events(encoder, events):
    rows = torch.zeros(len(events), 2 * encoder.variables)
    for row, (variable, value) in zip(rows, events):
        row[variable], row[encoder.variables + variable] = value, 1.0
    return rows


def loop_set(encoder, events):
    """The vector (1, width) of one set, alone: no padding, no mask."""
    x = F.gelu(loop_norm(loop_linear(loop_events(encoder, events), encoder.sets.embed[0]), encoder.sets.embed[1]))
    for level in encoder.sets.levels:
        x = loop_block(level.spread, x, loop_block(level.gather, level.points, x))
    return loop_norm(x.mean(0, keepdim=True), encoder.sets.norm)


def loop_stay(encoder, stay):
    """The hidden states (T, width) of one stay, alone, its sets encoded one at a time."""
    minutes, x = [minute for minute, _ in stay], []
    for i, (minute, events) in enumerate(stay):
        bucket = min(63, int(64 * math.log1p(minute - (minutes[i - 1] if i else 0)) / math.log1p(2880)))
        place = [f(i / 10000 ** (c / encoder.width)) for c in range(0, encoder.width, 2) for f in (math.sin, math.cos)]
        x.append(loop_linear(loop_set(encoder, events), encoder.mu) + torch.tensor(place) + encoder.gap.weight[bucket])
    x = torch.cat(x)
    slope, tau = encoder.time_bias.log_slope.exp().tolist(), encoder.time_bias.log_tau.exp().tolist()
    bias = torch.tensor([[[-s * math.log(1 + (a - b) / t) if j <= i else -math.inf for j, b in enumerate(minutes)]
                          for i, a in enumerate(minutes)] for s, t in zip(slope, tau)])
    for layer in encoder.layers:
        q, k, v = loop_linear(loop_norm(x, layer.attention_norm), layer.qkv).chunk(3, 1)
        x = x + loop_linear(loop_attention(q, k, v, layer.heads, bias), layer.out[0])
        x = x + loop_mlp(loop_norm(x, layer.mlp_norm), layer.mlp)
    return loop_norm(x, encoder.norm)


def settled(model):
    """lived_in, but attention that reaches hours back: at slopes and tau drawn like weights it would see the last set only."""
    model, bias = lived_in(model), [m for m in model.modules() if isinstance(m, models.TimeBias)]
    with torch.no_grad():
        for each in bias:
            each.log_slope.sub_(1.0), each.log_tau.add_(3.0)
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
    stays[1][7] = (stays[1][6][0], [(2, 0.5), (2, -1.5), (2, 0.5)])  # one variable thrice; and no minute later than the set before
    hidden = encoder(packed_sets(stays))
    assert hidden.shape == (5, 40, 16)
    for row, stay in zip(hidden, stays):
        expected = loop_stay(encoder, stay)
        assert near(row[: len(stay)], expected, 1e-5), (row[: len(stay)] - expected).abs().max()
    assert hidden[1].std(0).min() > 0.1 and abs(set_encoder(width=64).gap.weight.std() / 0.02 - 1) < 0.05
    heads = [m.heads for m in set_encoder(set_heads=8).modules() if hasattr(m, "heads")]
    assert heads == [8] * 4 + [4] * 2  # two levels of two blocks, two layers
    big = settled(set_encoder(variables=41, width=64, depth=2, heads=8, hidden=128, points=16))
    stays = draw_sets((4, 9), variables=41, seed=1)
    for row, stay in zip(big(packed_sets(stays)), stays):
        assert near(row[: len(stay)], loop_stay(big, stay), 1e-5)


@torch.no_grad()
def test_models_seqset_classifier_is_the_head_on_the_mean_and_the_last_state():
    net, stays = settled(models.SeqSetClassifier(set_encoder(), layers=3, hidden=10)), draw_sets(STAY_LENGTHS)
    inputs, linear = packed_sets(stays), [layer for layer in net.head.modules() if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(32, 10), (10, 10), (10, 1)]
    logits = net(inputs)
    assert logits.shape == (5,) and logits.std() > 0.01
    for logit, features, stay in zip(logits, net.features(inputs), stays):
        hidden = loop_stay(net.encoder, stay)
        x = torch.cat([sum(hidden) / len(stay), hidden[len(stay) - 1]])
        assert near(features, x, 1e-5)
        for layer in linear:
            x = loop_linear(x, layer).relu() if layer is not linear[-1] else loop_linear(x, layer)
        assert near(logit, x[0], 1e-4)
    shallow = models.SeqSetClassifier(set_encoder(), layers=1)
    assert [type(layer) for layer in shallow.head] == [nn.Linear] and shallow.head[0].in_features == 32


@torch.no_grad()
def test_models_strongest_events_are_the_largest_of_each_channel_one_event_at_a_time():
    block, counts = lived_in(models.StrongestEvents(6, width=8, longest=100.0)), (4, 1, 9)
    events, minutes = torch.randn(14, 6), 100 * torch.rand(14)
    first, middle, _, last = block.embed
    with_time = torch.cat([events, minutes[:, None] / 100], 1)
    each = [loop_linear(F.gelu(loop_norm(loop_linear(x, first), middle)), last) for x in with_time]
    y = block(events, minutes, torch.tensor(counts))
    for row, end, count in zip(y, np.cumsum(counts), counts):
        largest = [max(float(x[channel]) for x in each[end - count : end]) for channel in range(8)]
        assert near(row, loop_norm(torch.tensor(largest), block.norm), 1e-5)
    order = torch.cat([torch.randperm(4), torch.tensor([4]), 5 + torch.randperm(9)])
    assert near(block(events[order], minutes[order], torch.tensor(counts)), y, 1e-6)
    assert (block(events, minutes.flip(0), torch.tensor(counts)) - y).abs().amax(1).min() > 1e-3  # when it came plays a role


@torch.no_grad()
def test_models_seqset_classifier_reads_the_strongest_events_beside_its_scaled_down_states():
    net, stays = settled(models.SeqSetClassifier(set_encoder(), events=True)), draw_sets(STAY_LENGTHS, largest=7)
    inputs = packed_sets(stays)
    unit, minutes = torch.eye(6), [torch.tensor([minute for minute, events in stay for _ in events]) for stay in stays]
    events = [torch.stack([torch.cat([x * unit[v], unit[v]]) for _, events in stay for v, x in events]) for stay in stays]
    strongest = torch.cat([net.strongest(each, when, torch.tensor([len(each)])) for each, when in zip(events, minutes)])
    logits = net.head(torch.cat([net.scale * net.features(inputs), strongest], 1)).squeeze(1)
    assert near(net(inputs), logits, 1e-5) and net.head[0][0].in_features == 48
    assert net.scale == 0.1 and net.strongest.longest == 2880
    net.scale = 1.0
    assert (net(inputs) - logits).abs().min() > 1e-4


@torch.no_grad()
def test_models_seqset_vae_equals_one_set_and_one_stay_at_a_time():
    net, stays = settled(models.SeqSetVAE(set_encoder(), seeds=14)), draw_sets(STAY_LENGTHS)
    encoder, decoder, output = net.encoder, net.decoder, net(packed_sets(stays))
    sets = [each for stay in stays for _, each in stay]
    encoded = torch.cat([loop_set(encoder, events) for events in sets])
    assert near(output["mu"], loop_linear(encoded, encoder.mu), 3e-5)
    assert near(output["logvar"], loop_linear(encoded, net.logvar), 1e-5)
    hidden, seen = torch.cat([loop_stay(encoder, stay) for stay in stays]), []
    for chunk in output["sets"]:
        for i, guess, target, mask in zip(chunk["sets"].tolist(), chunk["guess"], chunk["target"], chunk["mask"]):
            n, scale, shift = len(sets[i]), loop_linear(hidden[i], decoder.scale), loop_linear(hidden[i], decoder.shift)
            x = torch.stack([seed * (1 + scale) + shift for seed in decoder.seeds[:n]])
            expected = loop_linear(loop_norm(loop_block(decoder.block, x, x), decoder.out[0]), decoder.out[1])
            assert mask.tolist() == [True] * n + [False] * (len(mask) - n)
            assert near(guess[:n], expected, 3e-5), (guess[:n] - expected).abs().max()
            assert torch.equal(target[:n], loop_events(encoder, sets[i]))
            seen.append(i)
    assert sorted(seen) == list(range(63)) and output["mu"].std() > 0.1


def test_models_sets_by_size_reads_every_element_once_and_pads_to_the_largest_of_a_chunk():
    sizes = torch.tensor([5, 1, 3, 3, 8, 1, 2])
    for chunk, widths in ((1, [1, 1, 2, 3, 3, 5, 8]), (2, [1, 3, 5, 8]), (3, [2, 5, 8]), (7, [8]), (256, [8])):
        chunks = models.sets_by_size(sizes, chunk=chunk)
        assert [index.shape[1] for _, index, _ in chunks] == widths and max(len(sets) for sets, _, _ in chunks) <= chunk
        found = {int(i): index[row][mask[row]].tolist() for sets, index, mask in chunks for row, i in enumerate(sets)}
        assert found == {i: list(range(sum(sizes[:i]), sum(sizes[: i + 1]))) for i in range(7)}
        for sets, index, mask in chunks:  # padding repeats an element of the same set: nothing else can leak from it
            first = sizes.cumsum(0)[sets] - sizes[sets]
            assert torch.equal(mask.sum(1), sizes[sets]) and torch.equal(index.where(mask, first[:, None])[~mask], index[~mask])
    (sets, _, mask), (last, index, _) = models.sets_by_size(torch.tensor([1, 3, 1]), chunk=2)
    assert sets.tolist() == [0, 2] and mask.shape == (2, 1) and last.tolist() == [1] and index.tolist() == [[1, 2, 3]]


@torch.no_grad()
def test_models_seqset_is_blind_to_the_order_of_events_the_company_and_the_chunks():
    net, stays = settled(models.SeqSetVAE(set_encoder(), seeds=40)).double(), draw_sets(STAY_LENGTHS)
    encoder, whole = net.encoder, net.encoder(packed_doubles(stays))
    rng = np.random.default_rng(1)
    mixed = [[(minute, [events[i] for i in rng.permutation(len(events))]) for minute, events in stay] for stay in stays]
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
            models.sets_by_size = lambda sizes: original(sizes, chunk=chunk)
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
    for known in (1, 5, 11):
        for later in ([], far, far[:1], [(minute, other[i][1]) for i, (minute, _) in enumerate(stay)][known:]):
            changed = encoder(packed_doubles([stay[:known] + later]))[0]
            assert near(changed[:known], hidden[:known], 1e-10)
            if later and known < 11:
                assert (changed[known] - hidden[known]).abs().max() > 1e-2  # what came is known from there on
    earlier = encoder(packed_doubles([[(stay[0][0], other[0][1])] + stay[1:]]))[0]
    assert (earlier - hidden).abs().amax(1).min() > 1e-4  # every later state knows the first set
    guesses = lambda stay: {int(i): guess[row] for chunk in net(packed_doubles([stay]))["sets"] for guess in [chunk["guess"]]
                            for row, i in enumerate(chunk["sets"])}
    before, after = guesses(stay), guesses(stay[:5] + far)
    for i in range(5):
        n = len(stay[i][1])
        assert near(before[i][:n], after[i][:n], 1e-10)


def test_models_time_bias_is_the_formula_causal_and_learns():
    bias = models.TimeBias(3)
    start = bias(torch.tensor([[0.0, 60.0, 60.0], [7.0, 7.0, 0.0]]))  # the last minute of the second row: padding
    assert start.shape == (2, 3, 3, 3) and near(start[0, :, 1, 0], torch.tensor(-0.693147), 1e-5) and (start[0, :, 2, 1] == 0).all()
    minutes = torch.tensor([[0.0, 5.0, 65.0, 65.0, 900.0]])
    with torch.no_grad():
        bias.log_slope.copy_(torch.tensor([0.0, 0.5, -1.0])), bias.log_tau.copy_(torch.tensor([1.0, 3.0, 6.0]))
    table = bias(minutes)
    for h, i, j in itertools.product(range(3), range(5), range(5)):
        slope, tau = math.exp((0, 0.5, -1)[h]), math.exp((1, 3, 6)[h])
        expected = -slope * math.log(1 + float(minutes[0, i] - minutes[0, j]) / tau) if j <= i else -math.inf
        assert table[0, h, i, j] == expected or near(table[0, h, i, j], expected, 1e-5), (h, i, j)
    same = bias(torch.full((1, 4), 33.0))
    assert torch.equal(same, torch.zeros(1, 3, 4, 4).masked_fill(torch.ones(4, 4).triu(1) > 0, -math.inf))

    encoder, stays = settled(set_encoder()), draw_sets((12, 3))
    (encoder(packed_sets(stays)) * torch.randn(16)).sum().backward()
    for p in (encoder.time_bias.log_slope, encoder.time_bias.log_tau):
        assert p.shape == (4,) and (p.grad.abs() > 1e-6).all()
    nn.init.zeros_(encoder.gap.weight)  # what is left of time is the bias
    with torch.no_grad():
        hidden = encoder(packed_sets(stays))[0]
        apart = encoder(packed_sets([[(3 * minute, events) for minute, events in stays[0]]]))[0]
        moved = encoder(packed_sets([[(minute + 100, events) for minute, events in stays[0]]]))[0]
    assert near(apart[0], hidden[0], 1e-6) and (apart - hidden)[1:].abs().amax(1).min() > 1e-3
    assert near(moved, hidden, 1e-5)  # only spans of time matter to it


def test_models_induced_set_attention_is_equivariant_and_reads_no_padding():
    layer, x = lived_in(models.InducedSetAttention(12, heads=3, points=5)), torch.randn(3, 7, 12)
    order, mask = torch.randperm(7), torch.arange(7) < torch.tensor([3, 7, 1])[:, None]
    assert near(layer(x[:, order], mask[:, order]), layer(x, mask)[:, order], 1e-5)
    for row, n in enumerate((3, 7, 1)):
        h = loop_block(layer.gather, layer.points, x[row, :n])
        assert h.shape == (5, 12) and near(layer(x, mask)[row, :n], loop_block(layer.spread, x[row, :n], h), 1e-5)
    assert not near(layer(x, mask)[0], layer(x)[0], 1e-2)
    assert abs(models.InducedSetAttention(64, points=256).points.std() / 0.125 - 1) < 0.05


def test_models_seqset_dropout_has_its_rate_and_acts_in_training_only():
    net, inputs = models.SeqSetClassifier(set_encoder(dropout=0.25), layers=3, dropout=0.5), packed_sets(draw_sets((4, 9)))
    assert [m.p for m in net.encoder.modules() if isinstance(m, nn.Dropout)] == [0.25] * (1 + 2 * 3)
    assert [m.p for m in net.head.modules() if isinstance(m, nn.Dropout)] == [0.5, 0.5]
    assert [layer.dropout for layer in net.encoder.layers] == [0.25, 0.25]
    assert not torch.equal(net(inputs), net(inputs)) and torch.equal(net.eval()(inputs), net(inputs))
    encoder = set_encoder(dropout=0.25)
    encoder.layers.eval()  # what still drops is the sum of latent, position and time
    assert not torch.equal(encoder(inputs), encoder(inputs))
    layer = models.TransformerLayer(8, heads=2, hidden=16, dropout=0.5, qkv_bias=False)
    x, bias = torch.randn(1, 6, 8), torch.zeros(1, 2, 6, 6)
    for module in layer.modules():
        module.p = 0.0  # what still drops is the attention
    assert not torch.equal(layer(x, bias), layer(x, bias)) and torch.equal(layer.eval()(x, bias), layer(x, bias))


def test_models_seqset_vae_is_noisy_by_its_logvar_in_training_only():
    torch.manual_seed(0)
    net = models.SeqSetVAE(set_encoder(dropout=0.0), seeds=12)
    inputs, latents = packed_sets(draw_sets((40, 40, 40))), []
    original = net.encoder.sequence
    net.encoder.sequence = lambda latent, inputs: latents.append(latent) or original(latent, inputs)
    output = net(inputs)
    assert (output["logvar"] + 5).abs().max() < 2.5 and abs(output["logvar"].mean() + 5) < 0.3
    for shift in (0.0, 4.0):
        nn.init.constant_(net.logvar.bias, -5.0 + shift)
        output = net(inputs)
        noise = (latents[-1] - output["mu"]) / (output["logvar"] / 2).exp()
        assert abs(noise.std() - 1) < 0.05 and abs(noise.mean()) < 0.05  # 1,920 draws
        rows = (noise - noise.mean(0)) / noise.std(0)
        assert (rows.T @ rows / len(rows) - torch.eye(16)).abs().max() < 0.5 and (noise[1:] * noise[:-1]).mean().abs() < 0.1
    assert not torch.equal(net(inputs)["sets"][0]["guess"], net(inputs)["sets"][0]["guess"])
    net.eval()
    assert torch.equal(net(inputs)["sets"][0]["guess"], net(inputs)["sets"][0]["guess"]) and torch.equal(latents[-1], net(inputs)["mu"])
    classifier = models.SeqSetClassifier(net.encoder, dropout=0.0).train()  # takes mu also in training
    assert torch.equal(classifier(inputs), classifier(inputs)) and torch.equal(latents[-1], output["mu"])


def test_models_seqset_refuses_what_does_not_fit():
    for width, heads, set_heads in ((18, 4, 2), (16, 4, 3), (16, 3, 2)):
        wrong = heads if width % heads else set_heads
        raises(ValueError, f"heads must divide channels, got {wrong} heads for {width} channels",
               lambda: set_encoder(width=width, heads=heads, set_heads=set_heads))
    raises(ValueError, "channels must be even, got 15", lambda: set_encoder(width=15, heads=3, set_heads=3))
    for layer in (models.AttentionBlock, models.TransformerLayer):
        raises(ValueError, "heads must divide channels, got 5 heads for 16 channels", lambda: layer(16, heads=5, hidden=8))
    decoder = models.SetDecoder(6, width=8, seeds=5)
    assert decoder(torch.zeros(2, 8), torch.ones(2, 5, dtype=torch.bool)).shape == (2, 5, 6)
    message = "a set of 6 elements needs as many seeds, there are 5: build it with more"
    raises(ValueError, message, lambda: decoder(torch.zeros(2, 8), torch.ones(2, 6, dtype=torch.bool)))
    raises(ValueError, "a set of 12 elements needs as many seeds, there are 11",
           lambda: models.SeqSetVAE(set_encoder(), seeds=11)(packed_sets(draw_sets((3,)))))


def test_models_set_decoder_starts_near_zero_and_reads_the_set_only_through_the_vector_and_its_size():
    torch.manual_seed(0)
    decoder = models.SetDecoder(82, width=64, seeds=40)
    assert abs(decoder.out[1].weight.std() / 0.02 - 1) < 0.05 and abs(decoder.seeds.std() - 1) < 0.05
    assert decoder.block.heads == 2 and models.SetDecoder(6, width=8, seeds=2, heads=4).block.heads == 4
    decoder = lived_in(models.SetDecoder(12, width=16, seeds=9))
    y, mask = torch.randn(3, 16), torch.arange(9) < torch.tensor([2, 9, 5])[:, None]
    guess = decoder(y, mask)
    for row, n in enumerate((2, 9, 5)):
        alone = decoder(y[row : row + 1], torch.ones(1, n, dtype=torch.bool))[0]
        assert near(guess[row, :n], alone, 1e-6) and (alone[1:] - alone[:1]).abs().amax(1).min() > 1e-2  # all differ
    swapped = decoder(y.flip(0), mask)
    assert near(swapped[1], guess[1], 1e-5) and not near(swapped[0, :2], guess[0, :2], 1e-3)


def test_models_seqset_targets_are_the_events_and_no_parameter_moves_them():
    net, stays = models.SeqSetVAE(set_encoder(), seeds=12), draw_sets((5, 9))
    stays[0][2] = (stays[0][2][0], [(3, 0.0), (1, -2.0), (3, 0.0)])
    inputs = packed_sets(stays)
    events = net.encoder.events(inputs)
    assert torch.equal(events[:, 6:].argmax(1), inputs["variables"]) and (events[:, 6:].sum(1) == 1).all()
    assert torch.equal(events[:, :6], inputs["values"][:, None] * events[:, 6:])
    place = int(inputs["sizes"][:2].sum())
    assert events[place].tolist() == [0.0] * 9 + [1.0, 0, 0] and events[place + 1].tolist() == [0, -2.0, 0, 0, 0, 0, 0, 1.0, 0, 0, 0, 0]
    targets = [chunk["target"] for chunk in net(inputs)["sets"]]
    assert not events.requires_grad and not any(target.requires_grad for target in targets)
    others = [chunk["target"] for chunk in settled(net)(inputs)["sets"]]
    assert all(map(torch.equal, targets, others))
    zero, other = ([[(0, [(variable, 0.0)])]] for variable in (3, 1))
    assert (net.encoder(packed_sets(zero)) - net.encoder(packed_sets(other))).abs().max() > 1e-2  # a value of 0 keeps its variable
    again = models.SeqSetVAE(set_encoder(), seeds=12)
    assert len(again.state_dict()) == len(dict(again.named_parameters()))  # no buffer either


def test_models_log_time_buckets_are_even_in_the_logarithm_and_rise():
    assert models.log_time_buckets(torch.tensor([0.0, 1, 60, 1440, 2880])).tolist() == [0, 5, 33, 58, 63]
    assert models.log_time_buckets(torch.tensor([-5.0, 2879.0, 1e9])).tolist() == [0, 63, 63]
    spans = torch.arange(0, 2881, dtype=torch.float32)
    for buckets, longest in ((64, 2880.0), (16, 600.0)):
        found = models.log_time_buckets(spans, buckets=buckets, longest=longest)
        assert (found.diff() >= 0).all() and found[0] == 0 and found[-1] == buckets - 1 and found.dtype == torch.int64
        bounds = [math.expm1(math.log1p(longest) * k / buckets) for k in range(1, buckets)]
        expected = [sum(span >= bound for bound in bounds) for span in spans.tolist()]
        assert found.tolist() == expected
    assert models.log_time_buckets(torch.zeros(2, 3)).shape == (2, 3)
    assert set_encoder(buckets=16).gap.num_embeddings == 16
    set_encoder(buckets=16)(packed_sets(draw_sets((9,))))  # long spans stay inside a smaller table


def test_models_seqset_networks_run_forward_and_backward_under_bf16_autocast():
    inputs = packed_sets(draw_sets(STAY_LENGTHS))
    vae, classifier = models.SeqSetVAE(set_encoder(dropout=0.0), seeds=12), models.SeqSetClassifier(set_encoder(), dropout=0.0, events=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = vae(inputs)
        recon = torch.cat([losses.chamfer(c["guess"], c["target"], x_mask=c["mask"], y_mask=c["mask"]) for c in output["sets"]])
        kl = losses.kl_to_standard_normal(output["mu"], output["logvar"]).mean()
        logits = classifier(inputs)
    assert output["sets"][0]["guess"].dtype == torch.bfloat16
    (recon.mean() + 0.01 * kl).backward(), logits.float().square().sum().backward()
    for model in (vae, classifier):
        assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in model.parameters())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = settled(classifier)(inputs)
    assert half.isfinite().all() and (half - classifier(inputs)).abs().max() < 0.1 * classifier(inputs).abs().max()


def test_models_load_backbone_moves_the_encoder_of_a_seqset_vae_into_a_classifier_or_refuses():
    source, target = models.SeqSetVAE(set_encoder(), seeds=12), models.SeqSetClassifier(set_encoder())
    state, inputs = settled(source).state_dict(), packed_sets(draw_sets((4, 9)))
    tensors = len(target.encoder.state_dict())
    report = models.load_backbone(target.encoder, state)
    assert report == {"tensors": tensors, "scalars": models.count_parameters(target.encoder), "missing": 0, "unexpected": 0,
                      "left_out": [name for name in state if name.startswith(("logvar.", "decoder."))]}
    assert tensors + len(report["left_out"]) == len(state)
    assert torch.equal(target.eval().encoder(inputs), source.encoder(inputs))
    before = copy.deepcopy(target.state_dict())
    for name in ("time_bias.log_tau", "gap.weight", "layers.1.qkv.weight", "sets.levels.0.points"):
        lacking = {key: value for key, value in state.items() if key != f"encoder.{name}"}
        raises(ValueError, f"{tensors - 1} of {tensors} tensors fit under 'encoder.': missing 1 ({name})",
               lambda: models.load_backbone(target.encoder, lacking))
        assert same_bits(before, target.state_dict())
    models.freeze_backbone(target.encoder, unfreeze_last=1)
    trained = [name for name, p in target.named_parameters() if p.requires_grad and not name.startswith("head.")]
    assert {name.split(".")[1] for name in trained} == {"layers", "norm"} and not any("layers.0." in name for name in trained)
