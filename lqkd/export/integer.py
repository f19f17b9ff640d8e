"""Layers as they are deployed: integer weights with a scale per channel and integer biases."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.export.grids import ActivationGrid
from lqkd.quantization.accumulator import layer_integers
from lqkd.quantization.codes import WeightCodes, weight_codes
from lqkd.quantization.layers import QuantizedLayer, QuantizedSubclass

_CONVOLUTIONS: dict[type[nn.Module], Any] = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


EXACT = 2**24
"""Whole numbers below it, and their sums below it in any order, are exact in float32."""


class IntegerLayer(nn.Module):
    """A convolution or Linear whose weight is ``codes * scale`` and whose bias is ``bias_codes * bias_scale``.

    The products run in floating point in :meth:`forward`, and on codes in :meth:`sums`, as in an integer runtime.

    Attributes:
        codes: int8, shape of the weight. Where ``levels`` is set they are positions in it, uint8.
        scale: (channels,) float32, positive; ones where ``levels`` is set.
        levels: (channels, L) float32 or ``None``.
        bias_codes: (channels,) int32 or ``None``: then ``bias`` is in floating point.
        bias_scale: (channels,) float32: ``input scale * scale / multiplier``.
        multiplier: power of two by which codes may be multiplied, and ``scale`` divided, within 8 bits. Biases are
            integers on the grid of the accumulator, which would be coarse for few bits.
        bits: of the weight.
        changed: how many weights had to move by one step, because a negative batch norm factor turns -128 into 128.
    """

    codes: Tensor
    scale: Tensor
    levels: Tensor | None
    bias: Tensor | None
    bias_codes: Tensor | None
    bias_scale: Tensor | None

    def __init__(
        self,
        codes: WeightCodes,
        output_scale: Tensor | None,
        bias: Tensor | None,
        grid: ActivationGrid | None,
        place: str,
    ) -> None:
        super().__init__()
        self.bits = codes.bits
        held = layer_integers(codes, output_scale, bias, None if grid is None else grid.as_codes(), place)
        self.multiplier = held.multiplier
        self.changed = held.changed
        for name in ("codes", "scale", "levels", "bias_scale", "bias_codes"):
            self.register_buffer(name, getattr(held, name))
        self.register_buffer("bias", held.bias if held.bias_codes is None else None)

    def float_weight(self) -> Tensor:
        """The weight in floating point."""
        if self.levels is not None:
            codes = self.codes.long()
            return self.levels.gather(1, codes.flatten(1)).view(codes.shape)
        return self.codes.float() * self.scale.view(-1, *[1] * (self.codes.ndim - 1))

    def float_bias(self) -> Tensor | None:
        """The bias in floating point."""
        if self.bias_codes is None or self.bias_scale is None:
            return self.bias
        return self.bias_codes.float() * self.bias_scale

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's operation with a given weight and bias."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.float_weight(), self.float_bias())

    def sums(self, x: Tensor, largest: int) -> Tensor:
        """What the 32-bit accumulators of an integer kernel hold in the end, as float32, to which it turns them.

        Args:
            x: codes of the input minus the code of zero: whole numbers, float32, (B, channels, ...).
            largest: their largest magnitude on the grid.
        """
        codes = self.codes.int()
        bias = torch.zeros(len(codes)) if self.bias_codes is None else self.bias_codes
        bound = largest * codes.abs().flatten(1).sum(1)
        if (bound * self.multiplier + bias.double().abs()).max() < EXACT:
            return self.product(x, (codes * self.multiplier).float(), bias.float())
        dtype = torch.float32 if bound.max() < EXACT else torch.float64
        sums = self.product(x.to(dtype), codes.to(dtype), None).double() * self.multiplier
        return (sums + self.by_channel(bias.double(), sums.ndim)).float()

    def by_channel(self, values: Tensor, rank: int) -> Tensor:
        """View (channels,) ``values`` so that they broadcast over a result of ``rank`` axes."""
        return values.view(-1, *[1] * (rank - 2))


class IntegerLinear(IntegerLayer):
    """:class:`torch.nn.Linear` with integer weights; input (..., in_features)."""

    def by_channel(self, values: Tensor, rank: int) -> Tensor:
        return values

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


class IntegerConv(IntegerLayer):
    """A convolution over one to three axes, padded with zeros, with integer weights; input (B, C, ...)."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    function: Any

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.function(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)  # type: ignore[no-any-return]


def integer_layer(layer: QuantizedLayer, grid: ActivationGrid | None, place: str) -> IntegerLayer | None:
    """The deployed form of a quantised layer, or ``None`` when its weight is in floating point.

    Args:
        layer: a quantised convolution or Linear.
        grid: that of its input; ``None`` when it has none, or one that is not uniform.
        place: its name, for messages.

    Raises:
        UsageError: when the layer pads with something else than zeros, or its numbers are unusable.
    """
    if layer.weight_quantizer is None:
        return None
    if isinstance(layer, QuantizedSubclass) and not _is_plain(layer):
        raise UsageError(
            f"operator {layer.float_class.__name__} in {place} cannot be exported: it computes something else than "
            f"the layer that it is derived from"
        )
    assert isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d), "others are no operation of a file"
    codes = weight_codes(layer.weight_quantizer, layer.weight, place)
    arguments = (codes, layer.output_scale, layer.bias, grid, place)
    if isinstance(layer, nn.Linear):
        return IntegerLinear(*arguments)
    conv: Any = layer
    result = IntegerConv(*arguments)
    result.function = _function(conv)
    result.stride, result.dilation, result.groups = conv.stride, conv.dilation, conv.groups
    result.padding = symmetric_padding(conv, place)
    return result


def _function(conv: nn.Module) -> Any:
    return next(function for kind, function in _CONVOLUTIONS.items() if isinstance(conv, kind))


@torch.no_grad()
def _is_plain(layer: QuantizedLayer) -> bool:
    """Whether a subclass computes what its base class would, tried on one input."""
    if isinstance(layer, nn.Linear):
        x = torch.linspace(-1, 1, 2 * layer.in_features).view(2, -1)
        return torch.equal(layer(x), F.linear(x, layer.quantized_weight(), layer.bias))
    conv: Any = layer
    sides = [3 * d * (k - 1) + 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    x = torch.linspace(-1, 1, conv.in_channels * math.prod(sides)).view(1, conv.in_channels, *sides)
    settings = (conv.stride, conv.padding, conv.dilation, conv.groups)
    plain = _function(layer)(x, layer.quantized_weight(), conv.bias, *settings)
    own = layer(x)
    return own.shape == plain.shape and torch.allclose(own, plain)


def symmetric_padding(conv: Any, place: str) -> tuple[int, ...]:
    """The zeros on both sides of each axis.

    Raises:
        UsageError: when the convolution pads with something else, or not the same on both sides.
    """
    if conv.padding_mode != "zeros":
        raise UsageError(f"{place} pads with padding_mode={conv.padding_mode!r}, which cannot be exported: use zeros")
    if not isinstance(conv.padding, str):
        return tuple(conv.padding)
    totals = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    if conv.padding == "same" and any(total % 2 for total in totals):
        raise UsageError(f"{place} pads one side more than the other, which cannot be exported: use an odd kernel size")
    return tuple(total // 2 if conv.padding == "same" else 0 for total in totals)
