"""Vectors without their length, with finite gradients at zero."""

from __future__ import annotations

import torch
from torch import Tensor

Axes = int | tuple[int, ...]


def rescaled(x: Tensor, axes: Axes | None = None) -> Tensor:
    """``x`` over its largest absolute value along ``axes`` (None: of all), a constant for the gradient; 0 stays 0.

    What follows must not depend on the scale of ``x``. Squares of the result neither overflow nor vanish.
    """
    absolute = x.detach().abs()
    largest = absolute.max() if axes is None else absolute.amax(axes, keepdim=True)
    return x / torch.where(largest > 0, largest, 1.0)


def unit(x: Tensor, axes: Axes) -> Tensor:
    """``x`` over its Euclidean norm along ``axes``; a zero vector stays zero and passes no gradient on."""
    x = rescaled(x, axes)
    norm = torch.linalg.vector_norm(x, dim=axes, keepdim=True)
    nonzero = norm > 0
    return torch.where(nonzero, x / torch.where(nonzero, norm, 1.0), 0.0)


def deviation(x: Tensor, axis: int) -> Tensor:
    """``x`` less its mean along ``axis``, over its norm there, so that a product of two is Pearson's correlation.

    Where ``x`` is constant but for rounding, the result is zero and passes no gradient on.
    """
    centred = x - x.mean(axis, keepdim=True)
    rounding = 4 * torch.finfo(x.dtype).eps * x.detach().abs().amax(axis, keepdim=True)
    varies = centred.detach().abs().amax(axis, keepdim=True) > rounding
    return unit(torch.where(varies, centred, 0.0), axis)
