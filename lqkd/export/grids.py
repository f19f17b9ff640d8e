"""Quantizers as what an integer runtime knows: unsigned 8-bit codes of activations, signed codes of weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.quantization import Quantizer
from lqkd.quantization.quantizers import N2UQ, TTQ, TWN, APoT, DoReFa, LSQPlus, ReAct
from lqkd.quantization.quantizers.apot import magnitudes
from lqkd.quantization.quantizers.binary import BinaryQuantizer
from lqkd.quantization.quantizers.uniform import UniformQuantizer

CODES = 256
"""Number of unsigned 8-bit codes."""
MIDDLE = 128
"""The code of zero on a signed grid: every activation is unsigned, as integer additions want operands of one type."""


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
    _check_fitted(quantizer, place)
    if quantizer.channels is not None:
        raise UsageError(f"the input of {place} has a grid per channel: integer layers need one per tensor")
    if isinstance(quantizer, ReAct):
        assert quantizer.shift is not None
        _check_finite(quantizer.shift, place, "shift")
        return SignGrid(quantizer.shift)
    if isinstance(quantizer, LSQPlus) and quantizer.offset is not None:
        _check_finite(quantizer.offset, place, "offset")
        scale, zero = _step(quantizer.step(), place), -int(quantizer.zero_level())
        return ActivationGrid(scale, zero, 0, quantizer.code_range()[1], quantizer.bits)
    if isinstance(quantizer, UniformQuantizer):
        zero = MIDDLE if quantizer.signed else 0
        low, high = quantizer.code_range()
        return ActivationGrid(_step(quantizer.step(), place), zero, low + zero, high + zero, quantizer.bits)
    if isinstance(quantizer, DoReFa):
        return ActivationGrid(quantizer._activation_step(), 0, *quantizer.code_range(), quantizer.bits)
    if isinstance(quantizer, APoT):
        clip, midpoints = _step(quantizer.clip(), place), quantizer._tables()[1]
        return LookupGrid(clip, torch.ones(()), midpoints, quantizer.levels(), quantizer.bits)
    if isinstance(quantizer, N2UQ):
        scale = _step(quantizer.scale, place)
        return LookupGrid(scale, quantizer.scale_in.abs(), quantizer.thresholds(), quantizer.levels(), quantizer.bits)
    raise UsageError(f"quantizer {type(quantizer).__name__} of the input of {place} cannot be exported")


@dataclass(frozen=True)
class WeightCodes:
    """A weight as integers.

    Attributes:
        codes: int64, shape of the weight: multiples of ``scale`` or, where there are ``levels``, positions in them.
        scale: (channels,) or (), float32; ``None`` where the levels are not multiples of one step, or too many.
        levels: (channels, L) or (L,), float32, where ``scale`` is ``None``.
        bits: of the quantizer.
    """

    codes: Tensor
    scale: Tensor | None
    levels: Tensor | None
    bits: int


def weight_codes(quantizer: Quantizer, weight: Tensor, place: str) -> WeightCodes:
    """The codes of ``weight`` on the grid of its quantizer.

    Raises:
        UsageError: when the quantizer is not fitted or its scale is zero or not finite.
    """
    _check_fitted(quantizer, place)
    if not weight.isfinite().all():
        raise UsageError(f"the weight of {place} is not finite: the training has failed, choose another checkpoint")
    codes = quantizer.codes(weight).long()
    bits, top = quantizer.bits, quantizer.code_range()[1]
    if isinstance(quantizer, UniformQuantizer):
        return WeightCodes(codes, _step(quantizer.step(), place), None, bits)
    if isinstance(quantizer, TWN):
        return WeightCodes(codes, _step(quantizer.scale, place), None, bits)
    if isinstance(quantizer, BinaryQuantizer):
        return WeightCodes(2 * codes - 1, _step(quantizer.scale, place), None, bits)
    if isinstance(quantizer, DoReFa | N2UQ) and bits < 8:
        odd = 2 * codes - top  # evenly spaced without a zero: odd multiples of half a distance
        scale = quantizer.scale if isinstance(quantizer, N2UQ) or bits == 1 else torch.ones_like(quantizer.scale)
        return WeightCodes(odd, _step(scale / top, place), None, bits)
    if isinstance(quantizer, APoT):
        table = _apot_integers(quantizer)
        if table is not None:
            return WeightCodes(table[codes], _step(quantizer.clip() / int(table[-1]), place), None, bits)
    levels = quantizer.levels().detach().float()
    _check_finite(levels, place, "levels")
    return WeightCodes(codes - quantizer.code_range()[0], None, levels, bits)


def is_exactly_uniform(quantizer: Quantizer) -> bool:
    """Whether the levels of a weight quantizer are integers times one scale that fit into 8 bits."""
    if isinstance(quantizer, APoT):
        return _apot_integers(quantizer) is not None
    return not isinstance(quantizer, TTQ) and not (isinstance(quantizer, DoReFa | N2UQ) and quantizer.bits == 8)


def _apot_integers(quantizer: APoT) -> Tensor | None:
    """The levels as integers, the largest of which is alpha: sums of powers of two are multiples of the smallest."""
    half = magnitudes(quantizer.bits - 1) if quantizer.signed else magnitudes(quantizer.bits)
    for top in range(1, MIDDLE):
        scaled = [value * top for value in half]
        if all(abs(value - round(value)) < 1e-9 for value in scaled):
            positive = [round(value) for value in scaled]
            return torch.tensor([-value for value in reversed(positive[1:])] + positive)
    return None


def _step(step: Tensor, place: str) -> Tensor:
    step = step.detach().float()
    _check_finite(step, place, "scale")
    if (step <= torch.finfo(torch.float32).tiny).any():
        channel = "" if step.ndim == 0 else f" in channel {int(step.argmin())}"
        raise UsageError(f"a scale of {place} is zero{channel}: choose another checkpoint, or train on")
    return step


def _check_finite(value: Tensor, place: str, name: str) -> None:
    if not value.isfinite().all():
        raise UsageError(f"a {name} of {place} is not finite: the training has failed, choose another checkpoint")


def _check_fitted(quantizer: Quantizer, place: str) -> None:
    if not quantizer.is_ready:
        raise UsageError(
            f"a quantizer of {place} has never been fitted to data: train the student, or call initialize_quantizers"
        )
