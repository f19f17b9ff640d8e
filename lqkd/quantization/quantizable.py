"""Which layers of a network can be quantised, and why the others cannot."""

from __future__ import annotations

from collections.abc import Hashable
from typing import cast

from torch import nn

from lqkd.errors import UsageError
from lqkd.quantization.computed import computed
from lqkd.quantization.graph import survey
from lqkd.quantization.layers import QUANTIZED_LAYERS, QuantizedLayer, quantized_subclass
from lqkd.quantization.survey import Survey
from lqkd.quantization.trial import refusal


def quantizable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer of ``model`` that a recipe decides on, quantised already or not, by its first name.

    Raises:
        UsageError: when there is none.
    """
    return quantizable(model, survey(model))


def quantizable(model: nn.Module, found: Survey) -> dict[str, nn.Module]:
    refusals = refusals_of(model, found)
    layers: dict[str, nn.Module] = {
        name: cast(nn.Module, module)
        for name, module in model.named_modules()
        if isinstance(module, (QuantizedLayer, *QUANTIZED_LAYERS)) and name not in refusals
    }
    if not layers:
        reasons = f" ({next(iter(refusals))}: {next(iter(refusals.values()))})" if refusals else ""
        raise UsageError(
            f"{type(model).__name__} has nothing to quantise{reasons}: it needs at least one layer of type "
            + ", ".join(dict.fromkeys(kind.__name__.removeprefix("Quant") for kind in QUANTIZED_LAYERS.values()))
        )
    return layers


def quantized_class(layer: nn.Module) -> type[QuantizedLayer]:
    """The quantised class of a float layer that is not refused."""
    known = QUANTIZED_LAYERS.get(type(layer))
    return quantized_subclass(cast(Hashable, type(layer))) if known is None else known


def layer_kind(layer: nn.Module) -> str:
    """The class name of a layer, the same before and after it is quantised."""
    known = QUANTIZED_LAYERS.get(type(layer), type(layer))
    return known.__name__.removeprefix("Quant")


def refusals_of(model: nn.Module, found: Survey) -> dict[str, str]:
    """Names of the layers that would be quantised but cannot be, and why."""
    refused: dict[str, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, tuple(QUANTIZED_LAYERS)) or isinstance(module, QuantizedLayer):
            continue
        reason = _reason(name, cast(nn.Module, module), found)
        if reason is not None:
            refused.setdefault(name, reason)
            if isinstance(module, nn.MultiheadAttention):
                refused[f"{name}.out_proj".lstrip(".")] = "part of attention that is not quantised"
    return refused


def _reason(name: str, layer: nn.Module, found: Survey) -> str | None:
    """Why a layer of a known class, or of a subclass of one, cannot be quantised."""
    changed = computed(layer)
    if changed is not None:
        return changed
    if type(layer) not in QUANTIZED_LAYERS:
        return refusal(layer)
    if isinstance(layer, nn.Embedding) and (layer.max_norm is not None or layer.sparse):
        return "an embedding with max_norm or sparse gradients changes its table in place"
    if isinstance(layer, nn.MultiheadAttention) and layer.in_proj_weight is None:
        return "attention whose key or value has another width than its query"
    if name in found.bypassed:
        return f"its weight is read by {found.bypassed[name] or 'the network'}, which does not call the layer"
    return None
