"""Full-precision training of teachers and float students."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import SGD

from lqkd.data.reading import check_collates
from lqkd.modules.base import TaskModule
from lqkd.modules.compilation import Compile
from lqkd.modules.divergence import LossWatch, diverged
from lqkd.modules.hyperparameters import save_plain_hyperparameters
from lqkd.modules.optimizers import optimizer_of
from lqkd.modules.schedules import Cosine, Schedule
from lqkd.modules.state import start_from
from lqkd.modules.tasks import task_of
from lqkd.tasks import Asked, Inputs, Task
from lqkd.tasks.trial import enough_samples, refuse_auxiliary, try_network


class ClassifierModule(TaskModule):
    """Trains a network on labels in full precision; the run folder's ``network.safetensors`` holds the result.

    Args:
        network: the network.
        weights: ``builtin:NAME`` or a file with weights to start from; null keeps its own.
        optimizer: its optimizer.
        schedule: learning rate over the training; null for a cosine to zero.
        label_smoothing: of the cross-entropy of a classification, 0 <= e < 1.
        replace_head: whether weights for another number of classes are accepted: the last layer then starts anew.
        task: what the network is trained for; null for the classification of images.
        compile: whether training passes run through ``torch.compile``, as of :class:`lqkd.modules.DistillModule`.

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
        task: Task | None = None,
        compile: Compile = False,
    ) -> None:
        super().__init__(task_of(task, label_smoothing), compile)
        save_plain_hyperparameters(self)
        start_from(network, weights, replace_head)
        self.network = network
        self.optimizer = optimizer
        self.schedule = schedule or Cosine()
        self._watch = LossWatch()
        self._batch: tuple[Tensor, Any, Any, Inputs] | None = None
        """Loss, outputs, batch and inputs of a step between forward and backward."""
        self._tried = False
        self._started = 0.0  # of a step

    def trained(self) -> nn.Module:
        return self.network

    def configure_optimizers(self) -> Any:
        optimizer = optimizer_of(self.optimizer, "optimizer", self.network.parameters())
        self._beginnings.clear()
        return {"optimizer": optimizer, "lr_scheduler": self.start_schedule(optimizer, self.schedule, "schedule")}

    def on_fit_start(self) -> None:
        super().on_fit_start()
        check_collates(self.trainer.train_dataloader, "training")
        if self.compilation.setting:
            self.compilation.start("network", self.network)
        self.compilation.start_augmentation(self.trainer.datamodule, self.device)  # type: ignore[attr-defined]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self._started = time.perf_counter()
        self.compilation.begin_step()
        inputs = self.inputs(batch)
        self.samples_in_batch = len(inputs)
        try:
            with enough_samples("network", len(inputs)):
                returned = inputs.call(self.compilation.of(self.network))
        except (RuntimeError, ValueError):
            try_network(self.network, "network", inputs, self.task)  # says so in one sentence if it is the inputs
            raise
        if not self._tried:
            refuse_auxiliary(self.network, "network", inputs, returned)
            if self.task.unlabelled(batch):
                rank_zero_warn("the first batch has no labels: there is nothing that a float training learns from it")
            self._tried = True
        outputs = self.task.outputs(returned, Asked("network", len(inputs), training=True))
        loss = self.task.loss(outputs, batch)
        self._watch.ask(loss)
        self._batch = (loss.detach(), outputs, batch, inputs)
        self.log("train/loss", loss, batch_size=len(inputs))
        return loss

    def on_after_backward(self) -> None:
        if self._batch is not None and not self._watch.finite():
            loss, outputs, batch, inputs = self._batch
            self.task.check_batch(outputs, batch)
            diverged(self, {"the loss": loss}, self.network, inputs)
        self._batch = None
        self.compilation.end_step(time.perf_counter() - self._started)
