"""LSQ+: a learned step size and, for activations, a learned offset."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.quantization.kernels import learned_offset_quantize, uniform_codes
from lqkd.quantization.quantizers.base import max_over_ranks, mean_over_ranks
from lqkd.quantization.quantizers.lsq import LSQ
from lqkd.quantization.quantizers.uniform import thinned


class LSQPlus(LSQ):
    """LSQ with a learned offset (Bhalgat et al., arXiv 2004.09576).

    Activations: ``x_hat = round(clamp((x - beta) / s, 0, Q_P)) * s + beta`` with ``Q_P = 2**b - 1`` (eq. 3),
    where beta is the nearest multiple ``z * s`` of the step to the parameter ``offset`` with ``-Q_P <= z <= 0``, so
    that zero (padding, ReLU) is a level and codes are those of ONNX ``QuantizeLinear`` with zero point ``-z``. The
    gradients are the paper's, the rounding of the offset passed straight through: for s as in LSQ with ``x - beta``;
    for the offset 0 inside the range and 1 where it clips. Both are multiplied by LSQ's ``1 / sqrt(N * Q_P)``, that of
    the step by no more than ``1 / Q_P**2`` (see :class:`LSQ`; ``bound_gradient: false`` is the paper's). Step
    and offset start where the squared error on the first batch is least.

    Weights (``signed=True``): symmetric two's complement without an offset; the step starts at
    ``max(|mu - 3 sigma|, |mu + 3 sigma|) / 2**(b-1)``.

    Args:
        bits: 1 to 8 with an offset, 2 to 8 without.
        signed: true for a symmetric signed grid without an offset; otherwise codes count from zero and the offset
            takes care of negative values.
        channels, channel_axis, batched, group_size: see :class:`Quantizer`; groups only of a symmetric signed grid.
        bound_gradient: see :class:`LSQ`.

    Raises:
        UsageError: when ``bits`` is out of range, or 1 for a symmetric signed grid, or there are groups of another.

    Examples:
        >>> quantizer = LSQPlus(4, batched=True)
        >>> x = torch.linspace(-0.2, 1.0, 64).reshape(4, 16)  # such as a GELU's
        >>> _ = quantizer(x)
        >>> quantizer.code_range(), bool((quantizer.levels() == 0).any()), bool(quantizer.levels().min() < 0)
        ((0, 15), True, True)
    """

    offset: Tensor | None

    def __init__(
        self,
        bits: int,
        *,
        signed: bool | None = None,
        channels: int | None = None,
        channel_axis: int = 0,
        batched: bool = False,
        group_size: int | None = None,
        bound_gradient: bool = True,
    ) -> None:
        super().__init__(
            bits,
            signed=bool(signed),
            channels=channels,
            channel_axis=channel_axis,
            batched=batched,
            group_size=group_size,
            bound_gradient=bound_gradient,
        )
        if group_size is not None and not signed:
            raise UsageError(f"group_size={group_size} of quantizer LSQPlus is for a signed grid without an offset")
        self.offset = None if signed else nn.Parameter(torch.zeros_like(self.scale))

    def zero_level(self) -> Tensor:
        """``z = beta / s``: the integer, at most 0, at which the grid starts, in the shape of ``scale``."""
        if self.offset is None:
            return torch.full_like(self.scale, self.code_range()[0])
        return (self.offset / self.step()).detach().round().clamp(-self.code_range()[1], 0)

    def codes(self, x: Tensor) -> Tensor:
        if self.offset is None:
            return super().codes(x)
        zero = self._broadcast(self.zero_level(), x.ndim)
        position = uniform_codes(x, self._broadcast(self.step(), x.ndim), zero, zero + self.code_range()[1])
        return (position - zero).to(torch.int32)

    def dequantize(self, codes: Tensor) -> Tensor:
        if self.offset is None:
            return super().dequantize(codes)
        return (codes + self._broadcast(self.zero_level(), codes.ndim)) * self._broadcast(self.step(), codes.ndim)

    def levels(self) -> Tensor:
        steps = torch.arange(2**self.bits, device=self.scale.device)
        return (steps + self.zero_level().unsqueeze(-1)) * self.step().unsqueeze(-1)

    def _quantize(self, x: Tensor) -> Tensor:
        if self.offset is None:
            return super()._quantize(x)
        return learned_offset_quantize(
            x,
            self.step(),
            self.offset,
            self.zero_level(),
            constants=(self._gradient_scale(x), self._paper_gradient_scale(x), self.code_range()[1]),
            channel_axis=self.channel_axis,
        )

    def _fit(self, x: Tensor) -> bool:
        if self.offset is None:
            return super()._fit(x)
        low, high = _mse_range(self._per_channel(x), self.code_range()[1])
        usable = high > low
        if not usable.any():
            return False
        self.scale.copy_(torch.where(usable, (high - low) / self.code_range()[1], 1.0).reshape(self.scale.shape))
        self.offset.copy_(low.reshape(self.scale.shape))
        return True

    def _fit_mse(self, x: Tensor) -> bool:
        return super()._fit_mse(x) if self.offset is None else self._fit(x)

    def _initial_step(self, rows: Tensor) -> Tensor:
        peak = rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        relative = rows / peak
        mean, deviation = relative.mean(1), relative.std(1, correction=0)
        return mean_over_ranks((mean.abs() + 3 * deviation) * peak.squeeze(1)) / 2 ** (self.bits - 1)


def _mse_range(rows: Tensor, qmax: int) -> tuple[Tensor, Tensor]:
    """Ends ``low <= 0 <= high`` of the range with the least squared error, each (channels,).

    The upper end is searched first among 40 fractions of the maximum, then the lower end likewise.

    Args:
        rows: (channels, elements), finite.
        qmax: largest code.
    """
    rows = thinned(rows)
    peak = max_over_ranks(rows.abs().amax(1)).clamp_min(torch.finfo(torch.float32).tiny)
    relative = rows / peak.unsqueeze(1)
    low, high = -max_over_ranks(-relative.amin(1)).clamp_min(0), max_over_ranks(relative.amax(1)).clamp_min(0)
    fractions = torch.logspace(0, -1.7, 40, dtype=rows.dtype, device=rows.device)

    def error(low: Tensor, high: Tensor) -> Tensor:
        step = ((high - low) / qmax).clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)
        zero = (low.unsqueeze(1) / step).round()
        position = torch.minimum(torch.maximum(relative / step, zero), zero + qmax).round()
        return (position * step - relative).square().mean(1)

    high = high * fractions[mean_over_ranks(torch.stack([error(low, high * f) for f in fractions])).argmin(0)]
    low = low * fractions[mean_over_ranks(torch.stack([error(low * f, high) for f in fractions])).argmin(0)]
    return low * peak, high * peak
