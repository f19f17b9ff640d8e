"""What an integer kernel adds up: products of codes, and a bias that is an integer on the same grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.quantization.codes import ActivationCodes, WeightCodes

LARGEST_BIAS = 2**30
"""In steps of the accumulator; beyond, nothing else would fit into 32 bits."""


@dataclass(frozen=True)
class LayerIntegers:
    """The numbers of a layer in an integer kernel, on the CPU.

    Attributes:
        codes: int8, shape of the weight. Where ``levels`` is set they are positions in it, uint8.
        scale: (channels,) float32, positive; ones where ``levels`` is set.
        levels: (channels, L) float32 or ``None``.
        multiplier: power of two by which codes may be multiplied, and ``scale`` divided, within 8 bits. Biases are
            integers on the grid of the accumulator, which would be coarse for few bits.
        bias: (channels,) float32 or ``None``: as it is given.
        bias_scale: (channels,) float32, the grid of the accumulator: ``input scale * scale / multiplier``; ``None``
            where the bias stays in floating point: without one, without a uniform grid of the input, with ``levels``.
        bias_codes: (channels,) int32, likewise.
        changed: how many weights had to move by one step, because a negative batch norm factor turns -128 into 128.
    """

    codes: Tensor
    scale: Tensor
    levels: Tensor | None
    multiplier: int
    bias: Tensor | None
    bias_scale: Tensor | None
    bias_codes: Tensor | None
    changed: int


def layer_integers(
    weight: WeightCodes, factor: Tensor | None, bias: Tensor | None, grid: ActivationCodes | None, place: str
) -> LayerIntegers:
    """The integers of a convolution or Linear.

    Args:
        weight: its weight.
        factor: (channels,) what its output is multiplied by, before the bias is added: that of a folded batch norm.
        bias: (channels,) with batch norm folded.
        grid: that of its input; ``None`` when it has none, or one that is not uniform.
        place: its name, for messages.

    Raises:
        UsageError: when the bias or the factor is not finite.
    """
    channels = weight.codes.shape[0]
    factor = torch.ones(channels) if factor is None else factor.detach().cpu().float()
    if bias is not None and not bias.isfinite().all():
        raise UsageError(f"the bias of {place} is not finite: the training has failed, choose another checkpoint")
    if not factor.isfinite().all():
        raise UsageError(f"batch norm after {place} is not finite: the training has failed")
    bias = None if bias is None else bias.detach().cpu().float()
    codes = weight.codes.cpu()
    if weight.scale is None:
        assert weight.levels is not None
        levels = weight.levels.cpu().expand(channels, -1) * factor.unsqueeze(1)
        return LayerIntegers(codes.to(torch.uint8), torch.ones(channels), levels, 1, bias, None, None, 0)
    scale = weight.scale.cpu().expand(channels) * factor.abs()
    codes = codes * torch.where(factor < 0, -1, 1).view(-1, *[1] * (codes.ndim - 1))
    changed = int((codes > 127).sum())
    codes = codes.clamp_max(127)
    multiplier = 1 if grid is None else _multiplier(codes, grid.high)
    input_scale = torch.ones(()) if grid is None else grid.scale.cpu()
    codes, scale = _without_dead_channels(codes, scale, bias, input_scale, multiplier)
    bias_scale = bias_codes = None
    if bias is not None and grid is not None:
        bias_scale = input_scale * (scale / multiplier)
        bias_codes = (bias / bias_scale).round().to(torch.int32)
    return LayerIntegers(codes.to(torch.int8), scale, None, multiplier, bias, bias_scale, bias_codes, changed)


def _multiplier(codes: Tensor, largest_input: int) -> int:
    """The largest power of two by which ``codes`` may be multiplied.

    They stay signed bytes, two of their products with the largest code of the input fit into 16 bits, in which CPUs
    without VNNI add them, and the largest sum of a channel leaves as much of 32 bits as a bias may take.
    """
    low, high = int(codes.min()), int(codes.max())
    largest, total = max(-low, high), int(codes.abs().flatten(1).sum(1).max())

    def fits(multiplier: int) -> bool:
        return (
            multiplier * low >= -128
            and multiplier * high <= 127
            and multiplier * largest * largest_input * 2 < 2**15
            and multiplier * total * largest_input < 2**31 - LARGEST_BIAS
        )

    multiplier = 1
    while largest > 0 and fits(2 * multiplier):
        multiplier *= 2
    return multiplier


def _without_dead_channels(
    codes: Tensor, scale: Tensor, bias: Tensor | None, input_scale: Tensor, multiplier: int
) -> tuple[Tensor, Tensor]:
    """Zero the weights of channels whose scale vanishes beside their bias, and give these a scale that bears the bias.

    A batch norm whose factor is (nearly) zero makes such a channel a constant.
    """
    amount = torch.zeros_like(scale) if bias is None else bias.abs()
    step = input_scale * (scale / multiplier)
    dead = (step < torch.finfo(torch.float32).tiny) | (amount > LARGEST_BIAS * step)
    usable = torch.where(amount > 0, amount * (multiplier / 2**20) / input_scale, 1.0)
    shape = (-1, *[1] * (codes.ndim - 1))
    return torch.where(dead.view(shape), 0, codes), torch.where(dead, usable, scale)
