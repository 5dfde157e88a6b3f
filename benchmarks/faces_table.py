"""Test scores of finished faceparse runs as rows of a table: seeds of one recipe joined by commas, several recipes side by side.

    $ for seed in 0 1; do for flip in swap naive none; do
    >     python train.py --task faceparse --lr 2e-3 --data celebamask_mini --size 96 --epochs 20 --warmup-epochs 1 \\
    >         --min-lr 2e-6 --jitter 0 --flip $flip --seed $seed --out runs/flip-$flip-$seed; done; done
    $ python benchmarks/faces_table.py runs/flip-swap-0,runs/flip-swap-1 runs/flip-naive-0,runs/flip-naive-1 \\
    >     runs/flip-none-0,runs/flip-none-1

sided: mean F of the six classes that have a left and a right; middle: of the nine that are in most faces and have none; both pooled
over the images. gap: F of training rows less that of validation rows, in the last epoch, both not augmented.
"""

import json
import tempfile
from pathlib import Path

import numpy as np

from _quick import new_parser, parse

SIDED = ("l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear")
MIDDLE = ("background", "skin", "nose", "mouth", "u_lip", "l_lip", "hair", "neck", "cloth")


def columns(folder):
    """{column: score} of one run."""
    test = json.loads((folder / "scores.json").read_text())["test"]["model"]
    last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    mean_of = lambda names: np.mean([test["classes"][name]["f"] for name in names])
    return {"F": test["f"], "F pooled": test["f_pooled"], "mean IoU": test["miou"], "sided": mean_of(SIDED), "middle": mean_of(MIDDLE),
            "gap": last["train_eval"]["f"] - last[last["weights"]]["f"]}


def print_table(recipes):
    """A row for each list of folders, which are seeds of one recipe."""
    for i, folders in enumerate(recipes):
        rows = [columns(folder) for folder in folders]
        if i == 0:
            print("| run | " + " | ".join(rows[0]) + " |\n|" + " --- |" * (len(rows[0]) + 1))
        cells = []
        for name in rows[0]:
            values = [row[name] for row in rows]
            mean = f", mean {np.mean(values):.3f}" if len(values) > 1 else ""
            cells.append(" / ".join(f"{value:.3f}" for value in values) + mean)
        print(f"| {folders[0].name} | " + " | ".join(cells) + " |")


def tiny_recipes(folder):
    """One recipe with two seeds, and the second of them alone, on drawn faces."""
    from _drawn import tiny_run, write_faces

    write_faces(folder / "faces.npz")
    runs = [tiny_run("faceparse", folder / "faces.npz", folder / f"run-{seed}", "--seed", seed)
            for seed in ("0", "1")]
    return [runs, runs[1:]]


def main():
    parser = new_parser(__doc__)
    parser.add_argument("runs", nargs="*", help="folders of finished runs; seeds joined by commas")
    args = parse(parser)
    if bool(args.runs) == args.quick:
        parser.error("give either folders of finished runs, or --quick")
    with tempfile.TemporaryDirectory() as folder:
        if args.quick:
            print_table(tiny_recipes(Path(folder)))
        else:
            print_table([[Path(name) for name in group.split(",")] for group in args.runs])


if __name__ == "__main__":
    main()
