"""Memory of a whole run (load, one epoch, scores, test) on a set and on one 100 times as large.

    $ OMP_NUM_THREADS=1 python benchmarks/memory.py            # Linux; 6 GB of disk, 25 minutes
    $ OMP_NUM_THREADS=1 python benchmarks/memory.py --quick    # two kinds of data, 1 minute

A tiny network trains for one epoch in a fresh process. The larger set repeats the rows of the
smaller one, under other groups. build: the run makes the cache; mapped: the next run, with the same
cache; no cache: without --cache (recordings always have one).

A thread reads /proc/self/status every 20 ms. anon: highest RssAnon, memory of the process, which
the kernel cannot take back. file: highest RssFile, pages of mapped files, those of torch's
libraries included, which the kernel drops when it needs room.
"""

import contextlib
import io
import os
import shutil
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np

from _quick import new_parser, parse, run_python
import data
import train
from _drawn import recording_tables
from tasks import bidmc_data, faceparse, ocec, quadmodal

RUN = "--epochs 1 --device cpu --train-ratio 0.6 --val-ratio 0.2 --test-ratio 0.2"
EYES = ("--task ocec --size 32x64 --inputs images --block baseline --channels 4 --blocks 1 "
        "--batch-size 256")
COMMANDS = {
    "eyes .npz": EYES,
    "eyes folder": EYES,
    "faces .npz": "--task faceparse --size 64 --width 4 --batch-size 16 --photometric 0",
    "modalities .npz": "--task quadmodal --inputs waveform --width 8 --heads 1 --hidden 8 "
                       "--embed 4 --tokens 2",
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
        tables = recording_tables(recording)
        for k in range(times):
            name = f"bidmc_{k * len(recordings) + i + 1:04d}"
            patient = f"{recording['patient']}_{k}"
            (path / f"{name}_Fix.txt").write_text(f"MIMIC II matched wdb ID: {patient}\n")
            for table, (header, values) in tables.items():
                file = path / f"{name}_{table}.csv"
                if k == 0:
                    np.savetxt(file, values, "%.7g", delimiter=",", header=header, comments="")
                else:
                    os.link(path / f"bidmc_{i + 1:04d}_{table}.csv", file)


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
    peaks = {"RssAnon": 0, "RssFile": 0}
    done = threading.Event()

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
    printed = run_python(__file__, "--child", *map(str, words))
    seconds = time.perf_counter() - start
    rows, anon, file = map(float, printed.split())
    print(f"    {title:<26} {rows:>9,.0f} rows   anon {anon:>6,.0f} MB   "
          f"file {file:>6,.0f} MB   {seconds:>4.0f} s", flush=True)
    return anon


def compare(kind, rows, times, calls, folder):
    """Measure a set and one `times` times as large; print the ratio of their memory."""
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
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    growth = ", ".join(f"{call} {large / small:.2f}" for call, (small, large) in peaks.items())
    print(f"    {kind}: memory of {times} times the rows, as a ratio: {growth}", flush=True)


def main():
    parser = new_parser(__doc__)
    parser.add_argument("kinds", nargs="*", help=f"of {', '.join(COMMANDS)} (default: all)")
    args = parse(parser)
    default_kinds = ["eyes .npz", "recordings"] if args.quick else COMMANDS
    for kind in args.kinds or default_kinds:
        rows, times = ROWS[kind], 100
        if args.quick:
            rows, times = max(10, ROWS[kind] // 5), 2
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
