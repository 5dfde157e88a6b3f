"""Memory of a whole run (load, one epoch, scores, test) on sets that grow a hundredfold.

    $ OMP_NUM_THREADS=1 python benchmarks/memory.py            # Linux; 6 GB of disk, 25 minutes
    $ OMP_NUM_THREADS=1 python benchmarks/memory.py --quick    # does the script still run? 1 minute

Tiny networks train for one epoch, each in a fresh process. `build` is the run that makes the cache,
`mapped` the next one with the same cache, `no cache` a run without --cache (recordings always have
one). Every 20 ms a thread reads /proc/self/status. anon is the highest RssAnon: the memory of the
process, which the kernel cannot take back. file is the highest RssFile: pages of mapped files,
those of torch's libraries too, which the kernel drops when it needs room. The larger set repeats
the rows of the smaller one, under other groups.

"""

import argparse
import contextlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import train
from tasks import bidmc_data, faceparse, ocec, quadmodal

RUN = "--epochs 1 --device cpu --train-ratio 0.6 --val-ratio 0.2 --test-ratio 0.2"
COMMANDS = {
    "eyes .npz": "--task ocec --channels 4 --blocks 1 --batch-size 256 --photometric 0 --clahe 0",
    "eyes folder": "--task ocec --channels 4 --blocks 1 --batch-size 256 --photometric 0 --clahe 0",
    "faces .npz": "--task faceparse --size 64 --width 4 --batch-size 16 --photometric 0",
    "modalities .npz": "--task quadmodal --width 8 --heads 1 --hidden 8 --embed 4 --tokens 2",
    "recordings": "--task bidmc_hr --width 8 --depth 1 --heads 1 --bins 16 --batch-size 256",
}
ROWS = {"eyes .npz": 3000, "eyes folder": 300, "faces .npz": 100, "modalities .npz": 600,
        "recordings": 10}


def repeated_npz(path, arrays, times):
    """An .npz of arrays, `times` times over, one copy at a time in memory; groups are renamed."""
    member = path.with_suffix(".member")
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            pieces = (array for _ in range(times))
            if name == "groups":
                pieces = [np.array([f"{group}-{k:03d}" for group in array]) for k in range(times)]
                array = pieces[0]
            data.write_npy(member, array.dtype, array.shape[1:], pieces)
            archive.write(member, f"{name}.npy")
    member.unlink()


def eyes_folder(path, images, labels, times):
    """Eyes as PNG files, each with `times` names."""
    for name in ("closed", "open"):
        (path / name).mkdir(parents=True)
    for i, (image, label) in enumerate(zip(images, labels)):
        folder = path / ("closed", "open")[label]
        (folder / f"{i}-0.png").write_bytes(data.encode_png(image))
        for k in range(1, times):
            os.link(folder / f"{i}-0.png", folder / f"{i}-{k}.png")


def write_recordings(path, recordings, times):
    """Recordings as PhysioNet writes them, `times` times over, each time of other patients."""
    path.mkdir()
    for i, recording in enumerate(recordings):
        marks = [recording["breaths"], recording["breaths_2"]]
        breaths = np.full((max(map(len, marks)), 2), np.nan)
        for column, samples in enumerate(marks):
            breaths[: len(samples), column] = samples
        numerics = np.stack([recording[name] for name in ("time", "hr", "pulse")], 1)
        marked = "breaths ann1 [signal sample no],breaths ann2 [signal sample no]"
        tables = {"Signals": ("PLETH", recording["ppg"]), "Breaths": (marked, breaths),
                  "Numerics": ("Time [s],HR,PULSE", numerics)}
        for k in range(times):
            name = f"bidmc_{k * len(recordings) + i + 1:04d}"
            patient = f"{recording['patient']}_{k}"
            (path / f"{name}_Fix.txt").write_text(f"MIMIC II matched wdb ID: {patient}\n")
            for table, (columns, values) in tables.items():
                first, file = path / f"bidmc_{i + 1:04d}_{table}.csv", path / f"{name}_{table}.csv"
                if k:
                    os.link(first, file)
                else:
                    np.savetxt(file, values, "%.7g", delimiter=",", header=columns, comments="")


def write_set(kind, path, rows, times):
    """A set of `rows` drawn rows, `times` times over."""
    if kind == "recordings":
        write_recordings(path, bidmc_data.synthetic_ppg(rows, seconds=240), times)
    elif kind == "modalities .npz":
        arrays, labels, groups, names, _ = quadmodal.synthetic_modalities(rows)
        labels = np.array(names)[labels]
        repeated_npz(path, arrays | {"labels": labels, "groups": groups}, times)
    elif kind == "faces .npz":
        images, masks, _ = faceparse.synthetic_faces(rows, size=(128, 128))
        images = images.permute(0, 2, 3, 1).numpy()
        repeated_npz(path, {"images": images, "masks": masks.numpy()}, times)
    else:
        images, labels, groups, _ = ocec.synthetic_eyes(rows)
        images = images.permute(0, 2, 3, 1).numpy()
        if kind == "eyes folder":
            eyes_folder(path, images, labels, times)
        else:
            repeated_npz(path, {"images": images, "labels": labels, "groups": groups}, times)


def child(words):
    """Train in this process; print the rows and the peaks of RssAnon and RssFile in MB."""
    peaks, done = {"RssAnon": 0, "RssFile": 0}, threading.Event()

    def watch():
        while not done.wait(0.02):
            for line in Path("/proc/self/status").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in peaks:
                    peaks[name] = max(peaks[name], int(value.split()[0]))

    thread = threading.Thread(target=watch)
    thread.start()
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            code = train.main(words)
    finally:
        done.set()
        thread.join()
    if code:
        sys.exit(code)
    sizes = printed.getvalue().split(" | ")[1].split(", ")  # such as "1,800 train, 600 validation"
    rows = sum(int(size.split()[0].replace(",", "")) for size in sizes)
    print(rows, peaks["RssAnon"] / 1024, peaks["RssFile"] / 1024)


def measure(title, words, out):
    """Train in a fresh process; returns the peak of its own memory in MB."""
    start = time.perf_counter()
    words = [*words, *RUN.split(), "--out", out, "--overwrite"]
    command = [sys.executable, __file__, "--child", *map(str, words)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stdout + result.stderr)
    rows, anon, file = map(float, result.stdout.split())
    print(f"    {title:<26} {rows:>9,.0f} rows   anon {anon:>6,.0f} MB   file {file:>6,.0f} MB"
          f"   {time.perf_counter() - start:>4.0f} s", flush=True)
    return anon


def compare(kind, rows, times, calls, folder):
    """Measure a set and the one that is `times` times as large; print how much the memory grew."""
    peaks = {}
    for repeats in (1, times):
        path, cache = folder / f"set-{repeats}.npz", folder / "cache"
        write_set(kind, path, rows, repeats)
        words = [*COMMANDS[kind].split(), "--data", path]
        for call in calls:
            more = [] if call == "no cache" else ["--cache", cache]
            peak = measure(f"{kind}, {call}", [*words, *more], folder / "runs" / "run")
            peaks.setdefault(call, []).append(peak)
        shutil.rmtree(cache)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    growth = ", ".join(f"{call} {large / small:.2f}" for call, (small, large) in peaks.items())
    print(f"    {kind}: {times} times the rows take so many times the memory: {growth}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help=f"of {', '.join(COMMANDS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="tiny sets, twice the rows")
    args = parser.parse_args()
    for kind in args.kinds or (["eyes .npz", "recordings"] if args.quick else COMMANDS):
        rows, times = (max(10, ROWS[kind] // 5), 2) if args.quick else (ROWS[kind], 100)
        calls = ["build", "mapped"]
        if kind != "recordings" and not args.quick:  # recordings always have a cache
            calls.append("no cache")
        with tempfile.TemporaryDirectory() as folder:
            compare(kind, rows, times, calls, Path(folder))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
    else:
        main()
