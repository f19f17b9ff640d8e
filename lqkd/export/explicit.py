"""The graph of a network with every quantizer as a node, and the proof that it is the network's."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.utils._pytree import tree_leaves

from lqkd.errors import UsageError, first_line
from lqkd.export.constants import fold_constants
from lqkd.export.in_place import refuse_in_place
from lqkd.export.operations import operation
from lqkd.export.same_padding import take_padding_apart
from lqkd.export.sized_trace import sized_trace
from lqkd.models.calls import Inputs
from lqkd.models.torchvision_detector import whole_detector
from lqkd.quantization import Quantizer, quantizers
from lqkd.quantization.computed import copy_of
from lqkd.quantization.graph import obstacle
from lqkd.quantization.layers import QuantizedLayer


def traced(student: nn.Module, example: Inputs) -> fx.Graph:
    """The graph of a network as the example calls it: arguments that it does not give are what they are by default."""
    return sized_trace(student, given(student, example), example)


def given(network: nn.Module, example: Inputs) -> tuple[str, ...]:
    """The names of the arguments that the example calls a network with."""
    return tuple(inspect.signature(network.forward).bind(*example.args, **example.keywords).arguments)


def check_takes(network: nn.Module, inputs: Inputs, what: str) -> None:
    """Refuse inputs that the network does not take; ``what`` is what a mistake calls them."""
    try:
        with torch.no_grad():
            inputs.call(network)
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        tensors = [f"of shape {tuple(tensor.shape)} and type {tensor.dtype}" for tensor in inputs.tensors()]
        raise UsageError(f"the network cannot take {what} {', '.join(tensors)} ({first_line(error)})") from error


@torch.no_grad()
def check_traced(student: nn.Module, example: Inputs) -> None:
    """Refuse a network of which a trace finds no graph, or that of something else than it computes."""
    _check_inputs(student, example)
    try:
        graph = traced(student, example)
    except UsageError:
        raise
    except Exception as error:  # networks that decide by their data fail in many ways
        why = whole_detector(student) or f"its graph cannot be traced ({obstacle(error)})"
        raise UsageError(f"the network cannot be exported: {why}") from error
    expected = _tensors(example.map(torch.clone).call(student))
    try:
        given = example.map(torch.clone).by_name(parameters(fx.GraphModule(student, graph)))
        found = _tensors(fx.Interpreter(student, graph=graph).run(*given.values()))
        difference = "" if _all_agree(found, expected) else "it computes something else"
    except Exception as error:  # of whichever operation gets something that it does not take
        difference = first_line(error)
    if difference:
        raise UsageError(
            f"the network cannot be exported: a trace of its forward goes another way than a batch ({difference}): the "
            "forward must not ask for the Python type of a value (isinstance, type), where a trace has a stand-in"
        )


@torch.no_grad()
def check_separated(apart: nn.Module, student: nn.Module, example: Inputs) -> None:
    """Refuse a network with a layer for each call that computes something else than the one with layers for all."""
    given = [example.map(torch.clone).call(network) for network in (apart, student)]
    if not _all_agree(*map(_tensors, given)):
        raise UsageError(
            "the network cannot be exported: with a layer of its own for each call of a pass it computes something "
            "else; its forward must call layers in the same order in every pass"
        )


@torch.no_grad()
def unquantised(network: nn.Module, example: Inputs) -> list[Tensor]:
    """What a network returns while its quantizers round nothing, so that no rounding hides what it computes."""
    found = set(quantizers(network).values())
    try:
        for quantizer in found:
            quantizer.forward = torch.clone  # type: ignore[assignment]
        return _tensors(example.map(torch.clone).call(network))
    finally:
        for quantizer in found:
            del quantizer.forward


def _compute_the_same(network: nn.Module, before: nn.Module, example: Inputs) -> bool:
    """Whether two networks return the same without quantizers, in float64 where float32 cannot tell.

    Through hundreds of layers rounding may come to more than what is allowed, as of a ResNet-152 with random weights.
    """
    if _all_agree(*(unquantised(one, example) for one in (network, before))):
        return True
    given = example.map(lambda x: x.double() if x.is_floating_point() else x)
    try:
        return _all_agree(*(unquantised(copy_of(one).double(), given) for one in (network, before)))
    except RuntimeError:  # of a forward that makes float32 tensors
        return False


def _all_agree(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(map(_agree, found, expected))


def _tensors(returned: Any) -> list[Tensor]:
    return [value for value in tree_leaves(returned) if isinstance(value, Tensor)]


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Whether two results are the same but for rounding, which may differ where a forward works in place."""
    if found.shape != expected.shape:
        return False
    found, expected = found.double(), expected.double()
    return torch.allclose(
        found, expected, rtol=1e-3, atol=1e-3 * float(expected.nan_to_num(0, 0, 0).abs().max()), equal_nan=True
    )


def parameters(network: fx.GraphModule) -> tuple[str, ...]:
    """The names of what the network is called with, in order."""
    return tuple(str(node.target) for node in network.graph.nodes if node.op == "placeholder")


def explicit(student: nn.Module, example: Inputs, before: nn.Module) -> fx.GraphModule:
    """The graph of ``student`` in which every quantizer is a node and nothing without effect is left.

    Args:
        student: taken apart and folded as a file has it.
        example: what it is called with.
        before: the student before, with tensors of its own.

    Raises:
        UsageError: when the graph returns something else.
    """
    graph = traced(student, example)
    refuse_in_place(graph, student)
    network = fx.GraphModule(student, graph)
    for node in list(graph.nodes):
        if node.op != "call_module":
            continue
        module: Any = network.get_submodule(node.target)
        _expose(network, node, module, "argument_quantizer", before=True)
        if isinstance(module, QuantizedLayer):
            _expose(network, node, module, "input_quantizer", before=True)
        _expose(network, node, module, "output_quantizer", before=False)
    for module in network.modules():  # of the quantizers, which are nodes now
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        if isinstance(module, QuantizedLayer):
            module.input_quantizer = None
    recompile(network)
    propagate_shapes(network, example)
    take_padding_apart(network)
    recompile(network)
    if not _compute_the_same(network, before, example):  # before constants are computed on grids
        raise UsageError(
            "the network cannot be exported: written as the operations of a file it computes something else, also in "
            "floating point; its forward must make new tensors, and not change those that it reads again"
        )
    fold_constants(network)
    recompile(network)
    propagate_shapes(network, example)
    for node in list(graph.nodes):
        found = operation(node, network)
        if found is not None and found.kind == "identity":
            node.replace_all_uses_with(found.inputs[0])
            graph.erase_node(node)
        elif node.target == "view":  # which may have stood behind a contiguous() that is gone
            node.target = "reshape"
    recompile(network)
    return network


def _check_inputs(student: nn.Module, example: Inputs) -> None:
    """Refuse inputs that are no tensors with the same number of samples."""
    bound = inspect.signature(student.forward).bind(*example.args, **example.keywords).arguments
    for name, value in bound.items():
        if not isinstance(value, Tensor):
            raise UsageError(f"input {name!r} is a {type(value).__name__}: export takes tensors (B, ...) alone")
        if value.ndim == 0 or len(value) != len(example):
            raise UsageError(
                f"input {name!r} of shape {tuple(value.shape)} has no batch axis: export takes tensors (B, ...) alone"
            )


def _expose(network: fx.GraphModule, node: fx.Node, module: Any, name: str, before: bool) -> None:
    quantizer = module._modules.get(name)
    if not isinstance(quantizer, Quantizer):
        return
    target = f"grids.{str(node.target).replace('.', '_')}.{name}"
    network.add_submodule(target, quantizer)
    if before:
        with network.graph.inserting_before(node):
            new = network.graph.call_module(target, (node.args[0],))
        node.args = (new, *node.args[1:])
    else:
        with network.graph.inserting_after(node):
            new = network.graph.call_module(target, (node,))
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    new.meta["lqkd_place"] = str(node.target)


def recompile(network: fx.GraphModule) -> None:
    """After a change of the graph."""
    network.graph.lint()
    network.recompile()


def propagate_shapes(network: fx.GraphModule, example: Inputs) -> None:
    """Let every node know the shape of its result."""
    try:
        with torch.no_grad():
            ShapeProp(network).propagate(*example.by_name(parameters(network)).values())
    except RuntimeError as error:
        raise UsageError(
            f"the network cannot take an example of {example.described()} ({first_line(error)})"
        ) from error
    for node in network.graph.nodes:  # shapes of several results are kept by ShapeProp as a tuple of metas
        if isinstance(node.meta.get("tensor_meta"), tuple) and not hasattr(node.meta["tensor_meta"], "shape"):
            node.meta["tensors"] = True
