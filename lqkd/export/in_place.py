"""Statements that change a tensor in place, which a graph of values does not have."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from lqkd.errors import UsageError
from lqkd.export.nodes import place

_STATEMENTS = ("setitem", "iadd", "imul", "isub", "itruediv")
_SIZES: tuple[Any, ...] = ("size", "dim", "numel", getattr)


def refuse_in_place(graph: fx.Graph, network: nn.Module) -> None:
    """Refuse what changes a tensor that is read again under its old name, such as ``x[:, 0] = 0`` and ``x.mul_(2)``.

    Where only the result is read, as in ``x = relu_(x)``, nothing tells it from an operation that makes a new tensor.

    Args:
        graph: of ``network``.

    Raises:
        UsageError: then; the message names the operation and its place.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if not _changes(node, network) or not node.all_input_nodes:
            continue
        source = node.all_input_nodes[0]
        again = [user for user in source.users if order[user] > order[node] and user.target not in _SIZES]
        if again or not node.users:
            raise UsageError(
                f"operator {getattr(node.target, '__name__', node.target)} in {place(node)} cannot be exported: it "
                "changes a tensor in place that is read again; make a new one, such as with torch.where"
            )


def _changes(node: fx.Node, network: nn.Module) -> bool:
    if node.op == "call_module":
        return bool(getattr(network.get_submodule(str(node.target)), "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    name = str(getattr(node.target, "__name__", node.target))
    marked = name.endswith("_") and not name.endswith("__")
    return marked or name.strip("_") in _STATEMENTS or bool(node.kwargs.get("inplace"))
