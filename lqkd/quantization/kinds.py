"""What each node of a traced network computes, by the vocabulary of placement, as far as it is known without shapes."""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import fx, nn

from lqkd.quantization.layers import QUANTIZED_LAYERS, QuantizedLayer
from lqkd.quantization.moves import RELUS, clamps, is_identity, moves
from lqkd.quantization.norms import is_batch_norm
from lqkd.quantization.placement import ISLAND
from lqkd.quantization.quantizers import Quantizer

ACTIVATIONS: dict[Any, str] = {
    nn.Hardswish: "HardSwish",
    F.hardswish: "HardSwish",
    nn.Hardsigmoid: "HardSigmoid",
    F.hardsigmoid: "HardSigmoid",
    nn.Sigmoid: "Sigmoid",
    torch.sigmoid: "Sigmoid",
    F.sigmoid: "Sigmoid",
    "sigmoid": "Sigmoid",
    "sigmoid_": "Sigmoid",
    nn.SiLU: "SiLU",
    F.silu: "SiLU",
    nn.Tanh: "Tanh",
    torch.tanh: "Tanh",
    "tanh": "Tanh",
    nn.LeakyReLU: "LeakyRelu",
    F.leaky_relu: "LeakyRelu",
    nn.ELU: "Elu",
    F.elu: "Elu",
    nn.GELU: "Gelu",
    F.gelu: "Gelu",
}
"""Functions of each number that are no clamps, and what files call them."""
PAIRS: dict[Any, str] = {
    operator.add: "add",
    operator.iadd: "add",
    torch.add: "add",
    "add": "add",
    "add_": "add",
    operator.mul: "mul",
    operator.imul: "mul",
    torch.mul: "mul",
    "mul": "mul",
    "mul_": "mul",
}
"""Additions and products."""
_CHUNKS: tuple[Any, ...] = (torch.chunk, "chunk", torch.split, "split")
_UNBOUND: tuple[Any, ...] = (torch.unbind, "unbind")
_AVERAGES = (nn.AvgPool2d, nn.AdaptiveAvgPool2d, F.avg_pool2d, F.adaptive_avg_pool2d, torch.mean, "mean")
_KINDS: dict[str, tuple[Any, ...]] = {
    "activation": tuple(ACTIVATIONS),
    **{kind: tuple(target for target, other in PAIRS.items() if other == kind) for kind in ("add", "mul")},
    "cat": (torch.cat, torch.concat),
    "avgpool": _AVERAGES,
    "chunks": _CHUNKS,
    "unbound": _UNBOUND,
}
_ENDS = {"placeholder": "input", "get_attr": "constant", "output": "output"}


def kind_of(node: fx.Node, model: nn.Module) -> str:
    """The kind of what ``node`` computes.

    Files have more to say about an operation, such as its axes, and refuse what they have no form of
    (:func:`lqkd.export.operations.operation`); here that is an island, as all that has no integer form.

    Args:
        node: of a graph of ``model``, that is no size.
        model: the network.
    """
    if node.op in _ENDS:
        return _ENDS[node.op]
    module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
    if module is None:
        return _kind_of_function(node, node.target, model)
    if isinstance(module, Quantizer):
        return "grid"
    if isinstance(module, (QuantizedLayer, *QUANTIZED_LAYERS)):
        return "layer"
    return "norm" if is_batch_norm(module) else _kind_of_function(node, type(module), model)


def _kind_of_function(node: fx.Node, target: Any, model: nn.Module) -> str:
    if target is operator.getitem and node.all_input_nodes[0].target in (*_CHUNKS, *_UNBOUND):
        return "part"
    if target in (nn.Upsample, F.interpolate):
        return "nearest" if _mode(node, model) == "nearest" else "resize"
    if is_identity(target) or (target == "to" and not node.kwargs):
        return "identity"
    if clamps(node, model):
        return "relu" if target in RELUS else "clamp"
    known = next((kind for kind, targets in _KINDS.items() if target in targets), None)
    return known or ("reshape" if moves(node, model) else ISLAND)


def _mode(node: fx.Node, model: nn.Module) -> str:
    if node.op == "call_module":
        return str(cast(nn.Upsample, model.get_submodule(str(node.target))).mode)
    return str(
        node.args[3] if len(node.args) > len(("input", "size", "scale_factor")) else node.kwargs.get("mode", "nearest")
    )
