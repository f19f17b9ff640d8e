"""The grids of ggml's block formats, trained on as a GGUF file holds them: steps are float16, codes are the file's."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from lqkd.quantization.kernels import learned_step_quantize, stretched_quantize
from lqkd.quantization.quantizers.lsq import LSQ
from lqkd.quantization.quantizers.seq import TERNARY_STEPS, stretched_bound
from lqkd.quantization.quantizers.statistic import require_bits, require_weights
from lqkd.quantization.quantizers.uniform import mse_step

SMALLEST, LARGEST = 2.0**-24, 65504.0
"""Of float16's positive numbers; a step of zero would hold its block at zero for ever."""


def _half_step(scale: Tensor, start: Tensor) -> Tensor:
    step = start * scale
    sign = torch.where(step < 0, -1.0, 1.0).to(step.dtype)
    return step.abs().clamp(SMALLEST, LARGEST).to(torch.float16).to(step.dtype) * sign


# A graph of torch.compile would leave out the way to float16 and back.
@torch.library.custom_op("lqkd::half_step", mutates_args=())
def _in_graph(scale: Tensor, start: Tensor) -> Tensor:
    return _half_step(scale, start)


@_in_graph.register_fake
def _(scale: Tensor, start: Tensor) -> Tensor:
    return torch.empty_like(scale)


class _HalfStep(torch.autograd.Function):
    """``start * scale`` rounded to float16, in the dtype that it is given.

    The gradient of ``scale`` is that of the step divided by ``start``: see :class:`BlockFormat`.
    """

    @staticmethod
    def forward(ctx: Any, scale: Tensor, start: Tensor) -> Tensor:
        ctx.save_for_backward(start)
        return _in_graph(scale, start) if torch.compiler.is_compiling() else _half_step(scale, start)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (start,) = ctx.saved_tensors
        return gradients[0] / start, None


class BlockFormat(LSQ):
    """Blocks of weights along the input axis, 32 unless a format has others, with one step each: ``x_hat = d * q``.

    The step d is ``start * scale`` rounded to float16, in training too, and ``x_hat`` in float32 is bit for bit what
    the file decodes to. The gradients of x and d are those of :class:`LSQ` (arXiv 1902.08153, eq. 2 and 3, section
    2.2), that of d passed through its rounding. ``start`` is what d was fitted to and the parameter ``scale`` begins at
    1, since steps of so few weights are small: Adam would move a step itself by its learning rate, whatever the
    gradient, which at 0.001 is a third of a step of 4 bits in a small GPT. So it moves each by a share of it. The
    gradient of ``scale`` is that of d divided by ``start``, with which SGD moves d as it does in LSQ.
    """

    start: Tensor
    """(channels,) or (): d as it was fitted, within float16's range."""

    block_size = 32
    format_name: str
    """What recipes and GGUF files call it."""
    format_bits: int

    def __init__(
        self,
        bits: int,
        *,
        signed: bool | None = None,
        channels: int | None = None,
        channel_axis: int = 0,
        batched: bool = False,
        group_size: int | None = None,
        bound_gradient: bool = True,
    ) -> None:
        require_weights(self.format_name, batched)
        super().__init__(
            bits,
            signed=True,
            channels=channels,
            channel_axis=channel_axis,
            group_size=group_size,
            bound_gradient=bound_gradient,
        )
        self.register_buffer("start", torch.ones_like(self.scale))

    @classmethod
    def check_bits(cls, bits: int, signed: bool | None) -> int:
        return require_bits(cls.format_name, super().check_bits(bits, signed), cls.format_bits)

    def step(self) -> Tensor:
        """The step d in the shape of ``scale``: a float16 number as float32, differentiable."""
        return _HalfStep.apply(self.scale, self.start)  # type: ignore[no-any-return]

    @abstractmethod
    def _largest_step(self, rows: Tensor) -> Tensor:
        """The step of each row of (blocks, elements) that puts its largest magnitude on the end of the grid."""

    @abstractmethod
    def _initial_step(self, rows: Tensor) -> Tensor:
        """The step with the least squared error, likewise."""

    def _fit(self, x: Tensor) -> bool:
        rows = self._per_channel(x)
        return self._take_step(self._largest_step(rows), rows)

    def _fit_mse(self, x: Tensor) -> bool:
        rows = self._per_channel(x)
        return self._take_step(self._initial_step(rows), rows)

    def _take_step(self, step: Tensor, rows: Tensor) -> bool:
        usable = step.isfinite() & (step != 0) & rows.any(1)
        if not usable.any():
            return False
        of_zeros = step[usable].abs().median()  # what it learns may become like what the others hold
        self._set_step(torch.where(usable, step, of_zeros).reshape(self.scale.shape))
        return True

    def _set_step(self, step: Tensor) -> None:
        self.start.copy_(step.abs().clamp(SMALLEST, LARGEST) * step.sign())
        self.scale.fill_(1.0)

    def overhead_bytes(self) -> int:
        return 2 * self.scale.numel()


class Q4_0(BlockFormat):
    """ggml's Q4_0: ``x_hat = d * q`` with q from -8 to 7, 4.5 bits a weight.

    The step d has a sign: the grid reaches from ``-8 d`` to ``7 d``, and a negative d turns it round, so that the
    longer side is that of the block's largest weight. Codes are the file's minus 8; where d is negative they fall as
    the weight rises. It starts as ggml's ``quantize_row_q4_0_ref`` rounds, with ``d = m / -8`` for the weight m of the
    largest magnitude.

    Args:
        bits: 4.
        bound_gradient: see :class:`LSQ`.
        signed, channels, channel_axis, batched, group_size: see :class:`~lqkd.quantization.Quantizer`.

    Raises:
        UsageError: when ``bits`` is not 4 or it is for activations.

    Examples:
        >>> quantizer = Q4_0(4)
        >>> quantizer(torch.tensor([0.5, -0.25, 1.0])).detach(), quantizer.step().item()
        (tensor([ 0.5000, -0.2500,  1.0000]), -0.125)
        >>> quantizer.codes(torch.tensor([0.5, -0.25, 1.0])), quantizer.levels().detach().aminmax()
        (tensor([-4,  2, -8], dtype=torch.int32), torch.return_types.aminmax(
        min=tensor(-0.8750),
        max=tensor(1.)))
    """

    format_name, format_bits = "q4_0", 4

    def levels(self) -> Tensor:
        return super().levels().sort(dim=-1).values

    def _quantize(self, x: Tensor) -> Tensor:
        step = self.step()
        sign = torch.where(step.detach() < 0, -1.0, 1.0)
        signs = self._broadcast(sign, x.ndim).to(x.dtype)  # a product by one of them is exact
        constants = (self._gradient_scale(x), *self.code_range())
        return signs * learned_step_quantize(
            signs * x, step * sign, constants=constants, channel_axis=self.channel_axis
        )

    def _largest_step(self, rows: Tensor) -> Tensor:
        return rows.gather(1, rows.abs().argmax(1, keepdim=True)).squeeze(1) / -8

    def _initial_step(self, rows: Tensor) -> Tensor:
        qmin, qmax = self.code_range()
        found = mse_step(rows, qmin, qmax), -mse_step(-rows, qmin, qmax), self._largest_step(rows)
        steps = torch.stack(found).unsqueeze(2)  # (3, blocks, 1)
        positions = (rows / steps).clamp(qmin, qmax).round().nan_to_num()  # of a block of zeros
        best = (positions * steps - rows).square().mean(2).argmin(0, keepdim=True)
        return steps.squeeze(2).gather(0, best).squeeze(0)


class Q8_0(BlockFormat):
    """ggml's Q8_0: ``x_hat = d * q`` with q from -127 to 127, 8.5 bits a weight.

    It starts as ggml's ``quantize_row_q8_0_ref`` rounds, with ``d = max |x| / 127``. The step is positive.

    Args:
        bits: 8.
        bound_gradient: see :class:`LSQ`.
        signed, channels, channel_axis, batched, group_size: see :class:`~lqkd.quantization.Quantizer`.

    Raises:
        UsageError: when ``bits`` is not 8 or it is for activations.

    Examples:
        >>> quantizer = Q8_0(8)
        >>> quantizer(torch.tensor([0.5, -1.0])).detach(), quantizer.code_range()
        (tensor([ 0.5039, -0.9999]), (-127, 127))
    """

    format_name, format_bits = "q8_0", 8

    def code_range(self) -> tuple[int, int]:
        return -127, 127

    def step(self) -> Tensor:
        return super().step().abs()

    def _quantize(self, x: Tensor) -> Tensor:
        constants = (self._gradient_scale(x), *self.code_range())
        return learned_step_quantize(x, self.step(), constants=constants, channel_axis=self.channel_axis)

    def _largest_step(self, rows: Tensor) -> Tensor:
        return rows.abs().amax(1) / 127

    def _initial_step(self, rows: Tensor) -> Tensor:
        return mse_step(rows, *self.code_range())


class TQ2_0(BlockFormat):
    """ggml's TQ2_0: ``x_hat = d * q`` with q from -1 to 1 in blocks of 256, 2.0625 bits a weight.

    The step is positive. It starts at the least squared error of its block: ggml's own rounding, ``d = max |x|``, would
    leave only what is above half of the largest weight. Within 1.5 steps of zero the gradient of x passes, as in the
    three levels of :class:`SEQ` (arXiv 2502.02631), whose grid this is: a weight beyond the last level can return.

    Args:
        bits: 2, of whose four values three are used.
        bound_gradient: see :class:`LSQ`; it changes nothing here.
        signed, channels, channel_axis, batched, group_size: see :class:`~lqkd.quantization.Quantizer`.

    Raises:
        UsageError: when ``bits`` is not 2 or it is for activations.

    Examples:
        >>> quantizer = TQ2_0(2)
        >>> quantizer(torch.tensor([1.0, -1.0, 0.25])).detach(), quantizer.block_size
        (tensor([ 1., -1.,  0.]), 256)
    """

    format_name, format_bits, block_size = "tq2_0", 2, 256

    def code_range(self) -> tuple[int, int]:
        return -1, 1

    def step(self) -> Tensor:
        return super().step().abs()

    def _quantize(self, x: Tensor) -> Tensor:
        constants = (self._gradient_scale(x), stretched_bound(TERNARY_STEPS), 0.0)
        return stretched_quantize(x, self.step(), constants=constants, channel_axis=self.channel_axis)

    def _largest_step(self, rows: Tensor) -> Tensor:
        return self._initial_step(rows)

    def _initial_step(self, rows: Tensor) -> Tensor:
        return mse_step(rows, *self.code_range())
