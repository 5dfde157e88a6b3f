"""The settings of a run, and the refusal of a call: its message is for the user."""

import contextlib
import shlex
import types
from pathlib import Path

import torch

from runtime import processes
from tasks.common import NonFinite, show, spelled


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
        raise ValueError(f"--device {name} is one for {world} processes: give --device cuda, then each "
                         "takes its own")
    try:
        if world > 1 and name == "cuda":
            torch.cuda.set_device(processes.local_rank())
        if torch.device(name).type not in ("cpu", "cuda"):
            raise RuntimeError("this script knows cpu and cuda")
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used ({str(error).splitlines()[0]}): try --device "
                         "cpu") from error
    return name


def command_line(args, flags, names):
    """The command that this run resolves to, as it can be typed again, without flags it does not read."""
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


def check_paths(args, run_files):
    """Refuse to write predictions or a network over what they are made from, or over files of a run."""
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
        raise ValueError(f"--out {out} would replace the checkpoint, the data or a file of a run: choose "
                         "another --out")
