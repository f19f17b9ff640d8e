"""The common parent of image sets that are read from a folder of the user's, with or without parts."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lqkd.data.base import ImageDataModule
from lqkd.data.split import stratified_split
from lqkd.errors import UsageError
from lqkd.utils.counter_rng import STREAM_TEST

_TEST_SEED = 0  # never the run's: every run is tested on the same images


class FolderDataModule(ImageDataModule):
    """Images in a folder: tells how many are for what, and holds out those for testing where there are no parts.

    Attributes:
        root: the folder.
        test_fraction: share of all images held out for testing where the folder has no parts, in (0, 1).
    """

    root: Path
    test_fraction: float
    _given_validation = 0
    """Images at the end of the training set that the folder has for validation; 0 where they are held out."""

    def setup(self, stage: str | None = None) -> None:
        """List the images and hold out those for validation and testing, once for all stages."""
        first = self._images is None
        super().setup(stage)
        if first:
            counts = len(self.train_indices), len(self.val_indices), len(self._loaded().test_labels)
            rank_zero_info("images of %s: %d to train, %d to validate, %d to test", self.root, *counts)

    def _hold_out(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        if self._given_validation:
            everything = torch.arange(len(labels))
            return everything[-self._given_validation :], everything[: -self._given_validation]
        return super()._hold_out(labels)

    def _test_apart(self, labels: Tensor) -> dict[str, list[int]]:
        """Positions of the parts ``train`` and ``test``, the same ones in every run, stratified by (N,) labels."""
        size = round(self.test_fraction * len(labels))
        if not 0 < size < len(labels):
            raise UsageError(
                f"test_fraction={self.test_fraction} holds out {size} of {len(labels)} images: at least one must be"
                " held out and one left."
            )
        test, train = stratified_split(torch.arange(len(labels)), labels, size, seed=_TEST_SEED, stream=STREAM_TEST)
        return {"train": train.tolist(), "test": test.tolist()}


def check_test_fraction(test_fraction: float) -> float:
    """``test_fraction``; UsageError where it is not in (0, 1)."""
    if not 0 < test_fraction < 1:
        raise UsageError(f"test_fraction={test_fraction} is not accepted: it must lie between 0 and 1, both excluded.")
    return test_fraction


def of_one_class(count: int) -> Tensor:
    """Labels (N,) int64 of images that have no class by which a split could be stratified."""
    return torch.zeros(count, dtype=torch.int64)
