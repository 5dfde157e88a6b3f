"""Ablation of seqsetvae: the strongest events and the head, without set encoder and transformer.

    $ OMP_NUM_THREADS=1 python benchmarks/stays_events.py --data physionet2012 --seed 0 1 2
    $ python benchmarks/stays_events.py --quick     # 80 drawn stays, one epoch

Same stays, splits, batches, loss and schedule as `train.py --task seqsetvae --anchor none --lr 1e-3
--epochs 6`. Raw weights, no EMA. The validation stays pick the epoch by AUROC; the test stays are
scored once. The last rows are means over the seeds and the difference to the logistic regression,
with the interval of stays_table.py.

Last result, torch 2.13.0+cpu, one of 2 busy cores, half a minute a seed:

    seed 0: AUROC 0.8371, AUPRC 0.4153; logistic regression 0.8273, 0.4271
    seed 1: AUROC 0.8195, AUPRC 0.4516; logistic regression 0.8230, 0.4682
    seed 2: AUROC 0.8356, AUPRC 0.4468; logistic regression 0.8126, 0.4406
    auroc: 0.831 +- 0.010, minus the regression +0.010 [-0.009, +0.030]
    auprc: 0.438 +- 0.020, minus the regression -0.007 [-0.046, +0.032]
"""

import copy
import math
import tempfile
from pathlib import Path

import numpy as np
import torch

from _quick import new_parser, parse
import data
import losses
import schedulers
import train
from stays_table import difference_text, differences_from_regression, mean_and_sd
from tasks import seqsetvae
from tasks.common import outputs_over


class EventsAlone(torch.nn.Module):
    """Packed stays to logits (b,): SeqSetClassifier with events=True, without its states."""

    def __init__(self, like):
        super().__init__()
        self.events = like.encoder.events
        self.strongest, width = like.strongest, like.encoder.width
        first = torch.nn.Linear(width, 128)
        self.head = torch.nn.Sequential(first, *like.head[0][1:], like.head[-1])

    def forward(self, inputs):
        sizes, lengths = inputs["sizes"], inputs["lengths"]
        stay = torch.arange(len(lengths)).repeat_interleave(lengths)
        minutes = inputs["minutes"].repeat_interleave(sizes)
        event_counts = torch.zeros_like(lengths).index_add(0, stay, sizes)
        strongest = self.strongest(self.events(inputs), minutes, event_counts)
        return self.head(strongest).squeeze(1)


def outputs_of(model, split, args, facts):
    model.eval()
    with torch.inference_mode():
        return outputs_over(split, lambda batch: seqsetvae.outputs(model, batch, args, facts))


def train_one(args):
    """Test logits of the best epoch, those of the logistic regression, and the labels."""
    splits = seqsetvae.load(args.data, args)
    facts = splits.facts
    torch.manual_seed(args.seed)
    model = EventsAlone(seqsetvae.network(args, facts))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": args.weight_decay},
                                   {"params": others, "weight_decay": 0.0}], lr=args.lr)
    steps = math.ceil(len(splits.train) / args.batch_size)
    schedule = schedulers.WarmupCosine(
        optimizer, args.epochs * steps, warmup_steps=int(args.warmup_epochs * steps),
        warmup_start_lr=args.warmup_start_lr, min_lr=args.min_lr)
    best_score, best_weights, step = -math.inf, None, 0
    for epoch in range(args.epochs):
        for rows in data.stratified_batches(splits.train.labels, args.batch_size, seed=args.seed,
                                            epoch=epoch):
            generator = torch.Generator().manual_seed(args.seed * 10**6 + step)
            batch = splits.train.batch(rows, generator)
            loss, _ = seqsetvae.loss(model, batch, args, facts)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            optimizer.step()
            schedule.step()
            step += 1
        outputs = outputs_of(model, splits.validation, args, facts)
        score = seqsetvae.scores(outputs, splits.validation, args, facts)["auroc"]
        if score > best_score:
            best_score, best_weights = score, copy.deepcopy(model.state_dict())
        model.train()
    model.load_state_dict(best_weights)
    logits = outputs_of(model, splits.test, args, facts)["logits"].numpy()
    return logits, seqsetvae.regression(splits.test, facts), splits.test.labels


def compare(path, seeds, flags=()):
    """Train once per seed; print the scores of every seed, then means and differences."""
    runs = []
    for seed in seeds:
        words = ["--task", "seqsetvae", "--anchor", "none", "--lr", "1e-3", "--epochs", "6",
                 "--data", str(path), "--device", "cpu", "--seed", str(seed)]
        logits, regression, labels = train_one(train.parse_args([*words, *flags]))
        assert len(logits) == len(regression) == len(labels) and np.isfinite(logits).all()
        runs.append((logits, regression, labels))
        print(f"seed {seed}: AUROC {losses.auroc(logits, labels):.4f}, "
              f"AUPRC {losses.average_precision(logits, labels):.4f}; "
              f"logistic regression {losses.auroc(regression, labels):.4f}, "
              f"{losses.average_precision(regression, labels):.4f}", flush=True)
    for name, (scores, baseline, interval) in differences_from_regression(runs).items():
        print(f"{name}: {mean_and_sd(scores)}, "
              f"minus the regression {difference_text(scores, baseline, interval)}")


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
