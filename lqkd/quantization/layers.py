"""Quantised layers: a float layer with a quantizer on its weight and another on its input."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lqkd.quantization.convolution import convolve, not_keeping
from lqkd.quantization.products import AttentionProducts
from lqkd.quantization.quantizers import Quantizer


class QuantizedLayer(nn.Module):
    """Mixin of the quantised layers.

    The class of the float layer stays a base class and its parameters keep their names, so a float checkpoint
    loads with nothing missing but the quantizers. A layer is made from a float one by :meth:`from_float` only.

    Examples:
        >>> from lqkd.quantization import LSQ
        >>> linear = nn.Linear(4, 2)
        >>> layer = QuantLinear.from_float(linear, LSQ(4, signed=True), LSQ(4, batched=True))
        >>> isinstance(layer, nn.Linear), layer.weight is linear.weight
        (True, True)
    """

    weight: Tensor
    weight_quantizer: Quantizer | None
    input_quantizer: Quantizer | None
    output_scale: Tensor | None
    """(output channels,) factor on the quantised weight, set when a batch norm is folded into the layer. It is kept
    apart from the quantizer because it may be negative or zero, which a grid cannot absorb without moving codes."""
    quantizes_input = True
    """Whether the input holds real numbers; an embedding's are indices."""

    @classmethod
    def from_float(
        cls, layer: nn.Module, weight_quantizer: Quantizer | None, input_quantizer: Quantizer | None
    ) -> QuantizedLayer:
        """Take over ``layer`` whole: the same parameter objects, hyper-parameters, hooks and mode."""
        quantized = cls.__new__(cls)
        quantized.__dict__.update(layer.__dict__)
        # The tables must not be shared with the float layer, which would grow the quantizers too.
        quantized._modules = dict(layer._modules)
        quantized._parameters = dict(layer._parameters)
        quantized._buffers = dict(layer._buffers)
        quantized.weight_quantizer = weight_quantizer
        quantized.input_quantizer = input_quantizer
        for quantizer in (weight_quantizer, input_quantizer):
            if quantizer is not None:
                quantizer.train(layer.training)
        quantized.register_buffer("output_scale", None)
        return quantized

    @staticmethod
    def weight_axis(layer: nn.Module) -> int:
        """The axis of the weight of ``layer`` (float or quantised) that has one grid per channel."""
        return 0

    def quantized_input(self, x: Tensor) -> Tensor:
        """``x`` on the input's grid."""
        return x if self.input_quantizer is None else self.input_quantizer(x)

    def quantized_weight(self) -> Tensor:
        """The weight on its grid, times ``output_scale`` where there is one."""
        weight = self.weight if self.weight_quantizer is None else self.weight_quantizer(self.weight)
        return weight if self.output_scale is None else weight * self.broadcast_output(self, self.output_scale)

    @staticmethod
    def broadcast_output(layer: Any, values: Tensor) -> Tensor:
        """View (output channels,) ``values`` so that they broadcast over the weight of ``layer``."""
        return values.view(-1, *[1] * (layer.weight.ndim - 1))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(prefix + "output_scale")
        if saved is not None and self.output_scale is None:
            self.output_scale = saved.to(self.weight.device, copy=True)
        super()._load_from_state_dict(state_dict, prefix, *args)


class _QuantConv(QuantizedLayer):
    _conv_forward: Any
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        return convolve(self, self.quantized_input(input), self.quantized_weight())


class QuantConv1d(_QuantConv, nn.Conv1d):
    """:class:`torch.nn.Conv1d` on quantised input and weight; input (B, C, L).

    Examples:
        >>> from lqkd.quantization import Recipe, quantize_model
        >>> layer, _ = quantize_model(nn.Conv1d(3, 8, 3), Recipe())
        >>> type(layer).__name__, layer(torch.randn(2, 3, 16)).shape
        ('QuantConv1d', torch.Size([2, 8, 14]))
    """


class QuantConv2d(_QuantConv, nn.Conv2d):
    """:class:`torch.nn.Conv2d` on quantised input and weight; input (B, C, H, W).

    Examples:
        >>> from lqkd.quantization import Recipe, quantize_model
        >>> layer, _ = quantize_model(nn.Conv2d(3, 8, 3), Recipe())
        >>> type(layer).__name__, layer(torch.randn(2, 3, 8, 8)).shape
        ('QuantConv2d', torch.Size([2, 8, 6, 6]))
    """


class QuantConv3d(_QuantConv, nn.Conv3d):
    """:class:`torch.nn.Conv3d` on quantised input and weight; input (B, C, D, H, W).

    Examples:
        >>> from lqkd.quantization import Recipe, quantize_model
        >>> layer, _ = quantize_model(nn.Conv3d(3, 8, 3), Recipe())
        >>> type(layer).__name__, layer(torch.randn(2, 3, 4, 8, 8)).shape
        ('QuantConv3d', torch.Size([2, 8, 2, 6, 6]))
    """


class _TransposedWeight(QuantizedLayer):
    """A weight laid out as (in, out / groups, ...).

    One grid per channel means one per entry of axis 1: exactly one per output channel when ``groups`` is 1, and
    one for the ``groups`` output channels at the same place of each group otherwise. When every group has a single
    input channel (depthwise), it means one per entry of axis 0, hence one per group: axis 1 would have the same grid
    for all. In each case all products that are summed into one output share one grid, as integer kernels require.
    """

    @staticmethod
    def weight_axis(layer: nn.Module) -> int:
        assert isinstance(layer, _ConvTransposeNd)
        return 0 if layer.groups > 1 and layer.groups == layer.in_channels else 1

    @staticmethod
    def broadcast_output(layer: Any, values: Tensor) -> Tensor:
        by_group = values.view(layer.groups, 1, -1).expand(-1, layer.in_channels // layer.groups, -1)
        return by_group.reshape(layer.in_channels, -1, *[1] * (layer.weight.ndim - 2))


class _QuantConvTranspose(_TransposedWeight):
    _function: Callable[..., Tensor]
    _output_padding: Any
    bias: Tensor | None
    groups: int
    stride: Any
    padding: Any
    dilation: Any
    kernel_size: Any

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        dimensions = len(self.kernel_size)
        output_padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, dimensions, self.dilation
        )
        x, weight = self.quantized_input(input), self.quantized_weight()
        with not_keeping(x):
            return type(self)._function(
                x, weight, self.bias, self.stride, self.padding, output_padding, self.groups, self.dilation
            )


class QuantConvTranspose1d(_QuantConvTranspose, nn.ConvTranspose1d):
    """:class:`torch.nn.ConvTranspose1d` on quantised input and weight; input (B, C, L).

    Examples:
        >>> from lqkd.quantization import Recipe, quantize_model
        >>> layer, _ = quantize_model(nn.ConvTranspose1d(3, 8, 2, stride=2), Recipe())
        >>> type(layer).__name__, layer(torch.randn(2, 3, 16)).shape
        ('QuantConvTranspose1d', torch.Size([2, 8, 32]))
    """

    _function = staticmethod(F.conv_transpose1d)


class QuantConvTranspose2d(_QuantConvTranspose, nn.ConvTranspose2d):
    """:class:`torch.nn.ConvTranspose2d` on quantised input and weight; input (B, C, H, W).

    Examples:
        >>> from lqkd.quantization import Recipe, quantize_model
        >>> layer, _ = quantize_model(nn.ConvTranspose2d(3, 8, 2, stride=2), Recipe())
        >>> type(layer).__name__, layer(torch.randn(2, 3, 8, 8)).shape
        ('QuantConvTranspose2d', torch.Size([2, 8, 16, 16]))
    """

    _function = staticmethod(F.conv_transpose2d)


class QuantConvTranspose3d(_QuantConvTranspose, nn.ConvTranspose3d):
    """:class:`torch.nn.ConvTranspose3d` on quantised input and weight; input (B, C, D, H, W).

    Examples:
        >>> from lqkd.quantization import Recipe, quantize_model
        >>> layer, _ = quantize_model(nn.ConvTranspose3d(3, 8, 2, stride=2), Recipe())
        >>> type(layer).__name__, layer(torch.randn(2, 3, 2, 4, 4)).shape
        ('QuantConvTranspose3d', torch.Size([2, 8, 4, 8, 8]))
    """

    _function = staticmethod(F.conv_transpose3d)


class QuantLinear(QuantizedLayer, nn.Linear):
    """:class:`torch.nn.Linear` on quantised input and weight; input (..., in_features).

    Examples:
        >>> from lqkd.quantization import Recipe, quantize_model
        >>> layer, _ = quantize_model(nn.Linear(4, 2), Recipe())
        >>> type(layer).__name__, layer(torch.randn(8, 4)).shape
        ('QuantLinear', torch.Size([8, 2]))
    """

    def forward(self, input: Tensor) -> Tensor:
        x, weight = self.quantized_input(input), self.quantized_weight()
        with not_keeping(x):
            return F.linear(x, weight, self.bias)


class QuantEmbedding(QuantizedLayer, nn.Embedding):
    """:class:`torch.nn.Embedding` with a quantised table, one grid per row; input (...) of indices.

    Examples:
        >>> from lqkd.quantization import Recipe, quantize_model
        >>> layer, _ = quantize_model(nn.Embedding(100, 16), Recipe())
        >>> type(layer).__name__, layer(torch.tensor([[3, 7, 1]])).shape
        ('QuantEmbedding', torch.Size([1, 3, 16]))
    """

    quantizes_input = False

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(input, self.quantized_weight(), self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)


class QuantMultiheadAttention(QuantizedLayer, nn.MultiheadAttention):
    """:class:`torch.nn.MultiheadAttention` whose projections are quantised; arguments and results are the same.

    The quantizers here are those of the input projections (``in_proj_weight``, one grid per output channel); query,
    key and value share one input grid. ``out_proj`` is a layer of its own. What the attention itself multiplies is on
    grids where there are ``products``, and in floating point elsewhere. PyTorch's fused inference path, which would
    read the float weights, is never taken.

    Examples:
        >>> from lqkd.quantization import Recipe, quantize_model
        >>> layer, _ = quantize_model(nn.MultiheadAttention(16, 4, batch_first=True), Recipe())
        >>> x = torch.randn(2, 5, 16)
        >>> type(layer).__name__, layer(x, x, x)[0].shape
        ('QuantMultiheadAttention', torch.Size([2, 5, 16]))
    """

    products: AttentionProducts | None

    @classmethod
    def from_float(
        cls, layer: nn.Module, weight_quantizer: Quantizer | None, input_quantizer: Quantizer | None
    ) -> QuantizedLayer:
        quantized = super().from_float(layer, weight_quantizer, input_quantizer)
        quantized.register_module("products", None)
        return quantized

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight of the input projections, (3 * embed_dim, embed_dim)."""
        return self.in_proj_weight

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if is_causal and attn_mask is None:
            raise ValueError("is_causal=True needs attn_mask as well: it only says that the mask is a causal one")
        batched = query.ndim == 3
        q, k, v = self._project(query, key, value, batched)  # each (B, L or S, E)
        if self.bias_k is not None and self.bias_v is not None:
            k = self._append(k, self.bias_k)
            v = self._append(v, self.bias_v)
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        mask = self._mask(attn_mask, key_padding_mask, q, k)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if self.products is not None:
            attended, made = self.products(q, k, v, mask, dropout)
            weights = made if need_weights else None
        elif need_weights:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)  # (B, H, L, S)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(dim=-1), dropout)
            attended = weights @ v
        else:
            attended = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        if weights is not None:
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        output = self.out_proj(attended.transpose(1, 2).flatten(2))
        if not batched:
            return output.squeeze(0), weights
        return (output if self.batch_first else output.transpose(0, 1)), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor, batched: bool) -> tuple[Tensor, Tensor, Tensor]:
        inputs: dict[int, Tensor] = {}
        for x in (query, key, value):
            if id(x) not in inputs:  # self-attention passes one tensor three times
                batch_first = x if batched else x.unsqueeze(0)
                if batched and not self.batch_first:
                    batch_first = x.transpose(0, 1)
                inputs[id(x)] = self.quantized_input(batch_first)
        weight = self.quantized_weight()
        if len(inputs) == 1:
            q, k, v = F.linear(inputs[id(query)], weight, self.in_proj_bias).chunk(3, dim=-1)
            return q, k, v
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        operands = zip((query, key, value), weight.chunk(3), biases, strict=True)
        q, k, v = (F.linear(inputs[id(x)], part, bias) for x, part, bias in operands)
        return q, k, v

    @staticmethod
    def _append(x: Tensor, token: Tensor) -> Tensor:
        return torch.cat([x, token.expand(x.shape[0], 1, -1)], dim=1)

    def _mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """Both masks as one additive mask that broadcasts to (B, H, L, S); appended keys are never masked."""
        batch, heads, length, _ = q.shape
        total = None
        if attn_mask is not None:
            total = _additive(attn_mask, q)
            if total.ndim == 3:
                total = total.view(batch, heads, length, -1)
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, q).view(batch, 1, 1, -1)
            total = padding if total is None else total + padding
        return None if total is None else F.pad(total, (0, k.shape[2] - total.shape[-1]))


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """A mask to add to scores: where a boolean one is true, minus infinity."""
    if mask.is_floating_point():
        return mask.to(like.dtype)
    return like.new_zeros(mask.shape).masked_fill(mask, float("-inf"))


class QuantizedSubclass(QuantizedLayer):
    """A layer of a class that lqkd does not know, derived from one that it does; see :func:`quantized_subclass`.

    Its own forward runs on the quantised input and finds the quantised weight under the name ``weight``.
    """

    float_class: type[nn.Module]

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # An entry of the instance hides the parameter of the same name, which nn.Module looks up last.
        self.__dict__["weight"] = self.quantized_weight()
        try:
            return super().forward(self.quantized_input(input), *args, **kwargs)
        finally:
            del self.__dict__["weight"]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time, so that pickle cannot find it by name.
        return _new_subclass, (self.float_class,), self.__dict__


@cache  # one class for all layers of a class, so that copies have the type of the original
def quantized_subclass(float_class: Any) -> type[QuantizedLayer]:
    """The quantised class of a subclass of a known layer; :func:`lqkd.quantization.trial.refusal` says if it may be."""
    transposed = (_TransposedWeight,) if issubclass(float_class, _ConvTransposeNd) else ()
    attributes = {"float_class": float_class, "__doc__": float_class.__doc__}
    return type(f"Quant{float_class.__name__}", (QuantizedSubclass, *transposed, float_class), attributes)


def _new_subclass(float_class: type[nn.Module]) -> nn.Module:
    kind = quantized_subclass(cast(Hashable, float_class))
    return kind.__new__(kind)


QUANTIZED_LAYERS: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Conv3d: QuantConv3d,
    nn.ConvTranspose1d: QuantConvTranspose1d,
    nn.ConvTranspose2d: QuantConvTranspose2d,
    nn.ConvTranspose3d: QuantConvTranspose3d,
    nn.Linear: QuantLinear,
    NonDynamicallyQuantizableLinear: QuantLinear,  # out_proj of attention: nn.Linear under another name
    nn.Embedding: QuantEmbedding,
    nn.MultiheadAttention: QuantMultiheadAttention,
}
"""Float layer class to quantised layer class."""
