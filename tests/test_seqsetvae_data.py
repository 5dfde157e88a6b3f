"""Tests of seqsetvae_data."""

import functools
import itertools
import json
import math

import numpy as np
import torch

import data
import losses
from tasks import seqsetvae_data
from tasks.seqsetvae_data import (
    event_scaler, gather_ranges, list_stays, pack_stays, rank_knots, read_stays, scale_events,
    stay_ranks, stay_statistics, stay_summaries, STAY_VARIABLES, StaySplit, SUMMARIES,
    synthetic_stays)
from tests.helpers import (
    edit, folder, near, need_real, OUTCOME_HEADER, padding, raises, replaced, same_bits, seeded,
    STAY_HEADER, warned, write_stay, write_stays)

refuses = functools.partial(raises, ValueError)
variable_index = STAY_VARIABLES.index


def assert_same_stays(one, other):
    assert list(one) == list(other)
    assert repr(one["left_out"]) == repr(other["left_out"]), (one["left_out"], other["left_out"])
    assert list(one["severity"]) == ["SAPS-I", "SOFA"]
    for name, scores in one["severity"].items():
        assert scores.dtype == np.float64, name
        assert np.array_equal(scores, other["severity"][name], equal_nan=True), name
    for name in one.keys() - {"severity", "left_out"}:
        assert one[name].dtype == other[name].dtype, name
        assert np.array_equal(one[name], other[name]), name


def stay_events(stays):
    """RecordID -> [(minute, [(variable, value)])], by plain loops over the compressed rows."""
    values = stays["values"].tolist()
    events = list(zip([STAY_VARIABLES[v] for v in stays["variables"]], values))
    first_set, first_event = stays["first_set"], stays["first_event"]
    by_stay = {}
    for i, record in enumerate(stays["ids"].tolist()):
        by_stay[record] = []
        for j in range(first_set[i], first_set[i + 1]):
            in_set = events[first_event[j] : first_event[j + 1]]
            by_stay[record].append((int(stays["minutes"][j]), in_set))
    return by_stay


def test_data_stays_are_read_as_they_were_written_in_one_set_or_two():
    stays = synthetic_stays(12, seed=2)
    with folder() as f:
        assert_same_stays(read_stays(write_stays(f / "one", stays)), stays)
        assert_same_stays(read_stays(f / "one" / "set-a"), stays)  # the folder of the set itself
        read = read_stays(write_stays(f / "two", stays, "ab", newline="\r\n"))
    order = np.r_[0:12:2, 1:12:2]  # by set, then RecordID
    assert read["left_out"] == {} and stay_events(read) == stay_events(stays)
    for name in ("ids", "labels"):
        assert read[name].tolist() == stays[name][order].tolist()
    arrays = {name: array for name, array in read.items() if isinstance(array, np.ndarray)}
    sets, events = read["first_set"][-1], read["first_event"][-1]
    assert {name: (array.dtype.name, len(array)) for name, array in arrays.items()} == {
        "ids": ("int64", 12), "labels": ("int64", 12), "first_set": ("int64", 13),
        "first_event": ("int64", len(stays["minutes"]) + 1), "minutes": ("float32", sets),
        "variables": ("uint8", events), "values": ("float32", events)}


def test_data_stay_variables_are_the_41_of_the_challenge_descriptors_first():
    assert len(STAY_VARIABLES) == len(set(STAY_VARIABLES)) == 41
    assert STAY_VARIABLES[:5] == ("Age", "Gender", "Height", "ICUType", "Weight")


def test_data_stays_survive_the_quirks_of_the_files_and_tell_what_was_left_out():
    with folder() as f:
        a = f / "set-a"
        write_stay(a / "9.txt", [
            "00:00,RecordID,9", "00:00,Age,54", "00:00,Gender,-1", "00:00,HR,80", "00:07,HR,73",
            "00:07,HR,75", "00:07,HR,73.0", "00:07,Temp,-17.8", "00:07,pH,735", "47:59,HR,0",
            "48:00,HR,70", "48:01,HR,70", "99:00,HR,-5", "100:30,HR,-1"])
        write_stay(a / "10.txt", ["05:00,HR,70", "00:30,K,4.1", "05:00,GCS,+3.", "00:00,Age,.5e2"],
                   newline="\r\n", end=False)
        # Descriptors only; nothing is left; no line.
        write_stay(a / "11.txt", ["00:00,RecordID,11", "00:00,Age,31", "00:00,Height,-1"])
        write_stay(a / "12.txt", [
            "00:00,RecordID,12", "00:00,Weight,-1", "01:00,Temp,-3", "48:01,HR,7"])
        write_stay(a / "13.txt", [])
        write_stay(a / "14.txt", ["01:00,,", "01:00,,3", "01:00,Foo,bar", "01:00,hr,4",
                                  "01:00,HR,4"], header=f"\ufeff{STAY_HEADER}")
        for name in ("notes.md", "15 (copy).txt", ".hidden"):
            (a / name).write_text("not a stay")
        outcomes = ["9,6,-1,5,-1,0", "10,-1,8,8,3,1", "", "11,0,0,1,-1,1", "12,1,1,1,1,0",
                    "77,1,1,1,-1,1"]
        (f / "Outcomes-a.txt").write_text("\n".join([OUTCOME_HEADER, *outcomes]))
        stays = read_stays(f)
    assert stay_events(stays) == {
        9: [(0, [("Age", 54), ("HR", 80)]), (7, [("HR", 73), ("HR", 75), ("pH", 735)]),
            (2879, [("HR", 0)]), (2880, [("HR", 70)])],
        10: [(0, [("Age", 50)]), (30, [("K", np.float32(4.1))]), (300, [("HR", 70), ("GCS", 3)])],
        11: [(0, [("Age", 31)])],
        14: [(60, [("HR", 4)])]}
    assert stays["ids"].tolist() == [9, 10, 11, 14] and stays["labels"].tolist() == [0, 1, 1, -1]
    assert np.array_equal(stays["severity"]["SAPS-I"], [6, np.nan, 0, np.nan], equal_nan=True)
    assert np.array_equal(stays["severity"]["SOFA"], [np.nan, 8, 0, np.nan], equal_nan=True)
    assert stays["left_out"] == {
        "not recorded (-1)": 3, "negative value": ["9 Temp -17.8", "12 Temp -3"],
        "later than 48:00": ["9 (3)", "12 (1)"],
        "unknown parameter": ["'' (2)", "'Foo' (1)", "'hr' (1)"],
        "same value twice in a minute": 1, "stay without an event": ["12", "13"],
        "stay without an outcome": ["14"], "outcome without a stay": ["77"],
        "file that is no stay": ["set-a/15 (copy).txt", "set-a/notes.md"]}


def test_data_stays_without_outcomes_are_read_for_pretraining_and_prediction():
    stays = synthetic_stays(6)
    with folder() as f:
        write_stays(f, stays, "ab")
        (f / "Outcomes-b.txt").unlink()
        refuses(f"{f / 'Outcomes-b.txt'} is missing: copy it beside set-b", lambda: read_stays(f))
        read = read_stays(f, need_outcomes=False)
        assert read["labels"].tolist() == stays["labels"][::2].tolist() + [-1] * 3
        assert read["left_out"] == {"set without outcomes": ["set-b"]}
        assert np.isnan(read["severity"]["SOFA"]).tolist() == [False] * 3 + [True] * 3
        (f / "set-a").rename(f / "new")
        read = read_stays(f / "new", need_outcomes=False)
        assert read["ids"].tolist() == [1, 3, 5] and read["labels"].tolist() == [-1] * 3
        assert read["left_out"] == {"set without outcomes": ["new"]}
        refuses("no folder set-?", lambda: read_stays(f / "new"))


def test_data_stays_name_file_line_and_remedy_of_what_is_damaged():
    good = ["00:00,RecordID,5", "00:00,Age,50", "01:00,HR,80"]
    outcome = f"{OUTCOME_HEADER}\n5,6,1,5,-1,0\n"
    wrong = ("01:00,HR", "01:00,H", "01:0", "01:60,HR,1", "xx:00,HR,1", "1,HR,1", "-1:00,HR,1",
             "01:00,HR,", "01:00,HR,x", "01:00,HR,nan", "01:00,HR,-inf", "01:00,HR,1e39",
             "01:00,HR,1_0", "01:00,HR,1,2", ",Foo,1", "12345:00,HR,1")
    rule = "must be HH:MM, a parameter and a finite number"
    cases = [([*good, line], f"5.txt line 5: {line!r} {rule}") for line in wrong]
    cases += [([good[0], "", *good[1:]], "5.txt line 3: ''"),
              (["00:00,RecordID,6"], "5.txt says RecordID 6"),
              ([*good, "00:00,RecordID,-1"], "5.txt says RecordID -1")]
    for (lines, message), newline in itertools.product(cases, ("\n", "\r\n")):
        with folder() as f:
            write_stay(f / "set-a" / "5.txt", lines, newline=newline)
            (f / "Outcomes-a.txt").write_text(outcome)
            refuses(message, lambda: read_stays(f, cache=f / "cache"))
            assert not (f / "cache").exists()
    for text, message in (
            ("", "line 1: columns [] must hold RecordID, In-hospital_death"),
            (outcome.replace("In-hospital_death", "Died"), "line 1: columns"),
            (outcome + "6,1,1,1,1,2\n", "line 3: In-hospital_death '2' must be 0 or 1"),
            (outcome + "6,1,1,1,1,-1\n", "line 3: In-hospital_death '-1'"),
            (outcome + "6,1,1,1,1,\n", "line 3: In-hospital_death ''"),
            (outcome + "6,1,1\n", "line 3: '6,1,1' must hold 6 numbers"),
            (outcome + "6,x,1,1,1,0\n", "line 3: '6,x,1,1,1,0'"),
            (outcome + "x,1,1,1,1,0\n", "line 3: 'x,1,1,1,1,0'"),
            (outcome + "5,6,1,5,-1,1\n", "line 3: RecordID 5 has a line already")):
        with folder() as f:
            write_stay(f / "set-a" / "5.txt", good)
            (f / "Outcomes-a.txt").write_text(text)
            refuses(f"Outcomes-a.txt {message}", lambda: read_stays(f))
    with folder() as f:
        refuses("holds no stays", lambda: read_stays(f))
        refuses("holds no stays", lambda: read_stays(f / "nowhere"))
        for header in ("", "Time,Value,Parameter"):
            write_stay(f / "set-a" / "5.txt", good, header=header)
            (f / "Outcomes-a.txt").write_text(outcome)
            refuses(f"5.txt line 1: {header!r} must be", lambda: read_stays(f))
        write_stay(f / "set-a" / "5.txt", ["00:00,Age,-1"])
        refuses("holds an event: {'not recorded (-1)': 1", lambda: read_stays(f))
        for twin in ("set-a/05.txt", "set-b/5.txt"):
            write_stay(f / twin, good)
            (f / "Outcomes-b.txt").write_text(f"{OUTCOME_HEADER}\n")
            refuses("have the same RecordID", lambda: read_stays(f))
            (f / twin).unlink()
        write_stay(f / "set-b" / "6.txt", ["01:00,HR,80"])
        (f / "Outcomes-b.txt").write_text(outcome)
        refuses("RecordID 5 has an outcome in another table too", lambda: read_stays(f))


def test_data_stays_cache_parses_once_per_content():
    stays, parsed, parse = synthetic_stays(5), [], seqsetvae_data.parse_stays

    def counted(*arguments):
        parsed.append(1)
        return parse(*arguments)

    with folder() as f, replaced(seqsetvae_data, "parse_stays", counted):
        raw, cache = f / "raw", f / "cache"
        write_stays(raw, stays)
        write_stay(raw / "set-a" / "8.txt", ["00:00,Age,-1"])
        write_stay(raw / "set-a" / "9.txt", ["00:00,Age,40", "00:00,Height,-1", "00:03,Temp,-17.8"])
        expected = parse(*list_stays(raw))
        assert len(expected["left_out"]) == 4
        for _ in range(3):
            assert_same_stays(read_stays(raw, cache=cache), expected)
        assert len(parsed) == 1
        [kept] = cache.iterdir()
        assert kept.suffix == ".npz"
        for damaged in (kept.read_bytes()[:500], b""):
            kept.write_bytes(damaged)
            read, text = warned(lambda: read_stays(raw, cache=cache))
            assert_same_stays(read, expected)
            assert "cannot be read" in text
        assert len(parsed) == 3 and len(list(cache.iterdir())) == 1
        for file in ("set-a/9.txt", "Outcomes-a.txt"):  # another content of the same length
            edit(raw / file, lambda text: text.replace("40", "41").replace(",-1,0", ",-1,1"))
            assert_same_stays(read_stays(raw, cache=cache), parse(*list_stays(raw)))
        assert len(parsed) == 5
        (raw / "set-a" / "readme").write_text("")
        left_out = read_stays(raw, cache=cache)["left_out"]
        assert left_out["file that is no stay"] == ["set-a/readme"] and len(parsed) == 6
        (f / "no folder").write_text("")
        read, text = warned(lambda: read_stays(raw, cache=f / "no folder"))
        assert len(read["ids"]) == 6 and "will be parsed again" in text


def test_data_packed_stays_are_the_sorted_sets_of_the_events_in_any_order():
    rng = np.random.default_rng(0)
    for size in (1, 3, 200):
        owner = np.append(np.arange(5), rng.integers(0, 5, size))
        minutes, variables = rng.integers(0, 6, size + 5), rng.integers(0, 3, size + 5)
        values = rng.integers(0, 3, size + 5) / 2
        packed = pack_stays(owner, minutes, variables, values)
        columns = (owner.tolist(), minutes.tolist(), variables.tolist(), values.tolist())
        events = sorted(set(zip(*columns)))
        sets = sorted({event[:2] for event in events})
        assert packed["minutes"].tolist() == [minute for _, minute in sets]
        assert packed["variables"].tolist() == [variable for *_, variable, _ in events]
        assert packed["values"].tolist() == [value for *_, value in events]
        lengths, sizes = np.diff(packed["first_set"]), np.diff(packed["first_event"])
        owners, keys = [i for i, _ in sets], [event[:2] for event in events]
        assert lengths.tolist() == [owners.count(i) for i in range(5)]
        assert sizes.tolist() == [keys.count(key) for key in sets]
        assert packed["first_set"][0] == packed["first_event"][0] == 0
    packed = pack_stays([0, 0, 0], [5, 5, 2], [1, 1, 0], [7, 7, 9])
    assert packed["first_event"].tolist() == [0, 1, 2]


def test_data_gather_ranges_equals_slices():
    rng = np.random.default_rng(0)
    first = np.append(0, np.cumsum(rng.integers(0, 4, 20)))
    for rows in (rng.integers(0, 20, 50), [3], []):
        slow = [element for r in rows for element in range(first[r], first[r + 1])]
        assert gather_ranges(first, rows).tolist() == slow
    assert gather_ranges(np.array([0, 2, 2, 5]), [2, 0]).tolist() == [2, 3, 4, 0, 1]


def small_stays():
    """Four stays: HR in the first three, K in the last two, MechVent 1 wherever it is."""
    hr, k, ventilated = map(variable_index, ("HR", "K", "MechVent"))
    events = [(0, 0, hr, 60), (0, 5, hr, 80), (0, 5, ventilated, 1), (1, 9, hr, 100),
              (1, 9, ventilated, 1), (2, 0, k, 4), (2, 0, hr, 9999), (3, 1, k, 5)]
    labels = {"ids": np.array([11, 12, 13, 14]), "labels": np.array([0, 1, 1, 0])}
    return labels | pack_stays(*zip(*events))


def stays_of(name, values):
    """One stay for each value, with this value of the variable as its only event."""
    n = len(values)
    return pack_stays(np.arange(n), np.zeros(n), np.full(n, variable_index(name)), values)


def test_data_event_scaler_is_of_the_training_stays_only_and_clipped_at_its_quantiles():
    stays = small_stays()
    hr, ph = variable_index("HR"), variable_index("pH")
    scaler = event_scaler(stays, [0, 1], tail=0)
    assert list(scaler) == ["mean", "sd", "low", "high"]
    for values in scaler.values():
        assert values.dtype == np.float64 and values.shape == (41,)
    for name, want in (("HR", [80, 16.3299, 60, 100]), ("MechVent", [1, 1, 1, 1]),
                       ("K", [0, 1, 0, 0])):
        read = [round(float(values[variable_index(name)]), 4) for values in scaler.values()]
        assert read == want, name
    z, variables = scale_events(stays["variables"], stays["values"], scaler), stays["variables"]
    assert z.dtype == np.float32
    assert near(z[variables == hr], [-1.2247, 0, 1.2247, 1.2247], 1e-4)  # 9999 is clipped
    assert (z[variables != hr] == 0).all()
    as_saved = {name: torch.from_numpy(values) for name, values in scaler.items()}
    assert np.array_equal(z, scale_events(variables, stays["values"], as_saved))
    many = stays_of("pH", [7.3, 7.5] * 500 + [735])
    for tail, sd in ((0.005, 0.1), (0, 22.986)):  # the numbers of the docstring
        assert near(event_scaler(many, np.arange(1001), tail=tail)["sd"][ph], sd, 1e-3)
    x = np.random.default_rng(0).normal(80, 20, 400).astype(np.float32)
    scaler = event_scaler(stays_of("HR", x), np.arange(400), tail=0.1)
    low, high = np.quantile(x.astype(np.float64), [0.1, 0.9])
    clipped = x.astype(np.float64).clip(low, high)
    expected = [clipped.mean(), clipped.std(), low, high]
    assert near([values[hr] for values in scaler.values()], expected, 1e-5)
    for wrong in (0.5, -0.1, float("nan")):
        refuses(f"tail {wrong:g} must be", lambda: event_scaler(stays, [0], tail=wrong))
    refuses("0 stays at least 1", lambda: event_scaler(stays, []))


def test_data_stay_statistics_equal_the_slow_version():
    stays = synthetic_stays(30, seed=1)
    scaler = event_scaler(stays, np.arange(20))
    rows = [25, 3, 3, 0]
    slow = np.zeros((len(rows), 3, 41))
    for k, r in enumerate(rows):
        by_variable = {}
        for _, events in stay_events(stays)[stays["ids"][r]]:
            for name, value in events:
                by_variable.setdefault(variable_index(name), []).append(value)
        slow[k, 1] = 1
        for v, x in by_variable.items():
            clipped = np.clip(x, scaler["low"][v], scaler["high"][v])
            z = (clipped - scaler["mean"][v]) / scaler["sd"][v]
            slow[k, :, v] = z.mean(), 0, np.log1p(len(x))
    fast = stay_statistics(stays, rows, scaler)
    assert fast.dtype == np.float64 and fast.shape == (4, 123)
    assert near(fast, slow.reshape(4, 123), 1e-6)
    assert stay_statistics(stays, [], scaler).shape == (0, 123)


def slow_summaries(events):
    """{variable: eight numbers} of one stay, [(minute, [(name, value)])]."""
    by_variable, table = {}, {}
    for minute, pairs in events:
        for name, value in pairs:
            by_variable.setdefault(variable_index(name), []).append((minute / 60, value))
    for v, points in by_variable.items():
        hours, x = zip(*points)
        mean_hours, mean = sum(hours) / len(x), sum(x) / len(x)
        moment = sum((h - mean_hours) * (value - mean) for h, value in points)
        spread = sum((h - mean_hours) ** 2 for h in hours)
        slope = moment / spread if len(set(hours)) > 1 else 0
        table[v] = (x[0], x[-1], min(x), max(x), mean, slope, len(x), 48 - hours[-1])
    return table


def slow_rank(value, points):
    """2 P(x' < x) + P(x' = x) - 1, between 21 knots, by looking at each pair of neighbours."""
    value = min(max(value, points[0]), points[-1])
    equal = [i for i, point in enumerate(points) if point == value]
    if equal:
        return sum(equal) / len(equal) / 10 - 1
    left = max(i for i, point in enumerate(points) if point < value)
    low, high = (slow_rank(points[i], points) for i in (left, left + 1))
    share = (value - points[left]) / (points[left + 1] - points[left])
    return low + share * (high - low)


def test_data_stay_summaries_and_ranks_equal_the_slow_version():
    stays = synthetic_stays(40, seed=1)
    training, rows = np.arange(30), [35, 3, 3, 0, 39]
    events_of = stay_events(stays)
    slow = {row: slow_summaries(events_of[stays["ids"][row]]) for row in {*training, *rows}}
    got = stay_summaries(stays, rows)
    assert got.shape == (8, 5, 41)
    columns = {}
    for row in training:
        for v, summary in slow[row].items():
            for s, value in enumerate(summary):
                columns.setdefault((s, v), []).append(value)
    knots = rank_knots(stay_summaries(stays, training))
    assert json.loads(json.dumps(knots)) == knots
    ranks = stay_ranks(got, knots)
    assert ranks.shape == (5, 17 * 41) and np.isfinite(ranks).all()
    for k, row in enumerate(rows):
        for v in range(41):
            assert ranks[k, 16 * 41 + v] == (v not in slow[row])
            if v not in slow[row]:
                assert got[6, k, v] == 0 and np.isnan(np.delete(got[:, k, v], 6)).all()
                assert not ranks[k, v : 16 * 41 : 41].any()
                continue
            for s, value in enumerate(slow[row][v]):
                assert math.isclose(got[s, k, v], value, rel_tol=1e-6, abs_tol=1e-5), (s, row, v)
                want = 0.0
                if (s, v) in columns:
                    points = np.quantile(columns[s, v], np.linspace(0, 1, 21))
                    if s != SUMMARIES.index("slope"):
                        assert near(knots[s][v], points, 1e-6)
                    want = slow_rank(got[s, k, v], knots[s][v])
                assert math.isclose(ranks[k, s * 41 + v], want, abs_tol=1e-9), (s, row, v)
                assert math.isclose(ranks[k, (8 + s) * 41 + v], want**2, abs_tol=1e-9)
    assert stay_ranks(stay_summaries(stays, []), knots).shape == (0, 17 * 41)


def test_data_stay_summaries_of_three_values_are_those_of_the_docstring():
    stays = pack_stays([0, 0, 0], [0, 60, 120], [2, 2, 2], [1, 5, 3])
    first, last, low, high, mean, slope, count, since_last = stay_summaries(stays, [0])[:, 0, 2]
    assert (first, last, low, high, mean, count, since_last) == (1, 3, 1, 5, 3, 3, 46)
    assert math.isclose(slope, 1)
    once = stay_summaries(pack_stays([0, 0], [7, 7], [2, 2], [1, 5]), [0])
    assert once[SUMMARIES.index("slope"), 0, 2] == 0  # two values at one time have no slope
    knots = [[list(range(21)) if v == 2 else [] for v in range(41)] for _ in SUMMARIES]
    summaries = np.full((8, 1, 41), np.nan)
    summaries[:, 0, 2], summaries[6, 0, :2], summaries[6, 0, 3:] = 15, 0, 0
    assert stay_ranks(summaries, knots)[0, [2, 8 * 41 + 2]].tolist() == [0.5, 0.25]


def test_data_stay_split_batches_equal_a_loop_over_stays():
    stays, index = synthetic_stays(30, seed=1), [7, 3, 20, 11, 3]
    scaler, events_of = event_scaler(stays, np.arange(20)), stay_events(stays)
    split = StaySplit(stays, index, scaler=scaler, drop_events=0.5)
    assert len(split) == 5 and split.ids.tolist() == [8, 4, 21, 12, 4]
    assert split.labels.tolist() == stays["labels"][index].tolist()
    assert split.lengths.tolist() == [len(events_of[record]) for record in split.ids.tolist()]
    assert split.lengths.dtype == np.int64
    types = {"variables": torch.int64, "values": torch.float32, "sizes": torch.int64,
             "minutes": torch.float32, "lengths": torch.int64}
    for rows in ([4, 0, 2], np.array([1]), torch.tensor([0, 0]), []):
        slow = {name: [] for name in types}
        for r in rows:
            sets = events_of[int(split.ids[r])]
            slow["lengths"].append(len(sets))
            for minute, events in sets:
                slow["minutes"].append(minute)
                slow["sizes"].append(len(events))
                for name, value in events:
                    v = variable_index(name)
                    clipped = min(max(value, scaler["low"][v]), scaler["high"][v])
                    slow["variables"].append(v)
                    slow["values"].append((clipped - scaler["mean"][v]) / scaler["sd"][v])
        batch = split.batch(rows)  # without a generator nothing is dropped
        assert batch["inputs"].keys() == types.keys()
        for name, values in batch["inputs"].items():
            assert values.dtype == types[name]
            assert near(values, torch.tensor(slow[name], dtype=values.dtype), 1e-5), name
        assert batch["targets"].dtype == torch.float32
        assert batch["targets"].tolist() == [float(split.labels[r]) for r in rows]
    split.features = torch.arange(5.0)[:, None]
    batch = split.batch([4, 0], seeded())
    assert batch["features"].tolist() == [[4], [0]] and "inputs" not in batch
    assert len(batch["targets"]) == 2
    stays["labels"][11] = -1
    for other, labelled in ((11, False), (12, True)):  # every batch of a split has the same keys
        batch = StaySplit(stays, [7, other], scaler=scaler).batch([0])
        assert ("targets" in batch) == labelled
    for wrong in (-0.1, 1, float("nan")):
        refuses(f"drop_events {wrong:g} must be",
                lambda: StaySplit(stays, [0], scaler=scaler, drop_events=wrong))


def test_data_dropped_events_leave_no_empty_set_and_no_empty_stay():
    stays, everyone = synthetic_stays(40, seed=1), np.arange(40)
    scaler = event_scaler(stays, everyone)

    def split_of(drop_events):
        return StaySplit(stays, everyone, scaler=scaler, drop_events=drop_events)

    def events_of(inputs):
        """[(stay, minute, variable, value)] of every event."""
        stay = torch.arange(len(inputs["lengths"])).repeat_interleave(inputs["lengths"])
        sizes = inputs["sizes"]
        columns = [stay.repeat_interleave(sizes), inputs["minutes"].repeat_interleave(sizes),
                   inputs["variables"], inputs["values"]]
        return list(zip(*[column.tolist() for column in columns], strict=True))

    whole = split_of(0.3).batch(everyone)["inputs"]
    for p in (0.3, 0.9):
        split = split_of(p)
        inputs = split.batch(everyone, seeded())["inputs"]
        kept, all_events = events_of(inputs), events_of(whole)
        places = iter(all_events)
        assert all(event in places for event in kept)  # in their order, under stay and minute
        assert abs(len(kept) / len(all_events) - (1 - p)) < 0.03 and inputs["sizes"].min() > 0
        for name, values in inputs.items():
            assert values.dtype == whole[name].dtype
        assert same_bits(inputs, split.batch(everyone, seeded())["inputs"])
        assert not same_bits(inputs, split.batch(everyone, seeded(1))["inputs"])
        assert same_bits(split.batch(everyone)["inputs"], whole)
    assert len(inputs["sizes"]) < len(whole["sizes"])  # at 0.9, whole minutes are gone
    minutes_of = [stay for stay, _ in {event[:2] for event in kept}]
    assert inputs["lengths"].tolist() == [minutes_of.count(stay) for stay in range(40)]
    last = split_of(1 - 1e-9).batch(everyone, seeded())
    assert last["inputs"]["lengths"].tolist() == [1] * 40 == last["inputs"]["sizes"].tolist()
    assert len(last["targets"]) == 40
    assert len(set(last["inputs"]["minutes"].tolist())) > 20  # not always the first
    assert len(split.batch([], seeded())["inputs"]["lengths"]) == 0


def logistic_auroc(stays, *, seed=0, ridge=0.02):
    """Of ridge logistic regression on stay_statistics, on a quarter of the stays."""
    train, test = data.split_by_group(stays["ids"], (0.75, 0.25), seed=seed)
    x = stay_statistics(stays, np.arange(len(stays["ids"])), event_scaler(stays, train))
    x = (x - x[train].mean(0)) / np.maximum(x[train].std(0), 1e-6)
    x = np.concatenate([x, np.ones((len(x), 1))], 1)
    y, weights = stays["labels"], np.zeros(x.shape[1])
    penalty = ridge * len(train)
    for _ in range(8):  # Newton's method
        p = 1 / (1 + np.exp(-x[train] @ weights))
        curvature = (x[train].T * (p * (1 - p))) @ x[train] + penalty * np.eye(len(weights))
        gradient = x[train].T @ (p - y[train]) + penalty * weights
        weights -= np.linalg.solve(curvature, gradient)
    return float(losses.auroc(x[test] @ weights, y[test]))


def test_data_synthetic_stays_die_by_a_severity_that_their_events_tell_in_part():
    aurocs = []
    for seed in range(3):
        stays = synthetic_stays(seed=seed)
        labels, variables, values = stays["labels"], stays["variables"], stays["values"]
        lengths, sizes = np.diff(stays["first_set"]), np.diff(stays["first_event"])
        assert len(lengths) == 1000 and 0.14 <= labels.mean() <= 0.2 and set(labels) == {0, 1}
        assert 18 <= lengths.min() and lengths.max() <= 61 and 30 < lengths.mean() < 45
        assert sizes.min() == 1 and 5 < sizes.mean() < 8 and 25 == len(set(variables))
        assert stays["minutes"].max() <= 2880
        assert (stays["minutes"][stays["first_set"][:-1]] == 0).all()
        assert np.isfinite(values).all() and values.min() >= 0
        owner = np.repeat(np.arange(1000), np.diff(stays["first_event"][stays["first_set"]]))
        lactate = variables == variable_index("Lactate")
        labs = np.bincount(owner[lactate], minlength=1000)
        assert labs[labels == 1].mean() > 1.1 * labs[labels == 0].mean()
        for name, sign in (("BUN", 1), ("GCS", -1)):
            x = variables == variable_index(name)
            of_died, others = (values[x & (labels[owner] == label)] for label in (1, 0))
            assert sign * (of_died.mean() - others.mean()) > 0.3 * others.std(), name
        assert 0.55 < losses.auroc(stays["severity"]["SOFA"], labels) < 0.75
        aurocs += [logistic_auroc(stays, seed=split) for split in range(2)]
    assert 0.74 < np.mean(aurocs) < 0.86 and max(aurocs) < 0.92, aurocs


def test_data_synthetic_stays_are_fixed_by_their_seed():
    one, again, other = (synthetic_stays(20, seed=seed) for seed in (3, 3, 4))
    assert_same_stays(one, again)
    assert not np.array_equal(one["values"], other["values"])
    assert one["ids"].tolist() == list(range(1, 21))
    assert len(synthetic_stays(1)["ids"]) == 1
    refuses("n 0 must be at least 1", lambda: synthetic_stays(0))


def test_data_real_stays_are_read_whole_and_have_their_floor():
    stays = read_stays(need_real("physionet2012"))
    variables, values = stays["variables"], stays["values"]
    lengths, left_out = np.diff(stays["first_set"]), stays["left_out"]
    assert len(stays["ids"]) == 4000 and stays["labels"].sum() == 554
    assert stays["labels"].min() == 0 and (stays["ids"][:-1] < stays["ids"][1:]).all()
    assert len(values) == 1_751_733 and len(stays["minutes"]) == 299_262
    assert stays["minutes"].max() == 2880 and set(variables) == set(range(41))
    # Stays with descriptors only: their one set is that of minute 0.
    owner = np.repeat(np.arange(4000), np.diff(stays["first_event"][stays["first_set"]]))
    later = np.bincount(owner, variables > variable_index("Weight"), minlength=4000)
    assert stays["ids"][later == 0].tolist() == [140501, 140936, 141264]
    assert (lengths[later == 0] == 1).all()
    negative = left_out["negative value"]
    assert left_out == {"not recorded (-1)": 2223, "negative value": negative}
    assert len(negative) == 24 and "132895 Temp -17.8" in negative
    assert all(" Temp -" in name for name in negative)
    for lowest, plan in ((1.07, data.bucketed_batches(lengths, 32, seed=0, epoch=0)),
                         (1.75, data.shuffled_batches(4000, 32, seed=0, epoch=0))):
        assert lowest < padding(plan, lengths) < lowest + 0.02  # the docstring's 1.08 and 1.76
    ph = variable_index("pH")
    scaler = event_scaler(stays, np.arange(4000))
    assert values[variables == ph].max() > 700
    assert scaler["sd"][ph] < 0.1 and scaler["high"][ph] < 7.6
    floor = np.mean([logistic_auroc(stays, seed=seed) for seed in range(3)])
    assert 0.79 < floor < 0.85, floor
