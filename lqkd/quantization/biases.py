"""Biases that an integer kernel can have: whole numbers on the grid of its accumulator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from lqkd.errors import UsageError
from lqkd.quantization.accumulator import layer_integers
from lqkd.quantization.batchnorm import folded_parameters, is_activated
from lqkd.quantization.codes import activation_codes, is_exactly_uniform, weight_codes
from lqkd.quantization.graph import trace
from lqkd.quantization.layers import QuantizedLayer
from lqkd.quantization.moves import clamps, moves
from lqkd.quantization.norms import is_batch_norm
from lqkd.quantization.quantizers import N2UQ, APoT, Dynamic, LevelwiseStep, Quantizer, ReAct

_TIE = 4e-6
"""How near to half way, relative to the value in steps, floating point decides on the side."""
_MOST_SUMS = 4096
"""Between two neighbouring levels and the ends of a grid; where more sums fall, none is frequent."""
_FARTHEST = 8


def bias_owners(model: nn.Module, folded: Mapping[str, str]) -> dict[str, str]:
    """Name of each layer whose bias is a whole number in an integer kernel to that of the module with the parameter.

    That is the batch norm that is folded into the layer, or the layer itself. Layers are left out whose weight or input
    is in floating point or on uneven levels, whose weight has a grid per group of inputs, or whose input has no
    quantizer of its own, and those whose bias is another's too: their biases stay as they are.

    Args:
        model: a network with quantised layers.
        folded: name of each batch norm that is folded to that of its layer, as
            :func:`~lqkd.quantization.batchnorm.foldable` finds them.
    """
    norms: dict[str, str] = {layer: norm for norm, layer in folded.items()}
    modules = dict(model.named_modules())
    shared = Counter(id(p) for module in modules.values() for p in module._parameters.values() if p is not None)
    owners: dict[str, str] = {}
    for name, layer in modules.items():
        owner = norms.get(name, "") or name
        bias = getattr(modules[owner], "bias", None)
        if _has_integer_bias(layer) and isinstance(bias, Tensor) and shared[id(bias)] == 1:
            owners[name] = owner
    return owners


def _has_integer_bias(layer: nn.Module) -> bool:
    if not isinstance(layer, QuantizedLayer) or not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return False
    weight, activation = layer.weight_quantizer, layer.input_quantizer
    even = weight is not None and weight.group_size is None and is_exactly_uniform(weight)
    unequal = APoT | N2UQ | Dynamic | LevelwiseStep
    return even and activation is not None and not isinstance(activation, unequal)


@torch.no_grad()
def integer_biases(model: nn.Module, folded: Mapping[str, str]) -> dict[str, Tensor]:
    """The nearest biases that an integer kernel can have, with batch norm folded, for the present weights and grids.

    An integer kernel adds products of codes in an accumulator of 32 bits, and the bias on its grid ``s_x * s_w`` (Jacob
    et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
    arXiv 1712.05877, equation 11). The export rounds biases to that grid. A network with these biases has them before.
    Taking them twice changes nothing but the last bits, which the export's own rounding absorbs.

    A sum in the accumulator that the next grid rounds exactly half way is rounded up here and down there, depending on
    the order in which floating point has added; a single one that is frequent changes the class of many images. Where
    the nearest whole number leads to such sums, the nearest of the others that does not is taken.

    Args:
        model: a network with quantised layers; it is not changed.
        folded: see :func:`bias_owners`.

    Returns:
        New values, on the CPU, of the biases of :func:`bias_owners` by the name of the module that has them. Layers
        whose quantizers are not fitted, or whose numbers the export would refuse, are left out.
    """
    found: dict[str, Tensor] = {}
    readers = _readers(model)
    for name, owner in bias_owners(model, folded).items():
        layer, module = cast(QuantizedLayer, model.get_submodule(name)), model.get_submodule(owner)
        factor, bias = folded_parameters(layer, cast(Any, module) if is_batch_norm(module) else None)
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
        scale = held.bias_scale.double()
        rounded = _clear(held.bias_codes.double(), scale, held.multiplier, readers.get(name, [])) * scale
        own = cast(Tensor, module.bias).cpu()
        found[owner] = (own.double() + rounded - bias.cpu().double()).to(own.dtype)
    return found


def _clear(codes: Tensor, scale: Tensor, multiplier: int, readers: list[Quantizer]) -> Tensor:
    """The whole numbers nearest to ``codes``, (channels,), that lead to no sum half way between levels of readers."""
    chosen, unclear = codes.clone(), torch.ones_like(codes, dtype=torch.bool)
    for offset in sorted(range(-_FARTHEST, _FARTHEST + 1), key=abs):
        ties = torch.zeros_like(unclear)
        for reader in readers:
            ties |= _ties(codes + offset, scale, multiplier, reader)
        chosen = torch.where(unclear & ~ties, codes + offset, chosen)
        unclear = unclear & ties
        if not unclear.any():
            break
    return chosen


def _ties(codes: Tensor, scale: Tensor, multiplier: int, reader: Quantizer) -> Tensor:
    """For each channel whether a sum ``multiplier * k + code`` is half way between two levels of ``reader``."""
    numbers = activation_codes(reader, "")
    assert numbers is not None
    ratio = scale / numbers.scale.double().cpu()  # steps of the reader's grid to a step of the accumulator
    low, high = numbers.low - numbers.zero_point - 1, numbers.high - numbers.zero_point + 1
    count = (high - low) / (ratio * multiplier)
    reach = int(count.clamp_max(_MOST_SUMS).max()) + 1
    first = ((low / ratio - codes) / multiplier).ceil()
    sums = (first.unsqueeze(1) + torch.arange(reach)) * multiplier + codes.unsqueeze(1)
    steps = sums * ratio.unsqueeze(1)
    inside = (steps > low) & (steps < high)
    near = (steps - steps.floor() - 0.5).abs() < _TIE * steps.abs().clamp_min(1)
    return (near & inside).any(1) & (count <= _MOST_SUMS)


def _readers(model: nn.Module) -> dict[str, list[Quantizer]]:
    """The fitted quantizers on even levels that round the result of each layer, by its name."""
    graph = trace(model)

    def behind(node: fx.Node) -> list[Quantizer]:
        module: Any = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        own = _argument_quantizer(getattr(module, "act", None)) if is_activated(module) else None
        own = getattr(module, "output_quantizer", None) if own is None else own
        if own is not None:
            return [own]
        return [quantizer for user in node.users for quantizer in reading(user)]

    def reading(node: fx.Node) -> list[Quantizer]:
        module: Any = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, Quantizer):
            return [module]
        own = _argument_quantizer(module)
        if own is not None:
            return [own]
        if isinstance(module, QuantizedLayer):
            return [] if module.input_quantizer is None else [module.input_quantizer]
        passes = is_batch_norm(module) or clamps(node, model) or moves(node, model)
        return behind(node) if passes else []

    found = {str(node.target): behind(node) for node in graph.nodes if node.op == "call_module"}
    return {
        name: [
            q
            for q in quantizers
            if q.is_ready and q.channels is None and not isinstance(q, APoT | Dynamic | LevelwiseStep | N2UQ | ReAct)
        ]
        for name, quantizers in found.items()
        if isinstance(model.get_submodule(name), QuantizedLayer)
    }


def _argument_quantizer(module: Any) -> Quantizer | None:
    return None if module is None else module._modules.get("argument_quantizer")
