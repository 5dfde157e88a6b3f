"""Tests of processes."""

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import unittest

import numpy as np
import torch

import train
from runtime import checkpoint, processes, report
from runtime.checkpoint import RUN_FILES
from runtime.processes import rank, world_size
from tasks import ocec
from tests.helpers import (
    call, FACEPARSE, faces_npz, folder, HERE, loaded, make_npz, MODAL, near, PPG, ppg_folder,
    quad_npz, replaced, result_of, same_bits, scores_of, STAYS, stays_folder, TINY)


IN_EACH_PROCESS = """
import pathlib, sys
sys.path.insert(0, {here!r})
from runtime import processes
from tests import test_processes
with processes.process_group():
    test_processes.{name}(pathlib.Path({folder!r}))
processes.leave(0)
"""
TWO_HERE = ["--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]


def start_two(work, f, *words):
    """torchrun with two processes that call work(f), or with what words say."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        raise unittest.SkipTest("needs torch with gloo")
    script = IN_EACH_PROCESS.format(here=str(HERE), name=work.__name__, folder=str(f))
    (f / "work.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", *(words or TWO_HERE), f / "work.py"]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def in_two_processes(work, f, *words):
    """work(f) in two processes, to its end; what they printed."""
    process = start_two(work, f, *words)
    try:
        printed = process.communicate(timeout=300)[0]
    finally:
        process.kill()
    assert process.returncode == 0, printed
    return printed


def after_an_epoch(*words):
    """The network after one epoch, its average, the epoch's loss, parts and step, and the seeds.

    By plain SGD: AdamW would magnify the rounding of tiny gradients.
    """
    args, sets = loaded(*words)
    batch_of, seeds = sets.train.batch, set()

    def noted_batch(rows, generator):
        seeds.add(generator.initial_seed())
        return batch_of(rows, generator)

    sets.train.batch = noted_batch
    run = train.build(args, sets.facts, 10)
    run.optimizer = torch.optim.SGD(run.raw_model.parameters(), lr=0.1)
    run.loss = processes.share_gradients(run.loss)
    with processes.StopSignal() as stop:
        row = train.train_epoch(run, sets.train, 1, stop)
    return {"model": run.raw_model.state_dict(), "ema": run.ema.module.state_dict(),
            "loss": row["train_loss"], "parts": row["parts"], "step": row["step"],
            "seeds": [torch.initial_seed(), *seeds]}


# No noise, no batch norm. 42 eyes: windows of 24 and of 18; 40 stays, of 24 and of 16; SupCon
# compares all rows of a batch.
ALIKE = {
    "ocec": [*TINY, "--data", "eyes.npz", "--block", "convnext", "--channels", "16",
             "--token-grid", "2x2", "--schedule", "none", "--warmup-epochs", "0", "--flip", "0",
             "--crop", "0", "--degrees", "0", "--zoom", "1", "--bend", "0", "--noise", "0",
             "--dropout", "0"],
    "seqsetvae": [*STAYS, "--data", "stays", "--sampler", "shuffled", "--dropout", "0",
                  "--head-dropout", "0", "--drop-events", "0"],
    "quadmodal": [*MODAL, "--data", "modal.npz", "--dropout", "0", "--noise", "0", "--scale", "0",
                  "--shift", "0", "--modality-dropout", "0"],
}


def alike_data(f):
    make_npz(f / "eyes.npz")
    stays_folder(f)
    quad_npz(f / "modal.npz")


def alike(f, task, batch_size, accumulate):
    words = [f / word if word in ("eyes.npz", "stays", "modal.npz") else word
             for word in ALIKE[task]]
    return after_an_epoch(*words, "--batch-size", batch_size, "--accumulate", accumulate)


class NumberedRows:
    """Five rows, scored one at a time."""

    chunk = 1

    def __len__(self):
        return 5

    def batch(self, rows):
        return torch.from_numpy(rows)


def rows_and_ranks(model, batch, args, facts):
    """The outputs of a task: which process computed which row."""
    return {"row": batch, "rank": torch.full_like(batch, rank())}


def work_alike(f):
    for task in ALIKE:
        torch.save(alike(f, task, 24, 1), f / f"{task}-{rank()}.pt")
        torch.save(alike(f, task, 12, 2), f / f"{task}-accumulated-{rank()}.pt")
    share, own = processes.share_buffers, {}

    def look_and_share(*models):
        for name, model in zip(("model", "ema"), models, strict=True):
            own[name] = {key: buffer.clone() for key, buffer in model.named_buffers()}
        share(*models)

    with replaced(processes, "share_buffers", look_and_share):
        noisy = after_an_epoch(*TINY, "--data", f / "eyes.npz")  # with batch norm
    torch.save(noisy, f / f"noisy-{rank()}.pt")
    torch.save(own, f / f"own-{rank()}.pt")
    task = types.SimpleNamespace(outputs=rows_and_ranks, reference=False)
    run = types.SimpleNamespace(task=task, args=None, facts=None)
    dealt = train.outputs_of(torch.nn.Identity(), NumberedRows(), run)
    torch.save(dealt, f / f"dealt-{rank()}.pt")


def results_of_two(f, name):
    return [torch.load(f / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1)]


def check_alike(got, want, where):
    """The same epoch, but for the order in which sums are rounded."""
    assert got["step"] == want["step"] and got["parts"].keys() == want["parts"].keys(), where
    assert near(got["loss"], want["loss"], 1e-5), (where, got["loss"], want["loss"])
    for kind in ("parts", "model", "ema"):
        for name, value in want[kind].items():
            assert near(got[kind][name], value, 1e-5), (where, kind, name)


def test_train_a_world_size_without_torchrun_is_refused():
    os.environ["WORLD_SIZE"] = "2"
    try:
        code, _, err = call(*TINY)
    finally:
        del os.environ["WORLD_SIZE"]
    assert code == 2 and "WORLD_SIZE is 2, but RANK, LOCAL_RANK" in err
    assert "start with torchrun" in err


def test_train_two_processes_equal_one_and_equal_accumulation():
    with folder() as f:
        alike_data(f)
        in_two_processes(work_alike, f)
        for task in ALIKE:
            two, other = results_of_two(f, task)
            assert same_bits(two | {"seeds": 0}, other | {"seeds": 0}), task
            check_alike(two, alike(f, task, 24, 1), (task, "one process"))
            if task != "quadmodal":
                check_alike(two, alike(f, task, 12, 2), (task, "one process, accumulated"))
                accumulated = results_of_two(f, f"{task}-accumulated")[0]
                check_alike(two, accumulated, (task, "two processes, accumulated"))
        first, second = results_of_two(f, "noisy")
        assert not set(first["seeds"]) & set(second["seeds"])
        assert same_bits(first | {"seeds": 0}, second | {"seeds": 0})
        own_first, own_second = results_of_two(f, "own")
        assert list(own_first) == ["model", "ema"]
        for name, buffers in own_first.items():  # batch statistics of rank 0, and of its average
            assert buffers and not same_bits(buffers, own_second[name]), name
            for key, value in buffers.items():
                assert torch.equal(first[name][key], value), (name, key)
        for dealt in results_of_two(f, "dealt"):
            assert dealt["row"].tolist() == [0, 1, 2, 3, 4]
            assert dealt["rank"].tolist() == [0, 1, 0, 1, 0]


def all_tasks(f):
    """A call of every task and of both pretrainings, on data in f; all kinds of noise are on."""
    ppg = [*PPG, "--data", f / "bidmc", "--cache", f / "cache"]
    stays = [*STAYS, "--data", f / "stays"]
    return {
        "ocec": [*TINY, "--data", f / "eyes.npz", "--accumulate", "2", "--batch-size", "12",
                 "--epochs", "2", "--schedule", "plateau"],
        "faceparse": [*FACEPARSE, "--data", f / "faces.npz", "--mixup", "0.2"],
        "bidmc_hr": [*ppg, "--mode", "pretrain"],
        "quadmodal": [*MODAL, "--data", f / "modal.npz", "--mixup", "0.3",
                      "--modality-dropout", "0.5", "--sampler", "stratified"],
        "seqsetvae": stays,
        "vae": [*stays, "--mode", "pretrain"],
        "probe": [*ppg, "--mode", "probe", "--pretrained", f / "bidmc_hr"],
    }


def main(*words):
    return train.main([str(word) for word in words])


def signals_after_an_epoch(finish):
    """finish_epoch, after which rank 1 is asked to end, once epoch 1 is written."""
    def finish_and_signal(run, folder):
        finish(run, folder)
        if run.history[-1]["epoch"] == 1 and rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    return replaced(train, "finish_epoch", finish_and_signal)


def work_all_tasks(f):
    """Every call straight, then again with SIGTERM to rank 1 after epoch 1, and resumed."""
    for name, words in all_tasks(f).items():
        again = f / f"{name}-again"
        assert main(*words, "--out", f / name) == 0, name
        with signals_after_an_epoch(train.finish_epoch):
            assert main(*words, "--out", again) == 128 + signal.SIGTERM, name
        cache = ["--cache", f / "cache"] if "--cache" in words else []
        assert main("--task", words[1], "--out", again, "--resume", *cache) == 0, name

    def score_epoch(run, row, splits):
        """Rank 1 alone would stop after epoch 2."""
        f1 = row["epoch"] / 10 if rank() == 0 else 0.5
        return row | {"raw": {"loss": 1.0, "f1": f1}, "score": f1, "weights": "raw"}

    with replaced(train, "score_epoch", score_epoch):
        words = ["--data", f / "eyes.npz", "--out", f / "decides", "--patience", "1"]
        assert main(*TINY, *words, "--epochs", "4") == 0


def test_train_two_processes_run_all_tasks_write_once_stop_together_and_resume_bit_for_bit():
    with folder() as f:
        alike_data(f)
        faces_npz(f / "faces.npz")
        ppg_folder(f)
        printed = in_two_processes(work_all_tasks, f)
        calls = all_tasks(f)
        assert len((f / "decides" / "log.jsonl").read_text().splitlines()) == 5
        # once straight, once broken off
        assert printed.count("epoch   1/2 |") == 2 * len(calls), printed
        assert printed.count("SIGTERM: epoch 1 of 2 is saved") == len(calls)
        assert "not bit for bit" not in printed and "| 2 processes" in printed
        assert "go on with\n    torchrun --nproc-per-node 2 train.py --task ocec" in printed
        for name in calls:
            straight, resumed = f / name, f / f"{name}-again"
            assert len((straight / "log.jsonl").read_text().splitlines()) == 3, name
            written = set(RUN_FILES)
            if name not in ("ocec", "faceparse"):
                written -= {"examples.png"}
            assert {path.name for path in straight.iterdir()} == written, name
            for file in ("last.pt", "best.pt"):
                assert same_bits(result_of(straight, file), result_of(resumed, file)), (name, file)
            scores = (straight / "scores.json").read_text()
            assert scores == (resumed / "scores.json").read_text(), name
            assert json.loads(scores)["validation"]["model"] == scores_alone(straight / "best.pt")


def scores_alone(path):
    """The validation scores of a checkpoint, in this process alone, as JSON has them."""
    content = torch.load(path, weights_only=True)
    args = train.parse_args(["--task", content["task"], "--eval", str(path)])
    args = checkpoint.adopt_recipe(args, content).replace(device="cpu")
    task, facts = train.task_of(args), content["facts"]
    model = task.network(args, facts)
    model.load_state_dict(content["model"])
    splits = task.load(args.data, args)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the two processes: sums of two threads end in other bits
    scores = scores_of(model, splits.validation, args, facts)
    torch.set_num_threads(threads)
    return json.loads(json.dumps(report.without_nan(scores)))


def work_refusals(f):
    assert main("--task", "ocec", "--find-lr") == 2
    words = [*TINY, "--data", f / "eyes.npz", "--out", f / "a"]
    for more in (["--batch-size", "17"], ["--folds", "3"], ["--device", "cuda:1"],
                 ["--batch-size", "2"]):
        assert main(*words, *more) == 2, more

    def read_absent(*_, **__):
        np.load(f / "absent.npz")

    if rank():
        ocec.read_eyes = read_absent
    assert main(*words) == 2 and not (f / "a").exists()


def work_in_turn(f):
    """Rank 0 reads the data before rank 1 does, and it alone writes files.

    A loss of rank 1 that is no number stops both.
    """
    read, criterion = ocec.read_eyes, ocec.criterion

    def read_in_turn(*words, **options):
        assert rank() == 0 or (f / "read by rank 0").exists()
        eyes = read(*words, **options)
        time.sleep(0.3 * (rank() == 0))  # the other would be here by now
        with checkpoint.atomic_write(f / f"read by rank {rank()}") as file:
            file.write("here")
        return eyes

    def not_a_number(logits, *rest):
        return criterion(logits, *rest) * (math.nan if logits.requires_grad else 1)

    ocec.read_eyes = read_in_turn
    if rank():
        ocec.criterion = not_a_number
    assert main(*TINY, "--data", f / "eyes.npz", "--out", f / "a") == 1


def test_train_two_processes_read_in_turn_write_once_and_stop_together_at_a_loss_of_nan():
    with folder() as f:
        make_npz(f / "eyes.npz")
        printed = in_two_processes(work_in_turn, f)
        assert [path.name for path in f.glob("read by*")] == ["read by rank 0"]
        assert len(result_of(f / "a")["history"]) == 1
    stopped = "train.py: stopped: the loss became nan in epoch 1, step 0, at lr "
    assert printed.count(stopped) == 1 and "Traceback" not in printed, printed


def test_train_two_processes_refuse_what_one_of_them_refuses_and_say_so_once():
    with folder() as f:
        make_npz(f / "eyes.npz")
        printed = in_two_processes(work_refusals, f)
    for message in (
            "--batch-size 17 counts the rows of all 2 processes, which take equal shares of it: "
            "give --batch-size 18",
            "--find-lr runs in one process, not in 2",
            "--folds and --seeds run in one process, not in 2: train one at a time",
            "--device cuda:1 is one for 2 processes: give --device cuda",
            "--batch-size 2 leaves a batch of 1 of the 42 training rows to each process",
            "absent.npz"):
        assert printed.count(message) == 1, (message, printed)


def note_pid(f):
    (f / f"pid{rank()}").write_text(str(os.getpid()))


def work_killed(f):
    note_pid(f)
    main(*TINY, "--data", f / "eyes.npz", "--out", f / "a", "--epochs", "60")


def test_train_two_processes_of_which_one_is_killed_end_with_a_message_and_one_process_goes_on():
    for victim in (0, 1):
        with folder() as f:
            make_npz(f / "eyes.npz")
            process, lines = start_two(work_killed, f), []
            watchdog = threading.Timer(60, process.kill)
            watchdog.start()
            for line in process.stdout:
                lines.append(line)
                if line.startswith("epoch   2/"):
                    os.kill(int((f / f"pid{victim}").read_text()), signal.SIGKILL)
            watchdog.cancel()
            assert process.wait() == 1, lines
            printed = "".join(lines)
            lost = f"train.py: stopped: process {1 - victim} of 2 lost another one"
            assert lost in printed and "is saved in" in printed, printed
            assert (f"go on with\n    torchrun --nproc-per-node 2 train.py --task ocec "
                    f"--out {f / 'a'} --resume") in printed
            code, out, err = call("--task", "ocec", "--out", f / "a", "--resume")
            assert code == 0 and "number of processes: 2 so far, 1 from here on" in out, err
            assert len(result_of(f / "a")["history"]) == 61


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def on_two_machines(work, f):
    """work(f) in two processes, each under a torchrun of its own as on two machines.

    Returns exit codes and what each printed, within 60 s.
    """
    words = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1",
             "--master-port", str(free_port())]
    both = [start_two(work, f, *words, "--node-rank", node) for node in "01"]
    try:
        printed = [torchrun.communicate(timeout=60)[0] for torchrun in both]
    except subprocess.TimeoutExpired:
        pids = [torchrun.pid for torchrun in both]
        # a process outlives its torchrun
        pids += [int(path.read_text()) for path in f.glob("pid*")]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        raise
    return [torchrun.returncode for torchrun in both], printed


def work_two_machines(f):
    """The run straight, then broken off by a signal to the second machine, and resumed."""
    assert os.environ["LOCAL_RANK"] == "0" and world_size() == 2
    assert int(os.environ["GROUP_RANK"]) == rank()
    note_pid(f)
    if rank():
        os.replace = None  # files are written by rank 0 alone
    words = [*TINY, "--data", f / "eyes.npz", "--epochs", "2"]
    assert main(*words, "--out", f / "a") == 0
    with signals_after_an_epoch(train.finish_epoch):
        assert main(*words, "--out", f / "b") == 128 + signal.SIGTERM
    assert main("--task", "ocec", "--out", f / "b", "--resume") == 0


def test_train_two_torchruns_as_on_two_machines_write_once_stop_together_and_resume():
    with folder() as f:
        make_npz(f / "eyes.npz")
        codes, (first, second) = on_two_machines(work_two_machines, f)
        assert codes == [0, 0], (first, second)
        assert first.count("epoch   2/2 |") == 2 and "epoch" not in second
        assert "go on with\n    torchrun --nnodes 2 --" in first
        assert {path.name for path in (f / "a").iterdir()} == set(RUN_FILES)
        assert same_bits(result_of(f / "a"), result_of(f / "b"))


def work_machine_lost(f):
    """A long run; after epoch 1 a process, or the torchrun of one, is killed."""
    note_pid(f)
    finish = train.finish_epoch
    victim_rank, victim = (f / "victim").read_text().split()

    def finish_and_kill(run, folder):
        finish(run, folder)
        if run.history[-1]["epoch"] == 1 and rank() == int(victim_rank):
            os.kill(os.getppid() if victim == "torchrun" else os.getpid(), signal.SIGKILL)

    train.finish_epoch = finish_and_kill
    words = ["--data", f / "eyes.npz", "--out", f / "a", "--epochs", "100000"]
    processes.leave(main(*TINY, *words))


def test_train_two_torchruns_end_with_a_message_when_one_or_its_process_is_killed():
    orphaned = "torchrun has died on the machine of 1 of the 2 processes"
    cases = [("1 process", [1, 1], ["process 0 of 2 lost another one, which died", ""]),
             ("0 torchrun", [-signal.SIGKILL, 1], [orphaned, orphaned])]
    for victim, exit_codes, messages in cases:
        with folder() as f:
            (f / "victim").write_text(victim)
            make_npz(f / "eyes.npz")
            codes, printed = on_two_machines(work_machine_lost, f)
            assert codes == exit_codes, (codes, printed)
            for message, text in zip(messages, printed):
                assert message in text, (victim, printed)
                if message:
                    assert "go on with\n    torchrun --nnodes 2 --" in text, (victim, printed)
            assert 2 <= len(result_of(f / "a")["history"]) < 100_000
