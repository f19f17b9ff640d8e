"""Batches of large images, decoded and cropped by worker processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lqkd.data.encoded import EncodedImages
from lqkd.data.loader import Batch, EpochShuffle, TensorBatches
from lqkd.data.resized_crop import crop_draws, random_window
from lqkd.errors import UsageError


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
        """(B, 3, S, S) uint8, channels last in memory; an error is returned, so that its message stays one line."""
        size = self.images.shape[-1]
        batch = torch.empty(len(key.indices), size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        draws = crop_draws(seed=self.seed, epoch=key.epoch, indices=key.indices).tolist()
        try:
            for row, (index, draw) in enumerate(zip(key.indices.tolist(), draws, strict=True)):
                batch[row] = self._cropped(self.images.read(index), draw, size)
        except UsageError as error:
            return error
        return batch

    def _cropped(self, pixels: np.ndarray, draws: list[list[float]], size: int) -> Tensor:
        from torchvision.transforms.v2 import functional

        image = torch.tensor(pixels).permute(2, 0, 1)  # (3, H, W); a copy, because Pillow's memory is read-only
        if self.crop_scale is None:
            resized = functional.resize(image, [self.resize_size], antialias=True)
            return functional.center_crop(resized, [size, size])
        window = random_window(image.shape[1], image.shape[2], self.crop_scale, draws)
        return functional.resized_crop(image, *window, [size, size], antialias=True)


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
    Workers only decode: the number of workers changes nothing but the speed.

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
                yield keys.batches.popleft()._replace(images=images)
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
