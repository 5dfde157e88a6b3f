"""Do two commits train to the same bits? For a refactoring that must change nothing.

    $ python benchmarks/golden.py HEAD~3 HEAD           # all commands, 5 minutes on 2 busy cores
    $ python benchmarks/golden.py main . ocec two       # those whose name holds a word; . is the
                                                        # working tree as it is
    $ python benchmarks/golden.py --quick               # HEAD against itself, two commands

Ten tiny runs of train.py on the CPU with one thread: every task, pretraining of both kinds with
training from it, plateau with accumulation and early stopping, two processes. Each runs on both
commits at the same time, in temporary worktrees. What they read is drawn by the commit itself, but
for faces and what is predicted: this script draws those, from a seed.

Compared, bit for bit:
    tensors  of best.pt and last.pt: weights, their average, the optimizer's state. Each must be at
             the same place of the checkpoint. Where NEW has no such place, it may be at any place
             that OLD does not have ("moved").
    scores   all numbers and words of log.jsonl and scores.json, but for times. What only one commit
             has is listed, and counts as a difference if OLD has it and it is in MAIN.
    files    that --predict wrote.
Settings, facts and counters in a checkpoint are not compared, but for what they do.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
SIDES = ("OLD", "NEW")
QUICK = ("faceparse", "plateau")

EYES = "train.py --task ocec --size 12x20 --channels 8 --blocks 2 --epochs 2 --monitor f1"
BREATHS = "--seconds 10 --stride 16 --bins 16 --width 16 --depth 2 --batch-size 64 --epochs 2"
STAYS = "train.py --task seqsetvae --width 16 --heads 2 --depth 2 --hidden 16 --points 4"
STAYS += " --train-ratio 0.2 --val-ratio 0.2 --test-ratio 0.6 --epochs 2"
TORCHRUN = "-m torch.distributed.run --nproc-per-node 2 --rdzv-backend c10d"
TORCHRUN += " --rdzv-endpoint localhost:0 "
COMMANDS = {  # name -> what is run one after the other; DATA and OUT are folders
    "ocec": [f"{EYES} --batch-size 64 --clahe 0.3 --cutmix 0.2 --sampler stratified --out OUT/run",
             "train.py --task ocec --predict OUT/run/best.pt --data DATA/eyes.npz"
             " --out OUT/predicted.csv"],
    "faceparse": ["train.py --task faceparse --data DATA/faces.npz --size 32 --width 4 --epochs 3"
                  " --train-ratio 0.5 --val-ratio 0.2 --test-ratio 0.3 --photometric 0.5"
                  " --mixup 0.2 --class-weights median --out OUT/run",
                  "train.py --task faceparse --predict OUT/run/best.pt --data DATA/faces.npz --tta"
                  " --out OUT/predicted"],
    "bidmc_rr": [f"train.py --task bidmc_rr {BREATHS} --out OUT/run"],
    "bidmc_hr": [f"train.py --task bidmc_hr {BREATHS} --loss mse --schedule restarts"
                 " --restart-epochs 1 --restart-mult 1 --out OUT/run"],
    "quadmodal": ["train.py --task quadmodal --width 8 --heads 2 --tokens 2 --hidden 16 --embed 8"
                  " --epochs 2 --mixup 0.3 --modality-dropout 0.3 --schedule cyclic --out OUT/run"],
    "seqsetvae": [f"{STAYS} --loss focal --out OUT/run"],
    "pretrain_bidmc": [f"train.py --task bidmc_rr --mode pretrain {BREATHS} --out OUT/encoder",
                       f"train.py --task bidmc_rr --mode partial {BREATHS} --out OUT/run"
                       " --pretrained OUT/encoder/best.pt"],
    "pretrain_stays": [f"{STAYS} --mode pretrain --out OUT/encoder",
                       f"{STAYS} --mode probe --pretrained OUT/encoder/best.pt --out OUT/run"],
    "plateau": [f"{EYES} --train-ratio 0.2 --val-ratio 0.1 --test-ratio 0.7 --batch-size 12"
                " --accumulate 3 --schedule plateau --plateau-patience 0 --patience 2 --epochs 8"
                " --lr 3e-2 --block convnext --token-grid 2x2 --loss focal --out OUT/run"],
    "two_processes": [f"{TORCHRUN} {EYES} --block inverted_se --accumulate 2 --out OUT/run"],
}

TIMES = re.compile("seconds|minutes|per_s$|memory")
MAIN = {"epoch", "step", "train_loss", "lr_end", "score", "weights", "raw", "ema", "model"}

Outputs = namedtuple("Outputs", "tensors scores files")  # each a dict from name to content


def write_data(folder):
    """Faces with blocks of every class in its own colour, and eyes that are noise."""
    rng = np.random.default_rng(0)
    masks = rng.integers(0, 19, (30, 4, 4)).repeat(12, axis=1).repeat(12, axis=2)
    colours = rng.integers(0, 256, (19, 3))
    faces = np.clip(colours[masks] + rng.normal(0, 20, (*masks.shape, 3)), 0, 255)
    np.savez(folder / "faces.npz", images=faces.astype(np.uint8), masks=masks.astype(np.uint8))
    eyes = rng.integers(0, 256, (40, 12, 20, 3)).astype(np.uint8)
    np.savez(folder / "eyes.npz", images=eyes, labels=np.arange(40) % 2)


def git(*words):
    """What git prints; None if it refuses."""
    done = subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True)
    return None if done.returncode else done.stdout.strip()


def stop(processes):
    """End what still runs: each is the leader of a group, so torchrun's processes end as well."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, number)
        for process in processes:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                pass  # the next signal ends it


def run(command, trees, data, folders):
    """The command on both sides at once: seconds of both, and what went wrong in words, or ""."""
    processes, seconds, start = [], [0.0, 0.0], time.perf_counter()
    try:
        for tree, folder in zip(trees, folders):
            words = [word.replace("DATA", str(data)).replace("OUT", str(folder))
                     for word in command.split()]
            with open(folder / "printed.txt", "w") as file:
                processes.append(subprocess.Popen(
                    [sys.executable, *words, "--device", "cpu"], cwd=tree,
                    env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=file,
                    stderr=subprocess.STDOUT, start_new_session=True))
        while not all(seconds):
            time.sleep(0.02)
            for i, process in enumerate(processes):
                if not seconds[i] and process.poll() is not None:
                    seconds[i] = time.perf_counter() - start
    finally:
        stop(processes)
    faults = []
    for side, process, folder in zip(SIDES, processes, folders):
        if process.returncode:
            lines = (folder / "printed.txt").read_text().splitlines() or ["nothing was printed"]
            errors = [line for line in lines if "rror: " in line]  # torchrun prints more behind it
            faults.append(f"{side} ends with {process.returncode}: {(errors or lines[-1:])[0]}")
    return seconds, "; ".join(faults)


def leaves(value, name):
    """(name, content) of everything in nested dicts and lists."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{name}/{key}")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from leaves(item, f"{name}/{i}")
    else:
        yield name, value


def outputs(folder):
    """What is compared of all that the commands of one name wrote."""
    tensors, scores, files = {}, {}, {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".pt":
            content = torch.load(path, map_location="cpu", weights_only=True)
            tensors.update(leaf for leaf in leaves(content, name) if torch.is_tensor(leaf[1]))
        elif path.name == "log.jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            scores[f"{name}/rows"] = len(rows)
            for row in rows:
                scores.update(leaves(row, f"{name}:{row['epoch']}"))
        elif path.name == "scores.json":
            scores.update(leaves(json.loads(path.read_text()), name))
        elif name.startswith("predicted") and path.is_file():
            files[name] = path.read_bytes()
    untimed = {name: value for name, value in scores.items() if not TIMES.search(name)}
    return Outputs(tensors, untimed, files)


def bits(tensor):
    """Equal for two tensors if type, shape and every bit are, NaN and the sign of 0 included."""
    flat = tensor.detach().contiguous().reshape(-1)
    return str(tensor.dtype), tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes()


def rename_moved(old, new):
    """Give a tensor that has another place in NEW its place in OLD; how many there are."""
    places = {}
    for name in sorted(new.keys() - old.keys()):
        places.setdefault(bits(new[name]), []).append(name)
    moved = 0
    for name in sorted(old.keys() - new.keys()):
        candidates = places.get(bits(old[name]))
        if candidates:
            new[name] = new.pop(candidates.pop(0))
            moved += 1
    return moved


def same(old, new):
    if torch.is_tensor(old):
        return bits(old) == bits(new)
    undefined = [value is None or value != value for value in (old, new)]  # NaN is null in JSON
    return old == new or all(undefined)


def distance(old, new):
    """The largest difference, in words."""
    if torch.is_tensor(old):
        if bits(old)[:2] != bits(new)[:2]:
            return f"is {bits(old)[:2]} and {bits(new)[:2]}"
        return f"differs by up to {(old.double() - new.double()).abs().max().item():.3g}"
    if isinstance(old, (int, float)) and isinstance(new, (int, float)):
        return f"differs by {abs(old - new):.3g} ({old} and {new})"
    return "differs" if isinstance(old, bytes) else f"is {old} and {new}"


def compare(old, new, kind):
    """One kind of outputs of both sides: (number compared, differences, remarks)."""
    both = [name for name in old if name in new]
    differences, remarks = [], []
    for name in both:
        if not same(old[name], new[name]):
            differences.append(f"{name} {distance(old[name], new[name])}")
    for side, here, there in (("OLD", old, new), ("NEW", new, old)):
        names = [name for name in here if name not in there]
        if names:
            keys = sorted({name.split("/")[-1] for name in names})
            remarks.append(f"{len(names)} {kind} only in {side}: {', '.join(keys[:8])}")
    for name in old:
        if name not in new and (kind != "scores" or MAIN & set(name.split("/"))):
            differences.append(f"{name} is missing in NEW")
    return len(both), differences, remarks


def compare_outputs(old, new, predicts):
    """(what was compared, the first difference or "", remarks)."""
    moved = rename_moved(old.tensors, new.tensors)
    compared, found, first = [], [], ""
    remarks = [f"{moved} tensors have moved in the checkpoint"] if moved else []
    for kind in ("scores", "tensors", "files"):  # the log first: it tells the epoch
        count, differences, notes = compare(getattr(old, kind), getattr(new, kind), kind)
        if not count and (kind != "files" or predicts):
            differences.append(f"no {kind} to compare")
        if count:
            compared.append(f"{count} {kind}")
        if differences:
            first = first or differences[0]
            found.append(f"{len(differences)} {kind}")
        remarks += notes
    compared.append(f"{sum(name.endswith('/train_loss') for name in old.scores)} epochs")
    if found:
        first += f"; in all {', '.join(found)}"
    return ", ".join(compared), first, remarks


def check(name, trees, data, folder):
    """Run the commands of a name on both sides, print a row of the table; whether all is equal."""
    folders = [folder / name / side for side in SIDES]
    total, fault = [0.0, 0.0], ""
    for side in folders:
        side.mkdir(parents=True)
    for command in COMMANDS[name]:
        seconds, fault = run(command, trees, data, folders)
        total = [total[0] + seconds[0], total[1] + seconds[1]]
        if fault:
            break
    compared, difference, remarks = "nothing", fault, []
    if not fault:
        predicts = any("--predict" in command for command in COMMANDS[name])
        old, new = outputs(folders[0]), outputs(folders[1])
        compared, difference, remarks = compare_outputs(old, new, predicts)
    result = f"DIFFERENT: {difference}" if difference else "equal"
    print(f"{name:<15} {total[0]:6.1f} {total[1]:6.1f}   {compared:<46} {result}", flush=True)
    for remark in remarks:
        print(f"{'':<15} {remark}", flush=True)
    return not difference


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", nargs="?", default="HEAD", help="a commit, or . (default: HEAD)")
    parser.add_argument("new", nargs="?", default="HEAD", help="a commit, or . (default: HEAD)")
    parser.add_argument("words", nargs="*", help="only commands whose name holds one of these")
    parser.add_argument("--quick", action="store_true", help=f"only {' and '.join(QUICK)}")
    parser.add_argument("--keep", type=Path, help="new folder for the outputs, kept at the end")
    args = parser.parse_intermixed_args()  # words may stand behind a flag
    args.names = [name for name in COMMANDS if not args.quick or name in QUICK]
    if args.words:
        args.names = [name for name in args.names if any(word in name for word in args.words)]
    if not args.names:
        parser.error(f"no command holds {' or '.join(args.words)}: {', '.join(COMMANDS)}")
    if args.keep and args.keep.exists():
        parser.error(f"--keep {args.keep} exists: choose a new folder")
    if not shutil.which("git") or git("rev-parse", "--show-toplevel") != str(ROOT):
        parser.error(f"{ROOT} is not a git repository, or there is no git: clone the project")
    for commit in (args.old, args.new):
        if commit != "." and git("rev-parse", "--verify", f"{commit}^{{commit}}") is None:
            parser.error(f"{commit} is not a commit of {ROOT}: see git log, or git fetch it")
    return args


def interrupt(*_):
    raise KeyboardInterrupt


def main():
    args = parse_args()
    signal.signal(signal.SIGTERM, interrupt)  # cleans up as after Ctrl-C
    start, trees = time.perf_counter(), []
    print(f"{args.old} against {args.new}, torch {torch.__version__}\n"
          f"{'name':<15} {'OLD s':>6} {'NEW s':>6}   {'compared':<46} result", flush=True)
    with tempfile.TemporaryDirectory(prefix="golden-") as temporary:
        temporary = Path(temporary).resolve()
        try:
            for side, commit in zip(SIDES, (args.old, args.new)):
                trees.append(ROOT if commit == "." else temporary / side)
                if commit != "." and git("worktree", "add", "--detach", trees[-1], commit) is None:
                    raise SystemExit(f"git worktree add --detach {trees[-1]} {commit} has failed")
            data = temporary / "data"
            data.mkdir()
            write_data(data)
            folder = args.keep.resolve() if args.keep else temporary / "outputs"
            equal = sum(check(name, trees, data, folder) for name in args.names)
        except KeyboardInterrupt:
            return 130
        finally:
            for tree in trees:
                if tree != ROOT:
                    git("worktree", "remove", "--force", tree)
    print(f"{time.perf_counter() - start:.0f} seconds\n"
          f"{equal} equal, {len(args.names) - equal} different")
    return equal < len(args.names)


if __name__ == "__main__":
    sys.exit(main())
