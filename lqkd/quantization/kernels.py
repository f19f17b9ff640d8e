"""The fake-quantization mathematics: forward and backward of each quantizer family as elementwise functions.

How they see their operands, and how they are run, is said in :mod:`lqkd.quantization.kernel`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lqkd.quantization.kernel import Kernel, compute_dtype
from lqkd.quantization.native import LearnedStep


def uniform_codes(x: Tensor, scale: Tensor, qmin: Any, qmax: Any) -> Tensor:
    """Integer grid positions ``round(clamp(x / scale, qmin, qmax))`` as a floating tensor in the compute dtype.

    Rounding is half to even, as in ONNX ``QuantizeLinear``. There is no -0.0, which an integer code cannot
    hold.

    Args:
        x: any shape, any floating dtype.
        scale: positive, broadcastable to ``x``.
        qmin, qmax: the integer range, numbers or 0-dim tensors.
    """
    codes = torch.clamp(x.to(compute_dtype(x)) / scale, qmin, qmax).round()
    return torch.where(codes == 0, 0.0, codes)


def _total(x: Tensor) -> Tensor:
    """The sum over the elements that share a parameter: everything (1-D) or each channel (2-D)."""
    return x.sum() if x.ndim == 1 else x.sum(1, keepdim=True)


def positive_step(scale: Tensor) -> Tensor:
    """The step of a grid from a parameter that may cross zero: its absolute value, at least the smallest normal."""
    return scale.abs().clamp_min(torch.finfo(torch.float32).tiny)


def _learned_step(x: Tensor, scale: Tensor, gradient_scale: Tensor, qmin: Tensor, qmax: Tensor) -> Tensor:
    step = positive_step(scale)
    return (uniform_codes(x, step, qmin, qmax) * step).to(x.dtype)


def _learned_step_backward(
    gradient: Tensor, x: Tensor, scale: Tensor, gradient_scale: Tensor, qmin: Tensor, qmax: Tensor
) -> tuple[Tensor, Tensor]:
    step = positive_step(scale)
    ratio = x.to(compute_dtype(x)) / step
    inside = (ratio > qmin) & (ratio < qmax)
    # Outside, the clamped ratio is the bound itself; inside, the rounding error.
    slope = torch.clamp(ratio, qmin, qmax).round() - torch.where(inside, ratio, 0.0)
    # The step's own slope, here and not in autograd, which would take longer than a small weight's quantization.
    towards_scale = torch.where(scale.abs() == step, torch.sign(scale), 0.0)
    return torch.where(inside, gradient, 0.0), _total(gradient * slope) * gradient_scale * towards_scale


learned_step_quantize = Kernel(_learned_step, _learned_step_backward, LearnedStep())
"""``x_hat = round(clamp(x / s, qmin, qmax)) * s`` with the gradients of LSQ: parameter scale, of which s is the
:func:`positive_step`; constants gradient_scale, qmin, qmax.

Esser et al., "Learned Step Size Quantization" (arXiv 1902.08153), eq. 1-3 and section 2.2:

* ``d x_hat / d x`` is 1 inside the range and 0 where it clips (straight-through estimator),
* ``d x_hat / d s`` is ``round(x/s) - x/s`` inside, ``qmin`` below and ``qmax`` above,
* the gradient of ``s`` is multiplied by ``gradient_scale``.
"""


def stretched_codes(x: Tensor, step: Tensor, bound: Any, shift: Any) -> Tensor:
    """``round(clamp(x / step, -bound, bound) - shift)`` as a floating tensor in the compute dtype, without -0.0.

    Args:
        x: any shape, any floating dtype.
        step: positive, broadcastable to ``x``.
        bound: where the range ends, in steps, such that what is there has a code.
        shift: of the levels, in steps; numbers or 0-dim tensors.
    """
    codes = (torch.clamp(x.to(compute_dtype(x)) / step, -bound, bound) - shift).round()
    return torch.where(codes == 0, 0.0, codes)


def _stretched(x: Tensor, step: Tensor, gradient_scale: Tensor, bound: Tensor, shift: Tensor) -> Tensor:
    return ((stretched_codes(x, step, bound, shift) + shift) * step).to(x.dtype)


def _stretched_backward(
    gradient: Tensor, x: Tensor, step: Tensor, gradient_scale: Tensor, bound: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    ratio = x.to(compute_dtype(x)) / step
    inside = ratio.abs() <= bound
    slope = stretched_codes(x, step, bound, shift) + shift - torch.where(inside, ratio, 0.0)
    return torch.where(inside, gradient, 0.0), _total(gradient * slope) * gradient_scale


stretched_quantize = Kernel(_stretched, _stretched_backward)
"""``x_hat = (round(clamp(x / s, -bound, bound) - shift) + shift) * s`` with the gradients of LSQ: positive parameter s;
constants gradient_scale, bound, shift. With ``shift = 0.5`` the grid of SEQ (Liu et al., arXiv 2502.02631)."""


def _element_wise_scaled(
    x: Tensor, scale: Tensor, gradient_scale: Tensor, qmin: Tensor, qmax: Tensor, delta: Tensor
) -> Tensor:
    return _learned_step(x, scale, gradient_scale, qmin, qmax)


def _element_wise_scaled_backward(
    gradient: Tensor, x: Tensor, scale: Tensor, gradient_scale: Tensor, qmin: Tensor, qmax: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor]:
    straight, gradient_s = _learned_step_backward(gradient, x, scale, gradient_scale, qmin, qmax)
    ratio = x.to(compute_dtype(x)) / positive_step(scale)
    distance = (ratio - ratio.round()) / (qmax - qmin)
    scaled = straight * (1.0 + delta * torch.sign(straight) * distance)
    return torch.where(straight == 0, straight, scaled.to(gradient.dtype)), gradient_s


element_wise_scaled_quantize = Kernel(_element_wise_scaled, _element_wise_scaled_backward)
"""LSQ whose input gradient g inside the range is ``g * (1 + delta * sign(g) * (x_n - x_q))``, with x_n and x_q in units
of the range (Lee et al., arXiv 2104.00903): parameter s; constants gradient_scale, qmin, qmax, delta."""


def _clipped(x: Tensor, scale: Tensor, qmin: Tensor, qmax: Tensor) -> Tensor:
    return (uniform_codes(x, scale, qmin, qmax) * scale).to(x.dtype)


def _clipped_backward(gradient: Tensor, x: Tensor, scale: Tensor, qmin: Tensor, qmax: Tensor) -> tuple[Tensor, Tensor]:
    ratio = x.to(compute_dtype(x)) / scale
    inside = (ratio > qmin) & (ratio < qmax)
    return torch.where(inside, gradient, 0.0), _total(torch.where(ratio >= qmax, gradient.to(ratio.dtype), 0.0)) * qmax


clipped_quantize = Kernel(_clipped, _clipped_backward)
"""The same grid with the gradients of PACT (Choi et al., arXiv 1805.06085, eq. 3): ``d x_hat / d (qmax * s)`` is 1
where x clips above and 0 elsewhere. Parameter s; constants qmin, qmax."""


def _learned_offset(
    x: Tensor,
    scale: Tensor,
    offset: Tensor,
    zero: Tensor,
    scale_step: Tensor,
    scale_offset: Tensor,
    qmax: Tensor,
) -> Tensor:
    return (uniform_codes(x, scale, zero, zero + qmax) * scale).to(x.dtype)


def _learned_offset_backward(
    gradient: Tensor,
    x: Tensor,
    scale: Tensor,
    offset: Tensor,
    zero: Tensor,
    scale_step: Tensor,
    scale_offset: Tensor,
    qmax: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ratio = x.to(compute_dtype(x)) / scale
    above = ratio >= zero + qmax
    inside = (ratio > zero) & ~above
    slope = torch.where(inside, ratio.round() - ratio, torch.where(above, qmax, 0.0))
    gradient_s = _total(gradient * slope) * scale_step
    gradient_o = _total(torch.where(inside, 0.0, gradient.to(ratio.dtype))) * scale_offset
    return torch.where(inside, gradient, 0.0), gradient_s, gradient_o, torch.zeros_like(zero)


learned_offset_quantize = Kernel(_learned_offset, _learned_offset_backward)
"""``x_hat = clamp(round(x / s), z, z + qmax) * s``, z the offset in steps, with the gradients of LSQ+ (Bhalgat et al.,
arXiv 2004.09576): that of s as in LSQ with ``x - z s``; that of the offset 0 inside and 1 where x clips.
Parameters s, offset, z (which receives no gradient); constants scale_step and
scale_offset (the factors of their gradients), qmax."""


def _binary(x: Tensor, scale: Tensor, *_: Tensor) -> Tensor:
    return torch.where(x.isnan(), x, torch.where(x >= 0, scale, -scale)).to(x.dtype)


def _binary_backward(gradient: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return gradient.clone(), torch.zeros_like(scale)


binary_quantize = Kernel(_binary, _binary_backward)
"""``x_hat = scale * sign(x)``, sign(0) = 1, whose gradient passes straight through. Parameter scale (no gradient)."""


def _binary_clip_backward(gradient: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return torch.where(x.abs() <= 1, gradient, 0.0), torch.zeros_like(scale)


binary_clip_quantize = Kernel(_binary, _binary_clip_backward)
"""``x_hat = scale * sign(x)`` with the gradient of ``clip(x, -1, 1)``. Parameter scale (no gradient)."""


def _binary_tanh_backward(gradient: Tensor, x: Tensor, scale: Tensor, t: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    curve = torch.tanh(t * x.to(compute_dtype(x)))
    return (gradient * (scale * k * t * (1.0 - curve * curve))).to(gradient.dtype), torch.zeros_like(scale)


binary_tanh_quantize = Kernel(_binary, _binary_tanh_backward)
"""``x_hat = scale * sign(x)`` with the gradient of ``scale * k * tanh(t x)``: the error decay estimator of IR-Net
(Qin et al., arXiv 1909.10788). Parameter scale (no gradient); constants t, k."""


def _shifted_sign(x: Tensor, shift: Tensor) -> Tensor:
    moved = x.to(compute_dtype(x)) + shift
    return torch.where(moved.isnan(), moved, torch.where(moved >= 0, 1.0, -1.0)).to(x.dtype)


def _shifted_sign_backward(gradient: Tensor, x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    moved = x.to(compute_dtype(x)) + shift
    slope = gradient * torch.clamp(2.0 - 2.0 * moved.abs(), min=0.0)
    return slope.to(gradient.dtype), _total(slope)


shifted_sign_quantize = Kernel(_shifted_sign, _shifted_sign_backward)
"""``x_hat = sign(x + shift)``, sign(0) = 1, with the gradient of Bi-Real net's piecewise polynomial (Liu et al., arXiv
1808.00278) for both. Parameter shift."""


def _ternary(x: Tensor, threshold: Tensor, scale: Tensor) -> Tensor:
    return _trained_ternary(x, threshold, scale, scale)


def _ternary_backward(gradient: Tensor, x: Tensor, threshold: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return gradient.clone(), torch.zeros_like(threshold), torch.zeros_like(scale)


ternary_quantize = Kernel(_ternary, _ternary_backward)
"""``x_hat`` is scale above the threshold, -scale below its negative and 0 between; the gradient passes straight
through. Parameters threshold and scale (no gradients)."""


def _trained_ternary(x: Tensor, threshold: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    v = x.to(compute_dtype(x))
    value = torch.where(v > threshold, positive, torch.where(v < -threshold, -negative, 0.0))
    return torch.where(v.isnan(), v, value).to(x.dtype)


def _trained_ternary_backward(
    gradient: Tensor, x: Tensor, threshold: Tensor, positive: Tensor, negative: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    v = x.to(compute_dtype(x))
    above, below = v > threshold, v < -threshold
    slope = gradient.to(v.dtype)
    gradient_x = slope * torch.where(above, positive, torch.where(below, negative, 1.0))
    gradient_p, gradient_n = _total(torch.where(above, slope, 0.0)), _total(torch.where(below, -slope, 0.0))
    return gradient_x.to(gradient.dtype), torch.zeros_like(threshold), gradient_p, gradient_n


trained_ternary_quantize = Kernel(_trained_ternary, _trained_ternary_backward)
"""``x_hat`` is W_p above the threshold, -W_n below its negative and 0 between, with the gradients of TTQ (Zhu et al.,
arXiv 1612.01064). Parameters threshold (no gradient), W_p, W_n."""


def centred_codes(x: Tensor, top: Any) -> Tensor:
    """``round((clamp(x, -1, 1) + 1) * top / 2)``: positions 0 to ``top`` on ``[-1, 1]``, floating, compute dtype."""
    return ((torch.clamp(x.to(compute_dtype(x)), -1.0, 1.0) + 1.0) * (top / 2)).round()


def _centred(x: Tensor, scale: Tensor, top: Tensor) -> Tensor:
    return ((2.0 * centred_codes(x, top) - top) / top * scale).to(x.dtype)


def _centred_backward(gradient: Tensor, x: Tensor, scale: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    return gradient.clone(), torch.zeros_like(scale)


centred_quantize = Kernel(_centred, _centred_backward)
"""``x_hat = scale * (2 q / top - 1)``, q the nearest position on ``[-1, 1]``: an even number of levels without a zero,
as in DoReFa and N2UQ. The gradient passes straight through, everywhere. Parameter scale (no gradient); constant top."""


def _nearest_level(x: Tensor, alpha: Tensor, levels: Tensor, midpoints: Tensor) -> Tensor:
    ratio = x.to(compute_dtype(x)) / alpha
    value = levels[torch.bucketize(ratio, midpoints)] * alpha
    return torch.where(ratio.isnan(), ratio, value).to(x.dtype)


def _nearest_level_backward(
    gradient: Tensor, x: Tensor, alpha: Tensor, levels: Tensor, midpoints: Tensor
) -> tuple[Tensor, Tensor]:
    ratio = x.to(compute_dtype(x)) / alpha
    inside = (ratio > levels[0]) & (ratio < levels[-1])
    slope = levels[torch.bucketize(ratio, midpoints)] - torch.where(inside, ratio, 0.0)
    return torch.where(inside, gradient, 0.0), _total(gradient * slope)


nearest_level_quantize = Kernel(_nearest_level, _nearest_level_backward)
"""``x_hat = alpha * l``, l the level nearest to ``x / alpha``, with the gradients of APoT (Li et al., arXiv
1909.13144). Parameter alpha; tables levels (ascending) and the midpoints between them."""


class StraightThrough(torch.autograd.Function):
    """The second tensor with the gradient of the first: a straight-through estimator that rounds nothing."""

    @staticmethod
    def forward(ctx: Any, differentiable: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
