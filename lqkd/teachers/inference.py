"""A copy of a network that only answers, and faster."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from lqkd.errors import UsageError, first_line
from lqkd.models.calls import Inputs
from lqkd.models.outputs import Asked, everything
from lqkd.quantization.batchnorm import fold_batchnorm
from lqkd.quantization.computed import copy_of
from lqkd.quantization.norms import is_batch_norm

TOLERANCE = 1e-3
"""Largest difference of a float32 copy's outputs from the network's, relative to the largest output."""


@torch.no_grad()
def inference_copy(
    network: nn.Module,
    given: Inputs | Tensor,
    *,
    bf16: bool = False,
    untouched: Collection[str] = (),
) -> tuple[nn.Module, str | None]:
    """A copy of ``network`` with batch norms folded into convolutions, in channels_last, on the same device.

    The network itself stays as it is. The float32 copy is compared with it on ``given``, so that one which cannot be
    rearranged (a forward that views activations as if they were contiguous) is copied as it is.

    Args:
        network: a network in eval mode.
        given: what to compare on, as the network is called with it: images (B, C, H, W) float32, say.
        bf16: whether the copy computes in bfloat16.
        untouched: names of modules whose outputs someone reads: they and their outputs' values stay.

    Returns:
        The copy, and why it is not rearranged, None where it is.
    """
    inputs = Inputs.of(given)
    with torch.autocast(inputs.tensors()[0].device.type, enabled=False):
        made, obstacle = _rearranged(network, inputs, untouched)
        made = made.requires_grad_(False)
        if bf16:
            made = made.to(dtype=torch.bfloat16)
    return made, obstacle


def _rearranged(network: nn.Module, inputs: Inputs, untouched: Collection[str]) -> tuple[nn.Module, str | None]:
    made = copy_of(network).eval()
    try:
        if any(is_batch_norm(module) for module in made.modules()):
            fold_batchnorm(made, untouched)
    except UsageError:
        made = copy_of(network).eval()  # a graph that cannot be traced; channels_last needs none
    made = made.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    asked = Asked("teacher", len(inputs))
    expected = everything(inputs.call(network), asked)
    try:
        found = everything(inputs.map(_channels_last).call(made), asked)
    except RuntimeError as error:
        return copy_of(network).eval(), first_line(error)
    difference = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
    if not difference <= TOLERANCE:
        return copy_of(network).eval(), f"its outputs would differ by {difference:.2g} of the largest"
    return made, None


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def computes_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 in hardware: CUDA from Ampere on, and CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False
