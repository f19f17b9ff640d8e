"""A deployed network in PyTorch as LiteRT computes a file of it, with XNNPACK and with its own kernels.

XNNPACK multiplies sums by a float32 factor and rounds half to even, as integer kernels elsewhere do; it adds in fixed
point, with factors of 20 bits, and rounds half up (``xnn_init_qs8_add_minmax_scalar_params``). LiteRT's own kernels
have fixed point alone: a product with a factor of 31 bits is rounded, and then its quotient by a power of two
(``MultiplyByQuantizedMultiplier``; Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", 2018, section 2.2): half away from zero, and half up in convolutions and linear
layers on x86. Both quantise by the reciprocal of a step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from lqkd.export.differences import Compared
from lqkd.export.grids import ActivationGrid
from lqkd.export.integer import IntegerLayer
from lqkd.export.nodes import Operation
from lqkd.export.reference import Codes, Unrounded

_XNNPACK_BITS = 20
_LEFT_SHIFT = 20
"""By so many bits LiteRT's own addition moves codes before it multiplies them."""
_BITS = 31


class XNNPack(Compared):
    """What XNNPACK computes.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lqkd import Recipe, quantize_model
        >>> from lqkd.export import deploy
        >>> from lqkd.export.litert_reference import XNNPack
        >>> from lqkd.quantization import initialize_quantizers
        >>> network, _ = quantize_model(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), Recipe(bits="w4a4"))
        >>> x = torch.randn(16, 4)
        >>> initialize_quantizers(network, x)
        >>> XNNPack(deploy(network.eval(), x).network)(x).shape
        torch.Size([16, 3])
    """

    gates = reshapes = False

    def quantised(self, x: Tensor, grid: ActivationGrid) -> Tensor:
        return (x * grid.scale.reciprocal()).round_().add_(grid.zero_point)

    def added(self, a: Codes, b: Codes | None, grid: ActivationGrid) -> Tensor:
        ratios = [x.grid.scale / grid.scale for x in (a, b) if x is not None]
        shift = _XNNPACK_BITS + 1 - math.frexp(float(max(ratios)))[1]
        sums = torch.full((), 2 ** (shift - 1), dtype=torch.int64)
        for x, ratio in zip((a, b), ratios, strict=False):
            assert x is not None
            sums = sums + x.values.long() * round(math.ldexp(float(ratio), shift))
        return (sums >> shift).float() + grid.zero_point

    def _globalpool(self, node: fx.Node, found: Operation, x: Any) -> Unrounded | None:
        """The file has it in floating point."""
        return None

    def _avgpool(self, node: fx.Node, found: Operation, x: Any) -> None:
        """Likewise."""


class OwnKernels(XNNPack):
    """What LiteRT's own kernels compute."""

    def requantised(self, sums: Tensor, x: Codes, layer: IntegerLayer, grid: ActivationGrid) -> Tensor:
        factors = x.grid.scale.double() * (layer.scale / layer.multiplier).double() / grid.scale.double()
        multiplier, shift = (layer.by_channel(part, sums.ndim) for part in _fixed(factors))
        return _scaled(sums.long(), multiplier, shift, half_up=True).float() + grid.zero_point

    def added(self, a: Codes, b: Codes | None, grid: ActivationGrid) -> Tensor:
        scales = [x.grid.scale.double() for x in (a, b) if x is not None]
        twice = 2 * max(scales)
        sums = torch.zeros((), dtype=torch.int64)
        for x, scale in zip((a, b), scales, strict=False):
            assert x is not None
            sums = sums + _scaled(x.values.long() << _LEFT_SHIFT, *_fixed(scale / twice))
        factor = twice / (2**_LEFT_SHIFT * grid.scale.double())
        return _scaled(sums, *_fixed(factor)).float() + grid.zero_point

    def multiplied(self, a: Codes, b: Codes, grid: ActivationGrid) -> Tensor:
        factor = a.grid.scale.double() * b.grid.scale.double() / grid.scale.double()
        return _scaled(a.values.long() * b.values.long(), *_fixed(factor)).float() + grid.zero_point


def _fixed(factor: Tensor) -> tuple[Tensor, Tensor]:
    """A positive factor, float64, as a whole multiplier of 31 bits and a power of two, by which it is multiplied."""
    fraction, exponent = torch.frexp(factor)
    multiplier, exponent = (fraction * 2**_BITS).round().long(), exponent.long()
    full = multiplier == 2**_BITS
    return torch.where(full, multiplier // 2, multiplier), torch.where(full, exponent + 1, exponent)


def _scaled(x: Tensor, multiplier: Tensor, exponent: Tensor, half_up: bool = False) -> Tensor:
    """``x * multiplier * 2**(exponent - 31)``, rounded to whole numbers twice, half up or away from zero."""
    product = (x << exponent.clamp_min(0)) * multiplier + 2 ** (_BITS - 1)
    right = exponent.clamp_max(0).neg()
    half = (1 << right) >> 1
    if half_up:
        return ((product >> _BITS) + half) >> right
    product = product + torch.where(product < 2 ** (_BITS - 1), 1 - 2**_BITS, 0)
    high = torch.div(product, 2**_BITS, rounding_mode="trunc")
    return high.sign() * ((high.abs() + half) >> right)
