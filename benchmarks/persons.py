"""Who is in which split of an ocec run, and the accuracy on each person of its test rows.

    $ python benchmarks/persons.py runs/mrl-3 runs/mrl-4 runs/mrl-5    # as docs/ocec.md has it
    $ python benchmarks/persons.py --quick
"""

import numpy as np

from _quick import main_of_runs
from results import rebuilt


def print_persons(folder):
    _, splits, *outputs = rebuilt(folder)
    is_open = splits.test.labels == 1
    network, simple = ((x["logits"].numpy() >= 0) == is_open for x in outputs)
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


def tiny_runs(folder):
    from _drawn import tiny_run, write_eyes

    write_eyes(folder / "eyes.npz", 200)
    return [tiny_run("ocec", folder / "eyes.npz", folder / "eyes-0")]


if __name__ == "__main__":
    main_of_runs(__doc__, lambda runs: [print_persons(run) for run in runs], tiny_runs)
