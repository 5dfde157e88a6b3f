"""The results table of README: every row's runs, and the table that they make.

    $ python benchmarks/results.py --folder data --rows mrl,cew    # train what is missing
    $ python benchmarks/results.py --print                         # the table of the file
    $ python benchmarks/results.py --quick

Writes docs/results.json after each seed and goes on where it stopped. --folder holds the data sets
under the names in ROWS. A seed's run stays in OUT/ROW-SEED: the difference between network and
strong floor is taken over the test rows of all seeds, which share persons, so a seed can only be
added where the runs of the others are.

A seed fixes the split, the initial weights and the order. Each run picks its epoch on validation
rows and scores the test rows once.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import numpy as np
import torch

from _quick import ROOT, new_parser, parse, processor
import losses
import train
from runtime import checkpoint, report

FILE = ROOT / "docs" / "results.json"
SEEDS = (3, 4, 5)  # 0 to 2 were looked at while the recipes were chosen; stays: 3 alone

# row: what it is, data in --folder, flags of train.py, scores in the table (the first is compared)
ROWS = {
    "cew": ("ocec: CEW, 4,846 eyes, by face", "eyes_cew", "--task ocec --lr 2e-3",
            ("f1", "auroc")),
    "mrl": ("ocec: MRL, 29 persons, by person", "eyes_mrl/mrl_29_subjects.npz",
            "--task ocec --lr 2e-3", ("f1", "auroc")),
    "faces": ("faceparse: 900 faces of CelebAMask-HQ, by image", "celebamask_mini",
              "--task faceparse --lr 4e-3 --size 192 --cache runs/cache", ("f", "f_pooled")),
    "motion": ("quadmodal: MotionSense, 18 persons, by person",
               "motionsense/motionsense_18_subjects.npz", "--task quadmodal --lr 1e-3",
               ("accuracy", "macro_f1")),
    "rr": ("bidmc_rr: 46 patients, 5 folds by patient", "bidmc_csv",
           "--task bidmc_rr --lr 1e-3 --folds 5", ("mae", "rmse")),
    "hr": ("bidmc_hr: 46 patients, 5 folds by patient", "bidmc_csv",
           "--task bidmc_hr --lr 1e-3 --folds 5", ("mae", "rmse")),
    "stays": ("seqsetvae: PhysioNet 2012 set a, 4,000 stays, 5 folds", "physionet2012",
              "--task seqsetvae --folds 5", ("auroc", "auprc")),
}


# --------------------------------------------------------------------------------------------------
# The runs


def run_seed(flags, data, seed, out):
    """Train one seed; what the file keeps of it."""
    words = [*flags.split(), "--data", str(data), "--seed", str(seed), "--out", str(out),
             "--overwrite"]  # not --resume: the seconds are those of a whole run
    start = time.perf_counter()
    with open(out.with_suffix(".log"), "a") as log:
        code = subprocess.run([sys.executable, ROOT / "train.py", *words], stdout=log,
                              stderr=subprocess.STDOUT).returncode
    if code:
        sys.exit(f"train.py ended with {code}: see {log.name}")
    scores = json.loads((out / "scores.json").read_text())["test"]
    return {"seed": seed, "seconds": round(time.perf_counter() - start),
            "scores": {name: report.plain(values) for name, values in scores.items()
                       if name != "rows"}, "rows": scores["rows"], **circumstances()}


def circumstances():
    commit = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"],
                            capture_output=True, text=True).stdout.strip()
    return {"commit": commit, "torch": torch.__version__, "numpy": np.__version__,
            "python": platform.python_version(), "threads": torch.get_num_threads(),
            "processor": f"{processor()}, {os.cpu_count()} cores"}


def rebuilt(folder):
    """A finished run: its state, its splits, and outputs of network and strong floor on test rows.
    """
    path = folder / "best.pt"
    task = torch.load(path, map_location="cpu", weights_only=True)["task"]
    content = checkpoint.load(path, task, train.TASKS[task].flags)
    args = checkpoint.adopt_recipe(train.parse_args(["--task", task]), content)
    args = args.replace(device="cpu")
    state = types.SimpleNamespace(args=args, facts=content["facts"], task=train.task_of(args))
    splits = state.task.load(args.data, args)
    state.model = state.task.network(args, state.facts)
    checkpoint.load_weights(state.model, content, path)
    with torch.inference_mode():
        outputs = train.outputs_of(state.model, splits.test, state)
    _, simple = report.strong_floor(state.task.floors(splits.test, args, state.facts))
    return state, splits, outputs, simple


def headlines(folder):
    """The headlines of network and strong floor on the test rows of a run, and the rows' units."""
    state, splits, *outputs = rebuilt(folder)
    groups = getattr(splits.test, "groups", None)
    units = splits.test.rows if groups is None else groups
    network, model = (state.task.headline(x, splits.test, state.args, state.facts)
                      for x in outputs)
    return network, model, [str(unit) for unit in units]


def pooled_difference(folders, sign):
    """By how much the network is better than the strong floor, over the test rows of several runs.

    The mean over the runs of the difference on the rows drawn, with an interval by group; a group
    that several runs test is drawn for all of them at once.
    """
    runs = [headlines(run) for folder in folders for run in checkpoint.runs_in(folder)]
    units = np.concatenate([run[2] for run in runs])
    ends = np.cumsum([0] + [len(run[2]) for run in runs])

    def better_by(weights):
        gains = []
        for (network, simple, _), a, b in zip(runs, ends, ends[1:]):
            with np.errstate(invalid="ignore"):  # NaN for a run none of whose rows are drawn
                gains.append(sign * (network(weights[:, a:b]) - simple(weights[:, a:b])))
        return np.nanmean(gains, axis=0)

    low, high = losses.paired_bootstrap(better_by, lambda weights: np.zeros(len(weights)), units)
    difference = float(better_by(np.ones((1, len(units))))[0])
    return {"difference": difference, "low": low, "high": high,
            "groups": len(np.unique(units)), "runs": len(runs)}


# --------------------------------------------------------------------------------------------------
# The table


def cell(seeds, name, keys):
    """Mean and sd over the seeds: F1 0.912 +- 0.010, AUROC ..."""
    parts = []
    for key in keys:
        values = [np.nan if seed["scores"][name].get(key) is None else seed["scores"][name][key]
                  for seed in seeds]
        spread = f" +- {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
        parts.append(f"{key} {np.mean(values):.3f}{spread}")
    return ", ".join(parts)


def table(results):
    """The rows of the file in Markdown."""
    lines = ["| data, split | network | best constant | strong floor | network better by, 95 % by "
             "group | seconds a seed | command |", "| --- " * 7 + "|"]
    for row, (title, _, flags, keys) in ROWS.items():
        if row not in results:
            continue
        seeds, beside = results[row]["seeds"], results[row]["beside"]
        scores = seeds[0]["scores"]
        strong, _ = report.strong_floor(scores)
        constants = [name for name in scores if name.startswith("constant")]
        lower = keys[0] in train.LOWER_IS_BETTER
        constant = sorted(constants, key=lambda name: seeds[0]["scores"][name][keys[0]])
        constant = constant[0 if lower else -1]
        seconds = sorted(seed["seconds"] for seed in seeds if seed["seconds"])  # null: interrupted
        times = " to ".join(str(second) for second in dict.fromkeys(seconds[:1] + seconds[-1:]))
        numbers = ", ".join(str(seed["seed"]) for seed in seeds)
        lines.append(
            f"| {title} | {cell(seeds, 'model', keys)} | {cell(seeds, constant, keys[:1])} | "
            f"{strong}: {cell(seeds, f'strong: {strong}', keys)} | "
            f"{beside['difference']:+.3f} [{beside['low']:+.3f}, {beside['high']:+.3f}], "
            f"{beside['groups']:,} groups | {times} | "
            f"`{flags} --seed {numbers}` |")
    return "\n".join(lines)


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--folder", type=Path, help="holds the data sets")
    parser.add_argument("--rows", default=",".join(ROWS), help="of %(default)s")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--file", type=Path, default=FILE)
    parser.add_argument("--print", action="store_true", help="print the table and do nothing else")
    args = parse(parser)
    if args.quick:
        with tempfile.TemporaryDirectory() as folder:
            quick(Path(folder))
        return
    if not args.print:
        fill(args)
    print(table(json.loads(args.file.read_text())))


def fill(args):
    """Train the rows' missing seeds, one after the other."""
    args.out.mkdir(exist_ok=True)
    args.file.parent.mkdir(exist_ok=True)
    for row in args.rows.split(","):
        _, data, flags, keys = ROWS[row]
        for seed in map(int, args.seeds.split(",")):
            results = json.loads(args.file.read_text()) if args.file.is_file() else {}
            seeds = results.get(row, {}).get("seeds", [])
            if seed in [known["seed"] for known in seeds]:
                continue
            print(f"{row}, seed {seed}", flush=True)
            known_folders = [args.out / f"{row}-{known['seed']}" for known in seeds]
            if missing := [path for path in known_folders if not checkpoint.runs_in(path)]:
                sys.exit(f"{row}: the difference is taken over all seeds, and "
                         f"{', '.join(map(str, missing))} is not there: give its --out, or take "
                         f"the row out of {args.file}")
            seeds.append(run_seed(flags, args.folder / data, seed, args.out / f"{row}-{seed}"))
            seeds.sort(key=lambda known: known["seed"])
            folders = [args.out / f"{row}-{known['seed']}" for known in seeds]
            beside = pooled_difference(folders, -1 if keys[0] in train.LOWER_IS_BETTER else 1)
            # another process may have finished another row meanwhile
            results = json.loads(args.file.read_text()) if args.file.is_file() else {}
            report.write_json(args.file, results | {row: {"seeds": seeds, "beside": beside}})


def quick(folder):
    """Two seeds of ocec on drawn eyes."""
    from _drawn import TINY, write_eyes

    write_eyes(folder / "eyes.npz", 200)
    ROWS.clear()
    ROWS["eyes"] = ("drawn eyes", "eyes.npz", f"--task ocec {TINY['ocec']}", ("f1", "auroc"))
    args = types.SimpleNamespace(folder=folder, rows="eyes", seeds="0,1", out=folder,
                                 file=folder / "results.json")
    fill(args)
    print(table(json.loads(args.file.read_text())))


if __name__ == "__main__":
    main()
