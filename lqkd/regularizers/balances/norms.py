"""How large the gradient of each loss is at the student's logits."""

from __future__ import annotations

import torch
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.regularizers.reduction import mean_over_processes

_SMALLEST_NORM, _LARGEST_NORM = 1e-15, 1e15  # whose squares float32 can add up


def output_gradient_norms(losses: dict[str, Tensor], output: Tensor) -> Tensor:
    """Norm of the gradient of each loss at the student's logits, one element a loss, detached, from 1e-15 to 1e15.

    The root mean square over the samples of all processes of ``|| d(B * L) / d(output of the sample) ||``, B the
    number of samples: for a mean over the batch that is the gradient of the sample's own loss, whatever the batch size
    and the number of processes. The mean square is what is averaged over processes.

    Args:
        losses: 0-dim each, with their graphs.
        output: logits (B, C) that the losses come from, with their graph.

    Raises:
        UsageError: when a loss does not depend on the logits.
    """
    squares = []
    for name, loss in losses.items():
        gradient = None
        if loss.requires_grad and output.requires_grad:
            (gradient,) = torch.autograd.grad(loss, output, retain_graph=True, allow_unused=True)
        if gradient is None:
            raise UsageError(
                f"the {name} loss does not depend on the student's logits, where this balance measures gradients: use "
                "a loss on logits, or another balance"
            )
        per_sample = (gradient.float() * len(gradient)).clamp(-_LARGEST_NORM, _LARGEST_NORM)
        squares.append(per_sample.square().sum() / len(gradient))
    norms = mean_over_processes(torch.stack(squares)).sqrt()
    return norms.clamp(_SMALLEST_NORM, _LARGEST_NORM)
