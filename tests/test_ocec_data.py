"""Tests of ocec_data."""

import csv
from pathlib import Path

import numpy as np
import torch

import data
import losses
from tasks import faceparse
from tasks.ocec import read_eyes, read_pairs, synthetic_eyes
from tasks import quadmodal
from tests.helpers import (
    folder, make_class_folder, make_npz, near, need_pillow, need_real, refuses, warned)


def test_data_no_group_is_on_two_sides_of_a_split():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 60, 1000)
    splits = data.split_by_group(groups, (0.7, 0.1, 0.2), seed=3)
    assert sorted(np.concatenate(splits)) == list(range(1000))
    sides = [set(groups[rows]) for rows in splits]
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    shares = [len(rows) / 1000 for rows in splits]
    assert np.abs(np.array(shares) - (0.7, 0.1, 0.2)).max() < 0.05


def test_data_npz_of_colour_or_grey_eyes_is_read_as_it_is():
    with folder() as f:
        images, labels, groups, names = read_eyes(make_npz(f / "eyes.npz"), size=(12, 20))
        source = synthetic_eyes(60, size=(12, 20), seed=1)
        assert torch.equal(images, source[0])
        assert np.array_equal(labels, source[1]) and np.array_equal(groups, source[2])
        assert names[:2] == ["eyes.npz#0", "eyes.npz#1"] and images.is_contiguous()
        grey = source[0][:, 0].numpy()
        make_npz(f / "grey.npz", images=grey, groups=None)
        images, _, groups, _ = read_eyes(f / "grey.npz", size=(12, 20))
        assert groups is None and all(np.array_equal(images[:, c].numpy(), grey) for c in range(3))


def test_data_class_folder_and_annotation_give_the_same_eyes():
    with folder() as f:
        source, labels = make_class_folder(f / "eyes")
        images, read, groups, names = read_eyes(f / "eyes", size=(12, 20))
        order = [int(Path(name).stem) for name in names]
        assert torch.equal(images, source[order]) and groups is None
        assert np.array_equal(read, labels[order])
        with open(f / "eyes" / "annotation.csv", "w") as file:
            csv.writer(file).writerows(zip(names, read))
        with open(f / "eyes" / "groups.csv", "w") as file:
            faces = [(name, f"face{int(Path(name).stem) // 2}") for name in reversed(names)]
            csv.writer(file).writerows(faces)
        again, labels_again, groups, _ = read_eyes(f / "eyes", size=(12, 20))
        assert torch.equal(again, images) and np.array_equal(labels_again, read)
        assert groups.tolist() == [f"face{i // 2}" for i in order]


def test_data_cache_maps_the_same_pixels_and_is_keyed_by_the_file():
    with folder() as f:
        path = make_npz(f / "eyes.npz")
        plain = read_eyes(path, size=(16, 24))[0]

        def read():
            return read_eyes(path, size=(16, 24), cache=f / "cache")[0]

        for _ in range(2):
            assert torch.equal(read(), plain)
        decoded, unpacked = sorted((f / "cache").iterdir())
        for file, message in ((decoded, "decoded again"), (unpacked, "unpacked again")):
            for damaged in (b"", file.read_bytes()[:500]):
                file.write_bytes(damaged)
                images, said = warned(read)
                assert torch.equal(images, plain) and message in said, said
        before = decoded.read_bytes()
        read()[0] = 3  # memory-mapped, and copied where it is written to
        assert decoded.read_bytes() == before
        make_npz(path, n=58)
        assert len(read_eyes(path, size=(16, 24), cache=f / "cache")[0]) == 58


def test_data_read_pairs_names_the_file_that_is_no_csv():
    with folder() as f:
        for content in ("a.png,1\n".encode("utf-16"), "ä.png,1\n".encode("latin-1"),
                        b'"a.png,1\n' + b"b.png,0\n" * 20_000):
            (f / "annotation.csv").write_bytes(content)
            refuses(read_pairs, "annotation.csv is no CSV in UTF-8", f / "annotation.csv")


def test_data_synthetic_eyes_are_balanced_varied_and_fixed_by_the_seed():
    images, labels, groups, _ = synthetic_eyes(400)
    assert near(losses.binary_report(np.ones(400), labels)["f1"], 0.69, 0.01)
    assert torch.equal(images, synthetic_eyes(400)[0])
    assert not torch.equal(images, synthetic_eyes(400, seed=1)[0])
    assert all(len(set(labels[groups == face])) == 1 for face in np.unique(groups))
    # Brightness and contrast give little away.
    for statistic in (images.float().mean((1, 2, 3)), images.float().std((1, 2, 3))):
        area = losses.auroc(statistic.numpy(), labels)
        assert max(area, 1 - area) < 0.75, area


def test_data_real_eyes_are_read_whole():
    need_pillow()
    images, labels, groups, names = read_eyes(need_real("eyes_cew"))
    assert images.shape == (4846, 3, 32, 64)
    assert int(labels.sum()) == 2462 and len(set(groups)) == 2423
    images, labels, groups, _ = read_eyes(need_real("eyes_mrl/mrl_29_subjects.npz"), size=(48, 48))
    assert images.shape == (10949, 3, 48, 48) and len(set(groups)) == 29


def centre_column(masks, k):
    """The mean column of class k in each mask, NaN where it is absent."""
    inside = (masks == k).double()
    return (inside * torch.arange(masks.shape[-1])).sum((1, 2)) / inside.sum((1, 2))


def test_data_synthetic_left_parts_lie_right_of_the_right_ones_flipped_or_not():
    images, masks, _ = faceparse.synthetic_faces(200)
    _, flipped = data.horizontal_flip(
        images, p=1, generator=torch.Generator(), masks=masks, pairs=faceparse.FACE_PAIRS)
    for left, right in faceparse.FACE_PAIRS:
        for maps in (masks, flipped):
            distance = centre_column(maps, left) - centre_column(maps, right)
            distance = distance[~distance.isnan()]
            assert len(distance) > 50 and distance.min() > 8, (left, right, distance.min())
    # No image is its own mirror: the nose is off the middle of the eyes, one ear is often gone.
    middle = (centre_column(masks, 4) + centre_column(masks, 5)) / 2
    assert (centre_column(masks, 2) - middle).nan_to_num().abs().mean() > 2
    assert ((masks == 8).any((1, 2)) != (masks == 9).any((1, 2))).double().mean() > 0.2


def test_data_synthetic_left_and_right_parts_are_painted_alike():
    images, masks, _ = faceparse.synthetic_faces(400, size=(64, 64))
    for left, right in faceparse.FACE_PAIRS:
        means = []
        for k in (left, right):
            inside = (masks == k)[:, None]
            means.append((images * inside).sum((2, 3)) / inside.sum((2, 3)))
        sides = torch.stack(means)[:, ~torch.stack(means).isnan().any(0).any(1)]
        gap, spread = sides[0] - sides[1], sides.std(1)
        error = gap.std(0) / len(gap) ** 0.5  # of light from one side, of gaze and of noise
        assert len(gap) > 100 and error.max() < 3
        assert (gap.mean(0).abs() < 3 * error).all(), (left, gap.mean(0), error)
        assert (spread[0] / spread[1] - 1).abs().max() < 0.15, (left, spread)


def test_data_synthetic_recordings_differ_more_than_their_rows():
    arrays, _, groups, _, _ = quadmodal.synthetic_modalities()
    level = {name: arrays[name].reshape(len(groups), -1).mean(1)
             for name in ("image", "video", "audio")}
    level["sensor"] = arrays["sensor"][:, :, 0].mean(1)
    for name, values in level.items():  # the share of the variance that lies between recordings
        means = {group: values[groups == group].mean() for group in np.unique(groups)}
        assert np.var([means[group] for group in groups]) / np.var(values) > 0.5, name


def test_data_csv_with_a_byte_order_mark_is_read_and_a_path_listed_twice_is_refused():
    with folder() as f:
        (f / "a.csv").write_bytes("\ufeffx.png,1\n\ny.png, 0\n".encode())
        assert read_pairs(f / "a.csv") == {"x.png": "1", "y.png": "0"}
        (f / "b.csv").write_text("x.png,1\n\nx.png,0\n")
        refuses(read_pairs, "line 3: x.png is listed twice", f / "b.csv")
