"""For --quick: drawn data, written in the formats that train.py reads, and tiny runs on them."""

import contextlib
import io
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train
from tasks import bidmc_data, faceparse, ocec, quadmodal, seqsetvae_data

TINY = {"ocec": "--channels 8 --blocks 2 --epochs 3 --batch-size 16 --lr 1e-2",
        "faceparse": "--size 32 --width 4 --epochs 2 --batch-size 8",
        "bidmc_hr": "--seconds 10 --bins 16 --width 16 --depth 2 --epochs 2 --batch-size 64",
        "seqsetvae": "--width 16 --heads 2 --depth 2 --hidden 16 --epochs 2 --batch-size 8 "
                     "--train-ratio 0.5 --val-ratio 0.2 --test-ratio 0.3"}


def write_eyes(file, n=400, size=(24, 24)):
    images, labels, groups, _ = ocec.synthetic_eyes(n, size=size)
    np.savez(file, images=images.permute(0, 2, 3, 1).numpy(), labels=labels, groups=groups)


def write_faces(file, n=40, size=(64, 64)):
    images, masks, _ = faceparse.synthetic_faces(n, size=size)
    np.savez(file, images=images.permute(0, 2, 3, 1).numpy(), masks=masks.numpy())


def write_modalities(file, n=240, classes=3, names=("audio", "sensor")):
    arrays, labels, groups, label_names, _ = quadmodal.synthetic_modalities(n, classes=classes)
    arrays = {name: arrays[name] for name in names}
    np.savez(file, **arrays, labels=labels, groups=groups, label_names=np.array(label_names))


def recording_tables(recording):
    """{table: (header, values)} of a recording, as PhysioNet writes BIDMC."""
    annotators = [recording["breaths"], recording["breaths_2"]]
    breaths = np.full((max(map(len, annotators)), 2), np.nan)
    for column, samples in enumerate(annotators):
        breaths[: len(samples), column] = samples
    numerics = np.stack([recording[name] for name in ("time", "hr", "pulse")], 1)
    return {"Signals": ("PLETH", recording["ppg"]),
            "Numerics": ("Time [s],HR,PULSE", numerics),
            "Breaths": ("breaths ann1 [signal sample no],breaths ann2 [signal sample no]", breaths)}


def write_recordings(folder, n=10, seconds=90):
    """n recordings as PhysioNet writes BIDMC."""
    folder.mkdir()
    for recording in bidmc_data.synthetic_ppg(n, seconds=seconds):
        name = f"{folder}/bidmc_{recording['number']:02d}"
        for table, (header, values) in recording_tables(recording).items():
            np.savetxt(f"{name}_{table}.csv", values, delimiter=",", header=header, comments="")
        Path(f"{name}_Fix.txt").write_text(f"MIMIC II matched wdb ID: {recording['patient']}\n")


def write_stays(folder, n=80):
    """n stays as PhysioNet writes the challenge of 2012, all of them in set a."""
    (folder / "set-a").mkdir(parents=True)
    stays = seqsetvae_data.synthetic_stays(n)
    first_event = stays["first_event"][stays["first_set"]]
    minutes = np.repeat(stays["minutes"], np.diff(stays["first_event"])).astype(int)
    scores = np.nan_to_num([stays["severity"]["SAPS-I"], stays["severity"]["SOFA"]], nan=-1)
    outcomes = ["RecordID,SAPS-I,SOFA,Length_of_stay,Survival,In-hospital_death"]
    for i, record in enumerate(stays["ids"]):
        lines = ["Time,Parameter,Value", f"00:00,RecordID,{record}"]
        for event in range(first_event[i], first_event[i + 1]):
            variable = seqsetvae_data.STAY_VARIABLES[stays["variables"][event]]
            hour, minute = divmod(minutes[event], 60)
            lines.append(f"{hour:02d}:{minute:02d},{variable},{stays['values'][event]:.9g}")
        (folder / "set-a" / f"{record}.txt").write_text("\n".join(lines) + "\n")
        saps, sofa = scores[:, i].astype(int)
        outcomes.append(f"{record},{saps},{sofa},5,-1,{stays['labels'][i]}")
    (folder / "Outcomes-a.txt").write_text("\n".join(outcomes) + "\n")


def tiny_run(task, path, out, *words):
    """The folder of a finished tiny run; if it fails, end with everything it printed."""
    log = io.StringIO()
    call = ["--task", task, *TINY[task].split(), "--data", str(path), "--device", "cpu"]
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        code = train.main([*call, "--out", str(out), *words])
    if code:
        sys.exit(f"{' '.join(call)} ended with {code}:\n{log.getvalue()}")
    return out
