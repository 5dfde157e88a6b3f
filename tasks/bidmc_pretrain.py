"""bidmc --mode pretrain: guess hidden patches of a PPG or of its spectrum, without labels.

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
    """Mean squared error of the hidden patches; other ones are hidden in every batch."""
    patches = model.encoder.patches(batch["inputs"])
    mask = models.random_patch_mask(*patches.shape[:2], args.mask_ratio).to(patches.device)
    return F.mse_loss(model(batch["inputs"], mask)[mask].float(), patches[mask]), {}


def outputs(model, batch, args, facts):
    """Guesses of the hidden samples or bins of each window, and what was hidden: (b, hidden)."""
    inputs, mask = batch["inputs"], batch["mask"]
    guesses = model(inputs, mask)[mask].float()
    targets = model.encoder.patches(inputs)[mask].float()
    return {"guesses": guesses.reshape(len(inputs), -1),
            "targets": targets.reshape(len(inputs), -1)}


def scores(outputs, split, args, facts):
    """Of the hidden samples or bins, in the unit of the input."""
    return patch_scores(outputs["guesses"].flatten(), outputs["targets"].flatten())


def patch_scores(guesses, targets):
    report = losses.regression_report(guesses, targets)
    return {"loss": report["rmse"] ** 2, "mae": report["mae"], "rmse": report["rmse"],
            "r2": report["r2"]}


def floors(split, args, facts):
    """Without learning: the mean of a window's visible patches, the mean of these rows, and a line
    between visible neighbours."""
    chunks = np.array_split(np.arange(len(split)), -(-len(split) // split.chunk))
    windows = torch.cat([split.batch(rows)["inputs"].cpu() for rows in chunks]).double().numpy()
    masks = split.masks.numpy().repeat(args.patch, 1)
    windows = windows[..., : masks.shape[1]]
    shape, place = windows.mean(0), np.arange(masks.shape[1])
    guesses, targets = {"constant mean": [], "constant shape": [], "interpolation": []}, []
    for signals, hidden in zip(windows, masks):
        for channel, signal in enumerate(signals):
            targets.append(signal[hidden])
            visible = signal[~hidden]
            guesses["constant mean"].append(np.full(hidden.sum(), visible.mean()))
            guesses["constant shape"].append(shape[channel][hidden])
            line = np.interp(place[hidden], place[~hidden], visible)
            guesses["interpolation"].append(line)
    targets = np.concatenate(targets)
    return {name: patch_scores(np.concatenate(parts), targets) for name, parts in guesses.items()}


def examples(outputs, split, args, facts):
    """The worst is the window whose hidden patches are guessed with the largest squared error."""
    error = (outputs["guesses"] - outputs["targets"]).square().mean(1)
    return error.numpy(), {}


def task(parent):
    refuse = functools.partial(no_predictions, "rate")
    return dataclasses.replace(
        parent, network=network, loss=loss, outputs=outputs, scores=scores, floors=floors,
        predictions=refuse, examples=examples, export=refuse)


TASKS = {name: task(parent) for name, parent in bidmc.TASKS.items()}
