"""Which faults does a run's diagnosis find, and does it keep quiet where there is none?

    $ export OMP_NUM_THREADS=1
    $ python benchmarks/faults.py --data ../shared/data              # all: 25 minutes on one core
    $ python benchmarks/faults.py --data ../shared/data ema overfit  # names that hold a word
    $ python benchmarks/faults.py --quick                            # five in seconds, drawn data

Each fault is put into a short run of train.py on real data, of the task where it belongs: by flags
where flags can do it, else by replacing one function with a wrong one, as the original teams had
it. Then diagnosis.json of the run is read. Five healthy runs follow, one per task. A further
finding beside the injected one is printed and is no false alarm, since a fault has consequences. A
finding in a healthy run is one, but for beaten-by-simple-model: that is no fault of the run, it is
what these short recipes are worth.

--data is a folder with eyes_cew, celebamask_mini, bidmc_csv, motionsense and physionet2012 in it.
"""

import contextlib
import functools
import io
import json
import os
import sys
import tempfile
import time
import unittest.mock
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from _drawn import write_eyes, write_faces, write_modalities, write_recordings, write_stays
from _quick import new_parser, parse

import ema
import models
import schedulers
import train
from runtime import diagnosis
from tasks import bidmc, ocec, quadmodal

DATA = {"ocec": "eyes_cew", "faceparse": "celebamask_mini", "bidmc_rr": "bidmc_csv",
        "quadmodal": "motionsense/motionsense_18_subjects.npz", "seqsetvae": "physionet2012"}
SPLIT = " --train-ratio 0.3 --val-ratio 0.2 --test-ratio 0.5"
EYES = ("--task ocec --size 24x24 --inputs images --block baseline --channels 16 --blocks 2 "
        "--epochs 6 --lr 1e-3 --batch-size 32 --weight-decay 0.01 --ema-decay 0.998 --monitor f1 "
        "--photometric 0.5 --clahe 0.01 --crop 4 --mixup 0.2 --degrees 0 --zoom 1 --bend 0 "
        "--noise 0") + SPLIT
FEW_LEARNT = EYES + (
    " --train-ratio 0.01 --test-ratio 0.79 --channels 32 --blocks 4 --epochs 60 --lr 3e-3 "
    "--weight-decay 0 --dropout 0 --flip 0 --photometric 0 --clahe 0 --crop 0 --mixup 0")
FEW_CHECKED = EYES + " --val-ratio 0.005 --test-ratio 0.695"
FACES = ("--task faceparse --lr 4e-3 --size 64 --epochs 8 "
         "--train-ratio 0.4 --val-ratio 0.1 --test-ratio 0.5")
BREATHS = "--task bidmc_rr --lr 1e-3"
MOTION = "--task quadmodal --lr 1e-3 --epochs 4"
STAYS = ("--task seqsetvae --width 32 --hidden 64 --epochs 4 "
         "--train-ratio 0.25 --val-ratio 0.1 --test-ratio 0.65")
PRETRAINED = BREATHS + " --mode pretrain --epochs 1"


def replaced(where, name, make):
    """A patch: the function `name` of a module or class becomes make(the function)."""
    return unittest.mock.patch.object(where, name, make(getattr(where, name)))


def shuffled_labels(read):
    def wrong(*args, **options):
        images, labels, groups, names = read(*args, **options)
        return images, np.random.default_rng(0).permutation(labels), groups, names
    return wrong


def few_closed(read):
    """All open eyes, and of the closed ones every fortieth."""
    def wrong(*args, **options):
        images, labels, groups, names = read(*args, **options)
        is_open, closed = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
        rows = np.sort(np.concatenate([is_open, closed[::40]]))
        return images[torch.from_numpy(rows)], labels[rows], groups[rows], [names[i] for i in rows]
    return wrong


def zeros_read(prepare):
    return lambda windows, args: torch.zeros_like(prepare(windows, args))


def rows_not_groups(split_rows):
    return lambda n, args, groups: split_rows(n, args)


def sorted_by_class(plan):
    """Batches of rows as they lie in a file sorted by class."""
    def wrong(split, epoch, args, *processes):
        batches = []
        for label in np.unique(split.labels):
            rows = np.flatnonzero(split.labels == label)
            batches += np.array_split(rows, max(1, len(rows) // args.batch_size))
        return [batches[i] for i in np.random.default_rng(epoch).permutation(len(batches))]
    return wrong


def unchecked(check):
    return lambda *_: None


def of_a_copy(optimizer):
    """The optimizer is built before the network is copied: it trains tensors that nothing reads."""
    def wrong(groups, **options):
        for group in groups:
            group["params"] = [p.detach().clone().requires_grad_() for p in group["params"]]
        return optimizer(groups, **options)
    return wrong


def bias_clamped_to_zero(forward):
    """The sign turned and a clamp at 0, as in the original: 0 throughout, with a gradient of 0."""
    def wrong(self, minutes):
        bias = forward(self, minutes)
        hidden = torch.isinf(bias)  # the mask of the future is part of the bias
        return (-bias).masked_fill(hidden, 0).clamp(max=0.0).masked_fill(hidden, -torch.inf)
    return wrong


def no_update(update):
    return lambda self, model, **options: None


def without_warm_up(ema_class):
    return functools.partial(ema_class, warmup=False)


def all_in_train_mode(train_mode):
    return lambda model: model.train()


def far_too_high_later(lr_at):
    """From the middle of the run on the weights are thrown away."""
    def wrong(self, step):
        return lr_at(self, step) if 2 * step < self.settings["total_steps"] else 30
    return wrong


# the batches of training, and those that are counted before it
SORTED = [(train, "plan_batches", sorted_by_class), (diagnosis, "plan_batches", sorted_by_class),
          (quadmodal, "check_training_rows", unchecked)]
FAULTS = {  # name -> (flags, patches, how it came about)
    "frozen-model": (EYES, [(torch.optim, "AdamW", of_a_copy)],
                     "the optimizer holds copies of the parameters"),
    "leak-across-split": (EYES, [(ocec, "split_rows", rows_not_groups)],
                          "a random split of crops: both eyes of a face on both sides"),
    "single-class-batches": (MOTION, SORTED,
                             "a loader that reads a file sorted by class, and no refusal of it"),
    "loss-at-bound": (MOTION, SORTED, "the same: SupCon of one class is ln(B - 1) at best"),
    "lr-too-large": (EYES + " --lr 1 --clip 0 --warmup-epochs 0", [], "--lr 1"),
    "lr-too-small": (EYES + " --lr 1e-8 --warmup-start-lr 0 --min-lr 0", [], "--lr 1e-8"),
    "no-gradient": (STAYS + " --epochs 1", [(models.TimeBias, "forward", bias_clamped_to_zero)],
                    "a sign and a clamp in the time bias"),
    "backbone-in-train-mode": (BREATHS + " --mode partial --epochs 2 --pretrained PRETRAINED",
                               [(models, "train_mode", all_in_train_mode)],
                               "model.train() after freezing"),
    "constant-prediction": (BREATHS + " --epochs 4", [(bidmc, "network_inputs", zeros_read)],
                            "a channel that is read as zeros"),
    "score-at-floor": (EYES, [(ocec, "read_eyes", shuffled_labels)],
                       "labels that slid apart from their images"),
    "ema-not-moving": (EYES, [(ema.EMA, "update", no_update)],
                       "the update sits in a branch that never runs"),
    "ema-horizon-too-long": (EYES + " --ema-decay 0.9999", [(ema, "EMA", without_warm_up)],
                             "0.9999 without warm-up"),
    "label-quantised": (BREATHS + " --variant original --epochs 2", [],
                        "breaths counted in 10 s: steps of 6 per minute"),
    "imbalance": (EYES + " --sampler shuffled", [(ocec, "read_eyes", few_closed)],
                  "97 % of the eyes are open"),
    "schedule-outlasts-run": (FACES + " --epochs 2 --cosine-epochs 300", [],
                              "a cosine of 300 epochs, stopped early"),
    "plateau-too-eager": (FEW_CHECKED + " --schedule plateau --plateau-factor 0.1 "
                          "--plateau-patience 0 --lr 3e-2 --epochs 16", [],
                          "--plateau-patience 0 --plateau-factor 0.1, 24 validation eyes"),
    "monitor-mismatch": (FEW_LEARNT + " --monitor loss", [],
                         "the loss picks the epoch, F1 is reported"),
    "overfit": (FEW_LEARNT, [], "48 eyes, no augmentation, no dropout"),
    "lucky-best": (EYES + " --epochs 24 --monitor auroc --clip 0 --ema-decay 0",
                   [(schedulers.WarmupCosine, "lr_at", far_too_high_later)],
                   "after half of the run the rate is 30"),
}
HEALTHY = {"ocec": "--task ocec" + SPLIT, "faceparse": FACES, "bidmc_rr": BREATHS + " --epochs 20",
           "quadmodal": MOTION, "seqsetvae": STAYS}


QUICK = {  # one fault for each task that a tiny run on drawn data shows -> flags that make it tiny
    "ema-not-moving": "--epochs 2",
    "schedule-outlasts-run": "--size 32 --width 4",
    "label-quantised": "--width 16 --depth 1 --epochs 1",
    "single-class-batches": "--width 8 --heads 2 --tokens 2 --hidden 16 --embed 8 --epochs 1",
    "no-gradient": "--width 16 --heads 2 --anchor none",
}
QUICK_HEALTHY = {"ocec": "--epochs 2"}  # too short for the rules that need luck


def run(words, patches, path, out):
    """The names of a run's findings, its evidence, and the seconds it took."""
    words = words.replace("PRETRAINED", str(out.parent / "pretrained")).split()
    words += ["--data", str(path), "--out", str(out)]
    if words[1] != "quadmodal":  # it reads one .npz, and refuses a cache
        words += ["--cache", str(out.parent / "cache")]
    log, start = io.StringIO(), time.perf_counter()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(log))
        stack.enter_context(contextlib.redirect_stderr(log))
        for where, name, make in patches:
            stack.enter_context(replaced(where, name, make))
        code = train.main(words)
    if code not in (0, 1) or not (out / "diagnosis.json").is_file():
        raise SystemExit(f"{' '.join(words)} ended with {code}:\n{log.getvalue()[-2000:]}")
    findings = json.loads((out / "diagnosis.json").read_text())["findings"]
    evidence = {finding["name"]: finding["evidence"] for finding in findings}
    return evidence, time.perf_counter() - start


def search(faults, healthy, data_of, folder):
    """Every fault in a run of its own, then the healthy runs; True if one is missed or alarms."""
    found, alarms = 0, 0
    if "backbone-in-train-mode" in faults:
        run(PRETRAINED, [], data_of["bidmc_rr"], folder / "pretrained")
    for name, (words, patches, cause) in faults.items():
        task = words.split()[1]
        findings, seconds = run(words, patches, data_of[task], folder / name)
        found += name in findings
        print(f"{'found ' if name in findings else 'MISSED'} {name} ({task}, {seconds:.0f} s): "
              f"{cause}\n       {findings.get(name, 'no such finding')}", flush=True)
        others = [other for other in findings if other != name]
        if others:
            print(f"       also {', '.join(others)}", flush=True)
    for task, words in healthy.items():
        findings, seconds = run(words, [], data_of[task], folder / f"healthy-{task}")
        faults_seen = findings.keys() - {"beaten-by-simple-model"}
        alarms += len(faults_seen)
        verdict = "FALSE ALARM" if faults_seen else "no fault found"
        print(f"healthy {task} ({seconds:.0f} s): {verdict}", flush=True)
        for name, evidence in findings.items():
            print(f"       {name}: {evidence}", flush=True)
    print(f"{found} of {len(faults)} faults found, "
          f"{alarms} false alarms in {len(healthy)} healthy runs")
    return found < len(faults) or alarms > 0


def check_all():
    """train.py takes the flags of every run, and has what every fault replaces."""
    for words in HEALTHY.values():
        train.parse_args(words.split())
    for words, patches, _ in FAULTS.values():
        train.parse_args(words.split())
        for where, name, _ in patches:
            getattr(where, name)


def tiny(folder):
    """What `search` needs for the runs of --quick."""
    data_of = {"ocec": folder / "eyes.npz", "faceparse": folder / "faces.npz",
               "bidmc_rr": folder / "bidmc", "quadmodal": folder / "modalities.npz",
               "seqsetvae": folder / "stays"}
    write_eyes(data_of["ocec"])
    write_faces(data_of["faceparse"])
    write_recordings(data_of["bidmc_rr"], 53, 30)  # the original split names all 53
    write_modalities(data_of["quadmodal"])
    write_stays(data_of["seqsetvae"])
    faults = {}
    for name, flags in QUICK.items():
        words, patches, cause = FAULTS[name]
        faults[name] = (f"{words} {flags}", patches, cause)
    healthy = {task: f"{HEALTHY[task]} {flags}" for task, flags in QUICK_HEALTHY.items()}
    return faults, healthy, data_of


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--data", type=Path, help="folder of the five sets; needed without --quick")
    parser.add_argument("words", nargs="*", help="only faults and tasks whose name holds a word")
    args = parse(parser)
    if bool(args.data) == args.quick:
        parser.error("give either --data, the folder of the five sets, or --quick")

    def chosen(table):
        return {name: table[name] for name in table
                if not args.words or any(word in name for word in args.words)}

    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {os.cpu_count()} cores",
          flush=True)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if args.quick:
            check_all()
            faults, healthy, data_of = tiny(folder)
        else:
            faults, healthy = FAULTS, HEALTHY
            data_of = {task: args.data / name for task, name in DATA.items()}
        return search(chosen(faults), chosen(healthy), data_of, folder)


if __name__ == "__main__":
    sys.exit(main())
