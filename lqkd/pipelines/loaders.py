"""DataLoaders as a DataModule, and the batches of either."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden

from lqkd.data.reading import first_batch, only_loader
from lqkd.errors import UsageError

_NAMES = {"train": "training", "val": "validation", "test": "test"}


class _Batches:
    """Batches in a list, which Lightning would take for several loaders."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class Loaders(LightningDataModule):
    """The loaders of a user, as the splits that they are for.

    Args:
        train: yields batches, as often as it is asked; a list of them, say.
        val: likewise; None for no such split.
        test: likewise.
    """

    def __init__(self, train: Any, val: Any = None, test: Any = None) -> None:
        super().__init__()
        for split, loader in (("train", train), ("val", val), ("test", test)):
            if loader is not None:  # Lightning takes a split for one that is there by its method
                one = _Batches(loader) if isinstance(loader, (list, tuple)) else loader
                setattr(self, f"{split}_dataloader", lambda one=one: one)


def has(data: LightningDataModule, split: str) -> bool:
    """Whether there is a split ``train``, ``val`` or ``test``."""
    return is_overridden(f"{split}_dataloader", data, LightningDataModule)


def first_to_train_on(data: LightningDataModule) -> Any:
    """The first batch, as its loader gives it; no random number is drawn.

    Raises:
        UsageError: when there is none.
    """
    data.prepare_data()
    data.setup("fit")
    batch = first_batch(_loader(data, "train"), "training")
    if batch is None:
        raise UsageError("train has no batch: there is nothing to train on")
    return batch


def batches(data: LightningDataModule, split: str, trainer: Trainer) -> Iterator[Any]:
    """Batches of a split on the CPU, as the task takes them in an evaluation.

    Args:
        data: of the training, which has set it up: once more it might split otherwise.
        split: one that there is.
        trainer: which has trained.
    """
    for batch in _loader(data, split):
        yield move_data_to_device(trainer.strategy.batch_to_device(batch, dataloader_idx=0), torch.device("cpu"))


def _loader(data: LightningDataModule, split: str) -> Any:
    return only_loader(getattr(data, f"{split}_dataloader")(), _NAMES[split])
