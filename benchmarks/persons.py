"""Who is in which split of an ocec run, and the accuracy on each person of its test rows.

    $ python benchmarks/persons.py runs/mrl-3 runs/mrl-4 runs/mrl-5    # as docs/ocec.md has it
    $ python benchmarks/persons.py --quick
"""

import tempfile
import types
from pathlib import Path

import numpy as np
import torch

from _quick import new_parser, parse, require_runs_or_quick
import train
from runtime import checkpoint, report


def accuracies(folder):
    """The splits of a run, and per test row whether network and strong floor are right."""
    content = checkpoint.load(folder / "best.pt", "ocec", train.TASKS["ocec"].flags)
    args = checkpoint.adopt_recipe(train.parse_args(["--task", "ocec"]), content)
    args = args.replace(device="cpu")
    task, splits = train.task_of(args), train.task_of(args).load(args.data, args)
    model = task.network(args, content["facts"])
    checkpoint.load_weights(model, content, folder / "best.pt")
    state = types.SimpleNamespace(args=args, facts=content["facts"], task=task)
    with torch.inference_mode():
        outputs = train.outputs_of(model, splits.test, state)
    _, simple = report.strong_floor(task.floors(splits.test, args, content["facts"]))
    is_open = splits.test.labels == 1
    return splits, [(x["logits"].numpy() >= 0) == is_open for x in (outputs, simple)]


def print_persons(folder):
    splits, (network, simple) = accuracies(folder)
    print(f"\n{folder.name}: test on {len(np.unique(splits.test.groups))} persons\n")
    for name in ("train", "validation"):
        persons = sorted(np.unique(splits.named()[name].groups), key=lambda x: (len(x), x))
        print(f"- {name}: {', '.join(persons)}")
    print("\n| test person | eyes | open | accuracy | logistic on HOG |")
    print("| --- " * 5 + "|")
    for person in sorted(np.unique(splits.test.groups), key=lambda x: (len(x), x)):
        rows = splits.test.groups == person
        print(f"| {person} | {rows.sum():,} | {splits.test.labels[rows].mean():.0%} | "
              f"{network[rows].mean():.3f} | {simple[rows].mean():.3f} |")


def main():
    parser = new_parser(__doc__)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of finished runs of ocec")
    args = parse(parser)
    require_runs_or_quick(parser, args)
    with tempfile.TemporaryDirectory() as folder:
        for run in [tiny(Path(folder))] if args.quick else args.runs:
            print_persons(run)


def tiny(folder):
    from _drawn import tiny_run, write_eyes

    write_eyes(folder / "eyes.npz", 200)
    return tiny_run("ocec", folder / "eyes.npz", folder / "eyes-0")


if __name__ == "__main__":
    main()
