"""The small network inside of the regularizers: positive, and exactly 1 before training."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from lqkd.errors import UsageError

ONE = math.log(math.e - 1)
"""``softplus(ONE) == 1``."""


def check_hidden(hidden: int) -> int:
    """Return ``hidden``, or raise :class:`UsageError` when no layer has so many units."""
    if isinstance(hidden, bool) or not isinstance(hidden, int) or hidden < 1:
        raise UsageError(f"hidden={hidden!r} is not possible: the hidden layer needs at least one unit")
    return hidden


def start_at_one(layer: nn.Linear | nn.Conv2d) -> None:
    """Let ``softplus(layer(x))`` be 1 for every x."""
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.constant_(layer.bias, ONE)


class MLP(nn.Module):
    """``softplus(Linear(GELU(Linear(x))))``: (..., features) -> (...).

    Args:
        features: number of inputs.
        hidden: width of the hidden layer.

    Raises:
        UsageError: when the hidden layer has no unit.
    """

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        last = nn.Linear(check_hidden(hidden), 1)
        start_at_one(last)
        self.layers = nn.Sequential(nn.Linear(features, hidden), nn.GELU(), last)

    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(self.layers(x).squeeze(-1))
