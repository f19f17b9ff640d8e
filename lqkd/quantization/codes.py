"""Quantizers as whole numbers: unsigned 8-bit codes of activations, signed codes of weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.quantization.quantizers import (
    N2UQ,
    SEQ,
    TTQ,
    TWN,
    AbsMean,
    APoT,
    DoReFa,
    Dynamic,
    LevelwiseStep,
    LSQPlus,
    Quantizer,
    ReAct,
    UniformQuantizer,
)
from lqkd.quantization.quantizers.apot import magnitudes
from lqkd.quantization.quantizers.binary import BinaryQuantizer

CODES = 256
"""Number of unsigned 8-bit codes."""
MIDDLE = 128
"""The code of zero on a signed grid: every activation is unsigned, as integer additions want operands of one type."""


@dataclass(frozen=True)
class ActivationCodes:
    """A uniform grid of activations: ``x_hat = (code - zero_point) * scale``.

    Attributes:
        scale: positive, 0-dim float32.
        zero_point: the code of zero, 0 to 255.
        low, high: smallest and largest code in use, within 0 to 255.
    """

    scale: Tensor
    zero_point: int
    low: int
    high: int


def activation_codes(quantizer: Quantizer, place: str) -> ActivationCodes | None:
    """The codes of an activation quantizer, ``None`` for one whose levels are not evenly spaced.

    Args:
        quantizer: fitted, one grid per tensor.
        place: its layer, for messages.

    Raises:
        UsageError: when it is not fitted, has a grid per channel or token, or its scale is zero or not finite.
    """
    if isinstance(quantizer, Dynamic):
        raise UsageError(
            f"the input of {place} is measured for each token (quantizer dynamic), and an integer file has one grid a "
            "tensor: train with activation_quantizer=lsq, or with 32 activation bits"
        )
    check_fitted(quantizer, place)
    if quantizer.channels is not None:
        raise UsageError(f"the input of {place} has a grid per channel: integer layers need one per tensor")
    if isinstance(quantizer, LevelwiseStep) and not quantizer.shared:
        raise UsageError(f"the input of {place} has a grid for each call: integer layers need one of one call")
    if isinstance(quantizer, ReAct):
        return ActivationCodes(torch.ones(()), MIDDLE, MIDDLE - 1, MIDDLE + 1)
    if isinstance(quantizer, LSQPlus) and quantizer.offset is not None:
        check_finite(quantizer.offset, place, "offset")
        scale, zero = step_of(quantizer.step(), place), -int(quantizer.zero_level())
        return ActivationCodes(scale, zero, 0, quantizer.code_range()[1])
    if isinstance(quantizer, UniformQuantizer):
        zero = MIDDLE if quantizer.signed else 0
        low, high = quantizer.code_range()
        return ActivationCodes(step_of(quantizer.step(), place), zero, low + zero, high + zero)
    if isinstance(quantizer, DoReFa):
        return ActivationCodes(quantizer._activation_step(), 0, *quantizer.code_range())
    return None


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
        UsageError: when the quantizer is not fitted, has groups, or its scale is zero or not finite.
    """
    check_ungrouped(quantizer, place)
    check_fitted(quantizer, place)
    if not weight.isfinite().all():
        raise UsageError(f"the weight of {place} is not finite: the training has failed, choose another checkpoint")
    codes = quantizer.codes(weight).long()
    bits = quantizer.bits
    if isinstance(quantizer, UniformQuantizer) or (isinstance(quantizer, SEQ) and quantizer.ternary):
        return WeightCodes(codes, step_of(quantizer.step(), place), None, bits)
    if isinstance(quantizer, TWN | AbsMean):
        return WeightCodes(codes, step_of(quantizer.scale, place), None, bits)
    if isinstance(quantizer, BinaryQuantizer):
        return WeightCodes(2 * codes - 1, step_of(quantizer.scale, place), None, bits)
    if isinstance(quantizer, DoReFa | N2UQ | SEQ) and bits < 8:
        # Evenly spaced without a zero: odd multiples of half a distance.
        lowest = quantizer.code_range()[0]
        return WeightCodes(2 * (codes - lowest) - (2**bits - 1), step_of(_half_distance(quantizer), place), None, bits)
    if isinstance(quantizer, APoT):
        table = _apot_integers(quantizer)
        if table is not None:
            return WeightCodes(
                table.to(codes.device)[codes], step_of(quantizer.clip() / int(table[-1]), place), None, bits
            )
    levels = quantizer.levels().detach().float()
    check_finite(levels, place, "levels")
    return WeightCodes(codes - quantizer.code_range()[0], None, levels, bits)


def _half_distance(quantizer: DoReFa | N2UQ | SEQ) -> Tensor:
    """Of two levels."""
    if isinstance(quantizer, SEQ):
        return quantizer.step() / 2
    measured = isinstance(quantizer, N2UQ) or quantizer.bits == 1
    return (quantizer.scale if measured else torch.ones_like(quantizer.scale)) / quantizer.code_range()[1]


def is_exactly_uniform(quantizer: Quantizer) -> bool:
    """Whether the levels of a weight quantizer are integers times one scale that fit into 8 bits."""
    if isinstance(quantizer, APoT):
        return _apot_integers(quantizer) is not None
    return not isinstance(quantizer, TTQ) and not (isinstance(quantizer, DoReFa | N2UQ | SEQ) and quantizer.bits == 8)


def _apot_integers(quantizer: APoT) -> Tensor | None:
    """The levels as integers, the largest of which is alpha: sums of powers of two are multiples of the smallest."""
    half = magnitudes(quantizer.bits - 1) if quantizer.signed else magnitudes(quantizer.bits)
    for top in range(1, MIDDLE):
        scaled = [value * top for value in half]
        if all(abs(value - round(value)) < 1e-9 for value in scaled):
            positive = [round(value) for value in scaled]
            return torch.tensor([-value for value in reversed(positive[1:])] + positive)
    return None


def step_of(step: Tensor, place: str) -> Tensor:
    """``step`` as float32; UsageError, which names ``place``, where one is zero or not finite."""
    step = step.detach().float()
    check_finite(step, place, "scale")
    if (step <= torch.finfo(torch.float32).tiny).any():
        channel = "" if step.ndim == 0 else f" in channel {int(step.argmin())}"
        raise UsageError(f"a scale of {place} is zero{channel}: choose another checkpoint, or train on")
    return step


def check_finite(value: Tensor, place: str, name: str) -> None:
    """Raise UsageError unless every element of ``value`` is finite."""
    if not value.isfinite().all():
        raise UsageError(f"a {name} of {place} is not finite: the training has failed, choose another checkpoint")


def check_ungrouped(quantizer: Quantizer, place: str) -> None:
    """Raise UsageError when ``quantizer`` has a grid per group: an integer kernel sums what shares one scale."""
    if quantizer.group_size is not None:
        instead = "leave group_size at null" if quantizer.block_size is None else "its file is that of --format gguf"
        raise UsageError(
            f"the weight of {place} has a grid per {quantizer.group_size} inputs, which an integer layer does not "
            f"have: {instead}"
        )


def check_fitted(quantizer: Quantizer, place: str) -> None:
    """Raise UsageError when ``quantizer`` has no grid yet."""
    if not quantizer.is_ready:
        raise UsageError(
            f"a quantizer of {place} has no grid, since it has seen no data or nothing but zeros: train the student, "
            "or call initialize_quantizers"
        )
