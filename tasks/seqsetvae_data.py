"""The data of seqsetvae: stays of irregular events, their statistics, drawn stays, batches."""

import hashlib
import math
import re
import warnings
from pathlib import Path

import numpy as np
import torch

import data
from tasks.common import UNREADABLE


STAY_VARIABLES = (
    "Age", "Gender", "Height", "ICUType", "Weight",  # the first four are descriptors, once at 00:00
    "HR", "MAP", "SysABP", "DiasABP", "Urine", "NISysABP", "NIDiasABP", "NIMAP", "Temp", "GCS",
    "RespRate", "FiO2", "MechVent", "pH", "PaCO2", "PaO2", "HCT", "K", "Platelets", "Creatinine",
    "BUN", "HCO3", "Mg", "Na", "Glucose", "WBC", "SaO2", "Lactate", "Bilirubin", "AST", "ALT",
    "ALP", "Albumin", "TroponinT", "TroponinI", "Cholesterol")
STAY_MINUTES = 2880  # 48:00, the last minute that is read: later events would leak the outcome
STAY_LINE = re.compile("([0-9]{1,4}):([0-5][0-9]),([^,\n]*),([^,_\n]*)")  # float() reads 1_0 as 10


def read_stays(path, *, cache="", need_outcomes=True):
    """Read the folder of the PhysioNet/CinC Challenge 2012: stays of sets of events.

        set-?/<RecordID>.txt  Time,Parameter,Value: HH:MM since admission, one of STAY_VARIABLES (or
                              RecordID), a number
        Outcomes-?.txt        RecordID, SAPS-I, SOFA, In-hospital_death; other columns are ignored

    A set is all events of one minute of one stay. Of n stays, S sets and E events, stay i holds the
    sets first_set[i] : first_set[i + 1], and set j the events first_event[j] : first_event[j + 1].

    path           the folder that holds set-a (and set-b, ...) or one of those
    cache          a folder: stays are parsed once per content of the files and kept there as .npz
    need_outcomes  False: Outcomes-?.txt is read if there is one, and a folder of <RecordID>.txt
                   with any name will do
    returns        a dict; stays are sorted by set, then RecordID; sets by minute; events by
                   variable, then value
        ids          int64 (n,)
        labels       int64 (n,): 1 died in hospital, 0 did not, -1 unknown
        first_set    int64 (n + 1,)
        first_event  int64 (S + 1,)
        minutes      float32 (S,) since admission
        variables    uint8 (E,), index into STAY_VARIABLES
        values       float32 (E,)
        severity     {"SAPS-I", "SOFA": float64 (n,)}, scores of the first day, NaN if unknown (-1)
        left_out     {reason: a count, or a list of short names} of all that was not taken
    Left out: the value -1, which means not recorded; other negative values (Temp -17.8 is 0 F);
              events later than 48:00; parameters that are unknown or empty; the second of two equal
              values of a variable in one minute; stays without any event; outcomes without a stay;
              files other than <RecordID>.txt
    Kept:     two values of a variable in one minute; descriptors, in one set with the measurements
              of 00:00; stays of descriptors only; stays without an outcome, with the label -1;
              values out of any range (a pH of 735), see event_scaler. Lines may be in any order and
              end in CRLF, and the last one may have no end.
    Errors:   ValueError with file, line and remedy for a wrong header, a line that is cut off, a
              time or value that is not a finite number, an outcome other than 0 and 1, a RecordID
              that differs from the file name or occurs twice, a missing Outcomes-?.txt, no stays
    Source:   Silva et al. 2012, Computing in Cardiology 39:245;
              physionet.org/content/challenge-2012
    Check:    set a holds 4,000 stays, 554 died, 3 have descriptors only, and 24 temperatures are
              below 0
    """
    files, outcomes, other = list_stays(path, need_outcomes=need_outcomes)
    if not cache:
        return parse_stays(files, outcomes, other)
    digest = hashlib.sha256(repr((1, other)).encode())  # raise the 1 when the parsing changes
    tables = [table for table in outcomes.values() if table is not None]
    for file in files + tables:
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        digest.update(f"{file.parent.name}/{file.name}:{content}".encode())
    kept = Path(cache) / f"stays-{digest.hexdigest()[:16]}.npz"
    if kept.exists():
        try:
            return read_stays_cache(kept)
        except UNREADABLE as error:
            warnings.warn(f"{kept} cannot be read ({error}): the stays are parsed again")
    stays = parse_stays(files, outcomes, other)
    try:
        write_stays_cache(kept, stays)
    except OSError as error:
        warnings.warn(f"the parsed stays cannot be kept in {cache} ({error}): they will be parsed "
                      "again")
    return stays


def write_stays_cache(file, stays):
    """Write the dict of read_stays as one .npz; an entry of a nested dict is named name/key."""
    arrays = {}
    for name, value in stays.items():
        if isinstance(value, dict):
            for key, nested in value.items():
                arrays[f"{name}/{key}"] = nested
        else:
            arrays[name] = value
    file.parent.mkdir(parents=True, exist_ok=True)
    with data.atomic_write(file) as stream:
        np.savez(stream, **arrays)


def read_stays_cache(file):
    """The dict of write_stays_cache."""
    names = ("ids", "labels", "first_set", "first_event", "minutes", "variables", "values")
    with np.load(file, allow_pickle=False) as archive:
        stays = {name: archive[name] for name in names} | {"severity": {}, "left_out": {}}
        for entry in archive.files:
            name, _, key = entry.partition("/")
            if name == "severity":
                stays[name][key] = archive[entry]
            elif name == "left_out":
                stays[name][key] = archive[entry].tolist()
    return stays


def list_stays(path, *, need_outcomes=True):
    """Files of the stays in order, {folder of a set: its outcomes or None}, names of other files.

    Errors: ValueError for no stays, missing outcomes, or two files of one RecordID
    """
    path = Path(path)
    folders = sorted(folder for folder in path.glob("set-?") if folder.is_dir())
    if not folders and path.is_dir():
        folders = [path]
    files, outcomes, other = [], {}, []
    for folder in folders:
        visible = [file for file in folder.iterdir()
                   if file.is_file() and not file.name.startswith(".")]
        stays = [file for file in visible if re.fullmatch(r"[0-9]{1,18}\.txt", file.name)]
        files += sorted(stays, key=lambda file: int(file.stem))
        other += sorted(f"{folder.name}/{file.name}" for file in set(visible) - set(stays))
        table = folder.parent / f"Outcomes-{folder.name[-1]}.txt"
        is_set = re.fullmatch("set-.", folder.name)
        outcomes[folder] = table if is_set and table.is_file() else None
        if stays and need_outcomes and outcomes[folder] is None:
            if not is_set:
                raise ValueError(f"{folder} holds stays but is no folder set-?: which "
                                 "Outcomes-?.txt is theirs cannot be told; move them into set-a, "
                                 "with Outcomes-a.txt beside it")
            raise ValueError(f"{table} is missing: copy it beside {folder.name}, or move "
                             f"{folder.name} away")
    if not files:
        raise ValueError(f"{path} holds no stays: give the folder with set-a/<RecordID>.txt and "
                         "Outcomes-a.txt of the challenge")
    file_of_record = {}
    for file in files:
        twin = file_of_record.setdefault(int(file.stem), file)
        if twin is not file:
            raise ValueError(f"{twin} and {file} have the same RecordID: one stay must not be on "
                             "two sides of a split, remove one")
    return files, outcomes, other


def parse_stays(files, outcomes, other=()):
    """The dict of read_stays from the files that list_stays lists."""
    unknown, events = {}, []
    for file in files:
        *columns, other_parameters = read_stay(file)
        events.append(columns)
        for name in other_parameters:
            unknown[name] = unknown.get(name, 0) + 1
    ids = np.array([int(file.stem) for file in files])
    owner = np.repeat(np.arange(len(files)), [len(columns[0]) for columns in events])
    minutes, variables, values = map(np.concatenate, zip(*events))

    missing, late = values == -1, minutes > STAY_MINUTES
    negative = (values < 0) & ~missing & ~late
    take = ~(missing | late | negative)
    has_events = np.bincount(owner[take], minlength=len(ids)) > 0
    owner_taken = (np.cumsum(has_events) - 1)[owner[take]]
    packed = pack_stays(owner_taken, minutes[take], variables[take], values[take])
    table = all_outcomes(outcomes)

    count_late = np.bincount(owner[late], minlength=len(ids))
    in_labelled_set = np.array([outcomes.get(file.parent) is not None for file in files])
    in_table = np.array([record in table for record in ids.tolist()])
    without_outcome = ids[has_events & in_labelled_set & ~in_table]
    without_stay = sorted(table.keys() - set(ids.tolist()))
    left_out = {
        "not recorded (-1)": int((missing & ~late).sum()),
        "negative value": [f"{ids[owner[i]]} {STAY_VARIABLES[variables[i]]} {values[i]:g}"
                           for i in np.flatnonzero(negative)],
        "later than 48:00": [f"{ids[i]} ({count_late[i]})" for i in np.flatnonzero(count_late)],
        "unknown parameter": [f"{name!r} ({count})" for name, count in sorted(unknown.items())],
        "same value twice in a minute": int(take.sum()) - len(packed["values"]),
        "stay without an event": [str(record) for record in ids[~has_events]],
        "stay without an outcome": [str(record) for record in without_outcome],
        "set without outcomes": [folder.name for folder in outcomes if outcomes[folder] is None],
        "outcome without a stay": [str(record) for record in without_stay],
        "file that is no stay": list(other)}
    if not has_events.any():
        raise ValueError(f"none of the {len(files)} stays from {files[0]} on holds an event: "
                         f"{left_out}")

    unknown_outcome = (-1, np.nan, np.nan)
    lines = [table.get(record, unknown_outcome) for record in ids[has_events].tolist()]
    died, saps, sofa = np.array(lines, dtype=np.float64).T.copy()
    return {"ids": ids[has_events], "labels": died.astype(np.int64), **packed,
            "severity": {"SAPS-I": saps, "SOFA": sofa},
            "left_out": {reason: items for reason, items in left_out.items() if items}}


def all_outcomes(outcomes):
    """{RecordID: (died, SAPS-I, SOFA)} of all sets, from {folder of a set: its file or None}."""
    table = {}
    for file in outcomes.values():
        lines = {} if file is None else read_outcomes(file)
        for record, line in lines.items():
            if record in table:
                raise ValueError(f"{file}: RecordID {record} has an outcome in another table too: "
                                 "remove one of the lines")
            table[record] = line
    return table


def read_stay(file):
    """Read one <RecordID>.txt: its events in the order of the file, and its unknown parameters.

    returns  minutes int64, variables uint8, values float64, a list of names
    Errors:  ValueError with file, line and remedy, see read_stays
    """
    text = file.read_bytes().decode("utf-8-sig", errors="replace").replace("\r\n", "\n")
    header, _, body = text.partition("\n")
    if header != "Time,Parameter,Value":
        raise ValueError(f"{file} line 1: {header[:80]!r} must be 'Time,Parameter,Value': copy the "
                         "file again")
    body = body.rstrip("\n")
    code = {name: i for i, name in enumerate((*STAY_VARIABLES, "RecordID"))}
    minutes, variables, values, unknown = [], [], [], []
    for number, line in enumerate(body.split("\n") if body else (), 2):
        cells = STAY_LINE.fullmatch(line)
        try:
            if cells is None:
                raise ValueError
            hour, minute, name, value = cells.groups()
            if name not in code:
                unknown.append(name)
                continue
            value = float(value)
            if not abs(value) < 3e38:  # NaN, infinite, or infinite as float32
                raise ValueError
        except ValueError:
            raise ValueError(f"{file} line {number}: {line[:80]!r} must be HH:MM, a parameter and "
                             "a finite number: the file is cut off or damaged, copy it again"
                             ) from None
        minutes.append(60 * int(hour) + int(minute))
        variables.append(code[name])
        values.append(value)
    minutes = np.array(minutes, dtype=np.int64)
    variables = np.array(variables, dtype=np.uint8)
    values = np.array(values, dtype=np.float64)
    is_id = variables == len(STAY_VARIABLES)
    for record in values[is_id]:
        if record != int(file.stem):
            raise ValueError(f"{file} says RecordID {record:.0f}: its name and its content are of "
                             "two stays, copy it again")
    return minutes[~is_id], variables[~is_id], values[~is_id], unknown


def read_outcomes(file):
    """{RecordID: (died 0 or 1, SAPS-I, SOFA)} of an Outcomes-?.txt; a score of -1 is NaN.

    Errors: ValueError with file, line and remedy, see read_stays
    """
    lines = file.read_bytes().decode("utf-8-sig", errors="replace").splitlines()
    header = [name.strip() for name in lines[0].split(",")] if lines else []
    names = ("RecordID", "In-hospital_death", "SAPS-I", "SOFA")
    if not set(names) <= set(header):
        raise ValueError(f"{file} line 1: columns {header} must hold {', '.join(names)}: copy the "
                         "file again")
    table = {}
    for number, line in enumerate(lines[1:], 2):
        cells = [cell.strip() for cell in line.split(",")]
        if cells == [""]:
            continue
        if len(cells) == len(header):
            record, died, *scores = [cells[header.index(name)] for name in names]
        else:
            record, died, scores = "", "", []
        numbers = all(re.fullmatch(r"-1|[0-9]+", score) for score in scores)
        if not record.isdecimal() or not numbers:
            raise ValueError(f"{file} line {number}: {line[:80]!r} must hold {len(header)} "
                             "numbers: copy the file again")
        if died not in ("0", "1"):
            raise ValueError(f"{file} line {number}: In-hospital_death {died!r} must be 0 or 1: a "
                             "stay whose outcome is not known has no line, remove it")
        if int(record) in table:
            raise ValueError(f"{file} line {number}: RecordID {record} has a line already: remove "
                             "one of them")
        saps, sofa = (math.nan if score == "-1" else float(score) for score in scores)
        table[int(record)] = int(died), saps, sofa
    return table


def pack_stays(owner, minutes, variables, values):
    """Events in any order as the compressed rows of read_stays: sorted, and without repetitions.

    owner   int (E,): 0 .. n - 1, the stay of each event; every stay has one
    Check:  pack_stays([0, 0, 0], [5, 5, 2], [1, 1, 0], [7, 7, 9])["first_event"].tolist()
            == [0, 1, 2]
    """
    columns = [np.asarray(column) for column in (owner, minutes, variables)]
    columns.append(np.asarray(values).astype(np.float32))
    order = np.lexsort(columns[::-1])  # the last key is the first to sort by
    owner, minutes, variables, values = (column[order] for column in columns)

    def differs(column):
        """Whether an entry differs from the one before; the first one does."""
        return np.concatenate([[True], column[1:] != column[:-1]])[: len(column)]

    opens_set = differs(owner) | differs(minutes)
    once = opens_set | differs(variables) | differs(values)
    sets = np.flatnonzero(opens_set)
    stays = np.arange(owner.max(initial=-1) + 2)
    first_event = np.append(np.flatnonzero(opens_set[once]), once.sum())
    return {"first_set": np.searchsorted(owner[sets], stays).astype(np.int64),
            "first_event": first_event.astype(np.int64),
            "minutes": minutes[sets].astype(np.float32),
            "variables": variables[once].astype(np.uint8), "values": values[once]}


def gather_ranges(first, rows):
    """Indices of the elements of rows: first[r] to first[r + 1] - 1 for each r, one after another.

    Check:  gather_ranges(np.array([0, 2, 2, 5]), [2, 0]).tolist() == [2, 3, 4, 0, 1]
    """
    first, rows = np.asarray(first), np.asarray(rows, dtype=np.int64)
    counts = first[rows + 1] - first[rows]
    before = np.cumsum(counts) - counts
    return np.arange(counts.sum()) + np.repeat(first[rows] - before, counts)


def event_scaler(stays, rows, *, tail=0.005):
    """Mean and sd of each variable over the events of the training stays, robust to typing errors.

        low, high = quantiles tail and 1 - tail of the values x of a variable
        mean, sd  = those of clip(x, low, high)

    Without clipping, one pH of 735 among 7.35 would dominate the sd. A variable with one value has
    sd 1. A variable without any event in these stays has low = high = mean = 0 and sd 1: its z is
    always 0, because the size of its values is unknown.

    stays    the dict of read_stays; rows (m,) of the training stays, of nothing else
    returns  {"mean", "sd", "low", "high": float64 (V,)}, V = len(STAY_VARIABLES)
    Errors:  ValueError for no rows, or tail outside [0, 0.5)
    Check:   7.3 and 7.5, 500 times each, and one 735 have sd 0.1, and 23 with tail 0
    """
    if not 0 <= tail < 0.5 or len(rows) == 0:
        raise ValueError(f"tail {tail:g} must be at least 0 (no clipping) and below 0.5, and "
                         f"{len(rows)} stays at least 1")
    events = gather_ranges(stays["first_event"][stays["first_set"]], rows)
    variables, values = stays["variables"][events], stays["values"][events].astype(np.float64)
    order = np.argsort(variables, kind="stable")
    bounds = np.searchsorted(variables[order], np.arange(len(STAY_VARIABLES) + 1))
    scaler = {name: np.full(len(STAY_VARIABLES), float(name == "sd"))
              for name in ("mean", "sd", "low", "high")}
    for v in range(len(STAY_VARIABLES)):
        x = values[order[bounds[v] : bounds[v + 1]]]
        if len(x):
            low, high = np.quantile(x, (tail, 1 - tail))
            x = x.clip(low, high)
            scaler["low"][v], scaler["high"][v], scaler["mean"][v] = low, high, x.mean()
            scaler["sd"][v] = x.std() if x.min() < x.max() else 1.0
    return scaler


def scale_events(variables, values, scaler):
    """Scale each event by the event_scaler of its variable, as float32.

        z = (clip(x, low, high) - mean) / sd

    Check:  an event of a variable that no training stay had is 0
    """
    low, high, mean, sd = (np.asarray(scaler[name], dtype=np.float64)[variables]
                           for name in ("low", "high", "mean", "sd"))
    return ((np.clip(values, low, high) - mean) / sd).astype(np.float32)


def stay_statistics(stays, rows, scaler):
    """Features of a stay for a logistic regression, the baseline for models that know time.

        columns 0 .. V - 1      mean z of the variable, 0 if never measured
                V .. 2 V - 1    1 if never measured, else 0
                2 V .. 3 V - 1  log(1 + number of events)

    returns float64 (m, 3 V)

    stays   the dict of read_stays; rows (m,); scaler of event_scaler
    """
    first, width = stays["first_event"][stays["first_set"]], len(STAY_VARIABLES)
    rows = np.asarray(rows, dtype=np.int64)
    events = gather_ranges(first, rows)
    variables = stays["variables"][events]
    cell = np.repeat(np.arange(len(rows)), first[rows + 1] - first[rows]) * width + variables
    z = scale_events(variables, stays["values"][events], scaler).astype(np.float64)
    count = np.bincount(cell, minlength=len(rows) * width).reshape(-1, width)
    total = np.bincount(cell, z, minlength=len(rows) * width).reshape(-1, width)
    return np.concatenate([total / np.maximum(count, 1), count == 0, np.log1p(count)], axis=1)


SUMMARIES = ("first", "last", "min", "max", "mean", "slope", "count", "since_last")


def stay_summaries(stays, rows):
    """What the values of each variable did over a stay, by the eight SUMMARIES.

        slope       of the least-squares line of value over time, per hour; 0 if all are of one time
        since_last  48 h - the time of the last value, in hours

    Values are as recorded, without any clipping: ranks forgive a typing error.

    stays    the dict of read_stays; rows (m,)
    returns  float64 (8, m, V); NaN where a stay has no value of the variable, but count 0
    Check:   values 1, 5 and 3 at 0, 1 and 2 h have slope 1, since_last 46
    """
    rows, width = np.asarray(rows, dtype=np.int64), len(STAY_VARIABLES)
    sets = gather_ranges(stays["first_set"], rows)
    events, sizes = gather_ranges(stays["first_event"], sets), np.diff(stays["first_event"])[sets]
    stay_of_set = np.repeat(np.arange(len(rows)), np.diff(stays["first_set"])[rows])
    cell = np.repeat(stay_of_set, sizes) * width + stays["variables"][events]
    order = np.argsort(cell, kind="stable")  # in a cell they stay in the order of time
    cell, x = cell[order], stays["values"][events[order]].astype(np.float64)
    hours = np.repeat(stays["minutes"][sets].astype(np.float64) / 60, sizes)[order]

    start = np.flatnonzero(np.diff(cell, prepend=-1))
    count = np.diff(np.append(start, len(cell)))
    end = start + count - 1
    mean = np.add.reduceat(x, start) / count
    t = hours - np.repeat(np.add.reduceat(hours, start) / count, count)
    moment, spread = np.add.reduceat(t * x, start), np.add.reduceat(t * t, start)
    several_times = hours[end] > hours[start]
    slope = np.where(several_times, moment / np.where(several_times, spread, 1), 0)
    columns = (x[start], x[end], np.minimum.reduceat(x, start), np.maximum.reduceat(x, start),
               mean, slope, count, 48 - hours[end])

    summaries = np.full((len(SUMMARIES), len(rows) * width), np.nan)
    summaries[SUMMARIES.index("count")] = 0
    summaries[:, cell[start]] = columns
    return summaries.reshape(len(SUMMARIES), len(rows), width)


def rank_knots(summaries, *, knots=21):
    """Quantiles 0, 0.05, ..., 1 of each summary of each variable, over the stays that have it.

    summaries  of stay_summaries, of training stays alone
    returns    lists [8][V][knots], empty for a variable that no stay has: plain, for a checkpoint
    """
    has_value = summaries[SUMMARIES.index("count")] > 0
    table = []
    for summary in summaries:
        columns = [summary[has, v] for v, has in enumerate(has_value.T)]
        quantiles = np.linspace(0, 1, knots)
        table.append([np.quantile(x, quantiles).tolist() if len(x) else [] for x in columns])
    return table


def stay_ranks(summaries, knots):
    """Features of a stay for a logistic regression: each summary by its rank, and its square.

        rank = 2 P(x' < x) + P(x' = x) - 1 in [-1, 1], by interpolation between the knots

    Outliers have rank 1, whatever their size. The square is there because both a low and a high
    value can be dangerous. A variable that a stay lacks has rank 0, and 1 in a column of its own.

    summaries  (8, m, V) of stay_summaries; knots of rank_knots, of the training stays
    returns    float64 (m, 17 V): ranks 8 V, their squares 8 V, missing V
    Check:     a variable with knots 0, 1, ..., 20 gives 15 the rank 0.5 and 99 the rank 1
    """
    missing = summaries[SUMMARIES.index("count")] == 0
    ranks = np.zeros_like(summaries)
    for summary, of_summary, result in zip(summaries, knots, ranks):
        for v, points in enumerate(of_summary):
            if points:
                values, member = np.unique(points, return_inverse=True)
                # equal knots share their mean place
                places = np.bincount(member, np.linspace(-1, 1, len(points))) / np.bincount(member)
                result[:, v] = np.interp(summary[:, v], values, places)
    ranks[:, missing] = 0
    flat = np.concatenate(ranks, axis=1)
    return np.concatenate([flat, flat**2, missing], axis=1)


class StaySplit:
    """The stays of one split: `labels`, `ids`, `lengths`, and `batch(rows)` to train on.

    stays        the dict of read_stays
    rows         (m,), the rows of this split; their events are scaled and copied once
    scaler       of event_scaler over the training stays, the same for every split
    drop_events  probability to leave an event out of a batch with a generator; a set without any
                 event left is dropped too; a stay always keeps its event with the largest draw
    labels       int64 (m,), -1 = unknown
    lengths      int64 (m,), sets of each stay: for bucketed_batches
    features     None, or a tensor (m, width) of a frozen encoder: batches hold its rows, not inputs
    anchor       None, or logits (m,) of a simple model, which batches hold
    Errors:      ValueError for drop_events outside [0, 1)
    """

    chunk = 64

    def __init__(self, stays, rows, *, scaler, drop_events=0.0, device="cpu"):
        if not 0 <= drop_events < 1:
            raise ValueError(f"drop_events {drop_events:g} must be at least 0 (off) and below 1")
        self.stays, self.rows, self.scaler = stays, np.asarray(rows, dtype=np.int64), scaler
        self.drop_events, self.device = drop_events, torch.device(device)
        self.features = self.anchor = None
        self.labels, self.ids = stays["labels"][self.rows], stays["ids"][self.rows]
        self.names = stays["ids"]  # of the whole set, as in the other splits
        sets = gather_ranges(stays["first_set"], self.rows)
        events = gather_ranges(stays["first_event"], sets)
        self.lengths = np.diff(stays["first_set"])[self.rows]
        self.sizes = np.diff(stays["first_event"])[sets]
        self.first_set = np.append(0, np.cumsum(self.lengths))
        self.first_event = np.append(0, np.cumsum(self.sizes))
        self.minutes, self.variables = stays["minutes"][sets], stays["variables"][events]
        self.values = scale_events(self.variables, stays["values"][events], scaler)

    def __len__(self):
        return len(self.rows)

    def statistics(self):
        """stay_statistics of these rows."""
        return stay_statistics(self.stays, self.rows, self.scaler)

    def summaries(self):
        """stay_summaries of these rows."""
        return stay_summaries(self.stays, self.rows)

    def batch(self, rows, generator=None):
        """Gather rows of this split; drop events if a generator is given.

        inputs    the events of b stays, one stay after the other: variables int64 (E,), values
                  float32 (E,) scaled; sizes int64 (S,), events of each set; minutes float32 (S,);
                  lengths int64 (b,), sets of each stay
        features  (b, width), instead of inputs
        anchor    float (b,), if there is one
        targets   float (b,), unless a label of this split is unknown
        """
        rows = np.asarray(rows, dtype=np.int64)
        if self.features is not None:
            batch = {"features": self.features[torch.from_numpy(rows)]}
        else:
            sets = gather_ranges(self.first_set, rows)
            events = gather_ranges(self.first_event, sets)
            inputs = {"variables": self.variables[events].astype(np.int64),
                      "values": self.values[events], "sizes": self.sizes[sets],
                      "minutes": self.minutes[sets], "lengths": self.lengths[rows]}
            if generator is not None and self.drop_events > 0:
                draw = torch.rand(len(events), generator=generator).numpy()
                inputs = self.dropped(inputs, draw)
            inputs = {name: torch.from_numpy(x).to(self.device) for name, x in inputs.items()}
            batch = {"inputs": inputs}
        if self.anchor is not None:
            batch["anchor"] = torch.from_numpy(self.anchor[rows]).float().to(self.device)
        if (self.labels >= 0).all():
            batch["targets"] = torch.from_numpy(self.labels[rows]).float().to(self.device)
        return batch

    def dropped(self, inputs, draw):
        """The inputs without the events whose draw (E,) is below drop_events."""
        stay = np.repeat(np.arange(len(inputs["lengths"])), inputs["lengths"])  # of each set
        event_set = np.repeat(np.arange(len(stay)), inputs["sizes"])
        largest = np.zeros(len(inputs["lengths"]), dtype=draw.dtype)
        np.maximum.at(largest, stay[event_set], draw)
        keep = (draw >= self.drop_events) | (draw == largest[stay[event_set]])
        sizes = np.bincount(event_set[keep], minlength=len(stay))
        return {"variables": inputs["variables"][keep], "values": inputs["values"][keep],
                "sizes": sizes[sizes > 0], "minutes": inputs["minutes"][sizes > 0],
                "lengths": np.bincount(stay[sizes > 0])}


def synthetic_stays(n=1000, *, seed=0):
    """Drawn stays, as read_stays returns them: for running and teaching, never for a result.

    A hidden severity with a trend over 48 hours moves vitals and labs away from their usual values.
    It also makes labs more frequent: every 4 hours instead of every 12. Death is drawn from a
    logistic curve of the severity at the end, so no model can be perfect. Vitals come at one rate
    per stay, every 1 to 2.5 hours, several in one minute; descriptors come at minute 0.

    returns  the dict of read_stays: ids 1 .. n, 20 to 60 sets per stay; SAPS-I and SOFA depend on
             the severity at the start
    Errors:  ValueError for n < 1
    Check:   of the default 1,000 stays, 14 to 20 % died; a logistic regression on stay_statistics
             has an AUROC of about 0.8
    """
    if n < 1:
        raise ValueError(f"n {n} must be at least 1")
    rng = np.random.default_rng(seed)
    start, trend = rng.normal(size=(2, n, 1))

    def severity(minutes):
        """(n, k) at times (n, k): the end of a stay shows more of the trend than its start."""
        return start + trend * (minutes / STAY_MINUTES - 0.3)

    died = rng.random(n) < 1 / (1 + np.exp(2.5 - 1.5 * severity(np.array(STAY_MINUTES))[:, 0]))
    events = []

    def measure(names, usual, sd, effect, times, p):
        """Append events: every name at every time (n, k) up to 48:00, with probability p.

        value = usual + sd (effect * severity + 0.7 person + 0.7 noise), at least usual / 10
        """
        usual, sd, effect = (np.array(x)[:, None, None] for x in (usual, sd, effect))
        person = rng.normal(size=(len(names), n, 1))
        z = effect * severity(times) + 0.7 * person
        z = z + 0.7 * rng.normal(size=(len(names), *times.shape))
        x = np.maximum(usual + sd * z, usual / 10).round(2)
        v, i, k = np.nonzero((rng.random(x.shape) < p) & (times <= STAY_MINUTES))
        codes = np.array([STAY_VARIABLES.index(name) for name in names])
        events.append((i, times[i, k], codes[v], x[v, i, k]))

    zero = np.zeros((n, 1))
    measure(("Age", "Height", "Weight"), (64, 170, 81), (15, 10, 20), (0.4, 0, 0), zero, 0.97)
    for name, x in (("Gender", rng.integers(0, 2, n)), ("ICUType", rng.integers(1, 5, n))):
        events.append((np.arange(n), zero[:, 0], np.full(n, STAY_VARIABLES.index(name)), x))
    every = rng.uniform(60, 150, (n, 1))
    times = np.floor((np.arange(48) + rng.uniform(0, 0.8, (n, 48))) * every)
    measure(("HR", "MAP", "SysABP", "DiasABP", "RespRate", "Temp", "Urine", "GCS"),
            (87, 80, 119, 60, 19, 37, 120, 12), (17, 15, 22, 12, 5, 0.8, 100, 3),
            (0.4, -0.3, -0.3, -0.2, 0.3, 0.1, -0.4, -0.5), times, 0.7)
    every = 240 + 480 / (1 + np.exp(1.5 * start))
    times = np.floor((np.arange(12) + rng.uniform(0.1, 0.9, (n, 12))) * every)
    measure(("Creatinine", "BUN", "Lactate", "HCO3", "Platelets", "WBC", "HCT", "K", "Na",
             "Glucose", "pH", "PaO2"), (1.4, 27, 2.8, 23, 190, 12.7, 30.7, 4.1, 139, 141, 7.4, 150),
            (0.8, 16, 1.5, 4.5, 90, 5, 5, 0.6, 5, 45, 0.1, 60),
            (0.4, 0.5, 0.5, -0.4, -0.3, 0.2, -0.1, 0.1, 0, 0.2, -0.3, -0.2), times, 0.6)
    scores = {name: np.maximum(usual + sd * (start[:, 0] + rng.normal(size=n)), 0).round()
              for name, usual, sd in (("SAPS-I", 14, 4), ("SOFA", 6, 3))}
    scores["SAPS-I"][rng.random(n) < 0.02] = np.nan
    return {"ids": np.arange(1, n + 1), "labels": died.astype(np.int64),
            **pack_stays(*map(np.concatenate, zip(*events))), "severity": scores, "left_out": {}}
