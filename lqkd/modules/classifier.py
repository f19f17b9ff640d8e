"""Full-precision training of teachers and float students."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import SGD

from lqkd.errors import UsageError
from lqkd.losses.task import task_loss
from lqkd.modules.base import ImageClassifier
from lqkd.modules.batches import Samples, check_range
from lqkd.modules.divergence import LossWatch, diverged
from lqkd.modules.hyperparameters import save_plain_hyperparameters
from lqkd.modules.optimizers import optimizer_of
from lqkd.modules.outputs import enough_samples, logits_of, try_network
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
        # Loss, logits and the images with their labels of a step between forward and backward.
        self._batch: tuple[Tensor, Tensor, Samples] | None = None

    def trained(self) -> nn.Module:
        return self.network

    def configure_optimizers(self) -> Any:
        optimizer = optimizer_of(self.optimizer, "optimizer", self.network.parameters())
        self._beginnings.clear()
        return {"optimizer": optimizer, "lr_scheduler": self.start_schedule(optimizer, self.schedule, "schedule")}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        samples = self.samples(batch)
        try:
            with enough_samples("network", len(samples.images)):
                output = self.network(samples.images)
        except (RuntimeError, ValueError):
            try_network(self.network, "network", samples.images[:2])  # says so in one sentence if it is the images
            raise
        logits = logits_of(output, "network", len(samples.images), training=True).float()
        loss = task_loss(logits, samples.labels, samples.targets, self.label_smoothing)
        self._watch.ask(loss)
        self._batch = (loss.detach(), logits.detach(), samples)
        self.log("train/loss", loss, batch_size=len(samples.labels))
        return loss

    def on_after_backward(self) -> None:
        if self._batch is not None and not self._watch.finite():
            loss, logits, samples = self._batch
            check_range(samples.labels, logits.shape[1])
            diverged(self, {"the loss": loss}, self.network, samples.images)
        self._batch = None
