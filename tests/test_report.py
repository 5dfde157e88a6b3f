"""Tests of report."""

import collections
import contextlib
import copy
import csv
import io
import json
import math
import re
import types
import xml.etree.ElementTree
import zlib

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import ema
import losses
import models
import train
from runtime import debug, diagnosis, page, report
from tasks import (
    bidmc, bidmc_data, common, faceparse, ocec, quadmodal, seqsetvae, seqsetvae_pretrain)
from tests.helpers import (
    call, FACEPARSE, faces_npz, faces_run, folder, loaded, make_npz, MODAL, near, NEVER,
    png_content, PPG, ppg_folder, ppg_run, prepared, quad_npz, quad_run, random_images,
    replaced, result_of, run, same_bits, STAYS, stays_folder, stays_run, succeeded, TINY)


def test_train_prints_the_constant_beside_every_score():
    with folder() as f:
        out = run(f / "a")
        scores = json.loads((f / "a" / "scores.json").read_text())
    assert out.startswith("python train.py --task ocec --epochs 3 --batch-size 16 ")
    assert "baselines on the" in out and "used for nothing but this" in out
    assert out.count("constant  ") == 3
    epochs = [line for line in out.splitlines() if line.startswith("epoch ")]
    assert len(epochs) == 4 and "untrained" in epochs[0]
    assert all("| floor 0." in line for line in epochs)
    for split in ("validation", "test"):
        constant = scores[split]["constant"]
        share = constant["auprc"]  # of open eyes
        assert math.isclose(constant["f1"], 2 * share / (1 + share))
        assert scores[split]["ceiling"]["f1"] == 1


def test_train_strong_floor_is_scored_as_the_network_is_and_kept_for_new_rows():
    with folder() as f:
        out = run(f / "a")
        _, splits = loaded(*TINY, "--data", f / "eyes.npz")
        best = result_of(f / "a", "best.pt")
        new = make_npz(f / "new.npz", n=40)
        again = succeeded("--task", "ocec", "--eval", str(f / "a" / "best.pt"), "--data", str(new))
        scores = json.loads((f / "a" / "scores.json").read_text())
    name = "strong: logistic on HOG"
    assert out.count(f"\n{name} ") == 3 and f"\n{name} " in again
    parts = (splits.train, splits.test)
    x = [data.hog_features(split.images[split.rows]) for split in parts]
    logits = losses.logistic_predict(x[0], splits.train.labels, x[1], penalty=468)
    report_of = losses.binary_report(logits, splits.test.labels)
    assert math.isclose(scores["test"][name]["auroc"], report_of["auroc"])
    assert math.isclose(scores["test"][name]["f1"], report_of["f1"])
    assert near(best["facts"]["strong"]["weights"], splits.facts["strong"]["weights"], 1e-6)
    f1 = scores["validation"][name]["f1"]
    assert out.count(f"| logistic on HOG {f1:.4f} ") == 4  # of four epochs


def test_train_resume_accepts_a_strong_floor_whose_last_digits_differ():
    now = {"data": 1, "strong": {"weights": [0.1]}}
    assert train.differing(now | {"strong": {"weights": [0.1 + 1e-15]}}, now) == []
    assert train.differing({"data": 2}, now) == ["data"]


def test_train_debug_prints_labels_gradients_and_a_checklist_and_changes_nothing():
    with folder() as f:
        plain = quad_run(f / "a", "--epochs", "3")
        out = quad_run(f / "b", "--epochs", "3", "--debug")
        assert same_bits(result_of(f / "a"), result_of(f / "b")) and "debug" not in plain
        lines = [line for line in out.splitlines() if line.startswith("debug epoch ")]
        assert len(lines) == 3 * 5 and "batch 0 | labels 0: 4, 1: 4, 2: 4" in lines[0]
        assert "lr 1e-06 | output (12, 8): mean" in lines[1] and "0 not finite" in lines[1]
        # no row lacks a modality: the stand-in for an absent one is not trained
        pattern = r"(\d+) of (\d+) trainable tensors have a gradient, norm ([0-9.]+) \(healthy"
        trained, trainable, norm = re.search(pattern, lines[2]).groups()
        assert int(trained) == int(trainable) > 50 and 0.1 < float(norm) < 100
        checklist = out[out.index("\nchecklist\n") :].splitlines()[2:]
        assert [line.split(" | ")[1].strip() for line in checklist] == [
            "warm-up rises", "batches hold all classes", "loss falls by epoch 20",
            "no value is not finite", "gradient norm is 1 to 10"]
        assert checklist[1].startswith("yes | ") and "at least 3 of 3 classes" in checklist[1]
        words = ["--mode", "pretrain", "--debug", "--epochs", "1", "--warmup-epochs", "0"]
        out = stays_run(f / "c", *words)
        assert "batches hold" not in out and "warm-up rises" not in out
        assert "NO  | loss falls by epoch 20" in out  # one epoch cannot show it


def printed_by(function, *words):
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        function(*words)
    return text.getvalue()


def test_train_debug_gradient_norm_is_without_the_scale_of_fp16_and_one_class_is_a_warning():
    net = nn.Linear(3, 1)
    (2.0**16 * net(torch.ones(2, 3)).sum()).backward()
    run_ = types.SimpleNamespace(
        args=types.SimpleNamespace(debug=True), parameters=list(net.parameters()),
        output=torch.tensor([[1.0], [math.nan], [3.0]]),
        scaler=types.SimpleNamespace(get_scale=lambda: 2.0**16))
    net.bias.grad = None
    out = printed_by(debug.looker(run_, 4, 0), {"targets": torch.ones(5)}, 1e-3)
    assert "batch 0 | labels 1: 5 | WARNING: one class only" in out
    assert "output (3, 1): mean 2, sd 1.414, 1 not finite" in out
    assert f"1 of 2 trainable tensors have a gradient, norm {2 * 3**0.5:.3g} (healthy" in out
    out = printed_by(debug.looker(run_, 4, 1), {"targets": torch.linspace(0, 1, 41)}, 1e-3)
    assert out.startswith("debug epoch 4 batch 1 | targets (41,): mean 0.5")
    assert out.count("\n") == 1 and debug.looker(run_, 4, 2) and debug.looker(run_, 4, 3) is None


def test_train_debug_checklist_tells_the_bad_from_the_good():
    args = train.parse_args(["--task", "ocec", "--warmup-epochs", "2", "--batch-size", "5"])

    def verdicts(labels, rates, norms, losses_, skipped):
        rows = [{"lr": lr, "grad_norm": norm, "train_loss": loss, "skipped_steps": skipped}
                for lr, norm, loss in zip(rates, norms, losses_)]
        splits = types.SimpleNamespace(train=ocec.EyeSplit(None, labels, np.arange(len(labels))))
        run_ = types.SimpleNamespace(args=args, history=[{}, *rows])
        out = printed_by(debug.print_verdicts, run_, splits)
        return [line[:3] for line in out.splitlines()[2:]]

    good = verdicts(np.tile([0, 1], 4), [1e-6, 1e-4, 2e-4], [3.0, 1.0, 10.0], [1.0, 1.2, 0.9], 0)
    bad = verdicts(np.repeat([0, 1], [97, 3]), [1e-3] * 3, [3.0, 10.1, 2.0], [1.0, 1.1, 1.0], 1)
    assert good[0] == "yes" and good[2:] == ["yes"] * 3 and bad == ["NO "] * 5
    train_losses = [1.0] * 20 + [0.5] * 4
    late = verdicts(np.tile([0, 1], 4), [1e-6, 1e-4, 2e-4] * 8, [3.0] * 24, train_losses, 0)
    assert late[2] == "NO "  # the loss fell after epoch 20 only


def findings_of(counts=None, rows=(), untrained=None):
    """Names of the findings of a healthy run with changed counts; a row changes one epoch."""
    healthy_counts = {
        "epochs": len(rows), "monitor": "f1", "headline": "f1", "schedule": "cosine",
        "planned_epochs": len(rows), "warmup_epochs": 0.5, "ema_decay": 0.99,
        "floor": {"loss": 0.7, "f1": 0.6}, "ceiling": {"loss": 0.0, "f1": 1.0},
        "shared": {"groups": 0, "rows": 0, "looked_at": 9}, "done": True} | sampler()
    start = {"loss": 0.7, "f1": 0.5}
    history = [{"epoch": 0, "step": 0, "raw": start, "ema": start} | (untrained or {})]
    for epoch, changes in enumerate(rows, 1):
        f1, loss = 1 - 0.4 / (1 + epoch), 0.7 / (1 + epoch)
        row = {
            "epoch": epoch, "step": 10 * epoch, "lr": 1e-3, "train_loss": loss, "grad_norm": 1.0,
            "weight_change": 0.1, "spread": 1.0, "lr_end": 1e-3 * (1 - epoch / len(rows)),
            "raw": {"loss": loss, "f1": f1}, "ema": {"loss": loss, "f1": f1 + 0.001},
            "weights": "ema", "no_gradient": [], "frozen_in_training": []} | changes
        history.append({"score": row[row["weights"]].get("f1")} | row)
    findings = diagnosis.diagnose(healthy_counts | (counts or {}), history)
    assert all(finding["evidence"] and finding["remedy"] for finding in findings)
    names = [finding["name"] for finding in findings]
    assert names == [name for name in diagnosis.RULES if name in names]  # worst first
    return set(names)


def sampler(single_class=0, largest_share=0.5, by_chance=0.1):
    return {"sampler": {"batches": 10, "single_class": single_class,
                        "largest_share": largest_share, "by_chance": by_chance}}


def scored(f1, loss, train_loss=None, **more):
    scores = {"loss": loss, "f1": f1}
    train_loss = loss if train_loss is None else train_loss
    return {"raw": scores, "ema": scores, "train_loss": train_loss} | more


def test_train_diagnosis_is_silent_on_a_healthy_run_of_any_length():
    for n in (0, 1, 2, 3, 6, 12, 40):
        assert findings_of(rows=[{}] * n) == set(), n
        unfinished = {"done": False, "epochs": 100}
        assert findings_of(unfinished, rows=[{"lr_end": 1e-3}] * n) == set(), n
    no_validation = [{"epoch": 0, "step": 0, "lr": 1e-3}]
    for i in range(1, 15):
        no_validation.append({
            "epoch": i, "step": i, "lr": 1e-3, "lr_end": 1e-5, "train_loss": 1 / i,
            "grad_norm": 1.0, "weight_change": 0.1, "score": 1 / i, "weights": "raw",
            "no_gradient": [], "frozen_in_training": []})
    counts = {
        "epochs": 14, "monitor": "loss", "headline": "loss", "schedule": "none",
        "planned_epochs": 14, "warmup_epochs": 0, "ema_decay": 0.9, "floor": {}, "ceiling": {},
        "shared": {"groups": 0, "rows": 0, "looked_at": 0}, "done": True}
    assert diagnosis.diagnose(counts, no_validation) == []


def beside(**changes):
    """Counts of a network that loses, but whose interval with few groups says little."""
    return {"simple": {
        "model": "ridge", "score": "f1", "part": "test", "rows": 90, "groups": 5, "network": 0.7,
        "simple": 0.8, "difference": -0.1, "low": -0.2, "high": -0.01, "groups_worse": 3,
        "share": -0.03} | changes}


def runs_with_and_without():
    """{finding: (findings_of arguments with it, those of nearly the same run without it)}"""
    still, stuck = {"weight_change": 0.0}, scored(0.9, 0.3, 0.694)
    untrained, raw = {"loss": 0.7, "f1": 0.5}, {"loss": 0.6, "f1": 0.8}
    rates, cut = [{"lr_end": 7e-4}] * 4, {"plateau_lr": [1e-3, 9e-6]}
    by_loss = {"monitor": "loss"}

    def averaged(loss):
        return {"ema": {"loss": loss, "f1": 0.7}, "raw": raw}

    def best_by_loss(f1):
        return [scored(f1, 0.1, score=0.1)] + [scored(0.8, 0.2, score=0.2)] * 3

    def lucky(mean):
        return [scored(0.95, 0.3)] + [scored(mean + 0.01 * (i % 2), 0.3) for i in range(9)]

    by_rows = {  # finding -> rows with it, rows of nearly the same run without it
        "frozen-model": ([still] * 3, [still] * 2 + [{}]),
        "lr-too-large": ([scored(0.71, 0.6, weight_change=4.0)] * 2,
                         [scored(0.73, 0.6, weight_change=4.0)] * 2),
        "lr-too-small": ([{"weight_change": 1e-4, "train_loss": 0.7}] * 3,
                         [{"weight_change": 1e-2, "train_loss": 0.7}] * 3),
        "no-gradient": ([{"no_gradient": ["a.b"]}], [{"no_gradient": ["a.b"]}, {}]),
        "backbone-in-train-mode": ([{"frozen_in_training": ["encoder"]}], [{}]),
        "constant-prediction": ([{"spread": 0.009}] * 3, [{"spread": 0.011}] * 3),
        "loss-at-bound": ([stuck] * 3, [scored(0.9, 0.3, 0.6)] + [stuck] * 3),
        "score-at-floor": ([scored(0.607, 0.5)] * 3, [scored(0.609, 0.5)] * 3),
        "ema-not-moving": ([{"ema": untrained}] * 2, [{"ema": untrained}, {}]),
        "ema-horizon-too-long": ([averaged(0.66)] * 3, [averaged(0.64)] * 3),
        "overfit": ([scored(0.9, 0.3, 0.3)] + [scored(0.9, 0.4, 0.1)] * 5,
                    [scored(0.9, 0.3, 0.3)] + [scored(0.9, 0.36, 0.1)] * 5),
        "lucky-best": (lucky(0.8), lucky(0.88))}
    by_counts = {  # the same for counts
        "leak-across-split": ({"shared": {"groups": 1, "rows": 0, "looked_at": 9}}, {}),
        "single-class-batches": (sampler(3, by_chance=1.4), sampler(3, by_chance=1.6)),
        "label-quantised": ({"labels": {"values": 5, "step": 6.0, "spread": 2.5}},
                            {"labels": {"values": 30, "step": 1.0, "spread": 2.5}}),
        "imbalance": (sampler(0, 0.91, 9.0), sampler(0, 0.89, 9.0)),
        "beaten-by-simple-model": (beside(groups=8, high=-0.001), beside(groups=8, high=0.001))}
    cases = {  # and for both
        "schedule-outlasts-run": (({"planned_epochs": 5}, rates), ({}, rates)),
        "plateau-too-eager": (({"epochs": 9}, [{}, cut] + [{}] * 7),
                              ({"epochs": 3}, [{}, cut, {}])),
        "monitor-mismatch": ((by_loss, best_by_loss(0.74)), (by_loss, best_by_loss(0.77)))}
    cases |= {name: (({}, ill), ({}, well)) for name, (ill, well) in by_rows.items()}
    cases |= {name: ((ill, []), (well, [])) for name, (ill, well) in by_counts.items()}
    return cases


def test_train_diagnosis_finds_each_fault_from_counts_and_log_and_not_just_beside_its_bound():
    cases, still = runs_with_and_without(), {"weight_change": 0.0}
    assert cases.keys() == diagnosis.RULES.keys()
    for name, (ill, well) in cases.items():
        assert name in findings_of(*ill), (name, findings_of(*ill))
        assert name not in findings_of(*well), name
    for epochs, reported in ((9, False), (10, True)):
        names = findings_of({"done": False}, [scored(0.6, 0.69, 0.69)] * epochs)
        assert ("score-at-floor" in names) == reported
    assert findings_of({"stopped": "the loss became nan"}) == {"lr-too-large"}
    # fp16 skipped all steps of the first epochs.
    skipped = [still | {"lr_end": 0.0}] + [still | {"grad_norm": math.nan}] * 2
    assert findings_of(rows=skipped) == set()
    falling = [scored(0.605, 0.5), scored(0.601, 0.4), scored(0.6, 0.3)]
    assert findings_of(rows=falling) == {"score-at-floor"}
    below = {"monitor": "mae", "headline": "mae", "floor": {"mae": 2.0}, "ceiling": {}}
    start = {"loss": 1.0, "mae": 2.0}
    for mae, expected in ((1.97, {"score-at-floor"}), (1.9, set())):  # lower is better
        scores = {"loss": 0.5, "mae": mae}
        row = {"raw": scores, "ema": scores, "train_loss": 0.5, "score": mae}
        assert findings_of(below, [row] * 3, {"raw": start, "ema": start}) == expected


def test_train_diagnosis_judges_few_groups_by_their_majority_and_by_the_way_to_the_ceiling():
    for changes, found in (({}, True), ({"high": 0.1}, True), ({"share": -0.02}, False),
                           ({"groups_worse": 2}, False), ({"groups": 6}, False),
                           ({"groups": 8}, True), ({"groups": 8, "high": math.nan}, False)):
        names = findings_of(beside(**changes))
        assert ("beaten-by-simple-model" in names) == found, changes
    evidence = diagnosis.beaten_by_simple_model(beside(), [])
    for part in ("f1 0.7000, ridge has 0.8000 on the same 90 test rows", "-0.1000 [-0.2000, "
                 "-0.0100]", "only 5 groups, the network loses in 3"):
        assert part in evidence, evidence


def test_train_compares_network_and_strong_floor_on_the_same_rows_by_group():
    with folder() as f:
        out = run(f / "a", "--epochs", "1")
        run_, splits = loaded(*TINY, "--data", f / "eyes.npz")
        scores = json.loads((f / "a" / "scores.json").read_text())
    simple, test = scores["beside"], scores["test"]
    name = "strong: logistic on HOG"
    assert simple["network"] == test["model"]["f1"] and simple["simple"] == test[name]["f1"]
    assert simple["rows"] == test["rows"] == len(splits.test) and simple["part"] == "test"
    difference = test["model"]["f1"] - test[name]["f1"]
    assert math.isclose(simple["difference"], difference)
    assert math.isclose(simple["share"], difference / (1 - test["constant"]["f1"]))
    assert f"network against logistic on HOG, f1: {difference:+.4f} [" in out
    # for an error, lower is better
    split = collections.UserList("abcd")
    split.groups = np.array([1, 1, 2, 3])
    error = {"network": np.array([2.0, 2, 2, 1]), "simple": np.array([1.0, 1, 1, 2])}
    task = types.SimpleNamespace(
        flags={"monitor": types.SimpleNamespace(choices=("mae",))},
        headline=lambda outputs, *_: common.mean_over(error[outputs]))
    state = types.SimpleNamespace(task=task, args=None, facts=None)
    floors = {"constant": {"mae": 4.0}, "strong: ridge": "simple"}
    got = diagnosis.beside_simple_model(state, split, "test", "network", floors)
    assert got["groups"] == 3 and got["groups_worse"] == 2 and got["difference"] == -0.5
    assert got["share"] == -0.125 and got["low"] <= -0.5 <= got["high"]
    assert diagnosis.beside_simple_model(state, split, "test", "network", {}) is None


def test_train_f1_of_a_person_whose_eyes_are_all_closed_is_one_where_none_is_called_open():
    split = types.SimpleNamespace(labels=np.array([0, 0, 1]))
    f1 = ocec.headline({"logits": torch.tensor([-1.0, 1.0, 1.0])}, split, None, None)
    assert f1(np.eye(3)).tolist() == [1, 0, 1] and f1(np.ones((1, 3))).tolist() == [2 / 3 * 1.0]


def test_train_headlines_are_the_scores_that_tasks_report():
    with folder() as f:
        sets = ((TINY, make_npz(f / "eyes.npz")), (PPG, ppg_folder(f)),
                (MODAL, quad_npz(f / "q.npz")), (FACEPARSE, faces_npz(f / "f.npz")),
                (STAYS, stays_folder(f)))
        for words, path in sets:
            args, splits = loaded(*words, "--data", path)
            task, split = train.task_of(args), splits.train
            torch.manual_seed(0)
            model = task.network(args, splits.facts)
            state = types.SimpleNamespace(task=task, args=args, facts=splits.facts)
            with torch.inference_mode():
                outputs = train.outputs_of(model, split, state)
                scores = task.scores(outputs, split, args, splits.facts)
            weighted = task.headline(outputs, split, args, splits.facts)
            [once] = weighted(np.ones((1, len(split))))
            twice = weighted(np.full((3, len(split)), 2.0))
            want = scores[task.flags["monitor"].choices[0]]
            assert near([once], [want], 1e-6) and near(twice, [want] * 3, 1e-6), args.task


def test_train_diagnosis_counts_groups_and_equal_rows_on_two_sides_of_a_split():
    with folder() as f:
        _, splits, _ = prepared(f)

        def shared():
            return diagnosis.shared_between(splits.train, [splits.validation, splits.test])

        held_out = len(splits.validation) + len(splits.test)
        assert shared() == {"groups": 0, "rows": 0, "looked_at": held_out}
        splits.test.images = splits.test.images.clone()
        for row in (0, 2):
            copied = splits.train.images[int(splits.train.rows[3])]
            splits.test.images[int(splits.test.rows[row])] = copied
        assert shared()["rows"] == 2
        for split in (splits.train, splits.test):  # blank rows are alike, and no leak
            split.images = split.images.clone()
            split.images[split.rows[:2].tolist()] = 7
        assert shared() == {"groups": 0, "rows": 1, "looked_at": held_out - 2}
        splits.train.groups = np.array([1, 2, 2, 3])
        splits.validation.groups = np.array([4, 3])
        splits.test.groups = np.array([5, 1])
        assert shared()["groups"] == 2


def length_of(tensors):
    """Euclidean length of several tensors as one vector."""
    return float(torch.cat([tensor.detach().flatten() for tensor in tensors]).double().norm())


def test_train_log_tells_how_far_weights_moved_what_has_no_gradient_and_what_is_frozen_but_trains():
    with folder() as f:
        _, splits, state = prepared(f, "--ema-decay", "0")
        model = state.raw_model
        model.idle = torch.nn.Linear(2, 2)
        model.kept = torch.nn.BatchNorm1d(2).requires_grad_(False)
        state.parameters = [p for p in model.parameters() if p.requires_grad]
        state.optimizer.param_groups[0]["params"] += list(model.idle.parameters())
        before = [p.detach().clone() for p in state.parameters]
        row = train.train_epoch(state, splits.train, 1, NEVER)
        moved = [p - old for p, old in zip(state.parameters, before)]
        assert row["weight_change"] > 0
        assert near(row["weight_change"], length_of(moved) / length_of(before), 1e-6)
        assert row["no_gradient"] == ["idle.weight", "idle.bias"]
        assert row["frozen_in_training"] == []
        with replaced(models, "train_mode", lambda model: model.train()):
            row = train.train_epoch(state, splits.train, 2, NEVER)
        assert row["frozen_in_training"] == ["kept"]


def test_train_spread_of_outputs_is_their_sd_over_the_rows_relative_to_their_size():
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    model = torch.nn.Identity()
    outputs = ((x, 1.0), (x * 0 + 5, 0.0), (5 + 0.1 * x, 0.02), (0.1 * x[:, 0], 0.1),
               (x.sort(0).values, 1.0))
    for output, want in outputs:
        with diagnosis.SpreadOfOutputs(model) as spread:
            model(output[:20]), model({"no": "tensor"}), model(output[20:])
        model(output * 100)  # no longer looked at
        assert abs(spread.value() - want) < 0.2 * want + 1e-6, (spread.value(), want)
    with diagnosis.SpreadOfOutputs(model) as spread:
        pass
    assert spread.value() is None


def test_train_label_steps_are_the_grid_that_labels_lie_on():
    assert diagnosis.label_steps(np.array([6.0, 12, 12, 24]))["step"] == 6
    assert diagnosis.label_steps(np.array([6.0, 7.1, 12, 24]))["step"] == 0


def test_train_prints_at_most_ten_findings_and_writes_all_of_them():
    findings = [{"name": f"n{i}", "evidence": "e", "remedy": "r"} for i in range(14)]
    for count, lines in ((3, 3), (10, 10), (11, 10), (14, 10)):
        printed = printed_by(report.print_findings, findings[:count]).splitlines()
        assert len(printed) == lines and printed[0] == "diagnosis: n0 | e | r"
        assert (printed[-1] == f"diagnosis: and {count - 9} more in diagnosis.json") == (count > 10)


def test_train_phases_are_thirds_and_what_came_after_the_best():
    history = [{"epoch": 0}]
    for epoch, score in enumerate([0.1, 0.2, 0.6, 0.8, 0.5], 1):
        history.append({"epoch": epoch, "score": score, "train_loss": 0.5, "lr": 1e-3,
                        "lr_end": 1e-3 / epoch, "raw": {"loss": 0.5 + epoch / 10}})
    phases = report.phases(history, "f1")
    assert {name: (phase["first"], phase["last"]) for name, phase in phases.items()} == {
        "early": (1, 2), "middle": (3, 4), "late": (5, 5), "after the best": (5, 5)}
    assert near(phases["early"]["mean"], 0.15, 1e-12)
    assert near(phases["early"]["sd"], 0.1 / 2 ** 0.5, 1e-12)
    assert near(phases["middle"]["gap"], 0.35, 1e-12) and math.isnan(phases["late"]["sd"])
    out = printed_by(report.print_phases, history, "f1", "f1")
    assert "best epoch 4 of 5, where the rate stood at 25% of its highest" in out


def test_train_prints_the_line_that_each_of_the_five_notes_lacked():
    """The fault of each original run, put into a small run, and the line that the run prints."""
    def line_of(name, *words):
        lines = call(*words)[1].splitlines()
        return [line for line in lines if line.startswith(f"diagnosis: {name} | ")][-1]

    with folder() as f:
        words = ["--data", make_npz(f / "eyes.npz"), "--out", f / "eyes"]
        with replaced(ema.EMA, "update", lambda self, model: None):
            line = line_of("ema-not-moving", *TINY, *words)
        assert ("the averaged weights have the validation loss of the untrained network in all "
                "3 epochs") in line
        findings = json.loads((f / "eyes" / "diagnosis.json").read_text())["findings"]
        assert "ema-not-moving" in [finding["name"] for finding in findings]

        words = ["--data", faces_npz(f / "faces.npz"), "--epochs", "1", "--out", f / "faces"]
        line = line_of("schedule-outlasts-run", *FACEPARSE, "--cosine-epochs", "300", *words)
        assert ("the cosine is planned for 300 epochs, the run ended after 1: "
                "the rate was still 100% of its peak") in line

        cut = bidmc_data.bidmc_windows

        def rounded(*words, **options):
            windows = cut(*words, **options)
            return windows | {"labels": 6 * np.round(windows["labels"] / 6)}

        words = ["bidmc_rr", *PPG[2:], "--data", ppg_folder(f), "--out", f / "ppg"]
        with replaced(bidmc_data, "bidmc_windows", rounded):
            line = line_of("label-quantised", "--task", *words)
        assert "6 apart: rounding alone costs a mean absolute error of 1.5" in line

        def sorted_batches(labels, *_, **options):
            return [np.flatnonzero(labels == label)[:12] for label in range(3)]

        words = ["--data", quad_npz(f / "quad.npz"), "--out", f / "quad"]
        with replaced(data, "stratified_batches", sorted_batches), \
                replaced(quadmodal, "check_training_rows", lambda train, args: None):
            line = line_of("single-class-batches", *MODAL, *words)
        assert "3 of 3 batches of the first epoch hold one class" in line

        forward = models.TimeBias.forward

        def without_slope(self, minutes):
            bias = forward(self, minutes)
            return torch.where(torch.isinf(bias), -math.inf, bias.clamp(min=0))

        with replaced(models.TimeBias, "forward", without_slope):
            line = line_of("no-gradient", *STAYS, "--epochs", "1", "--out", f / "stays")
        bias = "encoder.time_bias"
        assert f"2 ({bias}.log_slope, {bias}.log_tau) trainable tensors had no gradient" in line


def plotted(history, floors, monitor="f1"):
    """The SVG of a run with this history and these floors."""
    args = types.SimpleNamespace(task="ocec", variant="default", epochs=4, monitor=monitor)
    return page.curves_svg(types.SimpleNamespace(args=args, task=ocec.TASK, history=history,
                                                 floors=floors))


def made_up_history(f1, *, losses=None, validation=True):
    """Rows of log.jsonl with these F1 scores, the EMA's a little lower."""
    losses = losses or [1 / (1 + epoch) for epoch in range(len(f1))]
    rows = []
    for epoch, (score, loss) in enumerate(zip(f1, losses)):
        row = {"epoch": epoch, "score": score if validation else loss, "weights": "raw"}
        if validation:
            row |= {"raw": {"loss": loss, "f1": score}, "ema": {"loss": loss, "f1": score - 0.01}}
        rows.append(row | ({"train_loss": loss} if epoch else {}))
    return rows


def svg_lines(text):
    """{title: points (x, y)} of the polylines of an SVG, and its texts."""
    space = "{http://www.w3.org/2000/svg}"
    tree, lines = xml.etree.ElementTree.fromstring(text), {}
    for line in tree.iter(f"{space}polyline"):
        points = [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]
        lines[line.find(f"{space}title").text] = points
    return lines, [element.text for element in tree.iter(f"{space}text")]


def test_train_curves_svg_draws_series_floor_and_ceiling_where_they_belong():
    rows = {"constant low": {"f1": 0.2}, "constant": {"f1": 0.6, "loss": 0.5}, "a & b": {"f1": 0.7},
            "ceiling": {"f1": 1.0, "loss": 0.0}}
    history = made_up_history([0.1, 0.5, 0.8, 0.9, 0.85])
    lines, texts = svg_lines(plotted(history, rows))
    assert lines.keys() == {
        "loss: training", "loss: validation, raw", "loss: validation, EMA", "loss: constant 0.5",
        "loss: ceiling 0", "f1: validation, raw", "f1: validation, EMA", "f1: constant 0.6",
        "f1: a & b 0.7", "f1: ceiling 1"}
    places = lines["f1: validation, raw"]
    x = [place for place, _ in places]
    assert near(np.diff(x), np.full(4, (x[-1] - x[0]) / 4), 1e-3)
    assert len(lines["loss: training"]) == 4
    for name, score in (("constant 0.6", 0.6), ("a & b 0.7", 0.7), ("ceiling 1", 1.0)):
        (left, y), (right, level) = lines[f"f1: {name}"]
        assert (left, right, y) == (x[0], x[-1], level)
        # one scale for curves and lines: 0.1 below, 1 above
        want = np.interp(score, [0.1, 1], [places[0][1], lines["f1: ceiling 1"][0][1]])
        assert abs(y - want) < 2 and places[0][1] > y >= lines["f1: ceiling 1"][0][1]
    assert np.argmin([y for _, y in places]) == 3
    assert "ocec, variant default: epoch 4 of 4; best epoch 3, f1 0.9000" in texts
    assert {"training", "validation, EMA", "a & b 0.7", "epoch 0", "4"} <= set(texts)


def test_train_curves_svg_leaves_out_what_is_not_finite_and_needs_no_validation():
    nan = math.nan
    lines, _ = svg_lines(plotted(made_up_history([0.1, nan, 0.8, nan, 0.6]), {}))
    x = [place for place, _ in lines["loss: validation, raw"]]
    assert [place for place, _ in lines["f1: validation, raw"]] == x[::2]
    unscored = made_up_history([0, 0, 0], validation=False)
    lines, _ = svg_lines(plotted(unscored, {}, monitor="loss"))
    assert lines.keys() == {"loss: training"}
    for f1, values in (([0.1], None), ([nan, nan], None), ([0.5, 0.5], [0.0, 0.0]),
                       ([1e30, -1e-300, 3e-9], [1e-300, 1e300, 2.0])):
        history = made_up_history(f1, losses=values)
        text = plotted(history, {"constant": {"f1": nan}})
        assert svg_lines(text) and "nan" not in text and "inf" not in text


def test_train_curves_are_there_after_every_epoch():
    with folder() as f:
        line, counts = report.epoch_line, []

        def looked_at(state):
            lines, _ = svg_lines((f / "a" / "curves.svg").read_text())
            counts.append(len(lines["f1: validation, raw"]))
            return line(state)

        with replaced(report, "epoch_line", looked_at):
            out = run(f / "a")
        assert counts == [1, 2, 3, 4] and "curves.svg" in out.splitlines()[-1]


def test_train_log_and_curves_that_a_kill_left_behind_are_made_up_for_by_a_resume():
    with folder() as f:
        run(f / "a", "--epochs", "2")
        before = {name: (f / "a" / name).read_text() for name in ("log.jsonl", "curves.svg")}
        for name in before:
            (f / "a" / name).write_text("an epoch behind")
        assert call("--task", "ocec", "--out", f / "a", "--resume")[0] == 0
        assert before == {name: (f / "a" / name).read_text() for name in before}


def picture_of(path):
    """An RGB PNG as uint8 (h, w, 3)."""
    (width, height, depth, kind, *_), chunks = png_content(path.read_bytes())
    assert (depth, kind) == (8, 2)
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, -1)
    return rows[:, 1:].reshape(height, width, 3)


def cells_of(path, height, width):
    """The images (n, h, w, 3) of a grid of write_images, row by row; places left over are white."""
    picture = picture_of(path)
    columns = picture.shape[1] // (width + 4)
    cells = picture.reshape(-1, height + 4, columns, width + 4, 3).swapaxes(1, 2)
    cells = cells.reshape(-1, height + 4, width + 4, 3)
    border = np.ones(cells.shape[1:3], dtype=bool)
    border[2:-2, 2:-2] = False
    assert (cells[:, border] == 255).all()
    return cells[:, 2:-2, 2:-2]


def pixels_of(inputs):
    return (inputs * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def best_of(path, *words):
    """The run's settings, splits and best network in eval mode."""
    args, splits = loaded(*words)
    model = train.task_of(args).network(args, splits.facts).eval()
    model.load_state_dict(result_of(path, "best.pt")["model"])
    return args, splits, model


def examples_of(path, split, badness, columns):
    """The rows of examples.csv: all of the split, with the badness given here, the worst first."""
    with open(path / "examples.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows and list(rows[0]) == ["row", *columns, "badness"], list(rows[0])
    written = np.array([float(row["badness"]) for row in rows])
    place = {row: i for i, row in enumerate(split.rows.tolist())}
    order = [place[int(row["row"])] for row in rows]
    assert sorted(order) == list(range(len(split)))
    assert near(written, badness[order], 1e-4)
    assert (np.diff(written) <= 0).all()
    return rows, order


def test_train_examples_of_eyes_and_faces_are_all_rows_and_the_worst_images():
    with folder() as f:
        run(f / "eyes", "--epochs", "1")
        args, splits, model = best_of(f / "eyes", *TINY, "--data", f / "eyes.npz")
        inputs = splits.test.batch(np.arange(len(splits.test)))["inputs"]
        with torch.inference_mode():
            p = torch.sigmoid(model(inputs)).numpy()
        badness, columns = np.abs(p - splits.test.labels), ["name", "true", "predicted"]
        rows, order = examples_of(f / "eyes", splits.test, badness, columns)
        assert [int(row["true"]) for row in rows] == splits.test.labels[order].tolist()
        assert near([float(row["predicted"]) for row in rows], p[order], 1e-4)
        assert all(row["name"] == splits.test.names[int(row["row"])] for row in rows)
        worst = pixels_of(inputs[order])[:24]
        cells = cells_of(f / "eyes" / "examples.png", 12, 20)
        assert len(worst) >= 8 and (cells[: len(worst)] == worst).all()
        assert (cells[len(worst) :] == 255).all()

        faces_run(f / "faces", "--epochs", "1")
        args, splits, model = best_of(f / "faces", *FACEPARSE, "--data", f / "faces.npz")
        batch, confusions = splits.test.batch(np.arange(len(splits.test))), []
        with torch.inference_mode():
            for x, mask in zip(batch["inputs"], batch["masks"]):
                guess = faceparse.class_ids(model(x[None]), mask.shape)
                confusions.append(losses.confusion_matrix(guess, mask, 19))
        f_scores = losses.f_score_per_image(np.stack(confusions))
        rows, order = examples_of(f / "faces", splits.test, 1 - f_scores, ["name", "f"])
        assert near([float(row["f"]) for row in rows], f_scores[order], 1e-4)
        cells = cells_of(f / "faces" / "examples.png", 16, 16)
        assert (cells[: len(order)] == pixels_of(batch["inputs"])[order]).all()


def test_train_examples_of_windows_and_stays_are_all_rows_and_no_image():
    def inputs_of(split):
        return split.batch(np.arange(len(split)))["inputs"]

    def ppg_badness(args, splits, model):
        batch = splits.test.batch(np.arange(len(splits.test)))
        outputs = bidmc.outputs(model, batch, args, splits.facts)
        return np.abs(bidmc.rates(outputs, splits.facts).numpy() - splits.test.labels)

    def masked_badness(args, splits, model):
        inputs, masks = inputs_of(splits.test), splits.test.masks
        errors = (model(inputs, masks) - model.encoder.patches(inputs)).square()
        return np.array([float(error[hidden].mean()) for error, hidden in zip(errors, masks)])

    def stay_badness(args, splits, model):
        logits = model(inputs_of(splits.test)) + torch.tensor(splits.test.anchor)
        p = seqsetvae.probability(logits, args, splits.facts).numpy()
        return np.abs(p - splits.test.labels)

    def vae_badness(args, splits, model):
        badness = []
        for row in range(len(splits.test)):
            inputs = splits.test.batch([row])["inputs"]
            badness.append(seqsetvae_pretrain.per_stay(model(inputs), inputs, args)["recon"])
        return torch.cat(badness).numpy()

    values = ["name", "true", "predicted"]
    with folder() as f:
        for run_task, base, data_name, mode, badness, columns in (
                (ppg_run, PPG, "bidmc", "scratch", ppg_badness, values),
                (ppg_run, PPG, "bidmc", "pretrain", masked_badness, ["name"]),
                (stays_run, STAYS, "stays", "scratch", stay_badness, values),
                (stays_run, STAYS, "stays", "pretrain", vae_badness, ["name"])):
            path, words = f / f"{data_name}-{mode}", ["--mode", mode, "--epochs", "1"]
            run_task(path, *words)
            args, splits, model = best_of(path, *base, *words, "--data", f / data_name)
            with torch.inference_mode():
                want = badness(args, splits, model)
            rows, order = examples_of(path, splits.test, want, columns)
            assert all(row["name"] == str(splits.test.names[int(row["row"])]) for row in rows)
            if "true" in columns:
                errors = [abs(float(row["true"]) - float(row["predicted"])) for row in rows]
                assert near(errors, want[order], 1e-3)
            assert not (path / "examples.png").exists()
            names = {row["name"] for row in rows}
            if data_name == "stays":
                assert names == set(map(str, splits.test.ids.tolist()))
            else:
                assert len(names) == len(rows)
                assert all(re.fullmatch(r"[0-9]+ at [0-9.]+ s", name) for name in names)
        # batches of a probe hold features
        words = ["--mode", "probe", "--pretrained", f / "stays-pretrain", "--epochs", "1"]
        stays_run(f / "probe", *words)
        text = (f / "probe" / "examples.csv").read_text()
        assert text.startswith("row,name,true,predicted,badness\n")


def test_train_examples_of_modalities_begin_with_the_rows_among_strangers():
    with folder() as f:
        quad_run(f / "a", "--epochs", "1")
        args, splits, model = best_of(f / "a", *MODAL, "--data", f / "quad.npz")
        embeddings = []
        with torch.inference_mode():
            for split in (splits.test, splits.train):
                batch = split.batch(np.arange(len(split)))
                embeddings.append(model(batch["inputs"], batch["present"]))
        z, reference = embeddings
        cosine = F.normalize(z, dim=1) @ F.normalize(reference, dim=1).T
        nearest = splits.train.labels[cosine.topk(5).indices.numpy()]
        strangers = (nearest != splits.test.labels[:, None]).mean(1)
        rows, order = examples_of(f / "a", splits.test, strangers, ["true", "predicted"])
        names = splits.facts["names"]
        predicted = losses.knn_predict(reference, splits.train.labels, z)
        true = splits.test.labels[order]
        assert [row["true"] for row in rows] == [names[label] for label in true]
        assert [row["predicted"] for row in rows] == [names[label] for label in predicted[order]]
        assert len(set(strangers)) > 2 and not (f / "a" / "examples.png").exists()


def test_train_examples_need_a_split_that_is_held_out_and_go_with_overwrite():
    with folder() as f:
        words = ["--train-ratio", "1", "--val-ratio", "0", "--test-ratio", "0"]
        out = run(f / "a", "--epochs", "1", *words)
        assert not list((f / "a").glob("examples.*")) and "examples" not in out
        words = ["--train-ratio", "0.7", "--val-ratio", "0.3", "--test-ratio", "0"]
        run(f / "b", "--epochs", "1", *words)
        sets = best_of(f / "b", *TINY, *words, "--data", f / "eyes.npz")[1]
        with open(f / "b" / "examples.csv", newline="") as file:
            rows = {int(row["row"]) for row in csv.DictReader(file)}
        assert rows == set(sets.validation.rows.tolist())
        with replaced(train, "report_best", lambda *_: None):
            run(f / "b", "--epochs", "1", "--overwrite")
        assert not list((f / "b").glob("examples.*")) and (f / "b" / "curves.svg").exists()


def test_train_write_images_puts_every_image_in_its_cell_and_leaves_the_rest_white():
    images = random_images(8, 3, 5, 4)
    with folder() as f:
        for count, columns in ((1, 6), (6, 6), (8, 6), (8, 3)):
            inputs = (images[:count].float() - 127.5) / 127.5
            page.write_images(f / "a.png", inputs, columns=columns)
            picture, cells = picture_of(f / "a.png"), cells_of(f / "a.png", 5, 4)
            assert picture.shape == (-(-count // columns) * 9, columns * 8, 3)
            assert (cells[:count] == images[:count].permute(0, 2, 3, 1).numpy()).all()
            assert (cells[count:] == 255).all()


def test_train_look_shows_the_first_batch_that_training_sees():
    with folder() as f:
        paths = {"ocec": make_npz(f / "eyes.npz"), "faceparse": faces_npz(f / "faces.npz")}
        for task, words, kind, size in (("ocec", TINY, ocec.EyeSplit, (12, 20)),
                                        ("faceparse", FACEPARSE, faceparse.FaceSplit, (16, 16))):
            batch, seen = kind.batch, []

            def recorded(self, rows, generator=None):
                out = batch(self, rows, generator)
                if generator is not None:
                    seen.append(copy.deepcopy(out))
                return out

            kind.batch = recorded
            try:
                code, out, err = call(*words, "--data", paths[task], "--out", f / task, "--look")
                looked, count = seen[0], len(seen)
                words = [*words, "--data", paths[task], "--out", f / task, "--epochs", "1"]
                assert call(*words)[0] == 0
            finally:
                kind.batch = batch
            assert code == 0 and count == 1 and f"saved: {f / task / 'look.png'}" in out, err
            assert same_bits(looked, seen[1]), task
            cells = cells_of(f / task / "look.png", *size)
            want = pixels_of(looked["inputs"].clamp(-1, 1))[:24]
            assert (cells[: len(want)] == want).all() and (cells[len(want) :] == 255).all()


def test_train_look_replaces_its_own_picture_and_leaves_a_run_alone():
    def contents(path):
        return {file.name: file.read_bytes() for file in path.iterdir()}

    with folder() as f:
        run(f / "a", "--epochs", "1")
        before, words = contents(f / "a"), [*TINY, "--data", f / "eyes.npz"]
        (f / "a" / "look.png").write_bytes(b"older")
        succeeded(*words, "--look", "--out", f / "a")
        first = (f / "a" / "look.png").read_bytes()
        assert contents(f / "a") == before | {"look.png": first} and len(first) > 1000
        succeeded(*words, "--look", "--out", f / "b")
        assert contents(f / "b") == {"look.png": first}
        succeeded(*words, "--look", "--out", f / "b", "--seed", "1")
        assert (f / "b" / "look.png").read_bytes() != first
        succeeded(*words, "--epochs", "1", "--out", f / "b")  # a look is no run
        cases = [
            ("--resume is not read by this call", [*words, "--look", "--resume"]),
            ("is not read by this call", [*words, "--look", "--find-lr"]),
            ("--out is not read by this call", [*words, "--find-lr", "--out", f / "c"]),
            ("is a file", [*words, "--look", "--out", f / "eyes.npz"])]
        for task, path in ((PPG, ppg_folder(f)), (MODAL, quad_npz(f / "quad.npz")),
                           (STAYS, stays_folder(f))):
            cases.append((f"the rows of task {task[1]} are none",
                          [*task, "--data", path, "--look", "--out", f / "c"]))
        for message, words in cases:
            code, _, err = call(*words)
            assert code == 2 and message in err and not (f / "c").exists(), (message, err)
