"""APoT: levels that are sums of powers of two."""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.quantization.kernel import compute_dtype
from lqkd.quantization.kernels import nearest_level_quantize
from lqkd.quantization.quantizers.base import Quantizer, max_over_ranks, mean_over_ranks
from lqkd.quantization.quantizers.statistic import TINY, standardize
from lqkd.quantization.quantizers.uniform import thinned

WEIGHT_CLIP = 3.0
"""Initial clipping level of standardized weights, as in the authors' code."""


@functools.cache
def magnitudes(bits: int) -> tuple[float, ...]:
    """The ``2**bits`` additive powers-of-two magnitudes, ascending from 0 to 1.

    Sums of one element of each of ``bits // 2`` sets ``{0, 2**-i, 2**-(n+i), ...}`` of four, and, for an odd
    number of bits, of a set of two; divided by the largest sum. Up to 6 bits these are the levels of the authors' code
    (github.com/yhhhli/APoT_Quantization, ``build_power_value``); 7 and 8 bits continue the rule.
    """
    n, odd = divmod(bits, 2)
    sets = [[0.0, 2.0**-i, 2.0 ** -(n + i), 2.0 ** -(2 * n + odd + i)] for i in range(1, n + 1)]
    if odd:
        sets.append([0.0, 2.0 ** -(2 * n + 1)])
    sums = sorted(sum(choice) for choice in itertools.product(*sets))
    return tuple(value / sums[-1] for value in sums)


@functools.cache
def _tables(bits: int, signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Levels in ascending order, the largest 1, and the midpoints between them, float64."""
    with torch.inference_mode(False):
        half = magnitudes(bits - 1) if signed else magnitudes(bits)
        values = [-value for value in reversed(half[1:])] + list(half) if signed else list(half)
        levels = torch.tensor(values, dtype=torch.float64, device=device)
        return levels, (levels[1:] + levels[:-1]) / 2


class APoT(Quantizer):
    """Additive powers-of-two quantization (Li et al., arXiv 1909.13144).

    ``x_hat = alpha * nearest(clamp(x / alpha, -1, 1))`` on the levels of :func:`magnitudes`, with a sign for signed
    data: ``2**b - 1`` levels signed, ``2**b`` unsigned. Halfway between two levels the lower one is taken. The
    input's gradient is 1 inside and 0 where it clips; that of alpha is ``x_hat / alpha - x / alpha`` inside and the
    sign outside (the paper's reparameterized clipping function).

    Weights are standardized first, ``(w - mean) / std`` over what shares a grid, mean and deviation without a gradient
    as in the authors' code for CIFAR-10; that for ImageNet differentiates them. It also cuts the weight's gradient
    outside of the clipping level, as here, where that for CIFAR-10 passes it. Alpha starts at 3. The result is on the
    scale of the standardized weight, so the layer needs a normalisation behind it. For activations (``batched=True``)
    alpha starts where the squared error on the first batch is least (the paper: at a constant).

    Args:
        bits: 1 to 8 for unsigned, 2 to 8 for signed data.
        signed, channels, channel_axis, batched: see :class:`Quantizer`.

    Raises:
        UsageError: when ``bits`` is out of range, or 1 for signed data.

    Examples:
        >>> [round(value, 3) for value in magnitudes(3)]
        [0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0]
        >>> quantizer = APoT(4, signed=True)
        >>> quantizer(torch.randn(8, 16)).shape, quantizer.levels().shape
        (torch.Size([8, 16]), torch.Size([15]))
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
            raise UsageError("quantizer apot has a signed grid for weights: signed=False is not possible")
        signed = signed if batched else True
        super().__init__(bits, signed=signed, channels=channels, channel_axis=channel_axis, batched=batched)
        self.alpha = nn.Parameter(torch.ones(() if channels is None else (channels,)))

    @classmethod
    def check_bits(cls, bits: int, signed: bool | None) -> int:
        if super().check_bits(bits, signed) == 1 and signed:
            raise UsageError("bits=1 is not possible for signed APoT, whose only level would be 0: use 2 to 8 bits")
        return bits

    def clip(self) -> Tensor:
        """The positive clipping level alpha, in the shape of its parameter, differentiable."""
        return self.alpha.abs().clamp_min(TINY)

    def code_range(self) -> tuple[int, int]:
        return 0, 2**self.bits - (2 if self.signed else 1)

    def _tables(self) -> tuple[Tensor, Tensor]:
        return _tables(self.bits, bool(self.signed), self.alpha.device)

    def _input(self, x: Tensor) -> Tensor:
        return x if self.batched else standardize(x, self._axes(x), through_statistics=False)

    def codes(self, x: Tensor) -> Tensor:
        x = self._input(x.detach())
        ratio = x.to(compute_dtype(x)) / self._broadcast(self.clip(), x.ndim)
        return torch.bucketize(ratio, self._tables()[1].to(ratio.dtype)).to(torch.int32)

    def dequantize(self, codes: Tensor) -> Tensor:
        clip = self._broadcast(self.clip(), codes.ndim)
        return self._tables()[0].to(clip.dtype)[codes.long()] * clip

    def levels(self) -> Tensor:
        clip = self.clip().unsqueeze(-1)
        return self._tables()[0].to(clip.dtype) * clip

    def _quantize(self, x: Tensor) -> Tensor:
        axis, tables = self.channel_axis, self._tables()
        return nearest_level_quantize(self._input(x), self.clip(), tables=tables, channel_axis=axis).to(x.dtype)

    def _fit(self, x: Tensor) -> bool:
        if self.batched:
            return self._fit_mse(x)
        if not max_over_ranks(x.abs().max()) > 0:
            return False
        self.alpha.fill_(WEIGHT_CLIP)
        return True

    def _fit_mse(self, x: Tensor) -> bool:
        rows = thinned(self._per_channel(self._input(x)))
        peak = max_over_ranks(rows.abs().amax(1))
        if not (peak > 0).any():
            return False
        relative = rows / peak.clamp_min(TINY).unsqueeze(1)
        levels, midpoints = (table.to(relative.dtype) for table in self._tables())
        fractions = torch.logspace(0, -1.7, 80, dtype=relative.dtype, device=relative.device)
        errors = [(levels[torch.bucketize(relative / f, midpoints)] * f - relative).square().mean(1) for f in fractions]
        best = fractions[mean_over_ranks(torch.stack(errors)).argmin(0)] * peak
        self.alpha.copy_(torch.where(peak > 0, best, 1.0).reshape(self.alpha.shape))
        return True

    def _refit(self, previous_bits: int) -> None:
        """Nothing to do: alpha is the range."""
