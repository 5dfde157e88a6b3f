"""Does everything run on a GPU as on a CPU? A check of ten minutes on drawn data.

    $ python benchmarks/cuda_check.py                # the first GPU; runs of the tasks' own size
    $ python benchmarks/cuda_check.py --device cpu   # the same in small: the script itself works
    $ python benchmarks/cuda_check.py --quick        # a few rows in small; without a GPU on the CPU

A row is one check; most of them call train.py as a user does. The end of the output of a failed row
is printed below the table. Exit code 1: a row failed; 2: there is no GPU. TF32 is on, as in torch,
except where two devices are compared.

Last result, --device cpu, torch 2.13.0+cpu: 34 passed, 0 failed, 0 skipped, in 4.7 minutes of
processor time. It has not been run on a GPU yet.
"""

import argparse
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from pathlib import Path

import numpy as np
import torch

from _quick import ROOT
import losses
from tasks import bidmc_data, faceparse, ocec, quadmodal

FEW = "--train-ratio 0.2 --val-ratio 0.1 --test-ratio 0.7"
KINDS = {  # name: (flags of a run, flags that make it small)
    "ocec": ("--task ocec", "--channels 8 --blocks 2"),
    "faceparse": ("--task faceparse", "--size 32 --width 4"),
    "faceparse segformer": ("--task faceparse --network segformer", f"--size 32 {FEW}"),
    "bidmc_rr": ("--task bidmc_rr", "--width 16 --stride 64"),
    "bidmc_rr pretrain": ("--task bidmc_rr --mode pretrain", "--width 16 --stride 64"),
    "bidmc_hr": ("--task bidmc_hr", "--width 16 --stride 64"),
    "quadmodal": ("--task quadmodal", "--width 16"),
    "seqsetvae": ("--task seqsetvae", f"--width 16 --heads 2 {FEW}"),
    "seqsetvae pretrain": ("--task seqsetvae --mode pretrain", f"--width 16 --heads 2 {FEW}"),
}
TASKS = ("ocec", "faceparse", "bidmc_rr", "bidmc_hr", "quadmodal", "seqsetvae")
QUICK = ("ocec float32", "ocec predictions", "ocec export", "SupCon", "CE + Dice")
LOSS_BOUND = 0.1  # how far the training loss may be from that in float32, relative to it
BOUND = 1e-2  # how far predictions may be apart, relative to their range, or share of the pixels
# train.py without TF32, and with sums in one order: a GPU repeats them bit for bit
EXACT = """import sys, torch, train
from runtime import processes
torch.backends.cudnn.allow_tf32 = False
torch.use_deterministic_algorithms(True, warn_only=True)
processes.leave(train.main())"""
# train.py, and the largest memory that it took
MEASURED = """import resource, torch, train
from runtime import processes
code, peak = train.main(), 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print("peak", torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else peak)
processes.leave(code)"""


class Skipped(Exception):
    """The check cannot be made here; the message says why."""


class Failed(Exception):
    """The check has failed; `output` is the output of train.py."""

    def __init__(self, message, output=""):
        super().__init__(message)
        self.output = output


class Setting:
    """Settings of all rows: the device, whether the runs are small, the folder for their files."""

    def __init__(self, device, small, folder):
        self.device, self.small, self.folder = device, small, folder
        self.on_gpu = device == "cuda"

    def words(self, kind, out, epochs=1):
        """The command line of a short run of a kind, without the call itself."""
        flags, small = KINDS[kind]
        words = flags.split() + ["--epochs", epochs, "--device", self.device, "--out", out]
        return words + small.split() if self.small else words

    def start(self, words, call=("train.py",), **environment):
        """Start train.py in its own process; returns the file of its output and the process."""
        log = self.folder / "output.txt"
        environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # EXACT needs it
        with open(log, "w") as file:
            print("train.py", *words, file=file, flush=True)
            command = [sys.executable, *call, *map(str, words)]
            return log, subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                                         env=os.environ | environment)

    def run(self, words, call=("train.py",), **environment):
        """The output of train.py; raises Failed unless it ends well within 15 minutes."""
        log, process = self.start(words, call, **environment)
        try:
            code = process.wait(timeout=900)
        except subprocess.TimeoutExpired:
            process.kill()
            code = "none within 900 s"
        if code:
            raise Failed(f"exit code {code}", log.read_text())
        return log.read_text()


def last_epoch(folder):
    return json.loads((folder / "log.jsonl").read_text().splitlines()[-1])


def train_row(setting, kind, name, *more, call=("train.py",)):
    """A short epoch; its loss must be finite, and near that of the float32 run if there is one."""
    out, reference = setting.folder / f"{kind} {name}", setting.folder / f"{kind} float32"
    output = setting.run([*setting.words(kind, out), *more], call)
    row = last_epoch(out)
    text = f"train loss {row['train_loss']:.4f}, {row['rows_per_s']:,.0f} rows/s"
    if row["skipped_steps"]:
        text += f", {row['skipped_steps']} steps skipped"
    if f"| {setting.device}, amp" not in output or row["raw"]["loss"] is None:
        raise Failed(f"{text}: not on {setting.device}, or not finite", output)
    if out != reference and (reference / "log.jsonl").is_file():
        change = row["train_loss"] / last_epoch(reference)["train_loss"] - 1
        text += f", {100 * change:+.2f} % of float32"
        if abs(change) > LOSS_BOUND:
            raise Failed(f"{text}, beyond {100 * LOSS_BOUND:.0f} %", output)
    return text


def compile_row(setting):
    if not any(map(shutil.which, ("g++", "gcc", "clang", "cc"))):
        raise Skipped("torch.compile needs a C compiler, and none is installed")
    return train_row(setting, "ocec", "compiled", "--compile")


def processes_row(setting, kind):
    if setting.on_gpu and torch.cuda.device_count() < 2:
        raise Skipped("this takes two GPUs, and there is one")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    return train_row(setting, kind, "in two processes", call=torchrun)


def resume_row(setting, epochs=4):
    """Kill a run in its second epoch and resume it: the weights must equal an unbroken run's."""
    whole, killed = setting.folder / "whole", setting.folder / "killed"
    setting.run(setting.words("ocec", whole, epochs), call=["-c", EXACT])
    log, process = setting.start(setting.words("ocec", killed, epochs), call=["-c", EXACT])
    while process.poll() is None and not (killed / "best.pt").exists():
        time.sleep(0.01)
    process.kill()
    if process.wait() != -signal.SIGKILL:
        raise Failed("the run ended before it was killed", log.read_text())
    words = ["--task", "ocec", "--out", killed, "--resume", "--device", setting.device]
    setting.run(words, call=["-c", EXACT])
    load = functools.partial(torch.load, map_location="cpu", weights_only=True)
    unbroken, resumed = load(whole / "last.pt")["model"], load(killed / "last.pt")["model"]
    apart = max(float((unbroken[name] - resumed[name]).abs().max()) for name in unbroken)
    if not apart <= (1e-3 if setting.on_gpu else 0):
        raise Failed(f"after --resume a weight is off by {apart:.1e}")
    return "the same bit for bit" if apart == 0 else f"no weight is off by more than {apart:.1e}"


def write_inputs(setting, task):
    """Rows that no run has seen, as --predict reads them; their file or folder."""
    path, arrays = setting.folder / f"{task} inputs", {}
    if task == "ocec":
        arrays["images"] = ocec.synthetic_eyes(64, size=(24, 24), seed=1)[0].permute(0, 2, 3, 1)
    elif task == "faceparse":
        size = (32, 32) if setting.small else (128, 128)  # the network's: masks are not resized
        arrays["images"] = faceparse.synthetic_faces(8, size=size, seed=1)[0].permute(0, 2, 3, 1)
    elif task == "quadmodal":
        arrays = quadmodal.synthetic_modalities(64, seed=1)[0]
    if arrays:
        path = path.with_suffix(".npz")
        np.savez(path, **arrays)
        return path
    path.mkdir()
    if task == "seqsetvae":
        for stay in range(1, 33):
            lines = ["Time,Parameter,Value"]
            for hour in range(stay):
                lines.append(f"{hour:02d}:00,HR,{60 + 7 * hour * stay % 50}")
                lines.append(f"{hour:02d}:{hour % 2:02d},Temp,{35 + hour * stay % 5}")
            (path / f"{stay}.txt").write_text("\n".join(lines))
    else:
        for recording in bidmc_data.synthetic_ppg(4, seconds=96, seed=1):
            file = path / f"bidmc_{recording['number']:02d}_Signals.csv"
            np.savetxt(file, recording["ppg"], header="PLETH", comments="")
    return path


def read_predictions(task, path):
    """Output of --predict: last column of a table, embeddings, or the class of every pixel."""
    if task == "quadmodal":
        return np.load(path)["embeddings"]
    if task != "faceparse":
        return np.loadtxt(path, delimiter=",", skiprows=1, usecols=-1, comments=None)
    masks = []
    for file in sorted((path / "masks").iterdir()):
        png = file.read_bytes()
        width = int.from_bytes(png[16:20], "big")
        pixels = zlib.decompress(png[png.index(b"IDAT") + 4 : -16])
        masks.append(np.frombuffer(pixels, dtype=np.uint8).reshape(-1, 1 + width)[:, 1:])
    return np.stack(masks)


def compare(predictions, expected):
    """The difference of two predictions, as text; raises Failed if it is more than BOUND."""
    if predictions.shape != expected.shape:
        raise Failed(f"predictions {predictions.shape}, on the CPU {expected.shape}")
    if expected.dtype == np.uint8:
        apart, text = np.mean(predictions != expected), "of the pixels differ"
    else:
        apart = np.abs(predictions - expected).max() / np.ptp(expected)
        text = "of their range apart"
    if not apart <= BOUND:
        raise Failed(f"{apart:.1e} {text}, more than {BOUND}")
    return f"{apart:.1e} {text}"


def predict_row(setting, task):
    """--predict on the device and on the CPU; on a CPU, with and without vector instructions."""
    best = setting.folder / f"{task} float32" / "best.pt"
    if not best.is_file():
        raise Skipped(f"{task} float32 has left no checkpoint")
    plainest = {"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"}
    words = ["--task", task, "--predict", best, "--data", write_inputs(setting, task), "--out"]
    outs = [setting.folder / f"{task} predictions {name}" for name in ("device", "cpu")]
    environment = {} if setting.on_gpu else plainest
    setting.run([*words, outs[0], "--device", setting.device], call=["-c", EXACT], **environment)
    setting.run([*words, outs[1], "--device", "cpu"])
    return compare(read_predictions(task, outs[0]), read_predictions(task, outs[1]))


def export_row(setting, task):
    """The exported network of a run on the device against --predict of the run on the CPU."""
    expected, out = setting.folder / f"{task} predictions cpu", setting.folder / f"{task}.pt2"
    if not expected.exists():
        raise Skipped(f"{task} predictions have failed")
    best = setting.folder / f"{task} float32" / "best.pt"
    setting.run(["--task", task, "--export", best, "--out", out])
    images = torch.from_numpy(np.load(setting.folder / f"{task} inputs.npz")["images"])
    with torch.no_grad():
        outputs = torch.export.load(out).module()({"images": images})
    classes = outputs.argmax(1).byte() if task == "faceparse" else outputs
    return compare(classes.numpy(), read_predictions(task, expected))


def loss_row(setting, loss, x, labels):
    """A loss and its gradient on the device, under autocast, and in float64 on the CPU."""
    here, reference = x.to(setting.device, copy=True), x.double()
    with torch.autocast(setting.device, dtype=torch.bfloat16):
        value = loss(here.requires_grad_(), labels.to(setting.device))
    expected = loss(reference.requires_grad_(), labels)
    value.backward()
    expected.backward()
    apart = abs(float(value.detach()) / float(expected.detach()) - 1)
    slopes = (here.grad.double().cpu() - reference.grad).abs().max() / reference.grad.abs().max()
    text = f"{value.detach():.5f}, off by {apart:.1e}; gradient by {slopes:.1e} of its largest"
    if not (apart <= 1e-5 and slopes <= 1e-4):
        raise Failed(f"{text}: more than 1e-5 and 1e-4")
    return text


def supcon_row(setting):
    return loss_row(setting, losses.supcon_loss, torch.randn(512, 64), torch.arange(512) % 8)


def ce_dice_row(setting):
    """Class 18 is absent, the upper rows are ignored, and the pixels are taken in three chunks."""
    def loss(logits, targets):
        return losses.ce_dice_loss(logits, targets, ignore_index=255)[0]

    images, side = (2, 128) if setting.small else (8, 512)
    targets = torch.randint(18, (images, side, side))
    targets[:, :9] = 255
    return loss_row(setting, loss, torch.randn(images, 19, side, side), targets)


def speed_row(setting, *more):
    """ocec with 64 channels and 8 blocks, augmented: the last of three epochs of eight batches."""
    batch = 32 if setting.small else 4096
    file, out = setting.folder / "many.npz", setting.folder / f"speed {' '.join(more)}"
    images, labels, _, _ = ocec.synthetic_eyes(batch, size=(32, 64))
    images = images.permute(0, 2, 3, 1).numpy()
    np.savez(file, images=np.tile(images, (10, 1, 1, 1)), labels=np.tile(labels, 10))
    words = ["--task", "ocec", "--variant", "current", "--epochs", "3"]
    words += "--train-ratio 0.8 --val-ratio 0.1 --test-ratio 0.1".split()
    words += ["--batch-size", batch, "--data", file, "--device", setting.device, "--out", out]
    output = setting.run([*words, *more], call=["-c", MEASURED])
    peak = int(output.split()[-1]) / 2**30
    memory = "allocated on the GPU" if setting.on_gpu else "resident"
    speed = last_epoch(out)["rows_per_s"]
    return f"{speed:,.0f} images/s at batch {batch:,}; at most {peak:.2f} GiB {memory}"


def all_rows(setting):
    """(title, function, its arguments); a row comes after the row that it is compared with."""
    rows = []
    for kind in KINDS:
        rows.append((f"{kind} float32", train_row, kind, "float32"))
        rows.append((f"{kind} bf16", train_row, kind, "bf16", "--amp", "bf16"))
    rows.append(("ocec fp16", train_row, "ocec", "fp16", "--amp", "fp16"))
    rows.append(("ocec --compile", compile_row))
    rows += [(f"{kind} in two processes", processes_row, kind) for kind in ("ocec", "quadmodal")]
    rows.append(("ocec, SIGKILL and --resume", resume_row))
    rows += [(f"{task} predictions", predict_row, task) for task in TASKS]
    rows += [(f"{task} export", export_row, task) for task in ("ocec", "faceparse")]
    rows += [("SupCon", supcon_row), ("CE + Dice", ce_dice_row), ("ocec 64 x 8 float32", speed_row)]
    if setting.on_gpu:
        rows.append(("ocec 64 x 8 bf16", speed_row, "--amp", "bf16"))
    return rows


def run_rows(setting, rows):
    """Print the table, then the failures and the counts; returns how many rows failed."""
    counts, failures = {"passed": 0, "failed": 0, "skipped": 0}, []
    for title, function, *arguments in rows:
        start = time.perf_counter()
        try:
            state, text = "passed", function(setting, *arguments)
        except Skipped as reason:
            state, text = "skipped", reason
        except Failed as error:
            state, text = "failed", error
            failures.append((f"{title}: {text}", error.output))
        except Exception as error:  # a fault of this script; the other rows still run
            state, text = "failed", type(error).__name__
            failures.append((f"{title}: {text}", traceback.format_exc()))
        counts[state] += 1
        seconds = time.perf_counter() - start
        print(f"{state:<8} {title:<28} {seconds:6.1f} s   {text}", flush=True)
    for title, output in failures:
        print(f"\n{title}", *output.strip().splitlines()[-20:], sep="\n    ")
    print(", ".join(f"{count} {state}" for state, count in counts.items()))
    return counts["failed"]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda")
    parser.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK)}, in small")
    args = parser.parse_args()
    has_gpu = torch.cuda.is_available()
    device = args.device or ("cpu" if args.quick and not has_gpu else "cuda")
    if device == "cuda" and not has_gpu:
        parser.error(f"torch {torch.__version__} finds no GPU: install a torch built for CUDA, and "
                     "a driver, or give --device cpu, which makes the same checks in small")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(device, args.quick or device == "cpu", Path(folder))
        rows = all_rows(setting)
        chosen = [row for row in rows if row[0] in QUICK or not args.quick]
        name = f"{os.cpu_count()} cores"
        if setting.on_gpu:
            name = f"{torch.cuda.get_device_name()}, cuDNN {torch.backends.cudnn.version()}"
        size = ", in small" if setting.small else ""
        print(f"torch {torch.__version__}, {device} ({name}): {len(chosen)} of {len(rows)} rows"
              f"{size}", flush=True)
        return run_rows(setting, chosen) > 0


if __name__ == "__main__":
    sys.exit(main())
