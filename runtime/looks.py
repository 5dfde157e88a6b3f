"""Calls in place of training: --find-lr, --show-schedule, --look, --check-sampler."""

import itertools
from pathlib import Path

import torch

import data
import models
import schedulers
from runtime import page, report
from runtime.settings import autocast
from tasks.common import plan_batches, seed_of


def find_lr(run, splits):
    """Learning-rate range test on the training split; writes nothing."""
    args = run.args
    generator = torch.Generator().manual_seed(seed_of(args.seed, 0, 1))

    def batches():
        for epoch in itertools.count():
            for rows in plan_batches(splits.train, epoch, args):
                yield splits.train.batch(rows, generator) | {"step": 0}

    def loss(model, batch):
        models.train_mode(model)
        with autocast(args):
            return run.task.loss(model, batch, args, run.facts)[0]

    for group, lr in zip(run.optimizer.param_groups, run.schedule.base_lrs):
        group["lr"] = lr  # as before the schedule was built
    report.print_lr_curve(*schedulers.find_lr(run.raw_model, run.optimizer, loss, batches()))


def show_schedule(run, splits, width=50):
    """First and last rate of every epoch, and the curve as text.

    The reductions of plateau depend on the scores to come.
    """
    steps = run.steps_per_epoch
    rates = []
    for epoch in range(run.args.epochs):
        first, last = epoch * steps, (epoch + 1) * steps - 1
        rates.append((run.schedule.lr_at(first), run.schedule.lr_at(last)))
    top = max(1e-12, *(max(pair) for pair in rates))
    for epoch, (first, last) in enumerate(rates, 1):
        print(f"epoch {epoch:4d} | lr {first:.2e} to {last:.2e} | "
              f"{'#' * round(width * last / top)}")


def look(run, splits):
    """The first images of the first batch that train_epoch would train on, as one PNG."""
    args = run.args
    generator = torch.Generator().manual_seed(seed_of(args.seed, 1, 1, 0))
    inputs = splits.train.batch(plan_batches(splits.train, 1, args)[0], generator).get("inputs")
    if not page.is_image(inputs):
        raise ValueError(f"--look shows images, and the rows of task {args.task} are none: leave "
                         "it out")
    path = Path(args.out) / "look.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    page.write_images(path, inputs[:24])
    print(f"saved: {path}")


def check_sampler(run, splits):
    """Count the classes in all batches of the first epoch."""
    labels = getattr(splits.train, "labels", None)
    if labels is None or labels.dtype.kind not in "iu":
        raise ValueError("--check-sampler counts the classes of the rows: this task has none")
    report.print_sampler(data.sampler_report(plan_batches(splits.train, 1, run.args), labels))


LOOKS = {"find_lr": find_lr, "show_schedule": show_schedule, "look": look,
         "check_sampler": check_sampler}
