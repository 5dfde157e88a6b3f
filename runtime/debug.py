"""--debug: the first batches of every epoch, and a checklist at the end."""

import math

import numpy as np
import torch

import data
from tasks.common import plan_batches


def keep_output(run, split):
    """From here on run.output is the output of the network for the last training batch."""
    def hook(module, inputs, output):
        if module.training:
            first = next(iter(output.values())) if isinstance(output, dict) else output
            run.output = first.detach()

    on_features = torch.is_tensor(getattr(split, "features", None))  # then the head alone is run
    (run.raw_model.head if on_features else run.raw_model).register_forward_hook(hook)


def looker(run, epoch, step):
    """The function that train_step calls after the backward passes, in the first three steps.

    None without --debug, and in later steps.
    """
    if not run.args.debug or step > 2:
        return None

    def look(batch, lr):
        labels = count_labels(batch["targets"]) if "targets" in batch else "no labels"
        print(f"debug epoch {epoch} batch {step} | {labels}")
        if step == 0:
            print(f"debug epoch {epoch} | lr {lr:.3g} | output {describe(run.output)}")
            print(f"debug epoch {epoch} | {gradient_line(run)}")

    return look


def gradient_line(run):
    gradients = [parameter.grad for parameter in run.parameters]
    norms = [0.0 if gradient is None else float(gradient.norm()) for gradient in gradients]
    norm = math.hypot(*norms) / run.scaler.get_scale()  # 1 without fp16
    return (f"{np.count_nonzero(norms)} of {len(norms)} trainable tensors have a gradient, norm "
            f"{norm:.3g} (healthy: 1 to 10)")


def count_labels(targets):
    """How often each label occurs in a batch, or the range of targets that are no classes."""
    values, counts = targets.unique(return_counts=True)
    if len(values) > 30:
        return f"targets {describe(targets)}"
    pairs = zip(values.tolist(), counts.tolist())
    text = ", ".join(f"{value:.4g}: {count:,}" for value, count in pairs)
    return f"labels {text}" + (" | WARNING: one class only" if len(values) == 1 else "")


def describe(tensor):
    """Shape, mean, standard deviation and the number of values that are not finite."""
    numbers = tensor.detach().float()[torch.isfinite(tensor)]
    bad = tensor.numel() - len(numbers)
    return (f"{tuple(tensor.shape)}: mean {numbers.mean():.4g}, sd {numbers.std():.4g}, "
            f"{bad} not finite")


def print_verdicts(run, splits):
    """The signs of a run that learns, each with a verdict and its measurement."""
    args, rows, verdicts = run.args, run.history[1:], []
    labels = getattr(splits.train, "labels", None)
    if args.schedule != "cyclic" and args.warmup_epochs:
        rates = [row["lr"] for row in rows[: math.ceil(args.warmup_epochs) + 1]]
        text = ", ".join(f"{rate:.2g}" for rate in rates)
        verdicts.append(("warm-up rises", (np.diff(rates) > 0).all(),
                         f"lr at the start of each epoch {text}"))
    if labels is not None and labels.dtype.kind in "iu" and args.mode != "pretrain":
        fewest = data.sampler_report(plan_batches(splits.train, 1, args), labels)["classes_min"]
        classes = len(np.unique(labels))
        verdicts.append(("batches hold all classes", fewest == classes,
                         f"each batch holds at least {fewest} of {classes} classes"))
    first = rows[0]["train_loss"]
    lowest = min((row["train_loss"] for row in rows[1:20]), default=math.nan)
    verdicts.append(("loss falls by epoch 20", lowest < first,
                     f"{first:.4f} in epoch 1, lowest of epochs 2 to 20 {lowest:.4f}"))
    skipped = sum(row["skipped_steps"] for row in rows)
    verdicts.append(("no value is not finite", skipped == 0, f"{skipped} steps skipped"))
    norms = [row["grad_norm"] for row in rows]
    verdicts.append(("gradient norm is 1 to 10", 1 <= min(norms) and max(norms) <= 10,
                     f"{min(norms):.3g} to {max(norms):.3g}, mean of each epoch"))
    print("\nchecklist")
    for question, good, evidence in verdicts:
        print(f"{'yes' if good else 'NO ':<3} | {question:<26} | {evidence}")
