"""Full-precision training of teachers and float students."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import SGD

from lqkd.errors import UsageError
from lqkd.modules.base import ImageClassifier
from lqkd.modules.divergence import LossWatch, diverged
from lqkd.modules.hyperparameters import save_plain_hyperparameters
from lqkd.modules.optimizers import optimizer_of
from lqkd.modules.schedules import Cosine, Schedule
from lqkd.modules.state import start_from


class ClassifierModule(ImageClassifier):
    """Trains a network on labels in full precision; the run folder's ``network.safetensors`` holds the result.

    Args:
        network: the network.
        weights: ``builtin:NAME`` or a file with weights to start from; null keeps its own.
        optimizer: its optimizer.
        schedule: learning rate over the training; null for a cosine to zero.
        label_smoothing: of the cross-entropy, 0 <= e < 1.
        replace_head: whether weights for another number of classes are accepted: the last layer then starts anew.

    Raises:
        UsageError: when a setting is not possible.
    """

    def __init__(
        self,
        network: nn.Module,
        weights: str | None = None,
        optimizer: OptimizerCallable = lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=5e-4),
        schedule: Schedule | None = None,
        label_smoothing: float = 0.0,
        replace_head: bool = False,
    ) -> None:
        super().__init__()
        save_plain_hyperparameters(self)
        if not 0 <= label_smoothing < 1:
            raise UsageError(f"label_smoothing={label_smoothing!r} is not possible: it must be >= 0 and < 1")
        start_from(network, weights, replace_head)
        self.network = network
        self.optimizer = optimizer
        self.schedule = schedule or Cosine()
        self.label_smoothing = label_smoothing
        self._watch = LossWatch()
        self._batch: tuple[Tensor, Tensor] | None = None  # loss and images of a step between forward and backward

    def trained(self) -> nn.Module:
        return self.network

    def configure_optimizers(self) -> Any:
        optimizer = optimizer_of(self.optimizer, "optimizer", self.network.parameters())
        self._beginnings.clear()
        return {"optimizer": optimizer, "lr_scheduler": self.start_schedule(optimizer, self.schedule, "schedule")}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch[0], batch[1]
        targets = getattr(batch, "targets", None)  # class probabilities of mixed images
        loss = F.cross_entropy(
            self.network(images).float(), labels if targets is None else targets, label_smoothing=self.label_smoothing
        )
        self._watch.ask(loss)
        self._batch = (loss.detach(), images)
        self.log("train/loss", loss, batch_size=len(labels))
        return loss

    def on_after_backward(self) -> None:
        if self._batch is not None and not self._watch.finite():
            loss, images = self._batch
            diverged(self, {"the loss": loss}, self.network, images)
        self._batch = None
