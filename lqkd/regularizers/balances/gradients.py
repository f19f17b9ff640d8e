"""Weights that give both losses a gradient of the same size at the student's logits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.regularizers.balances.base import LOSSES, Balance
from lqkd.regularizers.reduction import mean_over_processes

_SMALLEST_NORM, _LARGEST_NORM = 1e-15, 1e15  # whose squares float32 can add up


class OutputGradientBalance(Balance):
    """Equal gradients at the logits: ``w_distill * G_distill = ratio * w_task * G_task``, with weights of sum 2.

    G is the root mean square over the samples of the norm of a loss's gradient at their logits (see
    :func:`output_gradient_norms`), as a geometric running mean over the steps, which no single batch can dominate.
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

    def propose(self, losses: Tensor, output: Tensor | None) -> tuple[Tensor, None]:
        assert output is not None
        if self.training and torch.is_grad_enabled():
            self.log_norms.lerp_(output_gradient_norms(losses, output).log().to(self.log_norms), 1 - self.momentum)
            self.steps.add_(1)
        seen = 1 - self.momentum ** self.steps.clamp_min(1)
        task, distill = (self.log_norms / seen).unbind()
        share = (math.log(self.ratio) + task - distill).sigmoid()
        return torch.stack([2 - 2 * share, 2 * share]), None


def output_gradient_norms(losses: Tensor, output: Tensor) -> Tensor:
    """Norm of the gradient of each loss at the student's logits, (2,), detached, between 1e-15 and 1e15.

    The root mean square over the samples of all processes of ``|| d(B * L) / d(output of the sample) ||``, B the
    number of samples: for a mean over the batch that is the gradient of the sample's own loss, whatever the batch size
    and the number of processes. The mean square is what is averaged over processes.

    Args:
        losses: (2,), with the student's graph.
        output: logits (B, C) that both losses come from, with their graph.

    Raises:
        UsageError: when a loss does not depend on the logits.
    """
    squares = []
    for name, loss in zip(LOSSES, losses.unbind(), strict=True):
        gradient = None
        if loss.requires_grad and output.requires_grad:
            (gradient,) = torch.autograd.grad(loss, output, retain_graph=True, allow_unused=True)
        if gradient is None:
            raise UsageError(
                f"the {name} loss does not depend on the student's logits, where this balance measures gradients: use "
                "a loss on logits, or another balance"
            )
        per_sample = (gradient * len(gradient)).clamp(-_LARGEST_NORM, _LARGEST_NORM)
        squares.append(per_sample.square().sum() / len(gradient))
    norms = mean_over_processes(torch.stack(squares)).sqrt()
    return norms.clamp(_SMALLEST_NORM, _LARGEST_NORM)
