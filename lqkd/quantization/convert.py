"""Turning a float network into a quantised one, and telling what was and was not quantised."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import cast

from torch import nn

from lqkd.errors import UsageError
from lqkd.quantization.attention import QuantizedProducts, products_of, quantize_attentions, quantized_products
from lqkd.quantization.batchnorm import fold_all
from lqkd.quantization.computed import computed
from lqkd.quantization.cost import size
from lqkd.quantization.function_grids import FunctionGrids, check_functions, quantize_functions
from lqkd.quantization.granularity import check_tokens, granularity, grids
from lqkd.quantization.graph import survey
from lqkd.quantization.layers import QUANTIZED_LAYERS, QuantizedLayer, quantized_subclass
from lqkd.quantization.ports import Port
from lqkd.quantization.quantizers import LSQ, LevelwiseStep, LSQPowerOfTwo, Quantizer
from lqkd.quantization.quantizers.levelwise import begin_pass
from lqkd.quantization.recipe import (
    FLOAT_BITS,
    LayerSettings,
    Recipe,
    asks_for_attention,
    build_quantizer,
    find_quantizer,
    folds_batch_norm,
    parse_bits,
    resolve,
)
from lqkd.quantization.residual import quantize_joins
from lqkd.quantization.survey import Join, Operation, Survey
from lqkd.quantization.trial import refusal
from lqkd.quantization.wrappers import wrapper
from lqkd.utils.tables import text_table

_NAMED = 3
"""So many layers of a kind are named where all of them stay in floating point."""
_CHOSEN = "floating point: the recipe says so"


@dataclass(frozen=True)
class LayerCoverage:
    """One row of a :class:`CoverageReport`: what happened to a layer with parameters, and why.

    Attributes:
        name: of the layer in its network.
        kind: its class.
        weight_bits, activation_bits: 32 for floating point.
        parameters: their number.
        note: what quantises it, or why nothing does.
        passed_over: whether it has weights (parameters over two axes or more) that the recipe did not leave in floating
            point and that are there nevertheless.
        operations: its share of the multiply-accumulates of a forward pass; ``None`` where they were not counted.

    Examples:
        >>> row = coverage(nn.Sequential(nn.Linear(4, 8))).layers[0]
        >>> row.name, row.kind, row.weight_bits, row.parameters, row.is_float
        ('0', 'Linear', 32, 40, True)
    """

    name: str
    kind: str
    weight_bits: int
    activation_bits: int
    parameters: int
    note: str
    passed_over: bool = False
    operations: float | None = field(default=None, compare=False)

    @property
    def is_float(self) -> bool:
        """Whether nothing of the layer is quantised."""
        return self.weight_bits == self.activation_bits == FLOAT_BITS


@dataclass(frozen=True)
class CoverageReport:
    """What :func:`quantize_model` did to a network.

    Attributes:
        layers: every layer that has parameters, in the order of the network; a module under several names once.
        operations: what is computed in floating point between the layers: additions, concatenations, products.
        joins: the additions and concatenations whose operands are quantised.
        products: the attentions whose products are quantised.
        untraceable: why the operations are not known, but for those in PyTorch's transformer layers; ``None`` when
            all are.
        already_quantised: how many layers were quantised before :func:`quantize_model` was called.
        parameters: of the whole network, each once.
        functions: the values between layers that functions read or write and that have got a grid of their own by
            ``function_bits``, with the bits of each.

    Examples:
        >>> report = coverage(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)))
        >>> report.parameters, [layer.kind for layer in report.layers]
        (56, ['Linear', 'LayerNorm'])
    """

    layers: tuple[LayerCoverage, ...]
    operations: tuple[Operation, ...] = ()
    joins: tuple[Join, ...] = ()
    products: tuple[QuantizedProducts, ...] = ()
    untraceable: str | None = None
    already_quantised: int = field(default=0, compare=False)
    parameters: int = 0
    functions: Mapping[Port, int] = field(default_factory=dict, compare=False)

    def summary(self) -> str:
        """One line: how many layers are quantised, with how many bits, and how many are not."""
        quantised = [x for x in self.layers if not x.is_float]
        counts = Counter(f"W{x.weight_bits}A{x.activation_bits}" for x in quantised)
        bits = ", ".join(f"{count} {name}" for name, count in counts.most_common())
        ends = f" (first: {quantised[0].name}, last: {quantised[-1].name})" if quantised else ""
        line = (
            f"{len(quantised)} layers quantised{ends}: {bits or 'none'}; {len(self.layers) - len(quantised)} in float"
        )
        if self.products:
            own = ", ".join(f"{bits} bits" for bits in dict.fromkeys(products.bits for products in self.products))
            line += f"; products of {len(self.products)} attentions with {own}"
        if self.functions:
            own = ", ".join(f"{bits} bits" for bits in dict.fromkeys(self.functions.values()))
            line += f"; {len(self.functions)} values between layers with {own}"
        return line + (f"; {self.already_quantised} were quantised already" if self.already_quantised else "")

    def with_operations(self, shares: Mapping[str, float]) -> CoverageReport:
        """The same with each layer's share of the operations, as :func:`lqkd.quantization.operation_shares` counts."""
        layers = tuple(replace(layer, operations=shares.get(layer.name)) for layer in self.layers)
        return replace(self, layers=layers)

    def passed_over(self) -> list[str]:
        """A sentence on the layers of each kind that stay in floating point although the recipe has bits for them."""
        groups: dict[tuple[str, str], list[LayerCoverage]] = defaultdict(list)
        for layer in self.layers:
            if layer.passed_over:
                groups[layer.kind, layer.note].append(layer)
        return [self._sentence(*group, layers) for group, layers in groups.items()]

    def _sentence(self, kind: str, note: str, layers: list[LayerCoverage]) -> str:
        names = ", ".join(layer.name or "the network" for layer in layers[:_NAMED])
        names += f" and {len(layers) - _NAMED} more" if len(layers) > _NAMED else ""
        parameters = sum(layer.parameters for layer in layers) / max(self.parameters, 1)
        counted = [layer.operations for layer in layers if layer.operations is not None]
        if not counted:
            return f"{kind} {names} with {parameters:.1%} of the parameters in {note}"
        return (
            f"{kind} {names} with {parameters:.1%} of the parameters and {sum(counted):.1%} of the operations in {note}"
        )

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("layer", "kind", "W", "A", "parameters", "note")]
        for layer in self.layers:
            bits = ["float" if b == FLOAT_BITS else str(b) for b in (layer.weight_bits, layer.activation_bits)]
            rows.append((layer.name, layer.kind, *bits, f"{layer.parameters:,}", layer.note))
        lines = [text_table(rows, left=6)]
        lines += [f"not quantised: {sentence}" for sentence in self.passed_over()]
        lines += [f"quantised: {join}" for join in (*self.joins, *self.products)]
        lines += [f"quantised: {port} with {bits} bits" for port, bits in self.functions.items()]
        lines += [f"not quantised: {operation}" for operation in self.operations]
        if self.untraceable is not None:
            lines.append(
                f"other functional operations are not known: the graph could not be traced ({self.untraceable})"
            )
        return "\n".join(lines)


def quantize_model(model: nn.Module, recipe: Recipe) -> tuple[nn.Module, CoverageReport]:
    """Replace the layers of ``model`` by quantised ones, in place.

    Parameters stay the same objects under the same names: a float checkpoint loads before or after. A module that is
    registered under several names is replaced by one quantised module under all of them, with the settings of its
    first name; layers that share one weight get one weight quantizer. Layers that are quantised already are left as
    they are, so calling twice changes nothing. "First" and "last" layer follow the order in which the network
    registers its layers. Of what is computed outside of layers, the operands of additions and concatenations are
    quantised where the recipe gives ``residual_bits``, and so are results that are read on several grids (see
    :func:`~lqkd.quantization.residual.quantize_joins`), where it gives ``function_bits`` what functions read and write
    (see :func:`~lqkd.quantization.function_grids.quantize_functions`), and where it gives ``attention_bits`` what
    attention multiplies (see :func:`~lqkd.quantization.attention.quantize_attentions`); the report lists the rest.
    Where the recipe folds batch norms, by itself or for its target, those are gone before, and their layers have a new
    weight and a bias: a float checkpoint is loaded before.

    Args:
        model: any network; quantised layers take the place of its convolutions, transposed convolutions, Linear,
            Embedding and MultiheadAttention children, and of their subclasses where a trial run shows that input
            and weight can be exchanged.
        recipe: which layer gets which quantizer.

    Returns:
        The model itself (a new layer when ``model`` is a single layer) and the report.

    Raises:
        UsageError: when the recipe is not possible, a batch norm that it folds would stay, a rule matches nothing,
            layers that share a weight have different settings for it, nothing is there to quantise, rules leave
            everything in floating point, or a part of the network is a wrapper such as that of :func:`torch.compile`,
            ``DataParallel`` or ``AveragedModel``, which would put its own name into every name.

    Examples:
        >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> model, report = quantize_model(network, Recipe("w4a4"))
        >>> model is network, model[2].weight_quantizer.bits
        (True, 4)
        >>> print(report.summary())
        3 layers quantised (first: 0, last: 4): 2 W8A8, 1 W4A4; 0 in float
    """
    for name, module in model.named_modules():
        around = wrapper(module)
        if around is not None:
            then = "call its compile() method" if around == "torch.compile" else "wrap it"
            raise UsageError(
                f"{f'the part {name!r}' if name else 'the network'} was made by {around} and cannot be quantised: give "
                f"the network itself and {then} afterwards, which keeps the names of its layers"
            )
    if "torchvision.models.swin_transformer" in sys.modules:
        from lqkd.quantization.windows import call_window_layers

        call_window_layers(model)
    if folds_batch_norm(recipe):
        fold_all(model)
    found = survey(model)
    check_functions(recipe, found)
    layers = _quantizable(model, found)
    settings = resolve(recipe, {name: layer_kind(module) for name, module in layers.items()})
    if all(entry.is_float for entry in settings.values()) and parse_bits(recipe.bits) != (FLOAT_BITS, FLOAT_BITS):
        raise UsageError(
            f"quantization.bits={recipe.bits!r} has no effect: the rules leave every layer in floating point, which "
            "bits='w32a32' would say"
        )
    floats: dict[str, nn.Module] = {
        name: module for name, module in layers.items() if not isinstance(module, QuantizedLayer)
    }
    _check_tied(layers, settings)
    _check_levels(settings, found)
    weight_quantizers = {
        id(module.weight): module.weight_quantizer
        for module in layers.values()
        if isinstance(module, QuantizedLayer) and module.weight_quantizer is not None
    }
    replacements = {
        id(module): _quantized_layer(name, module, settings[name], weight_quantizers, found.calls.get(name, 1))
        for name, module in floats.items()
        if not settings[name].is_float or _attention_needs(name, module, settings, recipe)
    }
    for parent in [*model.modules(), *replacements.values()]:
        _replace_children(parent, replacements)
    model = replacements.get(id(model), model)
    quantize_attentions(model, recipe)
    levelled = any(isinstance(module, LevelwiseStep) for module in model.modules())
    if levelled and begin_pass not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(begin_pass)
    functions = _quantize_between(model, recipe)
    found = survey(model)
    listed = {(operation.kind, operation.where) for operation in found.operations}
    left = [operation for operation in functions.left if (operation.kind, operation.where) not in listed]
    return model, replace(
        _coverage(model, replace(found, operations=(*found.operations, *left))),
        functions=functions.bits,
        already_quantised=len(layers) - len(floats),
    )


def _quantize_between(model: nn.Module, recipe: Recipe) -> FunctionGrids:
    """Quantise what functions read and write, and what meets in joins.

    A join whose operands have got grids is computed on integers, so that functions behind it may find more.
    """
    bits: dict[Port, int] = {}
    while recipe.residual_bits is not None:
        functions = quantize_functions(model, recipe)
        quantize_joins(model, survey(model), recipe)
        bits.update(functions.bits)
        if not functions.bits:
            return replace(functions, bits=bits)
    return FunctionGrids({}, ())


def quantizable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer of ``model`` that a recipe decides on, quantised already or not, by its first name.

    Raises:
        UsageError: when there is none.
    """
    return _quantizable(model, survey(model))


def _quantizable(model: nn.Module, found: Survey) -> dict[str, nn.Module]:
    refusals = _refusals(model, found)
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


def coverage(model: nn.Module) -> CoverageReport:
    """Report the bits of every layer of ``model`` that owns parameters, and what is computed between them.

    Args:
        model: any network, quantised or not.

    Examples:
        >>> print(coverage(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))))
        layer  kind    W      A      parameters  note
        0      Linear  float  float  40          floating point: the recipe says so
        2      Linear  float  float  18          floating point: the recipe says so
    """
    return _coverage(model, survey(model))


def _coverage(model: nn.Module, found: Survey) -> CoverageReport:
    names = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[id(module)].append(name)
    refusals = _refusals(model, found)
    rows = []
    for name, module in model.named_modules():
        if not module._parameters or isinstance(module, Quantizer):
            continue
        # What a parametrised layer computes its weight from is in modules of their own.
        row = _describe(name, module, refusals.get(name.partition(".parametrizations.")[0]))
        more = [f"also {', '.join(names[id(module)][1:])}"] if len(names[id(module)]) > 1 else []
        if found.calls.get(name, 1) > 1:
            more.append(f"called {found.calls[name]} times")
        rows.append(replace(row, note="; ".join([row.note, *more])))
    if all(row.is_float for row in rows):  # a network that is to stay as it is
        rows = [replace(row, passed_over=False) for row in rows]
    joins = tuple(join for join in found.joins if join.is_quantised)
    return CoverageReport(
        tuple(rows),
        found.operations,
        joins,
        quantized_products(model),
        found.untraceable,
        parameters=size(model).parameters,
    )


def _weight(layer: nn.Module) -> nn.Parameter:
    return layer.in_proj_weight if isinstance(layer, nn.MultiheadAttention) else layer.weight  # type: ignore[return-value]


def _class(layer: nn.Module) -> type[QuantizedLayer]:
    """The quantised class of a float layer that is not refused."""
    known = QUANTIZED_LAYERS.get(type(layer))
    return quantized_subclass(cast(Hashable, type(layer))) if known is None else known


def layer_kind(layer: nn.Module) -> str:
    """The class name of a layer, the same before and after it is quantised."""
    known = QUANTIZED_LAYERS.get(type(layer), type(layer))
    return known.__name__.removeprefix("Quant")


def _refusals(model: nn.Module, found: Survey) -> dict[str, str]:
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


def _check_tied(layers: dict[str, nn.Module], settings: dict[str, LayerSettings]) -> None:
    """Refuse different settings for one weight that belongs to several layers."""
    first: dict[int, str] = {}
    for name, layer in layers.items():
        other = first.setdefault(id(_weight(layer)), name)
        if other == name:
            continue
        mine, theirs = settings[name], settings[other]
        for key in ("weight_bits", "weight_quantizer", "per_channel", "group_size"):
            if getattr(mine, key) != getattr(theirs, key):
                raise UsageError(
                    f"layers {other!r} and {name!r} share one weight but the recipe gives them {key}="
                    f"{getattr(theirs, key)!r} and {getattr(mine, key)!r}: give both the same"
                )
        if mine.per_channel and _axis(layer) != _axis(layers[other]):
            raise UsageError(
                f"layers {other!r} and {name!r} share one weight whose output channels lie on different axes: "
                "give both per_channel=false"
            )


def _check_levels(settings: dict[str, LayerSettings], found: Survey) -> None:
    """Refuse steps by level where no layer has several levels, or nobody knows of any."""
    asked = [name for name, entry in settings.items() if entry.per_level is not None]
    if asked and not any(found.calls.get(name, 1) > 1 for name in asked):
        why = "a pass calls each layer once" if found.untraceable is None else f"no trace tells ({found.untraceable})"
        value = str(settings[asked[0]].per_level).lower()
        raise UsageError(f"quantization.per_level={value} has no effect: {why}; leave it null")


def _axis(layer: nn.Module) -> int:
    kind = type(layer) if isinstance(layer, QuantizedLayer) else _class(layer)
    return kind.weight_axis(layer)


def _attention_needs(name: str, layer: nn.Module, settings: dict[str, LayerSettings], recipe: Recipe) -> bool:
    """Whether ``layer`` is attention in float that must call its output projection, or its products, as quantised."""
    projection = settings.get(f"{name}.out_proj".lstrip("."))
    called = (projection is not None and not projection.is_float) or asks_for_attention(recipe)
    return isinstance(layer, nn.MultiheadAttention) and called


def _describe(name: str, module: nn.Module, refused: str | None) -> LayerCoverage:
    parameters = sum(p.numel() for p in module._parameters.values() if p is not None)
    if isinstance(module, QuantizedLayer):
        weight, activation = module.weight_quantizer, module.input_quantizer
        notes = [
            f"{what} {type(q).__name__} {granularity(q)}"
            for what, q in (("weight", weight), ("input", activation))
            if q is not None
        ]
        notes = notes or [_CHOSEN]
        if isinstance(module, nn.MultiheadAttention) and products_of(module) is None:
            notes.append("attention products in floating point")
        bits = [FLOAT_BITS if q is None else q.bits for q in (weight, activation)]
        return LayerCoverage(name, layer_kind(module), bits[0], bits[1], parameters, ", ".join(notes))
    if refused is not None:
        note = f"floating point: {refused}"
    elif isinstance(module, tuple(QUANTIZED_LAYERS)):
        note = _CHOSEN
    else:
        note = "floating point: no quantised layer of this kind"
    passed_over = note != _CHOSEN and any(_is_weight(p) for p in module._parameters.values() if p is not None)
    return LayerCoverage(name, layer_kind(module), FLOAT_BITS, FLOAT_BITS, parameters, note, passed_over)


def _is_weight(parameter: nn.Parameter) -> bool:
    """Whether it extends over two axes or more; a layer scale of shape (C, 1, 1) does not."""
    return parameter.is_floating_point() and sum(side > 1 for side in parameter.shape) > 1


def _quantized_layer(
    name: str, layer: nn.Module, settings: LayerSettings, weight_quantizers: dict[int, Quantizer], calls: int
) -> nn.Module:
    return _class(layer).from_float(layer, *layer_quantizers(name, layer, settings, weight_quantizers, calls))


def layer_quantizers(
    name: str, layer: nn.Module, settings: LayerSettings, weight_quantizers: dict[int, Quantizer], calls: int = 1
) -> tuple[Quantizer | None, Quantizer | None]:
    """Make the quantizers of the weight and the input of one layer, not fitted yet; None is floating point.

    Args:
        name: the layer's name, for messages.
        layer: the layer, quantised already or not.
        settings: what the recipe says about it.
        weight_quantizers: those made before, by the identity of the weight: a shared weight gets one quantizer.
        calls: how often a pass calls the layer.

    Raises:
        UsageError: when a quantizer has no grid of so many bits, or none for several calls.
    """
    kind = type(layer) if isinstance(layer, QuantizedLayer) else _class(layer)
    weight = _weight(layer)
    input_quantizer = None
    try:
        if settings.weight_bits != FLOAT_BITS and id(weight) not in weight_quantizers:
            shared = grids(layer, weight, settings, kind.weight_axis(layer), layer_kind(layer))
            weight_quantizers[id(weight)] = build_quantizer(
                settings.weight_quantizer, settings.weight_bits, signed=True, **shared
            ).to(weight.device)
        if settings.activation_bits != FLOAT_BITS and kind.quantizes_input:
            input_quantizer = _input_quantizer(settings, calls).to(weight.device)
            check_tokens(input_quantizer, layer, layer_kind(layer))
    except UsageError as error:
        raise UsageError(f"layer {name!r}: {error}") from None
    return weight_quantizers.get(id(weight)), input_quantizer


def _input_quantizer(settings: LayerSettings, calls: int) -> Quantizer:
    kind, arguments = find_quantizer(settings.activation_quantizer)
    if calls == 1 or settings.per_level is None:
        return build_quantizer(settings.activation_quantizer, settings.activation_bits, batched=True)
    if kind is not LSQ:
        raise UsageError(
            f"per_level={str(settings.per_level).lower()} is not possible with activation_quantizer="
            f"{settings.activation_quantizer!r}, and a pass calls it {calls} times: leave per_level null"
            + ("" if issubclass(kind, LSQPowerOfTwo) else ", or use lsq")
        )
    return LevelwiseStep(settings.activation_bits, calls=calls, shared=not settings.per_level, **arguments)


def _replace_children(parent: nn.Module, replacements: dict[int, nn.Module]) -> None:
    for name, child in parent._modules.items():
        if id(child) in replacements:
            parent._modules[name] = replacements[id(child)]
    if isinstance(parent, nn.TransformerEncoderLayer):
        # Its fused inference path reads the float weights of its children; this says that there is none.
        parent.activation_relu_or_gelu = 0
