"""Where grids go: one wherever an integer kernel writes its result."""

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
    unquantised,
)
from lqkd.export.gates import take_gate_apart
from lqkd.export.islands import KIND as ISLAND
from lqkd.export.nodes import Operation, place
from lqkd.export.operations import CLAMPS, KEEPS_GRID, MOVES, operation
from lqkd.models.calls import Inputs
from lqkd.quantization import Quantizer, fold_batchnorm
from lqkd.quantization.batchnorm import Folding, take_activations_apart
from lqkd.quantization.computed import computed
from lqkd.quantization.layers import QuantizedLayer
from lqkd.quantization.quantizers import LSQPlus, Mse, UniformQuantizer
from lqkd.quantization.targets import RESIDUAL_BITS

TWICE = ("add", "mul")
"""Kinds that are cheap enough to be computed once for each of two grids."""


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
    expected = unquantised(student, example)
    take_attention_apart(student)
    check_traced(student, example)
    apart = separated(student, partial(traced, example=example))
    if apart is not student:
        check_separated(apart, student, example)
    student = apart
    folding = fold_batchnorm(student, graph=traced(student, example))
    take_activations_apart(student)
    builder = GridPlacement(explicit(student, example, expected), example, missing, gates)
    builder.place()
    return builder, folding


class GridPlacement:
    """Places grids in the graph of a network whose quantizers are nodes."""

    def __init__(
        self,
        network: fx.GraphModule,
        example: Inputs,
        missing: Callable[[], Quantizer] = missing_grid,
        gates: bool = False,
    ) -> None:
        self.network = network
        self.missing = missing
        self.gates = gates
        self.graph = network.graph
        self.example = example
        self.fresh: dict[str, str] = {}
        self.rerouted: list[str] = []

    def place(self) -> None:
        self._hoist()
        for node in list(self.graph.nodes):
            if node.op != "output" and self._is_integer(node):
                self._settle(self._apart(node) if self.gates else node)
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
        if self._on_grid(node) or self._is_split_for_products(self._moved_from(node), [node]):
            return  # an integer kernel wrote it, before it was moved, or none has to
        grids = [user for user in node.users if self._kind(user) == "grid"]
        if len(grids) == len(node.users) and any(self._bits(grid) == RESIDUAL_BITS for grid in grids):
            self._read_from(next(grid for grid in grids if self._bits(grid) == RESIDUAL_BITS), node)

    def _moved_from(self, node: fx.Node) -> fx.Node:
        while self._kind(node) in MOVES:
            node = node.all_input_nodes[0]
        return node

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

    def _apart(self, node: fx.Node) -> fx.Node:
        """What ``node`` becomes where its gate needs a grid, or is one; itself elsewhere."""
        found = self._operation(node)
        returned = any(user.op == "output" or self._feeds_float(user) for user in node.users)
        return node if found is None or returned else take_gate_apart(node, found, self.network)

    def _settle(self, node: fx.Node) -> None:
        """Give the result of ``node`` one grid, or two where it is cheap enough to be computed twice."""
        end = node
        while len(end.users) == 1 and self._kind(next(iter(end.users))) in CLAMPS:
            end = next(iter(end.users))
        users = [user for user in end.users if user.op != "output" and self._operation(user) is not None]
        others = [user for user in users if self._kind(user) != "grid"]
        grids = [user for user in users if self._kind(user) == "grid"]
        if any(self._feeds_float(user) for user in others) or self._is_split_for_products(node, users):
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

    def _is_split_for_products(self, node: fx.Node, users: list[fx.Node]) -> bool:
        """Whether ``node`` is a linear layer of which several grids of attention's operands read a part each.

        A kernel writes its sums as real numbers then, and no further grid rounds them before those.
        """
        found = self._operation(node)
        linear = found is not None and isinstance(found.settings.get("module"), nn.Linear)
        return linear and all(self._kind(user) in MOVES and self._reaches_products(user) for user in users)

    def _reaches_products(self, node: fx.Node) -> bool:
        if self._kind(node) == "grid":
            return all(self._is_multiplied(user) for user in node.users)
        return self._kind(node) in MOVES and all(self._reaches_products(user) for user in node.users)

    def _is_multiplied(self, node: fx.Node) -> bool:
        found = self._operation(node)
        if found is None or found.kind in MOVES:
            return found is not None and all(self._is_multiplied(user) for user in node.users)
        return found.kind == ISLAND and found.settings["name"] == "MatMul"

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

    def _read_from(self, base: fx.Node, end: fx.Node) -> None:
        end.append(base)
        for user in list(end.users):
            if user is not base and user.op != "output" and self._operation(user) is not None:
                user.replace_input_with(end, base)
                self.rerouted.append(str(user.meta.get("lqkd_place", user.name)))
