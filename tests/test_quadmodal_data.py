"""Tests of quadmodal_data."""

import math
import warnings

import numpy as np
import torch

import data
from tasks import quadmodal
from tests.helpers import (
    channels_last, folder, is_mapped, near, quad_npz, raises, ridge_accuracy, same_bits, seeded)


def test_data_cache_maps_the_modalities_of_an_npz():
    with folder() as f:
        present = np.arange(240) % 3 > 0
        path = quad_npz(f / "modal.npz", change=lambda arrays: arrays | {"present_audio": present})
        plain = quadmodal.read_modalities(path)
        for _ in range(2):
            arrays, labels, groups, names, masks = quadmodal.read_modalities(path, cache=f / "cache")
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
    return {"table": rng.integers(0, 9, (n, 5)), "stream": rng.normal(size=(n, 8, 3)).astype(np.float16),
            "photo": rng.integers(0, 256, (n, 3, 6, 4), dtype=np.uint8), "film": rng.normal(size=(n, 2, 1, 4, 4)).astype(np.float32)}


def write_modalities(path, changes=None, n=12):
    """A good file of four modalities, three classes and four recordings, with changes; None leaves an array out."""
    content = modal_arrays(n) | {"labels": np.arange(n) % 3, "groups": np.arange(n) // 3} | (changes or {})
    np.savez(path, **{name: array for name, array in content.items() if array is not None})
    return path


def test_data_modalities_are_read_as_they_were_saved_two_four_or_seven():
    with folder() as f:
        more = {f"extra {i}": np.arange(24.0).reshape(12, 2) for i in range(3)}
        for change in ({"film": None, "photo": None}, {}, more):
            expected = {name: array for name, array in (modal_arrays() | change).items() if array is not None}
            arrays, labels, groups, names, present = quadmodal.read_modalities(write_modalities(f / "set.npz", change))
            assert list(arrays) == list(expected) == list(present) and names == ["0", "1", "2"]
            assert all(arrays[name].dtype == array.dtype and np.array_equal(arrays[name], array) for name, array in expected.items())
            assert labels.dtype == np.int64 and labels.tolist() == [0, 1, 2] * 4 and groups.tolist() == [i // 3 for i in range(12)]
            assert all(each.dtype == bool and each.all() and each.shape == (12,) for each in present.values())
        path = write_modalities(f / "set.npz", {"groups": None, "label_names": np.array(["lie", "sit", "run", "fly"])})
        assert quadmodal.read_modalities(path)[2] is None and quadmodal.read_modalities(path)[3] == ["lie", "sit", "run", "fly"]


def test_data_modality_labels_may_be_strings_in_sorted_order_or_that_of_their_names():
    words = np.array(["walk", "sit", "jog"] * 4)
    with folder() as f:
        for labels, names, expected, listed in (
                (words, None, [2, 1, 0] * 4, ["jog", "sit", "walk"]), (words.astype("S"), None, [2, 1, 0] * 4, ["jog", "sit", "walk"]),
                (words, ["walk", "fly", "jog", "sit"], [0, 3, 2] * 4, ["walk", "fly", "jog", "sit"]),
                (np.arange(12, dtype=np.uint8) % 2 * 255, [f"{i}" for i in range(256)], [0, 255] * 6, [f"{i}" for i in range(256)]),
                (np.arange(12) % 2 == 0, None, [1, 0] * 6, ["0", "1"])):
            path = write_modalities(f / "set.npz", {"labels": labels, "label_names": None if names is None else np.array(names)})
            _, read, _, shown, _ = quadmodal.read_modalities(path)
            assert read.tolist() == expected and shown == listed and read.dtype == np.int64
        write_modalities(f / "set.npz", {"labels": words[::-1]})
        assert quadmodal.read_modalities(f / "set.npz")[1].tolist() == [0, 1, 2] * 4  # numbers belong to names, whatever the order of rows


def test_data_modalities_absent_in_a_row_are_told_by_their_mask_alone():
    film, here = modal_arrays()["film"], np.arange(12) % 4 != 1
    film[~here] = np.nan
    with folder() as f:
        path = write_modalities(f / "set.npz", {"film": film, "present_film": here})
        arrays, _, _, _, present = quadmodal.read_modalities(path)
        assert list(arrays) == ["table", "stream", "photo", "film"] and np.array_equal(present["film"], here) and present["photo"].all()
        film[4, 0, 0, 1, 1], here[9] = np.inf, True
        write_modalities(f / "set.npz", {"film": film, "present_film": here})
        raises(ValueError, "'film' holds 33 NaN or infinite values, the first in row 4", lambda: quadmodal.read_modalities(path))


def test_data_modalities_name_what_is_wrong_with_a_file():
    arrays, eye = modal_arrays(), np.arange(12)
    alone, objects = np.array([0, 1, 2, 3] + [0, 1] * 4), np.array([None] * 12)
    cases = [
        ({"stream": arrays["stream"][:11]}, "'stream' has shape (11, 8, 3), 'table' has 12 rows"),
        ({"labels": eye[:10] % 3}, "'labels' has shape (10,), the modalities have 12 rows"),
        ({"groups": np.zeros((12, 1))}, "'groups' has shape (12, 1)"), ({"groups": np.where(eye == 5, np.nan, 1)}, "NaN in row 5"),
        ({"table": eye}, "'table' has shape (12,), expected (n, F)"), ({"table": np.zeros((12, 0))}, "shape (12, 0)"),
        ({"table": np.zeros((12,) + (1,) * 5)}, "'table' has shape"), ({"table": np.array(5.0)}, "'table' has shape ()"),
        ({"ids": np.array([["a"]] * 12)}, "'ids' is <U1, numbers"), ({"table": np.zeros((12, 2), complex)}, "complex128"),
        ({"stream": objects}, "no objects"), ({"labels": objects}, "no objects"),
        (dict.fromkeys(arrays), "holds no modality"), ({"labels": None}, "no array 'labels'"),
        ({"labels": eye % 3 - 1}, "row 0 has the label -1"), ({"labels": eye % 3 / 2}, "labels are float64"),
        ({"labels": eye % 3 * 50}, "label 100 in 12 rows"), ({"labels": np.array(["a", "", "b"] * 4)}, "row 1 has no label"),
        ({"label_names": np.array(["a", "b"])}, "row 2 has the label 2, which is none of the 2 label_names"),
        ({"labels": np.array(["a", "c", "b"] * 4), "label_names": np.array(["a", "b"])}, "row 1 has the label c, which is none of"),
        ({"label_names": np.array(["a", "b", "a"])}, "must differ"),
        ({"labels": alone}, "class '2' has 1 sample, as have 2 of 4 classes"),
        ({"labels": alone, "label_names": np.array(["a", "b", "c", "d"])}, "class 'c' has 1 sample"),
        ({"present_stream": np.ones(12)}, "'present_stream' is float64"), ({"present_sound": eye > 0}, "'present_sound' belongs to no"),
        ({"present_stream": eye[:9] > 0}, "'present_stream' has shape (9,)"),
        (dict.fromkeys([f"present_{name}" for name in arrays], eye != 7), "1 rows have no modality at all, the first is 7")]
    with folder() as f:
        for change, message in cases:
            write_modalities(f / "set.npz", change)
            raises(ValueError, message, lambda: quadmodal.read_modalities(f / "set.npz"))
        raises(ValueError, "is no file", lambda: quadmodal.read_modalities(f / "none.npz"))
        whole = write_modalities(f / "set.npz").read_bytes()
        for damaged in (b"", b"labels,table", whole[: len(whole) // 2], whole.replace(b"PK", b"KP", 1)):
            (f / "set.npz").write_bytes(damaged)
            raises(ValueError, "not a readable .npz", lambda: quadmodal.read_modalities(f / "set.npz"))
        np.save(f / "set.npy", np.zeros(3))
        raises(ValueError, "not a readable .npz", lambda: quadmodal.read_modalities(f / "set.npy"))


def test_data_modalities_without_labels_are_read_for_prediction():
    with folder() as f:
        for change in ({"labels": None}, {"labels": np.array([f"new {i}" for i in range(12)])}):
            arrays, labels, groups, names, _ = quadmodal.read_modalities(write_modalities(f / "set.npz", change), need_labels=False)
            assert list(arrays) == list(modal_arrays()) and labels is None and names == [] and len(groups) == 12


def test_data_modalities_with_their_channels_last_are_warned_of():
    with folder() as f:
        for array, warned in ((np.zeros((12, 6, 8, 3)), True), (np.zeros((12, 2, 6, 8, 3)), True), (np.zeros((12, 3, 6, 8)), False)):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                quadmodal.read_modalities(write_modalities(f / "set.npz", {"photo": array}))
            assert ["channels come last" in str(each.message) for each in caught] == [True] * warned


def test_data_channel_statistics_equal_numpy_over_the_training_rows_only():
    rows = np.array([7, 2, 3, 11, 5])
    for name, array in modal_arrays().items():
        expected = np.concatenate(channels_last(array[rows]))
        for chunk in (1, 40, 2**21):
            mean, sd = data.channel_statistics(array, rows, chunk=chunk)
            assert mean.dtype == sd.dtype == torch.float64 and mean.shape == sd.shape == expected.shape[1:]
            assert near(mean, expected.mean(0), 1e-12) and near(sd, expected.std(0), 1e-12)
        other = array.copy()
        other[np.setdiff1d(np.arange(12), rows)] = 99
        assert same_bits(data.channel_statistics(other, rows), data.channel_statistics(array, rows)), name
        present = np.ones(12, dtype=bool)
        present[[3, 5, 6]] = False
        assert same_bits(data.channel_statistics(array, rows, present), data.channel_statistics(array, [7, 2, 11])), name


def test_data_channel_statistics_of_constant_huge_and_no_values():
    array = np.random.default_rng(0).normal(1.7e9, 2.0, (500, 3))  # a clock in seconds: squares have 19 digits
    array[:, 1] = 0.1
    mean, sd = data.channel_statistics(array, np.arange(500), chunk=100)
    assert sd[1] == 1 and near(mean[1], 0.1, 1e-12) and near(sd[[0, 2]], array[:, [0, 2]].std(0), 1e-6)
    mean, sd = data.channel_statistics(np.full((4, 3), np.nan), np.arange(4), np.zeros(4, dtype=bool))
    assert mean.tolist() == [0, 0, 0] and sd.tolist() == [1, 1, 1]


def modal_split(rows=np.arange(12), **options):
    arrays = modal_arrays()
    scaler = {name: data.channel_statistics(array, rows) for name, array in arrays.items()}
    return quadmodal.ModalSplit(arrays, np.arange(12) % 3, rows, **({"scaler": scaler} | options))


def test_data_modal_split_standardises_each_channel_by_the_training_rows():
    train, rest = np.array([8, 1, 4, 10, 6, 3]), np.array([0, 2, 5])
    split = modal_split(train, groups=np.arange(12) // 3)
    batch = split.batch(np.arange(6))
    assert len(split) == 6 and split.labels.tolist() == (train % 3).tolist() and split.groups.tolist() == (train // 3).tolist()
    assert batch["targets"].dtype == torch.int64 and batch["targets"].tolist() == (train % 3).tolist()
    for name, array in modal_arrays().items():
        x = batch["inputs"][name]
        assert x.dtype == torch.float32 and x.shape == (6, *array.shape[1:]) and batch["present"][name].tolist() == [True] * 6
        flat = np.concatenate(channels_last(x.numpy()))
        assert np.abs(flat.mean(0)).max() < 1e-6 and near(flat.std(0), 1, 1e-5), name
    other = quadmodal.ModalSplit(modal_arrays(), None, rest, scaler=split.scaler).batch([2, 0])
    assert sorted(other) == ["encoded", "inputs", "present"] and not other["encoded"]
    mean, sd = (each[:, None, None].numpy() for each in split.scaler["photo"])
    assert near(other["inputs"]["photo"], (modal_arrays()["photo"][[5, 0]] - mean) / sd, 1e-5)


def test_data_modal_split_without_a_scaler_gives_the_values_and_keeps_a_large_offset_exact():
    arrays = modal_arrays() | {"swapped": np.arange(24, dtype=">f4").reshape(12, 2), "wide": np.arange(12, dtype=np.uint16)[:, None]}
    inputs = quadmodal.ModalSplit(arrays, None, np.arange(12)).batch([3, 5])["inputs"]
    assert all(x.dtype == torch.float32 and np.array_equal(x, arrays[name][[3, 5]].astype(np.float32)) for name, x in inputs.items())
    clock = 1.7e9 + np.random.default_rng(0).normal(size=(12, 6, 1))  # float32 counts 1.7e9 in steps of 128
    scaler = {"clock": data.channel_statistics(clock, np.arange(12))}
    x = quadmodal.ModalSplit({"clock": clock}, None, np.arange(12), scaler=scaler).batch(np.arange(12))["inputs"]["clock"]
    assert near(x, (clock - clock.mean()) / clock.std(), 1e-5)


def test_data_modal_split_shows_nothing_of_an_absent_row_and_says_that_it_is_absent():
    present = {"film": np.arange(12) % 3 != 0, "table": np.arange(12) != 4}
    for fill in (np.nan, 1e30):
        arrays = modal_arrays()
        arrays["film"][~present["film"]] = fill
        scaler = {name: data.channel_statistics(array, np.arange(12), present.get(name)) for name, array in arrays.items()}
        split = quadmodal.ModalSplit(arrays, None, np.arange(12), present=present, scaler=scaler, noise=0.5, scale=0.3, shift=2)
        for generator in (None, seeded()):
            batch = split.batch([0, 4, 5], generator)
            assert {name: here.tolist() for name, here in batch["present"].items()} == {
                "table": [True, False, True], "stream": [True] * 3, "photo": [True] * 3, "film": [False, True, True]}
            for name, x in batch["inputs"].items():
                assert torch.isfinite(x).all()
                assert [bool((row == 0).all()) for row in x] == [not here for here in batch["present"][name].tolist()], name


def test_data_modal_split_augments_with_a_generator_only_and_as_it_is_told():
    n, every = 400, np.arange(400)
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(1, 1, shape).astype(np.float32) for name, shape in {
        "sound": (n, 20, 2), "motion": (n, 20, 3), "slow": (n, 5, 1), "table": (n, 4), "photo": (n, 2, 6, 6)}.items()}
    kept = {name: array.copy() for name, array in arrays.items()}
    of = lambda **options: quadmodal.ModalSplit(arrays, None, every, **options)
    plain = of().batch(every)["inputs"]
    for options in ({}, {"noise": 0.2, "scale": 0.1, "shift": 3}):
        assert all(torch.equal(x, plain[name]) for name, x in of(**options).batch(every)["inputs"].items())
    assert all(torch.equal(x, plain[name]) for name, x in of().batch(every, seeded())["inputs"].items())
    first, again, other = (of(noise=0.2, scale=0.1, shift=3).batch(every, seeded(k))["inputs"] for k in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name]) for name in first)

    for name, x in of(noise=0.2).batch(every, seeded())["inputs"].items():
        assert near(float((x - plain[name]).std()), 0.2, 0.05) and abs(float((x - plain[name]).mean())) < 0.02
    factors = {name: (x / plain[name]).flatten(1) for name, x in of(scale=0.3).batch(every, seeded())["inputs"].items()}
    for factor in factors.values():  # one per row and modality
        assert near(factor, factor[:, :1].expand_as(factor), 1e-4)
        assert 0.7 <= factor.min() < 0.72 and 1.28 < factor.max() <= 1.3001
    assert abs(float(torch.corrcoef(torch.stack([factors["sound"][:, 0], factors["photo"][:, 0]]))[0, 1])) < 0.15

    rolled, steps = of(shift=3).batch(every, seeded())["inputs"], []
    for row in range(n):
        fits = [k for k in range(-3, 4) if torch.equal(rolled["sound"][row], plain["sound"][row].roll(k, 0))]
        assert len(fits) == 1 and torch.equal(rolled["motion"][row], plain["motion"][row].roll(fits[0], 0))
        assert torch.equal(rolled["slow"][row], plain["slow"][row].roll(fits[0], 0))
        steps += fits
    assert set(steps) == set(range(-3, 4)) and np.bincount(np.array(steps) + 3).max() < 90
    assert torch.equal(rolled["table"], plain["table"]) and torch.equal(rolled["photo"], plain["photo"])
    assert all(np.array_equal(arrays[name], kept[name]) for name in arrays)  # the store is never written to
    for wrong in ({"noise": -0.1}, {"scale": 1.0}, {"shift": -1}, {"shift": 1.5}, {"noise": math.nan}):
        raises(ValueError, "0 is off", lambda: of(**wrong))


def test_data_synthetic_modalities_tell_the_class_in_part_alone_and_well_together():
    for seed in (0, 1):
        arrays, labels, groups, _, _ = quadmodal.synthetic_modalities(seed=seed)
        train, test = data.split_by_group(groups, (0.7, 0.3), seed=seed)
        majority = np.bincount(labels[test]).max() / len(test)
        alone = {name: ridge_accuracy([array], labels, train, test) for name, array in arrays.items()}
        together = ridge_accuracy(arrays.values(), labels, train, test)
        assert majority < 0.3 and min(alone.values()) > majority + 0.05 and max(alone.values()) < 0.6 and together > 0.82, (alone, together)


def test_data_synthetic_modalities_are_fixed_by_their_seed_and_read_back_the_same():
    twin = quadmodal.synthetic_modalities(100, classes=5, missing=0.4, seed=3)
    arrays, labels, groups, names, present = twin
    assert {name: (array.shape[1:], array.dtype.name) for name, array in arrays.items()} == {
        "video": ((4, 3, 16, 16), "uint8"), "image": ((3, 24, 24), "uint8"), "audio": ((24, 16), "float32"), "sensor": ((64, 6), "float32")}
    counts = np.bincount(labels)
    assert labels.dtype == np.int64 and len(counts) == 5 and 1.8 < counts[0] / counts[-1] < 2.3 and len(names) == 5
    assert np.unique(groups, return_counts=True)[1].tolist() == [25] * 4 and min(len(set(labels[groups == g])) for g in groups) > 1
    lacking = 1 - np.mean(list(present.values()), axis=0)
    assert set(lacking) == {0, 0.25} and 0.25 < (lacking > 0).mean() < 0.55
    assert np.isnan(arrays["audio"][~present["audio"]]).all() and (arrays["video"][~present["video"]] == 0).all()
    with folder() as f:
        masks = {f"present_{name}": mask for name, mask in present.items()}
        np.savez(f / "twin.npz", **arrays, **masks, labels=np.array(names)[labels], groups=groups, label_names=np.array(names))
        read = quadmodal.read_modalities(f / "twin.npz")
    again, other = (quadmodal.synthetic_modalities(100, classes=5, missing=0.4, seed=seed) for seed in (3, 4))
    for same in (read, again):
        assert all(np.array_equal(same[0][name], array, equal_nan=array.dtype != np.uint8) for name, array in arrays.items())
        assert np.array_equal(same[1], labels) and np.array_equal(same[2], groups) and same[3] == names
        assert all(np.array_equal(same[4][name], mask) for name, mask in present.items())
    assert not np.array_equal(other[0]["image"], arrays["image"]) and not np.array_equal(other[1], labels)
    assert all(each.all() for each in quadmodal.synthetic_modalities(100)[4].values())
    for wrong in ({"classes": 1}, {"classes": 10}, {"missing": 1.5}, {"n": 20}):
        raises(ValueError, "classes", lambda: quadmodal.synthetic_modalities(**wrong))
