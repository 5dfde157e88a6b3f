"""Tests of quadmodal_data."""

import cmath
import functools
import itertools
import math

import numpy as np
import torch

import data
from tasks.quadmodal_data import (
    ModalSplit, band_energies, fit_whitening, gravity_frame, read_modalities, spectral_features,
    synthetic_modalities, whitened, window_statistics)
from tests.helpers import (
    channels_last, folder, is_mapped, near, quad_npz, raises, ridge_accuracy, same_bits, seeded,
    warned)

refuses = functools.partial(raises, ValueError)


def test_data_cache_maps_the_modalities_of_an_npz():
    with folder() as f:
        present = np.arange(240) % 3 > 0
        path = quad_npz(f / "modal.npz", change=lambda arrays: arrays | {"present_audio": present})
        plain = read_modalities(path)
        for _ in range(2):
            arrays, labels, groups, names, masks = read_modalities(path, cache=f / "cache")
            for name, array in plain[0].items():
                assert is_mapped(arrays[name]) and not is_mapped(array)
                assert arrays[name].dtype == array.dtype
                assert np.array_equal(arrays[name], array), name
            assert np.array_equal(labels, plain[1]) and np.array_equal(groups, plain[2])
            assert names == plain[3] and np.array_equal(masks["audio"], present)
        assert len(list((f / "cache").iterdir())) == len(plain[0])


def modal_arrays(n=12, seed=0):
    """One small array per rank and type that a modality may have."""
    rng = np.random.default_rng(seed)
    return {
        "table": rng.integers(0, 9, (n, 5)),
        "stream": rng.normal(size=(n, 8, 3)).astype(np.float16),
        "photo": rng.integers(0, 256, (n, 3, 6, 4), dtype=np.uint8),
        "film": rng.normal(size=(n, 2, 1, 4, 4)).astype(np.float32)}


def present_only(arrays):
    return {name: array for name, array in arrays.items() if array is not None}


def write_modalities(path, changes=None, n=12):
    """A file of four modalities, three classes and four recordings; None leaves an array out."""
    content = modal_arrays(n) | {"labels": np.arange(n) % 3, "groups": np.arange(n) // 3}
    np.savez(path, **present_only(content | (changes or {})))
    return path


def test_data_modalities_are_read_as_they_were_saved_two_four_or_seven():
    with folder() as f:
        more = {f"extra {i}": np.arange(24.0).reshape(12, 2) for i in range(3)}
        for change in ({"film": None, "photo": None}, {}, more):
            expected = present_only(modal_arrays() | change)
            path = write_modalities(f / "set.npz", change)
            arrays, labels, groups, names, present = read_modalities(path)
            assert list(arrays) == list(expected) == list(present) and names == ["0", "1", "2"]
            for name, array in expected.items():
                assert arrays[name].dtype == array.dtype and np.array_equal(arrays[name], array)
            assert labels.dtype == np.int64 and labels.tolist() == [0, 1, 2] * 4
            assert groups.tolist() == [i // 3 for i in range(12)]
            for mask in present.values():
                assert mask.dtype == bool and mask.all() and mask.shape == (12,)
        names = ["lie", "sit", "run", "fly"]
        write_modalities(path, {"groups": None, "label_names": np.array(names)})
        _, _, groups, read_names, _ = read_modalities(path)
        assert groups is None and read_names == names


def test_data_modality_labels_may_be_strings_in_sorted_order_or_that_of_their_names():
    words, eye = np.array(["walk", "sit", "jog"] * 4), np.arange(12)
    in_order, numbers = ["jog", "sit", "walk"], [f"{i}" for i in range(256)]
    with folder() as f:
        path = f / "set.npz"
        for labels, names, expected, listed in (
                (words, None, [2, 1, 0] * 4, in_order),
                (words.astype("S"), None, [2, 1, 0] * 4, in_order),
                (words, ["walk", "fly", "jog", "sit"], [0, 3, 2] * 4, None),
                (eye.astype(np.uint8) % 2 * 255, numbers, [0, 255] * 6, None),
                (eye % 2 == 0, None, [1, 0] * 6, ["0", "1"])):
            label_names = None if names is None else np.array(names)
            write_modalities(path, {"labels": labels, "label_names": label_names})
            _, read, _, shown, _ = read_modalities(path)
            assert read.tolist() == expected and read.dtype == np.int64
            assert shown == (listed or names)
        write_modalities(path, {"labels": words[::-1]})
        # Numbers belong to names, in any order of rows.
        assert read_modalities(path)[1].tolist() == [0, 1, 2] * 4


def test_data_modalities_absent_in_a_row_are_told_by_their_mask_alone():
    film, here = modal_arrays()["film"], np.arange(12) % 4 != 1
    film[~here] = np.nan
    with folder() as f:
        path = write_modalities(f / "set.npz", {"film": film, "present_film": here})
        arrays, _, _, _, present = read_modalities(path)
        assert list(arrays) == ["table", "stream", "photo", "film"]
        assert np.array_equal(present["film"], here) and present["photo"].all()
        film[4, 0, 0, 1, 1], here[9] = np.inf, True
        write_modalities(f / "set.npz", {"film": film, "present_film": here})
        refuses("'film' holds 33 NaN or infinite values, the first in row 4",
                lambda: read_modalities(path))


def test_data_modalities_name_what_is_wrong_with_a_file():
    arrays, eye = modal_arrays(), np.arange(12)
    rare, objects = np.array([0, 1, 2, 3] + [0, 1] * 4), np.array([None] * 12)
    no_modality = dict.fromkeys([f"present_{name}" for name in arrays], eye != 7)
    tables = (
        (eye, "'table' has shape (12,), expected (n, F)"),
        (np.zeros((12, 0)), "shape (12, 0)"),
        (np.zeros((12,) + (1,) * 5), "'table' has shape"),
        (np.array(5.0), "'table' has shape ()"),
        (np.zeros((12, 2), complex), "complex128"))
    labels = (
        (eye[:10] % 3, "'labels' has shape (10,), the modalities have 12 rows"),
        (objects, "no objects"),
        (None, "no array 'labels'"),
        (eye % 3 - 1, "row 0 has the label -1"),
        (eye % 3 / 2, "labels are float64"),
        (eye % 3 * 50, "label 100 in 12 rows"),
        (np.array(["a", "", "b"] * 4), "row 1 has no label"),
        (rare, "class '2' has 1 sample, as have 2 of 4 classes"))
    names = (  # labels, names, message
        (eye % 3, "ab", "row 2 has the label 2, which is none of the 2 label_names"),
        (np.array(["a", "c", "b"] * 4), "ab", "row 1 has the label c, which is none of"),
        (eye % 3, "aba", "must differ"),
        (rare, "abcd", "class 'c' has 1 sample"))
    cases = [
        ({"stream": arrays["stream"][:11]}, "'stream' has shape (11, 8, 3), 'table' has 12 rows"),
        ({"groups": np.zeros((12, 1))}, "'groups' has shape (12, 1)"),
        ({"groups": np.where(eye == 5, np.nan, 1)}, "NaN in row 5"),
        ({"ids": np.array([["a"]] * 12)}, "'ids' is <U1, numbers"),
        ({"stream": objects}, "no objects"),
        (dict.fromkeys(arrays), "holds no modality"),
        ({"present_stream": np.ones(12)}, "'present_stream' is float64"),
        ({"present_sound": eye > 0}, "'present_sound' belongs to no"),
        ({"present_stream": eye[:9] > 0}, "'present_stream' has shape (9,)"),
        (no_modality, "1 rows have no modality at all, the first is 7")]
    cases += [({"table": array}, message) for array, message in tables]
    cases += [({"labels": array}, message) for array, message in labels]
    for array, letters, message in names:
        cases.append(({"labels": array, "label_names": np.array(list(letters))}, message))
    with folder() as f:
        path = f / "set.npz"
        for change, message in cases:
            write_modalities(path, change)
            refuses(message, lambda: read_modalities(path))
        refuses("is no file", lambda: read_modalities(f / "none.npz"))
        whole = write_modalities(path).read_bytes()
        for damaged in (b"", b"labels,table", whole[: len(whole) // 2],
                        whole.replace(b"PK", b"KP", 1)):
            path.write_bytes(damaged)
            refuses("not a readable .npz", lambda: read_modalities(path))
        np.save(f / "set.npy", np.zeros(3))
        refuses("not a readable .npz", lambda: read_modalities(f / "set.npy"))


def test_data_modalities_without_labels_are_read_for_prediction():
    with folder() as f:
        for labels in (None, np.array([f"new {i}" for i in range(12)])):
            path = write_modalities(f / "set.npz", {"labels": labels})
            arrays, labels, groups, names, _ = read_modalities(path, need_labels=False)
            assert list(arrays) == list(modal_arrays()) and len(groups) == 12
            assert labels is None and names == []


def test_data_modalities_with_their_channels_last_are_warned_of():
    with folder() as f:
        for shape, suspicious in (((12, 6, 8, 3), True), ((12, 2, 6, 8, 3), True),
                                  ((12, 3, 6, 8), False)):
            path = write_modalities(f / "set.npz", {"photo": np.zeros(shape)})
            _, text = warned(lambda: read_modalities(path))
            assert text.count("channels come last") == suspicious and bool(text) == suspicious


def test_data_channel_statistics_equal_numpy_over_the_training_rows_only():
    rows = np.array([7, 2, 3, 11, 5])
    for name, array in modal_arrays().items():
        expected = np.concatenate(channels_last(array[rows]))
        for chunk in (1, 40, 2**21):
            mean, sd = data.channel_statistics(array, rows, chunk=chunk)
            assert mean.dtype == sd.dtype == torch.float64
            assert mean.shape == sd.shape == expected.shape[1:]
            assert near(mean, expected.mean(0), 1e-12) and near(sd, expected.std(0), 1e-12)
        plain = data.channel_statistics(array, rows)
        other = array.copy()
        other[np.setdiff1d(np.arange(12), rows)] = 99
        assert same_bits(data.channel_statistics(other, rows), plain), name
        present = np.ones(12, dtype=bool)
        present[[3, 5, 6]] = False
        expected = data.channel_statistics(array, [7, 2, 11])
        assert same_bits(data.channel_statistics(array, rows, present), expected), name


def test_data_channel_statistics_of_constant_huge_and_no_values():
    # A clock in seconds: squares have 19 digits.
    array = np.random.default_rng(0).normal(1.7e9, 2.0, (500, 3))
    array[:, 1] = 0.1
    mean, sd = data.channel_statistics(array, np.arange(500), chunk=100)
    assert sd[1] == 1 and near(mean[1], 0.1, 1e-12)
    assert near(sd[[0, 2]], array[:, [0, 2]].std(0), 1e-6)
    absent = np.zeros(4, dtype=bool)
    mean, sd = data.channel_statistics(np.full((4, 3), np.nan), np.arange(4), absent)
    assert mean.tolist() == [0, 0, 0] and sd.tolist() == [1, 1, 1]


def modal_split(rows=np.arange(12), **options):
    arrays = modal_arrays()
    scaler = {name: data.channel_statistics(array, rows) for name, array in arrays.items()}
    return ModalSplit(arrays, np.arange(12) % 3, rows, **({"scaler": scaler} | options))


def test_data_modal_split_standardises_each_channel_by_the_training_rows():
    train, rest = np.array([8, 1, 4, 10, 6, 3]), np.array([0, 2, 5])
    split = modal_split(train, groups=np.arange(12) // 3)
    batch = split.batch(np.arange(6))
    targets = batch["targets"]
    assert len(split) == 6 and split.groups.tolist() == (train // 3).tolist()
    assert targets.dtype == torch.int64
    assert split.labels.tolist() == targets.tolist() == (train % 3).tolist()
    for name, array in modal_arrays().items():
        x = batch["inputs"][name]
        assert x.dtype == torch.float32 and x.shape == (6, *array.shape[1:])
        assert batch["present"][name].tolist() == [True] * 6
        flat = np.concatenate(channels_last(x.numpy()))
        assert np.abs(flat.mean(0)).max() < 1e-6 and near(flat.std(0), 1, 1e-5), name
    other = ModalSplit(modal_arrays(), None, rest, scaler=split.scaler).batch([2, 0])
    assert sorted(other) == ["encoded", "inputs", "present"] and not other["encoded"]
    mean, sd = (values[:, None, None].numpy() for values in split.scaler["photo"])
    photo = modal_arrays()["photo"][[5, 0]]
    assert near(other["inputs"]["photo"], (photo - mean) / sd, 1e-5)


def test_data_modal_split_without_a_scaler_gives_the_values_and_keeps_a_large_offset_exact():
    arrays, every = modal_arrays(), np.arange(12)
    arrays["swapped"] = np.arange(24, dtype=">f4").reshape(12, 2)
    arrays["wide"] = np.arange(12, dtype=np.uint16)[:, None]
    inputs = ModalSplit(arrays, None, every).batch([3, 5])["inputs"]
    for name, x in inputs.items():
        values = arrays[name][[3, 5]].astype(np.float32)
        assert x.dtype == torch.float32 and np.array_equal(x, values)
    # float32 has steps of 128 at 1.7e9.
    clock = 1.7e9 + np.random.default_rng(0).normal(size=(12, 6, 1))
    scaler = {"clock": data.channel_statistics(clock, every)}
    split = ModalSplit({"clock": clock}, None, every, scaler=scaler)
    x = split.batch(every)["inputs"]["clock"]
    assert near(x, (clock - clock.mean()) / clock.std(), 1e-5)


def test_data_modal_split_shows_nothing_of_an_absent_row_and_says_that_it_is_absent():
    every = np.arange(12)
    present = {"film": every % 3 != 0, "table": every != 4}
    for fill in (np.nan, 1e30):
        arrays = modal_arrays()
        arrays["film"][~present["film"]] = fill
        scaler = {}
        for name, array in arrays.items():
            scaler[name] = data.channel_statistics(array, every, present.get(name))
        split = ModalSplit(arrays, None, every, present=present, scaler=scaler,
                           noise=0.5, scale=0.3, shift=2)
        for generator in (None, seeded()):
            batch = split.batch([0, 4, 5], generator)
            assert {name: mask.tolist() for name, mask in batch["present"].items()} == {
                "table": [True, False, True], "stream": [True] * 3, "photo": [True] * 3,
                "film": [False, True, True]}
            for name, x in batch["inputs"].items():
                assert torch.isfinite(x).all()
                zero = torch.stack([(row == 0).all() for row in x])
                assert torch.equal(zero, ~batch["present"][name]), name


def test_data_modal_split_augments_with_a_generator_only_and_as_it_is_told():
    n, every = 400, np.arange(400)
    rng = np.random.default_rng(0)
    shapes = {"sound": (n, 20, 2), "motion": (n, 20, 3), "slow": (n, 5, 1), "table": (n, 4),
              "photo": (n, 2, 6, 6)}
    arrays = {}
    for name, shape in shapes.items():
        arrays[name] = rng.normal(1, 1, shape).astype(np.float32)
    copies = {name: array.copy() for name, array in arrays.items()}
    settings = {"noise": 0.2, "scale": 0.1, "shift": 3}

    def inputs_of(generator=None, **options):
        return ModalSplit(arrays, None, every, **options).batch(every, generator)["inputs"]

    plain = inputs_of()
    for other in (inputs_of(), inputs_of(**settings), inputs_of(seeded())):
        assert same_bits(other, plain)
    first, again, other = (inputs_of(seeded(k), **settings) for k in (0, 0, 1))
    assert same_bits(first, again)
    assert not any(torch.equal(first[name], other[name]) for name in first)

    for name, x in inputs_of(seeded(), noise=0.2).items():
        noise = x - plain[name]
        assert near(float(noise.std()), 0.2, 0.05) and abs(float(noise.mean())) < 0.02
    scaled = inputs_of(seeded(), scale=0.3)
    factors = {name: (x / plain[name]).flatten(1) for name, x in scaled.items()}
    for factor in factors.values():  # one per row and modality
        assert near(factor, factor[:, :1].expand_as(factor), 1e-4)
        assert 0.7 <= factor.min() < 0.72 and 1.28 < factor.max() <= 1.3001
    pair = torch.stack([factors["sound"][:, 0], factors["photo"][:, 0]])
    assert abs(float(torch.corrcoef(pair)[0, 1])) < 0.15

    rolled, steps = inputs_of(seeded(), shift=3), []
    for row in range(n):
        sound = plain["sound"][row]
        [step] = [k for k in range(-3, 4) if torch.equal(rolled["sound"][row], sound.roll(k, 0))]
        for name in ("motion", "slow"):
            assert torch.equal(rolled[name][row], plain[name][row].roll(step, 0))
        steps.append(step)
    assert set(steps) == set(range(-3, 4)) and np.bincount(np.array(steps) + 3).max() < 90
    for name in ("table", "photo"):
        assert torch.equal(rolled[name], plain[name])
    for name, array in arrays.items():  # the store is never written to
        assert np.array_equal(array, copies[name])
    for name, wrong in (("noise", -0.1), ("scale", 1.0), ("shift", -1), ("shift", 1.5),
                        ("noise", math.nan)):
        refuses("0 is off", lambda: inputs_of(**{name: wrong}))


def test_data_synthetic_modalities_tell_the_class_in_part_alone_and_well_together():
    for seed in (0, 1):
        arrays, labels, groups, _, _ = synthetic_modalities(seed=seed)
        train, test = data.split_by_group(groups, (0.7, 0.3), seed=seed)
        majority = np.bincount(labels[test]).max() / len(test)
        alone = [ridge_accuracy([array], labels, train, test) for array in arrays.values()]
        together = ridge_accuracy(arrays.values(), labels, train, test)
        assert majority < 0.3 and majority + 0.05 < min(alone) and max(alone) < 0.6, alone
        assert together > 0.82, together


def test_data_synthetic_modalities_are_fixed_by_their_seed_and_read_back_the_same():
    def twin(seed):
        return synthetic_modalities(100, classes=5, missing=0.4, seed=seed)

    arrays, labels, groups, names, present = twin(3)
    assert {name: (array.shape[1:], array.dtype.name) for name, array in arrays.items()} == {
        "video": ((4, 3, 16, 16), "uint8"), "image": ((3, 24, 24), "uint8"),
        "audio": ((24, 16), "float32"), "sensor": ((64, 6), "float32")}
    counts = np.bincount(labels)
    assert labels.dtype == np.int64 and len(counts) == len(names) == 5
    assert 1.8 < counts[0] / counts[-1] < 2.3
    assert np.unique(groups, return_counts=True)[1].tolist() == [25] * 4
    assert min(len(set(labels[groups == group])) for group in groups) > 1
    lacking = 1 - np.mean(list(present.values()), axis=0)
    assert set(lacking) == {0, 0.25} and 0.25 < (lacking > 0).mean() < 0.55
    assert np.isnan(arrays["audio"][~present["audio"]]).all()
    assert (arrays["video"][~present["video"]] == 0).all()
    with folder() as f:
        masks = {f"present_{name}": mask for name, mask in present.items()}
        labelled = {"labels": np.array(names)[labels], "label_names": np.array(names)}
        np.savez(f / "twin.npz", **arrays, **masks, **labelled, groups=groups)
        read = read_modalities(f / "twin.npz")
    for same in (read, twin(3)):
        for name, array in arrays.items():
            assert np.array_equal(same[0][name], array, equal_nan=array.dtype != np.uint8)
            assert np.array_equal(same[4][name], present[name])
        assert np.array_equal(same[1], labels) and np.array_equal(same[2], groups)
        assert same[3] == names
    other = twin(4)
    assert not np.array_equal(other[0]["image"], arrays["image"])
    assert not np.array_equal(other[1], labels)
    assert all(mask.all() for mask in synthetic_modalities(100)[4].values())
    for name, wrong in (("classes", 1), ("classes", 10), ("missing", 1.5), ("n", 20)):
        refuses("classes", lambda: synthetic_modalities(**{name: wrong}))


def test_data_band_energies_equal_a_loop_over_steps_and_frequencies():
    rng = np.random.default_rng(0)
    for steps, edges in ((128, (1, 2, 3, 4, 6, 10, 16, 26, 41, 65)), (12, (1, 2, 3, 4, 5, 6, 7))):
        x = rng.normal(size=(3, steps, 2)) + 5
        got = band_energies(torch.tensor(x))
        assert got.shape == (3, 2 * (len(edges) - 1))
        hann = [0.5 - 0.5 * math.cos(2 * math.pi * t / (steps - 1)) for t in range(steps)]
        for row, channel in itertools.product(range(3), range(2)):
            signal = x[row, :, channel] - x[row, :, channel].mean()
            for band, (low, high) in enumerate(zip(edges, edges[1:])):
                energies = []
                for k in range(low, high):
                    turns = [cmath.exp(-2j * math.pi * k * t / steps) for t in range(steps)]
                    value = sum(h * v * turn for h, v, turn in zip(hann, signal, turns))
                    energies.append(abs(value) ** 2 / sum(h * h for h in hann))
                want = math.log(sum(energies) / len(energies) + 1e-6)
                assert math.isclose(got[row, 2 * band + channel], want, abs_tol=1e-9)
    sine = torch.sin(2 * torch.pi * 8 * torch.arange(128) / 128)[None, :, None]
    assert band_energies(sine).argmax() == 4  # the number in the docstring
    assert band_energies(torch.ones(2, 1, 3)).shape == (2, 0)
    assert near(band_energies(3 + torch.zeros(1, 128, 1)), torch.full((1, 9), math.log(1e-6)), 1e-6)


def test_data_gravity_frame_equals_a_loop_and_does_not_see_how_the_phone_lies():
    rng = np.random.default_rng(1)
    x, gravity = rng.normal(size=(2, 5, 3)), rng.normal(size=(2, 5, 3))
    gravity[0, 0] = 0
    got = gravity_frame(torch.tensor(x), torch.tensor(gravity))
    for row, step in itertools.product(range(2), range(5)):
        a, g = x[row, step], gravity[row, step]
        size = math.sqrt(sum(value**2 for value in g)) or 1.0
        along = sum(p * q / size for p, q in zip(a, g))
        across = math.sqrt(sum((p - along * q / size) ** 2 for p, q in zip(a, g)))
        want = [along, across, math.sqrt(sum(value**2 for value in a))]
        assert near(got[row, step], want, 1e-12)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    assert near(gravity_frame(torch.tensor(x @ turn), torch.tensor(gravity @ turn)), got, 1e-12)


def test_data_spectral_features_hold_every_sequence_and_the_frame_of_gravity():
    rng = np.random.default_rng(2)
    shape = (20, 32, 3)
    arrays = {name: rng.normal(size=shape).astype(np.float16)
              for name in ("gravity", "acceleration", "rotation", "attitude")}
    arrays |= {"features": rng.normal(size=(20, 7)), "image": rng.normal(size=(20, 3, 8, 8))}
    present = {"acceleration": np.arange(20) != 6}
    rows = np.array([3, 6, 15])
    scaler = {name: data.channel_statistics(array, np.arange(10)) for name, array in arrays.items()}
    split = ModalSplit(arrays, None, rows, present=present, scaler=scaler)
    got, columns = spectral_features(split), []
    for name in list(arrays)[:4]:
        mean, sd = (values.numpy() for values in scaler[name])
        columns.append(band_energies(torch.tensor((arrays[name][rows] - mean) / sd)))
    for name in ("acceleration", "rotation"):
        x, g = (torch.tensor(arrays[key][rows].astype(float)) for key in (name, "gravity"))
        columns.append(band_energies(gravity_frame(x, g)))
    columns[1][1] = columns[4][1] = math.nan
    want = torch.cat(columns, 1).numpy()
    assert np.array_equal(np.isnan(got), np.isnan(want))
    assert near(np.nan_to_num(got), np.nan_to_num(want), 1e-4)
    alone = ModalSplit({"features": arrays["features"]}, None, rows)
    assert spectral_features(alone).shape == (3, 0)
    split = ModalSplit({name: arrays[name] for name in ("acceleration", "rotation")}, None, rows)
    assert spectral_features(split).shape == (3, 2 * columns[1].shape[1])


def test_data_window_statistics_are_those_of_a_loop_over_the_steps():
    x = np.random.default_rng(3).normal(size=(2, 48, 3)) * [1, 5, 0] + [0, 2, 7]
    got = window_statistics(torch.tensor(x)).numpy()
    lags = range(2, 15, 2)  # of 48 steps
    for row, channel in itertools.product(range(2), range(3)):
        values = x[row, :, channel]
        z, variance = values - values.mean(), values.var()
        columns = [values.mean(), math.sqrt(variance)]
        energies = band_energies(torch.tensor(x[row : row + 1, :, channel, None]))[0].tolist()
        columns += energies
        for lag in lags:
            products = [z[t] * z[t + lag] for t in range(48 - lag)]
            columns.append(sum(products) / len(products) / (variance + 1e-6))
        assert near(got[row, channel::3], np.array(columns), 1e-9)
    sine = torch.sin(2 * torch.pi * 8 * torch.arange(480.0) / 480)[None, :, None]
    correlation = window_statistics(sine)[0, -7:]
    assert near(correlation[[0, 2, 5, 6]], torch.tensor([-0.5, 1, 1, -0.5]), 0.05)
    assert window_statistics(torch.ones(2, 1, 3)).shape == (2, 6)  # a step: mean and sd alone


def test_data_whitening_is_the_inverse_root_of_the_spread_within_classes():
    rng = np.random.default_rng(4)
    labels = rng.integers(0, 3, 600)
    x = (rng.normal(size=(600, 5)) + 3 * np.eye(5)[labels]) @ rng.normal(size=(5, 5)) * 100 + 7
    x[:, 4] = x[:, 3] * 2 + 1e-7 * x[:, 4]  # nearly a copy
    x[5, 0] = math.nan
    fit = fit_whitening(x, labels, ridge=0.2)
    z = np.empty_like(x)
    for column in range(5):
        values = x[~np.isnan(x[:, column]), column]
        z[:, column] = (x[:, column] - values.mean()) / values.std()
    z = np.clip(np.nan_to_num(z), -6, 6)
    spread = np.zeros((5, 5))
    for row, label in zip(z, labels):
        away = row - z[labels == label].mean(0)
        spread += np.outer(away, away) / 600
    u, sizes, _ = np.linalg.svd(spread + 0.2 * np.eye(5))
    y = z @ (u / np.sqrt(sizes)) @ u.T
    want = torch.tensor((y / y.std(0)).clip(-6, 6))
    got = whitened(torch.tensor(x), fit)
    assert got.dtype == torch.float32 and near(got, want, 1e-5)
    assert torch.equal(whitened(torch.full((1, 5), math.nan), fit), torch.zeros(1, 5))
    assert whitened(torch.tensor(np.nan_to_num(x) * 1e6), fit).abs().max() <= 6
    constant = fit_whitening(np.ones((6, 2)), np.arange(6) % 2)
    assert torch.equal(whitened(torch.ones(1, 2), constant), torch.zeros(1, 2))
