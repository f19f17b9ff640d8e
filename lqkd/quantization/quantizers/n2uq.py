"""N2UQ: learned thresholds and evenly spaced values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.quantization.kernel import compute_dtype
from lqkd.quantization.kernels import StraightThrough, centred_codes, centred_quantize
from lqkd.quantization.quantizers.base import max_over_ranks
from lqkd.quantization.quantizers.statistic import TINY, StatisticQuantizer
from lqkd.quantization.quantizers.uniform import mse_step

RANGE = 2.0
"""Width of the paper's internal range: the sum of all values' distances."""
MOST_STEPS = 255
SHORTEST = 1e-3


class N2UQ(StatisticQuantizer):
    """Nonuniform-to-uniform quantization (Liu et al., arXiv 2111.14826).

    Activations (``batched=True``): with ``n = 2**b - 1`` steps of height ``D = 2 / n``, learned ``start``, segment
    ``lengths`` a_i, input and output scales, ``u = scale_in * x / r`` and
    ``x_hat = scale_out * r * D * #{i : u > T_i}``, ``T_1 = start + a_1 / 2``,
    ``T_(i+1) = T_i + (a_i + a_(i+1)) / 2``.
    The backward pass is that of the generalized straight-through estimator: of the piecewise linear map that
    sends segment i, of length a_i, to ``[(i-1) D, i D]``. Lengths are at least 0.001. Values below the start become 0.
    As in the paper the lengths start at D, the start at 0 and the scales at 1; the constant r (``scale``), 1 in the
    paper, makes the initial range ``[0, 2 r]`` the one with the least squared error on the first batch.

    The paper has no negative activations. Here data that have some, such as a network's own input or what is behind a
    GELU, get the levels of two's complement, ``scale_out * r * D * (k - 2**(b-1))`` with ``D = 1 / (2**(b-1) - 1)``:
    the start begins at ``-2**(b-1) D``, zero is a level, and all else is as above.

    Weights: ``x_hat = s * (2 q / n - 1)``, ``q = round((clip(w / s, -1, 1) + 1) n / 2)`` with
    ``s = (2**b - 1) / 2**(b-1) * mean|w|``, without a zero; s has no gradient, and the gradient is that of ``w / s``
    everywhere, as in the paper's code.

    Args:
        bits: 1 to 8; 2 to 8 for activations with negative values.
        signed: true or ``None`` for weights.
        channels: for weights only.
        channel_axis, batched: see :class:`Quantizer`.

    Raises:
        UsageError: when ``bits`` is out of range, or 1 for signed activations, whose positive side would be empty; for
            unsigned weights and for activations with a grid per channel.

    Examples:
        >>> quantizer = N2UQ(2, batched=True)
        >>> quantizer(torch.rand(8, 16)).unique().numel() <= 4
        True
    """

    def __init__(
        self,
        bits: int,
        *,
        signed: bool | None = None,
        channels: int | None = None,
        channel_axis: int = 0,
        batched: bool = False,
    ) -> None:
        if not batched and signed is False:
            raise UsageError("quantizer n2uq has a signed grid for weights: signed=False is not possible")
        if batched and channels is not None:
            raise UsageError("quantizer n2uq has one grid per tensor for activations: leave channels at None")
        signed = signed if batched else True
        super().__init__(bits, signed=signed, channels=channels, channel_axis=channel_axis, batched=batched)
        if batched:
            self._check_sides(bits)
            self.start = nn.Parameter(torch.tensor(0.0))
            # As many as the largest number of bits needs, so that set_bits keeps the parameter and its shape.
            self.lengths = nn.Parameter(torch.full((MOST_STEPS,), RANGE / self.code_range()[1]))
            self.scale_in = nn.Parameter(torch.tensor(1.0))
            self.scale_out = nn.Parameter(torch.tensor(1.0))

    def code_range(self) -> tuple[int, int]:
        return 0, 2**self.bits - 1

    def set_bits(self, bits: int) -> None:
        self._check_sides(self.check_bits(bits, self.signed))
        super().set_bits(bits)

    def _check_sides(self, bits: int) -> None:
        if self.batched and self.signed and bits == 1:
            raise UsageError(
                "bits=1 is not possible for signed N2UQ activations, whose values would be {-1, 0}: use 2 to 8 bits"
            )

    def _zero(self, bits: int) -> int:
        """The code of zero of activations."""
        return 2 ** (bits - 1) if self.signed else 0

    def _height(self, bits: int) -> float:
        """D of activations."""
        return self._largest() / (2**bits - 1 - self._zero(bits))

    def _largest(self) -> float:
        """The largest value of activations in units of r."""
        return RANGE / 2 if self.signed else RANGE

    def thresholds(self) -> Tensor:
        """Where the code of ``scale_in * x / r`` steps up, ascending: (2**b - 1,)."""
        lengths = self._lengths()
        return self.start + lengths.cumsum(0) - lengths / 2

    def _lengths(self) -> Tensor:
        return self.lengths[: self.code_range()[1]].clamp_min(SHORTEST)

    def _scaled(self, x: Tensor) -> Tensor:
        return x.to(compute_dtype(x)) / self.scale * self.scale_in.abs().clamp_min(TINY)

    def _step(self) -> Tensor:
        """The distance of two values of activations."""
        return self.scale_out.abs().clamp_min(TINY) * self.scale * self._height(self.bits)

    def codes(self, x: Tensor) -> Tensor:
        x = x.detach()
        if self.batched:
            u = self._scaled(x)
            return torch.bucketize(u, self.thresholds().to(u.dtype)).to(torch.int32)
        x = x.to(compute_dtype(x))
        return centred_codes(x / self._broadcast(self.scale, x.ndim), self.code_range()[1]).to(torch.int32)

    def dequantize(self, codes: Tensor) -> Tensor:
        if self.batched:
            return (codes - self._zero(self.bits)) * self._step()
        return self._relative(codes) * self._broadcast(self.scale, codes.ndim)

    def levels(self) -> Tensor:
        codes = torch.arange(2**self.bits, device=self.scale.device)
        return self.dequantize(codes) if self.batched else self._relative(codes) * self.scale.unsqueeze(-1)

    def _relative(self, codes: Tensor) -> Tensor:
        """The values of codes of weights on ``[-1, 1]``."""
        top = self.code_range()[1]
        return (2 * codes - top).to(self.scale.dtype) / top

    def _quantize(self, x: Tensor) -> Tensor:
        if not self.batched:
            scale = self._measured_scale(x)
            relative, top = x.to(compute_dtype(x)) / self._broadcast(scale, x.ndim), self.code_range()[1:]
            return centred_quantize(relative, scale, constants=top, channel_axis=self.channel_axis).to(x.dtype)
        u, lengths, step = self._scaled(x), self._lengths(), self._step()
        codes = torch.bucketize(u.detach(), self.thresholds().detach().to(u.dtype))
        edges = torch.cat([self.start.view(1), self.start + lengths.cumsum(0)])
        segment = (torch.bucketize(u.detach(), edges.detach().to(u.dtype)) - 1).clamp(0, self.code_range()[1] - 1)
        inside = (u > edges[0]) & (u <= edges[-1])
        ramp = segment + (u - edges[segment]) / lengths[segment]
        ramp = torch.where(inside, ramp, 0.0)  # constant outside, where only the output scale has a gradient
        value = StraightThrough.apply(ramp, torch.where(u.isnan(), u, (codes - self._zero(self.bits)).to(u.dtype)))
        return (value * step).to(x.dtype)

    def _measure(self, x: Tensor) -> Tensor:
        return self._mean_magnitude(x) * _weight_factor(self.bits)

    def _fit(self, x: Tensor) -> bool:
        if not self.batched:
            return super()._fit(x)
        self._check_sides(self.bits)
        if not max_over_ranks((x.abs() if self.signed else x).max()) > 0:
            return False
        zero, height = self._zero(self.bits), self._height(self.bits)
        highest = self.code_range()[1] - zero
        rows = self._per_channel(x if self.signed else x.clamp_min(0.0))
        step = mse_step(rows, -zero, highest).squeeze(0)
        if self.signed:
            self.start.fill_(-zero * height)
        self.lengths.fill_(height)
        self.scale.copy_(step * highest / self._largest())
        return True

    def _refit(self, previous_bits: int) -> None:
        if not self.batched:
            self.scale.mul_(_weight_factor(self.bits) / _weight_factor(previous_bits))
            return
        before, now = 2**previous_bits - 1, self.code_range()[1]
        edges = torch.cat([self.lengths.new_zeros(1), self.lengths[:before].clamp_min(SHORTEST).cumsum(0)])
        # Where the new values are among the old ones: the largest stays, and so does zero. The lowest of a signed grid
        # moves by a part of a step, beyond the old ones where bits become fewer.
        ratio = self._height(self.bits) / self._height(previous_bits)
        lowest = self._zero(previous_bits) - self._zero(self.bits) * ratio
        position = torch.linspace(lowest, before, now + 1, device=edges.device)
        left = position.floor().long().clamp(0, before - 1)
        moved = edges[left] + (position - left) * (edges[left + 1] - edges[left])
        self.start.add_(moved[0])
        self.lengths[:now] = moved.diff()


def _weight_factor(bits: int) -> float:
    return (2**bits - 1) / 2 ** (bits - 1)
