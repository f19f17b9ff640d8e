"""What each node of a traced network computes, in one vocabulary whatever the network wrote: modules or functions."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lqkd.errors import UsageError
from lqkd.export.grids import ActivationGrid, LookupGrid
from lqkd.export.integer import IntegerLayer
from lqkd.export.islands import island_of_function, island_of_module
from lqkd.export.nodes import Operation, argument, first, is_tensor, place, shape_of
from lqkd.quantization import Quantizer
from lqkd.quantization.kinds import ACTIVATIONS, PAIRS
from lqkd.quantization.layers import QuantizedLayer
from lqkd.quantization.moves import IDENTITIES, RELUS, RESHAPE_METHODS, RESHAPES, SWAPS, TRANSPOSITIONS, is_identity
from lqkd.quantization.norms import is_frozen_norm

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""The layers that files have, quantised or not; a float one must be of this very class."""
_MAX_POOL = {"kernel_size": None, "stride": None, "padding": 0, "dilation": 1, "ceil_mode": False}
_AVERAGE_POOL = {
    "kernel_size": None,
    "stride": None,
    "padding": 0,
    "ceil_mode": False,
    "count_include_pad": True,
    "divisor_override": None,
}
"""Arguments of the pooling functions behind the input, and their defaults."""


_OF_EACH_SAMPLE = (
    "it normalises by statistics of each sample, which no integer layer takes over: build the network with batch norm "
    "(TorchvisionDetector: norm: batch_per_level)"
)
_REMEDIES = {"GroupNorm": _OF_EACH_SAMPLE, "group_norm": _OF_EACH_SAMPLE}
"""What to do about an operator that has no counterpart, where more can be said."""


def operation(node: fx.Node, network: nn.Module) -> Operation | None:
    """The operation of ``node``; ``None`` for sizes and what is computed from them.

    Args:
        node: of the graph of ``network``, whose shapes are known (:class:`torch.fx.passes.shape_prop.ShapeProp`).
        network: the traced network, or its :class:`~torch.fx.GraphModule`.

    Raises:
        UsageError: when there is no counterpart for it; the message names it and its place.
    """
    if node.op == "placeholder":
        return Operation("input", ())
    if node.op == "output":
        return Operation("output", tuple(node.all_input_nodes))
    if node.op == "get_attr":
        return Operation("constant", (), {"value": _attribute(network, str(node.target))})
    if node.op == "call_module":
        module = network.get_submodule(str(node.target))
        found = _of_module(module, node)
    else:
        if not is_tensor(node) and "tensors" not in node.meta:
            return None
        found = _of_function(node)
    if found is None:
        raise unsupported(node, network)
    return found


def unsupported(node: fx.Node, network: nn.Module, detail: str = "") -> UsageError:
    """The error for a node that cannot be exported."""
    kind = (
        type(network.get_submodule(str(node.target))).__name__
        if node.op == "call_module"
        else getattr(node.target, "__name__", str(node.target))
    )
    remedy = _REMEDIES.get(kind, "replace it in the network")
    return UsageError(f"operator {kind}{detail} in {place(node)} cannot be exported: {remedy}")


def _attribute(network: nn.Module, target: str) -> Any:
    owner, _, name = target.rpartition(".")
    return getattr(network.get_submodule(owner), name)


def _of_module(module: nn.Module, node: fx.Node) -> Operation | None:
    kind: str | None = None
    settings: dict[str, Any] = {"module": module}
    if isinstance(module, (Quantizer, ActivationGrid, LookupGrid)):
        kind = "grid"
    elif _is_layer(module):
        kind = "layer"
    elif _is_norm(module):
        kind = "norm"
    elif type(module) in IDENTITIES:
        kind = "identity"
    elif type(module) in RELUS:
        kind = "relu"
    elif isinstance(module, nn.Hardtanh):
        kind, settings = "clamp", {"low": module.min_val, "high": module.max_val}
    elif type(module) in ACTIVATIONS:
        kind, settings = "activation", _activation(ACTIVATIONS[type(module)], module.__dict__.get)
    elif isinstance(module, nn.MaxPool2d):
        kind, settings = "maxpool", _pool(module.__dict__.__getitem__)
    elif isinstance(module, nn.AvgPool2d):
        kind, settings = "avgpool", _pool(module.__dict__.__getitem__)
    elif isinstance(module, nn.AdaptiveAvgPool2d):
        return _adaptive(node)
    elif isinstance(module, nn.Upsample):
        return _resize(node, module.__dict__.get)
    elif type(module) in RESHAPES:
        kind = "reshape"
    return island_of_module(module, node) if kind is None else Operation(kind, first(node), settings)


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is batch norm by running statistics, and nothing besides."""
    plain = type(module).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
    return is_frozen_norm(module) or (isinstance(module, _BatchNorm) and plain and module.running_mean is not None)


def _is_layer(module: nn.Module) -> bool:
    known = type(module) in LAYERS or (isinstance(module, QuantizedLayer) and isinstance(module, LAYERS))
    return known or isinstance(module, IntegerLayer)


def _of_function(node: fx.Node) -> Operation | None:  # noqa: PLR0911, PLR0912
    target: Any = node.target
    if target in PAIRS:
        return _pair(node, PAIRS[target])
    if target in (torch.cat, torch.concat):
        tensors = argument(node, 0, "tensors", ())
        if isinstance(tensors, fx.Node):  # all results of a chunk, say, as they are
            return None
        return Operation("cat", tuple(tensors), {"axis": argument(node, 1, "dim", 0)})
    if target in RELUS:
        return Operation("relu", first(node))
    if is_identity(target) or (target == "to" and node.kwargs == {}):
        return Operation("identity", first(node))
    if target is F.relu6:
        return Operation("clamp", first(node), {"low": 0.0, "high": 6.0})
    if target in (F.hardtanh, torch.clamp, "clamp", "clamp_"):
        hard = target is F.hardtanh
        low = argument(node, 1, "min_val" if hard else "min", -1.0 if hard else None)
        high = argument(node, 2, "max_val" if hard else "max", 1.0 if hard else None)
        return Operation("clamp", first(node), {"low": low, "high": high})
    if target in ACTIVATIONS:
        return Operation(
            "activation",
            first(node),
            _activation(ACTIVATIONS[target], lambda name, default=None: argument(node, 1, name, default)),
        )
    if target in (F.max_pool2d, F.avg_pool2d):
        settings = _MAX_POOL if target is F.max_pool2d else _AVERAGE_POOL
        values = {n: argument(node, i, n, default) for i, (n, default) in enumerate(settings.items(), start=1)}
        return Operation("maxpool" if target is F.max_pool2d else "avgpool", first(node), _pool(values.__getitem__))
    if target is F.adaptive_avg_pool2d:
        return _adaptive(node)
    if target is F.interpolate:
        names = ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias")
        values = {n: argument(node, i, n, "nearest" if n == "mode" else None) for i, n in enumerate(names, start=1)}
        return _resize(node, values.get)
    if target in (torch.mean, "mean"):
        return _mean(node)
    if target in RESHAPES or target in RESHAPE_METHODS:
        return Operation("reshape", first(node))
    if target in TRANSPOSITIONS:
        return Operation("transpose", first(node), {"order": _order(node)})
    if target is F.pad:
        return _pad(node)
    if target is operator.getitem:
        return _getitem(node)
    if target in (torch.chunk, "chunk", torch.split, "split"):
        return Operation("chunks", first(node), {"axis": argument(node, 2, "dim", 0)})
    if target in (torch.unbind, "unbind"):
        return Operation("unbound", first(node), {"axis": argument(node, 1, "dim", 0)})
    return island_of_function(node)


def _pair(node: fx.Node, kind: str) -> Operation | None:
    operands = (argument(node, 0, "input", None), argument(node, 1, "other", None))
    if set(node.kwargs) - {"input", "other"}:
        return None
    nodes = tuple(x for x in operands if isinstance(x, fx.Node) and is_tensor(x))
    numbers = [x for x in operands if isinstance(x, int | float)]
    if len(nodes) + len(numbers) != 2 or not nodes:
        return None
    return Operation(kind, nodes, {"number": float(numbers[0])} if numbers else {})


def _activation(name: str, get: Callable[..., Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {"name": name}
    if name == "LeakyRelu":
        settings["alpha"] = float(get("negative_slope", 0.01))
    elif name == "Elu":
        settings["alpha"] = float(get("alpha", 1.0))
    elif name == "Gelu":
        settings["approximate"] = str(get("approximate", "none"))
    return settings


def _pool(get: Callable[[str], Any]) -> dict[str, Any]:
    def pair(value: Any) -> tuple[int, int]:
        return (value, value) if isinstance(value, int) else tuple(value)

    kernel = pair(get("kernel_size"))
    stride = get("stride")
    settings = {"kernel": kernel, "stride": pair(stride) if stride else kernel, "padding": pair(get("padding"))}
    for name in ("dilation", "ceil_mode", "count_include_pad", "divisor_override"):
        try:
            settings[name] = get(name)
        except KeyError:
            continue
    settings["dilation"] = pair(settings.get("dilation", 1))
    return settings


def _adaptive(node: fx.Node) -> Operation | None:
    (source,) = first(node)
    (height, width), (rows, columns) = shape_of(source)[-2:], shape_of(node)[-2:]
    if (rows, columns) == (1, 1):
        return Operation("globalpool", (source,), {"keepdim": True})
    if height % rows or width % columns:
        return None
    kernel = (height // rows, width // columns)
    return Operation("avgpool", (source,), {"kernel": kernel, "stride": kernel, "padding": (0, 0)})


def _resize(node: fx.Node, get: Callable[[str], Any]) -> Operation | None:
    """Bilinear, or nearest neighbour by whole factors, where the factor that PyTorch is given is that of the sizes."""
    source = first(node)
    before, after = shape_of(source[0])[2:], shape_of(node)[2:]
    factor, mode = get("scale_factor"), get("mode")
    factors = factor if isinstance(factor, tuple | list) else (factor,) * len(before)
    if factor is not None and any(b * f != a for b, f, a in zip(before, factors, after, strict=True)):
        return None
    if mode == "nearest" and not any(a % b for a, b in zip(after, before, strict=True)):
        places = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        return Operation("nearest", source, {"mode": mode, **places})
    if mode == "bilinear" and not get("antialias"):
        places = {"coordinate_transformation_mode": "align_corners" if get("align_corners") else "half_pixel"}
        return Operation("resize", source, {"mode": "linear", **places})
    return None


def _mean(node: fx.Node) -> Operation | None:
    (source,) = first(node)
    axes, keep = argument(node, 1, "dim", None), argument(node, 2, "keepdim", False)
    rank = len(shape_of(source))
    if axes is None or rank < 3:
        return None
    chosen = sorted(axis % rank for axis in ([axes] if isinstance(axes, int) else axes))
    if chosen == list(range(2, rank)):
        return Operation("globalpool", (source,), {"keepdim": bool(keep)})
    return Operation("mean", (source,), {"axes": chosen, "keepdim": bool(keep)})


def _order(node: fx.Node) -> list[int]:
    rank = len(shape_of(first(node)[0]))
    given: list[Any] = list(node.args[1:]) or [v for k, v in node.kwargs.items() if k != "input"]
    if node.target in SWAPS:
        order = list(range(rank))
        a, b = given[0] % rank, given[1] % rank
        order[a], order[b] = b, a
        return order
    axes = given[0] if isinstance(given[0], list | tuple) else given
    return [int(axis) % rank for axis in axes]


def _pad(node: fx.Node) -> Operation | None:
    pads, mode = argument(node, 1, "pad", None), argument(node, 2, "mode", "constant")
    value = argument(node, 3, "value", None)
    if mode != "constant" or value not in (None, 0, 0.0) or any(not isinstance(p, int) or p < 0 for p in pads):
        return None
    rank = len(shape_of(first(node)[0]))
    begins, ends = [0] * rank, [0] * rank
    for index in range(len(pads) // 2):
        begins[rank - 1 - index], ends[rank - 1 - index] = pads[2 * index], pads[2 * index + 1]
    return Operation("pad", first(node), {"pads": begins + ends})


def _getitem(node: fx.Node) -> Operation | None:
    source, index = node.args
    assert isinstance(source, fx.Node)
    if not is_tensor(source):  # one of the results of chunk or split
        return Operation("part", (source,), {"index": index})
    entries = list(index) if isinstance(index, tuple) else [index]
    shape = shape_of(source)
    if Ellipsis in entries:
        at = entries.index(Ellipsis)
        entries[at : at + 1] = [slice(None)] * (len(shape) - len(entries) + 1)
    slices, dropped = [], []
    for axis, entry in enumerate(entries):
        if isinstance(entry, int) and not isinstance(entry, bool):
            at = entry % shape[axis]
            slices.append((axis, at, at + 1, 1))
            dropped.append(axis)
            continue
        if not isinstance(entry, slice) or any(isinstance(x, fx.Node) for x in (entry.start, entry.stop, entry.step)):
            return None
        if entry == slice(None):
            continue
        if axis == 0 or (entry.step or 1) < 0:
            return None
        slices.append((axis, *entry.indices(shape[axis])))
    return Operation("slice", (source,), {"slices": slices, "dropped": dropped})
