"""Where a network's grids go: one wherever an integer kernel writes its result, for training and export alike."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import fx, nn

from lqkd.quantization.layers import QuantizedLayer
from lqkd.quantization.quantizers import LSQPlus, Quantizer, UniformQuantizer
from lqkd.quantization.targets import RESIDUAL_BITS

KEEPS_GRID = ("maxpool", "reshape", "transpose", "slice", "pad", "relu", "nearest", "identity")
"""Kinds whose result is on the grid of their input: they move, compare or drop values, or put zeros beside them."""
MOVES = (*KEEPS_GRID, "part", "chunks", "unbound")
"""Kinds whose result, or each of whose results, is on the grid of their input."""
CLAMPS = ("relu", "clamp")
"""Kinds that a grid behind them can do as limits on its codes."""
TWICE = ("add", "mul")
"""Kinds that are cheap enough to be computed once for each of two grids."""
ISLAND = "island"
"""The kind of what has no integer form in a runtime: its result is a real number."""


class Placement(ABC):
    """Places grids in a graph whose quantizers are nodes.

    What an operation is, by one vocabulary of kinds, is told by who derives from it, and so is how a grid is added.

    Attributes:
        graph: is changed.
        rerouted: the inputs that read a value from a grid of another reader now.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.rerouted: list[str] = []

    @abstractmethod
    def _kind(self, node: fx.Node) -> str:
        """What ``node`` computes; empty for sizes and what is computed from them."""

    @abstractmethod
    def _inputs(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """The nodes of the tensors that ``node`` computes it from."""

    @abstractmethod
    def _module(self, node: fx.Node) -> nn.Module:
        """What a ``node`` calls that calls a module."""

    @abstractmethod
    def _is_matrix_product(self, node: fx.Node) -> bool:
        """Whether ``node`` is one of attention's products."""

    @abstractmethod
    def _insert(self, end: fx.Node, users: list[fx.Node]) -> fx.Node:
        """A new grid behind ``end`` that ``users`` read in place of it."""

    def _apart(self, node: fx.Node) -> fx.Node:
        """What an operation becomes before its result gets a grid."""
        return node

    def place(self) -> None:
        """Give every result of an integer kernel a grid."""
        self._hoist()
        for node in list(self.graph.nodes):
            if node.op != "output" and self._is_integer(node):
                self._settle(self._apart(node))
        self._hoist()

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
                if self._keeps_grid(above) and list(above.users) == [node]:
                    source = above.args[0]
                    assert isinstance(source, fx.Node)
                    node.replace_all_uses_with(above)
                    node.args = (source,)
                    above.replace_input_with(source, node)
                    above.prepend(node)
                    node.meta.update({k: v for k, v in source.meta.items() if k == "tensor_meta"})
                    moved = True

    def _keeps_grid(self, node: fx.Node) -> bool:
        """Whether a grid behind ``node`` may be in front of it; in front of a ReLU half of its codes would be lost."""
        return self._kind(node) in KEEPS_GRID and self._kind(node) != "relu"

    def _share(self, node: fx.Node) -> None:
        """Let the readers of a result that keeps its grid read it from an 8-bit grid that one of them has."""
        if not self._keeps_grid(node) or len(node.users) < 2:
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
        return kind in MOVES and self._on_grid(self._inputs(node)[0])

    def _is_integer(self, node: fx.Node) -> bool:
        """Whether an integer kernel, or one between two grids, computes ``node``."""
        kind, inputs = self._kind(node), self._inputs(node)
        if not kind or not inputs or kind in ("grid", "output", ISLAND, *MOVES):
            return False
        if kind == "layer":
            module = self._module(node)
            if not isinstance(module, QuantizedLayer) or module.weight_quantizer is None:
                return False
        return all(self._on_grid(x) for x in inputs)

    def _settle(self, node: fx.Node) -> None:
        """Give the result of ``node`` one grid, or two where it is cheap enough to be computed twice."""
        end = node
        while len(end.users) == 1 and self._kind(next(iter(end.users))) in (*CLAMPS, "identity"):
            end = next(iter(end.users))
        users = [user for user in end.users if user.op != "output" and self._kind(user)]
        others = [user for user in users if self._kind(user) != "grid"]
        if any(self._feeds_float(user) for user in others) or self._is_split_for_products(node, users):
            return
        if others:
            self._insert(end, others)
        grids = [user for user in end.users if self._kind(user) == "grid"]
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
        linear = self._kind(node) == "layer" and isinstance(self._module(node), nn.Linear)
        return linear and all(self._kind(user) in MOVES and self._reaches_products(user) for user in users)

    def _reaches_products(self, node: fx.Node) -> bool:
        if self._kind(node) == "grid":
            return all(self._is_multiplied(user) for user in node.users)
        return self._kind(node) in MOVES and all(self._reaches_products(user) for user in node.users)

    def _is_multiplied(self, node: fx.Node) -> bool:
        if self._kind(node) in MOVES:
            return all(self._is_multiplied(user) for user in node.users)
        return self._is_matrix_product(node)

    def _read_from(self, base: fx.Node, end: fx.Node) -> None:
        end.append(base)
        for user in list(end.users):
            if user is not base and user.op != "output" and self._kind(user):
                user.replace_input_with(end, base)
                self.rerouted.append(str(user.meta.get("lqkd_place", user.name)))
