"""Leaving a ReLU to the quantizer behind it, which clips at zero itself: one pass over memory less in each direction.

The grid of an activation behind a ReLU begins at zero: what is below is quantised to zero and gets no gradient, with or
without the ReLU, bit for bit. So in training a ReLU is not computed where its result has one reader, a quantised layer;
see :class:`~lqkd.quantization.deferred.DeferredReLU`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as module_hooks
from torch.nn.modules.batchnorm import _BatchNorm

from lqkd.quantization.deferred import DeferredReLU
from lqkd.quantization.graph import trace_with_calls
from lqkd.quantization.layers import QUANTIZED_LAYERS, QuantizedLayer
from lqkd.quantization.moves import is_relu
from lqkd.quantization.ports import Calls
from lqkd.quantization.quantizers import Quantizer

_PLACES, _LEAVES = "_relus_left_to_quantizers", "_leaves_relu"
_SOURCES = (QuantizedLayer, _BatchNorm, *QUANTIZED_LAYERS)
"""Modules whose results nothing else shares memory with, so that a ReLU in place changes nothing else."""


@dataclass(frozen=True)
class _Place:
    """A ReLU by the names of what is around it.

    Attributes:
        source: the module whose result it gets.
        quantizer: what reads its result.
        others: all other modules that take or return what it gets or returns.
    """

    source: str
    quantizer: str
    others: tuple[str, ...]


def leave_relus(model: nn.Module) -> None:
    """Let training passes of ``model`` leave out ReLUs that quantizers compute as well.

    Values and gradients stay the same, bit for bit. A ReLU is computed as before where its result, or what it gets, has
    a second reader in the network or a hook looks at one of them, where the quantizer's grid has negative values or,
    behind a ReLU6, ends above it, in eval mode, and in graphs that are recorded or compiled.

    Args:
        model: a network with quantised layers, in place. One whose training pass cannot be traced stays as it is.
    """
    places = _places(model)
    model.__dict__[_PLACES] = places
    for place in places:
        _hook_up(model.get_submodule(place.source))
    if places and _arrange not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_arrange)


def _places(model: nn.Module) -> list[_Place]:
    try:
        graph, calls = trace_with_calls(model, training=True)
    except Exception:  # the coverage report says why
        return []
    found = (_place(node, model, calls) for node in graph.nodes if node.op == "call_module")
    return [place for place in found if place is not None]


def _place(reader: fx.Node, model: nn.Module, calls: Calls) -> _Place | None:
    """The ReLU whose result ``reader``, a quantised layer, reads alone, and whose argument nothing else reads."""
    layer, name = model.get_submodule(str(reader.target)), str(reader.target)
    if not isinstance(layer, QuantizedLayer) or layer.input_quantizer is None or len(reader.all_input_nodes) != 1:
        return None
    (relu,) = reader.all_input_nodes
    if not is_relu(relu, model) or len(relu.users) != 1 or len(relu.all_input_nodes) != 1:
        return None
    (result,) = relu.all_input_nodes
    source = str(result.target)
    if result.op != "call_module" or len(result.users) != 1 or not isinstance(model.get_submodule(source), _SOURCES):
        return None
    if calls.counts[source] != 1 or calls.counts[name] != 1:
        return None
    tables = (calls.outputs, calls.inputs)
    others = dict.fromkeys(other for node in (result, relu) for table in tables for other in table.get(node, ()))
    return _Place(source, f"{name}.input_quantizer", tuple(other for other in others if other != source))


# Functions of the module, not closures: copies and pickles of the network keep them.
def _arrange(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Before a training pass, tell every module of a place whether its ReLU can be left out now."""
    if not model.training or torch.compiler.is_compiling():
        return
    watched = module_hooks._has_any_global_hook()
    for place in model.__dict__[_PLACES]:
        source, quantizer = _find(model, place.source), _find(model, place.quantizer)
        if source is None:
            continue
        known = isinstance(quantizer, Quantizer) and type(quantizer).forward is Quantizer.forward
        around = (source, quantizer, *(_find(model, name) for name in place.others))
        left = known and not watched and not any(_watched(module) for module in around)
        _hook_up(source)  # modules may have been exchanged since
        source.__dict__[_LEAVES] = left


def _hook_up(source: nn.Module) -> None:
    source.__dict__.setdefault(_LEAVES, False)
    if _defer not in source._forward_hooks.values():
        source.register_forward_hook(_defer)


def _defer(source: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack():
        return None
    left = source.training and source.__dict__[_LEAVES] and type(output) is Tensor
    return DeferredReLU.of(output) if left else None


def _find(model: nn.Module, name: str) -> nn.Module | None:
    module: nn.Module | None = model
    for part in name.split("."):
        module = None if module is None else module._modules.get(part)
    return module


def _watched(module: nn.Module | None) -> bool:
    """Whether a hook of ``module`` sees what goes in or out, or there is no such module."""
    if module is None or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    return any(hook is not _defer for hook in module._forward_hooks.values())
