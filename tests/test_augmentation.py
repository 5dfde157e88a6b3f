"""Tests of augmentation."""

import base64
import colorsys
import itertools
import math
import zlib

import numpy as np
import torch
import torch.nn.functional as F

from data import (
    affine, band_spectrum, clahe, color_jitter, cutmix, horizontal_flip, lab_to_rgb, mixup,
    photometric_apply, photometric_distort, photometric_draw, random_affine, random_crop,
    random_gamma, random_noise, rgb_to_lab, soft_targets, spectral_rate, swap_labels,
    time_stretch, turn_hue_)
from tests.helpers import assert_near, near, random_images, refuses, seeded


def test_data_flip_twice_is_the_identity():
    images, masks = random_images(5, 3, 4, 6), random_images(5, 4, 6, seed=1)
    pairs = ((4, 5), (200, 7))
    once = horizontal_flip(images, p=1, generator=seeded(), masks=masks, pairs=pairs)
    twice = horizontal_flip(once[0], p=1, generator=seeded(), masks=once[1], pairs=pairs)
    assert torch.equal(once[0], images.flip(-1)) and not torch.equal(once[1], masks.flip(-1))
    assert torch.equal(twice[0], images) and torch.equal(twice[1], masks)


def test_data_flip_swaps_left_and_right_labels_in_flipped_masks_only():
    swapped = {4: 5, 5: 4, 8: 9, 9: 8}
    images = torch.arange(200 * 8).view(200, 1, 1, 8).float()
    for dtype in (torch.uint8, torch.int64):
        masks = torch.tensor([0, 4, 5, 8, 9, 17, 255, 4], dtype=dtype).expand(200, 1, 8)
        flipped, labels = horizontal_flip(
            images, generator=seeded(), masks=masks, pairs=((4, 5), (9, 8)))
        assert labels.dtype == dtype
        mirrored = 0
        for before, after, mask, label in zip(images, flipped, masks, labels):
            if torch.equal(after, before):
                assert torch.equal(label, mask)
            else:
                assert torch.equal(after, before.flip(-1))
                assert label[0].tolist() == [swapped.get(v, v) for v in mask[0].flip(-1).tolist()]
                mirrored += 1
        assert 70 < mirrored < 130  # 100 expected, sd 7


def test_data_flip_without_pairs_keeps_any_label():
    masks = torch.tensor([[[-100, 3, 1000]]])
    _, labels = horizontal_flip(masks.float(), p=1, generator=seeded(), masks=masks)
    assert labels.tolist() == [[[1000, 3, -100]]]


def test_data_flip_refuses_what_it_cannot_do():
    images = random_images(2, 3, 4, 6)
    for p in (-0.1, 1.1, float("nan")):
        refuses(horizontal_flip, "[0, 1]", images, p=p, generator=seeded())
    for pairs in (((4, 5), (5, 6)), ((4, 4),), ((4, 256),), ((-1, 4),)):
        refuses(horizontal_flip, "pairs",
                images, generator=seeded(), masks=images[:, 0], pairs=pairs)


def photometric_oracle(image, brightness, contrast_before, saturation, hue, contrast_after, order):
    """photometric_apply for one image (3, h, w) in float64, pixel by pixel, before rounding."""
    weights = np.array([0.2989, 0.587, 0.114])[:, None, None]

    def blend(x, factor, other):
        return (factor * x + (1 - factor) * other).clip(0, 255)

    x = (brightness * np.asarray(image, dtype=np.float64)).clip(0, 255)
    x = blend(x, contrast_before, (weights * x).sum(0).mean())
    x = blend(x, saturation, (weights * x).sum(0))
    for row in range(x.shape[1]):
        for column in range(x.shape[2]):
            h, s, v = colorsys.rgb_to_hsv(*x[:, row, column])
            x[:, row, column] = colorsys.hsv_to_rgb((h + hue) % 1, s, v)
    x = blend(x, contrast_after, (weights * x).sum(0).mean())
    return x[np.asarray(order)]


def colourful(n, height, width):
    """Noise, with pure, grey, black and white pixels among it."""
    images = random_images(n, 3, height, width, seed=n)
    corners = torch.cartesian_prod(*[torch.tensor([0, 128, 255])] * 3).T.to(torch.uint8)
    images.flatten(2)[:, :, :27] = corners
    return images


def test_data_photometric_equals_the_oracle_step_by_step_and_all_together():
    neutral = {"brightness": 1.0, "contrast_before": 1.0, "saturation": 1.0, "hue": 0.0,
               "contrast_after": 1.0, "order": [0, 1, 2]}
    single = {"brightness": (0.875, 1.125), "contrast_before": (0.5, 1.5), "saturation": (0.5, 1.5),
              "hue": (0.05, -0.05, 1 / 3, -1 / 3, 0.4, 0.5, -0.5, 0.9, -1.4),
              "contrast_after": (0.5, 1.5),
              "order": ([2, 0, 1],)}
    cases = [neutral]
    for name, values in single.items():
        cases += [neutral | {name: value} for value in values]
    cases.append(neutral | {"brightness": 1.1, "contrast_before": 1.4, "saturation": 1.4,
                            "hue": 0.04, "order": [1, 2, 0]})
    cases.append(neutral | {"brightness": 0.9, "saturation": 0.6, "hue": -0.03,
                            "contrast_after": 1.3, "order": [0, 2, 1]})
    images = colourful(len(cases), 5, 7)
    settings = {name: torch.tensor([case[name] for case in cases]) for name in cases[0]}
    distorted = photometric_apply(images, **settings)
    assert distorted.dtype == torch.uint8 and torch.equal(distorted[0], images[0])
    for image, case, result in zip(images, cases, distorted):
        # Rounded to the nearest level: half a level away from the exact value, and float32 noise.
        assert np.abs(result.numpy() - photometric_oracle(image, **case)).max() < 0.501, case


def test_data_photometric_distort_equals_the_oracle_across_chunks():
    images = colourful(515, 4, 7)  # chunks of 256, 256 and 3
    settings = photometric_draw(515, p=0.5, generator=seeded(3))
    distorted = photometric_distort(images, generator=seeded(3))
    for i in (0, 1, 2, 64, 131, 255, 256, 257, 511, 512, 513, 514):
        of_image = {name: values[i].numpy() for name, values in settings.items()}
        exact = photometric_oracle(images[i], **of_image)
        assert np.abs(distorted[i].numpy() - exact).max() < 0.501


def test_data_photometric_draws_five_times_independently():
    n = 20000
    settings = photometric_draw(n, p=0.3, generator=seeded())
    contrast = settings["contrast_before"] + settings["contrast_after"] - 1
    order = settings["order"]
    drawn = [(order != torch.arange(3)).any(1).float() * 6 / 5]  # one in six is the identity
    for value, neutral, spread in (
            (settings["brightness"], 1, 0.125), (contrast, 1, 0.5),
            (settings["saturation"], 1, 0.5), (settings["hue"], 0, 0.05)):
        on = value != neutral
        value = (value[on] - neutral + spread) / (2 * spread)
        assert 0 <= value.min() < 0.01 and 0.99 < value.max() <= 1 and near(value.mean(), 0.5, 0.02)
        drawn.append(on.float())
    for i, a in enumerate(drawn):
        assert near(a.mean(), 0.3, 0.06)  # sd 0.003
        assert all(near((a * b).mean(), 0.09, 0.13) for b in drawn[:i])
    # A fair coin gives the place of the contrast; the six permutations are equally likely.
    before, after = settings["contrast_before"] != 1, settings["contrast_after"] != 1
    assert not (before & after).any()
    assert abs(before.sum() / (before.sum() + after.sum()) - 0.5) < 0.03
    assert torch.equal(order.sort(1).values, torch.arange(3).expand(n, 3))
    counts = torch.bincount(order[:, 0] * 3 + order[:, 1])
    assert all(near(counts[k] / n, 0.3 / 6, 0.2) for k in (2, 3, 5, 6, 7))


def test_data_photometric_distort_at_the_limits_of_p():
    images = colourful(70, 4, 7)
    assert torch.equal(photometric_distort(images, p=0, generator=seeded()), images)
    settings = photometric_draw(70, p=1, generator=seeded())
    assert (settings["brightness"] != 1).all() and (settings["hue"] != 0).all()


def test_data_photometric_distort_refuses_normalised_input():
    normalised = torch.rand(2, 3, 4, 4)
    for images in (normalised, normalised.half(), random_images(2, 1, 4, 4),
                   random_images(3, 4, 4)):
        refuses(photometric_distort, "before you normalise", images, generator=seeded())
    refuses(photometric_distort, "p 1.5", random_images(2, 3, 4, 4), p=1.5, generator=seeded())


def test_data_turn_hue_keeps_value_and_chroma():
    planes = torch.rand(3, 4, 8, 8, generator=seeded())
    turn = torch.tensor([0.0, 0.05, -2 / 3, 1 / 3])[:, None, None]
    turned = turn_hue_(planes.clone(), turn)
    assert near(turned.amax(0), planes.amax(0), 1e-6)
    assert torch.equal(turned.amin(0), planes.amin(0))
    assert near(turned[:, 0], planes[:, 0], 1e-5)
    for image in (2, 3):  # a third forwards, two thirds backwards: red to green to blue
        assert near(turned[:, image], planes[:, image].roll(1, 0), 1e-5)


CLAHE_GREY = {(24, 24): 203914894, (24, 40): 2630615335, (30, 48): 939003530, (32, 64): 1353896281,
              (48, 48): 1976420963, (37, 53): 1021393679, (5, 9): 623223811, (120, 160): 1254161329}

CLAHE_LAB = 2529031476

CLAHE_COLOUR = (
    "913WlLz@4a;#wwp|8&0t5mUBPod2rlUNCL{hQK2#SKD=}|B~J|8FJ)oz5l4`b1QlOkJ2|FVB=`103S`CR*wI)=3`NN"
    "uU4x6oZ@mslmCOtA1GwVYOVjj_j*x=|C`S-K4RyKw-r!iE+%cqT%-S^-H1<&|AW0iKWg4|rVvG6jaz>Ir^{AcZvUFI"
    "|8}oVLviPEq8vzNkX3pAoxxL2Vf2NaB~)0id4mgVUx0vmlT>v7lCxY<V*ik(DpXUead!Y^Q*mx$|Cp3Yd}7L&gf5h5"
    "G+|cMnU*PrYLkz9|E!;6mT%#$k29QRpQCgDm{NPTb@0N7|K-Mu#*zQzwrkdn*5RT`)qA}Ds{i$?bnA%Z_L^MygUJ7+")


def pattern(height, width):
    """Grey (4, h, w) uint8 in integer arithmetic: noise, waves, faint noise, a chequerboard."""
    y, x = np.mgrid[:height, :width].astype(np.int64)
    noise = ((x * 7919 + y * 104729) * 2654435761 >> 13) & 255
    waves = (3 * y * y + 5 * x + x * y // 7) % 256
    board = np.where((x // 5 + y // 7) % 2 == 1, 200 + noise // 16, 10)
    return torch.from_numpy(np.stack([noise, waves, 90 + noise // 8, board]).astype(np.uint8))


def clahe_oracle(image, clip_limit, rows, columns):
    """CLAHE of one grey image, tile by tile and pixel by pixel."""
    height, width = image.shape
    padded = image
    if height % rows or width % columns:
        missing = (0, rows - height % rows), (0, columns - width % columns)
        padded = np.pad(image, missing, mode="reflect")
    tile_h, tile_w = padded.shape[0] // rows, padded.shape[1] // columns
    tables = {}
    for row in range(rows):
        for column in range(columns):
            tile = padded[row * tile_h : (row + 1) * tile_h]
            tile = tile[:, column * tile_w : (column + 1) * tile_w]
            bins = [int((tile == level).sum()) for level in range(256)]
            if clip_limit > 0:
                limit = max(int(clip_limit * tile.size / 256), 1)
                excess = sum(max(count - limit, 0) for count in bins)
                bins = [min(count, limit) + excess // 256 for count in bins]
                rest = excess % 256
                for level in range(0, 256, max(256 // rest, 1) if rest else 256):
                    if rest > 0:
                        bins[level] += 1
                        rest -= 1
            scale = np.float32(255) / np.float32(tile.size)
            tables[row, column] = np.rint(np.cumsum(bins).astype(np.float32) * scale)
    out, one = np.empty_like(image), np.float32(1)
    for y in range(height):
        for x in range(width):
            v = np.float32(y) * (one / np.float32(tile_h)) - np.float32(0.5)
            u = np.float32(x) * (one / np.float32(tile_w)) - np.float32(0.5)
            top, left = int(np.floor(v)), int(np.floor(u))
            down, across = v - np.float32(top), u - np.float32(left)
            above, below = (min(max(row, 0), rows - 1) for row in (top, top + 1))
            before, behind = (min(max(column, 0), columns - 1) for column in (left, left + 1))
            a, b, c, d = (tables[cell][image[y, x]] for cell in (
                (above, before), (above, behind), (below, before), (below, behind)))
            upper, lower = a * (one - across) + b * across, c * (one - across) + d * across
            out[y, x] = np.rint(upper * (one - down) + lower * down)
    return out


def test_data_clahe_of_grey_images_equals_opencv_bit_for_bit():
    for size, golden in CLAHE_GREY.items():
        crc, images = 0, pattern(*size)
        for grid in ((4, 4), (8, 8), (2, 3)):
            for clip_limit in (0, 1, 2, 4, 40):
                result = clahe(images, clip_limit=clip_limit, grid=grid)
                crc = zlib.crc32(result.numpy().tobytes(), crc)
        assert crc == golden, size


def test_data_clahe_equals_the_oracle():
    for size, grid, clip_limit in (
            ((24, 40), (4, 4), 2.0), ((13, 21), (2, 5), 3.0), ((16, 20), (4, 3), 0.0)):
        for image in pattern(*size):
            result = clahe(image, clip_limit=clip_limit, grid=grid)
            want = clahe_oracle(image.numpy(), clip_limit, *grid)
            assert np.array_equal(result.numpy(), want), (size, grid)


def test_data_clahe_in_colour_equals_opencv_up_to_one_level():
    levels = torch.arange(4, 256, 8)
    colours = torch.cartesian_prod(levels, levels, levels).to(torch.uint8).T.reshape(1, 3, 32, -1)
    lab = rgb_to_lab(colours)
    assert zlib.crc32(lab[0].permute(1, 2, 0).contiguous().numpy().tobytes()) == CLAHE_LAB
    golden = np.frombuffer(base64.b85decode(CLAHE_COLOUR), np.uint8).reshape(8, 12, 3).astype(int)
    result = clahe(pattern(8, 12)[None, :3], grid=(2, 3))[0].permute(1, 2, 0).numpy()
    off = np.abs(result - golden)
    assert off.max() <= 1 and off.mean() < 0.1


def test_data_lab_of_known_colours():
    known = {(0, 0, 0): [0, 128, 128], (255, 255, 255): [255, 128, 128],
             (255, 0, 0): [136, 208, 195], (0, 255, 0): [224, 42, 211], (0, 0, 255): [82, 207, 20]}
    colours = torch.tensor(list(known), dtype=torch.uint8)
    lab = rgb_to_lab(colours.T[None, :, :, None])[0, :, :, 0].T
    assert lab.tolist() == list(known.values())
    grey = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256)
    assert (lab_to_rgb(rgb_to_lab(grey)).int() - grey).abs().max() <= 2  # L has 256 levels as well
    red = torch.tensor([136, 208, 195]).view(1, 3, 1, 1)
    assert lab_to_rgb(red).flatten().tolist() == [255, 2, 1]


def test_data_clahe_of_an_image_is_independent_of_its_batch():
    for images in (pattern(24, 30), random_images(5, 3, 24, 30)):
        batch = clahe(images)
        assert batch.shape == images.shape and batch.dtype == torch.uint8
        alone = [clahe(images[i : i + 1]) for i in range(len(images))]
        assert torch.equal(batch, torch.cat(alone))
        assert clahe(images[:0]).shape == images[:0].shape  # no image of a batch drew it
        with torch.autocast("cpu", torch.bfloat16):  # nor does it matter where it is called
            assert torch.equal(clahe(images), batch)


def test_data_clahe_refuses_what_it_cannot_do():
    refuses(clahe, "before you normalise", torch.rand(2, 8, 8))
    for shape in ((2, 4, 8, 8), (2, 0, 8), (2, 3, 8, 0)):
        refuses(clahe, str(shape), random_images(*shape))
    for options in ({"clip_limit": -1}, {"clip_limit": math.nan}, {"clip_limit": math.inf},
                    {"grid": (0, 4)}):
        refuses(clahe, "at least 0", random_images(8, 8), **options)


def test_data_random_crop_moves_image_and_mask_alike_and_fills_with_ignore():
    n, height, width, padding = 3000, 4, 5, 2
    images = random_images(n, 3, height, width)
    places = torch.arange(height * width).view(height, width).expand(n, height, width)
    cropped, masks = random_crop(images, padding=padding, generator=seeded(), masks=places)
    sides = (padding, padding)
    mirrored = np.pad(images.numpy(), ((0, 0), (0, 0), sides, sides), mode="reflect")
    bordered = np.pad(places[0].numpy(), padding, constant_values=255)
    shifts = {}
    for y, x in itertools.product(range(5), range(5)):
        shifts[bordered[y : y + height, x : x + width].tobytes()] = (y, x)
    counts = np.zeros((5, 5))
    for i in range(n):
        y, x = shifts[masks[i].numpy().tobytes()]  # where the mask went, the image must be
        assert np.array_equal(cropped[i].numpy(), mirrored[i, :, y : y + height, x : x + width])
        counts[y, x] += 1
    assert 70 < counts.min() and counts.max() < 180  # 120 expected in each of the 25, sd 11


def test_data_random_crop_keeps_types_and_refuses_too_much_padding():
    images, masks = random_images(3, 1, 6, 9).float(), random_images(3, 6, 9)
    cropped, moved = random_crop(images, padding=5, generator=seeded(), masks=masks, fill_mask=19)
    assert cropped.dtype == torch.float32 and moved.dtype == torch.uint8 and (moved == 19).any()
    assert torch.equal(random_crop(images, padding=0, generator=seeded()), images)
    for padding in (-1, 6):
        refuses(random_crop, "shorter side, 6", images, padding=padding, generator=seeded())


def test_data_mixup_mixes_targets_as_inputs_for_every_lambda_and_odd_batches():
    first_shares = []
    for seed in range(300):
        inputs = torch.eye(5)  # the input says who is in it, so the target must say the same
        mixed, targets = mixup(inputs[:, :, None, None], inputs, alpha=0.4, generator=seeded(seed))
        assert torch.equal(mixed[:, :, 0, 0], targets) and near(targets.sum(1), torch.ones(5), 1e-5)
        assert near(targets.sum(0), torch.ones(5), 1e-5)  # a permutation
        lam = targets.diagonal().min().item()
        assert all(near(t[t > 0].sort().values, torch.tensor([lam, 1 - lam]).sort().values, 1e-6)
                   or t.max() == 1 for t in targets)
        _, scalar = mixup(inputs[:, :, None, None], torch.arange(5.0), alpha=0.4,
                          generator=seeded(seed))
        assert near(scalar, targets @ torch.arange(5.0), 1e-6)
        first_shares.append(lam)
    # Beta(a, a) has mean 1/2 and variance 1 / (8 a + 4); a permutation without a move gives 1.
    first_shares = np.array([share for share in first_shares if share < 1])
    assert abs(first_shares.mean() - 0.5) < 0.08 and abs(first_shares.var() - 1 / 7.2) < 0.025


def test_data_cutmix_counts_the_pixels_of_the_clipped_box():
    boxes = []
    for seed in range(300):
        inputs = torch.arange(5.0)[:, None, None, None].expand(5, 3, 7, 10)
        mixed, targets = cutmix(inputs, torch.eye(5), alpha=1.0, generator=seeded(seed))
        for i in range(5):
            shares = torch.bincount(mixed[i, 0].long().flatten(), minlength=5) / 70
            assert near(targets[i], shares, 1e-6) and torch.equal(mixed[i, 0], mixed[i, 2])
        pasted = (mixed[:, 0] != inputs[:, 0]).any(0).nonzero()
        if len(pasted):
            (top, left), (bottom, right) = pasted.min(0).values, pasted.max(0).values
            assert len(pasted) == (bottom - top + 1) * (right - left + 1)  # a box
            boxes.append((top == 0, bottom == 6, left == 0, right == 9))
    assert torch.tensor(boxes).sum(0).min() > 30  # it hangs over every edge, now and then
    assert torch.equal(inputs, torch.arange(5.0)[:, None, None, None].expand(5, 3, 7, 10))


def test_data_cutmix_box_has_the_share_of_lambda_and_lies_anywhere():
    inputs = torch.arange(5.0)[:, None, None, None].expand(5, 1, 7, 10)
    tops, lefts, sizes = set(), set(), set()
    for seed in range(300):
        mixed, _ = cutmix(inputs, torch.eye(5), alpha=1e6, generator=seeded(seed))  # lambda is 1/2
        pasted = (mixed != inputs)[:, 0].any(0).nonzero()
        if len(pasted) == 0:  # one permutation in 120 pastes everyone into himself
            continue
        (top, left), (bottom, right) = pasted.min(0).values.tolist(), pasted.max(0).values.tolist()
        tops.add(top), lefts.add(left), sizes.add((bottom - top + 1, right - left + 1))
    assert max(sizes) == (5, 7) and min(sizes) == (3, 4)  # half of 7 x 10; cut in a corner
    assert tops == set(range(5)) and lefts == set(range(7))


def test_data_cutmix_pastes_the_same_box_into_masks():
    masks = random_images(5, 7, 10).long()
    for seed in range(20):
        images, labels = cutmix(masks[:, None].byte(), masks, alpha=1.0, generator=seeded(seed))
        assert labels.dtype == torch.int64 and torch.equal(images[:, 0].long(), labels)
    assert not torch.equal(labels, masks)


def test_data_mixup_and_cutmix_off_at_alpha_zero_and_refuse_class_indices():
    inputs, targets = torch.rand(3, 1, 4, 4), torch.rand(3)
    for mix in (mixup, cutmix):
        same = mix(inputs, targets, alpha=0, generator=seeded())
        assert same[0] is inputs and same[1] is targets
        refuses(mix, "one_hot", inputs, torch.tensor([0, 1, 2]), alpha=1.0, generator=seeded())
        for alpha in (-0.1, float("nan"), float("inf")):
            refuses(mix, "alpha", inputs, targets, alpha=alpha, generator=seeded())
    refuses(mixup, "inputs.float()", inputs.byte(), targets, alpha=1.0, generator=seeded())
    refuses(cutmix, "masks of 4x4", inputs, torch.rand(3, 2, 2), alpha=1.0, generator=seeded())


def coordinates(height, width):
    """A float image (1, 2, h, w) whose channels hold each pixel's own x and y, from the centre."""
    rows, columns = torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([x, y])[None]

def source_of(image, angle, scale):
    """Where affine() samples the pixels of coordinates()."""
    x, y = image[0]
    sine, cosine = math.sin(angle), math.cos(angle)
    return (cosine * x - sine * y) / scale, (sine * x + cosine * y) / scale


def test_data_affine_by_a_quarter_is_rot90_of_image_and_mask():
    images, masks = random_images(2, 3, 8, 8), random_images(2, 8, 8, seed=1)
    angle, scale = torch.full((2,), math.pi / 2), torch.ones(2)
    turned, labels = affine(images, angle, scale, masks=masks)
    assert turned.dtype == torch.uint8 and torch.equal(turned, images.rot90(1, (2, 3)))
    assert torch.equal(labels, masks.rot90(1, (1, 2)))
    assert torch.equal(affine(images, -angle, scale), images.rot90(-1, (2, 3)))
    assert torch.equal(affine(images, angle.double(), scale.double()), turned)  # as numpy has them


def test_data_affine_samples_where_the_formula_says_in_pixels_of_any_frame():
    height, width = 12, 20
    image = coordinates(height, width)
    for angle, scale in ((0.3, 1.0), (-0.7, 1.4), (0.0, 0.8), (2.0, 1.1)):
        got = affine(image, torch.tensor([angle]), torch.tensor([scale]))[0]
        source_x, source_y = source_of(image, angle, scale)
        inside = (source_x.abs() <= (width - 1) / 2) & (source_y.abs() <= (height - 1) / 2)
        assert inside.sum() > 100  # a linear image is sampled exactly inside the frame
        assert_near(got[0][inside], source_x[inside], 1e-4)
        assert_near(got[1][inside], source_y[inside], 1e-4)


def quadrants(x, y):
    return ((x > 2).long() + 2 * (y > -1).long()).to(torch.uint8)


def test_data_affine_moves_a_mask_alike_with_nearest_sampling_and_ignores_what_lies_outside():
    height, width = 16, 24
    for factor in (1, 4):  # masks of the image's size, and four times finer
        fine = coordinates(height * factor, width * factor)[0] / factor
        masks = quadrants(*fine)[None]
        image = coordinates(height, width)
        got, labels = affine(image, torch.tensor([0.4]), torch.tensor([0.9]), masks=masks)
        x, y = got[0]
        # Away from edges, where nearest and bilinear sampling may differ.
        sure = ((x - 2).abs() > 0.8) & ((y + 1).abs() > 0.8) & (labels[0] != 255)
        assert sure.sum() > 150 and torch.equal(labels[0][sure], quadrants(x, y)[sure])
        source_x, source_y = source_of(image, 0.4, 0.9)
        outside = (source_x.abs() > width / 2) | (source_y.abs() > height / 2)
        assert outside.any() and torch.equal(labels[0] == 255, outside)


def test_data_random_affine_off_is_the_identity_and_reduces_a_mask_as_scoring_does():
    images = random_images(3, 3, 6, 8)
    for rows, columns in ((18, 24), (24, 32), (6, 8), (15, 31), (4, 7)):
        masks = random_images(3, rows, columns, seed=1)
        same, labels = random_affine(images, degrees=0, zoom=1, generator=seeded(), masks=masks)
        assert torch.equal(same, images)
        reduced = F.interpolate(masks[:, None], (6, 8), mode="nearest-exact")[:, 0]
        assert torch.equal(labels, reduced), (rows, columns)


def test_data_random_affine_draws_within_its_limits_and_fills_them():
    n, image = 400, coordinates(33, 33).expand(400, -1, -1, -1)
    got = random_affine(image, degrees=20, zoom=1.5, generator=seeded())
    across = got[:, :, 16, 17] - got[:, :, 16, 15]  # two pixels, in pixels of the source
    angle, scale = torch.atan2(across[:, 1], across[:, 0]).rad2deg(), 2 / across.norm(dim=1)
    assert -20.01 <= angle.min() < -18 and 18 < angle.max() <= 20.01
    assert 0.66 < scale.min() < 0.7 and 1.42 < scale.max() < 1.51 and n == len(got)
    assert abs(float(angle.mean())) < 2 and abs(float(scale.log().mean())) < 0.04
    for options in (dict(degrees=-1), dict(degrees=181), dict(zoom=0.9), dict(degrees=math.nan)):
        refuses(random_affine, "must be in", image[:1], generator=seeded(), **options)


def test_data_random_gamma_bends_each_image_by_a_power_of_its_own():
    images = torch.tensor([0.0, 0.2, 0.7, 1.0]).expand(300, 1, 1, 4)
    bent = random_gamma(images, strength=0.5, generator=seeded())
    powers = bent[:, 0, 0, 1].log() / math.log(0.2)
    assert_near(bent[:, 0, 0, 2].log() / math.log(0.7), powers, 1e-4)
    assert torch.equal(bent[..., 0], images[..., 0]) and torch.equal(bent[..., 3], images[..., 3])
    assert -0.501 < powers.log().min() < -0.49 and 0.49 < powers.log().max() < 0.501
    assert torch.equal(random_gamma(images, strength=0, generator=seeded()), images)
    refuses(random_gamma, "at least 0", images, strength=-1, generator=seeded())


def test_data_random_noise_is_of_another_strength_in_each_image_and_absent_in_some():
    images = torch.full((2000, 3, 4, 4), 0.5)
    noise = random_noise(images, sd=0.1, p=0.25, generator=seeded()) - images
    strength = noise.flatten(1).std(1)
    assert abs(float((strength > 0).float().mean()) - 0.25) < 0.03 and strength.max() < 0.15
    assert abs(float(noise.square().mean()) / (0.25 * 0.1**2 / 3) - 1) < 0.1
    assert torch.equal(random_noise(images, sd=0, generator=seeded()), images)
    assert random_noise(images.double(), generator=seeded()).dtype == torch.float64
    for options in (dict(sd=-1), dict(p=2), dict(sd=math.nan)):
        refuses(random_noise, "must be", images, generator=seeded(), **options)


def test_data_swap_labels_twice_is_the_identity_and_leaves_the_others():
    masks = random_images(2, 5, 7)
    once = swap_labels(masks, ((4, 5), (200, 7)))
    assert torch.equal(swap_labels(once, ((4, 5), (200, 7))), masks)
    assert swap_labels(torch.tensor([4, 5, 6, 255]), ((4, 5),)).tolist() == [5, 4, 6, 255]


def test_data_soft_targets_hold_nothing_for_ignored_pixels():
    soft = soft_targets(torch.tensor([[[0, 2, 255]]], dtype=torch.uint8), 3)
    assert soft.dtype == torch.float32
    assert soft[0, :, 0].T.tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 0]]


def test_data_color_jitter_multiplies_by_its_own_factors_within_the_strength():
    # One colour: contrast and saturation change nothing.
    grey = torch.full((300, 3, 2, 2), 100, dtype=torch.uint8)
    got = color_jitter(grey, strength=0.2, generator=seeded())[:, 0, 0, 0].float()
    assert 80 <= got.min() < 83 and 117 < got.max() <= 120 and abs(float(got.mean()) - 100) < 2
    two = torch.tensor([40, 160], dtype=torch.uint8).view(1, 1, 1, 2).expand(300, 3, 1, 2)
    spread = color_jitter(two, strength=0.2, generator=seeded())[:, 0, 0].float()
    ratio = (spread[:, 1] - spread[:, 0]) / spread.mean(1) / 1.2  # contrast alone changes it
    assert 0.78 < ratio.min() < 0.83 and 1.17 < ratio.max() < 1.22
    red = torch.tensor([160, 40, 40], dtype=torch.uint8).view(1, 3, 1, 1).expand(300, -1, -1, -1)
    chroma = color_jitter(red, strength=0.2, generator=seeded())[:, :, 0, 0].float()
    assert (chroma[:, 1] == chroma[:, 2]).all() and (chroma[:, 0] / chroma[:, 1]).std() > 0.3
    assert torch.equal(color_jitter(two, strength=0, generator=seeded()), two)
    refuses(color_jitter, "strength", two, strength=1.1, generator=seeded())
    refuses(color_jitter, "uint8 RGB", two.float(), strength=0.1, generator=seeded())


def augmentations():
    images, masks = random_images(6, 3, 8, 12), random_images(6, 8, 12, seed=1)
    targets = torch.rand(6, generator=seeded())
    return [
        (lambda g, x, m: horizontal_flip(x, generator=g, masks=m, pairs=((1, 2),)),
         (images, masks)),
        (lambda g, x: (photometric_distort(x, generator=g),), (images,)),
        (lambda g, x: (color_jitter(x, strength=0.5, generator=g),), (images,)),
        (lambda g, x: (clahe(x),), (images,)),
        (lambda g, x: (clahe(x, grid=(3, 5)),), (masks,)),
        (lambda g, x, m: random_crop(x, generator=g, masks=m), (images, masks)),
        (lambda g, x, m: random_affine(x, generator=g, masks=m), (images, masks)),
        (lambda g, x, t: mixup(x, t, alpha=1.0, generator=g), (images.float(), targets)),
        (lambda g, x, t: cutmix(x, t, alpha=1.0, generator=g), (images, targets)),
        (lambda g, x, m: cutmix(x, m, alpha=1.0, generator=g), (images, masks)),
    ]


def test_data_augmentation_depends_on_its_generator_alone_and_leaves_its_inputs():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for augment, inputs in augmentations():
        copies = [x.clone() for x in inputs]
        first = augment(seeded(1), *inputs)
        assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies))
        torch.manual_seed(5)
        np.random.seed(5)
        again = augment(seeded(1), *[x.to(device) for x in inputs])
        for a, b in zip(first, again):
            assert (a.float() - b.cpu().float()).abs().max() <= (device == "cuda")


def test_data_augmentation_takes_strided_and_empty_batches():
    for augment, inputs in augmentations():
        strided = []
        for x in inputs:
            turned = x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.ndim > 1 else x
            strided.append(turned)
        pairs = zip(augment(seeded(1), *inputs), augment(seeded(1), *strided))
        assert all(torch.equal(a, b) for a, b in pairs)
        empty = augment(seeded(1), *[x[:0] for x in inputs])
        assert all(a.shape == x[:0].shape for a, x in zip(empty, inputs))


def test_data_band_spectrum_equals_the_written_sum():
    x = torch.randn(2, 3, 40, generator=seeded(), dtype=torch.float64)
    for low, high, bins, rate_hz in ((0.1, 0.6, 7, 2.0), (0.0, 1.0, 5, 2.0)):
        spectrum = band_spectrum(x, rate_hz, (low, high), bins)
        assert spectrum.shape == (2, 3, bins) and spectrum.dtype == torch.float64
        for row, channel in itertools.product(range(2), range(3)):
            t, y = np.arange(40), x[row, channel].numpy()
            y = y - np.polyval(np.polyfit(t, y, 1), t)
            y = y * (0.5 - 0.5 * np.cos(2 * np.pi * t / 39))
            waves = [np.exp(-2j * np.pi * f * t / rate_hz) for f in np.linspace(low, high, bins)]
            power = np.array([abs((y * wave).sum()) ** 2 for wave in waves])
            assert near(spectrum[row, channel], np.log(power / power.mean() + 1e-3), 1e-6)


def test_data_band_spectrum_forgets_scale_offset_trend_and_phase():
    t = torch.arange(1000) / 31.25
    def spectrum_of(x, bins=51):
        return band_spectrum(x, 31.25, (0.1, 0.6), bins)

    def sine(phase):
        return torch.sin(2 * torch.pi * 0.35 * t + phase)[None]

    spectrum = spectrum_of(sine(0))
    assert spectrum.argmax() == 25
    assert near(spectrum_of(7 * sine(0) + 3), spectrum, 1e-3)
    assert near(spectrum_of(sine(0) + t), spectrum, 2e-2)
    assert (spectrum_of(sine(1.5)) - spectrum).exp().sub(1).abs()[0, 22:29].max() < 0.05
    assert near(spectrum_of(torch.ones(1, 100), 5), torch.tensor(1e-3).log().expand(1, 5), 1e-5)
    for band, bins in (((0.6, 0.1), 5), ((0.1, 20.0), 5), ((0.1, 0.6), 1)):
        refuses(band_spectrum, "must lie in order between 0 and half the rate, 15.625 Hz",
                sine(0), 31.25, band, bins)


def test_data_time_stretch_changes_the_rate_and_the_label_alike():
    t = torch.arange(1000) / 31.25
    windows = torch.sin(2 * torch.pi * 0.3 * t + 6.28 * torch.rand(200, 1, generator=seeded()))
    before = windows.clone()
    stretched, labels = time_stretch(
        windows, torch.full((200,), 18.0), limit=1.3, generator=seeded(1))
    assert torch.equal(windows, before) and stretched.shape == windows.shape
    slowed = labels <= 18  # nothing is mirrored there
    error = (spectral_rate(stretched, 31.25, (0.1, 0.6)) - labels).abs()
    assert 60 < slowed.sum() < 140 and error[slowed].max() < 0.1 and error.median() < 0.1
    # Log-uniform between the limits.
    assert 18 / 1.3 <= labels.min() < 14.2 and 23 < labels.max() <= 18 * 1.3
    assert abs(float((labels / 18).log().mean())) < 0.03


def test_data_time_stretch_at_its_seams():
    windows, labels = torch.randn(5, 64, generator=seeded()), torch.arange(5.0)
    same, rates = time_stretch(windows, labels, limit=1.0, generator=seeded())
    assert near(same, windows, 1e-5) and torch.equal(rates, labels)
    ramp = torch.arange(65.0).expand(50, -1)
    stretched, factor = time_stretch(ramp, torch.ones(50), limit=1.9, generator=seeded())
    expected = (torch.arange(65.0) - 32) * factor[:, None] + 32
    expected = expected.abs()  # mirrored at both ends
    expected = torch.where(expected > 64, 128 - expected, expected)
    assert near(stretched, expected, 1e-3)
    for dtype in (torch.float32, torch.float64, torch.int64):  # whole rates come back as fractions
        again = time_stretch(ramp, torch.ones(50, dtype=dtype), limit=1.9, generator=seeded())
        assert torch.equal(again[0], stretched) and torch.equal(again[1].float(), factor)
    for limit in (0.5, 2.0):
        refuses(time_stretch, f"limit {limit:g} must be at least 1",
                windows, labels, limit=limit, generator=seeded())
