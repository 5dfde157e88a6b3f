"""bidmc_rr and bidmc_hr: breaths and heart beats per minute from a PPG.

    python train.py --task bidmc_rr --lr 1e-3                        # drawn recordings
    python train.py --task bidmc_hr --lr 1e-3 --data bidmc_csv/ --folds 5

Reading, windows and drawn recordings are in bidmc_data.py, --mode pretrain in bidmc_pretrain.py.
"""

import functools
import math
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import losses
import models
from tasks import bidmc_data
from tasks.bidmc_data import PPGSplit
from tasks.common import (
    LABELLED, TRAINED, Exported, Flag, Rows, Splits, Task, head_outputs, joined, mean_over,
    mode_flags, refuse_folder, shared_flags, show, split_checksum, split_rows)

UNITS = {"rr": "breaths per minute", "hr": "beats per minute"}
REACH = 8  # per minute: how far the network may correct the anchor


def rate_of(args):
    """rr or hr."""
    return args.task.removeprefix("bidmc_")


def seconds_of(args):
    """Length of a window."""
    return 10 if args.protocol == "original" else args.seconds


def stride_of(args):
    """Seconds from the start of a window to that of the next."""
    return 2 if args.protocol == "original" else args.stride


def hz_of(args):
    """Samples per second after --reduce."""
    return bidmc_data.BIDMC_HZ / args.reduce


# --------------------------------------------------------------------------------------------------
# From recordings to splits


def read(path, cache, need_labels=True):
    """The recordings; on a terminal, one line shows which file is parsed."""
    if not path:
        return bidmc_data.synthetic_ppg()
    clear = "\r" + " " * 60 + "\r" if sys.stdout.isatty() else ""

    def progress(text):
        print(clear + text, end="", flush=True)

    try:
        return bidmc_data.read_bidmc(path, cache=cache, progress=progress if clear else None,
                                     need_labels=need_labels)
    finally:
        print(clear, end="", flush=True)


def network_inputs(windows, args):
    """Windows (b, t) at the reduced rate to what the encoder sees (b, channels, length)."""
    return bidmc_data.ppg_inputs(windows, hz_of(args), kind=args.inputs, rate=rate_of(args),
                                 bins=args.bins)


def anchor_of(args, facts):
    """What the network's output is added to: (windows) -> scaled rates (b,); None without one."""
    if args.anchor == "none":
        return None

    def beats(windows):
        rate = data.upslope_rate(windows, hz_of(args))
        return scaler_of(facts).transform(torch.nan_to_num(rate, nan=facts["median"])).float()
    return beats


def cut(recordings, args, rate):
    """Windows at the reduced rate, and the rows of the original split or None."""
    if args.protocol == "original":
        windows, rows = bidmc_data.bidmc_original(recordings, rate=rate, reduce=args.reduce)
    else:
        windows = bidmc_data.bidmc_windows(recordings, rate=rate, seconds=args.seconds,
                                           stride=args.stride, reduce=args.reduce)
        rows = None
    length = network_inputs(windows["inputs"][:1], args).shape[-1]
    if length < 2 * args.patch:
        raise ValueError(f"--patch {args.patch} must be at most {length // 2}: a window has "
                         f"{length} samples or bins, and two patches are the least")
    return windows, rows


def split_windows(windows, rows, recordings, args):
    """{split: rows of the windows}, without a split that has no share, and how it was done."""
    if args.protocol == "original":
        check_original(recordings)
        return rows, ("split: the original one, by recording; patients of validation and test "
                      "recordings are in training too")
    patients = np.array([recording["patient"] for recording in recordings])
    parts = split_rows(len(patients), args, patients)
    parts = dict(zip(("train", "validation", "test"), parts))
    parts = {name: part for name, part in parts.items() if len(part)}
    rows = {name: np.flatnonzero(np.isin(windows["recording"], part))
            for name, part in parts.items()}
    for name, part in rows.items():
        if len(part) == 0:
            raise ValueError(f"no window of the {name} split has a label: change --seed or the "
                             "ratios")
    counts = [f"{len(np.unique(patients[part]))} {name}" for name, part in parts.items()]
    return rows, f"split: by patient, {', '.join(counts)}, none on two sides"


def check_original(recordings):
    present = {recording["number"] for recording in recordings}
    needed = [number for part in bidmc_data.ORIGINAL_SPLIT.values() for number in part]
    missing = [str(number) for number in needed if number not in present]
    if missing:
        raise ValueError(f"--protocol original needs BIDMC's own recordings, {', '.join(missing)} "
                         "of its validation and test splits are not there: give the whole folder "
                         "bidmc_csv, or leave the variant out")


def checksum(windows, chunk=512):
    """Of all windows and labels, a chunk in memory at a time."""
    value, inputs = 0, windows["inputs"]
    for start in range(0, len(inputs), chunk):
        value = zlib.crc32(inputs[start : start + chunk].numpy(), value)
    return zlib.crc32(windows["labels"], value)


def data_note(path, recordings, windows, args):
    source = path or "SYNTHETIC recordings, drawn by the script: a score on them is no result"
    patients = {recording["patient"] for recording in recordings}
    return (f"data: {source}, {len(recordings)} recordings of {len(patients)} patients, "
            f"{len(windows['labels']):,} windows of {show(seconds_of(args))} s")


def window_names(recordings, windows):
    numbers = [recordings[index]["number"] for index in windows["recording"]]
    return [f"{number} at {start:g} s" for number, start in zip(numbers, windows["starts"])]


def load(path, args):
    """Read the recordings, cut windows, split them by patient, and fit the label scaler."""
    if args.protocol == "original" and not path:
        raise ValueError("--protocol original splits BIDMC by the numbers of its recordings: give "
                         "--data, PhysioNet's bidmc_csv")
    recordings = read(path, args.cache or run_folder(args))
    rate = None if args.mode == "pretrain" else rate_of(args)  # pretraining needs no labels
    windows, rows = cut(recordings, args, rate)
    rows, note = split_windows(windows, rows, recordings, args)
    notes = [data_note(path, recordings, windows, args), note]

    contents = np.array([zlib.crc32(recording["ppg"]) for recording in recordings])
    content = contents[windows["recording"]]
    seen = content[rows["train"]]
    facts = {"data": checksum(windows), "split": split_checksum(rows.values()),
             "seen": np.unique(seen).tolist(), "held_out": np.setdiff1d(content, seen).tolist()}
    scaler = None
    if rate:
        labels = windows["labels"]
        scaler = fit_scaler(labels[rows["train"]])
        facts["scaler"] = scaler.state_dict()
        facts["median"] = float(np.median(labels[rows["train"]]))
        if rate == "rr":
            facts["strong"] = fit_spectra(windows, rows["train"], args)
        for name, part in rows.items():
            notes.append(f"{name}: {len(part):,} windows, {UNITS[rate]} mean "
                         f"{labels[part].mean():.3f}, sd {labels[part].std(ddof=1):.3f}, "
                         f"{labels[part].min():.1f} to {labels[part].max():.1f}")

    names = window_names(recordings, windows)
    stretch = 1.0 if args.mode == "probe" else args.stretch
    splits = {}
    for name, part in rows.items():
        splits[name] = PPGSplit(
            windows, part, functools.partial(network_inputs, args=args), scaler=scaler,
            stretch=stretch, anchor=anchor_of(args, facts), device=args.device, names=names)
        if args.mode == "pretrain":
            splits[name].masks = hidden_patches(splits[name], args)
    return Splits(splits["train"], splits.get("validation"), splits.get("test"), facts, notes)


def fit_spectra(windows, rows, args):
    """Ridge regression of the breathing rate on the log spectra of these windows.

    The penalty is the number of columns, as if they together explained as much of the labels as
    they leave, times the number of windows that share a second and so tell the same.
    """
    x = over_chunks(functools.partial(log_spectra, args=args), windows["inputs"], rows)
    overlap = max(1.0, seconds_of(args) / stride_of(args))
    return losses.ridge_fit(x, windows["labels"][rows], penalty=x.shape[1] * overlap)


def log_spectra(windows, args):
    """What --inputs spectrum gives the network of 64 bins, as one row of 192 numbers a window."""
    return bidmc_data.ppg_inputs(windows, hz_of(args), kind="spectrum", rate="rr").flatten(1)


def over_chunks(function, windows, rows, chunk=512):
    """function of windows (b, t), 512 at a time: float64, one row per window."""
    parts = np.array_split(rows, math.ceil(len(rows) / chunk))
    return torch.cat([function(windows[part]) for part in parts]).double().numpy()


def run_folder(args):
    """The folder of the parsed recordings without --cache: beside the run, if there is one."""
    return str(Path(args.home).parent) if args.home else ""


def fit_scaler(labels):
    if labels.min() == labels.max():
        raise ValueError(f"all {len(labels):,} training labels are {labels[0]:g}: there is nothing "
                         "to learn; check the labels, or take other training rows with --seed or "
                         "the ratios")
    return data.LabelScaler().fit(labels)


def scaler_of(facts):
    """The label scaler that was fitted on the training rows."""
    scaler = data.LabelScaler()
    scaler.load_state_dict(facts["scaler"])
    return scaler


def hidden_patches(split, args):
    """Which patches pretraining is scored on, the same in every epoch: bool (m, patches)."""
    length = split.batch([0])["inputs"].shape[-1]
    generator = torch.Generator().manual_seed(0)
    return models.random_patch_mask(len(split), length // args.patch, args.mask_ratio,
                                    generator=generator)


def rows(path, args, facts, need_labels):
    labelled = need_labels and args.mode != "pretrain"
    recordings = read(path, args.cache, need_labels)
    windows, _ = cut(recordings, args, rate_of(args) if labelled else None)
    names = window_names(recordings, windows)
    split = PPGSplit(windows, np.arange(len(windows["starts"])),
                     functools.partial(network_inputs, args=args),
                     scaler=scaler_of(facts) if labelled else None, anchor=anchor_of(args, facts),
                     device=args.device, names=names)
    if args.mode == "pretrain":
        split.masks = hidden_patches(split, args)
    split.numbers = [recordings[index]["number"] for index in windows["recording"]]
    split.starts = windows["starts"]
    if not need_labels:
        return Rows(split, 0, [])
    return Rows(split, checksum(windows), [data_note(path, recordings, windows, args)])


# --------------------------------------------------------------------------------------------------
# The recipe


def encoder(args):
    channels = 3 if args.inputs == "spectrum" else 1
    return models.PPGEncoder(channels=channels, patch=args.patch, width=args.width,
                             depth=args.depth, heads=args.heads, dropout=args.dropout)


def network(args, facts):
    return models.PPGRegressor(encoder(args))


def criterion(outputs, targets, args):
    function = {"l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss, "mse": F.mse_loss}[args.loss]
    return function(outputs, targets)


def scaled_rates(model, batch, args, facts):
    """z-scored rates (b,): the network's output, or the anchor and a bounded correction."""
    output = head_outputs(model, batch)
    if args.anchor == "none":
        return output
    reach = REACH / facts["scaler"]["scale"]
    return batch["anchor"] + reach * torch.tanh(output / reach)


def loss(model, batch, args, facts):
    return criterion(scaled_rates(model, batch, args, facts), batch["targets"], args), {}


def outputs(model, batch, args, facts):
    return {"z": scaled_rates(model, batch, args, facts)}


def rates(outputs, facts):
    """Breaths or beats per minute, float64."""
    return scaler_of(facts).inverse(outputs["z"].double())


def scores(outputs, split, args, facts):
    return rate_scores(rates(outputs, facts).numpy(), split, args, facts)


def headline(outputs, split, args, facts):
    """Mean absolute error; see Task."""
    return mean_over(np.abs(rates(outputs, facts).numpy() - split.labels))


def rate_scores(prediction, split, args, facts, rows=slice(None)):
    """Scores of predictions per minute, of network or baseline; the loss is on z-scores."""
    labels, scale = split.labels[rows], scaler_of(facts).transform
    report = losses.regression_report(prediction[rows], labels, split.groups[rows])
    z, targets = torch.as_tensor(scale(prediction[rows])), torch.as_tensor(scale(labels))
    return {"loss": float(criterion(z, targets, args)), "mae": report["mae"],
            "rmse": report["rmse"], "r2": report["r2"], "patient_mae": report["group_mae"],
            "patient_sd": report["group_sd"]}


def simple_rates(split, args, facts):
    """{name: rates} of simple estimates; the training median where a window gives none.

    For hr nothing is learnt: the peak of the spectrum, the median interval between upslopes, and
    the median of these two and of the peak of the spectrum of the slope. For rr fit_spectra.
    """
    hz, band = hz_of(args), data.RATE_BANDS[rate_of(args)]

    def estimate(function):
        return np.nan_to_num(over_chunks(function, split.inputs, split.rows), nan=facts["median"])

    peak = estimate(lambda x: data.spectral_rate(x, hz, band))
    rates = {"spectral peak": peak}
    if rate_of(args) == "hr":
        beats = estimate(lambda x: data.upslope_rate(x, hz))
        slope = estimate(lambda x: data.spectral_rate(x.diff(dim=1), hz, band))
        rates["strong: beat intervals"] = beats
        rates["median of three"] = np.median([peak, beats, slope], axis=0)
    elif "strong" in facts:
        x = over_chunks(functools.partial(log_spectra, args=args), split.inputs, split.rows)
        rates["strong: ridge on log spectra"] = losses.linear_scores(facts["strong"], x)
    return rates


def floors(split, args, facts):
    """Constants of the training labels, simple_rates, and another reading of the same windows."""
    mean = np.full(len(split), scaler_of(facts).mean)
    median = np.full(len(split), facts["median"])
    rows = {"constant mean": rate_scores(mean, split, args, facts),
            "constant median": rate_scores(median, split, args, facts)}
    for name, estimate in simple_rates(split, args, facts).items():
        if name.startswith("strong"):
            rows[name] = {"z": torch.as_tensor(scaler_of(facts).transform(estimate))}
        else:
            rows[name] = rate_scores(estimate, split, args, facts)
    is_rr = rate_of(args) == "rr"
    if is_rr and args.protocol == "original":  # labels are counts: what knowing the true rate costs
        true_rate, best_count = bidmc_data.quantisation_cost(seconds_of(args))
        rows["true rate"] = {"mae": true_rate}
        rows["its best count"] = {"mae": best_count}
    known = ~np.isnan(split.second_reading)
    if known.any():
        name = "annotator 2" if is_rr else "PULSE, the monitor's own rate"
        rows[name] = rate_scores(split.second_reading, split, args, facts, known)
    return rows


def predictions(batches, split, out, args, facts):
    """A CSV with a row per window."""
    refuse_folder(out)
    values = rates(joined(batches), facts).tolist()
    unit = UNITS[rate_of(args)].replace(" ", "_")
    table = zip(split.numbers, split.starts, values)
    data.write_csv(out, ["recording", "start_s", "seconds", unit],
                   ([number, f"{start:g}", show(seconds_of(args)), f"{value:.3f}"]
                    for number, start, value in table))
    return len(values)


def examples(outputs, split, args, facts):
    """The worst is the rate that is furthest from its label."""
    predicted = rates(outputs, facts).numpy()
    return np.abs(predicted - split.labels), {"true": split.labels, "predicted": predicted}


def export(model, args, facts):
    """Windows as a sensor gives them, at 125 samples per second; --reduce happens inside."""
    seconds, unit = seconds_of(args), UNITS[rate_of(args)]
    hz = bidmc_data.BIDMC_HZ

    def forward(inputs):
        windows = data.reduce_rate(inputs["ppg"], args.reduce)
        batch = {"inputs": network_inputs(windows, args)}
        if args.anchor != "none":
            batch["anchor"] = anchor_of(args, facts)(windows)
        return rates(outputs(model, batch, args, facts), facts)

    return Exported(
        forward=forward,
        inputs={"ppg": ("float32", ("rows", round(seconds * hz)),
                        f"{show(seconds)} s of PPG at {hz} samples per second, of any scale and "
                        "level, without gaps")},
        output=(unit.replace(" ", "_"), ("rows",), unit),
        facts={"samples_per_second": hz, "label_mean": facts["scaler"]["mean"],
               "label_sd": facts["scaler"]["scale"]})


# The original run: counts in windows of 10 s, its own split by recording, patches of 1 s at 125 Hz,
# a rate that never moved. A, B and C are its three runs, with the small encoder of `--variant
# original --mode pretrain` in place of theirs and a linear head.
ORIGINAL = dict(
    protocol="original", inputs="waveform", reduce=1, patch=125, stretch=1.0, dropout=0.3,
    loss="mse", monitor="mae", anchor="none",
    batch_size=512, epochs=1024, patience=5, clip=0.0,
    lr=1e-4, schedule="none", warmup_epochs=0.0, weight_decay=1e-4, ema_decay=0.0,
)
A = ORIGINAL | dict(mode="finetune", backbone_lr=1e-5)
B = ORIGINAL | dict(mode="probe")
C = A | dict(lr=5e-5, backbone_lr=5e-6, weight_decay=1e-3)

BY_PATIENT = {"protocol": ("patients",)}


def flags(bins, error, anchors):
    """The two rates differ in how many bins the wider band needs, and in what is known before."""
    flags = shared_flags(
        epochs=12, batch_size=64, weight_decay=0.05, restart_epochs=4.0, cyclic_steps_up=200,
        patience=5, train_ratio=0.65, val_ratio=0.15)
    # the original split is a list of recordings
    for name in ("train_ratio", "val_ratio", "test_ratio", "folds", "fold"):
        flags[name] = flags[name].read_with(BY_PATIENT)
    flags["compile"] = flags["compile"].read_with({"mode": TRAINED})
    return flags | mode_flags() | dict(
        monitor=Flag("mae", "validation score that picks the epoch, and raw or EMA weights",
                     choices=("mae", "rmse", "r2", "loss", "last")),
        protocol=Flag("patients", "patients: labels and split as they should be; original: windows "
                      "of 10 s every 2 s, breaths counted, the original list of recordings",
                      choices=("patients", "original")),
        seconds=Flag(32.0, "length of a window", low=5, high=480, when=BY_PATIENT),
        stride=Flag(4.0, "seconds from one window to the next", above=0, when=BY_PATIENT),
        reduce=Flag(4, "keep a mean of this many samples of the 125 a second", low=1, high=12,
                    backbone=True),
        inputs=Flag("spectrum", "spectrum: log power in the band of the task, phase left out; "
                    "waveform: the samples", choices=("spectrum", "waveform"), backbone=True),
        bins=Flag(bins, "frequencies of the spectrum", low=4, when={"inputs": ("spectrum",)},
                  backbone=True),
        patch=Flag(4, "samples or bins of a token", low=1, backbone=True),
        width=Flag(64, "of a token", low=2, backbone=True),
        depth=Flag(2, "transformer layers", low=1, backbone=True),
        heads=Flag(4, "attention heads, must divide --width", low=1, backbone=True),
        dropout=Flag(0.1, "in the encoder, while it is trained", low=0, high=0.95,
                     when={"mode": TRAINED}),
        stretch=Flag(1.25, "play windows up to so many times faster or slower, and scale the label "
                     "(1 = off)", low=1, high=1.99, when={"mode": TRAINED}),
        anchor=Flag(anchors[0], "what the network's output is added to: beats, the median interval "
                    f"between upslopes, which it corrects by {REACH} a minute at most; or none",
                    choices=anchors, when={"mode": LABELLED}, otherwise="none"),
        loss=Flag(error, "on z-scored labels", choices=("l1", "smooth_l1", "mse"),
                  when={"mode": LABELLED}),
        mask_ratio=Flag(0.5, "share of the patches that pretraining hides", above=0, high=0.95,
                        when={"mode": ("pretrain",)}),
    )


def task(bins, error, anchors):
    return Task(
        flags=flags(bins, error, anchors), variants={"original": ORIGINAL, "A": A, "B": B, "C": C},
        load=load, rows=rows, network=network, loss=loss, outputs=outputs, scores=scores,
        floors=floors, headline=headline, predictions=predictions, examples=examples, export=export)


TASKS = {"bidmc_rr": task(bins=64, error="smooth_l1", anchors=("none",)),
         "bidmc_hr": task(bins=96, error="l1", anchors=("beats", "none"))}
