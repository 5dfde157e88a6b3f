"""Tests of seqsetvae."""

import csv
import json
import math
import types

import numpy as np
import torch
import torch.nn.functional as F

import losses
import models
import train
from tasks import seqsetvae_data
from tests.helpers import (
    call, check_resume, edit, folder, near, result_of, STAYS, stays_folder, stays_run, write_stay)


def stays_args(f, *words):
    args = train.parse_args([*STAYS, "--data", str(stays_folder(f)), *words])
    sets = train.stay_load(args.data, args)
    args.facts = sets.facts
    return args, sets


def test_train_stays_scores_stand_between_chance_and_ceiling_beside_a_logistic_regression():
    with folder() as f:
        out = stays_run(f / "a")
        scores = json.loads((f / "a" / "scores.json").read_text())["test"]
        args, sets = stays_args(f)
        code, _, err = call("--task", "seqsetvae", "--predict", f / "a" / "best.pt", "--data", f / "stays" / "set-a", "--out", f / "p.csv")
        assert code == 0, err
        with open(f / "p.csv") as file:
            rows = {int(row["RecordID"]): (float(row["logit"]), float(row["prob_death"])) for row in csv.DictReader(file)}
        stays = seqsetvae_data.read_stays(f / "stays")
        code, everything, err = call("--task", "seqsetvae", "--eval", f / "a" / "best.pt", "--data", f / "stays")
        assert code == 0 and "all rows, 80 rows" in everything and "training rows included" in everything, err
    assert list(scores) == ["rows", "model", "constant", "SAPS-I", "SOFA", "logistic regression", "ceiling"]
    test = sets.test
    logits, prob = np.array([rows[each] for each in test.ids]).T
    assert len(rows) == 80 and near(prob, 1 / (1 + np.exp(-logits)), 1e-5)
    assert near(scores["model"]["auroc"], losses.auroc(logits, test.labels), 1e-6)
    assert near(scores["model"]["auprc"], losses.average_precision(logits, test.labels), 1e-6)
    assert scores["model"]["auroc_low"] < scores["model"]["auroc"] < scores["model"]["auroc_high"]
    assert scores["constant"]["auroc"] == 0.5 and math.isclose(scores["constant"]["auprc"], test.labels.mean())
    assert scores["ceiling"] == {"loss": 0, "auroc": 1, "auprc": 1}
    train_rows = sets.train.rows
    scaler = seqsetvae_data.event_scaler(stays, train_rows)  # of training rows alone
    assert args.facts["scale"] == {name: each.tolist() for name, each in scaler.items()}
    expected = losses.logistic_predict(seqsetvae_data.stay_statistics(stays, train_rows, scaler), stays["labels"][train_rows],
                                       seqsetvae_data.stay_statistics(stays, test.rows, scaler), penalty=train.STAY_PENALTY)
    assert near(train.stay_regression(test, args), expected, 1e-5)
    assert math.isclose(scores["logistic regression"]["auroc"], losses.auroc(expected, test.labels))
    saps = stays["severity"]["SAPS-I"][test.rows]
    known = ~np.isnan(saps)
    assert math.isclose(scores["SAPS-I"]["auroc"], losses.auroc(saps[known], test.labels[known]))
    assert "80 stays" in out and "SYNTHETIC" not in out and out.count("logistic regression") == 3
    assert sum(len(each) for each in (sets.train, sets.validation, test)) == 80


def test_train_stays_probability_takes_back_the_weight_on_deaths():
    with folder() as f:
        args, sets = stays_args(f, "--pos-weight", "4")
        assert math.isclose(float(train.stay_probability(torch.tensor([0.0]), args)), 0.2, rel_tol=1e-6)  # odds of 1, four times too many
        args, sets = stays_args(f, "--pos-weight", "0")
        deaths = sets.train.labels.mean()
        assert math.isclose(args.facts["pos_weight"], (1 - deaths) / deaths, rel_tol=1e-6)
        args, sets = stays_args(f, "--loss", "focal", "--gamma", "0", "--alpha", "0.25")
        logits, targets = torch.tensor([0.3, -2.0]), torch.tensor([1.0, 0.0])
        p = torch.sigmoid(logits)
        by_hand = -0.25 * p[0].log(), -0.75 * (1 - p[1]).log()
        loss = train.stay_criterion(logits, targets, args)
        assert torch.isclose(loss, sum(by_hand) / 2) or torch.isclose(loss, sum(by_hand) / (0.25 + 0.75)), (loss, by_hand)
        assert math.isclose(float(train.stay_probability(torch.tensor([0.0]), args)), 0.5)


def test_train_stays_scores_do_not_depend_on_the_batch_they_are_in():
    with folder() as f:
        args, sets = stays_args(f)
        torch.manual_seed(0)
        model = train.stay_network(args).eval()
        with torch.inference_mode():
            together = train.stay_all_logits(model, sets.test)
            alone = torch.cat([model(sets.test.batch([row])["inputs"]) for row in range(len(sets.test))])
            assert near(together, alone, 1e-5) and together.std() > 0.01
            args, sets = stays_args(f, "--mode", "pretrain")
            model = train.vae_network(args).eval()
            one = train.vae_evaluate(model, sets.test, args)
            parts = [train.vae_parts(model, sets.test.batch([row])["inputs"], args) for row in range(len(sets.test))]
            other = train.vae_scores(*zip(*parts), args)
        assert all(math.isclose(one[name], other[name], rel_tol=1e-5) for name in one), (one, other)


def test_train_stays_pretraining_stands_between_constant_guesses_and_its_free_bits():
    with folder() as f:
        stays_run(f / "pre", "--mode", "pretrain", "--epochs", "1", "--beta", "0.1")
        scores = json.loads((f / "pre" / "scores.json").read_text())["test"]
        args, sets = stays_args(f, "--mode", "pretrain", "--beta", "0.1")
    assert list(scores) == ["rows", "model", "constant mean", "constant frequent", "ceiling"]
    assert list(scores["model"]) == ["loss", "recon", "kl", "decoded"]
    assert math.isclose(scores["model"]["loss"], scores["model"]["recon"] + 0.1 * scores["model"]["kl"], rel_tol=1e-6)
    assert math.isclose(scores["ceiling"]["kl"], 0.03 * 16) and scores["ceiling"]["decoded"] == 1
    events = sets.train.variables
    counts = np.bincount(events, minlength=41)
    frequent = np.argsort(-counts, kind="stable")
    hits, total, recon = 0, 0, []
    for row in range(len(sets.test)):  # the constant guess, set by set
        inputs, costs = sets.test.batch([row])["inputs"], []
        for variables, values in zip(inputs["variables"].split(inputs["sizes"].tolist()), inputs["values"].split(inputs["sizes"].tolist())):
            unit = F.one_hot(variables, 41).float()
            guess = F.one_hot(torch.from_numpy(frequent[: len(variables)].copy()), 41).float()
            x, y = torch.cat([0 * guess, guess], 1)[None], torch.cat([values[:, None] * unit, unit], 1)[None]
            costs.append(float(losses.chamfer(x, y)))
            nearest = losses.set_costs(x, y)[0].argmin(0)
            hits, total = hits + int((guess.argmax(1)[nearest] == variables).sum()), total + len(variables)
        recon.append(np.mean(costs))
    assert math.isclose(scores["constant frequent"]["recon"], np.mean(recon), rel_tol=1e-5)
    assert math.isclose(scores["constant frequent"]["decoded"], hits / total, rel_tol=1e-9)
    assert math.isclose(args.facts["frequency"][5], counts[5] / counts.sum())


def test_train_stays_beta_rises_from_nothing_over_its_steps():
    with folder() as f:
        args, sets = stays_args(f, "--mode", "pretrain", "--beta", "0.5", "--beta-steps", "10")
        torch.manual_seed(0)
        model = train.vae_network(args).eval()
        batch = sets.train.batch(np.arange(8))
        with torch.inference_mode():
            for step, beta in ((0, 0.0), (5, 0.25), (10, 0.5), (99, 0.5)):
                loss, parts = train.vae_loss(model, batch, step, args)
                assert math.isclose(float(loss), float(parts["recon"] + beta * parts["kl"]), rel_tol=1e-6), step
            args.beta_steps = 0
            loss, parts = train.vae_loss(model, batch, 0, args)
            assert math.isclose(float(loss), float(parts["recon"] + 0.5 * parts["kl"]), rel_tol=1e-6)


def test_train_stays_pretraining_brings_the_variable_of_an_event_back():
    """The published target was trainable, and all variables became one; here they come back far more often than by any constant guess."""
    variables = torch.arange(240) % 12
    inputs = {"variables": variables, "values": torch.randn(240, generator=torch.Generator().manual_seed(0)),
              "sizes": torch.full((80,), 3), "minutes": torch.arange(80).float() % 8 * 60, "lengths": torch.full((10,), 8)}
    inputs["variables"] = torch.stack([torch.randperm(12, generator=torch.Generator().manual_seed(i))[:3] for i in range(80)]).flatten()
    torch.manual_seed(0)
    model = models.SeqSetVAE(models.SetSequenceEncoder(41, width=32, heads=4, hidden=32, dropout=0.0), seeds=3)
    args = types.SimpleNamespace(free_bits=0.03, beta=0.01, beta_steps=100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(250):
        loss, parts = train.vae_loss(model, {"inputs": inputs}, step, args)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert parts["decoded"] > 0.6, parts  # always the three most frequent of twelve: 0.3


def test_train_stays_modes_train_what_they_say_from_the_pretrained_encoder():
    with folder() as f:
        stays_run(f / "pre", "--mode", "pretrain", "--epochs", "1")
        pretrained = result_of(f / "pre", "best.pt")["model"]
        tensors = [name for name in pretrained if name.startswith("encoder.")]
        for mode, words in (("probe", ()), ("finetune", ("--backbone-lr", "1e-3")), ("partial", ("--unfreeze-last", "1", "--no-events"))):
            out = stays_run(f / mode, "--mode", mode, "--pretrained", f / "pre", "--ema-decay", "0", *words)
            assert f"encoder: {len(tensors)} tensors" in out and "0 missing, 0 unexpected; left there: logvar.weight" in out
            state = result_of(f / mode)["model"]
            moved = {name.split(".")[1] if ".layers." not in name else ".".join(name.split(".")[1:3]) for name in tensors
                     if not torch.equal(state[name], pretrained[name])}
            assert any(name.startswith("strongest.") for name in state) == (mode == "finetune")
            assert moved == {"probe": set(), "partial": {"layers.1", "norm"},
                             "finetune": {"sets", "mu", "gap", "time_bias", "layers.0", "layers.1", "norm"}}[mode], (mode, moved)
        for variant, rate, layers in (("before", 1e-4, 4), ("after", 3e-4, 2)):
            small = ["--width", "16", "--heads", "2", "--depth", "2", "--hidden", "16"]
            stays_run(f / variant, "--variant", variant, "--pretrained", f / "pre", *small)
            last = result_of(f / variant)
            assert last["schedule"]["base_lrs"] == [rate] and last["recipe"]["mode"] == "probe"
            assert last["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.98)
            assert len([name for name in last["model"] if name.startswith("head.") and name.endswith("weight")]) == layers


def test_train_stays_resumed_run_equals_straight_run_bit_for_bit():
    with folder() as f:
        check_resume(STAYS, stays_run, f, ["--mode", "pretrain"], stays_folder(f))
    with folder() as f:
        check_resume(STAYS, stays_run, f, ["--schedule", "plateau", "--plateau-patience", "0"], stays_folder(f))


def test_train_stays_without_an_outcome_help_pretraining_and_nothing_else():
    def unlabelled(path):
        table = path / "Outcomes-a.txt"
        table.write_text("\n".join(table.read_text().splitlines()[:-6]) + "\n999,1,1,5,-1,0\n")

    with folder() as f:
        path = stays_folder(f, "gaps", unlabelled)
        out = stays_run(f / "a", "--data", path, "--epochs", "1")
        assert "left out: stay without an outcome: 6 (75, 76, 77, 78, 79, ...)" in out
        assert "left out: outcome without a stay: 1 (999)" in out
        stays_run(f / "pre", "--data", path, "--mode", "pretrain", "--epochs", "1")
        facts, labelled = result_of(f / "pre", "best.pt")["facts"], result_of(f / "a", "best.pt")["facts"]
        assert set(range(75, 81)) < set(facts["seen"]) and not set(range(75, 81)) & set(labelled["seen"] + labelled["held_out"])
        assert facts["held_out"] == labelled["held_out"] and facts["scale"] == labelled["scale"]
        stays_run(f / "b", "--data", path, "--mode", "probe", "--pretrained", f / "pre", "--epochs", "1")


def test_train_stays_without_an_event_keep_an_empty_row_in_the_predictions():
    def add_empty(path):
        write_stay(path / "set-a" / "500.txt", ["00:00,RecordID,500", "00:00,Height,-1"])

    with folder() as f:
        stays_run(f / "a", "--epochs", "1")
        path = stays_folder(f, "empty", add_empty)
        code, out, err = call("--task", "seqsetvae", "--predict", f / "a" / "best.pt", "--data", path, "--out", f / "p.csv")
        assert code == 0 and "stay without an event: 1 (500)" in out and (f / "p.csv").read_text().endswith("\n500,,\n"), err


def test_train_stays_refuses_bad_data_and_bad_calls_with_exit_code_2_and_one_message():
    def line(file, change):
        return lambda path: edit(path / file, change)

    with folder() as f:
        stays_run(f / "pre", "--mode", "pretrain", "--epochs", "1")
        stays_run(f / "run", "--epochs", "1")
        content = torch.load(f / "pre" / "best.pt", weights_only=True)
        content["model"].pop("encoder.layers.1.qkv.weight")
        torch.save(content, f / "lacking.pt")
        content = torch.load(f / "pre" / "best.pt", weights_only=True)
        content["facts"]["scale"]["mean"][5] += 1
        torch.save(content, f / "scaled.pt")
        good, pre = stays_folder(f), ["--mode", "probe", "--pretrained", f / "pre"]
        end = lambda text: text.rstrip("\n")
        cases = [
            ("set-a/3.txt line", ["--data", stays_folder(f, "b1", line("set-a/3.txt", lambda text: end(text) + "\n07:00,HR,high\n"))]),
            ("RecordID", ["--data", stays_folder(f, "b2", line("set-a/3.txt", lambda text: text.replace("RecordID,3", "RecordID,4")))]),
            ("Outcomes-a.txt is missing", ["--data", stays_folder(f, "b3", lambda path: (path / "Outcomes-a.txt").unlink())]),
            ("has an outcome", ["--mode", "pretrain", "--data", stays_folder(f, "b3")]),
            ("In-hospital_death", ["--data", stays_folder(f, "b4", line("Outcomes-a.txt", lambda text: end(text)[:-1] + "7\n"))]),
            ("stays 0 died", ["--data", stays_folder(f, "b5", line("Outcomes-a.txt", lambda text: text.replace(",1\n", ",0\n")))]),
            ("holds no stays", ["--data", f / "pre"]),
            ("tensors fit under 'encoder.': missing 1 (layers.1.qkv.weight)", ["--mode", "probe", "--pretrained", f / "lacking.pt"]),
            ("scaled by other training rows", ["--mode", "probe", "--pretrained", f / "scaled.pt"]),
            ("of the cases that this run holds out", [*pre, "--seed", "1"]),
            ("--width 32: the encoder in", [*pre, "--width", "32"]),
            ("whose encoder has seen labels", ["--mode", "probe", "--pretrained", f / "run"]),
            ("starts from an encoder: give --pretrained", ["--mode", "finetune"]),
            ("starts from an encoder: give --pretrained", ["--variant", "after", "--width", "16"]),
            ("heads must divide channels", ["--heads", "3"]),
            ("heads must divide channels", ["--set-heads", "3"]),
            ("--beta is read only with --mode pretrain", ["--beta", "0.1"]),
            ("--monitor is read only with --mode", ["--mode", "pretrain", "--monitor", "auroc"]),
            ("--alpha is read only with --loss focal", ["--alpha", "0.3"]),
            ("--drop-events is read only with --mode", [*pre, "--drop-events", "0.1"]),
            ("--plateau-watches is read only with --schedule plateau", ["--plateau-watches", "loss"]),
            ("--drop-events 1 must be finite and at least 0 and at most 0.95", ["--drop-events", "1"]),
        ]
        for message, words in cases:
            words = words if "--data" in words else [*words, "--data", good]
            code, _, err = call(*STAYS, "--out", f / "new", *words)
            assert code == 2 and message in err and err.count("error:") == 1, (message, code, err)
            assert not (f / "new").exists(), message
        code, _, err = call("--task", "seqsetvae", "--predict", f / "pre" / "best.pt", "--data", good, "--out", f / "p.csv")
        assert code == 2 and "predicts no death" in err and not (f / "p.csv").exists(), err
