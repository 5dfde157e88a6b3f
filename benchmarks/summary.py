"""Mean and standard deviation over the seeds of finished runs, cross-validated or not, with every floor and ceiling.

    $ for seed in 0 1 2; do python train.py --task ocec --lr 2e-4 --data eyes_cew --seed $seed --out runs/cew-$seed; done
    $ python benchmarks/summary.py runs/cew-0 runs/cew-1 runs/cew-2
"""

import json
import sys
from pathlib import Path

import numpy as np

folders = [Path(name) for name in sys.argv[1:]]
if not folders:
    sys.exit(__doc__)
runs = [json.loads((folder / "scores.json").read_text()) for folder in folders]
for folder, run in zip(folders, runs):
    run["test"] = {row: {name: value for name, value in scores.items() if not isinstance(value, dict)}  # without scores by class
                   if row != "rows" else scores for row, scores in run["test"].items()}
    scores = "  ".join(f"{name} {np.nan if value is None else value:.4f}" for name, value in run["test"]["model"].items())
    which = f"{run['folds']} folds" if "folds" in run else f"epoch {run['epoch']} ({run['weights']})"
    last = run.get("last") and f"  validation, last {run['last']['epochs']} epochs {run['last']['mean']:.4f} +- {run['last']['sd']:.4f}"
    print(f"{folder}: {which}, {run['test']['rows']} test rows  {scores}{last or ''}")
for row in (name for name in runs[0]["test"] if name != "rows"):
    for name in runs[0]["test"][row]:
        values = np.array([run["test"][row][name] for run in runs], dtype=float)  # an undefined score is null, NaN here
        spread = f" sd {values.std(ddof=1):.4f}" if len(values) > 1 else ""
        print(f"{row:<16} {name:<12} mean {values.mean():.4f}{spread}  ({len(values)} runs)")
