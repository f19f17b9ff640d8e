"""Values that an integer kernel writes once and that several grids read."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx, nn

from lqkd.quantization.layers import QUANTIZED_LAYERS, QuantizedLayer
from lqkd.quantization.moves import clamps, moves
from lqkd.quantization.norms import is_batch_norm
from lqkd.quantization.ports import Calls, Port
from lqkd.quantization.quantizers import Quantizer

_FLOAT = "a layer whose input is in floating point"
TWICE = 2
"""An addition or product is cheap enough to be computed for so many grids."""


def shared_activations(
    graph: fx.Graph, model: nn.Module, calls: Calls, planned: Mapping[fx.Node, list[Port]], pairs: frozenset[fx.Node]
) -> dict[fx.Node, Port]:
    """The values that need a grid of their own, since several layers or joins read each on another one.

    An integer kernel writes its result as codes of one grid. What reads them on a second grid rounds twice: it gets
    ``q2(q1(x))``, where training without a grid at this place gives it ``q2(x)``. A value is left out where a layer
    reads it in floating point, where no hook reaches it before all of its readers, and where it is that of an addition
    or product (and a clamp) with two readers, which are computed for each.

    Args:
        graph: of ``model``.
        model: a network with quantised layers.
        calls: what was called while it was traced.
        planned: the operands of joins that are going to be quantised, and where hooks reach them.
        pairs: the additions and products.

    Returns:
        For each value, a place where a hook reaches it before all of its readers.
    """
    return _Search(model, calls, planned, pairs).run(graph)


class _Search:
    def __init__(
        self, model: nn.Module, calls: Calls, planned: Mapping[fx.Node, list[Port]], pairs: frozenset[fx.Node]
    ) -> None:
        self.model = model
        self.calls = calls
        self.planned = planned
        self.pairs = pairs
        self.found: dict[fx.Node, Port] = {}

    def run(self, graph: fx.Graph) -> dict[fx.Node, Port]:
        for node in graph.nodes:  # values before what moves them
            if node.op in ("call_module", "call_function", "call_method") and self._is_shared(node):
                ports = self.calls.ports(node, self.model)
                port = next((p for p in ports if all(p.holds(user) for user in node.users)), None)
                if port is not None:
                    self.found[node] = port
        return self.found

    def _is_shared(self, node: fx.Node) -> bool:
        if self._is_on_grid(node):
            return False
        read = [grids for grids in (self._read_by(user, node) for user in node.users) if grids]
        grids = set().union(*read)
        if len(read) < 2 or len(grids) < 2 or _FLOAT in grids:
            return False
        return not (len(grids) <= TWICE and self._is_pair(node)) and self._is_written(node)

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.model.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _is_on_grid(self, node: fx.Node) -> bool:
        if node in self.found or isinstance(self._module(node), Quantizer) or self._quantizes_output(node):
            return True
        ports = self.planned.get(node, ())
        if any(all(port.holds(user) for user in node.users) for port in ports):
            return True
        return moves(node, self.model) and self._is_on_grid(node.all_input_nodes[0])

    def _quantizes_output(self, node: fx.Node) -> bool:
        return getattr(self._module(node), "output_quantizer", None) is not None

    def _read_by(self, user: fx.Node, node: fx.Node) -> set[str]:
        """The grids on which ``user``, or what it moves the value to, reads ``node``."""
        module = self._module(user)
        before = next((port for port in self.planned.get(node, ()) if port.holds(user)), None)
        if before is not None:
            return {str(before)}
        if isinstance(module, Quantizer):
            return {str(user.target)}
        if isinstance(module, (QuantizedLayer, *QUANTIZED_LAYERS)):
            quantizer = getattr(module, "input_quantizer", None)
            return {_FLOAT} if quantizer is None else {f"input of {user.target}"}
        if not moves(user, self.model):
            return set()
        behind = next((port for port in self.planned.get(user, ()) if port.output), None)
        if behind is not None or self._quantizes_output(user):
            return {str(behind or user.target)}
        return set().union(*(self._read_by(reader, user) for reader in user.users))

    def _is_pair(self, node: fx.Node) -> bool:
        while clamps(node, self.model):
            node = node.all_input_nodes[0]
        return node in self.pairs

    def _is_written(self, node: fx.Node) -> bool:
        """Whether something computes the value that has a chance to do so in integers."""
        while clamps(node, self.model) or moves(node, self.model) or is_batch_norm(self._module(node)):
            node = node.all_input_nodes[0]
        module = self._module(node)
        if isinstance(module, QuantizedLayer):
            return module.weight_quantizer is not None
        return node.op not in ("placeholder", "get_attr") and not isinstance(module, tuple(QUANTIZED_LAYERS))
