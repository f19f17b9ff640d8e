"""Which layer gets which quantizer and how many bits: presets and ordered rules, last match wins."""

from __future__ import annotations

import glob
import importlib
import inspect
import re
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from lqkd.errors import UsageError
from lqkd.quantization.quantizers import Q4_0, Q8_0, QUANTIZERS, TQ2_0, Quantizer
from lqkd.quantization.targets import Target, find_target

FLOAT_BITS = 32
"""The number of bits that means "leave it in floating point"."""


TERNARY = "ternary"
BLOCK_FORMATS = {kind.format_name: kind.format_bits for kind in (Q4_0, Q8_0, TQ2_0)}
"""What ``bits`` calls the grids of GGUF files, and their bits: weights only, in blocks, embeddings with 8."""


@dataclass
class Rule:
    """Settings for the layers whose name or class matches; a field left at null keeps what earlier rules said.

    Attributes:
        match: a layer's name as a glob (``layer1.*``), or a class name (``Conv2d``); of the layer's own class.
        weight_bits: 1 to 8, or 32 for floating point.
        activation_bits: 1 to 8, or 32 for floating point.
        weight_quantizer: a name (``lsq``), a dotted path to a Quantizer class, or a mapping of ``name`` (either) and
            arguments.
        activation_quantizer: likewise, for the layer's input.
        per_channel: one weight grid per output channel (true) or one for the whole tensor (false).
        group_size: one weight grid for so many neighbours on the input axis, such as 32, 64 or 128.
        per_level: see :class:`Recipe`.
        attention_bits: 2 to 8 for the products of the attentions whose name or class matches, or 32 for floating point.

    Examples:
        >>> from torch import nn
        >>> from lqkd.quantization import quantize_model
        >>> rules = [Rule("Linear", weight_bits=2), Rule("2", activation_bits=8)]
        >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> model, _ = quantize_model(network, Recipe("w4a4", rules=rules))
        >>> model[2].weight_quantizer.bits, model[2].input_quantizer.bits
        (2, 8)
    """

    match: str
    weight_bits: int | None = None
    activation_bits: int | None = None
    weight_quantizer: str | dict[str, Any] | None = None
    activation_quantizer: str | dict[str, Any] | None = None
    per_channel: bool | None = None
    group_size: int | None = None
    per_level: bool | None = None
    attention_bits: int | None = None


@dataclass
class Recipe:
    """How a network is quantised.

    Attributes:
        bits: weight and activation bits of all layers, e.g. ``w8a8``, ``w4a4`` or ``w2a32`` (32 is floating point),
            or ``ternary``: weights of three values, which take 2 bits, and 8-bit activations; or the grid of a GGUF
            file, on which the weights alone are then trained: ``q4_0`` or the three values of ``tq2_0``, of which
            embeddings and layers of 8 bits get that of ``q8_0``, or ``q8_0``.
        weight_quantizer: quantizer of the weights: a name (``lsq``), a dotted path to a Quantizer class, or
            a mapping of ``name`` (either of them) and arguments, as in ``{name: lsq, initial: mean}``. Null chooses by
            the bits of each layer:
            ``irnet`` for 1 bit, ``twn`` for the 2 bits of ``ternary``, those of a GGUF file's grid, ``lsq`` for all
            others.
        activation_quantizer: quantizer of the layers' inputs, likewise; null is ``react`` for 1 bit, else ``lsq``.
        per_channel: one weight grid per output channel (true) or one for the whole tensor (false); null is true, or
            what the target asks for.
        group_size: one weight grid for so many neighbours on the input axis, such as 32, 64 or 128, of linear layers,
            embeddings and attention; null for none. Convolutions have none: there give it in a rule for the others.
        per_level: of a layer that is called several times in a pass, as a detector's head is for every level of a
            pyramid: a step of its input for each call (true), or one for all whose gradient counts all calls (false);
            null is one whose gradient counts each call by itself, or what the task says. For ``lsq``.
        first_layer_bits: weight and activation bits of the first layer, 32 for floating point, null for no exception.
        last_layer_bits: weight and activation bits of the last layer, likewise.
        residual_bits: bits of what meets in additions and concatenations, as residual connections have them, and of
            results that several layers or additions read; null leaves those in floating point and lists the additions.
        function_bits: bits of what functions between layers read and write, as hard swish, SiLU and GELU, the products
            of squeeze and excitation and means do, which a file has on grids in any case; with ``residual_bits``. Null
            leaves those in floating point, and the export fits their grids.
        residual_quantizer: quantizer of both; signed or not is decided from their data. Null is ``lsq``, or what the
            target asks for.
        attention_bits: bits of what attention multiplies, queries, keys, values and the softmax, each on a grid of its
            own by ``lsq`` or what the target asks for, so that a file multiplies whole numbers there, too; null leaves
            both products in floating point.
        target: a runtime whose arithmetic asks something of all grids, which are then trained under it: ``tensorrt``,
            whose activations are signed 8-bit codes with zero in the middle; ``power_of_two``, fixed-point hardware:
            every scale is a power of two and of a whole tensor, zero points are zero, and batch norms are folded;
            ``ncnn``, whose codes are from -127 to 127, so that 8 bits are signed. Null for none: other files take all
            grids.
        fold_batch_norm: whether batch norms are folded into the layers before them, with the statistics that they
            have, before these are quantised; true is for students that are trained already. Batch norm gives each
            channel a factor of its own, so that without it ``per_channel: false`` is true of the deployed network too.
            Null is false, or what the target asks for.
        rules: exceptions, in order; each field is taken from the last rule that matches and sets it.

    Examples:
        >>> from torch import nn
        >>> from lqkd.quantization import quantize_model
        >>> recipe = Recipe("w2a4", first_layer_bits=8, last_layer_bits=None)
        >>> _, report = quantize_model(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), recipe)
        >>> print(report.summary())
        2 layers quantised (first: 0, last: 2): 1 W8A8, 1 W2A4; 0 in float
    """

    bits: str = "w4a4"
    weight_quantizer: str | dict[str, Any] | None = None
    activation_quantizer: str | dict[str, Any] | None = None
    per_channel: bool | None = None
    group_size: int | None = None
    per_level: bool | None = None
    first_layer_bits: int | None = 8
    last_layer_bits: int | None = 8
    residual_bits: int | None = None
    function_bits: int | None = None
    residual_quantizer: str | dict[str, Any] | None = None
    attention_bits: int | None = None
    target: str | None = None
    fold_batch_norm: bool | None = None
    rules: list[Rule] = field(default_factory=list)


@dataclass(frozen=True)
class LayerSettings:
    """What a recipe says about one layer."""

    weight_bits: int
    activation_bits: int
    weight_quantizer: str | dict[str, Any]
    activation_quantizer: str | dict[str, Any]
    per_channel: bool
    group_size: int | None = None
    per_level: bool | None = None

    @property
    def is_float(self) -> bool:
        """Whether the layer stays as it is."""
        return self.weight_bits == self.activation_bits == FLOAT_BITS


def parse_bits(bits: str) -> tuple[int, int]:
    """Weight and activation bits from a text like ``w4a4``, or ``ternary``, or the grid of a file such as ``q4_0``.

    Raises:
        UsageError: when the text has another form, or a number is neither 1 to 8 nor 32.
    """
    text = bits if isinstance(bits, str) else ""
    if text == TERNARY:
        return 2, 8
    if text in BLOCK_FORMATS:
        return BLOCK_FORMATS[text], FLOAT_BITS
    if text.lower() in (TERNARY, *BLOCK_FORMATS):
        raise UsageError(f"quantization.bits={bits!r} is not possible: write {text.lower()}")
    match = re.fullmatch(r"w(\d+)a(\d+)", text.lower())
    if match is None:
        raise UsageError(
            f"quantization.bits={bits!r} is not understood: write weight and activation bits like w4a4, or "
            + ", ".join((TERNARY, *BLOCK_FORMATS))
        )
    weight_bits, activation_bits = int(match[1]), int(match[2])
    for number in (weight_bits, activation_bits):
        check_bits(number, "quantization.bits", bits)
    return weight_bits, activation_bits


def check_bits(number: int, setting: str, value: object) -> None:
    """Refuse a number of bits that is neither 1 to 8 nor :data:`FLOAT_BITS`.

    Raises:
        UsageError: which names the ``setting`` and its ``value``.
    """
    if not (isinstance(number, int) and (1 <= number <= 8 or number == FLOAT_BITS)):
        raise UsageError(f"{setting}={value!r} is not possible: bits are 1 to 8, or {FLOAT_BITS} for floating point")


def find_quantizer(spec: str | dict[str, Any]) -> tuple[type[Quantizer], dict[str, Any]]:
    """The class and further arguments of a quantizer.

    Args:
        spec: a short name, a dotted path, or a mapping of ``name`` (either) and further arguments.

    Raises:
        UsageError: when there is no such quantizer, or the mapping has no name.
    """
    # Not class_path and init_args, which the command line would resolve itself, knowing no short names.
    arguments = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = arguments.pop("name", None)
    if not isinstance(name, str):
        raise UsageError(f"quantizer {spec!r} is not understood: write a name, or a mapping of name and arguments")
    if name in QUANTIZERS:
        return QUANTIZERS[name], arguments
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute) if module else None
    except (ImportError, AttributeError):
        found = None
    if isinstance(found, type) and issubclass(found, Quantizer):
        return found, arguments
    raise UsageError(
        f"quantizer {name!r} is unknown: use {', '.join(sorted(QUANTIZERS))} or the dotted path of a Quantizer class"
    )


def build_quantizer(spec: str | dict[str, Any], bits: int, **arguments: Any) -> Quantizer:
    """Make a quantizer of ``bits`` bits.

    Args:
        spec: see :func:`find_quantizer`.
        arguments: what the layer determines: ``signed``, ``channels``, ``channel_axis``, ``batched``, ``group_size``.

    Raises:
        UsageError: when the quantizer has no grid of so many bits or does not take its arguments.
    """
    kind, more = find_quantizer(spec)
    if arguments.get("group_size") is None:
        arguments.pop("group_size", None)
    elif "group_size" not in inspect.signature(kind).parameters:
        able = ", ".join(name for name, own in QUANTIZERS.items() if "group_size" in inspect.signature(own).parameters)
        raise UsageError(
            f"group_size={arguments['group_size']} is not possible with quantizer {kind.__name__}, which has no "
            f"groups: use {able}"
        )
    reserved = sorted({"bits", "group_size", *arguments} & more.keys())
    if reserved:
        raise UsageError(f"argument {', '.join(reserved)} of quantizer {kind.__name__} cannot be set: layers set it")
    try:
        return kind(bits, **arguments, **more).float()  # whatever the default dtype is, as within bf16-true
    except TypeError as error:
        raise UsageError(f"quantizer {kind.__name__} does not take {more!r}: {error}") from None


def exactly(name: str) -> str:
    """The ``match`` of a rule for the layer called ``name`` alone, whatever characters are in its name."""
    escaped = glob.escape(name)
    # A name without a dot could also be that of a class, which a pattern never is.
    return f"[{escaped[0]}]{escaped[1:]}" if escaped[:1].isupper() and "." not in escaped else escaped


def resolve(recipe: Recipe, layers: dict[str, str]) -> dict[str, LayerSettings]:
    """The settings of every layer.

    Args:
        recipe: what the user asked for.
        layers: name to class name of every layer that can be quantised, in the order of the network.

    Raises:
        UsageError: when a rule matches no layer, or a setting is not possible.
    """
    weight_bits, activation_bits = parse_bits(recipe.bits)
    in_blocks = recipe.bits in BLOCK_FORMATS
    if in_blocks:
        _check_free(recipe)
    base: dict[str, Any] = {
        "weight_bits": weight_bits,
        "activation_bits": activation_bits,
        "weight_quantizer": recipe.weight_quantizer,
        "activation_quantizer": recipe.activation_quantizer,
        "per_channel": recipe.per_channel,
        "group_size": recipe.group_size,
        "per_level": recipe.per_level,
    }
    settings = {name: dict(base) for name in layers}
    for name in (name for name, kind in layers.items() if in_blocks and kind == "Embedding"):
        settings[name].update(weight_bits=8)
    names = list(layers)
    for position, bits, setting in (
        (0, recipe.first_layer_bits, "first_layer_bits"),
        (-1, recipe.last_layer_bits, "last_layer_bits"),
    ):
        if bits is not None:
            check_bits(bits, f"quantization.{setting}", bits)
            if names:
                settings[names[position]].update(
                    weight_bits=bits, activation_bits=activation_bits if in_blocks else bits
                )
    for rule in recipe.rules:
        changes = {key: value for key, value in vars(rule).items() if key in base and value is not None}
        if rule.attention_bits is not None and not changes:
            continue  # resolve_attentions
        matched = _matched(rule, layers, "layer")
        for key in ("weight_bits", "activation_bits"):
            if key in changes:
                check_bits(changes[key], f"quantization rule {rule.match!r}: {key}", changes[key])
        for name in matched:
            settings[name].update(changes)
    target = find_target(recipe.target)
    return {name: _complete(name, entry, recipe.bits, target) for name, entry in settings.items()}


def resolve_attentions(recipe: Recipe, attentions: dict[str, str]) -> dict[str, int]:
    """The bits of the products of every attention, 32 for floating point.

    Args:
        recipe: what the user asked for.
        attentions: name to class name of every attention whose products can be quantised.

    Raises:
        UsageError: when there are bits and no attention, a rule matches none, or a number of bits is not possible.
    """
    bits = dict.fromkeys(attentions, FLOAT_BITS)
    if recipe.attention_bits is not None:
        check_bits(recipe.attention_bits, "quantization.attention_bits", recipe.attention_bits)
        if not attentions:
            raise UsageError(
                f"quantization.attention_bits={recipe.attention_bits} has no effect: no part of the network calls "
                "scaled_dot_product_attention in its forward, nor is one an nn.MultiheadAttention that can be "
                "quantised; leave it null"
            )
        bits = dict.fromkeys(attentions, recipe.attention_bits)
    for rule in recipe.rules:
        if rule.attention_bits is not None:
            check_bits(rule.attention_bits, f"quantization rule {rule.match!r}: attention_bits", rule.attention_bits)
            bits.update(dict.fromkeys(_matched(rule, attentions, "attention"), rule.attention_bits))
    return bits


def asks_for_attention(recipe: Recipe) -> bool:
    """Whether a recipe says something about the products of attention."""
    return recipe.attention_bits is not None or any(rule.attention_bits is not None for rule in recipe.rules)


def _matched(rule: Rule, parts: dict[str, str], what: str) -> list[str]:
    """The names of those of ``parts``, name to class name, that a rule is for."""
    matched = [name for name, kind in parts.items() if fnmatchcase(name, rule.match) or kind == rule.match]
    if not matched:
        known = ", ".join([*parts][:6]) + (", ..." if len(parts) > 6 else "")
        raise UsageError(f"quantization rule match={rule.match!r} matches no {what}: the {what}s are {known or 'none'}")
    return matched


def attention_quantizer(recipe: Recipe, operand: str, bits: int, signed: bool) -> Quantizer:
    """The quantizer of one operand of attention's products.

    Raises:
        UsageError: when it is not possible, also with the target.
    """
    target = find_target(recipe.target)
    default = "lsq" if target is None or target.quantizer is None else target.quantizer
    spec = _constrained(target, default, bits, operand)
    decided = isinstance(spec, dict) and "signed" in spec  # by the target
    try:
        return build_quantizer(spec, bits, batched=True, **({} if decided else {"signed": signed}))
    except UsageError as error:
        raise UsageError(f"attention_bits={bits} of the {operand}: {error}") from None


def residual_quantizer(recipe: Recipe, place: str, bits: int) -> str | dict[str, Any]:
    """The quantizer of ``bits`` bits of what a ``place`` brings to a join or a function.

    Raises:
        UsageError: when it is not possible with the target.
    """
    target = find_target(recipe.target)
    default = "lsq" if target is None or target.quantizer is None else target.quantizer
    spec = default if recipe.residual_quantizer is None else recipe.residual_quantizer
    return _constrained(target, spec, bits, place)


def folds_batch_norm(recipe: Recipe) -> bool:
    """Whether batch norms are folded into the layers before them before these are quantised.

    Raises:
        UsageError: when the recipe refuses what its target asks for.
    """
    target = find_target(recipe.target)
    if target is None or not target.folds_batch_norm:
        return bool(recipe.fold_batch_norm)
    if recipe.fold_batch_norm is False:
        raise UsageError(
            f"quantization.fold_batch_norm=False is not possible with target={target.name!r}: batch norm gives each "
            "channel a scale of its own; leave it out"
        )
    return True


def _constrained(target: Target | None, spec: str | dict[str, Any], bits: int, place: str) -> str | dict[str, Any]:
    if target is None:
        return spec
    kind, arguments = find_quantizer(spec)
    name = spec if isinstance(spec, str) else spec["name"]
    return {"name": name, **target.constrained(kind, arguments, bits, place)}


def _check_free(recipe: Recipe) -> None:
    """Refuse what the grid of a file decides by itself."""
    for setting, other in (("weight_quantizer", None), ("group_size", None), ("per_channel", True)):
        if getattr(recipe, setting) not in (None, other):
            raise UsageError(
                f"quantization.{setting}={getattr(recipe, setting)!r} is not possible with bits={recipe.bits!r}, "
                "which decides it: leave it out, or write bits like w4a32"
            )


def _complete(name: str, entry: dict[str, Any], bits: str, target: Target | None) -> LayerSettings:
    """Choose the quantizers that nobody chose, by the target and the number of bits, and hold all to the target."""
    if entry["weight_quantizer"] is None and bits in BLOCK_FORMATS:
        known = {own: name for name, own in BLOCK_FORMATS.items()} | {FLOAT_BITS: "lsq"}
        if entry["weight_bits"] not in known:
            raise UsageError(
                f"weight_bits={entry['weight_bits']} of layer {name!r} is not possible with bits={bits!r}: a GGUF "
                f"file's grids have {', '.join(map(str, sorted(known)))} bits"
            )
        entry["weight_quantizer"] = known[entry["weight_bits"]]
    for_all_bits = None if target is None else target.quantizer
    if entry["weight_quantizer"] is None:
        by_bits = {1: "irnet", 2: "twn"} if bits == TERNARY else {1: "irnet"}
        entry["weight_quantizer"] = for_all_bits or by_bits.get(entry["weight_bits"], "lsq")
    if entry["activation_quantizer"] is None:
        entry["activation_quantizer"] = for_all_bits or ("react" if entry["activation_bits"] == 1 else "lsq")
    if entry["per_channel"] is None:
        entry["per_channel"] = target is None or target.per_channel
    if entry["per_level"] not in (None, True, False):
        raise UsageError(f"per_level={entry['per_level']!r} of layer {name!r} is not possible: true, false or null")
    weights, _ = find_quantizer(entry["weight_quantizer"])
    find_quantizer(entry["activation_quantizer"])
    if target is not None:
        target.check_weights(weights, (entry["weight_bits"], entry["activation_bits"]), entry, f"layer {name!r}")
        entry["activation_quantizer"] = _constrained(
            target, entry["activation_quantizer"], entry["activation_bits"], f"input of layer {name!r}"
        )
    return LayerSettings(**entry)
