"""PACT: unsigned activations with a learned clipping level."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.quantization.kernels import clipped_quantize
from lqkd.quantization.quantizers.base import max_over_ranks
from lqkd.quantization.quantizers.uniform import UniformQuantizer


class PACT(UniformQuantizer):
    """Parameterized clipping activation (Choi et al., arXiv 1805.06085).

    ``y = clamp(x, 0, alpha)`` (eq. 1) and ``x_hat = round(y * (2**b - 1) / alpha) * alpha / (2**b - 1)`` (eq. 2). The
    gradient of alpha is 1 where ``x >= alpha`` and 0 elsewhere (eq. 3). Alpha starts at the largest value of the first
    batch (the paper: at a large constant). The paper's L2 penalty on alpha is weight decay on ``alpha``.

    Args:
        bits: 1 to 8.
        signed: false or ``None``.
        channels, channel_axis, batched: see :class:`Quantizer`.

    Raises:
        UsageError: when ``bits`` is out of range or the data have negative values.

    Examples:
        >>> quantizer = PACT(2, batched=True)
        >>> quantizer(torch.tensor([[0.0, 1.1, 3.0]])).detach()
        tensor([[0., 1., 3.]])
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
        self.alpha = nn.Parameter(torch.ones(() if channels is None else (channels,)))

    @classmethod
    def check_bits(cls, bits: int, signed: bool | None) -> int:
        if signed:
            raise UsageError(
                "quantizer pact is for values that are never negative, such as those after a ReLU, "
                "but this tensor is signed: use lsq or lsq_plus for it"
            )
        return super().check_bits(bits, signed)

    @property
    def scale(self) -> Tensor:  # type: ignore[override]
        """The distance of two levels, ``alpha / (2**b - 1)``."""
        return self.alpha / self.code_range()[1]

    def _quantize(self, x: Tensor) -> Tensor:
        return clipped_quantize(x, self.step(), constants=self.code_range(), channel_axis=self.channel_axis)

    def _initial_step(self, rows: Tensor) -> Tensor:
        return max_over_ranks(rows.amax(1)) / self.code_range()[1]

    def _set_step(self, step: Tensor) -> None:
        self.alpha.copy_(step * self.code_range()[1])

    def _refit(self, previous_bits: int) -> None:
        """Nothing to do: alpha is the range."""
