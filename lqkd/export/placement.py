"""Where grids go: every quantizer a node of the graph, and one grid wherever an integer kernel writes its result."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from lqkd.errors import UsageError, first_line
from lqkd.export.attention import take_attention_apart
from lqkd.export.calls import separated
from lqkd.export.constants import fold_constants
from lqkd.export.in_place import refuse_in_place
from lqkd.export.islands import KIND as ISLAND
from lqkd.export.nodes import Operation, place
from lqkd.export.operations import CLAMPS, KEEPS_GRID, MOVES, operation
from lqkd.export.same_padding import take_padding_apart
from lqkd.export.sized_trace import sized_trace
from lqkd.models.calls import Inputs
from lqkd.models.torchvision_detector import whole_detector
from lqkd.quantization import Quantizer, fold_batchnorm, quantizers
from lqkd.quantization.batchnorm import Folding, take_activations_apart
from lqkd.quantization.computed import computed
from lqkd.quantization.graph import obstacle
from lqkd.quantization.layers import QuantizedLayer
from lqkd.quantization.quantizers import LSQPlus, Mse, UniformQuantizer

RESIDUAL_BITS = 8
TWICE = ("add", "mul")
"""Kinds that are cheap enough to be computed once for each of two grids."""


def place_grids(student: nn.Module, example: Inputs) -> tuple[GridPlacement, Folding]:
    """The graph of a network with all grids that its kernels need, and what became of its batch norms, in place.

    Args:
        student: a quantised network in eval mode, which is changed.
        example: what it is called with, on the same device.

    Raises:
        UsageError: when the network does not take the example, cannot be traced, or something in it cannot be exported.
    """
    for name, module in student.named_modules():
        if parametrize.is_parametrized(module):
            raise UsageError(f"layer {name!r} cannot be exported yet: {computed(module)} is called")
        if isinstance(module, nn.Embedding):
            raise UsageError(
                f"embedding {name!r} cannot be exported, since a file takes real numbers and no indices: export the "
                "module behind it with lqkd.export.to_onnx, and look rows up in its quantized_weight() before"
            )
    check_takes(student, example, "an example")
    expected = _unquantised(student, example)
    take_attention_apart(student)
    _check_traced(student, example)
    apart = separated(student, partial(traced, example=example))
    if apart is not student:
        _check_separated(apart, student, example)
    student = apart
    folding = fold_batchnorm(student, graph=traced(student, example))
    take_activations_apart(student)
    builder = GridPlacement(_explicit(student, example, expected), example)
    builder.place()
    return builder, folding


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
def _check_traced(student: nn.Module, example: Inputs) -> None:
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
        same = len(found) == len(expected) and all(map(_agree, found, expected))
        difference = "" if same else "it computes something else"
    except Exception as error:  # of whichever operation gets something that it does not take
        difference = first_line(error)
    if difference:
        raise UsageError(
            f"the network cannot be exported: a trace of its forward goes another way than a batch ({difference}): the "
            "forward must not ask for the Python type of a value (isinstance, type), where a trace has a stand-in"
        )


@torch.no_grad()
def _check_separated(apart: nn.Module, student: nn.Module, example: Inputs) -> None:
    """Refuse a network with a layer for each call that computes something else than the one with layers for all."""
    given = [example.map(torch.clone).call(network) for network in (apart, student)]
    found, expected = map(_tensors, given)
    if len(found) != len(expected) or not all(map(_agree, found, expected)):
        raise UsageError(
            "the network cannot be exported: with a layer of its own for each call of a pass it computes something "
            "else; its forward must call layers in the same order in every pass"
        )


@torch.no_grad()
def _unquantised(network: nn.Module, example: Inputs) -> list[Tensor]:
    """What a network returns while its quantizers round nothing, so that no rounding hides what it computes."""
    found = set(quantizers(network).values())
    try:
        for quantizer in found:
            quantizer.forward = torch.clone  # type: ignore[assignment]
        return _tensors(example.map(torch.clone).call(network))
    finally:
        for quantizer in found:
            del quantizer.forward


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


def _explicit(student: nn.Module, example: Inputs, expected: list[Tensor]) -> fx.GraphModule:
    """The graph of ``student`` in which every quantizer is a node and nothing without effect is left.

    Args:
        student: taken apart and folded as a file has it.
        example: what it is called with.
        expected: what it returned before, as :func:`_unquantised` says.

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
    returned = _unquantised(network, example)  # before constants are computed on grids
    if len(returned) != len(expected) or not all(map(_agree, returned, expected)):
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


class GridPlacement:
    """Places grids in the graph of a network whose quantizers are nodes."""

    def __init__(self, network: fx.GraphModule, example: Inputs) -> None:
        self.network = network
        self.graph = network.graph
        self.example = example
        self.fresh: dict[str, str] = {}
        self.rerouted: list[str] = []

    def place(self) -> None:
        self._hoist()
        for node in list(self.graph.nodes):
            if node.op != "output" and self._is_integer(node):
                self._settle(node)
        self._hoist()
        recompile(self.network)
        propagate_shapes(self.network, self.example)

    def _kind(self, node: fx.Node) -> str:
        found = self._operation(node)
        return "" if found is None else found.kind

    def _operation(self, node: fx.Node) -> Operation | None:
        if "tensor_meta" not in node.meta and node.op == "call_module":
            return Operation("grid", tuple(node.all_input_nodes), {"module": self._module(node)})
        return operation(node, self.network)

    def _module(self, node: fx.Node) -> nn.Module:
        return self.network.get_submodule(str(node.target))

    def _hoist(self) -> None:
        """Move grids before operations that keep a grid, so that these run on codes. The values do not change."""
        moved = True
        while moved:
            moved = False
            for node in list(self.graph.nodes):
                if self._kind(node) != "grid" or not self._is_uniform(node):
                    continue
                above = node.args[0]
                assert isinstance(above, fx.Node)
                self._share(above)
                if self._kind(above) in KEEPS_GRID and self._kind(above) != "relu" and list(above.users) == [node]:
                    source = above.args[0]
                    assert isinstance(source, fx.Node)
                    node.replace_all_uses_with(above)
                    node.args = (source,)
                    above.replace_input_with(source, node)
                    above.prepend(node)
                    node.meta.update({k: v for k, v in source.meta.items() if k == "tensor_meta"})
                    moved = True

    def _share(self, node: fx.Node) -> None:
        """Let the readers of a result that keeps its grid read it from an 8-bit grid that one of them has."""
        if self._kind(node) not in KEEPS_GRID or self._kind(node) == "relu" or len(node.users) < 2:
            return
        if self._on_grid(node):  # an integer kernel wrote it, before it was moved
            return
        grids = [user for user in node.users if self._kind(user) == "grid"]
        if len(grids) == len(node.users) and any(self._bits(grid) == RESIDUAL_BITS for grid in grids):
            self._read_from(next(grid for grid in grids if self._bits(grid) == RESIDUAL_BITS), node)

    def _is_uniform(self, node: fx.Node) -> bool:
        return isinstance(self._module(node), UniformQuantizer | LSQPlus)

    def _bits(self, node: fx.Node) -> int:
        module = self._module(node)
        return module.bits if isinstance(module, UniformQuantizer) else 0

    def _on_grid(self, node: fx.Node) -> bool:
        kind = self._kind(node)
        if kind == "grid":
            return isinstance(self._module(node), Quantizer)
        if kind in MOVES:
            found = self._operation(node)
            assert found is not None
            return self._on_grid(found.inputs[0])
        return False

    def _is_integer(self, node: fx.Node) -> bool:
        """Whether an integer kernel, or one between two grids, computes ``node``."""
        found = self._operation(node)
        if found is None or not found.inputs or found.kind in ("grid", "output", ISLAND, *MOVES):
            return False
        if found.kind == "layer":
            module = self._module(node)
            if not isinstance(module, QuantizedLayer) or module.weight_quantizer is None:
                return False
        return all(self._on_grid(x) for x in found.inputs)

    def _settle(self, node: fx.Node) -> None:
        """Give the result of ``node`` one grid, or two where it is cheap enough to be computed twice."""
        end = node
        while len(end.users) == 1 and self._kind(next(iter(end.users))) in CLAMPS:
            end = next(iter(end.users))
        users = [user for user in end.users if user.op != "output" and self._operation(user) is not None]
        others = [user for user in users if self._kind(user) != "grid"]
        grids = [user for user in users if self._kind(user) == "grid"]
        if any(self._feeds_float(user) for user in others):
            return
        if others:
            grids.append(self._insert(end, others))
        if len(grids) <= 1 or (len(grids) == 2 and self._kind(node) in TWICE):
            return
        base = max(grids, key=self._bits)
        if self._bits(base) < RESIDUAL_BITS:
            base = self._insert(end, [])
        self._read_from(base, end)

    def _feeds_float(self, node: fx.Node) -> bool:
        """Whether ``node`` is a layer whose input training left in floating point, or what reaches one unchanged."""
        kind = self._kind(node)
        return kind == "layer" or (kind in KEEPS_GRID and any(self._feeds_float(user) for user in node.users))

    def _insert(self, end: fx.Node, users: list[fx.Node]) -> fx.Node:
        where = f"{end.target}" if end.op == "call_module" else f"{end.name} in {place(end)}"
        target = f"grids.calibrated.{end.name}"
        self.network.add_submodule(target, Mse(RESIDUAL_BITS, batched=True).eval())
        self.fresh[target] = where
        with self.graph.inserting_after(end):
            new = self.graph.call_module(target, (end,))
        new.meta["tensor_meta"] = end.meta["tensor_meta"]
        new.meta["lqkd_place"] = where
        for user in users:
            user.replace_input_with(end, new)
        return new

    def _read_from(self, base: fx.Node, end: fx.Node) -> None:
        end.append(base)
        for user in list(end.users):
            if user is not base and user.op != "output" and self._operation(user) is not None:
                user.replace_input_with(end, base)
                self.rerouted.append(str(user.meta.get("lqkd_place", user.name)))
