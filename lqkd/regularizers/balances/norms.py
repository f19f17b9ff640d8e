"""How large the gradient of each loss is at the student's logits, and how well both agree."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.regularizers.reduction import mean_over_processes

_SMALLEST_NORM, _LARGEST_NORM = 1e-15, 1e15  # whose squares float32 can add up


class OutputGradients(NamedTuple):
    """What is known of the gradients of the task and the distillation loss at the student's logits, detached."""

    norms: Tensor
    """(2,), from 1e-15 to 1e15: the root mean square over the samples of the norm of each sample's gradient."""
    cosine: Tensor
    """0-dim, -1 to 1: of the angle between both, all samples together; 0 where one of them vanishes."""


def output_gradients(losses: dict[str, Tensor], output: Tensor) -> OutputGradients:
    """Norms and cosine of the gradients of both losses at the student's logits, over the samples of all processes.

    The norm is the root mean square over the samples of ``|| d(B * L) / d(output of the sample) ||``, B the number of
    samples: for a mean over the batch that is the gradient of the sample's own loss, whatever the batch size and the
    number of processes. Mean squares and the mean product are what is averaged over processes.

    Args:
        losses: ``{"task": ..., "distill": ...}``, 0-dim each, with their graphs.
        output: logits (B, C) that the losses come from, with their graph.

    Raises:
        UsageError: when a loss does not depend on the logits.
    """
    found = []
    for name, loss in losses.items():
        gradient = None
        if loss.requires_grad and output.requires_grad:
            (gradient,) = torch.autograd.grad(loss, output, retain_graph=True, allow_unused=True)
        if gradient is None:
            raise UsageError(
                f"the {name} loss does not depend on the student's logits, where this balance measures gradients: use "
                "a loss on logits, or another balance"
            )
        found.append((gradient.float() * len(gradient)).clamp(-_LARGEST_NORM, _LARGEST_NORM))
    task, distill = found
    sums = torch.stack([task.square().sum(), distill.square().sum(), (task * distill).sum()])
    task_square, distill_square, product = mean_over_processes(sums / len(output)).unbind()
    norms = torch.stack([task_square, distill_square]).sqrt().clamp(_SMALLEST_NORM, _LARGEST_NORM)
    return OutputGradients(norms, (product / norms[0] / norms[1]).clamp(-1, 1))
