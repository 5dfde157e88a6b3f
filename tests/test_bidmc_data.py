"""Tests of bidmc_data."""

import lzma
import math
import os
import warnings
import weakref

import numpy as np
import torch

from data import (
    LabelScaler, RATE_BANDS, band_spectrum, reduce_rate, respiratory_signals, spectral_rate,
    standardise, upslope_rate)
from tasks import bidmc_data
from tasks.bidmc_data import (
    PPGSplit, bidmc_original, bidmc_windows, breath_count, breath_rate, mean_inside, ppg_inputs,
    quantisation_cost, read_bidmc, read_bidmc_recording, synthetic_ppg)
from tasks import ocec
from tests.helpers import (
    edit, folder, is_mapped, near, need_real, refuses, replaced, seeded, warned, write_bidmc)


def test_data_evaluation_batches_are_never_augmented():
    images, labels, _, names = ocec.synthetic_eyes(20, size=(12, 20))
    augment = {"flip": 1.0, "photometric": 1.0, "crop": 2, "mixup": 1.0}
    split = ocec.EyeSplit(images, labels, np.arange(5, 15), augment=augment)
    batch = split.batch(np.array([0, 3]))
    assert near(batch["inputs"], (images[[5, 8]].float() - 127.5) / 127.5, 1e-6)
    assert batch["targets"].tolist() == labels[[5, 8]].tolist()
    augmented = split.batch(np.array([0, 3]), seeded())
    assert not torch.equal(augmented["inputs"], batch["inputs"])
    unchanged = ocec.synthetic_eyes(20, size=(12, 20))[0]
    assert torch.equal(images, unchanged)


def assert_same(recordings, expected):
    assert len(recordings) == len(expected)
    for one, other in zip(recordings, expected):
        assert list(one) == list(other)
        for name, value in one.items():
            kinds = [(type(v), getattr(v, "dtype", None)) for v in (value, other[name])]
            assert kinds[0] == kinds[1], name
            assert np.array_equal(value, other[name], equal_nan=name in ("hr", "pulse")), name


def test_data_bidmc_reads_what_was_written_whatever_the_column_order():
    recordings = synthetic_ppg(3, seconds=130)  # Time repeats after 100 s: it is never read
    recordings[1]["breaths"] = recordings[1]["breaths"][:-3]
    with folder() as f:
        columns = (("RESP", "PLETH", "V"), ("PLETH", "II"), ("II", "V", "RESP", "PLETH"))
        for recording, names in zip(recordings, columns):
            write_bidmc(f / "bidmc", [recording], columns=("Time [s]", *names))
        assert_same(read_bidmc(f / "bidmc"), recordings)


def test_data_bidmc_reads_packed_files_and_prefers_plain_ones():
    recordings = synthetic_ppg(2, seconds=12)
    with folder() as f:
        write_bidmc(f, recordings)
        for name in ("bidmc_01_Signals.csv", "bidmc_02_Signals.csv", "bidmc_02_Numerics.csv"):
            (f / f"{name}.xz").write_bytes(lzma.compress((f / name).read_bytes()))
            (f / name).unlink()
        assert_same(read_bidmc(f), recordings)
        (f / "bidmc_01_Numerics.csv.xz").write_bytes(b"")
        assert_same(read_bidmc(f), recordings)


def test_data_bidmc_survives_the_quirks_of_the_files():
    recordings = synthetic_ppg(2, seconds=60)
    with folder() as f:
        write_bidmc(f, recordings, newline="\r\n")
        first, second = recordings
        with open(f / "bidmc_01_Numerics.csv", "ab") as file:  # one more row without a time: means
            file.write(b",91.3,91.0,,\r\n")
        rows = (f / "bidmc_02_Numerics.csv").read_text().splitlines()
        rows[1:] = ["-1,63,63,18,97"] + rows[1:-1]  # a second early, as bidmc_23
        rows[5] = f"{rows[5].split(',')[0]},NaN,,16,97"
        (f / "bidmc_02_Numerics.csv").write_text("\n".join(rows))
        second["time"] = np.concatenate([[-1], second["time"][:-1]])
        for name in ("hr", "pulse"):
            second[name] = np.concatenate([[63], second[name][:-1]])
        second["hr"][4] = second["pulse"][4] = np.nan
        marks = (f / "bidmc_01_Breaths.csv").read_text().splitlines()
        marks[2], marks[3] = marks[3], marks[2]  # out of order
        marks += [marks[-1], "NaN, "]  # one mark comes twice
        (f / "bidmc_01_Breaths.csv").write_text("\n".join(marks))
        for name in ("breaths", "breaths_2"):
            first[name] = np.append(first[name], first[name][-1])
        assert_same(read_bidmc(f), recordings)


def test_data_bidmc_cache_parses_once_per_content():
    recordings, printed = synthetic_ppg(2, seconds=12), []
    recordings[0]["hr"][3] = np.nan
    with folder() as f:
        def read():
            return read_bidmc(f / "bidmc", cache=f / "cache", progress=printed.append)

        write_bidmc(f / "bidmc", recordings)
        for _ in range(2):
            assert_same(read(), recordings)
        assert printed == ["reading bidmc_01 (1 of 2)", "reading bidmc_02 (2 of 2)"]
        arrays, signals = sorted((f / "cache").iterdir())
        assert arrays.suffix == ".npz" and signals.suffix == ".npy"
        for file in (f / "bidmc").iterdir():
            os.utime(file, (1, 1))  # another time, the same content
        assert_same(read(), recordings)
        assert len(printed) == 2
        for file, count in ((arrays, 4), (signals, 6)):
            file.write_bytes(file.read_bytes()[:-100])
            parsed, message = warned(read)
            assert_same(parsed, recordings)
            assert "cannot be read" in message and len(printed) == count
        assert_same(read(), recordings)
        assert len(printed) == 6
        recordings[1]["patient"] = "patient009"  # as long as the old one
        write_bidmc(f / "bidmc", recordings[1:])
        assert_same(read(), recordings)
        assert len(printed) == 8


def test_data_bidmc_cache_is_written_one_recording_at_a_time_and_mapped():
    recordings, read, signals = synthetic_ppg(5, seconds=12), read_bidmc_recording, []

    def read_and_look(*words, **options):
        assert all(signal() is None for signal in signals[:-1])  # the last one may just be written
        recording = read(*words, **options)
        signals.append(weakref.ref(recording["ppg"]))
        return recording

    with folder() as f:
        write_bidmc(f / "bidmc", recordings)
        with replaced(bidmc_data, "read_bidmc_recording", read_and_look):
            first = read_bidmc(f / "bidmc", cache=f / "cache")
        assert len(signals) == 5 and all(is_mapped(recording["ppg"]) for recording in first)
        (f / "file").write_text("")
        again, message = warned(lambda: read_bidmc(f / "bidmc", cache=f / "file" / "cache"))
        assert_same(again, recordings)
        assert "cannot be kept" in message


def test_data_bidmc_names_the_file_that_is_missing_cut_off_or_empty():
    recordings = synthetic_ppg(2, seconds=12)
    def half(text):
        return "".join(text.splitlines(keepends=True)[: text.count("\n") // 2])

    cases = (
        ("Numerics.csv", None, "bidmc_02_Numerics.csv is missing"),
        ("Signals.csv", None, "bidmc_02_Signals.csv is missing"),
        ("Breaths.csv", None, "bidmc_02_Breaths.csv is missing"),
        ("Fix.txt", None, "bidmc_02_Fix.txt is missing or has no line"),
        ("Fix.txt", lambda text: text.replace("s00001", "").replace("patient000", ""),
         "has no line 'MIMIC II matched wdb ID"),
        ("Signals.csv", half, "signals last"),
        ("Signals.csv", lambda text: text + "0.1,0.2",
         "Signals.csv is cut off or no such table (invalid column index 2"),
        ("Signals.csv", lambda text: text.partition("\n")[0] + "\n", "signals last 0.0 s"),
        ("Signals.csv", lambda text: text.replace(" PLETH", " PPG"),
         "no column 'PLETH' among ['Time [s]', 'RESP', 'PPG', 'V']"),
        ("Signals.csv", lambda text: text + "12,1,NaN,1\n", "PLETH holds 1 NaN in 1502 rows"),
        ("Signals.csv", lambda text: text + "12,1,inf,1\n", "PLETH holds 1 infinite"),
        ("Signals.csv", lambda text: text + "12,1,x,1\n", "could not convert"),
        ("Numerics.csv", half, "the numerics"),
        ("Numerics.csv", lambda text: text.replace(" HR", " HF"), "no column 'HR'"),
        ("Numerics.csv", lambda text: "Time [s], HR, PULSE\n12,NaN,80\n", "HR holds no number"),
        ("Numerics.csv", lambda text: "Time [s], HR, PULSE\n12,inf,80\n", "HR holds 1 infinite"),
        ("Breaths.csv", lambda text: text.replace("ann2", "ann3"), "no column 'breaths ann2"),
        ("Breaths.csv", lambda text: "", "no column 'breaths ann1"),
    )
    for table, change, message in cases:
        with folder() as f:
            write_bidmc(f, recordings)
            file = f / f"bidmc_02_{table}"
            edit(file, change) if change else file.unlink()
            with warnings.catch_warnings(action="ignore"):  # numpy's, for a table without rows
                refuses(read_bidmc, message, f, cache=f / "cache")
            assert not list((f / "cache").iterdir())
    with folder() as f:
        refuses(read_bidmc, "holds no bidmc_NN_Signals.csv", f)
        write_bidmc(f, recordings)
        packed = lzma.compress((f / "bidmc_01_Signals.csv").read_bytes())
        (f / "bidmc_01_Signals.csv").unlink()
        for damaged in (packed[: len(packed) // 2], b"no xz at all"):
            (f / "bidmc_01_Signals.csv.xz").write_bytes(damaged)
            refuses(read_bidmc, "bidmc_01_Signals.csv.xz is cut off", f)


def test_data_bidmc_signals_alone_are_enough_to_predict_on():
    recordings = synthetic_ppg(2, seconds=12)
    with folder() as f:
        write_bidmc(f, recordings)
        for file in (*f.glob("*Numerics*"), *f.glob("*Breaths*"), f / "bidmc_02_Fix.txt"):
            file.unlink()
        for _ in range(2):  # parsed, then from the cache
            read = read_bidmc(f, cache=f / "cache", need_labels=False)
            patients = [recording["patient"] for recording in read]
            assert patients == [recordings[0]["patient"], "bidmc_02"]
            assert list(read[0]) == ["number", "patient", "ppg"]
            for one, other in zip(read, recordings):
                assert np.array_equal(one["ppg"], other["ppg"])
        refuses(read_bidmc, "bidmc_01_Numerics.csv is missing", f, cache=f / "cache")
    windows = bidmc_windows(read, rate=None, seconds=10, stride=1)
    assert windows["inputs"].shape == (6, 1250)
    assert np.isnan(windows["labels"]).all() and np.isnan(windows["second_reading"]).all()


def test_data_bidmc_windows_are_slices_with_patient_and_start():
    recordings = synthetic_ppg(5, seconds=60)
    windows = bidmc_windows(recordings, rate="hr", seconds=20, stride=5)
    inputs = windows["inputs"]
    assert inputs.shape == inputs[:].shape == (5 * 9, 2500) and inputs[:2].dtype == torch.float32
    assert windows["starts"][:10].tolist() == [0, 5, 10, 15, 20, 25, 30, 35, 40, 0]
    assert all(windows[name].dtype == np.float64 
               for name in ("labels", "second_reading", "starts"))
    for row in (0, 8, 9, 44):
        recording, start = recordings[windows["recording"][row]], int(windows["starts"][row])
        samples = recording["ppg"][125 * start : 125 * start + 2500]
        assert np.array_equal(inputs[[row]][0].numpy(), samples)
        assert windows["groups"][row] == recording["patient"]
        assert windows["labels"][row] == recording["hr"][start : start + 20].mean()
        pulse = recording["pulse"][start : start + 20].mean()
        assert np.isclose(windows["second_reading"][row], pulse)
    exact = [recordings[0] | {"ppg": recordings[0]["ppg"][:2500]}]
    assert torch.equal(bidmc_windows(exact, rate="hr", seconds=20)["inputs"][:], inputs[:1])
    default = bidmc_windows(synthetic_ppg(1, seconds=40), rate="rr")
    assert default["inputs"].shape == (3, 4000) and default["starts"].tolist() == [0, 4, 8]


def test_data_bidmc_windows_without_a_label_are_left_out_and_second_readings_may_be_nan():
    [recording] = synthetic_ppg(1, seconds=60)
    recording["hr"][10:30] = np.nan
    recording["pulse"][30:60] = np.nan
    windows = bidmc_windows([recording], rate="hr", seconds=10, stride=10)
    assert windows["starts"].tolist() == [0, 30, 40, 50]
    assert np.isnan(windows["second_reading"]).tolist() == [False, True, True, True]
    recording["breaths"] = recording["breaths"][:3]
    refuses(bidmc_windows, "no window of 32 s has a label", [recording], rate="rr")
    refuses(bidmc_windows, "recording 1 lasts 60.0 s, a window 80 s",
            [recording], rate="rr", seconds=80)
    refuses(bidmc_windows, "rate 'bpm' must be", [recording], rate="bpm")
    refuses(bidmc_windows, "4000 samples every 0", [recording], rate="rr", stride=0)
    refuses(bidmc_windows, "0 samples every 500", [recording], rate="hr", seconds=0)
    refuses(bidmc_original, "rate 'bpm' must be", [recording], rate="bpm")


def test_data_breath_rate_equals_the_oracle():
    def slow(marks, start, length, total):
        marks = sorted({int(mark) - 1 for mark in marks})
        edges = [0, *marks, total]
        if any(b - a > 1250 and a < start + length and b > start for a, b in zip(edges, edges[1:])):
            return np.nan
        inside = [mark for mark in marks if start <= mark < start + length]
        if len(inside) < 4:
            return np.nan
        return 60 * (len(inside) - 1) / ((inside[-1] - inside[0]) / 125)

    rng = np.random.default_rng(0)
    for _ in range(30):
        marks = np.sort(rng.integers(1, 20001, rng.integers(4, 60)))
        starts = np.arange(0, 20001 - 4000, 125)
        expected = [slow(marks, start, 4000, 20001) for start in starts]
        assert np.allclose(breath_rate(marks, starts, 4000, 20001), expected, equal_nan=True)


def test_data_breath_rate_at_its_seams():
    def rate(marks, start, length=1000, total=5000):
        return breath_rate(np.array(marks), np.array([start]), length, total)[0]

    even = np.arange(1, 5000, 250)  # 1-based: 0-based 0, 250, ... and 30 per minute
    assert rate(even, 0) == rate(even, 250) == rate(even, 251, 1001) == 30
    assert np.isnan(rate(even, 251, 999))  # holds 500, 750 and 1000 only
    assert rate([*even, 501], 0) == 30 and np.isnan(rate([1, 1, 251, 501], 0))  # twice is once
    # 1250 samples between two marks: 10 s, no gap.
    wide = [1, 101, 201, 301, 401, 1651, 1751, 1851, 1951, 2051, 2151]
    assert rate(wide, 0, 2000, 2200) == 60 * 8 / (1950 / 125)
    gap = [1, 101, 201, 301, 401, 1652, 1752, 1852, 1952, 2052, 2152]  # 1251: from 400 to 1651
    for start, length in (0, 2000), (1650, 500), (0, 401):
        assert np.isnan(rate(gap, start, length, 2200))
    assert rate(gap, 1651, 500, 2200) == 75 and rate(gap, 0, 400, 2200) == 75
    late = np.arange(1302, 3000, 100)  # nothing known before 1301, nor from 2901 on
    assert np.isnan(rate(late, 1000, 1000, 3000)) and rate(late, 1301, 1000, 3000) == 75
    assert rate(late, 2400, 600, 4151) == 75 and np.isnan(rate(late, 2500, 600, 4152))


def test_data_breath_count_takes_the_marks_as_they_stand():
    marks = np.array([0, 100, 1249, 1250, 1250, 1251])
    counts = breath_count(marks, np.array([0, 1, 101, 1250]), 1250, 9999)
    assert counts.tolist() == [18, 12 + 12, 24, 18]


def test_data_mean_inside_leaves_nan_out():
    time, values = np.array([-1.0, 0, 1, 2, 3, 4]), np.array([50.0, 60, np.nan, 80, np.nan, np.nan])
    means = mean_inside(time, values, np.array([-1.0, 0, 1, 2, 3]), 2)
    assert np.array_equal(means, [55, 60, 80, 80, np.nan], equal_nan=True)


def test_data_original_windows_count_breaths_and_split_by_recording():
    recordings = synthetic_ppg(16, seconds=30)
    windows, rows = bidmc_original(recordings, rate="rr")
    assert windows["inputs"].shape == (16 * 11, 1250)
    assert windows["starts"][:3].tolist() == [0, 2, 4]
    numbers = np.array([recording["number"] for recording in recordings])[windows["recording"]]
    assert {name: np.unique(numbers[rows[name]]).tolist() for name in rows} == {
        "train": [1, 2, 3, 4, 5, 6, 7, 9, 10, 12, 13, 14, 16], "validation": [11], "test": [8, 15]}
    assert sorted(np.concatenate(list(rows.values()))) == list(range(16 * 11))
    for row in (0, 40, 170):
        recording, start = recordings[windows["recording"][row]], 125 * int(windows["starts"][row])
        for name, key in (("labels", "breaths"), ("second_reading", "breaths_2")):
            breaths = sum(start <= mark < start + 1250 for mark in recording[key])
            assert windows[name][row] == 6 * breaths
    hr, _ = bidmc_original(recordings, rate="hr")
    assert hr["labels"][12] == recordings[1]["hr"][2:12].mean()


def test_data_standardised_windows_forget_scale_and_offset():
    x = torch.randn(5, 400, generator=seeded())
    z = standardise(x)
    assert z.mean(1).abs().max() < 1e-6 and near(z.std(1, correction=0), 1, 1e-6)
    assert near(standardise(4 * x + 1), z, 1e-5)
    assert near(standardise(x[2]), z[2], 1e-5) and near(standardise(x.double()), z.double(), 1e-6)
    assert torch.equal(standardise(torch.full((2, 999), 0.1)), torch.zeros(2, 999))


def test_data_reduced_rate_is_the_mean_of_each_block():
    x = torch.arange(11.0)[None].repeat(2, 1)
    assert reduce_rate(x, 4).tolist() == [[1.5, 5.5]] * 2 and torch.equal(reduce_rate(x, 1), x)
    t = torch.arange(4000, dtype=torch.float64) / 125
    waves = torch.stack([torch.sin(2 * torch.pi * hz * t) for hz in (2.0, 5.5, 29.25)])
    shares = reduce_rate(waves, 4).square().mean(1).sqrt() * 2**0.5
    assert near(shares, [0.99, 0.95, 0.07], 0.006), shares  # as the docstring claims


def test_data_spectral_rate_finds_a_sine_at_any_rate_scale_and_phase():
    t = torch.arange(1000) / 31.25
    for name, hz in (("rr", torch.linspace(0.12, 0.58, 40)), ("hr", torch.linspace(0.8, 2.45, 40))):
        x = torch.sin(2 * torch.pi * hz[:, None] * t + torch.arange(40.0)[:, None])
        rate = spectral_rate(0.01 * x + 3, 31.25, RATE_BANDS[name])
        assert near(rate, 60 * hz, 0.003), (rate - 60 * hz).abs().max()
    mixed = 3 * torch.sin(2 * torch.pi * 1.5 * t) + torch.sin(2 * torch.pi * 0.3 * t)
    for band, want in ((0.1, 0.6), 18), ((0.75, 2.5), 90):  # the other wave is outside the band
        assert abs(spectral_rate(mixed[None], 31.25, band) - want) < 0.15
    below = spectral_rate(torch.sin(2 * torch.pi * 0.08 * t)[None], 31.25, (0.1, 0.6))
    assert 6 <= below < 6.5  # the flank of a peak below the band stays inside it
    assert spectral_rate(torch.full((1, 1000), 0.7), 31.25, (0.1, 0.6)).isnan().all()


def test_data_spectral_rate_equals_the_peak_of_the_padded_fft():
    x = torch.randn(20, 1024, dtype=torch.float64, generator=seeded())
    window = torch.hann_window(1024, periodic=False, dtype=x.dtype)
    power = torch.fft.rfft(standardise(x) * window, n=4096).abs().square()
    grid = torch.fft.rfftfreq(4096, 1 / 32, dtype=x.dtype)  # 32 Hz, 32 s: steps of 1/128 Hz
    inside = (grid >= 0.25) & (grid <= 1.25)
    rate = spectral_rate(x, 32, (0.25, 1.25))
    for row, estimate in zip(power, rate.tolist()):
        peak = int(torch.where(inside, row, 0).argmax())
        square, slope, _ = np.polyfit([-1, 0, 1], row[peak - 1 : peak + 2].log().numpy(), 2)
        vertex = np.clip(-slope / (2 * square), -0.5, 0.5)  # at the edge of the band it is none
        want = np.clip(60 * (float(grid[peak]) + vertex / 128), 15, 75)
        assert math.isclose(estimate, want, rel_tol=1e-9), (estimate, want)
    refuses(spectral_rate, "band 0.6 to 0.1 Hz must lie in order", x, 32, (0.6, 0.1))
    refuses(spectral_rate, "half the rate, 16 Hz", x, 32, (0.6, 17))
    refuses(spectral_rate, "band 0 to 1", x, 32, (0, 1))


def slow_mean(values, width):
    """Mean of a list over an odd width, over what there is of it at the ends."""
    half = width // 2
    parts = [values[max(i - half, 0) : i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def slow_upslope_rate(x, smooth, smooth_rise, apart, hz):
    """upslope_rate of one window, sample by sample; the widths in samples."""
    x = slow_mean(((x - x.mean()) / x.std()).tolist(), smooth)
    u = slow_mean([max(b - a, 0.0) for a, b in zip(x, x[1:])], smooth_rise)
    high, beats = 0.4 * sorted(u)[round(0.98 * (len(u) - 1))], []
    for i in range(1, len(u) - 1):
        if u[i] > high and u[i] > u[i - 1] and u[i] == max(u[max(i - apart, 0) : i + apart + 1]):
            square, slope, _ = np.polyfit([-1, 0, 1], u[i - 1 : i + 2], 2)
            beats.append(i - slope / (2 * square))
    gaps = sorted(b - a for a, b in zip(beats, beats[1:]))
    middle = len(gaps) // 2
    return 60 * hz / (gaps[middle] if len(gaps) % 2 else (gaps[middle - 1] + gaps[middle]) / 2)


def test_data_upslope_rate_equals_a_loop_over_the_samples():
    rng = np.random.default_rng(0)
    windows = []
    for pulse_hz in rng.uniform(0.8, 2.4, 12):
        t = np.arange(800) / 31.25
        phase = 2 * np.pi * pulse_hz * (t + 0.02 * np.sin(2 * np.pi * 0.25 * t))
        windows.append(np.sin(phase) + 0.4 * np.sin(2 * phase + 1) + 0.2 * rng.normal(size=800))
    windows = np.array(windows)
    for hz, widths in ((31.25, (3, 5, 10)), (125, (9, 15, 41))):
        got = upslope_rate(torch.tensor(windows), hz)
        for x, rate in zip(windows, got.tolist()):
            assert math.isclose(rate, slow_upslope_rate(x, *widths, hz), rel_tol=1e-9)
    assert near(upslope_rate(torch.tensor(windows, dtype=torch.float32), 125), got, 1e-4)


def test_data_upslope_rate_of_a_pulse_forgets_scale_offset_and_a_missed_beat():
    t = torch.arange(1000) / 31.25
    rate_hz = torch.linspace(0.7, 2.8, 30)
    x = torch.sin(2 * torch.pi * rate_hz[:, None] * t + torch.arange(30.0)[:, None])
    assert near(upslope_rate(0.01 * x + 3, 31.25), 60 * rate_hz, 0.01)
    x[:, 300:330] = 0  # about a second without a pulse
    assert near(upslope_rate(x, 31.25), 60 * rate_hz, 0.01)
    assert upslope_rate(torch.full((1, 500), 0.7), 31.25).isnan().all()
    once = (torch.arange(500.0) > 250).float()
    assert upslope_rate(once[None], 31.25).isnan().all()  # one beat has no interval


def breathing_pulse(where, *, breath_hz=0.3, pulse_hz=1.3, rate_hz=31.25, seconds=32):
    """A pulse that breathing modulates in one way only."""
    t = torch.arange(round(rate_hz * seconds)) / rate_hz
    breath = torch.sin(2 * torch.pi * breath_hz * t)
    amplitude, turn, baseline = 1, 0, 0
    if where == "amplitude":
        amplitude = 1 + 0.3 * breath
    elif where == "frequency":
        turn = 0.02 * -torch.cos(2 * torch.pi * breath_hz * t) / breath_hz
    else:
        baseline = 0.3 * breath
    return (amplitude * torch.sin(2 * torch.pi * pulse_hz * (t + turn)) + baseline)[None]


def test_data_respiratory_signals_show_breathing_where_it_is():
    for place, where in enumerate(("baseline", "amplitude", "frequency")):
        signals = respiratory_signals(breathing_pulse(where), 31.25)
        assert signals.shape == (1, 3, 1000) and signals.mean(-1).abs().max() < 1e-5
        assert near(signals.std(-1), 1, 1e-3)
        spectrum = band_spectrum(signals, 31.25, (0.1, 0.6), 51)  # bin 20 is 0.3 Hz
        assert abs(int(spectrum[0, place].argmax()) - 20) <= 1, where
        power = spectrum.exp()[0, :, 18:23].sum(-1) / spectrum.exp()[0].sum(-1)
        assert power[place] > 0.6, (where, power)
    scaled = respiratory_signals(4 * breathing_pulse("amplitude") + 1, 31.25)
    assert near(scaled, respiratory_signals(breathing_pulse("amplitude"), 31.25), 1e-3)
    assert torch.isfinite(respiratory_signals(torch.ones(2, 1000), 31.25)).all()


def test_data_ppg_inputs_are_the_window_or_the_spectra_of_its_task():
    windows = breathing_pulse("baseline").repeat(2, 1)
    waveform = ppg_inputs(windows, 31.25, kind="waveform", rate="hr")
    assert torch.equal(waveform, standardise(windows)[:, None])
    rr = ppg_inputs(windows, 31.25, kind="spectrum", rate="rr", bins=40)
    hr = ppg_inputs(windows, 31.25, kind="spectrum", rate="hr", bins=40)
    assert rr.shape == hr.shape == (2, 3, 40)
    breathing = respiratory_signals(windows, 31.25)
    assert torch.equal(rr, band_spectrum(breathing, 31.25, (0.08, 0.75), 40))
    assert torch.equal(hr[:, 0], band_spectrum(windows, 31.25, (0.6, 3.125), 40))
    assert torch.equal(hr[:, 1], band_spectrum(windows.diff(dim=1), 31.25, (0.6, 3.125), 40))
    grid, beats = np.linspace(0.6, 3.125, 40), upslope_rate(windows, 31.25)[0].item() / 60
    bump = np.exp(-0.5 * ((grid - beats) / (grid[1] - grid[0])) ** 2)
    assert near(hr[0, 2], torch.tensor(bump), 1e-4) and bump.max() > 0.8
    flat = ppg_inputs(torch.ones(1, 1000), 31.25, kind="spectrum", rate="hr", bins=40)
    assert torch.equal(flat[:, 2], torch.zeros(1, 40))
    refuses(ppg_inputs, "kind 'cepstrum'", windows, 31.25, kind="cepstrum", rate="rr")
    refuses(ppg_inputs, "rate 'bpm'", windows, 31.25, kind="waveform", rate="bpm")


def test_data_ppg_split_stretches_in_training_only_and_scales_its_targets():
    windows = bidmc_windows(synthetic_ppg(2, seconds=60), rate="hr", seconds=10)
    scaler = LabelScaler().fit(windows["labels"])
    rows = np.arange(3, 15)
    split = PPGSplit(windows, rows, lambda x: x[:, None], scaler=scaler, stretch=1.2)
    plain, stretched = split.batch(np.array([4, 0])), split.batch(np.array([4, 0]), seeded())
    assert len(split) == 12 and torch.equal(plain["inputs"][:, 0], windows["inputs"][[7, 3]])
    rates = windows["labels"][[7, 3]]
    assert near(scaler.inverse(plain["targets"].double()), rates, 1e-4)
    factor = scaler.inverse(stretched["targets"].double()) / torch.from_numpy(rates)
    assert not torch.equal(plain["inputs"], stretched["inputs"])
    assert (factor - 1).abs().min() > 1e-3 and (factor.log().abs() < math.log(1.2001)).all()
    for name in "groups", "labels":
        assert np.array_equal(getattr(split, name), windows[name][rows])
    split.features = torch.arange(12.0)[:, None]
    batch = split.batch(np.array([4, 0]), seeded())
    assert batch["features"].tolist() == [[4], [0]] and "inputs" not in batch
    assert torch.equal(batch["targets"], plain["targets"])
    assert "targets" not in PPGSplit(windows, rows, lambda x: x).batch(np.array([0]))


def test_data_quantisation_cost_is_what_even_breathing_shows():
    rng = np.random.default_rng(0)
    for seconds in (10, 32):
        mean = rng.uniform(2, 9, 200_000)  # breaths in a window
        phase = rng.uniform(size=len(mean))
        counts = np.floor(mean + phase) - np.floor(phase)
        truth, rounded = quantisation_cost(seconds)
        assert near(60 / seconds * np.abs(mean - counts).mean() / truth, 1, 0.02)
        assert near(60 / seconds * np.abs(np.round(mean) - counts).mean() / rounded, 1, 0.02)
    assert quantisation_cost(10) == (2.0, 1.5)


def spectral_estimate(windows, rate):
    return spectral_rate(reduce_rate(windows["inputs"][:], 4), 31.25, RATE_BANDS[rate]).numpy()


def test_data_synthetic_ppg_is_fixed_by_its_seed_and_holds_its_rates():
    recordings = synthetic_ppg(8, seconds=160)
    assert_same(synthetic_ppg(3, seconds=160), recordings[:3])
    assert not np.array_equal(synthetic_ppg(1, seconds=160, seed=1)[0]["ppg"], recordings[0]["ppg"])
    assert [recording["number"] for recording in recordings] == list(range(1, 9))
    assert len({recording["patient"] for recording in recordings}) == 6
    assert len(recordings[0]["ppg"]) == 160 * 125 + 1 and len(recordings[0]["hr"]) == 161
    for recording in recordings:
        assert recording["ppg"].min() == 0
    assert {float(recording["ppg"].max()) for recording in recordings} == {1, 4}
    # Annotator 2 and PULSE know the rates, and the PPG shows them.
    for rate, bound in (("rr", 0.15), ("hr", 0.4)):
        windows = bidmc_windows(recordings, rate=rate)
        labels = windows["labels"]
        spectral = spectral_estimate(windows, rate)
        assert np.abs(windows["second_reading"] - labels).mean() < bound
        assert np.median(np.abs(spectral - labels)) < 0.5
        assert np.abs(labels - np.median(labels)).mean() > 2


REAL_RECORDINGS = []


def real_recordings():
    if not REAL_RECORDINGS:
        REAL_RECORDINGS.extend(read_bidmc(need_real("bidmc_csv")))
    return REAL_RECORDINGS


def test_data_real_bidmc_is_read_whole():
    recordings = real_recordings()
    patients = {recording["number"]: recording["patient"] for recording in recordings}
    assert len(recordings) == 53 and list(patients) == list(range(1, 54))
    assert len(set(patients.values())) == 46
    for shared in ((6, 7, 8, 9), (20, 21, 22, 23), (38, 39)):
        assert len({patients[number] for number in shared}) == 1
    for recording in recordings:
        number = recording["number"]
        assert len(recording["ppg"]) == 60001 and len(recording["time"]) == 481
        assert (recording["ppg"].max() > 1.01) == (number in (40, 42, 44, 45, 46, 47, 48, 52, 53))
        assert (recording["time"][0] == -1) == (number == 23)
        for name in ("breaths", "breaths_2"):
            assert (np.diff(recording[name]) >= 0).all()
    assert np.isnan(recordings[26]["hr"]).sum() == 4
    assert np.isnan(recordings[0]["pulse"]).sum() == 13


def test_data_real_bidmc_gives_the_original_statistics_to_the_digit():
    windows, rows = bidmc_original(real_recordings(), rate="rr")
    train, validation, test = (
        windows["labels"][rows[name]] for name in ("train", "validation", "test"))
    assert (len(train), len(validation), len(test)) == (9912, 1180, 1416)
    assert (train.min(), train.max()) == (0, 36)
    spreads = f"{train.std(ddof=1):.3f} {validation.std(ddof=1):.3f}"
    assert f"{train.mean():.3f} {spreads}" == "17.216 4.430 3.859"
    assert f"{np.abs(validation - 18).mean():.3f} {np.abs(test - 18).mean():.3f}" == "2.222 2.352"
    assert round(float((windows["labels"] == 18).mean()), 1) == 0.6
    windows, rows = bidmc_original(real_recordings(), rate="hr")
    train = windows["labels"][rows["train"]]
    assert [len(rows[name]) for name in ("train", "validation", "test")] == [9912, 1180, 1416]
    assert f"{train.mean():.2f} {train.std(ddof=1):.2f}" == "88.12 11.76"
    assert f"{train.min():.1f} {train.max():.1f}" == "52.2 131.2"


def test_data_real_bidmc_windows_have_their_floors_and_second_readings():
    for rate, count, floor, other, spectral in (
            ("rr", 5730, 2.10, 0.28, 2.87), ("hr", 5989, 9.77, 0.99, 1.26)):
        windows = bidmc_windows(real_recordings(), rate=rate)
        labels = windows["labels"]
        assert len(labels) == count and len(set(windows["groups"])) == 46
        assert not np.isnan(windows["second_reading"]).any()
        for prediction, want in ((np.median(labels), floor), (windows["second_reading"], other),
                                 (spectral_estimate(windows, rate), spectral)):
            error = np.abs(prediction - labels).mean()
            assert near(error, want, 0.01), (rate, error)
