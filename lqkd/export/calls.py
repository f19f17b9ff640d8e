"""Layers that are called several times, as a head is for each level of a pyramid, as one layer for each call."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

from torch import fx, nn

from lqkd.quantization.layers import QuantizedLayer
from lqkd.quantization.norms import is_batch_norm
from lqkd.quantization.quantizers import LevelwiseStep


def separated(student: nn.Module, traced: Callable[[nn.Module], fx.Graph]) -> nn.Module:
    """The network with a copy of each layer and batch norm for each of its calls, where inputs have steps for them.

    An integer layer has one grid for its input, and a batch norm is folded into the layer before it: both need a layer
    that is called once. The copies share their weights. A network without such inputs is returned as it is.

    Args:
        student: a quantised network in eval mode that can be traced.
        traced: what gives the graph of a network.

    Raises:
        Exception: whatever the network's own forward or the tracer raises.
    """
    if not any(isinstance(module, LevelwiseStep) for module in student.modules()):
        return student
    graph = traced(student)
    network = fx.GraphModule(student, graph)
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    done: Counter[str] = Counter()
    for node in graph.nodes:
        if node.op != "call_module" or calls[str(node.target)] == 1:
            continue
        name = str(node.target)
        module = network.get_submodule(name)
        if isinstance(module, QuantizedLayer) or is_batch_norm(module):
            node.target = f"{name}_call{done[name]}"
            network.add_submodule(node.target, _of_call(module, done[name]))
            done[name] += 1
    network.delete_all_unused_submodules()
    network.recompile()
    return network.eval()


def _of_call(module: nn.Module, call: int) -> nn.Module:
    """A copy of the same tensors, whose tables are its own: a fold gives it another bias."""
    own = copy.copy(module)
    for table in ("_modules", "_parameters", "_buffers"):
        setattr(own, table, dict(getattr(module, table)))
    if isinstance(own, QuantizedLayer) and own.input_quantizer is not None:
        steps = own.input_quantizer
        own.input_quantizer = steps.at(call) if isinstance(steps, LevelwiseStep) else copy.deepcopy(steps)
    return own
