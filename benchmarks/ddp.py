"""What several processes pay for talking to each other: the same training step of ocec with and without it.

    $ torchrun --nproc-per-node 2 benchmarks/ddp.py
    $ python benchmarks/ddp.py --quick      # without torchrun it starts itself in two processes

Two processes of one thread each, gloo, train.tune_allocator in both. The network of train.build with 64 channels and 8 blocks, 128 images
of 32 x 64 for each process, float32: forward, BCE, backward, gradient norm, AdamW, average of the weights, as train.py does them. The
kinds take turns, two steps at a time; all processes start together, and it counts when the last one is done, so that waiting for the
slower one at every step is part of the cost. Medians of the rounds, and of the ratios to `alone` within a round.

alone: no process hears of another (DistributedDataParallel's no_sync). waiting: and after backward one number is summed over them, so
each waits for the other. gradients: what train.share_gradients does. all of train.py: and the sums of loss, rows and signals. The norm of
the gradients must be the same in both processes to the bit in the latter two, and not in the others.

Last result, torch 2.13.0+cpu, 2 cores with others at work on the machine (load 2):

    alone               328.5 ms    +0.0 %   middle half +0.0 to +0.0
    waiting             333.0 ms    +0.5 %   middle half -4.2 to +4.7
    gradients           332.9 ms    +1.2 %   middle half -3.9 to +6.2
    all of train.py     327.4 ms    +4.2 %   middle half -2.7 to +6.9

The rounds differ more than the kinds. Two runs before gave +4.8 % (30 rounds) and +3.9 % (24) for the gradients, +5.3 % for all of train.py
(30), and in the last of them +5.1 % for waiting alone: what is paid is waiting for the slower process. In that run broadcast_buffers=False
came to +5.8 %, with gradient_as_bucket_view to +3.1 %, with static_graph as well to +2.5 %, all within the noise: train.py takes none.
"""

import contextlib
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

import data
import train
from _quick import new_parser, parse

KINDS = ("alone", "waiting", "gradients", "all of train.py")


def step(kind, run, args, batch, stop):
    """One optimizer step; the gradients' norm."""
    if kind == "all of train.py":
        stop.check()
    with run.loss.no_sync() if kind in ("alone", "waiting") else contextlib.nullcontext():
        loss, _ = run.loss(batch, run.step, args)
        if kind == "all of train.py":
            train.summed([float(loss.detach()), len(batch["targets"])])
        loss.backward()
    if kind == "waiting":
        train.summed([0])
    norm = torch.nn.utils.clip_grad_norm_(run.raw_model.parameters(), args.clip)
    run.optimizer.step()
    run.ema.update(run.raw_model)
    run.optimizer.zero_grad(set_to_none=True)
    return float(norm)


def compare(channels, blocks, batch_size, steps, number_of_rounds):
    words = f"--task ocec --channels {channels} --blocks {blocks} --device cpu"
    args = train.parse_args(words.split())
    images, labels, _, _ = data.synthetic_eyes(batch_size, size=args.size, seed=train.rank())
    args.facts = {"pos_weight": 1.0}
    run = train.build(args, 1000)
    train.share_gradients(run)
    batch = {"inputs": train.unit_images(images.permute(0, 2, 3, 1)), "targets": torch.from_numpy(labels).float()}
    rounds = {kind: [] for kind in KINDS}
    with train.StopSignal() as stop:
        for kind in KINDS:
            norms = train.gathered(step(kind, run, args, batch, stop))
            if (len(set(norms)) == 1) != (kind not in ("alone", "waiting")):
                sys.exit(f"{kind}: gradient norms {norms}")
            for p in run.raw_model.parameters():
                torch.distributed.broadcast(p.data, 0)
        for i in range(number_of_rounds):
            for kind in KINDS[i % 4 :] + KINDS[: i % 4]:
                train.gathered(None)
                start = time.perf_counter()
                for _ in range(steps):
                    step(kind, run, args, batch, stop)
                train.summed([0])
                rounds[kind].append((time.perf_counter() - start) / steps)
    print(f"torch {torch.__version__}, {train.world_size()} processes, {torch.get_num_threads()} thread(s), load {os.getloadavg()[0]:.1f}")
    quarter = number_of_rounds // 4
    for kind, seconds in rounds.items():
        ratios = sorted(its / alone for its, alone in zip(seconds, rounds["alone"]))
        print(f"    {kind:<16} {statistics.median(seconds) * 1000:8.1f} ms   {100 * statistics.median(ratios) - 100:+5.1f} %   "
              f"middle half {100 * ratios[quarter] - 100:+.1f} "
              f"to {100 * ratios[-1 - quarter] - 100:+.1f}")


def main():
    parser = new_parser(__doc__)
    if "LOCAL_RANK" not in os.environ:
        parse(parser)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        words = ["--nproc-per-node", "2", __file__, *sys.argv[1:]]
        sys.exit(subprocess.run([*launcher, *words]).returncode)
    quick = parser.parse_args().quick
    train.tune_allocator()
    with train.processes():
        if quick:
            compare(channels=8, blocks=1, batch_size=8, steps=1, number_of_rounds=4)
        else:
            compare(channels=64, blocks=8, batch_size=128, steps=2, number_of_rounds=40)
    train.leave(0)


if __name__ == "__main__":
    main()
