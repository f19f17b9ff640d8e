"""A module that honours the contract of DistillModule and plays back the weights that a test prescribes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

BATCHES = 4
Play = Callable[[int, int], Tensor]


def ones(epoch: int, batch: int) -> Tensor:
    return torch.ones(2, 3)


class Bounded(nn.Module):
    """Stands for a regularizer with an upper bound of its weights."""

    def __init__(self, max_weight: float) -> None:
        super().__init__()
        self.max_weight = max_weight


class Dummy(LightningModule):
    """Returns ``weights(epoch, batch)`` and ``divergence(epoch, batch)`` (B, C); None stands for no regularizer.

    ``more(epoch, batch)`` are further outputs; ``watched`` lists the batches for which gradients were asked.
    Logs ``train/task`` = batch number and ``train/distill`` = 0.5, and ``val/acc`` = 0.75.
    """

    watch_gradients = False

    def __init__(
        self,
        weights: Play | None = ones,
        divergence: Play = ones,
        max_weight: float = 100.0,
        more: Callable[[int, int], dict[str, Any]] = lambda epoch, batch: {},
        regularizer: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.more = more
        self.watched: list[int] = []
        self.automatic_optimization = False
        self.parameter = nn.Parameter(torch.zeros(()))
        self.play, self.divergence = weights, divergence
        self.regularizer = None if weights is None else regularizer or Bounded(max_weight)

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Any]:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.parameter.square())
        optimizer.step()
        index = int(batch)  # the distributed sampler deals them out, so this is not batch_idx
        self.log_dict({"train/task": float(index), "train/distill": 0.5, "train/loss": 1.0}, batch_size=2)
        divergence = self.divergence(self.current_epoch, index)
        outputs: dict[str, Any] = {"loss": torch.zeros(()), "divergence": divergence, "labels": torch.zeros(2)}
        if self.play is not None:
            outputs["weights"] = self.play(self.current_epoch, index)
        if self.watch_gradients:
            self.watched.append(batch_idx)
        return outputs | self.more(self.current_epoch, index)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/acc", 0.75, batch_size=1, sync_dist=True)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test/acc", 0.5, batch_size=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(range(BATCHES), batch_size=1)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(range(1), batch_size=1)  # type: ignore[arg-type]

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(range(1), batch_size=1)  # type: ignore[arg-type]
