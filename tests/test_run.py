"""Tests of run."""

import contextlib
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
    random_images, read_scores, refused, replaced, result_of, run, same_bits, succeeded, TINY)


def started(*words):
    command = [sys.executable, HERE / "train.py", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_train_resumed_run_equals_straight_run_bit_for_bit():
    """Killed with SIGKILL in the middle of an epoch, with EMA, accumulation and mixup."""
    common = ("--accumulate 2 --mixup 0.4 --dropout 0.3 --epochs 6 --sampler stratified "
              "--batch-size 6").split()
    for schedule in ("plateau --plateau-patience 0 --warmup-epochs 1.5",
                     "cosine --warmup-epochs 2",
                     "restarts --restart-epochs 1 --restart-mult 2 --warmup-epochs 0.5"):
        words = [*common, "--schedule", *schedule.split()]
        with folder() as f:
            straight, killed = f / "straight", f / "killed"
            run(straight, *words)
            process = started(*TINY, "--data", f / "eyes.npz", "--out", killed, *words)
            for line in process.stdout:
                if line.startswith("epoch   2/"):
                    time.sleep(0.02)  # somewhere in epoch 3
                    process.kill()
            process.wait()
            assert process.returncode == -signal.SIGKILL
            killed_after = len(result_of(killed)["history"]) - 1
            assert 2 <= killed_after < 6, killed_after
            succeeded("--task", "ocec", "--out", killed, "--resume")
            for name in ("last.pt", "best.pt"):
                assert same_bits(result_of(straight, name), result_of(killed, name)), (words, name)
            for name in ("scores.json", "curves.svg"):
                assert (straight / name).read_text() == (killed / name).read_text(), (words, name)


def test_train_early_stopping_survives_a_resume():
    with folder() as f:
        out = run(f / "a", "--epochs", "40", "--patience", "2", "--lr", "1e-5")
        assert "stopped early" in out
        history = result_of(f / "a")["history"]
        assert len(history) < 41
        (f / "eyes.npz").rename(f / "moved.npz")
        out = succeeded(
            "--task", "ocec", "--out", f / "a", "--resume", "--data", f / "moved.npz")
        assert "stopped early" in out and same_bits(result_of(f / "a")["history"], history)
        # with a gain that no epoch has, the first is the best that counts; best.pt keeps the best
        words = "--epochs 9 --patience 3 --lr 1e-3 --monitor loss --min-delta 10"
        assert "for 3 epochs" in run(f / "b", *words.split())
        last, best = result_of(f / "b"), result_of(f / "b", "best.pt")
        assert len(last["history"]) == 5 and best["epoch"] > 1


def test_train_signals_end_a_run_cleanly_and_say_how_to_go_on():
    for number in (signal.SIGINT, signal.SIGTERM):
        with folder() as f:
            data, a = make_npz(f / "eyes.npz"), f / "a"
            process, lines = started(*TINY, "--data", data, "--out", a, "--epochs", "500"), []
            for line in process.stdout:
                lines.append(line)
                if line.startswith("epoch   1/"):
                    process.send_signal(number)
            assert process.wait() == 128 + number
            epoch = len(result_of(a)["history"]) - 1
            assert f"{number.name}: epoch {epoch} of 500 is saved" in lines[-2]
            assert f"--out {a} --resume" in lines[-1] and not list(a.glob("*.tmp"))
            assert len((a / "log.jsonl").read_text().splitlines()) == epoch + 1


def test_train_a_folder_in_which_a_run_trains_is_refused_to_another():
    resume = ["--resume", "--epochs", "1"]

    def report_while_another_starts(*words):
        refused("another process is training in this folder", *a, *resume)
        refusals.append(True)
        return report_best(*words)

    with folder() as f:
        data, report_best, refusals = [*TINY, "--data", f / "eyes.npz"], train.report_best, []
        a = [*data, "--out", f / "a"]
        with replaced(train, "report_best", report_while_another_starts):
            run(f / "a", "--epochs", "1")
        assert refusals == [True]
        succeeded(*a, *resume)  # it is free again
        (f / "a" / "best.pt").write_bytes((f / "a" / "best.pt").read_bytes()[:500])
        refused("best.pt is not a readable checkpoint", *a, *resume)  # before it trains on
        refused("too long", *data, "--out", f / ("x" * 300))


def test_train_a_step_that_the_scaler_skips_advances_neither_schedule_nor_ema():
    with folder() as f:
        criterion, calls = ocec.criterion, []

        def overflows_once(logits, *words):
            calls.append(logits.requires_grad)
            second_step = sum(calls) == 2 and logits.requires_grad
            return criterion(logits, *words) * (1e35 if second_step else 1)

        with replaced(ocec, "criterion", overflows_once):
            assert "| skipped 1" in run(f / "a", "--amp", "fp16", "--epochs", "2")
        last = result_of(f / "a")
        assert last["step"] == last["schedule"]["last_epoch"] == last["ema"]["updates"] == 5  # of 6


def test_train_a_write_that_fails_leaves_the_old_file():
    with folder() as f:
        (f / "x").write_text("old")
        with contextlib.suppress(KeyError), checkpoint.atomic_write(f / "x") as file:
            file.write("half")
            file.flush()
            assert (f / "x").read_text() == "old"
            raise KeyError
        assert (f / "x").read_text() == "old" and [path.name for path in f.iterdir()] == ["x"]
        with checkpoint.atomic_write(f / "x") as file:
            file.write("new")
        assert (f / "x").read_text() == "new"


def test_train_names_the_image_that_cannot_be_read():
    with folder() as f:
        make_class_folder(f / "eyes")
        victim, annotation = sorted((f / "eyes" / "open").iterdir())[1], f / "eyes/annotation.csv"
        words = [*TINY, "--data", f / "eyes", "--out", f / "new"]
        victim.write_bytes(victim.read_bytes()[:40])
        refused(f"{victim} is not a readable image", *words)
        refused(f"{victim} is not a readable image", *words, "--cache", f / "cache")
        assert not list((f / "cache").iterdir())
        annotation.write_text("open/absent.png,1\n")
        refused("absent.png is listed in annotation.csv but does not exist", *words)
        annotation.write_text(f"open/{victim.name},1,2\n")
        refused("line 1: expected 2 columns", *words)


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
        assert len(result_of(f / "a")["history"]) == 2
        for name in ("last.pt", "best.pt"):
            weights = result_of(f / "a", name)["model"]
            assert all(value.isfinite().all() for value in weights.values())
        succeeded("--task", "ocec", "--out", f / "a", "--resume")


def test_train_overwrite_replaces_and_changed_data_are_refused():
    with folder() as f:
        run(f / "a", "--epochs", "1")
        run(f / "a", "--epochs", "2", "--overwrite")
        assert len(result_of(f / "a")["history"]) == 3
        make_npz(f / "eyes.npz", n=50)
        refused("the data or their split are not those of the run",
                "--task", "ocec", "--out", f / "a", "--resume")


def test_train_folds_run_each_and_report_mean_and_sd():
    with folder() as f:
        cv, third = f / "cv", f / "cv" / "fold-3"
        ppg, resume = [*PPG, "--data", f / "bidmc"], ["--task", "bidmc_hr", "--out", cv, "--resume"]
        out = ppg_run(cv, "--folds", "3", "--epochs", "1")
        rows = [read_scores(cv / f"fold-{k}")["test"] for k in (1, 2, 3)]
        summary = read_scores(cv)
        values = [row["model"]["mae"] for row in rows]
        assert math.isclose(summary["test"]["model"]["mae"], np.mean(values))
        assert math.isclose(summary["test_sd"]["model"]["mae"], np.std(values, ddof=1))
        assert summary["folds"] == 3
        floors = ["constant mean", "constant median", "spectral peak", "strong: beat intervals",
                  "median of three", "PULSE, the monitor's own rate"]
        assert list(summary["test"])[1:] == ["model", *floors]
        assert summary["test"]["rows"] == sum(row["rows"] for row in rows)
        for text in ("fold 3 of 3", "mean over the folds", "standard deviation over the folds"):
            assert text in out
        refused("already holds a run", *ppg, "--out", cv, "--folds", "3")
        # A fold by itself is the same run; --resume trains what is missing and writes the summary.
        (third / "last.pt").rename(f / "third.pt")
        for name in set(checkpoint.RUN_FILES) - {"last.pt", "examples.png"}:
            (third / name).unlink()
        before = (cv / "scores.json").read_text()
        (cv / "scores.json").unlink()
        succeeded(*resume)
        assert (cv / "scores.json").read_text() == before
        before = torch.load(f / "third.pt", weights_only=True)["model"]
        assert same_bits(before, result_of(third)["model"])
        refused("holds the folds of a cross-validation", *ppg, "--out", cv)
        ppg_run(f / "one", "--folds", "3", "--fold", "2", "--epochs", "1")
        whole = [(path / "scores.json").read_text() for path in (f / "one", cv / "fold-2")]
        assert whole[0] == whole[1]
        # An encoder for each fold.
        ppg_run(f / "pre", "--mode", "pretrain", "--folds", "3", "--epochs", "1")
        probe = ["--mode", "probe", "--pretrained", f / "pre", "--folds", "3"]
        out = ppg_run(f / "probe", *probe, "--epochs", "1")
        for k in (1, 2, 3):
            assert f"loaded from {f / 'pre' / f'fold-{k}' / 'best.pt'}" in out
        (f / "pre" / "fold-3" / "best.pt").unlink()  # refused before the first fold is trained
        out = refused("fold-3/best.pt does not exist", *ppg, "--out", f / "late", *probe)
        assert "epoch" not in out and not (f / "late" / "fold-1").exists()
        ppg_run(cv, "--folds", "2", "--overwrite", "--epochs", "1")
        assert not third.exists() and read_scores(cv)["folds"] == 2


def test_train_folds_of_different_recipes_are_never_averaged():
    with folder() as f:
        data, cv = ["--epochs", "1", "--data", ppg_folder(f)], f / "cv"
        resume = ["--task", "bidmc_hr", "--out", cv, "--resume"]
        for fold, folds in ((1, 3), (2, 4), (3, 3)):
            ppg_run(cv / f"fold-{fold}", "--folds", folds, "--fold", fold, *data)
        refused("--folds 3 contradicts the run that is resumed (4 there)", *resume)
        assert not (cv / "scores.json").exists()
        ppg_run(cv / "fold-2", "--folds", "3", "--fold", "2", *data, "--overwrite")
        assert "3 folds, " in succeeded(*resume)
        (cv / "fold-1" / "last.pt").unlink()
        refused("fold-1 already holds a run", *resume)
        for fold in (2, 3):
            (cv / f"fold-{fold}" / "last.pt").unlink()
        refused("there is no run in", *resume)
        ppg_run(f / "single", *data)
        refused("holds a run without --folds", *PPG, "--data", f / "bidmc",
                "--folds", "3", "--fold", "1", "--out", f / "single" / "fold-1")


def test_train_interrupted_folds_say_how_to_go_on_with_all_of_them():
    with folder() as f:
        words = [*PPG, "--data", ppg_folder(f), "--out", f / "cv"]
        process = started(*words, *"--folds 2 --epochs 30 --patience 0".split())
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("epoch   1/") and "fold 2 of 2\n" in lines:
                process.terminate()
        assert process.wait() == 128 + signal.SIGTERM
        resume = lines[-1].split()[2:]
        assert resume == [*PPG[:2], "--out", str(f / "cv"), "--resume", "--device", "cpu"]
        assert "2 folds, " in succeeded(*resume)


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
        # There is nothing to go on with.
        assert code == 128 + signal.SIGINT and "the folds before" not in out
        with replaced(train, "report_best", scored_late):
            code, out, err = call(*words)
        assert code == 128 + signal.SIGTERM and "--resume" in out, (out, err)
        assert "\nfold 1 of 2" in out and "\nfold 2 of 2" not in out, out
        out = succeeded("--task", "bidmc_hr", "--out", f / "cv", "--resume")
        assert "2 folds, " in out


def test_train_folds_work_for_the_eyes_too():
    with folder() as f:
        out = run(f / "cv", "--folds", "2", "--val-ratio", "0.3", "--epochs", "1")
        assert "2 folds, 60 test rows in all" in out


def test_train_seeds_run_each_and_report_mean_and_sd():
    with folder() as f:
        out = run(f / "s", "--seeds", "4,2", "--epochs", "1")
        assert "\nseed 4 of 4,2\n" in out and "2 seeds, 24 test rows in all" in out
        alone = run(f / "alone", "--seed", "2", "--epochs", "1")
        scores = [read_scores(f / "s" / f"seed-{seed}")["test"] for seed in (4, 2)]
        assert scores[1] == read_scores(f / "alone")["test"] and "seed-2" not in alone
        summary = read_scores(f / "s")
        values = [score["model"]["auroc"] for score in scores]
        assert summary["seeds"] == [4, 2] and values[0] != values[1]
        assert math.isclose(summary["test"]["model"]["auroc"], np.mean(values))
        assert math.isclose(summary["test_sd"]["model"]["auroc"], np.std(values, ddof=1))
        # --resume knows the seeds, trains what is missing and writes the summary
        resume = ["--task", "ocec", "--out", f / "s", "--resume"]
        before = result_of(f / "s" / "seed-2")["model"]
        for name in checkpoint.RUN_FILES:
            (f / "s" / "seed-2" / name).unlink(missing_ok=True)
        (f / "s" / "scores.json").unlink()
        succeeded(*resume)
        assert same_bits(before, result_of(f / "s" / "seed-2")["model"])
        again = read_scores(f / "s")
        assert again["seeds"] == [2, 4] and again["test"]["rows"] == summary["test"]["rows"]
        assert math.isclose(again["test"]["model"]["auroc"], np.mean(values))
        # seeds can be added
        succeeded(*resume, "--seeds", "4,2,7")
        assert read_scores(f / "s")["seeds"] == [4, 2, 7]
        refused("holds the runs of seeds 2,4,7", *TINY, "--out", f / "s")
        refused("holds a run without --folds or --seeds", *TINY, "--out", f / "alone",
                "--seeds", "2,4")
        refused("--seed 1 and --seeds 0,1", *TINY, "--seed", "1", "--seeds", "0,1")
        refused("--fold is not read with --seeds", *TINY, "--folds", "3", "--fold", "2",
                "--seeds", "0,1")
        refused("holds the runs of several seeds", *TINY, "--out", f / "s", "--folds", "2",
                "--data", f / "eyes.npz")
        # what --overwrite leaves out is not trained again by --resume
        run(f / "s", "--seeds", "4,2", "--epochs", "1", "--overwrite")
        assert not (f / "s" / "seed-7").exists()
        succeeded(*resume)
        assert read_scores(f / "s")["seeds"] == [2, 4]
        for words in ("3", "0,0", "1,x", "0,"):
            refused(f"--seeds {words}: give two or more", *TINY, "--seeds", words)


def test_train_seeds_and_folds_are_a_cross_validation_for_each_seed():
    with folder() as f:
        words = ["--folds", "2", "--seeds", "0,1", "--epochs", "1", "--data", ppg_folder(f)]
        out = ppg_run(f / "s", *words)
        assert "checking fold-2 in" in out and "2 folds, " in out and "2 seeds, " in out
        tests = [read_scores(f / "s" / f"seed-{seed}")["test"] for seed in (0, 1)]
        summary = read_scores(f / "s")["test"]
        assert math.isclose(summary["model"]["mae"], np.mean([x["model"]["mae"] for x in tests]))
        last = f / "s" / "seed-1" / "fold-2" / "last.pt"
        before = torch.load(last, weights_only=True)["model"]
        for name in checkpoint.RUN_FILES:
            (last.parent / name).unlink(missing_ok=True)
        succeeded("--task", "bidmc_hr", "--out", f / "s", "--resume")
        assert same_bits(before, torch.load(last, weights_only=True)["model"])
        assert read_scores(f / "s")["test"] == summary


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
