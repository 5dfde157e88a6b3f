"""Tests of run."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
import types

import numpy as np
import torch

import train
from runtime import checkpoint, checks
from tasks import ocec
from tests.helpers import (
    call, folder, HERE, make_class_folder, make_npz, PPG, ppg_folder, ppg_run, raises,
    random_images, replaced, result_of, run, same_bits, TINY)


def test_train_resumed_run_equals_straight_run_bit_for_bit():
    """Killed with SIGKILL in mid-epoch; plateau, warm-up cosine and restarts, with EMA, accumulation and mixup."""
    common = ["--accumulate", "2", "--mixup", "0.4", "--dropout", "0.3", "--epochs", "6", "--sampler", "stratified", "--batch-size", "6"]
    for words in (["--schedule", "plateau", "--plateau-patience", "0", "--warmup-epochs", "1.5"],
                  ["--schedule", "cosine", "--warmup-epochs", "2"],
                  ["--schedule", "restarts", "--restart-epochs", "1", "--restart-mult", "2", "--warmup-epochs", "0.5"]):
        with folder() as f:
            run(f / "straight", *common, *words)
            process = subprocess.Popen([sys.executable, HERE / "train.py", *TINY, "--data", f / "eyes.npz", "--out", f / "killed",
                                        *common, *words], stdout=subprocess.PIPE, text=True)
            for line in process.stdout:
                if line.startswith("epoch   2/"):
                    time.sleep(0.02)  # somewhere in epoch 3
                    process.kill()
            process.wait()
            assert process.returncode == -signal.SIGKILL
            killed_after = len(result_of(f / "killed")["history"]) - 1
            assert 2 <= killed_after < 6, killed_after
            code, _, err = call("--task", "ocec", "--out", f / "killed", "--resume")
            assert code == 0, err
            for name in ("last.pt", "best.pt"):
                assert same_bits(result_of(f / "straight", name), result_of(f / "killed", name)), (words, name)
            for name in ("scores.json", "curves.svg"):
                assert (f / "straight" / name).read_text() == (f / "killed" / name).read_text(), (words, name)


def test_train_early_stopping_survives_a_resume():
    with folder() as f:
        out = run(f / "a", "--epochs", "40", "--patience", "2", "--lr", "1e-5")
        assert "stopped early" in out
        history = result_of(f / "a")["history"]
        assert len(history) < 41
        (f / "eyes.npz").rename(f / "moved.npz")
        code, out, _ = call("--task", "ocec", "--out", f / "a", "--resume", "--data", f / "moved.npz")
        assert code == 0 and "stopped early" in out and same_bits(result_of(f / "a")["history"], history)


def test_train_signals_end_a_run_cleanly_and_say_how_to_go_on():
    for number in (signal.SIGINT, signal.SIGTERM):
        with folder() as f:
            make_npz(f / "eyes.npz")
            process = subprocess.Popen([sys.executable, HERE / "train.py", *TINY, "--data", f / "eyes.npz", "--out", f / "a",
                                        "--epochs", "500"], stdout=subprocess.PIPE, text=True)
            lines = []
            for line in process.stdout:
                lines.append(line)
                if line.startswith("epoch   1/"):
                    process.send_signal(number)
            assert process.wait() == 128 + number
            epoch = len(result_of(f / "a")["history"]) - 1
            assert f"{number.name}: epoch {epoch} of 500 is saved" in lines[-2] and f"--out {f / 'a'} --resume" in lines[-1]
            assert len((f / "a" / "log.jsonl").read_text().splitlines()) == epoch + 1 and not list((f / "a").glob("*.tmp"))


def test_train_a_folder_in_which_a_run_trains_is_refused_to_another():
    def resumed():
        return call(*TINY, "--data", f / "eyes.npz", "--out", f / "a", "--resume", "--epochs", "1")

    def second(*words):
        answers.append(resumed())
        return report_best(*words)

    with folder() as f:
        answers, report_best = [], train.report_best
        with replaced(train, "report_best", second):
            run(f / "a", "--epochs", "1")
        [(code, _, err)] = answers
        assert code == 2 and "another process is training in this folder" in err, err
        assert resumed()[0] == 0  # it is free again
        (f / "a" / "best.pt").write_bytes((f / "a" / "best.pt").read_bytes()[:500])
        code, _, err = resumed()
        assert code == 2 and "best.pt is not a readable checkpoint" in err, err  # before it trains on
        code, _, err = call(*TINY, "--data", f / "eyes.npz", "--out", f / ("x" * 300))
        assert code == 2 and "too long" in err, err


def test_train_a_step_that_the_scaler_skips_advances_neither_schedule_nor_ema():
    with folder() as f:
        make_npz(f / "eyes.npz")
        criterion, calls = ocec.criterion, []

        def overflows_once(logits, *words):
            calls.append(logits.requires_grad)
            second_step = sum(calls) == 2 and logits.requires_grad
            return criterion(logits, *words) * (1e35 if second_step else 1)

        with replaced(ocec, "criterion", overflows_once):
            code, out, err = call(*TINY, "--data", f / "eyes.npz", "--out", f / "a", "--amp", "fp16",
                                  "--epochs", "2")
        assert code == 0 and "| skipped 1" in out, err
        last = result_of(f / "a")
        assert last["step"] == last["schedule"]["steps_done"] == last["ema"]["updates"] == 5  # of 6


def test_train_a_write_that_fails_leaves_the_old_file():
    with folder() as f:
        (f / "x").write_text("old")
        with contextlib.suppress(KeyError), checkpoint.atomic_write(f / "x") as file:
            file.write("half")
            file.flush()
            assert (f / "x").read_text() == "old"
            raise KeyError
        assert (f / "x").read_text() == "old" and [each.name for each in f.iterdir()] == ["x"]
        with checkpoint.atomic_write(f / "x") as file:
            file.write("new")
        assert (f / "x").read_text() == "new"


def test_train_names_the_image_that_cannot_be_read():
    with folder() as f:
        make_class_folder(f / "eyes")
        victim = sorted((f / "eyes" / "open").iterdir())[1]
        victim.write_bytes(victim.read_bytes()[:40])
        code, _, err = call(*TINY, "--data", f / "eyes", "--out", f / "new")
        assert code == 2 and str(victim) in err and "not a readable image" in err
        assert call(*TINY, "--data", f / "eyes", "--out", f / "new", "--cache", f / "cache")[0] == 2 and not list((f / "cache").iterdir())
        (f / "eyes" / "annotation.csv").write_text("open/absent.png,1\n")
        code, _, err = call(*TINY, "--data", f / "eyes", "--out", f / "new")
        assert code == 2 and "absent.png" in err and "does not exist" in err
        (f / "eyes" / "annotation.csv").write_text(f"open/{victim.name},1,2\n")
        assert "line 1: expected 2 columns" in call(*TINY, "--data", f / "eyes", "--out", f / "new")[2]


def test_train_stops_at_a_loss_that_is_no_number_and_keeps_the_last_good_epoch():
    with folder() as f:
        make_npz(f / "eyes.npz")
        criterion, calls = ocec.criterion, []

        def breaks_in_epoch_2(logits, *words):
            calls.append(logits.requires_grad)
            return criterion(logits, *words) * (math.nan if sum(calls) > 4 else 1)

        with replaced(ocec, "criterion", breaks_in_epoch_2):
            code, _, err = call(*TINY, "--data", f / "eyes.npz", "--out", f / "a")
        assert code == 1 and "the loss became nan in epoch 2, step 4, at lr " in err, err
        assert "gradient norm of the step before" in err
        last = result_of(f / "a")
        assert len(last["history"]) == 2 and all(value.isfinite().all() for value in last["model"].values())
        assert all(torch.isfinite(value).all() for value in result_of(f / "a", "best.pt")["model"].values())
        assert call("--task", "ocec", "--out", f / "a", "--resume")[0] == 0


def test_train_overwrite_replaces_and_changed_data_are_refused():
    with folder() as f:
        run(f / "a", "--epochs", "1")
        run(f / "a", "--epochs", "2", "--overwrite")
        assert len(result_of(f / "a")["history"]) == 3
        make_npz(f / "eyes.npz", n=50)
        code, _, err = call("--task", "ocec", "--out", f / "a", "--resume")
        assert code == 2 and "the data or their split are not those of the run" in err


def test_train_folds_run_each_and_report_mean_and_sd():
    with folder() as f:
        out = ppg_run(f / "cv", "--folds", "3", "--epochs", "1")
        rows = [json.loads((f / "cv" / f"fold-{k}" / "scores.json").read_text())["test"] for k in (1, 2, 3)]
        summary = json.loads((f / "cv" / "scores.json").read_text())
        values = [row["model"]["mae"] for row in rows]
        assert math.isclose(summary["test"]["model"]["mae"], np.mean(values))
        assert math.isclose(summary["test_sd"]["model"]["mae"], np.std(values, ddof=1))
        assert summary["folds"] == 3 and summary["test"]["rows"] == sum(row["rows"] for row in rows)
        assert list(summary["test"])[1:] == ["model", "constant mean", "constant median", "spectral peak", "PULSE"]
        assert "fold 3 of 3" in out and "mean over the folds" in out and "standard deviation over the folds" in out
        code, _, err = call(*PPG, "--data", f / "bidmc", "--out", f / "cv", "--folds", "3")
        assert code == 2 and "already holds a run" in err
        # a fold by itself is the same run; the summary comes with --resume, which trains what is missing
        (f / "cv" / "fold-3" / "last.pt").rename(f / "third.pt")
        for name in set(checkpoint.RUN_FILES) - {"last.pt", "examples.png"}:
            (f / "cv" / "fold-3" / name).unlink()
        before = (f / "cv" / "scores.json").read_text()
        (f / "cv" / "scores.json").unlink()
        code, out, err = call("--task", "bidmc_hr", "--out", f / "cv", "--resume")
        assert code == 0 and (f / "cv" / "scores.json").read_text() == before, err
        assert same_bits(torch.load(f / "third.pt", weights_only=True)["model"], result_of(f / "cv" / "fold-3")["model"])
        code, _, err = call(*PPG, "--data", f / "bidmc", "--out", f / "cv")
        assert code == 2 and "holds the folds of a cross-validation" in err
        ppg_run(f / "one", "--folds", "3", "--fold", "2", "--epochs", "1")
        assert (f / "one" / "scores.json").read_text() == (f / "cv" / "fold-2" / "scores.json").read_text()
        # an encoder for each fold
        ppg_run(f / "pre", "--mode", "pretrain", "--folds", "3", "--epochs", "1")
        out = ppg_run(f / "probe", "--mode", "probe", "--pretrained", f / "pre", "--folds", "3", "--epochs", "1")
        assert all(f"loaded from {f / 'pre' / f'fold-{k}' / 'best.pt'}" in out for k in (1, 2, 3))
        (f / "pre" / "fold-3" / "best.pt").unlink()  # told before the first fold is trained
        code, out, err = call(*PPG, "--data", f / "bidmc", "--out", f / "late", "--mode", "probe", "--pretrained", f / "pre",
                              "--folds", "3")
        assert code == 2 and "fold-3/best.pt does not exist" in err and "epoch" not in out and not (f / "late" / "fold-1").exists()
        ppg_run(f / "cv", "--folds", "2", "--overwrite", "--epochs", "1")
        assert not list((f / "cv" / "fold-3").iterdir()) and json.loads((f / "cv" / "scores.json").read_text())["folds"] == 2


def test_train_folds_of_different_recipes_are_never_averaged():
    with folder() as f:
        for fold, words in ((1, ("--folds", "3")), (2, ("--folds", "4")), (3, ("--folds", "3"))):
            ppg_run(f / "cv" / f"fold-{fold}", *words, "--fold", fold, "--epochs", "1", "--data", ppg_folder(f))
        code, _, err = call("--task", "bidmc_hr", "--out", f / "cv", "--resume")
        assert code == 2 and "--folds 3 contradicts the run that is resumed (4 there)" in err, err
        assert not (f / "cv" / "scores.json").exists()
        ppg_run(f / "cv" / "fold-2", "--folds", "3", "--fold", "2", "--epochs", "1", "--data", f / "bidmc", "--overwrite")
        code, out, err = call("--task", "bidmc_hr", "--out", f / "cv", "--resume")
        assert code == 0 and "3 folds, " in out, err
        (f / "cv" / "fold-1" / "last.pt").unlink()
        code, _, err = call("--task", "bidmc_hr", "--out", f / "cv", "--resume")
        assert code == 2 and "there is no run in" in err, err
        ppg_run(f / "single", "--epochs", "1", "--data", f / "bidmc")
        code, _, err = call(*PPG, "--data", f / "bidmc", "--folds", "3", "--fold", "1", "--out", f / "single" / "fold-1")
        assert code == 2 and "holds a run without --folds" in err, err


def test_train_interrupted_folds_say_how_to_go_on_with_all_of_them():
    with folder() as f:
        words = [*PPG, "--data", ppg_folder(f), "--folds", "2", "--epochs", "30", "--patience", "0", "--out", f / "cv"]
        process = subprocess.Popen([sys.executable, HERE / "train.py", *map(str, words)], stdout=subprocess.PIPE, text=True)
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("epoch   1/") and "fold 2 of 2\n" in lines:
                process.terminate()
        assert process.wait() == 128 + signal.SIGTERM
        assert lines[-1].split()[2:] == ["--task", "bidmc_hr", "--out", str(f / "cv"), "--resume", "--device", "cpu"], lines[-1]
        code, out, err = call(*lines[-1].split()[2:])
        assert code == 0 and "2 folds, " in out, err


def test_train_a_signal_while_a_fold_is_scored_keeps_the_next_from_starting():
    def scored_late(*words):
        report_best(*words)
        os.kill(os.getpid(), signal.SIGTERM)

    def interrupted(*_):
        raise KeyboardInterrupt

    with folder() as f:
        words = [*PPG, "--data", ppg_folder(f), "--folds", "2", "--epochs", "1", "--out", f / "cv"]
        report_best = train.report_best
        with replaced(train, "train_once", interrupted):
            code, out, err = call(*words)
        assert code == 128 + signal.SIGINT and "the folds before" not in out  # there is nothing to go on with
        with replaced(train, "report_best", scored_late):
            code, out, err = call(*words)
        assert code == 128 + signal.SIGTERM and "\nfold 1 of 2" in out and "\nfold 2 of 2" not in out and "--resume" in out, (out, err)
        code, out, err = call("--task", "bidmc_hr", "--out", f / "cv", "--resume")
        assert code == 0 and "2 folds, " in out, err


def test_train_folds_work_for_the_eyes_too():
    with folder() as f:
        out = run(f / "cv", "--folds", "2", "--val-ratio", "0.3", "--epochs", "1")
        assert "2 folds, 60 test rows in all" in out


def test_train_a_batch_of_one_row_in_each_process_is_refused_even_where_no_size_would_do():
    args = train.parse_args([*TINY, "--block", "inverted_se", "--batch-size", "2"])
    facts = {"pos_weight": 1.0}
    state = types.SimpleNamespace(args=args, facts=facts, task=ocec.TASK,
                                  raw_model=ocec.network(args, facts))
    for n, advice in ((2, "add rows"), (6, "try --batch-size 6")):
        split = ocec.EyeSplit(random_images(n, 3, 12, 20), np.arange(n) % 2, np.arange(n))
        for message in (f"1 of the {n} training rows to each process", advice):
            with replaced(checks, "world_size", lambda: 2):
                raises(ValueError, message,
                       lambda: checks.check_one_row_batch(state, split, [np.array([0])]))
