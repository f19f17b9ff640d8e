"""Moments of the regularizer's weights: what every batch adds, and what they say of an epoch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_AT_MAXIMUM = 0.98
"""Share of the upper bound from which on a weight counts as being at it; the bound is only approached."""


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
    """Count, mean, squared deviations, minimum, maximum, sum(w D), sum(D) and count at the bound; (8,) float32."""
    divergence = divergence.detach().float()
    weights = weights.detach().float().broadcast_to(divergence.shape)
    variance, mean = torch.var_mean(weights, correction=0)
    minimum, maximum = torch.aminmax(weights)
    count = torch.full_like(mean, weights.numel())
    at_maximum = (weights >= _AT_MAXIMUM * bound).sum() if bound is not None else torch.zeros_like(mean)
    counted, total = (weights * divergence).sum(), divergence.sum()
    return torch.stack((count, mean, variance * count, minimum, maximum, counted, total, at_maximum.float()))


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
