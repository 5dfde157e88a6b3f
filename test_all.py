"""Run the tests: `python test_all.py` (no test library needed), or `pytest tests`.

    $ python test_all.py                     # all, in as many processes as cores, one thread each
    $ python test_all.py plateau resume      # only tests whose file or name holds one of the words
    $ python test_all.py -v ema              # and a line per test
"""

import concurrent.futures
import importlib
import multiprocessing
import os
import sys
import traceback
import unittest
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "tests"
FIRST = ("test_processes", "test_export", "test_seqsetvae", "test_run")  # they take longest


def test_names(words):
    """[(file, test)] of the tests whose file or name holds one of the words; all without words."""
    files = sorted(path.stem for path in FOLDER.glob("test_*.py"))
    names = []
    for file in sorted(files, key=lambda file: file not in FIRST):
        for name in vars(importlib.import_module(f"tests.{file}")):
            chosen = not words or any(word in f"{file}.{name}" for word in words)
            if name.startswith("test_") and chosen:
                names.append((file, name))
    return names


def outcome_of(file, name):
    """Run one test: "passed", "failed" or "skipped", and the traceback or the reason."""
    try:
        getattr(importlib.import_module(f"tests.{file}"), name)()
    except unittest.SkipTest as reason:
        return "skipped", str(reason)
    except Exception:
        return "failed", traceback.format_exc()
    return "passed", ""


def main(words):
    names, outcomes = test_names([word for word in words if word != "-v"]), []
    spawn = multiprocessing.get_context("spawn")  # a fork of a process that holds torch may hang
    threads = int(os.environ.get("OMP_NUM_THREADS", 1))  # more than the cores wait for each other
    processes = max(1, os.cpu_count() // threads)
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        running = {pool.submit(outcome_of, *name): ".".join(name) for name in names}
        for future in concurrent.futures.as_completed(running):
            if future.exception():  # a process that dies takes with it the tests still to run
                outcome, text = "failed", f"its process died: {future.exception()}"
            else:
                outcome, text = future.result()
            outcomes.append(outcome)
            if outcome != "passed" or "-v" in words:
                print(f"{outcome}: {running[future]} {text}", flush=True)
    counts = [f"{outcomes.count(outcome)} {outcome}" for outcome in ("passed", "failed", "skipped")]
    print(", ".join(counts))
    return not outcomes or "failed" in outcomes


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
