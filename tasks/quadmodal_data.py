"""Reading of quadmodal: files, drawn modalities, batches."""

import warnings
from pathlib import Path

import numpy as np
import torch

import data
from tasks.common import open_npz


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
    scaler    {name: (mean, sd)} of channel_statistics over the training rows; without it, or for
              a name that is not in it, no scaling
    features  {name: tensor (m, T, width)} of frozen encoders: batches hold its rows as `encoded`
              instead of these inputs
    recorded  the same rows as they were recorded, if these arrays are made from them
    In batches with a generator, in units of the scaled values, 0 is off:
    noise     sd of Gaussian noise, added to every value; noise_of {name: sd}: another for these
    scale     a modality of a row is multiplied by one factor from U(1 - scale, 1 + scale)
    shift     sequences (n, T, C) are rolled by up to so many steps; all those of a row by the same
              number, so that streams of one rate stay synchronous
    Errors:   ValueError for noise or shift below 0, scale outside [0, 1)
    """

    chunk = 512

    def __init__(self, arrays, labels, rows, *, present=None, groups=None, scaler=None, noise=0.0,
                 noise_of=None, scale=0.0, shift=0, device="cpu"):
        if not (0 <= noise < float("inf") and 0 <= scale < 1 and 0 <= shift == int(shift)):
            raise ValueError(f"noise {noise} must be at least 0, scale {scale} in [0, 1), shift "
                             f"{shift} a whole number from 0; 0 is off")
        self.arrays, self.present = arrays, present or {}
        self.rows, self.scaler = np.asarray(rows), scaler
        self.labels = None if labels is None else np.asarray(labels)[self.rows]
        self.groups = None if groups is None else np.asarray(groups)[self.rows]
        self.noise, self.noise_of = noise, noise_of or {}
        self.scale, self.shift = scale, int(shift)
        self.device, self.features, self.recorded = torch.device(device), {}, self

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
            present[name] = self.is_present(name, index)
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
        if self.scaler is not None and name in self.scaler:
            mean, sd = (broadcast_channels(values.to(x), x) for values in self.scaler[name])
            x = (x - mean) / sd
        return x.float()

    def is_present(self, name, index):
        """Whether rows of the whole set have a modality, bool (b,)."""
        here = self.present[name][index] if name in self.present else np.ones(len(index), bool)
        return torch.from_numpy(here).to(self.device)

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
            noise = self.noise_of.get(name, self.noise)
            if noise:
                x = x + noise * torch.randn(x.shape, generator=generator).to(self.device)
            changed[name] = x
        return changed


def band_energies(x, bands=9):
    """Log energy of signals in bands, free of phase and offset.

        energy(k) = |sum_t hann(t) (x(t) - mean x) exp(-2 pi i k t / T)|^2 / sum hann^2
        log(mean energy of the k of a band + 1e-6)

    k counts cycles in T steps. Edges are geometric from 1 to T / 2, as no sampling rate is known:
    of 128 steps 1, 2, 3, 4, 6, 10, 16, 26, 41, 65. A short signal has fewer bands, a single step
    has none.

    x        float tensor (n, T, C)
    returns  (n, bands * C)
    Check:   a sine of 8 cycles in 128 steps is largest in the fifth band
    """
    steps = x.shape[1]
    edges = np.unique(np.geomspace(1, steps // 2 + 1, bands + 1).round().astype(int))
    hann = torch.hann_window(steps, periodic=False, dtype=x.dtype, device=x.device)
    spectrum = torch.fft.rfft((x - x.mean(1, keepdim=True)) * hann[:, None], dim=1)
    energy = spectrum.abs().square() / hann.square().sum().clamp(min=1e-6)
    parts = [energy[:, low:high].mean(1) for low, high in zip(edges, edges[1:])]
    if not parts:
        return x.new_zeros(len(x), 0)
    return (torch.stack(parts, 1) + 1e-6).log().flatten(1)


def gravity_frame(x, gravity):
    """A vector over time as it is seen from the ground, however the phone lies in the pocket.

        g = gravity / |gravity|        along = x . g        across = |x - (x . g) g|        |x|

    x, gravity  float tensors (n, T, 3) in the frame of the phone; g is 0 where gravity is
    returns     (n, T, 3): along, across, length
    Check:      turning both vectors by the same rotation changes nothing
    """
    length = gravity.norm(dim=2, keepdim=True)
    g = gravity / torch.where(length > 0, length, 1)
    along = (x * g).sum(2, keepdim=True)
    across = (x - along * g).norm(dim=2, keepdim=True)
    return torch.cat([along, across, x.norm(dim=2, keepdim=True)], 2)


def window_statistics(x):
    """What a window of signals is, free of phase: mean, sd, band_energies and autocorrelations.

        r(k) = mean_t (x(t) - mean x)(x(t + k) - mean x) / (var x + 1e-6)
        k    = 1/24, 2/24, ... 7/24 of the steps

    x        float tensor (n, T, C)
    returns  (n, D): all channels of the first statistic, then those of the next
    Check:   of a sine of 8 cycles r is -0.5 at 1/24 and 7/24 of the steps, and 1 at 3/24 and 6/24
    """
    mean = x.mean(1, keepdim=True)
    z, variance = x - mean, x.var(1, correction=0)
    columns = [mean[:, 0], variance.sqrt(), band_energies(x)]
    steps = x.shape[1]
    lags = {round(steps * part / 24) for part in range(1, 8)} - {0, steps}
    for lag in sorted(lags):
        columns.append((z[:, :-lag] * z[:, lag:]).mean(1) / (variance + 1e-6))
    return torch.cat(columns, 1)


def seen_from_the_ground(shapes):
    """Names of the vectors that gravity_frame is made for: those of the shape of `gravity`.

    shapes  {name: (T, C)} of the sequences
    """
    names = []
    for name in ("acceleration", "rotation"):
        if shapes.get(name) == shapes.get("gravity") and shapes.get(name, ())[1:] == (3,):
            names.append(name)
    return names


def summaries(scaled, recorded, present, summary):
    """A summary of every sequence, float64 (b, D); NaN where a row lacks it.

    Where the sequences `gravity` and `acceleration` or `rotation` are there, of equal length and
    with three channels, those of the latter in the gravity_frame follow.

    scaled    {name: (b, T, C)}, at least one; recorded: the same, not scaled
    present   {name: bool (b,)}
    summary   band_energies or window_statistics
    """
    columns = []
    for name, x in scaled.items():
        columns.append(summary(x).double().masked_fill(~present[name][:, None], torch.nan))
    for name in seen_from_the_ground({name: x.shape[1:] for name, x in scaled.items()}):
        values = summary(gravity_frame(recorded[name], recorded["gravity"])).double()
        here = present[name] & present["gravity"]
        columns.append(values.masked_fill(~here[:, None], torch.nan))
    return torch.cat(columns, 1)


def sequences_of(arrays):
    """Names of the sequences, (n, T, C)."""
    return [name for name, array in arrays.items() if array.ndim == 3]


def spectral_features(split, summary=band_energies):
    """The summaries of all rows of a ModalSplit, float64 (n, D); without sequences D is 0."""
    names = sequences_of(split.arrays)
    if not names:
        return np.empty((len(split), 0))
    parts = []
    for start in range(0, len(split), split.chunk):
        rows = split.rows[start : start + split.chunk]
        scaled = {name: split.scaled(name, rows) for name in names}
        recorded, present = {}, {}
        for name, x in scaled.items():
            recorded[name] = torch.from_numpy(split.arrays[name][rows].astype(np.float32)).to(x)
            present[name] = split.is_present(name, rows)
        parts.append(summaries(scaled, recorded, present, summary).cpu().numpy())
    return np.concatenate(parts)


def column_scale(x):
    """Mean and sd of the columns of (n, D) without NaN; the sd of a constant column is 1."""
    known = ~np.isnan(x)
    count = known.sum(0).clip(min=1)
    mean = np.where(known, x, 0).sum(0) / count
    sd = np.sqrt(np.where(known, np.square(x - mean), 0).sum(0) / count)
    return mean, np.where(sd > 1e-9 * np.abs(mean), sd, 1)  # of equal numbers, rounding makes an sd


def fit_whitening(x, labels, *, ridge=0.1, limit=6):
    """Learn to turn columns so that the rows of a class lie in a round cloud of radius about 1.

        z = (x - mean) / sd, at most 6 away from 0, and 0 where x is NaN
        S = mean of (z - m_c)(z - m_c)^T        m_c: the mean of the row's class
        y = z (S + ridge I)^(-1/2), every column divided by its sd, at most 6 away from 0

    Columns that are nearly copies of one another share their weight, and what differs between
    persons but not between classes is made small.

    x        (n, D), may hold NaN; labels (n,) integers
    returns  {"mean", "sd": (D,), "matrix": (D, D)}, float64 tensors; for `whitened`
    Source:  the within-class whitening of linear discriminant analysis; Hastie et al. 2009, 4.3.3
    """
    mean, sd = column_scale(x)
    z = np.nan_to_num((x - mean) / sd).clip(-limit, limit)
    within = z.copy()
    for label in np.unique(labels):
        within[labels == label] -= z[labels == label].mean(0)
    sizes, directions = np.linalg.eigh(within.T @ within / len(z))
    matrix = directions / np.sqrt(sizes.clip(min=0) + ridge) @ directions.T
    spread = (z @ matrix).std(0)
    matrix = matrix / np.where(spread > 1e-9, spread, 1)
    return {name: torch.from_numpy(values)
            for name, values in (("mean", mean), ("sd", sd), ("matrix", matrix))}


def whitened(x, fit, *, limit=6):
    """Rows (n, D), a float tensor that may hold NaN, by fit_whitening: float32 (n, D)."""
    mean, sd, matrix = (fit[name].to(x.device) for name in ("mean", "sd", "matrix"))
    z = torch.nan_to_num((x.double() - mean) / sd).clamp(-limit, limit)
    return (z @ matrix).clamp(-limit, limit).float()


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
