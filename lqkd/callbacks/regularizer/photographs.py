"""Photographs with the weights that were learned for their places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

COUNT = 4
"""Photographs of a batch that are kept."""


class Photographs(NamedTuple):
    """A few samples of a batch with their weights.

    Attributes:
        images: (N, C, H, W) on the CPU, as the student saw them, C 1 or 3.
        weights: of every tap that has them by place, (N, h, w) each, the mean over its channels.
    """

    images: Tensor
    weights: list[Tensor]

    @classmethod
    def of(cls, inputs: Any, weights: Sequence[Tensor]) -> Photographs | None:
        """Those at the beginning of a batch; None where inputs are no images, or no weight is finite and has a place.

        Args:
            inputs: of the student, whatever they are.
            weights: of every tap, whatever their shape.
        """
        if not (isinstance(inputs, Tensor) and inputs.ndim == 4 and inputs.shape[1] in (1, 3)):
            return None
        found = [one for one in weights if one.ndim == 4 and len(one) == len(inputs) and one[0, 0].numel() > 1]
        if len(inputs) < COUNT or not found:
            return None
        kept = [one[:COUNT].detach().float().mean(1).cpu() for one in found]
        if not all(bool(one.isfinite().all()) for one in kept):
            return None
        return cls(inputs[:COUNT].detach().float().cpu().clone(), kept)
