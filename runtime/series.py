"""Several runs, one after the other: the folds of a cross-validation, several seeds, or both."""

import contextlib
import json
from pathlib import Path

import numpy as np

from runtime import checkpoint, report
from runtime.settings import seeds_of


def is_series(args):
    """Whether the settings ask for several runs, one after the other."""
    return bool(args.seeds or args.folds and not args.fold)


def series_settings(args, flags):
    """The settings of every run of a series: --seeds in OUT/seed-0, ..., --folds in OUT/fold-1, ...

    With both, the run of a seed is a series of folds itself.
    """
    folder, runs = Path(args.out), {}
    begun = checkpoint.runs_in(folder) if args.resume else []
    if begun:
        content = checkpoint.load(begun[0] / "last.pt", args.task, flags)
        args = checkpoint.adopt_recipe(args, content, late={"seed"} if args.seeds else ())
    if args.seeds:
        for seed in seeds_of(args):
            runs[f"seed-{seed}"] = {"seed": seed, "seeds": "", "fold": 0}
    else:
        for fold in range(1, args.folds + 1):
            runs[f"fold-{fold}"] = {"fold": fold}
    settings = []
    for name, changes in runs.items():
        out = folder / name
        resume = args.resume and (not begun or bool(checkpoint.runs_in(out)))
        typed = args.typed | {"variant", *flags} - {"fold"}  # a run of another recipe is refused
        settings.append(args.replace(out=str(out), resume=resume, typed=typed, **changes))
    return settings


def refuse_other_series(args, folder):
    """Folds beside seeds in one folder could not be told apart by --resume."""
    other = "fold" if args.seeds else "seed"
    if not args.overwrite and list(folder.glob(f"{other}-*")):
        raise ValueError(f"{folder} holds the runs of several {other}s: choose another --out, or "
                         "--overwrite them")


def clear(folder):
    """Remove the files of a series, and its folders if they hold nothing else."""
    parts = [*folder.glob("seed-*/fold-*"), *folder.glob("seed-*"), *folder.glob("fold-*")]
    for part in [*parts, folder]:
        for name in checkpoint.RUN_FILES if part != folder else ("scores.json",):
            (part / name).unlink(missing_ok=True)
    for part in parts:
        with contextlib.suppress(OSError):
            part.rmdir()


def write_series_scores(folder, runs):
    """Print mean and sd of the scores of several folds or seeds, and write them to scores.json.

    Those of the test rows; without such rows of the validation rows, which picked the epochs.
    """
    scores = [json.loads((run / "scores.json").read_text()) for run in runs]
    part = "test" if "test" in scores[0] else "validation"
    if part not in scores[0]:
        return
    kind = runs[0].name.split("-")[0] + "s"  # folds or seeds
    scores = [score[part] for score in scores]
    mean, sd = {}, {}
    for name in scores[0]:
        if name == "rows" or not all(name in score for score in scores):
            continue
        mean[name], sd[name] = {}, {}
        for key in report.plain(scores[0][name]):
            if not key.endswith(("_low", "_high")):  # a mean of intervals is no interval
                # None, written for NaN, is NaN again
                values = np.array([score[name][key] for score in scores], dtype=float)
                mean[name][key] = float(values.mean())
                sd[name][key] = float(values.std(ddof=1))
    count = sum(score["rows"] for score in scores)
    overlap = "" if kind == "folds" else ", some in several"
    print(f"\n{len(runs)} {kind}, {count:,} {part} rows in all{overlap}, mean over the {kind}")
    print(report.score_table(mean))
    print(f"standard deviation over the {kind}\n{report.score_table(sd)}")
    numbers = len(runs) if kind == "folds" else [int(run.name.split("-")[1]) for run in runs]
    report.write_json(folder / "scores.json",
               {kind: numbers, part: {"rows": count} | mean, f"{part}_sd": sd})
    print(f"\nsaved in {folder}: scores.json, and the files of the {kind} in {runs[0].name} to "
          f"{runs[-1].name}")
