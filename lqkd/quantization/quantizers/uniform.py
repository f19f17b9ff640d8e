"""Uniform symmetric grids: what the families with one step size share, and the two that calibrate it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.quantization.kernels import learned_step_quantize, positive_step, uniform_codes
from lqkd.quantization.quantizers.base import Quantizer, integer_range, max_over_ranks, mean_over_ranks

SEARCH_SAMPLE = 2**18
"""About as many elements as a range search looks at; larger tensors are thinned out evenly."""
_SHORT = 256
"""Elements of rows that are not thinned out."""


class UniformQuantizer(Quantizer):
    """``x_hat = round(clamp(x / s, qmin, qmax)) * s``: zero is a level, codes are those of ONNX ``QuantizeLinear``.

    A family sets ``scale`` (parameter or buffer, () or (channels,)) and its initial value. The step s is the
    absolute value of ``scale``, never below the smallest normal float.

    Args:
        bits: 1 to 8 for unsigned, 2 to 8 for signed data.
        signed, channels, channel_axis, batched, group_size: see :class:`Quantizer`.
        narrow_range: whether signed codes leave the lowest out, as in -127 to 127.

    Raises:
        UsageError: when ``bits`` is out of range, or 1 for signed data, whose positive side would be empty.

    Examples:
        >>> quantizer = MinMax(3, signed=True)
        >>> _ = quantizer(torch.tensor([-1.0, 0.5, 3.0]))
        >>> quantizer.step(), quantizer.levels()
        (tensor(1.), tensor([-4., -3., -2., -1.,  0.,  1.,  2.,  3.]))
    """

    scale: Tensor

    def __init__(
        self,
        bits: int,
        *,
        signed: bool | None = None,
        channels: int | None = None,
        channel_axis: int = 0,
        batched: bool = False,
        group_size: int | None = None,
        narrow_range: bool = False,
    ) -> None:
        super().__init__(bits, signed=signed, channels=channels, channel_axis=channel_axis, batched=batched)
        self.group_size = group_size
        self.narrow_range = narrow_range
        self.format.copy_(self._format())

    @classmethod
    def check_bits(cls, bits: int, signed: bool | None) -> int:
        if super().check_bits(bits, signed) == 1 and signed:
            raise UsageError(
                f"bits=1 is not possible for signed {cls.__name__}, whose grid would be {{-1, 0}}: use 2 to 8 bits"
            )
        return bits

    def code_range(self) -> tuple[int, int]:
        low, high = super().code_range()
        return (-high, high) if self.narrow_range and self.signed else (low, high)

    def step(self) -> Tensor:
        """The positive step size s in the shape of ``scale``, float32, differentiable."""
        return positive_step(self.scale)

    def codes(self, x: Tensor) -> Tensor:
        rows = self._grouped(x)
        codes = uniform_codes(rows, self._broadcast(self.step(), rows.ndim), *self.code_range())
        return codes.to(torch.int32).view(x.shape)

    def dequantize(self, codes: Tensor) -> Tensor:
        return self._times(codes, self.step())

    def _times(self, codes: Tensor, step: Tensor) -> Tensor:
        """``codes * step`` in the shape of ``codes``, for one step a grid."""
        rows = self._grouped(codes)
        return (rows * self._broadcast(step, rows.ndim)).view(codes.shape)

    def at_codes(self, codes: Tensor, x: Tensor) -> Tensor:
        """The values of ``codes`` instead of those of ``x``: no gradient to ``x``, that of ``s * codes`` to the step.

        The step's gradient is scaled as the family scales it for ``x``; the result is ``dequantize(codes)``.
        """
        step = self.step()
        step = step.detach() + (step - step.detach()) * self._gradient_scale(x)
        return self._times(codes, step)

    def _gradient_scale(self, x: Tensor) -> float:
        """Factor of the gradient of the step for an input like ``x``."""
        return 1.0

    def levels(self) -> Tensor:
        qmin, qmax = self.code_range()
        grid = torch.arange(qmin, qmax + 1, device=self.scale.device)
        return grid * self.step().unsqueeze(-1)

    @abstractmethod
    def _initial_step(self, rows: Tensor) -> Tensor:
        """The step of each row of (channels, elements), the same on every rank; anything for a row of zeros."""

    def _fit(self, x: Tensor) -> bool:
        return self._take(self._initial_step, self._per_channel(x))

    def _fit_mse(self, x: Tensor) -> bool:
        return self._take(lambda rows: mse_step(rows, *self.code_range()), self._per_channel(x))

    def _take(self, rule: Callable[[Tensor], Tensor], rows: Tensor) -> bool:
        """Set the step of each row by ``rule``; False when no row says anything."""
        step = rule(rows)
        usable = step.isfinite() & (step > 0) & (max_over_ranks(rows.abs().amax(1)) > 0)
        if not usable.any():
            return False
        # A dead channel (all zero) has no scale of its own: 1 keeps its codes at zero and its gradient finite.
        self._set_step(torch.where(usable, step, 1.0).reshape(self.scale.shape))
        return True

    def _set_step(self, step: Tensor) -> None:
        self.scale.copy_(step)

    def _refit(self, previous_bits: int) -> None:
        self.scale.mul_(integer_range(previous_bits, self.signed)[1] / self.code_range()[1])


class _Calibrated(UniformQuantizer):
    """A step that comes from the first training batch and stays."""

    def __init__(
        self,
        bits: int,
        *,
        signed: bool | None = None,
        channels: int | None = None,
        channel_axis: int = 0,
        batched: bool = False,
        group_size: int | None = None,
        narrow_range: bool = False,
    ) -> None:
        super().__init__(
            bits,
            signed=signed,
            channels=channels,
            channel_axis=channel_axis,
            batched=batched,
            group_size=group_size,
            narrow_range=narrow_range,
        )
        self.register_buffer("scale", torch.ones(() if channels is None else (channels,)))

    def _quantize(self, x: Tensor) -> Tensor:
        constants = (1.0, *self.code_range())
        return learned_step_quantize(x, self.scale, constants=constants, channel_axis=self.channel_axis)


class MinMax(_Calibrated):
    """The largest magnitude of the first batch becomes the largest level; nothing is learned.

    The input's gradient passes inside the range and is zero where it clips.

    Args:
        bits: 1 to 8 for unsigned, 2 to 8 for signed data.
        signed, channels, channel_axis, batched, group_size, narrow_range: see :class:`UniformQuantizer`.

    Raises:
        UsageError: when ``bits`` is out of range, or 1 for signed data, whose positive side would be empty.

    Examples:
        >>> quantizer = MinMax(3, signed=True)
        >>> quantizer(torch.tensor([-1.0, 0.6, 3.0]))
        tensor([-1.,  1.,  3.])
    """

    def _initial_step(self, rows: Tensor) -> Tensor:
        return max_over_ranks(rows.abs().amax(1)) / self.code_range()[1]


class Mse(_Calibrated):
    """The step that minimises the mean squared error on the first batch; nothing is learned.

    The input's gradient passes inside the range and is zero where it clips.

    Args:
        bits: 1 to 8 for unsigned, 2 to 8 for signed data.
        signed, channels, channel_axis, batched, group_size, narrow_range: see :class:`UniformQuantizer`.

    Raises:
        UsageError: when ``bits`` is out of range, or 1 for signed data, whose positive side would be empty.

    Examples:
        >>> quantizer = Mse(8, batched=True)
        >>> x = torch.linspace(0, 1, 64).reshape(8, 8)
        >>> bool((quantizer(x) - x).abs().max() < 1 / 256), quantizer.signed
        (True, False)
    """

    def _initial_step(self, rows: Tensor) -> Tensor:
        return mse_step(rows, *self.code_range())


def mse_step(rows: Tensor, qmin: int, qmax: int) -> Tensor:
    """The step of a uniform grid with the least squared error, (channels,), the same on every rank.

    Args:
        rows: (channels, elements), finite.
        qmin, qmax: the integer range.
    """
    return least_squares(rows, qmax, lambda x, step: (x / step).clamp(qmin, qmax).round() * step)


def least_squares(rows: Tensor, steps: float, on_grid: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The step with the least squared error of the grid that it makes, (channels,), the same on every rank.

    The end of the grid is searched among 80 fractions, 1 down to 0.02, of the largest magnitude.

    Args:
        rows: (channels, elements), finite.
        steps: so many are between zero and the end of the grid.
        on_grid: the values nearest to some, for a 0-dim step.
    """
    rows = thinned(rows)
    peak = max_over_ranks(rows.abs().amax(1)).clamp_min(torch.finfo(torch.float32).tiny)
    relative = rows / peak.unsqueeze(1)
    tried = torch.logspace(0, -1.7, 80, dtype=rows.dtype, device=rows.device) / steps
    errors = torch.stack([(on_grid(relative, step) - relative).square().mean(1) for step in tried])
    return tried[mean_over_ranks(errors).argmin(0)] * peak


def thinned(rows: Tensor) -> Tensor:
    """Every k-th column of (channels, elements), so that about ``SEARCH_SAMPLE`` elements remain; the peak stays.

    Short rows, such as groups, are left whole: each would be fitted to a few of its values.
    """
    every = max(1, rows.numel() // SEARCH_SAMPLE)
    if every == 1 or rows.shape[1] <= _SHORT:
        return rows
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return torch.cat([rows[:, ::every], largest], dim=1)
