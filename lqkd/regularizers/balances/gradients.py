"""Weights that give both losses a gradient of the same size at the student's logits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.regularizers.balances.base import Balance


class OutputGradientBalance(Balance):
    """Equal gradients at the logits: ``w_distill * G_distill = ratio * w_task * G_task``, with weights of sum 2.

    G is the root mean square over the samples of the norm of a loss's gradient at their logits
    (:func:`~lqkd.regularizers.balances.norms.output_gradient_norms`), as a geometric running mean over the steps,
    which no single batch can dominate.
    It costs two backward passes through the losses alone, none through the network. The weights say nothing about how
    large the losses are: a student far from its teacher keeps hearing it.

    Args:
        ratio: gradient of the distillation loss relative to that of the task loss, > 0.
        momentum: of the running mean, >= 0 and < 1: it looks back on about ``1 / (1 - momentum)`` batches.
        **limits: ``minimum``, ``maximum``, ``teacher_share``, ``hold`` and ``release`` of :class:`Balance`.

    Raises:
        UsageError: when ratio or momentum is out of range, or a loss does not depend on the logits.
    """

    needs_output = True
    log_norms: Tensor
    steps: Tensor

    def __init__(self, ratio: float = 1.0, momentum: float = 0.99, **limits: Any) -> None:
        super().__init__(**limits)
        if not (math.isfinite(ratio) and ratio > 0):
            raise UsageError(f"balance ratio={ratio!r} is not possible: it must be a finite number greater than 0")
        if not 0 <= momentum < 1:
            raise UsageError(f"balance momentum={momentum!r} is not possible: it must be >= 0 and < 1")
        self.ratio, self.momentum = float(ratio), float(momentum)
        self.register_buffer("log_norms", torch.zeros(2))  # running means that start at 0, corrected where used
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def propose(self, losses: Tensor, norms: Tensor | None) -> tuple[Tensor, None]:
        if norms is not None:
            self.log_norms.lerp_(norms.log(), 1 - self.momentum)
            self.steps.add_(1)
        seen = 1 - self.momentum ** self.steps.clamp_min(1)
        task, distill = (self.log_norms / seen).unbind()
        share = (math.log(self.ratio) + task - distill).sigmoid()
        return torch.stack([2 - 2 * share, 2 * share]), None
