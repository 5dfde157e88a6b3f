"""Tests of bidmc and of its networks."""

import contextlib
import copy
import csv
import functools
import io
import math
import signal
import subprocess
import sys
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import models
import train
from runtime import looks
from tasks import bidmc
from tasks import bidmc_data
from tasks import bidmc_pretrain
from tests.helpers import (
    HERE, NEVER, PPG, call, edit, folder, loaded, near, ppg_folder, ppg_run, prepared, raises,
    read_scores, replaced, result_of, same_bits, scores_of, seeded, signals_of, small_encoder,
    succeeded, write_bidmc)

refuses = functools.partial(raises, ValueError)


def prepared_ppg(*words):
    """A run just before training, its splits and its folder; nothing is printed."""
    with contextlib.redirect_stdout(io.StringIO()):
        return train.prepare(train.parse_args([*PPG, *map(str, words)]))


def test_models_ppg_encoder_is_patches_linear_positions_layers_norm():
    encoder, x = small_encoder().eval(), signals_of(2, length=27)  # six patches and a rest
    patches = x[:, :, :24].unflatten(2, (6, 4)).transpose(1, 2).flatten(2)
    tokens = encoder.embed(patches) + models.sinusoidal_positions(6, 16)
    for layer in encoder.layers:
        tokens = layer(tokens)
    expected = F.layer_norm(tokens, (16,), encoder.norm.weight, encoder.norm.bias)
    assert near(encoder(x), expected, 1e-5)
    assert not near(encoder(x)[:, :1], encoder(x.flip(-1))[:, -1:], 1e-2)  # the place of a patch
    for bad in (torch.zeros(2, 24), torch.zeros(2, 1, 24), torch.zeros(2, 3, 3)):
        message = f"signals must be (B, 3, at least 4), got {tuple(bad.shape)}"
        refuses(message, lambda: encoder(bad))
    refuses("channels must be even", lambda: small_encoder(width=15, heads=3))
    refuses("heads must divide channels", lambda: small_encoder(width=18))


def test_models_ppg_regressor_is_a_linear_head_on_the_mean_token():
    model, x = models.PPGRegressor(small_encoder()).eval(), signals_of(3)
    assert torch.equal(model.features(x), model.encoder(x).mean(1))
    assert near(model(x), model.encoder(x).mean(1) @ model.head.weight[0] + model.head.bias, 1e-6)
    assert near(model(x)[1], model(x[1:2])[0], 1e-6)  # whatever else is in the batch


def test_models_masked_patch_model_does_not_see_what_is_hidden():
    model, x = models.MaskedPatchModel(small_encoder()).eval(), signals_of(2)
    mask = torch.tensor([[1, 0, 0, 1, 0, 0], [0, 1, 1, 1, 0, 0]]).bool()
    other = x.clone()
    other.view(2, 3, 6, 4)[mask[:, None].expand(2, 3, 6)] = 100.0
    assert torch.equal(model(x, mask), model(other, mask))
    assert not near(model(x, ~mask), model(other, ~mask), 1e-5)
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
    for ratio, hidden in ((0.01, 1), (0.99, 9)):
        assert (models.random_patch_mask(5, 10, ratio).sum(1) == hidden).all()
    refuses("at least 2 patches", lambda: models.random_patch_mask(5, 1, 0.5))
    refuses("a ratio between 0 and 1", lambda: models.random_patch_mask(5, 4, 1.0))


def test_models_load_backbone_takes_the_whole_encoder_or_nothing():
    source, target = models.MaskedPatchModel(small_encoder()), models.PPGRegressor(small_encoder())
    for p in source.encoder.parameters():
        nn.init.normal_(p)
    state = source.state_dict()
    assert models.load_backbone(target.encoder, state) == {
        "tensors": 28, "scalars": models.count_parameters(target.encoder),
        "missing": 0, "unexpected": 0, "left_out": ["mask_token", "decoder.weight", "decoder.bias"]}
    for name, value in target.encoder.state_dict().items():
        assert torch.equal(value, state[f"encoder.{name}"])
    before = copy.deepcopy(target.state_dict())
    lacking = {name: value for name, value in state.items() if name != "encoder.layers.1.qkv.bias"}
    extra = state | {"encoder.extra": torch.zeros(1)}
    wider = models.MaskedPatchModel(small_encoder(width=32)).state_dict()
    shallow = models.MaskedPatchModel(small_encoder(depth=1)).state_dict()
    fit = "tensors fit under 'encoder.'"
    for damaged, message in (
            (lacking, f"27 of 28 {fit}: missing 1 (layers.1.qkv.bias)"),
            (extra, f"28 of 28 {fit}: unexpected 1 (extra)"),
            (wider, "of another shape 28 (embed.weight is (32, 12) there and (16, 12) here"),
            (shallow, "missing 12 (layers.1.attention_norm.bias"),
            ({}, "0 of 28 tensors fit")):
        refuses(message, lambda: models.load_backbone(target.encoder, damaged))
        assert same_bits(before, target.state_dict())
    refuses("there is nothing to load", lambda: models.load_backbone(nn.Identity(), {}))


def test_models_frozen_backbone_has_no_dropout_and_no_gradient_in_training():
    model = models.PPGRegressor(small_encoder(dropout=0.5))
    models.freeze_backbone(model.encoder)
    models.train_mode(model)
    assert model.training and model.head.training
    assert not any(module.training for module in model.encoder.modules())
    assert torch.equal(model.features(signals_of(4)), model.features(signals_of(4)))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == ["head.weight", "head.bias"]
    models.freeze_backbone(model.encoder, unfreeze_last=1)
    models.train_mode(model)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    trained = {name.rpartition(".")[0].removeprefix("encoder.") for name in trained}
    assert {name.split(".")[0] for name in trained} == {"layers", "norm", "head"}
    assert "layers.1.qkv" in trained and "layers.0.qkv" not in trained
    first, last = model.encoder.layers
    assert last.mlp[2].training and not first.mlp[2].training
    for bad in (-1, 3):
        refuses(f"unfreeze_last {bad} must be between 0 and 2",
                lambda: models.freeze_backbone(model.encoder, unfreeze_last=bad))
    norm = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
    norm[0].requires_grad_(False)
    models.train_mode(norm)
    norm(torch.randn(8, 4))
    assert norm[0].num_batches_tracked == 0 and norm[1].training


def test_train_frozen_parameters_stay_bit_equal():
    with folder() as f:
        _, splits, run = prepared(f, "--weight-decay", "0.5")
        for p in run.raw_model.stem.parameters():
            p.requires_grad_(False)
        run.parameters = [p for p in run.raw_model.parameters() if p.requires_grad]
        before = [p.clone() for p in run.raw_model.parameters()]
        train.train_epoch(run, splits.train, 1, NEVER)
        frozen = len(list(run.raw_model.stem.parameters()))
        equal = [torch.equal(a, b) for a, b in zip(before, run.raw_model.parameters())]
        assert equal == [True] * frozen + [False] * (len(before) - frozen)


def test_train_ppg_scores_stand_between_constants_and_ceilings_in_the_unit_of_the_labels():
    with folder() as f:
        a, words = f / "a", ["--seed", "3", "--data", ppg_folder(f)]
        out = ppg_run(a, "--epochs", "3", *words)
        scores, best = read_scores(a)["test"], result_of(a, "best.pt")
        _, sets = loaded(*PPG, *words)
        recordings = bidmc_data.read_bidmc(f / "bidmc")
        windows = bidmc_data.bidmc_windows(recordings, rate="hr", seconds=10)
        succeeded("--task", "bidmc_hr", "--predict", a / "best.pt", "--data", f / "bidmc",
                  "--out", f / "p.csv")
        with open(f / "p.csv") as file:
            rows = list(csv.DictReader(file))
    test, labels, model = sets.test, sets.train.labels, scores["model"]
    monitor, strong = "PULSE, the monitor's own rate", "strong: beat intervals"
    floors = ["constant mean", "constant median", "spectral peak", strong, "median of three",
              monitor]
    assert list(scores) == ["rows", "model", *floors]
    assert list(model) == ["loss", "mae", "rmse", "r2", "patient_mae", "patient_sd"]
    scaler = {"mean": float(labels.mean()), "scale": float(labels.std())}  # in float64
    assert best["facts"]["scaler"] == scaler
    assert best["facts"]["median"] == np.median(labels) != np.median(windows["labels"])
    for name, value in (("constant mean", labels.mean()), ("constant median", np.median(labels))):
        errors = value - test.labels
        assert math.isclose(scores[name]["mae"], np.abs(errors).mean()), name
        assert math.isclose(scores[name]["rmse"], math.sqrt(np.square(errors).mean())), name
    beats = data.upslope_rate(test.signals(np.arange(len(test))), 31.25).double().numpy()
    assert not np.isnan(beats).any()
    errors = beats - test.labels
    assert near(scores[strong]["mae"], np.abs(errors).mean(), 1e-5)
    assert near(scores[strong]["rmse"], math.sqrt(np.square(errors).mean()), 1e-5)
    slope = data.spectral_rate(test.signals(np.arange(len(test))).diff(dim=1), 31.25, (0.75, 2.5))
    peak = data.spectral_rate(test.signals(np.arange(len(test))), 31.25, (0.75, 2.5))
    middle = np.median([beats, slope, peak], axis=0)
    assert near(scores["median of three"]["mae"], np.abs(middle - test.labels).mean(), 1e-5)
    assert math.isclose(scores[monitor]["mae"], np.abs(test.second_reading - test.labels).mean())
    rates = {}
    for row in rows:
        rates[int(row["recording"]), float(row["start_s"])] = float(row["beats_per_minute"])
    numbers, starts = windows["recording"] + 1, windows["starts"]
    errors = np.array([rates[numbers[row], starts[row]] for row in test.rows]) - test.labels
    assert near(model["mae"], np.abs(errors).mean(), 1e-3)
    assert near(model["rmse"], math.sqrt(np.square(errors).mean()), 1e-3)
    groups = np.unique(test.groups)
    by_patient = [np.abs(errors[test.groups == patient]).mean() for patient in groups]
    assert near(model["patient_mae"], np.mean(by_patient), 1e-3)
    for text in ("10 recordings of 8 patients", "none on two sides"):
        assert text in out
    assert "SYNTHETIC" not in out and out.count("constant median") == 3


def test_train_breaths_strong_floor_is_a_ridge_on_the_log_spectra_of_training_windows():
    with folder() as f:
        ppg = ["--task", "bidmc_rr", "--seconds", "20", "--data", ppg_folder(f), "--device", "cpu"]
        args, sets = loaded(*ppg)
        _, waveform = loaded(*ppg, "--inputs", "waveform")
        pretraining = loaded(*ppg, "--mode", "pretrain")[1]
    assert "strong" not in pretraining.facts and waveform.facts["strong"] == sets.facts["strong"]
    x = [split.batch(np.arange(len(split)))["inputs"].flatten(1).double().numpy()
         for split in (sets.train, sets.test)]
    mean, sd, labels = x[0].mean(0), x[0].std(0), sets.train.labels
    penalty = 192 * 20 / 4  # columns, times the windows that share a second
    penalty_rows = [math.sqrt(penalty) * np.eye(192), np.zeros((192, 1))]
    rows = np.block([[(x[0] - mean) / sd, np.ones((len(labels), 1))], penalty_rows])
    w = np.linalg.lstsq(rows, np.append(labels, np.zeros(192)), rcond=None)[0]
    errors = (x[1] - mean) / sd @ w[:-1] + w[-1] - sets.test.labels
    task = train.task_of(args)
    floors = task.floors(sets.test, args, sets.facts)
    floors = train.scored_floors(floors, task, sets.test, args, sets.facts)
    strong = floors["strong: ridge on log spectra"]
    assert near(strong["mae"], np.abs(errors).mean(), 1e-5)
    assert near(strong["rmse"], math.sqrt(np.square(errors).mean()), 1e-5)


def test_train_ppg_splits_keep_patients_apart_and_folds_test_each_of_them_once():
    with folder() as f:
        seen = []
        for fold in (1, 2, 3):
            _, sets = loaded(*PPG, "--data", ppg_folder(f), "--folds", "3", "--fold", fold)
            groups = [set(split.groups) for split in (sets.train, sets.validation, sets.test)]
            assert sum(map(len, groups)) == len(set().union(*groups)) == 8
            assert not set(sets.facts["seen"]) & set(sets.facts["held_out"])
            seen += groups[2]
        assert len(seen) == len(set(seen)) == 8
        words = ["--mode", "pretrain", "--data", f / "bidmc", "--folds", "3", "--fold", "3"]
        _, pretraining = loaded(*PPG, *words)
        assert pretraining.facts["seen"] == sets.facts["seen"]
        assert "scaler" not in pretraining.facts and np.isnan(pretraining.train.labels).all()
        assert "targets" not in pretraining.train.batch(np.arange(2))


def test_train_modes_start_from_the_pretrained_encoder_and_train_what_they_say():
    with folder() as f:
        out = ppg_run(f / "pre", "--mode", "pretrain")
        assert "interpolation" in out and "constant shape" in out and "PULSE" not in out
        content = result_of(f / "pre", "best.pt")["model"].items()
        source = {name: value for name, value in content if name.startswith("encoder.")}
        scalars = sum(value.numel() for value in source.values())
        for mode, words, moved in (
                ("probe", "--debug", ()),
                ("partial", "--unfreeze-last 1 --backbone-lr 2e-4", ("layers.1.", "norm.")),
                ("finetune", "--backbone-lr 2e-4", ("embed.", "layers.0.", "layers.1.", "norm."))):
            pretrained = ["--pretrained", f / "pre" / "best.pt"]
            out = ppg_run(f / mode, "--mode", mode, *pretrained, *words.split())
            assert f"encoder: 28 tensors, {scalars:,} scalars loaded" in out
            assert "0 missing, 0 unexpected; left there: mask_token, decoder.weight" in out
            assert ("17 trained" in out) == ("| output (" in out) == (mode == "probe")
            last = result_of(f / mode)
            for name, value in source.items():
                expected = name.removeprefix("encoder.").startswith(moved)
                assert torch.equal(last["model"][name], value) != expected, (mode, name)
                if not expected:
                    assert torch.equal(last["ema"]["module"][name], value)
            rates = last["schedule"]["base_lrs"]
            assert rates == ([1e-3] if mode == "probe" else [1e-3, 2e-4]), (mode, rates)


def test_train_masked_scores_and_floors_equal_a_slow_version_on_hidden_patches_only():
    with folder() as f:
        words = [*PPG, "--mode", "pretrain", "--mask-ratio", "0.25", "--data", ppg_folder(f)]
        args, splits = loaded(*words)
        split, facts = splits.test, splits.facts

        class Zero(nn.Module):  # guesses 7 for visible patches, 0 for hidden ones
            encoder = small_encoder(channels=3)

            def forward(self, signals, mask):
                return 7.0 * (~mask)[..., None].expand_as(self.encoder.patches(signals))

        batch = split.batch(np.arange(len(split)))
        inputs, mask = batch["inputs"], batch["mask"]
        assert (mask.sum(1) == 1).all()  # a quarter of 4 patches
        _, again = loaded(*words)
        parts = np.array_split(np.arange(len(split)), 5)
        assert torch.equal(mask, torch.cat([again.test.batch(rows)["mask"] for rows in parts]))
        targets, mean, line, shape = [], [], [], []
        for window, hidden in zip(inputs.numpy().astype(float), mask):
            i = int(hidden.nonzero()) * 4
            seen = np.delete(np.arange(16), range(i, i + 4))
            for channel, signal in enumerate(window):
                targets += list(signal[i : i + 4])
                mean += [np.mean(signal[seen])] * 4
                line += [np.interp(j, seen, signal[seen]) for j in range(i, i + 4)]
                shape += [float(inputs[:, channel, j].double().mean()) for j in range(i, i + 4)]
        targets = np.array(targets)
        rows = {"model": scores_of(Zero(), split, args, facts)}
        rows |= bidmc_pretrain.floors(split, args, facts)
        for name, guess in (("model", 0), ("constant mean", mean), ("interpolation", line),
                            ("constant shape", shape)):
            errors = guess - targets
            assert near(rows[name]["mae"], np.abs(errors).mean(), 1e-4), name
            assert near(rows[name]["loss"], np.square(errors).mean(), 1e-4), name
        torch.manual_seed(0)
        loss, _ = bidmc_pretrain.loss(Zero(), batch, args, facts)
        torch.manual_seed(0)
        drawn = models.random_patch_mask(len(split), 4, 0.25)
        expected = Zero.encoder.patches(batch["inputs"])[drawn].square().mean()
        assert math.isclose(float(loss), float(expected), rel_tol=1e-5)


def test_train_loss_of_the_regressor_is_what_the_flag_says():
    with folder() as f:
        for name, oracle in (("mse", F.mse_loss), ("smooth_l1", F.smooth_l1_loss),
                             ("l1", F.l1_loss)):
            args, splits = loaded(*PPG, "--loss", name, "--anchor", "none", "--data", ppg_folder(f))
            model = bidmc.network(args, splits.facts).eval()
            batch = splits.train.batch(np.arange(30))
            got, _ = bidmc.loss(model, batch, args, splits.facts)
            assert torch.equal(got, oracle(model(batch["inputs"]), batch["targets"]))


def test_train_heart_rate_is_that_of_the_beats_corrected_by_eight_at_most():
    with folder() as f:
        args, splits = loaded(*PPG, "--data", ppg_folder(f))
        split, facts, rows = splits.train, splits.facts, np.arange(30)
        model = bidmc.network(args, facts).eval()
        beats = data.upslope_rate(split.signals(rows), bidmc.hz_of(args)).double()
        beats = torch.nan_to_num(beats, nan=facts["median"])
        for bias, correction in ((0.0, 0.0), (1e6, 8.0), (-1e6, -8.0), (0.01, 0.01)):
            torch.nn.init.zeros_(model.head.weight)
            torch.nn.init.constant_(model.head.bias, bias)
            if abs(bias) < 1:
                correction *= facts["scaler"]["scale"]  # small outputs are z-scores
            with torch.no_grad():
                got = bidmc.outputs(model, split.batch(rows), args, facts)
            assert near(bidmc.rates(got, facts), beats + correction, 1e-3), bias
        stretched = split.batch(rows, seeded())  # the anchor is that of the stretched window
        assert not near(stretched["anchor"], split.batch(rows)["anchor"], 1e-2)


def test_train_frozen_layers_have_no_dropout_in_the_loop():
    with folder() as f:
        ppg_run(f / "pre", "--mode", "pretrain", "--epochs", "1")
        run, splits, _ = prepared_ppg(
            "--mode", "partial", "--pretrained", f / "pre", "--dropout", "0.5",
            "--data", f / "bidmc", "--out", f / "new")
        (first, last), seen = run.raw_model.encoder.layers, []

        def record(*_):
            seen.append((first.training, first.mlp[2].training, last.mlp[2].training))

        first.register_forward_hook(record)
        train.train_epoch(run, splits.train, 1, NEVER)
        assert set(seen) == {(False, False, True)}, seen
        seen.clear()
        with contextlib.redirect_stdout(io.StringIO()):
            looks.find_lr(run, splits)
        assert set(seen) == {(False, False, True)}, seen


def test_train_probe_on_cached_features_scores_what_the_whole_network_scores():
    with folder() as f:
        ppg_run(f / "pre", "--mode", "pretrain")
        probe = ["--mode", "probe", "--pretrained", f / "pre"]
        ppg_run(f / "probe", *probe, "--lr", "0.03")
        values = [f"{value:.4f}" for value in read_scores(f / "probe")["test"]["model"].values()]
        evaluate = ["--eval", f / "probe" / "best.pt", "--split", "test"]  # without features
        out = succeeded("--task", "bidmc_hr", *evaluate)
        [line] = [line for line in out.splitlines() if line.startswith("model")]
        assert line.split()[1:] == values, out
        run, splits, _ = prepared_ppg(*probe, "--data", f / "bidmc", "--out", f / "new")
        split = splits.train
        features = split.features.clone()
        assert not features.requires_grad and features.shape == (len(split), 16)
        split.features = None
        whole = run.raw_model.features(split.batch(np.arange(len(split)))["inputs"])
        assert near(whole, features, 1e-5)


def test_train_scratch_learns_the_heart_rate_of_synthetic_recordings():
    with folder() as f:
        recordings = bidmc_data.synthetic_ppg(20, seconds=120)
        words = ("--seconds 16 --bins 48 --epochs 12 --lr 3e-3 --batch-size 32 --width 32 "
                 "--device cpu").split()
        with replaced(bidmc_data, "synthetic_ppg", lambda *_, **__: recordings):
            out = succeeded("--task", "bidmc_hr", *words, "--out", f / "a")
        assert "SYNTHETIC recordings, drawn by the script" in out
        scores = read_scores(f / "a")["test"]
    assert scores["model"]["mae"] < 0.4 * scores["constant median"]["mae"], scores
    assert scores["model"]["r2"] > 0.5, scores


def test_train_ppg_resumed_run_equals_straight_run_bit_for_bit():
    """Killed with SIGKILL in the middle of an epoch; the file of the encoder is gone."""
    with folder() as f:
        ppg_run(f / "pre", "--mode", "pretrain")
        for mode, words in (
                ("finetune", "--schedule plateau --plateau-patience 0 --warmup-epochs 1.5"),
                ("pretrain", ""), ("probe", "--accumulate 2")):
            straight, killed, copy = f / f"{mode}-straight", f / f"{mode}-killed", f / "copy.pt"
            words = ["--epochs", "6", "--batch-size", "8", "--mode", mode, *words.split()]
            words += ["--data", f / "bidmc"]
            if mode != "pretrain":
                copy.write_bytes((f / "pre" / "best.pt").read_bytes())
                words += ["--pretrained", copy]
            ppg_run(straight, *words)
            command = [sys.executable, HERE / "train.py", *PPG, *words, "--out", killed]
            process = subprocess.Popen(map(str, command), stdout=subprocess.PIPE, text=True)
            for line in process.stdout:
                if line.startswith("epoch   2/"):
                    time.sleep(0.02)
                    process.kill()
            process.wait()
            copy.unlink(missing_ok=True)
            assert process.returncode == -signal.SIGKILL and len(result_of(killed)["history"]) < 7
            succeeded("--task", "bidmc_hr", "--out", killed, "--resume")
            for name in ("last.pt", "best.pt"):
                assert same_bits(result_of(straight, name), result_of(killed, name)), (mode, name)
            assert (straight / "scores.json").read_text() == (killed / "scores.json").read_text()


def ppg_refuses(f, cases):
    """Each {words: message} ends with code 2 and that message, once, and changes no file."""
    def state():
        files = [*(f / "run").glob("*"), *(f / "pre").glob("*")]
        return {file: file.read_bytes() for file in files}

    before = state()
    for text, message in cases.items():
        words = text.split()
        base = ["--task", "bidmc_hr"] if {"--predict", "--resume", "original"} & {*words} else PPG
        if not {"--predict", "--resume"} & {*words}:
            words += [] if "--out" in words else ["--out", f / "new"]
            words += [] if "--data" in text else ["--data", f / "bidmc"]
        code, _, err = call(*base, *words)
        assert code == 2 and message in err and err.count("error:") == 1, (message, code, err)
        assert not (f / "new").exists() and state() == before, message


def damaged(f, name, file, change):
    """--data with a copy of the recordings in which one file is changed, or gone."""
    path = f / name
    path.mkdir(parents=True)
    for source in ppg_folder(f).iterdir():
        (path / source.name).write_bytes(source.read_bytes())
    edit(path / file, change) if change else (path / file).unlink()
    return f"--data {path}"


def test_train_ppg_refuses_bad_data_with_exit_code_2_and_one_message():
    with folder() as f:
        ppg_run(f / "pre", "--mode", "pretrain", "--epochs", "1")
        ppg_run(f / "run", "--epochs", "1")
        _, splits = loaded(*PPG, "--data", f / "bidmc")
        [validation] = set(splits.validation.groups)
        constant, quiet = (bidmc_data.synthetic_ppg(10, seconds=90) for _ in range(2))
        for one, other in zip(constant, quiet):
            one["hr"][:] = 80
            other["hr"][:] = 80 if other["patient"] == validation else other["hr"]
        constant = write_bidmc(f / "constant", constant, columns=("PLETH",))
        quiet = write_bidmc(f / "quiet", quiet, columns=("PLETH",))
        signals, numerics = "bidmc_04_Signals.csv", "bidmc_04_Numerics.csv"

        def without_column(text):
            return text.replace(" HR", " XX")

        def all_nan(text):
            header, *rows = text.splitlines()
            return "\n".join([header] + ["NaN"] * len(rows))

        def first_half(text):
            return "".join(text.splitlines(keepends=True)[: text.count("\n") // 2])

        def other_values(text):
            return text.replace("0.5", "0.6")

        ppg_refuses(f, {
            damaged(f, "a", numerics, None): f"{numerics} is missing",
            damaged(f, "b", signals, first_half):
                "the signals last 45.0 s, the numerics 90.0 s: one of the two files is cut off",
            damaged(f, "c", numerics, without_column): "no column 'HR'",
            damaged(f, "d", signals, all_nan): "PLETH holds 11251 NaN in 11251 rows",
            f"--data {constant}": "training labels are 80: there is nothing to learn",
            f"--monitor r2 --data {quiet}": "--monitor r2 is not defined on the 42 validation rows",
            f"--data {f / 'pre'}": "holds no bidmc_NN_Signals.csv",
            damaged(f, "e", signals, other_values) + f" --out {f / 'run'} --resume":
                "differ in data",
        })


def test_train_ppg_refuses_bad_calls_with_exit_code_2_and_one_message():
    with folder() as f:
        ppg_run(f / "pre", "--mode", "pretrain", "--epochs", "1")
        ppg_run(f / "run", "--epochs", "1")
        pre, run = f"--pretrained {f / 'pre'}", f"--out {f / 'run'}"
        ppg_refuses(f, {
            f"--mode probe {pre} --width 32": "the encoder in",
            f"--mode finetune {pre} --width 32": "--width 32: the encoder in",
            f"--mode finetune {pre} --reduce 2": "--reduce 2: the encoder in",
            f"--mode probe {pre} --seed 1": "of the cases that this run holds out",
            f"--mode probe {pre}/best.pt --folds 3 --fold 1":
                "of the cases that this run holds out",
            "--mode partial": "starts from an encoder: give --pretrained",
            f"--mode probe --pretrained {f / 'nowhere.pt'}": "does not exist",
            pre: "--pretrained is read only with --mode probe or finetune or partial, "
                 "not with scratch",
            f"--mode probe {pre} --dropout 0.3": "--dropout is read only with --mode",
            f"--mode probe {pre} --compile": "--compile is read only with --mode",
            "--variant original --folds 3": "--folds is read only with --protocol patients",
            "--variant original": "needs BIDMC's own recordings, 11, 19",
            "--variant original --mode pretrain": "needs BIDMC's own recordings, 11, 19",
            f"--mode probe --pretrained {f / 'run'}": "whose encoder has seen labels",
            f"--mode probe {pre}/last.pt": "holds no 'epoch'",
            f"--mode probe {pre} --out {f / 'pre'} --overwrite":
                "--overwrite would delete the encoder",
            f"--mode probe {pre} --folds 3": "fold-1/best.pt does not exist",
            f"--folds 3 {run}": "holds a run without --folds",
            f"--folds 3 {run} --overwrite": "holds a run without --folds",
            f"--mode probe {pre} --stretch 1.1": "--stretch is read only with --mode",
            f"--mode probe {pre} --backbone-lr 1":
                "--backbone-lr is read only with --mode finetune or partial",
            f"--mode partial {pre} --unfreeze-last 3": "unfreeze_last 3 must be between 0 and 2",
            "--mode partial --unfreeze-last 0":
                "--unfreeze-last 0 must be finite and at least 1",
            "--sampler stratified": "unrecognized arguments: --sampler",
            "--channels-last": "unrecognized arguments: --channels-last",
            "--patch 9": "--patch 9 must be at most 8",
            "--heads 3": "heads must divide channels",
            "--seconds 91": "lasts 90.0 s, a window 91 s",
            "--folds 1": "there must be at least 2 folds",
            f"--folds 3 --fold 5 --resume {run}": "there must be at least 2 folds",
            "--folds 3 --fold 4": "--folds 3 --fold 4: there must be",
            "--folds 3 --test-ratio 0.1": "--test-ratio is read only with --folds 0",
            "--variant original --data=": "--protocol original splits BIDMC by the numbers",
            "--variant original --seconds 10": "--seconds is read only with --protocol patients",
            "--loss huber": "invalid choice: 'huber'",
            "--mode linear": "invalid choice: 'linear'",
            f"--predict {f / 'pre' / 'best.pt'} --data {f / 'bidmc'} --out {f / 'p.csv'}":
                "predicts no rate",
            f"{run} --resume --mode pretrain": "contradicts the run that is resumed",
        })


def test_train_pretrained_checkpoint_that_lacks_tensors_is_refused_with_its_counts():
    with folder() as f:
        ppg_run(f / "pre", "--mode", "pretrain", "--epochs", "1")
        content = torch.load(f / "pre" / "best.pt", weights_only=True)
        content["model"].pop("encoder.layers.1.qkv.weight")
        torch.save(content, f / "lacking.pt")
        ppg_refuses(f, {f"--mode probe --pretrained {f / 'lacking.pt'}":
                        "27 of 28 tensors fit under 'encoder.': missing 1 (layers.1.qkv.weight)"})
