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
from torch.nn.modules import module as module_hooks

from lqkd.quantization.kernel import call_of, recompute
from lqkd.quantization.kernels import positive_step

ONCE_MORE_FROM = 2**21
"""Number of elements from which the memory of a quantised input is worth the time of quantizing once more, on a CPU."""
_OF_X = 4
"""The place of the input among the arguments of a kernel's call."""


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
    if _is_first(layer, call, x_hat):
        return _FirstConvolution.apply(x_hat, weight, layer.bias, call.saved_tensors[1], call, layer)
    with _recomputed(x_hat, call):
        return layer._conv_forward(x_hat, weight, layer.bias)


def _recomputed(x_hat: Tensor, call: Any) -> AbstractContextManager[Any]:
    place, elements, dtype = x_hat.data_ptr(), x_hat.numel(), x_hat.dtype
    if (
        elements < ONCE_MORE_FROM or not call.needs_input_grad[_OF_X]
    ):  # images are nobody's to keep: others may change them
        return nullcontext()
    operands = call.saved_tensors
    versions = [operand._version for operand in operands]

    def pack(tensor: Tensor) -> Any:  # a linear layer keeps a view of its input
        same = tensor.data_ptr() == place and tensor.numel() == elements and tensor.dtype == dtype
        return (None, tensor.shape, tensor.stride()) if same else (tensor, tensor._version)

    def unpack(packed: Any) -> Tensor:
        tensor, *rest = packed
        if tensor is None:
            for operand, version in zip(operands, versions, strict=True):
                _check_unchanged(operand, version)
            return recompute(call, operands).as_strided(*rest)
        _check_unchanged(tensor, *rest)
        return tensor

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _check_unchanged(tensor: Tensor, version: int) -> None:
    """What PyTorch checks of everything that is kept, but for what goes through hooks."""
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: a tensor "
            f"{list(tensor.shape)} is at version {tensor._version}; expected version {version} instead"
        )


def _is_first(layer: Any, call: Any, x_hat: Tensor) -> bool:
    """Whether the grid's step needs a gradient and what lies before it does not, in a case that is handled here.

    The quantised input must be the layer's own: of one that others read, or whose gradient is watched, they want all.
    """
    quantizer = layer.input_quantizer
    if quantizer is None or call.native is None or call.channel_axis is not None:
        return False
    if call.needs_input_grad[-2:] != (False, True) or x_hat.ndim != layer.weight.ndim:
        return False
    watched = (
        quantizer._forward_hooks or module_hooks._global_forward_hooks or x_hat._backward_hooks or x_hat.retains_grad
    )
    simple = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return simple and not watched and not torch.is_autocast_enabled("cpu")


class _FirstConvolution(torch.autograd.Function):
    """A convolution of images on a grid, whose step gets its gradient from that of a weight.

    With o the gradient of the output, which is linear in x_hat, that of the step s is ``<o, conv(d x_hat / d s, w)>``,
    which is ``<conv_backward_weight(o, d x_hat / d s), w>``. Its sums run in another order than those over the gradient
    of x_hat, which is computed only where the graph of the gradients is asked for.
    """

    @staticmethod
    def forward(
        ctx: Any, x_hat: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, call: Any, layer: Any
    ) -> Tensor:
        ctx.save_for_backward(x_hat, weight, call.saved_tensors[0], scale)
        ctx.native, ctx.constants = call.native, call.constants
        ctx.bias_sizes = None if bias is None else list(bias.shape)
        ctx.geometry = layer.stride, layer.padding, layer.dilation, False, [0] * len(layer.stride), layer.groups
        return layer._conv_forward(x_hat, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_hat, weight, x, scale = ctx.saved_tensors
        graph, of_bias = torch.is_grad_enabled(), ctx.needs_input_grad[2]
        wanted = [graph, ctx.needs_input_grad[1], of_bias]
        of_x_hat, of_weight, of_bias = torch.ops.aten.convolution_backward(
            gradients[0], x_hat, weight, ctx.bias_sizes, *ctx.geometry, wanted
        )
        if graph:  # the step's comes through the quantizer
            return of_x_hat, of_weight, of_bias, None, None, None
        slope = ctx.native.slope(x, scale, ctx.constants)
        times_slope = torch.ops.aten.convolution_backward(
            gradients[0], slope, weight, None, *ctx.geometry, [False, True, False]
        )[1]
        towards = torch.where(scale.abs() == positive_step(scale), scale.sign(), 0.0)
        return None, of_weight, of_bias, (times_slope * weight).sum() * ctx.constants[0] * towards, None, None
