"""faceparse: which of 19 parts of the face is each pixel?

    python train.py --task faceparse --lr 4e-3                       # drawn faces
    python train.py --task faceparse --lr 4e-3 --data faces/         # faces/images/, faces/masks/

Reading, drawn faces and batches are in faceparse_data.py.
"""

import base64
import functools
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import losses
import models
from tasks.common import (
    Exported, Flag, NonFinite, Rows, Splits, Task, check_crop, finite, mean_over, shared_flags,
    show, split_checksum, split_rows, unit_images)
from tasks.faceparse_data import (
    FACE_CLASSES, FACE_COLOURS, FACE_PAIRS, FaceSplit, colour_logits, fit_colours, list_face_files,
    position_logits, read_faces, read_faces_npz, resize_ids, sides_reversed, synthetic_faces)


class FaceImages:
    """Images to predict masks for, of any sizes: decoded one at a time.

    sources  list of (name, read), where read() is uint8 (h, w, 3); size: what the network sees
    """

    chunk = 1

    def __init__(self, sources, size, *, device="cpu"):
        self.sources, self.size, self.device = sources, size, device

    def __len__(self):
        return len(self.sources)

    def batch(self, rows):
        """inputs (1, 3, h, w) at the network's size, and the image unchanged: uint8 (h, w, 3)."""
        name, read = self.sources[rows[0]]
        image = read()
        split = FaceSplit(data.resize_uint8(image[None], self.size), None, [0], device=self.device)
        return split.batch([0]) | {"image": image, "name": name}


def face_sources(path):
    """[(name, function that reads the image)] of a folder, its images/, an .npz or one file."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist: give a folder of images, an image or an .npz")
    if path.suffix != ".npz":
        files = [path] if path.is_file() else list_face_files(path, need_masks=False)[0]
        return [(file.stem, functools.partial(data.read_image, file)) for file in files]
    images, _ = read_faces_npz(path, need_masks=False)
    return [(f"{path.stem}-{row:05d}", functools.partial(rgb, image))
            for row, image in enumerate(images)]


def rgb(image):
    """A grey or RGB image (h, w[, 3]) as uint8 (h, w, 3)."""
    height, width = image.shape[:2]
    return np.array(np.broadcast_to(image.reshape(height, width, -1), (height, width, 3)))


# --------------------------------------------------------------------------------------------------
# The recipe

NETWORKS = {"cnn": models.FaceCNN, "segformer": models.MicroSegFormer}


def load(path, args):
    """Read the faces, split them by image, and count the classes of the training masks."""
    models.check_stride_fits(args.size, NETWORKS[args.network].stride)
    check_crop(args)
    images, masks, names = read(path, args)
    parts = dict(zip(("train", "validation", "test"), split_rows(len(masks), args)))
    for name, rows in parts.items():
        if len(rows) and not any((masks[row] != 255).any() for row in rows):
            raise ValueError(f"all pixels of the {len(rows)} {name} masks are 255, which do not "
                             "count: there is nothing to learn from or to score; change --seed or "
                             "the ratios, or take those images out")

    sides = sides_reversed(masks, FACE_PAIRS)
    reversed_in = ", ".join(f"{np.sum(sides[rows] == 1)} {name}" for name, rows in parts.items())
    remedy = ("set right for training" if args.fix_reversed else
              "kept, --fix-reversed sets them right for training")
    notes = [data_note(path, masks, args),
             "split: by image; whether a person has several is not known",
             f"{sides_note(sides)}: {reversed_in}; {remedy}"]

    counts = pixel_counts(masks, parts["train"])
    facts = {"data": checksum(images, masks), "split": split_checksum(parts.values()),
             "position": pack_map(counts.argmax(0)), "class_weights": []}
    facts["strong"] = fit_colours(images, masks, parts["train"])
    facts["strong"]["position"] = position_logits(counts).tolist()
    if args.class_weights == "median":
        facts["class_weights"] = losses.median_frequency_weights(counts.sum((1, 2))).tolist()

    split = functools.partial(FaceSplit, images, masks, device=args.device, pairs=FACE_PAIRS,
                              names=names)
    augmentations = ("degrees", "zoom", "crop", "flip", "jitter", "photometric", "mixup", "cutmix")
    train = split(parts["train"], augment={name: getattr(args, name) for name in augmentations},
                  wrong=sides == 1 if args.fix_reversed else None)
    validation = split(parts["validation"]) if len(parts["validation"]) else None
    test = split(parts["test"]) if len(parts["test"]) else None
    count = min(len(train), len(parts["validation"]))
    sample = np.linspace(0, len(train) - 1, count).astype(int)
    return Splits(train, validation, test, facts, notes, train_eval=split(parts["train"][sample]))


def rows(path, args, facts, need_labels):
    if not need_labels:
        if args.cache:
            raise ValueError("--cache is not read by --predict of this task: leave it out")
        return Rows(FaceImages(face_sources(path), args.size, device=args.device), 0, [])
    images, masks, names = read(path, args)
    split = FaceSplit(images, masks, np.arange(len(masks)), device=args.device, pairs=FACE_PAIRS,
                      names=names)
    notes = [data_note(path, masks, args), sides_note(sides_reversed(masks, FACE_PAIRS))]
    return Rows(split, checksum(images, masks), notes)


def read(path, args):
    if path:
        return read_faces(path, size=args.size, cache=args.cache)
    images, masks, names = synthetic_faces()
    return data.resize_uint8(images.permute(0, 2, 3, 1).numpy(), args.size), masks, names


def checksum(images, masks):
    sample = slice(None, None, max(1, len(masks) // 100))  # enough to tell this set from another
    return zlib.crc32(images[sample].numpy().tobytes(), zlib.crc32(masks[sample].numpy().tobytes()))


def data_note(path, masks, args):
    source = path or "SYNTHETIC faces, drawn by the script: a score on them is no result"
    return (f"data: {source}, {len(masks):,} images at {show(args.size)}, masks at "
            f"{show(tuple(masks.shape[1:]))}")


def sides_note(sides):
    return (f"left and right: {np.sum(sides < 0)} of {len(sides):,} masks cannot be told, reversed "
            f"in {np.sum(sides == 1)}")


def pixel_counts(masks, rows):
    """How many masks hold class c at each position: (19, h, w), without ignored pixels."""
    counts = torch.zeros(19, *masks.shape[1:], dtype=torch.int32)
    for row in rows:
        for c in range(19):
            counts[c] += masks[row] == c
    return counts.numpy()


def pack_map(ids):
    """A map of small ids as text for a checkpoint: 'rows,columns,base64 of the zlib bytes'."""
    body = base64.b64encode(zlib.compress(ids.astype(np.uint8).tobytes())).decode()
    return f"{ids.shape[0]},{ids.shape[1]},{body}"


def unpack_map(text):
    rows, columns, body = text.split(",")
    ids = torch.frombuffer(bytearray(zlib.decompress(base64.b64decode(body))), dtype=torch.uint8)
    return ids.view(int(rows), int(columns))


def network(args, facts):
    if args.network == "cnn":
        return models.FaceCNN(width=args.width, dropout=args.dropout)
    return models.MicroSegFormer(lmsa=args.lmsa, mix_ffn=args.mix_ffn, dropout=args.dropout)


def criterion(logits, targets, args, facts):
    return losses.ce_dice_loss(
        logits, targets, ce_weight=args.ce_weight, dice_weight=args.dice_weight,
        label_smoothing=args.smoothing, gamma=args.gamma,
        class_weights=facts["class_weights"] or None, ignore_index=255, per=args.dice_per,
        absent=args.dice_absent)


def loss(model, batch, args, facts):
    return criterion(model(batch["inputs"]), batch["targets"], args, facts)


def tta_logits(model, inputs, args):
    return models.flip_average(model, inputs, FACE_PAIRS) if args.tta else model(inputs)


def outputs(model, batch, args, facts):
    """Of each image the confusion matrix at the size of its mask, and its own loss at --size.

    An image whose pixels are all ignored has loss 0 and counted 0. Without masks: the class ids.
    """
    logits = finite(tta_logits(model, batch["inputs"], args))
    if "image" in batch:
        return {"ids": class_ids(logits, batch["image"].shape[:2])}
    rows = []
    for one, target, mask in zip(logits.split(1), batch["targets"].split(1), batch["masks"]):
        row = {"confusion": torch.from_numpy(confusion(class_ids(one, mask.shape), mask))}
        counted = bool((target != 255).any())
        value, parts = criterion(one, target, args, facts)
        for name, part in ({"loss": value} | parts).items():
            row[name] = torch.tensor(float(part) if counted else 0.0, dtype=torch.float64)
        rows.append(row | {"counted": torch.tensor(counted)})
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def confusion(ids, mask):
    return losses.confusion_matrix(ids, mask, 19)


def class_ids(logits, size):
    """Class ids (h, w) of one image's logits (1, 19, ., .), upsampled to its own size."""
    # channels last is three times faster on the CPU
    logits = logits.float().contiguous(memory_format=torch.channels_last)
    large = F.interpolate(logits, size, mode="bilinear", align_corners=False)
    return large.argmax(1)[0].to(torch.uint8)


def scores(outputs, split, args, facts):
    """The loss is a mean over the images; the other scores count pixels of the masks."""
    counted = outputs["counted"]
    if not counted.any():
        raise NonFinite(f"all pixels of the {len(split)} masks are ignored, there is no score")
    names = [name for name in outputs if name not in ("confusion", "counted")]
    means = {name: float(np.mean(outputs[name][counted].tolist())) for name in names}
    return means | f_scores(outputs["confusion"].numpy())


def headline(outputs, split, args, facts):
    """The official F, a mean over the images; see Task."""
    return mean_over(losses.f_score_per_image(outputs["confusion"].numpy()))


def f_scores(confusions):
    """Scores of one confusion matrix per image (n, 19, 19)."""
    pooled, per_image = confusions.sum(0), losses.f_score_per_image(confusions)
    low, high = losses.bootstrap_interval(per_image)
    f, images = losses.f_score_pooled(pooled), (confusions.sum(2) > 0).sum(0)
    classes = {name: {"images": int(count), "f": float(value)}
               for name, count, value in zip(FACE_CLASSES, images, f)}
    return {"f": float(np.nanmean(per_image)), "f_low": low, "f_high": high,
            "f_pooled": float(np.nanmean(f)), "miou": losses.mean_iou(pooled), "classes": classes}


def floors(split, args, facts):
    """Two constants, colour and position, and three ways to be nearly right.

    The constants are fitted on the training masks. The masks themselves, reduced to --size as the
    training targets are and brought back; reduced by area and brought back as the network's output
    is; with left and right set right, which disagrees with the reversed masks. Colour and position:
    of each pixel the class with the largest share of training masks there, times its density of
    that colour.
    """
    position = unpack_map(facts["position"])[None]
    confusions = {}
    for row in split.rows:
        mask = split.masks[row]
        reduced = resize_ids(mask[None], args.size)
        by_area = F.interpolate(data.soft_targets(mask[None], 19), args.size, mode="area")
        is_reversed = sides_reversed(mask[None], FACE_PAIRS)[0] == 1
        guesses = {
            "constant background": torch.zeros_like(mask),
            "constant by position": resize_ids(position, mask.shape)[0],
            f"at {show(args.size)}, nearest": resize_ids(reduced, mask.shape)[0],
            f"at {show(args.size)}, by area": class_ids(by_area, mask.shape),
            "sides set right": data.swap_labels(mask, FACE_PAIRS) if is_reversed else mask}
        for name, guess in guesses.items():
            guess = guess.masked_fill(guess == 255, 0)
            confusions.setdefault(name, []).append(confusion(guess, mask))
    rows = {name: f_scores(np.stack(matrices)) for name, matrices in confusions.items()}
    if "strong" in facts:
        rows["strong: colour and position"] = colour_and_position(split, facts)
    return rows


def colour_and_position(split, facts):
    """Outputs of the simple model: a confusion matrix per image, and whether any pixel counts."""
    fit = facts["strong"]
    size = split.images.shape[2:]
    position = F.interpolate(torch.tensor(fit["position"])[None], size, mode="bilinear")
    confusions, counted = [], []
    for row in split.rows:
        mask = split.masks[row]
        ids = class_ids(position + colour_logits(split.images[row][None], fit), mask.shape)
        confusions.append(torch.from_numpy(confusion(ids, mask)))
        counted.append(bool((mask != 255).any()))
    return {"confusion": torch.stack(confusions), "counted": torch.tensor(counted)}


def predictions(batches, split, out, args, facts):
    """Masks of the images' own sizes: OUT/masks holds class ids, OUT/colour the coloured faces."""
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--out {folder} exists and is not an empty folder: choose another one")
    palette = np.array(FACE_COLOURS, dtype=np.uint8)
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        for name in ("masks", "colour"):
            (temporary / name).mkdir(parents=True)
        for batch, outputs in batches:
            ids = outputs["ids"].cpu().numpy()
            coloured = (0.5 * batch["image"] + 0.5 * palette[ids]).astype(np.uint8)
            name = f"{batch['name']}.png"
            (temporary / "masks" / name).write_bytes(data.encode_png(ids, palette))
            (temporary / "colour" / name).write_bytes(data.encode_png(coloured))
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # still there if an image could not be read
    return len(split)


def examples(outputs, split, args, facts):
    """The worst is the image with the lowest F."""
    f = losses.f_score_per_image(outputs["confusion"].numpy())
    return 1 - f, {"f": f}


def export(model, args, facts):
    """Probabilities at --size, with --tta of the mean logits of an image and its mirror image."""
    def forward(inputs):
        return tta_logits(model, unit_images(inputs["images"]), args).float().softmax(1)

    return Exported(
        forward=forward,
        inputs={"images": ("uint8", ("rows", *args.size, 3), "faces, RGB, resized to this size")},
        output=("prob", ("rows", len(FACE_CLASSES), *args.size),
                "probability of every class at every pixel, in the order of the classes"),
        facts={"classes": list(FACE_CLASSES), "tta": args.tta})


FLAGS = shared_flags(epochs=60, batch_size=8, lr=4e-3, min_lr=4e-6, plateau_patience=5,
                     restart_epochs=30.0, train_ratio=0.8, test_ratio=0.1) | dict(
    channels_last=Flag(True, "memory format of images"),
    monitor=Flag("f", "validation score that picks the epoch, and raw or EMA weights: f is the "
                 "challenge's, per image", choices=("f", "f_pooled", "miou", "last")),
    size=Flag((128, 128), "height x width that the network sees; scores are counted at the masks' "
              "own resolution", low=8),
    network=Flag("cnn", "cnn: FaceCNN, size a multiple of 8; segformer: MicroSegFormer, a multiple "
                 "of 32", choices=tuple(NETWORKS)),
    width=Flag(32, "channels at half the size", low=1, when={"network": ("cnn",)}),
    lmsa=Flag(True, "local multi-scale attention before the classifier",
              when={"network": ("segformer",)}),
    mix_ffn=Flag(True, "depthwise 3x3 in every MLP, which supplies position",
                 when={"network": ("segformer",)}),
    dropout=Flag(0.0, "in the bottleneck of cnn, in every layer of segformer", low=0, high=0.79),
    ce_weight=Flag(1.0, "of cross-entropy in the loss", low=0),
    dice_weight=Flag(1.5, "of Dice in the loss", low=0),
    dice_per=Flag("image", "Dice of each image, or of the pixels of the batch",
                  choices=("image", "batch")),
    dice_absent=Flag("skip", "a class without pixels: left out, counted (near 1), or counted as 0",
                     choices=("skip", "count", "zero")),
    smoothing=Flag(0.0, "label smoothing of cross-entropy", low=0, high=0.99),
    gamma=Flag(0.0, "exponent of the focal loss in place of cross-entropy (0 = off)", low=0),
    class_weights=Flag("none", "median: square root of median frequency, counted on training masks",
                       choices=("none", "median")),
    fix_reversed=Flag(False, "train on masks with left and right set right where they are "
                      "reversed; what is scored is kept as it is"),
    flip=Flag("swap", "swap: mirror half of the faces, left and right labels change places; naive: "
              "they do not; none: no mirroring", choices=("swap", "naive", "none")),
    degrees=Flag(15.0, "rotate by up to so much (0 = off)", low=0, high=180),
    zoom=Flag(1.25, "enlarge by a factor between 1 / zoom and zoom (1 = off)", low=1, high=10),
    crop=Flag(0, "random crop after padding by this many pixels (0 = off)", low=0),
    jitter=Flag(0.2, "multiply brightness, contrast and saturation by up to 1 +- this (0 = off)",
                low=0, high=1),
    photometric=Flag(0.0, "probability of each of the five photometric operations", low=0, high=1),
    mixup=Flag(0.0, "alpha of mixup (0 = off)", low=0),
    cutmix=Flag(0.0, "alpha of cutmix (0 = off)", low=0),
    tta=Flag(False, "score and predict the mean of an image and its mirror image"),
)

# The recipe as its team ran it, with its faults: left and right keep their labels when a face is
# mirrored, absent classes keep their Dice term, and the cosine is planned for 300 epochs although
# early stopping ended it at 112. The other variants change what they name. Two things are ours: the
# score that picks the epoch, and one seeded split.
ORIGINAL = dict(
    network="segformer", mix_ffn=False, size=(512, 512), dropout=0.15,
    batch_size=32, epochs=300, patience=20, clip=1.0,
    lr=8e-4, warmup_epochs=5.0, warmup_start_lr=8e-5, min_lr=0.0, weight_decay=1e-4, ema_decay=0.0,
    dice_weight=1.5, dice_per="image", dice_absent="count",
    flip="naive", degrees=15.0, zoom=1.0, crop=0, jitter=0.2, photometric=0.0,
    train_ratio=0.9, val_ratio=0.1, test_ratio=0.0,
)
RESTARTS = ORIGINAL | dict(epochs=200, schedule="restarts", restart_epochs=30.0, restart_mult=2,
                           min_lr=1e-6)
COMBINED = RESTARTS | dict(dice_weight=2.5, dropout=0.2, weight_decay=2e-4, lr=6e-4,
                           warmup_start_lr=6e-5, smoothing=0.1, patience=100)

TASK = Task(
    flags=FLAGS,
    variants={
        "original": ORIGINAL, "dice1": ORIGINAL | dict(dice_weight=1.0),
        "dice2": ORIGINAL | dict(dice_weight=2.0), "dice2.5": ORIGINAL | dict(dice_weight=2.5),
        "dice3": ORIGINAL | dict(dice_weight=3.0),
        "cosine120": ORIGINAL | dict(epochs=200, cosine_epochs=120.0), "restarts": RESTARTS,
        "lr1e-3": ORIGINAL | dict(lr=1e-3, warmup_epochs=10.0, warmup_start_lr=1e-4),
        "combined": COMBINED},
    load=load, rows=rows, network=network, loss=loss, outputs=outputs, scores=scores, floors=floors,
    headline=headline, predictions=predictions, examples=examples, export=export)
