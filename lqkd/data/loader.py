"""Batches cut straight out of tensors in memory, shared out over processes exactly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import SequentialSampler

from lqkd.errors import UsageError
from lqkd.utils.counter_rng import STREAM_ORDER, random_bits


class Batch(NamedTuple):
    """What every loader yields and every step receives."""

    images: Tensor
    """(B, C, H, W): uint8 from the loader, normalised float32 once the data module has preprocessed it."""
    labels: Any
    """(B,) int64 classes; of a mixed image the class that has the larger share of it. For segmentation (B, H, W), for
    detection a list with a dict of ``boxes`` (N, 4) and ``labels`` (N,) for each image."""
    indices: Tensor
    """(B,) int64 positions in the data set: the same sample has the same number in every epoch and process."""
    targets: Tensor | None = None
    """(B, classes) float32 probabilities of classes, where mixing has made them differ from ``labels``."""


class EpochShuffle:
    """The order of the samples in each epoch: a pure function of (seed, epoch, the set of samples).

    Lightning calls :meth:`set_epoch` on whatever a loader calls ``sampler``, before each epoch.
    """

    def __init__(self, indices: Tensor, seed: int) -> None:
        self.indices = indices
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, counted from 0, whose order comes next."""
        self.epoch = epoch

    def order(self) -> Tensor:
        """Return the (N,) int64 sample ids in the order of the current epoch."""
        return self.indices[random_bits(self.seed, self.epoch, self.indices, STREAM_ORDER).argsort(stable=True)]


class TensorBatches:
    """Iterate over a subset of tensors in memory as :class:`Batch`, this process's share only.

    Every process yields the same number of batches, so that DDP never waits for a partner that has finished.

    **Training** (``shuffle=True``): global batch t is ``order[t * B * W:(t + 1) * B * W]`` for B samples per process
    and W processes, and rank r takes every W-th of it from the r-th on: W processes with B each see the same global
    batches as one process with B * W. The last, short global batch is dropped with ``drop_last``; otherwise it is
    shared out in the same way, unless it has fewer than W samples and would leave a process without one.

    **Evaluation** (``shuffle=False``): every sample exactly once over all processes, none padded, none dropped. Rank r
    owns ``indices[r::W]`` and cuts it into equal parts, sizes differing by at most one. No part is empty: where shares
    differ by one and ``batch_size`` is 1, the larger share has one batch of 2 instead of a batch more.

    Args:
        images: (N, C, H, W) uint8.
        labels: (N,) int64.
        indices: (M,) int64 positions of the subset in ``images``.
        batch_size: samples per process and batch.
        shuffle: training (shuffled anew in each epoch) or evaluation (the order of ``indices``).
        seed: of the shuffling; unused in evaluation.
        drop_last: leave out the last, short global batch of training; evaluation never drops.
        rank: this process.
        world_size: the number of processes.
        order: another order for training than a shuffle of all samples.

    Raises:
        UsageError: when there are too few samples for every process to get a batch.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        indices: Tensor,
        *,
        batch_size: int,
        shuffle: bool,
        seed: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        order: EpochShuffle | None = None,
    ) -> None:
        self.images = images
        self.labels = labels
        self.indices = indices
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.rank = rank
        self.world_size = world_size
        self._start = 0
        self._shuffle = (order or EpochShuffle(indices, seed)) if shuffle else None
        # Lightning reads these two as it would a DataLoader's: to set the epoch and to see whether a loader shuffles.
        self.sampler: EpochShuffle | SequentialSampler = self._shuffle or SequentialSampler(range(len(indices)))
        self.batch_sampler = None
        if len(self) == 0:
            needed = world_size * batch_size if shuffle and drop_last else world_size
            raise UsageError(
                f"batch_size={batch_size} on {world_size} process(es) needs at least {needed} samples"
                f" for one batch in each process, but there are {len(indices)}."
            )

    def __len__(self) -> int:
        """The number of batches of every process."""
        samples, ranks = len(self.indices), self.world_size
        if self._shuffle is None:
            smallest_share, largest_share = samples // ranks, -(-samples // ranks)
            return min(-(-largest_share // self.batch_size), smallest_share)
        full, left_over = divmod(samples, self.batch_size * ranks)
        return full + int(left_over >= ranks and not self.drop_last)

    def start_at(self, batch: int) -> None:
        """Let the next epoch that is read, and only that, start at this batch: a resumed training goes on there."""
        self._start = batch

    def __iter__(self) -> Iterator[Batch]:
        # A generator, so that the epoch is read at the first batch: Lightning makes the first iterator of a run, or of
        # a resumed run, before it calls set_epoch.
        if self._shuffle is None:
            parts = self.indices[self.rank :: self.world_size].tensor_split(len(self))
        else:
            order, step = self._shuffle.order(), self.batch_size * self.world_size
            starts = range(0, len(self) * step, step)
            parts = tuple(order[start + self.rank : start + step : self.world_size] for start in starts)
        first, self._start = self._start, 0
        for part in parts[first:]:
            # index_select copies whole images; images[part] goes value by value and takes 16 times as long on a CPU.
            yield Batch(self.images.index_select(0, part), self.labels.index_select(0, part), part)
