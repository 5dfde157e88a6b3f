"""seqsetvae: death in hospital from the irregular events of the first 48 hours.

    python train.py --task seqsetvae                                      # drawn stays
    python train.py --task seqsetvae --data physionet2012/                # the challenge's own
    folder

Reading, statistics and batches are in seqsetvae_data.py, --mode pretrain in seqsetvae_pretrain.py.
"""

import math
import zlib

import numpy as np
import torch
import torch.nn.functional as F

import data
import losses
import models
from tasks import seqsetvae_data
from tasks.seqsetvae_data import StaySplit
from tasks.common import (
    LABELLED, TRAINED, Flag, Rows, Splits, Task, count_or_names, head_outputs, joined, mode_flags,
    refuse_folder, shared_flags, split_checksum, split_rows)

# Of the logistic regression on means: of 1, 10, 30 and 100 about the best on validation stays.
PENALTY = 30.0


def load(path, args):
    """Read the stays, split them, and fit scaler and simple models on training stays."""
    pretraining = args.mode == "pretrain"  # also takes the stays without an outcome, for training
    stays = read(path, args, need_outcomes=not pretraining)
    labels, ids = stays["labels"], stays["ids"]
    known = known_outcomes(stays, path)
    parts = [known[rows] for rows in split_rows(len(known), args)]
    notes = data_notes(path, stays, known)
    notes.append("split: by stay; the files do not say which stays are of one patient")
    for name, rows in zip(("training", "validation", "test"), parts):
        died = int(labels[rows].sum())
        if len(rows) and died in (0, len(rows)):
            raise ValueError(f"of the {len(rows)} {name} stays {died} died: AUROC and AUPRC need "
                             "both outcomes; change the ratios or --seed")
        if len(rows):
            share = died / len(rows)
            notes.append(f"{name}: {len(rows):,} stays, {died:,} deaths, {share:.1%}")

    scaler = seqsetvae_data.event_scaler(stays, parts[0])
    facts = {"data": checksum(stays), "split": split_checksum(parts),
             "scale": {name: values.tolist() for name, values in scaler.items()},
             "held_out": sorted(ids[np.concatenate(parts[1:])].tolist()),
             "largest_set": int(np.diff(stays["first_event"]).max())}
    if pretraining:
        parts[0] = np.concatenate([parts[0], np.flatnonzero(labels < 0)])
    else:
        facts["pos_weight"] = args.pos_weight or losses.auto_pos_weight(labels[parts[0]])
        facts["deaths"] = float(labels[parts[0]].mean())
    facts["seen"] = sorted(ids[parts[0]].tolist())

    drop_events = 0.0 if args.mode == "probe" else args.drop_events
    splits = []
    for rows in parts:
        split = StaySplit(stays, rows, scaler=scaler, drop_events=drop_events, device=args.device)
        splits.append(split if len(rows) else None)
    train = splits[0]
    if pretraining:
        counts = np.bincount(train.variables, minlength=len(seqsetvae_data.STAY_VARIABLES))
        facts["frequency"] = (counts / counts.sum()).tolist()
    else:
        facts["strong"] = fit_simple_models(train)
        if args.anchor == "ranks":
            train.anchor = unseen_logits(train, args.seed)
            for split in splits[1:]:
                if split is not None:
                    split.anchor = rank_regression(split, facts)
    return Splits(*splits, facts, notes)


def read(path, args, need_outcomes):
    if path:
        return seqsetvae_data.read_stays(path, cache=args.cache, need_outcomes=need_outcomes)
    return seqsetvae_data.synthetic_stays()


def known_outcomes(stays, path):
    """Rows of the stays with an outcome; ValueError without any."""
    known = np.flatnonzero(stays["labels"] >= 0)
    if not len(known):
        raise ValueError(f"none of the {len(stays['ids']):,} stays of {path} has an outcome: the "
                         "splits are drawn from stays with one, also in pretraining, and --eval "
                         "scores those; add Outcomes-?.txt beside set-?")
    return known


def checksum(stays):
    arrays = (stays["values"], stays["ids"], stays["labels"])
    return zlib.crc32(b"".join(array.tobytes() for array in arrays))


def data_notes(path, stays, known):
    source = path or "SYNTHETIC stays, drawn by the script: a score on them is no result"
    notes = [f"data: {source}, {len(stays['ids']):,} stays, {len(stays['minutes']):,} sets of "
             f"{len(stays['values']):,} events, {stays['labels'][known].mean():.1%} died in "
             "hospital"]
    return notes + left_out(stays)


def left_out(stays):
    return [f"left out: {reason}: {count_or_names(items)}"
            for reason, items in stays["left_out"].items()]


def fit_simple_models(train):
    """Logistic regressions on stay_statistics and, the strong one, on stay_ranks.

    The penalty of the latter is the number of its columns: before any data is seen each logit then
    has an sd of 1, whatever their number.
    """
    summaries = train.summaries()
    knots = seqsetvae_data.rank_knots(summaries)
    ranks = seqsetvae_data.stay_ranks(summaries, knots)
    return {"means": losses.logistic_fit(train.statistics(), train.labels, penalty=PENALTY),
            "knots": knots, "ranks": fit_ranks(ranks, train.labels)}


def fit_ranks(ranks, labels):
    return losses.logistic_fit(ranks, labels, penalty=float(ranks.shape[1]))


def unseen_logits(train, seed, folds=5):
    """Logits (m,) of the training stays, each by a regression on ranks that did not see it.

    One that did is too sure of them: its AUROC is 0.91 where new stays have 0.85, and a network
    that is added to it would learn that there is little to correct. Each fold has its share of the
    deaths.
    """
    summaries, labels, logits = train.summaries(), train.labels, np.empty(len(train))
    deaths = int(labels.sum())
    if min(deaths, len(labels) - deaths) < 2:
        raise ValueError(f"{deaths} of the {len(labels)} training stays died: --anchor ranks needs "
                         "two of either outcome; change the ratios or --seed, or give --anchor "
                         "none")
    rng, fold = np.random.default_rng(seed), np.empty(len(labels), dtype=int)
    for outcome in (0, 1):
        rows = rng.permutation(np.flatnonzero(labels == outcome))
        fold[rows] = np.arange(len(rows)) % folds
    for number in range(folds):
        part, rest = np.flatnonzero(fold == number), np.flatnonzero(fold != number)
        knots = seqsetvae_data.rank_knots(summaries[:, rest])
        ranks = seqsetvae_data.stay_ranks(summaries, knots)
        logits[part] = losses.linear_scores(fit_ranks(ranks[rest], labels[rest]), ranks[part])
    return logits


def rows(path, args, facts, need_labels):
    pretraining = args.mode == "pretrain"
    stays = read(path, args, need_outcomes=need_labels and not pretraining)
    if not need_labels:
        split = StaySplit(stays, np.arange(len(stays["ids"])), scaler=facts["scale"],
                          device=args.device)
        found = Rows(split, 0, left_out(stays))
    else:
        known = known_outcomes(stays, path)
        split = StaySplit(stays, known, scaler=facts["scale"], device=args.device)
        found = Rows(split, checksum(stays), data_notes(path, stays, known))
    if args.anchor == "ranks":
        split.anchor = rank_regression(split, facts)
    return found


# --------------------------------------------------------------------------------------------------
# The recipe


def encoder(args):
    return models.SetSequenceEncoder(
        len(seqsetvae_data.STAY_VARIABLES), width=args.width, depth=args.depth, heads=args.heads,
        hidden=args.hidden, set_heads=args.set_heads, points=args.points, dropout=args.dropout)


def network(args, facts):
    """SeqSetClassifier; beside an anchor, which knows the share of deaths, it starts at 0."""
    anchored = args.anchor == "ranks"
    model = models.SeqSetClassifier(
        encoder(args), layers=args.head_layers, dropout=args.head_dropout,
        prior=0.5 if anchored else facts["deaths"], events=args.events)
    if anchored:
        torch.nn.init.zeros_(model.head[-1].weight)
    return model


def criterion(logits, targets, args, facts):
    if args.loss == "focal":
        weights = torch.tensor([1 - args.alpha, args.alpha], device=logits.device)
        return losses.focal_label_smooth_ce(logits, targets, gamma=args.gamma, smoothing=0.0,
                                            class_weights=weights)
    pos_weight = torch.tensor(facts["pos_weight"], device=logits.device)
    return F.binary_cross_entropy_with_logits(logits.float(), targets, pos_weight=pos_weight)


def loss(model, batch, args, facts):
    """On stratified batches half of the stays are deaths, so their log odds are higher by `shift`.

    Added to the logits here, it leaves the network with the odds of all stays.
    """
    deaths = facts["deaths"]
    shift = math.log((1 - deaths) / deaths) if args.sampler == "stratified" else 0.0
    logits = outputs(model, batch, args, facts)["logits"]
    return criterion(logits + shift, batch["targets"], args, facts), {}


def outputs(model, batch, args, facts):
    logits = head_outputs(model, batch)
    return {"logits": logits + batch["anchor"] if args.anchor == "ranks" else logits}


def probability(logits, args, facts):
    """Probability of death, without the factor by which pos_weight multiplies the learned odds."""
    shift = math.log(facts["pos_weight"]) if args.loss == "bce" else 0.0
    return torch.sigmoid(logits - shift)


def scores(outputs, split, args, facts):
    return logit_scores(outputs["logits"].numpy(), split, args, facts)


def headline(outputs, split, args, facts):
    """AUROC; see Task."""
    logits = outputs["logits"].numpy()
    return lambda weights: losses.weighted_ranking(logits, split.labels, weights)["auroc"]


def logit_scores(logits, split, args, facts):
    """For logits of the network or of a baseline, with 95 % bootstrap intervals over the stays."""
    report = losses.binary_report(logits, split.labels)
    report |= losses.ranking_interval(logits, split.labels)
    names = [name + end for name in ("auroc", "auprc") for end in ("", "_low", "_high")]
    return {"loss": loss_of(logits, split, args, facts)} | {name: report[name] for name in names}


def loss_of(logits, split, args, facts):
    logits = torch.as_tensor(logits)
    targets = torch.from_numpy(split.labels).to(logits.dtype)
    return float(criterion(logits, targets, args, facts))


def regression(split, facts):
    """Logits of the logistic regression on means, missingness and counts."""
    return losses.linear_scores(facts["strong"]["means"], split.statistics())


def rank_regression(split, facts):
    """Logits of the logistic regression on ranks and their squares."""
    ranks = seqsetvae_data.stay_ranks(split.summaries(), facts["strong"]["knots"])
    return losses.linear_scores(facts["strong"]["ranks"], ranks)


def floors(split, args, facts):
    """Chance, severity scores of the files, logistic regressions on means and on ranks."""
    deaths, chance = facts["deaths"], losses.binary_floor(split.labels)
    constant = np.full(len(split), math.log(deaths / (1 - deaths)))
    rows = {"constant": {"loss": loss_of(constant, split, args, facts), "auroc": chance["auroc"],
                         "auprc": chance["auprc"]}}
    for name, severity in split.stays["severity"].items():
        severity = severity[split.rows]
        known = ~np.isnan(severity)
        if 0 < split.labels[known].sum() < known.sum():
            report = losses.binary_report(severity[known], split.labels[known])
            rows[name] = {key: report[key] for key in report if key in ("auroc", "auprc")}
    if "strong" in facts:
        rows["logistic regression"] = logit_scores(regression(split, facts), split, args, facts)
        rows["strong: logistic on ranks"] = {"logits": torch.tensor(rank_regression(split, facts))}
    rows["ceiling"] = {"loss": 0.0, "auroc": 1.0, "auprc": 1.0}
    return rows


def predictions(batches, split, out, args, facts):
    """A CSV with a row per stay; a stay without any event keeps its row, with nothing in it."""
    refuse_folder(out)
    logits = joined(batches)["logits"]
    table = zip(split.ids.tolist(), logits.tolist(), probability(logits, args, facts).tolist())
    lines = [[stay, f"{logit:.6f}", f"{prob:.6f}"] for stay, logit, prob in table]
    empty = split.stays["left_out"].get("stay without an event", [])
    data.write_csv(out, ["RecordID", "logit", "prob_death"],
                   lines + [[stay, "", ""] for stay in empty])
    return len(logits)


def examples(outputs, split, args, facts):
    """The worst is the probability of death that is furthest from the outcome."""
    predicted = probability(outputs["logits"], args, facts).numpy()
    return np.abs(predicted - split.labels), {"true": split.labels, "predicted": predicted}


FLAGS = shared_flags(
    epochs=4, lr=3e-4, weight_decay=1.0, plateau_watches="monitor", plateau_factor=0.8,
    plateau_patience=4, train_ratio=0.75, val_ratio=0.075, test_ratio=0.175) | mode_flags() | dict(
    sampler=Flag("stratified", "stratified: as many deaths as survivors in every batch, which the "
                 "loss takes into account; bucketed: stays of like length share a batch, as in "
                 "pretraining",
                 choices=("stratified", "bucketed", "shuffled"), when={"mode": LABELLED},
                 otherwise="bucketed"),
    monitor=Flag("auroc", "validation score that picks the epoch, and raw or EMA weights; "
                 "pretraining takes its loss", choices=("auroc", "auprc", "loss", "last"),
                 when={"mode": LABELLED}, otherwise="loss"),
    width=Flag(64, "of the latent vectors and hidden states, a multiple of --heads and --set-heads",
               low=2, backbone=True),
    depth=Flag(2, "layers of the causal transformer", low=1, backbone=True),
    heads=Flag(8, "attention heads of the transformer", low=1, backbone=True),
    hidden=Flag(128, "width of its MLPs", low=1, backbone=True),
    set_heads=Flag(2, "attention heads in the set encoder", low=1, backbone=True),
    points=Flag(16, "induced points of the set encoder", low=1, backbone=True),
    dropout=Flag(0.3, "in the transformer, while it is trained", low=0, high=0.95,
                 when={"mode": TRAINED}),
    drop_events=Flag(0.3, "probability to leave out an event in training", low=0, high=0.95,
                     when={"mode": TRAINED}),
    head_layers=Flag(2, "linear layers of the head", low=1, when={"mode": LABELLED}),
    head_dropout=Flag(0.3, "between them", low=0, high=0.95, when={"mode": LABELLED}),
    events=Flag(True, "the head reads the strongest events of a stay, too, beside what the "
                "sequence of its sets tells", when={"mode": ("scratch", "finetune", "partial")},
                otherwise=False),
    anchor=Flag("ranks", "what the network's logit is added to: ranks, that of the logistic "
                "regression on ranks; or none", choices=("ranks", "none"),
                when={"mode": ("scratch", "finetune", "partial")}, otherwise="none"),
    loss=Flag("bce", "bce with --pos-weight, or focal", choices=("bce", "focal"),
              when={"mode": LABELLED}),
    pos_weight=Flag(1.0, "weight of the deaths (0 = survivors / deaths of the training stays)",
                    low=0, when={"loss": ("bce",), "mode": LABELLED}),
    gamma=Flag(2.0, "exponent of the focal loss", low=0,
               when={"loss": ("focal",), "mode": LABELLED}),
    alpha=Flag(0.5, "focal: weight of the deaths, 1 - alpha that of the survivors; 0.25 weighs the "
               "rarer class three times less", above=0, high=0.999,
               when={"loss": ("focal",), "mode": LABELLED}),
    beta=Flag(0.05, "weight of the KL divergence", low=0, when={"mode": ("pretrain",)}),
    beta_steps=Flag(300, "steps over which it rises from 0 (0 = at once)", low=0,
                    when={"mode": ("pretrain",)}),
    free_bits=Flag(0.03, "nats that each dimension of a code may hold at no cost", low=0,
                   when={"mode": ("pretrain",)}),
)
FLAGS["compile"] = FLAGS["compile"].read_with({"mode": TRAINED})

# The fine-tuning of the original at its own size, before and after its authors mended it. `after`
# is our --mode probe with early stopping on AUROC; pretrain for either with `--variant after --mode
# pretrain`.
AFTER = dict(
    mode="probe", width=256, depth=4, hidden=512, dropout=0.15, head_dropout=0.1, events=False,
    anchor="none",
    epochs=100, batch_size=8, patience=10, monitor="auroc", sampler="bucketed", loss="bce",
    lr=3e-4, weight_decay=0.01, beta2=0.98, warmup_epochs=0.0, min_lr=1e-6, ema_decay=0.0,
    schedule="plateau", plateau_watches="monitor", plateau_factor=0.8, plateau_patience=4,
    drop_events=0.0, beta_steps=8000,
)
BEFORE = AFTER | dict(lr=1e-4, batch_size=4, monitor="loss", plateau_watches="loss", head_layers=4)
# Our own, at width 64. With the original beta of 0.05 and its dropout a code holds 12 nats, too few
# to tell the variables of a set; here 48.
PRETRAIN = dict(mode="pretrain", epochs=10, lr=2e-3, weight_decay=0.05, beta=0.005, dropout=0.0,
                drop_events=0.0)

TASK = Task(
    flags=FLAGS, variants={"pretrain": PRETRAIN, "before": BEFORE, "after": AFTER},
    load=load, rows=rows, network=network, loss=loss, outputs=outputs, scores=scores, floors=floors,
    headline=headline, predictions=predictions, examples=examples)
