"""One training step of SeqSetVAE at width 64 and depth 2 (forward, loss of train.py, backward, fused AdamW): all stays packed in one
batch, as SeqSetVAE takes them, against a loop over stays and sets, which needs neither padding nor masks.

    $ OMP_NUM_THREADS=1 python benchmarks/sets.py                                          # synthetic stays
    $ OMP_NUM_THREADS=1 python benchmarks/sets.py --data ../shared/data/physionet2012      # stays of the challenge
    $ python benchmarks/sets.py --quick     # one batch of two stays

loop: every set alone through the set encoder, the decoder and the Chamfer distance, every stay alone through the sequence encoder; the
losses are added up and go backward once. It leaves out the share of decoded variables, which the packed step counts: in its favour.
First all must agree, with dropout and noise off: the loss to 1e-5 of itself, each gradient to 1e-4 of its largest entry.

Time: the batches are those of the bucketed sampler, both take the same one in turn, in one process, three batches after one step of
each to warm up; medians are printed, of the ratios too, which are taken within a batch.

Memory (Linux): a fresh process each, which gets only the first of these batches; the peak resident memory of one step, VmHWM, minus
what is resident before it, when a step of one stay has loaded the libraries and made the state of the optimizer. The peak is reset in
between, through /proc/self/clear_refs; ru_maxrss cannot be, and a new process inherits it. MALLOC_MMAP_THRESHOLD_ is set, for both
alike, so that freed memory goes back at once. "by stay" is the loop with a backward pass after every stay: the same gradients, the
activations of one stay at a time.

Last result, torch 2.13.0+cpu, 2 cores, 1 thread, others at work beside it (load about 4): the seconds are far too long, the ratios are
taken side by side. The row of 64 stays is of an earlier run, with a decoder whose MLP was a quarter as wide and whose seeds were only
shifted; the time allowed for the last run ended before it.

    torch 2.13.0+cpu, 1 thread(s), 4,000 stays, physionet2012, 75 sets each of 5.9 events, the largest 39
      8 stays of   633 sets   loop  19.36 s   packed  1.35 s    12.7 x   peak MB: loop   280, by stay   36, packed   130
     16 stays of 1,110 sets   loop   7.71 s   packed  0.47 s    16.5 x   peak MB: loop   501, by stay   32, packed   218
     32 stays of 1,914 sets   loop  32.22 s   packed  2.11 s    15.3 x   peak MB: loop   879, by stay   28, packed   352
     64 stays of 5,589 sets   loop  28.52 s   packed  1.72 s    16.5 x   peak MB: loop 2,331, by stay   49, packed   874
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

import data
import losses
import train
from _quick import new_parser, parse


def loop_losses(model, inputs, args):
    """The loss of each stay, one after the other: mean over its sets of reconstruction + beta * KL divergence."""
    encoder, set_end = model.encoder, inputs["lengths"].cumsum(0).tolist()
    events = encoder.events(inputs).split(inputs["sizes"].tolist())
    for end, length in zip(set_end, inputs["lengths"].tolist()):
        stay = slice(end - length, end)
        encoded = torch.cat([encoder.sets(each, torch.tensor([len(each)])) for each in events[stay]])
        mu, logvar = encoder.mu(encoded), model.logvar(encoded)
        latent = mu + torch.randn_like(mu) * (logvar / 2).exp() if model.training else mu
        hidden = encoder.sequence(latent, {"minutes": inputs["minutes"][stay], "lengths": torch.tensor([length])})[0]
        recon = [losses.chamfer(model.decoder(hidden[i : i + 1], torch.ones(1, len(each), dtype=torch.bool)), each[None])
                 for i, each in enumerate(events[stay])]
        yield torch.cat(recon).mean() + args.beta * losses.kl_to_standard_normal(mu, logvar, free_bits=args.free_bits).mean()


def backward(kind, model, inputs, args):
    """Gradients of the batch, and its loss."""
    if kind == "packed":
        loss, _ = train.vae_loss(model, {"inputs": inputs}, args.beta_steps, args)  # at the full beta
    elif kind == "loop":
        loss = sum(loop_losses(model, inputs, args)) / len(inputs["lengths"])
    else:
        loss = 0.0
        for each in loop_losses(model, inputs, args):
            (each / len(inputs["lengths"])).backward()
            loss += float(each.detach()) / len(inputs["lengths"])
        return loss
    loss.backward()
    return float(loss.detach())


def network(largest_set):
    args = train.parse_args(["--task", "seqsetvae", "--mode", "pretrain", "--width", "64", "--depth", "2"])
    args.facts = {"largest_set": largest_set}
    torch.manual_seed(0)
    model = train.vae_network(args).train()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True), args


def step(kind, model, optimizer, inputs, args):
    """Seconds of one step."""
    start = time.perf_counter()
    optimizer.zero_grad()
    backward(kind, model, inputs, args)
    optimizer.step()
    return time.perf_counter() - start


def check(model, inputs, args):
    """All ways give one loss and the same gradients, or this ends here."""
    model.eval()
    found = []
    for kind in ("loop", "packed", "by stay"):
        model.zero_grad()
        loss = backward(kind, model, inputs, args)
        found.append((loss, {name: p.grad.clone() for name, p in model.named_parameters()}))
    model.zero_grad()
    model.train()
    (loss, gradients), *others = found
    worst = [0.0, 0.0]
    for other, theirs in others:
        worst[0] = max(worst[0], abs(other - loss) / loss)
        worst[1] = max(worst[1], *(float((theirs[name] - g).abs().max() / g.abs().max().clamp_min(1e-12)) for name, g in gradients.items()))
    if worst[0] > 1e-5 or worst[1] > 1e-4:
        sys.exit(f"they disagree: loss by {worst[0]:.1e}, gradients by {worst[1]:.1e}")
    return worst


def memory(kind, file):
    """Prints the MB that one step adds to the peak of this process."""
    small, inputs, largest_set = torch.load(file)
    model, optimizer, args = network(largest_set)
    step(kind, model, optimizer, small, args)
    resident = lambda name: int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) / 1024
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    step(kind, model, optimizer, inputs, args)
    print(resident("VmHWM") - before)


def peak_of_step(kind, file):
    """MB, in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "memory", kind, str(file)],
                          capture_output=True, text=True,
                          env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"})
    if done.returncode:
        sys.exit(done.stderr)
    return float(done.stdout)


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--data", default="", help="the folder of PhysioNet 2012; without it synthetic stays")
    parser.add_argument("--stays", type=int, nargs="+", default=[8, 16, 32, 64])
    given = parse(parser)
    path, counts, most_batches, kinds = given.data, given.stays, 3, ("loop", "by stay", "packed")
    if given.quick:
        path, counts, most_batches, kinds = "", [2], 1, ("packed",)
    if path:
        stays = data.read_stays(path, need_outcomes=False)
    else:
        stays = data.synthetic_stays(6 if given.quick else 1000)
    rows, largest_set = np.arange(len(stays["ids"])), int(np.diff(stays["first_event"]).max())
    split, name = data.StaySplit(stays, rows, scaler=data.event_scaler(stays, rows)), Path(path).name if path else "synthetic"
    model, optimizer, args = network(largest_set)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {len(rows):,} stays, {name}, "
          f"{split.lengths.mean():.0f} sets each of {split.sizes.mean():.1f} events, the largest {largest_set}")
    errors = []
    for count in counts:
        plan = data.bucketed_batches(split.lengths, count, seed=0, epoch=0)[:most_batches]
        batches = [split.batch(rows)["inputs"] for rows in plan]
        errors.append(check(model, batches[0], args))
        for kind in ("packed", "loop"):
            step(kind, model, optimizer, split.batch([0])["inputs"], args)
        loop, packed = zip(*[[step(kind, model, optimizer, inputs, args) for kind in ("loop", "packed")] for inputs in batches])
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "batch.pt"
            torch.save((split.batch([0])["inputs"], batches[0], largest_set), file)
            peaks = [f"{kind} {peak_of_step(kind, file):5,.0f}" for kind in kinds]
        ratio = statistics.median(slow / fast for slow, fast in zip(loop, packed))
        print(f"{count:3} stays of {statistics.median(len(each['sizes']) for each in batches):5,.0f} sets   "
              f"loop {statistics.median(loop):6.2f} s   packed {statistics.median(packed):5.2f} s   {ratio:5.1f} x   "
              f"peak MB: {', '.join(peaks)}", flush=True)
    print(f"all three differ by at most {max(loss for loss, _ in errors):.0e} (loss) and {max(each for _, each in errors):.0e} (gradients)")


if __name__ == "__main__":
    if sys.argv[1:2] == ["memory"]:
        memory(*sys.argv[2:])
    else:
        main()
