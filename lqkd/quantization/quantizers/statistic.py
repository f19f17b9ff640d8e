"""Weight quantizers whose scale is a statistic of the weight itself."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.quantization.quantizers.base import Quantizer, finite, max_over_ranks, mean_over_ranks

TINY = torch.finfo(torch.float32).tiny


class StatisticQuantizer(Quantizer):
    """A quantizer that measures its scale on the weight in every training forward, without a gradient.

    The buffer ``scale`` (() or (channels,)) holds the last measurement; eval mode, ``dequantize`` and ``levels`` use
    it and never write it. ``codes`` look at the tensor that they are given. So ``x_hat`` is no fixed point: what is
    measured on it differs from what was measured on the weight.
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
    ) -> None:
        super().__init__(bits, signed=signed, channels=channels, channel_axis=channel_axis, batched=batched)
        self.register_buffer("scale", torch.ones(() if channels is None else (channels,)))

    @abstractmethod
    def _measure(self, x: Tensor) -> Tensor:
        """The scale of a finite ``x``, broadcastable to it; zero for a dead channel."""

    @torch.no_grad()
    def _measured_scale(self, x: Tensor) -> Tensor:
        """The scale for this forward, in the shape of ``scale``; a copy, as the next forward writes the buffer."""
        # The compiler cannot ask for inference mode; what is compiled in training mode is a training's pass.
        if self.training and (torch.compiler.is_compiling() or not torch.is_inference_mode_enabled()):
            self.scale.copy_(self._measure(finite(x)).clamp_min(TINY).reshape(self.scale.shape))
        return self.scale.clone()

    def _fit(self, x: Tensor) -> bool:
        if not max_over_ranks(x.abs().max()) > 0:
            return False
        self.scale.copy_(mean_over_ranks(self._measure(x)).clamp_min(TINY).reshape(self.scale.shape))
        return True

    def _refit(self, previous_bits: int) -> None:
        """Nothing to do unless the scale depends on the number of bits."""

    def _mean_magnitude(self, x: Tensor) -> Tensor:
        return x.abs().mean(self._axes(x), keepdim=True)


def standardize(x: Tensor, axes: tuple[int, ...], *, through_statistics: bool = True) -> Tensor:
    """``(x - mean) / std`` over ``axes``, in the compute dtype, differentiable; a constant becomes zero.

    The standard deviation is the unbiased one, as in the papers' code. Values that are not finite stay alone.

    Args:
        x: any shape and floating dtype.
        axes: the axes over which mean and deviation are taken.
        through_statistics: whether mean and deviation have a gradient.
    """
    peak = finite(x.detach()).abs().amax(axes, keepdim=True)
    peak = torch.where(peak > 0, peak, 1.0)
    x = x.to(peak.dtype) / peak  # squares of the weights themselves may not be representable
    known = torch.where(x.isfinite(), x, 0.0)
    known = known if through_statistics else known.detach()
    mean = known.mean(axes, keepdim=True)
    count = x.numel() // max(peak.numel(), 1)
    variance = (known - mean).square().sum(axes, keepdim=True) / max(count - 1, 1)
    return (x - mean) / torch.where(variance > 1e-12, variance, 1.0).sqrt()


def require_weights(quantizer: str, batched: bool) -> None:
    """Refuse to quantize activations with a weight quantizer."""
    if batched:
        raise UsageError(f"quantizer {quantizer} is for weights: choose another activation quantizer, such as lsq")


def require_bits(quantizer: str, bits: int, only: int) -> int:
    """Refuse every number of bits but one."""
    if bits != only:
        raise UsageError(
            f"bits={bits!r} is not possible: quantizer {quantizer} has a grid for bits={only} only: give layers of "
            "other bits, such as the first and the last, weight_quantizer: lsq in a rule"
        )
    return bits
