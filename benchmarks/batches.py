"""What feeds a training loop: the plan of an epoch of class-balanced batches, and batches of augmented images.

    $ pip install pytorch-metric-learning albumentations pillow torchvision
    $ python benchmarks/batches.py            # the allocator as glibc has it
    $ python benchmarks/batches.py tuned      # with train.tune_allocator, as train.py runs; for all of them alike
    $ python benchmarks/batches.py --quick

Plan: all batches of 256 of an epoch over 470,811 labels of two classes, 53 to 47, as index lists; the second epoch is timed. Against
pytorch-metric-learning's MPerClassSampler with 128 rows per class, and torch's WeightedRandomSampler in a BatchSampler, which draws with
replacement, so that a third of the rows of an epoch is missing and no batch is exactly balanced.

Images: an epoch over 16,384 synthetic eyes of 32 x 64 in batches of 256, each (256, 3, 32, 64) float32 in [-1, 1], with the probabilities
of the ocec recipe: flip 0.5, photometric 0.5 for each of five changes, CLAHE 0.01 (crop and mixup are left out for all). Ours: gathered
from one uint8 array in this process, with as many threads as the peers have workers, and with one. The peers: a DataLoader with 2
persistent workers, started before the clock.
    torchvision      PNG files, PIL, v2.RandomHorizontalFlip, v2.RandomPhotometricDistort; it has no CLAHE, which is in its favour
    albumentations   from the array: HorizontalFlip, RandomBrightnessContrast, HueSaturationValue, ChannelShuffle at 0.5, CLAHE at 0.01

All take turns; medians of the rounds are printed, of the ratios too, which are taken within a round.

Last result, torch 2.13.0+cpu, torchvision 0.28.0 (PyPI's, made for CUDA: beside a CPU torch its three compiled operators, unused, were
declared by hand), pytorch-metric-learning 2.9.0, albumentations 2.0.8, 2 cores of an AMD EPYC with AVX-512, nothing else of ours at work;
the last two of four runs each, the first two in brackets:

              ours                      ours, 1 thread            MPerClassSampler         WeightedRandomSampler
    plan      12.3, 11.8 ms                                       981, 913 x (960, 857)    11.1,  9.6 x  (8.6,  9.3)
    tuned     12.0, 14.4 ms                                       866, 732 x (1009, 934)   10.6,  7.7 x (11.5, 10.6)

                                                                  PIL + torchvision         albumentations
    images    33,748, 54,580 images/s   30,317, 39,770 images/s   15.7, 19.9 x (16.7, 17.6)   2.6, 3.1 x (2.8, 2.8)
    tuned     42,633, 43,375 images/s   31,851, 33,821 images/s   19.0, 18.6 x (18.4, 19.9)   2.8, 3.2 x (3.8, 3.2)

In quiet moments ours has 69,000 images/s with two threads and 44,000 with one; then others on the machine slow us down more than the peers,
presumably because our batches lie in the cache that all share, and their single images in the cores' own. MPerClassSampler draws each
128 rows with np.random.choice without replacement, which permutes the whole class.

What is left of the plan: three permutations are 9.5 of 15.8 ms (line by line), the sort by class 4; the order of the batches hangs on
them. Of a batch of 256, 5.9 ms at best with one thread: photometric 3.9 (hue 1.2, of half of the images; contrast 0.8; out of float32 and
into it 0.6; saturation 0.35; gathering 0.4; draws and sort 0.25), CLAHE of 2.6 images 0.9, some 90 small operations; gathering, flip and
scaling 0.9. Each pass over float32 runs at the speed of the cache and each operation costs 3 to 5 us before it starts, so neither smaller
nor larger chunks help. Sorting by contrast as well would gain 0.3, taking each operation in inference mode 0.2: left out.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, WeightedRandomSampler

import data
import train
from _quick import new_parser, parse, require


def compare(title, contestants, rounds, show):
    seconds = {name: [] for name in contestants}
    for i in range(rounds + 1):
        for name, work in contestants.items():
            start = time.perf_counter()
            work(i)
            seconds[name].append(time.perf_counter() - start)
    print(title)
    for name, (_, *taken) in seconds.items():  # the first round warms up
        ratio = statistics.median(its / our for its, our in zip(taken, seconds["ours"][1:]))
        print(f"    {name:<22} {show(statistics.median(taken)):>16}   {ratio:6.1f} x", flush=True)


def compare_plans(n, size, peers):
    labels = (np.random.default_rng(0).random(n) < 0.53).astype(np.int64)
    for rows in data.stratified_batches(labels, size, seed=0, epoch=0):
        assert len(rows) == size and labels[rows].sum() == size // 2, "a batch is not balanced"
    weighted = WeightedRandomSampler(torch.from_numpy(1 / np.bincount(labels)[labels]), n)

    def batched(sampler):
        return list(BatchSampler(sampler, size, drop_last=False))

    contestants = {"ours": lambda i: data.stratified_batches(labels, size, seed=0, epoch=i),
                   "WeightedRandomSampler": lambda i: batched(weighted)}
    if peers:
        from pytorch_metric_learning.samplers import MPerClassSampler

        balanced = MPerClassSampler(labels, size // 2, batch_size=size, length_before_new_iter=n)
        contestants["MPerClassSampler"] = lambda i: batched(balanced)
    compare(f"plan of {n:,} labels in batches of {size}", contestants, 3,
            lambda s: f"{s * 1000:,.1f} ms")


class Files(Dataset):
    """PNG files, decoded by PIL and augmented by torchvision each time they are asked for."""

    def __init__(self, folder, images):
        from PIL import Image
        from torchvision.transforms import v2

        self.open = Image.open
        self.files = [folder / f"{i}.png" for i in range(len(images))]
        for file, image in zip(self.files, images):
            file.write_bytes(data.encode_png(image))
        self.transform = v2.Compose([v2.ToImage(), v2.RandomHorizontalFlip(0.5), v2.RandomPhotometricDistort(p=0.5),
                                     v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)])

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        return self.transform(self.open(self.files[i]).convert("RGB"))


class Resident(Dataset):
    """Images (h, w, 3) of an array, augmented by albumentations."""

    def __init__(self, images):
        import albumentations as a
        import cv2

        cv2.setNumThreads(0)
        self.images = images
        self.transform = a.Compose([a.HorizontalFlip(p=0.5), a.RandomBrightnessContrast(0.125, 0.5, p=0.5), a.HueSaturationValue(p=0.5),
                                    a.ChannelShuffle(p=0.5), a.CLAHE(2.0, (4, 4), p=0.01), a.Normalize([0.5] * 3, [0.5] * 3)])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return torch.from_numpy(np.ascontiguousarray(self.transform(image=self.images[i])["image"].transpose(2, 0, 1)))


def compare_images(n, size, peers):
    images, labels, _, _ = data.synthetic_eyes(n, size=(32, 64))
    split = data.EyeSplit(images, labels, np.arange(n), augment={"flip": 0.5, "photometric": 0.5, "clahe": 0.01})
    inputs = split.batch(np.arange(size), torch.Generator().manual_seed(0))["inputs"]
    assert inputs.shape == (size, 3, 32, 64) and inputs.dtype == torch.float32
    assert -1 <= inputs.min() < -0.5 and 0.5 < inputs.max() <= 1, "not scaled to [-1, 1]"

    def ours(epoch, threads=2):
        torch.set_num_threads(threads)
        generator = torch.Generator().manual_seed(epoch)
        for rows in data.shuffled_batches(n, size, seed=0, epoch=epoch):
            split.batch(rows, generator)

    contestants = {"ours": ours, "ours, 1 thread": lambda i: ours(i, 1)}
    with tempfile.TemporaryDirectory() as folder:
        if peers:
            pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
            options = dict(shuffle=True, num_workers=2, persistent_workers=True)
            files = DataLoader(Files(Path(folder), pixels), size, **options)
            resident = DataLoader(Resident(pixels), size, **options)
            contestants["PIL + torchvision"] = lambda i: [None for _ in files]
            contestants["albumentations"] = lambda i: [None for _ in resident]
        compare(f"{n:,} augmented images in batches of {size}", contestants, 3,
                lambda s: f"{n / s:,.0f} images/s")


def main():
    parser = new_parser(__doc__)
    parser.add_argument("allocator", nargs="?", choices=["tuned"], help="tuned: as train.py runs")
    args = parse(parser)
    if not args.quick:
        require("pip install pytorch-metric-learning albumentations pillow torchvision",
                "pytorch_metric_learning", "albumentations", "PIL", "torchvision")
    if args.allocator:
        train.tune_allocator()
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, "
          f"allocator {args.allocator or 'default'} on all sides, load {os.getloadavg()[0]:.1f}")
    if args.quick:
        compare_plans(1000, 32, peers=False)
        compare_images(64, 32, peers=False)
    else:
        compare_plans(470_811, 256, peers=True)
        compare_images(16_384, 256, peers=True)


if __name__ == "__main__":
    main()
