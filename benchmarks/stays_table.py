"""Finished seqsetvae runs beside the logistic regression on the same test stays: a row of a table per group of seeds.

    $ for seed in 0 1 2; do
    >     python train.py --task seqsetvae --data physionet2012 --seed $seed --out runs/stays-scratch-$seed
    >     python train.py --task seqsetvae --data physionet2012 --seed $seed --variant pretrain --out runs/stays-pretrain-$seed
    >     for mode in "probe --epochs 60" finetune; do
    >         python train.py --task seqsetvae --data physionet2012 --seed $seed --mode $mode --pretrained runs/stays-pretrain-$seed \\
    >             --out runs/stays-${mode%% *}-$seed; done; done
    $ python benchmarks/stays_table.py runs/stays-scratch-{0,1,2} -- runs/stays-probe-{0,1,2} -- runs/stays-finetune-{0,1,2}

The difference is the mean over the seeds of (model - logistic regression), each on the test stays of its seed; its 95 % interval
resamples stays in pairs, within each seed. What another draw of the training stays would change is in the sd over the seeds, not in it.
The data are read from where the runs found them.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from _quick import new_parser, parse

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import losses
import train

RESAMPLES = 2000


def test_scores(folder):
    """Logits of the best epoch's weights, of the logistic regression, and labels: the test stays of one run."""
    content = train.load_checkpoint(folder / "best.pt", "seqsetvae")
    args = train.parse_args(["--task", "seqsetvae", "--eval", str(folder / "best.pt")])
    train.adopt_recipe(args, content)
    args.device, args.split = "cpu", "test"
    sets = train.TASKS["seqsetvae"].load(args.data, args)
    if sets.facts != content["facts"]:
        sys.exit(f"{folder}: the data are not those of the run")
    model = train.stay_network(args)
    train.load_weights(model, content, folder)
    model.eval()
    with train.torch.inference_mode():
        logits = train.stay_all_logits(model, sets.test).numpy()
    return logits, train.stay_regression(sets.test, args), sets.test.labels


def spread(x):
    """Mean, and standard deviation where there is more than one."""
    return f"{x.mean():.3f}" + (f" +- {x.std(ddof=1):.3f}" if len(x) > 1 else "")


def print_table(groups):
    print("| run | AUROC | logistic regression | difference [95 %] | AUPRC | logistic regression | "
          "difference [95 %] |\n|" + " --- |" * 7)
    for folders in groups:
        runs = [test_scores(folder) for folder in folders]
        cells = []
        for name, score in (("auroc", losses.auroc), ("auprc", losses.average_precision)):
            of = [np.array([score(run[i], run[2]) for run in runs]) for i in (0, 1)]
            drawn = [losses.bootstrap_ranking(run[i], run[2], resamples=RESAMPLES, seed=seed)[name]
                     for i in (0, 1) for seed, run in enumerate(runs)]
            gain = np.mean(drawn[: len(runs)], axis=0) - np.mean(drawn[len(runs) :], axis=0)
            low, high = np.nanquantile(gain, (0.025, 0.975))
            cells += [spread(of[0]), spread(of[1]),
                      f"{(of[0] - of[1]).mean():+.3f} [{low:+.3f}, {high:+.3f}]"]
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
    # argparse would drop a --
    args = parse(parser, [word if word != "--" else "+" for word in sys.argv[1:]])
    if bool(args.runs) == args.quick:
        parser.error("give either folders of finished runs, or --quick")
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
