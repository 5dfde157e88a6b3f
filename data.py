"""Data: from decoded files to augmented batches, without worker processes.

A whole data set is one contiguous uint8 array, in memory or memory-mapped. A batch is gathered from
it by an index array and augmented as a whole, on the device. The order of the rows is a function of
(seed, epoch), so it needs no checkpoint. Readers of files are in tasks/.

Dimension key: b batch, c channel, h w space, n rows of the set, t samples of a signal.

    >>> labels = np.array([0] * 90 + [1] * 10)
    >>> batches = stratified_batches(labels, 25, seed=0, epoch=0)
    >>> [np.bincount(labels[rows]).tolist() for rows in batches]
    [[13, 12], [12, 13], [13, 12], [12, 13]]
"""

import bisect
import contextlib
import csv
import functools
import hashlib
import math
import os
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
# Hz: 6 to 36 breaths, 45 to 150 beats per minute
RATE_BANDS = {"rr": (0.1, 0.6), "hr": (0.75, 2.5)}


# --------------------------------------------------------------------------------------------------
# Labels


class LabelScaler:
    """Labels to mean 0 and sd 1 and back, by the mean and sd of the training labels, in float64.

        transform(labels) = (labels - mean) / scale
        inverse(predictions) = predictions * scale + mean

    Fit it on training rows only and save it with the weights. Score after inverse, in the unit of
    the labels: an error in that unit cannot be read from the loss. Several targets have a mean and
    a scale each. Constant labels have scale 1. Arrays and tensors keep their kind, device and type.

    labels  (n,), with mean and scale as floats; or (n, targets), with lists of one float per column
    Errors: ValueError for no labels, NaN or infinity in fit, other than `targets` columns later;
            RuntimeError for a scaler that was neither fitted nor loaded.
    Check:  fit([10, 20]) has mean 15 and scale 5
    Needs:  np, torch
    """

    def __init__(self):
        self.mean = self.scale = None

    def fit(self, labels):
        labels = np.asarray(labels, dtype=np.float64)
        self._check(labels)
        constant = labels.min(axis=0) == labels.max(axis=0)
        self.mean = labels.mean(axis=0).tolist()
        self.scale = np.where(constant, 1.0, labels.std(axis=0)).tolist()
        return self

    def transform(self, labels):
        mean, scale = self._like(labels)
        return (labels - mean) / scale

    def inverse(self, predictions):
        mean, scale = self._like(predictions)
        return predictions * scale + mean

    def state_dict(self):
        return {"mean": self.mean, "scale": self.scale}

    def load_state_dict(self, state):
        self.mean, self.scale = state["mean"], state["scale"]

    def _check(self, labels):
        if labels.ndim not in (1, 2):
            raise ValueError(f"labels of shape {labels.shape} must be (n,) or (n, targets): "
                             "reshape them so that a column is what has a mean of its own")
        if labels.size == 0 or not np.isfinite(labels).all():
            raise ValueError(f"{labels.size} labels, {(~np.isfinite(labels)).sum()} of them NaN or "
                             "infinite: leave out rows without a label before fitting")

    def _like(self, labels):
        """Mean and scale as floats, or in the kind and type of labels with several columns."""
        if self.mean is None:
            raise RuntimeError("LabelScaler has no mean yet: fit it on the training labels, or "
                               "load its state")
        if not isinstance(self.mean, list):
            return self.mean, self.scale
        if tuple(labels.shape[-1:]) != (len(self.mean),):
            raise ValueError(f"labels of shape {tuple(labels.shape)} must have {len(self.mean)} "
                             "columns, as in fit")
        pair = np.array([self.mean, self.scale])
        if torch.is_tensor(labels):
            kind = labels.dtype if labels.is_floating_point() else torch.get_default_dtype()
            return torch.from_numpy(pair).to(kind).to(labels.device)
        return pair.astype(labels.dtype if labels.dtype.kind == "f" else np.float64)


# --------------------------------------------------------------------------------------------------
# Splits and order


def split_by_group(groups, shares, *, seed):
    """Split rows so that no group is on two sides.

    The groups are shuffled, and their row counts are cut at the shares. A group goes to the split
    in which the middle of its rows falls, so a share is met to within half a group. Without groups
    pass `np.arange(n)`: every row is a group of its own, and leakage cannot be excluded.

    Splits do not depend on how groups are stored: groups that all spell integers are sorted as
    integers, others as strings.

    groups  (n,) such as persons, patients or faces: integers or strings, of whatever type
    shares  one number per split, all >= 0, sum 1; a share of 0 gives an empty split
    returns one sorted int64 index array per share
    Errors: ValueError if the shares do not add up to 1, or if a split with a share gets no group.
    Needs:  np, numbered_groups
    Check:  split_by_group(np.arange(10), (0.8, 0.2), seed=0) gives 8 and 2 rows
    """
    shares = np.asarray(shares, dtype=np.float64)
    if not (shares >= 0).all() or abs(shares.sum() - 1) > 1e-6:
        raise ValueError(f"shares {shares.tolist()} must be at least 0 and add up to 1")
    group_of_row = numbered_groups(groups)
    counts = np.bincount(group_of_row)
    order = np.random.default_rng(seed).permutation(len(counts))
    middle = np.empty(len(counts))
    middle[order] = np.cumsum(counts[order]) - counts[order] / 2
    cuts = np.cumsum(shares)[:-1] * len(group_of_row)
    split_of_group = np.searchsorted(cuts, middle, side="right")
    splits = [np.flatnonzero(split_of_group[group_of_row] == k) for k in range(len(shares))]
    for k, rows in enumerate(splits):
        if shares[k] > 0 and len(rows) == 0:
            raise ValueError(f"split {k} with a share of {shares[k]:g} got none of the "
                             f"{len(counts)} groups: raise its share, change the seed, or give "
                             "groups that are smaller")
    return splits


def numbered_groups(groups):
    """Groups (n,) as numbers from 0, in the order of integers if all spell one, else of strings.

    Needs: np
    """
    groups = np.asarray(groups)
    if groups.dtype.kind in "iu" or groups.dtype.kind == "f" and not (groups % 1).any():
        return np.unique(groups, return_inverse=True)[1]
    names, group_of_row = np.unique(groups.astype(str), return_inverse=True)
    try:
        order = sorted(range(len(names)), key=lambda i: int(names[i]))
    except ValueError:
        return group_of_row
    return np.argsort(order)[group_of_row]


def stratified_batches(labels, batch_size, *, seed, epoch, rank=0, world_size=1, per_class=None):
    """Class-balanced batches: classes take turns and give rows from shuffled queues.

        slot s of the epoch takes the next row of class s % k, of k classes
        per_class=m: m slots at a time take rows of one class, the next one in a queue of classes

    Every batch holds batch_size // k rows of all k classes; the classes share the rest in turn.
    With per_class it holds m rows of each of batch_size // m classes, as contrastive losses of many
    classes need. An epoch is ceil(n / batch_size / world_size) full batches: rare classes repeat,
    frequent ones are not used up (over the epochs all of their rows are). The batches of
    `world_size` ranks are the slices of one global draw. Balanced batches and class weights both
    correct the imbalance: use one.

    A queue is shuffled again when it runs out: every row of a class is used before one repeats. A
    row repeats within a batch only if its class is smaller than its quota there.

    labels  (n,) integers or other values; a row is an index into them, so that for a Subset they
            are all_labels[subset.indices]
    returns a list of int64 index arrays of batch_size rows (with fewer rows than that, of
            n // world_size, and a warning)
    Errors: ValueError for labels that are not (n,), n < world_size, batch_size < 1, a rank that is
            not below world_size, a batch_size that is no multiple of per_class. Warns once, without
            per_class, of batches in which rows are alone in their class.
    Check:  90 and 10 rows in batches of 25 hold 12 or 13 of either class, see the top of this file
    Needs:  check_batch_size, check_labels, indices_by_value, shuffled_queue, stratified_shape,
            bisect
    """
    rows_by_class = indices_by_value(check_labels(labels))
    k = len(rows_by_class)
    num_batches, batch_size = stratified_shape(len(labels), k, batch_size, rank, world_size,
                                               per_class)
    global_batch = batch_size * world_size
    rng = np.random.default_rng([seed, epoch])
    plan = np.empty(num_batches * global_batch, dtype=np.int64)
    if per_class is None:
        for c, rows in enumerate(rows_by_class):
            plan[c::k] = shuffled_queue(rows, range(c, len(plan), k), global_batch, rng)
    else:
        turns = shuffled_queue(np.arange(k), range(0, len(plan), per_class), global_batch, rng)
        slots = np.argsort(np.repeat(turns, per_class), kind="stable")
        ends = per_class * np.cumsum(np.bincount(turns, minlength=k))
        for rows, mine in zip(rows_by_class, np.split(slots, ends[:-1])):
            plan[mine] = shuffled_queue(rows, mine, global_batch, rng)
    return list(plan.reshape(num_batches, world_size, batch_size)[:, rank])


def shuffled_queue(items, slots, batch_size, rng):
    """One item for each slot: all of them in random order, and again whenever they run out.

    Items that the batch of the next slot already holds go to the end. If it has more slots than
    there are items, they come in the order in which it took them: the uses of an item in a batch
    are then len(items) apart, and no rank's slice of it holds an item twice unless it must.

    slots   (p,) places in an epoch, ascending, or a range; slot s lies in batch s // batch_size
    returns (p,) items
    Needs:  np, bisect
    """
    queue = np.empty(len(slots), dtype=np.int64)
    filled = 0
    while filled < len(queue):
        again = rng.permutation(items)
        start = slots[filled] // batch_size * batch_size
        first, end = (bisect.bisect_left(slots, s) for s in (start, start + batch_size))
        taken = queue[first:filled]
        if len(taken):
            again = again[: len(queue) - first]  # enough, even if all of `taken` is among them
            repeated = np.isin(again, taken)
            late = again[repeated] if end - first <= len(items) else taken[-len(items) :]
            again = np.concatenate([again[~repeated], late])
        again = again[: len(queue) - filled]
        queue[filled : filled + len(again)] = again
        filled += len(again)
    return queue


def indices_by_value(values):
    """[the indices of every value, ascending], in the order of the values (n,). Needs: np"""
    if values.dtype.kind in "iu" and len(values) and 0 <= values.min() <= values.max() < 2**16:
        # of 16 bits, numpy's stable sort is a radix sort: five times faster
        values = values.astype(np.uint16)
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    return np.split(order, np.flatnonzero(ordered[1:] != ordered[:-1]) + 1)


def stratified_shape(n, k, batch_size, rank, world_size, per_class):
    """Batches in an epoch of stratified_batches, and rows in one of them; refuses, and warns.

    Needs:  check_batch_size
    """
    check_batch_size(n, batch_size, rank, world_size)
    batch_size = min(batch_size, n // world_size)
    if per_class is not None:
        if per_class < 1 or batch_size % per_class:
            raise ValueError(f"a batch of {batch_size} rows must be a multiple of per_class "
                             f"{per_class}, which is at least 1: change one of them")
    elif batch_size < 2 * k and k > 1:
        warnings.warn(f"{k} classes in batches of {batch_size}: rows are alone in their class, "
                      "and a contrastive loss has no pairs. per_class=m draws m rows of a class")
    return -(-n // (batch_size * world_size)), batch_size


def check_labels(labels):
    """Labels as an array (n,); refuse what numpy would read as one with other axes.

    Needs:  np, torch
    """
    is_dataset = isinstance(labels, torch.utils.data.Dataset)
    shape = () if is_dataset else tuple(np.shape(labels))
    if len(shape) != 1:
        raise ValueError(f"labels must be (n,), one class per row, got {type(labels).__name__}"
                         f"{'' if is_dataset else f' {shape}'}: of a Subset give "
                         "all_labels[subset.indices], of (n, 1) labels[:, 0], of one-hot rows "
                         "labels.argmax(1)")
    return np.asarray(labels)


def check_batch_size(n, batch_size, rank, world_size):
    """Refuse a batch size below 1, fewer rows than ranks, no such rank; warn of one short batch.

    Needs:  warnings
    """
    if batch_size < 1 or n < world_size:
        raise ValueError(f"batch_size {batch_size} must be at least 1, and {n} rows at least one "
                         f"per rank ({world_size})")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} must be at least 0 and below world_size {world_size}")
    if n < batch_size * world_size:
        warnings.warn(f"{n} rows are fewer than a batch of {batch_size * world_size}: one partial "
                      "batch an epoch")


def shuffled_batches(n, batch_size, *, seed, epoch, rank=0, world_size=1, even=False):
    """Every row once per epoch, in an order that (seed, epoch) fixes.

    A global batch is dealt to the ranks in turn, so ranks are disjoint and equal in length. Of n
    rows, n % world_size are left out, others in the next epoch. The last batch may be smaller; with
    even=True all batches differ by one row at most, for losses that compare the rows of a batch.

    returns a list of ceil(n // world_size / batch_size) int64 index arrays
    Errors: ValueError for n < world_size or batch_size < 1. Warns when n is smaller than a batch.
    Check:  [len(rows) for rows in shuffled_batches(10, 4, seed=0, epoch=0)] == [4, 4, 2]
    Needs:  check_batch_size, np
    """
    check_batch_size(n, batch_size, rank, world_size)
    order = np.random.default_rng([seed, epoch]).permutation(n)
    mine = order[: n - n % world_size][rank::world_size]
    if even:
        return np.array_split(mine, -(-len(mine) // batch_size))
    return [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]


def bucketed_batches(lengths, batch_size, *, seed, epoch, rank=0, world_size=1, pool=16):
    """Every row once per epoch as in shuffled_batches, in batches of similar length.

    Less padding is needed. Rows are shuffled and cut into pools of `pool` batches. A pool is
    sorted by length (ties stay shuffled) and cut into batches, and the full batches are shuffled.
    A pool is small against the set, so rows meet others in every epoch. A last, smaller batch is
    cut off before the sorting: it holds rows of any length, and comes last.

    lengths  (n,) numbers, such as the sets of a stay
    pool     batches that are sorted together: 1 sorts nothing, n and more sorts the whole epoch
    returns  a list of int64 index arrays, as many as shuffled_batches; a global batch is dealt to
             the ranks in turn
    Errors: ValueError for n < world_size, batch_size < 1 or pool < 1; warns if n is below a batch
    Check:  PhysioNet 2012 set a in batches of 32 is padded 1.08 times, 1.76 times if shuffled
    Needs:  check_batch_size, np
    """
    lengths = np.asarray(lengths)
    n, global_batch = len(lengths), batch_size * world_size
    check_batch_size(n, batch_size, rank, world_size)
    if pool < 1:
        raise ValueError(f"pool {pool} must be at least 1 batch (1: no sorting, 16 is common)")
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(n)[: n - n % world_size]
    full = len(order) // global_batch
    body, rest = np.split(order, [full * global_batch])
    width = pool * global_batch
    pools = [body[start : start + width] for start in range(0, len(body), width)]
    ordered = [rows[np.argsort(lengths[rows], kind="stable")] for rows in pools]
    batches = np.concatenate([body[:0], *ordered]).reshape(full, global_batch)
    batches = batches[rng.permutation(full)]
    return [rows[rank::world_size] for rows in (*batches, rest) if len(rows)]


class StratifiedBatchSampler(torch.utils.data.Sampler):
    """`stratified_batches` as the batch_sampler= of a DataLoader; as its sampler= it is wrong.

    It counts epochs itself: the epoch advances when the first batch of an iteration is drawn, so
    that a loop may break off. `set_epoch` overrides the count, before an iteration. To go on in the
    middle of epoch e, call set_epoch(e) and skip the batches that were seen.

    labels, batch_size, seed, per_class, Errors: as for stratified_batches
    rank, world_size    of this process; if None, torch.distributed's where it is initialised, else
                        0 and 1. A client that deals out whole batches itself needs rank=0,
                        world_size=1 (accelerate, and so transformers' Trainer)
    Check:  its third iteration draws stratified_batches(..., epoch=2)
    Needs:  check_batch_size, check_labels, indices_by_value, shuffled_queue, stratified_batches,
            stratified_shape, bisect
    """

    drop_last = False  # accelerate reads it, and batch_size: every batch is full

    def __init__(self, labels, batch_size, *, seed=0, rank=None, world_size=None, per_class=None):
        self.labels, self.batch_size = check_labels(labels), batch_size
        self.seed, self.per_class, self.epoch = seed, per_class, 0
        self.rank, self.world_size = rank, world_size
        self.num_classes = len(np.unique(self.labels))
        len(self)  # refuses bad sizes now

    def place(self):
        """Rank and world size, looked up late: a group may be initialised after the sampler."""
        group = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if group else 0
        world_size = torch.distributed.get_world_size() if group else 1
        return {"rank": rank if self.rank is None else self.rank,
                "world_size": world_size if self.world_size is None else self.world_size}

    def __iter__(self):
        batches = stratified_batches(self.labels, self.batch_size, seed=self.seed, epoch=self.epoch,
                                     per_class=self.per_class, **self.place())
        self.epoch += 1
        for rows in batches:
            yield rows.tolist()

    def __len__(self):
        return stratified_shape(len(self.labels), self.num_classes, self.batch_size,
                                per_class=self.per_class, **self.place())[0]

    @property
    def sampler(self):
        """The object itself: Lightning calls set_epoch of batch_sampler.sampler."""
        return self

    def set_epoch(self, epoch):
        self.epoch = epoch

    def state_dict(self):
        return {"epoch": self.epoch}

    def load_state_dict(self, state):
        self.epoch = state["epoch"]


def sampler_report(batches, labels):
    """Counts over all planned batches of an epoch: the first few cannot show the tail.

    batches  a list of index arrays, as the functions above return it; labels (n,) of any values
    returns  a dict
        batches, rows             planned batches, and rows in them
        class_counts              {class: its rows in the epoch}, 0 for a class that is never drawn
        largest_share             of the commonest class in the epoch
        largest_batch_share       the same in the worst batch
        classes_min, classes_mean distinct classes per batch
        single_class              batches of one class: nothing to contrast
        repeats                   second and later uses of a row in its batch, over all batches
        never_drawn               rows of the set that are in no batch
    Errors: ValueError for no batches, or an empty one
    Needs:  np
    Check:  [[0, 1], [2, 2]] of labels a, b, b: classes_min 1, classes_mean 1.5, single_class 1,
            repeats 1, never_drawn 0
    """
    batches = [np.asarray(rows) for rows in batches]
    sizes = np.array([len(rows) for rows in batches])
    if not sizes.all() or not len(sizes):
        raise ValueError(f"{len(sizes)} batches, {(sizes == 0).sum()} of them empty: there is "
                         "nothing to report on")
    values, inverse = np.unique(np.asarray(labels), return_inverse=True)
    counts = np.stack([np.bincount(inverse[rows], minlength=len(values)) for rows in batches])
    classes, total = (counts > 0).sum(1), counts.sum(0)
    repeats = sum(len(rows) - len(np.unique(rows)) for rows in batches)
    drawn = np.unique(np.concatenate(batches))
    return {
        "batches": len(batches),
        "rows": int(sizes.sum()),
        "class_counts": dict(zip(values.tolist(), total.tolist())),
        "largest_share": float(total.max() / total.sum()),
        "largest_batch_share": float((counts.max(1) / sizes).max()),
        "classes_min": int(classes.min()),
        "classes_mean": float(classes.mean()),
        "single_class": int((classes == 1).sum()),
        "repeats": int(repeats),
        "never_drawn": len(inverse) - len(drawn),
    }


# --------------------------------------------------------------------------------------------------
# Files: written whole or not at all; decoded once into .npy files, which are memory-mapped


@contextlib.contextmanager
def atomic_write(path, mode="wb"):
    """Open a file under a temporary name beside path, and move it there at the end.

    A reader sees the old file or the new one, never a half. On an error the old one stays.

    Needs:  Path, contextlib, os
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_csv(path, header, rows):
    """A table of rows under a header, written whole or not at all.

    Needs:  atomic_write, csv
    """
    with atomic_write(path, "w") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def encode_png(pixels, palette=None):
    """The bytes of an 8-bit PNG: grey, RGB, or class ids with a palette of colours.

    pixels  uint8 array (h, w), or (h, w, 3) for RGB
    palette uint8 (k, 3), with (h, w) ids below k: the file holds the ids themselves, and every
            viewer shows their colours
    Errors: ValueError for other shapes, types or ids
    Source: PNG specification, 3rd edition (W3C 2025), chapter 11: signature, IHDR, PLTE, IDAT,
            IEND; filter 0 on every row
    Needs:  np, struct, zlib
    """
    pixels = np.ascontiguousarray(pixels)
    rgb = pixels.ndim == 3 and pixels.shape[2] == 3 and palette is None
    if pixels.dtype != np.uint8 or not (rgb or pixels.ndim == 2):
        raise ValueError("a PNG is written from uint8 (h, w) or (h, w, 3), with a palette from "
                         f"(h, w); got {pixels.dtype} {pixels.shape}")
    if palette is not None and pixels.max() >= len(palette):
        raise ValueError(f"id {pixels.max()} has no colour: the palette has {len(palette)}")
    height, width = pixels.shape[:2]
    colour_type = 2 if rgb else 0 if palette is None else 3
    # filter type 0 before every row
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0))]
    if palette is not None:
        chunks.append((b"PLTE", np.asarray(palette, dtype=np.uint8).tobytes()))
    chunks += [(b"IDAT", zlib.compress(rows.tobytes(), 6)), (b"IEND", b"")]
    content = b"\x89PNG\r\n\x1a\n"
    for name, body in chunks:
        checksum = zlib.crc32(name + body)
        content += struct.pack(">I", len(body)) + name + body + struct.pack(">I", checksum)
    return content


def write_npy(path, dtype, row_shape, pieces):
    """Write arrays, one below the other, as one .npy file; only one of them is in memory at a time.

    It is written, not memory-mapped: a full disk is an OSError here. In a memory map it would be a
    bus error, which ends the process.

    row_shape  shape of one row, () for numbers
    pieces     iterable of arrays (k, *row_shape), of any lengths k
    Check:     np.load gives the concatenated pieces, of the given type
    Needs:  atomic_write, np
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
    """An .npy file, memory-mapped: a change of the array does not change the file. Needs: np"""
    return np.load(path, mmap_mode="c", allow_pickle=False)  # torch warns of read-only arrays ("r")


def file_stamps(files, root):
    """(name, size, time) of every file: a cache is kept as long as they stay the same."""
    for file in files:
        stat = file.stat()
        yield str(file.relative_to(root)), stat.st_size, stat.st_mtime_ns


def short_digest(parts):
    """16 characters that tell one sequence of values from another. Needs: hashlib"""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(part).encode())
    return digest.hexdigest()[:16]


def decode_once(load, shape, *, key, cache="", kind="eyes", chunk=256):
    """One uint8 tensor of this shape from load(start, stop), memory-mapped if there is a `cache`.

    load   decodes rows start to stop, at most `chunk` of them
    key    iterable of values; a file in the folder `cache` belongs to one key, kind and shape
    Needs:  atomic_write, map_npy, short_digest, write_npy, torch, warnings
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
            cached = map_npy(file)
            if cached.dtype == np.uint8 and cached.shape == tuple(shape):
                return torch.from_numpy(cached)
            problem = f"{cached.dtype} {cached.shape}"
        except (ValueError, OSError, EOFError) as error:
            problem = error
        warnings.warn(f"{file} cannot be read ({problem}): it is decoded again")
    write_npy(file, np.uint8, shape[1:], (load(rows.start, rows.stop).numpy() for rows in chunks))
    return torch.from_numpy(map_npy(file))


def unpack_once(path, name, cache):
    """Array `name` of an .npz file, unpacked into the folder `cache` and memory-mapped.

    Errors: ValueError for an array that is damaged or no plain numbers
    Needs:  atomic_write, file_stamps, map_npy, short_digest, shutil, warnings, zipfile, zlib
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


# --------------------------------------------------------------------------------------------------
# Images


def read_image(path):
    """One image file as a uint8 array (h, w, 3), by Pillow.

    Errors: ValueError for a file that cannot be read or has more than 8 bits per channel;
            ImportError with the command that installs Pillow.
    Needs:  np
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "reading image files needs Pillow: pip install pillow (or pass an .npz)") from error
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):  # converted to RGB it would be clipped to white
                raise ValueError(f"mode {image.mode}, 8 bits per channel are needed")
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{path} is not a readable image ({error}): repair or remove it") from error


def resize_uint8(images, size):
    """uint8 images (n, h, w) or (n, h, w, 3) as a uint8 tensor (n, 3, *size).

    Bilinear with antialiasing, rounded; images that have the size are not changed.

    Needs:  F, np, torch
    """
    images = torch.from_numpy(np.ascontiguousarray(images))
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
    if images.shape[2:] != tuple(size):
        images = F.interpolate(images.float(), size=tuple(size), mode="bilinear",
                               antialias=True).round().clamp(0, 255).byte()
    return images.expand(-1, 3, -1, -1).contiguous()


# --------------------------------------------------------------------------------------------------
# Augmentation: whole batches on their device; draws from a CPU generator; only turn_hue_ in place


def horizontal_flip(images, *, p=0.5, generator, masks=None, pairs=()):
    """Mirror images left to right with probability p, and their masks with them.

    A mirrored left eye is a right eye: in a flipped mask the two labels of a pair change places.
    Without that, every paired class of a flipped image is labelled wrong.

    images  (B, ..., W) any dtype
    masks   (B, H, W) integers in [0, 255] or None; a label in no pair, such as 255, stays
    pairs   ((left, right), ...) labels
    returns images, or (images, masks) if masks were given
    Errors: ValueError for p outside [0, 1], and with masks for the pairs that swap_labels refuses
    Check:  p=1 twice is the identity, for images and masks
    Needs:  swap_labels
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p {p} must be in [0, 1]: it is the probability that an image is flipped")
    n = len(images)
    # row i of the doubled batch is image i, row n + i its mirror image
    pick = (torch.arange(n) + n * (torch.rand(n, generator=generator) < p)).to(images.device)
    flipped = torch.cat([images, images.flip(-1)]).index_select(0, pick)
    if masks is None:
        return flipped
    mirrored = masks.flip(-1)
    if pairs:
        mirrored = swap_labels(mirrored, pairs)
    return flipped, torch.cat([masks, mirrored]).index_select(0, pick)


def swap_labels(masks, pairs):
    """Masks in which the two labels of every pair have changed places; other labels stay.

    masks   any shape, integers in [0, 255]
    Errors: ValueError for a paired label outside [0, 255] or in two pairs
    Needs:  torch
    Check:  twice is the identity
    """
    labels = [label for pair in pairs for label in pair]
    if len(set(labels)) < len(labels) or not all(0 <= label <= 255 for label in labels):
        raise ValueError(f"pairs {pairs} must hold labels in [0, 255], none of them twice")
    becomes = torch.arange(256)
    for left, right in pairs:
        becomes[left], becomes[right] = right, left
    return becomes.to(masks).index_select(0, masks.flatten().long()).view_as(masks)


def soft_targets(masks, classes, *, ignore=255):
    """Class ids (b, h, w) as probabilities (b, classes, h, w); an ignored pixel is 0 throughout.

    Needs:  torch
    """
    valid = (masks != ignore).unsqueeze(1)
    soft = torch.zeros(len(masks), classes, *masks.shape[1:], device=masks.device)
    return soft.scatter_(1, masks.unsqueeze(1).long().masked_fill(~valid, 0), valid.float())


def photometric_distort(images, *, p=0.5, generator):
    """Change brightness, contrast, saturation, hue and channel order of images.

    The five have draws of their own. One draw for all would leave a share 1 - p of the images
    untouched; five leave (1 - p)^5, which is 3 % at 0.5.

    images  (B, 3, H, W) uint8 RGB  ->  the same
    Errors: ValueError for p outside [0, 1], for anything but uint8 RGB: normalise afterwards
    Source: Liu et al. 2016 (SSD), arXiv:1512.02325; ranges and order of torchvision's
            v2.RandomPhotometricDistort
    Check:  p=0 returns equal values
    Needs:  check_rgb_uint8, photometric_draw, photometric_apply, turn_hue_
    """
    check_rgb_uint8(images, "photometric_distort", "distort")
    n = len(images)
    settings = photometric_draw(n, p=p, generator=generator)
    # a CPU's cache holds some hundred small images
    step = 256 if images.device.type == "cpu" else max(n, 1)
    distorted = []
    for start in range(0, max(n, 1), step):
        chunk = slice(start, start + step)
        chosen = {name: value[chunk] for name, value in settings.items()}
        distorted.append(photometric_apply(images[chunk], **chosen))
    return torch.cat(distorted)


def color_jitter(images, *, strength, generator):
    """Multiply brightness, contrast and saturation of every image by random factors.

        factor ~ U(1 - strength, 1 + strength), drawn for all three, in this order

    images  (B, 3, H, W) uint8 RGB  ->  the same
    Errors: ValueError for a strength outside [0, 1], for anything but uint8 RGB
    Source: torchvision's ColorJitter(strength, strength, strength), there in random order
    Check:  strength=0 returns equal values
    Needs:  check_rgb_uint8, photometric_apply, turn_hue_
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength {strength} must be in [0, 1]: a factor is at least 0")
    check_rgb_uint8(images, "color_jitter", "jitter")
    n = len(images)
    factors = torch.empty(3, n).uniform_(1 - strength, 1 + strength, generator=generator)
    brightness, contrast, saturation = factors
    return photometric_apply(images, brightness=brightness, contrast_before=contrast,
                             saturation=saturation, hue=torch.zeros(n),
                             contrast_after=torch.ones(n), order=torch.arange(3).expand(n, 3))


def check_rgb_uint8(images, who, remedy):
    """Refuse anything but uint8 RGB (B, 3, H, W): colour changes clamp at 0 and 255.

    Needs:  torch
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"{who} needs uint8 RGB (B, 3, H, W), got {images.dtype} "
                         f"{tuple(images.shape)}: {remedy} before you normalise, the limits are 0 "
                         "and 255")


def photometric_draw(n, *, p, generator):
    """Random settings of n images for photometric_apply: CPU tensors under its argument names.

    With probability p, else neutral: brightness U(0.875, 1.125), contrast and saturation
    U(0.5, 1.5), hue U(-0.05, 0.05) of a full turn, a random order of the channels. A fair coin per
    image puts contrast before saturation or after hue.

    Needs:  torch
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p {p} must be in [0, 1]: it is the probability of each of the five "
                         "changes")

    def draw(low, high, neutral):
        value = torch.empty(n).uniform_(low, high, generator=generator)
        return torch.where(torch.rand(n, generator=generator) < p, value, neutral)

    brightness = draw(0.875, 1.125, 1.0)
    contrast = draw(0.5, 1.5, 1.0)
    saturation = draw(0.5, 1.5, 1.0)
    hue = draw(-0.05, 0.05, 0.0)
    before = torch.rand(n, generator=generator) < 0.5
    order = torch.rand(n, 3, generator=generator).argsort(1)
    order = torch.where(torch.rand(n, 1, generator=generator) < p, order, torch.arange(3))
    return {"brightness": brightness, "contrast_before": torch.where(before, contrast, 1.0),
            "saturation": saturation, "hue": hue,
            "contrast_after": torch.where(before, 1.0, contrast), "order": order}


def photometric_apply(images, *, brightness, contrast_before, saturation, hue, contrast_after,
                      order):
    """Distort uint8 RGB images by given settings.

        brightness  f x                          grey = 0.2989 R + 0.587 G + 0.114 B
        contrast    f x + (1 - f) mean(grey)     before saturation, or after hue
        saturation  f x + (1 - f) grey
        hue         turned by this part of a full turn
        order       channel c becomes what was channel order[c]

    In float32; every step is clamped to [0, 255], and the result rounded once. torchvision
    truncates to uint8 after brightness, contrast and saturation: every time half a grey level
    darker. Hue is expensive: only the images that it turns are computed.

    images  (B, 3, H, W) uint8
    settings (B,) floats and order (B, 3) integers, all of them on one device, any
    Needs:  turn_hue_
    """
    def grey(x):
        red, green, blue = x.split(1, dim=1)
        return (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)

    def per_image(setting):
        return setting.to(images.device)[:, None, None, None]

    def blend_(x, factor, other):
        return x.mul_(per_image(factor)).add_(other * per_image(1 - factor)).clamp_(0, 255)

    x = images.float().mul_(per_image(brightness)).clamp_(0, 255)
    # the grey of the means is the mean of the grey
    blend_(x, contrast_before, grey(x.mean((2, 3), keepdim=True)))
    blend_(x, saturation, grey(x))
    turned = hue.nonzero()[:, 0]
    part = x.index_select(0, turned.to(x.device))
    turn_hue_(part.unbind(1), per_image(hue[turned])[:, 0])
    x.index_copy_(0, turned.to(x.device), part)
    blend_(x, contrast_after, grey(x.mean((2, 3), keepdim=True)))
    # float to uint8 in one go is several times slower on CPU
    x = x.round_().to(torch.int16).to(torch.uint8)
    places = order + 3 * torch.arange(len(x), device=order.device)[:, None]
    return x.flatten(0, 1).index_select(0, places.flatten().to(x.device)).view_as(images)


def turn_hue_(planes, turn):
    """Turn the hue in place by a part of the full circle; value (max) and chroma (max - min) stay.

    The circle has six parts; the places of R, G and B on it are 0, 2 and -2.

        hue      = copysign(chroma + G + B - R - min, G - B) / chroma + 6 turn
        nearness = | |hue - place| - 3 |        3 at the channel's own place, 0 opposite to it
        channel  = min + chroma clamp(nearness - 1, 0, 1)

    The first line is RGB to HSV without a branch. The last is the trapezoid of HSV to RGB: all of
    the chroma up to one sixth from the channel's place, none of it from two sixths on.

    planes  (3, ...) float RGB of any scale
    turn    part of the full circle, any number, to broadcast with a plane
    Check:  red turned by 1/3 is green, by 1/2 cyan; grey stays grey
    Needs:  torch
    """
    red, green, blue = planes
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = torch.maximum(torch.maximum(red, green), blue) - low
    hue = torch.copysign(chroma + green + blue - red - low, green - blue)
    hue = hue / chroma.clamp(min=torch.finfo(hue.dtype).tiny) + 6 * turn
    hue = hue - 6 * (hue / 6).round()  # half a circle on either side of red
    for channel, place in zip(planes, (0, 2, -2)):
        nearness = (hue - place).abs_().sub_(3).abs_()
        torch.addcmul(low, chroma, nearness.sub_(1).clamp_(0, 1), out=channel)
    return planes


def clahe(images, *, clip_limit=2.0, grid=(4, 4)):
    """Contrast-limited adaptive histogram equalisation: tile by tile, bilinear between.

    A bin of a tile's histogram holds at most clip_limit times the mean, which bounds the gain in
    contrast; the rest is spread over all bins. Grey images are bit-equal to OpenCV's
    createCLAHE(clip_limit, (columns, rows)).apply(image). Colour images are equalised in the L of
    8-bit Lab: bit-equal up to there. After the way back to RGB, all but 1 value in 100,000 are at
    most one grey level off OpenCV (see lab_to_rgb).

    images      uint8, grey (H, W) or (B, H, W), or RGB (B, 3, H, W)
    clip_limit  0 = no limit
    grid        tiles as (rows, columns), where OpenCV's tileGridSize is (columns, rows)
    returns the same shape, uint8
    Errors: ValueError for anything but uint8 of these shapes, a clip_limit below 0 or not finite,
            an empty grid.
    Source: Zuiderveld 1994 (Graphics Gems IV) in the arithmetic of OpenCV's clahe.cpp
    Needs:  clahe_axis, clahe_tables, look_up, rgb_to_lab, lab_to_rgb, lab_tables
    """
    wrong = images.ndim not in (2, 3, 4) or 0 in images.shape[-2:]
    wrong = wrong or images.ndim == 4 and images.shape[1] != 3
    if images.dtype != torch.uint8 or wrong:
        raise ValueError(f"clahe needs uint8 (H, W), (B, H, W) or (B, 3, H, W), got {images.dtype} "
                         f"{tuple(images.shape)}: equalise before you normalise")
    if not 0 <= clip_limit < float("inf") or min(grid) < 1:
        raise ValueError(f"clip_limit {clip_limit} must be at least 0 (none) and finite, grid "
                         f"{grid} at least (1, 1)")
    if images.ndim == 4:
        lab = rgb_to_lab(images)
        lab[:, 0] = clahe(lab[:, 0], clip_limit=clip_limit, grid=grid)
        return lab_to_rgb(lab)
    (rows, columns), (height, width), device = grid, images.shape[-2:], images.device
    levels = images.reshape(-1, height, width).long()
    uneven = height % rows > 0 or width % columns > 0
    y, row, down = (part.to(device) for part in clahe_axis(height, rows, uneven))
    x, column, across = (part.to(device) for part in clahe_axis(width, columns, uneven))
    padded = levels[:, y[:, None], x] if uneven else levels
    tiles = padded.unflatten(1, (rows, -1)).unflatten(3, (columns, -1)).transpose(2, 3)
    tables = clahe_tables(tiles.flatten(3).flatten(0, 2), clip_limit).flatten()
    image = torch.arange(len(levels), device=device)[:, None, None]
    # (2, 2, B, H, W): the four tiles about a pixel, upper and lower, left and right
    tile = (image * rows + row[:, None, None, :, None]) * columns + column[:, None, None]
    corners = look_up(tables, 256 * tile + levels).flatten(0, 1)
    upper_left, upper_right, lower_left, lower_right = corners
    upper = upper_left * (1 - across) + upper_right * across
    lower = lower_left * (1 - across) + lower_right * across
    down = down[:, None]
    return (upper * (1 - down) + lower * down).round().to(torch.uint8).view_as(images)


@functools.cache
def clahe_axis(size, tiles, uneven):
    """One side of an image for clahe: the source of its padded pixels, and the tiles about a pixel.

    If any side is not a multiple of its tiles (uneven), OpenCV pads both: a side that is one grows
    by one pixel per tile.

    returns source (padded size,), tiles (2, size), weight of the second tile (size,) float32; the
            function caches them, so do not change them
    Needs:  functools, torch
    Check:  the sources of 3 pixels in 4 tiles are 0 1 2 1: mirrored without repeating the edge
            (reflect-101)
    """
    padded = size + (tiles - size % tiles if uneven else 0)
    period = 2 * (size - 1)
    source = torch.arange(padded) % max(period, 1)
    position = torch.arange(size, dtype=torch.float32) * (1 / (padded // tiles)) - 0.5
    first = position.floor()
    weight, first = position - first, first.long()
    neighbours = torch.stack([first, first + 1]).clamp_(0, tiles - 1)
    return torch.minimum(source, period - source), neighbours, weight


def clahe_tables(tiles, clip_limit):
    """Clipped cumulative histograms of n tiles (n, pixels) int64: new levels (n, 256) float32.

    Needs:  torch
    """
    n, area = tiles.shape
    bins = torch.arange(256, device=tiles.device)
    tiles = tiles + 256 * torch.arange(n, device=tiles.device)[:, None]
    histogram = torch.bincount(tiles.flatten(), minlength=256 * n).view(n, 256)
    if clip_limit > 0:
        limit = max(int(clip_limit * area / 256), 1)
        excess = (histogram - limit).clamp(min=0).sum(1, keepdim=True)
        rest = excess % 256  # after an even share: one to every step-th bin
        step = (256 // rest.clamp(min=1)).clamp(min=1)
        gets_one = (bins % step == 0) & (bins < step * rest)
        histogram = histogram.clamp(max=limit) + excess // 256 + gets_one
    return (histogram.cumsum(1).float() * (255 / area)).round()


def look_up(table, index):
    """table[index] for a table (n,); faster than that on CPU."""
    return table.index_select(0, index.flatten()).view_as(index)


def rgb_to_lab(images):
    """sRGB to 8-bit CIE Lab (D65), both uint8 (B, 3, H, W), as OpenCV's COLOR_RGB2LAB computes it.

        L = 2.55 (116 f(Y) - 16)    a = 500 (f(X) - f(Y)) + 128    b = 200 (f(Y) - f(Z)) + 128
        f: cube root

    Fixed point: linear light is counted in 1/2040, the matrix in 1/2^12, f in 1/2^15. All 2^24
    colours come out as OpenCV's. The formulas in float miss L by 1 in places, and an equalised
    histogram makes tens of grey levels of that.

    Check:  (255, 0, 0) becomes (136, 208, 195)
    Needs:  lab_tables, look_up
    """
    light, root, _ = (table.to(images.device) for table in lab_tables())
    red, green, blue = look_up(light, images.int()).unbind(1)
    # sRGB to XYZ, white at 2^12
    x = look_up(root, (1777 * red + 1541 * green + 778 * blue + 2**11) >> 12)
    y = look_up(root, (871 * red + 2929 * green + 296 * blue + 2**11) >> 12)
    z = look_up(root, (73 * red + 448 * green + 3575 * blue + 2**11) >> 12)
    # 296 = 1.16 * 255, 1336934 = 0.16 * 255 * 2^15, 2^22 = 128 * 2^15
    lab = torch.stack([296 * y - 1336934, 500 * (x - y) + 2**22, 200 * (y - z) + 2**22], dim=1)
    return ((lab + 2**14) >> 15).to(torch.uint8)


def lab_to_rgb(lab):
    """8-bit CIE Lab (D65) to sRGB, both uint8 (B, 3, H, W): in float32, clipped to sRGB, rounded.

    Of the channels of all 2^24 Lab values 97.2 % equal OpenCV's COLOR_LAB2RGB, 2.8 % differ by 1,
    0.001 % by 2 or 3.

    Check:  (136, 208, 195) becomes (255, 2, 1)
    Needs:  lab_tables
    """
    lightness, a, b = lab.transpose(0, 1).float().flatten(1)  # channels first: planes
    y = (lightness / 2.55 + 16) / 116
    f = torch.stack([y + (a - 128) / 500, y, y - (b - 128) / 200])
    xyz = torch.where(f > 6 / 29, f**3, (f - 16 / 116) / 7.787)
    to_rgb = lab_tables()[2].to(lab.device)
    # in half precision a third of the values would be off
    with torch.autocast(lab.device.type, enabled=False):
        light = (to_rgb @ xyz).clamp_(0, 1)
    rgb = torch.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    pixels = (255 * rgb).round().to(torch.uint8)
    return pixels.unflatten(1, lab[:, 0].shape).transpose(0, 1).contiguous()


@functools.cache
def lab_tables():
    """The constants of rgb_to_lab and lab_to_rgb, on the CPU, cached.

    returns linear light (256,) of the sRGB levels, in 1/2040; f (3072,) of the light, in 1/2^15;
            the float matrix (3, 3) from XYZ over the white point to linear RGB
    Needs:  functools, torch
    """
    level = torch.arange(256, dtype=torch.float64) / 255
    light = torch.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4)
    share = torch.arange(3072, dtype=torch.float64) / 2040
    root = torch.where(share < 0.008856, 7.787 * share + 16 / 116, share ** (1 / 3))
    to_xyz = torch.tensor([[0.412453, 0.35758, 0.180423], [0.212671, 0.71516, 0.072169],
                           [0.019334, 0.119193, 0.950227]])
    to_rgb = torch.linalg.inv(to_xyz / to_xyz.sum(1, keepdim=True))
    return (light * 2040).round().int(), (root.float() * 2**15).round().int(), to_rgb


def random_affine(images, *, degrees=15.0, zoom=1.25, generator, masks=None, fill_mask=255):
    """Turn images about their centre and enlarge them, masks likewise.

        angle ~ U(-degrees, degrees)        scale = exp(U(-ln zoom, ln zoom))

    images  (B, C, H, W) uint8 or float
    masks   (B, h, w) integers, of any size: they come out in the size of the images
    returns images, or (images, masks) if masks were given, as `affine` makes them
    Errors: ValueError for degrees outside [0, 180], zoom below 1
    Check:  degrees=0, zoom=1 is the identity for images and for masks of their size
    Needs:  affine, math
    """
    if not 0 <= degrees <= 180 or not 1 <= zoom < float("inf"):
        raise ValueError(f"degrees {degrees} must be in [0, 180] (0 = off) and zoom {zoom} at "
                         "least 1 (1 = off)")
    angle, size = torch.empty(2, len(images)).uniform_(-1, 1, generator=generator)
    return affine(images, angle * math.radians(degrees), (size * math.log(zoom)).exp(), masks=masks,
                  fill_mask=fill_mask)


def affine(images, angle, scale, *, masks=None, fill_mask=255):
    """Turn and enlarge images about their centre, masks by the same geometry.

        source pixel of output pixel x = R(angle) x / scale, from the centre
        a positive angle turns counter-clockwise

    Outside, an image is mirrored at its edge, and a mask gets fill_mask: mirrored pixels are not
    graded.

    images  (B, C, H, W) uint8 (rounded at the end) or float; bilinear
    angle, scale (B,) in radians, and as a factor
    masks   (B, h, w) integers of any size; the nearest pixel, once, straight into the size of the
            images
    returns images, or (images, masks) if masks were given
    Needs:  F, torch
    Check:  angle pi / 2 on a square is torch.rot90
    """
    height, width = images.shape[2:]
    if not len(images):
        return images if masks is None else (images, masks.new_empty((0, height, width)))
    device = images.device
    c = (angle.cos() / scale).float().to(device)[:, None, None]
    s = (angle.sin() / scale).float().to(device)[:, None, None]
    y = torch.arange(height, device=device)[:, None] - (height - 1) / 2
    x = torch.arange(width, device=device) - (width - 1) / 2
    source_x, source_y = c * x - s * y, s * x + c * y  # (B, H, W), pixels from the centre
    grid = torch.stack([source_x * (2 / width), source_y * (2 / height)], -1)
    turned = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="reflection",
                           align_corners=False)
    if not images.is_floating_point():
        turned = turned.round_().to(torch.int32)
    turned = turned.to(images.dtype)
    if masks is None:
        return turned
    rows, columns = masks.shape[1:]
    column = ((source_x + width / 2) * (columns / width)).floor().long()
    row = ((source_y + height / 2) * (rows / height)).floor().long()
    outside = (column < 0) | (column >= columns) | (row < 0) | (row >= rows)
    source = (row.clamp(0, rows - 1) * columns + column.clamp(0, columns - 1)).flatten(1)
    masks = masks.flatten(1).gather(1, source).view_as(outside)
    return turned, masks.masked_fill(outside, fill_mask)


def random_crop(images, *, padding=4, generator, masks=None, fill_mask=255):
    """Move every image by up to `padding` pixels in both directions: pad, then crop to its size.

    The image is padded with its mirror image (reflect-101), not with the zeros of the CIFAR recipe:
    a black bar is an edge that no photograph has. A mask gets `fill_mask` there: mirrored pixels
    are not graded.

    images  (B, C, H, W) any dtype
    masks   (B, H, W) or None; moves by the same whole pixels, so labels stay labels
    returns images, or (images, masks) if masks were given
    Errors: ValueError for a padding below 0, or not below the shorter side (no more to mirror)
    Needs:  torch
    Check:  padding=0 is the identity
    """
    n, channels, height, width = images.shape
    if not 0 <= padding < min(height, width):
        raise ValueError(f"padding {padding} must be at least 0 and below the shorter side, "
                         f"{min(height, width)}")
    shift = torch.randint(-padding, padding + 1, (2, n, 1), generator=generator)
    down, right = shift.to(images.device)
    y = torch.arange(height, device=images.device) - down
    x = torch.arange(width, device=images.device) - right

    def mirror(index, size):
        return size - 1 - (size - 1 - index.abs()).abs()

    source = (mirror(y, height)[:, :, None] * width + mirror(x, width)[:, None, :]).flatten(1)
    cropped = images.flatten(2).gather(2, source[:, None].expand(-1, channels, -1)).view_as(images)
    if masks is None:
        return cropped
    inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
    masks = masks.flatten(1).gather(1, source).view_as(masks)
    return cropped, masks.masked_fill(~inside, fill_mask)


def random_gamma(images, *, strength=0.5, generator):
    """Bend the brightness of images: dark tones brighter, or bright ones darker.

        x ** g,  g = exp(U(-strength, strength)), one per image

    images  (B, C, H, W) float in [0, 1] -> the same
    Errors: ValueError for a strength below 0
    Check:  strength 0 is the identity; 0 and 1 stay 0 and 1
    Needs:  torch
    """
    if not strength >= 0:
        raise ValueError(f"strength {strength} must be at least 0 (0 = off)")
    exponent = torch.empty(len(images), 1, 1, 1).uniform_(-strength, strength, generator=generator)
    return images ** exponent.exp().to(images.device)


def random_noise(images, *, sd=0.05, p=0.5, generator):
    """Add the noise of a poor sensor: normal, independent in every pixel and channel.

        x + s n,  n ~ N(0, 1),  s = U(0, sd) with probability p and 0 else, one per image

    images  (B, C, H, W) float -> the same; not clipped
    sd      in the unit of the images: 0.05 of [0, 1] is 13 grey levels
    Errors: ValueError for an sd below 0, a p outside [0, 1]
    Check:  of images 0 the mean square is p sd^2 / 3
    Needs:  torch
    """
    if not (sd >= 0 and 0 <= p <= 1):
        raise ValueError(f"sd {sd} must be at least 0 (0 = off) and p {p} in [0, 1]")
    of_image = sd * torch.rand(len(images), 1, 1, 1, generator=generator)
    of_image *= torch.rand(len(images), 1, 1, 1, generator=generator) < p
    noise = torch.randn(images.shape, generator=generator) * of_image
    return images + noise.to(images.device, images.dtype)


def mixup(inputs, targets, *, alpha, generator):
    """Blend every sample with another one, and its target with the same weight.

        x_i = lam x_i + (1 - lam) x_j        t_i = lam t_i + (1 - lam) t_j
        lam ~ Beta(alpha, alpha), one per batch        j: a permutation of the batch

    The target is mixed for every lam: with the first label alone, a sample that is nine tenths j
    would be called an i.

    inputs  (B, ...) float
    targets (B,), (B, C) or (B, C, H, W) float: probabilities or values, no class indices
    returns mixed inputs, mixed targets; the arguments themselves for alpha = 0 (off)
    Errors: ValueError for alpha below 0 or not finite, integer inputs or targets.
    Source: Zhang et al. 2018, arXiv:1710.09412
    Needs:  np, torch
    """
    if not 0 <= alpha < float("inf"):
        raise ValueError(f"alpha {alpha} must be at least 0 (off) and finite")
    if not (inputs.is_floating_point() and targets.is_floating_point()):
        raise ValueError(f"mixup needs float inputs and targets, got {inputs.dtype} and "
                         f"{targets.dtype}: pass inputs.float(), and for class indices "
                         "F.one_hot(targets).float()")
    if alpha == 0:
        return inputs, targets
    seed = int(torch.randint(2**62, (), generator=generator))  # torch's own Beta takes no generator
    lam = np.random.default_rng(seed).beta(alpha, alpha)
    other = torch.randperm(len(inputs), generator=generator).to(inputs.device)
    return lam * inputs + (1 - lam) * inputs[other], lam * targets + (1 - lam) * targets[other]


def cutmix(inputs, targets, *, alpha, generator):
    """Paste a box of another sample into every one, and mix the targets by the share of pixels.

        lam = 1 - box_height box_width / (H W)        t_i = lam t_i + (1 - lam) t_j
        j: a permutation of the batch

    One box per batch: the shape of the image, 1 - Beta(alpha, alpha) of its area, a random centre,
    cut off at the edge. Its sides are rounded to whole pixels (the authors' code rounds them down),
    so its area is near the drawn one only. lam is counted after all that: the targets are exact.

    inputs  (B, C, H, W) any dtype
    targets (B,) or (B, C) float; or masks (B, H, W) or (B, C, H, W) of any dtype, into which the
            box is pasted as well
    returns inputs, targets; the arguments themselves for alpha = 0 (off)
    Errors: ValueError for alpha below 0 or not finite, class indices, masks of another size.
    Source: Yun et al. 2019, arXiv:1905.04899
    Needs:  np, torch
    """
    if not 0 <= alpha < float("inf"):
        raise ValueError(f"alpha {alpha} must be at least 0 (off) and finite")
    height, width = inputs.shape[-2:]
    is_mask = targets.ndim > 2
    fits = targets.shape[-2:] == (height, width) if is_mask else targets.is_floating_point()
    if not fits:
        raise ValueError("cutmix needs float targets (B,) or (B, C), or masks of "
                         f"{height}x{width}, got {targets.dtype} {tuple(targets.shape)}: for "
                         "class indices pass F.one_hot(targets).float()")
    if alpha == 0:
        return inputs, targets
    seed = int(torch.randint(2**62, (), generator=generator))  # torch's own Beta takes no generator
    rng = np.random.default_rng(seed)
    side = (1 - rng.beta(alpha, alpha)) ** 0.5
    box_height, box_width = round(side * height), round(side * width)
    y, x = int(rng.integers(height)) - box_height // 2, int(rng.integers(width)) - box_width // 2
    top, bottom = max(y, 0), min(y + box_height, height)
    left, right = max(x, 0), min(x + box_width, width)
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


# --------------------------------------------------------------------------------------------------
# Features of images, for a simple model beside a network


def hog_features(images, *, side=48, cells=(12, 16)):
    """Histograms of signed gradients at several scales: what an eye or a face part looks like.

        g = grey(x + 1) - grey(x - 1), grey(y + 1) - grey(y - 1)    the edge is repeated
        angle / 40 degrees lies between two of 9 bins; |g| is shared between them linearly
        cell = the sum over c x c pixels; block = 2 x 2 cells next to each other, b
        b <- b / |b|;  b <- min(b, 0.2);  b <- b / |b|              |b|^2 = 0.01 + sum of squares

    Images become squares of `side` pixels first, bilinear with antialiasing. Signed: a dark iris on
    white and a white spot on dark differ. Large cells: a quarter and a third of the side describe
    where the iris is, not the lashes of one person.

    images  (n, c, h, w), uint8 or float in 0..255; grey is the mean of the channels
    cells   sides of a cell in pixels, divisors of `side`
    returns float32 (n, D), D = the sum of 36 (side / c - 1)^2 over the cells; for 48, (12, 16) that
            is 324 + 144 = 468; about 0 for a flat image
    Errors: ValueError for cells that do not divide the side, or that leave fewer than 2 x 2
    Source: Dalal and Triggs 2005; L2-Hys is their normalisation
    Needs:  F, torch, _cell_histograms
    Check:  an image of half the contrast gives the same numbers, unless it is nearly flat
    """
    for cell in cells:
        if side % cell or side < 2 * cell:
            raise ValueError(f"cells of {cell} pixels must divide {side}, at least twice")
    grey = images.float().mean(1, keepdim=True) / 255
    if grey.shape[2:] != (side, side):
        grey = F.interpolate(grey, size=(side, side), mode="bilinear", antialias=True)
    features = []
    for histograms in _cell_histograms(grey, cells):
        blocks = F.unfold(histograms, 2).transpose(1, 2)  # (n, blocks, 36)
        blocks = blocks / (blocks.square().sum(2, keepdim=True) + 0.01).sqrt()
        blocks = blocks.clamp(max=0.2)
        blocks = blocks / (blocks.square().sum(2, keepdim=True) + 0.01).sqrt()
        features.append(blocks.flatten(1))
    return torch.cat(features, 1)


def _cell_histograms(grey, cells):
    """[(n, 9, side / c, side / c)] for each c: gradients by direction, summed over cells.

    Needs:  F, torch
    """
    padded = F.pad(grey, (1, 1, 1, 1), mode="replicate")
    dx = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    dy = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    place = torch.atan2(dy, dx) * (9 / (2 * torch.pi)) % 9  # 9 bins over 360 degrees
    centres = torch.arange(9, device=grey.device)[:, None, None]
    distance = (place - centres).abs()
    distance = torch.minimum(distance, 9 - distance)
    votes = (1 - distance).clamp(min=0) * torch.hypot(dx, dy)
    return [F.avg_pool2d(votes, cell) * cell**2 for cell in cells]


# --------------------------------------------------------------------------------------------------
# Signals: spectra and rates of windows, statistics of channels


def standardise(windows):
    """Every window by itself to mean 0 and sd 1; a flat one becomes 0.

    The scale of a PPG carries no information: the device sets it for a recording.

    windows (..., t) float tensor
    Needs:  torch
    Check:  standardise(4 * x + 1) equals standardise(x)
    """
    windows = windows - windows[..., :1]  # so that a flat window is exactly 0, whatever its level
    windows = windows - windows.mean(-1, keepdim=True)
    sd = windows.square().mean(-1, keepdim=True).sqrt()
    return windows / torch.where(sd > 0, sd, 1)


def reduce_rate(windows, factor):
    """Windows (..., t) at a `factor`-th of their rate: means of `factor` samples, a rest dropped.

    The mean is the low-pass. By 4, from 125 to 31.25 Hz, it keeps 99 % of an amplitude at 2 Hz and
    95 % at 5.5 Hz. Of 29.25 Hz, which would alias to 2 Hz (a PPG holds nothing there), 7 % is left.
    """
    whole = windows.shape[-1] // factor * factor
    return windows[..., :whole].unflatten(-1, (-1, factor)).mean(-1)


def hann_power(x, rate_hz, frequencies):
    """Power of signals at any frequencies, under a Hann window.

        power(f) = |sum_t hann(t) x(t) exp(-2 pi i f t)|^2

    x (..., t) float tensor, rate_hz samples per second, frequencies float64 (k,) in Hz -> (..., k)

    Needs:  torch
    """
    t = x.shape[-1]
    angle = 2 * torch.pi / rate_hz * torch.arange(t, dtype=torch.float64)[:, None] * frequencies
    x = x * torch.hann_window(t, periodic=False, dtype=x.dtype, device=x.device)
    return (x @ angle.cos().to(x)).square() + (x @ angle.sin().to(x)).square()


def spectral_rate(windows, rate_hz, band):
    """The classical estimate of a rate per minute: the highest point of the spectrum in a band.

        power(f) = |sum_t hann(t) x(t) exp(-2 pi i f t)|^2
        on a grid of 1 / (4 T); between its points a parabola in log power

    For hr the peak is the pulse itself; for rr it is the baseline, which moves with breathing.

    windows (n, t) float tensor of any scale; rate_hz samples per second
    band    (low, high) in Hz, as in RATE_BANDS
    returns (n,) inside the band; NaN for a flat window
    Errors: ValueError for a band that is empty, or not between 0 and half the rate.
    Check:  a sine of 0.3 Hz gives 18.0
    Needs:  standardise, hann_power
    """
    low, high = band
    if not 0 < low < high <= rate_hz / 2:
        raise ValueError(f"band {low:g} to {high:g} Hz must lie in order between 0 and half the "
                         f"rate, {rate_hz / 2:g} Hz")
    t = windows.shape[-1]
    step = rate_hz / t / 4
    grid = low + step * torch.arange(-1, round((high - low) / step) + 2, dtype=torch.float64)
    x = standardise(windows)
    power = hann_power(x, rate_hz, grid)
    peak = power[:, 1:-1].argmax(1, keepdim=True) + 1
    left, top, right = (power.log().gather(1, peak + k)[:, 0] for k in (-1, 0, 1))
    offset = ((left - right) / (2 * (left - 2 * top + right))).clamp(-0.5, 0.5)
    return (60 * (grid.to(x)[peak[:, 0]] + step * offset)).clamp(60 * low, 60 * high)


def upslope_rate(windows, rate_hz):
    """Heart rate of a PPG from beat to beat: 60 / the median interval between its steepest rises.

        x = windows, a mean over 0.07 s
        u = max(x(t + 1) - x(t), 0), a mean over 0.11 s
        beat = where u is the largest within 0.33 s on either side, and above 0.4 of its 0.98
               quantile; between samples a parabola through three values of u

    The median forgets a missed or an additional beat, which the mean interval does not. Beats are
    at least 0.33 s apart, so rates end at about 180 per minute, earlier at a low sampling rate.

    windows (n, t) float tensor of any scale; rate_hz samples per second
    returns (n,) per minute; NaN for a window with fewer than two beats
    Check:  a sine of 1.2 Hz gives 72
    Needs:  F, torch, standardise, _centred_mean
    """
    x = _centred_mean(standardise(windows), 0.07 * rate_hz)
    u = _centred_mean(x.diff(dim=1).clamp(min=0), 0.11 * rate_hz)
    apart = round(0.33 * rate_hz)
    largest = F.max_pool1d(u[:, None], 2 * apart + 1, stride=1, padding=apart)[:, 0]
    left, top, right = u[:, :-2], u[:, 1:-1], u[:, 2:]
    rank = round(0.98 * (u.shape[1] - 1)) + 1  # torch.quantile refuses more than 16 million values
    high = 0.4 * u.kthvalue(rank, dim=1, keepdim=True).values
    is_beat = (top == largest[:, 1:-1]) & (top > left) & (top > high)
    # of a beat left < top >= right, so the parabola opens downwards
    offset = 0.5 * (left - right) / torch.where(is_beat, left - 2 * top + right, 1)
    time = torch.arange(is_beat.shape[1], dtype=u.dtype, device=u.device) + offset
    latest = torch.where(is_beat, time, -torch.inf).cummax(1).values
    before = F.pad(latest[:, :-1], (1, 0), value=-torch.inf)
    # infinite where there is no beat, and for the first
    intervals = torch.where(is_beat, time - before, torch.inf).sort(1).values
    count = is_beat.sum(1, keepdim=True) - 1
    lower, upper = (count - 1).clamp(min=0) // 2, count.clamp(min=0) // 2
    median = (intervals.gather(1, lower) + intervals.gather(1, upper)) / 2
    return torch.where(count > 0, 60 * rate_hz / median, torch.nan)[:, 0]


def _centred_mean(x, samples):
    """Mean of (n, t) over an odd number of samples near `samples`; fewer at the ends.

    Needs:  F
    """
    width = 2 * round(samples / 2) + 1
    return F.avg_pool1d(x[:, None], width, stride=1, padding=width // 2,
                        count_include_pad=False)[:, 0]


def respiratory_signals(windows, rate_hz):
    """The three ways in which breathing shows in a PPG, as signals over time.

        baseline   x, the window itself: breathing moves its level
        amplitude  |z|, the height of the pulse: breathing changes the stroke volume
        frequency  the turn of arg z from sample to sample, over 1 s: breathing in quickens the
                   pulse

    z is the analytic signal of x in the band of the pulse, f0 +- 0.65 Hz around the strongest
    frequency f0 of the hr band. The turn is the angle of the mean of z(t + 1) conj z(t). That mean
    is weighted by the height of the pulse: where the pulse fades its phase means nothing, and the
    turn does not spike there.

    windows (n, t) float tensor of any scale; rate_hz samples per second
    returns (n, 3, t), signals of mean 0 and sd 1; zeros for a flat window
    Source: Charlton et al. 2018, IEEE Reviews in Biomedical Engineering 11 (baseline wander,
            amplitude and frequency modulation)
    Needs:  RATE_BANDS, hann_power, spectral_rate, standardise, F
    """
    x = standardise(windows)
    pulse_hz = torch.nan_to_num(spectral_rate(x, rate_hz, RATE_BANDS["hr"]) / 60, nan=1.0)[:, None]
    frequency = torch.fft.fftfreq(x.shape[-1], 1 / rate_hz).to(x)
    in_band = (frequency - pulse_hz).abs() <= 0.65
    z = torch.fft.ifft(2 * torch.fft.fft(x) * in_band)
    turn = torch.view_as_real(z[:, 1:] * z[:, :-1].conj()).transpose(1, 2)
    second = 2 * round(rate_hz / 2) + 1  # odd, so that the mean is centred
    turn = F.avg_pool1d(F.pad(turn, (0, 1), mode="replicate"), second, stride=1,
                        padding=second // 2, count_include_pad=False)
    turn = torch.atan2(turn[:, 1], turn[:, 0])
    return standardise(torch.stack([x, z.abs(), turn], 1))


def band_spectrum(signals, rate_hz, band, bins):
    """Log spectrum of a signal in a band, free of phase and scale.

        power(f) = |sum_t hann(t) x(t) exp(-2 pi i f t)|^2
        result = log(power / mean power of the band + 0.001)

    x is the signal without its mean and its straight-line trend, whose leakage would fill the low
    end of the band.

    signals (..., t) float tensor; rate_hz samples per second
    band    (low, high) in Hz; bins: frequencies, both ends among them
    returns (..., bins); log 0.001 everywhere for a flat signal
    Errors: ValueError for a band that is not between 0 and half the rate, or for fewer than 2 bins.
    Check:  a sine is largest at its own frequency
    Needs:  standardise, hann_power
    """
    low, high = band
    if not 0 <= low < high <= rate_hz / 2 or bins < 2:
        raise ValueError(f"band {low:g} to {high:g} Hz in {bins} bins must lie in order between 0 "
                         f"and half the rate, {rate_hz / 2:g} Hz, with at least 2 bins")
    t = signals.shape[-1]
    x, line = standardise(signals), torch.linspace(-1, 1, t).to(signals)
    x = x - (x @ line)[..., None] / line.square().sum() * line
    power = hann_power(x, rate_hz, torch.linspace(low, high, bins, dtype=torch.float64))
    mean = power.mean(-1, keepdim=True)
    return (power / torch.where(mean > 0, mean, 1) + 1e-3).log()


def time_stretch(windows, labels, *, limit, generator):
    """Play every window faster or slower, and scale its rate with it.

        x'(t) = x(centre + s (t - centre))        label' = s * label
        log s ~ U(-log limit, log limit)

    Linear between samples; a faster window is mirrored where it lacks samples, at its ends. The
    label of a slowed window is still the mean of the whole of it, though only its middle is left.

    windows   (b, t) float tensor
    labels    (b,) rates, in any unit that is proportional to frequency (not yet z-scored)
    limit     >= 1; 1 is off
    generator a CPU torch.Generator; nothing is changed in place
    Errors: ValueError for a limit below 1, or from 2 on: half of a window would be mirrored
    Source: Um et al. 2017, arXiv:1706.00527, where "time-warping" is smooth and the label stays
    Needs:  math, torch
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


def channel_statistics(array, rows, present=None, *, chunk=2**21):
    """Mean and sd of all channels over the given rows, to scale by: (x - mean) / sd.

    Give it training rows only. In float64, `chunk` values at a time, so that a set of any size
    fits. In two passes: the mean of squares minus the square of the mean loses all digits where a
    mean is large.

    array   (n, F) or (n, T, C): the last axis holds the channels; (n, C, H, W) or (n, T, C, H, W):
            the third from the end
    rows    (m,) indices
    present (n,) bool or None: only the present rows count
    returns mean, sd: float64 tensors (channels,); sd 1 for a constant channel; mean 0 and sd 1
            where no row is present
    Needs:  math, np, torch
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
    # of 0.1, rounding alone makes an sd of 1e-17
    return torch.from_numpy(mean), torch.from_numpy(np.where(high > low, sd, 1.0))
