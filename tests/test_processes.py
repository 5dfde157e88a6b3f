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
import unittest
import unittest.mock

import numpy as np
import torch

import train
from tasks import ocec
from tests.helpers import (
    call, FACEPARSE, faces_npz, folder, HERE, make_npz, MODAL, near, PPG, ppg_folder, quad_npz,
    result_of, same_bits, STAYS, stays_folder, TINY)


IN_EACH_PROCESS = """
import os, pathlib, sys
sys.path.insert(0, {here!r})
import test_all, train
with train.processes():
    test_all.{name}(pathlib.Path({folder!r}))
train.leave(0)
"""


def start_two(work, f, *words):
    """torchrun with two processes that call work(f), or with what words say."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        raise unittest.SkipTest("needs torch with gloo")
    (f / "work.py").write_text(IN_EACH_PROCESS.format(here=str(HERE), name=work.__name__, folder=str(f)))
    words = words or ["--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *words, f / "work.py"],
                            env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


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
    """A network after one epoch of plain SGD, AdamW would magnify the rounding of tiny gradients; its average; the epoch's row; seeds."""
    args = train.parse_args(list(map(str, words)))
    sets = train.task_of(args).load(args.data, args)
    args.facts, batch_of, seeds = sets.facts, sets.train.batch, set()
    sets.train.batch = lambda rows, generator: seeds.add(generator.initial_seed()) or batch_of(rows, generator)
    state = train.build(args, 10)
    state.optimizer = torch.optim.SGD(state.raw_model.parameters(), lr=0.1)
    train.share_gradients(state)
    with train.StopSignal() as stop:
        row = train.train_epoch(state, sets.train, 1, args, stop)
    return {"model": state.raw_model.state_dict(), "ema": state.ema.module.state_dict(), "loss": row["train_loss"], "parts": row["parts"],
            "step": row["step"], "seeds": [torch.initial_seed(), *seeds]}


# No noise, no batch norm. 42 eyes: windows of 24 and of 18; 40 stays, of 24 and of 16; SupCon compares all rows of a batch.
ALIKE = {
    "ocec": (*TINY, "--data", "eyes.npz", "--block", "convnext", "--channels", "16", "--token-grid", "2x2", "--schedule", "none",
             *"--flip 0 --photometric 0 --clahe 0 --crop 0 --mixup 0 --dropout 0 --warmup-epochs 0".split()),
    "seqsetvae": (*STAYS, "--data", "stays", "--sampler", "shuffled", "--dropout", "0", "--head-dropout", "0", "--drop-events", "0"),
    "quadmodal": (*MODAL, "--data", "modal.npz", *"--dropout 0 --noise 0 --scale 0 --shift 0 --modality-dropout 0".split()),
}


def alike_data(f):
    make_npz(f / "eyes.npz")
    stays_folder(f)
    quad_npz(f / "modal.npz")


def alike(f, task, batch_size, accumulate):
    words = [f / word if word in ("eyes.npz", "stays", "modal.npz") else word for word in ALIKE[task]]
    return after_an_epoch(*words, "--batch-size", batch_size, "--accumulate", accumulate)


def work_alike(f):
    for task in ALIKE:
        torch.save(alike(f, task, 24, 1), f / f"{task}-{train.rank()}.pt")
        torch.save(alike(f, task, 12, 2), f / f"{task}-accumulated-{train.rank()}.pt")
    share, own = train.share_buffers, {}

    def look_and_share(state):
        for name, model in (("model", state.raw_model), ("ema", state.ema.module)):
            own[name] = {key: buffer.clone() for key, buffer in model.named_buffers()}
        share(state)

    train.share_buffers = look_and_share
    torch.save(after_an_epoch(*TINY, "--data", f / "eyes.npz"), f / f"noisy-{train.rank()}.pt")  # with batch norm
    train.share_buffers = share
    torch.save(own, f / f"own-{train.rank()}.pt")
    torch.save(train.over_batches(lambda batch: (batch, train.rank()), range(5)), f / f"dealt-{train.rank()}.pt")


def results_of_two(f, name):
    return [torch.load(f / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_train_a_world_size_without_torchrun_is_refused():
    os.environ["WORLD_SIZE"] = "2"
    try:
        code, _, err = call(*TINY)
    finally:
        del os.environ["WORLD_SIZE"]
    assert code == 2 and "WORLD_SIZE is 2, but RANK, LOCAL_RANK" in err and "start with torchrun" in err


def test_train_two_processes_equal_one_and_equal_accumulation():
    with folder() as f:
        alike_data(f)
        in_two_processes(work_alike, f)
        for task in ALIKE:
            two, other = results_of_two(f, task)
            assert same_bits(two | {"seeds": 0}, other | {"seeds": 0}), task
            ways = {"one": alike(f, task, 24, 1)}
            if task != "quadmodal":
                ways |= {"one accumulated": alike(f, task, 12, 2), "two accumulated": results_of_two(f, f"{task}-accumulated")[0]}
            for way, want in ways.items():
                assert two["step"] == want["step"] and two["parts"].keys() == want["parts"].keys(), (task, way)
                assert near(two["loss"], want["loss"], 1e-5), (task, way, two["loss"], want["loss"])
                for name, value in want["parts"].items():
                    assert near(two["parts"][name], value, 1e-5), (task, way, name)
                for kind in ("model", "ema"):
                    for name, value in want[kind].items():
                        assert near(two[kind][name], value, 1e-5), (task, way, kind, name)
        one, two = results_of_two(f, "noisy")
        assert not set(one["seeds"]) & set(two["seeds"]) and same_bits(one | {"seeds": 0}, two | {"seeds": 0})
        for name, buffers in results_of_two(f, "own")[0].items():  # batch statistics of rank 0, and of its average
            assert buffers and all(torch.equal(one[name][key], value) for key, value in buffers.items()), name
            assert not same_bits(buffers, results_of_two(f, "own")[1][name]), name
        assert results_of_two(f, "dealt") == [[(0, 0), (1, 1), (2, 0), (3, 1), (4, 0)]] * 2


def five_tasks(f):
    """A call of every task and of both pretrainings, on data in f; all kinds of noise are on."""
    return {"ocec": [*TINY, "--data", f / "eyes.npz", "--accumulate", "2", "--batch-size", "12", "--epochs", "2", "--schedule", "plateau"],
            "faceparse": [*FACEPARSE, "--data", f / "faces.npz", "--mixup", "0.2"],
            "bidmc_hr": [*PPG, "--data", f / "bidmc", "--mode", "pretrain", "--cache", f / "cache"],
            "quadmodal": [*MODAL, "--data", f / "modal.npz", "--mixup", "0.3", "--modality-dropout", "0.5", "--sampler", "stratified"],
            "seqsetvae": [*STAYS, "--data", f / "stays"],
            "vae": [*STAYS, "--data", f / "stays", "--mode", "pretrain"],
            "probe": [*PPG, "--data", f / "bidmc", "--mode", "probe", "--pretrained", f / "bidmc_hr", "--cache", f / "cache"]}


def work_five_tasks(f):
    """Every call straight, then again with SIGTERM to rank 1 after epoch 1, and resumed."""
    finish = train.finish_epoch

    def ends(run, *rest):
        finish(run, *rest)
        if run.history[-1]["epoch"] == 1 and train.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    for name, words in five_tasks(f).items():
        words, task = list(map(str, words)), words[1]
        assert train.main([*words, "--out", str(f / name)]) == 0, name
        train.finish_epoch = ends
        assert train.main([*words, "--out", str(f / f"{name}-again")]) == 128 + signal.SIGTERM, name
        train.finish_epoch = finish
        cache = words[words.index("--cache"):][:2] if "--cache" in words else []
        assert train.main(["--task", task, "--out", str(f / f"{name}-again"), "--resume", *cache]) == 0, name
    f1 = lambda epoch: epoch / 10 if train.rank() == 0 else 0.5  # rank 1 alone would stop after epoch 2
    train.score_epoch = lambda run, row, *_: row | {
        "raw": {"loss": 1.0, "f1": f1(row["epoch"])}, "score": f1(row["epoch"]), "weights": "raw"}
    assert train.main([*TINY, "--data", str(f / "eyes.npz"), "--out", str(f / "decides"), "--patience", "1", "--epochs", "4"]) == 0


def test_train_two_processes_run_all_tasks_write_once_stop_together_and_resume_bit_for_bit():
    with folder() as f:
        alike_data(f)
        faces_npz(f / "faces.npz")
        ppg_folder(f)
        printed = in_two_processes(work_five_tasks, f)
        assert len((f / "decides" / "log.jsonl").read_text().splitlines()) == 5
        assert printed.count("epoch   1/2 |") == 2 * len(five_tasks(f)), printed  # once straight, once broken off
        assert printed.count("SIGTERM: epoch 1 of 2 is saved") == len(five_tasks(f)) and "not bit for bit" not in printed
        assert "go on with\n    torchrun --nproc-per-node 2 train.py --task ocec" in printed and "| 2 processes" in printed
        for name in five_tasks(f):
            log = (f / name / "log.jsonl").read_text().splitlines()
            assert len(log) == 3 and sorted(each.name for each in (f / name).iterdir()) == sorted(train.RUN_FILES), name
            for file in ("last.pt", "best.pt"):
                assert same_bits(result_of(f / name, file), result_of(f / f"{name}-again", file)), (name, file)
            scores = (f / name / "scores.json").read_text()
            assert scores == (f / f"{name}-again" / "scores.json").read_text(), name
            assert json.loads(scores)["validation"]["model"] == train.without_nan(scores_alone(f / name / "best.pt")), name


def scores_alone(path):
    """The validation scores of a checkpoint, in this process alone."""
    content = torch.load(path, weights_only=True)
    args = train.parse_args(["--task", content["task"], "--eval", str(path)])
    train.adopt_recipe(args, content)
    args.device = "cpu"
    sets = train.task_of(args).load(args.data, args)
    model = train.task_of(args).network(args)
    model.load_state_dict(content["model"])
    return json.loads(json.dumps(train.evaluate(model, sets.validation, args)))


def work_refusals(f):
    assert train.main(["--task", "ocec", "--find-lr"]) == 2
    words = [*TINY, "--data", str(f / "eyes.npz"), "--out", str(f / "a")]
    for more in (["--batch-size", "17"], ["--folds", "3"], ["--device", "cuda:1"], ["--batch-size", "2"]):
        assert train.main([*words, *more]) == 2, more
    if train.rank():
        ocec.read_eyes = lambda *_, **__: np.load(f / "absent.npz")
    assert train.main(words) == 2 and not (f / "a").exists()


def work_in_turn(f):
    """Rank 0 reads the data before rank 1 does; it alone writes files; a loss of rank 1 that is no number stops both."""
    read, criterion = ocec.read_eyes, train.eyes_criterion

    def read_in_turn(*words, **options):
        assert train.rank() == 0 or (f / "read by rank 0").exists()
        found = read(*words, **options)
        time.sleep(0.3 * (train.rank() == 0))  # the other would be here by now
        with train.atomic_write(f / f"read by rank {train.rank()}") as file:
            file.write("here")
        return found

    ocec.read_eyes = read_in_turn
    if train.rank():
        train.eyes_criterion = lambda logits, *rest: criterion(logits, *rest) * (math.nan if logits.requires_grad else 1)
    assert train.main([*TINY, "--data", str(f / "eyes.npz"), "--out", str(f / "a")]) == 1


def test_train_two_processes_read_in_turn_write_once_and_stop_together_at_a_loss_that_is_no_number():
    with folder() as f:
        make_npz(f / "eyes.npz")
        printed = in_two_processes(work_in_turn, f)
        assert [each.name for each in f.glob("read by*")] == ["read by rank 0"]
        assert len(result_of(f / "a")["history"]) == 1
    assert printed.count("train.py: stopped: the loss became nan in epoch 1, step 0, at lr ") == 1 and "Traceback" not in printed, printed


def test_train_two_processes_refuse_what_one_of_them_refuses_and_say_so_once():
    with folder() as f:
        make_npz(f / "eyes.npz")
        printed = in_two_processes(work_refusals, f)
    for message in ("--batch-size 17 counts the rows of all 2 processes, which take equal shares of it: give --batch-size 18",
                    "--find-lr runs in one process, not in 2",
                    "--folds runs in one process, not in 2: train one fold at a time",
                    "--device cuda:1 is one for 2 processes: give --device cuda",
                    "--batch-size 2 leaves a batch of 1 of the 42 training rows to each process", "absent.npz"):
        assert printed.count(message) == 1, (message, printed)


def work_killed(f):
    (f / f"pid{train.rank()}").write_text(str(os.getpid()))
    train.main([*TINY, "--data", str(f / "eyes.npz"), "--out", str(f / "a"), "--epochs", "60"])


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
            assert f"train.py: stopped: process {1 - victim} of 2 lost another one" in printed and "is saved in" in printed, printed
            assert f"go on with\n    torchrun --nproc-per-node 2 train.py --task ocec --out {f / 'a'} --resume" in printed
            code, out, err = call("--task", "ocec", "--out", f / "a", "--resume")
            assert code == 0 and "number of processes: 2 so far, 1 from here on" in out, err
            assert len(result_of(f / "a")["history"]) == 61


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def on_two_machines(work, f):
    """work(f) in two processes, each under a torchrun of its own as on two machines; exit codes and what each printed, within 60 s."""
    port, rest = free_port(), ["--master-addr", "127.0.0.1", "--nproc-per-node", "1"]
    both = [start_two(work, f, "--nnodes", "2", "--node-rank", node, "--master-port", str(port), *rest) for node in "01"]
    try:
        printed = [each.communicate(timeout=60)[0] for each in both]
    except subprocess.TimeoutExpired:
        for pid in [each.pid for each in both] + [int(path.read_text()) for path in f.glob("pid*")]:  # a process outlives its torchrun
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        raise
    return [each.returncode for each in both], printed


def work_two_machines(f):
    """The run straight, then broken off by a signal to the second machine, and resumed."""
    assert os.environ["LOCAL_RANK"] == "0" and train.world_size() == 2 and int(os.environ["GROUP_RANK"]) == train.rank()
    (f / f"pid{train.rank()}").write_text(str(os.getpid()))
    os.replace = None if train.rank() else os.replace  # files are written by rank 0 alone
    words, finish = [*TINY, "--data", str(f / "eyes.npz"), "--epochs", "2"], train.finish_epoch
    assert train.main([*words, "--out", str(f / "a")]) == 0

    def ends(run, *rest):
        finish(run, *rest)
        if run.history[-1]["epoch"] == 1 and train.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    train.finish_epoch = ends
    assert train.main([*words, "--out", str(f / "b")]) == 128 + signal.SIGTERM
    train.finish_epoch = finish
    assert train.main(["--task", "ocec", "--out", str(f / "b"), "--resume"]) == 0


def test_train_two_torchruns_as_on_two_machines_write_once_stop_together_and_resume():
    with folder() as f:
        make_npz(f / "eyes.npz")
        codes, (first, second) = on_two_machines(work_two_machines, f)
        assert codes == [0, 0], (first, second)
        assert first.count("epoch   2/2 |") == 2 and "go on with\n    torchrun --nnodes 2 --" in first and "epoch" not in second
        assert sorted(each.name for each in (f / "a").iterdir()) == sorted(train.RUN_FILES)
        assert same_bits(result_of(f / "a"), result_of(f / "b"))


def work_machine_lost(f):
    """A long run, in epoch 2 of which one process, or the torchrun of one, is killed."""
    (f / f"pid{train.rank()}").write_text(str(os.getpid()))
    finish, (rank, victim) = train.finish_epoch, (f / "victim").read_text().split()

    def kills(run, *rest):
        finish(run, *rest)
        if run.history[-1]["epoch"] == 1 and str(train.rank()) == rank:
            os.kill(os.getppid() if victim == "torchrun" else os.getpid(), signal.SIGKILL)

    train.finish_epoch = kills
    train.leave(train.main([*TINY, "--data", str(f / "eyes.npz"), "--out", str(f / "a"), "--epochs", "100000"]))


def test_train_two_torchruns_end_with_a_message_when_one_or_its_process_is_killed():
    for victim, messages in (("1 process", ["process 0 of 2 lost another one, which died", ""]),
                             ("0 torchrun", ["torchrun has died on the machine of 1 of the 2 processes"] * 2)):
        with folder() as f:
            (f / "victim").write_text(victim)
            make_npz(f / "eyes.npz")
            codes, printed = on_two_machines(work_machine_lost, f)
            assert codes == ([1, 1] if "process" in victim else [-signal.SIGKILL, 1]), (codes, printed)
            for message, text in zip(messages, printed):
                assert message in text and (not message or "go on with\n    torchrun --nnodes 2 --" in text), (victim, printed)
            assert 2 <= len(result_of(f / "a")["history"]) < 100_000
