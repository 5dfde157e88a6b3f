"""Pretrained encoders: load whole or not at all, freeze, and compute frozen features once."""

from pathlib import Path

import numpy as np
import torch

import models
from runtime import checkpoint
from tasks.common import show, spelled


def read_encoder(args, facts, flags):
    """The checkpoint of --pretrained, checked against this run; None for a mode without one."""
    if args.mode in ("scratch", "pretrain"):
        return None
    if not args.pretrained:
        raise ValueError(f"--mode {args.mode} starts from an encoder: give --pretrained, the "
                         "best.pt of a run with --mode pretrain")
    path = Path(args.pretrained)
    if path.is_dir():
        if (path / f"seed-{args.seed}").is_dir():
            path = path / f"seed-{args.seed}"
        path = path / (f"fold-{args.fold}" if args.fold else "") / "best.pt"
    content = checkpoint.load(path, args.task, flags, needs=("model", "epoch"))
    recipe = content["recipe"]
    if recipe["mode"] != "pretrain":
        raise ValueError(f"{path} is a run with --mode {recipe['mode']}, whose encoder has seen "
                         "labels: give one of --mode pretrain")
    if args.overwrite and path.resolve().parent == Path(args.out).resolve():
        raise ValueError(f"--overwrite would delete the encoder that --pretrained names, {path}: "
                         "choose another --out")
    for name, flag in flags.items():
        value = getattr(args, name)
        if flag.backbone and not flag.unmet(args) and recipe[name] != value:
            raise ValueError(f"{spelled(name)} {show(value)}: the encoder in {path} was pretrained "
                             f"with {show(recipe[name])}; give that, or pretrain another one")
    leaked = set(content["facts"]["seen"]) & set(facts["held_out"])
    if leaked:
        raise ValueError(f"the encoder in {path} was pretrained on {len(leaked)} of the cases that "
                         "this run holds out: pretrain with the same --seed, ratios, --folds and "
                         "--fold")
    if content["facts"].get("scale") != facts.get("scale"):
        raise ValueError(f"the encoder in {path} was pretrained on inputs scaled by other training "
                         "rows: pretrain on the same data")
    return content | {"path": path}


def set_up_backbone(model, args, encoder):
    """Fill the encoder and freeze what --mode freezes.

    Returns the optimizer's parameter groups: [(parameters, share of --lr)].
    """
    if encoder:
        load_encoder(model, encoder)
    if args.mode == "probe":
        models.freeze_backbone(model.encoder, unfreeze_last=0)
    if args.mode == "partial":
        models.freeze_backbone(model.encoder, unfreeze_last=args.unfreeze_last)
    backbone, rest = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            slow = args.mode in ("finetune", "partial") and name.startswith("encoder.")
            (backbone if slow else rest).append(parameter)
    groups = [(rest, 1.0)]
    if backbone:
        groups.append((backbone, args.backbone_lr / args.lr))
    return groups


def load_encoder(model, content):
    try:
        report = models.load_backbone(model.encoder, content["model"])
    except ValueError as error:
        raise ValueError(f"{content['path']}: {error}") from error
    print(f"encoder: {report['tensors']} tensors, {report['scalars']:,} scalars loaded from "
          f"{content['path']} (epoch {content['epoch']}), {report['missing']} missing, "
          f"{report['unexpected']} unexpected; left there: "
          f"{', '.join(report['left_out']) or 'nothing'}")


@torch.no_grad()
def cache_features(model, splits):
    """Compute the features of a frozen encoder once, in eval mode, without augmentation.

    They become split.features, which batches hold instead of inputs: one tensor, or {name: tensor}
    if some of several encoders are frozen.
    """
    encode = getattr(model, "encode_frozen", model.features)
    model.eval()
    for split in splits:
        parts = []
        for start in range(0, len(split), 512):
            rows = np.arange(start, min(start + 512, len(split)))
            parts.append(encode(split.batch(rows)["inputs"]))
        if isinstance(parts[0], dict):
            split.features = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        else:
            split.features = torch.cat(parts)
