"""Time to the first training step, and to --help, as multiples of `import torch`.

    $ python benchmarks/start.py
    $ python benchmarks/start.py --quick     # one round

Whole processes, as a user starts them. The first step of train.py is on 100 eyes of an .npz and
includes reading, baselines, scores of the untrained network and its checkpoint. Twelve rounds in
turns, the first to warm up; medians. Bytecode is cached, except for train.py itself, which Python
compiles at every start. train.py tunes its allocator, the others have glibc's default.

Last result, torch 2.13.0+cpu, 1 thread on one of 2 cores, others at work (load 2):

    import torch                 1.04 s    1.00 x
    train.py --help              1.58 s    1.51 x
    train.py, first step         2.52 s    2.37 x
    linear layer and AdamW()     2.19 s    2.04 x

A torch.optim optimizer imports torch._dynamo (0.65 to 0.8 s) when it is built.
"""

import os
import statistics
import tempfile
import time

from _quick import ROOT, new_parser, parse, run_python

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
script["main"](["--task", "ocec", "--lr", "2e-3", "--data", sys.argv[2], "--out", sys.argv[3]])"""


def seconds_of(*words):
    """Wall time of a Python process."""
    start = time.perf_counter()
    run_python(*words)
    return time.perf_counter() - start


def main():
    quick = parse(new_parser(__doc__)).quick
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # so that the second start reads bytecode
    import numpy as np
    import torch

    from tasks import ocec

    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), "
          f"load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        images, labels, _, _ = ocec.synthetic_eyes(100)
        np.savez(f"{folder}/eyes.npz", images=images.permute(0, 2, 3, 1).numpy(), labels=labels)
        rounds = []
        for i in range(1 if quick else 12):
            first_step = [FIRST_STEP, str(ROOT), f"{folder}/eyes.npz", f"{folder}/{i}"]
            rounds.append({
                "import torch": seconds_of("-c", "import os, torch; os._exit(0)"),
                "train.py --help": seconds_of(str(ROOT / "train.py"), "--task", "ocec", "--help"),
                "train.py, first step": seconds_of("-c", *first_step),
                "linear layer and AdamW()": seconds_of("-c", LINEAR)})
    if not quick:
        rounds = rounds[1:]  # the first round fills the caches
    for name in rounds[0]:
        taken = [seconds[name] for seconds in rounds]
        ratio = statistics.median(seconds[name] / seconds["import torch"] for seconds in rounds)
        print(f"    {name:<26} {statistics.median(taken):6.2f} s   {ratio:5.2f} x", flush=True)


if __name__ == "__main__":
    main()
