"""What a batch with boxes must be: one place that reads batches of all loaders, in every stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lqkd.errors import UsageError


class Objects(NamedTuple):
    """The objects of one image."""

    boxes: Tensor
    """(N, 4) float32 xyxy, in pixels."""
    labels: Tensor
    """(N,) int64, from 0."""


class Scenes(NamedTuple):
    """A batch as detection sees it."""

    images: Tensor
    """(B, channels, H, W); H and W are multiples of the coarsest stride."""
    objects: list[Objects] | None
    """Of each image; None for images alone."""


def scenes_of(batch: Any, multiple: int) -> Scenes:
    """Read ``(images, targets, ...)``, or images alone. Nothing here waits for the device.

    Images are a tensor (B, channels, H, W), or a list of tensors (channels, H, W) of any sizes, which are padded with
    zeros at the right and at the bottom; a batch of such tensors is images alone. Targets are dicts with ``boxes`` and
    ``labels``, as torchvision's.

    Args:
        batch: what a loader yields, on the device.
        multiple: of which heights and widths become multiples, likewise.

    Raises:
        UsageError: when the batch is none of these.
    """
    parts = (batch,) if are_images(batch) else batch
    if not isinstance(parts, (tuple, list)) or not parts:
        raise UsageError(f"a batch of the data is a {type(batch).__name__}: (images, targets) is needed")
    images = _padded(parts[0], multiple)
    if len(parts) == 1 or parts[1] is None:
        return Scenes(images, None)
    targets = parts[1]
    if not isinstance(targets, Sequence) or len(targets) != len(images):
        found = f"{len(targets)} for {len(images)} images" if isinstance(targets, Sequence) else type(targets).__name__
        raise UsageError(
            f"the targets of a batch are {found}: a list with a dict of 'boxes' and 'labels' for each image is needed"
        )
    return Scenes(images, [_objects(target) for target in targets])


def are_images(batch: Any) -> bool:
    """Whether a batch is images alone: a tensor, or tensors of three axes."""
    return isinstance(batch, Tensor) or _are_single(batch)


def _are_single(images: Any) -> bool:
    """Whether they are tensors (channels, H, W)."""
    listed = isinstance(images, (list, tuple)) and len(images) > 0
    return listed and all(isinstance(image, Tensor) and image.ndim == 3 for image in images)


def _padded(images: Any, multiple: int) -> Tensor:
    if isinstance(images, Tensor) and images.ndim == 4 and len(images):
        stacked = images
    elif _are_single(images):
        height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
        stacked = torch.stack([_grown(image, height, width) for image in images])
    else:
        raise UsageError(
            "the images of a batch are neither a tensor (B, C, H, W) nor a list of tensors (C, H, W), B >= 1"
        )
    height, width = (-(-size // multiple) * multiple for size in stacked.shape[-2:])
    return _grown(stacked, height, width)


def _grown(image: Tensor, height: int, width: int) -> Tensor:
    """With zeros at the right and at the bottom; itself where it has that size."""
    if image.shape[-2:] == (height, width):
        return image
    return F.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2]))


def _objects(target: Any) -> Objects:
    if not isinstance(target, Mapping) or not {"boxes", "labels"} <= target.keys():
        found = ", ".join(map(repr, target)) if isinstance(target, Mapping) else f"a {type(target).__name__}"
        raise UsageError(f"a target of the batch has {found}: a dict with 'boxes' and 'labels' is needed")
    boxes, labels = target["boxes"], target["labels"]
    fits = isinstance(boxes, Tensor) and isinstance(labels, Tensor) and not labels.is_floating_point()
    if not fits or boxes.shape != (len(labels), 4) or labels.ndim != 1:
        shapes = [tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in (boxes, labels)]
        raise UsageError(
            f"a target of the batch has boxes {shapes[0]} and labels {shapes[1]}: boxes (N, 4) xyxy and whole numbers "
            "(N,) are needed"
        )
    return Objects(boxes.float(), labels.to(torch.int64))
