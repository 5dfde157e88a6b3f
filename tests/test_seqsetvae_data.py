"""Tests of seqsetvae_data."""

import itertools
import warnings

import numpy as np
import torch

import data
import losses
from tasks import seqsetvae_data
from tests.helpers import (
    edit, folder, near, need_real, OUTCOME_HEADER, padding, raises, same_bits, seeded, STAY_HEADER,
    write_stay, write_stays)


def assert_same_stays(one, other):
    assert list(one) == list(other) and repr(one["left_out"]) == repr(other["left_out"]), (one["left_out"], other["left_out"])
    for name in one:
        if name == "severity":
            assert list(one[name]) == ["SAPS-I", "SOFA"]
            for key, each in one[name].items():
                assert each.dtype == np.float64 and np.array_equal(each, other[name][key], equal_nan=True), key
        elif name != "left_out":
            assert one[name].dtype == other[name].dtype and np.array_equal(one[name], other[name]), name


def stay_events(stays):
    """Per RecordID the list of (minute, {(variable, value), ...}), by plain loops over the compressed rows."""
    found = {}
    for i, record in enumerate(stays["ids"].tolist()):
        sets = range(stays["first_set"][i], stays["first_set"][i + 1])
        found[record] = [(int(stays["minutes"][j]), [(seqsetvae_data.STAY_VARIABLES[stays["variables"][e]], float(stays["values"][e])) for e in
                                                     range(stays["first_event"][j], stays["first_event"][j + 1])]) for j in sets]
    return found


def test_data_stays_are_read_as_they_were_written_in_one_set_or_two():
    stays = seqsetvae_data.synthetic_stays(12, seed=2)
    with folder() as f:
        assert_same_stays(seqsetvae_data.read_stays(write_stays(f / "one", stays)), stays)
        assert_same_stays(seqsetvae_data.read_stays(f / "one" / "set-a"), stays)  # and the folder of the set itself
        read = seqsetvae_data.read_stays(write_stays(f / "two", stays, "ab", newline="\r\n"))
    order = np.r_[0:12:2, 1:12:2]  # by set, then RecordID
    assert read["ids"].tolist() == stays["ids"][order].tolist() and read["left_out"] == {}
    assert read["labels"].tolist() == stays["labels"][order].tolist() and stay_events(read) == stay_events(stays)
    assert {name: (each.dtype.name, len(each)) for name, each in read.items() if isinstance(each, np.ndarray)} == {
        "ids": ("int64", 12), "labels": ("int64", 12), "first_set": ("int64", 13), "first_event": ("int64", len(stays["minutes"]) + 1),
        "minutes": ("float32", read["first_set"][-1]), "variables": ("uint8", read["first_event"][-1]),
        "values": ("float32", read["first_event"][-1])}


def test_data_stay_variables_are_the_41_of_the_challenge_descriptors_first():
    assert len(seqsetvae_data.STAY_VARIABLES) == len(set(seqsetvae_data.STAY_VARIABLES)) == 41
    assert seqsetvae_data.STAY_VARIABLES[:5] == ("Age", "Gender", "Height", "ICUType", "Weight")


def test_data_stays_survive_the_quirks_of_the_files_and_tell_what_was_left_out():
    with folder() as f:
        a = f / "set-a"
        write_stay(a / "9.txt", ["00:00,RecordID,9", "00:00,Age,54", "00:00,Gender,-1", "00:00,HR,80", "00:07,HR,73", "00:07,HR,75",
                                 "00:07,HR,73.0", "00:07,Temp,-17.8", "00:07,pH,735", "47:59,HR,0", "48:00,HR,70", "48:01,HR,70",
                                 "99:00,HR,-5", "100:30,HR,-1"])
        write_stay(a / "10.txt", ["05:00,HR,70", "00:30,K,4.1", "05:00,GCS,+3.", "00:00,Age,.5e2"], newline="\r\n", end=False)
        write_stay(a / "11.txt", ["00:00,RecordID,11", "00:00,Age,31", "00:00,Height,-1"])  # descriptors only
        write_stay(a / "12.txt", ["00:00,RecordID,12", "00:00,Weight,-1", "01:00,Temp,-3", "48:01,HR,7"])  # nothing is left
        write_stay(a / "13.txt", [])
        write_stay(a / "14.txt", ["01:00,,", "01:00,,3", "01:00,Foo,bar", "01:00,hr,4", "01:00,HR,4"], header=f"\ufeff{STAY_HEADER}")
        (a / "notes.md").write_text("not a stay")
        (a / "15 (copy).txt").write_text("not a stay")
        (a / ".hidden").write_text("not a stay")
        outcomes = ["9,6,-1,5,-1,0", "10,-1,8,8,3,1", "", "11,0,0,1,-1,1", "12,1,1,1,1,0", "77,1,1,1,-1,1"]
        (f / "Outcomes-a.txt").write_text("\n".join([OUTCOME_HEADER, *outcomes]))
        stays = seqsetvae_data.read_stays(f)
    assert stay_events(stays) == {
        9: [(0, [("Age", 54), ("HR", 80)]), (7, [("HR", 73), ("HR", 75), ("pH", 735)]), (2879, [("HR", 0)]), (2880, [("HR", 70)])],
        10: [(0, [("Age", 50)]), (30, [("K", np.float32(4.1))]), (300, [("HR", 70), ("GCS", 3)])],
        11: [(0, [("Age", 31)])],
        14: [(60, [("HR", 4)])]}
    assert stays["ids"].tolist() == [9, 10, 11, 14] and stays["labels"].tolist() == [0, 1, 1, -1]
    assert np.array_equal(stays["severity"]["SAPS-I"], [6, np.nan, 0, np.nan], equal_nan=True)
    assert np.array_equal(stays["severity"]["SOFA"], [np.nan, 8, 0, np.nan], equal_nan=True)
    assert stays["left_out"] == {
        "not recorded (-1)": 3, "negative value": ["9 Temp -17.8", "12 Temp -3"], "later than 48:00": ["9 (3)", "12 (1)"],
        "unknown parameter": ["'' (2)", "'Foo' (1)", "'hr' (1)"], "same value twice in a minute": 1,
        "stay without an event": ["12", "13"], "stay without an outcome": ["14"], "outcome without a stay": ["77"],
        "file that is no stay": ["set-a/15 (copy).txt", "set-a/notes.md"]}


def test_data_stays_without_outcomes_are_read_for_pretraining_and_prediction():
    stays = seqsetvae_data.synthetic_stays(6)
    with folder() as f:
        write_stays(f, stays, "ab")
        (f / "Outcomes-b.txt").unlink()
        raises(ValueError, f"{f / 'Outcomes-b.txt'} is missing: copy it beside set-b", lambda: seqsetvae_data.read_stays(f))
        read = seqsetvae_data.read_stays(f, need_outcomes=False)
        assert read["labels"].tolist() == stays["labels"][::2].tolist() + [-1] * 3
        assert read["left_out"] == {"set without outcomes": ["set-b"]}
        assert np.isnan(read["severity"]["SOFA"][3:]).all() and not np.isnan(read["severity"]["SOFA"][:3]).any()
        (f / "set-a").rename(f / "new")
        read = seqsetvae_data.read_stays(f / "new", need_outcomes=False)
        assert read["ids"].tolist() == [1, 3, 5] and read["labels"].tolist() == [-1] * 3
        assert read["left_out"] == {"set without outcomes": ["new"]}
        raises(ValueError, "no folder set-?", lambda: seqsetvae_data.read_stays(f / "new"))


def test_data_stays_name_file_line_and_remedy_of_what_is_damaged():
    good = ["00:00,RecordID,5", "00:00,Age,50", "01:00,HR,80"]
    outcome = f"{OUTCOME_HEADER}\n5,6,1,5,-1,0\n"
    stay_cases = [([*good, line], f"5.txt line 5: {line!r} must be HH:MM, a parameter and a finite number") for line in (
        "01:00,HR", "01:00,H", "01:0", "01:60,HR,1", "xx:00,HR,1", "1,HR,1", "-1:00,HR,1", "01:00,HR,", "01:00,HR,x", "01:00,HR,nan",
        "01:00,HR,-inf", "01:00,HR,1e39", "01:00,HR,1_0", "01:00,HR,1,2", ",Foo,1", "12345:00,HR,1")]
    stay_cases += [([good[0], "", *good[1:]], "5.txt line 3: ''"), (["00:00,RecordID,6"], "5.txt says RecordID 6"),
                   ([*good, "00:00,RecordID,-1"], "5.txt says RecordID -1")]
    for lines, message in stay_cases:
        for newline in ("\n", "\r\n"):
            with folder() as f:
                write_stay(f / "set-a" / "5.txt", lines, newline=newline)
                (f / "Outcomes-a.txt").write_text(outcome)
                raises(ValueError, message, lambda: seqsetvae_data.read_stays(f, cache=f / "cache"))
                assert not (f / "cache").exists()
    outcome_cases = (
        ("", "Outcomes-a.txt line 1: columns [] must hold RecordID, In-hospital_death"),
        (outcome.replace("In-hospital_death", "Died"), "Outcomes-a.txt line 1: columns"),
        (outcome + "6,1,1,1,1,2\n", "Outcomes-a.txt line 3: In-hospital_death '2' must be 0 or 1"),
        (outcome + "6,1,1,1,1,-1\n", "Outcomes-a.txt line 3: In-hospital_death '-1'"),
        (outcome + "6,1,1,1,1,\n", "Outcomes-a.txt line 3: In-hospital_death ''"),
        (outcome + "6,1,1\n", "Outcomes-a.txt line 3: '6,1,1' must hold 6 numbers"),
        (outcome + "6,x,1,1,1,0\n", "Outcomes-a.txt line 3: '6,x,1,1,1,0'"),
        (outcome + "x,1,1,1,1,0\n", "Outcomes-a.txt line 3: 'x,1,1,1,1,0'"),
        (outcome + "5,6,1,5,-1,1\n", "Outcomes-a.txt line 3: RecordID 5 has a line already"))
    for text, message in outcome_cases:
        with folder() as f:
            write_stay(f / "set-a" / "5.txt", good)
            (f / "Outcomes-a.txt").write_text(text)
            raises(ValueError, message, lambda: seqsetvae_data.read_stays(f))
    with folder() as f:
        raises(ValueError, "holds no stays", lambda: seqsetvae_data.read_stays(f))
        raises(ValueError, "holds no stays", lambda: seqsetvae_data.read_stays(f / "nowhere"))
        for header in ("", "Time,Value,Parameter"):
            write_stay(f / "set-a" / "5.txt", good, header=header)
            (f / "Outcomes-a.txt").write_text(outcome)
            raises(ValueError, f"5.txt line 1: {header!r} must be", lambda: seqsetvae_data.read_stays(f))
        write_stay(f / "set-a" / "5.txt", ["00:00,Age,-1"])
        raises(ValueError, "holds an event: {'not recorded (-1)': 1", lambda: seqsetvae_data.read_stays(f))
        for twin in ("set-a/05.txt", "set-b/5.txt"):
            write_stay(f / twin, good)
            (f / "Outcomes-b.txt").write_text(f"{OUTCOME_HEADER}\n")
            raises(ValueError, "have the same RecordID", lambda: seqsetvae_data.read_stays(f))
            (f / twin).unlink()
        write_stay(f / "set-b" / "6.txt", ["01:00,HR,80"])
        (f / "Outcomes-b.txt").write_text(outcome)
        raises(ValueError, "RecordID 5 has an outcome in another table too", lambda: seqsetvae_data.read_stays(f))


def test_data_stays_cache_parses_once_per_content():
    stays, parsed, parse = seqsetvae_data.synthetic_stays(5), [], seqsetvae_data.parse_stays

    def counted(*arguments):
        parsed.append(1)
        return parse(*arguments)

    seqsetvae_data.parse_stays = counted
    try:
        with folder() as f:
            write_stays(f / "raw", stays)
            write_stay(f / "raw" / "set-a" / "8.txt", ["00:00,Age,-1"])
            write_stay(f / "raw" / "set-a" / "9.txt", ["00:00,Age,40", "00:00,Height,-1", "00:03,Temp,-17.8"])
            expected = parse(*seqsetvae_data.list_stays(f / "raw"))
            read = lambda: seqsetvae_data.read_stays(f / "raw", cache=f / "cache")
            assert len(expected["left_out"]) == 4
            for _ in range(3):
                assert_same_stays(read(), expected)
            assert len(parsed) == 1
            [kept] = (f / "cache").iterdir()
            assert kept.suffix == ".npz"
            for damaged in (kept.read_bytes()[:500], b""):
                kept.write_bytes(damaged)
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    assert_same_stays(read(), expected)
                assert "cannot be read" in str(caught[0].message)
            assert len(parsed) == 3 and len(list((f / "cache").iterdir())) == 1
            for file in ("set-a/9.txt", "Outcomes-a.txt"):  # another content of the same length
                edit(f / "raw" / file, lambda text: text.replace("40", "41").replace(",-1,0", ",-1,1"))
                assert_same_stays(read(), parse(*seqsetvae_data.list_stays(f / "raw")))
            assert len(parsed) == 5
            (f / "raw" / "set-a" / "readme").write_text("")
            assert read()["left_out"]["file that is no stay"] == ["set-a/readme"] and len(parsed) == 6
            (f / "no folder").write_text("")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                assert len(seqsetvae_data.read_stays(f / "raw", cache=f / "no folder")["ids"]) == 6
            assert "will be parsed again" in str(caught[-1].message)
    finally:
        seqsetvae_data.parse_stays = parse


def test_data_packed_stays_are_the_sorted_sets_of_the_events_in_any_order():
    rng = np.random.default_rng(0)
    for size in (1, 3, 200):
        owner = np.append(np.arange(5), rng.integers(0, 5, size))
        minutes, variables, values = rng.integers(0, 6, size + 5), rng.integers(0, 3, size + 5), rng.integers(0, 3, size + 5) / 2
        packed = seqsetvae_data.pack_stays(owner, minutes, variables, values)
        slow = sorted(set(zip(owner.tolist(), minutes.tolist(), variables.tolist(), values.tolist())))
        sets = sorted({each[:2] for each in slow})
        assert packed["minutes"].tolist() == [minute for _, minute in sets]
        assert list(zip(packed["variables"].tolist(), packed["values"].tolist())) == [each[2:] for each in slow]
        assert np.diff(packed["first_set"]).tolist() == [sum(each[0] == i for each in sets) for i in range(5)]
        assert np.diff(packed["first_event"]).tolist() == [sum(each[:2] == one for each in slow) for one in sets]
        assert packed["first_set"][0] == packed["first_event"][0] == 0
    assert seqsetvae_data.pack_stays([0, 0, 0], [5, 5, 2], [1, 1, 0], [7, 7, 9])["first_event"].tolist() == [0, 1, 2]


def test_data_gather_ranges_equals_slices():
    rng = np.random.default_rng(0)
    first = np.append(0, np.cumsum(rng.integers(0, 4, 20)))
    for rows in (rng.integers(0, 20, 50), [3], []):
        slow = [element for r in rows for element in range(first[r], first[r + 1])]
        assert seqsetvae_data.gather_ranges(first, rows).tolist() == slow
    assert seqsetvae_data.gather_ranges(np.array([0, 2, 2, 5]), [2, 0]).tolist() == [2, 3, 4, 0, 1]


def small_stays():
    """Four stays: HR in the first three, K in the last two, MechVent 1 wherever it is."""
    name = seqsetvae_data.STAY_VARIABLES.index
    events = [(0, 0, name("HR"), 60), (0, 5, name("HR"), 80), (0, 5, name("MechVent"), 1), (1, 9, name("HR"), 100),
              (1, 9, name("MechVent"), 1), (2, 0, name("K"), 4), (2, 0, name("HR"), 9999), (3, 1, name("K"), 5)]
    return {"ids": np.array([11, 12, 13, 14]), "labels": np.array([0, 1, 1, 0]), **seqsetvae_data.pack_stays(*zip(*events))}


def test_data_event_scaler_is_of_the_training_stays_only_and_clipped_at_its_quantiles():
    stays, of = small_stays(), seqsetvae_data.STAY_VARIABLES.index
    scaler = seqsetvae_data.event_scaler(stays, [0, 1], tail=0)
    assert list(scaler) == ["mean", "sd", "low", "high"]
    assert all(each.dtype == np.float64 and each.shape == (41,) for each in scaler.values())
    at = lambda name: [round(float(scaler[key][of(name)]), 4) for key in ("mean", "sd", "low", "high")]
    assert at("HR") == [80, 16.3299, 60, 100] and at("MechVent") == [1, 1, 1, 1] and at("K") == [0, 1, 0, 0]
    z = seqsetvae_data.scale_events(stays["variables"], stays["values"], scaler)
    hr = z[stays["variables"] == of("HR")]
    assert z.dtype == np.float32 and near(hr, [-1.2247, 0, 1.2247, 1.2247], 1e-4)  # 9999 as far as the training stays go
    assert (z[stays["variables"] == of("K")] == 0).all() and (z[stays["variables"] == of("MechVent")] == 0).all()
    again = seqsetvae_data.scale_events(stays["variables"], stays["values"], {name: torch.from_numpy(each) for name, each in scaler.items()})
    assert np.array_equal(z, again)  # as saved with the weights
    many = seqsetvae_data.pack_stays(np.arange(1001), np.zeros(1001), np.full(1001, of("pH")), [7.3, 7.5] * 500 + [735])
    sds = [seqsetvae_data.event_scaler(many, np.arange(1001), tail=tail)["sd"][of("pH")] for tail in (0.005, 0)]
    assert near(sds, [0.1, 22.986], 1e-3)  # the docstring's numbers
    x = np.random.default_rng(0).normal(80, 20, 400).astype(np.float32)
    scaler = seqsetvae_data.event_scaler(seqsetvae_data.pack_stays(np.arange(400), np.zeros(400), np.full(400, of("HR")), x), np.arange(400), tail=0.1)
    low, high = np.quantile(x.astype(np.float64), [0.1, 0.9])
    clipped = x.astype(np.float64).clip(low, high)
    assert near([each[of("HR")] for each in scaler.values()], [clipped.mean(), clipped.std(), low, high], 1e-5)
    for wrong in (0.5, -0.1, float("nan")):
        raises(ValueError, f"tail {wrong:g} must be", lambda: seqsetvae_data.event_scaler(stays, [0], tail=wrong))
    raises(ValueError, "0 stays at least 1", lambda: seqsetvae_data.event_scaler(stays, []))


def test_data_stay_statistics_equal_the_slow_version():
    stays = seqsetvae_data.synthetic_stays(30, seed=1)
    scaler = seqsetvae_data.event_scaler(stays, np.arange(20))
    rows = [25, 3, 3, 0]
    slow = np.zeros((len(rows), 3, 41))
    for k, r in enumerate(rows):
        found = {}
        for _, events in stay_events(stays)[stays["ids"][r]]:
            for name, value in events:
                found.setdefault(seqsetvae_data.STAY_VARIABLES.index(name), []).append(value)
        for v in range(41):
            x = np.clip(found.get(v, []), scaler["low"][v], scaler["high"][v])
            slow[k, :, v] = [((x - scaler["mean"][v]) / scaler["sd"][v]).mean() if len(x) else 0, len(x) == 0, np.log1p(len(x))]
    fast = seqsetvae_data.stay_statistics(stays, rows, scaler)
    assert fast.dtype == np.float64 and fast.shape == (4, 123) and near(fast, slow.reshape(4, 123), 1e-6)
    assert seqsetvae_data.stay_statistics(stays, [], scaler).shape == (0, 123)


def test_data_stay_split_batches_equal_a_loop_over_stays():
    stays, index = seqsetvae_data.synthetic_stays(30, seed=1), [7, 3, 20, 11, 3]
    scaler = seqsetvae_data.event_scaler(stays, np.arange(20))
    split = seqsetvae_data.StaySplit(stays, index, scaler=scaler, drop_events=0.5)
    assert len(split) == 5 and split.ids.tolist() == [8, 4, 21, 12, 4] and split.labels.tolist() == stays["labels"][index].tolist()
    assert split.lengths.tolist() == [len(stay_events(stays)[record]) for record in split.ids.tolist()] and split.lengths.dtype == np.int64
    for rows in ([4, 0, 2], np.array([1]), torch.tensor([0, 0]), []):
        slow = {name: [] for name in ("variables", "values", "sizes", "minutes", "lengths")}
        for r in rows:
            sets = stay_events(stays)[int(split.ids[r])]
            slow["lengths"].append(len(sets))
            for minute, events in sets:
                slow["minutes"].append(minute)
                slow["sizes"].append(len(events))
                for name, value in events:
                    v = seqsetvae_data.STAY_VARIABLES.index(name)
                    slow["variables"].append(v)
                    slow["values"].append((min(max(value, scaler["low"][v]), scaler["high"][v]) - scaler["mean"][v]) / scaler["sd"][v])
        batch = split.batch(rows)  # without a generator nothing is dropped
        types = {"variables": torch.int64, "values": torch.float32, "sizes": torch.int64, "minutes": torch.float32, "lengths": torch.int64}
        assert {name: each.dtype for name, each in batch["inputs"].items()} == types
        for name, each in batch["inputs"].items():
            assert near(each, torch.tensor(slow[name], dtype=each.dtype), 1e-5), name
        assert batch["targets"].dtype == torch.float32 and batch["targets"].tolist() == [float(split.labels[r]) for r in rows]
    split.features = torch.arange(5.0)[:, None]
    batch = split.batch([4, 0], seeded())
    assert batch["features"].tolist() == [[4], [0]] and "inputs" not in batch and len(batch["targets"]) == 2
    stays["labels"][11] = -1
    assert "targets" not in seqsetvae_data.StaySplit(stays, [7, 11], scaler=scaler).batch([0])  # the same keys in every batch of a split
    assert "targets" in seqsetvae_data.StaySplit(stays, [7, 12], scaler=scaler).batch([0])
    for wrong in (-0.1, 1, float("nan")):
        raises(ValueError, f"drop_events {wrong:g} must be", lambda: seqsetvae_data.StaySplit(stays, [0], scaler=scaler, drop_events=wrong))


def test_data_dropped_events_leave_no_empty_set_and_no_empty_stay():
    stays = seqsetvae_data.synthetic_stays(40, seed=1)
    scaler = seqsetvae_data.event_scaler(stays, np.arange(40))
    everyone = np.arange(40)

    def events(inputs):
        """(stay, minute, variable, value) of each event, by loops."""
        sizes, lengths, found, e, s = inputs["sizes"].tolist(), inputs["lengths"].tolist(), [], 0, 0
        for i, length in enumerate(lengths):
            for _ in range(length):
                found += [(i, inputs["minutes"][s].item(), inputs["variables"][k].item(), inputs["values"][k].item())
                          for k in range(e, e + sizes[s])]
                e, s = e + sizes[s], s + 1
        assert e == len(inputs["variables"]) == len(inputs["values"]) and s == len(sizes) == len(inputs["minutes"])
        return found

    whole = seqsetvae_data.StaySplit(stays, everyone, scaler=scaler, drop_events=0.3).batch(everyone)["inputs"]
    for p in (0.3, 0.9):
        split = seqsetvae_data.StaySplit(stays, everyone, scaler=scaler, drop_events=p)
        inputs = split.batch(everyone, seeded())["inputs"]
        kept, all_events = events(inputs), events(whole)
        places = iter(all_events)
        assert all(event in places for event in kept)  # some of the events, in their order, under their stay and minute
        assert abs(len(kept) / len(all_events) - (1 - p)) < 0.03 and inputs["sizes"].min() > 0
        assert {name: each.dtype for name, each in inputs.items()} == {name: each.dtype for name, each in whole.items()}
        assert same_bits(inputs, split.batch(everyone, seeded())["inputs"])
        assert not same_bits(inputs, split.batch(everyone, seeded(1))["inputs"])
        assert same_bits(split.batch(everyone)["inputs"], whole)
    assert len(inputs["sizes"]) < len(whole["sizes"])  # at 0.9, whole minutes are gone
    assert inputs["lengths"].tolist() == [len({minute for i, minute, *_ in kept if i == k}) for k in range(40)]
    last = seqsetvae_data.StaySplit(stays, everyone, scaler=scaler, drop_events=1 - 1e-9).batch(everyone, seeded())
    assert last["inputs"]["lengths"].tolist() == [1] * 40 == last["inputs"]["sizes"].tolist() and len(last["targets"]) == 40
    assert len(set(last["inputs"]["minutes"].tolist())) > 20  # any one of them, not always the first
    assert len(split.batch([], seeded())["inputs"]["lengths"]) == 0


def logistic_auroc(stays, *, seed=0, ridge=0.02):
    """Of ridge logistic regression on stay_statistics, a quarter of the stays held out, by Newton's method."""
    train, test = data.split_by_group(stays["ids"], (0.75, 0.25), seed=seed)
    x = seqsetvae_data.stay_statistics(stays, np.arange(len(stays["ids"])), seqsetvae_data.event_scaler(stays, train))
    x = np.concatenate([(x - x[train].mean(0)) / np.maximum(x[train].std(0), 1e-6), np.ones((len(x), 1))], 1)
    y, weights = stays["labels"], np.zeros(x.shape[1])
    for _ in range(8):
        p = 1 / (1 + np.exp(-x[train] @ weights))
        curvature = (x[train].T * (p * (1 - p))) @ x[train] + ridge * len(train) * np.eye(len(weights))
        weights -= np.linalg.solve(curvature, x[train].T @ (p - y[train]) + ridge * len(train) * weights)
    return float(losses.auroc(x[test] @ weights, y[test]))


def test_data_synthetic_stays_die_by_a_severity_that_their_events_tell_in_part():
    aurocs = []
    for seed in range(3):
        stays = seqsetvae_data.synthetic_stays(seed=seed)
        lengths, sizes = np.diff(stays["first_set"]), np.diff(stays["first_event"])
        assert len(lengths) == 1000 and 0.14 <= stays["labels"].mean() <= 0.2 and set(stays["labels"]) == {0, 1}
        assert 18 <= lengths.min() and lengths.max() <= 61 and 30 < lengths.mean() < 45 and sizes.min() == 1 and 5 < sizes.mean() < 8
        assert stays["minutes"].max() <= 2880 and np.isfinite(stays["values"]).all() and stays["values"].min() >= 0
        assert (stays["minutes"][stays["first_set"][:-1]] == 0).all() and 25 == len(set(stays["variables"]))
        labs = [np.isin(stays["variables"][a:b], [seqsetvae_data.STAY_VARIABLES.index("Lactate")]).sum()
                for a, b in itertools.pairwise(stays["first_event"][stays["first_set"]])]
        assert np.mean(np.array(labs)[stays["labels"] == 1]) > 1.1 * np.mean(np.array(labs)[stays["labels"] == 0])
        owner = np.repeat(np.arange(1000), np.diff(stays["first_event"][stays["first_set"]]))
        for name, sign in (("BUN", 1), ("GCS", -1)):
            x = stays["variables"] == seqsetvae_data.STAY_VARIABLES.index(name)
            of_died, others = (stays["values"][x & (stays["labels"][owner] == label)] for label in (1, 0))
            assert sign * (of_died.mean() - others.mean()) > 0.3 * others.std(), name
        assert 0.55 < losses.auroc(stays["severity"]["SOFA"], stays["labels"]) < 0.75
        aurocs += [logistic_auroc(stays, seed=split) for split in range(2)]
    assert 0.74 < np.mean(aurocs) < 0.86 and max(aurocs) < 0.92, aurocs


def test_data_synthetic_stays_are_fixed_by_their_seed():
    one, again, other = (seqsetvae_data.synthetic_stays(20, seed=seed) for seed in (3, 3, 4))
    assert_same_stays(one, again)
    assert not np.array_equal(one["values"], other["values"]) and one["ids"].tolist() == list(range(1, 21))
    assert len(seqsetvae_data.synthetic_stays(1)["ids"]) == 1
    raises(ValueError, "n 0 must be at least 1", lambda: seqsetvae_data.synthetic_stays(0))


def test_data_real_stays_are_read_whole_and_have_their_floor():
    stays = seqsetvae_data.read_stays(need_real("physionet2012"))
    of = seqsetvae_data.STAY_VARIABLES.index
    assert len(stays["ids"]) == 4000 and stays["labels"].sum() == 554 and stays["labels"].min() == 0
    assert (stays["ids"][:-1] < stays["ids"][1:]).all() and len(stays["values"]) == 1_751_733 and len(stays["minutes"]) == 299_262
    assert stays["minutes"].max() == 2880 and set(stays["variables"]) == set(range(41))
    later = np.bincount(np.repeat(np.arange(299_262), np.diff(stays["first_event"])), stays["variables"] > of("Weight"), minlength=299_262)
    only = np.add.reduceat(later, stays["first_set"][:-1]) == 0
    assert stays["ids"][only].tolist() == [140501, 140936, 141264] and (np.diff(stays["first_set"])[only] == 1).all()
    assert set(stays["left_out"]) == {"not recorded (-1)", "negative value"} and stays["left_out"]["not recorded (-1)"] == 2223
    negative = stays["left_out"]["negative value"]
    assert len(negative) == 24 and all(" Temp -" in name for name in negative) and "132895 Temp -17.8" in negative
    lengths = np.diff(stays["first_set"])
    for lowest, plan in ((1.07, data.bucketed_batches(lengths, 32, seed=0, epoch=0)),
                         (1.75, data.shuffled_batches(4000, 32, seed=0, epoch=0))):
        assert lowest < padding(plan, lengths) < lowest + 0.02  # the docstring's 1.08 and 1.76
    ph = stays["values"][stays["variables"] == of("pH")]
    scaler = seqsetvae_data.event_scaler(stays, np.arange(4000))
    assert ph.max() > 700 and scaler["sd"][of("pH")] < 0.1 and scaler["high"][of("pH")] < 7.6
    floor = np.mean([logistic_auroc(stays, seed=seed) for seed in range(3)])
    assert 0.79 < floor < 0.85, floor
