"""What README says of bidmc_rr and bidmc_hr, from finished cross-validated runs: scores, and differences patient by patient.

    $ python train.py --task bidmc_rr --lr 1e-3 --data bidmc_csv --folds 5 --out runs/rr-scratch
    $ python benchmarks/bidmc_table.py runs/rr-scratch runs/rr-finetune

For each run the mean over the folds and their standard deviation, beside every floor and ceiling. Then, for each patient (every
one of them is tested in one fold), the mean absolute error of a run minus that of the spectral peak, of the constants and of the
first run named: mean over the patients, with a 95 % interval from 10,000 bootstrap samples of patients. Runs of several seeds
joined by commas are averaged patient by patient first.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train


def patient_errors(folder, folds):
    """{name: {patient: mean absolute error}} of the run and of what learns nothing, over the test windows of all folds."""
    errors = {"model": {}, "spectral peak": {}, "constant mean": {}, "constant median": {}}
    for fold in range(1, folds + 1):
        best = folder / f"fold-{fold}" / "best.pt"
        content = torch.load(best, map_location="cpu", weights_only=True)
        if not content["task"].startswith("bidmc_") or content["recipe"]["mode"] == "pretrain":
            sys.exit(f"{folder} is no run of bidmc_rr or bidmc_hr that predicts a rate")
        args = train.parse_args(["--task", content["task"], "--eval", str(best), "--cache", str(folder.parent)])
        train.adopt_recipe(args, content)
        args.device = "cpu"
        split = train.task_of(args).load(args.data, args).test
        model = train.task_of(args).network(args).eval()
        train.load_weights(model, content, best)
        with torch.inference_mode():
            predictions = {"model": train.ppg_prediction(train.ppg_all_outputs(model, split), args).numpy()}
        predictions |= {"spectral peak": train.ppg_spectral(split, args), "constant mean": args.facts["scaler"]["mean"],
                        "constant median": args.facts["median"]}
        for name, prediction in predictions.items():
            for patient in np.unique(split.groups):
                errors[name][patient] = np.abs(prediction - split.labels)[split.groups == patient].mean()
    return errors


def interval(differences):
    """Mean of the differences and its 95 % percentile bootstrap interval."""
    differences = np.asarray(differences)
    rows = np.random.default_rng(0).integers(0, len(differences), (10_000, len(differences)))
    return differences.mean(), *np.percentile(differences[rows].mean(1), (2.5, 97.5))


if len(sys.argv) < 2:
    sys.exit(__doc__)
first = None
for joined in sys.argv[1:]:
    of_seeds = []
    for folder in map(Path, joined.split(",")):
        scores = json.loads((folder / "scores.json").read_text())
        if "folds" not in scores:
            sys.exit(f"{folder} is a run without --folds")
        print(f"\n{folder}: {scores['folds']} folds, {scores['test']['rows']:,} test windows, mean +- sd over the folds")
        for name, row in scores["test"].items():
            if name != "rows":
                cells = [f"{key} {value:8.4f} +- {scores['test_sd'][name][key]:.4f}" for key, value in row.items() if value is not None]
                print(f"  {name:<16}" + "   ".join(cells))
        of_seeds.append(patient_errors(folder, scores["folds"]))
    errors = {name: {patient: np.mean([each[name][patient] for each in of_seeds]) for patient in of_seeds[0][name]} for name in of_seeds[0]}
    first = first or errors["model"]
    others = {name: errors[name] for name in errors if name != "model"} | ({sys.argv[1]: first} if first is not errors["model"] else {})
    for title, other in others.items():
        mean, low, high = interval([errors["model"][patient] - other[patient] for patient in other])
        print(f"  {joined}: MAE by patient minus that of {title}: {mean:+.3f} [{low:+.3f}, {high:+.3f}], {len(other)} patients")
