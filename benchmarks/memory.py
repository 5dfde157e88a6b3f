"""Resident memory of a whole run (load, diagnosis, one epoch, scores, test) on a packed set that grows a hundredfold, and in memory.

    $ OMP_NUM_THREADS=1 python benchmarks/memory.py          # Linux; needs 5 GB of disk in the temporary folder and 5 minutes
    $ python benchmarks/memory.py --quick                    # 300 eyes, and twice as many

A set of --pack is repeated 1, 10 and 100 times, each time with new groups, and trained on for one epoch by a tiny network, each in a
fresh process. Every 20 ms a thread reads /proc/self/status there. anon is the highest RssAnon: the memory of the process, which the
kernel cannot take back. file is the highest RssFile: pages of mapped files, those of torch's libraries too, which the kernel drops
when it needs room. "in memory" trains on the same eyes as an .npz. What still grows with the rows are labels, groups and order:
"a row" is the growth of anon from the smallest to the largest set, in bytes per row (an eye has 6,144 bytes, a window 2,000 of its own).

Last result, torch 2.13.0+cpu, 2 cores, 1 thread, others at work beside it (load about 3.5: the speeds say little):

    eyes, packed               3,000 rows   anon    353 MB   file    127 MB    3,964 rows/s      6 s
    eyes, in memory            3,000 rows   anon    332 MB   file    109 MB    4,642 rows/s      6 s
    eyes, packed              30,000 rows   anon    413 MB   file    284 MB    4,444 rows/s     14 s
    eyes, in memory           30,000 rows   anon    564 MB   file    108 MB    4,670 rows/s     15 s
    eyes, packed             300,000 rows   anon    679 MB   file  1,867 MB    3,774 rows/s     96 s
    eyes, in memory          300,000 rows   anon  3,717 MB   file    109 MB    4,482 rows/s     93 s
    eyes, packed: 1,151 bytes a row
    recordings, packed         1,130 rows   anon    252 MB   file    108 MB   13,074 rows/s      4 s
    recordings, packed        11,300 rows   anon    259 MB   file    129 MB   18,781 rows/s      8 s
    recordings, packed       113,000 rows   anon    283 MB   file    335 MB   21,569 rows/s     33 s
    recordings, packed: 292 bytes a row

A hundred times the eyes took 1.9 times the memory on disk, 11 times in memory. numpy and Python allocate about 300 bytes a row for labels,
groups and order; the rest of the growth was not traced, freed memory that train.tune_allocator keeps is part of it.
"""

import contextlib
import io
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import train
from _drawn import write_recordings
from _quick import new_parser, parse

EYES = "--task ocec --channels 4 --blocks 1 --batch-size 256 --photometric 0 --clahe 0 --crop 0 --mixup 0".split()
RUN = "--val-ratio 0.2 --train-ratio 0.6 --epochs 1 --device cpu".split()  # 512 validation rows and more: a full chunk
HEART = "--task bidmc_hr --width 8 --depth 1 --heads 1 --bins 16 --batch-size 256".split()


def repeat(pack, kind, times, folder):
    """A packed set `times` times over, as another one: groups, patients and numbers are new each time."""
    about, arrays = data.read_pack(pack, kind)
    shared = {"groups", "patient", "number", "ends"}
    with data.new_pack(folder, {key: about[key] for key in about if key not in ("format", "files")}) as temporary:
        for name in arrays.keys() - shared:
            with data.NpyWriter(temporary / f"{name}.npy", arrays[name].dtype, arrays[name].shape[1:]) as writer:
                for _ in range(times):
                    writer.append(arrays[name])
        for name in arrays.keys() & shared:
            old = arrays[name]
            if name == "ends":
                new = np.concatenate([old + k * old[-1] for k in range(times)])
            elif name == "number":
                new = np.arange(1, times * len(old) + 1)
            else:
                new = np.array([f"{each}-{k}" for k in range(times) for each in old])
            np.save(temporary / f"{name}.npy", new)


def eyes_npz(pack, file):
    _, arrays = data.read_pack(pack, "eyes")
    np.savez(file, images=arrays["images"].transpose(0, 2, 3, 1), labels=arrays["labels"], groups=arrays["groups"])


def child(words):
    """Train in this process; print the rows, the peaks of RssAnon and RssFile in MB, and rows per second."""
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
    text = printed.getvalue()
    rows = sum(int(part.split()[0].replace(",", "")) for part in text.split(" | ")[1].split(", ") if part) if code == 0 else 0
    speed = text.split("rows/s")[0].split()[-1] if code == 0 else "0"
    print(code, rows, peaks["RssAnon"] / 1024, peaks["RssFile"] / 1024, speed)


def measure(title, words, folder):
    start = time.perf_counter()
    call = [sys.executable, __file__, "--child", *words, *RUN, "--out", str(folder / "run"), "--overwrite"]
    result = subprocess.run(call, capture_output=True, text=True)
    code, rows, anon, file, speed = result.stdout.split() if result.returncode == 0 else sys.exit(result.stderr)
    if code != "0":
        sys.exit(result.stderr)
    print(f"    {title:<22} {int(rows):>9,} rows   anon {float(anon):>6,.0f} MB   file {float(file):>6,.0f} MB   "
          f"{float(speed):>6,.0f} rows/s   {time.perf_counter() - start:>4.0f} s", flush=True)
    return int(rows), float(anon)


def main():
    quick = parse(new_parser(__doc__)).quick
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images, labels, groups, _ = data.synthetic_eyes(300 if quick else 3000)
        np.savez(folder / "eyes.npz", images=images.permute(0, 2, 3, 1).numpy(), labels=labels, groups=groups)
        data.pack_eyes(folder / "eyes.npz", folder / "eyes", size=(32, 64))
        if not quick:
            write_recordings(folder / "csv", 10, 480)
            data.pack_bidmc(folder / "csv", folder / "recordings")
        for kind, words in (("eyes", EYES),) if quick else (("eyes", EYES), ("recordings", HEART)):
            found = []
            for times in (1, 2) if quick else (1, 10, 100):
                repeat(folder / kind, kind, times, folder / f"{kind}-{times}")
                found.append(measure(f"{kind}, packed", [*words, "--data", str(folder / f"{kind}-{times}")], folder))
                if kind == "eyes" and not quick:
                    eyes_npz(folder / f"eyes-{times}", folder / "big.npz")
                    measure("eyes, in memory", [*words, "--data", str(folder / "big.npz")], folder)
                    (folder / "big.npz").unlink()
            (first, low), (last, high) = found[0], found[-1]
            print(f"    {kind}, packed: {(high - low) * 2**20 / (last - first):,.0f} bytes a row", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
    else:
        main()
