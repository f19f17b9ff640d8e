"""Channels in the numbers that integer kernels are made for, filled up with zeros; no sum changes by it.

ONNX Runtime's kernels for depthwise convolutions take 16 channels at a time and what is left one by one: 72 channels
take 2.3 times as long as 80. Its kernels for convolutions without a matrix of patches take 4 channels of input at a
time, where an image has three.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from lqkd.export.deploy import Deployed
from lqkd.export.integer import IntegerConv, IntegerLayer, IntegerLinear
from lqkd.export.nodes import shape_of
from lqkd.export.operations import operation

CHANNELS = 16
"""What a depthwise kernel takes at a time."""
COLOURS, COLOUR_CHANNELS = 3, 4
"""Channels of an image, and what a kernel takes of them."""
MOST = 1.5
"""At most so many times as many channels: a few channels are not worth it."""
_BY_CHANNEL = ("grid", "activation", "clamp", "relu", "identity", "add", "mul", "maxpool", "avgpool", "globalpool")
"""Kinds that compute each channel by itself, and the same for each."""


def aligned(deployed: Deployed) -> tuple[Deployed, dict[str, int]]:
    """A copy with as many channels as kernels take, and how many channels of its values are real, by node.

    Channels are added where a depthwise convolution is: its own, and those of what is computed channel by channel
    before and behind it, up to the layers that write them and read them. The new ones have weights of zero on both
    sides. Three colours get a fourth channel of zeros in front of a convolution.

    Args:
        deployed: left alone; the copy shares its tensors but for layers that change.
    """
    network = fx.GraphModule(deployed.network, copy.deepcopy(deployed.network.graph))
    channels: dict[str, int] = {}
    for node in list(network.graph.nodes):
        layer = _layer(node, network)
        if isinstance(layer, IntegerConv) and _is_depthwise(layer):
            _align(node, network, channels)
        elif isinstance(layer, IntegerConv) and _reads_colours(node, layer, network):
            _add_colour(node, layer, network)
    network.recompile()
    return replace(deployed, network=network.eval()), channels


def _layer(node: fx.Node, network: fx.GraphModule) -> Any:
    return network.get_submodule(str(node.target)) if node.op == "call_module" else None


def _is_depthwise(layer: IntegerConv) -> bool:
    return layer.groups == len(layer.codes) > 1 and layer.levels is None


def _is_dense(node: fx.Node, layer: Any) -> bool:
    """Whether each channel of what ``layer`` writes is a sum over all of what it reads, on axis 1 of both."""
    if isinstance(layer, IntegerLinear):
        return layer.levels is None and len(shape_of(node)) == len("BC")
    return isinstance(layer, IntegerConv) and layer.groups == 1 and layer.levels is None


def _reads_colours(node: fx.Node, layer: IntegerConv, network: fx.GraphModule) -> bool:
    source = node.all_input_nodes[0]
    found = operation(source, network)
    images = layer.codes.ndim == len("OIHW") and layer.codes.shape[1] == COLOURS and layer.codes[0, 0].numel() > 1
    once = Counter(other.target for other in network.graph.nodes)[node.target] == 1
    return images and _is_dense(node, layer) and once and found is not None and found.kind == "grid"


def _add_colour(node: fx.Node, layer: IntegerConv, network: fx.GraphModule) -> None:
    source, more = node.all_input_nodes[0], COLOUR_CHANNELS - COLOURS
    with network.graph.inserting_before(node):
        padded = network.graph.call_function(F.pad, (source, (0, 0, 0, 0, 0, more)))
    padded.meta.update(source.meta)
    _widen(padded, COLOUR_CHANNELS)
    node.replace_input_with(source, padded)
    _exchange(node, network, _with_inputs(layer, more))


def _align(start: fx.Node, network: fx.GraphModule, channels: dict[str, int]) -> None:
    count = shape_of(start)[1]
    more = -count % CHANNELS
    values = _values(start, network) if 0 < more <= (MOST - 1) * count else None
    if values is None:
        return
    # One that reads such values may write some, too, into an addition of both.
    readers = {user for node in values for user in node.users if _is_dense(user, _layer(user, network))}
    calls = Counter(node.target for node in network.graph.nodes)
    if any(calls[node.target] > 1 for node in values | readers if isinstance(_layer(node, network), IntegerLayer)):
        return
    for node in values:
        channels[node.name] = count
        _widen(node, count + more)
        layer = _layer(node, network)
        if isinstance(layer, IntegerLayer):
            _exchange(node, network, _with_outputs(layer, more))
    for node in readers:
        _exchange(node, network, _with_inputs(_layer(node, network), more))


def _values(start: fx.Node, network: fx.GraphModule) -> set[fx.Node] | None:
    """All nodes whose channels are those of ``start``; None where one of them cannot have more of them."""
    found, waiting = {start}, [start]
    while waiting:
        node = waiting.pop()
        layer = _layer(node, network)
        if _is_dense(node, layer):
            sources = []
        elif _takes_more(node, network):
            sources = list(node.all_input_nodes)
        else:
            return None
        readers = [user for user in node.users if not _is_dense(user, _layer(user, network))]
        for other in {*sources, *readers} - found:
            found.add(other)
            waiting.append(other)
    return found


def _takes_more(node: fx.Node, network: fx.GraphModule) -> bool:
    """Whether ``node`` computes each channel of inputs of as many channels by itself, whatever their number is."""
    layer = _layer(node, network)
    if isinstance(layer, IntegerConv) and _is_depthwise(layer):
        return True
    found = None if node.op in ("output", "placeholder", "get_attr") else operation(node, network)
    if found is None or found.kind not in _BY_CHANNEL:
        return False
    pool = found.kind == "globalpool"  # which may leave axes out behind the channels
    ranks = {len(shape_of(x)) for x in (node, *found.inputs)}
    return (pool or len(ranks) == 1) and all(shape_of(x)[1:2] == shape_of(node)[1:2] for x in found.inputs)


def _widen(node: fx.Node, channels: int) -> None:
    meta = node.meta["tensor_meta"]
    node.meta["tensor_meta"] = meta._replace(shape=torch.Size((meta.shape[0], channels, *meta.shape[2:])))


def _exchange(node: fx.Node, network: fx.GraphModule, layer: IntegerLayer) -> None:
    network.set_submodule(str(node.target), layer)


def _with_outputs(layer: IntegerLayer, more: int) -> IntegerLayer:
    """A copy with ``more`` channels of zeros behind its own."""
    wide = copy.copy(layer)
    wide._buffers = dict(layer._buffers)
    for name in ("codes", "bias", "bias_codes"):
        wide._buffers[name] = _behind(wide._buffers[name], more)
    for name in ("scale", "bias_scale"):  # of the last channel: the runtime looks whether they belong together
        values = wide._buffers[name]
        wide._buffers[name] = None if values is None else torch.cat([values, values[-1:].expand(more)])
    if isinstance(wide, IntegerConv) and wide.groups > 1:
        wide.groups += more
    return wide


def _with_inputs(layer: IntegerLayer, more: int) -> IntegerLayer:
    """A copy that reads ``more`` channels behind its own, and multiplies them by zero."""
    wide = copy.copy(layer)
    codes = cast(Tensor, _behind(layer.codes.transpose(0, 1), more)).transpose(0, 1).contiguous()
    wide._buffers = dict(layer._buffers) | {"codes": codes}
    return wide


def _behind(values: Tensor | None, more: int) -> Tensor | None:
    """``values`` with ``more`` rows of zeros behind them."""
    return None if values is None else torch.cat([values, values.new_zeros(more, *values.shape[1:])])
