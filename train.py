"""Train, score and apply deep-learning recipes; no score is printed without its floor and its
ceiling.

    $ python train.py --task ocec --lr 2e-3                          # drawn eyes: no data needed
    $ python train.py --task ocec --lr 2e-3 --data eyes/ --out runs/eyes
    $ python train.py --task ocec --out runs/eyes --resume           # goes on bit for bit
    $ torchrun --nproc-per-node 2 train.py --task ocec --lr 2e-3     # two processes, one GPU each
    $ python train.py --task ocec --variant aggressive --help        # the flags and their defaults
    $ python train.py --task ocec --data eyes/ --cache cache/        # more images than memory holds
    $ python train.py --task ocec --data eyes/ --find-lr             # learning-rate range test
    $ python train.py --task ocec --data eyes/ --look                # the first batch, as a picture
    $ python train.py --task ocec --eval runs/eyes/best.pt --split test
    $ python train.py --task ocec --predict runs/eyes/best.pt --data new/ --out preds.csv
    $ python train.py --task ocec --export runs/eyes/best.pt --out eyes.pt2

The order: the step, the epoch, evaluation, fit; what a run is built from; the command line; the
kinds of call. A recipe is one file in tasks/. The loop knows no task.
"""

import argparse
import contextlib
import io
import math
import signal
import sys
import time
import types
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

import ema
import models
import schedulers
from runtime import (
    checkpoint, checks, debug, diagnosis, export, looks, page, pretrained, processes, report,
    series)
from runtime.checkpoint import RUN_FILES
from runtime.processes import Interrupted, ProcessLost, rank, world_size
from runtime.settings import (
    CHECKS, NOT_OF_THE_TASK, RUN_FLAGS, SCORING_FLAGS, USES, Refused, Settings, add_flag, autocast,
    check_call, check_flags, chosen_of, command_line, refusals, resolve_device, resume_command)
from tasks import bidmc, bidmc_pretrain, faceparse, ocec, quadmodal, seqsetvae, seqsetvae_pretrain
from tasks.common import (
    LOWER_IS_BETTER, NonFinite, finite, plan_batches, seed_of, show, spelled)

TASKS = {"ocec": ocec.TASK, "faceparse": faceparse.TASK, **bidmc.TASKS, "quadmodal": quadmodal.TASK,
         "seqsetvae": seqsetvae.TASK}
MODES = {("seqsetvae", "pretrain"): seqsetvae_pretrain.TASK}
for name, task in bidmc_pretrain.TASKS.items():
    MODES[name, "pretrain"] = task


def task_of(args):
    """What a run trains: its task, or with --mode pretrain the one that trains its encoder."""
    return MODES.get((args.task, args.mode), TASKS[args.task])


# --------------------------------------------------------------------------------------------------
# The step


def train_step(run, split, window, generator, look=None):
    """One optimizer step on a window of batches, whose gradients are added up.

    Of each batch: forward, loss, backward. Then unscale, clip, finite check, optimizer, schedule,
    EMA, update of the loss scale. Returns the totals of loss and parts over the rows, and the
    gradient norm: NaN where fp16 skipped the step.
    """
    args, lr = run.args, run.schedule.get_last_lr()[0]
    # of this process; the processes have equal shares of a batch
    rows_in_window = sum(len(rows) for rows in window)
    values = []
    for rows in window:
        batch = split.batch(rows, generator) | {"step": run.step}
        # processes exchange gradients once a window, in the backward of its last batch
        with processes.no_sync(run.loss, unless=rows is window[-1]):
            with autocast(args):
                loss, parts = run.loss(batch, args, run.facts)
            # a short window divides by its own size: it equals one big batch
            run.scaler.scale(loss * (len(rows) / rows_in_window)).backward()
        values.append({"train_loss": loss.detach(), **parts})
    if look:
        look(batch, lr)

    run.scaler.unscale_(run.optimizer)
    norm = nn.utils.clip_grad_norm_(run.parameters, args.clip or math.inf)
    totals, norm = summed_over_processes(values, window, norm)
    if not math.isfinite(sum(total["train_loss"] for total in totals)):  # in all processes alike
        mean = sum(total["train_loss"] for total in totals) / sum(total["rows"] for total in totals)
        raise NonFinite(f"the loss became {mean}")
    if math.isfinite(norm):
        run.scaler.step(run.optimizer)
        run.schedule.step()
        run.step += 1
        if run.ema is not None:
            run.ema.update(run.raw_model)
    elif args.amp == "fp16" and run.scaler.get_scale() > 1:
        norm = math.nan  # the scaled gradients overflowed: the step is skipped, the scale falls
    else:
        raise NonFinite(f"the gradient norm became {norm} (loss {loss.item():.4g})")
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    return totals, norm


def summed_over_processes(values, window, norm):
    """Values of the batches times their rows, summed over the processes.

    The device is waited for once. values: [{name: scalar}] of each batch. Returns
    [{name: total, "rows": count}], and the norm.
    """
    scalars = [norm] + [value for part in values for value in part.values()]
    on_device = [x.double().to(norm.device) for x in scalars if torch.is_tensor(x)]
    waited = iter(torch.stack(on_device).tolist())
    norm, *numbers = [next(waited) if torch.is_tensor(x) else float(x) for x in scalars]

    weighted, numbers = [], iter(numbers)
    for rows, part in zip(window, values):
        weighted += [next(numbers) * len(rows) for _ in part] + [len(rows)]
    sums = iter(processes.sum_over_processes(weighted))
    totals = []
    for part in values:
        totals.append({name: next(sums) for name in part} | {"rows": next(sums)})
    return totals, norm


def train_epoch(run, split, epoch, stop):
    """One pass over the training split; returns the epoch's row of the log.

    Order, dropout and augmentation are functions of (seed, epoch, process), so an interrupted epoch
    is simply run again, bit for bit.
    """
    args = run.args
    torch.manual_seed(seed_of(args.seed, epoch, 0, rank()))  # dropout
    generator = torch.Generator().manual_seed(seed_of(args.seed, epoch, 1, rank()))
    batches = plan_batches(split, epoch, args, rank(), world_size())
    models.train_mode(run.model)  # model.train(), but frozen parts stay in eval mode
    before = [parameter.detach().clone() for parameter in run.parameters]
    sums, norms, skipped, start = {}, [], 0, time.perf_counter()
    row = {"epoch": epoch, "lr": run.schedule.get_last_lr()[0]}
    for first in range(0, len(batches), args.accumulate):
        stop.check()  # SIGINT and SIGTERM end a run between two steps
        row["lr_end"] = run.schedule.get_last_lr()[0]
        look = debug.looker(run, epoch, first // args.accumulate)
        try:
            totals, norm = train_step(run, split, batches[first : first + args.accumulate],
                                      generator, look)
        except NonFinite as error:
            raise NonFinite(f"{error} in epoch {epoch}, step {run.step}, at lr {row['lr_end']:.3g} "
                            "(gradient norm of the step before: "
                            f"{norms[-1] if norms else math.nan:.3g})") from error
        for total in totals:
            for name, value in total.items():
                sums[name] = sums.get(name, 0.0) + value
        if math.isnan(norm):
            skipped += 1
        else:
            norms.append(norm)
        report.print_progress(epoch, first / len(batches), sums["train_loss"] / sums["rows"])
    averaged = [] if run.ema is None else [run.ema.module]
    processes.share_buffers(run.raw_model, *averaged)

    seconds, seen = time.perf_counter() - start, sums.pop("rows")
    means = {name: value / seen for name, value in sums.items()}
    row |= {"step": run.step, "train_loss": means.pop("train_loss"), "parts": means,
            "grad_norm": float(np.mean(norms)) if norms else math.nan, "skipped_steps": skipped,
            "seconds": round(seconds, 3), "rows_per_s": round(seen / seconds, 1)}
    return row | diagnosis.weight_facts(run, before)


# --------------------------------------------------------------------------------------------------
# Evaluation


def evaluate(model, split, run):
    """The task's scores of a whole split, computed once, from the outputs for all of its rows."""
    with processes.raised_everywhere(), torch.inference_mode():
        return scored(outputs_of(model, split, run), split, run)


def scored(outputs, split, run):
    scores = run.task.scores(outputs, split, run.args, run.facts)
    if not math.isfinite(scores["loss"]):
        raise NonFinite(f"the loss over {len(split)} rows is {scores['loss']}")
    return scores


def outputs_of(model, split, run):
    """{name: tensor}, one row per row of the split, on the CPU, in all processes.

    Each process computes its share of the batches, so that a score depends neither on the batch
    size nor on the number of processes. No autocast, whatever --amp says.
    """
    outputs = joined_outputs(model, split, run)
    if run.task.reference:
        outputs["reference"] = joined_outputs(model, split.reference, run)
    return outputs


def joined_outputs(model, split, run):
    """outputs_of without the reference.

    One tensor is allocated for all rows: many small ones, allocated between the activations of a
    network, would cut the free memory into pieces and memory would grow.
    """
    model.eval()
    joined, rows = {}, 0
    for start in range(rank() * split.chunk, len(split), world_size() * split.chunk):
        batch = split.batch(np.arange(start, min(start + split.chunk, len(split))))
        for name, values in run.task.outputs(model, batch, run.args, run.facts).items():
            if rows == 0:
                joined[name] = torch.empty(len(split), *values.shape[1:], dtype=values.dtype)
            joined[name][rows : rows + len(values)] = values.cpu()
        rows += len(values)
    if world_size() > 1:
        joined = processes.gather_rows(joined, rows, split.chunk)
    return {name: finite(values) for name, values in joined.items()}


def scored_floors(floors, task, split, args, facts):
    """{name: scores} of the task's floors; the strong one, which is outputs, is scored here."""
    scores = dict(floors)
    for name, value in floors.items():
        if name.startswith("strong"):
            scores[name] = task.scores(value, split, args, facts)
    return scores


def score_epoch(run, row, splits):
    """The row with validation scores of raw and averaged weights, and which of the two count.

    The better of the two; with --monitor last the averaged ones.
    """
    last = run.args.monitor == "last"
    if splits.validation is None:
        weights = "ema" if last and run.ema is not None else "raw"
        return row | {"score": row.get("train_loss"), "weights": weights}
    monitor = run.task.watched(run.args)
    with diagnosis.SpreadOfOutputs(run.raw_model) as spread:
        row["raw"] = evaluate(run.raw_model, splits.validation, run)
    row["spread"] = spread.value()
    row |= {"score": row["raw"][monitor], "weights": "raw"}
    if run.ema is not None:
        row["ema"] = evaluate(run.ema.module, splits.validation, run)
        raw_is_better = report.gain(monitor, row["score"], row["ema"][monitor]) > 0
        if last or not raw_is_better:  # a tie, or NaN: the average
            row |= {"score": row["ema"][monitor], "weights": "ema"}
    if splits.train_eval is not None:
        row["train_eval"] = evaluate(weights_of(run, row), splits.train_eval, run)
    return row


def weights_of(run, row):
    """The network whose validation score counted in that epoch."""
    return run.ema.module if row["weights"] == "ema" else run.raw_model


# --------------------------------------------------------------------------------------------------
# The run, epoch by epoch


def fit(run, splits, folder, stop):
    """Train to the last epoch. After each one: score, best.pt, last.pt, log and curves, a line."""
    args, monitor = run.args, run.args.monitor
    if run.history:
        write_history(run, folder)  # a kill after last.pt left them an epoch behind
    else:
        row = {"epoch": 0, "step": 0, "lr": run.schedule.get_last_lr()[0]}  # the untrained network
        run.history.append(processes.gather_objects(score_epoch(run, row, splits))[0])
        finish_epoch(run, folder)
    while run.history[-1]["epoch"] < args.epochs:
        best = report.best_row(run.history, monitor, args.min_delta)
        if args.patience and best and run.history[-1]["epoch"] - best["epoch"] >= args.patience:
            print(f"stopped early: no new best {monitor} for {args.patience} epochs")
            break
        row = train_epoch(run, splits.train, run.history[-1]["epoch"] + 1, stop)
        try:
            # rank 0 decides for all: best epoch, plateau, early stopping
            row = processes.gather_objects(score_epoch(run, row, splits))[0]
        except NonFinite as error:
            raise NonFinite(f"{error}, after epoch {row['epoch']}, step {run.step}, at lr "
                            f"{row['lr_end']:.3g}, mean gradient norm {row['grad_norm']:.3g}"
                            ) from error
        if args.schedule == "plateau":
            before = run.schedule.get_last_lr()[0]
            watched = row["train_loss"]
            if splits.validation is not None:
                watched = row["raw"][watched_by_plateau(args)]
            run.schedule.step(watched)
            row["plateau_lr"] = [before, run.schedule.get_last_lr()[0]]
        run.history.append(row)
        if report.best_row(run.history, monitor) is row:
            content = {"model": weights_of(run, row).state_dict(), "epoch": row["epoch"],
                       "weights": row["weights"], "score": row["score"]}
            checkpoint.save(folder / "best.pt", content, args, run.facts, run.task.flags)
        finish_epoch(run, folder)


def write_history(run, folder):
    """Write log, curves and findings, all of them known from last.pt; returns the findings."""
    findings = diagnosis.diagnose(run.counts, run.history)
    report.write_log(folder / "log.jsonl", run.history)
    with checkpoint.atomic_write(folder / "curves.svg") as file:
        file.write(page.curves_svg(run))
    phases = report.phases(run.history, run.args.monitor)
    report.write_json(folder / "diagnosis.json",
                      {"findings": findings, "phases": phases, "counts": run.counts})
    return findings


def finish_epoch(run, folder):
    """Write last.pt, log and curves, print the epoch's line.

    A kill before last.pt replays the epoch, one after it does not.
    """
    checkpoint.save_run(folder / "last.pt", run)
    findings = write_history(run, folder)
    report.print_epoch(run)
    before, after = run.history[-1].get("plateau_lr", (0, 0))
    if after != before:
        print(f"plateau: lr {before:.3g} -> {after:.3g} after epoch {run.history[-1]['epoch']}")
    report.print_findings([finding for finding in findings if finding["name"] not in run.printed])
    run.printed |= {finding["name"] for finding in findings}


# --------------------------------------------------------------------------------------------------
# What a run is built from


def watched_by_plateau(args):
    """The score that the plateau schedule watches."""
    return task_of(args).watched(args) if args.plateau_watches == "monitor" else "loss"


def cosine(optimizer, args, steps):
    return schedulers.WarmupCosine(optimizer, steps(args.cosine_epochs or args.epochs),
                                   min_lr=args.min_lr, **warmup(optimizer, args, steps))


def restarts(optimizer, args, steps):
    return schedulers.WarmRestarts(optimizer, max(1, steps(args.restart_epochs)),
                                   cycle_mult=args.restart_mult, min_lr=args.min_lr,
                                   **warmup(optimizer, args, steps))


def cyclic(optimizer, args, steps):
    return schedulers.Cyclic(optimizer, base_lr=args.cyclic_base_lr, max_lr=peak_of(optimizer),
                             steps_up=args.cyclic_steps_up)


def plateau(optimizer, args, steps):
    mode = "min" if watched_by_plateau(args) in LOWER_IS_BETTER else "max"
    return schedulers.Plateau(optimizer, mode=mode, factor=args.plateau_factor,
                              patience=args.plateau_patience, min_lr=args.min_lr,
                              metric_within=max(1000, steps(2)),
                              **warmup(optimizer, args, steps))


def constant(optimizer, args, steps):
    return schedulers.Constant(optimizer, **warmup(optimizer, args, steps))


def warmup(optimizer, args, steps):
    start = min(args.warmup_start_lr, peak_of(optimizer))  # without a warm-up it is not read
    return {"warmup_steps": steps(args.warmup_epochs), "warmup_start_lr": start}


def peak_of(optimizer):
    return max(group["lr"] for group in optimizer.param_groups)


SCHEDULES = {"cosine": cosine, "restarts": restarts, "cyclic": cyclic, "plateau": plateau,
             "none": constant}


def make_schedule(optimizer, args, flags, steps_per_epoch):
    """The schedule of --schedule; epochs become optimizer steps here and nowhere else."""
    limit = "epochs"
    if args.schedule == "cosine" and 0 < args.cosine_epochs < args.epochs:
        limit = "cosine_epochs"
    if args.schedule != "cyclic" and args.warmup_epochs >= getattr(args, limit):
        raise ValueError(f"--warmup-epochs {show(args.warmup_epochs)} must be below "
                         f"{spelled(limit)} {show(getattr(args, limit))}: train longer or warm up "
                         "less")
    peak = peak_of(optimizer)
    for name in ("warmup_start_lr", "min_lr"):
        read = not flags[name].unmet(args) and (name == "min_lr" or args.warmup_epochs > 0)
        if read and getattr(args, name) > peak:
            raise ValueError(f"{spelled(name)} {show(getattr(args, name))} must not be above the "
                             f"peak rate, {show(peak)}: lower it")
    return SCHEDULES[args.schedule](optimizer, args, lambda epochs: round(epochs * steps_per_epoch))


def build(args, facts, steps_per_epoch, encoder=None):
    """Everything a run changes, from the settings, the seed and a pretrained encoder alone."""
    task = task_of(args)
    run = types.SimpleNamespace(args=args, facts=facts, task=task, step=0, history=[], floors={},
                                counts={}, printed=set(), steps_per_epoch=steps_per_epoch)
    torch.manual_seed(seed_of(args.seed))
    run.raw_model = task.network(args, facts).to(args.device)
    groups = pretrained.set_up_backbone(run.raw_model, args, encoder)
    if args.channels_last:
        run.raw_model.to(memory_format=torch.channels_last)
    run.model = torch.compile(run.raw_model) if args.compile else run.raw_model
    run.parameters = [p for p in run.raw_model.parameters() if p.requires_grad]
    run.loss = processes.LossOfBatch(run.model, task.loss)
    lr = args.lr
    if args.base_batch:
        lr *= args.batch_size * args.accumulate / args.base_batch
    run.optimizer = torch.optim.AdamW(
        [{"params": parameters, "lr": lr * share} for parameters, share in groups], lr=lr,
        betas=(0.9, args.beta2), weight_decay=args.weight_decay, fused=True)
    run.schedule = make_schedule(run.optimizer, args, task.flags, steps_per_epoch)
    run.scaler = torch.amp.GradScaler(torch.device(args.device).type, enabled=args.amp == "fp16")
    run.ema = ema.EMA(run.raw_model, args.ema_decay) if args.ema_decay else None
    return run


# --------------------------------------------------------------------------------------------------
# Command line: two passes, so that --task and --variant pick the defaults that --help shows


def parse_args(argv):
    """Command line -> settings: the task's defaults, then the variant's, then what was typed."""
    words = []
    for word in argv:
        flag, sign, value = word.partition("=")
        words.append((flag.replace("_", "-") if flag.startswith("--") else flag) + sign + value)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--task")
    first.add_argument("--variant", default="default")
    chosen = first.parse_known_args(words)[0]

    parser = argparse.ArgumentParser(prog="train.py", usage="train.py --task TASK [--variant "
                                     "VARIANT] [flags]", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--task", choices=sorted(TASKS), required=True, help="which recipe")
    flags, recipe = {}, {}
    if chosen.task in TASKS:
        flags, variants = TASKS[chosen.task].flags, TASKS[chosen.task].variants
        parser.add_argument("--variant", choices=["default", *variants], default=argparse.SUPPRESS,
                            help="named overrides of the defaults")
        recipe = {name: flag.default for name, flag in flags.items()}
        recipe |= variants.get(chosen.variant, {})
        group = parser.add_argument_group(f"recipe of {chosen.task}, variant {chosen.variant}")
        for name, flag in flags.items():
            add_flag(group, name, flag.default, flag.help, flag.choices, shown=recipe[name])
    group = parser.add_argument_group("the run")
    for name, (default, text) in RUN_FLAGS.items():
        add_flag(group, name, default, text)

    typed = vars(parser.parse_args(words))
    run_defaults = {name: default for name, (default, _) in RUN_FLAGS.items()}
    settings = NOT_OF_THE_TASK | run_defaults | recipe | {"variant": chosen.variant} | typed
    args = Settings(**settings, typed=set(typed) - {"task"}, home="")  # home: the --out to resume
    args = check_flags(args, flags)
    check_call(args, TASKS[args.task], RUN_FILES)
    return args


# --------------------------------------------------------------------------------------------------
# Before training: everything that the user can cause to fail


def prepare(args):
    """Do everything that can fail because of the user before the folder of the run is touched.

    Returns run, splits, folder; the folder is None for a call that does not train.
    """
    folder = content = None
    if args.look:
        checkpoint.writable_folder(args.out)
    elif not chosen_of(args, CHECKS):
        folder = checkpoint.open_run_folder(args)
        if args.resume:
            content = checkpoint.load(folder / "last.pt", args.task, TASKS[args.task].flags,
                                      needs=("model", "history", "step", "processes"))
            args = checkpoint.adopt_recipe(args, content)
    args = settled_args(args)
    checks.warn_slow_amp(args)
    splits = load_splits(args)
    differ = differing(content["facts"], splits.facts) if content else []
    if differ:
        raise ValueError(f"the data or their split are not those of the run in {folder}: they "
                         f"differ in {', '.join(differ)}; restore them, or start a new run in "
                         "another --out")
    if splits.validation is None and args.monitor != "last":
        args = args.replace(monitor="loss")
        print("no validation split: the training loss picks the epoch, and the raw weights are "
              "kept")
    run = prepare_run(args, splits, content)
    if content:
        restore(run, content, folder)
    if not chosen_of(args, CHECKS):
        run.counts = diagnosis.count_before(run, splits)  # of inputs, not of cached features
    if args.mode == "probe" or args.freeze:
        pretrained.cache_features(run.raw_model, splits.named().values())
    report.print_summary(run, splits)
    return run, splits, folder


def settled_args(args):
    """The settings with the device that this process takes; prints the command that they are."""
    flags = task_of(args).flags
    if args.batch_size % world_size():
        fits = math.ceil(args.batch_size / world_size()) * world_size()
        raise ValueError(f"--batch-size {args.batch_size} counts the rows of all {world_size()} "
                         f"processes, which take equal shares of it: give --batch-size {fits}")
    args = args.replace(device=resolve_device(args.device))
    names = [*flags, "data", "cache", "out", "device"]
    check = chosen_of(args, CHECKS)
    print(command_line(args, flags, names + [check] if check else names), flush=True)
    return args


def differing(before, now):
    """Names of the facts that have changed; what was fitted differs in its last digits anyway."""
    fitted = ("strong", "whitening")
    return [key for key, value in now.items() if key not in fitted and before.get(key) != value]


def load_splits(args):
    """The task's splits, with their notes printed; rank 0 fills a cache, the others read it."""
    for turn in ("rank 0", "the others"):
        with processes.raised_everywhere():
            if turn == ("the others" if rank() else "rank 0"):
                splits = task_of(args).load(args.data, args)
    print("\n".join(splits.notes))
    return splits


def prepare_run(args, splits, content):
    """The run with its floors, after what can only be checked with a network."""
    task = task_of(args)
    floors = {}
    if splits.validation is not None:
        floors = task.floors(splits.validation, args, splits.facts)
        floors = scored_floors(floors, task, splits.validation, args, splits.facts)
    constant = report.best_constant(floors)
    monitor = task.watched(args)
    if floors and monitor not in constant:
        raise ValueError(f"--monitor {monitor}: the floors of task {args.task} need a "
                         "constant that has this score, under a name that begins with `constant`")
    if math.isnan(constant.get(monitor, 0.0)):
        raise ValueError(f"--monitor {monitor} is not defined on the {len(splits.validation)} "
                         "validation rows (labels of one value or one class): choose another, or "
                         "other rows with --seed or the ratios")
    batches = plan_batches(splits.train, 1, args, rank(), world_size())
    encoder = None  # a resumed run has its own weights
    if not content:
        encoder = pretrained.read_encoder(args, splits.facts, task.flags)
    run = build(args, splits.facts, math.ceil(len(batches) / args.accumulate), encoder)
    run.floors = floors
    checks.check_one_row_batch(run, splits.train, batches)
    if args.compile and not chosen_of(args, CHECKS):
        checks.check_compile(args.device)
    return run


def restore(run, content, folder):
    """Go on where last.pt ended."""
    checkpoint.load_run(run, content, folder / "last.pt")
    if content["processes"] != world_size():
        print(f"number of processes: {content['processes']} so far, {world_size()} from here on; "
              f"the run goes on, but not bit for bit as it would have over {content['processes']}")
    best = folder / "best.pt"
    if report.best_row(run.history, run.args.monitor) and not best.is_file():
        raise ValueError(f"{best} is missing, the best epoch is lost: start again with --overwrite")
    if best.is_file():  # it is read in the end
        checkpoint.load(best, run.args.task, run.task.flags,
                        needs=("model", "epoch", "weights", "score"))


# --------------------------------------------------------------------------------------------------
# The kinds of call


def train(run, splits, folder):
    """Train to the end and report; returns the exit code."""
    start, again = time.perf_counter(), resume_command(run.args)
    if run.floors:
        print(f"baselines on the {len(splits.validation):,} validation rows:")
        print(report.score_table(run.floors), flush=True)
    try:
        with processes.StopSignal() as stop, processes.loss_of_a_process():
            run.loss = processes.share_gradients(run.loss)
            if run.args.debug:
                debug.keep_output(run, splits.train)
            fit(run, splits, folder, stop)
            report_best(run, splits, folder, time.perf_counter() - start)
            if run.args.debug:
                debug.print_verdicts(run, splits)
            if run.args.out != run.args.home:
                stop.check()  # asked to end while it was scored: the next fold must not begin
    except ProcessLost as error:
        raise ProcessLost(
            f"{error}; {report.saved(run, folder)}; go on with\n    {again}") from error
    except Interrupted as error:
        print(f"\n{error}: epoch {run.history[-1]['epoch']} of {run.args.epochs} is saved in "
              f"{folder / 'last.pt'}; go on with\n    {again}")
        return 128 + error.number
    except NonFinite as error:
        run.counts["stopped"] = str(error)
        if run.history:
            report.print_findings(write_history(run, folder))
        if not rank():
            print(f"train.py: stopped: {error}; {report.saved(run, folder)}: start again with a "
                  "lower --lr, a longer --warmup-epochs or --clip 1", file=sys.stderr)
        return 1
    return 0


def report_best(run, splits, folder, seconds):
    """Score the best epoch's weights: on validation, which picked them, and once on test."""
    processes.gather_objects(None)  # rank 0 has written them
    args, monitor = run.args, run.task.watched(run.args)
    best = checkpoint.load(folder / "best.pt", args.task, run.task.flags)
    model = run.task.network(args, run.facts).to(args.device)
    checkpoint.load_weights(model, best, folder / "best.pt")
    kept, picked = ("last", "") if args.monitor == "last" else ("best", ", which picked the epoch")
    print(f"\n{kept} epoch {best['epoch']} ({best['weights']} weights), {seconds / 60:.1f} minutes")
    scores = {"epoch": best["epoch"], "weights": best["weights"]}
    last = report.last_epochs(run.history, best["weights"], monitor)
    if last:  # a best far above them is luck
        scores["last"] = last
        print(f"validation {monitor}: {kept} {best['score']:.4f}, last {last['epochs']} epochs "
              f"{last['mean']:.4f} +- {last['sd']:.4f}")
    report.print_phases(run.history, args.monitor, monitor)
    titles = {"validation": "validation" + picked, "test": "test, used for nothing but this"}
    held_out = {name: split for name, split in splits.named().items() if name in titles}
    for name, split in held_out.items():  # the last is the test split, if there is one
        scores[name], outputs, floors = print_scores(titles[name], model, split, run)
    if held_out:
        run.counts["simple"] = diagnosis.beside_simple_model(run, split, name, outputs, floors)
        scores["beside"] = run.counts["simple"]
        report.print_beside(scores["beside"])
        badness, columns = run.task.examples(outputs, split, args, run.facts)
        page.write_examples(folder, split, badness, columns)
    report.write_json(folder / "scores.json", scores)
    run.counts["done"] = True
    findings = write_history(run, folder)
    print()
    report.print_findings(findings or [{"name": "no finding"}])
    written = [name for name in RUN_FILES if (folder / name).exists()]
    print(f"\nsaved in {folder}: {', '.join(written)}")


def print_scores(title, model, split, run):
    """Score a split and print it between the baselines and the ceiling on the same rows.

    Returns all scores, and the outputs of the network and the floors that they are of.
    """
    with processes.raised_everywhere(), torch.inference_mode():
        outputs = outputs_of(model, split, run)
        scores = scored(outputs, split, run)
    floors = run.task.floors(split, run.args, run.facts)
    floor_scores = scored_floors(floors, run.task, split, run.args, run.facts)
    report.print_scores(title, len(split), scores, floor_scores)
    return {"rows": len(split), "model": scores} | floor_scores, outputs, floors


def apply_checkpoint(args):
    """--eval, --predict, --export: rebuild the network from the checkpoint's recipe, and use it."""
    path, flags = args.eval or args.predict or args.export, TASKS[args.task].flags
    content = checkpoint.load(path, args.task, flags)
    late = args.typed & SCORING_FLAGS
    args = checkpoint.adopt_recipe(args, content, late)
    split = args.split or ("all" if args.eval and "data" in args.typed else "")
    args = args.replace(device="cpu" if args.export else resolve_device(args.device), split=split)
    names = ["eval", "predict", "data", "cache", "split", "out", "device"]
    if args.export:
        names = ["export", "out"]
    print(command_line(args, flags, [*names, *sorted(late)]), flush=True)
    run = types.SimpleNamespace(args=args, facts=content["facts"], task=task_of(args))
    model = run.task.network(args, run.facts).to(args.device)
    checkpoint.load_weights(model, content, path)
    if args.export:
        export.write_export(model, run.task, args, run.facts)
    elif args.predict:
        predict(model, run)
    else:
        score_checkpoint(model, run)


def predict(model, run):
    """Apply a network to all rows of --data; labels are not needed."""
    args, task = run.args, run.task
    rows = task.rows(args.data, args, run.facts, need_labels=False)
    for note in rows.notes:
        print(note)
    split = rows.split
    model.eval()

    def batches():
        for start in range(0, len(split), split.chunk):
            batch = split.batch(np.arange(start, min(start + split.chunk, len(split))))
            outputs = task.outputs(model, batch, args, run.facts)
            yield batch, {name: finite(values.cpu()) for name, values in outputs.items()}

    with torch.inference_mode():
        count = task.predictions(batches(), split, args.out, args, run.facts)
    print(f"{count:,} predictions in {args.out}")


def score_checkpoint(model, run):
    """Score a network on a split of the run's own data, or on all rows of other data."""
    args = run.args
    if args.split == "all":
        rows = run.task.rows(args.data, args, run.facts, need_labels=True)
        print("\n".join(rows.notes))
        if rows.checksum == run.facts["data"]:
            print("these are the run's own data, training rows included")
        else:
            print("the run did not see these data")
        print_scores("all rows", model, rows.split, run)
        return
    loaded = run.task.load(args.data, args)
    print("\n".join(loaded.notes))
    splits = loaded.named()
    name = args.split or list(splits)[-1]  # test, or validation, or training rows
    if differing(run.facts, loaded.facts):
        raise ValueError(f"--split {name}: these are not the data that the run split; --split all "
                         "scores every row")
    if name not in splits:
        raise ValueError(f"--split {name}: the run has {', '.join(splits)}; --split all scores "
                         "every row")
    print_scores(name, model, splits[name], run)


def check_series(runs):
    """Prepare every run of a series: what the user can cause to fail, fails before the first."""
    for settings in runs:
        if series.is_series(settings):
            check_series(series.series_settings(settings, TASKS[settings.task].flags))
            continue
        out = Path(settings.out)
        print(f"checking {out.name} in {out.parent}", flush=True)
        with contextlib.redirect_stdout(io.StringIO()):
            prepare(settings)


def train_series(args, check=True):
    """The runs of a series, then mean and standard deviation of their scores."""
    folder = Path(args.out)
    with refusals():
        series.refuse_other_series(args, folder)
        runs = series.series_settings(args, TASKS[args.task].flags)
        if check:
            check_series(runs)
        if args.overwrite:
            series.clear(folder)
        for settings in runs:
            Path(settings.out).mkdir(parents=True, exist_ok=True)  # they tell --resume the seeds
    for i, settings in enumerate(runs):
        kind, number = Path(settings.out).name.split("-")
        print(f"\n{kind} {number} of {args.seeds or len(runs)}")
        try:
            several = series.is_series(settings)
            code = train_series(settings, check=False) if several else train_once(settings)
        except (Refused, KeyboardInterrupt):
            if i and checkpoint.runs_in(Path(runs[0].out)):
                print(f"the runs before {kind} {number} are finished; go on with\n    "
                      f"{resume_command(args)}", flush=True)
            raise
        if code:
            return code
    series.write_series_scores(folder, [Path(settings.out) for settings in runs])
    return 0


def train_once(args):
    """One run, or one of the checks, from its settings to its exit code."""
    with contextlib.ExitStack() as stack:
        with refusals():
            run, splits, folder = prepare(args)
            check = chosen_of(args, CHECKS)
            if check:
                looks.LOOKS[check](run, splits)
                return 0
            folder.mkdir(parents=True, exist_ok=True)
            if not rank():
                stack.enter_context(checkpoint.lock_folder(folder))
                checkpoint.open_run_folder(args)  # another run may have begun here meanwhile
                if args.overwrite:
                    for name in RUN_FILES:
                        (folder / name).unlink(missing_ok=True)
        return train(run, splits, folder)


def run_command(argv):
    """The call that a command line asks for; returns the exit code."""
    with refusals():
        args = parse_args(argv)
        if chosen_of(args, USES):
            apply_checkpoint(args)
            return 0
    check = chosen_of(args, CHECKS)
    if check:
        args = args.replace(fold=args.fold or min(args.folds, 1))
    out = args.out or f"runs/{args.task}" + (f"/fold-{args.fold}" if args.fold else "")
    if check:
        return train_once(args.replace(out=out if args.look else ""))
    args = args.replace(out=out, home=out)
    with refusals():  # a folder that may not be looked into
        folder = Path(out)
        begun = args.resume and not (folder / "last.pt").is_file() and checkpoint.runs_in(folder)
        if begun and not args.seeds:
            args = args.replace(seeds=checkpoint.seeds_in(folder))
    several = series.is_series(args) or begun and not args.folds
    if several and world_size() > 1:
        raise Refused(f"--folds and --seeds run in one process, not in {world_size()}: train one "
                      "at a time with --fold and --seed, or start it with python in place of "
                      "torchrun")
    return train_series(args) if several else train_once(args)


def show_warning(message, *_):
    if not rank():
        print(f"warning: {message}", file=sys.stderr)


def main(argv=None):
    """Exit code 0: done; 1: training broke off; 2: refused before training; 128 + n: signal n."""
    processes.tune_allocator()
    with processes.process_group():
        warnings.showwarning = show_warning
        warnings.simplefilter("once", UserWarning)
        try:
            with processes.loss_of_a_process():
                return run_command(sys.argv[1:] if argv is None else argv)
        except Refused as error:
            if not rank():
                print(f"train.py: error: {error}", file=sys.stderr)
            return 2
        except ProcessLost as error:
            print(f"train.py: stopped: {error}", file=sys.stderr, flush=True)
            processes.leave(1)
        except KeyboardInterrupt:
            print("train.py: interrupted before training", file=sys.stderr)
            return 128 + signal.SIGINT


if __name__ == "__main__":
    processes.leave(main())
