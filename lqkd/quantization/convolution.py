"""What the backward pass of a layer does otherwise because its input came from a quantizer: less memory, less time.

* A layer keeps its input for the gradient of its weight. A large quantised input is not kept: the quantizer keeps its
  own input, which the layer before it mostly keeps anyway, and quantizes it once more in the backward pass.
* The gradient of the step of a first layer's grid goes through no gradient of the images, which nobody asks for and
  which takes longer to compute than the layer itself.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lqkd.quantization.kernel import call_of, recompute
from lqkd.quantization.kernels import positive_step

ONCE_MORE_FROM = 2**21
"""Number of elements from which the memory of a quantised input is worth the time of quantizing once more."""


def not_keeping(x_hat: Tensor) -> AbstractContextManager[Any]:
    """A context in which layers do not keep ``x_hat``, the large result of a quantizer, for their backward pass.

    Examples:
        >>> from lqkd.quantization import LSQ
        >>> x, weight = torch.randn(8, 16), torch.randn(4, 16, requires_grad=True)
        >>> x_hat = LSQ(4, batched=True)(x)
        >>> with not_keeping(x_hat):
        ...     y = torch.nn.functional.linear(x_hat, weight)
        >>> y.sum().backward()
        >>> bool(torch.allclose(weight.grad[0], x_hat.sum(0)))
        True
    """
    call = call_of(x_hat)
    return nullcontext() if call is None else _recomputed(x_hat, call)


def convolve(layer: Any, x_hat: Tensor, weight: Tensor) -> Tensor:
    """The convolution of ``layer``, one of PyTorch's classes, with ``x_hat`` and ``weight`` in the place of its own."""
    call = call_of(x_hat)
    if call is None:
        return layer._conv_forward(x_hat, weight, layer.bias)
    first = _is_first(layer, call)
    with _recomputed(x_hat, call):
        output = layer._conv_forward(x_hat.detach() if first else x_hat, weight, layer.bias)
    return _StepGradient.apply(output, weight, call.saved_tensors[1], call, layer) if first else output


def _recomputed(x_hat: Tensor, call: Any) -> AbstractContextManager[Any]:
    place, elements, dtype = x_hat.data_ptr(), x_hat.numel(), x_hat.dtype
    if elements < ONCE_MORE_FROM:
        return nullcontext()

    def pack(tensor: Tensor) -> Any:  # a linear layer keeps a view of its input
        same = tensor.data_ptr() == place and tensor.numel() == elements and tensor.dtype == dtype
        return (call, tensor.shape, tensor.stride()) if same else tensor

    def unpack(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else recompute(packed[0]).as_strided(*packed[1:])

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _is_first(layer: Any, call: Any) -> bool:
    """Whether the grid's step needs a gradient and what lies before it does not, in a case that is handled here."""
    if call.native is None or call.needs_input_grad[-2:] != (False, True) or call.channel_axis is not None:
        return False
    simple = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    # A hook may have taken the quantised input, to ask for its gradient.
    return simple and not layer.input_quantizer._forward_hooks and not torch.is_autocast_enabled("cpu")


class _StepGradient(torch.autograd.Function):
    """Gives the output of a convolution as it is, and the step of its input's grid a gradient.

    With o the gradient of the output, which is linear in x_hat, that of the step s is ``<o, conv(d x_hat / d s, w)>``,
    which is ``<conv_backward_weight(o, d x_hat / d s), w>``. Its sums run in another order than those over the gradient
    of x_hat.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, weight: Tensor, scale: Tensor, call: Any, layer: Any) -> Tensor:
        ctx.save_for_backward(call.saved_tensors[0], weight, scale)
        ctx.native, ctx.constants = call.native, call.constants
        ctx.geometry = layer.stride, layer.padding, layer.dilation, False, [0] * len(layer.stride), layer.groups
        ctx.mark_dirty(output)  # the same tensor, not a view, which nothing could change in place
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        slope = ctx.native.slope(x, scale, ctx.constants)
        arguments = gradients[0], slope, weight, None, *ctx.geometry, [False, True, False]
        of_weight = torch.ops.aten.convolution_backward(*arguments)[1]
        towards = torch.where(scale.abs() == positive_step(scale), scale.sign(), 0.0).detach()
        gradient = (of_weight * weight).sum() * ctx.constants[0] * towards
        return gradients[0], None, gradient, None, None
