"""Golden values for the CLAHE tests, by OpenCV: what test_all.py stores, printed to be pasted there.

    $ pip install opencv-python-headless numpy && python benchmarks/golden_clahe.py
"""

import base64
import zlib

import cv2
import numpy as np

SIZES = [(24, 24), (24, 40), (30, 48), (32, 64), (48, 48), (37, 53), (5, 9), (120, 160)]
GRIDS = [(4, 4), (8, 8), (2, 3)]  # rows, columns
LIMITS = [0, 1, 2, 4, 40]


def pattern(height, width):
    """Four grey pictures (4, h, w) uint8 by integer arithmetic alone: noise, waves, faint noise, a chequerboard."""
    y, x = np.mgrid[:height, :width].astype(np.int64)
    noise = ((x * 7919 + y * 104729) * 2654435761 >> 13) & 255
    waves = (3 * y * y + 5 * x + x * y // 7) % 256
    board = np.where((x // 5 + y // 7) % 2 == 1, 200 + noise // 16, 10)
    return np.stack([noise, waves, 90 + noise // 8, board]).astype(np.uint8)


def equalised(image, limit, grid):
    return cv2.createCLAHE(limit, (grid[1], grid[0])).apply(image)


def golden_grey(size):
    """One checksum over every grid, limit and picture of a size, in this order."""
    crc = 0
    for grid in GRIDS:
        for limit in LIMITS:
            for image in pattern(*size):
                crc = zlib.crc32(equalised(image, limit, grid).tobytes(), crc)
    return crc


def golden_colour():
    """The picture (8, 12, 3) of the first three patterns, equalised in Lab with limit 2 and grid (2, 3)."""
    lab = cv2.cvtColor(np.ascontiguousarray(pattern(8, 12)[:3].transpose(1, 2, 0)), cv2.COLOR_RGB2LAB)
    lab[..., 0] = equalised(np.ascontiguousarray(lab[..., 0]), 2, (2, 3))
    return cv2.cvtColor(lab, cv2.COLOR_LAB2RGB)


def golden_lab():
    """Checksum of the Lab values of the 32^3 colours with channels 4, 12, ... 252, red slowest."""
    colours = np.stack(np.meshgrid(*[np.arange(4, 256, 8)] * 3, indexing="ij"), axis=-1).astype(np.uint8)
    return zlib.crc32(cv2.cvtColor(colours.reshape(32, -1, 3), cv2.COLOR_RGB2LAB).tobytes())


if __name__ == "__main__":
    print(f"# OpenCV {cv2.__version__}")
    print("CLAHE_GREY =", {size: golden_grey(size) for size in SIZES})
    print("CLAHE_LAB =", golden_lab())
    text = base64.b85encode(golden_colour().tobytes()).decode()
    print("CLAHE_COLOUR = (\n" + "\n".join(f'    "{text[i : i + 90]}"' for i in range(0, len(text), 90)) + ")")
