"""What the training of every image classifier here has in common: its evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lqkd.errors import UsageError, first_line
from lqkd.modules.callback_checks import check_callbacks, check_monitors
from lqkd.modules.state import check_state
from lqkd.modules.trainer_checks import check_trainer_numbers
from lqkd.quantization.modes import evaluating


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

    Logs ``val/loss`` and ``val/acc``, ``test/loss`` and ``test/acc``: cross-entropy and top-1 accuracy, exact over
    all ranks.
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

    def configure_callbacks(self) -> list[Any]:
        """Refuse impossible settings of the Trainer here: it is the first hook, before Lightning's less clear checks.

        Raises:
            UsageError: when a setting or a callback is not possible.
        """
        if self.trainer.state.fn == TrainerFn.FITTING:
            check_trainer_numbers(self.trainer)
            check_callbacks(self.trainer, self)
        return []

    def metric_names(self) -> set[str]:
        """Names of what this module logs in a training, which a callback may go by; callbacks log more."""
        return {"train/loss", "val/loss", "val/acc"}

    def setup(self, stage: str) -> None:
        """Refuse networks that do not fit the data, before the first batch.

        Raises:
            UsageError: when a network cannot take the images, numbers of classes differ, or a callback waits for a
                metric that nothing logs.
        """
        if stage == "fit":
            check_monitors(self.trainer, self, self.metric_names())
        data: Any = getattr(self.trainer, "datamodule", None)
        image = example_input(data, self.device)
        if image is None:
            return
        counts = {"data": len(data.class_names)} if hasattr(data, "class_names") else {}
        for name, network in self.networks():
            with torch.no_grad(), evaluating(network):
                try:
                    logits = network(image)
                except (RuntimeError, AssertionError, TypeError, ValueError) as error:
                    shape = "x".join(map(str, image.shape[1:]))
                    raise UsageError(
                        f"the {name} cannot take images of {shape} from the data ({first_line(error)})"
                    ) from error
            if not isinstance(logits, Tensor) or logits.ndim != 2:
                raise UsageError(f"the {name} returns a {type(logits).__name__}: logits of shape (B, C) are needed")
            counts[name] = logits.shape[1]
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise UsageError(f"numbers of classes differ ({listed}): they must agree")

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of images (B, channels, H, W)."""
        return self.product()(images)

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

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "val", self.val_loss, self.val_accuracy)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "test", self.test_loss, self.test_accuracy)

    def _evaluate(self, batch: Any, split: str, loss: MeanMetric, accuracy: MeanMetric) -> None:
        images, labels = batch[0], batch[1]
        logits = self(images)
        loss.update(F.cross_entropy(logits.float(), labels, reduction="none"))
        accuracy.update((logits.argmax(dim=1) == labels).float())
        self.log_dict({f"{split}/loss": loss, f"{split}/acc": accuracy}, on_step=False, on_epoch=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Class probabilities (B, C)."""
        return self(batch[0]).float().softmax(dim=-1)

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
