"""Shear, translation and rotation of a uint8 batch, every image with its own."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
"""What :func:`inverse_matrix` knows, in torchvision's names."""


def inverse_matrix(operation: str, amount: float, height: int, width: int) -> tuple[tuple[float, ...], ...]:
    """Return the 2x3 matrix from a pixel of the result to the place that it comes from.

    Both are (x, y, 1) in pixels from the image's centre, as in torchvision's ``affine`` and ``rotate``.

    Args:
        operation: one of :data:`GEOMETRIC`.
        amount: of a shear its slope about the upper left corner, of a translation pixels (a fraction is cut off), of
            a rotation degrees, counter-clockwise.
        height: of the images, in pixels.
        width: of the images, in pixels.
    """
    if operation == "ShearX":
        return (1.0, amount, amount * height / 2), (0.0, 1.0, 0.0)
    if operation == "ShearY":
        return (1.0, 0.0, 0.0), (amount, 1.0, amount * width / 2)
    if operation == "TranslateX":
        return (1.0, 0.0, -float(int(amount))), (0.0, 1.0, 0.0)
    if operation == "TranslateY":
        return (1.0, 0.0, 0.0), (0.0, 1.0, -float(int(amount)))
    assert operation == "Rotate", operation
    cos, sin = math.cos(math.radians(amount)), math.sin(math.radians(amount))
    return (cos, -sin, 0.0), (sin, cos, 0.0)


def transform(images: Tensor, matrices: Tensor) -> Tensor:
    """Move the pixels of each image by its own matrix; the nearest pixel is taken, black where there is none.

    Where a place lies within rounding of the middle between two pixels, the other one of the two may be taken than
    torchvision takes. The result of an image does not depend on the others in the batch: it is made of elementwise
    arithmetic, and no matrix product, whose rounding follows the shape of the batch.

    Args:
        images: (B, C, H, W) uint8.
        matrices: (B, 2, 3) float32; see :func:`inverse_matrix`.

    Returns:
        (B, C, H, W) uint8.
    """
    height, width = images.shape[-2:]
    x = torch.linspace(0.5 - width / 2, width / 2 - 0.5, width, device=images.device)
    y = torch.linspace(0.5 - height / 2, height / 2 - 0.5, height, device=images.device)[:, None]
    # grid_sample counts from -1 to 1 over the image
    sources = (matrices[:, 0] / (width / 2), matrices[:, 1] / (height / 2))  # x and y, (B, 3) each
    grid = torch.stack([a * x + b * y + c for a, b, c in (m.T[..., None, None] for m in sources)], dim=-1)
    moved = grid_sample(images.to(torch.float32), grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return moved.to(torch.uint8)
