"""Random erasing of whole batches: a rectangle of each image is blanked, and what a rectangle is.

Zhong et al., "Random Erasing Data Augmentation", arXiv 1708.04896, with the ranges of torchvision's ``RandomErasing``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lqkd.utils.counter_rng import (
    STREAM_ERASE,
    STREAM_ERASE_AREA,
    STREAM_ERASE_RATIO,
    STREAM_ERASE_X,
    STREAM_ERASE_Y,
    integers,
    uniform,
)

SMALLEST_AREA, LARGEST_AREA = 0.02, 0.33
"""Range of the share of the image that is erased."""
LARGEST_RATIO = 3.3
"""Of height to width; the smallest is 0.3, as in the paper, and not its inverse."""
SMALLEST_RATIO = 0.3


def random_erasing(images: Tensor, probability: float, *, seed: int, epoch: int | Tensor, indices: Tensor) -> Tensor:
    """Set a random rectangle of each image to zero, which is the mean colour once images are normalised.

    Args:
        images: (B, C, H, W) float32, normalised; they are overwritten, which spares the CPU a fresh copy.
        probability: that an image is erased at all.
        seed: the run's seed.
        epoch: the epoch, counted from 0; a 0-dim int64 tensor in a graph.
        indices: (B,) int64 stable sample ids on the device of ``images``.

    Returns:
        ``images``.
    """
    height, width = images.shape[-2:]
    top, left, tall, wide = erased_boxes(height, width, seed=seed, epoch=epoch, indices=indices)
    tall = tall * (uniform(seed, epoch, indices, STREAM_ERASE) < probability)  # the others lose nothing
    return images.mul_(1 - box_mask(top, left, top + tall, left + wide, height, width))


def erased_boxes(
    height: int, width: int, *, seed: int, epoch: int | Tensor, indices: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the rectangle of each sample: area uniform, ratio log-uniform, anywhere within the image.

    Where a side would be as long as the image's, or longer, it is a pixel shorter than that; the paper draws again,
    which square images need less than once in a hundred times.

    Args:
        height: of the images.
        width: of the images.
        seed: the run's seed.
        epoch: the epoch, counted from 0; a 0-dim int64 tensor in a graph.
        indices: (B,) int64 stable sample ids.

    Returns:
        Top, left, height and width in pixels, (B,) int64 each.
    """
    # float64, so that a last bit, in which devices may differ, practically never decides how a side is rounded
    share, place = (uniform(seed, epoch, indices, s).double() for s in (STREAM_ERASE_AREA, STREAM_ERASE_RATIO))
    area = height * width * (SMALLEST_AREA + (LARGEST_AREA - SMALLEST_AREA) * share)
    low, high = math.log(SMALLEST_RATIO), math.log(LARGEST_RATIO)
    ratio = (low + (high - low) * place).exp()
    tall = (area * ratio).sqrt().round().long().clamp(max=height - 1)
    wide = (area / ratio).sqrt().round().long().clamp(max=width - 1)
    top = integers(seed, epoch, indices, STREAM_ERASE_Y, height - tall + 1)
    left = integers(seed, epoch, indices, STREAM_ERASE_X, width - wide + 1)
    return top, left, tall, wide


def box_mask(top: Tensor, left: Tensor, bottom: Tensor, right: Tensor, height: int, width: int) -> Tensor:
    """Return which pixels lie inside each sample's rectangle, its last row and column excluded.

    Args:
        top: (B,) int64, like the other three sides.
        left: (B,) int64.
        bottom: (B,) int64.
        right: (B,) int64.
        height: of the images.
        width: of the images.

    Returns:
        (B, 1, H, W) float32, 1 inside and 0 outside.
    """
    y = torch.arange(height, device=top.device)
    x = torch.arange(width, device=top.device)
    rows = (y >= top[:, None]) & (y < bottom[:, None])  # (B, H)
    columns = (x >= left[:, None]) & (x < right[:, None])  # (B, W)
    return (rows.float()[:, :, None] * columns.float()[:, None, :])[:, None]
