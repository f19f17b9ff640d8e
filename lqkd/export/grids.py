"""Quantizers of activations as what an integer runtime knows: unsigned 8-bit codes, and tables for the others."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.quantization import Quantizer
from lqkd.quantization.codes import MIDDLE, ActivationCodes, activation_codes, check_finite, step_of
from lqkd.quantization.quantizers import N2UQ, APoT, ReAct


class ActivationGrid(nn.Module):
    """``x_hat = (clamp(round(x / scale) + zero_point, low, high) - zero_point) * scale``: ONNX Q, Clip and DQ.

    Rounding is half to even. The values are those of the quantizer that it is made from, bit for bit.

    Args:
        scale: positive, 0-dim float32.
        zero_point: the code of zero, 0 to 255.
        low, high: smallest and largest code in use, within 0 to 255.
        bits: of the quantizer.
    """

    scale: Tensor

    def __init__(self, scale: Tensor, zero_point: int, low: int, high: int, bits: int) -> None:
        super().__init__()
        self.register_buffer("scale", scale.detach().clone().float())
        self.zero_point = zero_point
        self.low = low
        self.high = high
        self.bits = bits

    def code(self, value: float) -> int:
        """The code of ``value``."""
        return int(self.codes(torch.tensor(value, device=self.scale.device)))

    def limits(self, clamps: Iterable[tuple[float | None, float | None]]) -> tuple[int, int]:
        """The smallest and largest code of values that went through ``clamps`` before, the last of them first."""
        low, high = self.low, self.high
        for least, most in clamps:
            low = low if least is None else max(low, min(self.code(least), high))
            high = high if most is None else min(high, max(self.code(most), low))
        return low, high

    def as_codes(self) -> ActivationCodes:
        """The grid's numbers."""
        return ActivationCodes(self.scale, self.zero_point, self.low, self.high)

    def codes(self, x: Tensor) -> Tensor:
        """Codes of ``x`` as a floating tensor."""
        return torch.clamp(torch.round(x / self.scale) + self.zero_point, self.low, self.high)

    def forward(self, x: Tensor) -> Tensor:
        return (self.codes(x) - self.zero_point) * self.scale

    def extra_repr(self) -> str:
        return f"scale={float(self.scale):.4g}, zero_point={self.zero_point}, codes {self.low} to {self.high}"


class SignGrid(ActivationGrid):
    """``x_hat = sign(x + shift)``, sign(0) = 1, with -1 and 1 as the codes 127 and 129 (ReActNet's activations)."""

    shift: Tensor

    def __init__(self, shift: Tensor) -> None:
        super().__init__(torch.ones(()), MIDDLE, MIDDLE - 1, MIDDLE + 1, bits=1)
        self.register_buffer("shift", shift.detach().clone().float())

    def codes(self, x: Tensor) -> Tensor:
        return torch.where(x + self.shift >= 0, float(self.high), float(self.low))


class LookupGrid(nn.Module):
    """``x_hat = values[number of thresholds below x / divisor * factor]``: an activation on a non-uniform grid.

    Args:
        divisor, factor: 0-dim.
        thresholds: (L - 1,), ascending.
        values: (L,), ascending.
        bits: of the quantizer.
    """

    divisor: Tensor
    factor: Tensor
    thresholds: Tensor
    values: Tensor

    def __init__(self, divisor: Tensor, factor: Tensor, thresholds: Tensor, values: Tensor, bits: int) -> None:
        super().__init__()
        for name, value in (
            ("divisor", divisor),
            ("factor", factor),
            ("thresholds", thresholds),
            ("values", values),
        ):
            self.register_buffer(name, value.detach().clone().float())
        self.bits = bits

    def forward(self, x: Tensor) -> Tensor:
        return self.values[torch.bucketize(x / self.divisor * self.factor, self.thresholds)]


def activation_grid(quantizer: Quantizer, place: str) -> ActivationGrid | LookupGrid:
    """The grid of an activation quantizer.

    Args:
        quantizer: fitted, one grid per tensor.
        place: its layer, for messages.

    Raises:
        UsageError: when it is not fitted, its scale is zero or not finite, or it is of a family that is not known.
    """
    codes = activation_codes(quantizer, place)
    if isinstance(quantizer, ReAct):
        assert quantizer.shift is not None
        check_finite(quantizer.shift, place, "shift")
        return SignGrid(quantizer.shift)
    if codes is not None:
        return ActivationGrid(codes.scale, codes.zero_point, codes.low, codes.high, quantizer.bits)
    if isinstance(quantizer, APoT):
        clip, midpoints = step_of(quantizer.clip(), place), quantizer._tables()[1]
        return LookupGrid(clip, torch.ones(()), midpoints, quantizer.levels(), quantizer.bits)
    if isinstance(quantizer, N2UQ):
        scale = step_of(quantizer.scale, place)
        return LookupGrid(scale, quantizer.scale_in.abs(), quantizer.thresholds(), quantizer.levels(), quantizer.bits)
    raise UsageError(f"quantizer {type(quantizer).__name__} of the input of {place} cannot be exported")
