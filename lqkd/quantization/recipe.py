"""Which layer gets which quantizer and how many bits: presets and ordered rules, last match wins."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from lqkd.errors import UsageError
from lqkd.quantization.quantizers import QUANTIZERS, Quantizer

FLOAT_BITS = 32
"""The number of bits that means "leave it in floating point"."""


@dataclass
class Rule:
    """Settings for the layers whose name or class matches; a field left at null keeps what earlier rules said.

    Attributes:
        match: a layer's name as a glob (``layer1.*``), or a class name (``Conv2d``); of the layer's own class.
        weight_bits: 1 to 8, or 32 for floating point.
        activation_bits: 1 to 8, or 32 for floating point.
        weight_quantizer: a name (``lsq``) or a dotted path to a Quantizer class.
        activation_quantizer: likewise, for the layer's input.
        per_channel: one weight grid per output channel (true) or one for the whole tensor (false).
    """

    match: str
    weight_bits: int | None = None
    activation_bits: int | None = None
    weight_quantizer: str | None = None
    activation_quantizer: str | None = None
    per_channel: bool | None = None


@dataclass
class Recipe:
    """How a network is quantised.

    Attributes:
        bits: weight and activation bits of all layers, e.g. ``w4a4`` or ``w2a32``; 32 is floating point.
        weight_quantizer: quantizer of the weights: a name (``lsq``) or a dotted path to a Quantizer class.
        activation_quantizer: quantizer of the layers' inputs, likewise.
        per_channel: one weight grid per output channel (true) or one for the whole tensor (false).
        first_layer_bits: weight and activation bits of the first layer, 32 for floating point, null for no exception.
        last_layer_bits: weight and activation bits of the last layer, likewise.
        rules: exceptions, in order; each field is taken from the last rule that matches and sets it.
    """

    bits: str = "w4a4"
    weight_quantizer: str = "lsq"
    activation_quantizer: str = "lsq"
    per_channel: bool = True
    first_layer_bits: int | None = 8
    last_layer_bits: int | None = 8
    rules: list[Rule] = field(default_factory=list)


@dataclass(frozen=True)
class LayerSettings:
    """What a recipe says about one layer."""

    weight_bits: int
    activation_bits: int
    weight_quantizer: str
    activation_quantizer: str
    per_channel: bool


def parse_bits(bits: str) -> tuple[int, int]:
    """Weight and activation bits from a text like ``w4a4``.

    Raises:
        UsageError: when the text has another form, or a number is neither 1 to 8 nor 32.
    """
    match = re.fullmatch(r"w(\d+)a(\d+)", bits.lower()) if isinstance(bits, str) else None
    if match is None:
        raise UsageError(f"quantization.bits={bits!r} is not understood: write weight and activation bits like w4a4")
    weight_bits, activation_bits = int(match[1]), int(match[2])
    for number in (weight_bits, activation_bits):
        _check_bits(number, "quantization.bits", bits)
    return weight_bits, activation_bits


def _check_bits(number: int, setting: str, value: object) -> None:
    if not (isinstance(number, int) and (1 <= number <= 8 or number == FLOAT_BITS)):
        raise UsageError(f"{setting}={value!r} is not possible: bits are 1 to 8, or {FLOAT_BITS} for floating point")


def find_quantizer(name: str) -> type[Quantizer]:
    """The quantizer class of a short name or dotted path.

    Raises:
        UsageError: when there is none.
    """
    if name in QUANTIZERS:
        return QUANTIZERS[name]
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute) if module else None
    except (ImportError, AttributeError):
        found = None
    if isinstance(found, type) and issubclass(found, Quantizer):
        return found
    raise UsageError(
        f"quantizer {name!r} is unknown: use {', '.join(sorted(QUANTIZERS))} or the dotted path of a Quantizer class"
    )


def resolve(recipe: Recipe, layers: dict[str, str]) -> dict[str, LayerSettings]:
    """The settings of every layer.

    Args:
        recipe: what the user asked for.
        layers: name to class name of every layer that can be quantised, in the order of the network.

    Raises:
        UsageError: when a rule matches no layer, or a setting is not possible.
    """
    weight_bits, activation_bits = parse_bits(recipe.bits)
    base = LayerSettings(
        weight_bits, activation_bits, recipe.weight_quantizer, recipe.activation_quantizer, recipe.per_channel
    )
    settings = dict.fromkeys(layers, base)
    names = list(layers)
    for position, bits, setting in (
        (0, recipe.first_layer_bits, "first_layer_bits"),
        (-1, recipe.last_layer_bits, "last_layer_bits"),
    ):
        if bits is not None:
            _check_bits(bits, f"quantization.{setting}", bits)
            if names:
                settings[names[position]] = replace(base, weight_bits=bits, activation_bits=bits)
    for rule in recipe.rules:
        matched = [n for n, class_name in layers.items() if fnmatchcase(n, rule.match) or class_name == rule.match]
        if not matched:
            known = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
            raise UsageError(f"quantization rule match={rule.match!r} matches no layer: the layers are {known}")
        changes = {key: value for key, value in vars(rule).items() if key != "match" and value is not None}
        for key in ("weight_bits", "activation_bits"):
            if key in changes:
                _check_bits(changes[key], f"quantization rule {rule.match!r}: {key}", changes[key])
        for name in matched:
            settings[name] = replace(settings[name], **changes)
    for entry in settings.values():
        find_quantizer(entry.weight_quantizer)
        find_quantizer(entry.activation_quantizer)
    return settings
