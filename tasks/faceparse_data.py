"""The data of faceparse: images and masks of faces, drawn faces, batches."""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
from tasks.common import open_npz

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
    """Read images and masks of faces from a folder or an .npz.

        folder/images/*.jpg|png|...  RGB or grey
        folder/masks/*.png           palette or grey class ids, same stems as the images
        file.npz                     images uint8 (n, h, w, 3) or (n, h, w), masks uint8 (n, h, w)

    An id is 0..18, or 255 for pixels that do not count. Images are resized to `size` (bilinear with
    antialiasing). Masks keep their size, so that a prediction can be scored at it.

    cache    a folder: images and masks are decoded once into .npy files there, and memory-mapped
    returns  images uint8 tensor (n, 3, *size), masks uint8 tensor (n, h, w), names: list of n str
    Errors:  ValueError with the file for an image without a mask or the reverse, a size that
             differs from that of its image or of the other masks, an RGB mask, an id of 19 or more
             other than 255, a file that cannot be read; ImportError with the install command if
             image files need Pillow and it is missing
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist: give a folder with images/ and masks/, or an "
                         ".npz file")
    options = {"cache": cache, "chunk": 16}
    if path.is_file():
        arrays, masks = read_faces_npz(path, cache=cache)
        names = [f"{path.stem}-{i:05d}" for i in range(len(arrays))]

        def resized(start, stop):
            return data.resize_uint8(arrays[start:stop], size)

        key = data.file_stamps([path], path.parent)
        shape = (len(names), 3, *size)
        images = data.decode_once(resized, shape, key=key, kind="faces", **options)
        return images, masks, names

    files, mask_files = list_face_files(path)

    def load_images(start, stop):
        images = [data.read_image(file) for file in files[start:stop]]
        return torch.cat([data.resize_uint8(image[None], size) for image in images])

    def load_masks(start, stop):
        pairs = zip(mask_files[start:stop], files[start:stop])
        masks = [read_mask(mask_file, file, shape) for mask_file, file in pairs]
        return torch.from_numpy(np.stack(masks))

    key = data.file_stamps(files, path)
    images = data.decode_once(load_images, (len(files), 3, *size), key=key, kind="faces", **options)
    shape = read_mask(mask_files[0], files[0]).shape  # of all masks
    key = data.file_stamps(mask_files + files, path)
    masks = data.decode_once(load_masks, (len(files), *shape), key=key, kind="masks", **options)
    return images, masks, [file.stem for file in files]


def list_face_files(folder, *, need_masks=True):
    """Image files of a face-parsing folder and their mask files (or None), sorted by name.

    Errors: ValueError for a stem that occurs twice, or without its image or mask
    """

    def by_stem(place, suffixes):
        files = {}
        for file in sorted(place.iterdir()):
            if file.suffix.lower() in suffixes and files.setdefault(file.stem, file) != file:
                raise ValueError(f"{file} and {files[file.stem].name} have the same stem: remove "
                                 "or rename one of them")
        return files

    place = folder / "images" if need_masks or (folder / "images").is_dir() else folder
    for needed in (place, folder / "masks") if need_masks else (place,):
        if not needed.is_dir():
            raise ValueError(f"{needed} does not exist: a face-parsing folder holds images/ and "
                             "masks/ with files of the same stems")
    images = by_stem(place, data.IMAGE_SUFFIXES)
    if not images:
        raise ValueError(f"{place} holds no image files ({', '.join(data.IMAGE_SUFFIXES)})")
    if not need_masks:
        return list(images.values()), None
    masks = by_stem(folder / "masks", (".png",))
    for files, partners, partner in ((images, masks, "mask"), (masks, images, "image")):
        alone = [file for stem, file in files.items() if stem not in partners]
        if alone:
            raise ValueError(f"{alone[0]} has no {partner} of the same stem, {len(alone)} of "
                             f"{len(files)} files are alone: add the {partner}s, or take the files "
                             "away")
    return list(images.values()), [masks[stem] for stem in images]


def read_mask(path, image=None, shape=None):
    """Class ids uint8 (h, w) of a palette or grey PNG, checked against its image and other masks.

    image   the image file, of the same size; shape: (h, w) of the other masks
    Errors: ValueError with the file if it cannot be read, is not palette or grey 8 bit, or has
            wrong ids or a wrong size; ImportError if Pillow is missing
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "reading image files needs Pillow: pip install pillow (or pass an .npz)") from error
    try:
        with Image.open(path) as file:
            mode, mask = file.mode, np.array(file)  # Pillow stretches ids of fewer bits to 0..255
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
    wrong = []
    for start in range(0, len(masks), 64):  # memory-mapped masks may not fit into memory
        chunk = masks[start : start + 64]
        wrong.append(chunk[(chunk > 18) & (chunk != 255)])
    wrong = np.concatenate(wrong)
    if wrong.size:
        raise ValueError(f"{where}: class ids must be 0 to 18, or 255 for pixels that do not "
                         f"count; got {wrong.max()} in {wrong.size} pixels")


def read_faces_npz(path, *, cache="", need_masks=True):
    """Checked images and masks (None without need_masks) of an .npz file; see read_faces."""
    with open_npz(path, "images=..., masks=...") as archive:
        present = [name for name in ("images", "masks") if name in archive]
        content = {} if cache else {name: archive[name] for name in present}
    if cache:
        content = {name: data.unpack_once(path, name, cache) for name in present}
    images, masks = content.get("images"), content.get("masks")

    def described(array):
        return "none" if array is None else f"{array.dtype} {array.shape}"

    shape_ok = images is not None and (images.ndim == 3 or images.shape[3:] == (3,))
    if not shape_ok or images.dtype != np.uint8 or 0 in images.shape:
        raise ValueError(f"{path}: images must be uint8 (n, h, w) or (n, h, w, 3), got "
                         f"{described(images)}")
    if not need_masks:
        return images, None
    if masks is None or masks.dtype != np.uint8 or masks.shape != images.shape[:3]:
        raise ValueError(f"{path}: masks must be uint8 class ids {images.shape[:3]}, the size of "
                         f"the images, got {described(masks)}")
    check_face_ids(masks, path)
    return images, torch.from_numpy(masks)


def sides_reversed(masks, pairs, *, chunk=64):
    """Find masks in which the person's left and right are labelled the wrong way round.

    In a pair (left, right), left is the label of the person's own left, which is further right in
    the image. Each pair with both parts votes by their mean columns, and the majority decides. Of
    large masks every (w // 128)-th row and column is read.

    masks    (n, h, w) uint8
    returns  int8 array (n,): 1 reversed, 0 in order, -1 unknown (no pair is complete, or a tie)
    Check:   label 5 left of label 4 is in order for pairs ((4, 5),)
    """
    votes, counts = np.zeros(len(masks), dtype=int), np.zeros(len(masks), dtype=int)
    step = max(1, masks.shape[2] // 128)
    columns = torch.arange(0, masks.shape[2], step, dtype=torch.float64)

    def mean_column(part, label):
        """(n,), NaN where the label is absent."""
        pixels_of_column = (part == label).sum(1).double()
        return pixels_of_column @ columns / pixels_of_column.sum(1)

    for start in range(0, len(masks), chunk):
        rows = slice(start, start + chunk)
        part = masks[rows, ::step, ::step]
        for left, right in pairs:
            apart = mean_column(part, right) - mean_column(part, left)
            votes[rows] += apart.nan_to_num().sign().int().numpy()
            counts[rows] += (~apart.isnan()).numpy()
    return np.where((counts == 0) | (votes == 0), -1, votes > 0).astype(np.int8)


def synthetic_faces(n=200, *, size=(128, 128), seed=0):
    """Drawn faces and the class of each pixel: for running and teaching, never for a result.

    A face is a pile of ellipses. Place, size, tilt and turn of the head, every part, its colour,
    light and noise vary by face. Skin, nose, ears and neck have nearly one colour, hair and brows
    another; hat and background have any colour; both sides of a pair are painted alike. So place
    and shape separate the classes. Glasses, hats, jewellery, open mouths and ears are in a share of
    the images only. Parts narrower than a pixel of a small `size` are missing.

    returns  images uint8 tensor (n, 3, h, w), masks uint8 tensor (n, h, w) of ids in FACE_CLASSES,
             names: list of n str
    Check:   200 faces hold all 19 classes, one face 14 of them on average
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
    """The faces of one split: `batch(rows)` to train on, with masks to score by.

    images   uint8 (n, 3, h, w) and masks uint8 (n, H, W) or None, the whole set (never copied)
    rows     (m,), the rows of this split
    augment  {} or all of degrees, zoom, crop, flip ("swap", "naive", "none"), jitter, photometric,
             mixup, cutmix
    pairs    labels that change places when a face is mirrored
    wrong    bool (n,) or None: masks whose paired labels change places in augmented batches; masks
             that are scored stay as they are
    """

    chunk = 16

    def __init__(self, images, masks, rows, *, device="cpu", augment=None, pairs=(), wrong=None,
                 classes=19, names=None):
        self.images, self.masks, self.rows = images, masks, np.asarray(rows)
        self.names, self.wrong = names, wrong
        self.device, self.augment = torch.device(device), augment or {}
        self.pairs, self.classes = pairs, classes

    def __len__(self):
        return len(self.rows)

    def batch(self, rows, generator=None):
        """Gather rows of this split; augment them if a generator is given.

        inputs float (b, 3, h, w) in [-1, 1]; targets at that size: ids (b, h, w), after mixup
        probabilities (b, classes, h, w); without augmentation masks (b, H, W), the ids at their own
        size
        """
        index = torch.from_numpy(self.rows[rows])
        # index_select is much faster than images[index]
        images = self.images.index_select(0, index).to(self.device, non_blocking=True)
        if self.masks is None:
            return {"inputs": unit_range(images)}
        masks = self.masks.index_select(0, index).to(self.device, non_blocking=True)
        if generator is None or not self.augment:
            targets = resize_ids(masks, images.shape[2:]).long()
            return {"inputs": unit_range(images), "masks": masks, "targets": targets}
        if self.wrong is not None:
            wrong = torch.from_numpy(self.wrong[index.numpy()]).to(self.device)
            masks = torch.where(wrong[:, None, None], data.swap_labels(masks, self.pairs), masks)
        return self.augmented(images, masks, generator)

    def augmented(self, images, masks, generator):
        """inputs and targets after all of `augment`, in this order."""
        on = self.augment
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
        inputs, targets = unit_range(images), masks
        if on["mixup"]:
            targets = data.soft_targets(masks, self.classes)
            inputs, targets = data.mixup(inputs, targets, alpha=on["mixup"], generator=generator)
            # if one of the two pixels is ignored, the other counts
            total = targets.sum(1, keepdim=True)
            targets = targets / total.masked_fill(total == 0, 1)
        inputs, targets = data.cutmix(inputs, targets, alpha=on["cutmix"], generator=generator)
        return {"inputs": inputs, "targets": targets if on["mixup"] else targets.long()}


def relative_colours(images):
    """Colours in units of 255, less the mean colour of the middle of the image, which is skin.

        x / 255 - mean of x / 255 over the middle half of the rows and columns

    So lips are redder than the skin of the same person, in any light.

    images  uint8 (n, 3, h, w)  ->  float (n, 3, h, w)
    """
    x = images.float() / 255
    height, width = x.shape[2:]
    middle = x[:, :, height // 4 : height - height // 4, width // 4 : width - width // 4]
    return x - middle.mean((2, 3), keepdim=True)


def fit_colours(images, masks, rows, *, classes=19, prior=100.0):
    """Mean and covariance of relative_colours in each class, over every `step`-th training pixel.

    `prior` pixels that are distributed as those of all classes together are added to every class:
    a rare or absent class has a wide Gaussian then, not a narrow one. 1e-4 is added to the
    variances, so that grey images have a covariance with an inverse.

    images   uint8 (n, 3, h, w); masks uint8 (n, H, W), 255 is ignored; rows (m,)
    returns  {"mean": [C][3], "covariance": [C][3][3]}, plain lists for a checkpoint
    Check:   a class that no mask holds has the mean of all pixels
    """
    step = max(1, min(images.shape[2:]) // 64)  # about 64 x 64 pixels of an image
    count, total, products = (torch.zeros(classes, *shape, dtype=torch.float64)
                              for shape in ((), (3,), (3, 3)))
    for part in np.array_split(rows, math.ceil(len(rows) / 64)):
        index = torch.from_numpy(part)
        ids = resize_ids(masks.index_select(0, index), images.shape[2:])[:, ::step, ::step]
        x = relative_colours(images.index_select(0, index))[:, :, ::step, ::step].movedim(1, 3)
        known = ids < classes
        x, ids = x[known].double(), ids[known].long()
        count.index_add_(0, ids, torch.ones(len(ids), dtype=torch.float64))
        total.index_add_(0, ids, x)
        products.index_add_(0, ids, x[:, :, None] * x[:, None])
    share = prior / count.sum()
    count, total, products = (sums + share * sums.sum(0) for sums in (count, total, products))
    mean = total / count[:, None]
    covariance = products / count[:, None, None] - mean[:, :, None] * mean[:, None]
    covariance += 1e-4 * torch.eye(3, dtype=torch.float64)
    return {"mean": mean.tolist(), "covariance": covariance.tolist()}


def colour_logits(images, fit):
    """Log density of the relative colour of each pixel under each class, up to a constant.

        -1/2 (x - mean)^T covariance^-1 (x - mean) - 1/2 ln det covariance

    images   uint8 (n, 3, h, w); fit of fit_colours
    returns  float (n, C, h, w)
    Check:   a colour at the mean of a class whose covariance is I has 0
    """
    covariance = torch.tensor(fit["covariance"], dtype=torch.float64)
    root = torch.linalg.cholesky(torch.linalg.inv(covariance)).float()
    x, planes = relative_colours(images), []
    for centre, factor in zip(torch.tensor(fit["mean"]), root):
        z = torch.einsum("nchw,cd->ndhw", x - centre[:, None, None], factor)
        planes.append(factor.diagonal().log().sum() - z.square().sum(1) / 2)
    return torch.stack(planes, 1)


def position_logits(counts, grid=32, prior=1.0):
    """Log share of each class at each place of a coarse grid: smooth, and small in a checkpoint.

    counts   (C, H, W): how many training masks hold class c at each pixel
    prior    masks that hold every class everywhere alike, so that nothing is impossible
    returns  float (C, grid, grid)
    Check:   without any mask all are log 1 / C
    """
    shares = F.interpolate(torch.as_tensor(counts, dtype=torch.float64)[None], (grid, grid),
                           mode="area")[0] + prior / len(counts)
    return (shares / shares.sum(0)).log().float()


def unit_range(images):
    """uint8 images as float in [-1, 1]."""
    return images.float().sub_(127.5).div_(127.5)


def resize_ids(masks, size):
    """Class ids (n, h, w) at another size, nearest."""
    return F.interpolate(masks[:, None], size, mode="nearest-exact")[:, 0]
