"""best.pt, last.pt, and the folder of a run.

A checkpoint is a plain dictionary of tensors, numbers and strings: it loads with weights_only=True.
"""

import contextlib
import os
import pickle
from pathlib import Path

import torch

import data
from runtime import processes
from tasks.common import show, spelled

FORMAT = 2
RUN_FILES = ("best.pt", "last.pt", "log.jsonl", "curves.svg", "diagnosis.json", "scores.json",
             "examples.csv", "examples.png")


@contextlib.contextmanager
def atomic_write(path, mode="w"):
    """data.atomic_write in rank 0; what the other processes write is thrown away."""
    if processes.rank():
        with open(os.devnull, mode) as nothing:
            yield nothing
    else:
        with data.atomic_write(path, mode) as file:
            yield file


def save(path, content, args, facts, flags):
    """The content, with what a use without the command line needs: task, recipe, facts, data."""
    header = {"format": FORMAT, "task": args.task, "variant": args.variant,
              "recipe": {name: getattr(args, name) for name in flags}, "facts": facts,
              "data": args.data}
    with atomic_write(path, "wb") as file:
        torch.save(header | content, file)


def load(path, task, flags, needs=("model",)):
    """A checkpoint of this task, on the CPU; ValueError that says what is wrong with the file."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"checkpoint {path} is a folder: give the best.pt in it")
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:100]
        raise ValueError(f"{path} is not a readable checkpoint, it may be truncated "
                         f"({reason})") from error
    for key in ("format", "task", "recipe", "facts", *needs):
        if not isinstance(content, dict) or key not in content:
            raise ValueError(f"{path} is not a checkpoint of train.py for this use: it holds no "
                             f"{key!r}")
    if content["format"] != FORMAT:
        raise ValueError(f"{path} is a checkpoint of format {content['format']}, this version "
                         f"reads format {FORMAT}: train again, or use the version that wrote it")
    if content["task"] != task:
        raise ValueError(f"{path} is a checkpoint of task {content['task']}, not of {task}: give "
                         f"--task {content['task']}")
    strange = set(content["recipe"]) ^ set(flags)
    if strange:
        raise ValueError(f"{path} was written by another version of this script: it differs in the "
                         f"flags {', '.join(sorted(strange))}")
    return content


def load_weights(model, content, path):
    """The checkpoint's weights, every one of them and no other."""
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as error:
        raise ValueError(f"{path} does not hold the weights of its own recipe: "
                         f"{' '.join(str(error).split())[:300]}") from error


def adopt_recipe(args, content, late=()):
    """The settings of a checkpoint; a typed flag that contradicts them is an error.

    late: typed flags that may differ, since --eval, --predict or --export read them
    """
    stored = content["recipe"] | {"variant": content["variant"]}
    stored = {name: value for name, value in stored.items() if name not in late}
    for name in sorted(args.typed & set(stored)):
        value = getattr(args, name)
        loss_picked = name == "monitor" and stored["val_ratio"] == 0  # whatever --monitor was
        if value != stored[name] and not loss_picked:
            raise ValueError(f"{spelled(name)} {show(value)} contradicts the run that is resumed "
                             f"({show(stored[name])} there): leave it out, or start a new run in "
                             "another --out")
    if "data" not in args.typed:  # a typed path may differ: the set may have moved
        stored["data"] = content["data"]
    return args.replace(**stored)


STATEFUL = ("optimizer", "schedule", "scaler", "ema")


def save_run(path, run):
    """Everything that --resume needs."""
    content = {"model": run.raw_model.state_dict(), "step": run.step, "history": run.history,
               "processes": processes.world_size()}
    for name in STATEFUL:
        if getattr(run, name) is not None:  # --ema-decay 0 has no average
            content[name] = getattr(run, name).state_dict()
    save(path, content, run.args, run.facts, run.task.flags)


def load_run(run, content, path):
    load_weights(run.raw_model, content, path)
    for name in STATEFUL:
        if getattr(run, name) is not None:
            getattr(run, name).load_state_dict(content[name])
    run.step, run.history = content["step"], content["history"]


# --------------------------------------------------------------------------------------------------
# The folder of a run


def writable_folder(out):
    """--out as a path, there or not, if it can be written to."""
    folder = Path(out)
    present = folder
    while not present.exists():
        present = present.parent
    if not present.is_dir():
        raise ValueError(f"--out {folder}: {present} is a file, not a folder; choose another --out")
    if not os.access(present, os.W_OK):
        raise ValueError(f"--out {folder}: no permission to write in {present}; choose another "
                         "--out")
    return folder


def open_run_folder(args):
    """The run's folder as a path, checked before anything is read or trained."""
    folder = writable_folder(args.out)
    if args.resume:
        if not (folder / "last.pt").is_file():
            raise ValueError(f"--resume: there is no run in {folder} (no last.pt); leave --resume "
                             "out, or give its --out")
        return folder
    # the files of a series would be taken for those of a single run, and the other way round
    if (folder / "fold-1").is_dir():
        raise ValueError(f"{folder} holds the folds of a cross-validation: choose another --out")
    if seeds_in(folder):
        raise ValueError(f"{folder} holds the runs of seeds {seeds_in(folder)}: choose another "
                         "--out")
    parent_holds_run = any((folder.parent / name).exists() for name in ("last.pt", "best.pt"))
    if folder.name in (f"fold-{args.fold}", f"seed-{args.seed}") and parent_holds_run:
        raise ValueError(f"{folder.parent} holds a run without --folds or --seeds: choose another "
                         "--out")
    if any((folder / name).exists() for name in RUN_FILES) and not args.overwrite:
        raise ValueError(f"{folder} already holds a run: add --resume to go on with it, "
                         "--overwrite to replace it, or choose another --out")
    return folder


def runs_in(folder):
    """The folders of the runs that were begun in a folder: itself, or its folds and seeds."""
    found = []
    for pattern in ("last.pt", "fold-*/last.pt", "seed-*/last.pt", "seed-*/fold-*/last.pt"):
        found += [path.parent for path in sorted(folder.glob(pattern))]
    return found


def seeds_in(folder):
    """The seeds that have a folder there, as --seeds takes them."""
    names = [path.name.removeprefix("seed-") for path in folder.glob("seed-*")]
    return ",".join(sorted(filter(str.isdigit, names), key=int))


@contextlib.contextmanager
def lock_folder(folder):
    """The folder is this process's alone until the block or the process ends.

    Two runs in one folder would overwrite each other's files.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise ValueError(f"--out {folder}: another process is training in this folder: wait for "
                         "it, end it, or choose another --out") from error
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(descriptor)
