"""Tests of faceparse."""

import itertools
import json
import math
import re
import struct
import subprocess
import sys
import types
import zlib

import numpy as np
import torch
import torch.nn.functional as F

import data
import losses
import models
import train
from tasks import faceparse
from tests.helpers import (
    call, check_resume, FACEPARSE, faces_npz, faces_run, folder, HERE, loaded, near,
    need_pillow, raises, read_scores, result_of, same_bits, scores_of, seeded, sgd, succeeded,
    write_faces)


def test_train_faces_scores_stand_between_constants_and_ceilings_with_every_class():
    with folder() as f:
        out = faces_run(f / "a")
        scores = read_scores(f / "a")
        log = [json.loads(line) for line in (f / "a" / "log.jsonl").read_text().splitlines()]
        _, sets = loaded(*FACEPARSE, "--data", f / "faces.npz")
    test, names = scores["test"], faceparse.FACE_CLASSES
    model, by_position = test["model"], test["constant by position"]
    assert list(test) == [
        "rows", "model", "constant background", "constant by position", "at 16x16, nearest",
        "at 16x16, by area", "sides set right", "strong: colour and position"]
    assert list(model) == "loss ce dice f f_low f_high f_pooled miou classes".split()
    assert model["f_low"] <= model["f"] <= model["f_high"]
    background, position_f, nearest, area, sides, strong = [
        test[name]["f"] for name in list(test)[2:]]
    assert background < position_f < min(nearest, area) < max(nearest, area) < sides, test
    assert sides > 0.9999 and background < strong < area
    masks = sets.test.masks[sets.test.rows]
    for number, name in enumerate(names):
        images = int((masks == number).flatten(1).any(1).sum())
        assert model["classes"][name]["images"] == images, name
    # From scratch: the most frequent class of the training masks at each position.
    train_masks = sets.train.masks[sets.train.rows]
    position = torch.stack([(train_masks == c).sum(0) for c in range(19)]).argmax(0)
    confusions = np.stack([losses.confusion_matrix(position, mask, 19) for mask in masks])
    assert math.isclose(by_position["f"], losses.f_score_per_image(confusions).mean())
    confusion = confusions.sum(0)
    assert math.isclose(by_position["miou"], losses.mean_iou(confusion))
    pooled = losses.f_score_pooled(confusion)
    assert math.isclose(by_position["f_pooled"], np.nanmean(pooled))
    # Colour and position, written out.
    counts = torch.stack([(train_masks == c).sum(0) for c in range(19)])
    fit = faceparse.fit_colours(sets.train.images, sets.train.masks, sets.train.rows)
    logits = faceparse.colour_logits(sets.test.images[sets.test.rows], fit)
    logits += F.interpolate(faceparse.position_logits(counts)[None], (16, 16), mode="bilinear")
    large = F.interpolate(logits, masks.shape[1:], mode="bilinear")
    confusions = [losses.confusion_matrix(*pair, 19) for pair in zip(large.argmax(1), masks)]
    expected = losses.f_score_per_image(np.stack(confusions)).mean()
    assert math.isclose(strong, expected, rel_tol=1e-3)
    for row in log[1:]:
        parts = row["parts"]
        assert set(parts) == {"ce", "dice"}
        assert near(row["train_loss"], parts["ce"] + 1.5 * parts["dice"], 1e-5)
        assert set(row["train_eval"]) == set(row["raw"]) and row["train_eval"] != row["raw"]
    for row in log:  # the training rows without augmentation, by the weights that count
        images = row["train_eval"]["classes"]["skin"]["images"]
        assert images == len(sets.train_eval) == 3 and row["score"] == row[row["weights"]]["f"]
    assert set(sets.train_eval.rows) < set(sets.train.rows)
    lines = [line for line in out.splitlines() if line.startswith("epoch ")]
    assert len(lines) == 3
    for part in ("| ce ", "| dice ", "| f ", "| ema ", "| train f ", "| floor ",
                 "| colour and position "):
        assert part in lines[1]
    assert out.count("constant by position") >= 3
    table = out[out.index("used for nothing but this") :].splitlines()
    [head] = [line for line in table if line.startswith(" ") and line.strip().startswith("images ")]
    [skin] = [line for line in table if line.startswith("skin ")]
    assert re.split("  +", head.strip()) == ["images", "f", *list(test)[2:]]
    skin_scores = [f"{test[name]['classes']['skin']['f']:.4f}" for name in list(test)[1:]]
    assert skin.split() == ["skin", "3", *skin_scores]


def test_train_faces_training_rows_are_scored_by_the_weights_that_count():
    with folder() as f:
        args, splits = loaded(*FACEPARSE, "--data", faces_npz(f / "faces.npz"))
    run, nets = train.build(args, splits.facts, 3), []
    for favourite in (0, 13):
        nets.append(faceparse.network(args, splits.facts))
        with torch.no_grad():
            nets[-1].classify.bias[favourite] += 9
    scores = [train.evaluate(net, splits.validation, run)["f"] for net in nets]
    for raw, averaged in (nets, nets[::-1]):
        run.raw_model, run.ema = raw, types.SimpleNamespace(module=averaged)
        row = train.score_epoch(run, {}, splits)
        winner = nets[scores.index(max(scores))]
        assert row["weights"] == ("raw" if winner is raw else "ema")
        assert row["score"] == max(scores) != min(scores)
        want = train.evaluate(winner, splits.train_eval, run)
        assert same_bits(row["train_eval"], want)  # NaN where a class is absent


def test_train_faces_loss_reads_every_flag_of_the_recipe():
    logits = torch.randn(2, 19, 8, 8, generator=seeded())
    targets = torch.randint(0, 5, (2, 8, 8), generator=seeded(1))
    targets[0, 0] = 255
    weights = torch.linspace(0.5, 2, 19)
    base = dict(dice_weight=1.5, ignore_index=255)
    for words, options in (
            ([], {}), (["--dice-absent", "count"], {"absent": "count"}),
            (["--dice-per", "batch"], {"per": "batch"}), (["--gamma", "2"], {"gamma": 2.0}),
            (["--smoothing", "0.1"], {"label_smoothing": 0.1}),
            (["--ce-weight", "0.5"], {"ce_weight": 0.5}),
            (["--dice-weight", "2"], {"dice_weight": 2.0}),
            (["--class-weights", "median"], {"class_weights": weights})):
        args = train.parse_args([*FACEPARSE, *words])
        facts = {"class_weights": weights.tolist() if words[:1] == ["--class-weights"] else []}
        batch = {"inputs": logits, "targets": targets}
        got, _ = faceparse.loss(torch.nn.Identity(), batch, args, facts)
        want, _ = losses.ce_dice_loss(logits, targets, **base | options)
        without, _ = losses.ce_dice_loss(logits, targets, **base)
        assert torch.isclose(got, want) and (not words or abs(got - without) > 1e-3), words


def test_train_faces_training_batches_do_what_the_flags_say():
    with folder() as f:
        faces_npz(f / "faces.npz")
        off = ["--degrees", "0", "--zoom", "1", "--flip", "none", "--jitter", "0"]
        batches = {}
        cases = ("off", "--flip swap", "--flip naive", "--degrees 15", "--zoom 1.25", "--crop 3",
                 "--jitter 0.5", "--photometric 1", "--mixup 1", "--cutmix 1")
        for name in cases:
            words = [] if name == "off" else name.split()
            _, splits = loaded(*FACEPARSE, "--data", f / "faces.npz", *off, *words)
            batches[name] = splits.train.batch(np.arange(24), seeded(2))
    plain = batches.pop("off")
    for name, batch in batches.items():
        assert not torch.equal(batch["inputs"], plain["inputs"]), name
        same_targets = name in ("--jitter 0.5", "--photometric 1")
        assert torch.equal(batch["targets"], plain["targets"]) == same_targets, name
    swap, naive = batches["--flip swap"], batches["--flip naive"]
    mirrored = [not torch.equal(a, b) for a, b in zip(swap["inputs"], plain["inputs"])]
    assert 4 < sum(mirrored) < 20
    assert torch.equal(naive["inputs"], swap["inputs"])
    want = plain["targets"][mirrored].flip(-1)
    assert torch.equal(naive["targets"][mirrored], want)
    want = data.swap_labels(want, faceparse.FACE_PAIRS)
    assert torch.equal(swap["targets"][mirrored], want)


def test_train_faces_folds_test_every_image_once_and_average_what_can_be_averaged():
    with folder() as f:
        out = faces_run(f / "a", "--folds", "2")
        whole = read_scores(f / "a")
        parts = [read_scores(f / "a" / f"fold-{k}")["test"]["model"]["f"] for k in (1, 2)]
    assert "2 folds, 30 test rows" in out and whole["test"]["rows"] == 30
    assert math.isclose(whole["test"]["model"]["f"], np.mean(parts))
    assert not {"f_low", "f_high", "classes"} & set(whole["test"]["model"])


def test_train_faces_without_a_validation_or_test_split_and_with_find_lr():
    with folder() as f:
        out = faces_run(f / "a", "--val-ratio", "0", "--train-ratio", "0.9")
        assert "the training loss picks the epoch" in out
        assert "used for nothing but this, 3 rows" in out
        out = faces_run(f / "b", "--test-ratio", "0", "--train-ratio", "0.9")
        assert "used for nothing" not in out
        command = [sys.executable, HERE / "benchmarks" / "summary.py", f / "b"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert "3 validation rows" in done.stdout and "last 2 epochs" in done.stdout, done.stderr
        out = succeeded(*FACEPARSE, "--data", f / "faces.npz", "--find-lr")
        assert "suggested: --lr" in out


def test_train_faces_loss_and_score_leave_out_an_image_that_is_ignored_whole():
    with folder() as f:
        args, splits = loaded(*FACEPARSE, "--data", faces_npz(f / "faces.npz"))
    images, masks, facts = splits.train.images, splits.train.masks, splits.facts
    model = faceparse.network(args, facts)
    masks[3] = 255
    all_five = scores_of(model, faceparse.FaceSplit(images, masks, np.arange(5)), args, facts)
    four = scores_of(model, faceparse.FaceSplit(images, masks, [0, 1, 2, 4]), args, facts)
    for name in ("loss", "ce", "dice", "f", "f_pooled", "miou"):
        assert math.isclose(all_five[name], four[name], rel_tol=1e-5), name


def test_train_faces_score_does_not_depend_on_the_batch_size():
    def ignore_rows(arrays):
        arrays["masks"][::3, :9] = 255

    with folder() as f:
        faces_npz(f / "faces.npz", change=ignore_rows)
        args, splits = loaded(*FACEPARSE, "--data", f / "faces.npz")
    torch.manual_seed(0)
    model, split, scores = faceparse.network(args, splits.facts), splits.train, []
    for size in (1, 32):
        split.chunk = size
        scores.append(scores_of(model, split, args, splits.facts))
        classes = scores[-1].pop("classes")
        scores[-1] |= {name: row["f"] for name, row in classes.items() if row["images"]}
    assert len(split) == 24 and {"loss", "miou", "skin"} < set(scores[0])
    for name, value in scores[0].items():
        assert near(value, scores[1][name], 1e-6), name


def test_train_faces_resumed_run_equals_straight_run_bit_for_bit():
    with folder() as f:
        words = "--epochs 3 --photometric 0.5 --crop 2 --mixup 0.2 --cutmix 0.5 --dropout 0.1"
        check_resume(FACEPARSE, faces_run, f, words.split())


def test_train_faces_eval_and_predict_may_add_the_mirror_image():
    with folder() as f:
        words = ["--epochs", "1", "--ema-decay", "0", "--warmup-epochs", "0"]
        evaluate = ["--task", "faceparse", "--eval", f / "a" / "best.pt", "--split", "test"]
        faces_run(f / "a", *words)
        faces_run(f / "b", *words, "--tta")
        plain, mirrored = succeeded(*evaluate), succeeded(*evaluate, "--tta")
        scores = [read_scores(f / name)["test"]["model"] for name in "ab"]
        assert " --tta" in mirrored.splitlines()[0] and f"{scores[0]['f']:.4f}" in plain
        args = train.parse_args([*FACEPARSE, "--tta", "--data", str(f / "faces.npz")])
        model = faceparse.network(args, facts={}).eval()
        model.load_state_dict(torch.load(f / "a" / "best.pt", weights_only=True)["model"])
        images = torch.randn(2, 3, 16, 16, generator=seeded())
        with torch.inference_mode():
            want = models.flip_average(model, images, faceparse.FACE_PAIRS)
            assert torch.equal(faceparse.tta_logits(model, images, args), want)
            assert not torch.equal(model(images), want)
        predict = ["--task", "faceparse", "--predict", f / "a" / "best.pt"]
        for name, words in (("p", []), ("q", ["--tta"])):
            assert call(*predict, "--data", f / "faces.npz", "--out", f / name, *words)[0] == 0
        contents = []
        for name in "pq":
            contents.append([file.read_bytes() for file in sorted((f / name / "masks").iterdir())])
        assert len(contents[0]) == 30 and contents[0] != contents[1]
        assert scores[0]["loss"] != scores[1]["loss"] and f"{scores[1]['loss']:.4f}" in mirrored
        assert call("--task", "faceparse", "--out", f / "a", "--resume", "--tta")[0] == 2


def test_train_faces_predict_writes_masks_that_training_can_read_and_coloured_faces():
    need_pillow()
    with folder() as f:
        faces_run(f / "a")
        images, masks, _ = faceparse.synthetic_faces(3, size=(40, 24))
        write_faces(f / "new", images, masks)
        best = f / "a" / "best.pt"
        predict = ["--task", "faceparse", "--predict", best]
        assert "3 predictions" in succeeded(*predict, "--data", f / "new", "--out", f / "out")
        model = faceparse.network(train.parse_args(FACEPARSE), facts={}).eval()
        model.load_state_dict(torch.load(best, weights_only=True)["model"])
        (f / "out" / "images").symlink_to(f / "new" / "images")
        small, predicted, _ = faceparse.read_faces(f / "out", size=(16, 16))
        with torch.no_grad():
            logits = model(small.float() / 127.5 - 1)
        by_logits = F.interpolate(logits, (40, 24), mode="bilinear").argmax(1)
        by_probability = F.interpolate(logits.softmax(1), (40, 24), mode="bilinear").argmax(1)
        assert (predicted == by_logits).float().mean() > 0.999
        assert (predicted == by_probability).float().mean() > 0.9  # equal on pixels, not between
        colour = data.read_image(f / "out" / "colour" / "001.png")
        palette = np.array(faceparse.FACE_COLOURS)[predicted[1].numpy()]
        assert np.abs(colour - (images[1].permute(1, 2, 0).numpy() + palette) / 2).max() <= 1
        code, _, err = call(*predict, "--data", f / "new", "--out", f / "out")
        assert code == 2 and "is not an empty folder" in err
        faces_npz(f / "grey.npz", change=lambda arrays: {"images": arrays["images"][:2, :, :, 0]})
        succeeded(*predict, "--data", f / "grey.npz", "--out", f / "p")
        written = sorted(file.name for file in (f / "p" / "masks").iterdir())
        assert written == ["grey-00000.png", "grey-00001.png"]
        succeeded(*predict, "--data", f / "new" / "images" / "001.png", "--out", f / "q")
        masks = [(f / name / "masks" / "001.png").read_bytes() for name in ("q", "out")]
        assert masks[0] == masks[1]
        (f / "new" / "images" / "zzz.png").write_bytes(b"no png")
        missing, cache = f / "nowhere", ["--cache", f / "cache"]
        for message, words in (
                ("zzz.png is not a readable image", ["--data", f / "new"]),
                ("--cache is not read", ["--data", f / "new", *cache]),
                ("nowhere does not exist: give a folder of images", ["--data", missing])):
            code, _, err = call(*predict, "--out", f / "r", *words)
            assert code == 2 and message in err, err
            assert not (f / "r").exists() and not list(f.glob("*.tmp")), message


def test_train_faces_reversed_labels_are_reported_and_set_right_in_training_alone():
    pairs = ((4, 5), (6, 7), (8, 9))

    def reverse_half(arrays):
        reversed_masks = data.swap_labels(torch.from_numpy(arrays["masks"][::2]), pairs)
        arrays["masks"][::2] = reversed_masks.numpy()

    with folder() as f:
        faces_npz(f / "good.npz")
        faces_npz(f / "bad.npz", change=reverse_half)
        settings, splits = {}, {}
        for name, words in (("good", []), ("bad", []), ("fixed", ["--fix-reversed"])):
            file = f / ("good.npz" if name == "good" else "bad.npz")
            settings[name], splits[name] = loaded(*FACEPARSE, "--data", file, *words)
        whole = {}
        for name in ("bad", "fixed"):
            args, facts = settings[name], splits[name].facts
            whole[name] = faceparse.rows(args.data, args, facts, need_labels=True)
    for notes, count in ((splits["good"].notes, 0), (splits["bad"].notes, 15),
                         (splits["fixed"].notes, 15), (whole["bad"].notes, 15)):
        [line] = [line for line in notes if line.startswith("left and right: ")]
        pattern = r"(\d+) of 30 masks cannot be told, reversed in (\d+)"
        hidden, reversed_masks = map(int, re.search(pattern, line).groups())
        assert count - hidden <= reversed_masks <= count and hidden < 4, line
    checksums = {name: splits[name].facts["data"] for name in splits}
    assert checksums["bad"] == checksums["fixed"] == whole["bad"].checksum != checksums["good"]
    trained = {}
    for name in splits:
        trained[name] = splits[name].train.batch(np.arange(24), seeded())["targets"]
    good = splits["good"].train
    known = faceparse.sides_reversed(good.masks[good.rows], pairs) == 0
    assert torch.equal(trained["fixed"][known], trained["good"][known])
    assert not torch.equal(trained["bad"][known], trained["good"][known])
    scored = {}
    for name in ("bad", "fixed"):
        parts = [*splits[name].named().values(), splits[name].train_eval, whole[name].split]
        scored[name] = [part.batch(np.arange(3)) for part in parts]
    assert len(parts) == 5
    assert same_bits(scored["bad"], scored["fixed"])  # scored masks stay as they were read
    args, facts = settings["bad"], splits["bad"].facts
    for name, low, high in (("bad", 0, 0.9), ("good", 0.9999, 1.1)):
        floors = faceparse.floors(splits[name].train, args, facts)
        assert low < floors["sides set right"]["f"] < high


def test_train_faces_class_weights_count_training_pixels_only():
    with folder() as f:
        faces_npz(f / "faces.npz")
        _, sets = loaded(*FACEPARSE, "--class-weights", "median", "--data", f / "faces.npz")
        train_masks = sets.train.masks[sets.train.rows].flatten().numpy()
        weights = losses.median_frequency_weights(np.bincount(train_masks, minlength=19))
        assert near(sets.facts["class_weights"], weights.numpy(), 1e-5)
        faces_run(f / "a", "--class-weights", "median", "--gamma", "2", "--smoothing", "0.1",
                  "--dice-per", "batch", "--dice-absent", "zero")
        assert result_of(f / "a")["facts"] == sets.facts


def test_train_faces_segformer_trains_too():
    with folder() as f:
        words = "--network segformer --size 32 --no-lmsa --flip naive --schedule plateau"
        assert "1,737,939 parameters" in faces_run(f / "a", *words.split())


def test_train_faces_original_schedule_has_the_rates_of_the_note():
    for variant, epochs, want in (("original", (60, 92, 112), (7.33e-4, 6.40e-4, 5.67e-4)),
                                  ("cosine120", (120, 121, 200), (0, 0, 0))):
        args = train.parse_args(["--task", "faceparse", "--variant", variant])
        # 900 images in batches of 32
        schedule = train.make_schedule(sgd(args.lr), args, faceparse.TASK.flags, 29)
        for epoch, rate in zip(epochs, want):
            assert near(schedule.lr_at(epoch * 29), rate, 6e-3), (variant, epoch)
        assert math.isclose(schedule.lr_at(5 * 29), 8e-4)
        assert math.isclose(schedule.lr_at(0), 8e-5)
    for words, message in (
            ("--cosine-epochs 0.5", "--warmup-epochs 0.5 must be below --cosine-epochs 0.5"),
            ("--cosine-epochs 100 --epochs 3 --warmup-epochs 5", "5 must be below --epochs 3")):
        args = train.parse_args(["--task", "faceparse", *words.split()])
        raises(ValueError, message,
               lambda: train.make_schedule(sgd(args.lr), args, faceparse.TASK.flags, 29))


def test_train_faces_variants_change_what_they_name_and_nothing_else():
    names = faceparse.TASK.flags
    settings = {}
    for variant in faceparse.TASK.variants:
        settings[variant] = train.parse_args(["--task", "faceparse", "--variant", variant])
    original, changed = settings["original"], {}
    for variant, args in settings.items():
        changed[variant] = {
            name for name in names if getattr(args, name) != getattr(original, name)}
    rate, shape = {"lr", "warmup_start_lr"}, {"epochs", "schedule", "min_lr"}
    training = {"dice_weight", "dropout", "weight_decay", "smoothing", "patience"}
    dice = {name: {"dice_weight"} for name in ("dice1", "dice2", "dice2.5", "dice3")}
    assert changed == dice | {
        "original": set(), "cosine120": {"epochs", "cosine_epochs"}, "restarts": shape,
        "lr1e-3": rate | {"warmup_epochs"},
        "combined": rate | shape | training}
    for args in settings.values():
        assert models.count_parameters(faceparse.network(args, facts={})) == 1_747_923
        assert math.isclose(args.warmup_start_lr, 0.1 * args.lr)


def png_chunk(name, body):
    checksum = struct.pack(">I", zlib.crc32(name + body))
    return struct.pack(">I", len(body)) + name + body + checksum


# A grey PNG of 2 x 1 pixels with 4 bits each, ids 1 and 15, which Pillow reads as 17 and 255.
FOUR_BITS = (
    b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 4, 0, 0, 0, 0))
    + png_chunk(b"IDAT", zlib.compress(b"\x00\x1f")) + png_chunk(b"IEND", b""))


def test_train_faces_notices_other_images_beside_the_same_masks():
    with folder() as f:
        faces_run(f / "a", "--epochs", "1")
        faces_npz(f / "faces.npz", change=lambda a: a | {"images": 255 - a["images"]})
        for words in (["--out", f / "a", "--resume"],
                      ["--eval", f / "a" / "best.pt", "--split", "validation"]):
            code, _, err = call("--task", "faceparse", *words)
            assert code == 2 and "data" in err, (code, err)


def refused_folders(f, pillow):
    """[(message, words)] of damaged face-parsing folders in f."""
    images, masks, _ = faceparse.synthetic_faces(20, size=(32, 32))
    zeros, folders = np.zeros((32, 32), np.uint8), []

    def spoiled(change):
        folders.append(write_faces(f / f"folder-{len(folders)}", images, masks))
        change(folders[-1])
        return f"--data {folders[-1]}"

    def with_file(name, content):
        return spoiled(lambda path: (path / name).write_bytes(content))

    def with_image(name, mode):
        return spoiled(lambda path: pillow.new(mode, (32, 32)).save(path / name))

    def with_mask(mask):
        return with_file("masks/003.png", data.encode_png(mask))

    def without(name):
        return spoiled(lambda path: (path / name).unlink())

    def truncate(path):
        file = path / "masks" / "003.png"
        file.write_bytes(file.read_bytes()[:60])

    def remove_images(path):
        for file in (path / "images").iterdir():
            file.unlink()

    def widen_third(path):
        pillow.new("RGB", (40, 32)).save(path / "images" / "003.png")
        pillow.new("L", (40, 32)).save(path / "masks" / "003.png")

    one_wrong = zeros.copy()
    one_wrong[0, 0] = 19
    return [
        ("003.png has no mask of the same stem, 1 of 20", without("masks/003.png")),
        ("003.png has no image of the same stem, 1 of 20", without("images/003.png")),
        ("is 16x32 but its image is 32x32", with_mask(zeros[:, :16].copy())),
        ("003.png: class ids must be 0 to 18, or 255 for pixels that do not count; "
         "got 19 in 1 pixels", with_mask(one_wrong)),
        ("003.png is a RGB image of 8 bits: a mask is a palette or 8-bit grey PNG",
         with_mask(np.zeros((32, 32, 3), np.uint8))),
        ("003.png is a 1 image of 1 bits", with_image("masks/003.png", "1")),
        ("003.png is a L image of 4 bits", with_file("masks/003.png", FOUR_BITS)),
        ("mode I;16, 8 bits per channel", with_image("images/003.png", "I;16")),
        ("003.png and 003.jpg have the same stem", with_image("images/003.jpg", "RGB")),
        ("is not a readable .npz of plain arrays", f"--data {f / 'plain.npy'}"),
        ("003.png is not a readable mask", spoiled(truncate)),
        ("000.png is not a readable", with_file("images/000.png", b"no png")),
        ("masks does not exist",
         spoiled(lambda path: (path / "masks").rename(path / "labels"))),
        ("holds no image files", spoiled(remove_images)),
        ("is 40x32 but the first mask is 32x32", spoiled(widen_third)),
        ("does not exist: give a folder with images/ and masks/",
         f"--data {f / 'nowhere'}")]


def refused_arrays(f):
    """[(message, words)] of damaged .npz files in f."""
    count = itertools.count()

    def npz(change):
        path = faces_npz(f / f"{next(count)}.npz", change=change)
        return f"--data {path}"

    def mark_corner(arrays):
        arrays["masks"][:, 0, 0] = 77

    return [
        ("masks are 255, which do not count",
         npz(lambda a: a | {"masks": np.full_like(a["masks"], 255)})),
        ("got uint8 (30, 0, 32, 3)", npz(lambda a: a | {"images": a["images"][:, :0]})),
        ("masks must be uint8 class ids (30, 32, 32), the size of the images, got none",
         npz(lambda a: {"images": a["images"]})),
        ("got uint8 (30, 16, 32)", npz(lambda a: a | {"masks": a["masks"][:, ::2]})),
        ("images must be uint8 (n, h, w) or (n, h, w, 3), got float64",
         npz(lambda a: a | {"images": a["images"] / 255})),
        ("got 77 in 30 pixels", npz(mark_corner))]


def test_train_faces_refuses_bad_data_and_bad_calls_with_exit_code_2_and_one_message():
    pillow = need_pillow()
    with folder() as f:
        faces_npz(f / "faces.npz")
        np.save(f / "plain.npy", np.zeros((2, 32, 32, 3), np.uint8))
        calls = [
            ("rows and columns must be multiples of 8, got 20x20: "
             "the nearest sizes that fit are 16x16 and 24x24", "--size 20"),
            ("multiples of 32, got 48x48", "--network segformer --size 48"),
            ("must have fewer than 1,821,085: make it narrower", "--width 40"),
            ("--crop 16 must be below the shorter side of --size 16x16", "--crop 16"),
            ("--flip: invalid choice", "--flip both"),
            ("--lmsa is read only with --network segformer", "--lmsa"),
            ("there must be at least 2 folds", "--folds 1")]
        for message, words in refused_folders(f, pillow) + refused_arrays(f) + calls:
            words = words.split() + ([] if "--data" in words else ["--data", f / "faces.npz"])
            base = FACEPARSE[:-2] if "segformer" in words else FACEPARSE
            code, out, err = call(*base, *words, "--out", f / "new")
            assert code == 2 and message in err and "Traceback" not in err, (message, code, err)
            assert not (f / "new").exists() and "epoch " not in out, message
