"""Tables of finished cross-validated bidmc runs: scores, and differences by patient.

    $ python train.py --task bidmc_rr --lr 1e-3 --data bidmc_csv --folds 5 --out runs/rr-scratch
    $ python benchmarks/bidmc_table.py runs/rr-scratch runs/rr-finetune
    $ python benchmarks/bidmc_table.py --quick

Scores: mean and standard deviation over the folds, for the model and for every floor and ceiling.

Differences: the mean absolute error of each patient (tested in exactly one fold), minus that of the
spectral peak, of the constants and of the first run. The mean over the patients is printed with a
95 % interval from 10,000 bootstrap samples of patients. Runs of several seeds, joined by commas,
are averaged by patient first.
"""

import json
import sys

import numpy as np
import torch

from _quick import main_of_table
import train
from runtime import checkpoint
from tasks import bidmc
from tasks.common import outputs_over


def patient_errors(folder, folds):
    """{name: {patient: mean absolute test error}} of a run and its baselines, over all folds."""
    errors = {"model": {}, "spectral peak": {}, "constant mean": {}, "constant median": {}}
    for fold in range(1, folds + 1):
        best = folder / f"fold-{fold}" / "best.pt"
        content = torch.load(best, map_location="cpu", weights_only=True)
        if not content["task"].startswith("bidmc_") or content["recipe"]["mode"] == "pretrain":
            sys.exit(f"{folder} is no run of bidmc_rr or bidmc_hr that predicts a rate")
        words = ["--task", content["task"], "--eval", str(best), "--device", "cpu"]
        args = train.parse_args([*words, "--cache", str(folder.parent)])
        args, facts = checkpoint.adopt_recipe(args, content), content["facts"]
        split = bidmc.load(args.data, args).test
        model = bidmc.network(args, facts).eval()
        checkpoint.load_weights(model, content, best)
        with torch.inference_mode():
            outputs = outputs_over(split, lambda batch: bidmc.outputs(model, batch, args, facts))
        predictions = {"model": bidmc.rates(outputs, facts).numpy(),
                       "spectral peak": bidmc.simple_rates(split, args, facts)["spectral peak"],
                       "constant mean": facts["scaler"]["mean"],
                       "constant median": facts["median"]}
        for name, prediction in predictions.items():
            window_errors = np.abs(prediction - split.labels)
            for patient in np.unique(split.groups):
                errors[name][patient] = window_errors[split.groups == patient].mean()
    return errors


def interval(differences):
    """Mean of the differences and its 95 % percentile bootstrap interval."""
    differences = np.asarray(differences)
    rows = np.random.default_rng(0).integers(0, len(differences), (10_000, len(differences)))
    return differences.mean(), *np.percentile(differences[rows].mean(1), (2.5, 97.5))


def print_scores(folder, scores):
    """A row for the model and for each floor and ceiling."""
    print(f"\n{folder}: {scores['folds']} folds, {scores['test']['rows']:,} test windows, "
          "mean +- sd over the folds")
    for name, row in scores["test"].items():
        if name == "rows":
            continue
        sd = scores["test_sd"][name]
        cells = []
        for metric, value in row.items():
            if value is not None:
                cells.append(f"{metric} {value:8.4f} +- {sd[metric]:.4f}")
        print(f"  {name:<16}" + "   ".join(cells))


def errors_of_seeds(folders):
    """patient_errors averaged by patient over the seeds; prints the scores of every seed."""
    of_seeds = []
    for folder in folders:
        scores = json.loads((folder / "scores.json").read_text())
        if "folds" not in scores:
            sys.exit(f"{folder} is a run without --folds")
        print_scores(folder, scores)
        of_seeds.append(patient_errors(folder, scores["folds"]))
    means = {}
    for name, patients in of_seeds[0].items():
        means[name] = {}
        for patient in patients:
            means[name][patient] = np.mean([errors[name][patient] for errors in of_seeds])
    return means


def compare(recipes):
    """Compare each recipe (the folders of its seeds) with its baselines and the first recipe."""
    first = None
    for folders in recipes:
        title = ",".join(map(str, folders))
        errors = errors_of_seeds(folders)
        others = {name: errors[name] for name in errors if name != "model"}
        if first:
            others[",".join(map(str, recipes[0]))] = first
        first = first or errors["model"]
        for name, other in others.items():
            differences = [errors["model"][patient] - other[patient] for patient in other]
            mean, low, high = interval(differences)
            print(f"  {title}: MAE by patient minus that of {name}: "
                  f"{mean:+.3f} [{low:+.3f}, {high:+.3f}], {len(other)} patients")


def tiny_recipes(folder):
    """One recipe with two seeds, and the second alone, on drawn recordings, in two folds."""
    from _drawn import tiny_run, write_recordings

    write_recordings(folder / "csv")
    runs = []
    for seed in ("0", "1"):
        run = folder / f"run-{seed}"
        runs.append(tiny_run("bidmc_hr", folder / "csv", run, "--folds", "2", "--seed", seed))
    for run in runs:
        errors = patient_errors(run, folds=1)["model"]
        mean = np.mean(list(errors.values()))
        scores = json.loads((run / "fold-1" / "scores.json").read_text())["test"]["model"]
        assert abs(mean / scores["patient_mae"] - 1) < 1e-4, (mean, scores)
    return [runs, runs[1:]]


if __name__ == "__main__":
    main_of_table(__doc__, compare, tiny_recipes)
