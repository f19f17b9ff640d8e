"""Stratified subsets that are a pure function of a seed."""

from __future__ import annotations

import torch
from torch import Tensor

from lqkd.utils.counter_rng import random_bits


def stratified_split(indices: Tensor, labels: Tensor, size: int, *, seed: int, stream: int) -> tuple[Tensor, Tensor]:
    """Choose exactly ``size`` of ``indices``, each class in proportion to its share.

    A class of n samples out of N gives n * size / N, rounded so that the total is exact (largest remainder first,
    the lower label on a tie).

    Args:
        indices: (N,) int64 stable sample ids.
        labels: (N,) int64 class of each; negative where a sample has none.
        size: how many to choose, 0 <= size <= N.
        seed: which subset.
        stream: what the subset is for, one of the ``STREAM_*`` constants of :mod:`lqkd.utils.counter_rng`.

    Returns:
        The chosen ids and the others, two sorted int64 tensors.
    """
    assert len(indices) == len(labels)
    assert 0 <= size <= len(indices)
    labels = labels - labels.min().clamp(max=0)  # samples without a label, which is negative, are a class too
    counts = torch.bincount(labels)
    quota = counts * size // len(labels)
    remainder = counts * size % len(labels)
    quota[remainder.argsort(descending=True, stable=True)[: size - int(quota.sum())]] += 1

    by_chance = random_bits(seed, 0, indices, stream).argsort(stable=True)
    order = by_chance[labels[by_chance].argsort(stable=True)]  # class by class, shuffled within each
    grouped = labels[order]
    place_in_class = torch.arange(len(order)) - (counts.cumsum(0) - counts)[grouped]
    chosen = place_in_class < quota[grouped]
    return indices[order[chosen]].sort().values, indices[order[~chosen]].sort().values
