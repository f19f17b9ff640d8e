"""What a network computes between its layers, read from a symbolic trace that leaves the network untouched."""

from __future__ import annotations

import copy
import operator
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lqkd.quantization.layers import QUANTIZED_LAYERS, QuantizedLayer
from lqkd.quantization.trial import PRODUCTS

_FUNCTIONS: dict[Any, str] = {
    operator.add: "add",
    operator.iadd: "add",
    torch.add: "add",
    operator.mul: "mul",
    operator.imul: "mul",
    torch.mul: "mul",
    operator.matmul: "matmul",
    torch.matmul: "matmul",
    torch.bmm: "matmul",
    torch.baddbmm: "matmul",
    torch.einsum: "einsum",
    torch.cat: "cat",
    torch.concat: "cat",
    torch.stack: "cat",
    F.scaled_dot_product_attention: "attention product",
    F.multi_head_attention_forward: "attention",
    **dict.fromkeys(PRODUCTS, "product with a weight"),
}
_METHODS = {"add": "add", "add_": "add", "mul": "mul", "mul_": "mul", "matmul": "matmul", "bmm": "matmul"}
_OPAQUE: dict[type[nn.Module], int] = {nn.TransformerEncoderLayer: 2, nn.TransformerDecoderLayer: 3}
"""Modules that a trace does not look into, and their residual additions."""
_PAIRS = ("add", "mul")
"""Operations that are listed only when both operands are tensors."""


@dataclass(frozen=True)
class Operation:
    """A function that combines tensors outside of any layer.

    Attributes:
        kind: ``add``, ``cat``, ``mul``, ``matmul`` ...
        where: name of the module in whose forward it is computed; empty for the network itself.
        count: how many there are at this place.
    """

    kind: str
    where: str
    count: int

    def __str__(self) -> str:
        times = f" ({self.count} times)" if self.count > 1 else ""
        return f"functional {self.kind} at {self.where or 'the top level'}{times}"


@dataclass(frozen=True)
class Survey:
    """What a trace says about a network.

    Attributes:
        operations: the functional operations.
        calls: name of each layer to the number of times it is called in one forward pass.
        bypassed: name of each layer that is never called to the name of the module whose forward reads its weight.
        untraceable: why the network could not be traced, ``None`` when it could. Nothing is known then but the
            additions inside of PyTorch's own transformer layers.
    """

    operations: tuple[Operation, ...] = ()
    calls: dict[str, int] = field(default_factory=dict)
    bypassed: dict[str, str] = field(default_factory=dict)
    untraceable: str | None = None


class _Tracer(fx.Tracer):
    """Looks into everything but layers, batch norms and quantizers."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, QuantizedLayer | _BatchNorm) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> fx.Graph:
    """The graph of ``model``; a copy that shares all tensors is traced, so that a forward may assign to ``self``.

    Raises:
        Exception: whatever the network's own forward, copy or the tracer raises.
    """
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return _Tracer().trace(copy.deepcopy(model, memo=dict(tensors)))


def survey(model: nn.Module) -> Survey:
    """Find the functional operations of ``model``, without running or changing it."""
    operations = Counter(
        {
            ("add", name): additions
            for name, module in model.named_modules()
            for opaque, additions in _OPAQUE.items()
            if isinstance(module, opaque)
        }
    )
    if isinstance(model, QuantizedLayer):
        return Survey()
    try:
        graph = trace(model)
    except Exception as error:  # networks with data-dependent control flow fail in many ways
        lines = str(error).strip().splitlines() or [""]
        return Survey(_listed(operations), untraceable=f"{type(error).__name__}: {lines[0]}")
    numbers = _numbers(graph)
    calls: Counter[str] = Counter()
    read: dict[str, str] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls[node.target] += 1
        elif node.op == "get_attr":
            owner = node.target.rpartition(".")[0]
            if owner and isinstance(model.get_submodule(owner), (QuantizedLayer, *QUANTIZED_LAYERS)):
                read.setdefault(owner, _where(node))
        kind = _kind(node)
        if kind is not None and node not in numbers and (kind not in _PAIRS or _combines(node, numbers)):
            operations[kind, _where(node)] += 1
    return Survey(
        _listed(operations), dict(calls), {name: reader for name, reader in read.items() if name not in calls}
    )


def _listed(operations: Counter[tuple[str, str]]) -> tuple[Operation, ...]:
    return tuple(Operation(kind, where, count) for (kind, where), count in operations.items())


def _kind(node: fx.Node) -> str | None:
    if node.op == "call_function":
        return _FUNCTIONS.get(node.target)
    return _METHODS.get(str(node.target)) if node.op == "call_method" else None


def _where(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return str(next(reversed(stack), ""))


def _combines(node: fx.Node, numbers: set[fx.Node]) -> bool:
    """Whether two tensors meet in ``node``."""
    return sum(isinstance(x, fx.Node) and x not in numbers for x in (*node.args, *node.kwargs.values())) > 1


def _numbers(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that hold sizes, not tensors: shapes and what is computed from them."""
    numbers: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "call_method" and node.target in ("size", "dim", "numel"):
            numbers.add(node)
        elif node.op == "call_function":
            if node.target is getattr and node.args[1] in ("shape", "ndim"):
                numbers.add(node)
            elif getattr(node.target, "__module__", None) in ("_operator", "math", "builtins"):
                inputs = node.all_input_nodes
                if inputs and all(x in numbers for x in inputs):
                    numbers.add(node)
    return numbers
