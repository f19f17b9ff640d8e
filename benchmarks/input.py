"""The cost of input: batches ready for the network, by lqkd and by torchvision's transforms of single PIL images.

    [LQKD_DATA=FOLDER] python -m benchmarks.input --json FILE [--csv FILE] [--rounds N] [--images N]

"cifar" is images in the shape of CIFAR-10 in memory, random crop and flip, normalised; "cifar+randaugment" has two
operations of RandAugment besides. torchvision's peer is its own way to train on CIFAR-10: one PIL image at a time in a
DataLoader. "photographs" is the files of FOLDER/imagenet_sample, repeated, decoded, cropped at random to 224 pixels,
flipped and normalised, by both in two workers; without LQKD_DATA it is left out.

All contestants run in one process and in alternation, an epoch each round, after a first one that is not counted and
that starts the workers; what counts are the ratios of the medians. The process itself has one thread.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets
from torchvision import transforms as peer

from lqkd.data import ImageDataModule, ImageFolder
from lqkd.data.base import ImageSet
from lqkd.utils.files import atomic_path

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
WORKERS = 2
BATCH = 128  # of small images
PHOTOGRAPHS_BATCH = 32

Epoch = Callable[[int], int]  # from the epoch's number to the images it had


class Random(ImageDataModule):
    """Random images in the shape of CIFAR-10."""

    default_mean, default_std = MEAN, STD

    def __init__(self, images: np.ndarray, **settings: Any) -> None:
        super().__init__(batch_size=BATCH, seed=0, validation_fraction=0.01, **settings)
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()

    def load(self) -> ImageSet:
        labels = torch.arange(len(self.images)) % 10
        return ImageSet(self.images, labels, self.images[:10], labels[:10], tuple(map(str, range(10))))


class SingleImages(Dataset[tuple[Any, int]]):
    """What torchvision.datasets.CIFAR10 does with the same images."""

    def __init__(self, images: np.ndarray, transform: Callable[[Image.Image], Any]) -> None:
        self.images = images
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.images[index])), index % 10


def epochs_of(data: ImageDataModule) -> Epoch:
    """An epoch of lqkd: loader and preprocessing, as training has them."""
    data.setup("fit")
    loader: Any = data.train_dataloader()

    def epoch(number: int) -> int:
        loader.sampler.set_epoch(number)
        return sum(len(data.preprocess(batch, train=True, epoch=number).images) for batch in loader)

    return epoch


def epochs_of_peer(data: Dataset[Any], batch: int, workers: int) -> Epoch:
    loader: Iterable[Any] = DataLoader(
        data, batch_size=batch, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0
    )
    return lambda number: sum(len(images) for images, _ in loader)


def small_images(count: int, rand_augment: int) -> dict[str, Epoch]:
    images = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    steps = [peer.RandomCrop(32, padding=4), peer.RandomHorizontalFlip()]
    if rand_augment:
        steps.append(peer.RandAugment(rand_augment))
    transform = peer.Compose([*steps, peer.ToTensor(), peer.Normalize(MEAN, STD)])
    single = SingleImages(images, transform)
    return {
        "lqkd": epochs_of(Random(images, crop_padding=4, horizontal_flip=True, rand_augment=rand_augment)),
        "torchvision, 0 workers": epochs_of_peer(single, BATCH, 0),
        f"torchvision, {WORKERS} workers": epochs_of_peer(single, BATCH, WORKERS),
    }


def photographs(source: Path, folder: Path, count: int) -> dict[str, Epoch]:
    files = sorted(source.glob("*/*.JPEG"))
    for number in range(count):  # two classes, which both sides read as folders
        target = folder / str(number % 2) / f"{number}.jpeg"
        target.parent.mkdir(exist_ok=True)
        target.symlink_to(files[number // 2 % len(files)])
    transform = peer.Compose(
        [peer.RandomResizedCrop(224), peer.RandomHorizontalFlip(), peer.ToTensor(), peer.Normalize(MEAN, STD)]
    )
    ours = ImageFolder(
        root=str(folder),
        batch_size=PHOTOGRAPHS_BATCH,
        seed=0,
        validation_fraction=0.01,
        test_fraction=0.01,
        num_workers=WORKERS,
    )
    return {
        f"lqkd, {WORKERS} workers": epochs_of(ours),
        f"torchvision, {WORKERS} workers": epochs_of_peer(
            datasets.ImageFolder(str(folder), transform), PHOTOGRAPHS_BATCH, WORKERS
        ),
    }


def measure(name: str, contestants: dict[str, Epoch], rounds: int) -> dict[str, Any]:
    for epoch in contestants.values():
        epoch(0)
    times: dict[str, list[float]] = {label: [] for label in contestants}
    for turn in range(rounds):
        for label, epoch in contestants.items():
            started = time.perf_counter()
            images = epoch(turn + 1)
            times[label].append((time.perf_counter() - started) / images)
    medians = {label: statistics.median(values) for label, values in times.items()}
    ours, *_ = medians.values()
    return {
        "input": name,
        "rounds": rounds,
        "microseconds_per_image": {label: round(1e6 * value, 2) for label, value in medians.items()},
        "times_as_fast": {label: round(value / ours, 2) for label, value in medians.items()},
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
    }


def write_csv(path: Path, results: list[dict[str, Any]]) -> None:
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["input", "contestant", "rounds", "microseconds_per_image", "lqkd_times_as_fast", "machine"])
        for result in results:
            for label, value in result["microseconds_per_image"].items():
                ratio = result["times_as_fast"][label]
                writer.writerow([result["input"], label, result["rounds"], value, ratio, result["machine"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file for the result")
    parser.add_argument("--csv", type=Path, help="file for the result as a table")
    parser.add_argument("--rounds", type=int, default=7, help="epochs of each contestant that are timed")
    parser.add_argument("--images", type=int, default=10_000, help="small images in an epoch")
    parser.add_argument("--photographs", type=int, default=400, help="photographs in an epoch")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # on a machine that does other work as well, two threads wait for each other
    results = []

    def add(name: str, contestants: dict[str, Epoch]) -> None:
        result = measure(name, contestants, arguments.rounds)
        results.append(result)
        with atomic_path(arguments.json) as temporary:
            Path(temporary).write_text(json.dumps(results, indent=2) + "\n")
        print(f"{name:28}{'us/image':>10}{'lqkd is':>10}")
        for label, value in result["microseconds_per_image"].items():
            print(f"{label:28}{value:10.2f}{result['times_as_fast'][label]:9.1f}x", flush=True)

    add("cifar", small_images(arguments.images, 0))
    add("cifar+randaugment", small_images(arguments.images, 2))
    source = Path(os.environ.get("LQKD_DATA", "")) / "imagenet_sample" / "val"
    if "LQKD_DATA" in os.environ and source.is_dir():
        with tempfile.TemporaryDirectory() as folder:
            add("photographs", photographs(source, Path(folder), arguments.photographs))
    else:
        print("photographs left out: LQKD_DATA names no folder with imagenet_sample/val")
    if arguments.csv is not None:
        write_csv(arguments.csv, results)


if __name__ == "__main__":
    main()
