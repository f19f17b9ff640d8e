"""The graph of a student with a grid wherever an integer kernel writes its result."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import fx, nn
from torch.nn.utils import parametrize

from lqkd.errors import UsageError
from lqkd.export.attention import take_attention_apart
from lqkd.export.calls import separated
from lqkd.export.explicit import (
    check_separated,
    check_takes,
    check_traced,
    explicit,
    propagate_shapes,
    recompile,
    traced,
)
from lqkd.export.gates import take_gate_apart
from lqkd.export.nodes import Operation, place
from lqkd.export.operations import operation
from lqkd.models.calls import Inputs
from lqkd.quantization import Quantizer, fold_batchnorm
from lqkd.quantization.batchnorm import Folding, take_activations_apart
from lqkd.quantization.computed import computed, copy_of
from lqkd.quantization.placement import ISLAND, Placement
from lqkd.quantization.quantizers import Mse
from lqkd.quantization.targets import RESIDUAL_BITS


def missing_grid() -> Quantizer:
    """The quantizer of a result that training left in floating point; its sign is decided from data."""
    return Mse(RESIDUAL_BITS, batched=True)


def place_grids(
    student: nn.Module, example: Inputs, missing: Callable[[], Quantizer] = missing_grid, gates: bool = False
) -> tuple[GridPlacement, Folding]:
    """The graph of a network with all grids that its kernels need, and what became of its batch norms, in place.

    Args:
        student: a quantised network in eval mode, which is changed.
        example: what it is called with, on the same device.
        missing: makes the quantizer of a grid that is missing.
        gates: whether gates without a grid get one of 256 levels, and hard swish and SiLU become products with one.

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
    before = copy_of(student)  # with tensors of its own, which nothing below writes to
    take_attention_apart(student)
    check_traced(student, example)
    apart = separated(student, partial(traced, example=example))
    if apart is not student:
        check_separated(apart, student, example)
    student = apart
    folding = fold_batchnorm(student, graph=traced(student, example))
    take_activations_apart(student)
    builder = GridPlacement(explicit(student, example, before), example, missing, gates)
    builder.place()
    return builder, folding


class GridPlacement(Placement):
    """Places grids in the graph of a network whose quantizers are nodes."""

    def __init__(
        self,
        network: fx.GraphModule,
        example: Inputs,
        missing: Callable[[], Quantizer] = missing_grid,
        gates: bool = False,
    ) -> None:
        super().__init__(network.graph)
        self.network = network
        self.missing = missing
        self.gates = gates
        self.example = example
        self.fresh: dict[str, str] = {}

    def place(self) -> None:
        super().place()
        recompile(self.network)
        propagate_shapes(self.network, self.example)

    def _kind(self, node: fx.Node) -> str:
        found = self._operation(node)
        return "" if found is None else found.kind

    def _inputs(self, node: fx.Node) -> tuple[fx.Node, ...]:
        found = self._operation(node)
        return () if found is None else found.inputs

    def _operation(self, node: fx.Node) -> Operation | None:
        if "tensor_meta" not in node.meta and node.op == "call_module":
            return Operation("grid", tuple(node.all_input_nodes), {"module": self._module(node)})
        return operation(node, self.network)

    def _module(self, node: fx.Node) -> nn.Module:
        return self.network.get_submodule(str(node.target))

    def _is_matrix_product(self, node: fx.Node) -> bool:
        found = self._operation(node)
        return found is not None and found.kind == ISLAND and found.settings["name"] == "MatMul"

    def _apart(self, node: fx.Node) -> fx.Node:
        """What ``node`` becomes where its gate needs a grid, or is one; itself elsewhere."""
        found = self._operation(node)
        returned = any(user.op == "output" or self._feeds_float(user) for user in node.users)
        if not self.gates or found is None or returned:
            return node
        return take_gate_apart(node, found, self.network)

    def _insert(self, end: fx.Node, users: list[fx.Node]) -> fx.Node:
        where = f"{end.target}" if end.op == "call_module" else f"{end.name} in {place(end)}"
        target = f"grids.calibrated.{end.name}"
        self.network.add_submodule(target, self.missing().eval())
        self.fresh[target] = where
        with self.graph.inserting_after(end):
            new = self.graph.call_module(target, (end,))
        new.meta["tensor_meta"] = end.meta["tensor_meta"]
        new.meta["lqkd_place"] = where
        for user in users:
            user.replace_input_with(end, new)
        return new
