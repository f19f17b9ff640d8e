"""Looking ahead exactly: the task loss after one step of distillation, differentiated by the weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call


def one_step_alignment(
    network: nn.Module,
    distill: Callable[[Tensor, Tensor], Tensor],
    weights: Tensor,
    images: Tensor,
    held_out: tuple[Tensor, Callable[[Tensor], Tensor]],
    step_size: float,
) -> Tensor:
    """``-N / step_size * d L_task(theta') / d w``, ``theta' = theta - step_size * d L_distill(theta, w) / d theta``.

    To first order in the step it is the product of each element's gradient with the task's, both in the parameters, N
    times. Neither the network's parameters and buffers nor their gradients are touched.

    Args:
        network: the student, in the mode in which it trains.
        distill: the distillation loss, 0-dim, of logits (B, C) and weights.
        weights: in the shape of the divergence map, N elements.
        images: (B, C, H, W), on which the step is taken.
        held_out: images on which the task loss is measured, and that loss, 0-dim, of their logits (B, C).
        step_size: of the step.

    Returns:
        A tensor in the shape of ``weights``, detached.
    """
    with torch.enable_grad():
        parameters = {n: p.detach().requires_grad_() for n, p in network.named_parameters() if p.requires_grad}
        weights = weights.detach().clone().requires_grad_()
        loss = distill(functional_call(network, (parameters, _buffers(network)), (images,)).float(), weights)
        gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True, allow_unused=True)
        moved = {
            name: parameter if gradient is None else parameter.detach() - step_size * gradient
            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
        }
        logits = functional_call(network, (moved, _buffers(network)), (held_out[0],)).float()
        (slope,) = torch.autograd.grad(held_out[1](logits), weights)
    return -slope * (weights.numel() / step_size)


def _buffers(network: nn.Module) -> dict[str, Tensor]:
    """Copies, which batch norm may update."""
    return {name: buffer.clone() for name, buffer in network.named_buffers()}
