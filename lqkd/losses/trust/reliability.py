"""How often predictions are right by how sure they are: the reliability diagram."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 10
"""Of confidence, equally wide."""


@dataclass
class Reliability:
    """By bin of the largest probability, from 0 to 1 in tenths (DeGroot & Fienberg 1983; Guo et al., arXiv 1706.04599).

    Examples:
        >>> said = torch.tensor([[0.9, 0.1], [0.95, 0.05], [0.45, 0.55]]).log()
        >>> found = Reliability.of(said, torch.tensor([0, 1, 1]))
        >>> found.right[9], found.count[9], round(found.confidence[9], 3), found.count[5]
        (0.5, 2.0, 0.925, 1.0)
    """

    right: list[float]
    """The share of right answers; 0 where there is none."""
    confidence: list[float]
    """The mean of the largest probabilities; 0 where there is none."""
    count: list[float]
    """Rows."""

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> Reliability:
        """Of logits (N, C) and labels (N,) int64, none negative."""
        sure, answers = logits.double().softmax(-1).max(-1)
        index = (sure * BINS).long().clamp_max(BINS - 1)
        each = torch.stack([(answers == labels).to(sure), sure, torch.ones_like(sure)])
        right, confidence, count = sure.new_zeros(3, BINS).index_add_(1, index, each).cpu()
        right, confidence = right / count.clamp_min(1), confidence / count.clamp_min(1)
        return cls(right.tolist(), confidence.tolist(), count.tolist())
