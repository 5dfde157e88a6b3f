"""One training step of SeqSetVAE: all stays packed in one batch, against a loop over the sets.

    $ OMP_NUM_THREADS=1 python benchmarks/sets.py                          # synthetic stays
    $ OMP_NUM_THREADS=1 python benchmarks/sets.py --data physionet2012     # stays of the challenge
    $ python benchmarks/sets.py --quick     # one batch of two stays

Width 64, depth 2: forward, loss of --mode pretrain, backward, fused AdamW.
    packed     as SeqSetVAE takes stays
    loop       every set and every stay alone, one backward pass; no padding, no masks, and no share
               of decoded variables, which packed counts: in its favour
    by stay    the loop with a backward pass after every stay: activations of one stay at a time

First all must agree without dropout and noise: the loss to 1e-5, gradients to 1e-4. Time: three
batches, in turn in one process; a ratio is taken within a batch. Memory (Linux): a fresh process
with the first batch; the peak of one step (VmHWM) minus what is resident before it, where freed
memory goes back at once (MALLOC_MMAP_THRESHOLD_).

Last result, torch 2.13.0+cpu, 2 cores, 1 thread, physionet2012, 4,000 stays, 75 sets each of 5.9
events, the largest 39. Load about 4: the seconds are too long; the ratios are taken side by side.
The row of 64 stays is older: a decoder with an MLP a quarter as wide and seeds only shifted.

                  sets     loop      packed    ratio    peak MB: loop   by stay   packed
     8 stays       633    19.36 s    1.35 s    12.7 x             280        36      130
    16 stays     1,110     7.71 s    0.47 s    16.5 x             501        32      218
    32 stays     1,914    32.22 s    2.11 s    15.3 x             879        28      352
    64 stays     5,589    28.52 s    1.72 s    16.5 x           2,331        49      874
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from _quick import median_ratio, new_parser, parse, run_python
import data
import losses
import train
from tasks import seqsetvae_data, seqsetvae_pretrain


def loop_losses(model, inputs, args):
    """Yield the loss of every stay: mean over its sets of reconstruction + beta * KL divergence."""
    encoder = model.encoder
    all_events = encoder.events(inputs).split(inputs["sizes"].tolist())
    last_sets = inputs["lengths"].cumsum(0).tolist()
    for end, length in zip(last_sets, inputs["lengths"].tolist()):
        stay = slice(end - length, end)
        sets = all_events[stay]
        encoded = torch.cat([encoder.sets(events, torch.tensor([len(events)])) for events in sets])
        mu, logvar = encoder.mu(encoded), model.logvar(encoded)
        latent = mu
        if model.training:
            latent = mu + torch.randn_like(mu) * (logvar / 2).exp()
        times = {"minutes": inputs["minutes"][stay], "lengths": torch.tensor([length])}
        hidden = encoder.sequence(latent, times)[0]
        reconstructions = []
        for i, events in enumerate(sets):
            mask = torch.ones(1, len(events), dtype=torch.bool)
            decoded = model.decoder(hidden[i : i + 1], mask)
            reconstructions.append(losses.chamfer(decoded, events[None]))
        divergence = losses.kl_to_standard_normal(mu, logvar, free_bits=args.free_bits)
        yield torch.cat(reconstructions).mean() + args.beta * divergence.mean()


def backward(kind, model, inputs, args):
    """Add the gradients of the batch; returns its loss."""
    stays = len(inputs["lengths"])
    if kind == "by stay":
        total = 0.0
        for loss in loop_losses(model, inputs, args):
            (loss / stays).backward()
            total += float(loss.detach()) / stays
        return total
    if kind == "packed":
        batch = {"inputs": inputs, "step": args.beta_steps}  # at the full beta
        loss, _ = seqsetvae_pretrain.loss(model, batch, args, facts=None)
    else:
        loss = sum(loop_losses(model, inputs, args)) / stays
    loss.backward()
    return float(loss.detach())


def network(largest_set):
    """The network, its optimizer and the arguments of the run."""
    words = "--task seqsetvae --mode pretrain --width 64 --depth 2"
    args = train.parse_args(words.split())
    torch.manual_seed(0)
    model = seqsetvae_pretrain.network(args, {"largest_set": largest_set}).train()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True), args


def step(kind, model, optimizer, inputs, args):
    """Seconds of one step."""
    start = time.perf_counter()
    optimizer.zero_grad()
    backward(kind, model, inputs, args)
    optimizer.step()
    return time.perf_counter() - start


def check(model, inputs, args):
    """Largest differences of the loss and of a gradient; end if the three kinds disagree."""
    model.eval()
    results = []
    for kind in ("loop", "packed", "by stay"):
        model.zero_grad()
        loss = backward(kind, model, inputs, args)
        results.append((loss, {name: p.grad.clone() for name, p in model.named_parameters()}))
    model.zero_grad()
    model.train()
    (loop_loss, loop_gradients), *others = results
    loss_error = gradient_error = 0.0
    for loss, gradients in others:
        loss_error = max(loss_error, abs(loss - loop_loss) / loop_loss)
        for name, expected in loop_gradients.items():
            largest = expected.abs().max().clamp_min(1e-12)
            error = (gradients[name] - expected).abs().max() / largest
            gradient_error = max(gradient_error, float(error))
    if loss_error > 1e-5 or gradient_error > 1e-4:
        sys.exit(f"they disagree: loss by {loss_error:.1e}, gradients by {gradient_error:.1e}")
    return loss_error, gradient_error


def resident_memory(name):
    """MB of VmRSS (now) or VmHWM (peak) of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) / 1024


def memory(kind, file):
    """In a process of its own: print the MB that one step adds to its peak."""
    small, inputs, largest_set = torch.load(file)
    model, optimizer, args = network(largest_set)
    step(kind, model, optimizer, small, args)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_memory("VmRSS")
    step(kind, model, optimizer, inputs, args)
    print(resident_memory("VmHWM") - before)


def peaks_of_step(kinds, content):
    """"KIND MB, ..." for a step of each kind, in a process of its own; content: see `memory`."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "batch.pt"
        torch.save(content, file)
        peaks = []
        for kind in kinds:
            printed = run_python(__file__, "memory", kind, str(file),
                                 MALLOC_MMAP_THRESHOLD_="1000000")
            peaks.append(f"{kind} {float(printed):5,.0f}")
    return ", ".join(peaks)


def compare(stays, name, counts, most_batches, kinds):
    """A row per number of stays in a batch, at most `most_batches` batches."""
    rows = np.arange(len(stays["ids"]))
    largest_set = int(np.diff(stays["first_event"]).max())
    scaler = seqsetvae_data.event_scaler(stays, rows)
    split = seqsetvae_data.StaySplit(stays, rows, scaler=scaler)
    model, optimizer, args = network(largest_set)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), "
          f"{len(rows):,} stays, {name}, {split.lengths.mean():.0f} sets each of "
          f"{split.sizes.mean():.1f} events, the largest {largest_set}")
    one_stay = split.batch([0])["inputs"]
    errors = []
    for count in counts:
        plan = data.bucketed_batches(split.lengths, count, seed=0, epoch=0)[:most_batches]
        batches = [split.batch(batch_rows)["inputs"] for batch_rows in plan]
        errors.append(check(model, batches[0], args))
        for kind in ("packed", "loop"):
            step(kind, model, optimizer, one_stay, args)
        loop, packed = [], []
        for inputs in batches:
            loop.append(step("loop", model, optimizer, inputs, args))
            packed.append(step("packed", model, optimizer, inputs, args))
        peaks = peaks_of_step(kinds, (one_stay, batches[0], largest_set))
        ratio = median_ratio(loop, packed)
        sets = statistics.median(len(inputs["sizes"]) for inputs in batches)
        print(f"{count:3} stays of {sets:5,.0f} sets   loop {statistics.median(loop):6.2f} s   "
              f"packed {statistics.median(packed):5.2f} s   {ratio:5.1f} x   peak MB: {peaks}",
              flush=True)
    loss_errors, gradient_errors = zip(*errors)
    print(f"all three differ by at most {max(loss_errors):.0e} (loss) and "
          f"{max(gradient_errors):.0e} (gradients)")


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--data", default="",
                        help="the folder of PhysioNet 2012 (default: synthetic stays)")
    parser.add_argument("--stays", type=int, nargs="+", default=[8, 16, 32, 64])
    args = parse(parser)
    if args.quick:
        stays = seqsetvae_data.synthetic_stays(6)
        compare(stays, "synthetic", counts=[2], most_batches=1, kinds=("packed",))
        return
    if args.data:
        stays = seqsetvae_data.read_stays(args.data, need_outcomes=False)
    else:
        stays = seqsetvae_data.synthetic_stays(1000)
    compare(stays, Path(args.data).name or "synthetic", args.stays, most_batches=3,
            kinds=("loop", "by stay", "packed"))


if __name__ == "__main__":
    if sys.argv[1:2] == ["memory"]:
        memory(*sys.argv[2:])
    else:
        main()
