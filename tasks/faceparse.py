"""faceparse: which of 19 parts of the face is each pixel?

    python train.py --task faceparse --lr 4e-3                       # drawn faces
    python train.py --task faceparse --lr 4e-3 --data faces/         # faces/images/, faces/masks/

Files, drawn faces, batches; then the recipe: load, network, loss, scores, floors, predictions.
"""

import base64
import functools
import os
import shutil
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import losses
import models
from tasks.common import (
    Exported, Flag, NonFinite, Rows, Splits, Task, check_crop, finite, shared_flags, show,
    split_checksum, split_rows, unit_images)


# eye_g glasses, ear_r earring, neck_l necklace
FACE_CLASSES = ("background", "skin", "nose", "eye_g", "l_eye", "r_eye", "l_brow", "r_brow",
                "l_ear", "r_ear", "mouth", "u_lip", "l_lip", "hair", "hat", "ear_r", "neck_l",
                "neck", "cloth")
# eyes, brows, ears: l_ is the person's left, on the RIGHT side of the image
FACE_PAIRS = ((4, 5), (6, 7), (8, 9))
# RGB by class id, as CelebAMask-HQ is usually shown
FACE_COLOURS = ((0, 0, 0), (204, 0, 0), (76, 153, 0), (204, 204, 0), (51, 51, 255), (204, 0, 204),
                (0, 255, 255), (255, 204, 204), (102, 51, 0), (255, 0, 0), (102, 204, 0),
                (255, 255, 0), (0, 0, 153), (0, 0, 204), (255, 51, 153), (0, 204, 204), (0, 51, 0),
                (255, 153, 51), (0, 204, 0))


def read_faces(path, *, size, cache=""):
    """Read a face-parsing set: a folder with images/ and masks/ of the same stems, or an .npz with
    `images` and `masks`.

        folder/images/*.jpg|png|...  RGB or grey            folder/masks/*.png  palette or grey,
                                     holding class ids
        file.npz                     images uint8 (n, h, w, 3) or (n, h, w), masks uint8 (n, h, w)

    An id is 0..18, or 255 for pixels that do not count. Images are resized to `size` (bilinear with
    antialiasing); masks are kept as they are, so that a prediction can be scored at their own
    resolution.

    cache   a folder: images and masks are kept there in .npy files and memory-mapped, decoded once
    returns images uint8 tensor (n, 3, *size), masks uint8 tensor (n, h, w), names: list of n str
    Errors: ValueError naming the file for an image without a mask or the reverse, another size than
            that of its image or of the other masks, an RGB mask, an id of 19 or more other than
            255, a file that cannot be read; ImportError with the install command when image files
            need Pillow and it is missing.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist: give a folder with images/ and masks/, or an "
                         ".npz file")
    if path.is_file():
        arrays, masks = read_faces_npz(path, cache=cache)
        names = [f"{path.stem}-{i:05d}" for i in range(len(arrays))]

        def resized(start, stop):
            return data.resize_uint8(arrays[start:stop], size)

        key = data.file_stamps([path], path.parent)
        shape = (len(names), 3, *size)
        images = data.decode_once(resized, shape, key=key, cache=cache, kind="faces", chunk=16)
        return images, masks, names

    files, mask_files = list_face_files(path)
    load = lambda start, stop: torch.cat([data.resize_uint8(data.read_image(file)[None], size)
                                          for file in files[start:stop]])
    key = data.file_stamps(files, path)
    images = data.decode_once(load, (len(files), 3, *size), key=key, cache=cache, kind="faces",
                              chunk=16)
    shape = read_mask(mask_files[0], files[0]).shape
    load = lambda start, stop: torch.stack([torch.from_numpy(read_mask(*pair, shape))
                                            for pair in zip(mask_files[start:stop],
                                                            files[start:stop])])
    key = data.file_stamps(mask_files + files, path)
    masks = data.decode_once(load, (len(files), *shape), key=key, cache=cache, kind="masks",
                             chunk=16)
    return images, masks, [file.stem for file in files]


def list_face_files(folder, *, need_masks=True):
    """Image files of a face-parsing folder and their mask files (or None), by stem. ValueError for
    a stem that occurs once, or twice.

    """

    def listed(place, suffixes):
        files = {}
        for file in sorted(place.iterdir()):
            if file.suffix.lower() in suffixes and files.setdefault(file.stem, file) != file:
                raise ValueError(f"{file} and {files[file.stem].name} have the same stem: remove "
                                 "or rename one of them")
        return files

    place = folder / "images" if need_masks or (folder / "images").is_dir() else folder
    for each in [place] + [folder / "masks"] * need_masks:
        if not each.is_dir():
            raise ValueError(f"{each} does not exist: a face-parsing folder holds images/ and "
                             "masks/ with files of the same stems")
    images = listed(place, data.IMAGE_SUFFIXES)
    if not images:
        raise ValueError(f"{place} holds no image files ({', '.join(data.IMAGE_SUFFIXES)})")
    if not need_masks:
        return list(images.values()), None
    masks = listed(folder / "masks", (".png",))
    for have, lack, what in (images, masks, "mask"), (masks, images, "image"):
        alone = [file for stem, file in have.items() if stem not in lack]
        if alone:
            raise ValueError(f"{alone[0]} has no {what} of the same stem, {len(alone)} of "
                             f"{len(have)} files are alone: add the {what}s, or take the files "
                             "away")
    return list(images.values()), [masks[stem] for stem in images]


def read_mask(path, image=None, shape=None):
    """Class ids of a palette or grey PNG as uint8 (h, w), checked against its image file and the
    shape of the other masks.

    With Pillow; ValueError names a file that cannot be read, that is not palette or grey 8 bit
    (Pillow would stretch the ids of fewer bits to 0..255), or whose ids or size are wrong.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "reading image files needs Pillow: pip install pillow (or pass an .npz)") from error
    try:
        with Image.open(path) as file:
            mode, mask = file.mode, np.array(file)
        with open(path, "rb") as file:
            bits = file.read(25)[24]  # of a PNG's first chunk, IHDR
        image_size = mask.shape[1::-1]
        if image is not None:
            with Image.open(image) as file:
                image_size = file.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a readable mask ({error}): repair or remove it, and its "
                         "image") from error
    if mode != "P" and (mode != "L" or bits != 8):
        raise ValueError(f"{path} is a {mode} image of {bits} bits: a mask is a palette or 8-bit "
                         "grey PNG whose values are class ids, not colours")
    if image_size != mask.shape[1::-1]:
        raise ValueError(f"{path} is {mask.shape[1]}x{mask.shape[0]} but its image is "
                         f"{image_size[0]}x{image_size[1]} (width x height): a mask has the size "
                         "of its image")
    if shape is not None and mask.shape != shape:
        raise ValueError(f"{path} is {mask.shape[1]}x{mask.shape[0]} but the first mask is "
                         f"{shape[1]}x{shape[0]} (width x height): all masks of a set have one "
                         "size; resize image and mask (nearest) beforehand")
    check_face_ids(mask, path)
    return mask


def check_face_ids(masks, where):
    """ValueError for an id other than 0..18 and 255."""
    # 64 at a time: masks that are memory-mapped may not fit into memory
    chunks = [masks[start : start + 64] for start in range(0, len(masks), 64)]
    wrong = np.concatenate([chunk[(chunk > 18) & (chunk != 255)] for chunk in chunks])
    if wrong.size:
        raise ValueError(f"{where}: class ids must be 0 to 18, or 255 for pixels that do not "
                         f"count; got {wrong.max()} in {wrong.size} pixels")


def read_faces_npz(path, *, cache="", need_masks=True):
    """Images and masks (None without need_masks) of an .npz file, checked.

    """
    try:
        with np.load(path, allow_pickle=False) as file:
            present = [name for name in ("images", "masks") if name in file]
            content = {} if cache else {name: file[name] for name in present}
    except (OSError, ValueError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error,
            EOFError) as error:
        raise ValueError(f"{path} is not a readable .npz file ({error})") from error
    for name in present if cache else ():
        content[name] = data.unpack_once(path, name, cache)
    images, masks = content.get("images"), content.get("masks")
    shape_ok = images is not None and (images.ndim == 3 or images.shape[3:] == (3,))
    if not shape_ok or images.dtype != np.uint8 or 0 in images.shape:
        raise ValueError(f"{path}: images must be uint8 (n, h, w) or (n, h, w, 3), got "
                         f"{'none' if images is None else f'{images.dtype} {images.shape}'}")
    if not need_masks:
        return images, None
    if masks is None or masks.dtype != np.uint8 or masks.shape != images.shape[:3]:
        raise ValueError(f"{path}: masks must be uint8 class ids {images.shape[:3]}, the size of "
                         "the images, got "
                         f"{'none' if masks is None else f'{masks.dtype} {masks.shape}'}")
    check_face_ids(masks, path)
    return images, torch.from_numpy(masks)


def sides_reversed(masks, pairs, *, chunk=64):
    """Which masks have the person's left and right labelled the wrong way round, told by where the
    parts lie.

    (left, right) are labels of the person's own left and right, and the left one lies further right
    in the image. Each pair whose two parts are there has a vote, by the mean column of either; a
    mask is reversed if most votes say so. Of large masks every (w // 128)-th row and column is
    looked at.

    masks   (n, h, w) uint8
    returns int8 array (n,): 1 reversed, 0 in order, -1 cannot be told (no pair is complete, or a
    tie)
    Check:  label 5 left of label 4 is in order for pairs ((4, 5),)
    """
    votes, counts = np.zeros(len(masks), dtype=int), np.zeros(len(masks), dtype=int)
    step = max(1, masks.shape[2] // 128)
    columns = torch.arange(0, masks.shape[2], step, dtype=torch.float64)
    for start in range(0, len(masks), chunk):
        part, rows = masks[start : start + chunk, ::step, ::step], slice(start, start + chunk)
        for left, right in pairs:
            # pixels of each column
            sums = [(part == label).sum(1).double() for label in (left, right)]
            # NaN where the part is absent
            x_left, x_right = (each @ columns / each.sum(1) for each in sums)
            apart = x_right - x_left
            votes[rows] += apart.nan_to_num().sign().int().numpy()
            counts[rows] += (~apart.isnan()).numpy()
    return np.where((counts == 0) | (votes == 0), -1, votes > 0).astype(np.int8)


def synthetic_faces(n=200, *, size=(128, 128), seed=0):
    """Drawn faces and the class of each pixel. For running and teaching, never for a result.

    A face is a pile of ellipses. Place, size, tilt and turn of the head, every part, its colour,
    light and noise vary by face. Skin, nose, ears and neck have nearly one colour, hair and brows
    another, any colour can be that of a hat or of the background, and both sides of a pair are
    painted alike: place and shape tell the classes apart. Glasses, hats, jewellery, open mouths and
    ears are in some images only. Parts narrower than a pixel of a small `size` are missing.

    returns images uint8 tensor (n, 3, h, w), masks uint8 tensor (n, h, w) of ids in FACE_CLASSES,
            names: list of n str
    Check:  200 faces hold all 19 classes, one face 14 of them on average
    """
    # back to front: class, x, y, half width, half height, shift when the head turns, share of faces
    parts = (
        ("hair", 0, -0.2, 1, 1.15, 0, 0.95), ("cloth", 0, 2.3, 1.9, 1.1, 0, 1),
        ("neck", 0, 1, 0.48, 0.65, 0, 1), ("neck_l", 0, 1.4, 0.48, 0.09, 0, 0.15),
        ("l_ear", 0.84, 0.1, 0.16, 0.26, 0, 0.55), ("ear_r", 0.88, 0.42, 0.08, 0.11, 0, 0.15),
        ("skin", 0, 0, 0.78, 1.05, 0.05, 1), ("hair", 0, -0.9, 0.66, 0.35, 0.05, 0.9),
        ("hat", 0, -1.05, 1.1, 0.45, 0, 0.15), ("nose", 0, 0.2, 0.15, 0.32, 0.4, 1),
        ("eye_g", 0, -0.08, 0.66, 0.21, 0.2, 0.2), ("l_eye", 0.34, -0.1, 0.16, 0.09, 0.2, 1),
        ("l_brow", 0.34, -0.38, 0.23, 0.07, 0.2, 1), ("u_lip", 0, 0.62, 0.3, 0.11, 0.2, 1),
        ("l_lip", 0, 0.76, 0.28, 0.11, 0.2, 1), ("mouth", 0, 0.69, 0.22, 0.08, 0.2, 0.4))
    rng = np.random.default_rng(seed)
    images = torch.empty((n, 3, *size), dtype=torch.uint8)
    masks = torch.empty((n, *size), dtype=torch.uint8)
    rows, columns = np.mgrid[1 - size[0] : size[0] : 2, 1 - size[1] : size[1] : 2] / min(size)
    for i in range(n):
        dx, dy, tilt = rng.uniform((-0.12, -0.12, -0.25), (0.12, 0.12, 0.25))
        scale, turn = rng.uniform((0.54, -1), (0.7, 1))
        mask = np.zeros(size, dtype=np.uint8)
        right, down = (columns - dx) / scale, (rows - dy) / scale
        x = np.cos(tilt) * right + np.sin(tilt) * down
        y = np.cos(tilt) * down - np.sin(tilt) * right
        for name, part_x, part_y, width, height, depth, share in parts:
            for side in (1, -1) if part_x else (1,):  # a part beside the middle has a twin
                across = (x - side * part_x - depth * turn) / (width * rng.uniform(0.85, 1.15))
                along = (y - part_y - rng.uniform(-0.04, 0.04)) / (height * rng.uniform(0.85, 1.15))
                if rng.random() < share:  # x > 0 is the person's left
                    twin = name.replace("l_", "r_") if side < 0 else name
                    mask[across**2 + along**2 < 1] = FACE_CLASSES.index(twin)
        colour = dict(zip(FACE_CLASSES, rng.uniform(15, 240, (19, 3))))
        skin = rng.uniform(70, 245) * rng.uniform(0.72, 0.9) ** np.arange(3)  # red, green, blue
        hair = rng.uniform(15, 200) * rng.uniform(0.65, 1) ** np.arange(3)
        colour |= {"skin": skin, "nose": 0.88 * skin, "neck": 0.8 * skin, "hair": hair}
        colour |= {"u_lip": skin * [0.9, 0.6, 0.65], "l_lip": skin * [1, 0.7, 0.75]}
        for part, shade in (("ear", 0.92 * skin), ("brow", 0.8 * hair), ("eye", 0.3 * skin + 150)):
            colour[f"l_{part}"] = colour[f"r_{part}"] = shade
        image = np.stack([colour[name] for name in FACE_CLASSES])[mask]
        light = 1 + rng.uniform(-0.2, 0.2) * x + rng.uniform(-0.15, 0.1) * y
        image *= rng.uniform(0.65, 1.1) * np.maximum(light, 0.1)[..., None]
        image += rng.normal(scale=rng.uniform(3, 14), size=image.shape)
        images[i] = torch.from_numpy(np.clip(image, 0, 255).astype(np.uint8)).permute(2, 0, 1)
        masks[i] = torch.from_numpy(mask)
    return images, masks, [f"synthetic/{i:05d}" for i in range(n)]


class FaceSplit:
    """Some rows of a face-parsing set as a training loop sees them: `batch(rows)` to train on, with
    masks to score by.

    images  uint8 (n, 3, h, w), masks uint8 (n, H, W) or None, of the whole set (never copied); rows
            (m,) of this split
    augment {} or all of degrees, zoom, crop, flip ("swap", "naive", "none"), jitter, photometric,
    mixup, cutmix
    pairs   labels that change places when a face is mirrored
    wrong   (n,) bool or None: masks whose paired labels change places in augmented batches; what is
            scored keeps them
    """

    chunk = 16

    def __init__(self, images, masks, rows, *, device="cpu", augment=None, pairs=(), wrong=None,
                 classes=19, names=None):
        self.images, self.masks, self.rows, self.wrong = images, masks, np.asarray(rows), wrong
        self.names = names
        self.device, self.augment = torch.device(device), augment or {}
        self.pairs, self.classes = pairs, classes

    def __len__(self):
        return len(self.rows)

    def batch(self, rows, generator=None):
        """Gather rows: inputs float (b, 3, h, w) in [-1, 1], targets at the same size: ids (b, h,
        w), or after mixup probabilities.

        Not augmented without a generator, and then `masks` (b, H, W) holds the ids as they are, at
        their own resolution. """
        index = torch.from_numpy(self.rows[rows])
        # much faster than images[index]
        images = self.images.index_select(0, index).to(self.device, non_blocking=True)
        masks = None
        if self.masks is not None:
            masks = self.masks.index_select(0, index).to(self.device, non_blocking=True)
        scale = lambda images: images.float().sub_(127.5).div_(127.5)
        if generator is None or not self.augment:
            batch = {"inputs": scale(images)}
            if masks is not None:
                batch["masks"] = masks
                batch["targets"] = resize_ids(masks, images.shape[2:]).long()
            return batch
        on = self.augment
        if self.wrong is not None:
            wrong = torch.from_numpy(self.wrong[index.numpy()]).to(self.device)
            masks = torch.where(wrong[:, None, None], data.swap_labels(masks, self.pairs), masks)
        images, masks = data.random_affine(images, degrees=on["degrees"], zoom=on["zoom"],
                                           generator=generator, masks=masks)
        if on["crop"]:
            images, masks = data.random_crop(images, padding=on["crop"], generator=generator,
                                             masks=masks)
        if on["flip"] != "none":
            pairs = self.pairs if on["flip"] == "swap" else ()
            images, masks = data.horizontal_flip(images, generator=generator, masks=masks,
                                                 pairs=pairs)
        if on["jitter"]:
            images = data.color_jitter(images, strength=on["jitter"], generator=generator)
        if on["photometric"]:
            images = data.photometric_distort(images, p=on["photometric"], generator=generator)
        inputs, targets = scale(images), masks
        if on["mixup"]:
            inputs, targets = data.mixup(inputs, data.soft_targets(masks, self.classes),
                                         alpha=on["mixup"], generator=generator)
            # where one of the two is ignored, the other counts
            targets = targets / targets.sum(1, keepdim=True).clamp_min(1e-6)
        inputs, targets = data.cutmix(inputs, targets, alpha=on["cutmix"], generator=generator)
        return {"inputs": inputs, "targets": targets if on["mixup"] else targets.long()}


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
        """inputs (1, 3, h, w) of the size of the network, and the image as it is: uint8 (h, w,
        3)."""
        name, read = self.sources[rows[0]]
        image = read()
        split = FaceSplit(data.resize_uint8(image[None], self.size), None, [0], device=self.device)
        return split.batch([0]) | {"image": image, "name": name}


def face_sources(path):
    """[(name, function that reads the image)] of a folder, of its images/, of an .npz or of one
    file."""
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
    parts = dict(zip(("train", "validation", "test"), split_rows(np.arange(len(masks)), args)))
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
    return (f"data: {source}, {len(masks):,} images at {show(args.size)}, "
            f"masks at {show(tuple(masks.shape[1:]))}")


def sides_note(sides):
    return (f"left and right: {np.sum(sides < 0)} of {len(sides):,} masks cannot be told, reversed "
            f"in {np.sum(sides == 1)}")


def pixel_counts(masks, rows):
    """How many of these masks hold class c at each position: (19, h, w); ignored pixels count for
    none."""
    counts = torch.zeros(19, *masks.shape[1:], dtype=torch.int32)
    for row in rows:
        for c in range(19):
            counts[c] += masks[row] == c
    return counts.numpy()


def pack_map(ids):
    """A map of small ids as text for a checkpoint: 'rows,columns,base64 of the zlib-compressed
    bytes'."""
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


def resize_ids(masks, size):
    """Class ids (n, h, w) at another size, nearest."""
    return F.interpolate(masks[:, None], size, mode="nearest-exact")[:, 0]


def class_ids(logits, size):
    """Class ids (h, w) of one image's logits (1, 19, ., .), upsampled to its own size."""
    # channels last is three times faster on the CPU
    logits = logits.float().contiguous(memory_format=torch.channels_last)
    large = F.interpolate(logits, size, mode="bilinear", align_corners=False)
    return large.argmax(1)[0].to(torch.uint8)


def scores(outputs, split, args, facts):
    """The loss is the mean over the images of their own; the other scores count pixels of the
    masks."""
    counted = outputs["counted"]
    if not counted.any():
        raise NonFinite(f"all pixels of the {len(split)} masks are ignored, there is no score")
    names = [name for name in outputs if name not in ("confusion", "counted")]
    means = {name: float(np.mean(outputs[name][counted].tolist())) for name in names}
    return means | f_scores(outputs["confusion"].numpy())


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
    """Two constants, and three ways to be nearly right.

    The constants are fitted on the training masks. The masks themselves, reduced to --size as the
    training targets are and brought back; reduced by area and brought back as the network's output
    is; with left and right set right, which disagrees with the reversed masks.
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
    return {name: f_scores(np.stack(matrices)) for name, matrices in confusions.items()}


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
                 "challenge's, per image", choices=("f", "f_pooled", "miou")),
    size=Flag((128, 128), "height x width that the network sees; scores are counted at the masks' "
              "own "
              "resolution", low=8),
    network=Flag("cnn", "cnn: FaceCNN, size a multiple of 8; segformer: MicroSegFormer, a multiple "
                 "of "
                 "32", choices=tuple(NETWORKS)),
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
                      "reversed; "
                      "what is scored is kept as it is"),
    flip=Flag("swap", "swap: mirror half of the faces, left and right labels change places; naive: "
              "they "
              "do not; none: no mirroring", choices=("swap", "naive", "none")),
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
    predictions=predictions, examples=examples, export=export)
