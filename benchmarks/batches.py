"""Feeding a training loop: plans of class-balanced batches, and batches of augmented images.

    $ pip install pytorch-metric-learning albumentations pillow torchvision
    $ python benchmarks/batches.py            # glibc's default allocator
    $ python benchmarks/batches.py tuned      # processes.tune_allocator, as in train.py; for all
    $ python benchmarks/batches.py --quick

Plan: index lists of an epoch, batches of 256, 470,811 labels of two classes (53 : 47). The peers:
MPerClassSampler with 128 rows per class; torch's WeightedRandomSampler, which draws with
replacement, so that a third of the rows is missing and no batch is exactly balanced.

Images: an epoch of 16,384 drawn eyes of 32 x 64, batches of 256, float32 in [-1, 1]; flip 0.5, each
of five photometric changes 0.5, CLAHE 0.01. Ours gathers from one uint8 array in this process. The
peers have a DataLoader with 2 persistent workers, started before the clock: PNG files with PIL and
torchvision (no CLAHE, in its favour); albumentations on the array.

All take turns. Medians over the rounds are printed; a ratio is taken within a round.

Last result: ranges of four runs, ours of two. torch 2.13.0+cpu, torchvision 0.28.0 (the CUDA build;
beside a CPU torch its three compiled operators, unused, were declared by hand),
pytorch-metric-learning 2.9.0, albumentations 2.0.8, 2 cores of an AMD EPYC with AVX-512:

                                        default                tuned
    plan, ours                          11.8 to 12.3 ms        12.0 to 14.4 ms
    MPerClassSampler                    857 to 981 x           732 to 1,009 x
    WeightedRandomSampler               8.6 to 11.1 x          7.7 to 11.5 x
    images/s, ours, 2 threads           33,748 to 54,580       42,633 to 43,375
    images/s, ours, 1 thread            30,317 to 39,770       31,851 to 33,821
    PIL + torchvision                   15.7 to 19.9 x         18.4 to 19.9 x
    albumentations                      2.6 to 3.1 x           2.8 to 3.8 x
"""

import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, WeightedRandomSampler

from _quick import median_ratio, new_parser, parse, require
import data
from runtime import processes
from tasks import ocec


def compare(title, contestants, rounds, show):
    """Run the functions {name: work(round)} in turn; print medians, and their ratios to ours."""
    seconds = {name: [] for name in contestants}
    for i in range(rounds + 1):
        for name, work in contestants.items():
            start = time.perf_counter()
            work(i)
            seconds[name].append(time.perf_counter() - start)
    print(title)
    for name, (_, *taken) in seconds.items():  # the first round warms up
        ratio = median_ratio(taken, seconds["ours"][1:])
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
    """PNG files, decoded by PIL and augmented by torchvision each time a row is read."""

    def __init__(self, folder, images):
        from PIL import Image
        from torchvision.transforms import v2

        self.open = Image.open
        self.files = [folder / f"{i}.png" for i in range(len(images))]
        for file, image in zip(self.files, images):
            file.write_bytes(data.encode_png(image))
        self.transform = v2.Compose([
            v2.ToImage(), v2.RandomHorizontalFlip(0.5), v2.RandomPhotometricDistort(p=0.5),
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
        self.transform = a.Compose([
            a.HorizontalFlip(p=0.5), a.RandomBrightnessContrast(0.125, 0.5, p=0.5),
            a.HueSaturationValue(p=0.5), a.ChannelShuffle(p=0.5), a.CLAHE(2.0, (4, 4), p=0.01),
            a.Normalize([0.5] * 3, [0.5] * 3)])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image = self.transform(image=self.images[i])["image"]
        return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def compare_images(n, size, peers):
    images, labels, _, _ = ocec.synthetic_eyes(n, size=(32, 64))
    augment = {"flip": 0.5, "photometric": 0.5, "clahe": 0.01}
    split = ocec.EyeSplit(images, labels, np.arange(n), augment=augment)
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
        processes.tune_allocator()
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
