"""How large the gradients of both losses are, at the student's logits or in shared weights, and how well both agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.regularizers.reduction import mean_over_processes

SMALLEST_NORM, _LARGEST_NORM = 1e-15, 1e15  # whose squares float32 can add up


class LossGradients(NamedTuple):
    """What is known of the gradients of the task and the distillation loss where a balance measures them, detached."""

    norms: Tensor
    """(2,), from 1e-15 to 1e15: the size of both."""
    cosine: Tensor
    """0-dim, -1 to 1: of the angle between both, all samples together; 0 where one of them vanishes."""


def output_gradients(losses: dict[str, Tensor], output: Tensor) -> LossGradients:
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
        (gradient,) = gradients_or_none(loss, [output])
        if gradient is None:
            raise UsageError(
                f"the {name} loss does not depend on the student's logits, where this balance measures gradients: use "
                "a loss on logits, or another balance"
            )
        found.append(_bounded(gradient * len(gradient)))
    return _compared(mean_over_processes(_products(*found) / len(output)))


def weight_gradients(losses: dict[str, Tensor], weights: Sequence[Tensor], layer: str) -> LossGradients:
    """Norms and cosine of the gradients of both losses in the weights that both reach, all of them as one vector.

    The vectors are averaged over processes before they are measured, as the gradients are that the student learns
    from: for a mean over the batch it is the gradient of the mean over the samples of all processes. Nothing is added
    to the ``grad`` of a parameter.

    Args:
        losses: ``{"task": ..., "distill": ...}``, 0-dim each, with their graphs, which are kept.
        weights: leaves of these graphs, in any shapes. Those that one of the losses does not reach are left out.
        layer: name of the module that the weights are of, for messages.

    Raises:
        UsageError: when there is no weight that both losses reach.
    """
    task, distill = (gradients_or_none(loss, weights) for loss in losses.values())
    shared = [(t, d) for t, d in zip(task, distill, strict=True) if t is not None and d is not None]
    if not shared:
        raise not_shared(layer, task=any_of(task), distill=any_of(distill))
    vectors = [torch.cat([_bounded(gradient).flatten() for gradient in found]) for found in zip(*shared, strict=True)]
    return _compared(_products(*mean_over_processes(torch.stack(vectors)).unbind()))


def gradients_or_none(loss: Tensor, of: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradient of ``loss``, 0-dim, in each of these tensors, None where it does not reach one; keeps the graph."""
    asked = [index for index, tensor in enumerate(of) if tensor.requires_grad and loss.requires_grad]
    found: list[Tensor | None] = [None] * len(of)
    if asked:
        gradients = torch.autograd.grad(loss, [of[index] for index in asked], retain_graph=True, allow_unused=True)
        for index, gradient in zip(asked, gradients, strict=True):
            found[index] = gradient
    return found


def any_of(gradients: Sequence[Tensor | None]) -> bool:
    """Whether a loss reaches one of the tensors at least."""
    return any(gradient is not None for gradient in gradients)


def not_shared(layer: str, **reaches: bool) -> UsageError:
    """The error for a module with no weight that both losses reach; ``reaches`` says of each whether it reaches any."""
    without = " and ".join(name for name, any_weight in reaches.items() if not any_weight)
    reason = f"weights that the {without} loss depends on" if without else "a weight that both losses depend on"
    return UsageError(
        f"balance shared={layer!r} has not got {reason}: choose a module of the student before every tap, or null to "
        "have one found"
    )


def _bounded(gradient: Tensor) -> Tensor:
    return gradient.float().clamp(-_LARGEST_NORM, _LARGEST_NORM)


def _products(task: Tensor, distill: Tensor) -> Tensor:
    """Both squares and the product, (3,)."""
    return torch.stack([task.square().sum(), distill.square().sum(), (task * distill).sum()])


def _compared(products: Tensor) -> LossGradients:
    norms = products[:2].sqrt().clamp(SMALLEST_NORM, _LARGEST_NORM)
    return LossGradients(norms, (products[2] / norms[0] / norms[1]).clamp(-1, 1))
