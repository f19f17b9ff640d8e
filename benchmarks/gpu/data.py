"""CIFAR on the device: images and augmentation, from files that were brought along in pieces."""

from __future__ import annotations

import os
import shutil
import tarfile
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.plan import Settings
from lqkd.data import CIFAR10, CIFAR100, Batch, ImageDataModule
from lqkd.data.loader import EpochShuffle, TensorBatches
from lqkd.errors import UsageError
from lqkd.utils.files import default_cache_dir

SETS: dict[str, type[CIFAR10]] = {"cifar10": CIFAR10, "cifar100": CIFAR100}
CLASSES = {"cifar10": 10, "cifar100": 100}
NORMALISATION: dict[str, dict[str, Any]] = {
    "cifar10": {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},  # of the published weights
    "cifar100": {},
}
VALIDATION = 0.02
"""1,000 images, for the curve alone: nothing is chosen by them, and 49,000 are left of the 50,000 of the literature."""


def data_folder(given: Path | None) -> Path:
    """The folder of images and weights.

    Raises:
        UsageError: when none is named.
    """
    if given is None and "LQKD_DATA" not in os.environ:
        raise UsageError("--data is missing: name the folder of images and weights, here or by LQKD_DATA")
    return Path(os.environ["LQKD_DATA"]) if given is None else given


def image_root(name: str, folder: Path) -> Path:
    """The folder that :class:`CIFAR10` reads ``name`` from: ``folder/name``, or an archive, unpacked into the cache.

    Raises:
        UsageError: when ``folder`` has neither ``name`` nor ``name.tar.gz``, whole or in pieces (``split -b 50m``).
    """
    if (folder / name).is_dir():
        return folder / name
    pieces = sorted(folder.glob(f"{name}.tar.gz*"))
    if not pieces:
        raise UsageError(f"{folder} has neither {name}/ nor {name}.tar.gz, whole or in pieces {name}.tar.gz.*")
    scratch = default_cache_dir() / "gpu_pack"
    target = scratch / name
    if not target.is_dir():
        scratch.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=scratch) as temporary:
            beside = Path(temporary) / "unpacked"
            with open(Path(temporary) / "archive", "w+b") as joined:
                for piece in pieces:
                    with open(piece, "rb") as stream:
                        shutil.copyfileobj(stream, joined)
                joined.seek(0)
                with tarfile.open(fileobj=joined, mode="r:gz") as archive:
                    archive.extractall(beside, filter="data")
            beside.rename(target)
    return target


class Feed:
    """The batches of one seed of one data set, as its data module and Lightning's loop would give them, on the device.

    Args:
        name: ``cifar10`` or ``cifar100``.
        seed: of split, order and augmentation.
        root: folder of the images.
        settings: of the visit.
        device: where the images are kept.
    """

    def __init__(self, name: str, seed: int, root: Path, settings: Settings, device: torch.device) -> None:
        self.data: ImageDataModule = SETS[name](
            root=str(root),
            seed=seed,
            batch_size=settings.batch,
            eval_batch_size=1000 if settings.whole else 100,
            validation_fraction=VALIDATION,
            **NORMALISATION[name],
        )
        self.data.setup("fit")
        loader = self.data.train_dataloader()
        assert isinstance(loader, TensorBatches)
        assert isinstance(loader.sampler, EpochShuffle)
        self._order = loader.sampler
        self._batch = loader.batch_size
        self.device = device
        self._images, self._labels = loader.images.to(device), loader.labels.to(device)
        self.steps = min(len(loader), settings.steps_per_epoch or len(loader))
        """Of an epoch."""
        self._most_evaluated = None if settings.whole else 1

    def batches(self, epoch: int, first: int, count: int) -> Batch:
        """Batches ``first`` to ``first + count`` of an epoch, augmented and normalised, as one."""
        self._order.set_epoch(epoch)
        chosen = self._order.order()[first * self._batch : (first + count) * self._batch].to(self.device)
        batch = Batch(self._images.index_select(0, chosen), self._labels.index_select(0, chosen), chosen)
        return self.data.preprocess(batch, train=True, epoch=epoch)

    def parts(self, batch: Batch) -> list[Batch]:
        """What :meth:`batches` gives, batch by batch."""
        parts = zip(*(tensor.split(self._batch) for tensor in batch[:3]), strict=True)
        return [Batch(*part) for part in parts]

    def evaluation(self, split: str) -> list[tuple[Tensor, Tensor]]:
        """Images and labels of ``val`` or ``test``, on the device."""
        loader = self.data.val_dataloader() if split == "val" else self.data.test_dataloader()
        found = []
        for batch in islice(loader, self._most_evaluated):
            moved = Batch(*(tensor.to(self.device) for tensor in batch[:3]))
            prepared = self.data.preprocess(moved, train=False, epoch=0)
            found.append((prepared.images, prepared.labels))
        return found
