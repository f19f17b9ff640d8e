"""How long a step is, and which loss makes it so: gradients of single losses in the student's parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lqkd.balances.base import TASK, GradientScale
from lqkd.quantization.quantizers.blocks import BlockFormat
from lqkd.utils.reduction import mean_over_processes

TOTAL = "total"
"""The name of the sum of all losses' gradients beside theirs."""


def gradient_of(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """The gradient of ``loss``, 0-dim, in all parameters, (P,) float32, the mean over all processes; keeps the graph.

    Parameters that it does not depend on have zeros.
    """
    found: Sequence[Tensor | None] = [None] * len(parameters)
    if loss.requires_grad:
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    flat = [
        torch.zeros_like(p, dtype=torch.float32).flatten() if gradient is None else gradient.float().flatten()
        for p, gradient in zip(parameters, found, strict=True)
    ]
    return mean_over_processes(torch.cat(flat))


def gradient_norms(
    losses: Mapping[str, Tensor], weights: Mapping[str, Tensor], parameters: Sequence[nn.Parameter]
) -> dict[str, Tensor]:
    """By loss, the Euclidean norm of what it puts into the student's gradient, and that of the sum, ``total``.

    Costs a backward pass for each loss.

    Args:
        losses: 0-dim each, differentiable.
        weights: of the balance, 0-dim each; 1 for a loss that is not among them.
        parameters: of the student.

    Returns:
        0-dim each, of all processes together.
    """
    total: Tensor | None = None
    norms = {}
    for name, loss in losses.items():
        gradient = gradient_of(loss, parameters)
        if name in weights:
            gradient = weights[name] * gradient
        norms[name] = gradient.norm()
        total = gradient if total is None else total + gradient
    assert total is not None
    return norms | {TOTAL: total.norm()}


def measured_together(module: nn.Module, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Those of ``parameters`` that one norm of a gradient is of: all but steps of blocks, which are learned by shares.

    The gradient of such a share is divided by the step's own size, some thousandth, and would be all of the norm.
    """
    relative = {id(each.scale) for each in module.modules() if isinstance(each, BlockFormat)}
    return [parameter for parameter in parameters if id(parameter) not in relative]


class GradientLength:
    """Gives the student's gradient the length that a balance asks for with ``gradient_scale``; its direction stays.

    Args:
        scale: see :class:`~lqkd.balances.Balance`.
        parameters: of the student.
    """

    def __init__(self, scale: GradientScale, parameters: Sequence[nn.Parameter]) -> None:
        self._scale, self._parameters = scale, parameters
        self._task: Tensor | None = None  # the sum, over a group of batches, of the gradient of the task's loss

    def add(self, losses: Mapping[str, Tensor], samples: int) -> None:
        """Look at the losses of a batch, before its backward pass, which counts as so many samples on this process."""
        if self._scale == "task":
            gradient = gradient_of(samples * losses[TASK], self._parameters)
            self._task = gradient if self._task is None else self._task + gradient

    def apply(self, samples: Tensor) -> None:
        """Rescale the gradient that is there, of a group of batches with so many samples on a process in the mean."""
        if self._scale == "sum":
            return
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        length = nn.utils.get_total_norm(gradients)
        wanted = torch.ones_like(length)
        if self._task is not None:
            wanted, self._task = (self._task / samples).norm().to(length), None
        factor = torch.where(length > 0, wanted / length, torch.zeros_like(length))  # of nothing, nothing is made
        torch._foreach_mul_(gradients, factor)
