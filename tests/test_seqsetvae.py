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
from tasks import seqsetvae, seqsetvae_data, seqsetvae_pretrain
from tests.helpers import (
    call, check_resume, edit, folder, loaded, near, raises, result_of, seeded, STAYS,
    stays_folder, stays_run, succeeded, write_stay)


def loaded_stays(f, *words):
    return loaded(*STAYS, "--data", stays_folder(f), *words)


def built(args, sets):
    """A run whose network is in eval mode."""
    run = train.build(args, sets.facts, 10)
    run.raw_model.eval()
    return run


def test_train_stays_scores_stand_between_chance_and_ceiling_beside_a_logistic_regression():
    with folder() as f:
        out = stays_run(f / "a")
        scores = json.loads((f / "a" / "scores.json").read_text())["test"]
        args, sets = loaded_stays(f)
        best = f / "a" / "best.pt"
        succeeded("--task", "seqsetvae", "--predict", best, "--out", f / "p.csv",
                  "--data", f / "stays" / "set-a")
        with open(f / "p.csv") as file:
            table = list(csv.DictReader(file))
        stays = seqsetvae_data.read_stays(f / "stays")
        everything = succeeded("--task", "seqsetvae", "--eval", best, "--data", f / "stays")
        assert "all rows, 80 rows" in everything
        assert "training rows included" in everything
    strong = "strong: logistic on ranks"
    assert list(scores) == ["rows", "model", "constant", "SAPS-I", "SOFA", "logistic regression",
                            strong, "ceiling"]
    test, model = sets.test, scores["model"]
    row_of = {int(row["RecordID"]): row for row in table}
    assert len(row_of) == 80
    logits = np.array([float(row_of[record]["logit"]) for record in test.ids])
    prob = np.array([float(row_of[record]["prob_death"]) for record in test.ids])
    assert near(prob, 1 / (1 + np.exp(-logits)), 1e-5)
    assert near(model["auroc"], losses.auroc(logits, test.labels), 1e-6)
    assert near(model["auprc"], losses.average_precision(logits, test.labels), 1e-6)
    assert model["auroc_low"] < model["auroc"] < model["auroc_high"]
    assert scores["constant"]["auroc"] == 0.5
    assert math.isclose(scores["constant"]["auprc"], test.labels.mean())
    assert scores["ceiling"] == {"loss": 0, "auroc": 1, "auprc": 1}

    rows = sets.train.rows
    scaler = seqsetvae_data.event_scaler(stays, rows)  # of training rows alone
    assert sets.facts["scale"] == {name: values.tolist() for name, values in scaler.items()}
    expected = losses.logistic_predict(
        seqsetvae_data.stay_statistics(stays, rows, scaler), stays["labels"][rows],
        seqsetvae_data.stay_statistics(stays, test.rows, scaler), penalty=seqsetvae.PENALTY)
    assert near(seqsetvae.regression(test, sets.facts), expected, 1e-5)
    regression = scores["logistic regression"]
    assert math.isclose(regression["auroc"], losses.auroc(expected, test.labels))
    summaries = [seqsetvae_data.stay_summaries(stays, part) for part in (rows, test.rows)]
    knots = seqsetvae_data.rank_knots(summaries[0])
    ranks = [seqsetvae_data.stay_ranks(part, knots) for part in summaries]
    expected = losses.logistic_predict(ranks[0], stays["labels"][rows], ranks[1], penalty=17 * 41)
    assert near(seqsetvae.rank_regression(test, sets.facts), expected, 1e-5)
    assert math.isclose(scores[strong]["auroc"], losses.auroc(expected, test.labels))
    assert strong in everything and out.count("| logistic on ranks 0.") == 3
    saps = stays["severity"]["SAPS-I"][test.rows]
    known = ~np.isnan(saps)
    assert math.isclose(scores["SAPS-I"]["auroc"], losses.auroc(saps[known], test.labels[known]))
    assert "80 stays" in out and "SYNTHETIC" not in out and out.count("logistic regression") == 3
    assert len(sets.train) + len(sets.validation) + len(test) == 80


def test_train_stays_probability_takes_back_the_weight_on_deaths():
    with folder() as f:
        zero = torch.tensor([0.0])
        args, sets = loaded_stays(f, "--pos-weight", "4")
        prob = seqsetvae.probability(zero, args, sets.facts)  # odds of 1, four times too many
        assert math.isclose(float(prob), 0.2, rel_tol=1e-6)
        args, sets = loaded_stays(f, "--pos-weight", "0")
        deaths = sets.train.labels.mean()
        assert math.isclose(sets.facts["pos_weight"], (1 - deaths) / deaths, rel_tol=1e-6)
        args, sets = loaded_stays(f, "--loss", "focal", "--gamma", "0", "--alpha", "0.25")
        logits, targets = torch.tensor([0.3, -2.0]), torch.tensor([1.0, 0.0])
        p = torch.sigmoid(logits)
        by_hand = -0.25 * p[0].log() - 0.75 * (1 - p[1]).log()
        loss = seqsetvae.criterion(logits, targets, args, sets.facts)
        of_rows, of_weights = by_hand / 2, by_hand / (0.25 + 0.75)
        assert torch.isclose(loss, of_rows) or torch.isclose(loss, of_weights), (loss, by_hand)
        assert math.isclose(float(seqsetvae.probability(zero, args, sets.facts)), 0.5)


def test_train_stays_network_corrects_the_regression_on_ranks_and_starts_at_it():
    with folder() as f:
        args, sets = loaded_stays(f)
        run = built(args, sets)
        with torch.inference_mode():
            for split in (sets.validation, sets.test):
                got = train.outputs_of(run.raw_model, split, run)["logits"]
                want = seqsetvae.rank_regression(split, sets.facts)
                assert near(got, torch.tensor(want), 1e-5)
            torch.nn.init.constant_(run.raw_model.head[-1].bias, 0.5)
            got = train.outputs_of(run.raw_model, sets.test, run)["logits"]
        assert near(got - torch.tensor(want), 0.5, 1e-4)
        # of outcomes drawn at random a regression knows those that it saw, and no others
        stays = seqsetvae_data.synthetic_stays(400)
        split = seqsetvae.StaySplit(stays, np.arange(400), scaler=sets.train.scaler)
        split.labels = np.random.default_rng(0).permutation(split.labels)
        seen = seqsetvae.rank_regression(split, {"strong": seqsetvae.fit_simple_models(split)})
        assert losses.auroc(seen, split.labels) > 0.75
        assert abs(losses.auroc(seqsetvae.unseen_logits(split, 0), split.labels) - 0.5) < 0.1
        split.labels[:] = np.arange(400) < 1
        raises(ValueError, "needs two of either outcome",
               lambda: seqsetvae.unseen_logits(split, 0))
        # new stays, without outcomes, have theirs
        new = seqsetvae.rows(args.data, args, sets.facts, need_labels=False).split
        place = np.flatnonzero(np.isin(new.ids, sets.test.ids))
        assert near(new.batch(place)["anchor"], torch.tensor(sets.test.anchor), 1e-5)
        args, sets = loaded_stays(f, "--anchor", "none")
        assert "anchor" not in sets.test.batch([0]) and sets.train.anchor is None


def test_train_stays_scores_do_not_depend_on_the_batch_they_are_in():
    with folder() as f:
        args, sets = loaded_stays(f, "--anchor", "none")
        run, test = built(args, sets), sets.test
        with torch.inference_mode():
            together = train.outputs_of(run.raw_model, test, run)["logits"]
            alone = [run.raw_model(test.batch([row])["inputs"]) for row in range(len(test))]
        assert near(together, torch.cat(alone), 1e-5) and together.std() > 0.01

        args, sets = loaded_stays(f, "--mode", "pretrain")
        run = built(args, sets)
        scores = train.evaluate(run.raw_model, sets.test, run)
        sets.test.chunk = 1
        alone = train.evaluate(run.raw_model, sets.test, run)
        for name, score in scores.items():
            assert math.isclose(score, alone[name], rel_tol=1e-5), (scores, alone)


def test_train_stays_pretraining_stands_between_constant_guesses_and_its_free_bits():
    with folder() as f:
        words = ["--mode", "pretrain", "--beta", "0.1"]
        stays_run(f / "pre", *words, "--epochs", "1")
        scores = json.loads((f / "pre" / "scores.json").read_text())["test"]
        args, sets = loaded_stays(f, *words)
    assert list(scores) == ["rows", "model", "constant mean", "constant frequent", "ceiling"]
    model, constant = scores["model"], scores["constant frequent"]
    assert list(model) == ["loss", "recon", "kl", "decoded"]
    assert math.isclose(model["loss"], model["recon"] + 0.1 * model["kl"], rel_tol=1e-6)
    assert math.isclose(scores["ceiling"]["kl"], 0.03 * 16) and scores["ceiling"]["decoded"] == 1
    counts = np.bincount(sets.train.variables, minlength=41)
    frequent = torch.from_numpy(np.argsort(-counts, kind="stable"))
    hits, total, recon = 0, 0, []
    for row in range(len(sets.test)):  # the constant guess, set by set
        inputs, costs = sets.test.batch([row])["inputs"], []
        sizes = inputs["sizes"].tolist()
        values_of_sets = inputs["values"].split(sizes)
        for variables, values in zip(inputs["variables"].split(sizes), values_of_sets):
            unit = F.one_hot(variables, 41).float()
            guess = F.one_hot(frequent[: len(variables)], 41).float()
            x = torch.cat([0 * guess, guess], 1)[None]
            y = torch.cat([values[:, None] * unit, unit], 1)[None]
            costs.append(float(losses.chamfer(x, y)))
            nearest = losses.set_costs(x, y)[0].argmin(0)
            hits += int((guess.argmax(1)[nearest] == variables).sum())
            total += len(variables)
        recon.append(np.mean(costs))
    assert math.isclose(constant["recon"], np.mean(recon), rel_tol=1e-5)
    assert math.isclose(constant["decoded"], hits / total, rel_tol=1e-9)
    assert math.isclose(sets.facts["frequency"][5], counts[5] / counts.sum())


def test_train_stays_beta_rises_from_nothing_over_its_steps():
    with folder() as f:
        args, sets = loaded_stays(f, "--mode", "pretrain", "--beta", "0.5", "--beta-steps", "10")
    model = built(args, sets).raw_model
    batch = sets.train.batch(np.arange(8))
    cases = [(0, 10, 0.0), (5, 10, 0.25), (10, 10, 0.5), (99, 10, 0.5), (0, 0, 0.5)]
    for step, beta_steps, beta in cases:
        args = args.replace(beta_steps=beta_steps)
        with torch.inference_mode():
            loss, parts = seqsetvae_pretrain.loss(model, batch | {"step": step}, args, sets.facts)
        want = parts["recon"] + beta * parts["kl"]
        assert math.isclose(float(loss), float(want), rel_tol=1e-6), (step, beta_steps)


def test_train_stays_pretraining_brings_the_variable_of_an_event_back():
    """The published target was trainable, and all variables became one.

    Here they come back far more often than by any constant guess.
    """
    orders = [torch.randperm(12, generator=seeded(i)) for i in range(80)]
    inputs = {"variables": torch.cat([order[:3] for order in orders]),
              "values": torch.randn(240, generator=seeded()), "sizes": torch.full((80,), 3),
              "minutes": torch.arange(80).float() % 8 * 60, "lengths": torch.full((10,), 8)}
    torch.manual_seed(0)
    encoder = models.SetSequenceEncoder(41, width=32, heads=4, hidden=32, dropout=0.0)
    model = models.SeqSetVAE(encoder, seeds=3)
    args = types.SimpleNamespace(free_bits=0.03, beta=0.01, beta_steps=100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(250):
        loss, parts = seqsetvae_pretrain.loss(model, {"inputs": inputs, "step": step}, args, {})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert parts["decoded"] > 0.6, parts  # always the three most frequent of twelve: 0.3


def test_train_stays_modes_train_what_they_say_from_the_pretrained_encoder():
    modes = [
        ("probe", [], set()),
        ("finetune", ["--backbone-lr", "1e-3"],
         {"sets", "mu", "gap", "time_bias", "layers.0", "layers.1", "norm"}),
        ("partial", ["--unfreeze-last", "1", "--no-events"], {"layers.1", "norm"}),
    ]
    with folder() as f:
        stays_run(f / "pre", "--mode", "pretrain", "--epochs", "1")
        from_encoder = ["--pretrained", f / "pre"]
        pretrained = result_of(f / "pre", "best.pt")["model"]
        tensors = [name for name in pretrained if name.startswith("encoder.")]
        for mode, words, parts in modes:
            out = stays_run(f / mode, "--mode", mode, *from_encoder, "--ema-decay", "0", *words)
            assert f"encoder: {len(tensors)} tensors" in out
            assert "0 missing, 0 unexpected; left there: logvar.weight" in out
            state, moved = result_of(f / mode)["model"], set()
            for name in tensors:
                if not torch.equal(state[name], pretrained[name]):
                    words_of_name = name.split(".")
                    last = 3 if words_of_name[1] == "layers" else 2
                    moved.add(".".join(words_of_name[1:last]))
            assert moved == parts, (mode, moved)
            reads_events = any(name.startswith("strongest.") for name in state)
            assert reads_events == (mode == "finetune")
        small = ["--width", "16", "--heads", "2", "--depth", "2", "--hidden", "16"]
        for variant, rate, layers in (("before", 1e-4, 4), ("after", 3e-4, 2)):
            stays_run(f / variant, "--variant", variant, *from_encoder, *small)
            last = result_of(f / variant)
            assert last["schedule"]["base_lrs"] == [rate] and last["recipe"]["mode"] == "probe"
            assert last["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.98)
            weights = [name for name in last["model"]
                       if name.startswith("head.") and name.endswith("weight")]
            assert len(weights) == layers


def test_train_stays_resumed_run_equals_straight_run_bit_for_bit():
    for words in (["--mode", "pretrain"], ["--schedule", "plateau", "--plateau-patience", "0"]):
        with folder() as f:
            check_resume(STAYS, stays_run, f, words, stays_folder(f))


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
        facts = result_of(f / "pre", "best.pt")["facts"]
        labelled = result_of(f / "a", "best.pt")["facts"]
        without = set(range(75, 81))
        assert without < set(facts["seen"])
        assert not without & set(labelled["seen"] + labelled["held_out"])
        assert facts["held_out"] == labelled["held_out"] and facts["scale"] == labelled["scale"]
        stays_run(f / "b", "--data", path, "--mode", "probe", "--pretrained", f / "pre",
                  "--epochs", "1")


def test_train_stays_without_an_event_keep_an_empty_row_in_the_predictions():
    def add_empty(path):
        write_stay(path / "set-a" / "500.txt", ["00:00,RecordID,500", "00:00,Height,-1"])

    with folder() as f:
        stays_run(f / "a", "--epochs", "1")
        path = stays_folder(f, "empty", add_empty)
        out = succeeded("--task", "seqsetvae", "--predict", f / "a" / "best.pt",
                        "--data", path, "--out", f / "p.csv")
        assert "stay without an event: 1 (500)" in out
        assert (f / "p.csv").read_text().endswith("\n500,,\n")


def refused_calls(f):
    """[(a part of the message, words)]: bad files, encoders that do not fit, and bad settings."""

    def word_as_value(path):
        edit(path / "set-a/3.txt", lambda text: text.rstrip("\n") + "\n07:00,HR,high\n")

    def other_record(path):
        edit(path / "set-a/3.txt", lambda text: text.replace("RecordID,3", "RecordID,4"))

    def no_outcomes(path):
        (path / "Outcomes-a.txt").unlink()

    def outcome_of_7(path):
        edit(path / "Outcomes-a.txt", lambda text: text.rstrip("\n")[:-1] + "7\n")

    def nobody_died(path):
        edit(path / "Outcomes-a.txt", lambda text: text.replace(",1\n", ",0\n"))

    def damaged(change):
        return ["--data", stays_folder(f, change.__name__, change)]

    stays_run(f / "pre", "--mode", "pretrain", "--epochs", "1")
    stays_run(f / "run", "--epochs", "1")
    content = torch.load(f / "pre" / "best.pt", weights_only=True)
    content["model"].pop("encoder.layers.1.qkv.weight")
    torch.save(content, f / "lacking.pt")
    content = torch.load(f / "pre" / "best.pt", weights_only=True)
    content["facts"]["scale"]["mean"][5] += 1
    torch.save(content, f / "scaled.pt")
    probe = ["--mode", "probe", "--pretrained"]
    pre = [*probe, f / "pre"]
    return [
        ("set-a/3.txt line", damaged(word_as_value)),
        ("RecordID", damaged(other_record)),
        ("Outcomes-a.txt is missing", damaged(no_outcomes)),
        ("has an outcome", ["--mode", "pretrain", *damaged(no_outcomes)]),
        ("In-hospital_death", damaged(outcome_of_7)),
        ("stays 0 died", damaged(nobody_died)),
        ("holds no stays", ["--data", f / "pre"]),
        ("tensors fit under 'encoder.': missing 1 (layers.1.qkv.weight)",
         [*probe, f / "lacking.pt"]),
        ("scaled by other training rows", [*probe, f / "scaled.pt"]),
        ("of the cases that this run holds out", [*pre, "--seed", "1"]),
        ("--width 32: the encoder in", [*pre, "--width", "32"]),
        ("whose encoder has seen labels", [*probe, f / "run"]),
        ("starts from an encoder: give --pretrained", ["--mode", "finetune"]),
        ("starts from an encoder: give --pretrained", ["--variant", "after", "--width", "16"]),
        ("heads must divide channels", ["--heads", "3"]),
        ("heads must divide channels", ["--set-heads", "3"]),
        ("--beta is read only with --mode pretrain", ["--beta", "0.1"]),
        ("--monitor is read only with --mode", ["--mode", "pretrain", "--monitor", "auroc"]),
        ("--alpha is read only with --loss focal", ["--alpha", "0.3"]),
        ("--drop-events is read only with --mode", [*pre, "--drop-events", "0.1"]),
        ("--plateau-watches is read only with --schedule plateau",
         ["--plateau-watches", "loss"]),
        ("--drop-events 1 must be finite and at least 0 and at most 0.95",
         ["--drop-events", "1"]),
    ]


def test_train_stays_refuses_bad_data_and_bad_calls_with_exit_code_2_and_one_message():
    with folder() as f:
        cases, good = refused_calls(f), stays_folder(f)
        for message, words in cases:
            words = words if "--data" in words else [*words, "--data", good]
            code, _, err = call(*STAYS, "--out", f / "new", *words)
            assert code == 2 and message in err and err.count("error:") == 1, (message, code, err)
            assert not (f / "new").exists(), message
        code, _, err = call("--task", "seqsetvae", "--predict", f / "pre" / "best.pt",
                            "--data", good, "--out", f / "p.csv")
        assert code == 2 and "predicts no death" in err and not (f / "p.csv").exists(), err
