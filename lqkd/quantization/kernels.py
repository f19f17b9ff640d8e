"""The fake-quantization mathematics: forward and backward of one quantizer family as one ``autograd.Function``.

Mathematics runs in float32 (float64 for float64 inputs) and the result returns to the input's dtype, so that an
8-bit grid stays exact under bfloat16. Only the input and the scale are kept for the backward pass; codes are
recomputed there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which ``x`` is quantized: float64 stays float64, every other floating dtype becomes float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def uniform_codes(x: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    """Integer grid positions ``round(clamp(x / scale, qmin, qmax))`` as a floating tensor in the compute dtype.

    Rounding is half to even, as in ONNX ``QuantizeLinear``. Adding zero turns -0.0 into 0.0, which an integer
    code cannot hold.

    Args:
        x: any shape, any floating dtype.
        scale: positive, broadcastable to ``x``.
        qmin, qmax: the integer range.
    """
    return (x.to(compute_dtype(x)) / scale).clamp_(qmin, qmax).round_().add_(0.0)


class LearnedStepQuantize(torch.autograd.Function):
    """``x_hat = round(clamp(x / s, qmin, qmax)) * s`` with the gradients of LSQ.

    Esser et al., "Learned Step Size Quantization" (arXiv 1902.08153), eq. 1-3 and section 2.2:

    * ``d x_hat / d x`` is 1 inside the range and 0 where it clips (straight-through estimator),
    * ``d x_hat / d s`` is ``round(x/s) - x/s`` inside, ``qmin`` below and ``qmax`` above,
    * the gradient of ``s`` is multiplied by ``gradient_scale``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, gradient_scale: float, qmin: int, qmax: int) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.constants = (gradient_scale, qmin, qmax)
        return uniform_codes(x, scale, qmin, qmax).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        (gradient,) = gradients
        x, scale = ctx.saved_tensors
        gradient_scale, qmin, qmax = ctx.constants
        ratio = x.to(compute_dtype(x)) / scale
        inside = (ratio > qmin) & (ratio < qmax)
        gradient_x = gradient_s = None
        if ctx.needs_input_grad[0]:
            gradient_x = gradient * inside
        if ctx.needs_input_grad[1]:
            # Outside, the clamped ratio is the bound itself; inside, the rounding error.
            slope = ratio.clamp(qmin, qmax).round_().sub_(torch.where(inside, ratio, 0.0))
            gradient_s = (gradient.to(slope.dtype) * slope).sum_to_size(scale.shape) * gradient_scale
        return gradient_x, gradient_s, None, None, None
