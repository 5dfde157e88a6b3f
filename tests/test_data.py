"""Tests of data."""

import io
import itertools
import json
import math
import zlib
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

from data import (
    LabelScaler, StratifiedBatchSampler, bucketed_batches, encode_png, hog_features, map_npy,
    numbered_groups, resize_uint8, sampler_report, shuffled_batches, split_by_group,
    stratified_batches, write_npy)
from tasks import faceparse
from tasks import ocec
from tasks import quadmodal
from tests.helpers import (
    folder, make_npz, near, need_pillow, need_real, padding, png_content, raises, random_images,
    refuses, ridge_accuracy, warned)


def test_data_split_is_fixed_by_its_seed_and_refuses_what_cannot_be_met():
    first, again, other = (
        split_by_group(np.arange(50), (0.8, 0.2), seed=seed) for seed in (1, 1, 2))
    assert [len(rows) for rows in first] == [40, 10]
    assert np.array_equal(first[1], again[1]) and not np.array_equal(first[1], other[1])
    whole = split_by_group(np.arange(9), (1.0, 0.0, 0.0), seed=0)
    assert [len(rows) for rows in whole] == [9, 0, 0]
    refuses(split_by_group, "add up to 1", np.arange(9), (0.8, 0.3), seed=0)
    refuses(split_by_group, "none of the 1 groups", np.zeros(9), (0.5, 0.5), seed=0)


def test_data_split_does_not_depend_on_how_groups_are_stored():
    persons = np.random.default_rng(0).integers(0, 40, 300)
    wanted = split_by_group(persons, (0.6, 0.2, 0.2), seed=1)
    for groups in (persons.astype(np.uint8), persons.astype(str), persons.tolist(),
                   persons.astype(str).astype(object), torch.from_numpy(persons),
                   [f"{person:03d}" for person in persons]):
        for got, want in zip(split_by_group(groups, (0.6, 0.2, 0.2), seed=1), wanted):
            assert np.array_equal(got, want)
    # not all integers: in the order of the strings
    named = [f"p{person}" for person in persons]
    by_name = np.unique(named, return_inverse=True)[1]
    for got, want in zip(split_by_group(np.array(named, object), (0.6, 0.4), seed=1),
                         split_by_group(by_name, (0.6, 0.4), seed=1)):
        assert np.array_equal(got, want)
    for groups in ([f"{10**20 + int(person)}" for person in persons], persons.astype(np.float32)):
        got = split_by_group(np.array(groups), (0.6, 0.2, 0.2), seed=1)
        assert all(map(np.array_equal, got, wanted))
    # 1 and 01 are two persons
    assert len(np.unique(numbered_groups(["1", "01", "2"]))) == 3


def test_data_shuffled_batches_hold_every_row_once():
    for n, size in ((10, 4), (12, 4), (7, 7), (5, 1)):
        batches = shuffled_batches(n, size, seed=0, epoch=0)
        assert sorted(np.concatenate(batches)) == list(range(n)) and len(batches) == -(-n // size)
        assert all(len(rows) == size for rows in batches[:-1])
    for rank in range(2):  # of 5 rows 2 each
        [rows] = shuffled_batches(5, 2, seed=0, epoch=0, rank=rank, world_size=2)
        assert len(rows) == 2
    even = shuffled_batches(13, 4, seed=0, epoch=0, even=True)
    assert [len(rows) for rows in even] == [4, 3, 3, 3]
    assert np.array_equal(np.concatenate(even),
                          np.concatenate(shuffled_batches(13, 4, seed=0, epoch=0)))


def balanced(plan, labels):
    return [np.bincount(labels[rows], minlength=labels.max() + 1) for rows in plan]


def plan_quietly(labels, size, **options):
    return warned(lambda: stratified_batches(labels, size, **options))[0]


def test_data_stratified_batches_keep_quota_and_length():
    labels = np.repeat([0, 1, 2], [97, 13, 5])
    for size in (6, 7, 31):
        plan = plan_quietly(labels, size, seed=1, epoch=0)
        assert len(plan) == -(-len(labels) // size) and all(len(rows) == size for rows in plan)
        for counts in balanced(plan, labels):
            assert counts.min() >= size // 3 and counts.max() <= size // 3 + 1
        total = np.sum(balanced(plan, labels), axis=0)
        assert total.max() - total.min() <= 1  # the remainder is handed round in turn


def test_data_stratified_batches_repeat_a_row_only_when_they_must():
    for counts, size in (((97, 13, 5), 7), ((50, 3), 9), ((9, 9), 4), ((40, 1), 6),
                         *(((550, 10, 8, 6, 5, 4), size) for size in (32, 31, 37, 5))):
        labels = np.repeat(np.arange(len(counts)), counts)
        for epoch in range(4):
            plan = plan_quietly(labels, size, seed=5, epoch=epoch)
            for rows in plan:
                for c, n in enumerate(counts):
                    mine = rows[labels[rows] == c]
                    if n >= len(mine):
                        assert len(set(mine)) == len(mine)
            order = np.concatenate(plan)
            for c, n in enumerate(counts):
                mine = order[labels[order] == c]
                for start in range(0, len(mine), n):  # one pass over the class after the other
                    assert len(set(mine[start : start + n])) == len(mine[start : start + n])


def test_data_stratified_batches_hold_two_classes_whatever_their_size():
    for counts in ((550, 10, 8, 6, 5, 4), (583, 2), (40, 1), (300, 1, 1), (9, 9, 9)):
        labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
        for size in (2, 3, 5, 7, 13, 31, 32, 37):  # a size below the number of classes as well
            for ranks in (1, 2):
                full = min(size, len(labels) // ranks)
                for rank in range(ranks):
                    for rows in plan_quietly(labels, full, seed=1, epoch=2, rank=rank,
                                             world_size=ranks):
                        present = len(set(labels[rows]))
                        assert len(rows) == full, (counts, size, ranks)
                        assert present == min(full, len(counts)), (counts, size, ranks)
    # With the sampler of the note, 16 of 18 batches hold one class.
    labels = np.repeat(np.arange(6), (550, 10, 8, 6, 5, 4))
    for epoch in range(3):
        plan = plan_quietly(labels, 32, seed=0, epoch=epoch)
        assert [len(set(labels[rows])) for rows in plan] == [6] * 19


def test_data_stratified_batches_of_one_class_are_shuffled_batches_that_are_full():
    for labels in (np.zeros(23, int), np.full(23, 4), np.array(["walk"] * 23)):
        plan = plan_quietly(labels, 7, seed=0, epoch=0)
        assert [len(rows) for rows in plan] == [7] * 4 and all(len(set(rows)) == 7 for rows in plan)
        assert set(np.concatenate(plan)) == set(range(23))


def slow_stratified(labels, size, seed, epoch):
    """Slot s takes a row of class s % k from its queue; a refill puts rows of the batch last.

    They come shuffled, but in the order of their use where the batch needs more than there are.
    """
    classes, rng = np.unique(labels), np.random.default_rng([seed, epoch])
    slots = -(-len(labels) // size) * size
    plan = [None] * slots
    for c, label in enumerate(classes):
        queue = []
        for s in range(c, slots, len(classes)):
            if not queue:
                start = s - s % size
                mine = range(start + (c - start) % len(classes), start + size, len(classes))
                rows, used = np.flatnonzero(labels == label), [plan[t] for t in mine if t < s]
                again = rng.permutation(rows).tolist()
                fresh = [row for row in again if row not in used]
                late = [row for row in again if row in used]
                queue = fresh + (used[-len(rows) :] if len(mine) > len(rows) else late)
            plan[s] = queue.pop(0)
    return np.reshape(plan, (-1, size))


def test_data_stratified_batches_equal_the_slow_version():
    rng = np.random.default_rng(0)
    for _ in range(60):
        labels = rng.choice(rng.integers(1, 9), size=rng.integers(40, 120)) ** 2
        size, seed, epoch = (int(x) for x in rng.integers(1, 40, 3))
        # The first kind takes the faster sort.
        for labels in (labels, labels - 3, labels * 70000, labels.astype(str)):
            plan = plan_quietly(labels, size, seed=seed, epoch=epoch)
            assert np.array_equal(plan, slow_stratified(labels, size, seed, epoch)), (labels, size)


def test_data_sampler_report_equals_counting_by_hand():
    labels = ["a", "b", "b", "c", "d"]
    assert sampler_report([[0, 1], torch.tensor([2, 2]), np.array([1, 2, 3, 1])], labels) == {
        "batches": 3, "rows": 8, "class_counts": {"a": 1, "b": 6, "c": 1, "d": 0},
        "largest_share": 0.75, "largest_batch_share": 1.0, "classes_min": 1,
        "classes_mean": 5 / 3, "single_class": 1, "repeats": 2, "never_drawn": 1}
    for batches in ([], [[0], []]):
        refuses(sampler_report, "nothing to report", batches, labels)


def test_data_sampler_report_sees_a_sorted_epoch_and_a_tail_of_one_class():
    labels = np.repeat(np.arange(6), (550, 10, 8, 6, 5, 4))
    report = sampler_report(stratified_batches(labels, 32, seed=0, epoch=0), labels)
    assert report["single_class"] == 0 and report["rows"] == 19 * 32
    assert report["classes_min"] == report["classes_mean"] == 6
    assert 0.16 < report["largest_share"] < 0.17 and report["largest_batch_share"] == 6 / 32
    # Quotas are 5 and 6: the class of 4 repeats rows in every batch, the class of 5 in some.
    assert 19 <= report["repeats"] <= 3 * 19
    assert report["never_drawn"] == 550 - report["class_counts"][0]
    in_order = [np.arange(start, min(start + 32, 583)) for start in range(0, 583, 32)]
    report = sampler_report(in_order, labels)
    assert report["single_class"] == 17 and report["classes_min"] == 1
    assert report["repeats"] == report["never_drawn"] == 0
    assert report["largest_share"] == 550 / 583
    assert report["class_counts"] == dict(enumerate((550, 10, 8, 6, 5, 4)))


def check_order(plan):
    """plan(seed, epoch) gives the same order again, and another one for each of nine pairs."""
    pairs = itertools.product(range(3), range(3))
    orders = [np.concatenate(plan(*pair)).tolist() for pair in pairs]
    assert np.concatenate(plan(0, 0)).tolist() == orders[0]
    assert len(set(map(tuple, orders))) == 9


def test_data_order_is_fixed_by_seed_and_epoch():
    labels = np.repeat([0, 1], [30, 20])
    check_order(lambda seed, epoch: stratified_batches(labels, 8, seed=seed, epoch=epoch))
    check_order(lambda seed, epoch: shuffled_batches(50, 8, seed=seed, epoch=epoch))


def test_data_ranks_together_are_one_process_with_the_whole_batch():
    labels = np.repeat([0, 1, 2], [70, 31, 22])
    for plan in (lambda size, **kw: stratified_batches(labels, size, seed=0, epoch=1, **kw),
                 lambda size, **kw: shuffled_batches(120, size, seed=0, epoch=1, **kw)):
        ranks = [plan(6, rank=rank, world_size=2) for rank in (0, 1)]
        whole = plan(12)
        assert len(ranks[0]) == len(ranks[1]) == len(whole)
        for a, b, rows in zip(*ranks, whole):
            assert not set(a) & set(b) and sorted([*a, *b]) == sorted(rows)


def test_data_stratified_batches_of_a_rank_repeat_a_row_only_when_they_must():
    cases = ((3, 5), 4, 2), ((3, 50), 4, 3), ((2, 9, 9), 6, 3), ((5, 80), 8, 3)
    for counts, size, ranks in cases:
        labels = np.repeat(np.arange(len(counts)), counts)
        for epoch, rank in itertools.product(range(10), range(ranks)):
            for rows in stratified_batches(labels, size, seed=1, epoch=epoch, rank=rank,
                                           world_size=ranks):
                for c, n in enumerate(counts):
                    mine = rows[labels[rows] == c]
                    assert len(set(mine)) == min(n, len(mine)), (counts, rows)
    for rank in (-1, 2, 5):
        for plan in (lambda **kw: stratified_batches(labels, 2, **kw),
                     lambda **kw: shuffled_batches(9, 2, **kw),
                     lambda **kw: bucketed_batches(range(9), 2, **kw)):
            refuses(plan, f"rank {rank} must be", seed=0, epoch=0, rank=rank, world_size=2)


def test_data_stratified_batches_per_class_hold_as_many_rows_of_every_class_drawn():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(100), [9] * 60 + [30] * 40))
    _, message = warned(lambda: stratified_batches(labels, 32, seed=0, epoch=0))
    assert "rows are alone in their class" in message and "per_class" in message
    orders = set()
    for m, size in ((4, 32), (2, 32), (8, 8), (1, 32)):
        plan, message = warned(
            lambda: stratified_batches(labels, size, seed=0, epoch=m, per_class=m))
        assert message == "" and len(plan) == -(-len(labels) // size)
        drawn = np.zeros(100, int)
        for rows in plan:
            counts = np.bincount(labels[rows], minlength=100)
            assert set(counts) == {0, m} and len(rows) == len(set(rows)) == size
            drawn += counts
        assert drawn.max() - drawn.min() <= m  # classes take turns
        orders.add(tuple(labels[np.concatenate(plan[:3])]))
        for rank in range(2):
            half = stratified_batches(labels, size // 2, seed=0, epoch=m, per_class=m, rank=rank,
                                      world_size=2) if size > m else []
            assert all(np.array_equal(rows, whole[rank * len(rows) : (rank + 1) * len(rows)])
                       for rows, whole in zip(half, plan))
    assert len(orders) == 4
    for m in (0, 5):
        refuses(stratified_batches, f"per_class {m}", labels, 32, seed=0, epoch=0, per_class=m)
    # with fewer classes than a batch has turns, a class has several
    [rows] = stratified_batches(np.repeat([0, 1], 4), 8, seed=0, epoch=0, per_class=2)
    assert sorted(rows) == list(range(8))


def test_data_stratified_batches_refuse_labels_that_are_not_one_class_per_row():
    subset = torch.utils.data.Subset(torch.arange(6), [0, 2, 4])
    one_hot = np.eye(2)[[0, 1, 1, 0]]
    for make in (lambda labels: stratified_batches(labels, 2, seed=0, epoch=0),
                 lambda labels: StratifiedBatchSampler(labels, 2)):
        refuses(make, "got Subset: of a Subset give all_labels[subset.indices]", subset)
        refuses(make, "got ndarray (4, 2)", one_hot)
        refuses(make, "got Tensor (4, 1)", torch.ones(4, 1))


def test_data_stratified_sampler_counts_its_own_epochs():
    labels = [0] * 90 + [1] * 10
    sampler = StratifiedBatchSampler(labels, 10, seed=3)
    loader = torch.utils.data.DataLoader(torch.arange(100), batch_sampler=sampler)
    epochs = [stratified_batches(labels, 10, seed=3, epoch=epoch) for epoch in range(50)]
    for epoch in range(49):
        iter(sampler)  # nothing is drawn of it
        assert len(sampler) == 10
        assert np.array_equal([rows.tolist() for rows in loader], epochs[epoch])
    assert sampler.state_dict() == {"epoch": 49}
    next(iter(loader))  # a loop that breaks off
    assert sampler.state_dict() == {"epoch": 50}
    sampler.sampler.set_epoch(7)  # where Lightning looks for it
    assert np.array_equal(list(sampler), epochs[7]) and sampler.epoch == 8
    other = StratifiedBatchSampler(labels, 10, seed=3)
    other.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    assert np.array_equal(list(other), epochs[8])


def test_data_stratified_sampler_asks_torch_distributed_for_its_place():
    labels = [0] * 20 + [1] * 10
    places = [dict(rank=rank, world_size=2) for rank in range(2)]
    halves = [stratified_batches(labels, 5, seed=0, epoch=0, **place) for place in places]
    early = StratifiedBatchSampler(labels, 5)  # before the group is there
    dist = torch.distributed
    with mock.patch.multiple(dist, is_initialized=lambda: True, get_world_size=lambda: 2,
                             get_rank=lambda: 1):
        for sampler in (early, StratifiedBatchSampler(labels, 5)):
            assert len(sampler) == 3 and np.array_equal(list(sampler), halves[1])
        assert np.array_equal(list(StratifiedBatchSampler(labels, 5, rank=0)), halves[0])
        alone = StratifiedBatchSampler(labels, 5, rank=0, world_size=1)
        assert np.array_equal(list(alone), stratified_batches(labels, 5, seed=0, epoch=0))


def test_data_stratified_sampler_checks_its_options_when_it_is_built():
    raises(TypeError, "positional", lambda: StratifiedBatchSampler([0, 1], 2, 0))
    for options, text in (({"batch_size": 0}, "batch_size 0"), ({"rank": 1}, "rank 1 must be"),
                          ({"per_class": 3}, "per_class 3")):
        refuses(StratifiedBatchSampler, text, [0, 1] * 4, **{"batch_size": 4} | options)


def test_data_fewer_rows_than_a_batch_is_one_partial_batch_and_a_warning():
    for plan in (lambda: shuffled_batches(5, 8, seed=0, epoch=0),
                 lambda: stratified_batches([0, 0, 1, 1, 1], 8, seed=0, epoch=0)):
        rows, message = warned(lambda: [len(rows) for rows in plan()])
        assert rows == [5] and "one partial batch" in message


def test_data_cache_of_a_damaged_npz_is_not_kept():
    with folder() as f:
        whole = make_npz(f / "eyes.npz").read_bytes()
        middle = len(whole) // 4  # inside the images
        flipped = bytes([whole[middle] ^ 1])
        (f / "eyes.npz").write_bytes(whole[:middle] + flipped + whole[middle + 1 :])
        refuses(ocec.read_eyes, "eyes.npz is not a readable .npz",
                f / "eyes.npz", cache=f / "cache")
        assert not list((f / "cache").iterdir())
        np.savez(f / "objects.npz", images=np.array([None, 1]))
        refuses(ocec.read_eyes, "not a readable .npz", f / "objects.npz", cache=f / "cache")


def test_data_write_npy_writes_pieces_of_any_length_that_numpy_reads():
    with folder() as f:
        for rows, row_shape, kind in (((3, 0, 40), (2, 5), "uint8"), ((0,), (), "float64"),
                                      ((7,) * 200, (), "int64")):
            parts = [np.random.default_rng(0).integers(0, 99, (n, *row_shape)) for n in rows]
            write_npy(f / "a.npy", kind, row_shape, iter(parts))
            for read in (np.load(f / "a.npy", allow_pickle=False), map_npy(f / "a.npy")):
                assert read.dtype == kind and np.array_equal(read, np.concatenate(parts))
            assert (f / "a.npy").stat().st_size == 128 + read.nbytes and len(list(f.iterdir())) == 1


def test_data_write_npy_that_breaks_off_leaves_the_old_file():
    def pieces():
        yield np.zeros(3)
        raise OSError("no more")

    with folder() as f:
        write_npy(f / "a.npy", "float64", (), [np.ones(2)])
        raises(OSError, "no more", lambda: write_npy(f / "a.npy", "float64", (), pieces()))
        assert np.load(f / "a.npy").tolist() == [1, 1] and len(list(f.iterdir())) == 1


def test_data_resize_is_a_mean_over_blocks_when_it_halves():
    image = np.arange(64, dtype=np.uint8).reshape(1, 8, 8) * 3
    small = resize_uint8(image, (4, 4))
    full = torch.from_numpy(image[:, None]).float()
    padded = F.interpolate(full, size=(4, 4), mode="bilinear", antialias=True)
    assert small.shape == (1, 3, 4, 4)
    assert (small[:, 0].float() - padded[:, 0]).abs().max() <= 0.5
    assert torch.equal(resize_uint8(image, (8, 8))[:, 1], torch.from_numpy(image))


def test_data_encode_png_writes_what_the_specification_says():
    ids, rgb = np.array([[0, 1, 2], [2, 1, 0]], np.uint8), random_images(2, 3, 3).numpy()
    palette = np.array([[0, 0, 0], [255, 0, 0], [1, 2, 3]])
    for pixels, colours, kind in ((ids, None, 0), (ids, palette, 3), (rgb, None, 2)):
        header, chunks = png_content(encode_png(pixels, colours))
        assert header == (3, 2, 8, kind, 0, 0, 0) and list(chunks)[-1] == b"IEND"
        rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(2, -1)
        assert (rows[:, 0] == 0).all() and (rows[:, 1:] == pixels.reshape(2, -1)).all()
    assert png_content(encode_png(ids, palette))[1][b"PLTE"] == bytes([0, 0, 0, 255, 0, 0, 1, 2, 3])
    refuses(encode_png, "id 2 has no colour", ids, palette[:2])
    for pixels in (ids.astype(float), ids[0], rgb[:, :, :2]):
        refuses(encode_png, "written from uint8", pixels)


def test_data_encode_png_is_read_back_by_pillow():
    image = need_pillow()
    ids, palette = random_images(9, 7).numpy() % 19, np.array(faceparse.FACE_COLOURS, np.uint8)
    with image.open(io.BytesIO(encode_png(ids, palette))) as file:
        assert file.mode == "P" and (np.array(file) == ids).all()
        assert (np.array(file.convert("RGB")) == palette[ids]).all()


def test_data_label_scaler_is_exact_for_arrays_and_tensors():
    labels = np.random.default_rng(0).normal(17, 4, 1000)
    scaler = LabelScaler().fit(labels.astype(np.float32))
    z = scaler.transform(labels.astype(np.float32).astype(np.float64))
    assert abs(z.mean()) < 1e-12 and near(z.std(), 1, 1e-12)
    assert near(scaler.inverse(scaler.transform(labels)), labels, 1e-5)
    tensor = torch.from_numpy(labels).float().requires_grad_()
    back = scaler.inverse(scaler.transform(tensor))
    assert back.dtype == torch.float32 and back.requires_grad and near(back, tensor, 1e-5)
    large = 1e8 + np.array([0.0, 1, 2, 3])
    assert near(LabelScaler().fit(large).transform(large), [-1.3416, -0.4472, 0.4472, 1.3416], 1e-4)
    simple = LabelScaler().fit([10, 20])
    assert simple.state_dict() == {"mean": 15.0, "scale": 5.0}
    assert all(type(value) is float for value in simple.state_dict().values())
    loaded = LabelScaler()
    loaded.load_state_dict(simple.state_dict())
    assert loaded.transform(20) == 1.0 and loaded.inverse(-1) == 10.0


def test_data_label_scaler_has_a_mean_and_a_scale_for_every_column():
    labels = np.array([[10, 3.0, 500], [20, 3.0, 900]])
    scaler, loaded = LabelScaler().fit(labels), LabelScaler()
    assert scaler.state_dict() == {"mean": [15, 3, 700], "scale": [5, 1, 200]}
    file = io.BytesIO()
    torch.save(scaler.state_dict(), file)
    file.seek(0)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert json.loads(json.dumps(loaded.state_dict())) == scaler.state_dict()
    for kind in (labels, labels.astype(np.float16), torch.from_numpy(labels).half()):
        z = loaded.transform(kind)
        assert type(z) is type(kind) and z.dtype == kind.dtype
        assert z.tolist() == [[-1, 0, -1], [1, 0, 1]]
        assert loaded.inverse(z).tolist() == labels.tolist()
    assert loaded.transform(labels[0].astype(int)).tolist() == [-1, 0, -1]
    for shape in ((3, 1), (2,), ()):  # broadcasting would take them
        refuses(loaded.inverse, "must have 3 columns", torch.ones(shape))
    refuses(LabelScaler().fit, "(n,) or (n, targets)", np.ones((2, 3, 4)))


def test_data_label_scaler_tolerates_constant_labels_and_refuses_none_or_nan():
    scaler = LabelScaler().fit(np.full(7, 0.1))
    assert scaler.scale == 1.0 and np.abs(scaler.transform(np.full(7, 0.1))).max() < 1e-15
    assert near(scaler.inverse(0.0), 0.1, 1e-15)
    refuses(LabelScaler().fit, "0 labels", [])
    refuses(LabelScaler().fit, "3 labels, 1 of them NaN", [1, np.nan, 2])
    refuses(LabelScaler().fit, "1 of them NaN or infinite", [1, np.inf])
    empty = LabelScaler()
    raises(RuntimeError, "fit it on the training labels", lambda: empty.transform(np.ones(2)))
    raises(RuntimeError, "load its state", lambda: empty.inverse(np.ones(2)))


def test_data_real_motionsense_is_read_whole_and_one_stream_tells_half():
    path = need_real("motionsense/motionsense_18_subjects.npz")
    arrays, labels, groups, names, present = quadmodal.read_modalities(path)
    assert list(arrays) == ["attitude", "gravity", "rotation", "acceleration"]
    for array in arrays.values():
        assert array.shape == (8106, 128, 3) and array.dtype == np.float16
    assert names == ["dws", "ups", "wlk", "jog", "sit", "std"] and len(set(groups)) == 18
    assert np.bincount(labels).tolist() == [747, 875, 1983, 758, 2026, 1717]
    assert all(rows.all() for rows in present.values())
    train, validation, test = split_by_group(groups, (12 / 18, 3 / 18, 3 / 18), seed=0)
    alone = [ridge_accuracy([array], labels, train, test) for array in arrays.values()]
    together = ridge_accuracy(arrays.values(), labels, train, test)
    assert max(alone) < 0.7 and together > max(alone) + 0.1, (alone, together)


def test_data_bucketed_batches_hold_every_row_once_and_as_many_batches_as_shuffled_ones():
    rng = np.random.default_rng(0)
    for n, size, ranks, pool in (
            (10, 4, 1, 16), (12, 4, 1, 1), (7, 7, 1, 2), (5, 1, 1, 2), (1000, 32, 1, 16),
            (1000, 31, 3, 4), (131, 8, 2, 3)):
        lengths = rng.integers(1, 90, n)
        order = dict(seed=1, epoch=2, world_size=ranks)
        plans = [bucketed_batches(lengths, size, rank=rank, pool=pool, **order)
                 for rank in range(ranks)]
        sizes = [len(rows) for rows in shuffled_batches(n, size, **order)]
        for plan in plans:
            assert [len(rows) for rows in plan] == sizes, (n, size, ranks)
        rows = np.concatenate([rows for plan in plans for rows in plan])
        assert rows.dtype == np.int64 and len(set(rows.tolist())) == len(rows) == n - n % ranks
    lengths = rng.integers(1, 90, 50)
    check_order(lambda seed, epoch: bucketed_batches(lengths, 8, seed=seed, epoch=epoch))
    lengths = rng.integers(1, 90, 120)
    order = dict(seed=0, epoch=1, pool=3)
    ranks = [bucketed_batches(lengths, 6, rank=rank, world_size=2, **order) for rank in (0, 1)]
    for a, b, rows in zip(*ranks, bucketed_batches(lengths, 12, **order), strict=True):
        assert not set(a) & set(b) and sorted([*a, *b]) == sorted(rows)
        assert abs(lengths[a].mean() - lengths[b].mean()) < 12  # no rank waits for the other
    plan, message = warned(lambda: bucketed_batches([3, 1, 2], 8, seed=0, epoch=0))
    assert [len(rows) for rows in plan] == [3]
    assert "3 rows are fewer than a batch of 8" in message
    for option, message in (
            ({"batch_size": 0}, "batch_size 0 must be"), ({"pool": 0}, "pool 0 must be"),
            ({"world_size": 4}, "3 rows at least one per rank (4)")):
        options = {"batch_size": 2, "seed": 0, "epoch": 0} | option
        refuses(bucketed_batches, message, [3, 1, 2], **options)


def test_data_bucketed_batches_are_padded_less_in_an_order_that_tells_nothing_of_length():
    lengths = np.random.default_rng(0).gamma(4, 18, 3210).astype(int) + 1
    shuffled = padding(shuffled_batches(3210, 32, seed=0, epoch=0), lengths)
    bucketed = {pool: bucketed_batches(lengths, 32, seed=0, epoch=0, pool=pool)
                for pool in (1, 4, 16, 1000)}
    pads = [padding(plan, lengths) for plan in bucketed.values()]
    assert 1.6 < shuffled and abs(pads[0] - shuffled) < 0.1, (shuffled, pads)
    assert shuffled - 0.1 > pads[1] > pads[2] > pads[3] and pads[2] < 1.15, (shuffled, pads)
    plan = bucketed_batches(lengths, 32, seed=0, epoch=0)
    means = np.array([lengths[rows].mean() for rows in plan[:-1]])
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.3
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3
    plans = [bucketed_batches(lengths, 32, seed=0, epoch=epoch) for epoch in range(40)]
    rests = [lengths[plan[-1]].mean() for plan in plans]
    assert abs(np.mean(rests) / lengths.mean() - 1) < 0.1  # the rest is not of the longest rows
    same = [set(rows.tolist()) for rows in bucketed_batches(np.ones(3210), 32, seed=0, epoch=0)]
    in_order = [set(range(start, min(start + 32, 3210))) for start in range(0, 3210, 32)]
    assert same != in_order  # ties stay shuffled
    batches = {frozenset(rows.tolist()) for rows in [*plans[0], *plans[1]]}
    assert len(batches) == 2 * len(plan)  # a row meets others in the next epoch


def slow_hog(grey, cells):
    """hog_features of one square float64 image (side, side) in 0..1, pixel by pixel."""
    side, features = len(grey), []
    for cell in cells:
        count = side // cell
        histograms = np.zeros((count, count, 9))
        for y in range(side):
            for x in range(side):
                dx = grey[y, min(x + 1, side - 1)] - grey[y, max(x - 1, 0)]
                dy = grey[min(y + 1, side - 1), x] - grey[max(y - 1, 0), x]
                place = math.degrees(math.atan2(dy, dx)) % 360 / 40
                left, share = int(place), place - int(place)
                length = math.hypot(dx, dy)
                histograms[y // cell, x // cell, left % 9] += (1 - share) * length
                histograms[y // cell, x // cell, (left + 1) % 9] += share * length
        for y in range(count - 1):
            for x in range(count - 1):
                # bins first, then the 2 x 2 cells
                block = histograms[y : y + 2, x : x + 2].transpose(2, 0, 1).ravel()
                block = block / math.sqrt(0.01 + sum(value**2 for value in block))
                block = np.minimum(block, 0.2)
                features.append(block / math.sqrt(0.01 + sum(value**2 for value in block)))
    return features


def test_data_hog_equals_a_loop_over_the_pixels():
    images = random_images(4, 3, 48, 48)
    images[0, :, :, :20] = 90  # flat, with one edge
    got = hog_features(images)
    assert got.shape == (4, 468) and got.dtype == torch.float32
    for image, row in zip(images.double().mean(1).numpy() / 255, got):
        assert near(row, np.concatenate(slow_hog(image, (12, 16))), 1e-5)
    small = random_images(2, 1, 20, 30)
    square = F.interpolate(small.float(), size=(24, 24), mode="bilinear", antialias=True)
    got = hog_features(small, side=24, cells=(6,))
    for image, row in zip(square[:, 0].double().numpy() / 255, got):
        assert near(row, np.concatenate(slow_hog(image, (6,))), 1e-5)


def test_data_hog_ignores_contrast_and_level_and_is_zero_where_nothing_is():
    images = random_images(3, 1, 48, 48).float()
    assert near(hog_features(images / 2 + 60), hog_features(images), 1e-4)
    assert near(hog_features(images[:, :1].expand(-1, 3, -1, -1)),
                hog_features(images), 1e-5)
    flat = torch.full((1, 3, 32, 64), 77, dtype=torch.uint8)
    assert hog_features(flat).abs().max() < 1e-3
    for side, cells in ((48, (10,)), (48, (48,))):
        refuses(hog_features, f"cells of {cells[0]} pixels must divide 48", images, side=side,
                cells=cells)
