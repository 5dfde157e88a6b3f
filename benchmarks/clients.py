"""Our pieces in other people's loops: each client trains, is killed, and goes on.

    $ pip install lightning transformers accelerate timm
    $ python benchmarks/clients.py
    $ python benchmarks/clients.py lightning accelerate
    $ python benchmarks/clients.py --quick     # the loops that need torch alone

A tiny regression on 90 rows of one class and 10 of another, batches of 10 from
StratifiedBatchSampler, twelve epochs, two param groups. Every client runs in one process and in
two (torchrun, gloo), each time straight to the end, and once more killed by SIGKILL within the
seventh epoch and resumed from the client's own checkpoint. Checked:

    rate      of both groups at every update is the closed form, and 0.1 times it
    resume    rates, rows and final weights equal the straight run bit for bit
    rows      all 100 are drawn

The settings that a client needs are the comments in its function here. Last result, torch
2.13.0+cpu, lightning 2.6.6, transformers 5.24.0, accelerate 1.15.0, timm 1.0.31:

    client        processes  updates  rows   rate, resume, rows
    plain                 1      120   100   as they should be
    plain                 2       60   100   as they should be
    sequential            1      120   100   as they should be
    sequential            2       60   100   as they should be
    timm                  1      120   100   as they should be
    lightning             1      120   100   as they should be
    lightning             2       60   100   as they should be
    transformers          1      120   100   as they should be
    transformers          2       60   100   as they should be
    accelerate            1      120   100   as they should be
    accelerate            2      120   100   as they should be
    accumulation          1       60   100   as they should be
    accumulation          2       60   100   as they should be
    0 failed
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed
import torch.nn as nn
from torch.utils.data import DataLoader

from _quick import new_parser, parse, require
import data
import schedulers

EPOCHS, BATCH_SIZE, LABELS = 12, 10, [0] * 90 + [1] * 10
PEAK, WARMUP, MIN_LR = 0.1, 11, 0.001


# --------------------------------------------------------------------------------------------------
# What all clients train


class Rows(torch.utils.data.Dataset):
    def __init__(self):
        self.x = torch.randn(len(LABELS), 4, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"x": self.x[i], "y": self.x[i].sum(), "row": i}


class Net(nn.Module):
    """Returns the loss, as networks of transformers do, and notes the rows that it saw."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.seen = nn.Linear(4, 8), nn.Linear(8, 1), []

    def forward(self, x, y, row):
        self.seen += row.tolist()
        return {"loss": nn.functional.mse_loss(self.head(self.body(x).tanh()).squeeze(1), y)}


def optimizer_of(net):
    return torch.optim.AdamW([{"params": net.body.parameters(), "lr": 0.1 * PEAK},
                              {"params": net.head.parameters(), "lr": PEAK}])


def cosine(optimizer, updates):
    return schedulers.WarmupCosine(optimizer, updates, warmup_steps=WARMUP, min_lr=MIN_LR)


def cosine_at(t, updates):
    return schedulers.warmup_cosine(t, PEAK, total_steps=updates, warmup_steps=WARMUP,
                                    min_lr=MIN_LR)


def batches_of_rows(**processes):
    sampler = data.StratifiedBatchSampler(LABELS, BATCH_SIZE, **processes)
    return sampler, DataLoader(Rows(), batch_sampler=sampler)


class Recorder:
    """Writes the rates and rows of every update to a file; kills the process where asked."""

    def __init__(self, folder, begin, kill):
        rank = os.environ.get("RANK", "0")
        self.folder, self.update, self.kill = folder, begin, kill
        self.file = open(folder / f"updates-{rank}.jsonl", "a")

    def watch(self, net, optimizer):
        def after_step(optimizer, args, kwargs):  # in Lightning the step runs forward and backward
            line = {"update": self.update, "rows": list(net.seen),
                    "rates": [float(group["lr"]) for group in optimizer.param_groups]}
            print(json.dumps(line), file=self.file, flush=True)
            net.seen.clear()
            if self.update == self.kill and os.environ.get("RANK", "0") == "0":
                os.kill(os.getpid(), signal.SIGKILL)
            self.update += 1
        optimizer.register_step_post_hook(after_step)

    def end(self, net):
        weights = b"".join(p.detach().numpy().tobytes() for p in net.parameters())
        if os.environ.get("RANK", "0") == "0":
            (self.folder / "weights").write_text(hashlib.sha256(weights).hexdigest())


# --------------------------------------------------------------------------------------------------
# The clients: train(recorder, folder, updates) goes on where the folder holds a checkpoint


def plain(recorder, folder, updates, make_schedule=cosine):
    """A loop in torch alone, which saves four state_dicts and never calls set_epoch."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        torch.distributed.init_process_group("gloo")
    net = Net()
    optimizer = optimizer_of(net)
    schedule = make_schedule(optimizer, updates)
    sampler, batches = batches_of_rows()  # rank and world size are torch.distributed's
    recorder.watch(net, optimizer)
    model = nn.parallel.DistributedDataParallel(net) if world_size > 1 else net
    parts, path, begin = [net, optimizer, schedule, sampler], folder / "checkpoint.pt", 0
    if path.exists():
        begin, *states = torch.load(path)
        for part, state in zip(parts, states):
            part.load_state_dict(state)
    for epoch in range(begin, EPOCHS):
        for batch in batches:
            optimizer.zero_grad()
            model(**batch)["loss"].backward()
            optimizer.step()
            schedule.step()
        if os.environ.get("RANK", "0") == "0":
            torch.save([epoch + 1, *[part.state_dict() for part in parts]], path)
    recorder.end(net)


def sequential(recorder, folder, updates):
    """The same with a SequentialLR: a warm-up, then from update 20 a cosine of its own."""
    def make_schedule(optimizer, updates):
        parts = [schedulers.Constant(optimizer, warmup_steps=WARMUP),
                 schedulers.WarmupCosine(optimizer, updates - 20, min_lr=MIN_LR)]
        return torch.optim.lr_scheduler.SequentialLR(optimizer, parts, milestones=[20])
    plain(recorder, folder, updates, make_schedule)


def sequential_at(t, updates):
    if t < 20:
        return schedulers.linear_warmup(t, PEAK, warmup_steps=WARMUP)
    return schedulers.warmup_cosine(t - 20, PEAK, total_steps=updates - 20, min_lr=MIN_LR)


def timm(recorder, folder, updates):
    """The loop of timm's train.py, which counts updates itself and saves no schedule."""
    from timm.utils import CheckpointSaver
    net = Net()
    optimizer = optimizer_of(net)
    for group in optimizer.param_groups:  # as layer decay writes it
        group["lr_scale"], group["lr"] = group["lr"] / PEAK, PEAK
    # timm's default: the cosine begins under the warm-up
    schedule = schedulers.WarmupCosine(optimizer, updates, warmup_steps=WARMUP, min_lr=MIN_LR,
                                       warmup_prefix=False)
    sampler, batches = batches_of_rows()
    recorder.watch(net, optimizer)
    saver = CheckpointSaver(net, optimizer, checkpoint_dir=str(folder))
    begin = 0
    if (folder / "last.pth.tar").exists():
        state = torch.load(folder / "last.pth.tar", weights_only=False)
        begin = state["epoch"] + 1
        net.load_state_dict(state["state_dict"])
        optimizer.load_state_dict(state["optimizer"])
    num_updates = begin * len(batches)
    schedule.set_step(num_updates)                 # in place of step_update(num_updates)
    for epoch in range(begin, EPOCHS):
        sampler.set_epoch(epoch)                   # the checkpoint of timm has no sampler
        for batch in batches:
            optimizer.zero_grad()
            net(**batch)["loss"].backward()
            optimizer.step()
            num_updates += 1
            schedule.set_step(num_updates)
        saver.save_checkpoint(epoch, metric=epoch)
    recorder.end(net)


def timm_at(t, updates):
    """timm's own CosineLRScheduler."""
    from timm.scheduler import CosineLRScheduler
    parameters = nn.ParameterList([nn.Parameter(torch.zeros(1))])
    theirs = CosineLRScheduler(torch.optim.SGD(parameters, lr=PEAK), t_initial=updates,
                               lr_min=MIN_LR, warmup_t=WARMUP, t_in_epochs=False)
    theirs.step_update(t)
    return theirs.optimizer.param_groups[0]["lr"]


def lightning(recorder, folder, updates):
    """Lightning calls set_epoch where a batch sampler has `sampler`, and saves the schedule."""
    from lightning import pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def training_step(self, batch, _):
            return self.net(**batch)["loss"]

        def configure_optimizers(self):
            optimizer = optimizer_of(self.net)
            recorder.watch(self.net, optimizer)
            return {"optimizer": optimizer,        # "step": without it, a step is an epoch
                    "lr_scheduler": {"scheduler": cosine(optimizer, updates), "interval": "step"}}

    module = Module()
    save = pl.callbacks.ModelCheckpoint(dirpath=folder, filename="last",
                                        save_on_train_epoch_end=True, enable_version_counter=False)
    trainer = pl.Trainer(max_epochs=EPOCHS, accelerator="cpu", callbacks=[save], logger=False,
                         devices=int(os.environ.get("WORLD_SIZE", 1)), default_root_dir=folder,
                         # the batch sampler already knows its rank
                         use_distributed_sampler=False,
                         enable_progress_bar=False, enable_model_summary=False)
    path = folder / "last.ckpt"
    _, batches = batches_of_rows(**ranks_of_environment())  # made before Lightning's processes
    trainer.fit(module, batches, ckpt_path=path if path.exists() else None)
    recorder.end(module.net)


def ranks_of_environment():
    return {"rank": int(os.environ.get("RANK", 0)),
            "world_size": int(os.environ.get("WORLD_SIZE", 1))}


def transformers(recorder, folder, updates):
    """The Trainer gets optimizer and schedule as a pair, and its own batches by an override."""
    from transformers import Trainer, TrainingArguments

    class StratifiedTrainer(Trainer):
        def get_train_dataloader(self):
            # accelerate deals the batches out, and hands set_epoch on when the Trainer resumes
            _, batches = batches_of_rows(rank=0, world_size=1)
            return self.accelerator.prepare(batches)

    net = Net()
    optimizer = optimizer_of(net)
    recorder.watch(net, optimizer)
    arguments = TrainingArguments(folder, num_train_epochs=EPOCHS, save_strategy="epoch",
                                  save_total_limit=1, use_cpu=True, report_to=[],
                                  disable_tqdm=True, logging_strategy="no")
    trainer = StratifiedTrainer(net, arguments, train_dataset=Rows(),
                                optimizers=(optimizer, cosine(optimizer, updates)))
    trainer.train(resume_from_checkpoint=bool(list(folder.glob("checkpoint-*"))))
    recorder.end(net)


def accelerate(recorder, folder, updates, **accumulation):
    """accelerate cuts the batches itself, so the sampler is that of one process."""
    import accelerate
    accelerator = accelerate.Accelerator(
        cpu=True, **accumulation,
        # without it the schedule is stepped once per process
        dataloader_config=accelerate.DataLoaderConfiguration(split_batches=True))
    net = Net()
    optimizer = optimizer_of(net)
    recorder.watch(net, optimizer)
    _, batches = batches_of_rows(rank=0, world_size=1)
    model, optimizer, batches, schedule = accelerator.prepare(
        net, optimizer, batches, cosine(optimizer, updates))
    begin = 0
    if (folder / "epoch").exists():
        begin = int((folder / "epoch").read_text())
        accelerator.load_state(folder / f"state-{begin}")
    for epoch in range(begin, EPOCHS):
        batches.set_epoch(epoch)                   # its checkpoint has no batch sampler
        for batch in batches:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch)["loss"])
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        accelerator.save_state(folder / f"state-{epoch + 1}")
        if accelerator.is_main_process:
            (folder / "epoch").write_text(str(epoch + 1))
    recorder.end(net)


def accumulation(recorder, folder, updates):
    """The same, two batches an update: accelerate steps the schedule once per update."""
    accelerate(recorder, folder, updates, gradient_accumulation_steps=2)


# name: train, closed form, updates in an epoch of 100 rows (in one process, in two), package
CLIENTS = {
    "plain": (plain, cosine_at, (10, 5), "torch"),
    "sequential": (sequential, sequential_at, (10, 5), "torch"),
    "timm": (timm, timm_at, (10, None), "timm"),  # timm's loop of two processes is plain's
    "lightning": (lightning, cosine_at, (10, 5), "lightning"),
    "transformers": (transformers, cosine_at, (10, 5), "transformers"),
    "accelerate": (accelerate, cosine_at, (10, 10), "accelerate"),
    "accumulation": (accumulation, cosine_at, (5, 5), "accelerate"),
}


# --------------------------------------------------------------------------------------------------
# The checks


def train_in_new_processes(name, processes, folder, begin=0, kill=-1):
    """Whether the run came to its end."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    words = [*torchrun, __file__] if processes > 1 else [__file__]
    words += ["--train", name, str(folder), str(processes), str(begin), str(kill)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment)
    if done.returncode and kill < 0:
        sys.exit(f"{name}, {processes} processes:\n{done.stdout}{done.stderr}")
    return done.returncode == 0


def updates_of(folder, processes):
    """{update: (rates, rows of all processes)}; of an update made twice, the later."""
    rates, rows = {}, {}
    for rank in range(processes):
        for line in map(json.loads, (folder / f"updates-{rank}.jsonl").read_text().splitlines()):
            rates[line["update"]] = line["rates"]
            rows[line["update"], rank] = line["rows"]
    return {t: (rates[t], [rows[t, rank] for rank in range(processes)]) for t in sorted(rates)}


def check(name, processes):
    """Names of the checks that failed, of one client."""
    _, closed_form, updates_per_epoch, _ = CLIENTS[name]
    per_epoch = updates_per_epoch[processes - 1]
    updates = EPOCHS * per_epoch
    with tempfile.TemporaryDirectory() as folder:
        straight, killed = Path(folder, "straight"), Path(folder, "killed")
        straight.mkdir(), killed.mkdir()
        train_in_new_processes(name, processes, straight)
        if train_in_new_processes(name, processes, killed, kill=6 * per_epoch + per_epoch // 2):
            sys.exit(f"{name}: it was to be killed, and came to its end")
        train_in_new_processes(name, processes, killed, begin=6 * per_epoch)
        seen, resumed = updates_of(straight, processes), updates_of(killed, processes)
        same_weights = (straight / "weights").read_text() == (killed / "weights").read_text()
    wanted = {t: closed_form(t, updates) for t in range(updates)}
    rate = seen.keys() == wanted.keys() and all(
        abs(got - share * wanted[t]) <= 1e-12 for t, (rates, _) in seen.items()
        for share, got in zip((0.1, 1), rates))
    rows = {row for _, of_ranks in seen.values() for rows in of_ranks for row in rows}
    outcome = {"rate": rate, "resume": seen == resumed and same_weights,
               "rows": len(rows) == len(LABELS)}
    return [check for check, ok in outcome.items() if not ok], updates, len(rows)


def main():
    parser = new_parser(__doc__)
    parser.add_argument("clients", nargs="*", help=f"of {', '.join(CLIENTS)}")
    parser.add_argument("--train", nargs=5, help="used by the script itself",
                        metavar=("CLIENT", "FOLDER", "PROCESSES", "BEGIN", "KILL"))
    args = parse(parser)
    if args.train:
        name, folder, processes, begin, kill = args.train
        train, _, per_epoch, _ = CLIENTS[name]
        recorder = Recorder(Path(folder), int(begin), int(kill))
        train(recorder, Path(folder), EPOCHS * per_epoch[int(processes) - 1])
        return
    names = args.clients or (["plain", "sequential"] if args.quick else list(CLIENTS))
    if unknown := set(names) - CLIENTS.keys():
        parser.error(f"no client {', '.join(sorted(unknown))}: choose from {', '.join(CLIENTS)}")
    require("pip install lightning transformers accelerate timm",
            *[CLIENTS[name][3] for name in names])
    print(f"{'client':<14}{'processes':>9}{'updates':>9}{'rows':>6}   rate, resume, rows")
    failed = 0
    for name in names:
        for processes in (1, 2):
            if CLIENTS[name][2][processes - 1] is None or args.quick and processes == 2:
                continue
            wrong, updates, rows = check(name, processes)
            failed += bool(wrong)
            outcome = "wrong: " + ", ".join(wrong) if wrong else "as they should be"
            print(f"{name:<14}{processes:>9}{updates:>9}{rows:>6}   {outcome}", flush=True)
    print(f"{failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
