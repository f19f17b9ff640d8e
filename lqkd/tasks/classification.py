"""The classification of images or other tensors, one label each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.losses.task import UNLABELLED, task_loss
from lqkd.models.outputs import Asked, main_tensor
from lqkd.tasks.base import Rows, Task, example_input
from lqkd.tasks.labels import Samples, check_range, samples_of

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

    from lqkd.tasks.metrics import SameAnswer


class Classification(Task):
    """One class of several for each sample of batches ``(images, labels, ...)``, or of images alone.

    Images stand for whatever the networks take: sequences (B, channels, L) and tokens (B, L) are classified as well.
    Networks return logits (B, C). Labels are (B,) or (B, 1) of any integer type, negative where a sample has none,
    which then takes part in distillation alone. A batch's attribute ``targets``, (B, C) float class probabilities, is
    what the loss learns from in place of labels: mixup and CutMix.

    Logs ``loss`` and ``acc``: cross-entropy, without weights of classes, and top-1 accuracy of the samples that have a
    label, exact over all ranks; NaN where none has one.

    Args:
        label_smoothing: of the cross-entropy, 0 <= e < 1.
        class_weights: what a sample of each class counts in the task's loss, whose mean they weight; None for 1 each.
        ignore_index: a label that stands for none, beside all that are negative; None for no other.

    Raises:
        UsageError: when an argument is not possible.
    """

    predicts_classes = True
    confidences = True
    answer = "first class"

    class_weights: Tensor | None

    def __init__(
        self,
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | None = None,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise UsageError(f"label_smoothing={label_smoothing!r} is not possible: it must be >= 0 and < 1")
        self.label_smoothing, self.ignore_index = label_smoothing, ignore_index
        self.register_buffer("class_weights", checked_weights("class_weights", class_weights), persistent=False)

    # ---- the path of a batch

    def inputs(self, batch: Any) -> Tensor:
        """The images."""
        return self._samples(batch).images

    def outputs(self, returned: Any, asked: Asked) -> Tensor:
        """Logits (B, C), float32.

        Raises:
            UsageError: when the network returns anything else.
        """
        logits = main_tensor(returned, asked)
        if logits.ndim == 2 and len(logits) == asked.samples:
            return logits.float()
        shape = "x".join(map(str, logits.shape)) or "()"
        raise UsageError(
            f"the {asked.network} returns a tensor of shape {shape} for {asked.samples} images: logits of shape (B, C) "
            "are needed"
        )

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """Cross-entropy, 0-dim; see :func:`lqkd.losses.task.task_loss`."""
        samples = self._samples(batch)
        return task_loss(outputs, samples.labels, samples.targets, self.label_smoothing, self.class_weights)

    def rows(self, outputs: Tensor, batch: Any) -> Rows:
        """Every sample: logits (B, C) and labels (B,)."""
        return Rows(outputs, self._samples(batch).labels)

    def counted(self, rows: Rows, batch: Any) -> Tensor | int:
        return len(rows.logits) if self._samples(batch).targets is not None else super().counted(rows, batch)

    def part(self, batch: Any, samples: slice) -> Samples:
        images, labels, targets = self._samples(batch)
        return Samples(images[samples], labels[samples], None if targets is None else targets[samples])

    # ---- evaluation

    def metrics(self) -> MetricCollection:
        from torchmetrics import MetricCollection

        from lqkd.tasks.metrics import Accuracy, CrossEntropy

        return MetricCollection({"loss": CrossEntropy(), "acc": Accuracy()}, compute_groups=False)

    def predictions(self, outputs: Tensor, batch: Any) -> Tensor:
        """Class probabilities (B, C)."""
        return outputs.softmax(dim=-1)

    def table(self, predictions: Tensor, batch: Any, names: Sequence[str]) -> list[dict[str, Any]]:
        """The true class of each sample, if it has a label, and the most probable one with its confidence."""

        def name(label: int) -> Any:
            return names[label] if names else label

        confidence, winner = predictions.max(dim=1)
        parts = self._samples(batch).labels.tolist(), winner.tolist(), confidence.tolist()
        return [
            {"label": name(label) if label >= 0 else None, "class": name(best), "confidence": f"{value:.6f}"}
            for label, best, value in zip(*parts, strict=True)
        ]

    def tally(self, rows: Sequence[Mapping[str, Any]]) -> str:
        right = [row["label"] == row["class"] for row in rows if row["label"] is not None]
        return f"{sum(right)} of them right" if right else ""

    def agreement(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """1 where both put the same class first, 0 elsewhere (B,)."""
        return (ours.argmax(dim=1) == theirs.argmax(dim=1)).float()

    # ---- what a value of the metric means

    def chance(self, data: Any) -> float:
        """See :func:`lowest_accuracy`; 0 where the number of classes is not known."""
        classes = getattr(data, "class_names", None)
        return lowest_accuracy(0 if classes is None else len(classes))

    def constant(self) -> SameAnswer:
        from lqkd.tasks.metrics import LargestClass

        return LargestClass()

    def described(self, value: float) -> str:
        return f"is right on {self.shown(value)} of the validation images"

    # ---- before the first batch

    def example(self, data: Any, device: torch.device) -> Tensor | None:
        return example_input(data, device)

    def check(self, outputs: Mapping[str, Tensor], data: Any) -> None:
        """Refuse networks with other numbers of classes than the data, the weights or each other."""
        counts = {"data": len(data.class_names)} if outputs and hasattr(data, "class_names") else {}
        if outputs and self.class_weights is not None:
            counts["class_weights"] = len(self.class_weights)
        counts |= {name: logits.shape[1] for name, logits in outputs.items()}
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise UsageError(f"numbers of classes differ ({listed}): they must agree")

    def check_batch(self, outputs: Tensor, batch: Any) -> None:
        """Refuse labels that no output of the network stands for, and outputs that no weight stands for."""
        check_range(self._samples(batch).labels, outputs.shape[1])
        if self.class_weights is not None and len(self.class_weights) != outputs.shape[1]:
            raise UsageError(
                f"class_weights has {len(self.class_weights)} numbers, and the network {outputs.shape[1]} classes: "
                "they must agree"
            )

    def unlabelled(self, batch: Any) -> bool:
        samples = self._samples(batch)
        return samples.targets is None and not bool((samples.labels >= 0).any())

    def samples(self, batch: Any) -> Samples:
        """Images, labels and targets of a batch; a subclass says where they are in other batches.

        Raises:
            UsageError: when the batch has none.
        """
        return samples_of(batch)

    def _samples(self, batch: Any) -> Samples:
        samples = self.samples(batch)
        if self.ignore_index is None:
            return samples
        ignored = samples.labels == self.ignore_index
        return samples._replace(labels=samples.labels.masked_fill(ignored, UNLABELLED))


def checked_weights(name: str, weights: Sequence[float] | None) -> Tensor | None:
    """Weights of classes, (C,) float32; None for none.

    Raises:
        UsageError: when one of them is negative or not finite, or all are 0.
    """
    if weights is None:
        return None
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
        raise UsageError(f"{name}={list(weights)!r} are not possible: they must be finite and >= 0, and one above 0")
    return torch.tensor(weights, dtype=torch.float32)


def lowest_accuracy(classes: int) -> float:
    """Below it a teacher is hardly better than chance: 1.5 times that, or 10 points more where that is less.

    Args:
        classes: their number; 0 where it is not known, which accepts any teacher.
    """
    chance = 1.0 / classes if classes else 0.0
    return min(1.5 * chance, chance + 0.1)
