"""How large the gradients of the losses are, at the student's logits or in shared weights, and how well they agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.utils.reduction import mean_over_processes

SMALLEST_NORM, _LARGEST_NORM = 1e-15, 1e15  # whose squares float32 can add up


class LossGradients(NamedTuple):
    """Of the gradients of the task and of K distillation losses where a balance measures them, detached."""

    norms: Tensor
    """(1 + K,), from 1e-15 to 1e15: the size of each, the task's first."""
    cosines: Tensor
    """(K,), -1 to 1: of the angle between each and the task's, all samples together; 0 where one of them vanishes."""


def output_gradients(losses: dict[str, Tensor], output: Tensor) -> LossGradients:
    """Norms and cosines of the gradients of the losses at the student's logits, over the samples of all processes.

    The norm is the root mean square over the samples of ``|| d(B * L) / d(output of the sample) ||``, B the number of
    samples: for a mean over the batch that is the gradient of the sample's own loss, whatever the batch size and the
    number of processes. Mean squares and the mean products are what is averaged over processes.

    Args:
        losses: by name, the task's first, 0-dim each, with their graphs.
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
    return _compared(mean_over_processes(_products(found) / len(output)))


def weight_gradients(losses: dict[str, Tensor], weights: Sequence[Tensor], layer: str) -> LossGradients:
    """Norms and cosines of the gradients of the losses in the weights that all reach, these as one vector.

    The vectors are averaged over processes before they are measured, as the gradients are that the student learns
    from: for a mean over the batch it is the gradient of the mean over the samples of all processes. Nothing is added
    to the ``grad`` of a parameter.

    Args:
        losses: by name, the task's first, 0-dim each, with their graphs, which are kept.
        weights: leaves of these graphs, in any shapes. Those that one of the losses does not reach are left out.
        layer: name of the module that the weights are of, for messages.

    Raises:
        UsageError: when there is no weight that all losses reach.
    """
    reached = {name: gradients_or_none(loss, weights) for name, loss in losses.items()}
    shared = [found for found in zip(*reached.values(), strict=True) if all(g is not None for g in found)]
    if not shared:
        raise not_shared(layer, {name: any_of(found) for name, found in reached.items()})
    vectors = [torch.cat([_bounded(g).flatten() for g in of_loss]) for of_loss in zip(*shared, strict=True)]  # type: ignore[arg-type]
    return _compared(_products(mean_over_processes(torch.stack(vectors)).unbind()))


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


def not_shared(layer: str, reaches: Mapping[str, bool]) -> UsageError:
    """The error for a module with no weight that all losses reach; ``reaches`` says of each whether it reaches any."""
    without = " and ".join(name for name, any_weight in reaches.items() if not any_weight)
    every = "both losses depend" if len(reaches) == 2 else "all losses depend"
    reason = f"weights that the {without} loss depends on" if without else f"a weight that {every} on"
    return UsageError(
        f"balance shared={layer!r} has not got {reason}: choose a module of the student before every tap, or null to "
        "have one found"
    )


def _bounded(gradient: Tensor) -> Tensor:
    return gradient.float().clamp(-_LARGEST_NORM, _LARGEST_NORM)


def _products(gradients: Sequence[Tensor]) -> Tensor:
    """The squares of all 1 + K gradients and the products of the first with each other, (1 + 2 K,)."""
    task, *others = gradients
    return torch.stack([*(g.square().sum() for g in gradients), *((task * other).sum() for other in others)])


def _compared(products: Tensor) -> LossGradients:
    count = (len(products) + 1) // 2
    norms = products[:count].sqrt().clamp(SMALLEST_NORM, _LARGEST_NORM)
    return LossGradients(norms, (products[count:] / norms[0] / norms[1:]).clamp(-1, 1))
