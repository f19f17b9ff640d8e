"""LSQ: a uniform grid whose step size is learned."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.quantization.kernels import learned_step_quantize, uniform_codes
from lqkd.quantization.quantizers.base import Quantizer, integer_range, mean_over_ranks


class LSQ(Quantizer):
    """Learned step size quantization (Esser et al., arXiv 1902.08153).

    ``x_hat = round(clamp(x / s, -Q_N, Q_P)) * s`` with ``Q_N = 2**(b-1), Q_P = 2**(b-1) - 1`` for signed and
    ``Q_N = 0, Q_P = 2**b - 1`` for unsigned data (eq. 1, 2). The step starts at ``2 * mean|x| / sqrt(Q_P)`` and its
    gradient is multiplied by ``1 / sqrt(N * Q_P)``, where N is the number of weights that share the step, or the
    number of features of one sample for activations (section 2.2). The parameter ``scale`` may cross zero under a
    large learning rate; the step is its absolute value, never below the smallest normal float.

    Args:
        bits: 1 to 8 for unsigned, 2 to 8 for signed data.
        signed, channels, channel_axis, batched: see :class:`Quantizer`.

    Raises:
        UsageError: when ``bits`` is out of range, or 1 for signed data, whose positive side would be empty.
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
        super().__init__(bits, signed=signed, channels=channels, channel_axis=channel_axis, batched=batched)
        self.scale = nn.Parameter(torch.ones(() if channels is None else (channels,)))

    @classmethod
    def check_bits(cls, bits: int, signed: bool | None) -> int:
        if super().check_bits(bits, signed) == 1 and signed:
            raise UsageError("bits=1 is not possible for signed LSQ, whose grid would be {-1, 0}: use 2 to 8 bits")
        return bits

    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code, ``(-Q_N, Q_P)``."""
        return integer_range(self.bits, self.signed)

    def step(self) -> Tensor:
        """The positive step size s in the shape of ``scale``, float32, differentiable."""
        return self.scale.abs().clamp_min(torch.finfo(torch.float32).tiny)

    def codes(self, x: Tensor) -> Tensor:
        return uniform_codes(x, self._broadcast(self.step(), x.ndim), *self.code_range()).to(torch.int32)

    def dequantize(self, codes: Tensor) -> Tensor:
        return codes * self._broadcast(self.step(), codes.ndim)

    def levels(self) -> Tensor:
        qmin, qmax = self.code_range()
        grid = torch.arange(qmin, qmax + 1, device=self.scale.device)
        return grid * self.step().unsqueeze(-1)

    def _quantize(self, x: Tensor) -> Tensor:
        samples = x.shape[0] if self.batched else 1
        elements = x.numel() / max(samples, 1) / (self.channels or 1)
        qmin, qmax = self.code_range()
        gradient_scale = 1.0 / math.sqrt(max(elements, 1.0) * qmax)
        return learned_step_quantize(
            x, self.step(), constants=(gradient_scale, qmin, qmax), channel_axis=self.channel_axis
        )

    def _fit(self, x: Tensor) -> bool:
        self.check_bits(self.bits, self.signed)
        magnitude = mean_over_ranks(self._per_channel(x.float()).abs().mean(dim=1))
        usable = magnitude.isfinite() & (magnitude > 0)
        if not usable.any():
            return False
        # A dead channel (all zero) has no scale of its own: 1 keeps its codes at zero and its gradient finite.
        step = torch.where(usable, 2.0 * magnitude / math.sqrt(self.code_range()[1]), 1.0)
        self.scale.copy_(step.reshape(self.scale.shape))
        return True

    def _refit(self, previous_bits: int) -> None:
        self.scale.mul_(integer_range(previous_bits, self.signed)[1] / self.code_range()[1])
