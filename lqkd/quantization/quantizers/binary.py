"""Binary weights and activations: IR-Net and ReActNet."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lqkd.quantization.kernel import compute_dtype
from lqkd.quantization.kernels import (
    binary_clip_quantize,
    binary_tanh_quantize,
    shifted_sign_quantize,
)
from lqkd.quantization.quantizers.base import max_over_ranks, mean_over_ranks
from lqkd.quantization.quantizers.statistic import StatisticQuantizer, require_bits, require_weights, standardize


class BinaryQuantizer(StatisticQuantizer):
    """Two values, ``-scale`` for code 0 and ``+scale`` for code 1; zero belongs to the positive one."""

    @classmethod
    def check_bits(cls, bits: int, signed: bool | None) -> int:
        return require_bits(cls.__name__, super().check_bits(bits, signed), 1)

    def code_range(self) -> tuple[int, int]:
        return 0, 1

    def codes(self, x: Tensor) -> Tensor:
        return (self._signed_value(x.detach()) >= 0).to(torch.int32)

    def _signed_value(self, x: Tensor) -> Tensor:
        """The tensor whose sign is the code."""
        return x

    def dequantize(self, codes: Tensor) -> Tensor:
        return (2 * codes - 1) * self._broadcast(self.scale, codes.ndim)

    def levels(self) -> Tensor:
        return torch.stack([-self.scale, self.scale], dim=-1)


class IRNet(BinaryQuantizer):
    """Binary weights of IR-Net (Qin et al., arXiv 1909.10788).

    ``x_hat = 2**round(log2(mean|w_hat|)) * sign(w_hat)`` on the standardized weight ``w_hat = (w - mean) / std`` of
    each channel (Libra parameter binarization); the shift receives no gradient. The error decay estimator replaces the
    derivative of the sign by ``k t (1 - tanh(t w_hat)**2)`` with ``t = 0.1 * 100**progress`` and ``k = max(1 / t, 1)``,
    which begins as the identity and ends near the sign (the authors' trainer for CIFAR-10 begins with 0.001 instead of
    0.1). The result is on the scale of the standardized weight, so the layer needs a normalisation behind it.

    ``progress`` goes from 0 at the first step to 1 at the end of training (the paper counts epochs).

    Args:
        bits: 1.
        signed, channels, channel_axis: see :class:`Quantizer`.
        batched: must be false.

    Raises:
        UsageError: when ``bits`` is not 1, or for activations.

    Examples:
        >>> quantizer = IRNet(1, channels=2)
        >>> quantizer(torch.tensor([[0.1, 0.3, 0.2, 0.4], [-5.0, 5.0, -5.0, 5.0]])).sign()
        tensor([[-1.,  1., -1.,  1.],
                [-1.,  1., -1.,  1.]])
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
        require_weights("irnet", batched)
        super().__init__(bits, signed=signed, channels=channels, channel_axis=channel_axis)
        self.progress = 0.0

    def _signed_value(self, x: Tensor) -> Tensor:
        return standardize(x, self._axes(x))

    def _measure(self, x: Tensor) -> Tensor:
        # A dead channel is zero after standardization, and 2**log2(0) is zero.
        return torch.exp2(self._mean_magnitude(self._signed_value(x)).log2().round())

    def _quantize(self, x: Tensor) -> Tensor:
        assert self.progress is not None
        t = 0.1 * 100.0**self.progress
        standardized = self._signed_value(x)
        scale = self._measured_scale(x)
        constants = (t, max(1.0 / t, 1.0))
        axis = self.channel_axis
        return binary_tanh_quantize(standardized, scale, constants=constants, channel_axis=axis).to(x.dtype)


class ReAct(BinaryQuantizer):
    """Binary weights and activations of ReActNet (Liu et al., arXiv 2003.03488).

    Activations (``batched=True``): ``x_hat = sign(x + shift)`` with a learned shift per tensor or channel (RSign) and
    the derivative of Bi-Real net's polynomial, ``2 - 2 |x + shift|`` within 1 and 0 beyond. The shift starts at zero
    for signed data, as in the paper, and at minus the mean for data that are never negative, whose signs would all
    be equal. Values are -1 and 1.

    Weights: ``x_hat = mean|w| * sign(w)``, the scale without a gradient; the weight's gradient is that of
    ``clip(w, -1, 1)``.

    Args:
        bits: 1.
        signed, channels, channel_axis, batched: see :class:`Quantizer`.

    Raises:
        UsageError: when ``bits`` is not 1.

    Examples:
        >>> quantizer = ReAct(1)
        >>> quantizer(torch.tensor([0.5, -1.5, 1.0]))
        tensor([ 1., -1.,  1.])
    """

    shift: Tensor | None

    def __init__(
        self,
        bits: int,
        *,
        signed: bool | None = None,
        channels: int | None = None,
        channel_axis: int = 0,
        batched: bool = False,
    ) -> None:
        super().__init__(bits, signed=signed, channels=channels, channel_axis=channel_axis, batched=batched)
        self.shift = nn.Parameter(torch.zeros_like(self.scale)) if batched else None

    def _signed_value(self, x: Tensor) -> Tensor:
        if self.shift is None:
            return x
        return x.to(compute_dtype(x)) + self._broadcast(self.shift, x.ndim)

    def _measure(self, x: Tensor) -> Tensor:
        return self._mean_magnitude(x)

    def _fit(self, x: Tensor) -> bool:
        if self.shift is None:
            return super()._fit(x)
        if not max_over_ranks(x.abs().max()) > 0:
            return False
        if not self.signed:
            self.shift.copy_(-mean_over_ranks(x.mean(self._axes(x))))
        return True

    def _quantize(self, x: Tensor) -> Tensor:
        if self.shift is not None:
            return shifted_sign_quantize(x, self.shift, channel_axis=self.channel_axis)
        return binary_clip_quantize(x, self._measured_scale(x), channel_axis=self.channel_axis)
