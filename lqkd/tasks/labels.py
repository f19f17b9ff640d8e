"""What a batch with labels must be: one place that reads batches of all loaders, in every stage."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.losses.task import UNLABELLED
from lqkd.models.calls import dtype_name


class Samples(NamedTuple):
    """The part of a batch that networks and losses see."""

    images: Tensor
    """(B, channels, H, W), or inputs of another kind; B >= 1."""
    labels: Tensor
    """(B,) int64; negative where a sample has no label."""
    targets: Tensor | None
    """(B, C) float class probabilities for the task loss, where a batch has an attribute of that name."""


def samples_of(batch: Any) -> Samples:
    """Read ``(images, labels, ...)``, or images alone, which have no labels. Nothing here waits for the device.

    Labels of any integer type and of shape (B, 1) become (B,) int64.

    Args:
        batch: what a loader yields, on the device.

    Raises:
        UsageError: when the batch is none of these.
    """
    parts = (batch,) if isinstance(batch, Tensor) else batch
    if not isinstance(parts, (tuple, list)) or not parts:
        raise UsageError(
            f"a batch of the data is a {type(batch).__name__}: (images, labels) is needed, as a tuple or a list"
        )
    images = parts[0]
    if not isinstance(images, Tensor) or images.ndim == 0 or len(images) == 0:
        found = f"shape {tuple(images.shape)}" if isinstance(images, Tensor) else f"a {type(images).__name__}"
        raise UsageError(f"a batch of the data begins with {found}: images in a tensor (B, ...) are needed, B >= 1")
    labels = _labels(parts[1], len(images)) if len(parts) > 1 else _none(images)
    return Samples(images, labels, getattr(batch, "targets", None))


def _labels(labels: Any, samples: int) -> Tensor:
    if isinstance(labels, Tensor):
        if labels.ndim == 2 and labels.shape[1] == 1:
            labels = labels.squeeze(1)
        if labels.shape == (samples,) and not (labels.is_floating_point() or labels.is_complex()):
            return labels.to(torch.int64)
    if isinstance(labels, Tensor):
        what = f"{dtype_name(labels)} of shape {tuple(labels.shape)}"
    else:
        what = f"a {type(labels).__name__}"
    raise UsageError(
        f"the labels of a batch of {samples} are {what}: numbers of classes are needed, whole numbers of shape (B,), "
        "negative where a sample has none"
    )


def _none(images: Tensor) -> Tensor:
    return torch.full((len(images),), UNLABELLED, device=images.device)


def check_range(labels: Tensor, classes: int) -> None:
    """Refuse labels that no output of the network stands for. Waits for the device.

    Args:
        labels: (B,) int64.
        classes: C, the number of outputs.

    Raises:
        UsageError: when a label is C or more.
    """
    largest = int(labels.max())
    if largest >= classes:
        raise UsageError(
            f"label {largest} is out of range: the network has {classes} classes, whose labels are 0 to {classes - 1} "
            "(a sample without a label has a negative number)"
        )
