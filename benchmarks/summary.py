"""Mean and standard deviation over the seeds of finished runs, with every floor and ceiling.

    $ for seed in 0 1 2; do
    >     python train.py --task ocec --lr 2e-3 --data eyes_cew --seed $seed --out runs/cew-$seed
    > done
    $ python benchmarks/summary.py runs/cew-0 runs/cew-1 runs/cew-2
    $ python benchmarks/summary.py --quick

The runs may be cross-validated.
"""

import json

import numpy as np

from _quick import main_of_runs


def numbers(scores):
    """The scores without tables by class; an undefined score (null) becomes NaN."""
    return {name: np.nan if value is None else value for name, value in scores.items()
            if not isinstance(value, dict)}


def summarise(folders):
    """A line of scores per run, then mean and standard deviation over the runs."""
    runs = [json.loads((folder / "scores.json").read_text()) for folder in folders]
    # a run without a test split reports the rows on which it picked its epoch
    part = "test" if "test" in runs[0] else "validation"
    for folder, run in zip(folders, runs):
        rows = run[part].pop("rows")
        for row, scores in run[part].items():
            run[part][row] = numbers(scores)
        if "last" in run:
            last = {"validation": run["last"]["mean"], "their sd": run["last"]["sd"]}
            run[part][f"last {run['last']['epochs']} epochs"] = last
        if "folds" in run:
            origin = f"{run['folds']} folds"
        else:
            origin = f"epoch {run['epoch']} ({run['weights']})"
        scores = "  ".join(f"{name} {value:.4f}" for name, value in run[part]["model"].items())
        print(f"{folder}: {origin}, {rows} {part} rows  {scores}")
    for row in runs[0][part]:
        for name in runs[0][part][row]:
            values = np.array([run[part][row][name] for run in runs])
            spread = f" sd {values.std(ddof=1):.4f}" if len(values) > 1 else ""
            print(f"{row:<20} {name:<12} mean {values.mean():.4f}{spread}  ({len(values)} runs)")


def tiny_runs(folder):
    """Two runs of ocec on drawn eyes."""
    from _drawn import tiny_run, write_eyes

    write_eyes(folder / "eyes.npz", 200)
    return [tiny_run("ocec", folder / "eyes.npz", folder / f"eyes-{seed}", "--seed", f"{seed}")
            for seed in (0, 1)]


if __name__ == "__main__":
    main_of_runs(__doc__, summarise, tiny_runs)
