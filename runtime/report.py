"""Reports of a run: epoch lines, tables, logs, the final report."""

import json
import math
import sys

import numpy as np

import models
from runtime import checkpoint
from runtime.processes import world_size
from tasks.common import LOWER_IS_BETTER


def gain(key, score, than):
    """How much better a score is than another: positive is better, whichever way the score goes."""
    return than - score if key in LOWER_IS_BETTER else score - than


def best_row(history, monitor, min_delta=0.0):
    """The first row with the best score, without the untrained network; None before epoch 1.

    With min_delta a row replaces the best before it only if it is better by more than that.
    monitor "last": the last row.
    """
    if monitor == "last":
        return history[-1] if len(history) > 1 else None
    best = None
    for row in history[1:]:
        if math.isnan(row["score"]):
            continue
        if best is None or gain(monitor, row["score"], best["score"]) > min_delta:
            best = row
    return best


def best_constant(rows):
    """The best that the constants of a task's floors reach, score by score."""
    best = {}
    for name, scores in rows.items():
        if name.startswith("constant"):
            for key, value in plain(scores).items():
                choose = min if key in LOWER_IS_BETTER else max
                best[key] = choose(value, best.get(key, value))
    return best


def strong_floor(rows):
    """Name, without `strong: `, and scores of the strongest simple model; "" and {} without one."""
    for name, scores in rows.items():
        if name.startswith("strong"):
            return name.removeprefix("strong: "), scores
    return "", {}


def print_beside(beside):
    """The paired difference of network and strong floor; see diagnosis.beside_simple_model."""
    if beside:
        print(f"network against {beside['model']}, {beside['score']}: "
              f"{beside['difference']:+.4f} [{beside['low']:+.4f}, {beside['high']:+.4f}] over "
              f"{beside['groups']:,} groups (positive: the network is better)")


def plain(scores):
    """The scores that are numbers, without the tables, such as a score of every class."""
    return {key: value for key, value in scores.items() if not isinstance(value, dict)}


def without_nan(value):
    """NaN and infinite numbers -> None, in nested dictionaries: JSON has neither."""
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path, content):
    with checkpoint.atomic_write(path) as file:
        json.dump(without_nan(content), file, indent=1)


def write_log(path, history):
    with checkpoint.atomic_write(path) as file:
        for row in history:
            file.write(json.dumps(without_nan(row)) + "\n")


# --------------------------------------------------------------------------------------------------
# Lines and tables


def print_summary(run, splits):
    args = run.args
    sizes = [f"{len(split):,} {name}" for name, split in splits.named().items()]
    weights = models.count_parameters(run.raw_model)
    trained = models.count_parameters(run.raw_model, trainable_only=True)
    parts = [args.task, ", ".join(sizes), f"{weights:,} parameters",
             f"{run.steps_per_epoch} steps/epoch", f"{args.device}, amp {args.amp}"]
    if trained < weights:
        parts[2] += f", {trained:,} trained"
    if world_size() > 1:
        parts.append(f"{world_size()} processes")
    print(" | ".join(parts))


def watched_scores(row, task, args):
    """The validation scores that an epoch is read by: the task's first, then --monitor."""
    names = dict.fromkeys((task.flags["monitor"].choices[0], task.watched(args)))
    return [name for name in names if name in row.get("raw", {})]


def epoch_line(run):
    """`*` marks the row that best.pt holds: a new best of --monitor, or the last.

    On the same rows, `floor` is the score of the best constant; the name and score of the strong
    floor follow it.
    """
    history, args = run.history, run.args
    row, constant = history[-1], best_constant(run.floors)
    simple_model, strong = strong_floor(run.floors)
    parts = [f"epoch {row['epoch']:3d}/{args.epochs}"]
    if row["epoch"]:
        parts += [f"lr {row['lr_end']:.2e}", f"train {row['train_loss']:.4f}"]
        parts += [f"{name} {value:.4f}" for name, value in row["parts"].items()]
    if "raw" in row:
        parts.append(f"val {row['raw']['loss']:.4f}")
        for name in watched_scores(row, run.task, args):
            parts.append(f"{name} {row['raw'][name]:.4f}")
            if "ema" in row:
                parts.append(f"ema {row['ema'][name]:.4f}")
            if "train_eval" in row:
                parts.append(f"train {name} {row['train_eval'][name]:.4f}")
            parts.append(f"floor {constant[name]:.4f}")
            if name in strong:
                parts.append(f"{simple_model} {strong[name]:.4f}")
    if not row["epoch"]:
        return " | ".join(parts + ["untrained"])
    parts += [f"grad {row['grad_norm']:6.2f}", f"{row['rows_per_s']:5.0f} rows/s"]
    if row["skipped_steps"]:
        parts.append(f"skipped {row['skipped_steps']}")
    return " | ".join(parts) + (" *" if best_row(history, args.monitor) is row else "")


def score_table(rows):
    """{name: {score: value}} as aligned text; a score that a row does not have is left blank."""
    rows = {name: plain(scores) for name, scores in rows.items()}
    columns = list(dict.fromkeys(key for scores in rows.values() for key in scores))
    width = max(map(len, rows))
    lines = [" " * width]
    for key in columns:
        lines[0] += f"{key:>{max(11, len(key) + 2)}}"
    for name, scores in rows.items():
        line = f"{name:<{width}}"
        for key in columns:
            value = scores.get(key, "")
            text = f"{value:.4f}" if isinstance(value, float) else str(value)
            line += f"{text:>{max(11, len(key) + 2)}}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def print_scores(title, count, scores, floors):
    """A split's scores between the baselines and the ceiling on the same rows."""
    print(f"\n{title}, {count:,} rows")
    print(score_table({"model": scores} | floors))
    for key, table in scores.items():
        if isinstance(table, dict):
            tables = {name: rows[key] for name, rows in floors.items()}
            print(score_table(with_floors(table, tables)))


def with_floors(table, floors):
    """A table by class of the model, and beside it the last column of every row of the floors."""
    joined = {name: dict(row) for name, row in table.items()}
    for floor, rows in floors.items():
        for name in table:
            joined[name][floor] = list(rows[name].values())[-1]
    return joined


def phases(history, monitor):
    """The run in thirds and after its best epoch.

    Mean and sd of the score, and how far the validation loss is above the training loss.
    """
    rows, best = history[1:], best_row(history, monitor)
    third = math.ceil(len(rows) / 3)
    after = rows[rows.index(best) + 1 :] if best else []
    parts = {"early": rows[:third], "middle": rows[third : 2 * third], "late": rows[2 * third :],
             "after the best": after}
    table = {}
    for name, part in parts.items():
        if not part:
            continue
        scores = [row["score"] for row in part]
        gaps = [row["raw"]["loss"] - row["train_loss"] for row in part if "raw" in row]
        sd = float(np.std(scores, ddof=1)) if len(part) > 1 else math.nan
        gap = float(np.mean(gaps)) if gaps else math.nan
        table[name] = {"first": part[0]["epoch"], "last": part[-1]["epoch"],
                       "mean": float(np.mean(scores)), "sd": sd, "gap": gap}
    return table


def last_epochs(history, weights, key):
    """Mean and sd of a validation score over the last ten epochs; None below two."""
    values = [row[weights][key] for row in history[1:][-10:] if weights in row]
    if len(values) < 2:
        return None
    return {"epochs": len(values), "mean": float(np.mean(values)),
            "sd": float(np.std(values, ddof=1))}


def highest_rate(history):
    return max((max(row["lr"], row["lr_end"]) for row in history[1:]), default=0.0)


def print_phases(history, monitor, score):
    """The table of phases of a score, and where the rate stood at the best epoch."""
    print(f"\n{'epochs':<24}{score + ', mean and sd':>24}{'validation - training loss':>30}")
    for name, row in phases(history, monitor).items():
        score = f"{row['mean']:.4f}"
        if row["last"] > row["first"]:
            score += f" +- {row['sd']:.4f}"
        gap = "" if math.isnan(row["gap"]) else f"{row['gap']:+.4f}"
        print(f"{name:<15}{row['first']:>4} to {row['last']:<4}{score:>21}{gap:>30}".rstrip())
    best = best_row(history, monitor)
    if best and monitor != "last":
        share = best["lr_end"] / max(highest_rate(history), 1e-12)
        print(f"best epoch {best['epoch']} of {history[-1]['epoch']}, where the rate stood at "
              f"{share:.0%} of its highest")


def print_findings(findings, most=10):
    """At most ten lines."""
    shown = findings if len(findings) <= most else findings[: most - 1]
    for finding in shown:
        print("diagnosis: " + " | ".join(finding.values()))
    if len(findings) > len(shown):
        print(f"diagnosis: and {len(findings) - len(shown)} more in diagnosis.json")


def saved(run, folder):
    """Where the last epoch of a run that broke off is saved."""
    if not run.history:
        return "nothing is saved"
    return f"epoch {run.history[-1]['epoch']} is saved in {folder / 'last.pt'}"


def print_lr_curve(rates, smoothed, suggestion, width=50):
    """The range test as text: one line per rate, the bar is the smoothed loss."""
    if math.isnan(suggestion):
        print(f"no suggestion: over {len(rates)} rates from {rates[0]:.0e} the loss never falls; "
              "look at the data and the loss first")
        return
    low, high = min(smoothed), max(smoothed)
    distances = [abs(math.log(rate / suggestion)) for rate in rates]
    nearest = distances.index(min(distances))
    step = max(1, len(rates) // 30)
    for i in sorted({*range(0, len(rates), step), nearest, len(rates) - 1}):
        bar = "#" * round(width * (smoothed[i] - low) / max(high - low, 1e-12))
        mark = "  <- suggested" if i == nearest else ""
        print(f"lr {rates[i]:.2e} | loss {smoothed[i]:.4f} | {bar}{mark}")
    print(f"suggested: --lr {suggestion:.2g} (steepest descent of the smoothed loss; everything is "
          "restored)")


def print_sampler(report):
    """A data.sampler_report, and a warning if one class is nearly all there is."""
    counts = [f"{name}: {count:,}" for name, count in report["class_counts"].items()]
    print(f"{report['batches']:,} batches, {report['rows']:,} rows | {', '.join(counts)}")
    print(f"classes per batch: at least {report['classes_min']}, "
          f"{report['classes_mean']:.2f} on average | batches of one class: "
          f"{report['single_class']} | repeats within a batch: {report['repeats']} | "
          f"rows never drawn: {report['never_drawn']}")
    largest = {"of the rows drawn": report["largest_share"],
               "of a batch": report["largest_batch_share"]}
    for place, share in largest.items():
        if share > 0.9:
            print(f"WARNING: one class is {share:.1%} {place}: use --sampler stratified, or add "
                  "rows of the others")


def print_epoch(run):
    """The line of the last epoch, in place of the progress bar."""
    clear = "\r" + 60 * " " + "\r" if sys.stdout.isatty() else ""
    print(clear + epoch_line(run), flush=True)


def print_progress(epoch, share, loss):
    """On a terminal: a bar of the epoch's steps, and the mean loss so far."""
    if sys.stdout.isatty():
        bar = "#" * int(30 * share)
        print(f"\repoch {epoch:3d} [{bar:<30}] loss {loss:.4f} ", end="", flush=True)
