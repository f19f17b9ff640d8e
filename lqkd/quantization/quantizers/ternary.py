"""Ternary weights: TWN, the absmean of BitNet b1.58, and TTQ."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lqkd.quantization.kernels import ternary_quantize, trained_ternary_quantize
from lqkd.quantization.quantizers.base import Quantizer, finite, max_over_ranks, mean_over_ranks
from lqkd.quantization.quantizers.statistic import TINY, StatisticQuantizer, require_bits, require_weights


def _ternary_codes(x: Tensor, threshold: Tensor) -> Tensor:
    x = x.to(threshold.dtype)
    return (x > threshold).to(torch.int32) - (x < -threshold).to(torch.int32)


class _MeasuredTernary(StatisticQuantizer):
    """``x_hat = alpha * {-1, 0, 1}``, threshold and alpha measured on the weight, with a straight-through gradient."""

    name: str
    share: float
    """The threshold as a share of the mean magnitude."""

    def __init__(
        self,
        bits: int,
        *,
        signed: bool | None = None,
        channels: int | None = None,
        channel_axis: int = 0,
        batched: bool = False,
        group_size: int | None = None,
    ) -> None:
        require_weights(self.name, batched)
        super().__init__(bits, signed=signed, channels=channels, channel_axis=channel_axis)
        self.group_size = group_size

    @classmethod
    def check_bits(cls, bits: int, signed: bool | None) -> int:
        return require_bits(cls.name, super().check_bits(bits, signed), 2)

    def code_range(self) -> tuple[int, int]:
        return -1, 1

    def _threshold(self, x: Tensor) -> Tensor:
        return self.share * self._mean_magnitude(finite(x.detach()))

    def codes(self, x: Tensor) -> Tensor:
        rows = self._grouped(x)
        return _ternary_codes(rows, self._threshold(rows)).view(x.shape)

    def dequantize(self, codes: Tensor) -> Tensor:
        rows = self._grouped(codes)
        return (rows * self._broadcast(self.scale, rows.ndim)).view(codes.shape)

    def levels(self) -> Tensor:
        return torch.stack([-self.scale, torch.zeros_like(self.scale), self.scale], dim=-1)

    def _quantize(self, x: Tensor) -> Tensor:
        threshold = self._threshold(x).reshape(self.scale.shape)
        return ternary_quantize(x, threshold, self._measured_scale(x), channel_axis=self.channel_axis)


class TWN(_MeasuredTernary):
    """Ternary weight networks (Li et al., arXiv 1605.04711).

    ``x_hat = alpha * {-1, 0, 1}`` with the threshold ``Delta = 0.7 * mean|w|``, the paper's approximation of the best
    one, and ``alpha = mean(|w| : |w| > Delta)``, both measured on the weight; the gradient passes straight through.
    Three of the four values of two bits are used.

    Args:
        bits: 2.
        signed, channels, channel_axis, group_size: see :class:`Quantizer`.
        batched: must be false.

    Raises:
        UsageError: when ``bits`` is not 2, or for activations.

    Examples:
        >>> quantizer = TWN(2)
        >>> quantizer(torch.tensor([0.9, -1.1, 0.1, 0.0]))
        tensor([ 1., -1.,  0.,  0.])
    """

    name, share = "twn", 0.7

    def _measure(self, x: Tensor) -> Tensor:
        large, axes = x.abs() > self._threshold(x), self._axes(x)
        return (x.abs() * large).sum(axes, keepdim=True) / large.sum(axes, keepdim=True).clamp_min(1)


class AbsMean(_MeasuredTernary):
    """The ternary weights of BitNet b1.58 (Ma et al., arXiv 2402.17764, eq. 1 to 3).

    ``x_hat = gamma * round(clip(w / gamma, -1, 1))`` with ``gamma = mean|w|``, measured on the weight in every step: so
    the threshold is ``gamma / 2``. The gradient passes straight through. The paper has one gamma for a whole weight
    (``per_channel: false``).

    Args:
        bits: 2, of whose four values three are used.
        signed, channels, channel_axis, group_size: see :class:`Quantizer`.
        batched: must be false.

    Raises:
        UsageError: when ``bits`` is not 2, or for activations.

    Examples:
        >>> quantizer = AbsMean(2)
        >>> quantizer(torch.tensor([0.9, -2.6, 0.5, 0.0]))
        tensor([ 1., -1.,  0.,  0.])
    """

    name, share = "absmean", 0.5

    def _measure(self, x: Tensor) -> Tensor:
        return self._mean_magnitude(x)


class TTQ(Quantizer):
    """Trained ternary quantization (Zhu et al., arXiv 1612.01064).

    ``x_hat`` is ``W_p`` above ``Delta``, ``-W_n`` below ``-Delta`` and 0 between, ``Delta = 0.05 * max|w|`` measured
    on the weight. ``W_p`` and ``W_n`` are learned: their gradients are the sums of the upstream gradient over the
    positive weights, and of its negative over the negative ones, whose value is ``-W_n``. The gradient of the weight
    is multiplied by ``W_p``, 1 or ``W_n``. Both are as the authors' code (github.com/czhu95/ternarynet) computes them,
    which starts ``W_p`` and ``W_n`` at 1; here they start at the mean magnitudes of the two groups; both are
    absolute values of their parameters.

    Args:
        bits: 2, of whose four values three are used.
        signed, channels, channel_axis: see :class:`Quantizer`.
        batched: must be false.

    Raises:
        UsageError: when ``bits`` is not 2, or for activations.

    Examples:
        >>> quantizer = TTQ(2)
        >>> quantizer(torch.tensor([0.5, 1.0, -0.2, 0.0])).detach()
        tensor([ 0.7500,  0.7500, -0.2000,  0.0000])
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
        require_weights("ttq", batched)
        super().__init__(bits, signed=signed, channels=channels, channel_axis=channel_axis)
        self.positive = nn.Parameter(torch.ones(() if channels is None else (channels,)))
        self.negative = nn.Parameter(torch.ones_like(self.positive))

    @classmethod
    def check_bits(cls, bits: int, signed: bool | None) -> int:
        return require_bits("ttq", super().check_bits(bits, signed), 2)

    def code_range(self) -> tuple[int, int]:
        return -1, 1

    def values(self) -> tuple[Tensor, Tensor]:
        """``W_p`` and ``W_n``, positive, in the shape of their parameters, differentiable."""
        return self.positive.abs().clamp_min(TINY), self.negative.abs().clamp_min(TINY)

    def _threshold(self, x: Tensor) -> Tensor:
        return 0.05 * finite(x.detach()).abs().amax(self._axes(x), keepdim=True)

    def codes(self, x: Tensor) -> Tensor:
        return _ternary_codes(x, self._threshold(x))

    def dequantize(self, codes: Tensor) -> Tensor:
        positive, negative = (self._broadcast(value, codes.ndim) for value in self.values())
        return codes * torch.where(codes > 0, positive, negative)

    def levels(self) -> Tensor:
        positive, negative = self.values()
        return torch.stack([-negative, torch.zeros_like(positive), positive], dim=-1)

    def _quantize(self, x: Tensor) -> Tensor:
        threshold = self._threshold(x).reshape(self.positive.shape)
        return trained_ternary_quantize(x, threshold, *self.values(), channel_axis=self.channel_axis)

    def _fit(self, x: Tensor) -> bool:
        threshold, axes = self._threshold(x), self._axes(x)
        if not (max_over_ranks(threshold) > 0).any():
            return False
        for parameter, group in ((self.positive, x > threshold), (self.negative, x < -threshold)):
            mean = (x.abs() * group).sum(axes) / group.sum(axes)
            # A group without members takes the mean magnitude of all; 1 in a dead channel, which never shows it.
            mean = torch.where(group.any(axes) if axes else group, mean, x.abs().mean(axes))
            parameter.copy_(mean_over_ranks(torch.where(mean > 0, mean, 1.0)))
        return True

    def _refit(self, previous_bits: int) -> None:
        """Nothing to do: there is one number of bits."""
