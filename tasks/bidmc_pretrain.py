"""bidmc --mode pretrain: predict hidden patches of a PPG or of its spectrum, without labels.

    python train.py --task bidmc_rr --mode pretrain --out runs/rr-pretrain
    python train.py --task bidmc_rr --mode probe --pretrained runs/rr-pretrain
"""

import dataclasses
import functools

import numpy as np
import torch
import torch.nn.functional as F

import losses
import models
from tasks import bidmc
from tasks.common import no_predictions


def network(args, facts):
    return models.MaskedPatchModel(bidmc.encoder(args))


def loss(model, batch, args, facts):
    """Mean squared error of the hidden patches, which are drawn anew for every batch."""
    patches = model.encoder.patches(batch["inputs"])
    mask = models.random_patch_mask(*patches.shape[:2], args.mask_ratio).to(patches.device)
    return F.mse_loss(model(batch["inputs"], mask)[mask].float(), patches[mask]), {}


def outputs(model, batch, args, facts):
    """Guesses and targets of the hidden samples or bins of each window, both (b, hidden)."""
    inputs, mask = batch["inputs"], batch["mask"]
    guesses = model(inputs, mask)[mask].float()
    targets = model.encoder.patches(inputs)[mask].float()
    return {"guesses": guesses.reshape(len(inputs), -1),
            "targets": targets.reshape(len(inputs), -1)}


def scores(outputs, split, args, facts):
    """Errors over all hidden samples or bins, in the unit of the input."""
    return patch_scores(outputs["guesses"].flatten(), outputs["targets"].flatten())


def patch_scores(guesses, targets):
    """The scores of guesses (n,) for targets (n,), of the network or of a baseline."""
    report = losses.regression_report(guesses, targets)
    return {"loss": report["rmse"] ** 2, "mae": report["mae"], "rmse": report["rmse"],
            "r2": report["r2"]}


def floors(split, args, facts):
    """Baselines: mean of the visible patches, mean of these rows, line between visible neighbours.
    """
    windows = []
    for start in range(0, len(split), split.chunk):
        rows = np.arange(start, min(start + split.chunk, len(split)))
        windows.append(split.batch(rows)["inputs"].cpu())
    windows = torch.cat(windows).double().numpy()
    masks = split.masks.numpy().repeat(args.patch, 1)
    windows = windows[..., : masks.shape[1]]
    shape, place = windows.mean(0), np.arange(masks.shape[1])
    means, shapes, lines, targets = [], [], [], []
    for window, hidden in zip(windows, masks):
        for signal, mean_signal in zip(window, shape):
            visible = signal[~hidden]
            targets.append(signal[hidden])
            means.append(np.full(hidden.sum(), visible.mean()))
            shapes.append(mean_signal[hidden])
            lines.append(np.interp(place[hidden], place[~hidden], visible))
    targets = np.concatenate(targets)
    guesses = {"constant mean": means, "constant shape": shapes, "interpolation": lines}
    return {name: patch_scores(np.concatenate(parts), targets) for name, parts in guesses.items()}


def examples(outputs, split, args, facts):
    """The worst window has the largest mean squared error over its hidden patches."""
    error = (outputs["guesses"] - outputs["targets"]).square().mean(1)
    return error.numpy(), {}


def task(parent):
    """The pretraining task of bidmc_rr or bidmc_hr."""
    refuse = functools.partial(no_predictions, "rate")
    return dataclasses.replace(
        parent, network=network, loss=loss, outputs=outputs, scores=scores, floors=floors,
        predictions=refuse, examples=examples, export=refuse)


TASKS = {name: task(parent) for name, parent in bidmc.TASKS.items()}
