"""Tests of export."""

import json
import math
import subprocess
import sys

import numpy as np
import torch

import train
from runtime import checkpoint
from tasks import bidmc
from tasks import bidmc_data
from tasks import faceparse
from tasks import quadmodal
from tests.helpers import (
    call, faces_npz, folder, lived_in, loaded, make_npz, MODAL, near, PPG, ppg_folder,
    quad_npz, replaced, STAYS, stays_folder, succeeded, TINY)


LOAD = """
import sys, torch
for path in sys.argv[1:]:
    model = torch.export.load(path + "/net.pt2").module()
    inputs = torch.load(path + "/inputs", weights_only=True)
    torch.save([model(rows) for rows in inputs], path + "/outputs")
assert not any(name in sys.modules for name in ("train", "models", "data"))
"""


def untrained(path, *words):
    """best.pt of drawn weights in a new folder -> its network, settings and splits."""
    args, splits = loaded(*words, "--device", "cpu")
    task = train.task_of(args)
    model = lived_in(task.network(args, splits.facts))
    path.mkdir(parents=True)
    content = {"model": model.state_dict()}
    checkpoint.save(path / "best.pt", content, args, splits.facts, task.flags)
    return model, args, splits


def export(path, task, *words):
    files = ["--export", path / "best.pt", "--out", path / "net.pt2"]
    return succeeded("--task", task, *files, *words)


def eyes_exported(f, path, *words):
    """An exported network: inputs of all rows, and the function rows -> the task's own numbers."""
    model, _, splits = untrained(path, *TINY, "--data", make_npz(f / "eyes.npz"), *words)
    export(path, "ocec")
    split = splits.test
    images = split.images[torch.from_numpy(split.rows)].permute(0, 2, 3, 1)
    return {"images": images}, lambda rows: torch.sigmoid(model(split.batch(rows)["inputs"]))


def faces_exported(f, path, *words):
    words = ["--task", "faceparse", "--data", faces_npz(f / "faces.npz"), *words]
    model, args, splits = untrained(path, *words)
    export(path, "faceparse", "--tta")
    args = args.replace(tta=True)
    split = splits.test
    images = split.images[torch.from_numpy(split.rows)].permute(0, 2, 3, 1)

    def own(rows):
        return faceparse.tta_logits(model, split.batch(rows)["inputs"], args).softmax(1)

    return {"images": images}, own


def ppg_exported(f, path, *words):
    model, args, splits = untrained(path, "--width", "16", "--data", ppg_folder(f), *words)
    export(path, args.task)
    recordings = bidmc_data.read_bidmc(f / "bidmc")
    windows = bidmc_data.bidmc_windows(
        recordings, rate=None, seconds=args.seconds, stride=args.stride)
    facts = splits.facts
    split = bidmc.rows(args.data, args, facts, need_labels=False).split

    def own(rows):
        return bidmc.rates(bidmc.outputs(model, split.batch(rows), args, facts), facts)

    return {"ppg": windows["inputs"][:]}, own


def quad_exported(f, path, *words):
    """Three kinds of modality, one of integers and one a clock in float64, absent rows of NaN."""
    def change(arrays):
        arrays["present_sensor"] = np.arange(240) % 3 > 0
        arrays["sensor"][~arrays["present_sensor"]] = math.nan
        arrays["clock"] = 1.7e9 + np.random.default_rng(0).normal(size=(240, 2))
        arrays["image"] = np.random.default_rng(1).integers(0, 256, (240, 3, 9, 9), dtype=np.uint8)

    data_path = quad_npz(f / "quad.npz", change=change)
    model, args, splits = untrained(path, *MODAL, "--data", data_path, *words)
    export(path, "quadmodal")
    split = splits.test
    inputs = {}
    for name, array in split.recorded.arrays.items():  # in the order of about.json: see README
        inputs[name] = torch.from_numpy(array[split.rows])
    for name, present in split.recorded.present.items():
        inputs[f"present_{name}"] = torch.from_numpy(present[split.rows])

    def own(rows):
        return quadmodal.outputs(model, split.batch(rows), args, splits.facts)["embedding"]

    return inputs, own


def test_train_exported_networks_give_the_numbers_of_their_task_without_this_script():
    """For 1 row, for 3 and for all; in a process that cannot import the repository."""
    cases = {
        "eyes": (eyes_exported, ""),
        "eyes-tokens": (eyes_exported, "--block inverted_se --head transformer"),
        "faces": (faces_exported, "--size 16 --width 4"),
        "faces-segformer": (faces_exported, "--size 32 --network segformer"),
        "heart": (ppg_exported, "--task bidmc_hr --seconds 10 --inputs waveform --reduce 3"),
        "heart-spectrum": (ppg_exported, "--task bidmc_hr --seconds 10"),
        "breath": (ppg_exported, "--task bidmc_rr --bins 16"),
        "quad": (quad_exported, ""),
        "quad-spectra": (quad_exported, "--inputs spectra")}
    if torch.__version__ < "2.6":
        del cases["breath"], cases["quad-spectra"]  # an FFT cannot be exported there: refused
    with folder() as f, torch.no_grad():
        own, runs = {}, f / "runs"
        for name, (exported, words) in cases.items():
            inputs, numbers = exported(f, runs / name, *words.split())
            rows = len(next(iter(inputs.values())))
            last_rows = [{key: values[-n:] for key, values in inputs.items()} for n in (1, 3, rows)]
            torch.save(last_rows, runs / name / "inputs")
            own[name] = [numbers(np.arange(rows - n, rows)) for n in (1, 3, rows)]
        command = [sys.executable, "-I", "-c", LOAD, *cases]
        done = subprocess.run(command, cwd=runs, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        for name, expected in own.items():
            outputs = torch.load(runs / name / "outputs", weights_only=True)
            for ours, theirs in zip(expected, outputs, strict=True):
                assert theirs.dtype == torch.float32 and not theirs.requires_grad, name
                assert ours.shape == theirs.shape, name
                difference = (theirs - ours).abs().max()
                assert near(theirs.double(), ours.double(), 1e-6), (name, difference)
            assert expected[-1].std(0).max() > 1e-4, name  # rows differ


def test_train_export_describes_itself_and_prints_the_lines_that_load_it():
    with folder() as f:
        inputs, numbers = eyes_exported(f, f / "run")
        out = export(f / "run", "ocec")
        lines = out.split("to use it, without this script:\n")[1]
        known = {"images": inputs["images"]}
        exec("\n".join(line.strip() for line in lines.splitlines()), known)
        assert near(known["prob_open"], numbers(np.arange(len(inputs["images"]))), 1e-6)
        files = {"about.json": ""}
        torch.export.load(f / "run" / "net.pt2", extra_files=files)
        about = json.loads(files["about.json"])
    images = about["inputs"]["images"]
    assert (images["type"], images["shape"]) == ("uint8", ["rows", 12, 20, 3])
    assert images.keys() == {"type", "shape", "is"}
    text = "probability that the eye is open"
    assert about["output"] == {"prob_open": {"type": "float32", "shape": ["rows"], "is": text}}
    assert about["task"] == "ocec" and about["recipe"]["channels"] == 8
    assert about["facts"]["pos_weight"] > 0


def test_train_export_refuses_what_it_cannot_write_with_exit_code_2_and_leaves_nothing():
    with folder() as f:
        untrained(f / "eyes", *TINY, "--data", make_npz(f / "eyes.npz"))
        untrained(f / "ppg", *PPG, "--data", ppg_folder(f), "--mode", "pretrain")
        untrained(f / "stays-run", *STAYS, "--data", stays_folder(f), "--mode", "pretrain")
        before, out = {path: path.stat().st_mtime_ns for path in f.rglob("*")}, f / "net.pt2"
        eyes = ["--task", "ocec", "--export", f / "eyes" / "best.pt", "--out"]
        for message, words in [
            ("predicts no rate",
             ["--task", "bidmc_hr", "--export", f / "ppg" / "best.pt", "--out", out]),
            ("task seqsetvae cannot be exported: apply its checkpoint with --predict",
             ["--task", "seqsetvae", "--export", f / "stays-run" / "best.pt", "--out", out]),
            ("is a checkpoint of task ocec, not of faceparse",
             ["--task", "faceparse", *eyes[2:], out]),
            ("absent.pt does not exist", [*eyes[:3], f / "absent.pt", "--out", out]),
            ("does not exist; create it", [*eyes, f / "absent" / "net.pt2"]),
            ("whose name ends in .pt2", [*eyes, f / "net.pt"]),
            ("whose name ends in .pt2", eyes[:-1]),
            ("--device is not read by this call", [*eyes, out, "--device", "cpu"]),
            ("--lr is not read by this call", [*eyes, out, "--lr", "1"]),
        ]:
            code, _, err = call(*words)
            assert code == 2 and message in err and err.count("error:") == 1, (message, code, err)
        fft = torch.ops.aten._fft_r2c.default

        def without_fft(*_, **__):  # as torch 2.4 does
            raise torch._subclasses.fake_tensor.UnsupportedOperatorException(fft)

        with replaced(torch.export, "export", without_fft):
            code, _, err = call(*eyes, out)
        message = "cannot export aten._fft_r2c.default, which this network uses"
        assert code == 2 and message in err, err
        assert {path: path.stat().st_mtime_ns for path in f.rglob("*")} == before
