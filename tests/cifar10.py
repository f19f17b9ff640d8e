"""A part of the real CIFAR-10, where LQKD_DATA has it: to unpack all of it takes longer than what is asked of it."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path
from typing import Any

from lqkd.data import CIFAR10

DATA = Path(os.environ.get("LQKD_DATA", "missing"))
EVERY = {"train": 20, "test": 5}
"""Of so many images of a class one is taken: 2,500 to train and 2,000 to test."""


def part_of_cifar10(folder: Path, **settings: Any) -> CIFAR10:
    """Set up, with the normalisation that the published weights were trained with."""
    seen = dict.fromkeys(EVERY, 0)
    with tarfile.open(DATA / "cifar10.tar.gz") as archive:
        for member in archive:
            split = member.name.partition("/")[0]
            if member.isfile():
                if seen[split] % EVERY[split] == 0:
                    archive.extract(member, folder, filter="data")
                seen[split] += 1
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    data = CIFAR10(root=str(folder), mean=mean, std=std, cache_dir=str(folder / "cache"), **settings)
    data.setup()
    return data
