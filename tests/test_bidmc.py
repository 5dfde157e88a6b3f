"""Tests of bidmc."""

import contextlib
import csv
import io
import json
import math
import signal
import subprocess
import sys
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import models
import train
from runtime import looks
from tasks import bidmc
from tasks import bidmc_data
from tasks import bidmc_pretrain
from tests.helpers import (
    call, edit, folder, HERE, loaded, near, NEVER, PPG, ppg_folder, ppg_run, prepared, result_of,
    same_bits, scores_of, small_encoder, write_bidmc)


def prepared_ppg(*words):
    """A run just before training, its splits and its folder; nothing is printed."""
    with contextlib.redirect_stdout(io.StringIO()):
        return train.prepare(train.parse_args([*PPG, *map(str, words)]))


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
        out = ppg_run(f / "a", "--epochs", "3", "--seed", "3")
        scores = json.loads((f / "a" / "scores.json").read_text())["test"]
        best = result_of(f / "a", "best.pt")
        _, sets = loaded(*PPG, "--seed", "3", "--data", f / "bidmc")
        windows = bidmc_data.bidmc_windows(bidmc_data.read_bidmc(f / "bidmc"), rate="hr", seconds=10)
        code, _, err = call("--task", "bidmc_hr", "--predict", f / "a" / "best.pt", "--data", f / "bidmc", "--out", f / "p.csv")
        assert code == 0, err
        with open(f / "p.csv") as file:
            rows = list(csv.DictReader(file))
    test, labels = sets.test, sets.train.labels
    assert list(scores) == ["rows", "model", "constant mean", "constant median", "spectral peak", "PULSE"]
    assert list(scores["model"]) == ["loss", "mae", "rmse", "r2", "patient_mae", "patient_sd"]
    assert best["facts"]["scaler"] == {"mean": float(labels.mean()), "scale": float(labels.std())}  # training rows, float64
    assert best["facts"]["median"] == np.median(labels) != np.median(windows["labels"])
    for name, value in (("constant mean", labels.mean()), ("constant median", np.median(labels))):
        assert math.isclose(scores[name]["mae"], np.abs(value - test.labels).mean()), name
        assert math.isclose(scores[name]["rmse"], math.sqrt(np.square(value - test.labels).mean())), name
    assert math.isclose(scores["PULSE"]["mae"], np.abs(test.ceiling - test.labels).mean())
    keys = {(int(row["recording"]), float(row["start_s"])): float(row["beats_per_minute"]) for row in rows}
    predicted = np.array([keys[windows["recording"][row] + 1, windows["starts"][row]] for row in test.rows])
    assert near(scores["model"]["mae"], np.abs(predicted - test.labels).mean(), 1e-3)
    assert near(scores["model"]["rmse"], math.sqrt(np.square(predicted - test.labels).mean()), 1e-3)
    by_patient = [np.abs(predicted - test.labels)[test.groups == each].mean() for each in np.unique(test.groups)]
    assert near(scores["model"]["patient_mae"], np.mean(by_patient), 1e-3)
    assert "SYNTHETIC" not in out and "10 recordings of 8 patients" in out and "none on two sides" in out
    assert out.count("constant median") == 3


def test_train_ppg_splits_keep_patients_apart_and_folds_test_each_of_them_once():
    with folder() as f:
        seen = []
        for fold in (1, 2, 3):
            _, sets = loaded(*PPG, "--data", ppg_folder(f), "--folds", "3", "--fold", fold)
            groups = [set(split.groups) for split in (sets.train, sets.validation, sets.test)]
            assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2] and len(set().union(*groups)) == 8
            assert not set(sets.facts["seen"]) & set(sets.facts["held_out"])
            seen += groups[2]
        assert len(seen) == len(set(seen)) == 8
        _, pretraining = loaded(*PPG, "--mode", "pretrain", "--data", f / "bidmc", "--folds", "3",
                                "--fold", "3")
        assert pretraining.facts["seen"] == sets.facts["seen"] and "scaler" not in pretraining.facts
        assert np.isnan(pretraining.train.labels).all() and "targets" not in pretraining.train.batch(np.arange(2))


def test_train_modes_start_from_the_pretrained_encoder_and_train_what_they_say():
    with folder() as f:
        out = ppg_run(f / "pre", "--mode", "pretrain")
        assert "interpolation" in out and "constant shape" in out and "PULSE" not in out
        source = {name: value for name, value in result_of(f / "pre", "best.pt")["model"].items() if name.startswith("encoder.")}
        for mode, words, moved in (("probe", ("--debug",), ()),
                                   ("partial", ("--unfreeze-last", "1", "--backbone-lr", "2e-4"), ("layers.1.", "norm.")),
                                   ("finetune", ("--backbone-lr", "2e-4"), ("embed.", "layers.0.", "layers.1.", "norm."))):
            out = ppg_run(f / mode, "--mode", mode, "--pretrained", f / "pre" / "best.pt", *words)
            scalars = sum(value.numel() for value in source.values())
            assert f"encoder: 28 tensors, {scalars:,} scalars loaded" in out
            assert "0 missing, 0 unexpected; left there: mask_token, decoder.weight" in out
            assert ("17 trained" in out) == ("| output (" in out) == (mode == "probe")
            last = result_of(f / mode)
            for name, value in source.items():
                expected = name.removeprefix("encoder.").startswith(moved) if moved else False
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

        class Zero(nn.Module):  # guesses 7 for what is visible and 0 for what is hidden
            encoder = small_encoder(channels=1)

            def forward(self, signals, mask):
                return 7.0 * (~mask)[..., None].expand_as(self.encoder.patches(signals))

        batch = split.batch(np.arange(len(split)))
        inputs, mask = batch["inputs"], batch["mask"]
        assert (mask.sum(1) == 1).all()  # a quarter of 4 patches
        _, again = loaded(*words)
        parts = np.array_split(np.arange(len(split)), 5)
        assert torch.equal(mask, torch.cat([again.test.batch(rows)["mask"] for rows in parts]))
        targets, mean, line, shape = [], [], [], []
        for signal, hidden in zip(inputs[:, 0].numpy().astype(float), mask):
            i = int(hidden.nonzero()) * 4
            seen = np.delete(np.arange(16), range(i, i + 4))
            targets += list(signal[i : i + 4])
            mean += [np.mean(signal[seen])] * 4
            line += [np.interp(j, seen, signal[seen]) for j in range(i, i + 4)]
            shape += [float(inputs[:, 0, j].double().mean()) for j in range(i, i + 4)]
        targets = np.array(targets)
        rows = {"model": scores_of(Zero(), split, args, facts)}
        rows |= bidmc_pretrain.floors(split, args, facts)
        for name, guess in (("model", 0), ("constant mean", mean), ("interpolation", line), ("constant shape", shape)):
            assert math.isclose(rows[name]["mae"], np.abs(guess - targets).mean(), rel_tol=1e-4), name
            assert math.isclose(rows[name]["loss"], np.square(guess - targets).mean(), rel_tol=1e-4), name
        torch.manual_seed(0)
        loss, _ = bidmc_pretrain.loss(Zero(), batch, args, facts)
        torch.manual_seed(0)
        drawn = models.random_patch_mask(len(split), 4, 0.25)
        assert math.isclose(float(loss), float(Zero.encoder.patches(batch["inputs"])[drawn].square().mean()), rel_tol=1e-5)


def test_train_loss_of_the_regressor_is_what_the_flag_says():
    with folder() as f:
        for name, oracle in (("mse", F.mse_loss), ("smooth_l1", F.smooth_l1_loss)):
            args, splits = loaded(*PPG, "--loss", name, "--data", ppg_folder(f))
            model = bidmc.network(args, splits.facts).eval()
            batch = splits.train.batch(np.arange(30))
            got, _ = bidmc.loss(model, batch, args, splits.facts)
            assert torch.equal(got, oracle(model(batch["inputs"]), batch["targets"]))


def test_train_frozen_layers_have_no_dropout_in_the_loop():
    with folder() as f:
        ppg_run(f / "pre", "--mode", "pretrain", "--epochs", "1")
        run, splits, _ = prepared_ppg("--mode", "partial", "--pretrained", f / "pre", "--dropout", "0.5",
                                      "--data", f / "bidmc", "--out", f / "new")
        layers, seen = run.raw_model.encoder.layers, []
        layers[0].register_forward_hook(
            lambda module, *_: seen.append((layers[0].training, layers[0].mlp[2].training, layers[1].mlp[2].training)))
        train.train_epoch(run, splits.train, 1, NEVER)
        assert set(seen) == {(False, False, True)}, seen
        seen.clear()
        with contextlib.redirect_stdout(io.StringIO()):
            looks.find_lr(run, splits)
        assert set(seen) == {(False, False, True)}, seen


def test_train_probe_on_cached_features_scores_what_the_whole_network_scores():
    with folder() as f:
        ppg_run(f / "pre", "--mode", "pretrain")
        ppg_run(f / "probe", "--mode", "probe", "--pretrained", f / "pre", "--lr", "0.03")
        value = json.loads((f / "probe" / "scores.json").read_text())["test"]["model"]
        code, out, err = call("--task", "bidmc_hr", "--eval", f / "probe" / "best.pt", "--split", "test")  # no features there
        [line] = [line for line in out.splitlines() if line.startswith("model")]
        assert code == 0 and line.split()[1:] == [f"{each:.4f}" for each in value.values()], (out, err)
        run, splits, _ = prepared_ppg("--mode", "probe", "--pretrained", f / "pre",
                                      "--data", f / "bidmc", "--out", f / "new")
        split = splits.train
        features = split.features.clone()
        assert not features.requires_grad and features.shape == (len(split), 16)
        split.features = None
        whole = run.raw_model.features(split.batch(np.arange(len(split)))["inputs"])
        assert near(whole, features, 1e-5)


def test_train_scratch_learns_the_heart_rate_of_synthetic_recordings():
    with folder() as f:
        recordings = bidmc_data.synthetic_ppg(20, seconds=120)
        synthetic, bidmc_data.synthetic_ppg = bidmc_data.synthetic_ppg, lambda *_, **__: recordings
        try:
            code, out, err = call("--task", "bidmc_hr", "--seconds", "16", "--bins", "48", "--epochs", "12", "--lr", "3e-3",
                                  "--batch-size", "32", "--width", "32", "--out", f / "a", "--device", "cpu")
        finally:
            bidmc_data.synthetic_ppg = synthetic
        assert code == 0 and "SYNTHETIC recordings, drawn by the script" in out, err
        scores = json.loads((f / "a" / "scores.json").read_text())["test"]
    assert scores["model"]["mae"] < 0.4 * scores["constant median"]["mae"] and scores["model"]["r2"] > 0.5, scores


def test_train_ppg_resumed_run_equals_straight_run_bit_for_bit():
    """Fine-tuning, pretraining and probing, killed with SIGKILL in mid-epoch; plateau, EMA, two rates; the encoder's file is gone."""
    with folder() as f:
        ppg_run(f / "pre", "--mode", "pretrain")
        for words in (["--mode", "finetune", "--schedule", "plateau", "--plateau-patience", "0", "--warmup-epochs", "1.5"],
                      ["--mode", "pretrain"], ["--mode", "probe", "--accumulate", "2"]):
            common = ["--epochs", "6", "--batch-size", "8", "--data", f / "bidmc", *words]
            if words[1] != "pretrain":
                (f / "copy.pt").write_bytes((f / "pre" / "best.pt").read_bytes())
                common += ["--pretrained", f / "copy.pt"]
            code, _, err = call(*PPG, *common, "--out", f / f"{words[1]}-straight")
            assert code == 0, err
            process = subprocess.Popen([sys.executable, HERE / "train.py", *PPG, *map(str, common), "--out", f / f"{words[1]}-killed"],
                                       stdout=subprocess.PIPE, text=True)
            for line in process.stdout:
                if line.startswith("epoch   2/"):
                    time.sleep(0.02)
                    process.kill()
            process.wait()
            (f / "copy.pt").unlink(missing_ok=True)
            straight, killed = f / f"{words[1]}-straight", f / f"{words[1]}-killed"
            assert process.returncode == -signal.SIGKILL and len(result_of(killed)["history"]) < 7
            code, _, err = call("--task", "bidmc_hr", "--out", killed, "--resume")
            assert code == 0, err
            for name in ("last.pt", "best.pt"):
                assert same_bits(result_of(straight, name), result_of(killed, name)), (words, name)
            assert (straight / "scores.json").read_text() == (killed / "scores.json").read_text()


def ppg_refuses(f, cases):
    """Each (message, words) must end with code 2 and that message, once, and leave no trace."""
    state = lambda: {file: file.read_bytes() for name in ("run", "pre") for file in sorted((f / name).iterdir())}
    before = state()
    for message, words in cases:
        words = list(words)
        if "--predict" in words or "--resume" in words:
            base = ["--task", "bidmc_hr"]
        else:
            base = ["--task", "bidmc_hr"] if "original" in words else PPG
            words += ([] if "--out" in words else ["--out", f / "new"]) + ([] if "--data" in words else ["--data", f / "bidmc"])
        code, _, err = call(*base, *words)
        assert code == 2 and message in err and err.count("error:") == 1, (message, code, err)
        assert not (f / "new").exists() and state() == before, message


def damaged(f, name, file, change):
    """--data with a copy of the recordings in which one file is changed, or gone."""
    path = f / name
    path.mkdir(parents=True)
    for each in ppg_folder(f).iterdir():
        (path / each.name).write_bytes(each.read_bytes())
    edit(path / file, change) if change else (path / file).unlink()
    return ["--data", path]


def test_train_ppg_refuses_bad_data_with_exit_code_2_and_one_message():
    with folder() as f:
        ppg_run(f / "pre", "--mode", "pretrain", "--epochs", "1")
        ppg_run(f / "run", "--epochs", "1")
        _, splits = loaded(*PPG, "--data", f / "bidmc")
        [validation] = set(splits.validation.groups)
        constant, quiet = bidmc_data.synthetic_ppg(10, seconds=90), bidmc_data.synthetic_ppg(10, seconds=90)
        for one, other in zip(constant, quiet):
            one["hr"][:] = 80
            other["hr"][:] = 80 if other["patient"] == validation else other["hr"]
        constant, quiet = (write_bidmc(f / name, each, columns=("PLETH",)) for name, each in (("constant", constant), ("quiet", quiet)))
        nan = lambda text: "\n".join([text.splitlines()[0]] + ["NaN"] * (len(text.splitlines()) - 1))
        half = lambda text: "".join(text.splitlines(keepends=True)[: text.count("\n") // 2])
        ppg_refuses(f, [
            ("bidmc_04_Numerics.csv is missing", damaged(f, "a", "bidmc_04_Numerics.csv", None)),
            ("the signals last 45.0 s, the numerics 90.0 s: one of the two files is cut off",
             damaged(f, "b", "bidmc_04_Signals.csv", half)),
            ("no column 'HR'", damaged(f, "c", "bidmc_04_Numerics.csv", lambda text: text.replace(" HR", " XX"))),
            ("PLETH holds 11251 NaN in 11251 rows", damaged(f, "d", "bidmc_04_Signals.csv", nan)),
            ("training labels are 80: there is nothing to learn", ["--data", constant]),
            ("--monitor r2 is not defined on the 42 validation rows", ["--monitor", "r2", "--data", quiet]),
            ("holds no bidmc_NN_Signals.csv", ["--data", f / "pre"]),
            ("differ in data", ["--out", f / "run", "--resume",
                                *damaged(f, "e", "bidmc_04_Signals.csv", lambda text: text.replace("0.5", "0.6"))]),
        ])


def test_train_ppg_refuses_bad_calls_with_exit_code_2_and_one_message():
    with folder() as f:
        ppg_run(f / "pre", "--mode", "pretrain", "--epochs", "1")
        ppg_run(f / "run", "--epochs", "1")
        ppg_refuses(f, [
            ("the encoder in", ["--mode", "probe", "--pretrained", f / "pre", "--width", "32"]),
            ("--width 32: the encoder in", ["--mode", "finetune", "--pretrained", f / "pre", "--width", "32"]),
            ("--reduce 2: the encoder in", ["--mode", "finetune", "--pretrained", f / "pre", "--reduce", "2"]),
            ("of the cases that this run holds out", ["--mode", "probe", "--pretrained", f / "pre", "--seed", "1"]),
            ("of the cases that this run holds out",
             ["--mode", "probe", "--pretrained", f / "pre" / "best.pt", "--folds", "3", "--fold", "1"]),
            ("starts from an encoder: give --pretrained", ["--mode", "partial"]),
            ("does not exist", ["--mode", "probe", "--pretrained", f / "nowhere.pt"]),
            ("--pretrained is read only with --mode probe or finetune or partial, not with scratch", ["--pretrained", f / "pre"]),
            ("--dropout is read only with --mode", ["--mode", "probe", "--pretrained", f / "pre", "--dropout", "0.3"]),
            ("--compile is read only with --mode", ["--mode", "probe", "--pretrained", f / "pre", "--compile"]),
            ("--folds is read only with --protocol patients", ["--variant", "original", "--folds", "3"]),
            ("needs BIDMC's own recordings, 11, 19", ["--variant", "original"]),
            ("needs BIDMC's own recordings, 11, 19", ["--variant", "original", "--mode", "pretrain"]),
            ("whose encoder has seen labels", ["--mode", "probe", "--pretrained", f / "run"]),
            ("holds no 'epoch'", ["--mode", "probe", "--pretrained", f / "pre" / "last.pt"]),
            ("--overwrite would delete the encoder", ["--mode", "probe", "--pretrained", f / "pre", "--out", f / "pre", "--overwrite"]),
            ("fold-1/best.pt does not exist", ["--mode", "probe", "--pretrained", f / "pre", "--folds", "3"]),
            ("holds a run without --folds", ["--folds", "3", "--out", f / "run"]),
            ("holds a run without --folds", ["--folds", "3", "--out", f / "run", "--overwrite"]),
            ("--stretch is read only with --mode", ["--mode", "probe", "--pretrained", f / "pre", "--stretch", "1.1"]),
            ("--backbone-lr is read only with --mode finetune or partial",
             ["--mode", "probe", "--pretrained", f / "pre", "--backbone-lr", "1"]),
            ("unfreeze_last 3 must be between 0 and 2", ["--mode", "partial", "--pretrained", f / "pre", "--unfreeze-last", "3"]),
            ("--unfreeze-last 0 must be finite and at least 1", ["--mode", "partial", "--unfreeze-last", "0"]),
            ("unrecognized arguments: --sampler", ["--sampler", "stratified"]),
            ("unrecognized arguments: --channels-last", ["--channels-last"]),
            ("--patch 9 must be at most 8", ["--patch", "9"]),
            ("heads must divide channels", ["--heads", "3"]),
            ("lasts 90.0 s, a window 91 s", ["--seconds", "91"]),
            ("there must be at least 2 folds", ["--folds", "1"]),
            ("there must be at least 2 folds", ["--folds", "3", "--fold", "5", "--resume", "--out", f / "run"]),
            ("--folds 3 --fold 4: there must be", ["--folds", "3", "--fold", "4"]),
            ("--test-ratio is read only with --folds 0", ["--folds", "3", "--test-ratio", "0.1"]),
            ("--protocol original splits BIDMC by the numbers", ["--variant", "original", "--data", ""]),
            ("--seconds is read only with --protocol patients", ["--variant", "original", "--seconds", "10"]),
            ("invalid choice: 'huber'", ["--loss", "huber"]),
            ("invalid choice: 'linear'", ["--mode", "linear"]),
            ("predicts no rate", ["--predict", f / "pre" / "best.pt", "--data", f / "bidmc", "--out", f / "p.csv"]),
            ("contradicts the run that is resumed", ["--out", f / "run", "--resume", "--mode", "pretrain"]),
        ])


def test_train_pretrained_checkpoint_that_lacks_tensors_is_refused_with_its_counts():
    with folder() as f:
        ppg_run(f / "pre", "--mode", "pretrain", "--epochs", "1")
        content = torch.load(f / "pre" / "best.pt", weights_only=True)
        content["model"].pop("encoder.layers.1.qkv.weight")
        torch.save(content, f / "lacking.pt")
        code, _, err = call(*PPG, "--data", f / "bidmc", "--mode", "probe", "--pretrained", f / "lacking.pt", "--out", f / "new")
        assert code == 2 and "27 of 28 tensors fit under 'encoder.': missing 1 (layers.1.qkv.weight)" in err, err
        assert not (f / "new").exists()
