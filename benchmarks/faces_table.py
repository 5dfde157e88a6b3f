"""Table of finished faceparse runs: test scores of several recipes, a row per recipe.

    $ for seed in 0 1; do for flip in swap naive none; do
    >     python train.py --task faceparse --lr 2e-3 --data celebamask_mini --size 96 \\
    >         --epochs 20 --warmup-epochs 1 --min-lr 2e-6 --jitter 0 --flip $flip --seed $seed \\
    >         --out runs/flip-$flip-$seed; done; done
    $ python benchmarks/faces_table.py runs/flip-swap-0,runs/flip-swap-1 \\
    >     runs/flip-naive-0,runs/flip-naive-1 runs/flip-none-0,runs/flip-none-1
    $ python benchmarks/faces_table.py --quick

Seeds of one recipe are joined by commas.

    sided     mean F of the six classes that have a left and a right; pooled over the images
    middle    mean F of the nine classes that have none and are in most faces; pooled
    gap       F of training rows minus F of validation rows, last epoch, neither augmented
"""

import json

import numpy as np

from _quick import main_of_table

SIDED = ("l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear")
MIDDLE = ("background", "skin", "nose", "mouth", "u_lip", "l_lip", "hair", "neck", "cloth")


def columns(folder):
    """{column: score} of one run."""
    test = json.loads((folder / "scores.json").read_text())["test"]["model"]
    last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])

    def mean_f(names):
        return np.mean([test["classes"][name]["f"] for name in names])

    return {"F": test["f"], "F pooled": test["f_pooled"], "mean IoU": test["miou"],
            "sided": mean_f(SIDED), "middle": mean_f(MIDDLE),
            "gap": last["train_eval"]["f"] - last[last["weights"]]["f"]}


def print_table(recipes):
    """A row per recipe; a recipe is the list of the folders of its seeds."""
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


if __name__ == "__main__":
    main_of_table(__doc__, print_table, tiny_recipes)
