"""quadmodal: one embedding of several modalities, by supervised contrastive learning.

    python train.py --task quadmodal --lr 1e-3                       # drawn modalities
    python train.py --task quadmodal --lr 1e-3 --data motion.npz     # an array per modality, labels

Files, drawn modalities, batches; then the recipe: load, network, loss, scores, floors, predictions.
"""

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
    Exported, Flag, Rows, Splits, Task, finite, joined, open_npz, plan_batches, refuse_folder,
    shared_flags, show, split_checksum, split_note, split_rows)


def read_modalities(path, *, cache="", need_labels=True):
    """Read samples of several sensors: an .npz with one array per modality, of any names.

        NAME          (n, F) features, (n, T, C) sequences, (n, C, H, W) images or (n, T, C, H, W)
                      videos; integers or floats
        present_NAME  optional, bool (n,): False where a sample lacks it; the values of NAME in
                      those rows are never read
        labels        (n,) integers from 0, or strings, which are numbered in the order of
                      label_names or else sorted
        label_names   optional, one string per class
        groups        optional, (n,): the person or recording of a sample

    cache        a folder: modalities are unpacked once into .npy files there, and memory-mapped
    need_labels  False: labels and label_names are not read, for prediction
    returns      arrays {NAME: (n, ...)} in the types of the file, labels int64 (n,) or None, groups
                 (n,) or None, label_names: list of str, present {NAME: bool (n,)}
    Errors:      ValueError with array and row: a missing or unreadable file, objects, no modality,
                 another rank or length, NaN or infinity in a present row, a row without any
                 modality, labels that are missing, negative, not whole or without a name, a class
                 of one sample. Warns of images that seem to have their channels last.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is no file: give an .npz with one array per modality, labels, "
                         "and optionally label_names, groups")
    small = ("labels", "label_names", "groups")
    unread = () if need_labels else ("labels", "label_names")
    content = {}
    with open_npz(path, "NAME=..., labels=...") as archive:
        for name in archive.files:
            if name not in unread:
                in_memory = not cache or name in small or name.startswith("present_")
                content[name] = archive[name] if in_memory else None
    for name, array in content.items():
        # outside the block above: an error of the cache folder is not one of the file
        array = data.unpack_once(path, name, cache) if array is None else array
        content[name] = np.asarray(array)
    labels, names, groups = (content.pop(name, None) for name in small)
    masks = {name: content.pop(name) for name in list(content) if name.startswith("present_")}
    if not content:
        raise ValueError(f"{path} holds no modality beside labels, label_names, groups and "
                         "present_NAME: save one array for each")
    present = check_modalities(content, masks, path)
    rows = len(next(iter(content.values())))
    for name, array in {"labels": labels, "groups": groups}.items():
        if array is not None and array.shape != (rows,):
            raise ValueError(f"{path}: {name!r} has shape {array.shape}, the modalities have "
                             f"{rows} rows: one entry per row")
    if groups is not None and groups.dtype.kind == "f" and np.isnan(groups).any():
        raise ValueError(f"{path}: 'groups' is NaN in row {np.isnan(groups).argmax()}: each row "
                         "needs a group, or leave groups out")
    if not need_labels:
        return content, None, groups, [], present
    if labels is None:
        raise ValueError(f"{path} has no array 'labels', it holds {[*content, *masks]}")
    labels, names = check_class_labels(labels, names, path)
    return content, labels, groups, names, present


def check_modalities(arrays, masks, where):
    """Check modalities and their masks {present_NAME: bool (n,)}; see read_modalities.

    returns  {NAME: bool (n,)}, all True without a mask
    """
    for name, array in arrays.items():
        if array.dtype.kind not in "fiub" or array.dtype.itemsize > 8:
            raise ValueError(f"{where}: modality {name!r} is {array.dtype}, numbers of at most 64 "
                             "bits are needed: convert it or leave it out")
        if not 2 <= array.ndim <= 5 or 0 in array.shape:
            raise ValueError(f"{where}: modality {name!r} has shape {array.shape}, expected (n, "
                             "F), (n, T, C), (n, C, H, W) or (n, T, C, H, W), none of them 0; one "
                             "number per row is array[:, None]")
        if array.ndim > 3 and array.shape[-1] in (1, 3, 4) and array.shape[-3] > 4:
            warnings.warn(f"{where}: modality {name!r} of shape {array.shape} is read as "
                          f"{array.shape[-3]} channels of {array.shape[-2]}x{array.shape[-1]}: if "
                          "its channels come last, move them before height and width")
    first = next(iter(arrays))
    rows = len(arrays[first])
    for name, array in (arrays | masks).items():
        if array.shape[:1] != (rows,):
            raise ValueError(f"{where}: {name!r} has shape {array.shape}, {first!r} has {rows} "
                             "rows: one entry per row in each")
    for name, mask in masks.items():
        if name.removeprefix("present_") not in arrays:
            raise ValueError(f"{where}: {name!r} belongs to no modality, there are {list(arrays)}")
        if mask.dtype != bool or mask.ndim != 1:
            raise ValueError(f"{where}: {name!r} is {mask.dtype} {mask.shape}, expected bool "
                             f"({rows},): True where the row has it")
    present = {name: masks.get(f"present_{name}", np.ones(rows, dtype=bool)) for name in arrays}
    absent = ~np.any(list(present.values()), axis=0)
    if absent.any():
        raise ValueError(f"{where}: {absent.sum()} rows have no modality at all, the first is "
                         f"{absent.argmax()}: remove them")
    for name, array in arrays.items():
        wrong = count_non_finite(array) * present[name]
        if wrong.any():
            raise ValueError(f"{where}: modality {name!r} holds {wrong.sum()} NaN or infinite "
                             f"values, the first in row {(wrong > 0).argmax()}: remove those "
                             f"rows, or mark them False in 'present_{name}'")
    return present


def count_non_finite(array, *, chunk=256):
    """NaN and infinite values in every row, int (n,); memory-mapped arrays are read in chunks."""
    counts = np.zeros(len(array), int)
    if array.dtype.kind == "f":
        for start in range(0, len(array), chunk):
            rows = slice(start, start + chunk)
            counts[rows] = (~np.isfinite(array[rows])).sum(tuple(range(1, array.ndim)))
    return counts


def check_class_labels(labels, names, where):
    """Labels (n,), integers or strings, as int64, and the list of class names.

    names   (k,) or None: the sorted strings, or the numbers from 0 as strings
    Errors: see read_modalities
    """
    text = labels.dtype.kind in "US"
    if not text and labels.dtype.kind not in "iub":
        raise ValueError(f"{where}: labels are {labels.dtype}, integers from 0 or strings are "
                         "needed: convert them, if they are whole")
    if text:
        labels = np.char.strip(labels.astype(str))
        empty = np.isin(labels, ("", "nan"))
        if empty.any():
            raise ValueError(f"{where}: row {empty.argmax()} has no label: remove such rows, or "
                             "name their class")
    elif labels.min() < 0:
        row, count = (labels < 0).argmax(), (labels < 0).sum()
        raise ValueError(f"{where}: row {row} has the label {labels[row]}: classes are numbered "
                         f"from 0; remove the {count} rows without a class")
    elif names is None and labels.max() >= len(labels):
        raise ValueError(f"{where}: label {labels.max()} in {len(labels)} rows: number the classes "
                         "from 0 without gaps, or save strings")

    if names is None:
        names = np.unique(labels) if text else np.arange(int(labels.max()) + 1)
    names = np.char.strip(names.astype(str)).reshape(-1).tolist()
    if len(set(names)) < len(names):
        raise ValueError(f"{where}: label_names {names} must differ from each other")
    if text:
        number = {name: i for i, name in enumerate(names)}
        numbers = np.array([number.get(label, -1) for label in labels.tolist()])
    else:
        numbers = labels.astype(np.int64)
    unknown = (numbers < 0) | (numbers >= len(names))
    if unknown.any():
        row = unknown.argmax()
        raise ValueError(f"{where}: row {row} has the label {labels[row]}, which is none of the "
                         f"{len(names)} label_names {names}: name the class, or remove its "
                         f"{unknown.sum()} rows")
    alone = np.flatnonzero(np.bincount(numbers) == 1)
    if len(alone):
        raise ValueError(f"{where}: class {names[alone[0]]!r} has 1 sample, as have {len(alone)} "
                         f"of {len(names)} classes: none to compare it with, drop it or merge it "
                         "with another class")
    return numbers, names


def broadcast_channels(values, x):
    """Values of channels (C,), shaped to apply to x: (b, C), (b, T, C), or (..., C, h, w)."""
    return values.reshape(-1, 1, 1) if x.ndim > 3 else values


class ModalSplit:
    """The samples of one split: `labels`, and `batch(rows)` to train on.

    arrays    {name: (n, ...)}, the whole set in any numeric type (never copied)
    labels    (n,) or None; groups (n,) or None
    rows      (m,), the rows of this split
    present   {name: bool (n,)}: inputs of rows that lack it are 0; True for absent names
    scaler    {name: (mean, sd)} of channel_statistics over the training rows; None: no scaling
    features  {name: tensor (m, T, width)} of frozen encoders: batches hold its rows as `encoded`
              instead of these inputs
    In batches with a generator, in units of the scaled values, 0 is off:
    noise     sd of Gaussian noise, added to every value
    scale     a modality of a row is multiplied by one factor from U(1 - scale, 1 + scale)
    shift     sequences (n, T, C) are rolled by up to so many steps; all those of a row by the same
              number, so that streams of one rate stay synchronous
    Errors:   ValueError for noise or shift below 0, scale outside [0, 1)
    """

    chunk = 512

    def __init__(self, arrays, labels, rows, *, present=None, groups=None, scaler=None, noise=0.0,
                 scale=0.0, shift=0, device="cpu"):
        if not (0 <= noise < float("inf") and 0 <= scale < 1 and 0 <= shift == int(shift)):
            raise ValueError(f"noise {noise} must be at least 0, scale {scale} in [0, 1), shift "
                             f"{shift} a whole number from 0; 0 is off")
        self.arrays, self.present = arrays, present or {}
        self.rows, self.scaler = np.asarray(rows), scaler
        self.labels = None if labels is None else np.asarray(labels)[self.rows]
        self.groups = None if groups is None else np.asarray(groups)[self.rows]
        self.noise, self.scale, self.shift = noise, scale, int(shift)
        self.device, self.features = torch.device(device), {}

    def __len__(self):
        return len(self.rows)

    def batch(self, rows, generator=None):
        """Gather rows of this split; augment the inputs if a generator is given.

        inputs {name: float32 (b, ...)}, encoded {name: (b, T, width)} of those in features,
        present {name: bool (b,)}, and with labels targets int64 (b,)
        """
        rows = np.asarray(rows)
        index = self.rows[rows]
        inputs, encoded, present = {}, {}, {}
        for name in self.arrays:
            here = self.present[name][index] if name in self.present else np.ones(len(index), bool)
            present[name] = torch.from_numpy(here).to(self.device)
            if name not in self.features:
                inputs[name] = self.scaled(name, index)
        for name, tokens in self.features.items():
            encoded[name] = tokens[torch.from_numpy(rows)]
        if generator is not None:
            inputs = self.augmented(inputs, generator)
        for name, x in inputs.items():
            x[~present[name]] = 0  # not times 0: an absent row may hold NaN
        batch = {"inputs": inputs, "encoded": encoded, "present": present}
        if self.labels is not None:
            batch["targets"] = torch.from_numpy(self.labels[rows]).long().to(self.device)
        return batch

    def scaled(self, name, index):
        """Rows of the whole set as float32 (b, ...), channels by their mean and sd."""
        array = self.arrays[name]
        # float64 stays: a clock of 1.7e9 s loses its mean before float32 cuts its digits
        values = array[index].astype(np.result_type(array.dtype, np.float32))
        x = torch.from_numpy(values).to(self.device)
        if self.scaler is not None:
            mean, sd = (broadcast_channels(values.to(x), x) for values in self.scaler[name])
            x = (x - mean) / sd
        return x.float()

    def augmented(self, inputs, generator):
        """Scaled inputs after shift, scale and noise, in that order; nothing in place."""
        b = max(map(len, inputs.values()), default=0)
        steps = torch.randint(-self.shift, self.shift + 1, (b, 1), generator=generator)
        steps = steps.to(self.device)
        changed = {}
        for name, x in inputs.items():
            if self.shift and x.ndim == 3:
                source = (torch.arange(x.shape[1], device=self.device) - steps) % x.shape[1]
                x = x.gather(1, source[:, :, None].expand_as(x))
            if self.scale:
                factor = 1 + self.scale * (2 * torch.rand(b, generator=generator) - 1)
                x = x * factor.to(self.device).reshape(-1, *(1,) * (x.ndim - 1))
            if self.noise:
                x = x + self.noise * torch.randn(x.shape, generator=generator).to(self.device)
            changed[name] = x
        return changed


def synthetic_modalities(n=1200, *, classes=6, missing=0.0, seed=0):
    """Drawn samples of four modalities: for running and teaching, never for a result.

        video   uint8 (n, 4, 3, 16, 16)  one of three colours blinks       sign c % 3
        image   uint8 (n, 3, 24, 24)     one of three colours is stronger  c // 3
        audio   float32 (n, 24, 16)      a burst in one of three bands     (c + c // 3) % 3
        sensor  float32 (n, 64, 6)       1 of 3 channel pairs vibrates     (c + 2 (c // 3)) % 3

    Class c decides only the sign: which of the three it is. Video and image show a blob, audio is a
    log spectrogram. One modality separates groups of classes only; any two separate all classes
    (nine points of the plane over the integers modulo 3: two lines meet in one). A share of the
    signs is too weak to be seen. Recordings of about 25 rows (`groups`) have their own brightness,
    gain and offset. The first class is twice as frequent as the last.

    classes  2 to 9; missing: the share of rows that lack one modality, whose values there are NaN
             or 0
    returns  as read_modalities: arrays, labels, groups, label_names, present
    Errors:  ValueError for other classes, fewer than 4 rows per class, missing outside [0, 1]
    Check:   on held-out recordings, ridge regression on mean and sd of all channels has an accuracy
             of 0.3 to 0.5 alone and 0.9 on all four, the most frequent class 0.2
    """
    if not 2 <= classes <= 9 or n < 4 * classes or not 0 <= missing <= 1:
        raise ValueError(f"classes {classes} must be 2 to 9, n {n} at least 4 per class, missing "
                         f"{missing} in [0, 1]")
    rng = np.random.default_rng(seed)
    shares = np.cumsum(np.linspace(2, 1, classes))
    labels = rng.permutation(np.searchsorted(shares / shares[-1], (np.arange(n) + 0.5) / n))
    recording = np.arange(n) * max(2, n // 25) // n
    line = labels // 3
    signs = {"video": labels % 3, "image": line, "audio": (labels + line) % 3,
             "sensor": (labels + 2 * line) % 3}
    arrays = draw_modalities(signs, recording, rng)
    lacks = np.where(rng.random(n) < missing, rng.integers(4, size=n), -1)
    present = {name: lacks != i for i, name in enumerate(arrays)}
    for name, array in arrays.items():
        array[~present[name]] = 0 if array.dtype == np.uint8 else np.nan
    groups = np.array([f"recording{i:03d}" for i in recording])
    return arrays, labels, groups, [f"class {c}" for c in range(classes)], present


def draw_modalities(signs, recording, rng):
    """The arrays of synthetic_modalities from the signs {name: (n,)} and recordings (n,)."""
    n = len(recording)

    def of_recording(low, high):
        """(n,), one number per recording."""
        return rng.uniform(low, high, recording.max() + 1)[recording]

    def blob(side, frames):
        """A soft spot (n, frames, side, side) that drifts over the frames."""
        start, step = rng.uniform(0.25, 0.75, (2, n, 1)), rng.uniform(-0.1, 0.1, (2, n, 1))
        y, x = (start + step * np.arange(frames))[..., None, None]
        row, column = np.arange(side)[:, None] / (side - 1), np.arange(side) / (side - 1)
        return np.exp(-((row - y) ** 2 + (column - x) ** 2) / 0.03)

    def camera(light, colour):
        """uint8 images of light (n, frames, h, w) in colour (n, frames, 3) on a grey ground."""
        grey = of_recording(40, 110)[:, None, None, None, None]
        gain = of_recording(0.6, 1.2)[:, None, None, None, None]
        picture = gain * (grey + 90 * light[:, :, None] * colour[..., None, None])
        return np.clip(picture + rng.normal(0, 12, picture.shape), 0, 255).astype(np.uint8)

    strength = {}  # {name: (n, 3)}: how strong a colour, band or pair is; 0 for all but the sign
    for name, sign in signs.items():
        strength[name] = np.eye(3)[sign] * rng.uniform(0, 1, n)[:, None]

    cast = rng.uniform(0.6, 1.2, (2, n, 1, 3))
    blink = np.array([1, -1, 1, -1])[:, None]
    video = camera(blob(16, 4), cast[0] * (1 + 0.9 * strength["video"][:, None] * blink))
    image = camera(blob(24, 1), cast[1] + strength["image"][:, None])[:, 0]

    time, band = np.arange(24)[:, None], np.arange(16)
    burst = np.exp(-((time - rng.uniform(4, 20, (n, 1, 1))) ** 2) / 18)
    centre = np.array([3, 8, 13])[:, None] + rng.uniform(-1, 1, (n, 1, 1))
    in_band = np.exp(-((band - centre) ** 2) / 4)  # (n, 3, 16)
    audio = of_recording(-1, 1)[:, None, None] + of_recording(-0.1, 0.1)[:, None, None] * band
    audio = audio + rng.normal(0, 1, (n, 24, 16))
    audio += 3 * burst * (strength["audio"][:, :, None] * in_band).sum(1)[:, None]

    turns = np.arange(64)[:, None] * rng.uniform(0.05, 0.2, (n, 1, 1)) + rng.uniform(size=(n, 1, 6))
    loud = rng.uniform(0.2, 0.8, (n, 6)) + np.repeat(strength["sensor"], 2, axis=1)
    gain = of_recording(0.5, 2)[:, None, None]
    sensor = gain * (np.sin(2 * np.pi * turns) * loud[:, None] + rng.normal(0, 0.3, (n, 64, 6)))
    sensor += np.stack([of_recording(-1, 1) for _ in range(6)], 1)[:, None]
    return {"video": video, "image": image, "audio": audio.astype(np.float32),
            "sensor": sensor.astype(np.float32)}


# --------------------------------------------------------------------------------------------------
# The recipe


def load(path, args):
    """Read the modalities, split them by group, measure their channels, and check every batch."""
    arrays, labels, groups, names, present = read(path, args)
    parts = dict(zip(("train", "validation", "test"), split_rows(len(labels), args, groups)))
    shapes = {name: list(array.shape[1:]) for name, array in arrays.items()}
    notes = [data_note(path, labels, shapes), split_note(groups, parts)]
    train = parts["train"]
    scaler, plain_scaler = {}, {}
    for name, array in arrays.items():
        mean, sd = data.channel_statistics(array, train, present[name])
        scaler[name] = mean, sd
        plain_scaler[name] = [mean.tolist(), sd.tolist()]
    complete = [name for name in arrays if present[name][train].all()]
    facts = {"data": checksum(arrays, labels), "split": split_checksum(parts.values()),
             "names": list(names), "shapes": shapes, "complete": complete, "scaler": plain_scaler}
    options = dict(noise=args.noise, scale=args.scale, shift=args.shift, device=args.device)
    splits = {}
    for part, rows in parts.items():
        if len(rows):
            splits[part] = ModalSplit(arrays, labels, rows, present=present, groups=groups,
                                      scaler=scaler, **options)
            counts = np.bincount(labels[rows], minlength=len(names))
            classes = [f"{count:,} {name}" for count, name in zip(counts, names)]
            notes.append(f"{part}: {', '.join(classes)}")
    check_training_rows(splits["train"], args)
    for part, split in splits.items():
        split.reference = splits["train"]  # k-NN looks for neighbours there
        if not scored_batches(split.labels, args):
            raise ValueError(f"no class has two of the {len(split)} {part} rows: SupCon has "
                             "nothing to compare there; change --seed or the ratios")
    return Splits(splits["train"], splits.get("validation"), splits.get("test"), facts, notes)


def read(path, args):
    """What read_modalities returns, with the arrays of --modalities only."""
    if path:
        arrays, labels, groups, names, present = read_modalities(path, cache=args.cache)
    else:
        arrays, labels, groups, names, present = synthetic_modalities()
    chosen = [name for name in args.modalities.split(",") if name] or list(arrays)
    unknown = [name for name in chosen if name not in arrays]
    if unknown:
        raise ValueError(f"--modalities {args.modalities}: there is no {', '.join(unknown)}; the "
                         f"file holds {', '.join(arrays)}")
    return {name: arrays[name] for name in chosen}, labels, groups, names, present


def checksum(arrays, labels):
    """A number that tells this set from another, by its labels and about 100 rows."""
    parts = [labels.tobytes()]
    for array in arrays.values():
        parts.append(array[:: max(1, len(array) // 100)].tobytes())
    return zlib.crc32(b"".join(parts))


def data_note(path, labels, shapes):
    """The line that says what was read."""
    source = path or "SYNTHETIC modalities, drawn by the script: a score on them is no result"
    arrays = [f"{name} {show(tuple(shape))}" for name, shape in shapes.items()]
    return f"data: {source}, {len(labels):,} rows of {', '.join(arrays)}"


def check_training_rows(train, args):
    """Refuse training rows and batches from which SupCon cannot learn."""
    classes = np.unique(train.labels)
    if args.neighbours > len(train):
        raise ValueError(f"--neighbours {args.neighbours} must be at most {len(train)}, the number "
                         "of training rows")
    if len(classes) < 2 and not args.allow_single_class:
        bound = math.log(max(args.batch_size - 1, 1))
        raise ValueError(f"all {len(train):,} training rows are of class {classes[0]}: the loss "
                         f"then cannot fall below ln(B - 1), {bound:.5f} for batches of "
                         f"{args.batch_size}, whatever the network learns; add the other classes, "
                         "split by other groups (--seed, the ratios), or watch it with "
                         "--allow-single-class")
    for epoch in range(1, args.epochs + 1):
        for rows in plan_batches(train, epoch, args):
            counts = np.bincount(train.labels[rows])
            present = np.count_nonzero(counts)
            if counts.max() < 2 or len(classes) > 1 and present < 2:
                raise ValueError(f"a batch of {len(rows)} rows holds {present} classes, at most "
                                 f"{counts.max()} rows of one: SupCon needs two classes and two "
                                 "rows of one; --sampler stratified with --batch-size "
                                 f"{2 * len(classes)} or more has them")


def rows(path, args, facts, need_labels):
    """All rows of a file without labels, for --predict."""
    if need_labels:
        raise ValueError("--split all: k-NN compares with the run's own training rows: give "
                         "--split train, validation or test, and no other --data")
    arrays, _, _, _, present = read_modalities(path, cache=args.cache, need_labels=False)
    missing = [name for name in facts["shapes"] if name not in arrays]
    if missing:
        raise ValueError(f"{path} holds no {', '.join(missing)}, which the network was trained on: "
                         f"for rows that lack a modality give any values and present_{missing[0]} "
                         "of False")
    arrays = {name: arrays[name] for name in facts["shapes"]}
    count = len(next(iter(arrays.values())))
    split = ModalSplit(arrays, None, np.arange(count), present=present, scaler=scaler_of(facts),
                       device=args.device)
    return Rows(split, 0, [])


def scaler_of(facts):
    """{modality: (mean, sd)} of the channels, float64, measured on training rows."""
    scaler = {}
    for name, (mean, sd) in facts["scaler"].items():
        scaler[name] = [torch.tensor(values, dtype=torch.float64) for values in (mean, sd)]
    return scaler


def network(args, facts):
    """QuadModal with the settings of the flags, and --freeze applied."""
    shapes = {name: tuple(shape) for name, shape in facts["shapes"].items()}
    model = models.QuadModal(
        shapes, width=args.width, tokens=args.tokens, heads=args.heads, depth=args.depth,
        hidden=args.hidden, embed=args.embed, patch=args.patch, dropout=args.dropout,
        modality_dropout=args.modality_dropout)
    models.freeze_encoders(model, [name for name in args.freeze.split(",") if name])
    if not args.modality_dropout:
        for name in facts["complete"]:  # every training row has it, so its stand-in is never used
            model.readouts[name].missing.requires_grad_(False)
    return model


def loss(model, batch, args, facts):
    """SupCon over the rows of all processes.

    Its parts: the bounds of the loss for these labels, the mean cosine of the embeddings, and the
    number of classes in the batch.
    """
    labels = batch["targets"]
    if args.mixup:
        value, z = mixup_loss(model, batch, args)
    else:
        z = finite(model(batch["inputs"], batch["present"], encoded=batch["encoded"]))
        value = losses.supcon_loss(z, labels, temperature=args.temperature)
    z, labels, _ = losses.all_rows(z.detach(), labels)
    lower, collapsed = losses.supcon_bounds(labels, temperature=args.temperature)
    return value, {"bound": lower, "collapsed": collapsed, "cosine": float(losses.mean_cosine(z)),
                   "classes": len(labels.unique())}


def mixup_loss(model, batch, args):
    """Mix the features of every row with another row's; weight the losses for both classes.

        x = lam x_i + (1 - lam) x_j;  loss = lam SupCon(x, y_i) + (1 - lam) SupCon(x, y_j)
    """
    present, labels = batch["present"], batch["targets"]
    draw = torch.distributions.Beta(args.mixup, args.mixup).sample()
    shares, _, _ = losses.all_rows(draw.view(1, 1).to(labels.device), labels[:1])
    lam = float(shares[0, 0])  # all processes share one batch, so they take the lam of the first
    other = torch.randperm(len(labels), device=labels.device)
    tokens = {}
    for name, x in batch["inputs"].items():
        tokens[name] = model.encode_present(name, x, present[name])
    tokens |= batch["encoded"]
    mixed = {name: lam * x + (1 - lam) * x[other] for name, x in tokens.items()}
    both_present = {name: here & here[other] for name, here in present.items()}
    z = finite(model.fuse(mixed, both_present))
    as_first = losses.supcon_loss(z, labels, temperature=args.temperature)
    as_other = losses.supcon_loss(z, labels[other], temperature=args.temperature)
    return lam * as_first + (1 - lam) * as_other, z


def outputs(model, batch, args, facts):
    """The embedding of every row, float (b, embed)."""
    return {"embedding": model(batch["inputs"], batch["present"], encoded=batch["encoded"]).float()}


def scored_batches(labels, args):
    """The stratified batches that the loss is scored in: the same after every epoch."""
    batches = data.stratified_batches(labels, args.batch_size, seed=0, epoch=0)
    return [rows for rows in batches if np.bincount(labels[rows]).max() > 1]


def label_scores(predicted, split, facts):
    """Accuracy, macro F1 and a table by class, for predictions of the network or of a baseline."""
    report = losses.class_report(predicted, split.labels, len(facts["names"]))
    classes = {}
    for name, row in zip(facts["names"], report["classes"]):
        classes[name] = {key: row[key] for key in ("rows", "recall", "f1")}
    return {"accuracy": report["accuracy"], "macro_f1": report["macro_f1"], "classes": classes}


def scores(outputs, split, args, facts):
    """k-NN and a linear probe on embedded training rows; SupCon in stratified batches."""
    z, reference = outputs["embedding"], outputs["reference"]["embedding"]
    known = split.reference.labels
    nearest = losses.knn_predict(reference, known, z, k=args.neighbours)
    probe = losses.ridge_predict(reference, known, z)
    values = []
    for rows in scored_batches(split.labels, args):
        labels = torch.from_numpy(split.labels[rows])
        value = losses.supcon_loss(z[rows], labels, temperature=args.temperature, gather=False)
        values.append(float(value))
    return {"loss": float(np.mean(values)), **label_scores(nearest, split, facts),
            "probe": float(np.mean(probe == split.labels)), "cosine": float(losses.mean_cosine(z))}


def channel_features(split):
    """{modality: (n, 2 C)} mean and sd of every channel and row; 0 where the row lacks it."""
    parts = {name: [] for name in split.arrays}
    for start in range(0, len(split), split.chunk):
        rows = split.rows[start : start + split.chunk]
        for name in split.arrays:
            x = split.scaled(name, rows)
            x[torch.from_numpy(~split.present[name][rows])] = 0
            if x.ndim == 2:  # a feature is a channel
                x = x[:, None]
            elif x.ndim > 3:
                x = x.movedim(-3, -1).flatten(1, -2)
            statistics = torch.cat([x.mean(1), x.std(1, correction=0)], 1)
            parts[name].append(statistics.cpu())
    return {name: torch.cat(chunks).double().numpy() for name, chunks in parts.items()}


def floors(split, args, facts):
    """The majority class, ridge regressions on channel_features, and the bounds of the loss."""
    train = split.reference
    bounds = []
    for rows in scored_batches(split.labels, args):
        labels = torch.from_numpy(split.labels[rows])
        bounds.append(losses.supcon_bounds(labels, temperature=args.temperature))
    lower, collapsed = np.mean(bounds, axis=0)
    majority = np.full(len(split), np.bincount(train.labels).argmax())
    rows = {"constant majority": {"loss": float(collapsed), **label_scores(majority, split, facts)}}
    fitted, scored = channel_features(train), channel_features(split)
    for features in (fitted, scored):
        features["all"] = np.concatenate(list(features.values()), axis=1)
    for name in fitted:
        predicted = losses.ridge_predict(fitted[name], train.labels, scored[name])
        rows[f"ridge {name}"] = label_scores(predicted, split, facts)
    rows["ceiling"] = {"loss": float(lower), **label_scores(split.labels, split, facts)}
    return rows


def predictions(batches, split, out, args, facts):
    """An .npz with the embedding of every row."""
    refuse_folder(out)
    embeddings = finite(joined(batches)["embedding"]).numpy()
    with data.atomic_write(out, "wb") as file:
        np.savez(file, embeddings=embeddings)
    return len(embeddings)


def examples(outputs, split, args, facts):
    """The worst row has the fewest of its class among the training rows nearest to it."""
    names, known = np.array(facts["names"]), split.reference.labels
    z, reference = outputs["embedding"], outputs["reference"]["embedding"]
    predicted = losses.knn_predict(reference, known, z, k=args.neighbours)
    unit = F.normalize(reference, dim=1)
    nearest = []
    for part in z.split(512):
        cosine = F.normalize(part, dim=1) @ unit.T
        nearest.append(known[cosine.topk(args.neighbours).indices.numpy()])
    share_of_others = (np.concatenate(nearest) != split.labels[:, None]).mean(1)
    return share_of_others, {"true": names[split.labels], "predicted": names[predicted]}


def export(model, args, facts):
    """The network from recorded values to the embedding; k-NN on it gives the class."""
    shapes, scaler = facts["shapes"], scaler_of(facts)

    def forward(inputs):
        tokens, present = {}, {}
        for name in shapes:
            mean, sd = (broadcast_channels(values, inputs[name]) for values in scaler[name])
            present[name] = inputs[f"present_{name}"]
            # rows that lack the modality are encoded too: in eval mode no row sees another
            tokens[name] = model.encode(name, ((inputs[name] - mean) / sd).float())
        return model.fuse(tokens, present)

    arrays, masks = {}, {}
    for name, shape in shapes.items():
        arrays[name] = ("float32", ("rows", *shape),
                        "as recorded, or of another numeric type; anything where it is absent")
        masks[f"present_{name}"] = ("bool", ("rows",), f"whether the row has {name}")
    output = ("embedding", ("rows", args.embed), "of length 1: rows are alike by their cosine")
    return Exported(forward, arrays | masks, output,
                    {"scaler": facts["scaler"], "classes_of_training": facts["names"]})


FLAGS = shared_flags(epochs=24, batch_size=64, plateau_patience=5, train_ratio=0.65, val_ratio=0.15)
FLAGS.update(
    sampler=Flag("stratified", "stratified: as many rows of every class in a batch; shuffled: "
                 "every row once an epoch", choices=("shuffled", "stratified")),
    monitor=Flag("accuracy", "validation score that picks the epoch, and raw or EMA weights",
                 choices=("accuracy", "macro_f1", "loss")),
    modalities=Flag("", "which ones to use, names with commas between (default: all)"),
    temperature=Flag(0.2, "of SupCon", above=0),
    neighbours=Flag(5, "k of the k-NN that scores", low=1),
    width=Flag(64, "of a token, a multiple of --heads and of 4", low=4),
    tokens=Flag(4, "fusion tokens", low=1),
    heads=Flag(8, "attention heads", low=1),
    depth=Flag(1, "transformer layers of the encoder of a sequence or video", low=0),
    hidden=Flag(128, "width between fusion and embedding", low=1),
    embed=Flag(64, "width of the embedding", low=1),
    patch=Flag(16, "steps of a sequence that make a token", low=1),
    dropout=Flag(0.2, "in transformer layers, attention and head", low=0, high=0.95),
    modality_dropout=Flag(0.0, "probability that a modality of a row is left out in training, "
                          "never its last", low=0, high=0.95),
    freeze=Flag("", "encoders that are not trained, names with commas between: in eval mode, run "
                "once on rows that are not augmented"),
    noise=Flag(0.3, "sd of noise added in training, the sd of a channel being 1", low=0),
    scale=Flag(0.4, "multiply a modality of a row by up to 1 +- this", low=0, high=0.99),
    shift=Flag(64, "roll sequences by up to so many steps", low=0, high=10**6),
    mixup=Flag(0.0, "alpha of mixup of the encoded features (0 = off)", low=0),
    allow_single_class=Flag(False, "train although there is one class, to see the loss stand at "
                            "its bound"),
)

# The recipe as its team ran it, and their later settings. Their data are not public: 12 classes, of
# which training saw one.
ORIGINAL = dict(
    width=512, tokens=4, heads=8, hidden=1024, embed=512, patch=8, dropout=0.1,
    modality_dropout=0.0, epochs=100, batch_size=32, clip=1.0, temperature=0.07, lr=1e-4,
    warmup_epochs=10.0, warmup_start_lr=1e-7, min_lr=1e-6, weight_decay=1e-4, ema_decay=0.0,
    noise=0.0, scale=0.0, shift=0)
LATER = ORIGINAL | dict(lr=5e-5, weight_decay=1e-2, warmup_epochs=5.0, warmup_start_lr=1e-6,
                        temperature=0.1, clip=0.5, mixup=0.2)

TASK = Task(
    flags=FLAGS, variants={"original": ORIGINAL, "later": LATER},
    load=load, rows=rows, network=network, loss=loss, outputs=outputs, scores=scores, floors=floors,
    predictions=predictions, examples=examples, export=export, reference=True)
