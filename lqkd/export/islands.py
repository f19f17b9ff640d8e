"""Operations that have no integer form in a runtime and stay in floating point between the integer parts of a network.

Layer norm, softmax, the products of attention and plain arithmetic: a file has them as they are, on real numbers, and
its card names and counts them (:class:`lqkd.export.runtimes.Kernels`). What is quantised before and behind them is not
changed by it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from lqkd.export.nodes import Operation, argument, first, is_tensor, shape_of
from lqkd.quantization.placement import ISLAND

KIND = ISLAND
"""The kind of all of them; ``settings["name"]`` tells them apart."""

_UNARY: dict[Any, str] = {
    torch.exp: "Exp",
    "exp": "Exp",
    torch.sqrt: "Sqrt",
    "sqrt": "Sqrt",
    torch.rsqrt: "Rsqrt",
    "rsqrt": "Rsqrt",
    torch.neg: "Neg",
    operator.neg: "Neg",
    "neg": "Neg",
    torch.abs: "Abs",
    "abs": "Abs",
    F.softplus: "Softplus",
}
_BINARY: dict[Any, str] = {
    operator.sub: "Sub",
    operator.isub: "Sub",
    torch.sub: "Sub",
    "sub": "Sub",
    operator.truediv: "Div",
    torch.div: "Div",
    "div": "Div",
    operator.pow: "Pow",
    torch.pow: "Pow",
    "pow": "Pow",
}
_PRODUCTS: tuple[Any, ...] = (operator.matmul, torch.matmul, torch.bmm, "matmul", "bmm")
_SOFTMAX: tuple[Any, ...] = (F.softmax, torch.softmax, "softmax")


def island_of_module(module: nn.Module, node: fx.Node) -> Operation | None:
    """The operation of a module that has no integer form; ``None`` for any other.

    Args:
        module: what ``node`` calls.
        node: of a graph whose shapes are known.
    """
    source = first(node)
    if isinstance(module, nn.LayerNorm):
        held = {"weight": module.weight, "bias": module.bias}
        return _island("LayerNorm", source, shape=module.normalized_shape, eps=module.eps, **held)
    if isinstance(module, nn.Softmax) and module.dim is not None:
        return _island("Softmax", source, axis=module.dim)
    if isinstance(module, nn.Softplus) and module.beta == 1:
        return _island("Softplus", source)
    return None


def island_of_function(node: fx.Node) -> Operation | None:
    """The operation of a function or method that has no integer form; ``None`` for any other."""
    target: Any = node.target
    if target in _UNARY:
        return _island(_UNARY[target], first(node)) if _plain(node) else None
    if target in _BINARY:
        return _binary(node, _BINARY[target])
    if target in _PRODUCTS:
        return _island("MatMul", tuple(argument(node, i, n, None) for i, n in enumerate(("input", "other"))))
    if target in _SOFTMAX:
        return _island("Softmax", first(node), axis=argument(node, 1, "dim", -1))
    finder = _FINDERS.get(target)
    return None if finder is None else finder(node)


def _island(name: str, inputs: tuple[fx.Node, ...], **settings: Any) -> Operation:
    return Operation(KIND, inputs, {"name": name, **settings})


def _plain(node: fx.Node) -> bool:
    """Whether a call has nothing but its tensor."""
    return len(node.args) == 1 and not node.kwargs


def _binary(node: fx.Node, name: str) -> Operation | None:
    """Two tensors, or a tensor and a number on either side."""
    if set(node.kwargs) - {"input", "other", "exponent"}:  # a factor or a rounding mode
        return None
    a = argument(node, 0, "input", None)
    b = argument(node, 1, "exponent" if name == "Pow" else "other", None)
    tensors = tuple(x for x in (a, b) if isinstance(x, fx.Node) and is_tensor(x))
    numbers = [x for x in (a, b) if isinstance(x, int | float)]
    if not tensors or len(tensors) + len(numbers) != 2:
        return None
    settings = {"number": float(numbers[0]), "first": numbers[0] is a} if numbers else {}
    return _island(name, tensors, **settings)


def _layer_norm(node: fx.Node) -> Operation:
    tensors = (argument(node, 2, "weight", None), argument(node, 3, "bias", None))
    given = {name: value for name, value in zip(("weight", "bias"), tensors, strict=True) if value is not None}
    shape = tuple(argument(node, 1, "normalized_shape", ()))
    eps = argument(node, 4, "eps", 1e-5)
    return _island("LayerNorm", (*first(node), *given.values()), given=tuple(given), shape=shape, eps=eps)


def _attention(node: fx.Node) -> Operation | None:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    query, key, value, mask, _, causal = (argument(node, i, name, None) for i, name in enumerate(names))
    if node.kwargs.get("enable_gqa"):
        return None
    scale = node.kwargs.get("scale")
    settings = {
        "scale": shape_of(query)[-1] ** -0.5 if scale is None else scale,
        "rank": len(shape_of(query)),
        "boolean": mask is not None and mask.meta["tensor_meta"].dtype == torch.bool,
        "causal": (shape_of(query)[-2], shape_of(key)[-2]) if causal else None,
    }
    return _island("Attention", tuple(x for x in (query, key, value, mask) if x is not None), **settings)


def _expand(node: fx.Node) -> Operation | None:
    """A tensor repeated along axes; the first may hang on the number of samples, which only the runtime knows."""
    given = list(node.args[1] if isinstance(node.args[1], tuple | list) else node.args[1:])
    sizes = [1 if size == -1 else size for size in given]  # of one, an axis stays as it is
    first_is_computed = isinstance(sizes[0], fx.Node)
    if any(not isinstance(size, int) for size in sizes[first_is_computed:]):
        return None
    samples = shape_of(next(other for other in node.graph.nodes if other.op == "placeholder"))[0]
    times, rest = divmod(shape_of(node)[0], samples) if first_is_computed else (0, 0)
    return None if rest else _island("Expand", first(node), times=times, sizes=sizes[first_is_computed:])


def _expand_as(node: fx.Node) -> Operation:
    return _island("ExpandAs", tuple(argument(node, i, name, None) for i, name in enumerate(("input", "other"))))


def _einsum(node: fx.Node) -> Operation | None:
    equation, *operands = node.args
    if not isinstance(equation, str) or not all(isinstance(x, fx.Node) for x in operands):
        return None
    return _island("Einsum", tuple(x for x in operands if isinstance(x, fx.Node)), equation=equation)


def _roll(node: fx.Node) -> Operation | None:
    shifts, axes = argument(node, 1, "shifts", None), argument(node, 2, "dims", None)
    pairs = [(shifts, axes)] if isinstance(shifts, int) else list(zip(shifts, axes or (), strict=False))
    if not pairs or any(not isinstance(shift, int) or not isinstance(axis, int) for shift, axis in pairs):
        return None
    shape = shape_of(first(node)[0])
    turns = [(axis % len(shape), shift % shape[axis], shape[axis]) for shift, axis in pairs]
    return _island("Roll", first(node), turns=[turn for turn in turns if turn[1]])


def _reduced(name: str) -> Callable[[fx.Node], Operation | None]:
    def finder(node: fx.Node) -> Operation | None:
        axes, keep = argument(node, 1, "dim", None), argument(node, 2, "keepdim", False)
        if axes is None or node.kwargs.get("dtype") is not None:
            return None
        axes = [axes] if isinstance(axes, int) else list(axes)
        return _island("Reduce", first(node), operator=name, axes=axes, keepdim=bool(keep))

    return finder


def _stack(node: fx.Node) -> Operation:
    tensors, axis = argument(node, 0, "tensors", ()), argument(node, 1, "dim", 0)
    return _island("Stack", tuple(tensors), axis=axis)


def _normalize(node: fx.Node) -> Operation | None:
    power, axis, least = (argument(node, i, n, d) for i, n, d in ((1, "p", 2.0), (2, "dim", 1), (3, "eps", 1e-12)))
    return _island("Normalize", first(node), axis=axis, eps=least) if power == 2 else None


_FINDERS: dict[Any, Callable[[fx.Node], Operation | None]] = {
    F.layer_norm: _layer_norm,
    F.scaled_dot_product_attention: _attention,
    "expand": _expand,
    "expand_as": _expand_as,
    torch.einsum: _einsum,
    torch.sum: _reduced("ReduceSum"),
    "sum": _reduced("ReduceSum"),
    torch.amax: _reduced("ReduceMax"),
    "amax": _reduced("ReduceMax"),
    torch.roll: _roll,
    torch.stack: _stack,
    F.normalize: _normalize,
}
