"""What the training of every image classifier here has in common: its evaluation, and schedules that resume."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MeanMetric

from lqkd.errors import UsageError
from lqkd.losses.task import task_losses
from lqkd.modules.batches import Samples, check_range, samples_of
from lqkd.modules.beginning import Beginning, steps_taken
from lqkd.modules.callback_checks import check_averages, check_callbacks, check_monitors
from lqkd.modules.outputs import logits_of, try_network
from lqkd.modules.schedules import Schedule, TorchSchedule
from lqkd.modules.state import check_state
from lqkd.modules.steps import total_epochs, total_steps
from lqkd.modules.trainer_checks import check_trainer_numbers


def example_input(data: Any, device: torch.device) -> Tensor | None:
    """One input of zeros as the DataModule ``data`` yields them; None when it tells no shape.

    Its shape is (1, *data.image_shape) and its dtype ``data.input_dtype``, float32 where there is no such attribute:
    tokens of a text are int64.
    """
    shape = getattr(data, "image_shape", None)
    return None if shape is None else torch.zeros(1, *shape, dtype=getattr(data, "input_dtype", None), device=device)


TRAINED = "trained_weights"
"""Where a checkpoint keeps the state of the network that is trained, when its average is in ``state_dict``."""
AVERAGED = "averaged_weights"
"""Where callbacks find the state of the average when training goes on from such a checkpoint."""


class ImageClassifier(LightningModule):
    """Validates, tests and predicts with the network that :meth:`product` names, on batches (images, labels, ...).

    Images stand for whatever the networks take: sequences (B, channels, L) and tokens (B, L) are classified as well.

    Logs ``val/loss`` and ``val/acc``, ``test/loss`` and ``test/acc``: cross-entropy and top-1 accuracy of the samples
    that have a label (>= 0), exact over all ranks; NaN, with a warning, where no sample has one.

    Attributes:
        averaged: the average of the trained network's weights while a callback keeps one; None for none. It is held
            outside the module tree, and takes the network's place in evaluations and, under its names, in checkpoints.
    """

    averaged: nn.Module | None

    def __init__(self) -> None:
        super().__init__()
        # Not by self.log's own mean: it rounds the mean number of images of a rank down to a whole number.
        self.val_loss, self.val_accuracy = MeanMetric(), MeanMetric()
        self.test_loss, self.test_accuracy = MeanMetric(), MeanMetric()
        self.__dict__["averaged"] = None
        self._beginnings: list[Beginning] = []  # of every optimizer
        self._resumed = False  # from a checkpoint

    def trained(self) -> nn.Module:
        """The network that training changes."""
        raise NotImplementedError

    def product(self) -> nn.Module:
        """The network that training makes, which is evaluated and kept: the trained one, or the average of it."""
        return self.trained() if self.averaged is None else self.averaged

    def keep_average(self, network: nn.Module | None) -> None:
        """Let a network like the trained one take its place as the product; None for the trained one itself."""
        self.__dict__["averaged"] = network  # past nn.Module's registration

    def networks(self) -> Iterator[tuple[str, nn.Module]]:
        """Name and network of all that must take the data's images and tell its classes apart."""
        yield "network", self.product()

    def configure_callbacks(self) -> list[Any]:
        """Refuse impossible settings of the Trainer here: it is the first hook, before Lightning's checks.

        Raises:
            UsageError: when a setting or a callback is not possible.
        """
        if self.trainer.state.fn == TrainerFn.FITTING:
            check_trainer_numbers(self.trainer)
            check_averages(self.trainer.callbacks)  # type: ignore[attr-defined]
            check_callbacks(self.trainer, self)
        return []

    def metric_names(self) -> set[str]:
        """Names of what this module logs in a training, which a callback may go by; callbacks log more."""
        return {"train/loss", "val/loss", "val/acc"}

    def setup(self, stage: str) -> None:
        """Refuse networks that do not fit the data, before the first batch.

        Raises:
            UsageError: when a network cannot take the images or returns no logits, numbers of classes differ, or a
                callback waits for a metric that nothing logs.
        """
        if stage == "fit":
            check_monitors(self.trainer, self, self.metric_names())
        data: Any = getattr(self.trainer, "datamodule", None)
        image = example_input(data, self.device)
        if image is None:
            return
        counts = {"data": len(data.class_names)} if hasattr(data, "class_names") else {}
        for name, network in self.networks():
            counts[name] = try_network(network, name, image).shape[1]
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise UsageError(f"numbers of classes differ ({listed}): they must agree")

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of images (B, channels, H, W)."""
        return self.product()(images)

    def samples(self, batch: Any) -> Samples:
        """The images and labels of a batch on the device; see :func:`~lqkd.modules.batches.samples_of`."""
        return samples_of(batch, self.product())

    def accumulated_batches(self) -> int:
        """Batches whose gradients make one step."""
        return self.trainer.accumulate_grad_batches

    def start_schedule(self, optimizer: Optimizer, schedule: Schedule, setting: str) -> dict[str, Any]:
        """Lightning's scheduler configuration of an optimizer, whose settings are kept for a resumed training.

        Raises:
            UsageError: when the schedule of ``setting`` ends before the training.
        """
        steps = total_steps(self.trainer, self.accumulated_batches())
        made = schedule.configure(optimizer, steps)
        beginning = Beginning.of(optimizer, made["scheduler"])
        if isinstance(schedule, TorchSchedule):
            by_step = schedule.interval == "step"
            length = steps if by_step else total_epochs(self.trainer, self.accumulated_batches())
            if length is not None:
                beginning.check_lasts(optimizer, made["scheduler"], length, schedule.interval, setting)
        self._beginnings.append(beginning)
        return made

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the product under the names of the trained network, whose own state goes beside it."""
        if self.averaged is None:
            return
        state, prefix = checkpoint["state_dict"], self._prefix()
        average = {prefix + key: value for key, value in self.averaged.state_dict().items()}
        checkpoint[TRAINED] = {key: state[key] for key in average}
        checkpoint["state_dict"] = {**state, **average}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the trained network's own state where a training goes on, and with the product elsewhere."""
        self._resumed = True
        if TRAINED in checkpoint and self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            state, prefix = checkpoint["state_dict"], self._prefix()
            checkpoint[AVERAGED] = {key.removeprefix(prefix): state[key] for key in checkpoint[TRAINED]}
            checkpoint["state_dict"] = {**state, **checkpoint[TRAINED]}

    def _prefix(self) -> str:
        """What names in the trained network begin with in this module."""
        return next(f"{name}." for name, module in self.named_modules() if module is self.trained())

    def on_train_start(self) -> None:
        if (
            self._resumed and self._beginnings
        ):  # the checkpoint's optimizers have brought the settings of an earlier run
            parts = zip(self._beginnings, self.trainer.optimizers, self.trainer.lr_scheduler_configs, strict=True)
            for beginning, optimizer, config in parts:
                beginning.advance(optimizer, config.scheduler, steps_taken(config.scheduler))
        self._tell_global_batch()

    def _tell_global_batch(self) -> None:
        """Tell the global batch, for which the learning rate is meant: lqkd never changes one for the other."""
        size, processes = (
            getattr(getattr(self.trainer, "datamodule", None), "batch_size", None),
            self.trainer.world_size,
        )
        accumulated = self.accumulated_batches()
        if size is not None and processes * accumulated > 1:
            parts = [f"{processes} processes", f"{size} images"] + [f"{accumulated} batches"] * (accumulated > 1)
            rank_zero_info(f"global batch {processes * size * accumulated} = {' x '.join(parts)}")

    def on_validation_start(self) -> None:
        # What an evaluation in inference mode left behind cannot be updated by one outside of it, as within a training.
        self.val_loss.reset()
        self.val_accuracy.reset()

    def on_test_start(self) -> None:
        self.test_loss.reset()
        self.test_accuracy.reset()

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self._tell_unlabelled("validation", self.val_accuracy)

    def on_test_epoch_end(self) -> None:
        self._tell_unlabelled("test", self.test_accuracy)

    def _tell_unlabelled(self, split: str, accuracy: MeanMetric) -> None:
        if accuracy.update_called and accuracy.compute().isnan():  # a mean over nothing
            rank_zero_warn(f"no sample of the {split} split has a label: its loss and accuracy are not measured (nan)")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "val", self.val_loss, self.val_accuracy)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "test", self.test_loss, self.test_accuracy)

    def _evaluate(self, batch: Any, split: str, loss: MeanMetric, accuracy: MeanMetric) -> None:
        images, labels, _ = self.samples(batch)
        logits = logits_of(self(images), "network", len(images))
        check_range(labels, logits.shape[1])
        losses, labelled = task_losses(logits.float(), labels)
        loss.update(losses, labelled)
        accuracy.update((logits.argmax(dim=1) == labels).float(), labelled)
        self.log_dict({f"{split}/loss": loss, f"{split}/acc": accuracy}, on_step=False, on_epoch=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Class probabilities (B, C)."""
        images = self.samples(batch).images
        return logits_of(self(images), "network", len(images)).float().softmax(dim=-1)

    def check_state(self, state_dict: Mapping[str, Tensor]) -> None:
        """Refuse a state that does not belong to this module; see :func:`lqkd.modules.state.check_state`."""
        check_state(self, state_dict)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load a checkpoint's state.

        Raises:
            UsageError: when it is that of another architecture or of other bits.
        """
        self.check_state(state_dict)
        return super().load_state_dict(state_dict, strict, assign)
