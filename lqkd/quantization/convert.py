"""Turning a float network into a quantised one."""

from __future__ import annotations

import sys
from dataclasses import replace

from torch import nn

from lqkd.errors import UsageError
from lqkd.quantization.attention import quantize_attentions
from lqkd.quantization.batchnorm import fold_all
from lqkd.quantization.covered import CoverageReport, covered
from lqkd.quantization.function_grids import check_functions, quantize_functions
from lqkd.quantization.granularity import check_tokens, grids
from lqkd.quantization.graph import survey
from lqkd.quantization.layers import QuantizedLayer
from lqkd.quantization.ports import Port
from lqkd.quantization.quantizable import layer_kind, quantizable, quantized_class
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
from lqkd.quantization.survey import Operation, Survey
from lqkd.quantization.wrappers import wrapper


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
    layers = quantizable(model, found)
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
    left = [operation for operation in functions if (operation.kind, operation.where) not in listed]
    return model, replace(
        covered(model, replace(found, operations=(*found.operations, *left))),
        already_quantised=len(layers) - len(floats),
    )


def _quantize_between(model: nn.Module, recipe: Recipe) -> tuple[Operation, ...]:
    """Quantise what functions read and write, and what meets in joins; returns the functions that are left.

    A join whose operands have got grids is computed on integers, so that functions behind it may find more.
    """
    reached: set[Port] = set()
    while recipe.residual_bits is not None:
        functions = quantize_functions(model, recipe)
        quantize_joins(model, survey(model), recipe)
        if functions.bits.keys() <= reached:
            return functions.left
        reached |= functions.bits.keys()
    return ()


def _weight(layer: nn.Module) -> nn.Parameter:
    return layer.in_proj_weight if isinstance(layer, nn.MultiheadAttention) else layer.weight  # type: ignore[return-value]


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
    kind = type(layer) if isinstance(layer, QuantizedLayer) else quantized_class(layer)
    return kind.weight_axis(layer)


def _attention_needs(name: str, layer: nn.Module, settings: dict[str, LayerSettings], recipe: Recipe) -> bool:
    """Whether ``layer`` is attention in float that must call its output projection, or its products, as quantised."""
    projection = settings.get(f"{name}.out_proj".lstrip("."))
    called = (projection is not None and not projection.is_float) or asks_for_attention(recipe)
    return isinstance(layer, nn.MultiheadAttention) and called


def _quantized_layer(
    name: str, layer: nn.Module, settings: LayerSettings, weight_quantizers: dict[int, Quantizer], calls: int
) -> nn.Module:
    return quantized_class(layer).from_float(layer, *layer_quantizers(name, layer, settings, weight_quantizers, calls))


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
    kind = type(layer) if isinstance(layer, QuantizedLayer) else quantized_class(layer)
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
