"""Tests of faceparse_data."""

import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F

import data
from tasks.faceparse_data import (
    FACE_CLASSES, FACE_COLOURS, FACE_PAIRS, FaceSplit, colour_logits, fit_colours, position_logits,
    read_faces, sides_reversed, synthetic_faces)
from tests.helpers import (
    assert_near, folder, near, need_pillow, refuses, same_bits, seeded, write_faces)


def test_data_face_pairs_are_the_left_and_the_right_of_one_part():
    names = FACE_CLASSES
    assert len(set(names)) == len(set(FACE_COLOURS)) == 19
    assert names[0] == "background" and FACE_COLOURS[0] == (0, 0, 0)
    assert np.array(FACE_COLOURS).shape == (19, 3)
    assert 0 <= np.min(FACE_COLOURS) <= np.max(FACE_COLOURS) <= 255
    assert [(names[left], names[right]) for left, right in FACE_PAIRS] == [
        (f"l_{part}", f"r_{part}") for part in ("eye", "brow", "ear")]


def test_data_synthetic_faces_hold_all_classes_each_face_only_some():
    images, masks, names = synthetic_faces(200)
    assert images.shape == (200, 3, 128, 128) and masks.shape == (200, 128, 128)
    assert images.dtype == masks.dtype == torch.uint8
    assert len(set(names)) == 200 and images.is_contiguous()
    present = torch.stack([(masks == k).any((1, 2)) for k in range(19)], 1)
    assert int(masks.max()) == 18 and present.any(0).all(), present.sum(0)
    assert present[:, :2].all()  # background and skin
    assert abs(float(present.sum(1).double().mean()) - 14) < 0.5
    shares = dict(zip(FACE_CLASSES, present.double().mean(0)))
    rare = {name for name, share in shares.items() if 0 < share < 0.75}
    assert rare == {"eye_g", "l_ear", "r_ear", "mouth", "hat", "ear_r", "neck_l"}, rare
    small = synthetic_faces(40, size=(48, 80))
    assert small[0].shape == (40, 3, 48, 80) and small[1].shape == (40, 48, 80)


def test_data_synthetic_faces_are_fixed_by_the_seed():
    images, masks, _ = synthetic_faces(20, size=(48, 48), seed=3)
    again = synthetic_faces(20, size=(48, 48), seed=3)
    other = synthetic_faces(20, size=(48, 48), seed=4)
    assert torch.equal(images, again[0]) and torch.equal(masks, again[1])
    assert not torch.equal(images, other[0]) and not torch.equal(masks, other[1])


def test_data_synthetic_faces_colour_alone_does_not_tell_the_class():
    images, masks, _ = synthetic_faces(200)
    # Red, green and blue in 8 levels.
    colour = (images.long() // 32 * torch.tensor([64, 8, 1])[:, None, None]).sum(1)
    pairs = (colour[:100] * 19 + masks[:100]).flatten()
    counts = torch.bincount(pairs, minlength=512 * 19).view(512, 19)
    guess = (counts / counts.sum(0)).argmax(1)[colour[100:]]  # the class most typical of a colour
    recall = torch.tensor([(guess == k)[masks[100:] == k].double().mean() for k in range(19)])
    assert recall.mean() < 0.2, recall  # chance is 0.05, theirs 0.19


def test_data_sides_reversed_is_told_by_where_the_parts_lie():
    masks = torch.zeros(6, 4, 9, dtype=torch.uint8)
    masks[0, 1, 7], masks[0, 1, 1] = 4, 5  # the person's left lies right in the image: in order
    masks[1, 1, 7], masks[1, 1, 1] = 5, 4
    masks[2, 1, 7] = 4  # its counterpart is hidden
    masks[3, 1, [7, 1]], masks[3, 2, [7, 1]] = masks.new_tensor([[4, 5], [7, 6]])  # one vote each
    masks[4, 1, [8, 0]] = masks.new_tensor([4, 5])  # far apart, the two other pairs are near
    masks[4, 2, [4, 3]], masks[4, 3, [5, 4]] = masks.new_tensor([[7, 6], [9, 8]])
    masks[5] = 255
    pairs = ((4, 5), (6, 7), (8, 9))
    assert sides_reversed(masks, pairs).tolist() == [0, 1, -1, -1, 1, -1]
    assert sides_reversed(masks, pairs, chunk=4).tolist() == [0, 1, -1, -1, 1, -1]
    assert sides_reversed(data.swap_labels(masks, pairs), pairs).tolist() == [1, 0, -1, -1, 0, -1]
    assert sides_reversed(masks.flip(-1), pairs).tolist() == [1, 0, -1, -1, 0, -1]


def test_data_read_faces_gives_the_same_from_folder_cache_and_npz():
    need_pillow()
    images, masks, _ = synthetic_faces(4, size=(24, 32))
    masks[1, 0, 0] = 255
    with folder() as f:
        write_faces(f / "set", images, masks, grey=(2,))
        arrays = {"images": images.permute(0, 2, 3, 1).numpy(), "masks": masks.numpy()}
        np.savez(f / "set.npz", **arrays)
        for path, names in ((f / "set", ["000", "001", "002", "003"]),
                            (f / "set.npz", [f"set-{i:05d}" for i in range(4)])):
            got = read_faces(path, size=(24, 32))
            assert torch.equal(got[0], images) and torch.equal(got[1], masks) and got[2] == names
            small, reduced, _ = read_faces(path, size=(8, 16), cache=str(f / "cache"))
            assert torch.equal(small, data.resize_uint8(arrays["images"], (8, 16)))
            again = read_faces(path, size=(8, 16), cache=str(f / "cache"))
            assert same_bits([reduced, *again[:2]], [masks, small, masks])
        decoded = sorted((f / "cache").iterdir())
        decoded = [file.name.split("-")[0] for file in decoded]
        assert decoded == ["faces", "faces", "masks", "npz", "npz"]
        reduced[0] = 3  # memory-mapped copy-on-write: the cache stays as it is
        write_faces(f / "set", images[:1], masks[:1].flip(-1))
        changed = read_faces(f / "set", size=(8, 16), cache=str(f / "cache"))
        assert torch.equal(changed[1][0], masks[0].flip(-1))
        square = data.encode_png(np.zeros((9, 9, 3), np.uint8))
        (f / "set" / "images" / "001.png").write_bytes(square)
        refuses(read_faces, "its image is 9x9", f / "set", size=(8, 16), cache=str(f / "cache"))


AUGMENT = dict(degrees=0.0, zoom=1.0, crop=0, flip="none", jitter=0.0, photometric=0.0, mixup=0.0,
               cutmix=0.0)


def augmented(images, masks, seed=0, **changes):
    """A batch of all rows under AUGMENT with these changes."""
    rows = np.arange(len(images))
    split = FaceSplit(images, masks, rows, pairs=((4, 5),), augment=AUGMENT | changes)
    return split.batch(rows, seeded(seed))


def test_data_face_split_is_not_augmented_without_a_generator():
    images, masks, _ = synthetic_faces(6, size=(32, 32))
    small = data.resize_uint8(images.permute(0, 2, 3, 1).numpy(), (16, 16))
    strong = dict(degrees=90, zoom=2, crop=4, flip="swap", jitter=1, photometric=1, mixup=1,
                  cutmix=1)
    split = FaceSplit(small, masks, [1, 3, 4], pairs=FACE_PAIRS, augment=AUGMENT | strong,
                      wrong=np.ones(6, bool))
    batch = split.batch(np.array([0, 2]))
    assert len(split) == 3 and torch.equal(batch["masks"], masks[[1, 4]])
    assert_near(batch["inputs"], small[[1, 4]].float() / 127.5 - 1, 1e-6)
    reduced = F.interpolate(masks[[1, 4]][:, None], (16, 16), mode="nearest-exact")
    assert torch.equal(batch["targets"], reduced[:, 0].long())
    off = FaceSplit(small, masks, [1, 3, 4], augment=AUGMENT).batch(np.array([0, 2]), seeded())
    assert same_bits(off, {name: batch[name] for name in ("inputs", "targets")})
    none = FaceSplit(small, masks, [1, 3, 4]).batch(np.array([0, 2]), seeded())
    assert same_bits([none["masks"], none["inputs"]], [batch["masks"], batch["inputs"]])


def test_data_face_split_sets_reversed_masks_right_in_augmented_batches_only():
    images, masks, _ = synthetic_faces(4, size=(16, 16))
    wrong = np.array([False, True, False, True])
    split = FaceSplit(images, masks, [1, 2, 3], augment=AUGMENT, pairs=FACE_PAIRS, wrong=wrong)
    want = masks[[1, 2, 3]].clone()
    want[[0, 2]] = data.swap_labels(want[[0, 2]], FACE_PAIRS)
    assert torch.equal(split.batch(np.arange(3), seeded())["targets"], want.long())
    assert torch.equal(split.batch(np.arange(3))["masks"], masks[1:])
    assert torch.equal(split.masks, masks) and not torch.equal(want, masks[1:])


def test_data_face_split_changes_colours_as_it_is_told():
    images, masks, _ = synthetic_faces(4, size=(16, 16))
    plain = augmented(images, masks)
    for name in ("jitter", "photometric"):
        batch = augmented(images, masks, **{name: 0.5})
        assert torch.equal(batch["targets"], plain["targets"])
        assert all(not torch.equal(a, b) for a, b in zip(batch["inputs"], plain["inputs"])), name


def test_data_face_split_moves_image_and_mask_alike_and_swaps_sides_only_when_told():
    """The images hold the labels, so that both can be compared after any geometry."""
    masks = torch.tensor([0, 4, 1, 5], dtype=torch.uint8).repeat_interleave(16)
    masks, known = masks.expand(8, 64, 64).contiguous(), torch.tensor([0, 1, 4, 5])
    images = (40 * masks)[:, None].expand(-1, 3, -1, -1).contiguous()
    for flip in ("none", "naive", "swap"):
        batch = augmented(images, masks, seed=3, degrees=20, zoom=1.3, crop=3, flip=flip)
        grey, targets = (batch["inputs"][:, 0] + 1) * 127.5 / 40, batch["targets"]
        brightest = grey.round() == 5  # label 5 is at the right of an image as it was
        flipped = (brightest * (torch.arange(64.0) - 31.5)).sum((1, 2)) < 0
        assert flipped.any() == (flip != "none") and not flipped.all()
        for g, t, mirrored in zip(grey.round().long(), targets, flipped):
            want = data.swap_labels(g.clamp(0, 5), ((4, 5),)) if mirrored and flip == "swap" else g
            sure = (t != 255) & torch.isin(want, known) & torch.isin(g, known)
            assert (want == t)[sure].float().mean() > 0.97  # edges differ: bilinear and nearest
            assert (t == 255).any()


def test_data_face_split_mixes_targets_as_it_mixes_images():
    images, masks, _ = synthetic_faces(6, size=(16, 16))
    images, masks = images[:2], masks[:2]
    masks[0, :4] = 255
    masks[1, :2] = 255
    base = augmented(images, masks)
    (first, second), soft = base["inputs"], data.soft_targets(masks, 19)
    for name in ("mixup", "cutmix"):
        swaps = 0
        for seed in range(8):
            batch = augmented(images, masks, seed=seed, **{name: 1.0})
            x, t = batch["inputs"][0], batch["targets"][0]
            if name == "cutmix":
                other = (first != x).any(0)  # no two pixels of these images are equal: the box
                if other.any():
                    (top, left), (bottom, right) = (
                        other.nonzero().min(0).values, other.nonzero().max(0).values + 1)
                    want = base["targets"][0].clone()
                    want[top:bottom, left:right] = base["targets"][1][top:bottom, left:right]
                    assert torch.equal(t, want)
                swaps += int(other.any() and not other.all())
                continue
            if near(x, first, 1e-5):
                continue  # the permutation left the pair alone
            apart = (first - second).abs() > 0.1
            lam = ((x - second) / (first - second))[apart].median()
            swaps += 1
            both = (masks[0] != 255) & (masks[1] != 255)
            want = lam * soft[0] + (1 - lam) * soft[1]
            assert_near(t[:, both], want[:, both], 1e-3)
            assert (t[:, :2] == 0).all()  # ignored in both
            assert_near(t[:, 2:4], soft[1][:, 2:4], 1e-5)  # ignored in one: the other counts
        assert swaps >= 2


def test_data_colour_fit_and_logits_equal_a_loop_over_pixels():
    images, masks, _ = synthetic_faces(6, size=(16, 24))
    masks[1, :5], rows = 255, np.array([0, 1, 4])
    fit = fit_colours(images, masks, rows, classes=21)
    pixels = {c: [] for c in range(21)}
    for row in rows:
        x = images[row].double() / 255
        x = x - x[:, 4:12, 6:18].mean((1, 2))[:, None, None]
        for i, j in itertools.product(range(16), range(24)):
            if masks[row, i, j] != 255:
                pixels[int(masks[row, i, j])].append(x[:, i, j].numpy())
    everything = [pixel for part in pixels.values() for pixel in part]
    weight = 100 / len(everything)  # a hundred pixels as all classes have them
    for c, own in pixels.items():
        weights = [1.0] * len(own) + [weight] * len(everything)
        mean = sum(w * x for w, x in zip(weights, own + everything)) / sum(weights)
        spread = sum(w * np.outer(x - mean, x - mean) for w, x in zip(weights, own + everything))
        assert near(fit["mean"][c], mean, 1e-5)
        assert near(fit["covariance"][c], spread / sum(weights) + 1e-4 * np.eye(3), 1e-5)
    assert not pixels[20] and near(fit["mean"][20], np.mean(everything, 0), 1e-5)
    got = colour_logits(images[:2], fit)
    assert got.shape == (2, 21, 16, 24)
    for image, i, j, c in itertools.product(range(2), (0, 7, 15), (2, 23), (0, 1, 20)):
        x = images[image].double() / 255
        x = (x - x[:, 4:12, 6:18].mean((1, 2))[:, None, None])[:, i, j].numpy() - fit["mean"][c]
        covariance = np.array(fit["covariance"][c])
        want = -x @ np.linalg.solve(covariance, x) / 2 - math.log(np.linalg.det(covariance)) / 2
        assert math.isclose(got[image, c, i, j], want, rel_tol=1e-3, abs_tol=1e-3)


def test_data_position_logits_are_the_log_shares_of_training_masks_on_a_grid():
    counts = np.random.default_rng(0).integers(0, 9, (5, 8, 12))
    got = position_logits(counts, grid=4)
    for i, j in itertools.product(range(4), range(4)):
        cell = counts[:, 2 * i : 2 * i + 2, 3 * j : 3 * j + 3].mean((1, 2)) + 1 / 5
        assert near(got[:, i, j], np.log(cell / cell.sum()), 1e-5)
    alike = torch.full((5, 32, 32), math.log(1 / 5))
    assert near(position_logits(np.zeros((5, 8, 12))), alike, 1e-6)
