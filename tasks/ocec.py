"""ocec: is the eye open or closed?

    python train.py --task ocec --lr 2e-3                      # drawn eyes, no data needed
    python train.py --task ocec --lr 2e-3 --data eyes/         # eyes/open/*.png, eyes/closed/*.png

Files, drawn eyes, batches; then the recipe: load, network, loss, scores, floors, predictions.
"""

import csv
import math
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import losses
import models
from tasks.common import (
    Exported, Flag, Rows, Splits, Task, check_crop, joined, open_npz, refuse_folder, shared_flags,
    show, split_checksum, split_note, split_rows, unit_images)


EYE_FOLDERS = {"closed": 0, "close": 0, "0": 0, "open": 1, "opened": 1, "1": 1}


def read_eyes(path, *, size=(32, 64), cache="", need_labels=True):
    """Read eye crops and their labels, 1 = open and 0 = closed, from a folder or an .npz.

        folder/open/*.png, folder/closed/*.png    also 1/ and 0/
        folder/annotation.csv                     rows `path,label` without a header
        folder/groups.csv                         optional rows `path,group` without a header
        file.npz                                  images uint8 (n, h, w) or (n, h, w, 3),
                                                  labels (n,) of 0 and 1, optional groups (n,)
        folder of images                          only with need_labels=False, for prediction

    size     (height, width) of the returned images: bilinear resizing with antialiasing
    cache    a folder: images are decoded once into .npy files there, and memory-mapped
    returns  images uint8 tensor (n, 3, h, w), labels int64 (n,) or None, groups str (n,) or None,
             names: list of n str
    Errors:  ValueError with the file or row for data that are missing, unreadable, of a wrong
             shape, NaN, or not 0 / 1; ImportError with the install command if image files need
             Pillow and it is missing
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist: give a folder of eye images or an .npz file")
    if path.is_file():
        arrays, labels, groups = read_eyes_npz(path, cache=cache, need_labels=need_labels)
        names = [f"{path.name}#{i}" for i in range(len(arrays))]
        files = [path]

        def load(start, stop):
            return data.resize_uint8(arrays[start:stop], size)
    else:
        names, labels, groups = list_eye_files(path, need_labels=need_labels)
        files = [path / name for name in names]

        def load(start, stop):
            images = [data.read_image(file) for file in files[start:stop]]
            return torch.cat([data.resize_uint8(image[None], size) for image in images])

    key = data.file_stamps(files, path.parent)
    images = data.decode_once(load, (len(names), 3, *size), key=key, cache=cache)
    return images, labels, groups, names


def read_eyes_npz(path, *, cache="", need_labels=True):
    """Checked images uint8 (n, h, w[, 3]), labels and groups of an .npz file; see read_eyes."""
    with open_npz(path, "images=..., labels=...") as archive:
        present = archive.files
        in_memory = ("labels", "groups") if cache else ("images", "labels", "groups")
        arrays = {name: archive[name] for name in in_memory if name in present}
    if cache and "images" in present:
        arrays["images"] = data.unpack_once(path, "images", cache)
    for name in ("images", "labels") if need_labels else ("images",):
        if name not in arrays:
            raise ValueError(f"{path} has no array {name!r}, it holds {present}")

    images, labels, groups = (arrays.get(name) for name in ("images", "labels", "groups"))
    for name, array in arrays.items():
        if array.dtype.kind == "f" and np.isnan(array).any():
            raise ValueError(f"{path}: {name!r} holds {int(np.isnan(array).sum())} NaN: remove "
                             "those rows")
        if array.ndim == 0 or len(array) != len(images) or array.ndim > 1 and name != "images":
            raise ValueError(f"{path}: {name!r} has shape {array.shape}, 'images' has "
                             f"{images.shape}: one entry per image")
    image_shape = images.ndim == 3 or images.ndim == 4 and images.shape[3] == 3
    if images.dtype != np.uint8 or not image_shape or 0 in images.shape:
        raise ValueError(f"{path}: 'images' is {images.dtype} {images.shape}, expected uint8 (n, "
                         "h, w) or (n, h, w, 3)")
    if labels is not None:
        labels = check_eye_labels(labels, [f"{path}: row {row}" for row in range(len(labels))])
    if groups is not None:
        groups = groups.astype(str)
    return images, labels, groups


def list_eye_files(folder, *, need_labels=True):
    """Names (relative paths), labels and groups of a folder of images; see read_eyes."""
    annotation = folder / "annotation.csv"
    if annotation.is_file():
        label_of = read_pairs(annotation)
        names = list(label_of)
        places = [f"{annotation}, {name}" for name in names]
        labels = check_eye_labels(list(label_of.values()), places)
        problem = "is listed in annotation.csv but does not exist"
    else:
        files = [file for file in folder.rglob("*") if file.suffix.lower() in data.IMAGE_SUFFIXES]
        names = [file.relative_to(folder).as_posix() for file in sorted(files)]
        labels = labels_of_folders(folder, names) if need_labels else None
        problem = "is no file, but a folder or a broken link: remove it"
    if not names:
        raise ValueError(f"{folder} holds no images ({', '.join(data.IMAGE_SUFFIXES)}) and no "
                         "annotation.csv")
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} {problem}")
    return names, labels, read_groups(folder / "groups.csv", names)


def labels_of_folders(folder, names):
    """Labels int64 (n,) of images by the class folder at the top of their relative paths."""
    top = [Path(name).parts[0].lower() for name in names]
    unknown = sorted(set(top) - EYE_FOLDERS.keys())
    if unknown:
        raise ValueError(f"{folder}: {unknown[0]!r} is no class folder; expected sub-folders named "
                         "open and closed (or 1 and 0), or an annotation.csv with rows path,label")
    return np.array([EYE_FOLDERS[part] for part in top], dtype=np.int64)


def read_groups(path, names):
    """The group of each image, str (n,), from groups.csv; None if there is no such file."""
    if not path.is_file():
        return None
    group_of = read_pairs(path)
    missing = [name for name in names if name not in group_of]
    if missing:
        raise ValueError(f"{path} has no group for {len(missing)} of {len(names)} images, the "
                         f"first is {missing[0]}")
    return np.array([group_of[name] for name in names])


def read_pairs(path):
    """A CSV of two columns without a header as {first: second}.

    Errors: ValueError with the line for another number of columns or a first that comes twice
    """
    try:
        # utf-8-sig: spreadsheets write a byte order mark
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no CSV in UTF-8 ({error}): save it as such, and look for a "
                         "stray quotation mark") from error
    pairs = {}
    for i, row in enumerate(rows, start=1):
        if not row:
            continue
        if len(row) != 2:
            raise ValueError(f"{path}, line {i}: expected 2 columns, got {len(row)}: "
                             f"{','.join(row)[:80]}")
        first, second = row[0].strip(), row[1].strip()
        if first in pairs:
            raise ValueError(f"{path}, line {i}: {first} is listed twice")
        pairs[first] = second
    return pairs


def check_eye_labels(labels, places):
    """Labels (n,) as int64; ValueError with the place of the first that is not 0 or 1."""
    text = np.asarray(labels).astype(str)
    is_open = np.isin(text, ("1", "1.0", "True"))
    is_closed = np.isin(text, ("0", "0.0", "False"))
    wrong = np.flatnonzero(~(is_open | is_closed))
    if len(wrong):
        row = wrong[0]
        raise ValueError(f"{places[row]}: label {text[row]} is not 0 (closed) or 1 (open)")
    return is_open.astype(np.int64)


# --------------------------------------------------------------------------------------------------
# Drawn eyes


def synthetic_eyes(n=1000, *, size=(32, 64), seed=0, chunk=256):
    """Drawn eyes, 53 % open: for running and teaching, never for a result.

    A face has two eyes of the same skin, light and iris. An open eye is a pale almond between two
    lids with an iris in it, often nearly shut. A closed eye is a dark arc with lashes. Brightness,
    blur, noise, pose, brows and bars of hair vary in the same way in both classes, so no mean or
    histogram separates them.

    returns  as read_eyes: images uint8 (n, 3, h, w), labels (n,), groups (n,), names
    Check:   a constant scores F1 0.69 (always open: 2 * 0.53 / 1.53)
    """
    rng = np.random.default_rng(seed)
    faces = math.ceil(n / 2)
    face_of_eye = np.arange(n) // 2
    is_open = rng.permutation(np.arange(faces) < round(0.53 * faces))[face_of_eye]
    of_face = {"skin": (70, 210), "warmth": (0.05, 0.3), "iris": (10, 110), "light": (-60, 60),
               "gain": (0.5, 1.2), "half_width": (0.5, 0.85), "height": (0.12, 0.6),
               "gaze": (-0.25, 0.25), "brow": (-1.4, -0.7)}
    of_eye = {"dx": (-0.35, 0.35), "dy": (-0.4, 0.4), "tilt": (-0.6, 0.6), "sag": (0.0, 0.35),
              "bar": (-4, 1.5), "bar_slope": (-1, 1), "noise": (2, 14), "lash": (6, 14)}
    parameters = {}
    for name, (low, high) in of_face.items():
        parameters[name] = rng.uniform(low, high, faces)[face_of_eye]
    for name, (low, high) in of_eye.items():
        parameters[name] = rng.uniform(low, high, n)

    images = torch.empty((n, 3, *size), dtype=torch.uint8)
    for start in range(0, n, chunk):
        rows = slice(start, min(start + chunk, n))
        chunk_parameters = {name: values[rows, None, None] for name, values in parameters.items()}
        drawn = draw_eyes(is_open[rows, None, None], chunk_parameters, size, rng)
        images[rows] = torch.from_numpy(drawn)
    groups = np.array([f"face{i:05d}" for i in face_of_eye])
    names = [f"synthetic/{i:05d}_{'LR'[i % 2]}" for i in range(n)]
    return images, is_open.astype(np.int64), groups, names


def draw_eyes(is_open, p, size, rng):
    """Draw one chunk of synthetic_eyes as uint8 (n, 3, h, w).

    is_open  bool (n, 1, 1); p: {name of a parameter: (n, 1, 1)}
    """

    def soft(distance):
        """1 inside (distance > 0), 0 outside, blurred over about 3 pixels."""
        return 1 / (1 + np.exp(np.clip(-distance * size[0] / 3, -30, 30)))

    def stroke(distance, width):
        """A line where the distance is 0."""
        return soft(width - np.abs(distance))

    v, u = np.meshgrid(np.linspace(-1, 1, size[0]), np.linspace(-1, 1, size[1]), indexing="ij")
    x = (u - p["dx"]) + p["tilt"] * 0.5 * v
    y = (v - p["dy"]) - p["tilt"] * u
    arch = 1 - (x / p["half_width"]) ** 2
    between_corners = soft(arch * 0.5)
    upper = np.where(is_open, -p["height"], p["sag"]) * arch
    lower = np.where(is_open, 0.6 * p["height"], p["sag"]) * arch
    inside = soft(np.minimum(y - upper, lower - y)) * is_open

    lid = stroke(y - upper, 0.07) * between_corners
    lash_band = stroke(y - upper - np.where(is_open, -0.1, 0.1), 0.12)
    lashes = lash_band * (np.sin(x * p["lash"] * 3) > 0.3) * between_corners
    crease = stroke(y - upper + 0.3, 0.05) * between_corners
    brow = stroke(y - p["brow"] - 0.2 * x**2, 0.16)
    bar = stroke(u - p["bar"] - p["bar_slope"] * v, 0.08)

    grey = p["skin"] + p["light"] * u + 12 * np.sin(3 * v + p["tilt"] * 9)
    radius = np.hypot(x - p["gaze"], (y + 0.2 * p["height"]) * size[0] / size[1] * 1.6)
    eyeball = p["skin"] * 0.4 + 120
    eyeball = eyeball + (p["iris"] - eyeball) * soft(0.26 - radius)
    glint = soft(0.05 - np.hypot(x - p["gaze"] - 0.06, y + 0.1))
    eyeball = eyeball * (1 - soft(0.1 - radius)) + 90 * glint  # the pupil is black
    grey = grey + (eyeball - grey) * inside
    for ink, strength in ((lid, 0.75), (lashes, 0.4), (crease, 0.25), (brow, 0.6), (bar, 0.8)):
        grey = grey * (1 - strength * ink)

    warm = np.stack([1 + p["warmth"], np.ones_like(p["warmth"]), 1 - p["warmth"]], axis=1)
    colour = warm + (1 - warm) * inside[:, None]  # skin is warm, the eyeball grey
    rgb = 128 + (grey[:, None] * colour - 128) * p["gain"][:, None]
    rgb = rgb + rng.normal(size=rgb.shape) * p["noise"][:, None]
    return np.clip(rgb, 0, 255).astype(np.uint8)


# --------------------------------------------------------------------------------------------------
# Batches


class EyeSplit:
    """The eyes of one split: `labels` to plan batches by, `batch(rows)` to train on.

    images   uint8 (n, 3, h, w), the whole set (never copied)
    labels   (n,) or None; groups (n,) or None; names: list of n str or None
    rows     (m,), the rows of this split
    augment  {flag: value} of AUGMENTATIONS; absent is off
    """

    chunk = 512

    def __init__(self, images, labels, rows, *, groups=None, names=None, device="cpu",
                 augment=None):
        self.images = images
        self.rows = np.asarray(rows)
        self.names = names
        self.labels = None if labels is None else labels[self.rows]
        self.groups = None if groups is None else groups[self.rows]
        self.device = torch.device(device)
        self.augment = augment or {}

    def __len__(self):
        return len(self.rows)

    def batch(self, rows, generator=None):
        """Gather rows of this split; augment them if a generator is given.

        inputs float (b, 3, h, w) in [-1, 1]; targets float (b,), if there are labels
        """
        augment = self.augment if generator is not None else {}
        # index_select copies whole images; images[rows] copies byte by byte: 15 times slower on CPU
        images = self.images.index_select(0, torch.from_numpy(self.rows[rows]))
        images = images.to(self.device, non_blocking=True)
        if augment.get("crop"):
            images = data.random_crop(images, padding=augment["crop"], generator=generator)
        if augment.get("flip"):
            images = data.horizontal_flip(images, p=augment["flip"], generator=generator)
        degrees, zoom = augment.get("degrees", 0), augment.get("zoom", 1)
        if degrees or zoom > 1:
            images = data.random_affine(images, degrees=degrees, zoom=zoom, generator=generator)
        if augment.get("photometric"):
            images = data.photometric_distort(images, p=augment["photometric"],
                                              generator=generator)
        if augment.get("clahe"):
            chosen = torch.rand(len(images), generator=generator) < augment["clahe"]
            if chosen.any():
                images[chosen] = data.clahe(images[chosen])
        inputs = images.float().div_(255)
        if augment.get("bend"):
            inputs = data.random_gamma(inputs, strength=augment["bend"], generator=generator)
        if augment.get("noise"):
            inputs = data.random_noise(inputs, sd=augment["noise"], generator=generator)
        inputs = inputs.mul_(2).sub_(1)
        if self.labels is None:
            return {"inputs": inputs}

        targets = torch.from_numpy(self.labels[rows]).float().to(self.device)
        if augment.get("mixup"):
            inputs, targets = data.mixup(inputs, targets, alpha=augment["mixup"],
                                         generator=generator)
        if augment.get("cutmix"):
            inputs, targets = data.cutmix(inputs, targets, alpha=augment["cutmix"],
                                          generator=generator)
        return {"inputs": inputs, "targets": targets}


# --------------------------------------------------------------------------------------------------
# The recipe

AUGMENTATIONS = ("crop", "flip", "degrees", "zoom", "photometric", "clahe", "bend", "noise",
                 "mixup", "cutmix")


def load(path, args):
    """Read the eyes, split them by face or person, and measure the weight of the open ones."""
    check_crop(args)
    images, labels, groups, names = read(path, args)
    rows_of_parts = split_rows(len(labels), args, groups)
    parts = dict(zip(("training", "validation", "test"), rows_of_parts))
    for name, rows in parts.items():
        if len(rows) and len(np.unique(labels[rows])) < 2:
            raise ValueError(f"the {name} split of {len(rows)} rows holds one class only (label "
                             f"{labels[rows][0]}): F1, AUROC and pos_weight need open and closed "
                             "eyes; add the missing class, or change the ratios or --seed")

    facts = {"data": checksum(images, labels), "split": split_checksum(parts.values())}
    balanced = args.loss == "focal" or args.sampler == "stratified"
    training_weight = 1.0 if balanced else losses.auto_pos_weight(labels[parts["training"]])
    facts["pos_weight"] = args.pos_weight or training_weight
    facts["strong"] = fit_hog(images, labels, parts["training"])

    augment = {name: getattr(args, name) for name in AUGMENTATIONS}
    splits = []
    for rows in parts.values():
        split = EyeSplit(images, labels, rows, groups=groups, names=names, device=args.device,
                         augment=augment)
        splits.append(split if len(rows) else None)
    notes = [data_note(path, labels), split_note(groups, parts)]
    return Splits(*splits, facts, notes)


def fit_hog(images, labels, rows):
    """Logistic regression on hog_features of these rows.

    The penalty is the number of columns: before any data is seen a logit then has an sd of 1,
    so that P(open) is mostly between 0.1 and 0.9.
    """
    x = hog_of(images, rows)
    return losses.logistic_fit(x, labels[rows], penalty=float(x.shape[1]))


def hog_of(images, rows, chunk=512):
    """hog_features of some rows, float32 (m, 468)."""
    parts = [images.index_select(0, torch.from_numpy(rows[start : start + chunk]))
             for start in range(0, len(rows), chunk)]
    return torch.cat([data.hog_features(part) for part in parts])


def rows(path, args, facts, need_labels):
    """All eyes of a file, for --eval and --predict."""
    images, labels, groups, names = read(path, args, need_labels)
    split = EyeSplit(images, labels, np.arange(len(names)), groups=groups, names=names,
                     device=args.device)
    if not need_labels:
        return Rows(split, 0, [])
    return Rows(split, checksum(images, labels), [data_note(path, labels)])


def read(path, args, need_labels=True):
    """The eyes of --data, or drawn ones."""
    if path:
        return read_eyes(path, size=args.size, cache=args.cache, need_labels=need_labels)
    return synthetic_eyes(3000, size=args.size, seed=10)


def checksum(images, labels):
    """A number that tells this set from another, by its labels and about 1,000 images."""
    sample = images[:: max(1, len(images) // 1000)]
    return zlib.crc32(labels.tobytes() + sample.numpy().tobytes())


def data_note(path, labels):
    """The line that says what was read."""
    source = path or "SYNTHETIC eyes, drawn by the script: a score on them is no result"
    return f"data: {source}, {len(labels):,} images, {np.mean(labels):.1%} open"


def network(args, facts):
    """EyeNet with the settings of the flags."""
    model = models.EyeNet(
        args.size, block=args.block, channels=args.channels, blocks=args.blocks, head=args.head,
        token_grid=args.token_grid, token_layers=args.token_layers, dropout=args.dropout,
        stochastic_depth=args.stochastic_depth, inputs=args.inputs)
    if model.token_grid not in (None, args.token_grid):
        warnings.warn(f"--token-grid {show(args.token_grid)} becomes {show(model.token_grid)}, the "
                      "size of the feature map")
    return model


def criterion(logits, targets, args, facts):
    """The loss of --loss for logits (b,) and targets (b,) in [0, 1]; mixup makes soft ones."""
    if args.loss == "focal":
        return losses.focal_label_smooth_ce(logits, targets, gamma=args.gamma,
                                            smoothing=args.smoothing)
    pos_weight = torch.tensor(facts["pos_weight"], device=logits.device)
    return F.binary_cross_entropy_with_logits(logits.float(), targets, pos_weight=pos_weight)


def loss(model, batch, args, facts):
    """The loss of one batch; it has no parts to report."""
    return criterion(model(batch["inputs"]), batch["targets"], args, facts), {}


def outputs(model, batch, args, facts):
    """One logit per eye, float (b,): P(open) = sigmoid(logit)."""
    return {"logits": model(batch["inputs"]).float()}


def scores(outputs, split, args, facts):
    """Loss and binary metrics over the whole split."""
    logits = outputs["logits"]
    report = losses.binary_report(logits.numpy(), split.labels)
    value = criterion(logits, torch.from_numpy(split.labels).float(), args, facts)
    names = ("f1", "accuracy", "precision", "recall", "auroc", "auprc")
    return {"loss": float(value)} | {name: report[name] for name in names}


def headline(outputs, split, args, facts):
    """F1 of open eyes, 1 where none is there and none is called open; see Task."""
    called_open, is_open = outputs["logits"].numpy() >= 0, split.labels == 1
    found, wrong = called_open & is_open, called_open != is_open

    def f1(weights):
        twice, errors = 2 * (weights @ found), weights @ wrong
        return np.where(twice + errors > 0, twice / np.maximum(twice + errors, 1e-300), 1.0)
    return f1


def floors(split, args, facts):
    """The best constants on these rows, and logistic regression on gradient histograms.

    The constants: always open for F1, the majority for accuracy.
    """
    targets = torch.from_numpy(split.labels).float()
    constant = losses.binary_floor(split.labels)
    constant["loss"] = math.inf
    for logit in np.linspace(-6, 6, 241):
        value = criterion(torch.full_like(targets, logit), targets, args, facts)
        constant["loss"] = min(constant["loss"], float(value))
    rows = {"constant": constant}
    if "strong" in facts:
        logits = losses.linear_scores(facts["strong"], hog_of(split.images, split.rows))
        rows["strong: logistic on HOG"] = {"logits": torch.from_numpy(logits).float()}
    rows["ceiling"] = {name: 0.0 if name == "loss" else 1.0 for name in constant}
    return rows


def predictions(batches, split, out, args, facts):
    """Write a CSV with a row per image; return the number of rows."""
    refuse_folder(out)
    logits = joined(batches)["logits"]
    table = []
    for name, logit, prob in zip(split.names, logits.tolist(), torch.sigmoid(logits).tolist()):
        table.append([name, f"{logit:.6f}", f"{prob:.6f}"])
    data.write_csv(out, ["path", "logit", "prob_open"], table)
    return len(split)


def examples(outputs, split, args, facts):
    """The worst eye has the probability that is furthest from its label."""
    probability = torch.sigmoid(outputs["logits"]).numpy()
    return np.abs(probability - split.labels), {"true": split.labels, "predicted": probability}


def export(model, args, facts):
    """The network from uint8 crops to P(open)."""

    def forward(inputs):
        return torch.sigmoid(model(unit_images(inputs["images"])))

    crops = "crops of eyes, RGB or grey repeated three times, resized to this size"
    return Exported(
        forward,
        inputs={"images": ("uint8", ("rows", *args.size, 3), crops)},
        output=("prob_open", ("rows",), "probability that the eye is open"),
        facts={"pos_weight": facts["pos_weight"]})


FLAGS = shared_flags(epochs=12, batch_size=128, lr=2e-3, weight_decay=0.05, cyclic_steps_up=2000)
FLAGS.update(
    sampler=Flag("shuffled", "shuffled: each row once an epoch; stratified: as many rows of each "
                 "class in every batch", choices=("shuffled", "stratified")),
    channels_last=Flag(True, "memory format of images; faster for wide networks, slower for tiny "
                       "ones"),
    monitor=Flag("last", "last: best.pt is the average after the last epoch; or the validation "
                 "score that picks the epoch, and raw or EMA weights",
                 choices=("f1", "auroc", "loss", "last")),
    # the network
    size=Flag((24, 24), "height x width the eyes are resized to", low=8),
    inputs=Flag("gradients", "what the network makes of an image first: images, nothing; "
                "standardised, mean 0 and sd 1; gradients, eight directions of them over the "
                "energy around", choices=("images", "standardised", "gradients")),
    block=Flag("plain", "kind of block",
               choices=("plain", "baseline", "inverted_se", "convnext")),
    channels=Flag(16, "channels of the first block; blocks 2, 4, 6 double them", low=1),
    blocks=Flag(6, "number of blocks", low=1),
    head=Flag("auto", "auto: grid for plain, avg for baseline, avgmax_mlp for inverted_se, "
              "transformer for convnext",
              choices=("auto", "grid", "avg", "avgmax_mlp", "transformer", "mlp_mixer")),
    token_grid=Flag((2, 3), "rows x columns of tokens of the transformer and mlp_mixer heads",
                    low=1, when={"head": ("auto", "transformer", "mlp_mixer")}),
    token_layers=Flag(2, "layers of those heads",
                      low=1, when={"head": ("auto", "transformer", "mlp_mixer")}),
    dropout=Flag(0.3, "in the head", low=0, high=0.95),
    stochastic_depth=Flag(0.0, "probability to skip the last block, linear from 0 at the first",
                          low=0, high=0.95,
                          when={"block": ("baseline", "inverted_se", "convnext")}),
    # the loss
    loss=Flag("bce", "bce with pos_weight, or focal loss with label smoothing",
              choices=("bce", "focal")),
    pos_weight=Flag(0.0, "weight of open eyes (0 = closed / open of the training rows; 1 with the "
                    "stratified sampler, which balances already)", low=0, when={"loss": ("bce",)}),
    smoothing=Flag(0.05, "label smoothing of the focal loss",
                   low=0, high=0.99, when={"loss": ("focal",)}),
    gamma=Flag(2.0, "exponent of the focal loss", low=0, when={"loss": ("focal",)}),
    # the augmentation
    flip=Flag(0.5, "probability of a horizontal flip", low=0, high=1),
    crop=Flag(3, "random crop after padding by this many pixels (0 = off)", low=0),
    degrees=Flag(11.0, "rotate by up to so much (0 = off)", low=0, high=180),
    zoom=Flag(1.2, "enlarge by a factor between 1 / zoom and zoom (1 = off)", low=1, high=10),
    photometric=Flag(0.0, "probability of each of the five photometric operations", low=0, high=1),
    clahe=Flag(0.0, "probability of CLAHE", low=0, high=1),
    bend=Flag(0.5, "raise an image to a power between exp(-bend) and exp(bend) (0 = off)",
              low=0, high=3),
    noise=Flag(0.05, "standard deviation of the noise on half of the images, at most; of [0, 1] "
               "(0 = off)", low=0, high=1),
    mixup=Flag(0.0, "alpha of mixup (0 = off)", low=0),
    cutmix=Flag(0.0, "alpha of cutmix (0 = off)", low=0),
)

# The recipe as its team ran it; the defaults above are what scored best within minutes on 2 cores.
CURRENT = dict(
    size=(32, 64), inputs="images", block="baseline", channels=64, blocks=8, dropout=0.3,
    epochs=1000, batch_size=4096, clip=0.0, patience=0, monitor="f1",
    lr=1e-4, warmup_epochs=0.0, min_lr=0.0, weight_decay=1e-4, ema_decay=0.999,
    schedule="plateau", plateau_factor=0.5, plateau_patience=2,
    loss="bce",
    flip=0.5, photometric=0.5, clahe=0.01, crop=0, degrees=0.0, zoom=1.0, bend=0.0, noise=0.0,
    mixup=0.0,
    seed=42, train_ratio=0.8, val_ratio=0.2, test_ratio=0.0,
)
CONSERVATIVE = CURRENT | dict(lr=2e-4, weight_decay=5e-4, plateau_factor=0.7, plateau_patience=5,
                              dropout=0.25)
BALANCED = CONSERVATIVE | dict(loss="focal", smoothing=0.05, gamma=2.0)
AGGRESSIVE = BALANCED | dict(lr=3e-4, weight_decay=1e-3, warmup_epochs=5.0, plateau_patience=10,
                             batch_size=2048, dropout=0.2)

TASK = Task(
    flags=FLAGS,
    variants={"current": CURRENT, "conservative": CONSERVATIVE, "balanced": BALANCED,
              "aggressive": AGGRESSIVE},
    load=load, rows=rows, network=network, loss=loss, outputs=outputs, scores=scores, floors=floors,
    headline=headline, predictions=predictions, examples=examples, export=export)
