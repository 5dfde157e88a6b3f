"""The settings of a run, and the refusal of a call: its message is for the user."""

import argparse
import contextlib
import shlex
import types
from pathlib import Path

import torch

from runtime import processes
from tasks.common import NonFinite, show, spelled


CHECKS = ("find_lr", "show_schedule", "look", "check_sampler")  # in place of training
USES = ("eval", "predict", "export")  # of a checkpoint
SCORING_FLAGS = {"tta"}  # of the recipe, but USES may change them


class Settings(types.SimpleNamespace):
    """The flags of a run. They do not change after parsing: replace() gives a changed copy."""

    def __setattr__(self, name, value):
        raise AttributeError(f"settings do not change: use replace({name}=...)")

    def replace(self, **changes):
        return Settings(**(vars(self) | changes))


class Refused(Exception):
    """The call cannot be carried out, or a later fold of it."""


@contextlib.contextmanager
def refusals():
    """Errors that the user can cause become Refused; errors in training itself are bugs."""
    try:
        with processes.raised_everywhere():
            yield
    except (ValueError, OSError, ImportError, NonFinite) as error:
        raise Refused(error) from error


def resolve_device(name):
    """The device of this process: `cuda` is the GPU that torchrun counted out for it."""
    world = processes.world_size()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if world > 1 and ":" in name:
        raise ValueError(f"--device {name} is one for {world} processes: give --device cuda, then "
                         "each takes its own")
    try:
        if world > 1 and name == "cuda":
            torch.cuda.set_device(processes.local_rank())
        if torch.device(name).type not in ("cpu", "cuda"):
            raise RuntimeError("this script knows cpu and cuda")
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used ({str(error).splitlines()[0]}): try "
                         "--device cpu") from error
    return name


RUN_FLAGS = {
    "data": ("", "folder or file to read; synthetic data without it"),
    "out": ("", "folder of the run (default: runs/TASK, with --fold K runs/TASK/fold-K); with "
            "--predict the file to write (faceparse: the folder), with --export the .pt2"),
    "cache": ("", "folder that keeps the decoded data: images, recordings and the arrays of an "
              ".npz are then memory-mapped; recordings are otherwise kept beside --out"),
    "device": ("auto", "auto (CUDA when present), cpu, cuda or cuda:N"),
    "eval": ("", "score a checkpoint on --split instead of training"),
    "split": ("", "with --eval: train, validation, test, or all rows unsplit (default: all with "
              "--data, else test or what there is)"),
    "predict": ("", "apply a checkpoint to --data and write --out instead of training"),
    "export": ("", "write a checkpoint's network to --out, with all that stands before and behind "
               "it, for torch.export.load"),
    "seeds": ("", "0,1,2: a run for each --seed, in OUT/seed-0, OUT/seed-1, ..., then mean and sd "
              "of their scores; with --folds: a cross-validation for each"),
    "resume": (False, "go on from the last finished epoch in --out"),
    "overwrite": (False, "replace the run in --out"),
    "debug": (False, "print labels of the first batches, output, gradients and rate of every "
              "epoch, and a checklist at the end"),
    "find_lr": (False, "learning-rate range test instead of training; --clip, --accumulate and "
                "--compile do not apply"),
    "show_schedule": (False, "print the learning rate of every epoch instead of training"),
    "look": (False, "draw the first images of epoch 1, augmented as the network will see them, "
             "into look.png in --out instead of training"),
    "check_sampler": (False, "walk all batches of the first epoch and count classes and repeats "
                      "instead of training"),
}
# what the loop takes where a task has no such flag
NOT_OF_THE_TASK = {"mode": "scratch", "freeze": "", "sampler": "shuffled", "channels_last": False,
                   "anchor": "none"}
ALIASES = {"epochs": ("--num-epochs", "--max-epochs"), "compile": ("--compile-model",),
           "pretrained": ("--pretrained-ckpt",)}


def parse_pair(text):
    """'32x64' -> (32, 64), '128' -> (128, 128)."""
    try:
        sides = tuple(int(part) for part in text.lower().split("x"))
        if len(sides) > 2:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form ROWSxCOLUMNS, such as "
                                         "32x64, or one number for both") from None
    return sides[0], sides[-1]


def add_flag(parser, name, default, text, choices=(), shown=None):
    """One flag, typed with - or _; it appears in the result only if it was typed."""
    if shown not in (None, ""):
        text += f" (default: {show(shown)})"
    if isinstance(default, bool):
        kind = {"action": "store_true" if name in RUN_FLAGS else argparse.BooleanOptionalAction}
    elif isinstance(default, tuple):
        kind = {"type": parse_pair, "metavar": "HxW"}
    else:
        kind = {"type": type(default), "choices": choices or None,
                "metavar": None if choices else name.upper()}
    parser.add_argument(spelled(name), *ALIASES.get(name, ()), dest=name, default=argparse.SUPPRESS,
                        help=text.replace("%", "%%"), **kind)


def command_line(args, flags, names):
    """The command of this run, to be typed again, without the flags that it does not read."""
    words = ["train.py", "--task", args.task]
    for name in names:
        if name in flags and flags[name].unmet(args):
            continue
        value, flag = getattr(args, name), spelled(name)
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif value != "":
            words += [flag, show(value)]
    return f"{processes.launcher()} {shlex.join(words)}"


def resume_command(args):
    """The command that goes on with a run, or with all of a run's folds."""
    words = ["train.py", "--task", args.task, "--out", args.home, "--resume"]
    for name in ("device", "cache"):
        if name in args.typed:
            words += [f"--{name}", getattr(args, name)]
    return f"{processes.launcher()} {shlex.join(words)}"


def seeds_of(args):
    """The numbers of --seeds 0,1,2; ValueError if they are not several."""
    words = args.seeds.split(",")
    numbers = set(map(int, words)) if all(map(str.isdecimal, words)) else ()
    if len(words) < 2 or len(numbers) < len(words):
        raise ValueError(f"--seeds {args.seeds}: give two or more different whole numbers, such as "
                         "--seeds 0,1,2")
    return [int(word) for word in words]


def check_paths(args, run_files):
    """Refuse to write predictions or a network over their own sources or over files of a run."""
    out = Path(args.out)
    if not out.parent.is_dir():
        raise ValueError(f"--out {args.out}: the folder {out.parent} does not exist; create it, or "
                         "choose another --out")
    if args.export and out.is_dir():
        raise ValueError(f"--out {out} is a folder: give the file to write")
    if not out.is_file():
        return
    sources = [Path(path).resolve() for path in (args.predict, args.export, args.data) if path]
    inside = (out.resolve(), *out.resolve().parents)
    if out.name in run_files or any(path in inside for path in sources):
        raise ValueError(f"--out {out} would replace the checkpoint, the data or a file of a run: "
                         "choose another --out")


def check_flags(args, flags):
    """Refuse values out of bounds, and typed flags that the other settings leave unread.

    Returns the settings, in which an unread flag has its `otherwise`, if it has one.
    """
    unread = {}
    for name, flag in flags.items():
        flag.check(name, getattr(args, name))
        unmet = flag.unmet(args)
        if unmet and name in args.typed and not args.resume:
            other, values = unmet
            raise ValueError(f"{spelled(name)} is read only with {spelled(other)} "
                             f"{' or '.join(map(show, values))}, not with "
                             f"{show(getattr(args, other))}: leave it out, or change "
                             f"{spelled(other)}")
        if unmet and flag.otherwise is not None:  # pretraining has no labels for AUROC to monitor
            unread[name] = flag.otherwise
    return args.replace(**unread)


def chosen_of(args, names):
    """The first of these flags that was given, or None."""
    for name in names:
        if getattr(args, name):
            return name
    return None


def check_call(args, task, run_files):
    """Refuse flags that this kind of call would not read, and what contradicts itself."""
    use, check = chosen_of(args, USES), chosen_of(args, CHECKS)
    reads = args.typed - {"split"}
    if use:
        reads = {"eval": {"eval", "data", "cache", "split", "device"},
                 "predict": {"predict", "data", "cache", "out", "device"},
                 "export": {"export", "out"}}[use] | SCORING_FLAGS
    elif check:
        unread = {"out", "resume", "overwrite", "seeds", "split", "debug", *CHECKS} - {check}
        reads = args.typed - (unread - {"out"} if check == "look" else unread)
    for name in sorted(args.typed - reads):
        raise ValueError(f"{spelled(name)} is not read by this call: leave it out (--eval, "
                         "--predict and --export take the recipe from the checkpoint, --split goes "
                         "with --eval, --find-lr and its like write nothing)")
    if args.cache and not (args.data or args.eval or args.resume):
        raise ValueError("--cache is not read without --data: leave it out")
    if args.predict and not (args.data and args.out):
        raise ValueError("--predict needs --data (what to apply it to) and --out (what to write)")
    if args.export and task.export is None:
        raise ValueError(f"--export: a network of task {args.task} cannot be exported: apply its "
                         "checkpoint with --predict")
    if args.export and Path(args.out).suffix != ".pt2":
        raise ValueError("--export needs --out, a file whose name ends in .pt2 as "
                         f"torch.export.load expects it, not {args.out!r}")
    if args.predict or args.export:
        check_paths(args, run_files)
    if args.split not in ("", "train", "validation", "test", "all"):
        raise ValueError(f"--split {args.split} is not one of train, validation, test, all")
    if args.monitor == "last" and args.patience and not use:
        raise ValueError(f"--patience {args.patience} waits for a new best score, and --monitor "
                         "last compares none: give one of them")
    if args.resume and args.overwrite:
        raise ValueError("--resume goes on with a run, --overwrite replaces it: give one of them")
    if args.seeds and seeds_of(args) and "seed" in args.typed:
        raise ValueError(f"--seed {args.seed} and --seeds {args.seeds}: give one of them")
    if args.seeds and "fold" in args.typed:
        raise ValueError("--fold is not read with --seeds, which trains all folds of each seed: "
                         "leave it out, or give --seed")
    several_folds = args.folds != 1 and (args.fold <= args.folds
                                         or args.resume and "folds" not in args.typed)
    if not several_folds:
        raise ValueError(f"--folds {args.folds} --fold {args.fold}: there must be at least 2 "
                         "folds, numbered from 1 to --folds")
    if processes.world_size() > 1 and (use or check):
        raise ValueError(f"{spelled(use or check)} runs in one process, not in "
                         f"{processes.world_size()}: start it with python in place of torchrun")


def autocast_dtype(args):
    return torch.float16 if args.amp == "fp16" else torch.bfloat16


def autocast(args):
    kind = torch.device(args.device).type
    return torch.autocast(kind, dtype=autocast_dtype(args), enabled=args.amp != "off")
