"""Drawn data in the files that train.py reads, and tiny runs on them: what --quick works with."""

import contextlib
import io
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import train

TINY = {"ocec": "--channels 8 --blocks 2 --epochs 3 --batch-size 16 --lr 1e-2",
        "faceparse": "--size 32 --width 4 --epochs 2 --batch-size 8",
        "bidmc_hr": "--seconds 10 --bins 16 --width 16 --depth 2 --epochs 2 --batch-size 64",
        "seqsetvae": "--width 16 --heads 2 --depth 2 --hidden 16 --epochs 2 --batch-size 8 "
                     "--train-ratio 0.5 --val-ratio 0.2 --test-ratio 0.3"}


def write_eyes(file, n=400, size=(24, 24)):
    images, labels, groups, _ = data.synthetic_eyes(n, size=size)
    np.savez(file, images=images.permute(0, 2, 3, 1).numpy(), labels=labels, groups=groups)


def write_faces(file, n=40, size=(64, 64)):
    images, masks, _ = data.synthetic_faces(n, size=size)
    np.savez(file, images=images.permute(0, 2, 3, 1).numpy(), masks=masks.numpy())


def write_modalities(file, n=240, classes=3, names=("audio", "sensor")):
    arrays, labels, groups, label_names, _ = data.synthetic_modalities(n, classes=classes)
    arrays = {name: arrays[name] for name in names}
    np.savez(file, **arrays, labels=labels, groups=groups, label_names=np.array(label_names))


def write_recordings(folder, n=10, seconds=90):
    """n recordings as PhysioNet writes BIDMC."""
    folder.mkdir()
    for recording in data.synthetic_ppg(n, seconds=seconds):
        name = f"{folder}/bidmc_{recording['number']:02d}"
        breaths = [recording["breaths"], recording["breaths_2"]]
        marks = np.full((max(map(len, breaths)), 2), np.nan)
        for column, found in enumerate(breaths):
            marks[: len(found), column] = found
        clock = np.stack([recording[key] for key in ("time", "hr", "pulse")], 1)
        annotators = "breaths ann1 [signal sample no],breaths ann2 [signal sample no]"
        for table, header, values in (("Signals", "PLETH", recording["ppg"]),
                                      ("Numerics", "Time [s],HR,PULSE", clock),
                                      ("Breaths", annotators, marks)):
            np.savetxt(f"{name}_{table}.csv", values, delimiter=",", header=header, comments="")
        Path(f"{name}_Fix.txt").write_text(f"MIMIC II matched wdb ID: {recording['patient']}\n")


def write_stays(folder, n=80):
    """n stays as PhysioNet writes the challenge of 2012, all in set a."""
    (folder / "set-a").mkdir(parents=True)
    stays = data.synthetic_stays(n)
    first_event = stays["first_event"][stays["first_set"]]
    minutes = np.repeat(stays["minutes"], np.diff(stays["first_event"])).astype(int)
    scores = np.nan_to_num([stays["severity"]["SAPS-I"], stays["severity"]["SOFA"]], nan=-1)
    outcomes = ["RecordID,SAPS-I,SOFA,Length_of_stay,Survival,In-hospital_death"]
    for i, record in enumerate(stays["ids"]):
        lines = ["Time,Parameter,Value", f"00:00,RecordID,{record}"]
        for event in range(first_event[i], first_event[i + 1]):
            variable = data.STAY_VARIABLES[stays["variables"][event]]
            hour, minute = divmod(minutes[event], 60)
            lines.append(f"{hour:02d}:{minute:02d},{variable},{stays['values'][event]:.9g}")
        (folder / "set-a" / f"{record}.txt").write_text("\n".join(lines) + "\n")
        saps, sofa = scores[:, i].astype(int)
        outcomes.append(f"{record},{saps},{sofa},5,-1,{stays['labels'][i]}")
    (folder / "Outcomes-a.txt").write_text("\n".join(outcomes) + "\n")


def tiny_run(task, path, out, *words):
    """train.py on drawn data, or this ends with what it said."""
    log = io.StringIO()
    call = ["--task", task, *TINY[task].split(), "--data", str(path), "--device", "cpu"]
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        code = train.main([*call, "--out", str(out), *words])
    if code:
        sys.exit(f"{' '.join(call)} ended with {code}:\n{log.getvalue()}")
    return out
