"""Moments of the regularizer's weights: what every batch adds, and what they say of an epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_AT_MAXIMUM = 0.98
"""Share of the upper bound from which on a weight counts as being at it; the bound is only approached."""

_WAITING = 2**16
"""Elements of divergence maps that may wait for their moments."""


@dataclass(frozen=True)
class EpochWeights:
    """The weights w of one training epoch, over all elements of the divergence maps D of all batches and processes.

    Attributes:
        epoch: number of the epoch, from 0.
        mean, spread, minimum, maximum: of w; the spread is the standard deviation.
        effective: ``sum(w * D) / sum(D)``, the factor with which the divergence still counts; nan when D is 0.
        at_maximum: share of weights at the upper bound; None when there is no bound.
        contribution: the mean of ``w * D``.
        optimum: the mean of ``w * D`` for the guard's closed form of w; None where there is none.
        share: share of distillation in the student's gradient at the logits, 0 to 1; None when it is not known.
    """

    epoch: int
    mean: float
    spread: float
    minimum: float
    maximum: float
    effective: float
    at_maximum: float | None
    contribution: float | None = None
    optimum: float | None = None
    share: float | None = None


def moments(weights: Tensor, divergence: Tensor, bound: float | None) -> Tensor:
    """Count, mean, squared deviations, minimum, maximum, sum(w D), sum(D) and count at the bound of each batch.

    Args:
        weights: (N, ...), one batch a row; what follows broadcasts to the divergence's.
        divergence: (N, ...).
        bound: the largest weight there can be; None for no bound.

    Returns:
        (N, 8) float32.
    """
    rows = len(divergence)
    divergence = divergence.float()
    if divergence.ndim > weights.ndim:
        weights = weights.view(rows, *[1] * (divergence.ndim - weights.ndim), *weights.shape[1:])
    weights = weights.float().broadcast_to(divergence.shape).reshape(rows, -1)
    divergence = divergence.reshape(rows, -1)
    variance, mean = torch.var_mean(weights, dim=1, correction=0)
    minimum, maximum = torch.aminmax(weights, dim=1)
    count = torch.full_like(mean, weights.shape[1])
    at_maximum = (weights >= _AT_MAXIMUM * bound).sum(1) if bound is not None else torch.zeros_like(mean)
    counted, total = (weights * divergence).sum(1), divergence.sum(1)
    return torch.stack((count, mean, variance * count, minimum, maximum, counted, total, at_maximum.float()), dim=1)


class Moments:
    """The moments of an epoch's batches, which are taken of many small batches together: that is cheaper.

    No more than 65536 elements of divergence maps wait for it at any tap.
    """

    def __init__(self, taken: Iterable[Tensor] = ()) -> None:
        self._taken = {tap: [rows] for tap, rows in enumerate(taken)}
        self._waiting: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._bounds: dict[int, float | None] = {}

    def add(self, tap: int, weights: Tensor, divergence: Tensor, bound: Callable[[], float | None]) -> None:
        """Add a batch of one tap: weights that broadcast to the divergence map; ``bound`` as in :func:`moments`."""
        waiting = self._waiting.setdefault(tap, [])
        if waiting and (waiting[0][0].shape, waiting[0][1].shape) != (weights.shape, divergence.shape):
            self._take(tap)  # the last batch of an epoch may be smaller
        if tap not in self._bounds:
            self._bounds[tap] = bound()
        waiting.append((weights.detach(), divergence.detach()))
        if len(waiting) * divergence.numel() >= _WAITING:
            self._take(tap)

    def by_tap(self) -> list[Tensor]:
        """Moments (N, 8) of the N batches of each tap; none where nothing was added."""
        for tap in self._waiting:
            self._take(tap)
        for tap, rows in self._taken.items():
            self._taken[tap] = [torch.cat(rows)]
        return [rows for (rows,) in self._taken.values()]

    def _take(self, tap: int) -> None:
        if waiting := self._waiting[tap]:
            weights, divergences = (torch.stack(values) for values in zip(*waiting, strict=True))
            self._taken.setdefault(tap, []).append(moments(weights, divergences, self._bounds[tap]))
            waiting.clear()


def combine(parts: Tensor) -> Tensor:
    """Moments of the union of ``parts`` (N, 8), each as :func:`moments` gives them; (8,) float64 on the CPU."""
    count, mean, deviations, minimum, maximum, counted, total, at_maximum = parts.cpu().double().unbind(dim=1)
    center = (count * mean).sum() / count.sum()
    spread_of_means = (count * (mean - center).square()).sum()
    sums = (counted.sum(), total.sum(), at_maximum.sum())
    return torch.stack((count.sum(), center, deviations.sum() + spread_of_means, minimum.min(), maximum.max(), *sums))


def epoch_weights(
    combined: Tensor, epoch: int, bounded: bool, optimum: float | None, share: float | None
) -> EpochWeights:
    """What the :func:`combine`\\ d moments of an epoch say; ``optimum`` and ``share`` are handed through."""
    values: Sequence[float] = combined.tolist()
    count, mean, deviations, minimum, maximum, counted, total, at_maximum = values
    return EpochWeights(
        epoch=epoch,
        mean=mean,
        spread=math.sqrt(deviations / count),
        minimum=minimum,
        maximum=maximum,
        effective=counted / total if total else math.nan,
        at_maximum=at_maximum / count if bounded else None,
        contribution=counted / count,
        optimum=optimum,
        share=share,
    )
