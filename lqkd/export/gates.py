"""Gates on grids; hard swish and SiLU as integer kernels compute them, a value times its gate.

ONNX Runtime has a table for sigmoids of codes, and integer sums and products. It has no kernel for hard swish or SiLU:
in floating point between two grids they take more than twice as long.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from lqkd.export.grids import ActivationGrid, LookupGrid, SignGrid
from lqkd.export.middles import coarser, to_the_middle
from lqkd.export.nodes import Operation
from lqkd.quantization import Quantizer
from lqkd.quantization.codes import CODES
from lqkd.quantization.quantizers import MinMax

THREE, SIX = 3.0, 6.0
"""Hard sigmoid is ``clamp(x + 3, 0, 6) / 6``."""
SIXFOLD = "sixfold_scale"
"""What a file calls the step of ``x + 3`` behind the name of the grid."""
_GATES: dict[str, Callable[[Tensor], Tensor]] = {"HardSigmoid": F.hardsigmoid, "Sigmoid": torch.sigmoid}
_SELF_GATED = {"HardSwish": "HardSigmoid", "SiLU": "Sigmoid"}
"""What a value is multiplied by, that hangs on nothing but the value."""
_STEP = 1 / (CODES - 1)
_LEAST_STEPS = 8
"""So many steps three must have for a gate to share the codes of its value."""
_ROUNDING = 2e-4
"""So far, in steps, the middle between two levels of a trained grid is from what float32 makes of a sum."""


class GateRange(MinMax):
    """What becomes a :class:`GateGrid` when it has seen how large its gate gets."""

    def __init__(self) -> None:
        super().__init__(bits=8, signed=False, batched=True)

    def grid(self) -> GateGrid:
        """Levels up to the largest gate, at most to 1, and to 1 where it has seen none."""
        return GateGrid(min(float(self.step()), _STEP) if self.is_ready else _STEP)


class GateGrid(ActivationGrid):
    """The grid of a gate: numbers from 0 to 1, or to the largest that there are, on 256 levels.

    Args:
        step: between two levels.

    Attributes:
        shared: whether its codes are those of the value, cut off, as a hard sigmoid may have them.
    """

    def __init__(self, step: float = _STEP) -> None:
        super().__init__(torch.tensor(step), 0, 0, CODES - 1, bits=8)
        self.shared = False

    def share(self, source: ActivationGrid) -> bool:
        """Let a hard sigmoid have the codes of its value, so that it is exact; tell whether that is possible.

        Three are a whole number of steps then: the step of the value is moved by less than a fifteenth, mostly by less
        than a hundredth.

        Args:
            source: of the value, which is changed.
        """
        three = round(THREE / float(source.scale))
        if not _LEAST_STEPS <= three <= source.zero_point:
            return False
        source.scale = torch.tensor(THREE / three)
        self.scale = source.scale / SIX
        self.zero_point = source.zero_point - three
        self.low, self.high = max(source.low, self.zero_point), min(source.high, source.zero_point + three)
        self.shared = True
        return True

    def settle(self, source: ActivationGrid, gate: str) -> None:
        """Make the step a little coarser, so that no code hangs on the last bits of what computes the gate.

        Args:
            source: what the gate is computed of.
            gate: ``HardSigmoid`` or ``Sigmoid``.
        """
        values = _of_each_code(source, gate)
        self.scale = coarser(self.scale, lambda step: _to_the_middle(values, step))


def _to_the_middle(values: Tensor, step: Tensor) -> float:
    return to_the_middle(values.double() / step.double(), 0, CODES - 1)


def _of_each_code(source: ActivationGrid, gate: str) -> Tensor:
    return _GATES[gate](source.scale * (torch.arange(source.low, source.high + 1) - source.zero_point))


def is_gate(node: fx.Node, of: Callable[[fx.Node], Operation | None], source: ActivationGrid) -> bool:
    """Whether a hard sigmoid can be a sum of integers: one grid reads it, and has the same codes as in floating point.

    Args:
        node: the hard sigmoid.
        of: tells operations.
        source: the grid of its value.
    """
    readers = [found for user in node.users if (found := of(user)) is not None]
    grids = [found.settings["module"] for found in readers if found.kind == "grid"]
    if len(readers) != 1 or len(grids) != 1 or isinstance(grids[0], SignGrid | LookupGrid):
        return False
    values = _of_each_code(source, "HardSigmoid").to(grids[0].scale)
    return isinstance(grids[0], GateGrid) or _to_the_middle(values, grids[0].scale) >= _ROUNDING


def is_settled(node: fx.Node, of: Callable[[fx.Node], Operation | None]) -> bool:
    """Whether a :class:`GateGrid` reads ``node``, whose codes are the same whoever computes the gate."""
    readers = [found for user in node.users if (found := of(user)) is not None]
    return all(isinstance(found.settings.get("module"), GateGrid) for found in readers)


def take_gate_apart(node: fx.Node, found: Operation, network: fx.GraphModule) -> fx.Node:
    """Put the gate of an operation on a grid, in place.

    Args:
        node: an activation. A value times its gate becomes a gate and a product; what is a gate gets a grid unless
            training left it one; all others stay.
        found: its operation.
        network: whose graph is changed.

    Returns:
        What has the value of ``node`` now, or the gate itself.
    """
    name = found.settings.get("name")
    if found.kind != "activation":
        return node
    if name in _GATES and not any(isinstance(_called(user, network), Quantizer) for user in node.users):
        grid = _grid_behind(node, node.name, network)
        node.replace_all_uses_with(grid, delete_user_cb=lambda user: user is not grid)
    if name not in _SELF_GATED:
        return node
    (x,) = found.inputs
    with network.graph.inserting_before(node):
        gate = network.graph.call_function(_GATES[_SELF_GATED[name]], (x,))
        product = network.graph.call_function(operator.mul, (x, _grid_behind(gate, node.name, network)))
    for new in (gate, *gate.users, product):
        new.meta.update(node.meta)
    node.replace_all_uses_with(product)
    network.graph.erase_node(node)
    return product


def _called(node: fx.Node, network: fx.GraphModule) -> object:
    return network.get_submodule(str(node.target)) if node.op == "call_module" else None


def _grid_behind(gate: fx.Node, name: str, network: fx.GraphModule) -> fx.Node:
    target = f"grids.gates.{name}"
    network.add_submodule(target, GateRange().eval())
    with network.graph.inserting_after(gate):
        grid = network.graph.call_module(target, (gate,))
    grid.meta.update({key: value for key, value in gate.meta.items() if key != "nn_module_stack"})
    return grid
