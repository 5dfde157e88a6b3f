"""Table of finished seqsetvae runs: test scores beside the logistic regression, a row per recipe.

    $ for seed in 0 1 2; do
    >     run="python train.py --task seqsetvae --data physionet2012 --seed $seed"
    >     $run --anchor none --lr 1e-3 --epochs 6 --out runs/stays-scratch-$seed
    >     $run --variant pretrain --out runs/stays-pretrain-$seed
    >     for mode in "probe --lr 1e-3 --epochs 60" "finetune --anchor none"; do
    >         $run --mode $mode --pretrained runs/stays-pretrain-$seed \\
    >             --out runs/stays-${mode%% *}-$seed; done; done
    $ python benchmarks/stays_table.py runs/stays-scratch-{0,1,2} -- runs/stays-probe-{0,1,2} \\
    >     -- runs/stays-finetune-{0,1,2}
    $ python benchmarks/stays_table.py --quick

Recipes are separated by --. The difference is (model - logistic regression), the mean over the
seeds, each on the test stays of its seed. Its 95 % interval resamples the stays in pairs within
each seed; the effect of other training stays shows in the sd over the seeds, not in the interval.
The data are read from the path that the run has stored.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from _quick import new_parser, parse, require_runs_or_quick
import losses
import train
from runtime import checkpoint
from tasks import seqsetvae
from tasks.common import outputs_over

RESAMPLES = 2000
METRICS = {"auroc": losses.auroc, "auprc": losses.average_precision}


def test_scores(folder):
    """Logits of the best weights, those of the regression, labels: the test stays of a run."""
    best = folder / "best.pt"
    content = checkpoint.load(best, "seqsetvae", seqsetvae.FLAGS)
    args = train.parse_args(["--task", "seqsetvae", "--eval", str(best), "--device", "cpu"])
    args, facts = checkpoint.adopt_recipe(args, content), content["facts"]
    splits = seqsetvae.load(args.data, args)
    if splits.facts != facts:
        sys.exit(f"{folder}: the data are not those of the run")
    test = splits.test
    model = seqsetvae.network(args, facts).eval()
    checkpoint.load_weights(model, content, best)
    with torch.inference_mode():
        outputs = outputs_over(test, lambda batch: seqsetvae.outputs(model, batch, args, facts))
    return outputs["logits"].numpy(), seqsetvae.regression(test, facts), test.labels


def bootstrap_mean(runs, column, name):
    """Bootstrap draws of a metric, averaged over the seeds; column: 0 model, 1 regression."""
    draws = []
    for seed, run in enumerate(runs):
        by_metric = losses.bootstrap_ranking(run[column], run[2], resamples=RESAMPLES, seed=seed)
        draws.append(by_metric[name])
    return np.mean(draws, axis=0)


def differences_from_regression(runs):
    """{metric: (model scores, regression scores, 95 % interval of the mean difference)}.

    runs: (logits, logits of the regression, labels) of every seed; the scores have one per seed.
    """
    results = {}
    for name, score in METRICS.items():
        of_model = np.array([score(run[0], run[2]) for run in runs])
        of_regression = np.array([score(run[1], run[2]) for run in runs])
        differences = bootstrap_mean(runs, 0, name) - bootstrap_mean(runs, 1, name)
        results[name] = (of_model, of_regression, np.nanquantile(differences, (0.025, 0.975)))
    return results


def mean_and_sd(x):
    """The mean, and the standard deviation if there is more than one value."""
    text = f"{x.mean():.3f}"
    if len(x) > 1:
        text += f" +- {x.std(ddof=1):.3f}"
    return text


def difference_text(scores, baseline, interval):
    low, high = interval
    return f"{(scores - baseline).mean():+.3f} [{low:+.3f}, {high:+.3f}]"


def print_table(groups):
    """A row per group; a group is the list of the folders of its seeds."""
    print("| run | AUROC | logistic regression | difference [95 %] | AUPRC | logistic regression | "
          "difference [95 %] |\n|" + " --- |" * 7)
    for folders in groups:
        runs = [test_scores(folder) for folder in folders]
        cells = []
        for scores, baseline, interval in differences_from_regression(runs).values():
            cells += [mean_and_sd(scores), mean_and_sd(baseline),
                      difference_text(scores, baseline, interval)]
        print(f"| {folders[0].name} | " + " | ".join(cells) + " |", flush=True)


def tiny_groups(folder):
    """Two seeds of one recipe, and the second of them alone, on drawn stays."""
    from _drawn import tiny_run, write_stays

    write_stays(folder / "stays")
    runs = [tiny_run("seqsetvae", folder / "stays", folder / f"run-{seed}", "--seed", seed)
            for seed in ("0", "1")]
    for run in runs:
        logits, _, labels = test_scores(run)
        auroc = losses.auroc(logits, labels)
        scores = json.loads((run / "scores.json").read_text())["test"]["model"]
        assert abs(auroc - scores["auroc"]) < 1e-6, (auroc, scores)
    return [runs, runs[1:]]


def main():
    parser = new_parser(__doc__)
    parser.add_argument("runs", nargs="*", help="folders of finished runs, groups separated by --")
    words = ["+" if word == "--" else word for word in sys.argv[1:]]  # argparse would drop --
    args = parse(parser, words)
    require_runs_or_quick(parser, args)
    groups = [[]]
    for word in args.runs:
        if word == "+":
            groups.append([])
        else:
            groups[-1].append(Path(word))
    with tempfile.TemporaryDirectory() as folder:
        print_table(tiny_groups(Path(folder)) if args.quick else groups)


if __name__ == "__main__":
    main()
