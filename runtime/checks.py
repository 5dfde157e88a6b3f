"""Checks before training: --amp, --compile and the batches fit the machine and the network."""

import copy
import time

import torch

import models
from runtime.processes import world_size
from runtime.settings import autocast_dtype


def slowdown(dtype, device):
    """Seconds of one small matrix product in `dtype` over those in float32; the best of three.

    A processor without bf16 or fp16 instructions converts every value: 10 to 500 times slower.
    """
    # on a GPU large enough to take longer than a launch
    side = 128 if torch.device(device).type == "cpu" else 4096
    seconds = {}
    for kind in (torch.float32, dtype):
        matrix = torch.ones(side, side, dtype=kind, device=device)
        times = []
        for _ in range(4):  # the first one loads the kernel
            start = time.perf_counter()
            (matrix @ matrix)[0, 0].item()  # item() waits for the device
            times.append(time.perf_counter() - start)
        seconds[kind] = min(times[1:])
    return seconds[dtype] / seconds[torch.float32]


def warn_slow_amp(args):
    """Say so if --amp is slower than float32, as on most processors and GPUs before Ampere."""
    if args.amp == "off":
        return
    ratio = slowdown(autocast_dtype(args), args.device)
    if ratio > 2:
        print(f"warning: --amp {args.amp} is slow on this {args.device}: one small matrix product "
              f"takes {ratio:.0f} times as long as in float32; leave --amp out", flush=True)


def check_compile(device):
    """Refuse --compile without a compiler: torch.compile looks for one at the first batch."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:  # torch has no public class for it
        raise ValueError("--compile: torch.compile does not work here "
                         f"({' '.join(str(error).split())[:200]}): install a C++ compiler such as "
                         "g++ (on a GPU Triton too), or leave --compile out") from error


def check_one_row_batch(run, train, batches):
    """Refuse a batch of one row that the network cannot train on (batch norm over one value)."""
    single = [rows for rows in batches if len(rows) == 1]
    if not single:
        return
    try:
        model = copy.deepcopy(run.raw_model)
        models.train_mode(model)
        run.task.loss(model, train.batch(single[0]) | {"step": 0}, run.args, run.facts)
    except ValueError as error:
        n, world, size = len(train), world_size(), run.args.batch_size
        sizes = range(size + world, n + world + 1, world)
        fitting = [other for other in sizes if n // world % (other // world) != 1]
        remedy = f"try --batch-size {fitting[0]}" if fitting else "add rows"
        share = " to each process" if world > 1 else ""
        raise ValueError(f"--batch-size {size} leaves a batch of 1 of the {n} training "
                         f"rows{share}, which this network cannot train on ({error}): "
                         f"{remedy}") from error
