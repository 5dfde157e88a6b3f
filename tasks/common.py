"""The contract of a task, and code that several tasks share: flags, splits of rows, batches.

A task is one module with one TASK = Task(...). README lists the steps to add one.
"""

import contextlib
import dataclasses
import math
import zipfile
import zlib
from pathlib import Path
from typing import Callable

import numpy as np
import torch

import data


@dataclasses.dataclass(frozen=True)
class Flag:
    """One setting of a recipe: its default, its help text and its bounds."""

    default: object
    help: str
    low: float = -math.inf  # value >= low
    above: float = -math.inf  # value > above
    high: float = math.inf  # value <= high
    choices: tuple = ()
    # {other flag: values with which this one is read}
    when: dict = dataclasses.field(default_factory=dict)
    otherwise: object = None  # the value that the loop takes where the flag is not read
    backbone: bool = False  # shapes the encoder or its input: must be as it was in pretraining

    def unmet(self, args):
        """The first (flag, values) of `when` that the settings do not meet, or None."""
        for name, values in self.when.items():
            if getattr(args, name) not in values:
                return name, values
        return None

    def check(self, name, value):
        """ValueError with value, bound and remedy for a number outside the bounds."""
        numbers = value if isinstance(value, tuple) else (value,)
        if all(isinstance(number, str) or self.allows(number) for number in numbers):
            return
        bounds = []
        if self.low > -math.inf:
            bounds.append(f"at least {self.low:g}")
        if self.above > -math.inf:
            bounds.append(f"above {self.above:g}")
        if self.high < math.inf:
            bounds.append(f"at most {self.high:g}")
        raise ValueError(f"{spelled(name)} {show(value)} must be finite and "
                         f"{' and '.join(bounds)}: the default is {show(self.default)}")

    def read_with(self, when):
        """The same flag, read only with these values of other flags as well."""
        return dataclasses.replace(self, when=self.when | when)

    def allows(self, number):
        finite = abs(number) < 2**64 if isinstance(number, int) else math.isfinite(number)
        return finite and self.above < number <= self.high and number >= self.low


def spelled(name):
    """A flag's name as it is typed."""
    return "--" + name.replace("_", "-")


def show(value):
    """A flag's value as it is typed."""
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return str(value)


# --------------------------------------------------------------------------------------------------
# The flags that the loop reads

WARMED_UP = ("cosine", "restarts", "plateau", "none")  # schedules that --warmup-epochs precedes

SHARED_FLAGS = dict(
    epochs=Flag(10, "passes over the training set", low=1),
    batch_size=Flag(32, "rows of a batch, those of all processes of torchrun together", low=1),
    base_batch=Flag(0, "scale --lr by batch_size * accumulate / base_batch (0 = off)", low=0),
    accumulate=Flag(1, "batches per optimizer step", low=1),
    lr=Flag(1e-3, "peak learning rate", above=0),
    weight_decay=Flag(1e-2, "AdamW's decoupled weight decay", low=0),
    beta2=Flag(0.999, "AdamW's decay of the mean squared gradient", low=0, high=0.99999),
    schedule=Flag("cosine", "learning rate over the steps; plateau watches a validation score of "
                  "the raw weights", choices=("cosine", "restarts", "cyclic", "plateau", "none")),
    cosine_epochs=Flag(0.0, "cosine: it ends after this many epochs and stays at --min-lr (0 = "
                       "--epochs)", low=0, when={"schedule": ("cosine",)}),
    warmup_epochs=Flag(0.5, "linear warm-up before any schedule but cyclic (0 = off)", low=0,
                       when={"schedule": WARMED_UP}),
    warmup_start_lr=Flag(1e-6, "learning rate of the very first step, if there is a warm-up", low=0,
                         when={"schedule": WARMED_UP}),
    min_lr=Flag(1e-6, "where cosine and restarts end, and what plateau never goes below", low=0,
                when={"schedule": ("cosine", "restarts", "plateau")}),
    plateau_watches=Flag("loss", "plateau: the loss, or the score of --monitor",
                         choices=("loss", "monitor"), when={"schedule": ("plateau",)}),
    plateau_factor=Flag(0.5, "plateau: lr is multiplied by this", above=0, high=0.999,
                        when={"schedule": ("plateau",)}),
    plateau_patience=Flag(2, "plateau: epochs without improvement that are tolerated", low=0,
                          when={"schedule": ("plateau",)}),
    restart_epochs=Flag(10.0, "restarts: epochs of the first cycle", above=0,
                        when={"schedule": ("restarts",)}),
    restart_mult=Flag(2, "restarts: each cycle is this many times longer", low=1,
                      when={"schedule": ("restarts",)}),
    cyclic_base_lr=Flag(1e-5, "cyclic: lower rate; --lr is the upper one", above=0,
                        when={"schedule": ("cyclic",)}),
    cyclic_steps_up=Flag(500, "cyclic: optimizer steps from the lower to the upper rate", low=1,
                         when={"schedule": ("cyclic",)}),
    clip=Flag(1.0, "largest gradient norm (0 = no clipping)", low=0),
    ema_decay=Flag(0.99, "average of the weights, horizon 1 / (1 - decay) steps, warmed up (0 = "
                   "off)", low=0, high=0.99999),
    patience=Flag(0, "stop after this many epochs without a new best (0 = never)", low=0),
    min_delta=Flag(0.0, "a new best must be this much better to count for --patience", low=0),
    amp=Flag("off", "autocast precision of forward and loss", choices=("off", "bf16", "fp16")),
    compile=Flag(False, "torch.compile the network"),
    seed=Flag(0, "fixes the split, the initial weights, the order and the augmentation", low=0),
    train_ratio=Flag(0.7, "share of the training split", above=0, high=1, when={"folds": (0,)}),
    val_ratio=Flag(0.1, "share of the validation split, which picks the epoch (0 = the training "
                   "loss does); with --folds: of the rows that a fold leaves", low=0, high=0.99),
    test_ratio=Flag(0.2, "share of the test split, scored at the end only (0 = none)", low=0,
                    high=1, when={"folds": (0,)}),
    folds=Flag(0, "cross-validation: each group is in one of so many test splits; a run each, in "
               "OUT/fold-1, OUT/fold-2, ... (0 = one split by the ratios)", low=0),
    fold=Flag(0, "with --folds: train this fold alone, in --out itself (0 = all, one after the "
              "other)",
              low=0),
)

TRAINED = ("scratch", "pretrain", "finetune", "partial")  # modes that train the encoder
LABELLED = ("scratch", "probe", "finetune", "partial")  # modes that read labels

MODE_FLAGS = dict(
    mode=Flag("scratch", "scratch: train everything from random weights; pretrain: the encoder, "
              "without labels; and from an encoder given as --pretrained: probe trains the head "
              "alone, on features computed once, finetune everything, partial the head and the "
              "last layers",
              choices=("scratch", "pretrain", "probe", "finetune", "partial")),
    pretrained=Flag("", "best.pt of a --mode pretrain run on the same split, or the run's folder "
                    "(with --folds: the folder of all its folds)",
                    when={"mode": ("probe", "finetune", "partial")}),
    backbone_lr=Flag(1e-3, "peak learning rate of the pretrained encoder; --lr is the head's",
                     above=0,
                     when={"mode": ("finetune", "partial")}),
    unfreeze_last=Flag(1, "layers of the encoder that are trained, the last ones", low=1,
                       when={"mode": ("partial",)}),
)


def with_defaults(flags, **defaults):
    """The same flags with other defaults."""
    changed = dict(flags)
    for name, default in defaults.items():
        changed[name] = dataclasses.replace(flags[name], default=default)
    return changed


def shared_flags(**defaults):
    """The flags that the loop reads, with the defaults in which this task differs."""
    return with_defaults(SHARED_FLAGS, **defaults)


def mode_flags(**defaults):
    """The flags of a task whose network has an `encoder` that can be pretrained."""
    return with_defaults(MODE_FLAGS, **defaults)


# --------------------------------------------------------------------------------------------------
# The contract

# Names of scores that a run can select by, and which way they go. A new score is added to one.
LOWER_IS_BETTER = ("loss", "mae", "rmse", "patient_mae", "patient_sd", "recon", "kl")
HIGHER_IS_BETTER = ("f1", "accuracy", "macro_f1", "auroc", "auprc", "f", "f_pooled", "miou", "r2")


@dataclasses.dataclass
class Splits:
    """The rows of a run.

    A split has len(), .batch(rows, generator), .chunk (the number of rows scored at once) and
    .rows (its row numbers in the whole set, for examples.csv). It may have .labels (integers count
    as classes), .groups, and .names of the whole set. A batch holds `inputs` and, with labels,
    `targets`, on the device of the settings.

    facts: plain values measured on training rows (class weights, label scale), kept in every
    checkpoint. `data` and `split` are checksums. `seen` and `held_out` are the cases of the
    training rows and of the others: a pretrained encoder must not have seen the latter. `strong`
    is the simple model that stands beside the network, fitted on training rows.
    """

    train: object
    validation: object  # None without rows, as test
    test: object
    facts: dict
    notes: list  # lines to print: what was read, how it was split, what cannot be excluded
    train_eval: object = None  # as many training rows as in validation, scored after every epoch

    def named(self):
        """The splits that have rows, by the names that --split takes."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: split for name, split in splits.items() if split is not None}


@dataclasses.dataclass
class Rows:
    """All rows of a file, for --eval and --predict."""

    split: object
    checksum: int  # the `data` of a run's facts, if these are its rows
    notes: list


@dataclasses.dataclass(frozen=True)
class Task:
    """Everything that train.py knows of a task.

    args: the settings; facts: the values that `load` measured. A batch is a dictionary, to which
    train.py adds `step`, the number of optimizer steps so far.
    """

    flags: dict  # name -> Flag
    variants: dict  # name -> {flag: value}
    load: Callable  # (path or "", args) -> Splits
    rows: Callable  # (path, args, facts, need_labels) -> Rows: all rows of a file
    network: Callable  # (args, facts) -> nn.Module
    loss: Callable  # (model, batch, args, facts) -> scalar, {part: scalar}
    outputs: Callable  # (model, batch, args, facts) -> {name: tensor}, one row per sample
    # (outputs, split, args, facts) -> {score: number} over the whole split, with a "loss";
    # {column: number} in place of the number is a row of a table, such as a score of every class
    scores: Callable
    # (split, args, facts) -> {name: scores}: constants, simple models, ceilings; the name of a
    # constant begins with `constant`, and one of them has every score of --monitor. The strongest
    # simple model, chosen here and not by its score, is named `strong: ...`: its value is outputs,
    # as `scores` takes them, so that it is scored as the network is, row by row. What it learnt
    # from training rows is in facts["strong"], or it is fitted on split.reference
    floors: Callable
    # (batches, split, out, args, facts) -> rows written to out; batches: (batch, outputs) pairs
    predictions: Callable
    # (outputs, split, args, facts) -> how wrong each row is (n,), {column: (n,)}
    examples: Callable
    # (outputs, split, args, facts) -> the first score of --monitor as a function of how often each
    # row counts: weights (k, rows) -> (k,); for the paired difference from the strong floor
    headline: Callable = None
    export: Callable = None  # (model, args, facts) -> Exported; None: the task refuses --export
    reference: bool = False  # scores need outputs["reference"], for the rows of split.reference

    def __post_init__(self):
        if "monitor" not in self.flags:
            raise ValueError("a task needs a flag `monitor`, whose choices are scores, the first "
                             "of them the one that is reported")
        for name in self.flags["monitor"].choices:
            if name not in (*LOWER_IS_BETTER, *HIGHER_IS_BETTER, "last"):
                raise ValueError(f"--monitor {name}: add {name!r} to LOWER_IS_BETTER or "
                                 "HIGHER_IS_BETTER of tasks/common.py, so that its best is known")

    def watched(self, args):
        """The score of an epoch: that of --monitor; with `last`, which compares none, the first."""
        if args.monitor != "last":
            return args.monitor
        return self.flags["monitor"].choices[0] if args.val_ratio else "loss"


@dataclasses.dataclass(frozen=True)
class Exported:
    """The content of --export. In a shape a word is a free side, the same word the same side."""

    forward: Callable  # ({input: tensor}) -> tensor; no shape depends on the values
    inputs: dict  # input -> (type, shape, what it is and in which unit)
    output: tuple  # name, shape, what it is and in which unit
    facts: dict  # plain values for whoever uses the file, such as names of classes


class NonFinite(ArithmeticError):
    """The loss, the gradient or an output is no longer a number."""


def mean_over(values):
    """The mean of values (n,) as a function of weights (k, n): how often each counts; NaN never do.
    """
    known = ~np.isnan(values)
    return lambda weights: weights[:, known] @ values[known] / weights[:, known].sum(1)


def finite(outputs):
    """The outputs, or NonFinite if one of them is not a finite number."""
    if not torch.isfinite(outputs).all():
        count = int((~torch.isfinite(outputs)).sum())
        raise NonFinite(f"{count} of {outputs.numel()} outputs are not finite")
    return outputs


# --------------------------------------------------------------------------------------------------
# Used by several tasks


def split_rows(n, args, groups=None):
    """The n rows in train, validation and test, by the ratios or by --folds.

    No group is on two sides. Without groups every row is one of its own.
    """
    if groups is None:
        groups = np.arange(n)
    if not args.folds:
        ratios = (args.train_ratio, args.val_ratio, args.test_ratio)
        return data.split_by_group(groups, ratios, seed=args.seed)
    folds = data.split_by_group(groups, np.full(args.folds, 1 / args.folds), seed=args.seed)
    test = folds[args.fold - 1]
    rest = np.setdiff1d(np.arange(n), test)
    inner = data.split_by_group(groups[rest], (1 - args.val_ratio, args.val_ratio), seed=args.seed)
    return [rest[rows] for rows in inner] + [test]


def split_checksum(parts):
    """A number that tells one split from another: of the rows of each part, in order."""
    rows = []
    for part in parts:
        rows += [part, [-1]]
    return zlib.crc32(np.concatenate(rows).tobytes())


def split_note(groups, parts):
    """How the rows were split, with counts of groups. parts: {name: rows}"""
    if groups is None:
        return ("split: by row, since no groups are known: leakage between the splits cannot be "
                "excluded")
    counts = [f"{len(np.unique(groups[rows]))} {name}" for name, rows in parts.items()]
    return f"split: by group, {', '.join(counts)}, none on two sides"


# numpy.load and reading its arrays raise these for a file that is damaged, cut off or holds objects
UNREADABLE = (ValueError, OSError, EOFError, KeyError, AttributeError, TypeError,
              zipfile.BadZipFile, zlib.error)


@contextlib.contextmanager
def open_npz(path, arguments):
    """The open archive of an .npz of plain arrays, to be read inside the `with` block.

    arguments  of numpy.savez in the message: "images=..., labels=..."
    Errors:    ValueError with path and remedy for a file or an array that cannot be read
    """
    try:
        archive = np.load(path, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise ValueError("it is a single array")
        with archive:
            yield archive
    except UNREADABLE as error:
        raise ValueError(f"{path} is not a readable .npz of plain arrays ({error}): save it with "
                         f"numpy.savez(path, {arguments}), no objects") from error


def count_or_names(items, most=5):
    """A count, or the first few names of a list and how many there are."""
    if isinstance(items, int):
        return f"{items:,}"
    names = ", ".join(map(str, items[:most]))
    return f"{len(items):,} ({names}{', ...' if len(items) > most else ''})"


def head_outputs(model, batch):
    """One number a row, float32 (b,): of the network, or of its head if batches hold features."""
    if "features" in batch:
        return model.head(batch["features"]).squeeze(1).float()
    return model(batch["inputs"]).float()


def outputs_over(split, outputs):
    """outputs(batch) over a whole split, one row per sample, on the CPU: {name: tensor}."""
    parts = []
    for start in range(0, len(split), split.chunk):
        rows = np.arange(start, min(start + split.chunk, len(split)))
        parts.append(outputs(split.batch(rows)))
    return {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}


def joined(batches):
    """The outputs of batches, pairs of (batch, outputs), as those of all rows: {name: tensor}."""
    parts = [outputs for _, outputs in batches]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def refuse_folder(out):
    """Before anything is computed: --out must be a file, or nothing yet."""
    if Path(out).is_dir():
        raise ValueError(f"--out {out} is a folder: give the file to write")


def unit_images(images):
    """uint8 images (b, h, w, 3) as the image networks take them: float (b, 3, h, w) in [-1, 1]."""
    return (images.permute(0, 3, 1, 2).float() - 127.5) / 127.5


def check_crop(args):
    if args.crop >= min(args.size):
        raise ValueError(f"--crop {args.crop} must be below the shorter side of --size "
                         f"{show(args.size)}: there is no more to mirror")


def no_predictions(name, *_):
    """For a pretrained encoder, which has no head."""
    raise ValueError(f"a checkpoint of --mode pretrain predicts no {name}: give it as --pretrained "
                     "to --mode probe, partial or finetune first")


def plan_batches(split, epoch, args, rank=0, world_size=1):
    """Rows of every batch of an epoch, or this process's equal share of them."""
    options = dict(seed=args.seed, epoch=epoch, rank=rank, world_size=world_size)
    share = args.batch_size // world_size
    if args.sampler == "stratified":
        return data.stratified_batches(split.labels, share, **options)
    if args.sampler == "bucketed":
        return data.bucketed_batches(split.lengths, share, **options)
    return data.shuffled_batches(len(split), share, even=args.sampler == "even", **options)


def seed_of(*numbers):
    """One 63-bit seed from several numbers: (1, 2) and (2, 1) have nothing in common."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
