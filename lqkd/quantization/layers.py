"""Quantised layers: a float layer with a quantizer on its weight and another on its input."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lqkd.quantization.quantizers import Quantizer


class QuantizedLayer(nn.Module):
    """Mixin of the quantised layers.

    The class of the float layer stays a base class and its parameters keep their names, so a float checkpoint
    loads with nothing missing but the quantizers. A layer is made from a float one by :meth:`from_float` only.
    """

    weight: Tensor
    weight_quantizer: Quantizer | None
    input_quantizer: Quantizer | None
    output_channel_axis = 0
    """The axis of ``weight`` that has one grid per output channel."""

    @classmethod
    def from_float(
        cls, layer: nn.Module, weight_quantizer: Quantizer | None, input_quantizer: Quantizer | None
    ) -> QuantizedLayer:
        """Take over ``layer`` whole: the same parameter objects, hyper-parameters, hooks and mode."""
        quantized = cls.__new__(cls)
        quantized.__dict__.update(layer.__dict__)
        # The child table must not be shared with the float layer, which would grow the quantizers too.
        quantized._modules = dict(layer._modules)
        quantized.weight_quantizer = weight_quantizer
        quantized.input_quantizer = input_quantizer
        quantized.train(layer.training)
        return quantized

    def quantized_input(self, x: Tensor) -> Tensor:
        """``x`` on the input's grid."""
        return x if self.input_quantizer is None else self.input_quantizer(x)

    def quantized_weight(self) -> Tensor:
        """The weight on its grid."""
        return self.weight if self.weight_quantizer is None else self.weight_quantizer(self.weight)


class QuantConv2d(QuantizedLayer, nn.Conv2d):
    """:class:`torch.nn.Conv2d` on quantised input and weight; input (B, C, H, W)."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(self.quantized_input(input), self.quantized_weight(), self.bias)


class QuantLinear(QuantizedLayer, nn.Linear):
    """:class:`torch.nn.Linear` on quantised input and weight; input (..., in_features)."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(self.quantized_input(input), self.quantized_weight(), self.bias)


QUANTIZED_LAYERS: dict[type[nn.Module], Any] = {nn.Conv2d: QuantConv2d, nn.Linear: QuantLinear}
"""Float layer class to quantised layer class."""
