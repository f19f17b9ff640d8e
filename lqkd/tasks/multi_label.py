"""Several classes for one sample, each of them there or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MultilabelAveragePrecision

from lqkd.errors import UsageError
from lqkd.losses.task import UNLABELLED
from lqkd.models.outputs import Asked, main_tensor
from lqkd.tasks.base import Rows, Task, example_input
from lqkd.tasks.classification import checked_weights
from lqkd.tasks.metrics import SameAnswer


class Marked(NamedTuple):
    """A batch as a task of several labels sees it."""

    images: Tensor
    """(B, channels, H, W), or inputs of another kind."""
    labels: Tensor | None
    """(B, C) int64: 1 where the class is there, 0 where it is not, -1 where nobody knows; None for images alone."""


class MultiLabel(Task):
    """Which of several classes are there in each sample of batches ``(images, labels, ...)``, or of images alone.

    Networks return logits (B, C), a sigmoid of each being the class's probability. Labels are (B, C) of any type: 1, 0,
    and negative where it is not known, which then does not count. Each class is decided for itself: losses on logits
    that compare one with one, such as :class:`~lqkd.losses.LogitResidual` and :class:`~lqkd.losses.BinaryKL`, distil;
    those of a softmax are refused.

    Logs ``loss`` and ``map``: binary cross-entropy, and the mean over classes of the average precision, exact over all
    ranks. Chance is the mean prevalence of the classes, which the average precision of random answers tends to.

    Args:
        classes: their number C.
        positive_weights: what a class that is there counts in the task's loss, for each class; None for 1 each.
        ignore_index: a label that is not known, beside all that are negative; None for no other.

    Raises:
        UsageError: when an argument is not possible.
    """

    monitor = "val/map"
    confidences = True
    independent_logits = True
    answer = "set of classes"
    positive_weights: Tensor | None

    def __init__(
        self, classes: int, positive_weights: Sequence[float] | None = None, ignore_index: int | None = None
    ) -> None:
        super().__init__()
        if classes < 1:
            raise UsageError(f"classes={classes!r} is not possible: there must be at least 1")
        if positive_weights is not None and len(positive_weights) != classes:
            raise UsageError(
                f"positive_weights has {len(positive_weights)} numbers for {classes} classes: they must agree"
            )
        self.classes, self.ignore_index = classes, ignore_index
        weights = checked_weights("positive_weights", positive_weights)
        self.register_buffer("positive_weights", weights, persistent=False)

    # ---- the path of a batch

    def inputs(self, batch: Any) -> Tensor:
        """The images."""
        return self._marked(batch).images

    def outputs(self, returned: Any, asked: Asked) -> Tensor:
        """Logits (B, C), float32.

        Raises:
            UsageError: when the network returns anything else.
        """
        logits = main_tensor(returned, asked)
        if logits.shape == (asked.samples, self.classes):
            return logits.float()
        shape = "x".join(map(str, logits.shape)) or "()"
        raise UsageError(
            f"the {asked.network} returns a tensor of shape {shape} for {asked.samples} samples: logits of shape "
            f"(B, {self.classes}) are needed"
        )

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """Binary cross-entropy, 0-dim: the mean over the labels that are known, 0 where none is."""
        losses, known = self._losses(outputs, batch, self.positive_weights)
        return losses.sum() / known.sum().clamp_min(1.0)

    def rows(self, outputs: Tensor, batch: Any) -> Rows:
        """Every sample: logits (B, C), no labels."""
        return Rows(outputs, None)

    # ---- evaluation

    def metrics(self) -> MetricCollection:
        precision = MultilabelAveragePrecision(
            self.classes, average="macro", ignore_index=UNLABELLED, validate_args=False
        )
        return MetricCollection({"loss": MeanMetric(), "map": precision}, compute_groups=False)

    def update(self, metrics: MetricCollection, outputs: Tensor, batch: Any) -> None:
        labels = self._known(outputs, batch)
        for name, metric in metrics.items(keep_base=True, copy_state=False):
            if name == "loss":
                metric.update(*self._losses(outputs, batch, None))
            else:
                metric.update(outputs.sigmoid(), labels)

    def predictions(self, outputs: Tensor, batch: Any) -> Tensor:
        """The probability (B, C) of each class."""
        return outputs.sigmoid()

    def table(self, predictions: Tensor, batch: Any, names: Sequence[str]) -> list[dict[str, Any]]:
        """The classes that are known to be there, and those of a probability of a half or more, with it."""

        def joined(classes: Sequence[int]) -> str:
            return "; ".join(str(names[index] if names else index) for index in classes)

        rows = []
        for labels, values in zip(self._known(predictions, batch).tolist(), predictions.tolist(), strict=True):
            found = [index for index, value in enumerate(values) if value >= 0.5]
            rows.append(
                {
                    "labels": joined([index for index, label in enumerate(labels) if label > 0]),
                    "classes": joined(found),
                    "confidences": "; ".join(f"{values[index]:.6f}" for index in found),
                }
            )
        return rows

    def agreement(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """1 where both see the same classes, those of a probability of a half or more, 0 elsewhere (B,)."""
        return ((ours >= 0) == (theirs >= 0)).all(dim=1).float()

    # ---- what a value of the metric means

    def constant(self) -> Prevalence:
        return Prevalence(self.classes)

    # ---- before the first batch

    def example(self, data: Any, device: torch.device) -> Tensor | None:
        return example_input(data, device)

    def check(self, outputs: Mapping[str, Tensor], data: Any) -> None:
        """Refuse data with another number of classes than the task has; networks are refused by :meth:`outputs`."""
        names = getattr(data, "class_names", None)
        if names is not None and len(names) != self.classes:
            raise UsageError(f"numbers of classes differ (task {self.classes}, data {len(names)}): they must agree")

    def check_batch(self, outputs: Tensor, batch: Any) -> None:
        """Refuse labels that are neither 1 nor 0, nor unknown."""
        labels = self._marked(batch).labels
        if labels is not None and bool((labels > 1).any()):
            raise UsageError(f"label {int(labels.max())} is neither 1, which is there, nor 0, which is not")

    def unlabelled(self, batch: Any) -> bool:
        labels = self._marked(batch).labels
        return labels is None or not bool((labels >= 0).any())

    # ---- parts

    def _losses(self, outputs: Tensor, batch: Any, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """The loss of each label, 0 where it is not known, and 1.0 or 0.0 for whether it is (B, C)."""
        labels = self._known(outputs, batch)
        known = (labels >= 0).float()
        losses = F.binary_cross_entropy_with_logits(
            outputs, labels.clamp_min(0).float(), reduction="none", pos_weight=weights
        )
        return losses * known, known

    def _known(self, outputs: Tensor, batch: Any) -> Tensor:
        labels = self._marked(batch).labels
        return torch.full_like(outputs, UNLABELLED, dtype=torch.int64) if labels is None else labels

    def _marked(self, batch: Any) -> Marked:
        """Read a batch.

        Raises:
            UsageError: when it is none.
        """
        parts = (batch,) if isinstance(batch, Tensor) else batch
        if not isinstance(parts, (tuple, list)) or not parts or not isinstance(parts[0], Tensor) or parts[0].ndim == 0:
            raise UsageError("a batch of the data is no (images, labels), of which images are a tensor (B, ...)")
        if len(parts) == 1:
            return Marked(parts[0], None)
        labels = parts[1]
        if not isinstance(labels, Tensor) or labels.shape != (len(parts[0]), self.classes):
            found = f"a tensor {tuple(labels.shape)}" if isinstance(labels, Tensor) else f"a {type(labels).__name__}"
            raise UsageError(f"the labels of a batch are {found}: 1, 0 or -1 of shape (B, {self.classes}) are needed")
        labels = labels.to(torch.int64)
        unknown = labels < 0 if self.ignore_index is None else (labels < 0) | (labels == self.ignore_index)
        return Marked(parts[0], labels.masked_fill(unknown, UNLABELLED))


class Prevalence(SameAnswer):
    """The mean share of the samples that have a class, over the classes of which one is known; NaN without any."""

    there: Tensor
    known: Tensor
    name = "answering at random"

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.add_state("there", torch.zeros(classes), dist_reduce_fx="sum")
        self.add_state("known", torch.zeros(classes), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        self.there = self.there + (labels > 0).sum(dim=0)
        self.known = self.known + (labels >= 0).sum(dim=0)

    def compute(self) -> Tensor:
        return (self.there / self.known)[self.known > 0].mean()
