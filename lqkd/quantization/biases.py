"""Biases that an integer kernel can have: whole numbers on the grid of its accumulator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lqkd.errors import UsageError
from lqkd.quantization.accumulator import layer_integers
from lqkd.quantization.batchnorm import folded_parameters
from lqkd.quantization.codes import activation_codes, is_exactly_uniform, weight_codes
from lqkd.quantization.layers import QuantizedLayer
from lqkd.quantization.quantizers import N2UQ, APoT


def bias_owners(model: nn.Module, folded: Mapping[str, str]) -> dict[str, str]:
    """Name of each layer whose bias is a whole number in an integer kernel to that of the module with the parameter.

    That is the batch norm that is folded into the layer, or the layer itself. Layers are left out whose weight or input
    is in floating point or on uneven levels, or whose input has no quantizer of its own, and those whose bias is
    another's too: their biases stay as they are.

    Args:
        model: a network with quantised layers.
        folded: name of each batch norm that is folded to that of its layer, as
            :func:`~lqkd.quantization.batchnorm.foldable` finds them.
    """
    norms = {layer: norm for norm, layer in folded.items()}
    modules = dict(model.named_modules())
    shared = Counter(id(p) for module in modules.values() for p in module._parameters.values() if p is not None)
    owners: dict[str, str] = {}
    for name, layer in modules.items():
        owner = str(norms.get(name, name))
        bias = getattr(modules[owner], "bias", None)
        if _has_integer_bias(layer) and isinstance(bias, Tensor) and shared[id(bias)] == 1:
            owners[name] = owner
    return owners


def _has_integer_bias(layer: nn.Module) -> bool:
    if not isinstance(layer, QuantizedLayer) or not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return False
    weight, activation = layer.weight_quantizer, layer.input_quantizer
    even = weight is not None and is_exactly_uniform(weight)
    return even and activation is not None and not isinstance(activation, APoT | N2UQ)


@torch.no_grad()
def integer_biases(model: nn.Module, folded: Mapping[str, str]) -> dict[str, Tensor]:
    """The nearest biases that an integer kernel can have, with batch norm folded, for the present weights and grids.

    An integer kernel adds products of codes in an accumulator of 32 bits, and the bias on its grid ``s_x * s_w`` (Jacob
    et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
    arXiv 1712.05877, equation 11). The export rounds biases to that grid. A network with these biases has them before.
    Taking them twice changes nothing but the last bits, which the export's own rounding absorbs.

    Args:
        model: a network with quantised layers; it is not changed.
        folded: see :func:`bias_owners`.

    Returns:
        New values, on the CPU, of the biases of :func:`bias_owners` by the name of the module that has them. Layers
        whose quantizers are not fitted, or whose numbers the export would refuse, are left out.
    """
    found: dict[str, Tensor] = {}
    for name, owner in bias_owners(model, folded).items():
        layer, module = cast(QuantizedLayer, model.get_submodule(name)), model.get_submodule(owner)
        factor, bias = folded_parameters(layer, module if isinstance(module, _BatchNorm) else None)
        assert layer.weight_quantizer is not None
        assert layer.input_quantizer is not None
        assert bias is not None
        try:
            weight = weight_codes(layer.weight_quantizer, layer.weight, name)
            held = layer_integers(weight, factor, bias, activation_codes(layer.input_quantizer, name), name)
        except UsageError:  # the training has failed here, or not begun
            continue
        assert held.bias_codes is not None
        assert held.bias_scale is not None
        rounded = held.bias_codes.double() * held.bias_scale.double()
        own = cast(Tensor, module.bias).cpu()
        found[owner] = (own.double() + rounded - bias.cpu().double()).to(own.dtype)
    return found
