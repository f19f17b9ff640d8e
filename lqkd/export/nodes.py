"""What a node of a traced network is and is called with, in one vocabulary whatever the network wrote."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx


@dataclass(frozen=True)
class Operation:
    """One operation.

    Attributes:
        kind: its name, such as ``layer``, ``grid``, ``add`` or ``clamp``.
        inputs: the nodes of its tensors.
        settings: its other arguments.
    """

    kind: str
    inputs: tuple[fx.Node, ...]
    settings: dict[str, Any] = field(default_factory=dict)


def place(node: fx.Node) -> str:
    """The module in whose forward ``node`` is computed, for messages."""
    if node.op == "call_module":
        return str(node.target)
    stack = node.meta.get("nn_module_stack") or {}
    return str(next(reversed(stack), "")) or "the network's forward"


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of what ``node`` returned in the example."""
    return tuple(node.meta["tensor_meta"].shape)


def argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    """An argument of a call, given by position or by name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def is_tensor(node: fx.Node) -> bool:
    """Whether the value of ``node`` is one tensor."""
    return hasattr(node.meta.get("tensor_meta"), "shape")


def first(node: fx.Node) -> tuple[fx.Node, ...]:
    """The first argument of a call, as inputs of an operation."""
    value = node.args[0] if node.args else node.kwargs["input"]
    assert isinstance(value, fx.Node)
    return (value,)
