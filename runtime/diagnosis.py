"""Faults that a run finds in itself.

A rule reads the counts taken before training and the rows of the log (history[0] is the untrained
network). It returns its evidence in numbers, or None.
"""

import hashlib
import math

import numpy as np
import torch

import data
import losses
from runtime.report import best_constant, gain, highest_rate, plain, strong_floor
from tasks.common import LOWER_IS_BETTER, count_or_names, plan_batches

# --------------------------------------------------------------------------------------------------
# Measured while the run goes on


def weight_facts(run, before):
    """After an epoch: the change of the trained weights, and parts that cannot learn.

    The change is relative to their length. before: copies of the trained weights
    """
    parameters = run.parameters
    names = [name for name, p in run.raw_model.named_parameters() if p.requires_grad]
    moments = [run.optimizer.state.get(p, {}).get("exp_avg_sq") for p in parameters]  # Adam's
    silent = [name for name, moment in zip(names, moments) if moment is None or not moment.any()]
    moved = length(p - b for p, b in zip(parameters, before)) / max(length(before), 1e-12)
    return {"weight_change": moved, "no_gradient": silent,
            "frozen_in_training": frozen_in_training(run.raw_model)}


def length(tensors):
    """Euclidean length of several tensors as one vector."""
    return math.hypot(*(float(tensor.detach().double().norm()) for tensor in tensors))


def frozen_in_training(model):
    names = []
    for name, module in model.named_modules():
        parameters = list(module.parameters())
        if module.training and parameters and not any(p.requires_grad for p in parameters):
            names.append(name)
    return names


class SpreadOfOutputs:
    """How much the outputs of a model differ between the rows that pass it.

    Standard deviation over the rows, mean over the outputs, relative to the root mean square of
    outputs larger than 1. None for outputs that are no tensor, and where nothing passed.
    """

    def __init__(self, model):
        self.model, self.rows, self.sums, self.squares = model, 0, 0.0, 0.0

    def __enter__(self):
        self.hook = self.model.register_forward_hook(self.look)
        return self

    def __exit__(self, *_):
        self.hook.remove()

    def look(self, module, inputs, output):
        if torch.is_tensor(output) and output.ndim:
            x = output.reshape(len(output), -1)
            self.rows += len(x)
            self.sums = self.sums + x.sum(0, dtype=torch.float64)
            squares = torch.linalg.vector_norm(x, dim=0, dtype=torch.float64).square()
            self.squares = self.squares + squares

    def value(self):
        if not self.rows:
            return None
        square, mean = self.squares / self.rows, self.sums / self.rows
        deviation = (square - mean.square()).clamp(min=0).sqrt().mean()
        return float(deviation / square.mean().sqrt().clamp(min=1.0))


# --------------------------------------------------------------------------------------------------
# Counted before training


def fingerprints(split, most=5_000):
    """A checksum of the inputs of each row, not augmented. Blank rows are left out.

    Of evenly spaced rows if there are more than `most`.
    """
    digests = []
    rows = np.linspace(0, len(split) - 1, min(len(split), most)).astype(int)
    for row in np.unique(rows):
        tensors = []
        for name, value in split.batch(np.array([row])).items():
            if name in ("inputs", "present"):
                values = value.values() if isinstance(value, dict) else [value]
                tensors += [tensor.cpu() for tensor in values]
        if any((tensor != tensor.flatten()[0]).any() for tensor in tensors):
            content = b"".join(tensor.numpy().tobytes() for tensor in tensors)
            digests.append(hashlib.blake2b(content, digest_size=8).digest())
    return digests


def shared_between(train, others):
    """Groups, and rows with the same inputs, that are in the training split and in another one."""
    groups = []
    for split in (train, *others):
        known = getattr(split, "groups", None)
        groups.append(set() if known is None else set(np.unique(known).tolist()))
    seen = set(fingerprints(train))
    held_out = [digest for split in others for digest in fingerprints(split)]
    return {"groups": len(groups[0] & set().union(*groups[1:])),
            "rows": sum(digest in seen for digest in held_out), "looked_at": len(held_out)}


def label_steps(labels):
    """Step between label values (0 if they are on no grid), and mean distance to the median."""
    values = np.unique(np.round(labels, 6))
    step = float(np.diff(values).min()) if len(values) > 1 else 0.0
    places = (values - values[0]) / step if step else values * 0
    on_grid = np.allclose(places, places.round(), atol=1e-3)
    return {"values": len(values), "step": step if on_grid else 0.0,
            "spread": float(np.abs(labels - np.median(labels)).mean())}


def count_before(run, splits):
    """The numbers that the rules read beside the log, taken before training."""
    args, floor = run.args, best_constant(run.floors)
    labels = getattr(splits.train, "labels", None)
    others = [split for name, split in splits.named().items() if name != "train"]
    headline = run.task.flags["monitor"].choices[0]
    monitor = run.task.watched(args)
    if headline not in floor:
        headline = monitor
    counts = {"epochs": args.epochs, "monitor": monitor, "headline": headline,
              "keeps_last": args.monitor == "last", "anchored": args.anchor != "none",
              "schedule": args.schedule, "planned_epochs": args.cosine_epochs or args.epochs,
              "warmup_epochs": args.warmup_epochs, "ema_decay": args.ema_decay, "floor": floor,
              "ceiling": plain(run.floors.get("ceiling", {})),
              "shared": shared_between(splits.train, others)}
    if labels is None or args.mode == "pretrain":  # which reads no labels
        return counts
    if labels.dtype.kind not in "iu":
        return counts | {"labels": label_steps(labels)}
    batches = plan_batches(splits.train, 1, args)
    report = data.sampler_report(batches, labels)
    shares = np.array(list(report["class_counts"].values())) / report["rows"]
    sampler = {key: report[key] for key in ("batches", "single_class", "largest_share")}
    sampler["by_chance"] = sum(float((shares ** len(rows)).sum()) for rows in batches)
    return counts | {"sampler": sampler}


# --------------------------------------------------------------------------------------------------
# Measured at the end

FEW_GROUPS = 8  # below that many an interval by groups means little


def beside_simple_model(run, split, part, outputs, floors):
    """The scores of the network and of the strong floor on the same rows, and their difference.

    floors: the task's, with the outputs of the strong one. None where there is none. A positive
    difference says that the network is better; its interval is drawn by group.
    """
    task, args, key = run.task, run.args, run.task.flags["monitor"].choices[0]
    name, simple = strong_floor(floors)
    if not simple or task.headline is None:
        return None
    network, model = (task.headline(x, split, args, run.facts) for x in (outputs, simple))
    groups, rows = getattr(split, "groups", None), np.ones((1, len(split)))
    groups = np.arange(len(split)) if groups is None else np.asarray(groups)
    names = np.unique(groups)
    sign = -1 if key in LOWER_IS_BETTER else 1
    low, high = sorted(sign * end for end in losses.paired_bootstrap(network, model, groups))
    alone = (names[:, None] == groups).astype(float) if len(names) < FEW_GROUPS else rows
    worse = sign * (network(alone) - model(alone)) < 0
    scores = {"floor": best_constant(floors), "ceiling": plain(floors.get("ceiling", {}))}
    network, model = float(network(rows)[0]), float(model(rows)[0])
    return {"model": name, "score": key, "part": part, "rows": len(split),
            "groups": len(names), "network": network, "simple": model,
            "difference": sign * (network - model), "low": low, "high": high,
            "groups_worse": int(worse.sum()),
            "share": share_gained(scores, key, network) - share_gained(scores, key, model)}


# --------------------------------------------------------------------------------------------------
# Rules


def share_gained(counts, key, score):
    """Where a score is between the best constant, 0, and the ceiling, 1; NaN without a constant."""
    floor = counts["floor"].get(key, math.nan)
    ceiling = counts["ceiling"].get(key, 0.0 if key in LOWER_IS_BETTER else 1.0)
    whole = gain(key, ceiling, floor)
    return gain(key, score, floor) / whole if whole > 0 else math.nan


def settled(counts, history):
    """Whether it is late enough to judge: at the end, or ten epochs after the warm-up."""
    return len(history) > (3 if counts.get("done") else 10 + counts["warmup_epochs"])


def scored_rows(history):
    return [row for row in history[1:] if "raw" in row and not math.isnan(row["score"])]


def best_score(history):
    """The best validation score of every kind over the epochs, by raw or averaged weights."""
    best = {}
    for row in history[1:]:
        for scores in (row.get("raw", {}), row.get("ema", {})):
            for key, value in plain(scores).items():
                if not math.isnan(value) and (key not in best or gain(key, value, best[key]) > 0):
                    best[key] = value
    return best


def frozen_model(counts, history):
    rows = [row for row in history[1:] if row["lr_end"] > 0 and math.isfinite(row["grad_norm"])]
    if rows and all(row["weight_change"] == 0 for row in history[1:]):
        return (f"after {rows[-1]['step']:,} steps every weight is unchanged, with a gradient of "
                f"norm {rows[-1]['grad_norm']:.3g}")


def no_gradient(counts, history):
    names = history[-1].get("no_gradient", [])
    if names and history[-1].get("weight_change"):
        return f"{count_or_names(names)} trainable tensors had no gradient but 0 in any step"


def backbone_in_train_mode(counts, history):
    names = history[-1].get("frozen_in_training")
    if names:
        return (f"{count_or_names(names)} frozen modules were in training mode: dropout on, batch "
                "statistics moving")


def single_class_batches(counts, history):
    """More than a tenth of the batches, and more than twice as many as random rows would give."""
    sampler = counts.get("sampler")
    if sampler is None:
        return None
    single = sampler["single_class"]
    if single > max(0.1 * sampler["batches"], 2 * sampler["by_chance"]):
        return f"{single} of {sampler['batches']} batches of the first epoch hold one class"


def leak_across_split(counts, history):
    shared = counts["shared"]
    if shared["groups"] or shared["rows"]:
        return (f"{shared['groups']:,} groups are on both sides of the split, and "
                f"{shared['rows']:,} of the {shared['looked_at']:,} held-out rows looked at have "
                "the inputs of a training row")


def ema_not_moving(counts, history):
    rows = history[1:]
    if not rows or "ema" not in rows[-1] or same_loss(rows[-1]["raw"], history[0]["raw"]):
        return None
    if all(same_loss(row["ema"], history[0]["ema"]) for row in rows):
        return ("the averaged weights have the validation loss of the untrained network in all "
                f"{len(rows)} epochs, {rows[-1]['ema']['loss']:.4f}; the raw ones "
                f"{rows[-1]['raw']['loss']:.4f}")


def same_loss(scores, others):
    return math.isclose(scores["loss"], others["loss"], rel_tol=1e-6)


def constant_prediction(counts, history):
    """Not of a network that corrects a simple model: a correction near 0 may be right."""
    spread = None if counts.get("anchored") else history[-1].get("spread")
    if settled(counts, history) and spread is not None and spread < 0.01:
        return (f"outputs differ between the validation rows by {spread:.2g} (standard deviation, "
                "mean over the outputs)")


def loss_at_bound(counts, history):
    """For three epochs the loss was a constant's (SupCon: that of equal features), never better."""
    rows = [row for row in history[1:] if "raw" in row]
    bound = counts["floor"].get("loss", 0.0)
    if not settled(counts, history) or len(rows) < 3 or bound <= 0:
        return None
    losses = {"training": [row["train_loss"] for row in rows],
              "validation": [row["raw"]["loss"] for row in rows]}
    for name, values in losses.items():
        near = all(abs(value - bound) <= 0.01 * bound for value in values[-3:])
        if near and min(values) > 0.97 * bound:
            return (f"the {name} loss was {values[-3]:.4f} to {values[-1]:.4f} in the last 3 "
                    f"epochs, that of a constant is {bound:.4f}")


def score_at_floor(counts, history):
    best = best_score(history)
    for key in (counts["headline"], counts["monitor"]):
        share = share_gained(counts, key, best.get(key, math.nan))
        if settled(counts, history) and share < 0.02:
            return (f"best {key} of {len(history) - 1} epochs {best[key]:.4f}, a constant has "
                    f"{counts['floor'][key]:.4f}")


def beaten_by_simple_model(counts, history):
    """The interval of the difference is below 0.

    Of few groups: the network lost more than 0.02 of the way from the constant to the ceiling, and
    in most groups.
    """
    simple = counts.get("simple")
    if simple is None:
        return None
    few = simple["groups"] < FEW_GROUPS
    beaten = simple["high"] < 0
    if few:
        beaten = simple["share"] < -0.02 and 2 * simple["groups_worse"] > simple["groups"]
    if beaten:
        by = (f"only {simple['groups']} groups, the network loses in {simple['groups_worse']}"
              if few else f"by {simple['groups']:,} groups")
        return (f"{simple['score']} {simple['network']:.4f}, {simple['model']} has "
                f"{simple['simple']:.4f} on the same {simple['rows']:,} {simple['part']} rows; "
                f"difference {simple['difference']:+.4f} [{simple['low']:+.4f}, "
                f"{simple['high']:+.4f}], {by}")


def lr_too_large(counts, history):
    """Training broke off on a number that is not finite, or the weights moved far for a poor score.
    """
    if counts.get("stopped"):
        return counts["stopped"]
    change = max((row["weight_change"] for row in history[1:]), default=0.0)
    key = counts["headline"]
    best = best_score(history).get(key, math.nan)
    if len(history) > 2 and change > 3 and share_gained(counts, key, best) < 0.3:
        return (f"in one epoch the weights moved by {change:.1f} times their length, at lr "
                f"{highest_rate(history):.2g}; best {key} {best:.4f}, a constant has "
                f"{counts['floor'][key]:.4f}")


def lr_too_small(counts, history):
    rows = history[1:]
    moved, train = sum(row["weight_change"] for row in rows), [row["train_loss"] for row in rows]
    if settled(counts, history) and 0 < moved < 0.005 and train[-1] > 0.9 * train[0]:
        return (f"in {len(rows)} epochs the weights moved by {moved:.2g} of their length, at lr "
                f"{highest_rate(history):.2g}; training loss {train[0]:.4f} in epoch 1, "
                f"{train[-1]:.4f} in the last")


def schedule_outlasts_run(counts, history):
    epochs = len(history) - 1
    share = history[-1].get("lr_end", 0.0) / max(highest_rate(history), 1e-12)
    ended_early = counts.get("done") and epochs < counts["planned_epochs"]
    if ended_early and counts["schedule"] == "cosine" and share > 0.5:
        return (f"the cosine is planned for {counts['planned_epochs']:g} epochs, the run ended "
                f"after {epochs}: the rate was still {share:.0%} of its peak")


def plateau_too_eager(counts, history):
    peak, cuts = highest_rate(history), 0
    for row in history[1:]:
        before, after = row.get("plateau_lr", (0, 0))
        cuts += after < before
        if after < before and after < 0.01 * peak:
            if row["epoch"] <= 0.5 * counts["epochs"]:
                return (f"{cuts} cuts took the rate from {peak:.2g} to {after:.2g} by epoch "
                        f"{row['epoch']} of {counts['epochs']}")
            return None


def ema_horizon_too_long(counts, history):
    """The loss of the averaged weights has gone less than half of the way of the raw ones."""
    row, start = history[-1], history[0]
    if not settled(counts, history) or "ema" not in row or ema_not_moving(counts, history):
        return None
    untrained = start["raw"]["loss"]
    raw = untrained - row["raw"]["loss"]
    averaged = untrained - row["ema"]["loss"]
    if raw > 0.1 * abs(untrained) and averaged < 0.5 * raw:
        return (f"validation loss {untrained:.4f} untrained, {row['raw']['loss']:.4f} raw, "
                f"{row['ema']['loss']:.4f} averaged over 1 / (1 - decay) = "
                f"{1 / (1 - counts['ema_decay']):,.0f} steps, of which the run made "
                f"{row['step']:,}")


def label_quantised(counts, history):
    """Rounding to steps of s costs a perfect predictor a mean absolute error of s / 4."""
    labels = counts.get("labels")
    if labels and labels["step"] / 4 > 0.2 * labels["spread"]:
        return (f"the labels take {labels['values']} values, {labels['step']:.3g} apart: rounding "
                f"alone costs a mean absolute error of {labels['step'] / 4:.3g}, and a constant's "
                f"is {labels['spread']:.3g}")


def imbalance(counts, history):
    sampler = counts.get("sampler")
    if sampler and sampler["largest_share"] > 0.9:
        return f"one class is {sampler['largest_share']:.1%} of the rows drawn in an epoch"


def monitor_mismatch(counts, history):
    """The epoch that --monitor picks is worse in the headline score than the best epoch.

    By a fifth of what the best epoch gained over a constant.
    """
    monitor, key = counts["monitor"], counts["headline"]
    rows = scored_rows(history)
    if monitor == key or len(rows) < 3:
        return None
    best = best_score(history).get(key, math.nan)
    picked = max(rows, key=lambda row: gain(monitor, row["score"], 0.0))
    score = picked[picked["weights"]][key]
    gained = share_gained(counts, key, best)
    if gained - share_gained(counts, key, score) > max(0.05, 0.2 * gained):
        return (f"{monitor} picks epoch {picked['epoch']} with {key} {score:.4f}, the best was "
                f"{best:.4f}")


def overfit(counts, history):
    """The validation loss rose, or it is above the training loss by a constant's loss.

    A rise counts from a quarter of the loss and a tenth of a constant's loss on.
    """
    rows = [row for row in history[1:] if "raw" in row]
    constant = abs(counts["floor"].get("loss", math.nan))
    if len(rows) < 5:
        return None
    validation = [row["raw"]["loss"] for row in rows]
    train = [row["train_loss"] for row in rows]
    low, now = int(np.argmin(validation)), float(np.mean(validation[-3:]))
    rise = now - validation[low]
    large = rise > 0.25 * abs(validation[low]) and not rise < 0.1 * constant
    risen = large and low < len(rows) - 3
    apart = settled(counts, history) and now - float(np.mean(train[-3:])) > constant
    if (risen or apart) and train[-1] < train[low]:
        return (f"since epoch {rows[low]['epoch']} the validation loss went from "
                f"{validation[low]:.4f} to {now:.4f} (last 3 epochs), the training loss from "
                f"{train[low]:.4f} to {train[-1]:.4f}")


def lucky_best(counts, history):
    """The last epochs, at most ten and all after the best one, are far below it.

    By 2 of their sd, and by a fifth of the gain of the best over a constant.
    """
    key, rows = counts["monitor"], scored_rows(history)
    if not counts.get("done") or counts.get("keeps_last") or len(rows) < 6:
        return None
    best = max(rows, key=lambda row: gain(key, row["score"], 0.0))
    after = rows[rows.index(best) + 1 :]
    if len(after) < 3:
        return None
    last = [row[best["weights"]][key] for row in after[-10:]]
    mean, sd = float(np.mean(last)), float(np.std(last, ddof=1))
    gained = share_gained(counts, key, best["score"])
    lost = gained - share_gained(counts, key, mean)
    if gain(key, best["score"], mean) > 2 * sd and lost > max(0.05, 0.2 * gained):
        return (f"{key} {best['score']:.4f} in epoch {best['epoch']}, the last {len(last)} epochs "
                f"{mean:.4f} +- {sd:.4f}")


RULES = {  # worst first: name of the finding -> (rule, remedy)
    "frozen-model": (frozen_model, "the optimizer does not hold the parameters of the network: "
                     "build it from model.parameters()"),
    "leak-across-split": (leak_across_split, "split by group, and drop duplicates: the scores "
                          "count rows that were learnt"),
    "single-class-batches": (single_class_batches, "stratify the batches: one class offers no "
                             "contrast"),
    "lr-too-large": (lr_too_large, "lower --lr by 10, warm up longer, or clip the gradient; "
                     "--find-lr suggests a rate"),
    "lr-too-small": (lr_too_small, "raise --lr; --find-lr suggests a rate"),
    "no-gradient": (no_gradient, "look for a detach, a clamp, a sign, or a branch that forward "
                    "never takes"),
    "backbone-in-train-mode": (backbone_in_train_mode, "put frozen modules into eval mode after "
                               "model.train(), as models.train_mode does"),
    "constant-prediction": (constant_prediction, "look at the inputs' scale, dead activations, and "
                            "the balance of the classes"),
    "loss-at-bound": (loss_at_bound, "what is learnt is a constant: look at the batches, the "
                      "labels and the rate"),
    "score-at-floor": (score_at_floor, "the network knows no more than a constant does: look at "
                       "labels, inputs and rate before tuning"),
    "beaten-by-simple-model": (beaten_by_simple_model, "use the simple model, or give the network "
                               "what it knows: its inputs, its invariances"),
    "ema-not-moving": (ema_not_moving, "update the average after every optimizer step"),
    "ema-horizon-too-long": (ema_horizon_too_long, "lower --ema-decay to 1 - 10 / steps, or let it "
                             "warm up"),
    "label-quantised": (label_quantised, "take labels at a finer resolution, or longer windows"),
    "imbalance": (imbalance, "stratify the batches, or weigh the classes"),
    "schedule-outlasts-run": (schedule_outlasts_run, "plan the schedule for the epochs that are "
                              "run (--cosine-epochs, --patience)"),
    "plateau-too-eager": (plateau_too_eager, "raise --plateau-patience or --plateau-factor"),
    "monitor-mismatch": (monitor_mismatch, "monitor the score that is reported"),
    "overfit": (overfit, "fewer epochs, more augmentation, dropout or weight decay, more data"),
    "lucky-best": (lucky_best, "report the last epochs beside the best, validate on more rows"),
}


def diagnose(counts, history):
    """The findings, worst first: name, evidence, what to do. A healthy run has none."""
    findings = []
    for name, (rule, remedy) in RULES.items():
        evidence = rule(counts, history)
        if evidence:
            findings.append({"name": name, "evidence": evidence, "remedy": remedy})
    return findings
