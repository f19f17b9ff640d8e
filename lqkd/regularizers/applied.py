"""What of a row's learned weight the student gets: the weight itself, or what a study compares it with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

Applied = Literal["own", "mean", "exchanged"]
"""Names of :data:`APPLIED`."""


def own(weights: Tensor, divergence: Tensor) -> Tensor:
    """Every row its own."""
    return weights


def mean(weights: Tensor, divergence: Tensor) -> Tensor:
    """All rows the mean of the batch: how heavy, but not where."""
    return weights.mean().expand_as(weights)


def exchanged(weights: Tensor, divergence: Tensor) -> Tensor:
    """Every row that of the row a third of the batch before it: the same weights, but not where they belong.

    Nothing is drawn, so that a run that resumes does the same.
    """
    return weights.roll(max(1, len(weights) // 3), 0)


APPLIED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "own": own,
    "mean": mean,
    "exchanged": exchanged,
}
"""By name, from detached weights (N, 1, ...) and the detached divergence map that they broadcast to, the weights that
the student gets, in the shape of the first. All but ``own`` tell what a weight *of each row* is worth from what weights
of that size are: they are controls for studies."""
