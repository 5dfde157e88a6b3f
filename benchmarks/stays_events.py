"""What the sequence of the sets adds to seqsetvae: StrongestEvents and the head alone, without SetEncoder and transformer, on the same
stays, splits, batches, loss and schedule as `train.py --task seqsetvae` with its defaults.

    $ OMP_NUM_THREADS=1 python benchmarks/stays_events.py --data ../shared/data/physionet2012 --seed 0 1 2      # half a minute a seed
    $ python benchmarks/stays_events.py --quick                     # 80 drawn stays, one epoch

Raw weights, no EMA; the validation stays pick the epoch by AUROC; the test stays are scored once. The last rows are the means over the
seeds, of (this - logistic regression) with the interval of benchmarks/stays_table.py.

Last result, torch 2.13.0+cpu, one of 2 busy cores, half a minute a seed:

    seed 0: AUROC 0.8371, AUPRC 0.4153; logistic regression 0.8273, 0.4271
    seed 1: AUROC 0.8195, AUPRC 0.4516; logistic regression 0.8230, 0.4682
    seed 2: AUROC 0.8356, AUPRC 0.4468; logistic regression 0.8126, 0.4406
    auroc: 0.831 +- 0.010, minus the regression +0.010 [-0.009, +0.030]
    auprc: 0.438 +- 0.020, minus the regression -0.007 [-0.046, +0.032]
"""

import copy
import math
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

import data
import losses
import models
import schedulers
import train
from _quick import new_parser, parse


class EventsAlone(torch.nn.Module):
    """Packed stays to logits (b,), as SeqSetClassifier with events=True, whose states are left out."""

    def __init__(self, like):
        super().__init__()
        self.events = like.encoder.events
        self.strongest, width = like.strongest, like.encoder.width
        self.head = torch.nn.Sequential(torch.nn.Linear(width, 128), *like.head[0][1:], like.head[-1])

    def forward(self, inputs):
        sizes, lengths = inputs["sizes"], inputs["lengths"]
        stay = torch.arange(len(lengths)).repeat_interleave(lengths)
        strongest = self.strongest(self.events(inputs), inputs["minutes"].repeat_interleave(sizes),
                                   torch.zeros_like(lengths).index_add(0, stay, sizes))
        return self.head(strongest).squeeze(1)


def train_one(args):
    """Test logits of the best epoch, those of the logistic regression, labels."""
    sets = train.TASKS["seqsetvae"].load(args.data, args)
    args.facts = sets.facts
    torch.manual_seed(args.seed)
    model = EventsAlone(train.stay_network(args))
    optimizer = torch.optim.AdamW([{"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": args.weight_decay},
                                   {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}], lr=args.lr)
    steps = math.ceil(len(sets.train) / args.batch_size)
    schedule = schedulers.WarmupCosine(optimizer, args.epochs * steps, warmup_steps=int(args.warmup_epochs * steps),
                                       warmup_start_lr=args.warmup_start_lr, min_lr=args.min_lr)
    best, step = (-math.inf, None), 0
    for epoch in range(args.epochs):
        for rows in data.stratified_batches(sets.train.labels, args.batch_size, seed=args.seed, epoch=epoch):
            batch = sets.train.batch(rows, torch.Generator().manual_seed(args.seed * 10**6 + step))
            loss, _ = train.stay_loss(model, batch, step, args)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            optimizer.step()
            schedule.step()
            step += 1
        with torch.inference_mode():
            score = train.stay_evaluate(model.eval(), sets.validation, args)["auroc"]
        best = max(best, (score, copy.deepcopy(model.state_dict())), key=lambda pair: pair[0])
        model.train()
    model.load_state_dict(best[1])
    with torch.inference_mode():
        logits = train.stay_all_logits(model.eval(), sets.test).numpy()
    return logits, train.stay_regression(sets.test, args), sets.test.labels


def compare(path, seeds, flags=()):
    runs = []
    for seed in seeds:
        words = ["--task", "seqsetvae", "--data", str(path), "--seed", str(seed), *flags]
        args = train.parse_args(words)
        args.device, args.split = "cpu", "test"
        logits, regression, labels = train_one(args)
        assert len(logits) == len(regression) == len(labels) and np.isfinite(logits).all()
        runs.append((logits, regression, labels))
        scores = [f"{metric(outputs, labels):.4f}" for outputs in (logits, regression)
                  for metric in (losses.auroc, losses.average_precision)]
        print(f"seed {seed}: AUROC {scores[0]}, AUPRC {scores[1]}; "
              f"logistic regression {scores[2]}, {scores[3]}", flush=True)
    for name, score in (("auroc", losses.auroc), ("auprc", losses.average_precision)):
        of = np.array([[score(run[i], run[2]) for run in runs] for i in (0, 1)])
        drawn = []
        for i in (0, 1):
            of_seeds = [losses.bootstrap_ranking(run[i], run[2], resamples=2000, seed=seed)[name]
                        for seed, run in enumerate(runs)]
            drawn.append(np.mean(of_seeds, axis=0))
        low, high = np.nanquantile(drawn[0] - drawn[1], (0.025, 0.975))
        print(f"{name}: {of[0].mean():.3f} +- {of[0].std(ddof=1):.3f}, "
              f"minus the regression {(of[0] - of[1]).mean():+.3f} [{low:+.3f}, {high:+.3f}]")


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--data", help="the folder of PhysioNet 2012; needed without --quick")
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    args = parse(parser)
    if bool(args.data) == args.quick:
        parser.error("give either --data, the folder of PhysioNet 2012, or --quick")
    if args.data:
        compare(args.data, args.seed)
        return
    from _drawn import TINY, write_stays

    with tempfile.TemporaryDirectory() as folder:
        write_stays(Path(folder) / "stays")
        compare(Path(folder) / "stays", [0, 1], [*TINY["seqsetvae"].split(), "--epochs", "1"])


if __name__ == "__main__":
    main()
