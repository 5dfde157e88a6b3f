"""What several test files share."""

import contextlib
import io
import json
import itertools
import math
import struct
import tempfile
import types
import unittest
import unittest.mock
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch

import data
import models
import train
from tasks import bidmc_data
from tasks import faceparse
from tasks import ocec
from tasks import quadmodal
from tasks import seqsetvae_data


HERE = Path(__file__).resolve().parents[1]

REAL = HERE.parent / "shared" / "data"


def raises(kind, text, call):
    """call() must raise `kind` with `text` in its message."""
    try:
        call()
    except kind as error:
        assert text in str(error), f"{text!r} not in {error}"
    else:
        raise AssertionError(f"no {kind.__name__}")


def refuses(call, text, *arguments, **options):
    """call(*arguments, **options) must raise ValueError with `text` in its message."""
    raises(ValueError, text, lambda: call(*arguments, **options))


def near(got, want, within):
    """The largest difference is at most `within` times the largest wanted value."""
    kind = torch.complex128 if torch.is_tensor(want) and want.is_complex() else torch.float64
    got, want = (torch.as_tensor(values, dtype=kind).detach() for values in (got, want))
    if got.numel() == want.numel() == 0:
        return True
    return bool((got - want).abs().max() <= within * want.abs().max())


def assert_near(got, want, within=1e-5):
    """near() for one or several tensors of the same type and shape, with a message."""
    if isinstance(want, dict):
        assert got.keys() == want.keys(), (got.keys(), want.keys())
        got, want = list(got.values()), list(want.values())
    if isinstance(want, (list, tuple)):
        assert len(got) == len(want), (len(got), len(want))
        for a, b in zip(got, want):
            assert_near(a, b, within)
        return
    kinds = (got.dtype, got.shape), (want.dtype, want.shape)
    assert kinds[0] == kinds[1], kinds
    assert near(got, want, within), f"{(got - want).abs().max():.3g} of {want.abs().max():.3g}"


def with_gradient(loss_fn, inputs, *targets, **options):
    """The loss, and the gradient of its sum."""
    inputs = inputs.detach().clone().requires_grad_()
    loss = loss_fn(inputs, *targets, **options)
    loss.sum().backward()
    return loss.detach(), inputs.grad


def check_precision(loss_fn, inputs, *targets, **options):
    """Half precision is computed in float32, also under autocast; float64 stays float64."""
    for dtype in torch.bfloat16, torch.float16, torch.float32:
        rounded = inputs.to(dtype)
        want = loss_fn(rounded.float(), *targets, **options)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (torch.ones(1, 1) @ torch.ones(1, 1)).dtype == torch.bfloat16
            inside = loss_fn(rounded, *targets, **options)
        for got in inside, loss_fn(rounded, *targets, **options):
            assert same_bits(got, want) and got.dtype == torch.float32
    assert loss_fn(inputs.double(), *targets, **options).dtype == torch.float64


def need_pillow():
    try:
        from PIL import Image
    except ImportError:
        raise unittest.SkipTest("needs Pillow: pip install pillow") from None
    return Image


def need_real(name):
    if not (REAL / name).exists():
        raise unittest.SkipTest(f"needs the real data {REAL / name}")
    return REAL / name


def same_bits(a, b):
    """Bit for bit, through dictionaries and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return a == b or a != a and b != b


@contextlib.contextmanager
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def sgd(*lrs, **options):
    """An optimizer with one parameter group per rate."""
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in lrs]
    return torch.optim.SGD(groups, lr=0.5, **options)


def lived_in(model):
    """The model in eval mode; weights, biases, statistics and scales are drawn, none is 0 or 1."""
    torch.manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.ndim > 1:
            tensor.normal_(std=math.sqrt(2 / tensor[0].numel()))
        elif tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5).sub_(1.0 if name.endswith(("bias", "mean")) else 0.0)
    return model.eval()


def signals_of(n, channels=3, length=24, seed=0):
    return torch.randn(n, channels, length, generator=seeded(seed))


def small_encoder(**changes):
    torch.manual_seed(0)
    small = {"channels": 3, "patch": 4, "width": 16, "depth": 2, "heads": 4, "dropout": 0.1}
    return models.PPGEncoder(**small | changes)


QUAD = {  # every kind of encoder, sides odd
    "film": (5, 3, 9, 7), "motion": (21, 3), "photo": (3, 13, 11), "text": (7,)}


def quad(shapes=None, **changes):
    torch.manual_seed(0)
    small = {"width": 16, "heads": 4, "hidden": 24, "embed": 12, "patch": 4}
    return models.QuadModal(QUAD if shapes is None else shapes, **small | changes)


def quad_rows(n, shapes=QUAD, seed=0):
    generator = seeded(seed)
    return {name: torch.randn(n, *shape, generator=generator) for name, shape in shapes.items()}


def set_encoder(variables=6, **changes):
    torch.manual_seed(0)
    small = {"width": 16, "depth": 2, "heads": 4, "hidden": 24, "points": 3, "dropout": 0.1}
    return models.SetSequenceEncoder(variables, **small | changes)


def draw_sets(lengths, *, largest=12, variables=6, seed=0):
    """Stays as lists of (minute, [(variable, value), ...]).

    The first set is the largest. With more events than variables, a variable comes twice in it.
    """
    rng = np.random.default_rng(seed)
    stays = []
    for length in lengths:
        minutes = np.sort(rng.integers(0, 2880, length)).tolist()
        sizes = rng.integers(1, largest + 1, length)
        sizes[0] = largest
        stay = []
        for minute, size in zip(minutes, sizes):
            events = [(int(rng.integers(variables)), float(np.float32(rng.normal())))
                      for _ in range(size)]
            stay.append((minute, events))
        stays.append(stay)
    return stays


def packed_sets(stays, dtype=torch.float32):
    """Inputs of the networks from the lists of draw_sets; float64 where rounding hides a leak."""
    sets, lengths = [], []
    for stay in stays:
        sets += stay
        lengths.append(len(stay))
    events = [event for _, events in sets for event in events]
    return {"variables": torch.tensor([variable for variable, _ in events]),
            "values": torch.tensor([value for _, value in events], dtype=dtype),
            "sizes": torch.tensor([len(events) for _, events in sets]),
            "minutes": torch.tensor([minute for minute, _ in sets], dtype=dtype),
            "lengths": torch.tensor(lengths)}


STAY_LENGTHS = (3, 40, 1, 17, 2)


def make_npz(path, n=60, **changes):
    images, labels, groups, _ = ocec.synthetic_eyes(n, size=(12, 20), seed=1)
    pixels = images.permute(0, 2, 3, 1).numpy()
    arrays = {"images": pixels, "labels": labels, "groups": groups} | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def make_class_folder(path, n=12):
    Image = need_pillow()
    images, labels, _, _ = ocec.synthetic_eyes(n, size=(12, 20), seed=1)
    for i in range(n):
        side = path / ("closed", "open")[labels[i]]
        side.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i].permute(1, 2, 0).numpy()).save(side / f"{i}.png")
    return images, labels


def warned(make):
    """make(), and the text of the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = make()
    return result, " ".join(str(warning.message) for warning in caught)


def is_mapped(array):
    """Whether an array lies in a memory-mapped file."""
    while array is not None and not isinstance(array, np.memmap):
        array = array.base
    return array is not None


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_images(*shape, seed=0):
    return torch.randint(256, shape, dtype=torch.uint8, generator=seeded(seed))


def png_content(content):
    """(header fields, {chunk: body}) of a PNG without interlacing and filters."""
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        name, body = content[at + 4 : at + 8], content[at + 8 : at + 8 + length]
        checksum = int.from_bytes(content[at + 8 + length : at + 12 + length], "big")
        assert checksum == zlib.crc32(name + body)
        chunks[name], at = body, at + 12 + length
    return struct.unpack(">IIBBBBB", chunks[b"IHDR"]), chunks


def write_faces(path, images, masks, grey=()):
    """A face-parsing folder of PNG files; masks as palette PNG, those in `grey` as grey ones."""
    for name in ("images", "masks"):
        (path / name).mkdir(parents=True, exist_ok=True)
    for i, (image, mask) in enumerate(zip(images, masks)):
        pixels = image.permute(1, 2, 0).numpy()
        (path / "images" / f"{i:03d}.png").write_bytes(data.encode_png(pixels))
        palette = None if i in grey else np.arange(768).reshape(256, 3) % 256
        (path / "masks" / f"{i:03d}.png").write_bytes(data.encode_png(mask.numpy(), palette))
    return path


def write_bidmc(path, recordings, *, columns=("Time [s]", "RESP", "PLETH", "V"), newline="\n"):
    """PhysioNet's files: names after a space, Time to 5 digits, the shorter annotator padded."""
    def cell(value):
        return "NaN" if np.isnan(value) else f"{value:.9g}"

    path.mkdir(parents=True, exist_ok=True)
    for recording in recordings:
        number, samples = recording["number"], len(recording["ppg"])
        cells = {column: np.full(samples, 0.5) for column in columns}
        cells["Time [s]"] = np.array([float(f"{i / 125:.5g}") for i in range(samples)])
        cells["PLETH"] = recording["ppg"]
        signals = [", ".join(columns)]
        for row in zip(*(cells[column] for column in columns)):
            signals.append(",".join(map(cell, row)))
        numerics = ["Time [s], HR, PULSE, RESP, SpO2"]
        for row in zip(recording["time"], recording["hr"], recording["pulse"]):
            numerics.append(",".join(map(cell, row)) + ",16,97")
        breaths = ["breaths ann1 [signal sample no], breaths ann2 [signal sample no]"]
        for pair in itertools.zip_longest(recording["breaths"], recording["breaths_2"]):
            breaths.append(",".join("NaN" if mark is None else str(mark) for mark in pair))
        tables = {"Signals": signals, "Numerics": numerics, "Breaths": breaths}
        for table, lines in tables.items():
            content = newline.join(lines) + newline
            (path / f"bidmc_{number:02d}_{table}.csv").write_bytes(content.encode())
        (path / f"bidmc_{number:02d}_Fix.txt").write_text(
            f"bidmc_{number:02d}\nAge: 88\nMIMIC II matched wdb ID: {recording['patient']}\n"
            "MIMIC II data segment: 2688\n")
    return path


def edit(file, change):
    file.write_text(change(file.read_text()))


def channels_last(array):
    """A modality of any rank as float64 (rows, all but the channels, channels)."""
    axis = -1 if array.ndim < 4 else -3
    array = np.moveaxis(array.astype(np.float64), axis, -1)
    return array.reshape(len(array), -1, array.shape[-1])


def ridge_accuracy(arrays, labels, train, test):
    """Of one-against-all ridge regression on the means and deviations of the channels."""
    features = []
    for array in map(channels_last, arrays):
        features += [array.mean(1), array.std(1)]
    x = np.concatenate(features, 1)
    x = np.concatenate([(x - x[train].mean(0)) / x[train].std(0), np.ones((len(x), 1))], 1)
    targets = np.eye(labels.max() + 1)[labels[train]]
    weights = np.linalg.solve(x[train].T @ x[train] + np.eye(x.shape[1]), x[train].T @ targets)
    return float(((x[test] @ weights).argmax(1) == labels[test]).mean())


STAY_HEADER = "Time,Parameter,Value"

OUTCOME_HEADER = "RecordID,SAPS-I,SOFA,Length_of_stay,Survival,In-hospital_death"


def clock(minute):
    return f"{int(minute) // 60:02d}:{int(minute) % 60:02d}"



def write_stay(file, lines, *, newline="\n", header=STAY_HEADER, end=True):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes((newline.join([header, *lines]) + newline * end).encode())


def write_stays(path, stays, sets="a", *, newline="\n"):
    """The stays as PhysioNet writes them, dealt to the sets in turn."""
    def unknown(value):
        return -1 if np.isnan(value) else int(value)

    tables = {name: [OUTCOME_HEADER] for name in sets}
    for i, record in enumerate(stays["ids"]):
        lines = [f"00:00,RecordID,{record}"]
        for j in range(stays["first_set"][i], stays["first_set"][i + 1]):
            for e in range(stays["first_event"][j], stays["first_event"][j + 1]):
                variable = seqsetvae_data.STAY_VARIABLES[stays["variables"][e]]
                value = f"{stays['values'][e]:.9g}"
                lines.append(f"{clock(stays['minutes'][j])},{variable},{value}")
        name = sets[i % len(sets)]
        write_stay(path / f"set-{name}" / f"{record}.txt", lines, newline=newline)
        scores = [unknown(stays["severity"][score][i]) for score in ("SAPS-I", "SOFA")]
        tables[name].append(f"{record},{scores[0]},{scores[1]},5,-1,{stays['labels'][i]}")
    for name, lines in tables.items():
        (path / f"Outcomes-{name}.txt").write_bytes((newline.join(lines) + newline).encode())
    return path


def padding(plan, lengths):
    """Padded length of an epoch over the true one."""
    padded = sum(len(rows) * lengths[rows].max() for rows in plan)
    return padded / sum(lengths[rows].sum() for rows in plan)


TINY = ("--task ocec --size 12x20 --inputs images --block baseline --channels 8 --blocks 2 "
        "--epochs 3 --batch-size 16 --monitor f1 --device cpu").split()


def call(*words):
    """train.main on these words -> exit code, what it printed, what it complained about."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = train.main([str(word) for word in words])
        except SystemExit as stop:  # argparse
            code = stop.code
    return code, out.getvalue(), err.getvalue()


def succeeded(*words):
    """What the command prints; it must succeed."""
    code, out, err = call(*words)
    assert code == 0, err
    return out


def refused(text, *words):
    """What the command prints; it must be refused with `text`."""
    code, out, err = call(*words)
    assert code == 2 and text in err and "Traceback" not in err, (text, words, code, err)
    return out


def read_scores(path):
    return json.loads((path / "scores.json").read_text())


def run(path, *words):
    """A tiny run on a small .npz beside it; must succeed."""
    if not (path.parent / "eyes.npz").exists():
        make_npz(path.parent / "eyes.npz")
    return succeeded(*TINY, "--data", path.parent / "eyes.npz", "--out", path, *words)


def result_of(path, name="last.pt"):
    """A checkpoint without what the clock and the folder put into it."""
    content = torch.load(path / name, weights_only=True)
    for row in content.get("history", []):
        row.pop("seconds", None), row.pop("rows_per_s", None)
    return content


def loaded(*words):
    """The settings of a call, and the splits that its task makes of --data."""
    args = train.parse_args([str(word) for word in words])
    return args, train.task_of(args).load(args.data, args)


def prepared(f, *words):
    """Settings, splits and a fresh run of a tiny recipe on a small .npz in folder f."""
    args, splits = loaded(*TINY, "--data", make_npz(f / "eyes.npz"), *words)
    batches = train.plan_batches(splits.train, 1, args)
    return args, splits, train.build(args, splits.facts, len(batches))


def scores_of(model, split, args, facts):
    """The scores of a network on a whole split, as a run computes them."""
    run = types.SimpleNamespace(task=train.task_of(args), args=args, facts=facts)
    return train.evaluate(model, split, run)


NEVER = types.SimpleNamespace(check=lambda: None)  # a stop signal that never comes

PPG = ("--task bidmc_hr --seconds 10 --bins 16 --width 16 --depth 2 --batch-size 64 --epochs 2 "
       "--device cpu").split()


def ppg_folder(f, n=10, seconds=90):
    """n synthetic recordings, 4 of 5 patients each their own, in PhysioNet's format."""
    if not (f / "bidmc").exists():
        write_bidmc(f / "bidmc", bidmc_data.synthetic_ppg(n, seconds=seconds), columns=("PLETH",))
    return f / "bidmc"


def ppg_run(path, *words):
    words = words if "--data" in words else ["--data", ppg_folder(path.parent), *words]
    return succeeded(*PPG, "--out", path, *words)


FACEPARSE = "--task faceparse --epochs 2 --batch-size 8 --device cpu --size 16 --width 4".split()


def faces_npz(path, n=30, size=(32, 32), change=None):
    """Synthetic faces as an .npz; change(images, masks) may damage them first."""
    images, masks, _ = faceparse.synthetic_faces(n, size=size)
    arrays = {"images": images.permute(0, 2, 3, 1).numpy(), "masks": masks.numpy()}
    if change:
        arrays = change(arrays) or arrays
    np.savez(path, **arrays)
    return path


def faces_run(path, *words):
    if not (path.parent / "faces.npz").exists():
        faces_npz(path.parent / "faces.npz")
    base = FACEPARSE[:-2] if "segformer" in words else FACEPARSE
    return succeeded(*base, "--data", path.parent / "faces.npz", "--out", path, *words)


def check_resume(base, run, path, words, data_path=None):
    """A run killed after its first epoch and resumed ends like one that was not."""
    run(path / "a", *words)
    finish = train.finish_epoch

    def killed(state, folder):
        finish(state, folder)
        if state.history[-1]["epoch"] == 1:
            raise KeyboardInterrupt

    train.finish_epoch = killed
    try:
        [data_path] = [data_path] if data_path else path.glob("*.npz")
        assert call(*base, "--data", data_path, "--out", path / "b", *words)[0] == 130
    finally:
        train.finish_epoch = finish
    succeeded(*base[:2], "--out", path / "b", "--resume")
    for name in ("last.pt", "best.pt"):
        assert same_bits(result_of(path / "a", name), result_of(path / "b", name))
    assert (path / "a" / "curves.svg").read_text() == (path / "b" / "curves.svg").read_text()


MODAL = ("--task quadmodal --inputs waveform --width 8 --heads 2 --tokens 2 --hidden 16 --embed 8 "
         "--temperature 0.2 --sampler stratified --epochs 2 --batch-size 12 --monitor accuracy "
         "--neighbours 5 --device cpu").split()


def quad_npz(path, n=240, classes=3, change=None, only=("audio", "sensor")):
    """The synthetic twin's `only` modalities as an .npz; change(arrays) may damage them first."""
    arrays, labels, groups, names, _ = quadmodal.synthetic_modalities(n, classes=classes)
    content = {name: arrays[name] for name in only}
    content |= {"labels": labels, "groups": groups, "label_names": np.array(names)}
    if change:
        content = change(content) or content
    np.savez(path, **content)
    return path


def quad_run(path, *words):
    if not (path.parent / "quad.npz").exists():
        quad_npz(path.parent / "quad.npz")
    return succeeded(*MODAL, "--data", path.parent / "quad.npz", "--out", path, *words)


STAYS = ("--task seqsetvae --epochs 2 --batch-size 8 --device cpu --width 16 --heads 2 --depth 2 "
         "--hidden 16 --points 4 --train-ratio 0.5 --val-ratio 0.2 --test-ratio 0.3").split()


def short_stays(n=80, seed=0):
    """Drawn stays with the sets of their first 12 hours only: quick to train on."""
    stays = seqsetvae_data.synthetic_stays(n, seed=seed)
    keep = stays["minutes"] <= 720
    owner = np.repeat(np.arange(n), np.diff(stays["first_set"]))
    sets = np.repeat(np.arange(len(keep)), np.diff(stays["first_event"]))
    events = keep[sets]
    taken = sets[events]
    packed = seqsetvae_data.pack_stays(
        owner[taken], stays["minutes"][taken], stays["variables"][events], stays["values"][events])
    return stays | packed


def stays_folder(f, name="stays", change=None):
    """Drawn stays as PhysioNet writes them; change(path) damages them."""
    if not (f / name).exists():
        write_stays(f / name, short_stays())
        if change:
            change(f / name)
    return f / name


def stays_run(path, *words):
    words = words if "--data" in words else ["--data", stays_folder(path.parent), *words]
    return succeeded(*STAYS, "--out", path, *words)


@contextlib.contextmanager
def replaced(where, name, value):
    before = getattr(where, name)
    setattr(where, name, value)
    try:
        yield
    finally:
        setattr(where, name, before)
