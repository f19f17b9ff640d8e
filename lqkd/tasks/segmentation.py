"""Semantic segmentation: one class for each pixel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassJaccardIndex

from lqkd.errors import UsageError
from lqkd.losses.task import UNLABELLED, mean_of_labelled
from lqkd.models.outputs import Asked, main_tensor
from lqkd.regularizers.base import RowGroups
from lqkd.tasks.base import Rows, Task, example_input
from lqkd.tasks.metrics import Accuracy, CrossEntropy


class Masks(NamedTuple):
    """A batch as segmentation sees it."""

    images: Tensor
    """(B, channels, H, W)."""
    labels: Tensor | None
    """(B, H', W') int64, negative where a pixel is ignored; None for images alone."""


class Segmentation(Task):
    """One class of several for each pixel of batches ``(images, masks, ...)``, or of images alone.

    Networks return logits (B, C, h, w), or torchvision's dict with them under ``out``; another size than the masks' is
    interpolated to it (bilinear). Masks are (B, H, W) or (B, 1, H, W) of any integer type. Every pixel that is not
    ignored is a row; which they are is read from the device in every batch, since their number decides shapes: losses
    and guards average over all rows that they see, and some correlate them, so that a row of no weight would count.

    Logs ``loss``, ``acc`` and ``miou``: cross-entropy and accuracy of the pixels, and the mean over classes of
    intersection over union, exact over all ranks.

    Args:
        classes: their number C.
        ignore_index: the label of pixels that do not count; negative ones never do.
        label_smoothing: of the cross-entropy, 0 <= e < 1.

    Raises:
        UsageError: when an argument is not possible.
    """

    monitor = "val/miou"
    one_row_a_sample = False
    several_rows_a_sample = True
    predicts_classes = True
    answer = "class of a pixel"

    def __init__(self, classes: int, ignore_index: int = 255, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if classes < 2:
            raise UsageError(f"classes={classes!r} is not possible: a segmentation has at least 2")
        if 0 <= ignore_index < classes:
            raise UsageError(f"ignore_index={ignore_index!r} is not possible: it is one of the {classes} classes")
        if not 0 <= label_smoothing < 1:
            raise UsageError(f"label_smoothing={label_smoothing!r} is not possible: it must be >= 0 and < 1")
        self.classes, self.ignore_index, self.label_smoothing = classes, ignore_index, label_smoothing

    # ---- the path of a batch

    def inputs(self, batch: Any) -> Tensor:
        """The images."""
        return self._masks(batch).images

    def outputs(self, returned: Any, asked: Asked) -> Tensor:
        """Logits (B, C, h, w), float32.

        Raises:
            UsageError: when the network returns anything else.
        """
        logits = main_tensor(returned, asked)
        if logits.ndim == 4 and len(logits) == asked.samples:
            return logits.float()
        shape = "x".join(map(str, logits.shape)) or "()"
        raise UsageError(
            f"the {asked.network} returns a tensor of shape {shape} for {asked.samples} images: logits of shape "
            "(B, C, H, W) are needed"
        )

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """Cross-entropy, 0-dim: the mean over the pixels that are not ignored, 0 where all are."""
        logits, labels = self._aligned(outputs, batch)
        if labels is None:
            return 0.0 * logits.sum()

        def cross_entropy(known: Tensor) -> Tensor:
            return F.cross_entropy(logits, known, label_smoothing=self.label_smoothing)

        return mean_of_labelled(cross_entropy, labels, self.classes)

    def rows(self, outputs: Tensor, batch: Any) -> Rows:
        """Every pixel that is not ignored: logits (N, C) and labels (N,).

        Where all are, a single row of zeros without a label stands for them: its divergence is 0.
        """
        logits, labels = self._aligned(outputs, batch)
        logits = logits.permute(0, 2, 3, 1).flatten(0, 2)
        if labels is None:
            return Rows(logits, logits.new_full((len(logits),), UNLABELLED, dtype=torch.int64))
        flat = labels.flatten()
        kept = _kept(flat)
        if len(kept) == 0:
            return Rows(0.0 * logits[:1], flat[:1])
        return Rows(logits[kept], flat[kept])

    def samples_of_rows(self, rows: Rows, batch: Any) -> RowGroups:
        images, labels = self._masks(batch)
        count, pixels = len(images), len(rows.logits) // len(images)
        if labels is None:
            return RowGroups(torch.arange(len(rows.logits), device=images.device) // pixels, count)
        kept = _kept(labels.flatten())
        return RowGroups(kept // labels[0].numel() if len(kept) else kept.new_zeros(1), count)

    # ---- evaluation

    def metrics(self) -> MetricCollection:
        jaccard = MulticlassJaccardIndex(self.classes, ignore_index=UNLABELLED, validate_args=False)
        return MetricCollection({"loss": CrossEntropy(), "acc": Accuracy(), "miou": jaccard}, compute_groups=False)

    def predictions(self, outputs: Tensor, batch: Any) -> Tensor:
        """The class (B, H, W) int64 of every pixel of the images."""
        return _resized(outputs, self._masks(batch).images.shape[-2:]).argmax(dim=1)

    def agreement(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """The share of the pixels of each image (B,) for which both put the same class first."""
        return (ours.argmax(dim=1) == theirs.argmax(dim=1)).float().flatten(1).mean(dim=1)

    def chance(self, data: Any) -> float:
        """1 / C: the largest mean IoU of always the same class."""
        return 1.0 / self.classes

    # ---- before the first batch

    def example(self, data: Any, device: torch.device) -> Tensor | None:
        return example_input(data, device)

    def check(self, outputs: Mapping[str, Tensor], data: Any) -> None:
        """Refuse data and networks with other numbers of classes than the task."""
        names = getattr(data, "class_names", None)
        if names is not None and len(names) != self.classes:
            raise UsageError(f"numbers of classes differ (task {self.classes}, data {len(names)}): they must agree")
        for name, logits in outputs.items():
            self._check_classes(name, logits)

    def check_batch(self, outputs: Tensor, batch: Any) -> None:
        """Refuse masks with numbers that are no class, and networks with other numbers of classes than the task."""
        self._check_classes("network", outputs)
        labels = self._masks(batch).labels
        largest = -1 if labels is None else int(labels.max())
        if largest >= self.classes:
            raise UsageError(
                f"label {largest} of a mask is out of range: the task has {self.classes} classes, whose labels are 0 "
                f"to {self.classes - 1}, and ignores {self.ignore_index}"
            )

    def unlabelled(self, batch: Any) -> bool:
        labels = self._masks(batch).labels
        return labels is None or not bool((labels >= 0).any())

    # ---- parts

    def _check_classes(self, name: str, logits: Tensor) -> None:
        if logits.shape[1] != self.classes:
            raise UsageError(
                f"numbers of classes differ (task {self.classes}, {name} {logits.shape[1]}): they must agree"
            )

    def _masks(self, batch: Any) -> Masks:
        """Read a batch.

        Raises:
            UsageError: when it is none.
        """
        parts = (batch,) if isinstance(batch, Tensor) else batch
        if not isinstance(parts, (tuple, list)) or not parts or not isinstance(parts[0], Tensor) or parts[0].ndim != 4:
            raise UsageError("a batch of the data is no (images, masks), of which images are a tensor (B, C, H, W)")
        if len(parts) == 1:
            return Masks(parts[0], None)
        labels = parts[1]
        if isinstance(labels, Tensor) and labels.ndim == 4 and labels.shape[1] == 1:
            labels = labels.squeeze(1)
        if not isinstance(labels, Tensor) or labels.ndim != 3 or labels.is_floating_point():
            found = f"a tensor {tuple(labels.shape)}" if isinstance(labels, Tensor) else f"a {type(labels).__name__}"
            raise UsageError(f"the masks of a batch are {found}: whole numbers of shape (B, H, W) are needed")
        labels = labels.to(torch.int64)
        return Masks(parts[0], labels.masked_fill((labels == self.ignore_index) | (labels < 0), UNLABELLED))

    def _aligned(self, outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor | None]:
        """Logits (B, C, H, W) in the size of the masks, and the masks; in that of the images where there are none."""
        images, labels = self._masks(batch)
        return _resized(outputs, images.shape[-2:] if labels is None else labels.shape[-2:]), labels


def _kept(labels: Tensor) -> Tensor:
    """Which of the labels (N,) are of pixels that count."""
    return (labels >= 0).nonzero().squeeze(1)


def _resized(logits: Tensor, size: torch.Size) -> Tensor:
    if logits.shape[-2:] == size:
        return logits
    return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)
