"""Cost of communication between processes: one training step of ocec with and without it.

    $ torchrun --nproc-per-node 2 benchmarks/ddp.py
    $ python benchmarks/ddp.py --quick      # without torchrun it starts itself in two processes

Two processes of one thread each, gloo, tuned allocator. 64 channels, 8 blocks, 128 images of
32 x 64 per process, float32. The kinds of step take turns; all processes start together, and the
clock stops when the last one is done. A ratio to `alone` is taken within a round.

    alone             the step of train.py without communication
    waiting           alone, and one number is summed over the processes after backward
    gradients         the gradients are shared
    all of train.py   gradients, and the sums of loss, rows and signals

Last result, torch 2.13.0+cpu, 2 cores, others at work (load 2); the rounds differ more than the
kinds:

    alone               328.5 ms    +0.0 %   middle half +0.0 to +0.0
    waiting             333.0 ms    +0.5 %   middle half -4.2 to +4.7
    gradients           332.9 ms    +1.2 %   middle half -3.9 to +6.2
    all of train.py     327.4 ms    +4.2 %   middle half -2.7 to +6.9
"""

import contextlib
import os
import statistics
import subprocess
import sys
import time

import torch

from _quick import new_parser, parse
import train
from runtime import processes
from tasks import ocec
from tasks.common import unit_images

KINDS = ("alone", "waiting", "gradients", "all of train.py")
UNSHARED = ("alone", "waiting")  # the kinds that do not share gradients


def step(kind, run, batch, stop):
    """One optimizer step; returns the norm of the gradients."""
    if kind == "all of train.py":
        stop.check()
    sharing = run.loss.no_sync() if kind in UNSHARED else contextlib.nullcontext()
    with sharing:
        loss, _ = run.loss(batch, run.args, run.facts)
        loss.backward()
    if kind == "waiting":
        processes.sum_over_processes([0])
    norm = torch.nn.utils.clip_grad_norm_(run.raw_model.parameters(), run.args.clip)
    if kind == "all of train.py":
        processes.sum_over_processes([float(loss.detach()), len(batch["targets"])])
    run.optimizer.step()
    run.ema.update(run.raw_model)
    run.optimizer.zero_grad(set_to_none=True)
    return float(norm)


def print_rounds(rounds):
    """Median seconds of each kind, and its change against `alone`: median and middle half."""
    for kind, seconds in rounds.items():
        changes = sorted(100 * (taken / alone) - 100
                         for taken, alone in zip(seconds, rounds["alone"]))
        quarter = len(changes) // 4
        print(f"    {kind:<16} {statistics.median(seconds) * 1000:8.1f} ms   "
              f"{statistics.median(changes):+5.1f} %   "
              f"middle half {changes[quarter]:+.1f} to {changes[-1 - quarter]:+.1f}")


def compare(channels, blocks, batch_size, steps, number_of_rounds):
    """Time every kind of step in turn; end if the gradient norms are not as expected."""
    words = f"--task ocec --channels {channels} --blocks {blocks} --device cpu"
    words += " --size 32x64 --inputs images --block baseline"
    args = train.parse_args(words.split())
    images, labels, _, _ = ocec.synthetic_eyes(batch_size, size=args.size, seed=processes.rank())
    run = train.build(args, {"pos_weight": 1.0}, 1000)
    run.loss = processes.share_gradients(run.loss)
    batch = {"inputs": unit_images(images.permute(0, 2, 3, 1)),
             "targets": torch.from_numpy(labels).float()}
    rounds = {kind: [] for kind in KINDS}
    with processes.StopSignal() as stop:
        for kind in KINDS:
            norms = processes.gather_objects(step(kind, run, batch, stop))
            norms_are_equal = len(set(norms)) == 1
            if norms_are_equal != (kind not in UNSHARED):
                sys.exit(f"{kind}: gradient norms {norms}")
            for p in run.raw_model.parameters():
                torch.distributed.broadcast(p.data, 0)
        for i in range(number_of_rounds):
            for kind in KINDS[i % 4 :] + KINDS[: i % 4]:
                processes.gather_objects(None)
                start = time.perf_counter()
                for _ in range(steps):
                    step(kind, run, batch, stop)
                processes.sum_over_processes([0])
                rounds[kind].append((time.perf_counter() - start) / steps)
    print(f"torch {torch.__version__}, {processes.world_size()} processes, "
          f"{torch.get_num_threads()} thread(s), load {os.getloadavg()[0]:.1f}")
    print_rounds(rounds)


def main():
    parser = new_parser(__doc__)
    if "LOCAL_RANK" not in os.environ:
        parse(parser)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        words = ["--nproc-per-node", "2", __file__, *sys.argv[1:]]
        sys.exit(subprocess.run([*launcher, *words]).returncode)
    quick = parser.parse_args().quick
    processes.tune_allocator()
    with processes.process_group():
        if quick:
            compare(channels=8, blocks=1, batch_size=8, steps=1, number_of_rounds=4)
        else:
            compare(channels=64, blocks=8, batch_size=128, steps=2, number_of_rounds=40)
    processes.leave(0)


if __name__ == "__main__":
    main()
