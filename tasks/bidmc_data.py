"""The data of bidmc_rr and bidmc_hr: recordings, windows, labels, drawn recordings, batches."""

import hashlib
import lzma
import re
import warnings
from pathlib import Path

import numpy as np
import torch

import data
from tasks.common import UNREADABLE


BIDMC_HZ = 125  # samples per second of the PPG
# numbers of the recordings that the original run held out; all others train
ORIGINAL_SPLIT = {"validation": (11, 19, 21, 23, 53), "test": (8, 15, 29, 39, 43, 52)}


def read_bidmc(folder, *, cache="", progress=None, need_labels=True):
    """Read PhysioNet's folder bidmc_csv as a list of one dict per recording, sorted by name.

        bidmc_NN_Signals.csv   the column PLETH, 125 per second
        bidmc_NN_Breaths.csv   the breath marks of two annotators
        bidmc_NN_Numerics.csv  Time [s], HR and PULSE, 1 per second
        bidmc_NN_Fix.txt       the patient

    Any .csv may be a .csv.xz. 53 recordings come from 46 patients: split by patient, never by
    recording.

    cache        a folder: recordings are parsed once per content of the files and kept there; the
                 signals are memory-mapped
    progress     progress(text) is called before each recording is parsed
    need_labels  False: read number, patient and ppg only; the patient is the name of the recording
                 if there is no _Fix.txt
    returns      a list of dicts: number int, patient str, ppg float32 (t,);
                 breaths and breaths_2 int64, sorted marks, which count samples from 1;
                 time, hr, pulse float64, one per second, NaN = none
    Errors:      ValueError with the file that is missing or cut off, lacks a column or a number, or
                 has NaN in PLETH
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
    digest = data.short_digest([3, need_labels, *contents])  # raise the 3 when the parsing changes
    kept = Path(cache) / f"bidmc-{digest}.npz"
    if kept.exists():
        try:
            return read_bidmc_cache(kept)
        except UNREADABLE as error:
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
        raise ValueError(f"{folder} holds no bidmc_NN_Signals.csv: give PhysioNet's folder "
                         "bidmc_csv")
    return files, names


def write_bidmc_cache(file, recordings):
    """Write recordings one at a time: all signals into one .npy, the rest into an .npz."""
    rest = {}

    def signals():
        for i, recording in enumerate(recordings):
            for field, value in recording.items():
                rest[f"{i}/{field}"] = len(value) if field == "ppg" else value
            yield recording["ppg"]

    data.write_npy(file.with_suffix(".ppg.npy"), np.float32, (), signals())
    with data.atomic_write(file) as stream:
        np.savez(stream, **rest)


def read_bidmc_cache(file):
    """The recordings of write_bidmc_cache; their signals are memory-mapped."""
    recordings = {}
    with np.load(file, allow_pickle=False) as archive:
        for entry in archive.files:
            i, field = entry.split("/")
            value = archive[entry]
            recordings.setdefault(i, {})[field] = value if value.ndim else value.item()
    signals = np.asarray(data.map_npy(file.with_suffix(".ppg.npy")))
    start = 0
    for recording in recordings.values():
        stop = start + recording["ppg"]  # so far the number of samples
        recording["ppg"] = signals[start:stop]
        start = stop
    if start != len(signals):
        raise ValueError(f"{len(signals)} samples instead of {start}")
    return list(recordings.values())


def read_bidmc_recording(folder, name, *, need_labels=True):
    """Read the files of one recording and check them against each other; see read_bidmc."""
    fix = folder / f"{name}_Fix.txt"
    text = fix.read_text(encoding="utf-8") if fix.is_file() else ""
    patient = re.search(r"matched wdb ID: *(\w+)", text)
    if not patient and need_labels:
        raise ValueError(f"{fix} is missing or has no line 'MIMIC II matched wdb ID: sNNNNN': no "
                         "patient, no safe split")
    signals = folder / f"{name}_Signals.csv"
    [ppg] = read_columns(signals, ["PLETH"])
    wrong = int((~np.isfinite(ppg)).sum())
    if wrong:
        kind = "NaN" if np.isnan(ppg).any() else "infinite values"
        raise ValueError(f"{signals}: PLETH holds {wrong} {kind} in {len(ppg)} rows: cut them out "
                         "or remove the recording")
    recording = {"number": int(name.partition("_")[2]), "patient": patient[1] if patient else name,
                 "ppg": ppg.astype(np.float32)}
    if not need_labels:
        return recording

    numerics = folder / f"{name}_Numerics.csv"
    time, hr, pulse = read_columns(numerics, ["Time [s]", "HR", "PULSE"])
    annotators = ["breaths ann1 [signal sample no]", "breaths ann2 [signal sample no]"]
    breaths = read_columns(folder / f"{name}_Breaths.csv", annotators)
    for column, values in {"Time [s]": time, "HR": hr, "PULSE": pulse}.items():
        if np.isinf(values).any():
            raise ValueError(f"{numerics}: {column} holds {np.isinf(values).sum()} infinite "
                             "values: empty those cells")
        if np.isnan(values).all():
            raise ValueError(f"{numerics}: {column} holds no number: remove the recording")
    seconds, last = len(ppg) / BIDMC_HZ, np.nanmax(time)
    if abs(seconds - last) > 2:  # bidmc_23 starts and ends a second early
        raise ValueError(f"{folder / name}: the signals last {seconds:.1f} s, the numerics "
                         f"{last:.1f} s: one of the two files is cut off, copy them again")
    timed = ~np.isnan(time)  # bidmc_01 has a last row without a time: the means of the columns
    first, second = (np.sort(marks[~np.isnan(marks)]).astype(np.int64) for marks in breaths)
    return recording | {"breaths": first, "breaths_2": second, "time": time[timed], "hr": hr[timed],
                        "pulse": pulse[timed]}


def read_columns(path, names):
    """Columns of a CSV or CSV.xz by their names, float64 (len(names), rows); empty cells are NaN.

    Errors: ValueError with the file that is missing or cut off, lacks a column, or has a short row
            or a cell that is no number
    """
    packed = path.with_name(path.name + ".xz")
    if not path.is_file() and not packed.is_file():
        raise ValueError(f"{path} is missing (and so is {packed.name}): copy the whole folder "
                         "bidmc_csv")
    if not path.is_file():
        path = packed
    open_text = lzma.open if path == packed else open

    def number(cell):
        return float(cell.strip() or "nan")

    try:
        with open_text(path, "rt", encoding="utf-8-sig") as file:
            header = [name.strip() for name in file.readline().split(",")]
            absent = [name for name in names if name not in header]
            if absent:
                raise ValueError(f"no column {absent[0]!r} among {header}")
            columns = [header.index(name) for name in names]
            return np.loadtxt(file, delimiter=",", comments=None, usecols=columns, ndmin=2,
                              encoding="utf-8", converters=number).T
    except (ValueError, OSError, EOFError, lzma.LZMAError) as error:
        raise ValueError(f"{path} is cut off or no such table ({error}): copy it again") from error


class Windows:
    """Windows of signals, cut on demand: windows[rows] is a float32 tensor (b, length // reduce).

    Windows overlap and signals may be memory-mapped: neither is ever copied as a whole.

    signals  list of float32 arrays (t_i,); window k is samples starts[k] to starts[k] + length of
             signals[index[k]]
    reduce   factor by which the sampling rate falls, see reduce_rate
    Check:   Windows([np.arange(9.0)], [0, 0], [1, 5], 4)[[1]].tolist() == [[5, 6, 7, 8]]
    """

    def __init__(self, signals, index, starts, length, *, reduce=1):
        self.signals, self.index, self.starts = signals, np.asarray(index), np.asarray(starts)
        self.length, self.reduce = length, reduce
        self.shape = (len(self.index), length // reduce)

    def __len__(self):
        return len(self.index)

    def __getitem__(self, rows):
        windows = np.empty((len(self.index[rows]), self.length), dtype=np.float32)
        for window, k, start in zip(windows, self.index[rows].tolist(), self.starts[rows].tolist()):
            window[:] = self.signals[k][start : start + self.length]
        return data.reduce_rate(torch.from_numpy(windows), self.reduce)


def bidmc_windows(recordings, *, rate, seconds=32.0, stride=4.0, reduce=1):
    """Windows labelled by the intervals between breath marks, or by the monitor's heart rate.

        rr = 60 (m - 1) / (t_last - t_first)    from the m >= 4 marks of annotator 1 in the window
        hr = mean of HR in the window           NaN left out

    The second reading is the same from annotator 2 (rr), or from PULSE, the same monitor's rate
    from the PPG (hr). Windows without a label are left out. For rr, so are windows that overlap
    more than 10 s without a mark.

    rate     "rr" or "hr"; None: every window, labels and second readings NaN
    seconds  length of a window; stride: seconds from one start to the next
    reduce   factor by which the sampling rate of the windows falls
    returns  a dict: inputs Windows, as recorded; labels and second_reading float64 (n,), per
             minute, second_reading NaN if there is none; groups str (n,), the patients; recording
             int (n,), an index into recordings; starts float64 (n,), seconds
    Errors:  ValueError for another rate, no length or stride, a window longer than a recording, or
             no window with a label
    """
    return cut_windows(recordings, rate, breath_rate, length=round(seconds * BIDMC_HZ),
                       stride=round(stride * BIDMC_HZ), reduce=reduce)


def bidmc_original(recordings, *, rate, reduce=1):
    """The windows, labels and split of the original run, for comparison only.

        rr = 6 x marks of annotator 1 in [start, start + 1250);  hr as in bidmc_windows

    Windows last 10 s, one every 2 s. The marks count from 1 and are taken as if they counted from
    0. 60 % of the rr labels are exactly 18: a constant 18 has a mean absolute error of 2.222
    (validation) and 2.352 (test). The split is by recording: patients of validation and test are in
    training too.

    returns  windows as bidmc_windows does, and a dict of row numbers: train, validation, test
    Check:   9,912 / 1,180 / 1,416 windows; training labels 17.216 (sd 4.430) breaths, 88.12 (11.76)
             beats per minute
    """
    windows = cut_windows(recordings, rate, breath_count, length=10 * BIDMC_HZ, stride=2 * BIDMC_HZ,
                          reduce=reduce)
    numbers = np.array([recording["number"] for recording in recordings])[windows["recording"]]
    validation = np.isin(numbers, ORIGINAL_SPLIT["validation"])
    test = np.isin(numbers, ORIGINAL_SPLIT["test"])
    rows = {"train": np.flatnonzero(~(validation | test)),
            "validation": np.flatnonzero(validation), "test": np.flatnonzero(test)}
    return windows, rows


def cut_windows(recordings, rate, breaths_to_rate, *, length, stride, reduce=1):
    """The windows of bidmc_windows and bidmc_original; length and stride in samples.

    breaths_to_rate  (marks, starts, length, total), all in samples -> breaths per minute like
                     starts, NaN = no label
    """
    if rate not in ("rr", "hr", None):
        raise ValueError(f"rate {rate!r} must be 'rr' (breathing) or 'hr' (heart), or None for "
                         "windows without labels")
    if length < 1 or stride < 1:
        raise ValueError(f"windows of {length} samples every {stride}: both must be at least 1, "
                         f"{BIDMC_HZ} are a second")
    seconds = length / BIDMC_HZ
    parts = []
    for index, recording in enumerate(recordings):
        total = len(recording["ppg"])
        if total < length:
            raise ValueError(f"recording {recording['number']} lasts {total / BIDMC_HZ:.1f} s, a "
                             f"window {seconds:g} s")
        starts = np.arange(0, total - length + 1, stride)
        if rate == "rr":
            labels = breaths_to_rate(recording["breaths"], starts, length, total)
            second_reading = breaths_to_rate(recording["breaths_2"], starts, length, total)
        elif rate == "hr":
            time, since = recording["time"], starts / BIDMC_HZ
            labels = mean_inside(time, recording["hr"], since, seconds)
            second_reading = mean_inside(time, recording["pulse"], since, seconds)
        else:
            labels = second_reading = np.full(len(starts), np.nan)
        keep = ~np.isnan(labels) | (rate is None)
        count = np.count_nonzero(keep)
        parts.append({"labels": labels[keep], "second_reading": second_reading[keep],
                      "starts": starts[keep], "recording": np.full(count, index),
                      "groups": np.full(count, recording["patient"])})
    windows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if len(windows["labels"]) == 0:
        raise ValueError(f"no window of {seconds:g} s has a label: see bidmc_windows for which are "
                         "left out")
    signals = [recording["ppg"] for recording in recordings]
    inputs = Windows(signals, windows["recording"], windows["starts"], length, reduce=reduce)
    return windows | {"inputs": inputs, "starts": windows["starts"] / BIDMC_HZ}


def breath_rate(marks, starts, length, total):
    """Breaths per minute (n,) from the intervals between the marks of each window.

    A stretch of more than 10 s without a mark is missing annotation. Start and end of a recording
    count as marks there. The formula is in bidmc_windows.

    marks    samples, which count from 1; starts (n,), length of a window and total of the recording
             in samples
    returns  NaN for fewer than 4 marks and for a window that overlaps such a stretch
    Check:   marks every 500 samples are 15 per minute
    """
    marks = np.unique(marks) - 1  # a few marks occur twice
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
    """Breaths per minute (n,) from the number of marks with start <= mark < start + length."""
    count = np.searchsorted(marks, starts + length) - np.searchsorted(marks, starts)
    return 60 * BIDMC_HZ / length * count


def mean_inside(time, values, starts, seconds):
    """Mean (n,) of the values with start <= time < start + seconds and not NaN; NaN without any."""
    since = time - starts[:, None]
    inside = (since >= 0) & (since < seconds) & ~np.isnan(values)
    count = inside.sum(1)
    return np.where(count > 0, inside @ np.nan_to_num(values) / np.maximum(count, 1), np.nan)


def ppg_inputs(windows, rate_hz, *, kind, rate, bins=64):
    """Inputs of the encoder (n, channels, length) from a batch of windows (n, t).

        waveform  the standardised window: 1 channel of t samples
        spectrum  3 channels over the band of the task, a quarter wider at both ends. For rr log
                  power of the pulse's baseline, amplitude and frequency. For hr log power of the
                  window and of its slope, and a bump of one bin at data.upslope_rate

    A spectrum has no phase to overfit to. With about thirty patients, breathing could be learned
    from the spectrum but not from the waveform.

    Errors:  ValueError for another kind or rate
    Check:   4 * x + 1 gives the inputs of x, up to rounding
    """
    if kind not in ("waveform", "spectrum") or rate not in data.RATE_BANDS:
        raise ValueError(f"kind {kind!r} and rate {rate!r} must be 'waveform' or 'spectrum', 'rr' "
                         "or 'hr'")
    if kind == "waveform":
        return data.standardise(windows)[:, None]
    low, high = data.RATE_BANDS[rate]
    band = (low / 1.25, high * 1.25)
    if rate == "rr":
        signals = data.respiratory_signals(windows, rate_hz)
        return data.band_spectrum(signals, rate_hz, band, bins)
    spectra = [data.band_spectrum(x, rate_hz, band, bins) for x in (windows, windows.diff(dim=1))]
    grid = torch.linspace(*band, bins, dtype=windows.dtype, device=windows.device)
    beats_hz = data.upslope_rate(windows, rate_hz)[:, None] / 60
    bump = torch.exp(-0.5 * ((grid - beats_hz) / (grid[1] - grid[0])).square())
    return torch.stack([*spectra, torch.nan_to_num(bump)], 1)


class PPGSplit:
    """The PPG windows of one split: `labels`, and `batch(rows)` to train on.

    windows   the dict of bidmc_windows, with inputs at any reduced rate (never copied as a whole)
    rows      (m,), the rows of this split
    prepare   (windows (b, t)) -> inputs of the network, such as ppg_inputs
    scaler    a fitted LabelScaler for the targets, or None for windows without labels
    stretch   limit of time_stretch, 1 is off
    anchor    None, or (windows (b, t)) -> scaled rates (b,), which batches hold as `anchor`
    features  None, or a tensor (m, width) of a frozen encoder: batches hold its rows, not inputs
    masks     None, or a tensor bool (m, patches): batches without augmentation hold its rows as
              `mask`
    """

    chunk = 512

    def __init__(self, windows, rows, prepare, *, scaler=None, stretch=1.0, anchor=None,
                 device="cpu", names=None):
        self.inputs, self.rows, self.prepare = windows["inputs"], np.asarray(rows), prepare
        self.labels = windows["labels"][self.rows]
        self.second_reading = windows["second_reading"][self.rows]
        self.groups = windows["groups"][self.rows]
        self.scaler, self.stretch, self.anchor, self.names = scaler, stretch, anchor, names
        self.device, self.features, self.masks = torch.device(device), None, None

    def __len__(self):
        return len(self.rows)

    def signals(self, rows):
        """The windows (b, t) of rows of this split, as recorded."""
        return self.inputs[self.rows[rows]].to(self.device, non_blocking=True)

    def batch(self, rows, generator=None):
        """Gather rows of this split; stretch their time if a generator is given.

        inputs (b, c, n) or features (b, width); targets float (b,), scaled
        """
        labels = torch.from_numpy(self.labels[rows])
        index, batch = torch.from_numpy(np.asarray(rows)), {}
        if self.features is None or self.anchor is not None:
            windows = self.signals(rows)
            if generator is not None and self.stretch > 1:
                windows, labels = data.time_stretch(windows, labels, limit=self.stretch,
                                                    generator=generator)
        if self.anchor is not None:
            batch["anchor"] = self.anchor(windows)
        if self.features is not None:
            batch["features"] = self.features[index]
        else:
            batch["inputs"] = self.prepare(windows)
            if generator is None and self.masks is not None:
                batch["mask"] = self.masks[index].to(self.device)
        if self.scaler is None:
            return batch
        return batch | {"targets": self.scaler.transform(labels).float().to(self.device)}


def quantisation_cost(seconds):
    """Mean absolute errors of the true rate where labels are counts in T seconds, per minute.

    Events at an even rate r: a window holds r T / 60 = k + f of them on average, 0 <= f < 1. It has
    k + 1 in a share f of the windows and k in the others. Always predicting

        k + f, the true rate        costs f (1 - f) + (1 - f) f = 2 f (1 - f) counts
                                    1/3 over all f: 20 / T per minute
        the nearer of k and k + 1   costs min(f, 1 - f) counts, the least there is
                                    1/4 over all f: 15 / T per minute

    returns  (cost of the true rate, cost of its best rounding)
    Check:   quantisation_cost(10) == (2.0, 1.5)
    """
    return 20 / seconds, 15 / seconds


def synthetic_ppg(n_recordings=53, *, seconds=480, seed=0):
    """Drawn recordings, as read_bidmc returns them: for running and teaching, never for a result.

    A pulse of three harmonics is modulated by breathing in baseline, amplitude and (by 2 %)
    frequency. Both rates wander by 8 %. Each recording has its own scale (0..1 or 0..4) and its own
    strength of noise, of drift and of each modulation; in some recordings the baseline alone is too
    weak to show the rate. Annotators miss a breath by 0.06 s (sd), PULSE misses HR by 1. Every
    fifth recording has the patient of the one before.

    Check:   recording i is the same for every n_recordings
    """
    t = np.arange(round(seconds * BIDMC_HZ) + 1) / BIDMC_HZ
    recordings = []
    for i in range(n_recordings):
        rng = np.random.default_rng([seed, i])

        def wave(shortest, longest):
            """A sine of a random period in seconds and a random phase."""
            return np.sin(2 * np.pi * (t / rng.uniform(shortest, longest) + rng.uniform()))

        def modulation(weakest, strongest):
            """A sine in step with breathing, of a random strength and a random phase."""
            strength = rng.uniform(weakest, strongest)
            return strength * np.sin(2 * np.pi * (breath + rng.uniform()))

        def annotated():
            """Breath marks as an annotator sets them, samples that count from 1."""
            marks = breath_starts + rng.normal(0, 0.06 * BIDMC_HZ, len(breath_starts)).round()
            return np.sort(np.clip(marks, 0, len(t) - 1)).astype(np.int64) + 1

        breath_hz = rng.uniform(10, 25) / 60 * (1 + 0.08 * wave(60, 240))
        heart_hz = rng.uniform(60, 120) / 60 * (1 + 0.08 * wave(60, 240))
        breath = np.cumsum(breath_hz) / BIDMC_HZ + rng.uniform()  # number of breaths so far
        breath_starts = np.flatnonzero(np.diff(np.floor(breath))) + 1
        heart = 2 * np.pi * np.cumsum(heart_hz * (1 + 0.02 * np.sin(2 * np.pi * breath))) / BIDMC_HZ
        pulse = np.cos(heart) + 0.4 * np.cos(2 * heart - 1) + 0.1 * np.cos(3 * heart - 2)
        baseline = modulation(0, 0.5)
        amplitude = modulation(0.05, 0.3)
        noise = rng.uniform(0.05, 0.3) * rng.normal(size=len(t))
        noise = noise + rng.uniform(0, 0.6) * wave(8, 40)
        ppg = (1 + amplitude) * pulse + baseline + noise
        ppg = rng.choice([1, 4]) * (ppg - ppg.min()) / np.ptp(ppg)
        first, second = annotated(), annotated()
        hr = 60 * heart_hz[::BIDMC_HZ]
        recordings.append({"number": i + 1, "patient": f"patient{i * 4 // 5:03d}",
                           "ppg": ppg.astype(np.float32), "breaths": first, "breaths_2": second,
                           "time": t[::BIDMC_HZ], "hr": hr.round(),
                           "pulse": (hr + rng.normal(size=len(hr))).round()})
    return recordings
