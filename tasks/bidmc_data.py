"""The data of bidmc_rr and bidmc_hr: recordings, windows, labels, drawn recordings, batches."""

import hashlib
import lzma
import re
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch

import data


BIDMC_HZ = 125  # samples per second of the PPG
# recording numbers, the rest trains
ORIGINAL_SPLIT = {"validation": (11, 19, 21, 23, 53), "test": (8, 15, 29, 39, 43, 52)}


def read_bidmc(folder, *, cache="", progress=None, need_labels=True):
    """Read PhysioNet's bidmc_csv folder as it is: a list of one dict per recording, in the order of
    their names.

        bidmc_NN_Signals.csv   the column PLETH, 125 per second        bidmc_NN_Breaths.csv   ann1
                               and ann2
        bidmc_NN_Numerics.csv  Time [s], HR and PULSE, 1 per second    bidmc_NN_Fix.txt       the
                               patient

    Any .csv may be a .csv.xz. 53 recordings come from 46 patients: split by patient, never by
    recording.

    cache        a folder: what was parsed is kept there, parsed once per content of the files, and
                 the signals are memory-mapped
    progress     progress(text) is called before each recording that is parsed
    need_labels  False: the signals are enough; number, patient (the name of the recording where
                 _Fix.txt is missing) and ppg
    returns   a list of dicts: number int, patient str, ppg float32 (t,), breaths and breaths_2
              int64, the marks of the annotators (1-based samples, sorted, as they are otherwise),
              time, hr, pulse float64 (one a second, NaN = none)
    Errors: ValueError naming the file for whatever is missing, cut off, without a column, without a
            number, NaN in PLETH.
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
        raise ValueError(f"{folder} holds no bidmc_NN_Signals.csv: give PhysioNet's folder "
                         "bidmc_csv")
    return files, names


def write_bidmc_cache(file, recordings):
    """Write recordings one at a time: the signals end to end into an .npy, the rest into an .npz.

    """
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
    """The recordings of write_bidmc_cache, whose signals are memory-mapped."""
    recordings, start = {}, 0
    with np.load(file, allow_pickle=False) as archive:
        for entry in archive.files:
            i, field = entry.split("/")
            value = archive[entry]
            recordings.setdefault(i, {})[field] = value if value.ndim else value.item()
    signals = np.asarray(data.map_npy(file.with_suffix(".ppg.npy")))
    for recording in recordings.values():
        stop = start + recording["ppg"]  # so far the number of samples
        recording["ppg"] = signals[start:stop]
        start = stop
    if start != len(signals):
        raise ValueError(f"{len(signals)} samples instead of {start}")
    return list(recordings.values())


def read_bidmc_recording(folder, name, *, need_labels=True):
    """The files of one recording, checked against each other; see read_bidmc."""
    fix = folder / f"{name}_Fix.txt"
    patient = re.search(r"matched wdb ID: *(\w+)", fix.read_text(encoding="utf-8") if fix.is_file()
                        else "")
    if not patient and need_labels:
        raise ValueError(f"{fix} is missing or has no line 'MIMIC II matched wdb ID: sNNNNN': no "
                         "patient, no safe split")
    [ppg] = read_columns(folder / f"{name}_Signals.csv", ["PLETH"])
    if not np.isfinite(ppg).all():
        what = "NaN" if np.isnan(ppg).any() else "infinite values"
        raise ValueError(f"{folder / name}_Signals.csv: PLETH holds {(~np.isfinite(ppg)).sum()} "
                         f"{what} in {len(ppg)} rows: cut them out or remove the recording")
    recording = {"number": int(name.partition("_")[2]), "patient": patient[1] if patient else name,
                 "ppg": ppg.astype(np.float32)}
    if not need_labels:
        return recording
    time, hr, pulse = read_columns(folder / f"{name}_Numerics.csv", ["Time [s]", "HR", "PULSE"])
    breaths = read_columns(folder / f"{name}_Breaths.csv",
                           [f"breaths ann{k} [signal sample no]" for k in (1, 2)])
    for column, values in {"Time [s]": time, "HR": hr, "PULSE": pulse}.items():
        if np.isinf(values).any():
            raise ValueError(f"{folder / name}_Numerics.csv: {column} holds "
                             f"{np.isinf(values).sum()} infinite values: empty those cells")
        if np.isnan(values).all():
            raise ValueError(f"{folder / name}_Numerics.csv: {column} holds no number: remove the "
                             "recording")
    seconds, last = len(ppg) / BIDMC_HZ, np.nanmax(time)
    if abs(seconds - last) > 2:  # bidmc_23 starts and ends a second early
        raise ValueError(f"{folder / name}: the signals last {seconds:.1f} s, the numerics "
                         f"{last:.1f} s: one of the two files is cut off, copy them again")
    timed = ~np.isnan(time)  # bidmc_01 has a last row without a time: the means of the columns
    first, second = (np.sort(marks[~np.isnan(marks)]).astype(np.int64) for marks in breaths)
    return recording | {"breaths": first, "breaths_2": second, "time": time[timed], "hr": hr[timed],
                        "pulse": pulse[timed]}


def read_columns(path, names):
    """Columns of a CSV (or CSV.xz) by their stripped names, as float64 (len(names), rows); an empty
    cell is NaN.

    Errors: ValueError naming the file for a missing file or column, a short row, a cell that is no
            number, a cut-off .xz.
    """
    packed = path.with_name(path.name + ".xz")
    path = path if path.is_file() or not packed.is_file() else packed
    if not path.is_file():
        raise ValueError(f"{path} is missing (and so is {packed.name}): copy the whole folder "
                         "bidmc_csv")
    try:
        with (lzma.open if path == packed else open)(path, "rt", encoding="utf-8-sig") as file:
            header = [name.strip() for name in file.readline().split(",")]
            absent = [name for name in names if name not in header]
            if absent:
                raise ValueError(f"no column {absent[0]!r} among {header}")
            columns = [header.index(name) for name in names]
            return np.loadtxt(file, delimiter=",", comments=None, usecols=columns, ndmin=2,
                              encoding="utf-8",
                              converters=lambda cell: float(cell.strip() or "nan")).T
    except (ValueError, OSError, EOFError, lzma.LZMAError) as error:
        raise ValueError(f"{path} is cut off or no such table ({error}): copy it again") from error


class Windows:
    """Windows of recorded signals, cut when they are asked for: windows[rows] is a float32 tensor
    (b, t), len() their number.

    They overlap, and the signals may be memory-mapped: neither is ever copied as a whole.

    signals  list of float32 arrays (t_i,); of window k the signal index[k] from sample starts[k]
             on, for `length` samples
    reduce   each is given at a `reduce`-th of its rate, see reduce_rate
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
    """Labelled windows: breaths per minute from the intervals between breath marks, or the
    monitor's mean heart rate.

        rr = 60 (m - 1) / (t_last - t_first)    of annotator 1's m >= 4 marks inside; ceiling:
        annotator 2's
        hr = mean of HR inside, without NaN     ceiling: the mean of PULSE, the same monitor's rate
        from the PPG

    Windows without a label are left out, and so are, for rr, those that overlap more than 10 s
    without a mark.

    rate     "rr" or "hr"; None: every window, labels and ceiling NaN
    seconds  of a window; stride: seconds from one start to the next; reduce: factor by which the
             rate of its samples falls
    returns  a dict: inputs Windows, whose inputs[rows] is a float32 tensor (b, t), as recorded;
             labels and ceiling float64 (n,), per minute, ceiling NaN where there is none; groups
             str (n,), the patients; recording int (n,), an index; starts float64 (n,), seconds
    Errors: ValueError for another rate, no length or stride, a window longer than a recording, no
            window with a label.
    """
    return cut_windows(recordings, rate, breath_rate, length=round(seconds * BIDMC_HZ),
                       stride=round(stride * BIDMC_HZ), reduce=reduce)


def bidmc_original(recordings, *, rate, reduce=1):
    """The windows, labels and split of the original run: 10 s every 2 s, breaths counted,
    recordings held out.

        rr = 6 x marks of annotator 1 in [start, start + 1250), the 1-based marks taken as 0-based;
        hr as in bidmc_windows

    For comparison only: 60 % of the rr labels are exactly 18, so a constant 18 has a mean absolute
    error of 2.222 (validation) and 2.352 (test); and patients of validation and test recordings are
    in training.

    returns windows as bidmc_windows does, and rows: a dict of index arrays train, validation, test
    Check:  9,912 / 1,180 / 1,416 windows; training labels 17.216 (sd 4.430) breaths, 88.12 (11.76)
            beats per minute
    """
    windows = cut_windows(recordings, rate, breath_count, length=10 * BIDMC_HZ, stride=2 * BIDMC_HZ,
                          reduce=reduce)
    numbers = np.array([recording["number"] for recording in recordings])[windows["recording"]]
    held_out = {name: np.isin(numbers, members) for name, members in ORIGINAL_SPLIT.items()}
    rows = {"train": ~(held_out["validation"] | held_out["test"])} | held_out
    return windows, {name: np.flatnonzero(chosen) for name, chosen in rows.items()}


def cut_windows(recordings, rate, breaths_to_rate, *, length, stride, reduce=1):
    """The windows of bidmc_windows and bidmc_original, which see; length and stride in samples.

    breaths_to_rate  (marks, starts, length, total length), all in samples -> breaths per minute
                     like starts, NaN = no label
    """
    if rate not in ("rr", "hr", None):
        raise ValueError(f"rate {rate!r} must be 'rr' (breathing) or 'hr' (heart), or None for "
                         "windows without labels")
    if length < 1 or stride < 1:
        raise ValueError(f"windows of {length} samples every {stride}: both must be at least 1, "
                         f"{BIDMC_HZ} are a second")
    seconds, parts = length / BIDMC_HZ, []
    for index, recording in enumerate(recordings):
        ppg = recording["ppg"]
        if len(ppg) < length:
            raise ValueError(f"recording {recording['number']} lasts {len(ppg) / BIDMC_HZ:.1f} s, "
                             f"a window {seconds:g} s")
        starts = np.arange(0, len(ppg) - length + 1, stride)
        if rate == "rr":
            labels, ceiling = (breaths_to_rate(recording[name], starts, length, len(ppg))
                               for name in ("breaths", "breaths_2"))
        elif rate is None:
            labels = ceiling = np.full(len(starts), np.nan)
        else:
            time, since = recording["time"], starts / BIDMC_HZ
            labels, ceiling = (mean_inside(time, recording[name], since, seconds)
                               for name in ("hr", "pulse"))
        keep = ~np.isnan(labels) | (rate is None)
        count = np.count_nonzero(keep)
        parts.append({"labels": labels[keep], "ceiling": ceiling[keep], "starts": starts[keep],
                      "recording": np.full(count, index),
                      "groups": np.full(count, recording["patient"])})
    windows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if len(windows["labels"]) == 0:
        raise ValueError(f"no window of {seconds:g} s has a label: see bidmc_windows for which are "
                         "left out")
    signals = [recording["ppg"] for recording in recordings]
    inputs = Windows(signals, windows["recording"], windows["starts"], length, reduce=reduce)
    return windows | {"inputs": inputs, "starts": windows["starts"] / BIDMC_HZ}


def breath_rate(marks, starts, length, total):
    """Breaths per minute (n,) from the intervals between the marks in each window; see
    bidmc_windows.

    A stretch of more than 10 s without a mark is missing annotation; start and end of a recording
    count as marks there.

    marks   1-based samples; starts (n,), length of a window and total of the recording in samples
    returns NaN for fewer than 4 marks and for a window that overlaps such a stretch
    Check:  marks every 500 samples are 15 per minute
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
    """Breaths per minute (n,) as a count: the marks with start <= mark < start + length; see
    bidmc_original."""
    return 60 * BIDMC_HZ / length * (np.searchsorted(marks, starts + length)
                                     - np.searchsorted(marks, starts))


def mean_inside(time, values, starts, seconds):
    """Mean (n,) of the values with start <= time < start + seconds, without NaN; NaN where there is
    none."""
    since = time - starts[:, None]
    inside = (since >= 0) & (since < seconds) & ~np.isnan(values)
    count = inside.sum(1)
    return np.where(count > 0, inside @ np.nan_to_num(values) / np.maximum(count, 1), np.nan)


def ppg_inputs(windows, rate_hz, *, kind, rate, bins=64):
    """What the encoder sees of a batch of windows: (n, t) -> (n, channels, length), one of two
    kinds.

        waveform   the window, standardised: 1 channel of t samples
        spectrum   log power in the band of the task, a quarter wider at both ends: hr 1 channel,
                   the window's; rr 3 channels, of the baseline, the amplitude and the frequency of
                   the pulse

    The spectrum has no phase to overfit to: of some thirty patients, breathing was learnt from it
    and not from the waveform.

    Errors: ValueError for another kind or rate.
    Check:  4 * x + 1 gives what x gives, but for rounding
    """
    if kind not in ("waveform", "spectrum") or rate not in data.RATE_BANDS:
        raise ValueError(f"kind {kind!r} and rate {rate!r} must be 'waveform' or 'spectrum', 'rr' "
                         "or 'hr'")
    if kind == "waveform":
        return data.standardise(windows)[:, None]
    low, high = data.RATE_BANDS[rate]
    signals = data.respiratory_signals(windows, rate_hz) if rate == "rr" else windows[:, None]
    return data.band_spectrum(signals, rate_hz, (low / 1.25, high * 1.25), bins)


class PPGSplit:
    """Some rows of a set of PPG windows as a training loop sees them: `labels`, and `batch(rows)`
    to train on.

    windows   the dict of bidmc_windows, its inputs at any reduced rate (never copied as a whole);
              rows (m,) of this split
    prepare   (windows (b, t)) -> inputs of the network, such as ppg_inputs
    scaler    a fitted LabelScaler for the targets, or None for windows without labels
    stretch   limit of time_stretch, 1 is off
    features  set it to a tensor (m, width), and batches hold its rows instead of inputs: what a
              frozen encoder made of them
    masks     set it to a tensor bool (m, patches): batches that are not augmented hold them as
              `mask`
    """

    chunk = 512

    def __init__(self, windows, rows, prepare, *, scaler=None, stretch=1.0, device="cpu",
                 names=None):
        self.inputs, self.rows, self.prepare = windows["inputs"], np.asarray(rows), prepare
        self.scaler, self.names, self.masks = scaler, names, None
        self.labels, self.ceiling, self.groups = (windows[name][self.rows]
                                                  for name in ("labels", "ceiling", "groups"))
        self.stretch, self.device, self.features = stretch, torch.device(device), None

    def __len__(self):
        return len(self.rows)

    def signals(self, rows):
        """The windows (b, t) of rows of this split, as recorded."""
        return self.inputs[self.rows[rows]].to(self.device, non_blocking=True)

    def batch(self, rows, generator=None):
        """inputs (b, c, n) or features (b, width), and targets float (b,), scaled. Stretches time
        if given a generator."""
        labels = torch.from_numpy(self.labels[rows])
        if self.features is not None:
            batch = {"features": self.features[torch.from_numpy(np.asarray(rows))]}
        else:
            windows = self.signals(rows)
            if generator is not None and self.stretch > 1:
                windows, labels = data.time_stretch(windows, labels, limit=self.stretch,
                                                    generator=generator)
            batch = {"inputs": self.prepare(windows)}
            if generator is None and self.masks is not None:
                batch["mask"] = self.masks[torch.from_numpy(np.asarray(rows))].to(self.device)
        if self.scaler is None:
            return batch
        return batch | {"targets": self.scaler.transform(labels).float().to(self.device)}


def quantisation_cost(seconds):
    """What the true rate itself costs where labels are counts in T seconds: mean absolute errors
    per minute.

    Even events at a rate r, a window anywhere: it holds r T / 60 = k + f of them on average, 0 <= f
    < 1, which is k + 1 in a share f of the windows and k in the others. Predicting always

        k + f, the true rate        costs f (1 - f) + (1 - f) f = 2 f (1 - f) counts, over all f
                                    1/3: 20 / T per minute
        the nearer of k and k + 1   costs min(f, 1 - f) counts, the least there is, over all f 1/4:
                                    15 / T per minute

    returns (cost of the true rate, cost of its best rounding)
    Check:  quantisation_cost(10) == (2.0, 1.5)
    """
    return 20 / seconds, 15 / seconds


def synthetic_ppg(n_recordings=53, *, seconds=480, seed=0):
    """Made-up recordings as read_bidmc returns them, for running and teaching, never for a result.

    A pulse of three harmonics, modulated by breathing in baseline, amplitude and (by 2 %)
    frequency; both rates wander by 8 %. Each recording has its own strength of noise, of drift and
    of each modulation, in some too weak for the baseline alone to tell the rate, and a scale of
    0..1 or 0..4. Annotators miss a breath by 0.06 s (sd), PULSE misses HR by 1. Every fifth
    recording is of the same patient as the one before.

    Check:  recording i is the same for every n_recordings
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
        noise = rng.uniform(0.05, 0.3) * rng.normal(size=len(t))
        noise = noise + rng.uniform(0, 0.6) * wave(rng.uniform(8, 40))
        ppg = (1 + amplitude) * pulse + baseline + noise
        ppg = rng.choice([1, 4]) * (ppg - ppg.min()) / np.ptp(ppg)
        mark = np.flatnonzero(np.diff(np.floor(breath))) + 1
        marks = [np.sort(np.clip(mark + rng.normal(0, 0.06 * BIDMC_HZ, len(mark)).round(), 0, len(t)
                                 - 1)).astype(np.int64) + 1 for _ in range(2)]
        hr = 60 * heart_hz[::BIDMC_HZ]
        recordings.append({"number": i + 1, "patient": f"patient{i * 4 // 5:03d}",
                           "ppg": ppg.astype(np.float32), "breaths": marks[0],
                           "breaths_2": marks[1], "time": t[::BIDMC_HZ], "hr": hr.round(),
                           "pulse": (hr + rng.normal(size=len(hr))).round()})
    return recordings
