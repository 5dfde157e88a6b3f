"""Tests of quadmodal."""

import json
import math

import numpy as np
import torch

import losses
import train
from tasks import quadmodal
from tests.helpers import (
    call, check_resume, folder, MODAL, near, quad_npz, quad_run, raises, result_of, seeded)


def test_train_quad_prints_floor_bound_and_collapse_beside_the_loss():
    with folder() as f:
        out = quad_run(f / "a")
        scores = json.loads((f / "a" / "scores.json").read_text())["test"]
        log = [json.loads(line) for line in (f / "a" / "log.jsonl").read_text().splitlines()]
        args = train.parse_args([*MODAL, "--data", str(f / "quad.npz")])
        sets = train.quad_load(args.data, args)
        args.facts = sets.facts
        model = train.quad_network(args).eval()
        model.load_state_dict(torch.load(f / "a" / "best.pt", weights_only=True)["model"])
        assert call("--task", "quadmodal", "--predict", f / "a" / "best.pt", "--data", f / "quad.npz", "--out", f / "z.npz")[0] == 0
        z = np.load(f / "z.npz")["embeddings"]
    assert list(scores) == ["rows", "model", "constant majority", "ridge audio", "ridge sensor", "ridge all", "ceiling"]
    assert list(scores["model"]) == ["loss", "accuracy", "macro_f1", "classes", "probe", "cosine"]
    labels = sets.test.labels
    majority = np.bincount(sets.train.labels).argmax()
    assert math.isclose(scores["constant majority"]["accuracy"], np.mean(labels == majority))
    # the same scores again, from the embeddings that --predict wrote
    predicted = losses.knn_predict(z[sets.train.rows], sets.train.labels, z[sets.test.rows], k=5)
    assert near(np.linalg.norm(z, axis=1), 1, 1e-5)
    assert near(scores["model"]["accuracy"], np.mean(predicted == labels), 0.02)  # batches may round ties otherwise
    probe = losses.ridge_predict(z[sets.train.rows], sets.train.labels, z[sets.test.rows])
    assert near(scores["model"]["probe"], np.mean(probe == labels), 0.04) and np.mean(probe == predicted) < 0.95
    assert math.isclose(scores["model"]["cosine"], losses.mean_cosine(z[sets.test.rows]), rel_tol=1e-4)
    assert scores["ceiling"]["loss"] < scores["constant majority"]["loss"]
    assert scores["ridge all"]["accuracy"] > scores["constant majority"]["accuracy"]
    sizes = [len(rows) for rows in train.plan_batches(sets.train, 1, args)]
    for row in log[1:]:
        parts = row["parts"]
        assert set(parts) == {"bound", "collapsed", "cosine", "classes"} and parts["classes"] == 3
        assert parts["bound"] < row["train_loss"] and -1 <= parts["cosine"] <= 1
        assert math.isclose(parts["collapsed"], np.average([math.log(size - 1) for size in sizes], weights=sizes), rel_tol=1e-6)
    assert "| bound " in out and "| collapsed " in out and "rows     recall         f1" in out


def test_train_quad_knows_training_rows_only_and_augments_as_the_flags_say():
    with folder() as f:
        off = ["--noise", "0", "--scale", "0", "--shift", "0"]
        quad_npz(f / "quad.npz")
        for words in ([], ["--noise", "0.1"], ["--scale", "0.1"], ["--shift", "3"]):
            args = train.parse_args([*MODAL, "--data", str(f / "quad.npz"), *off, *words])
            sets = train.quad_load(args.data, args)
            plain, drawn = (sets.train.batch(np.arange(20), generator)["inputs"]["sensor"] for generator in (None, seeded()))
            assert torch.equal(plain, drawn) == (not words), words
        args.facts = sets.facts
        arrays, labels, _, names, _ = quadmodal.read_modalities(f / "quad.npz")
    for name, array in arrays.items():
        rows = array[sets.train.rows].astype(np.float64)
        assert near(sets.facts["scaler"][name][0], rows.mean((0, 1)), 1e-6)
        assert not near(sets.facts["scaler"][name][0], array.mean((0, 1)), 1e-6)
    one = quadmodal.ModalSplit(arrays, labels, np.flatnonzero(labels == 2)[:9], scaler=sets.train.scaler)  # rows of another class only
    one.reference, one.present = sets.train, sets.train.present
    assert np.bincount(sets.train.labels).argmax() != 2
    assert train.quad_floor(one, args)["constant majority"]["accuracy"] == 0


def test_train_quad_checks_the_batches_of_every_epoch():
    labels = np.array([0, 0, 0, 1, 1, 1])
    split, original = quadmodal.ModalSplit({"a": np.zeros((6, 2))}, labels, np.arange(6)), train.plan_batches
    args = train.parse_args([*MODAL, "--epochs", "3"])
    try:
        for bad in (1, 3, 4):
            train.plan_batches = lambda split, epoch, args: [[0, 1, 2]] if epoch == bad else [[0, 1, 3]]
            if bad < 4:
                raises(ValueError, "a batch of 3 rows holds 1 classes", lambda: train.quad_check(split, args))
            else:
                train.quad_check(split, args)
    finally:
        train.plan_batches = original


def test_train_quad_mixup_keeps_absent_rows_out_of_the_batch_statistics():
    arrays, labels, _, _, present = quadmodal.synthetic_modalities(24, classes=2)
    arrays = {"image": arrays["image"], "sensor": arrays["sensor"]}
    present = {"image": np.arange(24) < 12, "sensor": present["sensor"]}
    args = train.parse_args([*MODAL, "--mixup", "1"])
    args.facts = {"shapes": {name: array.shape[1:] for name, array in arrays.items()}}
    found = []
    for rows in (24, 12):
        torch.manual_seed(0)
        model = train.quad_network(args)
        batch = quadmodal.ModalSplit(arrays, labels, np.arange(rows), present=present).batch(np.arange(rows))
        train.quad_loss(model, batch, 0, args)
        found.append([each.clone() for name, each in model.named_buffers() if "running_mean" in name])
    assert found[0] and all(near(a, b, 1e-6) for a, b in zip(*found))


def test_train_quad_uses_the_modalities_that_are_named():
    with folder() as f:
        out = quad_run(f / "a", "--modalities", "sensor")
        assert "rows of sensor 64x6\n" in out and "ridge audio" not in out
        assert all("audio" not in name for name in result_of(f / "a")["model"])
        code, _, err = call("--task", "quadmodal", "--predict", f / "a" / "best.pt", "--out", f / "z.npz",
                            "--data", quad_npz(f / "b.npz", only=("audio",)))
        assert code == 2 and "holds no sensor" in err, err
        assert call("--task", "quadmodal", "--predict", f / "a" / "best.pt", "--data", f / "quad.npz", "--out", f / "z.npz")[0] == 0


def test_train_quad_statistics_are_mean_and_sd_of_every_channel():
    arrays, labels, _, _, present = quadmodal.synthetic_modalities(30, missing=0.5)
    arrays["vector"], present["vector"] = np.random.default_rng(0).normal(size=(30, 5)), np.arange(30) > 9
    split = quadmodal.ModalSplit(arrays, labels, np.arange(3, 17), present=present)
    found = train.quad_statistics(split)
    for name, array in arrays.items():
        channels = np.moveaxis(array, -3, -1) if array.ndim > 3 else array[:, None] if array.ndim == 2 else array
        flat = channels.reshape(len(array), -1, channels.shape[-1])[3:17].astype(np.float64)
        want = np.where(present[name][3:17, None], np.concatenate([flat.mean(1), flat.std(1)], 1), 0)
        assert near(found[name], want, 1e-4)


def test_train_quad_one_class_is_refused_or_stands_at_its_bound():
    """SupCon over one class cannot fall below ln(B - 1), whatever the rate: 3.43399 for 32 rows."""
    with folder() as f:
        def one_class(content):
            keep = content["labels"] == 0
            return {name: each[keep][:480] if name != "label_names" else each for name, each in content.items() if name != "groups"}

        quad_npz(f / "quad.npz", n=1500, classes=3, change=one_class)
        rows = len(np.load(f / "quad.npz")["labels"])
        words = ["--batch-size", "32", "--train-ratio", "0.8", "--val-ratio", "0", "--ema-decay", "0", "--width", "32", "--heads", "4",
                 "--embed", "32", "--dropout", "0", "--noise", "0", "--scale", "0", "--shift", "0"]
        assert rows == 480  # 384 training rows, 12 whole batches
        code, _, err = call(*MODAL, "--data", f / "quad.npz", "--out", f / "new", *words)
        assert code == 2 and "are of class" in err and "3.43399" in err and "--allow-single-class" in err and not (f / "new").exists()
        for lr, within in (("1e-4", 0.0005), ("1e-6", 9), ("1e-10", 9)):
            quad_run(f / lr, *words, "--allow-single-class", "--lr", lr, "--min-lr", "0", "--warmup-start-lr", "0",
                     "--epochs", "40" if lr == "1e-4" else "2")
            row = json.loads((f / lr / "log.jsonl").read_text().splitlines()[-1])
            assert math.log(31) - 1e-6 <= row["train_loss"] < math.log(31) + within, (lr, row["train_loss"])
            assert math.isclose(row["parts"]["bound"], math.log(31), rel_tol=1e-6)


def test_train_quad_frozen_encoders_are_run_once_and_stay_as_they_were():
    with folder() as f:
        original, calls = train.cache_features, []
        train.cache_features = lambda *call: calls.append(original(*call))
        try:
            quad_run(f / "a", "--freeze", "sensor", "--mixup", "0.4", "--modality-dropout", "0.2")
        finally:
            train.cache_features = original
        assert len(calls) == 1
        content = result_of(f / "a")
        args = train.parse_args([*MODAL, "--data", str(f / "quad.npz"), "--freeze", "sensor"])
        sets = train.quad_load(args.data, args)
        args.facts = sets.facts
        run_ = train.build(args, 10)
        for name, value in run_.raw_model.state_dict().items():
            assert torch.equal(value, content["model"][name]) == name.startswith("encoders.sensor."), name
        plain = train.quad_embeddings(run_.raw_model.eval(), sets.test)
        train.cache_features(run_.raw_model, sets)
        batch = sets.test.batch(np.array([3, 0]))
        assert torch.equal(batch["encoded"]["sensor"], sets.test.features["sensor"][[3, 0]])
        assert list(batch["encoded"]) == ["sensor"] and list(batch["inputs"]) == ["audio"]
        assert near(train.quad_embeddings(run_.raw_model, sets.test), plain, 1e-6)
        code, _, err = call(*MODAL, "--data", f / "quad.npz", "--out", f / "b", "--freeze", "audio,sensor")
        assert code == 0 and "all 2 encoders are frozen" in err


def test_train_quad_mixup_contrasts_a_mixed_row_as_either_of_its_classes():
    args = train.parse_args([*MODAL, "--mixup", "1", "--dropout", "0"])
    arrays, labels, _, _, present = quadmodal.synthetic_modalities(16, classes=2)
    args.facts = {"shapes": {name: array.shape[1:] for name, array in arrays.items()}}
    torch.manual_seed(0)
    model, batch = train.quad_network(args), quadmodal.ModalSplit(arrays, labels, np.arange(16), present=present).batch(np.arange(16))
    torch.manual_seed(5)
    loss = train.quad_loss(model, batch, 0, args)[0]
    torch.manual_seed(5)
    lam, other = float(torch.distributions.Beta(1.0, 1.0).sample()), torch.randperm(16)
    tokens = {name: lam * x + (1 - lam) * x[other] for name, x in ((name, model.encode(name, x)) for name, x in batch["inputs"].items())}
    z, y = model.fuse(tokens), batch["targets"]
    supcon = lambda labels: losses.supcon_loss(z, labels, temperature=args.temperature)
    want = lam * supcon(y) + (1 - lam) * supcon(y[other])
    assert 0.05 < lam < 0.95 and torch.isclose(loss, want, rtol=1e-4)


def test_train_quad_resumed_run_equals_straight_run_bit_for_bit():
    with folder() as f:
        check_resume(MODAL, quad_run, f, ["--epochs", "3", "--mixup", "0.4", "--modality-dropout", "0.2"])


def test_train_quad_that_diverges_stops_with_where_and_at_which_rate():
    with folder() as f:
        quad_npz(f / "quad.npz")
        code, _, err = call(*MODAL, "--data", f / "quad.npz", "--out", f / "a", "--noise", "1e38")
        assert code == 1 and "not finite" in err and "in epoch 1, step 0, at lr" in err, (code, err)


def test_train_quad_refuses_bad_data_and_bad_calls_with_exit_code_2_and_one_message():
    with folder() as f:
        quad_run(f / "run")
        npz = lambda name, change: ["--data", quad_npz(f / name, change=change)]

        def nan(content):
            content["audio"][7, 0, 0] = math.nan

        cases = [
            ("audio", npz("a.npz", lambda c: c | {"audio": c["audio"][:-1]})),
            ("sensor", npz("b.npz", lambda c: c | {"sensor": c["sensor"][:, 0, 0]})),
            ("audio", npz("c.npz", nan)),
            ("labels", npz("d.npz", lambda c: {name: each for name, each in c.items() if name != "labels"})),
            ("class", npz("e.npz", lambda c: c | {"labels": np.where(np.arange(240) == 3, 2, np.minimum(c["labels"], 1))})),
            ("--neighbours 500 must be at most", ["--neighbours", "500"]),
            ("--shift 100000000000000000000", ["--shift", "100000000000000000000"]),
            ("--epochs 1" + 40 * "0", ["--epochs", "1" + 40 * "0"]),
            ("is a folder: give the best.pt in it", ["--eval", f / "run"]),
            ("no class has two of the 3 validation rows", npz("g.npz", lambda c: {
                name: each for name, each in c.items() if name not in ("groups", "label_names")} | {"labels": np.arange(240) % 120}) + [
                "--train-ratio", "0.7875", "--val-ratio", "0.0125", "--batch-size", "240"]),
            ("cannot freeze 'video': the modalities are audio, sensor", ["--freeze", "video"]),
            ("--modalities audio,smell: there is no smell; the file holds audio, sensor", ["--modalities", "audio,smell"]),
            ("width must be a multiple of heads and of 4", ["--width", "10"]),
            ("SupCon needs two classes and two rows of one", ["--batch-size", "2", "--sampler", "shuffled"]),
            ("SupCon needs two classes and two rows of one", ["--batch-size", "6", "--sampler", "shuffled", "--epochs", "300"]),
            ("--split all: k-NN compares with the run's own training rows", ["--eval", f / "run" / "best.pt", "--split", "all"]),
            ("nowhere.npz is no file", ["--data", f / "nowhere.npz"]),
        ]
        for message, words in cases:
            words = [*words]
            base = ["--task", "quadmodal"] if "--eval" in words else [*MODAL, "--out", f / "new"]
            words += [] if "--data" in words or "--eval" in words else ["--data", f / "quad.npz"]
            code, out, err = call(*base, *words)
            assert code == 2 and message in err and "Traceback" not in err, (message, code, err)
            assert not (f / "new").exists() and "epoch " not in out, message
