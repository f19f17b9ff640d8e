"""Quantising what meets in additions and concatenations, at the modules that it comes from."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.quantization.granularity import check_tokens
from lqkd.quantization.ports import Port
from lqkd.quantization.products import OPERANDS
from lqkd.quantization.quantizers import Quantizer
from lqkd.quantization.recipe import Recipe, build_quantizer, check_bits, residual_quantizer
from lqkd.quantization.survey import Survey

_NAMES = ("output_quantizer", "argument_quantizer")


def quantize_joins(model: nn.Module, found: Survey, recipe: Recipe) -> None:
    """Give what meets in joins, and what is read on several grids, a quantizer of ``recipe.residual_bits`` bits.

    Integer kernels add and concatenate integers, so that both sides of a residual connection must be on a grid. The
    network is not rewritten: the module that returns the operand gets a quantizer as its child ``output_quantizer``,
    or the one that takes it as its first argument a child ``argument_quantizer``, and a hook that applies it. A join is
    left in floating point, and listed by the coverage report, when one of its operands passes no module that is called
    exactly once: the result of a function, a parameter, the network's own input.

    Whatever exchanges a module afterwards and keeps its children, as
    :meth:`torch.nn.SyncBatchNorm.convert_sync_batchnorm` does, drops its hooks: the network puts them back before each
    of its forward passes.

    An integer kernel also writes its result on one grid. Where several grids read a result, it gets a quantizer before
    all of them, so that training sees what is deployed: a layer with 4-bit inputs beside an 8-bit addition, as behind
    the first layer of a ResNet, reads the 8-bit values (see :mod:`lqkd.quantization.shared_activations`).

    Args:
        model: a network with quantised layers, in place.
        found: what :func:`~lqkd.quantization.graph.survey` says about it.
        recipe: the number of bits and the quantizer; nothing is done without the first.

    Raises:
        UsageError: when the number of bits or the quantizer is not possible.
    """
    if recipe.residual_bits is None:
        return
    check_bits(recipe.residual_bits, "quantization.residual_bits", recipe.residual_bits)
    wanted = list(found.shared)
    for join in found.joins:
        ports = [port for port in join.ports if port is not None]
        if len(ports) == len(join.ports):
            wanted += [port for port, bits in zip(ports, join.bits, strict=True) if bits is None]
    attach(model, {port: quantizer_at(port, recipe, recipe.residual_bits) for port in wanted})


def quantizer_at(port: Port, recipe: Recipe, bits: int) -> Quantizer:
    """A quantizer for what passes ``port``, as the recipe says.

    Raises:
        UsageError: when it is not possible.
    """
    try:
        quantizer = build_quantizer(residual_quantizer(recipe, f"{port}", bits), bits, batched=True)
        check_tokens(quantizer, None, "value outside of layers")
    except UsageError as error:
        raise UsageError(f"residual_quantizer for the {port}: {error}") from None
    return quantizer


def attach(model: nn.Module, placed: Mapping[Port, Quantizer]) -> None:
    """Let ``model`` apply quantizers at ports, in place; a port that has one keeps it."""
    for port, quantizer in placed.items():
        _attach(model.get_submodule(port.module), port, quantizer.to(_device(model)))
    if placed:
        _watch(model, dict.fromkeys(port.module for port in placed))


def attached(model: nn.Module) -> dict[Port, Quantizer]:
    """The quantizers that :func:`attach` has put at modules of ``model``."""
    return {
        Port(name, output=attribute == _NAMES[0]): quantizer
        for name, module in model.named_modules()
        for attribute in _NAMES
        if isinstance(quantizer := module._modules.get(attribute), Quantizer)
    }


def move_output_quantizer(source: nn.Module, target: nn.Module) -> None:
    """Let ``target``, which takes the place of ``source``, quantise its output as ``source`` did, if it did."""
    quantizer = getattr(source, "output_quantizer", None)
    if isinstance(quantizer, Quantizer):
        _attach(target, Port("", output=True), quantizer)


def quantizers_between(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Owner and attribute of every quantizer that belongs to no layer: of what meets in joins, of what functions read
    and write, and of what attention multiplies."""
    return [
        (module, name)
        for module in model.modules()
        for name in (*_NAMES, *OPERANDS)
        if isinstance(module._modules.get(name), Quantizer)
    ]


def other_places(own: Collection[str], saved: Collection[str]) -> str | None:
    """Why a state does not fit whose quantizers of results are where an earlier version of lqkd put them.

    Args:
        own: the names of the tensors of a network.
        saved: those of a state that is for it.

    Returns:
        ``None`` when they differ in something else, or in nothing, or either has no such quantizer.
    """
    places = [sorted({key.rpartition(".")[0] for key in keys if _is_of_result(key)}) for keys in (own, saved)]
    here, there = ([name for name in names if name not in others] for names, others in (places, places[::-1]))
    others = [key for key in {*own} ^ {*saved} if not _is_of_result(key)]
    if others or not all(places) or not (here or there):
        return None
    difference = f"it has none at {here[0]!r}" if here else f"it has one at {there[0]!r}"
    return (
        f"it quantises results at other places than this version of lqkd ({difference}): take the version, and the "
        "quantization.function_bits, that trained it, or train again"
    )


def _is_of_result(key: str) -> bool:
    return not set(_NAMES).isdisjoint(key.split("."))


def hook_up(modules: Iterable[nn.Module]) -> None:
    """Let every module that has a quantizer for its output or its argument apply it."""
    for module in modules:
        if "output_quantizer" in module._modules and _quantize_output not in module._forward_hooks.values():
            module.register_forward_hook(_quantize_output)
        if "argument_quantizer" in module._modules and _quantize_argument not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_quantize_argument)


def _attach(module: nn.Module, port: Port, quantizer: Quantizer) -> None:
    name = "output_quantizer" if port.output else "argument_quantizer"
    if name in module._modules:  # an operand of several joins
        return
    quantizer.train(module.training)
    module.register_module(name, quantizer)
    hook_up([module])


def _watch(model: nn.Module, names: Collection[str]) -> None:
    """Let ``model`` see before each forward pass that the modules called ``names``, or others in their place, apply
    their quantizers."""
    parents = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
    model.__dict__["_with_quantizers"] = [*model.__dict__.get("_with_quantizers", ()), *parents]
    if _hook_up_again not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_hook_up_again)


# Functions of the module, not closures: copies and pickles of the network keep them.
def _quantize_output(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    quantizer = module._modules["output_quantizer"]
    return output if quantizer is None else quantizer(output)  # type: ignore[no-any-return]


def _quantize_argument(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    quantizer = module._modules["argument_quantizer"]
    return inputs if quantizer is None else (quantizer(inputs[0]), *inputs[1:])


def _hook_up_again(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    children = (parent._modules.get(name) for parent, name in model.__dict__["_with_quantizers"])
    hook_up(child for child in children if child is not None)


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
