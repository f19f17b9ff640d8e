"""SEQ: levels at odd multiples of half a step, or three of them, on a range that is learned."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.quantization.kernels import positive_step, stretched_codes, stretched_quantize
from lqkd.quantization.quantizers.base import Quantizer, integer_range, max_over_ranks
from lqkd.quantization.quantizers.statistic import require_bits, require_weights
from lqkd.quantization.quantizers.uniform import least_squares

TERNARY_STEPS = 1.5
"""Steps from zero to the end of the range of three levels: each has a third of it."""
_MARGIN = 0.01
"""The part of the range (of two steps, where it has more) that is left out at its ends, as in the authors' code."""


def stretched_bound(steps: float) -> float:
    """Where a range of so many steps clips, in steps: its very end would be rounded beyond the last level."""
    return steps - _MARGIN * min(steps, 2.0)


class SEQ(Quantizer):
    """Stretched elastic quantization (Liu et al., "ParetoQ", arXiv 2502.02631, section 4.2), for 2 bits and fewer.

    ``x_hat = alpha * (round(clip(x / alpha, -1, 1) * k / 2 - 0.5) + 0.5) / k * 2`` with ``k = 2**bits`` levels: all are
    odd multiples of half a step of ``2 alpha / k``, as many above zero as below, and there is no zero. ``ternary`` has
    ``k = 3`` without the shift by half a step: ``-2/3 alpha``, 0 and ``2/3 alpha``, each in the middle of a third.
    The range clips 1 % before its end (0.02 steps beyond 2 bits), as in the authors' code.

    The gradient of x is straight through inside the range and 0 where it clips; that of ``alpha``, which is learned, is
    that of :class:`LSQ`: ``(x_hat - x) / alpha`` inside and ``x_hat / alpha`` where x clips, times ``1 / sqrt(N)`` for
    the N weights that share it. (The authors' code has 1 in place of 2/3 there for three levels, and all weights of the
    layer for N.) It starts at the least squared error; the paper's start, the largest magnitude, is ``initial: max``.

    Args:
        bits: 2 to 8; 2 where ``ternary``.
        ternary: three levels (1.58 bits), stored with 2 bits.
        initial: how ``alpha`` is fitted to the first batch: ``mse`` or ``max``.
        signed, channels, channel_axis, group_size: see :class:`Quantizer`.
        batched: must be false.

    Raises:
        UsageError: when ``bits`` or ``initial`` is another, or for activations.

    Examples:
        >>> quantizer = SEQ(2, initial="max")
        >>> quantizer(torch.tensor([1.0, -0.4, 0.0])).detach(), quantizer.levels().detach()
        (tensor([ 0.7500, -0.2500,  0.2500]), tensor([-0.7500, -0.2500,  0.2500,  0.7500]))
        >>> quantizer = SEQ(2, ternary=True, initial="max")
        >>> quantizer(torch.tensor([1.5, -0.6, 0.4])).detach(), quantizer.code_range()
        (tensor([ 1., -1.,  0.]), (-1, 1))
    """

    def __init__(
        self,
        bits: int,
        *,
        signed: bool | None = None,
        channels: int | None = None,
        channel_axis: int = 0,
        batched: bool = False,
        group_size: int | None = None,
        ternary: bool = False,
        initial: str = "mse",
    ) -> None:
        require_weights("seq", batched)
        if ternary:
            require_bits("seq with ternary", bits, 2)
        if initial not in ("mse", "max"):
            raise UsageError(f"initial={initial!r} of quantizer SEQ is not possible: use mse or max")
        super().__init__(bits, signed=True, channels=channels, channel_axis=channel_axis)
        self.group_size = group_size
        self.ternary, self.initial = ternary, initial
        self.scale = nn.Parameter(torch.ones(() if channels is None else (channels,)))  # alpha

    @classmethod
    def check_bits(cls, bits: int, signed: bool | None) -> int:
        if super().check_bits(bits, signed) == 1:
            raise UsageError("bits=1 is not possible for quantizer seq: use 2 to 8 bits, or irnet for 1")
        return bits

    def code_range(self) -> tuple[int, int]:
        return (-1, 1) if self.ternary else integer_range(self.bits, True)

    @property
    def shift(self) -> float:
        """What is added to a code, in steps: 0.5, or 0 for three levels."""
        return 0.0 if self.ternary else 0.5

    def step(self) -> Tensor:
        """The distance of two levels in the shape of ``scale``, float32, differentiable."""
        return positive_step(self.scale) / self._steps()

    def codes(self, x: Tensor) -> Tensor:
        rows = self._grouped(x)
        step = self._broadcast(self.step(), rows.ndim)
        return stretched_codes(rows, step, stretched_bound(self._steps()), self.shift).to(torch.int32).view(x.shape)

    def dequantize(self, codes: Tensor) -> Tensor:
        rows = self._grouped(codes)
        return ((rows + self.shift) * self._broadcast(self.step(), rows.ndim)).view(codes.shape)

    def at_codes(self, codes: Tensor, x: Tensor) -> Tensor:
        """The values of ``codes`` instead of those of ``x``, as :meth:`UniformQuantizer.at_codes` gives them."""
        values = self.dequantize(codes)
        return values.detach() + (values - values.detach()) * self._gradient_scale(x)

    def levels(self) -> Tensor:
        lowest, highest = self.code_range()
        grid = torch.arange(lowest, highest + 1, device=self.scale.device) + self.shift
        return grid * self.step().unsqueeze(-1)

    def _steps(self) -> float:
        """Steps from zero to the end of the range."""
        return TERNARY_STEPS if self.ternary else 2.0 ** (self.bits - 1)

    def _quantize(self, x: Tensor) -> Tensor:
        constants = (self._gradient_scale(x), stretched_bound(self._steps()), self.shift)
        return stretched_quantize(x, self.step(), constants=constants, channel_axis=self.channel_axis)

    def _gradient_scale(self, x: Tensor) -> float:
        return 1.0 / math.sqrt(max(x.numel() / (self.channels or 1), 1.0))

    def _fit(self, x: Tensor) -> bool:
        return self._take(x, self.initial == "mse")

    def _fit_mse(self, x: Tensor) -> bool:
        return self._take(x, True)

    def _take(self, x: Tensor, searched: bool) -> bool:
        rows = self._per_channel(x)
        peak = max_over_ranks(rows.abs().amax(1))
        if not (peak > 0).any():
            return False
        alpha = self._least_squares(rows) if searched else peak
        # A dead channel has no range of its own: 1 keeps its gradient finite.
        self.scale.copy_(torch.where(peak > 0, alpha, 1.0).reshape(self.scale.shape))
        return True

    def _least_squares(self, rows: Tensor) -> Tensor:
        steps, bound = self._steps(), stretched_bound(self._steps())

        def on_grid(x: Tensor, step: Tensor) -> Tensor:
            return (stretched_codes(x, step, bound, self.shift) + self.shift) * step

        return least_squares(rows, steps, on_grid) * steps

    def _refit(self, previous_bits: int) -> None:
        """Nothing to do: alpha is the range, which stays."""

    def extra_repr(self) -> str:
        return super().extra_repr() + (", ternary" if self.ternary else "")
