"""Tests of quadmodal."""

import json
import math

import numpy as np
import torch

import data
import losses
import train
from runtime import pretrained
from tasks import quadmodal
from tasks.common import plan_batches
from tasks.quadmodal_data import (
    fit_whitening, spectral_features, whitened, window_statistics)
from tests.helpers import (
    call, check_resume, folder, loaded, MODAL, near, quad_npz, quad_run, raises, replaced,
    result_of, seeded, succeeded)


def settings(*words):
    return train.parse_args([*MODAL, *words])


def facts_of(arrays):
    """What a network needs to know of the modalities."""
    return {"shapes": {name: array.shape[1:] for name, array in arrays.items()}, "complete": []}


def test_train_quad_prints_floor_bound_and_collapse_beside_the_loss():
    with folder() as f:
        out = quad_run(f / "a")
        scores = json.loads((f / "a" / "scores.json").read_text())["test"]
        log = [json.loads(line) for line in (f / "a" / "log.jsonl").read_text().splitlines()]
        args, sets = loaded(*MODAL, "--data", f / "quad.npz")
        succeeded("--task", "quadmodal", "--predict", f / "a" / "best.pt",
                  "--data", f / "quad.npz", "--out", f / "z.npz")
        z = np.load(f / "z.npz")["embeddings"]
    assert list(scores) == ["rows", "model", "constant majority", "ridge audio", "ridge sensor",
                            "ridge all", "strong: ridge on spectra", "5-NN after LDA", "ceiling"]
    model = scores["model"]
    assert list(model) == ["loss", "accuracy", "macro_f1", "classes", "probe", "cosine"]
    labels, known = sets.test.labels, sets.train.labels
    majority = np.bincount(known).argmax()
    assert math.isclose(scores["constant majority"]["accuracy"], np.mean(labels == majority))

    # the same scores again, from the embeddings that --predict wrote
    assert near(np.linalg.norm(z, axis=1), 1, 1e-5)
    reference, test = z[sets.train.rows], z[sets.test.rows]
    predicted = losses.knn_predict(reference, known, test, k=5)
    # batches may round ties otherwise
    assert near(model["accuracy"], np.mean(predicted == labels), 0.02)
    probe = losses.ridge_predict(reference, known, test)
    assert near(model["probe"], np.mean(probe == labels), 0.04)
    assert np.mean(probe == predicted) < 0.95
    assert math.isclose(model["cosine"], losses.mean_cosine(test), rel_tol=1e-4)
    assert scores["ceiling"]["loss"] < scores["constant majority"]["loss"]
    assert scores["ridge all"]["accuracy"] > scores["constant majority"]["accuracy"]

    sizes = [len(rows) for rows in plan_batches(sets.train, 1, args)]
    collapsed = np.average([math.log(size - 1) for size in sizes], weights=sizes)
    for row in log[1:]:
        parts = row["parts"]
        assert set(parts) == {"bound", "collapsed", "cosine", "classes"} and parts["classes"] == 3
        assert parts["bound"] < row["train_loss"] and -1 <= parts["cosine"] <= 1
        assert math.isclose(parts["collapsed"], collapsed, rel_tol=1e-6)
    assert "| bound " in out and "| collapsed " in out and "rows     recall         f1" in out


def test_train_quad_knows_training_rows_only_and_augments_as_the_flags_say():
    off = ["--noise", "0", "--scale", "0", "--shift", "0"]
    with folder() as f:
        quad_npz(f / "quad.npz")
        for words in ([], ["--noise", "0.1"], ["--scale", "0.1"], ["--shift", "3"]):
            args, sets = loaded(*MODAL, "--data", f / "quad.npz", *off, *words)
            plain = sets.train.batch(np.arange(20))["inputs"]["sensor"]
            drawn = sets.train.batch(np.arange(20), seeded())["inputs"]["sensor"]
            assert torch.equal(plain, drawn) == (not words), words
        arrays, labels, _, _, _ = quadmodal.read_modalities(f / "quad.npz")
    for name, array in arrays.items():
        mean = sets.facts["scaler"][name][0]
        assert near(mean, array[sets.train.rows].astype(np.float64).mean((0, 1)), 1e-6)
        assert not near(mean, array.mean((0, 1)), 1e-6)
    # rows of another class than the commonest of the training rows
    assert np.bincount(sets.train.labels).argmax() != 2
    rows = np.flatnonzero(labels == 2)[:9]
    present = sets.train.present
    split = quadmodal.ModalSplit(arrays, labels, rows, present=present, scaler=sets.train.scaler)
    split.reference = sets.train
    floors = quadmodal.floors(split, args, sets.facts)
    assert floors["constant majority"]["accuracy"] == 0


def test_train_quad_strong_floor_is_a_ridge_on_clipped_features_of_training_rows():
    arrays, labels, groups, names, present = quadmodal.synthetic_modalities(300, missing=0.3)
    train_rows, rows = np.arange(200), np.arange(200, 300)
    arrays["sensor"][250:260] *= 1e6  # far beyond 6 sd
    scaler = {name: data.channel_statistics(array, train_rows, present[name])
              for name, array in arrays.items()}
    split, reference = (quadmodal.ModalSplit(arrays, labels, part, present=present, scaler=scaler)
                        for part in (rows, train_rows))
    split.reference, facts = reference, {"names": list(names)}
    args = settings()
    floors = quadmodal.floors(split, args, facts)
    features = []
    for part in (reference, split):
        columns = list(quadmodal.channel_features(part).values())
        features.append(np.hstack([*columns, quadmodal.spectral_features(part)]))
    z = [np.zeros_like(part) for part in features]
    for j in range(z[0].shape[1]):
        known = [value for value in features[0][:, j] if not math.isnan(value)]
        mean, sd = np.mean(known), np.std(known) or 1
        for part, result in zip(features, z):
            for i, value in enumerate(part[:, j]):
                result[i, j] = 0 if math.isnan(value) else min(max((value - mean) / sd, -6), 6)
    assert np.isnan(features[0]).any() and np.abs(z[1]).max() == 6
    want = losses.ridge_predict(z[0], labels[train_rows], z[1], penalty=10)
    strong = floors["strong: ridge on spectra"]
    assert (strong["classes"].numpy() == want).all()
    lda = losses.lda_fit(z[0], labels[train_rows], penalty=10)
    near_to = [losses.linear_scores(lda, part) for part in z]
    want = losses.knn_accuracy(near_to[0], labels[train_rows], near_to[1], labels[rows])
    assert math.isclose(floors["5-NN after LDA"]["accuracy"], want)
    floors = quadmodal.floors(split, args, facts)
    scored = train.scored_floors(floors, quadmodal.TASK, split, args, facts)
    scored = scored["strong: ridge on spectra"]
    assert list(scored) == ["accuracy", "macro_f1", "classes"]


def test_train_quad_checks_the_batches_of_every_epoch():
    labels = np.array([0, 0, 0, 1, 1, 1])
    split = quadmodal.ModalSplit({"a": np.zeros((6, 2))}, labels, np.arange(6))
    args = settings("--sampler", "shuffled", "--batch-size", "3", "--epochs", "100")
    first = 1  # the first epoch with a batch of one class
    while all(len(set(labels[rows])) == 2 for rows in plan_batches(split, first, args)):
        first += 1
    assert 1 < first < 100
    quadmodal.check_training_rows(split, args.replace(epochs=first - 1))
    for epochs in (first, 100):
        raises(ValueError, "a batch of 3 rows holds 1 classes",
               lambda: quadmodal.check_training_rows(split, args.replace(epochs=epochs)))


def test_train_quad_mixup_keeps_absent_rows_out_of_the_batch_statistics():
    arrays, labels, _, _, present = quadmodal.synthetic_modalities(24, classes=2)
    arrays = {"image": arrays["image"], "sensor": arrays["sensor"]}
    present = {"image": np.arange(24) < 12, "sensor": present["sensor"]}
    args, facts = settings("--mixup", "1"), facts_of(arrays)
    means = []
    for count in (24, 12):
        torch.manual_seed(0)
        model, rows = quadmodal.network(args, facts), np.arange(count)
        split = quadmodal.ModalSplit(arrays, labels, rows, present=present)
        quadmodal.loss(model, split.batch(rows), args, facts)
        means.append([buffer.clone() for name, buffer in model.named_buffers()
                      if "running_mean" in name])
    assert means[0]
    for all_rows, first_half in zip(*means):
        assert near(all_rows, first_half, 1e-6)


def test_train_quad_uses_the_modalities_that_are_named():
    with folder() as f:
        out = quad_run(f / "a", "--modalities", "sensor")
        assert "rows of sensor 64x6\n" in out and "ridge audio" not in out
        assert all("audio" not in name for name in result_of(f / "a")["model"])
        predict = ["--task", "quadmodal", "--predict", f / "a" / "best.pt", "--out", f / "z.npz"]
        code, _, err = call(*predict, "--data", quad_npz(f / "b.npz", only=("audio",)))
        assert code == 2 and "holds no sensor" in err, err
        assert call(*predict, "--data", f / "quad.npz")[0] == 0


def test_train_quad_statistics_are_mean_and_sd_of_every_channel():
    arrays, labels, _, _, present = quadmodal.synthetic_modalities(30, missing=0.5)
    arrays["vector"] = np.random.default_rng(0).normal(size=(30, 5))
    present["vector"] = np.arange(30) > 9
    split = quadmodal.ModalSplit(arrays, labels, np.arange(3, 17), present=present)
    got = quadmodal.channel_features(split)
    for name, array in arrays.items():
        if array.ndim > 3:
            array = np.moveaxis(array, -3, -1)
        elif array.ndim == 2:
            array = array[:, None]
        flat = array.reshape(len(array), -1, array.shape[-1])[3:17].astype(np.float64)
        want = np.concatenate([flat.mean(1), flat.std(1)], 1)
        assert near(got[name], np.where(present[name][3:17, None], want, 0), 1e-4)


def test_train_quad_one_class_is_refused_or_stands_at_its_bound():
    """SupCon over one class cannot fall below ln(B - 1), whatever the rate: 3.43399 for 32 rows."""
    def one_class(content):
        keep = np.flatnonzero(content["labels"] == 0)[:480]
        changed = {name: content[name][keep] for name in ("audio", "sensor", "labels")}
        return changed | {"label_names": content["label_names"]}

    words = ["--batch-size", "32", "--train-ratio", "0.8", "--val-ratio", "0", "--ema-decay", "0",
             "--width", "32", "--heads", "4", "--embed", "32", "--dropout", "0", "--noise", "0",
             "--scale", "0", "--shift", "0"]
    with folder() as f:
        quad_npz(f / "quad.npz", n=1500, classes=3, change=one_class)
        rows = len(np.load(f / "quad.npz")["labels"])
        assert rows == 480  # 384 training rows, 12 whole batches
        code, _, err = call(*MODAL, "--data", f / "quad.npz", "--out", f / "new", *words)
        assert code == 2 and "are of class" in err and "3.43399" in err
        assert "--allow-single-class" in err and not (f / "new").exists()
        for lr, within in (("1e-4", 0.0005), ("1e-6", 9), ("1e-10", 9)):
            quad_run(f / lr, *words, "--allow-single-class", "--lr", lr, "--min-lr", "0",
                     "--warmup-start-lr", "0", "--epochs", "40" if lr == "1e-4" else "2")
            row = json.loads((f / lr / "log.jsonl").read_text().splitlines()[-1])
            bound = math.log(31)
            assert bound - 1e-6 <= row["train_loss"] < bound + within, (lr, row["train_loss"])
            assert math.isclose(row["parts"]["bound"], bound, rel_tol=1e-6)


def test_train_quad_frozen_encoders_are_run_once_and_stay_as_they_were():
    cache, calls = pretrained.cache_features, []

    def counted(model, splits):
        calls.append(model)
        cache(model, splits)

    with folder() as f:
        with replaced(pretrained, "cache_features", counted):
            quad_run(f / "a", "--freeze", "sensor", "--mixup", "0.4", "--modality-dropout", "0.2")
        assert len(calls) == 1
        content = result_of(f / "a")
        args, sets = loaded(*MODAL, "--data", f / "quad.npz", "--freeze", "sensor")
        run = train.build(args, sets.facts, 10)
        for name, value in run.raw_model.state_dict().items():
            same = torch.equal(value, content["model"][name])
            assert same == name.startswith("encoders.sensor."), name
        plain = train.outputs_of(run.raw_model, sets.test, run)
        cache(run.raw_model, sets.named().values())
        batch = sets.test.batch(np.array([3, 0]))
        assert torch.equal(batch["encoded"]["sensor"], sets.test.features["sensor"][[3, 0]])
        assert list(batch["encoded"]) == ["sensor"] and list(batch["inputs"]) == ["audio"]
        cached = train.outputs_of(run.raw_model, sets.test, run)
        assert near(cached["embedding"], plain["embedding"], 1e-6)
        code, _, err = call(*MODAL, "--data", f / "quad.npz", "--out", f / "b",
                            "--freeze", "audio,sensor")
        assert code == 0 and "all 2 encoders are frozen" in err


def test_train_quad_mixup_contrasts_a_mixed_row_as_either_of_its_classes():
    args = settings("--mixup", "1", "--dropout", "0")
    arrays, labels, _, _, present = quadmodal.synthetic_modalities(16, classes=2)
    facts, rows = facts_of(arrays), np.arange(16)
    torch.manual_seed(0)
    model = quadmodal.network(args, facts)
    batch = quadmodal.ModalSplit(arrays, labels, rows, present=present).batch(rows)
    torch.manual_seed(5)
    loss = quadmodal.loss(model, batch, args, facts)[0]
    torch.manual_seed(5)
    lam, other = float(torch.distributions.Beta(1.0, 1.0).sample()), torch.randperm(16)
    tokens = {name: model.encode(name, x) for name, x in batch["inputs"].items()}
    z = model.fuse({name: lam * x + (1 - lam) * x[other] for name, x in tokens.items()})
    y = batch["targets"]
    as_first = losses.supcon_loss(z, y, temperature=args.temperature)
    as_other = losses.supcon_loss(z, y[other], temperature=args.temperature)
    want = lam * as_first + (1 - lam) * as_other
    assert 0.05 < lam < 0.95 and torch.isclose(loss, want, rtol=1e-4)


def test_train_quad_resumed_run_equals_straight_run_bit_for_bit():
    with folder() as f:
        words = ["--epochs", "3", "--mixup", "0.4", "--modality-dropout", "0.2"]
        check_resume(MODAL, quad_run, f, words)


def test_train_quad_that_diverges_stops_with_where_and_at_which_rate():
    with folder() as f:
        quad_npz(f / "quad.npz")
        code, _, err = call(*MODAL, "--data", f / "quad.npz", "--out", f / "a", "--noise", "1e38")
        assert code == 1 and "not finite" in err and "in epoch 1, step 0, at lr" in err, (code, err)


def test_train_quad_refuses_bad_data_and_bad_calls_with_exit_code_2_and_one_message():
    def short(content):
        content["audio"] = content["audio"][:-1]

    def one_number_a_row(content):
        content["sensor"] = content["sensor"][:, 0, 0]

    def nan(content):
        content["audio"][7, 0, 0] = math.nan

    def no_labels(content):
        del content["labels"]

    def lonely_class(content):
        labels = np.minimum(content["labels"], 1)
        labels[3] = 2
        content["labels"] = labels

    def two_of_each(content):
        del content["groups"], content["label_names"]
        content["labels"] = np.arange(240) % 120

    with folder() as f:
        quad_run(f / "run")
        shuffled = ["--sampler", "shuffled"]
        three = ["--train-ratio", "0.7875", "--val-ratio", "0.0125", "--batch-size", "240"]
        damaged = [
            ("audio", short, []), ("sensor", one_number_a_row, []), ("audio", nan, []),
            ("labels", no_labels, []), ("class", lonely_class, []),
            ("no class has two of the 3 validation rows", two_of_each, three),
        ]
        badly_called = [
            ("--neighbours 500 must be at most", ["--neighbours", "500"]),
            ("--shift 100000000000000000000", ["--shift", "100000000000000000000"]),
            ("--epochs 1" + 40 * "0", ["--epochs", "1" + 40 * "0"]),
            ("cannot freeze 'video': the modalities are audio, sensor", ["--freeze", "video"]),
            ("--modalities audio,smell: there is no smell; the file holds audio, sensor",
             ["--modalities", "audio,smell"]),
            ("width must be a multiple of heads and of 4", ["--width", "10"]),
            ("SupCon needs two classes and two rows of one", ["--batch-size", "2", *shuffled]),
            ("SupCon needs two classes and two rows of one",
             ["--batch-size", "6", *shuffled, "--epochs", "300"]),
        ]
        training = [*MODAL, "--out", f / "new"]
        evaluate = ["--task", "quadmodal", "--eval"]
        cases = [
            ("nowhere.npz is no file", [*training, "--data", f / "nowhere.npz"]),
            ("is a folder: give the best.pt in it", [*evaluate, f / "run"]),
            ("--split all: k-NN compares with the run's own training rows",
             [*evaluate, f / "run" / "best.pt", "--split", "all"]),
        ]
        for message, change, words in damaged:
            path = quad_npz(f / f"{change.__name__}.npz", change=change)
            cases.append((message, [*training, "--data", path, *words]))
        for message, words in badly_called:
            cases.append((message, [*training, "--data", f / "quad.npz", *words]))
        for message, words in cases:
            code, out, err = call(*words)
            assert code == 2 and message in err and "Traceback" not in err, (message, code, err)
            assert not (f / "new").exists() and "epoch " not in out, message


def test_train_quad_spectra_stand_for_the_sequences_and_use_training_rows_only():
    def change(arrays):
        arrays["present_sensor"] = np.arange(240) % 5 > 0
        arrays["image"] = np.random.default_rng(1).integers(0, 256, (240, 3, 9, 9), dtype=np.uint8)

    with folder() as f:
        path = quad_npz(f / "quad.npz", change=change)
        words = [*MODAL, "--inputs", "spectra", "--data", path]
        args, sets = loaded(*words)
        assert list(sets.facts["shapes"]) == ["image", "spectra"]
        split, recorded = sets.test, sets.test.recorded
        statistics = spectral_features(recorded, window_statistics)
        want = whitened(torch.from_numpy(statistics), sets.facts["whitening"])
        batch = split.batch(np.arange(len(split)))
        assert near(batch["inputs"]["spectra"], want, 1e-5)
        assert batch["present"]["spectra"].all()  # audio is always there
        lacks = ~recorded.present["sensor"][recorded.rows]
        assert np.isnan(statistics[lacks]).any(1).all() and not np.isnan(statistics[~lacks]).any()
        noisy = split.batch(np.arange(len(split)), seeded())["inputs"]["spectra"]
        assert 0.9 < float((noisy - want).std()) < 1.3  # --spectra-noise 1, and --scale
        # rows of other splits do not change what was fitted
        train_rows = sets.train.rows
        x = spectral_features(sets.train.recorded, window_statistics)
        fit = fit_whitening(x, sets.train.labels)
        assert all(near(fit[key], sets.facts["whitening"][key], 1e-9) for key in fit)
        assert len(train_rows) == len(x)
        succeeded(*words, "--out", f / "run")
        out = succeeded("--task", "quadmodal", "--predict", f / "run" / "best.pt", "--data", path,
                        "--out", f / "embeddings.npz")
        assert "240 predictions" in out
        clash = quad_npz(f / "clash.npz", change=lambda x: x | {"spectra": np.ones((240, 2))})
        code, _, err = call(*words[:-1], clash, "--out", f / "new")
        assert code == 2 and "cannot be called 'spectra'" in err, err
