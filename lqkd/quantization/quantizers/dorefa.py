"""DoReFa: fixed grids for bounded weights and activations."""

from __future__ import annotations

import torch
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.quantization.kernel import compute_dtype
from lqkd.quantization.kernels import (
    binary_quantize,
    centred_codes,
    centred_quantize,
    learned_step_quantize,
    uniform_codes,
)
from lqkd.quantization.quantizers.base import finite
from lqkd.quantization.quantizers.statistic import TINY, StatisticQuantizer


class DoReFa(StatisticQuantizer):
    """DoReFa-Net (Zhou et al., arXiv 1606.06160).

    Activations (``batched=True``), never negative: ``x_hat = quant_k(clip(x, 0, 1))`` with
    ``quant_k(r) = round((2**k - 1) r) / (2**k - 1)``; the gradient is 1 within (0, 1) and 0 elsewhere.

    Weights: ``x_hat = 2 quant_k(tanh(w) / (2 max|tanh(w)|) + 1/2) - 1``, on ``[-1, 1]`` and without a zero, the
    maximum without a gradient; for one bit ``mean|w| * sign(w)`` with the gradient passed straight through.
    The grid is the same for every tensor and the result is not on the weight's own scale, so the layer needs a
    normalisation behind it.

    Args:
        bits: 1 to 8.
        signed: true or ``None`` for weights, false or ``None`` for activations.
        channels, channel_axis, batched: see :class:`Quantizer`.

    Raises:
        UsageError: when ``bits`` is out of range, for activations with negative values and for unsigned weights.

    Examples:
        >>> quantizer = DoReFa(2, batched=True)
        >>> quantizer(torch.tensor([[0.0, 0.3, 1.5]]))
        tensor([[0.0000, 0.3333, 1.0000]])
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
            raise UsageError("quantizer dorefa has a signed grid for weights: signed=False is not possible")
        _refuse_signed_activations(batched, signed)
        super().__init__(
            bits, signed=None if batched else True, channels=channels, channel_axis=channel_axis, batched=batched
        )

    def code_range(self) -> tuple[int, int]:
        return 0, 2**self.bits - 1

    def _activation_step(self) -> Tensor:
        return torch.ones_like(self.scale) / self.code_range()[1]

    def _bounded(self, x: Tensor) -> Tensor:
        """``tanh(w) / max|tanh(w)|``."""
        bounded = x.to(compute_dtype(x)).tanh()
        peak = finite(bounded.detach()).abs().amax(self._axes(x), keepdim=True)
        return bounded / peak.clamp_min(TINY)

    def codes(self, x: Tensor) -> Tensor:
        if self.batched:
            return uniform_codes(x, self._broadcast(self._activation_step(), x.ndim), *self.code_range()).int()
        if self.bits == 1:
            return (x >= 0).to(torch.int32)
        return centred_codes(self._bounded(x.detach()), self.code_range()[1]).to(torch.int32)

    def dequantize(self, codes: Tensor) -> Tensor:
        if self.batched:
            return codes * self._broadcast(self._activation_step(), codes.ndim)
        top = self.code_range()[1]
        values = (2 * codes - top).to(self.scale.dtype) / top
        return values * self._broadcast(self.scale, codes.ndim) if self.bits == 1 else values

    def levels(self) -> Tensor:
        codes = torch.arange(2**self.bits, device=self.scale.device)
        if self.batched:
            return codes * self._activation_step().unsqueeze(-1)
        top = self.code_range()[1]
        scale = self.scale if self.bits == 1 else torch.ones_like(self.scale)
        return (2 * codes - top).to(scale.dtype) / top * scale.unsqueeze(-1)

    def _quantize(self, x: Tensor) -> Tensor:
        if self.batched:
            constants = (1.0, *self.code_range())
            return learned_step_quantize(
                x, self._activation_step(), constants=constants, channel_axis=self.channel_axis
            )
        scale = self._measured_scale(x)  # measured for every number of bits, so that set_bits(1) finds it
        if self.bits == 1:
            return binary_quantize(x, scale, channel_axis=self.channel_axis)
        one = torch.ones_like(self.scale)
        return centred_quantize(
            self._bounded(x), one, constants=self.code_range()[1:], channel_axis=self.channel_axis
        ).to(x.dtype)

    def _measure(self, x: Tensor) -> Tensor:
        return self._mean_magnitude(x)

    def _fit(self, x: Tensor) -> bool:
        _refuse_signed_activations(self.batched, self.signed)
        return super()._fit(x)


def _refuse_signed_activations(batched: bool, signed: bool | None) -> None:
    if batched and signed:
        raise UsageError(
            "quantizer dorefa is for activations that are never negative, such as those after a ReLU, "
            "but this tensor is signed: use lsq or lsq_plus for it"
        )
