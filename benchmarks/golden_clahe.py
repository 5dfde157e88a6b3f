"""Golden values of the CLAHE tests, by OpenCV: stored in tests/test_augmentation.py.

    $ pip install opencv-python-headless && python benchmarks/golden_clahe.py
    $ python benchmarks/golden_clahe.py --quick     # data.clahe against the stored values
"""

import base64
import sys
import zlib

import numpy as np
import torch

from _quick import new_parser, parse, require
import data

SIZES = [(24, 24), (24, 40), (30, 48), (32, 64), (48, 48), (37, 53), (5, 9), (120, 160)]
GRIDS = [(4, 4), (8, 8), (2, 3)]  # rows, columns
LIMITS = [0, 1, 2, 4, 40]


def pattern(height, width):
    """Four grey pictures (4, h, w), uint8: noise, waves, faint noise, chequerboard.

    Integer arithmetic only, so that they are the same everywhere.
    """
    y, x = np.mgrid[:height, :width].astype(np.int64)
    noise = ((x * 7919 + y * 104729) * 2654435761 >> 13) & 255
    waves = (3 * y * y + 5 * x + x * y // 7) % 256
    board = np.where((x // 5 + y // 7) % 2 == 1, 200 + noise // 16, 10)
    return np.stack([noise, waves, 90 + noise // 8, board]).astype(np.uint8)


def opencv_clahe(image, limit, grid):
    import cv2
    return cv2.createCLAHE(limit, (grid[1], grid[0])).apply(image)


def our_clahe(image, limit, grid):
    return data.clahe(torch.from_numpy(image), clip_limit=limit, grid=grid).numpy()


def crc_of_grey(size, clahe):
    """One checksum over all grids, limits and pictures of a size, in this order."""
    crc = 0
    for grid in GRIDS:
        for limit in LIMITS:
            for image in pattern(*size):
                crc = zlib.crc32(clahe(image, limit, grid).tobytes(), crc)
    return crc


def three_patterns():
    """The first three patterns as red, green and blue (8, 12, 3)."""
    return np.ascontiguousarray(pattern(8, 12)[:3].transpose(1, 2, 0))


def golden_colour():
    """The picture of the first three patterns, equalised in Lab with limit 2 and grid (2, 3)."""
    import cv2
    lab = cv2.cvtColor(three_patterns(), cv2.COLOR_RGB2LAB)
    lab[..., 0] = opencv_clahe(np.ascontiguousarray(lab[..., 0]), 2, (2, 3))
    return cv2.cvtColor(lab, cv2.COLOR_LAB2RGB)


def colours():
    """The 32^3 colours (32, 1024, 3) with channels 4, 12, ... 252, red slowest."""
    channels = np.meshgrid(*[np.arange(4, 256, 8)] * 3, indexing="ij")
    return np.stack(channels, axis=-1).astype(np.uint8).reshape(32, -1, 3)


def print_golden():
    import cv2
    print(f"# OpenCV {cv2.__version__}")
    print("CLAHE_GREY =", {size: crc_of_grey(size, opencv_clahe) for size in SIZES})
    print("CLAHE_LAB =", zlib.crc32(cv2.cvtColor(colours(), cv2.COLOR_RGB2LAB).tobytes()))
    text = base64.b85encode(golden_colour().tobytes()).decode()
    lines = [f'    "{text[i : i + 90]}"' for i in range(0, len(text), 90)]
    print("CLAHE_COLOUR = (\n" + "\n".join(lines) + ")")


def check_stored():
    """End if data.py does not give the stored values for the inputs made here."""
    from tests.test_augmentation import CLAHE_COLOUR, CLAHE_GREY, CLAHE_LAB

    for size in SIZES:
        if crc_of_grey(size, our_clahe) != CLAHE_GREY[size]:
            sys.exit(f"grey images of {size}: data.clahe differs from the stored value")
    lab = data.rgb_to_lab(torch.from_numpy(colours()).movedim(-1, 0)[None])[0].movedim(0, -1)
    if zlib.crc32(lab.contiguous().numpy().tobytes()) != CLAHE_LAB:
        sys.exit("data.rgb_to_lab differs from the stored value")
    stored = np.frombuffer(base64.b85decode(CLAHE_COLOUR), np.uint8).reshape(8, 12, 3)
    image = torch.from_numpy(three_patterns()).movedim(-1, 0)[None]
    ours = data.clahe(image, clip_limit=2.0, grid=(2, 3))[0].movedim(0, -1).numpy()
    off = np.abs(ours.astype(int) - stored)
    if off.max() > 1:
        sys.exit(f"in colour data.clahe is {off.max()} levels off the stored values")
    print(f"{len(SIZES)} sizes of grey images and {colours().size // 3:,} colours equal the stored "
          f"values bit for bit, the image in colour up to {off.max()} level")


def main():
    if parse(new_parser(__doc__)).quick:
        check_stored()
    else:
        require("pip install opencv-python-headless", "cv2")
        print_golden()


if __name__ == "__main__":
    main()
