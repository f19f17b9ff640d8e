"""Constant weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.regularizers.balances.base import Balance
from lqkd.regularizers.balances.norms import LossGradients


class FixedBalance(Balance):
    """``L = task * L_task + distill * L_distill`` with constants; ``distill`` is the lambda of the method.

    Args:
        task: weight of the task loss, >= 0.
        distill: weight of the distillation loss, >= 0.
        **limits: ``minimum``, ``maximum``, ``teacher_share``, ``hold`` and ``release`` of :class:`Balance`.

    Raises:
        UsageError: when a weight is negative or not finite, or both are zero.
    """

    constants: Tensor

    def __init__(self, task: float = 1.0, distill: float = 1.0, **limits: Any) -> None:
        super().__init__(**limits)
        check_weights(task=task, distill=distill)
        if task == distill == 0:
            raise UsageError("balance task=0 and distill=0 leave nothing to train on: one must be greater than 0")
        self.register_buffer("constants", torch.tensor([float(task), float(distill)]), persistent=False)

    def propose(self, losses: Tensor, gradients: LossGradients | None) -> tuple[Tensor, None]:
        return self.constants, None


def check_weights(**weights: float) -> None:
    """Raise :class:`UsageError` when a weight is negative or not finite."""
    for name, value in weights.items():
        if not (math.isfinite(value) and value >= 0):
            raise UsageError(f"balance {name}={value!r} is not possible: a weight is a finite number >= 0")
