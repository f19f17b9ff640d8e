"""Batches of large images, decoded and cropped by worker processes."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lqkd.data.encoded import EncodedImages
from lqkd.data.loader import Batch, EpochShuffle, TensorBatches
from lqkd.data.resized_crop import crop_draws, random_window
from lqkd.errors import UsageError

if TYPE_CHECKING:  # workers that do not fork import this file, and need no Lightning
    from lightning.pytorch import Trainer

_MOST_WORKERS = 8
_WORTH_WORKERS = 1000  # images: fewer are decoded before workers have started


class Key(NamedTuple):
    """What a worker is told: its state is in the training process, because persistent workers see no later change."""

    epoch: int
    indices: Tensor
    """(B,) int64"""


class CroppedImages(Dataset[Tensor | UsageError]):
    """Decodes, crops and resizes whole batches; pickled to the workers.

    Args:
        images: where the images are.
        seed: of the random crops.
        crop_scale: smallest and largest share of an image's area that a random crop takes; null for the centre crop
            of evaluation.
        resize_size: what the shorter side is resized to before the centre crop, in pixels.
    """

    def __init__(
        self, images: EncodedImages, *, seed: int, crop_scale: tuple[float, float] | None, resize_size: int
    ) -> None:
        self.images = images
        self.seed = seed
        self.crop_scale = crop_scale
        self.resize_size = resize_size

    def __getitem__(self, key: Key) -> Tensor | UsageError:
        """(B, C, H, W) uint8, channels last in memory; an error is returned, so that its message stays one line."""
        size = self.images.shape[-2:]
        batch = torch.empty(len(key.indices), *size, self.images.channels, dtype=torch.uint8).permute(0, 3, 1, 2)
        draws = crop_draws(seed=self.seed, epoch=key.epoch, indices=key.indices).tolist()
        try:
            for row, (index, draw) in enumerate(zip(key.indices.tolist(), draws, strict=True)):
                batch[row] = self.cropped(self.images.read(index), draw)
        except UsageError as error:
            return error
        return batch

    def cropped(self, pixels: np.ndarray, draws: list[list[float]]) -> Tensor:
        """What networks see of one image, (C, H, W) uint8.

        Args:
            pixels: (height, width, C) uint8 as read.
            draws: what decides its random window, see :func:`~lqkd.data.resized_crop.random_window`.
        """
        from torchvision.transforms.v2 import functional

        size = list(self.images.shape[-2:])
        image = torch.tensor(pixels).permute(2, 0, 1)  # (3, H, W); a copy, because Pillow's memory is read-only
        if self.crop_scale is None:
            resized = functional.resize(image, [self.resize_size], antialias=True)
            return functional.center_crop(resized, size)
        window = random_window(image.shape[1], image.shape[2], self.crop_scale, draws)
        return functional.resized_crop(image, *window, size, antialias=True)


class _Keys(Sampler[Key]):
    """The keys of one epoch; reads the epoch when the first is asked for."""

    def __init__(self, plan: TensorBatches) -> None:
        self.plan = plan
        self.batches: deque[Batch] = deque()  # those whose images are on their way
        self.start = 0

    def __iter__(self) -> Iterator[Key]:
        epoch = self.plan.sampler.epoch if isinstance(self.plan.sampler, EpochShuffle) else 0
        for batch in islice(self.plan, self.start, None):  # those left out are not decoded
            self.batches.append(batch)
            yield Key(epoch, batch.indices)


class WorkerBatches:
    """Iterate over a subset of encoded images as :class:`~lqkd.data.Batch`, this process's share only.

    Which samples make which batch, in which order and process, is decided by ``plan`` exactly as for images in memory.
    Workers only decode: the number of workers changes nothing but the speed. What they make is the images of a batch,
    or several of its fields by their names.

    Args:
        plan: the batches, over any tensor with one row per image.
        images: what workers decode and crop.
        workers: number of worker processes; 0 decodes in this process.
        pin_memory: whether batches are put where a GPU copies them from without waiting.

    Raises:
        UsageError: from the iteration, when an image cannot be read.
    """

    def __init__(self, plan: TensorBatches, images: CroppedImages, *, workers: int, pin_memory: bool) -> None:
        self.plan = plan
        self.images = images
        self.workers = workers
        self.pin_memory = pin_memory
        # Lightning reads these two as it would a DataLoader's: to set the epoch and to see whether a loader shuffles.
        self.sampler = plan.sampler
        self.batch_sampler = None
        self._start = 0
        self._kept: DataLoader[Tensor] | None = None

    def __len__(self) -> int:
        """The number of batches of every process."""
        return len(self.plan)

    def __iter__(self) -> Iterator[Batch]:
        # Workers are kept from epoch to epoch. An iteration within another one gets workers of its own: those kept can
        # serve one at a time.
        loader = self._loader() if self._kept is None else self._kept
        self._kept = None
        keys = loader.sampler
        assert isinstance(keys, _Keys)
        keys.batches.clear()
        keys.start, self._start = self._start, 0
        try:
            for images in loader:
                if isinstance(images, UsageError):
                    raise images
                fields = images if isinstance(images, dict) else {"images": images}
                yield keys.batches.popleft()._replace(**fields)
        finally:
            self._kept = loader

    def start_at(self, batch: int) -> None:
        """Let the next epoch that is read, and only that, start at this batch: a resumed training goes on there."""
        self._start = batch

    def _loader(self) -> DataLoader[Tensor]:
        return DataLoader(
            self.images,  # type: ignore[arg-type]
            batch_size=None,  # a key is a whole batch already
            sampler=_Keys(self.plan),
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),  # or each epoch would draw from the global one
        )


def check_workers(num_workers: int | None) -> int | None:
    """The setting ``num_workers`` of a data module.

    Raises:
        UsageError: when it is negative.
    """
    if num_workers is not None and num_workers < 0:
        raise UsageError(f"num_workers={num_workers} is not accepted: it must be at least 0.")
    return num_workers


def worker_batches(
    plan: TensorBatches, images: CroppedImages, num_workers: int | None, trainer: Trainer | None
) -> WorkerBatches:
    """The loader of a plan; without ``num_workers`` one for each core of this process, and none for few images."""
    if num_workers is None:
        processes = trainer.num_devices if trainer else 1  # of this machine, which share its cores
        per_process = min(_MOST_WORKERS, max(1, (os.cpu_count() or 1) // processes), len(plan))
        num_workers = 0 if len(plan.indices) < _WORTH_WORKERS else per_process
    on_gpu = trainer is not None and trainer.strategy.root_device.type == "cuda"
    return WorkerBatches(plan, images, workers=num_workers, pin_memory=on_gpu)
