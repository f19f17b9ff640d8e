"""The positions at which a detector without anchors looks for objects, and the boxes that it sees from there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LARGEST_EXPONENT = 8.0
"""Of a distance in strides, beyond which it would overflow in half precision."""


class Positions(NamedTuple):
    """All P positions of an image, level by level, each level row by row."""

    points: Tensor
    """(P, 2) float32: x and y of the middle of each position's field, in pixels."""
    strides: Tensor
    """(P,) float32: pixels from a position to the next of its level."""
    finer: Tensor
    """(P,) float32: the stride of the level before; 0 on the finest."""

    @property
    def levels(self) -> list[int]:
        """How many positions each level has, the finest first."""
        return [int(count) for count in self.strides.unique_consecutive(return_counts=True)[1]]


def positions(height: int, width: int, strides: Sequence[int], device: torch.device | None = None) -> Positions:
    """The positions of an image: position (i, j) of a level of stride s is at ``(s * (j + 0.5), s * (i + 0.5))``.

    Tian et al., "FCOS: Fully Convolutional One-Stage Object Detection" (arXiv 1904.01355), section 3.1.

    Args:
        height, width: of the image, in pixels; a level has ``ceil(height / s)`` rows.
        strides: of the levels, the finest first.
        device: of the tensors.

    Examples:
        >>> positions(16, 32, [8, 16]).points.tolist()[-3:], positions(16, 32, [8, 16]).levels
        ([[28.0, 12.0], [8.0, 8.0], [24.0, 8.0]], [8, 2])
    """
    points: list[Tensor] = []
    of: list[Tensor] = []
    before: list[Tensor] = []
    for stride, finer in zip(strides, (0, *strides), strict=False):
        rows, columns = -(-height // stride), -(-width // stride)
        y, x = (stride * (torch.arange(count, device=device) + 0.5) for count in (rows, columns))
        points.append(torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1))
        for kept, value in ((of, stride), (before, finer)):
            kept.append(torch.full((rows * columns,), float(value), device=device))
    return Positions(torch.cat(points), torch.cat(of), torch.cat(before))


def boxes_at(distances: Tensor, at: Positions) -> Tensor:
    """The boxes of what a network says of distances: ``(x - l, y - t, x + r, y + b)``, with ``l = s * exp(d_l)``, ...

    Equation 1 of FCOS solved for the box; distances are exponentials of what the network says, as in its section 3.2,
    in units of the level's stride.

    Args:
        distances: (..., P, 4): left, top, right, bottom.
        at: the P positions.

    Returns:
        (..., P, 4) boxes xyxy in pixels, in the dtype of ``distances``.

    Examples:
        >>> boxes_at(torch.zeros(2, 4), positions(8, 16, [8])).tolist()
        [[-4.0, -4.0, 12.0, 12.0], [4.0, -4.0, 20.0, 12.0]]
    """
    reach = distances.clamp(max=LARGEST_EXPONENT).exp() * at.strides.unsqueeze(1)
    return torch.cat([at.points - reach[..., :2], at.points + reach[..., 2:]], dim=-1)
