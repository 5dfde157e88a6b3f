"""Who is in which split of an ocec run, the accuracy on each person, and what noise and blur cost.

    $ python benchmarks/persons.py runs/mrl-3 runs/mrl-4 runs/mrl-5    # as docs/ocec.md has it
    $ python benchmarks/persons.py --quick

Of more than 50 persons or faces neither the splits are named nor each one's accuracy.
"""

import numpy as np
import torch
import torch.nn.functional as F

from _quick import main_of_runs
from results import rebuilt
import data
import losses
from tasks.common import outputs_over


def print_persons(folder):
    state, splits, *outputs = rebuilt(folder)
    is_open, groups = splits.test.labels == 1, splits.test.groups
    persons = in_order(groups)
    print(f"\n{folder.name}: test on {len(persons):,} persons or faces\n")
    if len(persons) > 50:
        persons = []
    if persons:
        for name in ("train", "validation"):
            print(f"- {name}: {', '.join(in_order(splits.named()[name].groups))}")
    print("\n| test rows | eyes | open | accuracy | logistic on HOG |")
    print("| --- " * 5 + "|")
    correct = [(x["logits"].numpy() >= 0) == is_open for x in outputs]
    for person in persons:
        print_row(f"person {person}", is_open[groups == person],
                  [hits[groups == person] for hits in correct])
    print_row("all", is_open, correct)
    for name, change in (("all, with noise", with_noise), ("all, blurred", blurred)):
        logits = under(state, splits.test, change)
        print_row(name, is_open, [(values.numpy() >= 0) == is_open for values in logits])


def in_order(groups):
    return sorted(np.unique(groups), key=lambda group: (len(group), group))


def print_row(name, is_open, correct):
    accuracies = [f"{hits.mean():.3f}" for hits in correct]
    print(f"| {name} | {len(is_open):,} | {is_open.mean():.0%} | {' | '.join(accuracies)} |")


def with_noise(inputs):
    """Normal noise of sd 0.05, of pixels in [0, 1] at the size that the network sees, clipped."""
    noise = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(0))
    return (inputs + 0.1 * noise).clamp(-1, 1)  # the inputs are in [-1, 1]


def blurred(inputs):
    """The mean of 3x3 pixels."""
    return F.avg_pool2d(F.pad(inputs, (1, 1, 1, 1), mode="reflect"), 3, stride=1)


def under(state, split, change):
    """Logits of network and logistic regression on changed images."""

    def outputs(batch):
        inputs = change(batch["inputs"])
        network = state.task.outputs(state.model, {"inputs": inputs}, state.args, state.facts)
        images = ((inputs + 1) * 127.5).round().to(torch.uint8)
        simple = losses.linear_scores(state.facts["strong"], data.hog_features(images))
        return network | {"simple": torch.as_tensor(simple)}

    with torch.inference_mode():
        joined = outputs_over(split, outputs)
    return joined["logits"], joined["simple"]


def tiny_runs(folder):
    from _drawn import tiny_run, write_eyes

    write_eyes(folder / "eyes.npz", 200)
    return [tiny_run("ocec", folder / "eyes.npz", folder / "eyes-0")]


if __name__ == "__main__":
    main_of_runs(__doc__, lambda runs: [print_persons(run) for run in runs], tiny_runs)
