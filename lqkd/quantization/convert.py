"""Turning a float network into a quantised one, and telling what was and was not quantised."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.quantization.layers import QUANTIZED_LAYERS, QuantizedLayer
from lqkd.quantization.quantizers import Quantizer
from lqkd.quantization.recipe import FLOAT_BITS, LayerSettings, Recipe, find_quantizer, resolve


@dataclass(frozen=True)
class LayerCoverage:
    """One row of a :class:`CoverageReport`: what happened to a layer with parameters, and why."""

    name: str
    kind: str
    weight_bits: int
    activation_bits: int
    parameters: int
    note: str


@dataclass(frozen=True)
class CoverageReport:
    """What :func:`quantize_model` did to every layer that has parameters, in the order of the network."""

    layers: tuple[LayerCoverage, ...]

    def summary(self) -> str:
        """One line: how many layers are quantised, with how many bits, and how many are not."""
        quantised = [x for x in self.layers if (x.weight_bits, x.activation_bits) != (FLOAT_BITS, FLOAT_BITS)]
        counts = Counter(f"W{x.weight_bits}A{x.activation_bits}" for x in quantised)
        bits = ", ".join(f"{count} {name}" for name, count in counts.most_common())
        ends = f" (first: {quantised[0].name}, last: {quantised[-1].name})" if quantised else ""
        return (
            f"{len(quantised)} layers quantised{ends}: {bits or 'none'}; {len(self.layers) - len(quantised)} in float"
        )

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("layer", "kind", "W", "A", "parameters", "note")]
        for layer in self.layers:
            bits = ["float" if b == FLOAT_BITS else str(b) for b in (layer.weight_bits, layer.activation_bits)]
            rows.append((layer.name, layer.kind, *bits, f"{layer.parameters:,}", layer.note))
        widths = [max(len(row[i]) for row in rows) for i in range(6)]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def quantize_model(model: nn.Module, recipe: Recipe) -> tuple[nn.Module, CoverageReport]:
    """Replace the layers of ``model`` by quantised ones, in place.

    Parameters stay the same objects under the same names: a float checkpoint loads before or after. A module that is
    registered under several names is replaced by one quantised module under all of them, with the settings of its
    first name. Layers that are quantised already are left as they are, so calling twice changes nothing. "First" and
    "last" layer follow the order in which the network registers its layers.

    Args:
        model: any network; quantised layers take the place of its Conv2d and Linear children.
        recipe: which layer gets which quantizer.

    Returns:
        The model itself (a new layer when ``model`` is a single layer) and the report.

    Raises:
        UsageError: when the recipe is not possible, a rule matches nothing, or nothing is there to quantise.
    """
    floats = {name: module for name, module in model.named_modules() if type(module) in QUANTIZED_LAYERS}
    has_quantized = any(isinstance(module, QuantizedLayer) for module in model.modules())
    if not floats and not has_quantized:
        raise UsageError(
            f"{type(model).__name__} has nothing to quantise: it needs at least one layer of type "
            + ", ".join(kind.__name__ for kind in QUANTIZED_LAYERS)
        )
    settings = {}
    if floats:
        settings = resolve(recipe, {name: type(module).__name__ for name, module in floats.items()})
    replacements = {
        id(module): _quantized_layer(name, module, settings[name])
        for name, module in floats.items()
        if (settings[name].weight_bits, settings[name].activation_bits) != (FLOAT_BITS, FLOAT_BITS)
    }
    if id(model) in replacements:
        model = replacements[id(model)]
    else:
        _replace_children(model, replacements)
    return model, coverage(model)


def coverage(model: nn.Module) -> CoverageReport:
    """Report the bits of every layer of ``model`` that owns parameters."""
    return CoverageReport(tuple(_describe(name, module) for name, module in model.named_modules() if _counts(module)))


def _counts(module: nn.Module) -> bool:
    return bool(module._parameters) and not isinstance(module, Quantizer)


def _describe(name: str, module: nn.Module) -> LayerCoverage:
    parameters = sum(p.numel() for p in module._parameters.values() if p is not None)
    if isinstance(module, QuantizedLayer):
        weight, activation = module.weight_quantizer, module.input_quantizer
        kind = type(module).__name__.removeprefix("Quant")
        note = ", ".join(
            f"{what} {type(q).__name__} {'per tensor' if q.channels is None else 'per channel'}"
            for what, q in (("weight", weight), ("input", activation))
            if q is not None
        )
        bits = [FLOAT_BITS if q is None else q.bits for q in (weight, activation)]
        return LayerCoverage(name, kind, bits[0], bits[1], parameters, note)
    if type(module) in QUANTIZED_LAYERS:
        note = "floating point: the recipe says so"
    elif isinstance(module, tuple(QUANTIZED_LAYERS)):
        note = "floating point: a subclass whose forward may differ"
    else:
        note = "floating point: no quantised layer of this kind"
    return LayerCoverage(name, type(module).__name__, FLOAT_BITS, FLOAT_BITS, parameters, note)


def _quantized_layer(name: str, layer: nn.Module, settings: LayerSettings) -> nn.Module:
    kind = QUANTIZED_LAYERS[type(layer)]
    assert isinstance(layer.weight, Tensor)
    weight_quantizer = input_quantizer = None
    try:
        if settings.weight_bits != FLOAT_BITS:
            axis = kind.output_channel_axis
            weight_quantizer = find_quantizer(settings.weight_quantizer)(
                settings.weight_bits,
                signed=True,
                channels=layer.weight.shape[axis] if settings.per_channel else None,
                channel_axis=axis,
            )
        if settings.activation_bits != FLOAT_BITS:
            input_quantizer = find_quantizer(settings.activation_quantizer)(settings.activation_bits, batched=True)
    except UsageError as error:
        raise UsageError(f"layer {name!r}: {error}") from None
    quantized = kind.from_float(layer, weight_quantizer, input_quantizer)
    return quantized.to(layer.weight.device)


def _replace_children(module: nn.Module, replacements: dict[int, nn.Module]) -> None:
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if id(child) in replacements:
                parent._modules[name] = replacements[id(child)]
