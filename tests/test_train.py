"""Tests of train."""

import csv
import dataclasses
import itertools
import json
import math
import re
import types
import weakref

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import losses
import models
import train
from runtime import checks
from runtime.settings import command_line
from tasks import bidmc_data, common, ocec
from tests.helpers import (
    FACEPARSE, faces_npz, folder, HERE, make_class_folder, make_npz, MODAL, near,
    need_pillow, need_real, NEVER, PPG, ppg_folder, prepared, quad_npz, raises, read_scores,
    refused, replaced, result_of, run, same_bits, scores_of, stays_run, succeeded, TINY)


def parsed_again(args):
    """The settings of the command that a run prints."""
    flags = train.TASKS[args.task].flags
    return train.parse_args(command_line(args, flags, flags).split()[2:])


def test_train_resolved_command_says_the_same_again():
    words = "--lr=3e-4 --batch_size 32 --num-epochs 7 --size 24x40 --no-channels-last"
    args = train.parse_args(["--task", "ocec", *words.split()])
    again = parsed_again(args)
    assert all(getattr(args, name) == getattr(again, name) for name in ocec.TASK.flags)
    assert (args.lr, args.batch_size, args.epochs) == (3e-4, 32, 7)
    assert (args.size, args.channels_last) == ((24, 40), False)
    assert args.typed == {"lr", "batch_size", "epochs", "size", "channels_last"}


def test_train_settings_do_not_change_after_parsing():
    args = train.parse_args(["--task", "ocec"])
    raises(AttributeError, "use replace(lr=...)", lambda: setattr(args, "lr", 1.0))
    assert args.replace(lr=1.0).lr == 1.0 != args.lr


def test_train_resolved_command_of_every_variant_and_mode_is_accepted():
    for name, task in train.TASKS.items():
        modes = task.flags["mode"].choices if "mode" in task.flags else ("",)
        for variant, mode in itertools.product(("default", *task.variants), modes):
            words = ["--mode", mode] if mode else []
            args = train.parse_args(["--task", name, "--variant", variant, *words])
            again = parsed_again(args)
            read = [name for name, flag in task.flags.items() if not flag.unmet(args)]
            assert all(getattr(args, name) == getattr(again, name) for name in read)


def test_train_help_shows_the_defaults_of_the_variant():
    for variant, lr, batch in (("current", "0.0001", 4096), ("conservative", "0.0002", 4096),
                               ("aggressive", "0.0003", 2048)):
        text = " ".join(succeeded("--task", "ocec", "--variant", variant, "--help").split())
        assert f"peak learning rate (default: {lr})" in text
        assert f"together (default: {batch})" in text
    args = train.parse_args(["--task", "ocec", "--variant", "balanced"])
    assert set(vars(args)) >= set(ocec.TASK.flags)
    for task in train.TASKS.values():
        for name, overrides in task.variants.items():
            assert set(overrides) <= set(task.flags), name


def test_train_task_has_the_fields_of_the_design_and_the_loop_knows_no_task():
    fields = [field.name for field in dataclasses.fields(common.Task)]
    assert fields == ["flags", "variants", "load", "rows", "network", "loss", "outputs", "scores",
                      "floors", "predictions", "examples", "headline", "export", "reference"]
    loop = (HERE / "train.py").read_text().split("# The step\n")[1].split("# Command line")[0]
    assert "def train_step" in loop and "def build" in loop
    assert not re.search("ocec|faceparse|bidmc|quadmodal|seqsetvae", loop)
    for path in (HERE / "train.py", *(HERE / "runtime").glob("*.py")):
        assert not re.search(r"\btask (==|!=) ", path.read_text()), path


def test_train_accumulation_equals_one_big_batch():
    def weights(f, batch_size, accumulate):
        off = ["--zoom", "1"]
        for name in ("flip", "degrees", "crop", "bend", "noise", "dropout", "warmup-epochs"):
            off += [f"--{name}", "0"]
        _, splits, state = prepared(
            f, *off, "--batch-size", str(batch_size), "--accumulate", str(accumulate),
            "--schedule", "none", "--block", "convnext", "--channels", "16", "--token-grid", "2x2")
        # AdamW would magnify the rounding of tiny gradients
        state.optimizer = torch.optim.SGD(state.raw_model.parameters(), lr=0.1)
        row = train.train_epoch(state, splits.train, 1, NEVER)
        flat = torch.cat([p.detach().flatten() for p in state.raw_model.parameters()])
        return flat, state.step, row["train_loss"]

    # 42 training rows: windows of 16 + 16 and of 10; this network has no batch norm
    with folder() as f:
        big, steps, loss = weights(f, 32, 1)
        small, steps_again, loss_again = weights(f, 16, 2)
    assert steps == steps_again == 2 and near(loss, loss_again, 1e-6)
    assert near(big, small, 1e-6), (big - small).abs().max()


def test_train_amp_schedules_and_samplers_all_train():
    with folder() as f:
        for i, words in enumerate((
                "--amp bf16", "--schedule cyclic --cyclic-steps-up 4", "--schedule none",
                "--ema-decay 0", "--sampler stratified --loss focal", "--clip 0 --cutmix 1",
                "--val-ratio 0 --test-ratio 0.3 --schedule plateau", "--monitor loss",
                "--amp fp16", "--base-batch 64 --test-ratio 0 --val-ratio 0.3")):
            run(f / str(i), *words.split(), "--epochs", "2")
            history = result_of(f / str(i))["history"]
            assert len(history) == 3, words
            assert all(math.isfinite(row["train_loss"]) for row in history[1:]), words
        words = "--val-ratio 0 --test-ratio 0.3 --monitor auroc --epochs 1".split()
        run(f / "blind", *words)
        run(f / "blind", *words, "--resume")  # the training loss picks there
        out = run(f / "still", "--epochs", "1", "--batch-size", "64", *NO_RATE)
        assert "at 0% of its highest" in out


def test_train_warns_where_amp_is_slower_than_float32():
    measured = checks.slowdown
    assert 0 < measured(torch.bfloat16, "cpu") < math.inf and measured(torch.float32, "cpu") == 1

    words = ["--task", "ocec", "--device", "cpu", "--epochs", "2", "--show-schedule"]
    for ratio, warned in (19.4, True), (1.9, False):
        with replaced(checks, "slowdown", lambda dtype, device: ratio):
            for amp in ("bf16", "fp16"):
                text = succeeded(*words, "--amp", amp)
                assert (f"--amp {amp} is slow on this cpu" in text) == warned, text
                assert ("19 times" in text) == warned, text
            assert "is slow on this" not in succeeded(*words)
    commands = re.findall(r"python train\.py [^`\n]+", (HERE / "README.md").read_text())
    assert len(commands) > 10 and not any("--amp" in command for command in commands)


def test_train_lr_of_a_step_is_the_schedule_of_that_step():
    with folder() as f:
        cosine = "--schedule cosine --warmup-epochs 1 --warmup-start-lr 1e-7 --min-lr 1e-6"
        run(f / "a", *cosine.split(), "--lr", "1e-3")
        rows = result_of(f / "a")["history"]
        assert [row["lr"] for row in rows[:2]] == [1e-7, 1e-7] and math.isclose(rows[2]["lr"], 1e-3)
        assert [row["step"] for row in rows] == [0, 3, 6, 9]  # 42 rows in batches of 16
        plateau = ("--schedule plateau --plateau-patience 0 --plateau-factor 0.5 --warmup-epochs 0 "
                   "--base-batch 64 --min-lr 0 --epochs 8")
        run(f / "b", *plateau.split(), "--lr", "1e-3")
        rates = [row["lr"] for row in result_of(f / "b")["history"]]
        assert rates[0] == 2.5e-4 and len(set(rates)) > 1
        assert all(a in (b, b * 2) for a, b in zip(rates, rates[1:]))


def test_train_ema_moves_and_best_pt_holds_the_weights_that_scored():
    with folder() as f:
        run(f / "a", "--lr", "3e-3", "--ema-decay", "0.9")
        last, best = result_of(f / "a"), result_of(f / "a", "best.pt")
        scores = read_scores(f / "a")
        torch.manual_seed(train.seed_of(0))
        start = models.EyeNet((12, 20), channels=8, blocks=2).state_dict()
        assert last["ema"]["updates"] == last["step"] == 9
        assert all(not torch.equal(last["ema"]["module"][name], start[name]) for name in start)
        row = last["history"][best["epoch"]]
        best_score = max(row["score"] for row in last["history"][1:])
        assert row["weights"] == best["weights"] and row["score"] == best["score"] == best_score
        assert math.isclose(scores["validation"]["model"]["f1"], best["score"])
        words = ["--eval", f / "a" / "best.pt", "--split", "validation"]
        assert f"{best['score']:.4f}" in succeeded("--task", "ocec", *words)


def test_train_predict_writes_the_probability_that_eval_scores():
    with folder() as f:
        run(f / "a", "--lr", "3e-3")
        best, csv_file, data_file = f / "a" / "best.pt", f / "preds.csv", f / "eyes.npz"
        predict = ["--task", "ocec", "--predict", best, "--data"]
        out = succeeded(*predict, data_file, "--out", csv_file)
        succeeded(*out.splitlines()[0].split()[2:])  # the printed command can be typed again
        with open(csv_file) as file:
            rows = list(csv.DictReader(file))
        assert list(rows[0]) == ["path", "logit", "prob_open"]
        assert rows[3]["path"] == "eyes.npz#3" and len(rows) == 60
        logits = np.array([float(row["logit"]) for row in rows])
        for logit, row in zip(logits, rows):
            assert near(1 / (1 + math.exp(-logit)), float(row["prob_open"]), 1e-5)
        f1 = losses.binary_report(logits, np.load(data_file)["labels"])["f1"]
        out = succeeded("--task", "ocec", "--eval", best, "--split", "all")
        assert f"{f1:.4f}" in out.split("model")[1].split("constant")[0]
        make_npz(f / "unlabelled.npz", labels=None)
        succeeded(*predict, f / "unlabelled.npz", "--out", f / "p2.csv")
        assert (f / "p2.csv").read_text().replace("unlabelled", "eyes") == csv_file.read_text()


def test_train_predictions_never_replace_what_they_are_made_from():
    def contents(path):
        return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}

    with folder() as f:
        run(f / "a", "--epochs", "1")
        for name in ("copy.pt", "copy.pt2"):
            (f / name).write_bytes((f / "a" / "best.pt").read_bytes())
        (f / "folder").mkdir()
        predict = ["--predict", f / "copy.pt", "--data", f / "eyes.npz", "--out"]
        before = contents(f)
        for message, words in (
                ("would replace", [*predict, f / "copy.pt"]),
                ("would replace", [*predict, f / "eyes.npz"]),
                ("would replace", [*predict, f / "a" / "log.jsonl"]),
                ("is a folder", [*predict, f / "folder"]),
                ("would replace", ["--export", f / "copy.pt2", "--out", f / "copy.pt2"])):
            refused(message, "--task", "ocec", *words)
            assert contents(f) == before, words


def test_train_find_lr_prints_a_curve_and_writes_nothing():
    with folder() as f:
        out = succeeded(*TINY, "--data", make_npz(f / "eyes.npz"), "--find-lr")
        assert "suggested: --lr" in out and "<- suggested" in out
        assert [path.name for path in f.iterdir()] == ["eyes.npz"]


def test_train_scores_do_not_depend_on_the_batch_size_and_weights_come_from_training_rows():
    with folder() as f:
        args, splits, state = prepared(f)
        positives = int(splits.train.labels.sum())
        rows = ocec.TASK.rows(args.data, args, splits.facts, need_labels=True).split
        weight = splits.facts["pos_weight"]
        assert weight == (len(splits.train) - positives) / positives
        assert weight != losses.auto_pos_weight(rows.labels)
        outputs = []
        for chunk in (7, 512):
            rows.chunk = chunk
            with torch.no_grad():
                outputs.append(train.outputs_of(state.raw_model, rows, state)["logits"])
        assert len(outputs[0]) == 60 and near(*outputs, 1e-5)


def refused_data(f):
    """{words: message} of files in f that are no eye images; eyes.npz is good."""
    count = itertools.count()
    images, labels, _, _ = ocec.synthetic_eyes(60, size=(12, 20), seed=1)
    images, seventh = images.permute(0, 2, 3, 1).numpy(), np.arange(60) == 7
    bright = images.astype(np.float32)
    bright[5, 2, 3] = np.nan

    def npz(**changes):
        return f"--data {make_npz(f / f'{next(count)}.npz', **changes)}"

    objects = np.array([{"a": 1}] * 4, dtype=object)
    np.savez(f / "pickled.npz", images=objects, labels=np.zeros(4))
    np.save(f / "plain.npy", labels)
    (f / "empty").mkdir(), (f / "file").write_text("x")
    (f / "broken.npz").write_bytes((f / "eyes.npz").read_bytes()[:500])
    return {
        f"--data {f / 'nowhere'}": "does not exist",
        f"--data {f / 'empty'}": "holds no images",
        npz(labels=np.ones(60, dtype=np.int64)): "holds one class only",
        npz(labels=np.where(seventh, 2, labels)):
            "row 7: label 2 is not 0 (closed) or 1 (open)",
        npz(images=bright): "'images' holds 3 NaN",
        npz(labels=np.where(seventh, np.nan, labels)): "'labels' holds 1 NaN",
        npz(images=images.reshape(60, -1)): "expected uint8 (n, h, w)",
        npz(images=images.astype(np.float32)): "expected uint8 (n, h, w)",
        npz(labels=labels[:50]): "one entry per image",
        npz(labels=None): "no array 'labels'",
        npz(groups=np.zeros((60, 2))): "'groups' has shape (60, 2)",
        npz(labels=labels[:, None]): "'labels' has shape (60, 1)",
        f"--data {f / 'pickled.npz'}": "not a readable .npz",
        f"--data {f / 'broken.npz'}": "not a readable .npz",
        f"--data {f / 'file'}": "not a readable .npz",
        f"--data {f / 'plain.npy'}": "not a readable .npz",
    }


def refused_calls(f):
    """{words: message} of calls that are wrong beside the run in f / "done"."""
    done, good = f / "done", f / "eyes.npz"
    whole = (done / "best.pt").read_bytes()
    best = torch.load(done / "best.pt", weights_only=True)
    (f / "truncated.pt").write_bytes(whole[: len(whole) // 2]), (f / "zero.pt").write_bytes(b"")
    torch.save(best | {"task": "faceparse"}, f / "other.pt")
    torch.save({"model": {}}, f / "bare.pt")
    best["model"].pop("stem.0.weight")
    torch.save(best, f / "lacking.pt")
    resume, evaluate = f"--out {done} --resume", f"--eval {done / 'best.pt'}"
    return {
        "--variant wild": "invalid choice: 'wild'",
        "--lr -1": "--lr -1 must be finite and above 0",
        "--lr nan": "--lr nan must be finite",
        "--epochs 0": "--epochs 0 must be finite and at least 1",
        "--learning-rate 1": "unrecognized arguments: --learning-rate",
        "--batch 8": "unrecognized arguments: --batch",  # no abbreviations
        "--schedule linear": "invalid choice: 'linear'",
        "--size 32xa": "not of the form ROWSxCOLUMNS",
        "--train-ratio 0.9": "add up to 1",
        "--resume": "there is no run in",
        f"--out {f / 'file' / 'below'}": "is a file, not a folder",
        f"--out {done}": "already holds a run",
        f"{resume} --overwrite": "give one of them",
        f"{resume} --lr 5e-4": "contradicts the run that is resumed",
        f"{resume} --variant current":
            "contradicts the run that is resumed (default there)",
        f"--eval {f / 'truncated.pt'}": "is not a readable checkpoint",
        f"--eval {f / 'zero.pt'}": "is not a readable checkpoint",
        f"--eval {f / 'other.pt'}": "is a checkpoint of task faceparse, not of ocec",
        f"--eval {f / 'bare.pt'}": "holds no 'format'",
        f"--eval {f / 'absent.pt'}": "does not exist",
        f"--eval {f / 'lacking.pt'}": "does not hold the weights of its own recipe",
        f"{evaluate} --lr 1": "--lr is not read by this call",
        "--split test": "--split is not read by this call",
        "--find-lr --overwrite": "--overwrite is not read by this call",
        f"--predict {done / 'best.pt'} --data {good} --out {f / 'absent' / 'preds.csv'}":
            "the folder",
        f"--predict {done / 'best.pt'}": "needs --data",
        "--blocks 12 --block convnext": "blocks do not fit a size of 12x20",
        "--batch-size 41": "leaves a batch of 1 of the 42 training rows",
        "--device cuda:9": "cannot be used",
        "--device meta": "this script knows cpu and cuda",
        "--crop 12": "--crop 12 must be below the shorter side",
        "--gamma 3": "--gamma is read only with --loss focal, not with bce",
        "--plateau-factor 0.3": "--plateau-factor is read only with --schedule plateau",
        "--schedule cyclic --warmup-epochs 1": "--warmup-epochs is read only with",
        "--warmup-epochs 3": "--warmup-epochs 3 must be below --epochs 3",
        "--lr 1e-7": "--warmup-start-lr 1e-06 must not be above the peak rate, 1e-07",
    }


def test_train_refuses_bad_input_with_exit_code_2_and_one_message():
    with folder() as f:
        run(f / "done")
        best = (f / "done" / "best.pt").read_bytes()
        cases = refused_data(f) | refused_calls(f)
        for words, message in cases.items():
            words, base = words.split(), TINY[2:]
            if {"--eval", "--predict"} & {*words} or {"--resume", "--out"} <= {*words}:
                base = []
            for flag, value in (("--data", f / "eyes.npz"), ("--out", f / "new")):
                if flag not in words and not {"--eval", "--predict", "--find-lr"} & {*words}:
                    words += [flag, value]
            out = refused(message, "--task", "ocec", *base, *words)
            assert not (f / "new").exists() and "epoch " not in out, words
        assert (f / "done" / "best.pt").read_bytes() == best


def test_train_epoch_equals_the_loop_written_out():
    """Clip, AdamW, schedule and EMA in their order, without the loop of the script."""
    with folder() as f:
        words = ("--clip 0.1 --weight-decay 0.1 --warmup-epochs 1 --warmup-start-lr 1e-4 "
                 "--lr 1e-2 --ema-decay 0.9 --no-channels-last")
        args, splits, state = prepared(f, *words.split())
        row = train.train_epoch(state, splits.train, 1, NEVER)
        torch.manual_seed(train.seed_of(args.seed))
        model = ocec.network(args, splits.facts).train()
        shadow = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1, fused=False)
        torch.manual_seed(train.seed_of(args.seed, 1))
        generator, norms = torch.Generator().manual_seed(train.seed_of(args.seed, 1, 1)), []
        batches = data.shuffled_batches(len(splits.train), 16, seed=args.seed, epoch=1)
        pos_weight = torch.tensor(splits.facts["pos_weight"])
        for t, rows in enumerate(batches):
            optimizer.param_groups[0]["lr"] = 1e-4 + (1e-2 - 1e-4) * t / 3
            batch = splits.train.batch(rows, generator)
            logits, targets = model(batch["inputs"]), batch["targets"]
            loss = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=pos_weight)
            loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)))
            optimizer.step(), optimizer.zero_grad()
            decay = min(0.9, (1 + t) / (10 + t))
            for name, value in model.state_dict().items():
                average = decay * shadow[name] + (1 - decay) * value
                shadow[name] = average if value.is_floating_point() else value.clone()
        for ours, want in ((state.raw_model, model.state_dict()), (state.ema.module, shadow)):
            for name, value in ours.state_dict().items():
                assert near(value, want[name], 1e-5), name
        assert near(row["grad_norm"], np.mean(norms), 1e-3) and row["step"] == 3
        assert math.isclose(row["lr_end"], 1e-4 + 0.0099 * 2 / 3)


def test_train_order_augmentation_and_dropout_follow_seed_and_epoch():
    with folder() as f:
        _, splits, state = prepared(f)

        class Recorder:
            labels = splits.train.labels

            def __len__(self):
                return len(splits.train)

            def batch(self, rows, generator):
                seen.append((rows.tolist(), generator.initial_seed(), torch.initial_seed()))
                return splits.train.batch(rows, generator)

        def drawn(epoch):
            seen.clear()
            train.train_epoch(state, Recorder(), epoch, NEVER)
            return seen[0]

        seen = []
        first, again, second = (drawn(epoch) for epoch in (1, 1, 2))
        assert first == again and all(a != b for a, b in zip(first, second))


def test_train_autocast_covers_forward_and_loss_in_training_and_not_in_scoring():
    with folder() as f:
        args, splits, state = prepared(f, "--amp", "bf16")
        criterion, kinds, autocasts = ocec.criterion, [], []

        def recorded(*words):
            autocasts.append(torch.is_autocast_enabled("cpu"))
            return criterion(*words)

        state.raw_model.register_forward_hook(lambda _, inputs, output: kinds.append(output.dtype))
        with replaced(ocec, "criterion", recorded):
            train.train_epoch(state, splits.train, 1, NEVER)
            scores_of(state.raw_model, splits.validation, args, splits.facts)
        assert kinds == [torch.bfloat16] * 3 + [torch.float32]
        assert autocasts == [True] * 3 + [False]


def test_train_every_augmentation_flag_reaches_the_batch():
    images, labels, _, _ = ocec.synthetic_eyes(20, size=(12, 20))
    plain = ocec.EyeSplit(images, labels, np.arange(20)).batch(np.arange(8))["inputs"]
    for name in ocec.AUGMENTATIONS:
        augment = {name: 1.5 if name == "zoom" else 1}
        split = ocec.EyeSplit(images, labels, np.arange(20), augment=augment)
        batch = split.batch(np.arange(8), torch.Generator().manual_seed(0))
        assert not torch.equal(batch["inputs"], plain), name
    with folder() as f:
        args, splits, _ = prepared(f, "--flip", "0.25", "--crop", "4", "--mixup", "0.2")
        assert splits.train.augment == {
            "crop": 4, "flip": 0.25, "degrees": 11.0, "zoom": 1.2, "photometric": 0.0, "clahe": 0.0,
            "bend": 0.5, "noise": 0.05, "mixup": 0.2, "cutmix": 0.0}
        whole = ocec.TASK.rows(args.data, args, splits.facts, need_labels=True).split
        as_read = whole.batch(splits.validation.rows[:3])["inputs"]
        assert torch.equal(splits.validation.batch(np.arange(3))["inputs"], as_read)


def test_train_splits_keep_groups_apart_and_the_test_split_is_the_one_reported():
    with folder() as f:
        _, splits, _ = prepared(f)
        groups = np.load(f / "eyes.npz")["groups"]
        sides = [set(groups[split.rows]) for split in splits.named().values()]
        assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
        assert [len(split) for split in splits.named().values()] == [42, 6, 12]
        run(f / "a", "--lr", "3e-3")
        scores = read_scores(f / "a")
        assert scores["test"]["rows"] == 12 and scores["validation"]["rows"] == 6
        out = succeeded("--task", "ocec", "--eval", f / "a" / "best.pt", "--split", "test")
        values = [f"{value:.4f}" for value in scores["test"]["model"].values()]
        [line] = [line for line in out.splitlines() if line.startswith("model ")]
        assert line.split()[1:] == values


def test_train_monitor_plateau_and_early_stopping_use_the_right_numbers():
    with folder() as f:
        words = ("--monitor loss --epochs 12 --patience 2 --lr 3e-2 --schedule plateau "
                 "--warmup-epochs 2.5")
        run(f / "a", *words.split())
        last, best = result_of(f / "a"), result_of(f / "a", "best.pt")
        rows = last["history"][1:]
        losses_seen = [min(row["raw"]["loss"], row["ema"]["loss"]) for row in rows]
        assert [row["score"] for row in rows] == losses_seen and best["score"] == min(losses_seen)
        assert len(rows) < 12 and rows[-1]["epoch"] == best["epoch"] + 2
        raw = [row["raw"]["loss"] for row in rows]
        assert min(raw) <= last["schedule"]["best"] <= min(raw) * 1.001
        words = "--schedule plateau --warmup-epochs 2.5 --plateau-patience 50"
        assert "plateau:" not in run(f / "b", *words.split())  # warm-up is no reduction
        words = ("--schedule plateau --warmup-epochs 0 --plateau-patience 0 --lr 1e-7 "
                 "--warmup-start-lr 0 --min-lr 0 --epochs 6 --monitor auroc")
        out = run(f / "c", *words.split())
        assert "auroc" in out and ("plateau: lr 1e-07 -> 5e-08" in out or "plateau" not in out)


def test_train_monitor_last_keeps_the_average_after_the_last_epoch():
    with folder() as f:
        out = run(f / "a", "--monitor", "last", "--epochs", "4", "--lr", "3e-2")
        last, best = result_of(f / "a"), result_of(f / "a", "best.pt")
        assert best["epoch"] == 4 and best["weights"] == "ema"
        assert same_bits(best["model"], last["ema"]["module"])
        rows = last["history"][1:]
        assert [row["score"] for row in rows] == [row["ema"]["f1"] for row in rows]
        for text in ("last epoch 4 (ema weights)", "validation f1: last", "\nvalidation, 6 rows"):
            assert text in out, (text, out)
        assert "picked" not in out and "of its highest" not in out
        # without validation rows too; without an average the raw weights
        run(f / "b", *"--monitor last --val-ratio 0 --test-ratio 0.3 --epochs 2".split())
        assert result_of(f / "b", "best.pt")["weights"] == "ema"
        run(f / "c", *"--monitor last --ema-decay 0 --epochs 2".split())
        assert result_of(f / "c", "best.pt")["weights"] == "raw"
        refused("--patience 2 waits for a new best", *TINY, "--monitor", "last", "--patience", "2")


def test_train_eval_says_whether_the_run_saw_the_data():
    with folder() as f:
        run(f / "a", "--epochs", "1")
        best, other = f / "a" / "best.pt", make_npz(f / "other.npz", n=120)
        evaluate = ["--task", "ocec", "--eval", best, "--data"]
        (f / "copy.npz").write_bytes((f / "eyes.npz").read_bytes())
        assert "training rows included" in succeeded(*evaluate, f / "copy.npz")
        images, labels, _, _ = ocec.synthetic_eyes(6, size=(12, 20), seed=9)
        np.savez(f / "six.npz", images=images[:, 0].numpy(), labels=np.ones(6, dtype=np.int64))
        out = succeeded(*evaluate, f / "six.npz")
        for text in ("did not see", "all rows, 6 rows", "nan"):  # NaN: AUROC of one class
            assert text in out
        refused("not the data that the run split", *evaluate, other, "--split", "test")
        for name in ("last.pt", "log.jsonl", "scores.json"):
            (f / "a" / name).unlink()
        refused("already holds a run", *TINY, "--data", f / "eyes.npz", "--out", f / "a")
        assert best.exists()


def same_run(a, b):
    """Whether two runs left the same files, apart from times and the path of the data."""
    contents = []
    for path in (a, b):
        rows = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
        for row in rows:
            row.pop("seconds", None), row.pop("rows_per_s", None)
        checkpoints = [result_of(path, name) | {"data": ""} for name in ("best.pt", "last.pt")]
        contents.append([rows, checkpoints])
    return same_bits(*contents)


def test_train_with_a_cache_equals_training_without_bit_for_bit():
    read = bidmc_data.read_bidmc

    def without_cache(path, cache, **options):
        return read(path, **options)

    with folder() as f:
        eyes = [*TINY, *"--accumulate 2 --mixup 0.4 --clahe 0.5 --sampler stratified".split()]
        calls = {
            "eyes.npz": [*eyes, "--data", make_npz(f / "eyes.npz")],
            "eyes": [*eyes, "--data", f / "png"],
            "faces": [*FACEPARSE, "--mixup", "0.2", "--data", faces_npz(f / "faces.npz")],
            "modalities": [*MODAL, "--mixup", "0.3", "--data", quad_npz(f / "modal.npz")],
            "heart": [*PPG, "--stretch", "1.2", "--data", ppg_folder(f)],
            "pretraining": [*PPG, "--mode", "pretrain", "--data", f / "bidmc"]}
        make_class_folder(f / "png", n=48)
        for name, words in calls.items():
            with replaced(bidmc_data, "read_bidmc", without_cache):
                succeeded(*words, "--out", f / "plain" / name)
            for out in ("builds", "maps"):
                succeeded(*words, "--out", f / out / name, "--cache", f / "cache" / name)
                assert list((f / "cache" / name).iterdir()), name
                assert same_run(f / "plain" / name, f / out / name), (name, out)
        for name, written in (("eyes.npz", "a.csv"), ("modalities", "a.npz")):
            best = f / "maps" / name / "best.pt"
            plain, mapped = f / f"plain-{written}", f / f"mapped-{written}"
            words = [*calls[name][:2], "--predict", best, *calls[name][-2:], "--out"]
            succeeded(*words, plain)
            succeeded(*words, mapped, "--cache", f / "cache" / name)
            assert plain.read_bytes() == mapped.read_bytes()


def test_train_real_eyes_beat_every_constant_within_three_epochs():
    need_pillow()
    with folder() as f:
        words = "--lr 2e-3 --size 24x24 --channels 16 --blocks 4 --epochs 3 --device cpu"
        out = succeeded("--task", "ocec", *words.split(), "--data", need_real("eyes_cew"),
                        "--out", f / "a")
        scores = read_scores(f / "a")["test"]
    assert "by group" in out and scores["model"]["f1"] > 0.8 > scores["constant"]["f1"], scores
    assert scores["model"]["auroc"] > 0.85, scores


def test_train_real_original_run_prints_its_statistics_and_what_a_constant_scores():
    words = "--epochs 1 --width 16 --depth 1 --device cpu"
    tiny = ["--data", need_real("bidmc_csv"), *words.split()]
    with folder() as f:
        breathing, original = ["--task", "bidmc_rr", *tiny], ["--variant", "original"]
        out, scores = succeeded(*breathing, *original, "--out", f / "rr"), read_scores(f / "rr")
        for text in (
                "train: 9,912 windows, breaths per minute mean 17.216, sd 4.430, 0.0 to 36.0",
                "validation: 1,180 windows, breaths per minute mean", ", sd 3.859, ",
                "test: 1,416 windows"):
            assert text in out
        for split, mae in (("validation", "2.222"), ("test", "2.352")):
            assert f"{scores[split]['constant median']['mae']:.3f}" == mae
        assert scores["test"]["true rate"] == {"mae": 2.0}
        assert scores["test"]["its best count"] == {"mae": 1.5}
        assert result_of(f / "rr", "best.pt")["facts"]["median"] == 18
        succeeded(*breathing, *original, "--mode", "pretrain", "--out", f / "pre")
        for variant, rates in (("A", [1e-4, 1e-5]), ("B", [1e-4]), ("C", [5e-5, 5e-6])):
            words = ["--variant", variant, "--pretrained", f / "pre", "--out", f / variant]
            succeeded(*breathing, *words)
            assert result_of(f / variant)["schedule"]["base_lrs"] == rates
        out = succeeded("--task", "bidmc_hr", *tiny, *original, "--out", f / "hr")
        [line] = [line for line in out.splitlines() if line.startswith("train: ")]
        assert line.startswith("train: 9,912 windows, beats per minute"), line
        assert line.endswith(", 52.2 to 131.2"), line
        for name, want in (("mean", "88.12"), ("sd", "11.76")):
            assert f"{float(re.search(name + ' ([0-9.]+)', line)[1]):.2f}" == want, line


def test_train_real_breathing_beats_every_constant_on_held_out_patients():
    with folder() as f:
        words = "--stride 8 --epochs 8 --device cpu".split()
        succeeded("--task", "bidmc_rr", "--data", need_real("bidmc_csv"), *words, "--out", f / "a")
        scores = read_scores(f / "a")["test"]
    model = scores["model"]
    for name in ("constant mean", "constant median"):
        assert model["mae"] < 0.8 * scores[name]["mae"], scores
        assert model["rmse"] < 0.9 * scores[name]["rmse"], scores


def test_train_reports_the_last_ten_epochs_of_the_kind_of_weights_that_won():
    with folder() as f:
        run(f / "a", "--epochs", "12", "--lr", "1e-2", "--ema-decay", "0.9")
        scores = read_scores(f / "a")
        history = result_of(f / "a")["history"]
    last = [row[scores["weights"]]["f1"] for row in history[3:]]
    assert len(last) == scores["last"]["epochs"] == 10 and np.std(last) > 0
    # With one kind of weights the better of the two would be the same.
    assert {row["weights"] for row in history[3:]} == {"raw", "ema"}
    assert math.isclose(scores["last"]["mean"], np.mean(last))
    assert math.isclose(scores["last"]["sd"], np.std(last, ddof=1))


def test_train_real_faces_have_the_floors_and_ceilings_that_were_measured():
    source = need_real("celebamask_mini")
    need_pillow()
    with folder() as f:
        for name in ("images", "masks"):
            (f / "set" / name).mkdir(parents=True)
            for file in sorted((source / name).iterdir())[:200]:
                (f / "set" / name / file.name).symlink_to(file)
        words = ("--size 48 --epochs 2 --lr 4e-3 --width 24 --train-ratio 0.85 --val-ratio 0.05 "
                 "--device cpu").split()
        out = succeeded("--task", "faceparse", "--data", f / "set", *words, "--out", f / "a")
        test = read_scores(f / "a")["test"]
    scores = {name: row["f"] for name, row in test.items() if name != "rows"}
    assert 0.025 < scores["constant background"] < 0.04, scores
    assert 0.45 < scores["constant by position"] < 0.53, scores
    assert 0.80 < scores["at 48x48, nearest"] < 0.87 < scores["at 48x48, by area"] < 0.95, scores
    assert 0.93 < scores["sides set right"] <= 1, scores
    assert scores["model"] > 4 * scores["constant background"], scores
    reversed_masks = re.search(r"of 200 masks cannot be told, reversed in (\d+)", out)[1]
    assert int(reversed_masks) in range(8, 20), out


def test_train_compile_without_a_compiler_is_refused_before_training():
    def fails(*_):
        raise RuntimeError("no working C++ compiler found")

    def missing(model):  # as torch.compile, which compiles at the first call
        return model if isinstance(model, nn.Module) else fails

    with folder() as f, replaced(torch, "compile", missing):
        raises(ValueError, "install a C++ compiler", lambda: checks.check_compile("cpu"))
        words = ["--data", make_npz(f / "eyes.npz"), "--out", f / "a", "--compile"]
        refused("install a C++ compiler", *TINY, *words)
        assert not (f / "a").exists()


def test_train_real_motion_is_told_from_persons_never_seen():
    path = need_real("motionsense") / "motionsense_18_subjects.npz"
    with folder() as f:
        words = "--lr 1e-3 --epochs 2 --width 32 --heads 4 --device cpu".split()
        succeeded("--task", "quadmodal", "--data", path, *words, "--out", f / "a")
        scores = read_scores(f / "a")["test"]
    accuracy = {name: row["accuracy"] for name, row in scores.items() if name != "rows"}
    assert accuracy["model"] > 0.7 > 0.4 > accuracy["constant majority"], scores["model"]
    for name in ("attitude", "gravity", "rotation"):
        assert accuracy[f"ridge {name}"] < accuracy["ridge all"], name


def test_train_show_schedule_prints_first_and_last_rate_of_every_epoch():
    with folder() as f:
        quad_npz(f / "quad.npz", n=2400)
        words = "--variant original --width 8 --hidden 8 --embed 8 --device cpu --show-schedule"
        out = succeeded("--task", "quadmodal", "--data", f / "quad.npz", *words.split())
        assert not (f / "runs").exists()
    lines = [line for line in out.splitlines() if line.startswith("epoch ")]
    assert len(lines) == 100 and " to 1.00e-06 |" in lines[-1]
    assert "lr 1.00e-07 to " in lines[0] and "lr 1.00e-04 to " in lines[10]
    bars = [line.count("#") for line in lines]
    assert max(bars) == 50 and bars.index(50) in (9, 10, 11) and bars[0] < 10 and bars[-1] <= 1
    plateau = ["--show-schedule", "--schedule", "plateau"]
    for task, words in (("ocec", TINY[2:]), ("bidmc_hr", PPG[2:]), ("faceparse", FACEPARSE[2:])):
        out = succeeded("--task", task, *words, *plateau)
        shown = re.findall(r"^epoch +\d+ \| lr [0-9.e-]+ to [0-9.e-]+ \| #+$", out, re.M)
        assert len(shown) == int(words[words.index("--epochs") + 1]), out
    # The five epochs of warm-up of the variant, more than there are, are not read.
    succeeded(*TINY, "--variant", "aggressive", "--schedule", "cyclic", "--show-schedule")
    words = ["--epochs", "1", "--batch-size", "3000", *NO_RATE, "--show-schedule"]
    assert "epoch    1 | lr 0.00e+00 to 0.00e+00" in succeeded(*TINY, *words)


# A rate of 0 where an epoch is one step.
NO_RATE = ["--schedule", "none", "--warmup-epochs", "0.9", "--warmup-start-lr", "0"]


def test_train_check_sampler_walks_all_batches_of_an_epoch():
    def rare_classes(arrays):
        rare = {name: arrays[name][:240] for name in ("audio", "sensor", "label_names")}
        return rare | {"labels": np.repeat([0, 1, 2], [220, 16, 4])}

    with folder() as f:
        quad_npz(f / "quad.npz", change=rare_classes)
        check = [*MODAL, "--data", f / "quad.npz", "--check-sampler"]
        out = succeeded(*check, "--batch-size", "9")
        assert "batches of one class: 0" in out and "WARNING" not in out, out
        assert "at least 3, 3.00 on average" in out
        out = succeeded(*check, "--sampler", "shuffled", "--batch-size", "80")
        assert re.search(r"WARNING: one class is 9\d\.\d% of the rows drawn", out), out
        refused("this task has none", "--task", "faceparse", *FACEPARSE[2:], "--check-sampler")


def test_train_plateau_watches_the_loss_or_the_monitored_score():
    """Seen in the original: it watched the loss, and AUROC was the score of interest."""
    words = ("--schedule plateau --plateau-patience 0 --warmup-epochs 0 --epochs 6 --ema-decay 0 "
             "--lr 0.01").split()
    reduced = {}
    with folder() as f:
        for watches, key, sign in (("loss", "loss", 1), ("monitor", "auroc", -1)):
            stays_run(f / watches, *words, "--plateau-watches", watches)
            log = (f / watches / "log.jsonl").read_text().splitlines()
            rows = [json.loads(line) for line in log[1:]]
            values, best, expected = [sign * row["raw"][key] for row in rows], math.inf, []
            for value in values:
                better = best == math.inf or value < best - 1e-4 * abs(best)
                expected.append(not better)
                best = value if better else best
            reduced[watches] = [row["plateau_lr"][1] < row["plateau_lr"][0] for row in rows]
            assert reduced[watches] == expected, (watches, values)
            assert any(expected) and not all(expected), (watches, values)
    assert reduced["loss"] != reduced["monitor"]


def test_train_outputs_of_a_split_lie_in_one_tensor_and_not_in_one_of_each_batch():
    """Many small ones would cut the free memory into pieces."""
    split = ocec.EyeSplit(torch.zeros(1100, 3, 4, 4, dtype=torch.uint8), None, np.arange(1100))
    made = []

    def outputs(model, batch, args, facts):
        assert all(reference() is None for reference in made[:-1])
        values = batch["inputs"].mean((2, 3)) + len(made)
        made.append(weakref.ref(values))
        return {"logits": values}

    task = types.SimpleNamespace(outputs=outputs, reference=False)
    run = types.SimpleNamespace(task=task, args=None, facts=None)
    joined = train.outputs_of(nn.Identity(), split, run)["logits"]
    assert len(made) == 3 and joined.shape == (1100, 3)
    assert torch.equal(joined[512:1024], torch.full((512, 3), -1.0) + 1)


def test_train_every_schedule_can_be_chosen_and_a_task_says_which_way_its_scores_go():
    for task in train.TASKS.values():
        assert set(task.flags["schedule"].choices) == set(train.SCHEDULES)
    task = train.TASKS["ocec"]
    for flags, text in (({}, "needs a flag `monitor`"),
                        ({"monitor": common.Flag("mse", "", choices=("mse",))}, "add 'mse' to")):
        raises(ValueError, text, lambda: dataclasses.replace(task, flags=flags))
    without = dataclasses.replace(task, floors=lambda *_: {"majority": {"f1": 0.5}})
    with folder() as f, replaced(train, "TASKS", train.TASKS | {"ocec": without}):
        make_npz(f / "eyes.npz")
        refused("need a constant that has this score", *TINY, "--data", f / "eyes.npz",
                "--out", f / "a")
