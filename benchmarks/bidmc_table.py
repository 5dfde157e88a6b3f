"""What README says of bidmc_rr and bidmc_hr, from finished cross-validated runs: scores, and differences patient by patient.

    $ python train.py --task bidmc_rr --lr 1e-3 --data bidmc_csv --folds 5 --out runs/rr-scratch
    $ python benchmarks/bidmc_table.py runs/rr-scratch runs/rr-finetune

For each run the mean over the folds and their standard deviation, beside every floor and ceiling. Then, for each patient (every
one of them is tested in one fold), the mean absolute error of a run minus that of the spectral peak, of the best constant and of
the first run named: mean over the patients, with a 95 % interval from 10,000 bootstrap samples of patients.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train


def patient_errors(folder):
    """{patient: mean absolute error} of the run, of the spectral peak and of the training median, over all folds' test windows."""
    errors = {"model": {}, "spectral peak": {}, "constant median": {}}
    for best in sorted(folder.glob("fold-*/best.pt")):
        content = torch.load(best, map_location="cpu", weights_only=True)
        args = train.parse_args(["--task", content["task"], "--eval", str(best), "--cache", str(folder)])
        train.adopt_recipe(args, content)
        args.device = "cpu"
        split = train.task_of(args).load(args.data, args).test
        model = train.task_of(args).network(args).eval()
        train.load_weights(model, content, best)
        with torch.inference_mode():
            predictions = {"model": train.ppg_prediction(train.ppg_all_outputs(model, split), args).numpy()}
        predictions |= {"spectral peak": train.ppg_spectral(split, args), "constant median": args.facts["median"]}
        for name, prediction in predictions.items():
            for patient in np.unique(split.groups):
                errors[name][patient] = np.abs(prediction - split.labels)[split.groups == patient].mean()
    return errors


def interval(differences, rng=np.random.default_rng(0)):
    """Mean of the differences and its 95 % percentile bootstrap interval."""
    differences = np.asarray(differences)
    means = differences[rng.integers(0, len(differences), (10_000, len(differences)))].mean(1)
    return differences.mean(), *np.percentile(means, (2.5, 97.5))


folders = [Path(name) for name in sys.argv[1:]]
if not folders:
    sys.exit(__doc__)
first = None
for folder in folders:
    scores = json.loads((folder / "scores.json").read_text())
    print(f"\n{folder}: {scores['folds']} folds, {scores['test']['rows']:,} test windows, mean +- sd over the folds")
    for name, row in scores["test"].items():
        if name != "rows":
            cells = [f"{key} {value:7.3f} +- {scores['test_sd'][name][key]:.3f}" for key, value in row.items() if value is not None]
            print(f"  {name:<16}" + "   ".join(cells))
    errors = patient_errors(folder)
    first = first or errors
    for title, other in (("spectral peak", errors["spectral peak"]), ("constant median", errors["constant median"]), (str(folders[0]), first["model"])):
        if other is not errors["model"]:
            mean, low, high = interval([errors["model"][patient] - other[patient] for patient in errors["model"]])
            print(f"  MAE by patient minus that of {title}: {mean:+.3f} [{low:+.3f}, {high:+.3f}], {len(other)} patients")
