"""What the training of every image classifier here has in common: its evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lqkd.errors import UsageError
from lqkd.losses.task import task_losses
from lqkd.modules.batches import Samples, check_range, samples_of
from lqkd.modules.outputs import logits_of, try_network
from lqkd.modules.state import check_state


def example_input(data: Any, device: torch.device) -> Tensor | None:
    """One input of zeros as the DataModule ``data`` yields them; None when it tells no shape.

    Its shape is (1, *data.image_shape) and its dtype ``data.input_dtype``, float32 where there is no such attribute:
    tokens of a text are int64.
    """
    shape = getattr(data, "image_shape", None)
    return None if shape is None else torch.zeros(1, *shape, dtype=getattr(data, "input_dtype", None), device=device)


class ImageClassifier(LightningModule):
    """Validates, tests and predicts with the network that :meth:`product` names, on batches (images, labels, ...).

    Images stand for whatever the networks take: sequences (B, channels, L) and tokens (B, L) are classified as well.

    Logs ``val/loss`` and ``val/acc``, ``test/loss`` and ``test/acc``: cross-entropy and top-1 accuracy of the samples
    that have a label (>= 0), exact over all ranks; NaN, with a warning, where no sample has one.
    """

    def __init__(self) -> None:
        super().__init__()
        # Not by self.log's own mean: it rounds the mean number of images of a rank down to a whole number.
        self.val_loss, self.val_accuracy = MeanMetric(), MeanMetric()
        self.test_loss, self.test_accuracy = MeanMetric(), MeanMetric()

    def product(self) -> nn.Module:
        """The network that training makes."""
        raise NotImplementedError

    def networks(self) -> Iterator[tuple[str, nn.Module]]:
        """Name and network of all that must take the data's images and tell its classes apart."""
        yield "network", self.product()

    def setup(self, stage: str) -> None:
        """Refuse networks that do not fit the data, before the first batch.

        Raises:
            UsageError: when a network cannot take the images or returns no logits, or numbers of classes differ.
        """
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

    def on_train_start(self) -> None:
        """Tell the global batch, for which the learning rate is meant: lqkd never changes one for the other."""
        size, processes = (
            getattr(getattr(self.trainer, "datamodule", None), "batch_size", None),
            self.trainer.world_size,
        )
        accumulated = getattr(self, "accumulate_grad_batches", self.trainer.accumulate_grad_batches)
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
