"""A deployed network in PyTorch as integer kernels compute it: whole numbers are added and rounded once for each grid.

The formulas are those of ONNX Runtime on x86 with AVX2 or later, in the order in which it multiplies the scales; a sum
of whole numbers is the same in any order. So the logits are the runtime's to the last bit. In floating point single
codes would differ by a step, and deep layers may multiply that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, fx

from lqkd.export.gates import SIX, THREE, is_gate, is_settled
from lqkd.export.grids import ActivationGrid, LookupGrid, SignGrid
from lqkd.export.integer import IntegerLayer, IntegerLinear
from lqkd.export.nodes import Operation
from lqkd.export.operations import operation
from lqkd.quantization.placement import CLAMPS, MOVES

_EXACT = ("input", "output", "constant", "add", "mul", "clamp", "cat", *MOVES)
"""Kinds that round alike everywhere when they compute in floating point."""


@dataclass(frozen=True)
class Codes:
    """A value on a grid.

    Attributes:
        values: its codes minus the code of zero: whole numbers, float32.
        grid: the grid.
    """

    values: Tensor
    grid: ActivationGrid

    @property
    def largest(self) -> int:
        """The largest magnitude that ``values`` may have."""
        return max(abs(self.grid.low - self.grid.zero_point), abs(self.grid.high - self.grid.zero_point))

    def real(self) -> Tensor:
        """The real numbers, float32."""
        return self.values * self.grid.scale


@dataclass(frozen=True)
class Unrounded:
    """What an integer kernel has before it rounds.

    Attributes:
        shape: of the value, for those who only ask for it.
        round: from the grid behind the kernel to codes, which its limits still have to clamp.
        clamps: limits of the real numbers, the last of them first.
    """

    shape: torch.Size
    round: Callable[[ActivationGrid], Tensor]
    clamps: tuple[tuple[float | None, float | None], ...] = ()

    def size(self, axis: int | None = None) -> torch.Size | int:
        """As of a tensor."""
        return self.shape if axis is None else self.shape[axis]


class Reference(fx.Interpreter):
    """Runs a deployed network on its inputs, float32, and returns what ONNX Runtime's integer kernels return.

    Attributes:
        exact: after a run, whether nothing was computed in floating point whose last bits depend on who computes it,
            such as a convolution without a grid or a sigmoid.
        step: of the last value that was rounded or summed: of the accumulators of a classifier, (classes,), or a grid.
        steps: the name of every node to ``step`` after it.
    """

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__(network)
        self.exact = True
        self.step = torch.ones(())
        self.steps: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Any:
        """What the network returns for ``inputs``, in its order: logits, say."""
        return self.run(*inputs)

    def run_node(self, n: fx.Node) -> Any:
        result = self._run(n)
        self.steps[n.name] = self.step
        return result

    def _run(self, n: fx.Node) -> Any:
        found = self._operation(n)
        kernel = None if found is None else getattr(self, f"_{found.kind}", None)
        if found is not None and kernel is not None:
            result = kernel(n, found, *(self.env[x] for x in found.inputs))
            if result is not None:
                return result
        self.exact = self.exact and (found is None or found.kind in _EXACT)
        return self._called(n, _real)

    def _operation(self, node: fx.Node) -> Operation | None:
        return operation(node, cast(fx.GraphModule, self.module))

    def _called(self, node: fx.Node, read: Callable[[Any], Any]) -> Any:
        """Run ``node`` as PyTorch does, on ``read(value)`` of each value that it takes."""
        arguments = fx.node.map_arg((node.args, node.kwargs), lambda x: read(self.env[x]))
        return getattr(self, node.op)(node.target, *arguments)

    def is_rounded(self, node: fx.Node, readers: int = 1) -> bool:
        """Whether grids, and no more than ``readers``, are all that reads ``node``, directly or behind clamps."""
        users = self._readers(node)
        while len(users) == 1 and self._kind(users[0]) in CLAMPS:
            users = self._readers(users[0])
        return len(users) <= readers and all(self._kind(user) == "grid" and self._rounds(user) for user in users)

    def _readers(self, node: fx.Node) -> list[fx.Node]:
        """What reads the value of ``node``, and not only its size."""
        return [user for user in node.users if self._operation(user) is not None]

    def _kind(self, node: fx.Node) -> str:
        found = self._operation(node)
        return "" if found is None else found.kind

    def _rounds(self, node: fx.Node) -> bool:
        return not isinstance(self.submodules[str(node.target)], LookupGrid | SignGrid)

    gates = True
    """Whether a hard sigmoid between two grids is a sum of integers; its codes are the same where it is none."""
    reshapes = True
    """Whether the result of a linear layer on three axes is reshaped, in floating point, before its grid."""

    # ---- roundings: codes that the limits of the grid still have to clamp

    def quantised(self, x: Tensor, grid: ActivationGrid) -> Tensor:
        """Codes of real numbers."""
        return grid.codes(x)

    def requantised(self, sums: Tensor, x: Codes, layer: IntegerLayer, grid: ActivationGrid) -> Tensor:
        """Codes of what a layer summed of the codes ``x``."""
        factor = layer.by_channel(x.grid.scale * (layer.scale / layer.multiplier), sums.ndim)
        return rounded(sums, factor / grid.scale, grid)

    def added(self, a: Codes, b: Codes | None, grid: ActivationGrid) -> Tensor:
        """Codes of ``a + b``; of ``a`` on another grid where there is no ``b``."""
        return added(a, b, grid)

    def multiplied(self, a: Codes, b: Codes, grid: ActivationGrid) -> Tensor:
        """Codes of ``a * b``."""
        return multiplied(a, b, grid)

    # ---- kernels: each returns None where a runtime computes in floating point

    def _grid(self, node: fx.Node, found: Operation, x: Any) -> Codes | None:
        grid = found.settings["module"]
        if isinstance(grid, LookupGrid):
            return None
        if isinstance(grid, SignGrid) or isinstance(x, Tensor):
            codes, clamps = self.quantised(_real(x), grid), ()
        elif isinstance(x, Codes):
            codes, clamps = self.added(x, None, grid), ()
        else:
            codes, clamps = x.round(grid), x.clamps
        self.step = grid.scale
        return Codes(codes.clamp_(*grid.limits(clamps)).sub_(grid.zero_point), grid)

    def _layer(self, node: fx.Node, found: Operation, x: Any) -> Unrounded | Tensor | None:
        layer = found.settings["module"]
        if not isinstance(layer, IntegerLayer) or layer.levels is not None or not isinstance(x, Codes):
            return None
        scale = x.grid.scale * (layer.scale / layer.multiplier)
        linear = isinstance(layer, IntegerLinear)
        has_grid = self.is_rounded(node) and not (linear and self.reshapes and x.values.ndim > 2)
        if not (linear or has_grid):
            return None
        sums = layer.sums(x.values, x.largest)
        if has_grid:
            return Unrounded(sums.shape, lambda grid: self.requantised(sums, x, layer, grid))
        self.step = scale
        return sums * scale

    def _add(self, node: fx.Node, found: Operation, *operands: Any) -> Unrounded | None:
        if not self._is_pair(node, operands):
            return None
        self.exact = self.exact and operands[0].values.shape == operands[1].values.shape
        orders = [operands[::-1], operands]  # where two grids read the sum, the file has it twice, then reversed

        def in_turn(grid: ActivationGrid) -> Tensor:
            a, b = orders.pop()
            return self.added(a, b, grid)

        return Unrounded(_joint_shape(operands), in_turn)

    def _mul(self, node: fx.Node, found: Operation, *operands: Any) -> Unrounded | None:
        if not self._is_pair(node, operands):
            return None
        a, b = operands
        return Unrounded(_joint_shape(operands), lambda grid: self.multiplied(a, b, grid))

    def _island(self, node: fx.Node, found: Operation, *operands: Any) -> Unrounded | Tensor | None:
        """A product of two values on grids, as of attention; all other islands are in floating point."""
        if found.settings["name"] != "MatMul" or not all(isinstance(x, Codes) for x in operands):
            return None
        a, b = operands
        sums, scale = (a.values.double() @ b.values.double()).float(), a.grid.scale * b.grid.scale
        if self.is_rounded(node):
            return Unrounded(sums.shape, lambda grid: rounded(sums, scale / grid.scale, grid))
        self.step = scale
        return sums * scale

    def _is_pair(self, node: fx.Node, operands: tuple[Any, ...]) -> bool:
        return len(operands) == 2 and all(isinstance(x, Codes) for x in operands) and self.is_rounded(node, 2)

    def _globalpool(self, node: fx.Node, found: Operation, x: Any) -> Unrounded | None:
        if not isinstance(x, Codes) or not self.is_rounded(node):
            return None
        axes = tuple(range(2, x.values.ndim))
        count = x.values[0, 0].numel()
        sums = x.values.sum(axes, keepdim=found.settings["keepdim"], dtype=torch.float64).float()
        return Unrounded(sums.shape, lambda grid: rounded(sums, mean_factor(x.grid, grid, count), grid))

    def _avgpool(self, node: fx.Node, found: Operation, x: Any) -> Unrounded | None:
        if not isinstance(x, Codes) or not self.is_rounded(node):
            return None
        means = self._called(node, _real)
        return Unrounded(means.shape, lambda grid: averaged(means, grid))

    def _relu(self, node: fx.Node, found: Operation, x: Any) -> Codes | Unrounded | None:
        if isinstance(x, Codes):
            return replace(x, values=x.values.relu())
        return replace(x, clamps=((0.0, None), *x.clamps)) if isinstance(x, Unrounded) else None

    def _clamp(self, node: fx.Node, found: Operation, x: Any) -> Unrounded | None:
        if isinstance(x, Codes) and self.is_rounded(node):
            codes = x
            x = Unrounded(codes.values.shape, lambda grid: self.added(codes, None, grid))
        limits = (found.settings["low"], found.settings["high"])
        return replace(x, clamps=(limits, *x.clamps)) if isinstance(x, Unrounded) else None

    def _moved(self, node: fx.Node, found: Operation, x: Any) -> Codes | None:
        if not isinstance(x, Codes):
            return None
        return Codes(self._called(node, _whole), x.grid)

    _maxpool = _reshape = _transpose = _slice = _pad = _nearest = _moved

    def _chunks(self, node: fx.Node, found: Operation, x: Any) -> tuple[Codes, ...] | None:
        if not isinstance(x, Codes):
            return None
        return tuple(Codes(part, x.grid) for part in self._called(node, _whole))

    _unbound = _chunks

    def _part(self, node: fx.Node, found: Operation, x: Any) -> Any:
        return x[found.settings["index"]]

    def _activation(self, node: fx.Node, found: Operation, x: Any) -> Tensor | Unrounded | None:
        """Hard sigmoid and hard swish as ONNX defines them, with a sixth in float32."""
        name = found.settings["name"]
        if name == "Sigmoid" and is_settled(node, self._operation):
            return cast(Tensor, _real(x).sigmoid())
        if name not in ("HardSigmoid", "HardSwish"):
            return None
        if name == "HardSigmoid" and self.gates and isinstance(x, Codes) and is_gate(node, self._operation, x.grid):
            codes = x
            return Unrounded(codes.values.shape, lambda grid: hard_gate(codes, grid), ((0.0, 1.0),))
        x = _real(x)
        gate = (x * torch.tensor(1 / 6) + 0.5).clamp(0, 1)
        return cast(Tensor, gate if name == "HardSigmoid" else x * gate)


def _joint_shape(operands: tuple[Codes, ...]) -> torch.Size:
    return torch.broadcast_shapes(*(operand.values.shape for operand in operands))


def _real(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(_real(part) for part in value)
    return value.real() if isinstance(value, Codes) else value


def _whole(value: Any) -> Any:
    return value.values if isinstance(value, Codes) else value


def rounded(sums: Tensor, factor: Tensor, grid: ActivationGrid) -> Tensor:
    """Codes of ``sums * factor`` on ``grid``, which its limits still have to clamp."""
    return (sums * factor).round_().add_(grid.zero_point)


def mean_factor(source: ActivationGrid, grid: ActivationGrid, count: int) -> Tensor:
    """What turns sums of ``count`` codes of ``source`` into means on ``grid``."""
    return source.scale / (grid.scale * count)


def averaged(means: Tensor, grid: ActivationGrid) -> Tensor:
    """Codes of ``means``, real numbers, likewise; the zero of the grid is added before rounding."""
    return (means / grid.scale).add_(grid.zero_point).round_()


def multiplied(a: Codes, b: Codes, grid: ActivationGrid) -> Tensor:
    """Codes of ``a * b`` likewise."""
    factor = a.grid.scale * b.grid.scale / grid.scale
    return (a.values * b.values).mul_(factor).add_(grid.zero_point).round_()


def hard_gate(x: Codes, grid: ActivationGrid) -> Tensor:
    """Codes of the hard sigmoid of ``x`` likewise: of ``x + 3`` on a grid of six times the step."""
    three = ActivationGrid(torch.tensor(THREE), 0, 0, 1, bits=8)
    sixfold = ActivationGrid(grid.scale * SIX, grid.zero_point, grid.low, grid.high, grid.bits)
    return added(x, Codes(torch.ones(()), three), sixfold)


def added(a: Codes, b: Codes | None, grid: ActivationGrid) -> Tensor:
    """Codes of ``a + b`` likewise: fused multiplications and additions, ``b`` first, of codes with their zeros."""
    ratio_a = a.grid.scale / grid.scale
    zero_a, zero = a.values.new_tensor(a.grid.zero_point), grid.zero_point
    if b is None:
        summand = zero - ratio_a * zero_a
    else:
        ratio_b = b.grid.scale / grid.scale
        zeros = _fused(zero_a, ratio_a, ratio_b * b.grid.zero_point)
        summand = _fused(b.values + b.grid.zero_point, ratio_b, zero - zeros)
    return _fused(a.values + zero_a, ratio_a, summand).round_()


def _fused(x: Tensor, factor: Tensor, summand: Tensor) -> Tensor:
    """``x * factor + summand``, rounded once to float32: in float64 the product of a code and a scale is exact."""
    return x.double().mul_(factor.double()).add(summand).float()
