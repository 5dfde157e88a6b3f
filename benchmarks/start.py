"""The wait before the first training step, and for --help, in times of `import torch`.

    $ python benchmarks/start.py
    $ python benchmarks/start.py --quick     # one of each

Whole processes, as a user starts them: from the start of Python to the end of the first optimizer step of `train.py --task ocec` on 100
eyes of an .npz, with all that comes before it (reading and splitting the data, what learns nothing, the untrained network scored and
saved, the batch); `train.py --task ocec --help`; and the least that a script can do, one linear layer and AdamW(). Eleven of each in
turns, medians, bytecode cached for all (train.py itself is compiled at every start, as any script). The allocator: train.py tunes
its own, the others have glibc's default.

Last result, torch 2.13.0+cpu, 1 thread on one of 2 cores, others at work (load 2):

    import torch                 1.04 s    1.00 x
    train.py --help              1.58 s    1.51 x
    train.py, first step         2.52 s    2.37 x
    linear layer and AdamW()     2.19 s    2.04 x

With Python's garbage collector off while train.py and torch._dynamo were imported (gc.disable, gc.freeze, gc.enable around both) an
earlier run had --help 1.11 x and the first step 1.91 x, 2.00 s: the only gain found, left out because a script that others import should
not switch it. Of 1.8 s of such a run, 1 thread, timed inside, torch takes 0.85 (0.95 to 1.1 with the collector on), torch._dynamo 0.65 to
0.8, these modules and compiling train.py 0.1, the data, floors, untrained scores and files 0.1, the step 0.1. Every torch.optim optimizer
imports torch._dynamo when it is built (add_param_group, through torch._compile) and again asks for it in step(): only an optimizer of our
own would avoid it. A thread that imports it meanwhile has nothing to run beside: the imports hold the interpreter's lock, and little else
happens before the optimizer.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _quick import new_parser, parse

ROOT = Path(__file__).resolve().parents[1]
LINEAR = """
import os, torch
layer = torch.nn.Linear(4, 1)
optimizer = torch.optim.AdamW(layer.parameters())
layer(torch.ones(2, 4)).sum().backward()
optimizer.step()
os._exit(0)"""
FIRST_STEP = """
import os, runpy, sys
sys.path.insert(0, sys.argv[1])
script = runpy.run_path(sys.argv[1] + "/train.py", run_name="train")
from torch.optim.optimizer import register_optimizer_step_post_hook
register_optimizer_step_post_hook(lambda *_: os._exit(0))
script["main"](["--task", "ocec", "--lr", "2e-4", "--data", sys.argv[2], "--out", sys.argv[3]])"""


def seconds(*words):
    """Wall time of a Python process that must end well."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment)
    taken = time.perf_counter() - start
    if done.returncode:
        sys.exit(done.stderr)
    return taken


def main():
    quick = parse(new_parser(__doc__)).quick
    sys.path.insert(0, str(ROOT))
    import numpy as np
    import torch

    import data

    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        images, labels, _, _ = data.synthetic_eyes(100)
        np.savez(f"{folder}/eyes.npz", images=images.permute(0, 2, 3, 1).numpy(), labels=labels)
        rounds = []
        for i in range(1 if quick else 12):
            rounds.append({
                "import torch": seconds("-c", "import os, torch; os._exit(0)"),
                "train.py --help": seconds(str(ROOT / "train.py"), "--task", "ocec", "--help"),
                "train.py, first step": seconds("-c", FIRST_STEP, str(ROOT), f"{folder}/eyes.npz", f"{folder}/{i}"),
                "linear layer and AdamW()": seconds("-c", LINEAR)})
    rounds = rounds if quick else rounds[1:]  # the first round fills the caches
    for name in rounds[0]:
        taken = [each[name] for each in rounds]
        ratio = statistics.median(each[name] / each["import torch"] for each in rounds)
        print(f"    {name:<26} {statistics.median(taken):6.2f} s   {ratio:5.2f} x", flush=True)


if __name__ == "__main__":
    main()
