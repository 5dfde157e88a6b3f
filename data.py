"""Data: from files to augmented batches, without worker processes.

What is here
    splits and order     split_by_group, shuffled_batches, stratified_batches and the two samplers around them, bucketed_batches,
                         sampler_report
    files and cache      atomic_write, write_npy, decode_once, unpack_once: sets larger than memory
    eyes                 read_eyes (class folder, annotation.csv, .npz), synthetic_eyes, EyeSplit
    faces                read_faces (images/ and masks/, .npz), synthetic_faces, FACE_CLASSES, FACE_PAIRS, FACE_COLOURS,
                         sides_reversed, swap_labels, FaceSplit
    augmentation         horizontal_flip, color_jitter, photometric_distort, clahe, random_affine, random_crop, mixup, cutmix
    breathing and heart  read_bidmc, synthetic_ppg, Windows, bidmc_windows, bidmc_original, spectral_rate, quantisation_cost,
                         respiratory_signals, band_spectrum, time_stretch, ppg_inputs, PPGSplit
    labels               LabelScaler
    modalities           read_modalities (.npz), synthetic_modalities, channel_statistics, ModalSplit
    stays                read_stays (PhysioNet/CinC 2012), synthetic_stays, STAY_VARIABLES, pack_stays, gather_ranges, event_scaler,
                         scale_events, stay_statistics, StaySplit
    pictures             encode_png

A whole data set is one contiguous uint8 array, in memory or memory-mapped; a batch is gathered from it by an index array
and augmented as a batch on the device. The order is a pure function of (seed, epoch), so it needs no checkpoint.

Dimension key: b batch, c channel, h w space, n rows of the set, t samples of a signal.

    >>> labels = [0] * 90 + [1] * 10
    >>> [np.bincount(np.array(labels)[rows]).tolist() for rows in stratified_batches(labels, 25, seed=0, epoch=0)]
    [[13, 12], [12, 13], [13, 12], [12, 13]]
"""

import contextlib
import csv
import functools
import hashlib
import lzma
import math
import os
import re
import shutil
import struct
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
EYE_FOLDERS = {"closed": 0, "close": 0, "0": 0, "open": 1, "opened": 1, "1": 1}
BIDMC_HZ = 125  # samples per second of the PPG
RATE_BANDS = {"rr": (0.1, 0.6), "hr": (0.75, 2.5)}  # Hz: 6 to 36 breaths, 45 to 150 beats per minute
ORIGINAL_SPLIT = {"validation": (11, 19, 21, 23, 53), "test": (8, 15, 29, 39, 43, 52)}  # recording numbers, the rest trains


# ---------------------------------------------------------------------------------------------------------------------
# Splits and order


def split_by_group(groups, shares, *, seed):
    """Split rows so that no group is on two sides: shuffle the groups, then cut their row counts at the shares.

    A group goes to the split in which the middle of its rows falls, so a share is met to within half a group.
    Rows without a group: pass `np.arange(n)`, every row is its own group (and leakage cannot be excluded).

    groups  (n,) any sortable values: one person, patient or face each
    shares  one number per split, each >= 0, sum 1; a share of 0 gives an empty split
    returns one sorted int64 index array per share
    Errors: ValueError if the shares do not add up to 1, or if a split with a share gets no group.
    Check:  split_by_group(np.arange(10), (0.8, 0.2), seed=0) gives 8 and 2 rows
    """
    shares = np.asarray(shares, dtype=np.float64)
    if not (shares >= 0).all() or abs(shares.sum() - 1) > 1e-6:
        raise ValueError(f"shares {shares.tolist()} must be at least 0 and add up to 1")
    _, group_of_row, counts = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(counts))
    middle = np.empty(len(counts))
    middle[order] = np.cumsum(counts[order]) - counts[order] / 2
    split_of_group = np.searchsorted(np.cumsum(shares)[:-1] * len(group_of_row), middle, side="right")
    splits = [np.flatnonzero(split_of_group[group_of_row] == k) for k in range(len(shares))]
    for k, rows in enumerate(splits):
        if shares[k] > 0 and len(rows) == 0:
            raise ValueError(f"split {k} with a share of {shares[k]:g} got none of the {len(counts)} groups: "
                             "raise its share, change the seed, or give groups that are smaller")
    return splits


def shuffled_batches(n, batch_size, *, seed, epoch, rank=0, world_size=1):
    """Every row once per epoch in an order fixed by (seed, epoch): a list of ceil(n // world_size / batch_size) index arrays.

    The last batch may be smaller. Each global batch is dealt to the ranks in turn, so ranks are disjoint and equal in
    length; of n rows, n % world_size are left out (others in the next epoch). With world_size 1 nothing is.

    Errors: ValueError for n < world_size or batch_size < 1. Warns when n is smaller than a batch (one partial batch).
    Check:  [len(rows) for rows in shuffled_batches(10, 4, seed=0, epoch=0)] == [4, 4, 2]
    """
    if batch_size < 1 or n < world_size:
        raise ValueError(f"batch_size {batch_size} must be at least 1, and {n} rows at least one per rank ({world_size})")
    if n < batch_size * world_size:
        warnings.warn(f"{n} rows are fewer than a batch of {batch_size * world_size}: one partial batch an epoch")
    order = np.random.default_rng([seed, epoch]).permutation(n)
    mine = order[: n - n % world_size][rank::world_size]
    return [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]


def stratified_batches(labels, batch_size, *, seed, epoch, rank=0, world_size=1):
    """Class-balanced batches: each class is a queue, reshuffled when it runs out; batches take from the queues in turn.

        slot s of the epoch holds class s % k, and the (s // k)-th row of that class's queue

    so every batch holds batch_size // k rows of each of the k classes, and the remainder is handed round in turn. An epoch
    is ceil(n / batch_size / world_size) full batches: rare classes repeat, frequent ones are not used up (all of them
    are, over the epochs). Every row of a class is used before one repeats, and a row repeats within a batch only if its
    class is smaller than its quota there. The batches of `world_size` ranks are the slices of one global draw.
    Balanced batches and class weights both correct the imbalance: use one of them.

    labels  (n,) integers, any values
    returns a list of int64 index arrays of batch_size rows (of n // world_size, with a warning, if that is less)
    Errors: ValueError for n < world_size or batch_size < 1.
    Check:  90 and 10 rows in batches of 25 hold 12 or 13 of each class, see the top of this file
    """
    labels = np.asarray(labels)
    n = len(labels)
    if batch_size < 1 or n < world_size:
        raise ValueError(f"batch_size {batch_size} must be at least 1, and {n} rows at least one per rank ({world_size})")
    if n < batch_size * world_size:
        warnings.warn(f"{n} rows are fewer than a batch of {batch_size * world_size}: one partial batch an epoch")
        batch_size = n // world_size
    global_batch = batch_size * world_size
    num_batches = -(-n // global_batch)
    rng = np.random.default_rng([seed, epoch])
    if labels.dtype.kind in "iu" and labels.min() >= 0 and labels.max() < 2**16:
        labels = labels.astype(np.uint16)  # of 16 bits, numpy's stable sort is a radix sort: five times faster
    order = np.argsort(labels, kind="stable")
    ordered = labels[order]
    rows_by_class = np.split(order, np.flatnonzero(ordered[1:] != ordered[:-1]) + 1)
    plan, k = np.empty(num_batches * global_batch, dtype=np.int64), len(rows_by_class)
    for c, rows in enumerate(rows_by_class):
        queue, filled = plan[c::k], 0  # a view: slot s of the plan is place s // k of its class's queue
        while filled < len(queue):
            again = rng.permutation(rows)
            # The batch that straddles the seam must not see a row twice: what it already holds goes to the end.
            first = max(-(-((c + filled * k) // global_batch * global_batch - c) // k), 0)
            if first < filled:
                again = again[: len(queue) - first]  # enough, even if all that the batch holds is among them
                seen = np.isin(again, queue[first:filled])
                again = np.concatenate([again[~seen], again[seen]])
            again = again[: len(queue) - filled]
            queue[filled : filled + len(again)] = again
            filled += len(again)
    return list(plan.reshape(num_batches, world_size, batch_size)[:, rank])


def bucketed_batches(lengths, batch_size, *, seed, epoch, rank=0, world_size=1, pool=16):
    """Every row once per epoch as shuffled_batches does, in batches of similar length, for less padding.

    Rows are shuffled and cut into pools of `pool` batches; each pool is sorted by length (ties stay shuffled) and cut into batches,
    and the order of the full batches is shuffled. Rows still meet others in every epoch: the pool is small against the set.
    A last smaller batch is cut off before the sorting, so that it holds rows of any length, and comes last.

    lengths  (n,) numbers, such as sets of a stay
    pool     batches that are sorted together: 1 is shuffled_batches in another order, n and more sorts the whole epoch
    returns  a list of int64 index arrays, as many as shuffled_batches; a global batch is dealt to the ranks in turn
    Errors: ValueError for n < world_size, batch_size < 1 or pool < 1. Warns when n is smaller than a batch (one partial batch).
    Check:  on the stays of set a (see read_stays), batches of 32 are padded to 1.08 times their sets, those of shuffled_batches
            to 1.76 times
    """
    lengths = np.asarray(lengths)
    n, global_batch = len(lengths), batch_size * world_size
    if batch_size < 1 or n < world_size:
        raise ValueError(f"batch_size {batch_size} must be at least 1, and {n} rows at least one per rank ({world_size})")
    if pool < 1:
        raise ValueError(f"pool {pool} must be at least 1 batch (1: no sorting, 16 is common)")
    if n < global_batch:
        warnings.warn(f"{n} rows are fewer than a batch of {global_batch}: one partial batch an epoch")
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(n)[: n - n % world_size]
    full = len(order) // global_batch
    body, rest = np.split(order, [full * global_batch])
    width = pool * global_batch
    pools = [body[start : start + width] for start in range(0, len(body), width)]
    ordered = [rows[np.argsort(lengths[rows], kind="stable")] for rows in pools]
    batches = np.concatenate([body[:0], *ordered]).reshape(full, global_batch)[rng.permutation(full)]
    return [rows[rank::world_size] for rows in (*batches, rest) if len(rows)]


class ShuffledBatchSampler(torch.utils.data.Sampler):
    """`shuffled_batches` as the batch_sampler of a DataLoader; set_epoch(epoch) before each epoch. Needs: shuffled_batches."""

    def __init__(self, n, batch_size, *, seed=0, rank=0, world_size=1):
        self.n, self.batch_size, self.epoch = n, batch_size, 0
        self.options = {"seed": seed, "rank": rank, "world_size": world_size}
        self.length = len(self.plan())

    def plan(self):
        return shuffled_batches(self.n, self.batch_size, epoch=self.epoch, **self.options)

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.length

    def __iter__(self):
        return (rows.tolist() for rows in self.plan())


class StratifiedBatchSampler(torch.utils.data.Sampler):
    """`stratified_batches` as the batch_sampler of a DataLoader; set_epoch(epoch) before each epoch. Needs: stratified_batches."""

    def __init__(self, labels, batch_size, *, seed=0, rank=0, world_size=1):
        self.labels, self.batch_size, self.epoch = labels, batch_size, 0
        self.options = {"seed": seed, "rank": rank, "world_size": world_size}
        self.length = len(self.plan())

    def plan(self):
        return stratified_batches(self.labels, self.batch_size, epoch=self.epoch, **self.options)

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.length

    def __iter__(self):
        return (rows.tolist() for rows in self.plan())


def sampler_report(batches, labels):
    """What the planned batches of an epoch are made of, counted over all of them: the first few cannot show the tail.

    batches  a list of index arrays, as the functions above return it; labels (n,) of any values
    returns  a dict
        batches, rows             planned batches, and rows in them
        class_counts              {class: its rows in the epoch}, 0 for a class that is never drawn
        largest_share             of the commonest class in the epoch; largest_batch_share the same in the worst batch
        classes_min, classes_mean distinct classes per batch
        single_class              batches of one class: nothing to contrast
        repeats                   rows that stand in their batch a second time, summed over batches
        never_drawn               rows of the set that are in no batch
    Errors: ValueError for no batches, or an empty one
    Check:  [[0, 1], [2, 2]] of labels a, b, b: classes_min 1, classes_mean 1.5, single_class 1, repeats 1, never_drawn 0
    """
    batches = [np.asarray(rows) for rows in batches]
    sizes = np.array([len(rows) for rows in batches])
    if not sizes.all() or not len(sizes):
        raise ValueError(f"{len(sizes)} batches, {(sizes == 0).sum()} of them empty: there is nothing to report on")
    values, inverse = np.unique(np.asarray(labels), return_inverse=True)
    counts = np.stack([np.bincount(inverse[rows], minlength=len(values)) for rows in batches])
    classes, total = (counts > 0).sum(1), counts.sum(0)
    return {
        "batches": len(batches), "rows": int(sizes.sum()), "class_counts": dict(zip(values.tolist(), total.tolist())),
        "largest_share": float(total.max() / total.sum()), "largest_batch_share": float((counts.max(1) / sizes).max()),
        "classes_min": int(classes.min()), "classes_mean": float(classes.mean()), "single_class": int((classes == 1).sum()),
        "repeats": int(sum(len(rows) - len(np.unique(rows)) for rows in batches)),
        "never_drawn": len(inverse) - len(np.unique(np.concatenate(batches)))}


# ---------------------------------------------------------------------------------------------------------------------
# Files and cache: what was decoded once lies in .npy files, which are memory-mapped


@contextlib.contextmanager
def atomic_write(path, mode="wb"):
    """A file to write to: under a temporary name beside path, moved there at the end.

    A reader sees the old file or the new one, never a half; an error leaves the old one.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_npy(path, dtype, row_shape, pieces):
    """Write arrays, one below the other, as one .npy file; only one of them is in memory at a time.

    It is written and not memory-mapped: a full disk is an OSError then, and otherwise a bus error,
    which ends the process.

    row_shape  shape of one row, () for numbers
    pieces     iterable of arrays (k, *row_shape), of any lengths k
    Check:     np.load gives the concatenated pieces, of the given type
    Needs:     atomic_write
    """
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (0, *row_shape)}
    rows = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for piece in pieces:
            file.write(np.ascontiguousarray(piece, dtype=dtype))
            rows += len(piece)
        file.seek(0)
        # numpy leaves room for a larger number of rows: this header is as long as the first
        np.lib.format.write_array_header_1_0(file, header | {"shape": (rows, *row_shape)})


def map_npy(path):
    """An .npy file, memory-mapped: a change of the array does not change the file."""
    return np.load(path, mmap_mode="c", allow_pickle=False)  # torch warns of read-only arrays ("r")


def file_stamps(files, root):
    """(name, size, time) of every file: a cache is kept as long as they stay the same."""
    for file in files:
        stat = file.stat()
        yield str(file.relative_to(root)), stat.st_size, stat.st_mtime_ns


def short_digest(parts):
    """16 characters that tell one sequence of values from another."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(part).encode())
    return digest.hexdigest()[:16]


def decode_once(load, shape, *, key, cache="", kind="eyes", chunk=256):
    """One uint8 tensor of this shape from load(start, stop), in pieces; with `cache` memory-mapped.

    key    iterable of values; a file in the folder `cache` belongs to one key, kind and shape
    Needs: map_npy, short_digest, write_npy
    """
    chunks = [slice(start, min(start + chunk, shape[0])) for start in range(0, shape[0], chunk)]
    if not cache:
        images = torch.empty(shape, dtype=torch.uint8)
        for rows in chunks:
            images[rows] = load(rows.start, rows.stop)
        return images
    file = Path(cache) / f"{kind}-{short_digest([shape, *key])}.npy"
    if file.exists():
        try:
            kept = map_npy(file)
            if kept.dtype == np.uint8 and kept.shape == tuple(shape):
                return torch.from_numpy(kept)
            problem = f"{kept.dtype} {kept.shape}"
        except (ValueError, OSError, EOFError) as error:
            problem = error
        warnings.warn(f"{file} cannot be read ({problem}): it is decoded again")
    write_npy(file, np.uint8, shape[1:], (load(rows.start, rows.stop).numpy() for rows in chunks))
    return torch.from_numpy(map_npy(file))


def unpack_once(path, name, cache):
    """Array `name` of an .npz file, unpacked into the folder `cache` and memory-mapped.

    Errors: ValueError for an array that is damaged or no plain numbers
    Needs:  atomic_write, file_stamps, map_npy, short_digest
    """
    file = Path(cache) / f"npz-{short_digest([name, *file_stamps([path], path.parent)])}.npy"
    try:
        with zipfile.ZipFile(path) as archive:
            member = archive.getinfo(f"{name}.npy")
            whole = file.exists() and file.stat().st_size == member.file_size
            if file.exists() and not whole:
                warnings.warn(f"{file} has not the size of {name!r} in {path}: unpacked again")
            if not whole:
                file.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as packed, atomic_write(file) as unpacked:
                    shutil.copyfileobj(packed, unpacked, 1 << 20)
        return map_npy(file)
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a readable .npz of plain arrays: {name!r} is damaged or "
                         f"holds objects ({error}): save it again with numpy.savez") from error


# ---------------------------------------------------------------------------------------------------------------------
# Eyes: one contiguous uint8 array, labels, groups, names


def read_eyes(path, *, size=(32, 64), cache="", need_labels=True):
    """Read a set of eye crops: a folder per class, a folder with annotation.csv, or an .npz; label 1 = open.

        folder/open/*.png, folder/closed/*.png          (also 1/ and 0/)
        folder/annotation.csv  rows `path,label`; optional groups.csv with rows `path,group`; no headers
        file.npz               images uint8 (n, h, w) or (n, h, w, 3), labels (n,) of 0 and 1, optional groups (n,)
        folder of images       only with need_labels=False, for prediction

    size    (height, width) every image is resized to (bilinear with antialiasing)
    cache   a folder: the images are kept there in .npy files and memory-mapped, decoded once
    returns images uint8 tensor (n, 3, h, w), labels int64 (n,) or None, groups (n,) str or None, names: list of n str
    Errors: ValueError naming the file or row for whatever is missing, unreadable, of a wrong shape, NaN, or not 0 / 1;
            ImportError with the install command when image files need Pillow and it is missing.
    Needs:  list_eye_files, read_eyes_npz, read_image, resize_uint8, decode_once, file_stamps
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist: give a folder of eye images or an .npz file")
    if path.is_file():
        arrays, labels, groups = read_eyes_npz(path, cache=cache, need_labels=need_labels)
        names = [f"{path.name}#{i}" for i in range(len(arrays))]
        load = lambda start, stop: resize_uint8(arrays[start:stop], size)
    else:
        names, labels, groups = list_eye_files(path, need_labels=need_labels)
        load = lambda start, stop: torch.cat([resize_uint8(read_image(path / name)[None], size) for name in names[start:stop]])
    files = [path] if path.is_file() else (path / name for name in names)
    key = file_stamps(files, path.parent)
    images = decode_once(load, (len(names), 3, *size), key=key, cache=cache)
    return images, labels, groups, names


def read_eyes_npz(path, *, cache="", need_labels=True):
    """images (n, h, w[, 3]) uint8, labels, groups of an .npz file, checked; see read_eyes.

    Needs: check_eye_labels, unpack_once
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            present = archive.files
            names = ("labels", "groups") if cache else ("images", "labels", "groups")
            arrays = {name: archive[name] for name in names if name in present}
    except (ValueError, OSError, EOFError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a readable .npz of plain arrays ({error}): save it with numpy.savez(path, "
                         "images=..., labels=...), no objects") from error
    if cache and "images" in present:
        arrays["images"] = unpack_once(path, "images", cache)
    for name in ("images", "labels") if need_labels else ("images",):
        if name not in arrays:
            raise ValueError(f"{path} has no array {name!r}, it holds {present}")
    images, labels, groups = (arrays.get(name) for name in ("images", "labels", "groups"))
    for name, array in arrays.items():
        if array.dtype.kind == "f" and np.isnan(array).any():
            raise ValueError(f"{path}: {name!r} holds {int(np.isnan(array).sum())} NaN: remove those rows")
        if array.ndim == 0 or len(array) != len(images) or array.ndim > 1 and name != "images":
            raise ValueError(f"{path}: {name!r} has shape {array.shape}, 'images' has {images.shape}: one entry per image")
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.ndim == 4 and images.shape[3] != 3 or 0 in images.shape:
        raise ValueError(f"{path}: 'images' is {images.dtype} {images.shape}, expected uint8 (n, h, w) or (n, h, w, 3)")
    if labels is not None:
        labels = check_eye_labels(labels, lambda row: f"{path}: row {row}")
    return images, labels, None if groups is None else groups.astype(str)


def list_eye_files(folder, *, need_labels=True):
    """names (relative paths), labels, groups of a folder of images; see read_eyes.

    Needs: IMAGE_SUFFIXES, EYE_FOLDERS, read_pairs, check_eye_labels
    """
    annotation = folder / "annotation.csv"
    if annotation.is_file():
        label_of = read_pairs(annotation)
        names = list(label_of)
        labels = check_eye_labels(list(label_of.values()), lambda row: f"{annotation}, {names[row]}")
    else:
        files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        names, labels = [file.relative_to(folder).as_posix() for file in files], None
        top = [Path(name).parts[0].lower() for name in names]
        if need_labels and names:
            unknown = sorted({part for part in top if part not in EYE_FOLDERS})
            if unknown:
                raise ValueError(f"{folder}: {unknown[0]!r} is no class folder; expected sub-folders named open and closed "
                                 "(or 1 and 0), or an annotation.csv with rows path,label")
            labels = np.array([EYE_FOLDERS[part] for part in top], dtype=np.int64)
    if not names:
        raise ValueError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)}) and no annotation.csv")
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} " + ("is listed in annotation.csv but does not exist" if annotation.is_file() else
                                                    "is no file, but a folder or a broken link: remove it"))
    groups = None
    if (folder / "groups.csv").is_file():
        group_of = read_pairs(folder / "groups.csv")
        missing = [name for name in names if name not in group_of]
        if missing:
            raise ValueError(f"{folder / 'groups.csv'} has no group for {len(missing)} of {len(names)} images, "
                             f"the first is {missing[0]}")
        groups = np.array([group_of[name] for name in names])
    return names, labels, groups


def read_pairs(path):
    """A two-column CSV without a header as {first: second}; ValueError with the line of whatever is not, or comes twice."""
    pairs = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # -sig: spreadsheets write a byte order mark
            rows = list(csv.reader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no CSV in UTF-8 ({error}): save it as such, and look for a stray quotation mark") from error
    for i, row in enumerate(rows, start=1):
        if not row:
            continue
        if len(row) != 2:
            raise ValueError(f"{path}, line {i}: expected 2 columns, got {len(row)}: {','.join(row)[:80]}")
        first, second = row[0].strip(), row[1].strip()
        if first in pairs:
            raise ValueError(f"{path}, line {i}: {first} is listed twice")
        pairs[first] = second
    return pairs


def check_eye_labels(labels, where):
    """Labels as int64, or ValueError with where(row) for the first that is not 0 (closed) or 1 (open)."""
    text = np.asarray(labels).astype(str)
    is_open, is_closed = np.isin(text, ("1", "1.0", "True")), np.isin(text, ("0", "0.0", "False"))
    bad = np.argwhere(~(is_open | is_closed))
    if text.ndim != 1 or len(bad):
        row = bad[0][0] if len(bad) else 0
        raise ValueError(f"{where(row)}: label {text[row]} is not 0 (closed) or 1 (open)")
    return is_open.astype(np.int64)


def read_image(path):
    """One image file as a uint8 array (h, w, 3). Needs Pillow; ValueError names a file that cannot be read."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("reading image files needs Pillow: pip install pillow (or pass an .npz)") from error
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"mode {image.mode}, 8 bits per channel are needed")  # converted to RGB it would be clipped to white
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a readable image ({error}): repair or remove it") from error


def resize_uint8(images, size):
    """uint8 images (n, h, w) or (n, h, w, 3) as a uint8 tensor (n, 3, *size), bilinear with antialiasing, rounded."""
    images = torch.from_numpy(np.ascontiguousarray(images))
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
    if images.shape[2:] != tuple(size):
        images = F.interpolate(images.float(), size=tuple(size), mode="bilinear", antialias=True).round().clamp(0, 255).byte()
    return images.expand(-1, 3, -1, -1).contiguous()


def synthetic_eyes(n=1000, *, size=(32, 64), seed=0, chunk=256):
    """Drawn eyes, 53 % open: two per face, alike in skin, light and iris. For running and teaching, never for a result.

    An open eye is a pale almond between two lids with an iris in it, often nearly shut; a closed one is a dark arc with
    lashes. Brightness, blur, noise, pose, brows and bars of hair vary alike in both, so no mean or histogram tells them apart.
    Returns like read_eyes: images uint8 (n, 3, h, w), labels (n,), groups (n,), names.
    Needs:  draw_eyes
    Check:  a constant scores F1 0.69 (always open: 2 * 0.53 / 1.53)
    """
    rng = np.random.default_rng(seed)
    faces = -(-n // 2)
    face_of_eye = np.arange(n) // 2
    is_open = rng.permutation(np.arange(faces) < round(0.53 * faces))[face_of_eye]
    face = {name: rng.uniform(low, high, faces)[face_of_eye] for name, (low, high) in {
        "skin": (70, 210), "warmth": (0.05, 0.3), "iris": (10, 110), "light": (-60, 60), "gain": (0.5, 1.2),
        "half_width": (0.5, 0.85), "height": (0.12, 0.6), "gaze": (-0.25, 0.25), "brow": (-1.4, -0.7)}.items()}
    eye = {name: rng.uniform(low, high, n) for name, (low, high) in {
        "dx": (-0.15, 0.15), "dy": (-0.25, 0.25), "tilt": (-0.3, 0.3), "sag": (0.0, 0.35), "bar": (-4, 1.5),
        "bar_slope": (-1, 1), "noise": (2, 14), "lash": (6, 14)}.items()}
    images = torch.empty((n, 3, *size), dtype=torch.uint8)
    for start in range(0, n, chunk):
        rows = slice(start, min(start + chunk, n))
        parameters = {name: values[rows, None, None] for name, values in (face | eye).items()}
        images[rows] = torch.from_numpy(draw_eyes(is_open[rows, None, None], parameters, size, rng))
    groups = np.array([f"face{i:05d}" for i in face_of_eye])
    names = [f"synthetic/{i:05d}_{'LR'[i % 2]}" for i in range(n)]
    return images, is_open.astype(np.int64), groups, names


def draw_eyes(is_open, p, size, rng):
    """Render one chunk for synthetic_eyes: is_open and every entry of p have shape (n, 1, 1); returns uint8 (n, 3, h, w)."""
    v, u = np.meshgrid(np.linspace(-1, 1, size[0]), np.linspace(-1, 1, size[1]), indexing="ij")
    x = (u - p["dx"]) + p["tilt"] * 0.5 * v
    y = (v - p["dy"]) - p["tilt"] * u
    soft = lambda distance: 1 / (1 + np.exp(np.clip(-distance * size[0] / 3, -30, 30)))  # 1 inside, blurred over ~3 pixels
    stroke = lambda distance, width: soft(width - np.abs(distance))
    arch = 1 - (x / p["half_width"]) ** 2
    upper, lower = np.where(is_open, -p["height"], p["sag"]) * arch, np.where(is_open, 0.6 * p["height"], p["sag"]) * arch
    inside = soft(np.minimum(y - upper, lower - y)) * is_open
    lid = stroke(y - upper, 0.07) * soft(arch * 0.5)
    lashes = stroke(y - upper - np.where(is_open, -0.1, 0.1), 0.12) * (np.sin(x * p["lash"] * 3) > 0.3) * soft(arch * 0.5)
    crease = stroke(y - upper + 0.3, 0.05) * soft(arch * 0.5)
    brow = stroke(y - p["brow"] - 0.2 * x**2, 0.16)
    bar = stroke(u - p["bar"] - p["bar_slope"] * v, 0.08)
    radius = np.hypot(x - p["gaze"], (y + 0.2 * p["height"]) * size[0] / size[1] * 1.6)
    grey = p["skin"] + p["light"] * u + 12 * np.sin(3 * v + p["tilt"] * 9)
    eyeball = p["skin"] * 0.4 + 120
    eyeball = eyeball + (p["iris"] - eyeball) * soft(0.26 - radius)
    eyeball = eyeball * (1 - soft(0.1 - radius)) + 90 * soft(0.05 - np.hypot(x - p["gaze"] - 0.06, y + 0.1))
    grey = grey + (eyeball - grey) * inside
    for ink, strength in ((lid, 0.75), (lashes, 0.4), (crease, 0.25), (brow, 0.6), (bar, 0.8)):
        grey = grey * (1 - strength * ink)
    warm = np.stack([1 + p["warmth"], np.ones_like(p["warmth"]), 1 - p["warmth"]], axis=1)
    rgb = 128 + (grey[:, None] * (warm + (1 - warm) * inside[:, None]) - 128) * p["gain"][:, None]
    return np.clip(rgb + rng.normal(size=rgb.shape) * p["noise"][:, None], 0, 255).astype(np.uint8)


class EyeSplit:
    """Some rows of a set of eyes as a training loop sees them: `labels` to plan batches by, `batch(rows)` to train on.

    images   uint8 (n, 3, h, w), the whole set (never copied); labels (n,) or None; rows (m,) of this split
    augment  {} or shares and strengths: flip, photometric, clahe, crop, mixup, cutmix; 0 is off
    Needs:   horizontal_flip, photometric_distort, clahe, random_crop, mixup, cutmix
    """

    def __init__(self, images, labels, rows, *, device="cpu", augment=None):
        self.images, self.rows = images, np.asarray(rows)
        self.labels = None if labels is None else labels[self.rows]
        self.device, self.augment = torch.device(device), augment or {}

    def __len__(self):
        return len(self.rows)

    def batch(self, rows, generator=None):
        """Gather rows of this split: inputs float (b, 3, h, w) in [-1, 1], targets float (b,). Augments if given a generator."""
        on = self.augment if generator is not None else {}
        # index_select copies image by image, images[rows] number by number: 15 times slower for bytes on CPU
        images = self.images.index_select(0, torch.from_numpy(self.rows[rows])).to(self.device, non_blocking=True)
        if on.get("crop"):
            images = random_crop(images, padding=on["crop"], generator=generator)
        if on.get("flip"):
            images = horizontal_flip(images, p=on["flip"], generator=generator)
        if on.get("photometric"):
            images = photometric_distort(images, p=on["photometric"], generator=generator)
        if on.get("clahe"):
            chosen = torch.rand(len(images), generator=generator) < on["clahe"]
            if chosen.any():
                images[chosen] = clahe(images[chosen])
        inputs = images.float().sub_(127.5).div_(127.5)
        if self.labels is None:
            return {"inputs": inputs}
        targets = torch.from_numpy(self.labels[rows]).float().to(self.device)
        if on.get("mixup"):
            inputs, targets = mixup(inputs, targets, alpha=on["mixup"], generator=generator)
        if on.get("cutmix"):
            inputs, targets = cutmix(inputs, targets, alpha=on["cutmix"], generator=generator)
        return {"inputs": inputs, "targets": targets}


# ---------------------------------------------------------------------------------------------------------------------
# Faces: one uint8 array of images, one of masks that hold a class id per pixel

FACE_CLASSES = ("background", "skin", "nose", "eye_g", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear", "mouth", "u_lip",
                "l_lip", "hair", "hat", "ear_r", "neck_l", "neck", "cloth")  # eye_g glasses, ear_r earring, neck_l necklace
FACE_PAIRS = ((4, 5), (6, 7), (8, 9))  # eyes, brows, ears: l_ is the person's left, on the RIGHT side of the image
FACE_COLOURS = ((0, 0, 0), (204, 0, 0), (76, 153, 0), (204, 204, 0), (51, 51, 255), (204, 0, 204), (0, 255, 255), (255, 204, 204),
                (102, 51, 0), (255, 0, 0), (102, 204, 0), (255, 255, 0), (0, 0, 153), (0, 0, 204), (255, 51, 153), (0, 204, 204),
                (0, 51, 0), (255, 153, 51), (0, 204, 0))  # RGB by class id, as CelebAMask-HQ is usually shown


def read_faces(path, *, size, cache=""):
    """Read a face-parsing set: a folder with images/ and masks/ of the same stems, or an .npz with `images` and `masks`.

        folder/images/*.jpg|png|...  RGB or grey            folder/masks/*.png  palette or grey, holding class ids
        file.npz                     images uint8 (n, h, w, 3) or (n, h, w), masks uint8 (n, h, w)

    An id is 0..18, or 255 for pixels that do not count. Images are resized to `size` (bilinear with antialiasing); masks are
    kept as they are, so that a prediction can be scored at their own resolution.

    cache   a folder: images and masks are kept there in .npy files and memory-mapped, decoded once
    returns images uint8 tensor (n, 3, *size), masks uint8 tensor (n, h, w), names: list of n str
    Errors: ValueError naming the file for an image without a mask or the reverse, another size than that of its image or of
            the other masks, an RGB mask, an id of 19 or more other than 255, a file that cannot be read; ImportError with the
            install command when image files need Pillow and it is missing.
    Needs:  IMAGE_SUFFIXES, list_face_files, read_faces_npz, read_image, read_mask, check_face_ids,
            resize_uint8, decode_once, file_stamps
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist: give a folder with images/ and masks/, or an .npz file")
    if path.is_file():
        arrays, masks = read_faces_npz(path, cache=cache)
        names = [f"{path.stem}-{i:05d}" for i in range(len(arrays))]

        def resized(start, stop):
            return resize_uint8(arrays[start:stop], size)

        key = file_stamps([path], path.parent)
        images = decode_once(resized, (len(names), 3, *size), key=key, cache=cache, kind="faces")
        return images, masks, names

    files, mask_files = list_face_files(path)
    load = lambda start, stop: torch.cat([resize_uint8(read_image(file)[None], size) for file in files[start:stop]])
    key = file_stamps(files, path)
    images = decode_once(load, (len(files), 3, *size), key=key, cache=cache, kind="faces", chunk=16)
    shape = read_mask(mask_files[0], files[0]).shape
    load = lambda start, stop: torch.stack([torch.from_numpy(read_mask(*pair, shape)) for pair in zip(
        mask_files[start:stop], files[start:stop])])
    key = file_stamps(mask_files + files, path)
    masks = decode_once(load, (len(files), *shape), key=key, cache=cache, kind="masks", chunk=16)
    return images, masks, [file.stem for file in files]


def list_face_files(folder, *, need_masks=True):
    """Image files of a face-parsing folder and their mask files (or None), by stem. ValueError for a stem that occurs once, or twice.

    Needs:  IMAGE_SUFFIXES
    """

    def listed(place, suffixes):
        files = {}
        for file in sorted(place.iterdir()):
            if file.suffix.lower() in suffixes and files.setdefault(file.stem, file) != file:
                raise ValueError(f"{file} and {files[file.stem].name} have the same stem: remove or rename one of them")
        return files

    place = folder / "images" if need_masks or (folder / "images").is_dir() else folder
    for each in [place] + [folder / "masks"] * need_masks:
        if not each.is_dir():
            raise ValueError(f"{each} does not exist: a face-parsing folder holds images/ and masks/ with files of the same stems")
    images = listed(place, IMAGE_SUFFIXES)
    if not images:
        raise ValueError(f"{place} holds no image files ({', '.join(IMAGE_SUFFIXES)})")
    if not need_masks:
        return list(images.values()), None
    masks = listed(folder / "masks", (".png",))
    for have, lack, what in (images, masks, "mask"), (masks, images, "image"):
        alone = [file for stem, file in have.items() if stem not in lack]
        if alone:
            raise ValueError(f"{alone[0]} has no {what} of the same stem, {len(alone)} of {len(have)} files are alone: add the "
                             f"{what}s, or take the files away")
    return list(images.values()), [masks[stem] for stem in images]


def read_mask(path, image=None, shape=None):
    """Class ids of a palette or grey PNG as uint8 (h, w), checked against its image file and the shape of the other masks.

    With Pillow; ValueError names a file that cannot be read, that is not palette or grey 8 bit (Pillow would stretch the ids of
    fewer bits to 0..255), or whose ids or size are wrong.
    Needs:  check_face_ids
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("reading image files needs Pillow: pip install pillow (or pass an .npz)") from error
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
        raise ValueError(f"{path} is not a readable mask ({error}): repair or remove it, and its image") from error
    if mode != "P" and (mode != "L" or bits != 8):
        raise ValueError(f"{path} is a {mode} image of {bits} bits: a mask is a palette or 8-bit grey PNG whose values are class ids, "
                         "not colours")
    if image_size != mask.shape[1::-1]:
        raise ValueError(f"{path} is {mask.shape[1]}x{mask.shape[0]} but its image is {image_size[0]}x{image_size[1]} (width x height): "
                         "a mask has the size of its image")
    if shape is not None and mask.shape != shape:
        raise ValueError(f"{path} is {mask.shape[1]}x{mask.shape[0]} but the first mask is {shape[1]}x{shape[0]} (width x height): all "
                         "masks of a set have one size; resize image and mask (nearest) beforehand")
    check_face_ids(mask, path)
    return mask


def check_face_ids(masks, where):
    """ValueError for an id other than 0..18 and 255."""
    # 64 at a time: masks that are memory-mapped may not fit into memory
    chunks = [masks[start : start + 64] for start in range(0, len(masks), 64)]
    wrong = np.concatenate([chunk[(chunk > 18) & (chunk != 255)] for chunk in chunks])
    if wrong.size:
        raise ValueError(f"{where}: class ids must be 0 to 18, or 255 for pixels that do not count; got {wrong.max()} in {wrong.size} "
                         "pixels")


def read_faces_npz(path, *, cache="", need_masks=True):
    """Images and masks (None without need_masks) of an .npz file, checked.

    Needs:  check_face_ids, unpack_once
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            present = [name for name in ("images", "masks") if name in file]
            content = {} if cache else {name: file[name] for name in present}
    except (OSError, ValueError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is not a readable .npz file ({error})") from error
    for name in present if cache else ():
        content[name] = unpack_once(path, name, cache)
    images, masks = content.get("images"), content.get("masks")
    if images is None or images.dtype != np.uint8 or images.ndim != 3 and images.shape[3:] != (3,) or 0 in images.shape:
        raise ValueError(f"{path}: images must be uint8 (n, h, w) or (n, h, w, 3), got "
                         f"{'none' if images is None else f'{images.dtype} {images.shape}'}")
    if not need_masks:
        return images, None
    if masks is None or masks.dtype != np.uint8 or masks.shape != images.shape[:3]:
        raise ValueError(f"{path}: masks must be uint8 class ids {images.shape[:3]}, the size of the images, got "
                         f"{'none' if masks is None else f'{masks.dtype} {masks.shape}'}")
    check_face_ids(masks, path)
    return images, torch.from_numpy(masks)


def sides_reversed(masks, pairs, *, chunk=64):
    """Which masks have the person's left and right labelled the wrong way round, told by where the parts lie.

    (left, right) are labels of the person's own left and right, and the left one lies further right in the image. Each pair
    whose two parts are there has a vote, by the mean column of either; a mask is reversed if most votes say so. Of large masks
    every (w // 128)-th row and column is looked at.

    masks   (n, h, w) uint8
    returns int8 array (n,): 1 reversed, 0 in order, -1 cannot be told (no pair is complete, or a tie)
    Check:  label 5 left of label 4 is in order for pairs ((4, 5),)
    """
    votes, counts = np.zeros(len(masks), dtype=int), np.zeros(len(masks), dtype=int)
    step = max(1, masks.shape[2] // 128)
    columns = torch.arange(0, masks.shape[2], step, dtype=torch.float64)
    for start in range(0, len(masks), chunk):
        part, rows = masks[start : start + chunk, ::step, ::step], slice(start, start + chunk)
        for left, right in pairs:
            sums = [(part == label).sum(1).double() for label in (left, right)]  # pixels of each column
            x_left, x_right = (each @ columns / each.sum(1) for each in sums)  # NaN where the part is absent
            apart = x_right - x_left
            votes[rows] += apart.nan_to_num().sign().int().numpy()
            counts[rows] += (~apart.isnan()).numpy()
    return np.where((counts == 0) | (votes == 0), -1, votes > 0).astype(np.int8)


def swap_labels(masks, pairs):
    """Masks with the two labels of every pair in each other's place; a label in no pair, such as 255, is kept.

    masks   any shape, integers in [0, 255]
    Errors: ValueError for a paired label outside [0, 255] or in two pairs
    Check:  twice is the identity
    """
    labels = [label for pair in pairs for label in pair]
    if len(set(labels)) < len(labels) or not all(0 <= label <= 255 for label in labels):
        raise ValueError(f"pairs {pairs} must hold labels in [0, 255], none of them twice")
    becomes = torch.arange(256)
    for left, right in pairs:
        becomes[left], becomes[right] = right, left
    return becomes.to(masks).index_select(0, masks.flatten().long()).view_as(masks)


def synthetic_faces(n=200, *, size=(128, 128), seed=0):
    """Drawn faces and the class of each pixel. For running and teaching, never for a result.

    A face is a pile of ellipses. Place, size, tilt and turn of the head, every part, its colour,
    light and noise vary by face. Skin, nose, ears and neck have nearly one colour, hair and brows
    another, any colour can be that of a hat or of the background, and both sides of a pair are
    painted alike: place and shape tell the classes apart. Glasses, hats, jewellery, open mouths and
    ears are in some images only. Parts narrower than a pixel of a small `size` are missing.

    returns images uint8 tensor (n, 3, h, w), masks uint8 tensor (n, h, w) of ids in FACE_CLASSES,
            names: list of n str
    Needs:  FACE_CLASSES
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
    """Some rows of a face-parsing set as a training loop sees them: `batch(rows)` to train on, with masks to score by.

    images  uint8 (n, 3, h, w), masks uint8 (n, H, W) or None, of the whole set (never copied); rows (m,) of this split
    augment {} or all of degrees, zoom, crop, flip ("swap", "naive", "none"), jitter, photometric, mixup, cutmix
    pairs   labels that change places when a face is mirrored
    wrong   (n,) bool or None: masks whose paired labels change places in augmented batches; what is scored keeps them
    Needs:  random_affine, affine, random_crop, horizontal_flip, swap_labels, color_jitter, photometric_distort, soft_targets, mixup, cutmix
    """

    def __init__(self, images, masks, rows, *, device="cpu", augment=None, pairs=(), wrong=None, classes=19):
        self.images, self.masks, self.rows, self.wrong = images, masks, np.asarray(rows), wrong
        self.device, self.augment, self.pairs, self.classes = torch.device(device), augment or {}, pairs, classes

    def __len__(self):
        return len(self.rows)

    def batch(self, rows, generator=None):
        """Gather rows: inputs float (b, 3, h, w) in [-1, 1], targets at the same size: ids (b, h, w), or after mixup probabilities.

        Not augmented without a generator, and then `masks` (b, H, W) holds the ids as they are, at their own resolution.
        """
        index = torch.from_numpy(self.rows[rows])
        images = self.images.index_select(0, index).to(self.device, non_blocking=True)  # much faster than images[index]
        masks = None if self.masks is None else self.masks.index_select(0, index).to(self.device, non_blocking=True)
        scale = lambda images: images.float().sub_(127.5).div_(127.5)
        if generator is None or not self.augment:
            batch = {"inputs": scale(images)}
            if masks is not None:
                batch |= {"masks": masks, "targets": F.interpolate(masks[:, None], images.shape[2:], mode="nearest-exact")[:, 0].long()}
            return batch
        on = self.augment
        if self.wrong is not None:
            wrong = torch.from_numpy(self.wrong[index.numpy()]).to(self.device)
            masks = torch.where(wrong[:, None, None], swap_labels(masks, self.pairs), masks)
        images, masks = random_affine(images, degrees=on["degrees"], zoom=on["zoom"], generator=generator, masks=masks)
        if on["crop"]:
            images, masks = random_crop(images, padding=on["crop"], generator=generator, masks=masks)
        if on["flip"] != "none":
            pairs = self.pairs if on["flip"] == "swap" else ()
            images, masks = horizontal_flip(images, generator=generator, masks=masks, pairs=pairs)
        if on["jitter"]:
            images = color_jitter(images, strength=on["jitter"], generator=generator)
        if on["photometric"]:
            images = photometric_distort(images, p=on["photometric"], generator=generator)
        inputs, targets = scale(images), masks
        if on["mixup"]:
            inputs, targets = mixup(inputs, soft_targets(masks, self.classes), alpha=on["mixup"], generator=generator)
            targets = targets / targets.sum(1, keepdim=True).clamp_min(1e-6)  # where one of the two is ignored, the other counts
        inputs, targets = cutmix(inputs, targets, alpha=on["cutmix"], generator=generator)
        return {"inputs": inputs, "targets": targets if on["mixup"] else targets.long()}


def soft_targets(masks, classes, *, ignore=255):
    """Class ids (b, h, w) as probabilities (b, classes, h, w): 1 at the id, and 0 for every class in an ignored pixel."""
    kept = (masks != ignore).unsqueeze(1)
    soft = torch.zeros(len(masks), classes, *masks.shape[1:], device=masks.device)
    return soft.scatter_(1, masks.unsqueeze(1).long().masked_fill(~kept, 0), kept.float())


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation: whole batches on the device they are on, every draw from a CPU generator, nothing in place but turn_hue_


def horizontal_flip(images, *, p=0.5, generator, masks=None, pairs=()):
    """Mirror each image left to right with probability p; its mask is mirrored too and left/right labels change places.

    A mirrored left eye is a right eye: without the swap, every paired class of a flipped image is labelled wrong.

    images  (B, ..., W) any dtype
    masks   (B, H, W) integers in [0, 255] or None; a label in no pair, such as the ignore value 255, is kept
    pairs   ((left, right), ...) labels that change places in a flipped mask
    returns images, or (images, masks) if masks were given
    Needs:  swap_labels
    Errors: ValueError for p outside [0, 1]; and with masks for a paired label outside [0, 255] or in two pairs
    Check:  p=1 twice is the identity, for images and masks
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p {p} must be in [0, 1]: it is the probability that an image is flipped")
    n = len(images)
    # Row i of the doubled batch is image i, row n + i its mirror image.
    pick = (torch.arange(n) + n * (torch.rand(n, generator=generator) < p)).to(images.device)
    flipped = torch.cat([images, images.flip(-1)]).index_select(0, pick)
    if masks is None:
        return flipped
    return flipped, torch.cat([masks, swap_labels(masks.flip(-1), pairs) if pairs else masks.flip(-1)]).index_select(0, pick)


def photometric_distort(images, *, p=0.5, generator):
    """Change brightness, contrast, saturation, hue and channel order of each image, each of the five by its own draw.

    One draw for all five would leave a share 1 - p of the images untouched; five leave (1 - p)^5, which is 3 % at 0.5.

    images  (B, 3, H, W) uint8 RGB
    returns the same shape, uint8
    Needs:  photometric_draw, photometric_apply, turn_hue_
    Errors: ValueError for p outside [0, 1], and for anything but uint8 RGB: distort first, normalise afterwards.
    Source: Liu et al. 2016 (SSD), arXiv:1512.02325; ranges and order of torchvision's v2.RandomPhotometricDistort
    Check:  p=0 returns equal values
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"photometric_distort needs uint8 RGB (B, 3, H, W), got {images.dtype} "
                         f"{tuple(images.shape)}: distort before you normalise, the limits are 0 and 255")
    settings = photometric_draw(len(images), p=p, generator=generator)
    step = 256 if images.device.type == "cpu" else max(len(images), 1)  # a CPU's cache holds some hundred small images
    chunks = [slice(i, i + step) for i in range(0, max(len(images), 1), step)]
    return torch.cat([photometric_apply(images[chunk], **{name: value[chunk] for name, value in settings.items()})
                      for chunk in chunks])


def color_jitter(images, *, strength, generator):
    """Multiply brightness, contrast and saturation of each image by its own U(1 - strength, 1 + strength), in this order.

    images  (B, 3, H, W) uint8 RGB  ->  the same
    Needs:  photometric_apply, turn_hue_
    Errors: ValueError for a strength outside [0, 1], for anything but uint8 RGB
    Source: torchvision's ColorJitter(strength, strength, strength), there in random order
    Check:  strength=0 returns equal values
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength {strength} must be in [0, 1]: a factor is at least 0")
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"color_jitter needs uint8 RGB (B, 3, H, W), got {images.dtype} {tuple(images.shape)}: jitter before you "
                         "normalise")
    n = len(images)
    brightness, contrast, saturation = torch.empty(3, n).uniform_(1 - strength, 1 + strength, generator=generator)
    return photometric_apply(images, brightness=brightness, contrast_before=contrast, saturation=saturation, hue=torch.zeros(n),
                             contrast_after=torch.ones(n), order=torch.arange(3).expand(n, 3))


def photometric_draw(n, *, p, generator):
    """Settings of n images, CPU tensors under the names photometric_apply gives them; what is not drawn is neutral.

    Each with probability p: brightness U(0.875, 1.125), contrast, saturation U(0.5, 1.5), hue U(-0.05, 0.05) of a full
    turn, a random order of the channels. A fair coin per image puts contrast before saturation or after hue.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p {p} must be in [0, 1]: it is the probability of each of the five changes")

    def draw(low, high, neutral):
        value = torch.empty(n).uniform_(low, high, generator=generator)
        return torch.where(torch.rand(n, generator=generator) < p, value, neutral)

    brightness, contrast = draw(0.875, 1.125, 1.0), draw(0.5, 1.5, 1.0)
    saturation, hue = draw(0.5, 1.5, 1.0), draw(-0.05, 0.05, 0.0)
    before = torch.rand(n, generator=generator) < 0.5
    order = torch.rand(n, 3, generator=generator).argsort(1)
    order = torch.where(torch.rand(n, 1, generator=generator) < p, order, torch.arange(3))
    return {"brightness": brightness, "contrast_before": torch.where(before, contrast, 1.0), "saturation": saturation,
            "hue": hue, "contrast_after": torch.where(before, 1.0, contrast), "order": order}


def photometric_apply(images, *, brightness, contrast_before, saturation, hue, contrast_after, order):
    """Distort uint8 RGB images by given settings: float32, every step clamped to [0, 255], rounded once at the end.

        brightness  f x                                 grey = 0.2989 R + 0.587 G + 0.114 B
        contrast    f x + (1 - f) mean(grey)            before saturation, or after hue
        saturation  f x + (1 - f) grey
        hue         turned by this part of a full turn
        order       channel c becomes what was channel order[c]

    (torchvision truncates to uint8 after brightness, contrast and saturation, each time half a grey level darker.)
    The dear steps are done where they were drawn: the images are sorted so that saturation is one slice, and hue another.

    images  (B, 3, H, W) uint8; settings (B,) floats and order (B, 3) integers, all of them on one device, any
    Needs:  turn_hue_
    """
    n, device = len(images), images.device
    kind = 2 * (hue != 0) + ((hue != 0) != (saturation != 1))  # 0 neither, 1 saturation, 2 both, 3 hue: each change is one slice
    rows = kind.argsort()
    first, both, last = kind.bincount(minlength=4).cumsum(0)[:3].tolist()  # where saturation begins, both begin, hue alone begins
    saturated, turned = slice(first, last), slice(both, n)
    brightness, contrast_before, saturation, hue, contrast_after = (
        setting[rows].to(device)[:, None, None] for setting in (brightness, contrast_before, saturation, hue, contrast_after))

    def blend(x, factor, other):  # changes x; torch.lerp is slower where `other` is one number per image
        grey = (0.2989 * other[0]).add_(other[1], alpha=0.587).add_(other[2], alpha=0.114)
        x.mul_(factor).add_(grey.mul_(1 - factor)).clamp_(0, 255)

    channels = torch.arange(3, device=rows.device)[:, None]
    source = (3 * rows + channels).to(device)  # (3, B): all the reds in their new order, then the greens, then the blues
    x = images.flatten(0, 1).index_select(0, source.flatten()).view(3, *images[:, 0].shape).float()
    x.mul_(brightness).clamp_(max=255)
    blend(x, contrast_before, x.mean((2, 3), keepdim=True))  # the grey of the means is the mean of the grey
    blend(x[:, saturated], saturation[saturated], x[:, saturated])
    turn_hue_(x[:, turned], hue[turned])
    blend(x, contrast_after, x.mean((2, 3), keepdim=True))
    x = x.round_().to(torch.int16).to(torch.uint8)  # float to uint8 in one go is several times slower on CPU
    planes = (order * n + rows.argsort()[:, None]).to(device)  # (B, 3): where the channels of each image are now
    return x.flatten(0, 1).index_select(0, planes.flatten()).view_as(images)


def turn_hue_(planes, turn):
    """Turn the hue in place by a part of the full circle and keep value (max) and chroma (max - min): RGB to HSV and back.

    In sixths of the circle times the chroma, with red at 0, green at 2, blue at -2; without a branch and without a division:

        hue = copysign(chroma + G + B - R - min, G - B) + 6 turn chroma
        channel = min + clamp(abs(abs(hue - centre chroma) - 3 chroma) - chroma, 0, chroma)    centre 0, 2, -2 for R, G, B

    The last line is the trapezoid that a channel follows: chroma up to one sixth from its centre, 0 from two sixths on.

    planes  (3, ...) float RGB of any scale
    turn    part of the full circle, |turn| <= 1/3, to broadcast with a plane
    Check:  red turned by 1/3 is green; grey stays grey
    """
    red, green, blue = planes
    low = torch.minimum(torch.minimum(red, green), blue)
    high = torch.maximum(torch.maximum(red, green), blue)
    chroma = high - low
    hue = torch.copysign((green + blue).sub_(red).sub_(low).add_(chroma), green - blue).add_(6 * turn * chroma)
    three, base = 3 * chroma, low - chroma
    for channel, centre in zip(planes, (0, 2, -2)):
        torch.sub(hue, chroma, alpha=centre, out=channel).abs_().sub_(three).abs_().add_(base)
        torch.clamp(channel, low, high, out=channel)
    return planes


def clahe(images, *, clip_limit=2.0, grid=(4, 4)):
    """Contrast-limited adaptive histogram equalisation: each tile by itself, bilinear between.

    A bin of a tile's histogram holds at most clip_limit times the mean, which bounds the gain in contrast; the rest is
    spread over all bins. Grey images are bit-equal to OpenCV's createCLAHE(clip_limit, (columns, rows)).apply(image).
    Colour images are equalised in the L of 8-bit Lab: bit-equal up to there, and after the way back to RGB at most one
    grey level off OpenCV but for 1 value in 100,000 (see lab_to_rgb).

    images      uint8, grey (H, W) or (B, H, W), or RGB (B, 3, H, W)
    clip_limit  0 = no limit
    grid        tiles as (rows, columns), where OpenCV's tileGridSize is (columns, rows)
    returns the same shape, uint8
    Needs:  clahe_axis, clahe_tables, rgb_to_lab, lab_to_rgb, lab_tables
    Errors: ValueError for anything but uint8 of these shapes, a clip_limit below 0 or not finite, an empty grid.
    Source: Zuiderveld 1994 (Graphics Gems IV) in the arithmetic of OpenCV's clahe.cpp
    """
    wrong = images.ndim not in (2, 3, 4) or images.ndim == 4 and images.shape[1] != 3 or 0 in images.shape[-2:]
    if images.dtype != torch.uint8 or wrong:
        raise ValueError(f"clahe needs uint8 (H, W), (B, H, W) or (B, 3, H, W), got {images.dtype} "
                         f"{tuple(images.shape)}: equalise before you normalise")
    if not 0 <= clip_limit < float("inf") or min(grid) < 1:
        raise ValueError(f"clip_limit {clip_limit} must be at least 0 (none) and finite, grid {grid} at least (1, 1)")
    if images.ndim == 4:
        lab = rgb_to_lab(images)
        lab[:, 0] = clahe(lab[:, 0], clip_limit=clip_limit, grid=grid)
        return lab_to_rgb(lab)
    (rows, columns), (height, width), device = grid, images.shape[-2:], images.device
    levels = images.reshape(-1, height, width).long()
    uneven = height % rows > 0 or width % columns > 0
    y, row, down = (part.to(device) for part in clahe_axis(height, rows, uneven))
    x, column, across = (part.to(device) for part in clahe_axis(width, columns, uneven))
    tiles = (levels[:, y[:, None], x] if uneven else levels).unflatten(1, (rows, -1)).unflatten(3, (columns, -1)).transpose(2, 3)
    tables = clahe_tables(tiles.flatten(3).flatten(0, 2), clip_limit).flatten()
    image = torch.arange(len(levels), device=device)[:, None, None]
    # (2, 2, B, H, W): each pixel's new level in the tables of the four tiles about it, upper and lower, left and right
    tile = (image * rows + row[:, None, None, :, None]) * columns + column[:, None, None]
    upper_left, upper_right, lower_left, lower_right = tables.index_select(0, (256 * tile + levels).flatten()).view(4, *levels.shape)
    upper = upper_left * (1 - across) + upper_right * across
    lower = lower_left * (1 - across) + lower_right * across
    down = down[:, None]
    return (upper * (1 - down) + lower * down).round().to(torch.uint8).view_as(images)


@functools.cache
def clahe_axis(size, tiles, uneven):
    """One side of an image for clahe: where its padded pixels come from, and between which two tiles each pixel lies.

    If any side is not a multiple of its tiles (uneven), OpenCV pads both: one that is grows by one pixel per tile.

    returns source (padded size,), tiles (2, size), weight of the second tile (size,) float32; kept, so not to be changed
    Check:  the sources of 3 pixels in 4 tiles are 0 1 2 1: mirrored without repeating the edge (reflect-101)
    """
    padded = size + (tiles - size % tiles if uneven else 0)
    period = 2 * (size - 1)
    source = torch.arange(padded) % max(period, 1)
    position = torch.arange(size, dtype=torch.float32) * (1 / (padded // tiles)) - 0.5
    first = position.floor()
    weight, first = position - first, first.long()
    return torch.minimum(source, period - source), torch.stack([first, first + 1]).clamp_(0, tiles - 1), weight


def clahe_tables(tiles, clip_limit):
    """The new level (n, 256) float32 of each old one: clipped cumulative histograms of n tiles (n, pixels) int64."""
    n, area = tiles.shape
    bins = torch.arange(256, device=tiles.device)
    tiles = tiles + 256 * torch.arange(n, device=tiles.device)[:, None]
    histogram = torch.bincount(tiles.flatten(), minlength=256 * n).view(n, 256)
    if clip_limit > 0:
        limit = max(int(clip_limit * area / 256), 1)
        excess = (histogram - limit).clamp(min=0).sum(1, keepdim=True)
        rest = excess % 256  # what an even share leaves over: one each to every step-th bin
        step = (256 // rest.clamp(min=1)).clamp(min=1)
        histogram = histogram.clamp(max=limit) + excess // 256 + ((bins % step == 0) & (bins < step * rest))
    return (histogram.cumsum(1).float() * (255 / area)).round()


def rgb_to_lab(images):
    """sRGB to 8-bit CIE Lab (D65), both uint8 (B, 3, H, W), in the fixed-point arithmetic of OpenCV's COLOR_RGB2LAB.

        L = 2.55 (116 f(Y) - 16)    a = 500 (f(X) - f(Y)) + 128    b = 200 (f(Y) - f(Z)) + 128    f: cube root

    Linear light is counted in 1/2040, the matrix in 1/2^12, f in 1/2^15. All 2^24 colours come out as OpenCV's. The
    formulas in float miss L by 1 here and there, of which an equalised histogram makes tens of grey levels.

    Needs:  lab_tables
    Check:  (255, 0, 0) becomes (136, 208, 195)
    """
    light, root, _ = (table.to(images.device) for table in lab_tables())
    look_up = lambda table, index: table.index_select(0, index.flatten()).view_as(index)  # faster than table[index] on CPU
    red, green, blue = look_up(light, images.int()).unbind(1)
    x = look_up(root, (1777 * red + 1541 * green + 778 * blue + 2**11) >> 12)  # sRGB to XYZ, white at 2^12
    y = look_up(root, (871 * red + 2929 * green + 296 * blue + 2**11) >> 12)
    z = look_up(root, (73 * red + 448 * green + 3575 * blue + 2**11) >> 12)
    lab = torch.stack([296 * y - 1336934, 500 * (x - y) + 2**22, 200 * (y - z) + 2**22], dim=1)
    return ((lab + 2**14) >> 15).to(torch.uint8)  # 296 = 1.16 * 255, 1336934 = 0.16 * 255 * 2^15, 2^22 = 128 * 2^15


@functools.cache
def lab_tables():
    """What rgb_to_lab and lab_to_rgb look up, on the CPU, kept: linear light (256,) in 1/2040 of the sRGB levels, f (3072,) in
    1/2^15 of the light; and the matrix float (3, 3) from XYZ over the white point to linear RGB."""
    level = torch.arange(256, dtype=torch.float64) / 255
    light = torch.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4)
    share = torch.arange(3072, dtype=torch.float64) / 2040
    root = torch.where(share < 0.008856, 7.787 * share + 16 / 116, share ** (1 / 3))
    to_xyz = torch.tensor([[0.412453, 0.35758, 0.180423], [0.212671, 0.71516, 0.072169], [0.019334, 0.119193, 0.950227]])
    to_rgb = torch.linalg.inv(to_xyz / to_xyz.sum(1, keepdim=True))
    return (light * 2040).round().int(), (root.float() * 2**15).round().int(), to_rgb


def lab_to_rgb(lab):
    """8-bit CIE Lab (D65) to sRGB, both uint8 (B, 3, H, W): formulas in float32, clipped to the sRGB gamut, rounded.

    Of the channels of all 2^24 Lab values 97.2 % equal OpenCV's COLOR_LAB2RGB, 2.8 % differ by 1, 0.001 % by 2 or 3.

    Needs:  lab_tables
    Check:  (136, 208, 195) becomes (255, 2, 1)
    """
    lightness, a, b = lab.transpose(0, 1).float().flatten(1)  # channels first: planes
    y = (lightness / 2.55 + 16) / 116
    f = torch.stack([y + (a - 128) / 500, y, y - (b - 128) / 200])
    xyz = torch.where(f > 6 / 29, f**3, (f - 16 / 116) / 7.787)
    to_rgb = lab_tables()[2].to(lab.device)
    with torch.autocast(lab.device.type, enabled=False):  # in half precision a third of the values would be off
        light = (to_rgb @ xyz).clamp_(0, 1)
    rgb = torch.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return (255 * rgb).round().to(torch.uint8).unflatten(1, lab[:, 0].shape).transpose(0, 1).contiguous()


def random_affine(images, *, degrees=15.0, zoom=1.25, generator, masks=None, fill_mask=255):
    """Turn each image about its centre by U(-degrees, degrees) and enlarge it by exp(U(-ln zoom, ln zoom)); its mask likewise.

    images  (B, C, H, W) uint8 or float
    masks   (B, h, w) integers, of any size: they come out in the size of the images
    returns images, or (images, masks) if masks were given, as `affine` makes them
    Needs:  affine
    Errors: ValueError for degrees outside [0, 180], zoom below 1
    Check:  degrees=0, zoom=1 is the identity for images and for masks of their size
    """
    if not 0 <= degrees <= 180 or not 1 <= zoom < float("inf"):
        raise ValueError(f"degrees {degrees} must be in [0, 180] (0 = off) and zoom {zoom} at least 1 (1 = off)")
    angle, size = torch.empty(2, len(images)).uniform_(-1, 1, generator=generator)
    return affine(images, angle * math.radians(degrees), (size * math.log(zoom)).exp(), masks=masks, fill_mask=fill_mask)


def affine(images, angle, scale, *, masks=None, fill_mask=255):
    """Turn and enlarge images about their centre; masks go through the same geometry with nearest sampling.

        source pixel of output pixel x = R(angle) x / scale, from the centre; a positive angle turns counter-clockwise

    What lies outside is the image mirrored at its edge, and fill_mask in a mask: mirrored pixels are not graded.

    images  (B, C, H, W) uint8 (rounded at the end) or float; bilinear
    angle, scale (B,) in radians, and as a factor
    masks   (B, h, w) integers of any size: sampled once, straight into the size of the images
    returns images, or (images, masks) if masks were given
    Check:  angle pi / 2 on a square is torch.rot90
    """
    height, width = images.shape[2:]
    if not len(images):
        return images if masks is None else (images, masks.new_empty((0, height, width)))
    c, s = ((each / scale).float().to(images.device)[:, None, None] for each in (angle.cos(), angle.sin()))
    y, x = (torch.arange(n, device=images.device) - (n - 1) / 2 for n in (height, width))
    source_x, source_y = c * x - s * y[:, None], s * x + c * y[:, None]  # (B, H, W), pixels from the centre
    grid = torch.stack([source_x * (2 / width), source_y * (2 / height)], -1)
    turned = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    turned = turned.to(images.dtype) if images.is_floating_point() else turned.round_().to(torch.int32).to(images.dtype)
    if masks is None:
        return turned
    rows, columns = masks.shape[1:]
    column = ((source_x + width / 2) * (columns / width)).floor().long()
    row = ((source_y + height / 2) * (rows / height)).floor().long()
    outside = (column < 0) | (column >= columns) | (row < 0) | (row >= rows)
    source = (row.clamp(0, rows - 1) * columns + column.clamp(0, columns - 1)).flatten(1)
    return turned, masks.flatten(1).gather(1, source).view_as(outside).masked_fill(outside, fill_mask)


def random_crop(images, *, padding=4, generator, masks=None, fill_mask=255):
    """Move each image by up to `padding` pixels down or up and right or left: pad, then crop to the old size.

    What comes in at the edge is the image mirrored (reflect-101), not the zeros of the CIFAR recipe: a black bar is an
    edge that no photograph has. A mask gets `fill_mask` there: mirrored pixels are not graded.

    images  (B, C, H, W) any dtype
    masks   (B, H, W) or None; moves by the same whole pixels, so labels stay labels
    returns images, or (images, masks) if masks were given
    Errors: ValueError for a padding below 0 or not below the shorter side, which is all there is to mirror.
    Check:  padding=0 is the identity
    """
    n, channels, height, width = images.shape
    if not 0 <= padding < min(height, width):
        raise ValueError(f"padding {padding} must be at least 0 and below the shorter side, {min(height, width)}")
    down, right = torch.randint(-padding, padding + 1, (2, n, 1), generator=generator).to(images.device)
    y = torch.arange(height, device=images.device) - down
    x = torch.arange(width, device=images.device) - right
    mirror = lambda index, size: size - 1 - (size - 1 - index.abs()).abs()
    source = (mirror(y, height)[:, :, None] * width + mirror(x, width)[:, None, :]).flatten(1)
    cropped = images.flatten(2).gather(2, source[:, None].expand(-1, channels, -1)).view_as(images)
    if masks is None:
        return cropped
    inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
    return cropped, masks.flatten(1).gather(1, source).view_as(masks).masked_fill(~inside, fill_mask)


def mixup(inputs, targets, *, alpha, generator):
    """Blend each sample with another one and its target with the same weight; one weight per batch, Beta(alpha, alpha).

        x_i = lam x_i + (1 - lam) x_j        t_i = lam t_i + (1 - lam) t_j        j: a permutation of the batch

    The target is mixed for every lam: to keep the first label would call an i what is nine tenths j.

    inputs  (B, ...) float
    targets (B,), (B, C) or (B, C, H, W) float: probabilities or values, no class indices
    returns mixed inputs, mixed targets; the arguments themselves for alpha = 0 (off)
    Errors: ValueError for alpha below 0 or not finite, integer inputs or targets.
    Source: Zhang et al. 2018, arXiv:1710.09412
    """
    if not 0 <= alpha < float("inf"):
        raise ValueError(f"alpha {alpha} must be at least 0 (off) and finite")
    if not (inputs.is_floating_point() and targets.is_floating_point()):
        raise ValueError(f"mixup needs float inputs and targets, got {inputs.dtype} and {targets.dtype}: pass "
                         "inputs.float(), and for class indices F.one_hot(targets).float()")
    if alpha == 0:
        return inputs, targets
    seed = int(torch.randint(2**62, (), generator=generator))  # torch's own Beta takes no generator
    lam = np.random.default_rng(seed).beta(alpha, alpha)
    other = torch.randperm(len(inputs), generator=generator).to(inputs.device)
    return lam * inputs + (1 - lam) * inputs[other], lam * targets + (1 - lam) * targets[other]


def cutmix(inputs, targets, *, alpha, generator):
    """Paste a box of another sample into each one and mix the targets by the share of pixels that each really has.

    One box per batch: the shape of the image, 1 - Beta(alpha, alpha) of its area, its centre anywhere, cut off where it
    hangs over the edge. lam is counted after that, in whole pixels:

        lam = 1 - box_height box_width / (H W)        t_i = lam t_i + (1 - lam) t_j        j: a permutation of the batch

    inputs  (B, C, H, W) any dtype
    targets (B,) or (B, C) float; or masks (B, H, W) or (B, C, H, W) of any dtype, into which the box is pasted as well
    returns inputs, targets; the arguments themselves for alpha = 0 (off)
    Errors: ValueError for alpha below 0 or not finite, class indices, masks of another size.
    Source: Yun et al. 2019, arXiv:1905.04899
    """
    if not 0 <= alpha < float("inf"):
        raise ValueError(f"alpha {alpha} must be at least 0 (off) and finite")
    height, width = inputs.shape[-2:]
    is_mask = targets.ndim > 2
    fits = targets.shape[-2:] == (height, width) if is_mask else targets.is_floating_point()
    if not fits:
        raise ValueError(f"cutmix needs float targets (B,) or (B, C), or masks of {height}x{width}, got "
                         f"{targets.dtype} {tuple(targets.shape)}: for class indices pass F.one_hot(targets).float()")
    if alpha == 0:
        return inputs, targets
    seed = int(torch.randint(2**62, (), generator=generator))  # torch's own Beta takes no generator
    rng = np.random.default_rng(seed)
    side = (1 - rng.beta(alpha, alpha)) ** 0.5
    box_height, box_width = round(side * height), round(side * width)
    y, x = int(rng.integers(height)) - box_height // 2, int(rng.integers(width)) - box_width // 2
    top, bottom, left, right = max(y, 0), min(y + box_height, height), max(x, 0), min(x + box_width, width)
    box = (..., slice(top, bottom), slice(left, right))
    other = torch.randperm(len(inputs), generator=generator).to(inputs.device)
    mixed = inputs.clone()
    mixed[box] = inputs[box][other]
    if is_mask:
        targets = targets.clone()
        targets[box] = targets[box][other]
        return mixed, targets
    lam = 1 - (bottom - top) * (right - left) / (height * width)
    return mixed, lam * targets + (1 - lam) * targets[other]


# ---------------------------------------------------------------------------------------------------------------------
# Breathing and heart rate: recordings, windows, labels


def read_bidmc(folder, *, cache="", progress=None, need_labels=True):
    """Read PhysioNet's bidmc_csv folder as it is: a list of one dict per recording, in the order of their names.

        bidmc_NN_Signals.csv   the column PLETH, 125 per second        bidmc_NN_Breaths.csv   ann1 and ann2
        bidmc_NN_Numerics.csv  Time [s], HR and PULSE, 1 per second    bidmc_NN_Fix.txt       the patient

    Any .csv may be a .csv.xz. 53 recordings come from 46 patients: split by patient, never by
    recording.

    cache        a folder: what was parsed is kept there, parsed once per content of the files, and
                 the signals are memory-mapped
    progress     progress(text) is called before each recording that is parsed
    need_labels  False: the signals are enough; number, patient (the name of the recording where _Fix.txt is missing) and ppg
    returns   a list of dicts: number int, patient str, ppg float32 (t,), breaths and breaths_2 int64, the marks of the
              annotators (1-based samples, sorted, as they are otherwise), time, hr, pulse float64 (one a second, NaN = none)
    Errors: ValueError naming the file for whatever is missing, cut off, without a column, without a number, NaN in PLETH.
    Needs:  list_bidmc_files, read_bidmc_recording, short_digest, write_bidmc_cache,
            read_bidmc_cache
    """
    folder = Path(folder)
    files, names = list_bidmc_files(folder)

    def parse():
        for i, name in enumerate(names):
            if progress:
                progress(f"reading {name} ({i + 1} of {len(names)})")
            yield read_bidmc_recording(folder, name, need_labels=need_labels)

    if not cache:
        return list(parse())
    contents = [f"{file.name}:{hashlib.sha256(file.read_bytes()).hexdigest()}" for file in files]
    digest = short_digest([3, need_labels, *contents])  # raise the 3 when the parsing changes
    kept = Path(cache) / f"bidmc-{digest}.npz"
    if kept.exists():
        try:
            return read_bidmc_cache(kept)
        except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
            warnings.warn(f"{kept} cannot be read ({error}): the recordings are parsed again")
    try:
        write_bidmc_cache(kept, parse())
    except OSError as error:
        warnings.warn(f"the parsed recordings cannot be kept in {cache} ({error}): they are parsed "
                      "again, into memory")
        return list(parse())
    return read_bidmc_cache(kept)


def list_bidmc_files(folder):
    """The files of a BIDMC folder, and the names of its recordings, sorted."""
    files = sorted(Path(folder).glob("bidmc_[0-9]*_*"))
    names = sorted({file.name.rpartition("_")[0] for file in files})
    if not names:
        raise ValueError(f"{folder} holds no bidmc_NN_Signals.csv: give PhysioNet's folder bidmc_csv")
    return files, names


def write_bidmc_cache(file, recordings):
    """Write recordings one at a time: the signals end to end into an .npy, the rest into an .npz.

    Needs: atomic_write, write_npy
    """
    rest = {}

    def signals():
        for i, recording in enumerate(recordings):
            for field, value in recording.items():
                rest[f"{i}/{field}"] = len(value) if field == "ppg" else value
            yield recording["ppg"]

    write_npy(file.with_suffix(".ppg.npy"), np.float32, (), signals())
    with atomic_write(file) as stream:
        np.savez(stream, **rest)


def read_bidmc_cache(file):
    """The recordings of write_bidmc_cache, whose signals are memory-mapped. Needs: map_npy"""
    recordings, start = {}, 0
    with np.load(file, allow_pickle=False) as archive:
        for entry in archive.files:
            i, field = entry.split("/")
            value = archive[entry]
            recordings.setdefault(i, {})[field] = value if value.ndim else value.item()
    signals = np.asarray(map_npy(file.with_suffix(".ppg.npy")))
    for recording in recordings.values():
        stop = start + recording["ppg"]  # so far the number of samples
        recording["ppg"] = signals[start:stop]
        start = stop
    if start != len(signals):
        raise ValueError(f"{len(signals)} samples instead of {start}")
    return list(recordings.values())


def read_bidmc_recording(folder, name, *, need_labels=True):
    """The files of one recording, checked against each other; see read_bidmc. Needs: BIDMC_HZ, read_columns"""
    fix = folder / f"{name}_Fix.txt"
    patient = re.search(r"matched wdb ID: *(\w+)", fix.read_text(encoding="utf-8") if fix.is_file() else "")
    if not patient and need_labels:
        raise ValueError(f"{fix} is missing or has no line 'MIMIC II matched wdb ID: sNNNNN': no patient, no safe split")
    [ppg] = read_columns(folder / f"{name}_Signals.csv", ["PLETH"])
    if not np.isfinite(ppg).all():
        what = "NaN" if np.isnan(ppg).any() else "infinite values"
        raise ValueError(f"{folder / name}_Signals.csv: PLETH holds {(~np.isfinite(ppg)).sum()} {what} in {len(ppg)} rows: cut them "
                         "out or remove the recording")
    recording = {"number": int(name.partition("_")[2]), "patient": patient[1] if patient else name, "ppg": ppg.astype(np.float32)}
    if not need_labels:
        return recording
    time, hr, pulse = read_columns(folder / f"{name}_Numerics.csv", ["Time [s]", "HR", "PULSE"])
    breaths = read_columns(folder / f"{name}_Breaths.csv", [f"breaths ann{k} [signal sample no]" for k in (1, 2)])
    for column, values in {"Time [s]": time, "HR": hr, "PULSE": pulse}.items():
        if np.isinf(values).any():
            raise ValueError(f"{folder / name}_Numerics.csv: {column} holds {np.isinf(values).sum()} infinite values: empty those cells")
        if np.isnan(values).all():
            raise ValueError(f"{folder / name}_Numerics.csv: {column} holds no number: remove the recording")
    seconds, last = len(ppg) / BIDMC_HZ, np.nanmax(time)
    if abs(seconds - last) > 2:  # bidmc_23 starts and ends a second early
        raise ValueError(f"{folder / name}: the signals last {seconds:.1f} s, the numerics {last:.1f} s: one of the two "
                         "files is cut off, copy them again")
    timed = ~np.isnan(time)  # bidmc_01 has a last row without a time: the means of the columns
    first, second = (np.sort(marks[~np.isnan(marks)]).astype(np.int64) for marks in breaths)
    return recording | {"breaths": first, "breaths_2": second, "time": time[timed], "hr": hr[timed], "pulse": pulse[timed]}


def read_columns(path, names):
    """Columns of a CSV (or CSV.xz) by their stripped names, as float64 (len(names), rows); an empty cell is NaN.

    Errors: ValueError naming the file for a missing file or column, a short row, a cell that is no number, a cut-off .xz.
    """
    packed = path.with_name(path.name + ".xz")
    path = path if path.is_file() or not packed.is_file() else packed
    if not path.is_file():
        raise ValueError(f"{path} is missing (and so is {packed.name}): copy the whole folder bidmc_csv")
    try:
        with (lzma.open if path == packed else open)(path, "rt", encoding="utf-8-sig") as file:
            header = [name.strip() for name in file.readline().split(",")]
            absent = [name for name in names if name not in header]
            if absent:
                raise ValueError(f"no column {absent[0]!r} among {header}")
            columns = [header.index(name) for name in names]
            return np.loadtxt(file, delimiter=",", comments=None, usecols=columns, ndmin=2, encoding="utf-8",
                              converters=lambda cell: float(cell.strip() or "nan")).T
    except (ValueError, OSError, EOFError, lzma.LZMAError) as error:
        raise ValueError(f"{path} is cut off or no such table ({error}): copy it again") from error


class Windows:
    """Windows of recorded signals, cut when they are asked for: windows[rows] is a float32 tensor (b, t), len() their number.

    They overlap, and the signals may be memory-mapped: neither is ever copied as a whole.

    signals  list of float32 arrays (t_i,); of window k the signal index[k] from sample starts[k] on, for `length` samples
    reduce   each is given at a `reduce`-th of its rate, see reduce_rate
    Check:   Windows([np.arange(9.0)], [0, 0], [1, 5], 4)[[1]].tolist() == [[5, 6, 7, 8]]
    Needs:   reduce_rate
    """

    def __init__(self, signals, index, starts, length, *, reduce=1):
        self.signals, self.index, self.starts, self.length, self.reduce = signals, np.asarray(index), np.asarray(starts), length, reduce
        self.shape = (len(self.index), length // reduce)

    def __len__(self):
        return len(self.index)

    def __getitem__(self, rows):
        windows = np.empty((len(self.index[rows]), self.length), dtype=np.float32)
        for window, k, start in zip(windows, self.index[rows].tolist(), self.starts[rows].tolist()):
            window[:] = self.signals[k][start : start + self.length]
        return reduce_rate(torch.from_numpy(windows), self.reduce)


def bidmc_windows(recordings, *, rate, seconds=32.0, stride=4.0, reduce=1):
    """Labelled windows: breaths per minute from the intervals between breath marks, or the monitor's mean heart rate.

        rr = 60 (m - 1) / (t_last - t_first)    of annotator 1's m >= 4 marks inside; ceiling: annotator 2's
        hr = mean of HR inside, without NaN     ceiling: the mean of PULSE, the same monitor's rate from the PPG

    Windows without a label are left out, and so are, for rr, those that overlap more than 10 s without a mark.

    rate     "rr" or "hr"; None: every window, labels and ceiling NaN
    seconds  of a window; stride: seconds from one start to the next; reduce: factor by which the rate of its samples falls
    returns  a dict: inputs Windows, whose inputs[rows] is a float32 tensor (b, t), as recorded; labels and ceiling float64 (n,), per
             minute, ceiling NaN where there is none; groups str (n,), the patients; recording int (n,), an index; starts float64
             (n,), seconds
    Errors: ValueError for another rate, no length or stride, a window longer than a recording, no window with a label.
    Needs:  BIDMC_HZ, cut_windows, breath_rate
    """
    return cut_windows(recordings, rate, breath_rate, length=round(seconds * BIDMC_HZ), stride=round(stride * BIDMC_HZ), reduce=reduce)


def bidmc_original(recordings, *, rate, reduce=1):
    """The windows, labels and split of the original run: 10 s every 2 s, breaths counted, recordings held out.

        rr = 6 x marks of annotator 1 in [start, start + 1250), the 1-based marks taken as 0-based; hr as in bidmc_windows

    For comparison only: 60 % of the rr labels are exactly 18, so a constant 18 has a mean absolute error of 2.222
    (validation) and 2.352 (test); and patients of validation and test recordings are in training.

    returns windows as bidmc_windows does, and rows: a dict of index arrays train, validation, test
    Check:  9,912 / 1,180 / 1,416 windows; training labels 17.216 (sd 4.430) breaths, 88.12 (11.76) beats per minute
    Needs:  BIDMC_HZ, ORIGINAL_SPLIT, cut_windows, breath_count
    """
    windows = cut_windows(recordings, rate, breath_count, length=10 * BIDMC_HZ, stride=2 * BIDMC_HZ, reduce=reduce)
    numbers = np.array([recording["number"] for recording in recordings])[windows["recording"]]
    held_out = {name: np.isin(numbers, members) for name, members in ORIGINAL_SPLIT.items()}
    rows = {"train": ~(held_out["validation"] | held_out["test"])} | held_out
    return windows, {name: np.flatnonzero(chosen) for name, chosen in rows.items()}


def cut_windows(recordings, rate, breaths_to_rate, *, length, stride, reduce=1):
    """The windows of bidmc_windows and bidmc_original, which see; length and stride in samples.

    breaths_to_rate  (marks, starts, length, total length), all in samples -> breaths per minute like starts, NaN = no label
    Needs:  BIDMC_HZ, mean_inside, Windows
    """
    if rate not in ("rr", "hr", None):
        raise ValueError(f"rate {rate!r} must be 'rr' (breathing) or 'hr' (heart), or None for windows without labels")
    if length < 1 or stride < 1:
        raise ValueError(f"windows of {length} samples every {stride}: both must be at least 1, {BIDMC_HZ} are a second")
    seconds, parts = length / BIDMC_HZ, []
    for index, recording in enumerate(recordings):
        ppg = recording["ppg"]
        if len(ppg) < length:
            raise ValueError(f"recording {recording['number']} lasts {len(ppg) / BIDMC_HZ:.1f} s, a window {seconds:g} s")
        starts = np.arange(0, len(ppg) - length + 1, stride)
        if rate == "rr":
            labels, ceiling = (breaths_to_rate(recording[name], starts, length, len(ppg)) for name in ("breaths", "breaths_2"))
        elif rate is None:
            labels = ceiling = np.full(len(starts), np.nan)
        else:
            time, since = recording["time"], starts / BIDMC_HZ
            labels, ceiling = (mean_inside(time, recording[name], since, seconds) for name in ("hr", "pulse"))
        keep = ~np.isnan(labels) | (rate is None)
        count = np.count_nonzero(keep)
        parts.append({"labels": labels[keep], "ceiling": ceiling[keep], "starts": starts[keep], "recording": np.full(count, index),
                      "groups": np.full(count, recording["patient"])})
    windows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if len(windows["labels"]) == 0:
        raise ValueError(f"no window of {seconds:g} s has a label: see bidmc_windows for which are left out")
    signals = [recording["ppg"] for recording in recordings]
    inputs = Windows(signals, windows["recording"], windows["starts"], length, reduce=reduce)
    return windows | {"inputs": inputs, "starts": windows["starts"] / BIDMC_HZ}


def breath_rate(marks, starts, length, total):
    """Breaths per minute (n,) from the intervals between the marks in each window; see bidmc_windows.

    A stretch of more than 10 s without a mark is missing annotation; start and end of a recording count as marks there.

    marks   1-based samples; starts (n,), length of a window and total of the recording in samples
    returns NaN for fewer than 4 marks and for a window that overlaps such a stretch
    Check:  marks every 500 samples are 15 per minute
    Needs:  BIDMC_HZ
    """
    marks = np.unique(marks) - 1  # a few marks stand twice
    edges = np.concatenate([[0], marks, [total]])
    gap = np.flatnonzero(np.diff(edges) > 10 * BIDMC_HZ)
    in_gap = ((edges[gap] < starts[:, None] + length) & (edges[gap + 1] > starts[:, None])).any(1)
    first, stop = np.searchsorted(marks, starts), np.searchsorted(marks, starts + length)
    known = (stop - first >= 4) & ~in_gap
    first, last = first[known], stop[known] - 1
    rates = np.full(len(starts), np.nan)
    rates[known] = 60 * BIDMC_HZ * (last - first) / (marks[last] - marks[first])
    return rates


def breath_count(marks, starts, length, total):
    """Breaths per minute (n,) as a count: the marks with start <= mark < start + length; see bidmc_original. Needs: BIDMC_HZ"""
    return 60 * BIDMC_HZ / length * (np.searchsorted(marks, starts + length) - np.searchsorted(marks, starts))


def mean_inside(time, values, starts, seconds):
    """Mean (n,) of the values with start <= time < start + seconds, without NaN; NaN where there is none."""
    since = time - starts[:, None]
    inside = (since >= 0) & (since < seconds) & ~np.isnan(values)
    count = inside.sum(1)
    return np.where(count > 0, inside @ np.nan_to_num(values) / np.maximum(count, 1), np.nan)


def standardise(windows):
    """Each window by itself to mean 0 and sd 1; a flat one becomes 0. The scale of a PPG says nothing: it is set per recording.

    windows (..., t) float tensor
    Check:  standardise(4 * x + 1) equals standardise(x)
    """
    windows = windows - windows[..., :1]  # so that a flat window is exactly 0, whatever its level
    windows = windows - windows.mean(-1, keepdim=True)
    sd = windows.square().mean(-1, keepdim=True).sqrt()
    return windows / torch.where(sd > 0, sd, 1)


def reduce_rate(windows, factor):
    """Windows (..., t) at a `factor`-th of their rate: the mean of each `factor` samples, a rest at the end is dropped.

    The mean is the low-pass. By 4, from 125 to 31.25 Hz, it keeps 99 % of an amplitude at 2 Hz and 95 % at 5.5 Hz, and what
    would come back as 2 Hz (29.25 Hz, where a PPG holds nothing) is left with 7 %.
    """
    return windows[..., : windows.shape[-1] // factor * factor].unflatten(-1, (-1, factor)).mean(-1)


def hann_power(x, rate_hz, frequencies):
    """Power of signals at any frequencies, under a Hann window: |sum_t hann(t) x(t) exp(-2 pi i f t)|^2.

    x (..., t) float tensor, rate_hz samples per second, frequencies float64 (k,) in Hz -> (..., k)
    """
    t = x.shape[-1]
    angle = 2 * torch.pi / rate_hz * torch.arange(t, dtype=torch.float64)[:, None] * frequencies
    x = x * torch.hann_window(t, periodic=False, dtype=x.dtype, device=x.device)
    return (x @ angle.cos().to(x)).square() + (x @ angle.sin().to(x)).square()


def spectral_rate(windows, rate_hz, band):
    """The classical estimate: where in the band the spectrum of a window is highest, per minute.

        power(f) = |sum_t hann(t) x(t) exp(-2 pi i f t)|^2    on a grid of 1 / (4 T), between its points a parabola in log power

    For hr the pulse itself; for rr the wander of the baseline with breathing.

    windows (n, t) float tensor of any scale; rate_hz samples per second; band (low, high) in Hz, as in RATE_BANDS
    returns (n,) inside the band; NaN for a flat window
    Errors: ValueError for a band that is empty, or not between 0 and half the rate.
    Check:  a sine of 0.3 Hz gives 18.0
    Needs:  standardise, hann_power
    """
    low, high = band
    if not 0 < low < high <= rate_hz / 2:
        raise ValueError(f"band {low:g} to {high:g} Hz must lie in order between 0 and half the rate, {rate_hz / 2:g} Hz")
    t = windows.shape[-1]
    step = rate_hz / t / 4
    grid = low + step * torch.arange(-1, round((high - low) / step) + 2, dtype=torch.float64)
    x = standardise(windows)
    power = hann_power(x, rate_hz, grid)
    peak = power[:, 1:-1].argmax(1, keepdim=True) + 1
    left, top, right = (power.log().gather(1, peak + k)[:, 0] for k in (-1, 0, 1))
    offset = ((left - right) / (2 * (left - 2 * top + right))).clamp(-0.5, 0.5)
    return (60 * (grid.to(x)[peak[:, 0]] + step * offset)).clamp(60 * low, 60 * high)


def respiratory_signals(windows, rate_hz):
    """The three ways in which breathing shows in a PPG, each as a signal over time.

        baseline   x, the window itself: breathing moves its level
        amplitude  |z|, the height of the pulse: breathing changes the stroke volume
        frequency  the turn of arg z from sample to sample, over 1 s: the pulse quickens as one breathes in

    with z the analytic signal of x in the band of the pulse, f0 +- 0.65 Hz around the strongest frequency f0 of the hr band.
    The turn is the angle of the mean of z(t + 1) conj z(t): weighted by the height of the pulse, so that the phase, which means
    nothing where the pulse fades, does not spike there.

    windows (n, t) float tensor of any scale, rate_hz samples per second -> (n, 3, t), each signal of mean 0 and sd 1
    A flat window gives zeros.
    Source: Charlton et al. 2018, IEEE Reviews in Biomedical Engineering 11 (baseline wander, amplitude and frequency modulation)
    Needs:  RATE_BANDS, standardise, spectral_rate
    """
    x = standardise(windows)
    pulse_hz = torch.nan_to_num(spectral_rate(x, rate_hz, RATE_BANDS["hr"]) / 60, nan=1.0)[:, None]
    frequency = torch.fft.fftfreq(x.shape[-1], 1 / rate_hz).to(x)
    in_band = (frequency - pulse_hz).abs() <= 0.65
    z = torch.fft.ifft(2 * torch.fft.fft(x) * in_band)
    turn = torch.view_as_real(z[:, 1:] * z[:, :-1].conj()).transpose(1, 2)
    second = 2 * round(rate_hz / 2) + 1  # odd, so that the mean is centred
    turn = F.avg_pool1d(F.pad(turn, (0, 1), mode="replicate"), second, stride=1, padding=second // 2, count_include_pad=False)
    turn = torch.atan2(turn[:, 1], turn[:, 0])
    return standardise(torch.stack([x, z.abs(), turn], 1))


def band_spectrum(signals, rate_hz, band, bins):
    """Where in a band the power of a signal lies: its log spectrum, free of phase and scale.

        power(f) = |sum_t hann(t) x(t) exp(-2 pi i f t)|^2        result: log(power / mean power of the band + 0.001)

    x is the signal without its mean and its straight-line trend, whose leakage would fill the low end of the band.

    signals (..., t) float tensor; rate_hz samples per second; band (low, high) in Hz; bins: frequencies, both ends among them
    returns (..., bins); log 0.001 everywhere for a flat signal
    Errors: ValueError for a band that is not between 0 and half the rate, or for fewer than 2 bins.
    Check:  a sine is largest at its own frequency
    Needs:  standardise, hann_power
    """
    low, high = band
    if not 0 <= low < high <= rate_hz / 2 or bins < 2:
        raise ValueError(f"band {low:g} to {high:g} Hz in {bins} bins must lie in order between 0 and half the rate, "
                         f"{rate_hz / 2:g} Hz, with at least 2 bins")
    t = signals.shape[-1]
    x, line = standardise(signals), torch.linspace(-1, 1, t).to(signals)
    x = x - (x @ line)[..., None] / line.square().sum() * line
    power = hann_power(x, rate_hz, torch.linspace(low, high, bins, dtype=torch.float64))
    mean = power.mean(-1, keepdim=True)
    return (power / torch.where(mean > 0, mean, 1) + 1e-3).log()


def time_stretch(windows, labels, *, limit, generator):
    """Play each window faster or slower, and scale its rate with it: the augmentation that makes an estimator of a rate.

        x'(t) = x(centre + s (t - centre)),  label' = s * label        log s uniform in [-log limit, log limit]

    Linear between samples; what a faster window lacks at its ends is mirrored. The label of a slowed window is still the mean
    of the whole of it, though only its middle is left.

    windows   (b, t) float tensor; labels (b,) rates, in any unit that is proportional to frequency (not yet z-scored)
    limit     >= 1; 1 is off
    generator a CPU torch.Generator; nothing is changed in place
    Errors: ValueError for a limit below 1, or of 2 and more (half of a window would be its mirror image).
    Source: Um et al. 2017, arXiv:1706.00527, where "time-warping" is smooth and the label stays
    Check:  a sine of 18 per minute that comes back with the label 15 has its spectral peak at 15
    """
    if not 1 <= limit < 2:
        raise ValueError(f"limit {limit:g} must be at least 1 (off) and below 2")
    b, t = windows.shape
    factor = torch.exp((2 * torch.rand(b, generator=generator) - 1) * math.log(limit)).to(windows)
    centre = (t - 1) / 2
    place = (torch.arange(t).to(windows) - centre) * factor[:, None] + centre
    place = (t - 1) - ((t - 1) - place.abs()).abs()  # mirrored at 0 and at t - 1
    left = place.floor().long().clamp(0, t - 2)
    ahead = windows.gather(1, left + 1)
    behind = windows.gather(1, left)
    return behind + (place - left) * (ahead - behind), labels * factor.to(labels.device)


def ppg_inputs(windows, rate_hz, *, kind, rate, bins=64):
    """What the encoder sees of a batch of windows: (n, t) -> (n, channels, length), one of two kinds.

        waveform   the window, standardised: 1 channel of t samples
        spectrum   log power in the band of the task, a quarter wider at both ends: hr 1 channel, the window's; rr 3 channels,
                   of the baseline, the amplitude and the frequency of the pulse

    The spectrum has no phase to overfit to: of some thirty patients, breathing was learnt from it and not from the waveform.

    Errors: ValueError for another kind or rate.
    Check:  4 * x + 1 gives what x gives, but for rounding
    Needs:  RATE_BANDS, standardise, respiratory_signals, spectral_rate, band_spectrum
    """
    if kind not in ("waveform", "spectrum") or rate not in RATE_BANDS:
        raise ValueError(f"kind {kind!r} and rate {rate!r} must be 'waveform' or 'spectrum', 'rr' or 'hr'")
    if kind == "waveform":
        return standardise(windows)[:, None]
    low, high = RATE_BANDS[rate]
    signals = respiratory_signals(windows, rate_hz) if rate == "rr" else windows[:, None]
    return band_spectrum(signals, rate_hz, (low / 1.25, high * 1.25), bins)


class PPGSplit:
    """Some rows of a set of PPG windows as a training loop sees them: `labels`, and `batch(rows)` to train on.

    windows   the dict of bidmc_windows, its inputs at any reduced rate (never copied as a whole); rows (m,) of this split
    prepare   (windows (b, t)) -> inputs of the network, such as ppg_inputs
    scaler    a fitted LabelScaler for the targets, or None for windows without labels
    stretch   limit of time_stretch, 1 is off
    features  set it to a tensor (m, width), and batches hold its rows instead of inputs: what a frozen encoder made of them
    Needs:    time_stretch
    """

    def __init__(self, windows, rows, prepare, *, scaler=None, stretch=1.0, device="cpu"):
        self.inputs, self.rows, self.prepare, self.scaler = windows["inputs"], np.asarray(rows), prepare, scaler
        self.labels, self.ceiling, self.groups = (windows[name][self.rows] for name in ("labels", "ceiling", "groups"))
        self.stretch, self.device, self.features = stretch, torch.device(device), None

    def __len__(self):
        return len(self.rows)

    def signals(self, rows):
        """The windows (b, t) of rows of this split, as recorded."""
        return self.inputs[self.rows[rows]].to(self.device, non_blocking=True)

    def batch(self, rows, generator=None):
        """inputs (b, c, n) or features (b, width), and targets float (b,), scaled. Stretches time if given a generator."""
        labels = torch.from_numpy(self.labels[rows])
        if self.features is not None:
            batch = {"features": self.features[torch.from_numpy(np.asarray(rows))]}
        else:
            windows = self.signals(rows)
            if generator is not None and self.stretch > 1:
                windows, labels = time_stretch(windows, labels, limit=self.stretch, generator=generator)
            batch = {"inputs": self.prepare(windows)}
        if self.scaler is None:
            return batch
        return batch | {"targets": self.scaler.transform(labels).float().to(self.device)}


def quantisation_cost(seconds):
    """What the true rate itself costs where labels are counts in T seconds: mean absolute errors per minute.

    Even events at a rate r, a window anywhere: it holds r T / 60 = k + f of them on average, 0 <= f < 1, which is k + 1 in
    a share f of the windows and k in the others. Predicting always

        k + f, the true rate        costs f (1 - f) + (1 - f) f = 2 f (1 - f) counts, over all f 1/3: 20 / T per minute
        the nearer of k and k + 1   costs min(f, 1 - f) counts, the least there is, over all f 1/4: 15 / T per minute

    returns (cost of the true rate, cost of its best rounding)
    Check:  quantisation_cost(10) == (2.0, 1.5)
    """
    return 20 / seconds, 15 / seconds


def synthetic_ppg(n_recordings=53, *, seconds=480, seed=0):
    """Made-up recordings as read_bidmc returns them, for running and teaching, never for a result.

    A pulse of three harmonics, modulated by breathing in baseline, amplitude and (by 2 %) frequency; both rates wander by
    8 %. Each recording has its own strength of noise, of drift and of each modulation, in some too weak for the baseline
    alone to tell the rate, and a scale of 0..1 or 0..4. Annotators miss a breath by 0.06 s (sd), PULSE misses HR by 1.
    Every fifth recording is of the same patient as the one before.

    Check:  recording i is the same for every n_recordings
    Needs:  BIDMC_HZ
    """
    t = np.arange(round(seconds * BIDMC_HZ) + 1) / BIDMC_HZ
    recordings = []
    for i in range(n_recordings):
        rng = np.random.default_rng([seed, i])
        wave = lambda period: np.sin(2 * np.pi * (t / period + rng.uniform()))
        breath_hz = rng.uniform(10, 25) / 60 * (1 + 0.08 * wave(rng.uniform(60, 240)))
        heart_hz = rng.uniform(60, 120) / 60 * (1 + 0.08 * wave(rng.uniform(60, 240)))
        breath = np.cumsum(breath_hz) / BIDMC_HZ + rng.uniform()  # in turns
        heart = 2 * np.pi * np.cumsum(heart_hz * (1 + 0.02 * np.sin(2 * np.pi * breath))) / BIDMC_HZ
        pulse = np.cos(heart) + 0.4 * np.cos(2 * heart - 1) + 0.1 * np.cos(3 * heart - 2)
        baseline, amplitude = (rng.uniform(low, high) * np.sin(2 * np.pi * (breath + rng.uniform()))
                               for low, high in ((0, 0.5), (0.05, 0.3)))
        noise = rng.uniform(0.05, 0.3) * rng.normal(size=len(t)) + rng.uniform(0, 0.6) * wave(rng.uniform(8, 40))
        ppg = (1 + amplitude) * pulse + baseline + noise
        ppg = rng.choice([1, 4]) * (ppg - ppg.min()) / np.ptp(ppg)
        mark = np.flatnonzero(np.diff(np.floor(breath))) + 1
        marks = [np.sort(np.clip(mark + rng.normal(0, 0.06 * BIDMC_HZ, len(mark)).round(), 0, len(t) - 1)).astype(np.int64) + 1
                 for _ in range(2)]
        hr = 60 * heart_hz[::BIDMC_HZ]
        recordings.append({"number": i + 1, "patient": f"patient{i * 4 // 5:03d}", "ppg": ppg.astype(np.float32),
                           "breaths": marks[0], "breaths_2": marks[1], "time": t[::BIDMC_HZ], "hr": hr.round(),
                           "pulse": (hr + rng.normal(size=len(hr))).round()})
    return recordings


class LabelScaler:
    """Labels to mean 0 and sd 1 and back, with the mean and the sd of the training labels, in float64.

        transform(labels) = (labels - mean) / scale        inverse(predictions) = predictions * scale + mean

    Fit it on training rows only, save it with the weights, and score in the unit of the labels, after inverse: an error in
    that unit cannot be had from the loss. Constant labels have scale 1. Arrays and tensors keep their kind, device and type.

    Errors: ValueError for no labels, NaN or infinity in fit; RuntimeError for a scaler that was neither fitted nor loaded.
    Check:  fit([10, 20]) has mean 15 and scale 5
    """

    def __init__(self):
        self.mean = self.scale = None

    def fit(self, labels):
        labels = np.asarray(labels, dtype=np.float64)
        if labels.size == 0 or not np.isfinite(labels).all():
            raise ValueError(f"{labels.size} labels, {(~np.isfinite(labels)).sum()} of them NaN or infinite: leave out rows "
                             "without a label before fitting")
        self.mean = float(labels.mean())
        self.scale = float(labels.std()) if labels.min() < labels.max() else 1.0
        return self

    def transform(self, labels):
        self.check()
        return (labels - self.mean) / self.scale

    def inverse(self, predictions):
        self.check()
        return predictions * self.scale + self.mean

    def check(self):
        if self.mean is None:
            raise RuntimeError("LabelScaler has no mean yet: fit it on the training labels, or load its state")

    def state_dict(self):
        return {"mean": self.mean, "scale": self.scale}

    def load_state_dict(self, state):
        self.mean, self.scale = state["mean"], state["scale"]


# ---------------------------------------------------------------------------------------------------------------------
# Modalities: several arrays, one row of each per sample, and labels


def read_modalities(path, *, cache="", need_labels=True):
    """Read samples that several sensors saw: an .npz with one array per modality, as many as there are and of any names.

        NAME          (n, F) features, (n, T, C) sequences, (n, C, H, W) images or (n, T, C, H, W) videos; integers or floats
        present_NAME  optional, bool (n,): False where a sample lacks it; what NAME holds in those rows is never looked at
        labels        (n,) integers from 0, or strings, which are numbered in the order of label_names or else sorted
        label_names   optional, one string per class        groups  optional, (n,): the person or recording of each sample

    cache        a folder: the modalities are kept there in .npy files and memory-mapped
    need_labels  False: labels and label_names are not read, for prediction
    returns arrays {NAME: (n, ...)} in the types they have in the file, labels int64 (n,) or None, groups (n,) or None,
            label_names: list of str, present {NAME: bool (n,)}, all True where the file does not say
    Errors: ValueError naming array and row: a missing or unreadable file, objects, no modality, another rank or length, NaN
            or infinity in a present row, a row without any modality, labels that are missing, negative, not whole or without
            a name, a class of one sample. Warns of images that seem to have their channels last.
    Needs:  check_modalities, check_class_labels, unpack_once
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is no file: give an .npz with one array per modality, labels, and optionally label_names, groups")
    small = ("labels", "label_names", "groups")
    unread = () if need_labels else ("labels", "label_names")
    try:
        with np.load(path, allow_pickle=False) as archive:
            stored = [name for name in archive.files if name not in unread]
            read = {name: archive[name] for name in stored if not cache or name in small
                    or name.startswith("present_")}
    except (ValueError, OSError, EOFError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a readable .npz of plain arrays ({error}): save it with numpy.savez(path, "
                         "NAME=..., labels=...), no objects") from error
    content = {}
    for name in stored:
        content[name] = np.asarray(read[name] if name in read else unpack_once(path, name, cache))
    labels, names, groups = (content.pop(name, None) for name in ("labels", "label_names", "groups"))
    masks = {name: content.pop(name) for name in list(content) if name.startswith("present_")}
    if not content:
        raise ValueError(f"{path} holds no modality beside labels, label_names, groups and present_NAME: save one array for each")
    present = check_modalities(content, masks, path)
    rows = len(next(iter(content.values())))
    for name, array in {"labels": labels, "groups": groups}.items():
        if array is not None and array.shape != (rows,):
            raise ValueError(f"{path}: {name!r} has shape {array.shape}, the modalities have {rows} rows: one entry per row")
    if groups is not None and groups.dtype.kind == "f" and np.isnan(groups).any():
        raise ValueError(f"{path}: 'groups' is NaN in row {np.isnan(groups).argmax()}: each row needs a group, or leave groups out")
    if not need_labels:
        return content, None, groups, [], present
    if labels is None:
        raise ValueError(f"{path} has no array 'labels', it holds {[*content, *masks]}")
    labels, names = check_class_labels(labels, names, path)
    return content, labels, groups, names, present


def check_modalities(arrays, masks, where):
    """The present rows {name: bool (n,)} of modalities, by masks {present_name: bool (n,)}; see read_modalities for the checks."""
    first, rows = next((name, len(array) if array.ndim else 0) for name, array in arrays.items())
    for name, array in arrays.items():
        if array.dtype.kind not in "fiub" or array.dtype.itemsize > 8:
            raise ValueError(f"{where}: modality {name!r} is {array.dtype}, numbers of at most 64 bits are needed: convert it or "
                             "leave it out")
        if not 2 <= array.ndim <= 5 or 0 in array.shape:
            raise ValueError(f"{where}: modality {name!r} has shape {array.shape}, expected (n, F), (n, T, C), (n, C, H, W) or "
                             "(n, T, C, H, W), none of them 0; one number per row is array[:, None]")
        if array.ndim > 3 and array.shape[-1] in (1, 3, 4) and array.shape[-3] > 4:
            warnings.warn(f"{where}: modality {name!r} of shape {array.shape} is read as {array.shape[-3]} channels of "
                          f"{array.shape[-2]}x{array.shape[-1]}: if its channels come last, move them before height and width")
    for name, array in (arrays | masks).items():
        if array.shape[:1] != (rows,):
            raise ValueError(f"{where}: {name!r} has shape {array.shape}, {first!r} has {rows} rows: one entry per row in each")
    for name, mask in masks.items():
        if name.removeprefix("present_") not in arrays:
            raise ValueError(f"{where}: {name!r} belongs to no modality, there are {list(arrays)}")
        if mask.dtype != bool or mask.ndim != 1:
            raise ValueError(f"{where}: {name!r} is {mask.dtype} {mask.shape}, expected bool ({rows},): True where the row has it")
    present = {name: masks.get(f"present_{name}", np.ones(rows, dtype=bool)) for name in arrays}
    nothing = ~np.any(list(present.values()), axis=0)
    if nothing.any():
        raise ValueError(f"{where}: {nothing.sum()} rows have no modality at all, the first is {nothing.argmax()}: remove them")
    for name, array in arrays.items():
        parts = [array[start : start + 256] for start in range(0, rows, 256)] if array.dtype.kind == "f" else []
        wrong = np.concatenate([(~np.isfinite(part)).reshape(len(part), -1).sum(1) for part in parts] or [np.zeros(rows, int)])
        wrong *= present[name]
        if wrong.any():
            raise ValueError(f"{where}: modality {name!r} holds {wrong.sum()} NaN or infinite values, the first in row "
                             f"{(wrong > 0).argmax()}: remove those rows, or mark them False in 'present_{name}'")
    return present


def check_class_labels(labels, names, where):
    """Labels (n,), integers or strings, as int64, and the list of class names; see read_modalities for the checks.

    names  (k,) or None: the sorted strings, or the numbers from 0 as strings
    """
    text = labels.dtype.kind in "US"
    if not text and labels.dtype.kind not in "iub":
        raise ValueError(f"{where}: labels are {labels.dtype}, integers from 0 or strings are needed: convert them, if they are whole")
    if text:
        labels = np.char.strip(labels.astype(str))
        if np.isin(labels, ("", "nan")).any():
            raise ValueError(f"{where}: row {np.isin(labels, ('', 'nan')).argmax()} has no label: remove such rows, or name their class")
    elif labels.min() < 0:
        raise ValueError(f"{where}: row {(labels < 0).argmax()} has the label {labels[labels < 0][0]}: classes are numbered "
                         f"from 0; remove the {(labels < 0).sum()} rows without a class")
    elif names is None and labels.max() >= len(labels):
        raise ValueError(f"{where}: label {labels.max()} in {len(labels)} rows: number the classes from 0 without gaps, or save strings")
    if names is None:
        names = np.unique(labels) if text else np.arange(int(labels.max()) + 1)
    names = np.char.strip(names.astype(str)).reshape(-1).tolist()
    if len(set(names)) < len(names):
        raise ValueError(f"{where}: label_names {names} must differ from each other")
    number = {name: i for i, name in enumerate(names)}
    numbers = np.array([number.get(label, -1) for label in labels.tolist()]) if text else labels.astype(np.int64)
    unknown = (numbers < 0) | (numbers >= len(names))
    if unknown.any():
        raise ValueError(f"{where}: row {unknown.argmax()} has the label {labels[unknown.argmax()]}, which is none of the "
                         f"{len(names)} label_names {names}: name the class, or remove its {unknown.sum()} rows")
    alone = np.flatnonzero(np.bincount(numbers) == 1)
    if len(alone):
        raise ValueError(f"{where}: class {names[alone[0]]!r} has 1 sample, as have {len(alone)} of {len(names)} classes: none to "
                         "compare it with, drop it or merge it with another class")
    return numbers, names


def channel_statistics(array, rows, present=None, *, chunk=2**21):
    """Mean and standard deviation of each channel over some rows, to scale by: (x - mean) / sd.

    Give it the TRAINING rows only. In float64, `chunk` values at a time, so that a set of any size fits; two passes, since
    the mean of squares minus the square of the mean loses all digits where a mean is large.

    array   (n, F) or (n, T, C): the last axis holds the channels; (n, C, H, W) or (n, T, C, H, W): the third from the end
    rows    (m,) indices; present (n,) bool or None: of them, only the present rows count
    returns mean, sd: float64 tensors (channels,); sd 1 for a constant channel; mean 0 and sd 1 where no row is present
    Check:  channel_statistics(np.array([[1.0], [5.0]]), [0, 1]) is ([3], [2])
    """
    rows = np.asarray(rows, dtype=np.int64)
    rows = rows if present is None else rows[present[rows]]
    channels = array.shape[-1 if array.ndim < 4 else -3]
    if not len(rows):
        return torch.zeros(channels, dtype=torch.float64), torch.ones(channels, dtype=torch.float64)
    step = max(1, chunk // math.prod(array.shape[1:]))

    def parts():
        for start in range(0, len(rows), step):
            part = array[rows[start : start + step]].astype(np.float64)
            yield (part if part.ndim < 4 else np.moveaxis(part, -3, -1)).reshape(-1, channels)

    count, total, low, high = 0, 0.0, np.inf, -np.inf
    for part in parts():
        count, total = count + len(part), total + part.sum(0)
        low, high = np.minimum(low, part.min(0)), np.maximum(high, part.max(0))
    mean = total / count
    sd = np.sqrt(sum(np.square(part - mean).sum(0) for part in parts()) / count)
    return torch.from_numpy(mean), torch.from_numpy(np.where(high > low, sd, 1.0))  # of 0.1, rounding alone makes an sd of 1e-17


class ModalSplit:
    """Some rows of a set of modalities as a training loop sees them: `labels`, and `batch(rows)` to train on.

    arrays   {name: (n, ...)} of the whole set in any numeric type (never copied); labels (n,) or None; rows (m,) of this split
    present  {name: bool (n,)}: where False the inputs are 0, and the batch says so; a name that is not in it is always present
    scaler   {name: (mean, sd)} of channel_statistics over the training rows; None: values as they are
    features set it to {name: tensor (m, T, width)}, and batches hold its rows as `encoded` instead of these inputs: what frozen
             encoders made of them
    In batches with a generator, in units of the scaled values, 0 is off:
    noise    sd of Gaussian noise, added to every value
    scale    each modality of each row is multiplied by one factor from U(1 - scale, 1 + scale), its channels alike
    shift    sequences (n, T, C) are rolled by up to so many steps, all those of a row alike: streams of one rate stay in step
    Errors:  ValueError for noise or shift below 0, scale outside [0, 1)
    """

    def __init__(self, arrays, labels, rows, *, present=None, groups=None, scaler=None, noise=0.0, scale=0.0, shift=0, device="cpu"):
        if not (0 <= noise < float("inf") and 0 <= scale < 1 and 0 <= shift == int(shift)):
            raise ValueError(f"noise {noise} must be at least 0, scale {scale} in [0, 1), shift {shift} a whole number from 0; 0 is off")
        self.arrays, self.present, self.rows, self.scaler = arrays, present or {}, np.asarray(rows), scaler
        self.labels, self.groups = (None if each is None else np.asarray(each)[self.rows] for each in (labels, groups))
        self.noise, self.scale, self.shift, self.device, self.features = noise, scale, int(shift), torch.device(device), {}

    def __len__(self):
        return len(self.rows)

    def batch(self, rows, generator=None):
        """inputs {name: float32 (b, ...)}, encoded {name: (b, T, width)} of those in features, present {name: bool (b,)}, and with
        labels targets int64 (b,). Augments inputs if given a generator."""
        rows = np.asarray(rows)
        index = self.rows[rows]
        inputs = {name: self.scaled(name, index) for name in self.arrays if name not in self.features}
        present = {name: torch.from_numpy(self.present[name][index] if name in self.present else np.ones(len(index), dtype=bool)).to(
            self.device) for name in self.arrays}
        if generator is not None:
            inputs = self.augmented(inputs, generator)
        for name, x in inputs.items():
            x[~present[name]] = 0  # not times 0: an absent row may hold NaN
        encoded = {name: each[torch.from_numpy(rows)] for name, each in self.features.items()}
        batch = {"inputs": inputs, "encoded": encoded, "present": present}
        if self.labels is not None:
            batch["targets"] = torch.from_numpy(self.labels[rows]).long().to(self.device)
        return batch

    def scaled(self, name, index):
        """Rows of the whole set as float32 (b, ...), each channel by its mean and sd."""
        array = self.arrays[name]
        # float32 for all that fits into it; a clock of 1.7e9 s, float64, must lose its mean before it loses its digits
        x = torch.from_numpy(array[index].astype(np.result_type(array.dtype, np.float32))).to(self.device)
        if self.scaler is not None:
            mean, sd = (each.to(x).reshape(-1, *(1,) * (2 * (x.ndim > 3))) for each in self.scaler[name])
            x = (x - mean) / sd
        return x.float()

    def augmented(self, inputs, generator):
        """Scaled inputs after shift, scale and noise, in that order; nothing in place."""
        b = max(map(len, inputs.values()), default=0)
        steps = torch.randint(-self.shift, self.shift + 1, (b, 1), generator=generator).to(self.device)
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
    """Made-up samples of four modalities, returned as read_modalities does. For running and teaching, never for a result.

        video   uint8 (n, 4, 3, 16, 16)   a blob of which one colour blinks              sign  c % 3
        image   uint8 (n, 3, 24, 24)      a blob in which one colour is stronger               c // 3
        audio   float32 (n, 24, 16)       log spectrogram, a burst in one of three bands       (c + c // 3) % 3
        sensor  float32 (n, 64, 6)        a vibration in one of three pairs of channels        (c + 2 (c // 3)) % 3

    Which of the three it is, the sign, is all that class c decides: one modality tells groups of classes apart and no more, any
    two tell all of them (the nine points of the plane over the integers modulo 3; two points have one line in common).
    Some signs are too weak to be seen. Recordings of about 25 rows (`groups`) have their own brightness, gain and offset; the
    first class is twice as frequent as the last.

    classes  2 to 9; missing: the share of rows that lack one modality, whose values there are NaN or 0
    returns  arrays, labels, groups, label_names, present
    Errors:  ValueError for another number of classes, fewer than 4 rows per class, missing outside [0, 1]
    Needs:   draw_modalities
    Check:   recordings held out, ridge regression on mean and sd of each channel has an accuracy of 0.3 to 0.5 alone and 0.9 on all
             four, the commonest class 0.2; test_all.py computes it
    """
    if not 2 <= classes <= 9 or n < 4 * classes or not 0 <= missing <= 1:
        raise ValueError(f"classes {classes} must be 2 to 9, n {n} at least 4 per class, missing {missing} in [0, 1]")
    rng = np.random.default_rng(seed)
    shares = np.cumsum(np.linspace(2, 1, classes))
    labels = rng.permutation(np.searchsorted(shares / shares[-1], (np.arange(n) + 0.5) / n))
    recording = np.arange(n) * max(2, n // 25) // n
    line = labels // 3
    signs = {"video": labels % 3, "image": line, "audio": (labels + line) % 3, "sensor": (labels + 2 * line) % 3}
    arrays = draw_modalities(signs, recording, rng)
    lacks = np.where(rng.random(n) < missing, rng.integers(4, size=n), -1)
    present = {name: lacks != i for i, name in enumerate(arrays)}
    for name, array in arrays.items():
        array[~present[name]] = 0 if array.dtype == np.uint8 else np.nan
    groups = np.array([f"recording{i:03d}" for i in recording])
    return arrays, labels, groups, [f"class {c}" for c in range(classes)], present


def draw_modalities(signs, recording, rng):
    """The four arrays of synthetic_modalities, by the sign (n,) that each shows and the recording (n,) of each row."""
    n = len(recording)
    of_recording = lambda low, high: rng.uniform(low, high, recording.max() + 1)[recording]
    # (n, 3): how strongly each of the three places shows the sign, 0 but at its own
    strength = {name: np.eye(3)[sign] * rng.uniform(0, 1, n)[:, None] for name, sign in signs.items()}

    def blob(side, frames):
        """A soft spot (n, frames, side, side) that drifts over the frames."""
        start, step = rng.uniform(0.25, 0.75, (2, n, 1)), rng.uniform(-0.1, 0.1, (2, n, 1))
        y, x = (start + step * np.arange(frames))[..., None, None]
        row, column = np.arange(side)[:, None] / (side - 1), np.arange(side) / (side - 1)
        return np.exp(-((row - y) ** 2 + (column - x) ** 2) / 0.03)

    def camera(light, colour):
        """uint8 of the blob in its colours (n, frames, 3), on a grey ground, under the light of the recording."""
        grey, gain = of_recording(40, 110)[:, None, None, None, None], of_recording(0.6, 1.2)[:, None, None, None, None]
        picture = gain * (grey + 90 * light[:, :, None] * colour[..., None, None])
        return np.clip(picture + rng.normal(0, 12, picture.shape), 0, 255).astype(np.uint8)

    cast = rng.uniform(0.6, 1.2, (2, n, 1, 3))
    blink = np.array([1, -1, 1, -1])[:, None]
    video = camera(blob(16, 4), cast[0] * (1 + 0.9 * strength["video"][:, None] * blink))
    image = camera(blob(24, 1), cast[1] + strength["image"][:, None])[:, 0]
    time, band = np.arange(24)[:, None], np.arange(16)
    burst = np.exp(-((time - rng.uniform(4, 20, (n, 1, 1))) ** 2) / 18)
    in_band = np.exp(-((band - (np.array([3, 8, 13])[:, None] + rng.uniform(-1, 1, (n, 1, 1)))) ** 2) / 4)  # (n, 3, 16)
    audio = of_recording(-1, 1)[:, None, None] + of_recording(-0.1, 0.1)[:, None, None] * band + rng.normal(0, 1, (n, 24, 16))
    audio += 3 * burst * (strength["audio"][:, :, None] * in_band).sum(1)[:, None]
    wave = np.sin(2 * np.pi * (np.arange(64)[:, None] * rng.uniform(0.05, 0.2, (n, 1, 1)) + rng.uniform(size=(n, 1, 6))))
    loud = rng.uniform(0.2, 0.8, (n, 6)) + np.repeat(strength["sensor"], 2, axis=1)
    sensor = of_recording(0.5, 2)[:, None, None] * (wave * loud[:, None] + rng.normal(0, 0.3, (n, 64, 6)))
    sensor += np.stack([of_recording(-1, 1) for _ in range(6)], 1)[:, None]
    return {"video": video, "image": image, "audio": audio.astype(np.float32), "sensor": sensor.astype(np.float32)}


# ---------------------------------------------------------------------------------------------------------------------
# Stays: irregular clinical events

STAY_VARIABLES = (
    "Age", "Gender", "Height", "ICUType", "Weight",  # the first four, once at 00:00, are the descriptors
    "HR", "MAP", "SysABP", "DiasABP", "Urine", "NISysABP", "NIDiasABP", "NIMAP", "Temp", "GCS", "RespRate", "FiO2", "MechVent", "pH",
    "PaCO2", "PaO2", "HCT", "K", "Platelets", "Creatinine", "BUN", "HCO3", "Mg", "Na", "Glucose", "WBC", "SaO2", "Lactate", "Bilirubin",
    "AST", "ALT", "ALP", "Albumin", "TroponinT", "TroponinI", "Cholesterol")
STAY_MINUTES = 2880  # 48:00, the last minute of a stay that is read: what lies later tells of the outcome
STAY_LINE = re.compile(r"^([0-9]{1,4}):([0-5][0-9]),([^,\n]*),([^,_\n]*)$", re.MULTILINE)  # float() would read 1_0 as 10


def read_stays(path, *, cache="", need_outcomes=True):
    """Read the folder of the PhysioNet/CinC Challenge 2012 as it is: stays of sets of events, as compressed rows.

        set-?/<RecordID>.txt   Time,Parameter,Value: HH:MM since admission, one of STAY_VARIABLES (or RecordID), a number
        Outcomes-?.txt         beside it: RecordID, SAPS-I, SOFA, In-hospital_death; other columns are not read

    A set is all events of one minute of one stay. Of n stays, S sets and E events, stay i holds the sets
    first_set[i] : first_set[i + 1], and set j the events first_event[j] : first_event[j + 1].

    path           the folder that holds set-a (and set-b, ...) or one of those
    cache          a folder: what was parsed is kept there as one .npz, parsed once per content of the files
    need_outcomes  False: a set may lack its Outcomes-?.txt, and a bare folder of <RecordID>.txt will do; what outcomes there are
                   are read
    returns   a dict, stays by set, then RecordID; sets by minute; events by variable, then value
              ids int64 (n,), labels int64 (n,): 1 died in hospital, 0 did not, -1 unknown; first_set int64 (n + 1,)
              first_event int64 (S + 1,), minutes float32 (S,) since admission
              variables uint8 (E,) index into STAY_VARIABLES, values float32 (E,)
              severity {"SAPS-I", "SOFA": float64 (n,)}: scores of the first day, NaN where unknown (-1)
              left_out {reason: a count, or a list of short names}: everything that was not taken as it stands
    Left out: -1, which means not recorded; other negative values (Temp -17.8 is 0 F); what is later than 48:00; parameters that are
              unknown or empty, with or without a number; a variable with the same value twice in a minute, once; stays without
              any event; outcomes without a stay; files that are no <RecordID>.txt.
    Kept:     two values of a variable in one minute; descriptors, in one set with what is measured at 00:00; stays of descriptors
              only; stays without an outcome, with the label -1; values out of any range (a pH of 735), see event_scaler. Lines
              may be in any order, end in CRLF, and the last one may lack its end.
    Errors: ValueError naming file, line and remedy for a wrong header, a line that is cut off, a time or value that is no number (or
            NaN, or infinite), an outcome other than 0 and 1, a RecordID that is not that of the file or comes twice, a missing
            Outcomes-?.txt; or for a path without stays.
    Source: Silva et al. 2012, Computing in Cardiology 39:245; physionet.org/content/challenge-2012
    Check:  set a holds 4,000 stays, 554 died, 3 have descriptors only, and 24 temperatures are below 0
    Needs:  list_stays, parse_stays, atomic_write
    """
    files, outcomes, other = list_stays(path, need_outcomes=need_outcomes)
    if not cache:
        return parse_stays(files, outcomes, other)
    digest = hashlib.sha256(repr((1, other)).encode())  # 1: raise it when the parsing changes
    for file in (*files, *filter(None, outcomes.values())):
        digest.update(f"{file.parent.name}/{file.name}:{hashlib.sha256(file.read_bytes()).hexdigest()}".encode())
    kept = Path(cache) / f"stays-{digest.hexdigest()[:16]}.npz"
    if kept.exists():
        try:
            stays = {"severity": {}, "left_out": {}}
            with np.load(kept, allow_pickle=False) as archive:
                for entry in archive.files:
                    name, _, key = entry.partition("/")
                    if name == "left_out":
                        stays[name][key] = archive[entry].tolist()
                    elif key:
                        stays[name][key] = archive[entry]
                    else:
                        stays[name] = archive[entry]
            return {name: stays[name] for name in ("ids", "labels", "first_set", "first_event", "minutes", "variables", "values",
                                                   "severity", "left_out")}
        except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
            warnings.warn(f"{kept} cannot be read ({error}): the stays are parsed again")
    stays = parse_stays(files, outcomes, other)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(kept) as stream:
            nested = {f"{name}/{key}": value for name in ("severity", "left_out") for key, value in stays[name].items()}
            np.savez(stream, **nested, **{name: value for name, value in stays.items() if not isinstance(value, dict)})
    except OSError as error:
        warnings.warn(f"the parsed stays cannot be kept in {cache} ({error}): they will be parsed again")
    return stays


def list_stays(path, *, need_outcomes=True):
    """The files of read_stays: stays in their order, {folder of a set: its outcomes or None}, names of other files."""
    path = Path(path)
    folders = sorted(folder for folder in path.glob("set-?") if folder.is_dir())
    if not folders and path.is_dir():
        folders = [path]
    files, outcomes, other = [], {}, []
    for folder in folders:
        mine = [file for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")]
        stays = [file for file in mine if re.fullmatch(r"[0-9]{1,18}\.txt", file.name)]
        files += sorted(stays, key=lambda file: int(file.stem))
        other += sorted(f"{folder.name}/{file.name}" for file in set(mine) - set(stays))
        table = folder.parent / f"Outcomes-{folder.name[-1]}.txt"
        outcomes[folder] = table if re.fullmatch("set-.", folder.name) and table.is_file() else None
        if stays and need_outcomes and outcomes[folder] is None:
            if not re.fullmatch("set-.", folder.name):
                raise ValueError(f"{folder} holds stays but is no folder set-?: which Outcomes-?.txt is theirs cannot be told; move "
                                 "them into set-a, with Outcomes-a.txt beside it")
            raise ValueError(f"{table} is missing: copy it beside {folder.name}, or move {folder.name} away")
    if not files:
        raise ValueError(f"{path} holds no stays: give the folder with set-a/<RecordID>.txt and Outcomes-a.txt of the challenge")
    seen = {}
    for file in files:
        twin = seen.setdefault(int(file.stem), file)
        if twin is not file:
            raise ValueError(f"{twin} and {file} have the same RecordID: one stay must not be on two sides of a split, remove one")
    return files, outcomes, other


def parse_stays(files, outcomes, other=()):
    """What read_stays returns, from the files that list_stays found. Needs: STAY_VARIABLES, STAY_MINUTES, read_stay, read_outcomes,
    pack_stays"""
    unknown, events = {}, []
    for file in files:
        *columns, strange = read_stay(file)
        events.append(columns)
        for name in strange:
            unknown[name] = unknown.get(name, 0) + 1
    ids = np.array([int(file.stem) for file in files])
    owner = np.repeat(np.arange(len(files)), [len(columns[0]) for columns in events])
    minutes, variables, values = map(np.concatenate, zip(*events))
    missing, late = values == -1, minutes > STAY_MINUTES
    negative = (values < 0) & ~missing & ~late
    count_late = np.bincount(owner[late], minlength=len(ids))
    take = ~(missing | late | negative)
    has_events = np.bincount(owner[take], minlength=len(ids)) > 0
    owner_taken = (np.cumsum(has_events) - 1)[owner[take]]
    packed = pack_stays(owner_taken, minutes[take], variables[take], values[take])
    known = {}
    for table in filter(None, outcomes.values()):
        for record, line in read_outcomes(table).items():
            if record in known:
                raise ValueError(f"{table}: RecordID {record} has an outcome in another table too: remove one of the lines")
            known[record] = line
    labelled_set = np.array([outcomes.get(file.parent) is not None for file in files])
    with_line = np.array([record in known for record in ids.tolist()])
    lines = np.array([known.get(record, (-1, np.nan, np.nan)) for record in ids[has_events].tolist()], dtype=np.float64).reshape(-1, 3)
    left_out = {
        "not recorded (-1)": int((missing & ~late).sum()),
        "negative value": [f"{ids[owner[i]]} {STAY_VARIABLES[variables[i]]} {values[i]:g}" for i in np.flatnonzero(negative)],
        "later than 48:00": [f"{ids[i]} ({count_late[i]})" for i in np.flatnonzero(count_late)],
        "unknown parameter": [f"{name!r} ({count})" for name, count in sorted(unknown.items())],
        "same value twice in a minute": int(take.sum()) - len(packed["values"]),
        "stay without an event": [str(record) for record in ids[~has_events]],
        "stay without an outcome": [str(record) for record in ids[has_events & labelled_set & ~with_line]],
        "set without outcomes": [folder.name for folder, table in outcomes.items() if table is None],
        "outcome without a stay": [str(record) for record in sorted(known.keys() - set(ids.tolist()))],
        "file that is no stay": list(other)}
    if not has_events.any():
        raise ValueError(f"none of the {len(files)} stays from {files[0]} on holds an event: {left_out}")
    return {"ids": ids[has_events], "labels": lines[:, 0].astype(np.int64), **packed,
            "severity": {"SAPS-I": lines[:, 1].copy(), "SOFA": lines[:, 2].copy()},
            "left_out": {reason: what for reason, what in left_out.items() if what}}


def read_stay(file):
    """One <RecordID>.txt: minutes int64, variables uint8, values float64 of its events, and the other parameters' names, in the
    order of the file. Needs: STAY_VARIABLES, STAY_LINE"""
    text = file.read_bytes().decode("utf-8-sig", errors="replace").replace("\r\n", "\n")
    header, _, body = text.partition("\n")
    if header != "Time,Parameter,Value":
        raise ValueError(f"{file} line 1: {header[:80]!r} must be 'Time,Parameter,Value': copy the file again")
    body = body.rstrip("\n")
    code = {name: i for i, name in enumerate((*STAY_VARIABLES, "RecordID"))}
    cells = STAY_LINE.findall(body)
    try:
        if len(cells) != (body.count("\n") + 1 if body else 0):
            raise ValueError
        known = [cell for cell in cells if cell[2] in code]
        hours, minutes, names, values = zip(*known) if known else ((),) * 4
        minutes = 60 * np.array(list(map(int, hours)), dtype=np.int64) + np.array(list(map(int, minutes)), dtype=np.int64)
        variables = np.array([code[name] for name in names], dtype=np.uint8)
        values = np.array(list(map(float, values)), dtype=np.float64)
        if not (np.abs(values) < 3e38).all():  # NaN, infinite, or so once it is float32
            raise ValueError
    except ValueError:
        for number, line in enumerate(body.split("\n"), 2):
            found = STAY_LINE.fullmatch(line)
            try:
                good = found and (found[3] not in code or abs(float(found[4])) < 3e38)
            except ValueError:
                good = False
            if not good:
                raise ValueError(f"{file} line {number}: {line[:80]!r} must be HH:MM, a parameter and a finite number: the file is cut "
                                 "off or damaged, copy it again") from None
    is_id = variables == len(STAY_VARIABLES)
    for record in values[is_id]:
        if record != int(file.stem):
            raise ValueError(f"{file} says RecordID {record:.0f}: its name and its content are of two stays, copy it again")
    return minutes[~is_id], variables[~is_id], values[~is_id], [cell[2] for cell in cells if cell[2] not in code]


def read_outcomes(file):
    """{RecordID: (died 0 or 1, SAPS-I, SOFA)} of an Outcomes-?.txt, NaN for a score of -1; columns by their names.

    Errors: ValueError naming the file, line and remedy, see read_stays.
    """
    lines = file.read_bytes().decode("utf-8-sig", errors="replace").splitlines()
    header = [name.strip() for name in lines[0].split(",")] if lines else []
    names = ("RecordID", "In-hospital_death", "SAPS-I", "SOFA")
    if not set(names) <= set(header):
        raise ValueError(f"{file} line 1: columns {header} must hold {', '.join(names)}: copy the file again")
    table = {}
    for number, line in enumerate(lines[1:], 2):
        cells = [cell.strip() for cell in line.split(",")]
        if cells == [""]:
            continue
        record, died, *scores = [cells[header.index(name)] for name in names] if len(cells) == len(header) else [""] * 4
        if not record.isdecimal() or not all(re.fullmatch(r"-1|[0-9]+", score) for score in scores):
            raise ValueError(f"{file} line {number}: {line[:80]!r} must hold {len(header)} numbers: copy the file again")
        if died not in ("0", "1"):
            raise ValueError(f"{file} line {number}: In-hospital_death {died!r} must be 0 or 1: a stay whose outcome is not known has no "
                             "line, remove it")
        if int(record) in table:
            raise ValueError(f"{file} line {number}: RecordID {record} has a line already: remove one of them")
        table[int(record)] = (int(died), *(math.nan if score == "-1" else float(score) for score in scores))
    return table


def pack_stays(owner, minutes, variables, values):
    """Events in any order as the compressed rows of read_stays: sorted, and each (stay, minute, variable, value) once.

    owner  int (E,): 0 .. n - 1, the stay of each event; every stay has one
    Check: pack_stays([0, 0, 0], [5, 5, 2], [1, 1, 0], [7, 7, 9])["first_event"].tolist() == [0, 1, 2]
    """
    owner, minutes, variables, values = (np.asarray(each) for each in (owner, minutes, variables, values))
    values = values.astype(np.float32)
    order = np.lexsort((values, variables, minutes, owner))
    owner, minutes, variables, values = (each[order] for each in (owner, minutes, variables, values))
    differs = lambda each: np.concatenate([[True], each[1:] != each[:-1]])[: len(each)]
    opens_set = differs(owner) | differs(minutes)
    once = opens_set | differs(variables) | differs(values)
    sets = np.flatnonzero(opens_set)
    return {"first_set": np.searchsorted(owner[sets], np.arange(owner.max(initial=-1) + 2)).astype(np.int64),
            "first_event": np.append(np.flatnonzero(opens_set[once]), once.sum()).astype(np.int64),
            "minutes": minutes[sets].astype(np.float32), "variables": variables[once].astype(np.uint8), "values": values[once]}


def gather_ranges(first, rows):
    """The elements of some rows of compressed rows, one row after the other: of each r those from first[r] to first[r + 1].

    Check:  gather_ranges(np.array([0, 2, 2, 5]), [2, 0]).tolist() == [2, 3, 4, 0, 1]
    """
    first, rows = np.asarray(first), np.asarray(rows, dtype=np.int64)
    counts = first[rows + 1] - first[rows]
    before = np.cumsum(counts) - counts
    return np.arange(counts.sum()) + np.repeat(first[rows] - before, counts)


def event_scaler(stays, rows, *, tail=0.005):
    """Mean and sd of each variable over the events of the training stays, robust to slips of the pen.

        low, high = quantiles tail and 1 - tail of its values x;  mean, sd of clip(x, low, high)

    A pH of 735 among 7.35 would otherwise be the sd. A variable with one value has sd 1; one without any event in these
    stays has low = high = mean = 0 and sd 1, so that its z is 0 and not in raw units: it was seen, its size means nothing.

    stays    the dict of read_stays; rows (m,) of the training stays, of nothing else
    returns  {"mean", "sd", "low", "high": float64 (V,)}, V = len(STAY_VARIABLES)
    Errors:  ValueError for no rows, or tail outside [0, 0.5)
    Check:   of 7.3 and 7.5, 500 times each, and one 735 the sd is 0.1, and 23 with tail 0
    Needs:   STAY_VARIABLES, gather_ranges
    """
    if not 0 <= tail < 0.5 or len(rows) == 0:
        raise ValueError(f"tail {tail:g} must be at least 0 (no clipping) and below 0.5, and {len(rows)} stays at least 1")
    events = gather_ranges(stays["first_event"][stays["first_set"]], rows)
    variables, values = stays["variables"][events], stays["values"][events].astype(np.float64)
    order = np.argsort(variables, kind="stable")
    bounds = np.searchsorted(variables[order], np.arange(len(STAY_VARIABLES) + 1))
    scaler = {name: np.full(len(STAY_VARIABLES), float(name == "sd")) for name in ("mean", "sd", "low", "high")}
    for v in range(len(STAY_VARIABLES)):
        x = values[order[bounds[v] : bounds[v + 1]]]
        if len(x):
            low, high = np.quantile(x, (tail, 1 - tail))
            x = x.clip(low, high)
            scaler["low"][v], scaler["high"][v], scaler["mean"][v] = low, high, x.mean()
            scaler["sd"][v] = x.std() if x.min() < x.max() else 1.0
    return scaler


def scale_events(variables, values, scaler):
    """z = (clip(x, low, high) - mean) / sd, each event by its variable, as float32; see event_scaler.

    Check:  an event of a variable that no training stay had is 0
    """
    low, high, mean, sd = (np.asarray(scaler[name], dtype=np.float64)[variables] for name in ("low", "high", "mean", "sd"))
    return ((np.clip(values, low, high) - mean) / sd).astype(np.float32)


def stay_statistics(stays, rows, scaler):
    """What a logistic regression can be given of a stay, float64 (m, 3 V): the floor for anything that knows time.

        columns 0 .. V - 1  mean z of the variable, 0 if never measured     V .. 2 V - 1  1 if never measured, else 0
        2 V .. 3 V - 1      log(1 + number of events)

    stays   the dict of read_stays; rows (m,); scaler of event_scaler
    Needs:  STAY_VARIABLES, gather_ranges, scale_events
    """
    first, rows, width = stays["first_event"][stays["first_set"]], np.asarray(rows, dtype=np.int64), len(STAY_VARIABLES)
    events = gather_ranges(first, rows)
    variables = stays["variables"][events]
    cell = np.repeat(np.arange(len(rows)), first[rows + 1] - first[rows]) * width + variables
    z = scale_events(variables, stays["values"][events], scaler).astype(np.float64)
    count = np.bincount(cell, minlength=len(rows) * width).reshape(-1, width)
    total = np.bincount(cell, z, minlength=len(rows) * width).reshape(-1, width)
    return np.concatenate([total / np.maximum(count, 1), count == 0, np.log1p(count)], axis=1)


class StaySplit:
    """Some rows of a set of stays as a training loop sees them: `labels`, `ids`, `lengths`, and `batch(rows)` to train on.

    stays        the dict of read_stays; rows (m,) of this split, whose events are scaled and kept here, once
    scaler       of event_scaler over the training stays, the same for every split
    drop_events  probability with which an event is left out of a batch with a generator; a set that loses all its events goes
                 with them, and a stay that would lose all keeps the one with the largest draw
    labels       int64 (m,), -1 = unknown; lengths int64 (m,), sets of each stay: for bucketed_batches
    features     set it to a tensor (m, width), and batches hold its rows instead of inputs: what a frozen encoder made of them
    Errors: ValueError for drop_events outside [0, 1)
    Needs:  gather_ranges, scale_events, stay_statistics, STAY_VARIABLES
    """

    def __init__(self, stays, rows, *, scaler, drop_events=0.0, device="cpu"):
        if not 0 <= drop_events < 1:
            raise ValueError(f"drop_events {drop_events:g} must be at least 0 (off) and below 1")
        self.stays, self.rows, self.scaler = stays, np.asarray(rows, dtype=np.int64), scaler
        self.drop_events, self.device, self.features = drop_events, torch.device(device), None
        self.labels, self.ids = stays["labels"][self.rows], stays["ids"][self.rows]
        sets = gather_ranges(stays["first_set"], self.rows)
        events = gather_ranges(stays["first_event"], sets)
        self.lengths, self.sizes = np.diff(stays["first_set"])[self.rows], np.diff(stays["first_event"])[sets]
        self.first_set = np.append(0, np.cumsum(self.lengths))
        self.first_event = np.append(0, np.cumsum(self.sizes))
        self.minutes, self.variables = stays["minutes"][sets], stays["variables"][events]
        self.values = scale_events(self.variables, stays["values"][events], scaler)

    def __len__(self):
        return len(self.rows)

    def statistics(self):
        """stay_statistics of these rows."""
        return stay_statistics(self.stays, self.rows, self.scaler)

    def batch(self, rows, generator=None):
        """inputs, the events of b stays one after the other, or features (b, width); and targets float (b,) unless a label of this
        split is unknown. Drops events if given a generator.

        inputs  variables int64 (E,), values float32 (E,) scaled; sizes int64 (S,), the events of each set, and minutes float32 (S,);
                lengths int64 (b,), the sets of each stay
        """
        rows = np.asarray(rows, dtype=np.int64)
        if self.features is not None:
            batch = {"features": self.features[torch.from_numpy(rows)]}
        else:
            sets = gather_ranges(self.first_set, rows)
            events = gather_ranges(self.first_event, sets)
            inputs = {"variables": self.variables[events].astype(np.int64), "values": self.values[events], "sizes": self.sizes[sets],
                      "minutes": self.minutes[sets], "lengths": self.lengths[rows]}
            if generator is not None and self.drop_events > 0:
                inputs = self.dropped(inputs, torch.rand(len(events), generator=generator).numpy())
            batch = {"inputs": {name: torch.from_numpy(each).to(self.device) for name, each in inputs.items()}}
        if (self.labels >= 0).all():
            batch["targets"] = torch.from_numpy(self.labels[rows]).float().to(self.device)
        return batch

    def dropped(self, inputs, draw):
        """The inputs without the events whose draw (E,) is below drop_events."""
        stay = np.repeat(np.arange(len(inputs["lengths"])), inputs["lengths"])  # of each set
        event_set = np.repeat(np.arange(len(stay)), inputs["sizes"])
        largest = np.zeros(len(inputs["lengths"]), dtype=draw.dtype)
        np.maximum.at(largest, stay[event_set], draw)
        keep = (draw >= self.drop_events) | (draw == largest[stay[event_set]])
        sizes = np.bincount(event_set[keep], minlength=len(stay))
        return {"variables": inputs["variables"][keep], "values": inputs["values"][keep], "sizes": sizes[sizes > 0],
                "minutes": inputs["minutes"][sizes > 0], "lengths": np.bincount(stay[sizes > 0])}


def synthetic_stays(n=1000, *, seed=0):
    """Made-up stays as read_stays returns them, for running and teaching, never for a result.

    A hidden severity with a trend over 48 hours moves vitals and labs away from their usual values, and brings the labs more
    often: every 4 hours instead of every 12. Death is drawn from a logistic curve of the severity at the end, so no model can know
    it. Vitals come at one rate per stay, every 1 to 2.5 hours, several of them in a minute; the descriptors at minute 0.

    returns the dict of read_stays, ids 1 .. n, about 20 to 60 sets a stay; SAPS-I and SOFA tell something of the severity at the start
    Errors: ValueError for n < 1
    Check:  of the default 1,000 stays, 14 to 20 % died; a logistic regression on stay_statistics has an AUROC of about 0.8
    Needs:  STAY_VARIABLES, STAY_MINUTES, pack_stays
    """
    if n < 1:
        raise ValueError(f"n {n} must be at least 1")
    rng = np.random.default_rng(seed)
    column = lambda *each: np.array(each)[:, None, None]
    start, trend = rng.normal(size=(2, n, 1))
    severity = lambda minutes: start + trend * (minutes / STAY_MINUTES - 0.3)  # (n, k): the trend is the news of the end
    died = rng.random(n) < 1 / (1 + np.exp(2.5 - 1.5 * severity(np.array(STAY_MINUTES))[:, 0]))
    events = []

    def measure(names, usual, sd, effect, times, p):
        """Events of (names, n, k): each at each of the times (n, k) up to 48:00 with probability p, moved by effect * severity."""
        person = rng.normal(size=(len(names), n, 1))
        z = column(*effect) * severity(times) + 0.7 * person + 0.7 * rng.normal(size=(len(names), *times.shape))
        x = np.maximum(column(*usual) + column(*sd) * z, column(*usual) / 10).round(2)
        v, i, k = np.nonzero((rng.random(x.shape) < p) & (times <= STAY_MINUTES))
        codes = np.array([STAY_VARIABLES.index(name) for name in names])
        events.append((i, times[i, k], codes[v], x[v, i, k]))

    zero = np.zeros((n, 1))
    measure(("Age", "Height", "Weight"), (64, 170, 81), (15, 10, 20), (0.4, 0, 0), zero, 0.97)
    for name, x in (("Gender", rng.integers(0, 2, n)), ("ICUType", rng.integers(1, 5, n))):
        events.append((np.arange(n), zero[:, 0], np.full(n, STAY_VARIABLES.index(name)), x))
    every = rng.uniform(60, 150, (n, 1))
    times = np.floor((np.arange(48) + rng.uniform(0, 0.8, (n, 48))) * every)
    measure(("HR", "MAP", "SysABP", "DiasABP", "RespRate", "Temp", "Urine", "GCS"), (87, 80, 119, 60, 19, 37, 120, 12),
            (17, 15, 22, 12, 5, 0.8, 100, 3), (0.4, -0.3, -0.3, -0.2, 0.3, 0.1, -0.4, -0.5), times, 0.7)
    every = 240 + 480 / (1 + np.exp(1.5 * start))
    times = np.floor((np.arange(12) + rng.uniform(0.1, 0.9, (n, 12))) * every)
    measure(("Creatinine", "BUN", "Lactate", "HCO3", "Platelets", "WBC", "HCT", "K", "Na", "Glucose", "pH", "PaO2"),
            (1.4, 27, 2.8, 23, 190, 12.7, 30.7, 4.1, 139, 141, 7.4, 150), (0.8, 16, 1.5, 4.5, 90, 5, 5, 0.6, 5, 45, 0.1, 60),
            (0.4, 0.5, 0.5, -0.4, -0.3, 0.2, -0.1, 0.1, 0, 0.2, -0.3, -0.2), times, 0.6)
    scores = {name: np.maximum(usual + sd * (start[:, 0] + rng.normal(size=n)), 0).round() for name, usual, sd in
              (("SAPS-I", 14, 4), ("SOFA", 6, 3))}
    scores["SAPS-I"][rng.random(n) < 0.02] = np.nan
    return {"ids": np.arange(1, n + 1), "labels": died.astype(np.int64), **pack_stays(*map(np.concatenate, zip(*events))),
            "severity": scores, "left_out": {}}


# ---------------------------------------------------------------------------------------------------------------------
# PNG files


def encode_png(pixels, palette=None):
    """The bytes of an 8-bit PNG: grey or RGB, or class ids with a palette of colours, which every viewer shows in colour.

    pixels  uint8 array (h, w), or (h, w, 3) for RGB
    palette uint8 (k, 3) with (h, w) ids below k: the file then holds the ids themselves, as the masks of read_faces do
    Errors: ValueError for other shapes, types or ids
    Source: PNG specification, 3rd edition (W3C 2025), chapter 11: signature, IHDR, PLTE, IDAT, IEND; filter 0 on every row
    """
    pixels = np.ascontiguousarray(pixels)
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or pixels.ndim == 3 and (pixels.shape[2] != 3 or palette is not None):
        raise ValueError(f"a PNG is written from uint8 (h, w) or (h, w, 3), with a palette from (h, w); got {pixels.dtype} {pixels.shape}")
    if palette is not None and pixels.max() >= len(palette):
        raise ValueError(f"id {pixels.max()} has no colour: the palette has {len(palette)}")
    height, width = pixels.shape[:2]
    colour_type = 2 if pixels.ndim == 3 else 0 if palette is None else 3
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)  # filter type 0 before each row
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0))]
    chunks += [] if palette is None else [(b"PLTE", np.asarray(palette, dtype=np.uint8).tobytes())]
    chunks += [(b"IDAT", zlib.compress(rows.tobytes(), 6)), (b"IEND", b"")]
    content = b"".join(struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks)
    return b"\x89PNG\r\n\x1a\n" + content
