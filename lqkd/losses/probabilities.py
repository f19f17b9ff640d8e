"""Sums over classes of which some are impossible: their logits and log-probabilities are -inf.

So are words that are masked, the padding of a vocabulary, and classes that a teacher rules out.
"""

from __future__ import annotations

import torch
from torch import Tensor


def times_log(p: Tensor, log: Tensor) -> Tensor:
    """``p * log`` element by element, and 0 where p is 0, the limit of ``p log p``; so are its gradients there."""
    return p * log.masked_fill(p == 0, 0.0)


def log_sum_exp(x: Tensor, dim: int) -> Tensor:
    """``x.logsumexp(dim, keepdim=True)``, with gradients of 0 where all are -inf, which in PyTorch are NaN."""
    least = torch.finfo(x.dtype).min
    total = x.clamp_min(least).logsumexp(dim, keepdim=True)
    return total.masked_fill(total == least, -torch.inf)
