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
part = "test" if "test" in runs[0] else "validation"  # a run without a test split has picked its epoch on what it reports
number = lambda value: np.nan if value is None else value  # an undefined score is null
for folder, run in zip(folders, runs):
    rows = run[part].pop("rows")
    run[part] = {row: {name: number(value) for name, value in scores.items() if not isinstance(value, dict)}  # without tables by class
                 for row, scores in run[part].items()}
    if "last" in run:
        run[part][f"last {run['last']['epochs']} epochs"] = {"validation": run["last"]["mean"], "their sd": run["last"]["sd"]}
    which = f"{run['folds']} folds" if "folds" in run else f"epoch {run['epoch']} ({run['weights']})"
    print(f"{folder}: {which}, {rows} {part} rows  " + "  ".join(f"{name} {value:.4f}" for name, value in run[part]["model"].items()))
for row in runs[0][part]:
    for name in runs[0][part][row]:
        values = np.array([run[part][row][name] for run in runs])
        spread = f" sd {values.std(ddof=1):.4f}" if len(values) > 1 else ""
        print(f"{row:<20} {name:<12} mean {values.mean():.4f}{spread}  ({len(values)} runs)")
