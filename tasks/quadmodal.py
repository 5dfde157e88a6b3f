"""quadmodal: one embedding of several modalities, by supervised contrastive learning.

    python train.py --task quadmodal --lr 1e-3                       # drawn modalities
    python train.py --task quadmodal --lr 1e-3 --data motion.npz     # an array per modality, labels

Reading, drawn modalities and batches are in quadmodal_data.py.
"""

import math
import zlib

import numpy as np
import torch
import torch.nn.functional as F

import data
import losses
import models
from tasks.common import (
    Exported, Flag, Rows, Splits, Task, finite, joined, mean_over, plan_batches, refuse_folder,
    shared_flags, show, split_checksum, split_note, split_rows)
from tasks.quadmodal_data import (
    ModalSplit, broadcast_channels, column_scale, fit_whitening, read_modalities, sequences_of,
    spectral_features, summaries, synthetic_modalities, whitened, window_statistics)

# Of the simple models on standardised features. A lone column of n rows has its weight multiplied
# by n / (n + 10): with thousands of rows nothing is lost, but columns that are nearly copies of
# each other cannot take large opposite weights.
PENALTY = 10.0
SPECTRA = "spectra"  # the modality that stands for the sequences


def load(path, args):
    """Read the modalities, split them by group, measure their channels, and check every batch."""
    arrays, labels, groups, names, present = read(path, args)
    parts = dict(zip(("train", "validation", "test"), split_rows(len(labels), args, groups)))
    shapes = {name: list(array.shape[1:]) for name, array in arrays.items()}
    notes = [data_note(path, labels, shapes), split_note(groups, parts)]
    train = parts["train"]
    scaler, plain_scaler = {}, {}
    for name, array in arrays.items():
        mean, sd = data.channel_statistics(array, train, present[name])
        scaler[name] = mean, sd
        plain_scaler[name] = [mean.tolist(), sd.tolist()]
    facts = {"data": checksum(arrays, labels), "split": split_checksum(parts.values()),
             "names": list(names), "recorded": shapes, "scaler": plain_scaler}
    whole = ModalSplit(arrays, labels, np.arange(len(labels)), present=present, scaler=scaler,
                       device=args.device)
    statistics = None
    if args.inputs == "spectra" and sequences_of(arrays):
        statistics = spectral_features(whole, window_statistics)
        facts["whitening"] = fit_whitening(statistics[train], labels[train])
    seen, present_seen = as_seen(whole, facts, statistics)
    facts["shapes"] = {name: list(array.shape[1:]) for name, array in seen.items()}
    facts["complete"] = [name for name in seen if present_seen[name][train].all()]
    options = dict(noise=args.noise, noise_of={SPECTRA: args.spectra_noise}, scale=args.scale,
                   shift=args.shift, device=args.device)
    splits = {}
    for part, rows in parts.items():
        if len(rows):
            splits[part] = ModalSplit(seen, labels, rows, present=present_seen, groups=groups,
                                      scaler=scaler, **options)
            splits[part].recorded = ModalSplit(arrays, labels, rows, present=present,
                                               scaler=scaler, device=args.device)
            counts = np.bincount(labels[rows], minlength=len(names))
            classes = [f"{count:,} {name}" for count, name in zip(counts, names)]
            notes.append(f"{part}: {', '.join(classes)}")
    check_training_rows(splits["train"], args)
    for part, split in splits.items():
        split.reference = splits["train"]  # k-NN looks for neighbours there
        if not scored_batches(split.labels, args):
            raise ValueError(f"no class has two of the {len(split)} {part} rows: SupCon has "
                             "nothing to compare there; change --seed or the ratios")
    return Splits(splits["train"], splits.get("validation"), splits.get("test"), facts, notes)


def as_seen(whole, facts, statistics=None):
    """Arrays and presence that the network sees; whitened statistics stand for all sequences.

    whole       a ModalSplit of all rows as recorded; statistics: their window_statistics, if known
    returns     {name: (n, ...)}, {name: bool (n,)}
    """
    arrays, present = dict(whole.arrays), dict(whole.present)
    if "whitening" not in facts:
        return arrays, present
    if SPECTRA in arrays:
        raise ValueError(f"a modality cannot be called {SPECTRA!r} with --inputs spectra, which "
                         "makes one of this name: rename it, or give --inputs waveform")
    if statistics is None:
        statistics = spectral_features(whole, window_statistics)
    here = np.zeros(len(whole), bool)
    for name in sequences_of(arrays):
        del arrays[name]
        here |= present.pop(name)
    arrays[SPECTRA] = whitened(torch.from_numpy(statistics), facts["whitening"]).numpy()
    return arrays, present | {SPECTRA: here}


def read(path, args):
    """What read_modalities returns, with the arrays of --modalities only."""
    if path:
        arrays, labels, groups, names, present = read_modalities(path, cache=args.cache)
    else:
        arrays, labels, groups, names, present = synthetic_modalities()
    chosen = [name for name in args.modalities.split(",") if name] or list(arrays)
    unknown = [name for name in chosen if name not in arrays]
    if unknown:
        raise ValueError(f"--modalities {args.modalities}: there is no {', '.join(unknown)}; the "
                         f"file holds {', '.join(arrays)}")
    return {name: arrays[name] for name in chosen}, labels, groups, names, present


def checksum(arrays, labels):
    """A number that tells this set from another, by its labels and about 100 rows."""
    parts = [labels.tobytes()]
    for array in arrays.values():
        parts.append(array[:: max(1, len(array) // 100)].tobytes())
    return zlib.crc32(b"".join(parts))


def data_note(path, labels, shapes):
    """The line that says what was read."""
    source = path or "SYNTHETIC modalities, drawn by the script: a score on them is no result"
    arrays = [f"{name} {show(tuple(shape))}" for name, shape in shapes.items()]
    return f"data: {source}, {len(labels):,} rows of {', '.join(arrays)}"


def check_training_rows(train, args):
    """Refuse training rows and batches from which SupCon cannot learn."""
    classes = np.unique(train.labels)
    if args.neighbours > len(train):
        raise ValueError(f"--neighbours {args.neighbours} must be at most {len(train)}, the number "
                         "of training rows")
    if len(classes) < 2 and not args.allow_single_class:
        bound = math.log(max(args.batch_size - 1, 1))
        raise ValueError(f"all {len(train):,} training rows are of class {classes[0]}: the loss "
                         f"then cannot fall below ln(B - 1), {bound:.5f} for batches of "
                         f"{args.batch_size}, whatever the network learns; add the other classes, "
                         "split by other groups (--seed, the ratios), or watch it with "
                         "--allow-single-class")
    for epoch in range(1, args.epochs + 1):
        for rows in plan_batches(train, epoch, args):
            counts = np.bincount(train.labels[rows])
            present = np.count_nonzero(counts)
            if counts.max() < 2 or len(classes) > 1 and present < 2:
                raise ValueError(f"a batch of {len(rows)} rows holds {present} classes, at most "
                                 f"{counts.max()} rows of one: SupCon needs two classes and two "
                                 "rows of one; --sampler stratified with --batch-size "
                                 f"{2 * len(classes)} or more has them")


def rows(path, args, facts, need_labels):
    """All rows of a file without labels, for --predict."""
    if need_labels:
        raise ValueError("--split all: k-NN compares with the run's own training rows: give "
                         "--split train, validation or test, and no other --data")
    arrays, _, _, _, present = read_modalities(path, cache=args.cache, need_labels=False)
    missing = [name for name in facts["recorded"] if name not in arrays]
    if missing:
        raise ValueError(f"{path} holds no {', '.join(missing)}, which the network was trained on: "
                         f"for rows that lack a modality give any values and present_{missing[0]} "
                         "of False")
    arrays = {name: arrays[name] for name in facts["recorded"]}
    present = {name: present[name] for name in arrays}
    every = np.arange(len(next(iter(arrays.values()))))
    options = dict(scaler=scaler_of(facts), device=args.device)
    arrays, present = as_seen(ModalSplit(arrays, None, every, present=present, **options), facts)
    return Rows(ModalSplit(arrays, None, every, present=present, **options), 0, [])


def scaler_of(facts):
    """{modality: (mean, sd)} of the channels, float64, measured on training rows."""
    scaler = {}
    for name, (mean, sd) in facts["scaler"].items():
        scaler[name] = [torch.tensor(values, dtype=torch.float64) for values in (mean, sd)]
    return scaler


# --------------------------------------------------------------------------------------------------
# The recipe


def network(args, facts):
    """QuadModal with the settings of the flags, and --freeze applied."""
    shapes = {name: tuple(shape) for name, shape in facts["shapes"].items()}
    model = models.QuadModal(
        shapes, width=args.width, tokens=args.tokens, heads=args.heads, depth=args.depth,
        hidden=args.hidden, embed=args.embed, patch=args.patch, dropout=args.dropout,
        modality_dropout=args.modality_dropout)
    models.freeze_encoders(model, [name for name in args.freeze.split(",") if name])
    if not args.modality_dropout:
        for name in facts["complete"]:  # every training row has it, so its stand-in is never used
            model.readouts[name].missing.requires_grad_(False)
    return model


def loss(model, batch, args, facts):
    """SupCon over the rows of all processes.

    Its parts: the bounds of the loss for these labels, the mean cosine of the embeddings, and the
    number of classes in the batch.
    """
    labels = batch["targets"]
    if args.mixup:
        value, z = mixup_loss(model, batch, args)
    else:
        z = finite(model(batch["inputs"], batch["present"], encoded=batch["encoded"]))
        value = losses.supcon_loss(z, labels, temperature=args.temperature)
    z, labels, _ = losses.all_rows(z.detach(), labels)
    lower, collapsed = losses.supcon_bounds(labels, temperature=args.temperature)
    return value, {"bound": lower, "collapsed": collapsed, "cosine": float(losses.mean_cosine(z)),
                   "classes": len(labels.unique())}


def mixup_loss(model, batch, args):
    """Mix the features of every row with another row's; weight the losses for both classes.

        x = lam x_i + (1 - lam) x_j;  loss = lam SupCon(x, y_i) + (1 - lam) SupCon(x, y_j)
    """
    present, labels = batch["present"], batch["targets"]
    draw = torch.distributions.Beta(args.mixup, args.mixup).sample()
    shares, _, _ = losses.all_rows(draw.view(1, 1).to(labels.device), labels[:1])
    lam = float(shares[0, 0])  # all processes share one batch, so they take the lam of the first
    other = torch.randperm(len(labels), device=labels.device)
    tokens = {}
    for name, x in batch["inputs"].items():
        tokens[name] = model.encode_present(name, x, present[name])
    tokens |= batch["encoded"]
    mixed = {name: lam * x + (1 - lam) * x[other] for name, x in tokens.items()}
    both_present = {name: here & here[other] for name, here in present.items()}
    z = finite(model.fuse(mixed, both_present))
    as_first = losses.supcon_loss(z, labels, temperature=args.temperature)
    as_other = losses.supcon_loss(z, labels[other], temperature=args.temperature)
    return lam * as_first + (1 - lam) * as_other, z


def outputs(model, batch, args, facts):
    """The embedding of every row, float (b, embed)."""
    return {"embedding": model(batch["inputs"], batch["present"], encoded=batch["encoded"]).float()}


def scored_batches(labels, args):
    """The stratified batches that the loss is scored in: the same after every epoch."""
    batches = data.stratified_batches(labels, args.batch_size, seed=0, epoch=0)
    return [rows for rows in batches if np.bincount(labels[rows]).max() > 1]


def label_scores(predicted, split, facts):
    """Accuracy, macro F1 and a table by class, for predictions of the network or of a baseline."""
    report = losses.class_report(predicted, split.labels, len(facts["names"]))
    classes = {}
    for name, row in zip(facts["names"], report["classes"]):
        classes[name] = {key: row[key] for key in ("rows", "recall", "f1")}
    return {"accuracy": report["accuracy"], "macro_f1": report["macro_f1"], "classes": classes}


def predicted_classes(outputs, split, args):
    """By k-NN among the embedded training rows; those of a simple model are in its outputs."""
    if "classes" in outputs:
        return outputs["classes"].numpy()
    return losses.knn_predict(outputs["reference"]["embedding"], split.reference.labels,
                              outputs["embedding"], k=args.neighbours)


def headline(outputs, split, args, facts):
    """Accuracy; see Task."""
    return mean_over((predicted_classes(outputs, split, args) == split.labels).astype(float))


def scores(outputs, split, args, facts):
    """k-NN and a linear probe on embedded training rows; SupCon in stratified batches.

    Of a simple model, whose outputs are predicted classes, the scores of these alone.
    """
    if "classes" in outputs:
        return label_scores(predicted_classes(outputs, split, args), split, facts)
    z, reference = outputs["embedding"], outputs["reference"]["embedding"]
    nearest = predicted_classes(outputs, split, args)
    probe = losses.ridge_predict(reference, split.reference.labels, z)
    values = []
    for rows in scored_batches(split.labels, args):
        labels = torch.from_numpy(split.labels[rows])
        value = losses.supcon_loss(z[rows], labels, temperature=args.temperature, gather=False)
        values.append(float(value))
    return {"loss": float(np.mean(values)), **label_scores(nearest, split, facts),
            "probe": float(np.mean(probe == split.labels)), "cosine": float(losses.mean_cosine(z))}


def channel_features(split):
    """{modality: (n, 2 C)} mean and sd of every channel and row; 0 where the row lacks it."""
    parts = {name: [] for name in split.arrays}
    for start in range(0, len(split), split.chunk):
        rows = split.rows[start : start + split.chunk]
        for name in split.arrays:
            x = split.scaled(name, rows)
            x[torch.from_numpy(~split.present[name][rows])] = 0
            if x.ndim == 2:  # a feature is a channel
                x = x[:, None]
            elif x.ndim > 3:
                x = x.movedim(-3, -1).flatten(1, -2)
            statistics = torch.cat([x.mean(1), x.std(1, correction=0)], 1)
            parts[name].append(statistics.cpu())
    return {name: torch.cat(chunks).double().numpy() for name, chunks in parts.items()}


def standardised(train, x, limit=6):
    """Columns of both by mean and sd of training rows, at most 6 sd away; NaN becomes the mean."""
    mean, sd = column_scale(train)
    return [np.nan_to_num((part - mean) / sd).clip(-limit, limit) for part in (train, x)]


def floors(split, args, facts):
    """The majority class, simple models on channel and spectral features, bounds of the loss."""
    bounds = []
    for rows in scored_batches(split.labels, args):
        labels = torch.from_numpy(split.labels[rows])
        bounds.append(losses.supcon_bounds(labels, temperature=args.temperature))
    lower, collapsed = np.mean(bounds, axis=0)
    train, split = split.reference.recorded, split.recorded
    majority = np.full(len(split), np.bincount(train.labels).argmax())
    rows = {"constant majority": {"loss": float(collapsed), **label_scores(majority, split, facts)}}
    fitted, scored = channel_features(train), channel_features(split)
    for features in (fitted, scored):
        features["all"] = np.concatenate(list(features.values()), axis=1)
    for name in fitted:
        predicted = losses.ridge_predict(fitted[name], train.labels, scored[name])
        rows[f"ridge {name}"] = label_scores(predicted, split, facts)
    fitted, scored = standardised(
        np.concatenate([fitted["all"], spectral_features(train)], axis=1),
        np.concatenate([scored["all"], spectral_features(split)], axis=1))
    predicted = losses.ridge_predict(fitted, train.labels, scored, penalty=PENALTY)
    rows["strong: ridge on spectra"] = {"classes": torch.from_numpy(predicted)}
    lda = losses.lda_fit(fitted, train.labels, penalty=PENALTY)
    nearest = losses.knn_predict(losses.linear_scores(lda, fitted), train.labels,
                                 losses.linear_scores(lda, scored), k=args.neighbours)
    rows[f"{args.neighbours}-NN after LDA"] = label_scores(nearest, split, facts)
    rows["ceiling"] = {"loss": float(lower), **label_scores(split.labels, split, facts)}
    return rows


def predictions(batches, split, out, args, facts):
    """An .npz with the embedding of every row."""
    refuse_folder(out)
    embeddings = finite(joined(batches)["embedding"]).numpy()
    with data.atomic_write(out, "wb") as file:
        np.savez(file, embeddings=embeddings)
    return len(embeddings)


def examples(outputs, split, args, facts):
    """The worst row has the fewest of its class among the training rows nearest to it."""
    names, known = np.array(facts["names"]), split.reference.labels
    z, reference = outputs["embedding"], outputs["reference"]["embedding"]
    predicted = predicted_classes(outputs, split, args)
    unit = F.normalize(reference, dim=1)
    nearest = []
    for part in z.split(512):
        cosine = F.normalize(part, dim=1) @ unit.T
        nearest.append(known[cosine.topk(args.neighbours).indices.numpy()])
    share_of_others = (np.concatenate(nearest) != split.labels[:, None]).mean(1)
    return share_of_others, {"true": names[split.labels], "predicted": names[predicted]}


def export(model, args, facts):
    """The network from recorded values to the embedding; k-NN on it gives the class."""
    shapes, scaler = facts["recorded"], scaler_of(facts)

    def forward(inputs):
        scaled, present, tokens = {}, {}, {}
        for name in shapes:
            mean, sd = (broadcast_channels(values, inputs[name]) for values in scaler[name])
            present[name] = inputs[f"present_{name}"]
            scaled[name] = ((inputs[name] - mean) / sd).float()
        if "whitening" in facts:
            sequences = {name: scaled.pop(name) for name in sequences_of(scaled)}
            recorded = {name: inputs[name].float() for name in sequences}
            statistics = summaries(sequences, recorded, present, window_statistics)
            scaled[SPECTRA] = whitened(statistics, facts["whitening"])
            present[SPECTRA] = torch.stack([present.pop(name) for name in sequences]).any(0)
        for name, x in scaled.items():
            # rows that lack the modality are encoded too: in eval mode no row sees another
            tokens[name] = model.encode(name, x)
        return model.fuse(tokens, present)

    arrays, masks = {}, {}
    for name, shape in shapes.items():
        arrays[name] = ("float32", ("rows", *shape),
                        "as recorded, or of another numeric type; anything where it is absent")
        masks[f"present_{name}"] = ("bool", ("rows",), f"whether the row has {name}")
    output = ("embedding", ("rows", args.embed), "of length 1: rows are alike by their cosine")
    return Exported(forward, arrays | masks, output,
                    {"scaler": facts["scaler"], "classes_of_training": facts["names"]})


FLAGS = shared_flags(epochs=16, batch_size=64, plateau_patience=5, train_ratio=0.65, val_ratio=0.15)
FLAGS.update(
    sampler=Flag("even", "even: each row once an epoch, in batches of about equal size; shuffled: "
                 "the same, but the last batch may be small; stratified: as many rows of every "
                 "class in a batch", choices=("even", "shuffled", "stratified")),
    monitor=Flag("last", "last: best.pt is the average after the last epoch; or the validation "
                 "score that picks the epoch, and raw or EMA weights",
                 choices=("accuracy", "macro_f1", "loss", "last")),
    modalities=Flag("", "which ones to use, names with commas between (default: all)"),
    inputs=Flag("spectra", "what the network sees of the sequences: spectra, statistics and band "
                "energies of all of them, whitened within the classes; waveform, the samples",
                choices=("spectra", "waveform")),
    temperature=Flag(0.1, "of SupCon", above=0),
    neighbours=Flag(25, "k of the k-NN that scores", low=1),
    width=Flag(64, "of a token, a multiple of --heads and of 4", low=4),
    tokens=Flag(4, "fusion tokens", low=1),
    heads=Flag(8, "attention heads", low=1),
    depth=Flag(1, "transformer layers of the encoder of a sequence or video", low=0),
    hidden=Flag(128, "width between fusion and embedding", low=1),
    embed=Flag(64, "width of the embedding", low=1),
    patch=Flag(16, "steps of a sequence that make a token", low=1,
               when={"inputs": ("waveform",)}),
    dropout=Flag(0.2, "in transformer layers, attention and head", low=0, high=0.95),
    modality_dropout=Flag(0.0, "probability that a modality of a row is left out in training, "
                          "never its last", low=0, high=0.95),
    freeze=Flag("", "encoders that are not trained, names with commas between: in eval mode, run "
                "once on rows that are not augmented"),
    noise=Flag(0.3, "sd of noise added in training, the sd of a channel being 1", low=0),
    spectra_noise=Flag(1.0, "the same for the spectra", low=0, when={"inputs": ("spectra",)}),
    scale=Flag(0.4, "multiply a modality of a row by up to 1 +- this", low=0, high=0.99),
    shift=Flag(64, "roll sequences by up to so many steps", low=0, high=10**6,
               when={"inputs": ("waveform",)}),
    mixup=Flag(0.0, "alpha of mixup of the encoded features (0 = off)", low=0),
    allow_single_class=Flag(False, "train although there is one class, to see the loss stand at "
                            "its bound"),
)

# The recipe as its team ran it, and their later settings. Their data are not public: 12 classes, of
# which training saw one.
ORIGINAL = dict(
    inputs="waveform", sampler="stratified", monitor="accuracy", neighbours=5,
    width=512, tokens=4, heads=8, hidden=1024, embed=512, patch=8, dropout=0.1,
    modality_dropout=0.0, epochs=100, batch_size=32, clip=1.0, temperature=0.07, lr=1e-4,
    warmup_epochs=10.0, warmup_start_lr=1e-7, min_lr=1e-6, weight_decay=1e-4, ema_decay=0.0,
    noise=0.0, scale=0.0, shift=0)
LATER = ORIGINAL | dict(lr=5e-5, weight_decay=1e-2, warmup_epochs=5.0, warmup_start_lr=1e-6,
                        temperature=0.1, clip=0.5, mixup=0.2)

TASK = Task(
    flags=FLAGS, variants={"original": ORIGINAL, "later": LATER},
    load=load, rows=rows, network=network, loss=loss, outputs=outputs, scores=scores, floors=floors,
    headline=headline, predictions=predictions, examples=examples, export=export, reference=True)
