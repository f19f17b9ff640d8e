"""Activations on a grid for each token, measured on it as it comes: nothing is learned or kept."""

from __future__ import annotations

import torch
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.quantization.kernels import StraightThrough, compute_dtype, positive_step
from lqkd.quantization.quantizers.base import Quantizer, finite, integer_range, max_over_ranks


class Dynamic(Quantizer):
    """Per-token dynamic quantization of activations, as language models with W4A8 have it.

    Each vector along the last axis has its own grid, from its own largest magnitude (Liu et al., "LLM-QAT", arXiv
    2305.17888, eq. 1 and 2): ``x_hat = s * round(x / s)`` with ``s = max|x| / (2**(bits - 1) - 1)``. Where not
    ``symmetric``, ``s = (max(x, 0) - min(x, 0)) / (2**bits - 1)`` and codes are ``round(x / s) + z`` with
    ``z = round(-min(x, 0) / s)``, as the operator ``DynamicQuantizeLinear`` of ONNX has them for a tensor. Nothing
    clips, but what is infinite becomes the largest finite value of its token; the gradient passes straight through, and
    there is none through s. There is nothing to calibrate, and the same in training and in eval mode.

    The grid is of the tensor at hand: ``dequantize`` takes codes to the values of those that :meth:`codes` saw last,
    and ``levels`` are in steps of a token, counted from its lowest code.

    Args:
        bits: 2 to 8.
        symmetric: whether zero is the middle of the grid.
        batched: must be true.
        signed, channels, channel_axis: see :class:`Quantizer`; tokens have the place of channels.

    Raises:
        UsageError: when ``bits`` is not 2 to 8, or for weights.

    Examples:
        >>> quantizer = Dynamic(8, batched=True)
        >>> x = torch.tensor([[0.5, -1.0], [100.0, 50.5]])
        >>> quantizer(x)
        tensor([[  0.5039,  -1.0000],
                [100.0000,  50.3937]])
        >>> quantizer.codes(x)
        tensor([[  64, -127],
                [ 127,   64]], dtype=torch.int32)
    """

    def __init__(
        self,
        bits: int,
        *,
        signed: bool | None = None,
        channels: int | None = None,
        channel_axis: int = 0,
        batched: bool = False,
        symmetric: bool = True,
    ) -> None:
        if not batched:
            raise UsageError("quantizer dynamic is for activations: it measures each token")
        super().__init__(bits, signed=symmetric, channels=channels, channel_axis=channel_axis, batched=True)
        self.symmetric = symmetric
        self._last: tuple[Tensor, Tensor] | None = None

    @classmethod
    def check_bits(cls, bits: int, signed: bool | None) -> int:
        if super().check_bits(bits, signed) == 1:
            raise UsageError("bits=1 is not possible for quantizer dynamic: use 2 to 8 bits")
        return bits

    def code_range(self) -> tuple[int, int]:
        lowest, highest = integer_range(self.bits, self.symmetric)
        return (-highest, highest) if self.symmetric else (lowest, highest)

    def measure(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Step and code of zero of each token of (..., C): both (..., 1), in the compute dtype, without a gradient."""
        v = finite(x.detach())
        lowest, highest = self.code_range()
        if self.symmetric:
            step = v.abs().amax(-1, keepdim=True) / highest
            return torch.where(step > 0, positive_step(step), 1.0), torch.zeros_like(step)
        low, high = v.amin(-1, keepdim=True).clamp_max(0), v.amax(-1, keepdim=True).clamp_min(0)
        step = high / highest - low / highest
        step = torch.where(step > 0, positive_step(step), 1.0)
        return step, (-low / step).round().clamp(lowest, highest)

    def codes(self, x: Tensor) -> Tensor:
        step, zero = self._last = self.measure(x)
        return self._positions(x, step, zero).to(torch.int32)

    def dequantize(self, codes: Tensor) -> Tensor:
        if self._last is None:
            raise UsageError("quantizer dynamic has no grid of its own: ask for the codes of a tensor first")
        step, zero = self._last
        return (codes - zero) * step

    def levels(self) -> Tensor:
        lowest, highest = self.code_range()
        return torch.arange(lowest, highest + 1, dtype=torch.float32, device=self.initialized.device)

    def _positions(self, x: Tensor, step: Tensor, zero: Tensor) -> Tensor:
        return ((x.detach().to(compute_dtype(x)) / step).round() + zero).clamp(*self.code_range())

    def _quantize(self, x: Tensor) -> Tensor:
        step, zero = self.measure(x)
        return StraightThrough.apply(x, ((self._positions(x, step, zero) - zero) * step).to(x.dtype))  # type: ignore[no-any-return]

    def _fit(self, x: Tensor) -> bool:
        return bool(max_over_ranks(x.abs().max()) > 0)

    def _refit(self, previous_bits: int) -> None:
        """Nothing to do: each token is measured anew."""

    def extra_repr(self) -> str:
        return f"bits={self.bits}, {'symmetric' if self.symmetric else 'asymmetric'}, per token"
