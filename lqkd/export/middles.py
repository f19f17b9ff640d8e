"""Steps at which no code is in the middle between two levels of the grid that reads it.

There each runtime rounds in its own way: half up, half to even, or as the last bit of a product of scales has it, and
every value with that code becomes another one in the file. A grid that the export fits can be a little coarser instead,
and one of training can be moved by a hair.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from lqkd.export.operations import operation
from lqkd.quantization import Quantizer
from lqkd.quantization.codes import ActivationCodes, activation_codes
from lqkd.quantization.placement import MOVES
from lqkd.quantization.quantizers import ReAct, UniformQuantizer

_TRIED, _COARSER, _BY_A_HAIR = 64, 1e-4, 2.5e-7
_LEAST = 1e-3
"""So far, in steps, every code shall be from the middle between two levels."""
_OF_A_FUNCTION = 4e-7
"""So far, as a part of itself, it shall be where a grid of training reads it, or a function of it."""
_OF_EACH_NUMBER = ("activation", "relu", "clamp")
"""Kinds that compute each number of one other."""
_ROUNDING = 2.0**-24
"""What rounding to float32 costs, as a part of a number; the zero point is added before a code is rounded."""
_OF_PAIRS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int]] = {"add": (torch.add, 1), "mul": (torch.mul, 4)}
"""Operations, and for how many such roundings a result shall be from a middle where a grid of training reads it.

A product is times a factor that is made of three steps. Of a sum few are lost, and a grid that is moved costs more.
"""
_VALUES = 4096
"""So many different numbers there may be among inputs for each of them to count."""


def to_the_middle(codes: Tensor, low: int, high: int) -> float:
    """How far those of ``codes`` that are not cut off are from the middle between two whole numbers, at least.

    Args:
        codes: real numbers.
        low, high: beyond a step of which they are cut off.
    """
    within = _within(codes, low, high)
    return float(_distances(codes[within]).min()) if within.any() else 0.5


def _within(codes: Tensor, low: int, high: int) -> Tensor:
    return (codes > low - 1) & (codes < high + 1)


def _distances(codes: Tensor) -> Tensor:
    return (codes - codes.floor() - 0.5).abs()


def coarser(step: Tensor, apart: Callable[[Tensor], float], least: float = _LEAST) -> Tensor:
    """The least step from ``step`` on that is far enough from all middles, or the farthest that was tried.

    Args:
        step: 0-dim.
        apart: how far a step is, in steps.
        least: how far is enough.
    """
    steps = [step * (1 + _COARSER * turn) for turn in range(_TRIED)]
    distances = []
    for tried in steps:
        distances.append(apart(tried))
        if distances[-1] >= least:
            return tried
    return steps[distances.index(max(distances))]


@dataclass(frozen=True)
class _Reading:
    """A grid that reads the numbers of another one, or a function of each.

    Attributes:
        source, reader: quantizers.
        between: what is computed of the numbers.
    """

    source: Any
    reader: Any
    between: Callable[[Tensor], Tensor]

    @property
    def sources(self) -> tuple[Any, ...]:
        return (self.source,)

    def to_the_middle(self) -> float:
        source, reader = (activation_codes(one, "") for one in (self.source, self.reader))
        if source is None or reader is None:
            return 0.5
        codes = self.between(_numbers(source)).double() / reader.scale.double() + reader.zero_point
        return to_the_middle(codes, reader.low, reader.high)

    def codes(self) -> Tensor:
        """As training rounds them, real numbers."""
        grid = activation_codes(self.source, "")
        return torch.empty(0) if grid is None else _rounded(self.between(_numbers(grid)), self.reader)

    def clearance(self, by_a_hair: bool) -> float:
        """How far the codes are from all middles, as a part of what is far enough."""
        source = activation_codes(self.source, "")
        if source is None or not by_a_hair:
            return self.to_the_middle() / _LEAST
        return _clearance(self.between(_numbers(source)), self.reader)


@dataclass(frozen=True)
class _ReadingOfPairs:
    """A grid that reads sums or products of the numbers of two grids.

    Attributes:
        sources, reader: two quantizers and one.
        before: what is computed of the numbers of each source.
        combined: their sum or product.
        roundings: for how many each is to be from a middle.
        between: what is computed of it.
    """

    sources: tuple[Any, Any]
    reader: Any
    before: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
    combined: Callable[[Tensor, Tensor], Tensor]
    roundings: int
    between: Callable[[Tensor], Tensor]

    def codes(self) -> Tensor:
        """As training rounds them, real numbers."""
        one, other = (activation_codes(grid, "") for grid in self.sources)
        if one is None or other is None:
            return torch.empty(0)
        ours, theirs = self.before[0](_numbers(one)), self.before[1](_numbers(other))
        return _rounded(self.between(self.combined(ours[:, None], theirs[None]).flatten()), self.reader)

    def clearance(self, by_a_hair: bool) -> float:
        """How far every pair is from all middles, as a part of what rounding may cost it."""
        one, other, reader = (activation_codes(grid, "") for grid in (*self.sources, self.reader))
        if one is None or other is None or reader is None:
            return 1.0
        ours, theirs = self.before[0](_numbers(one)).double(), self.before[1](_numbers(other)).double()
        pairs = self.combined(ours[:, None], theirs[None]).flatten()
        size = self.combined(ours.abs()[:, None], theirs.abs()[None]).flatten() / reader.scale.double()
        codes = self.between(pairs) / reader.scale.double() + reader.zero_point
        within = _within(codes, reader.low, reader.high)
        if not within.any():
            return 1.0
        needed = _ROUNDING * (self.roundings * size[within] + max(reader.zero_point, 1))
        return float((_distances(codes[within]) / needed).min())


@dataclass(frozen=True)
class _ReadingOfInputs:
    """A grid that reads what the network is given, of which many numbers are the same: pixels have 256.

    Attributes:
        values: each once.
        reader: a quantizer.
    """

    values: Tensor
    reader: Any

    @property
    def sources(self) -> tuple[Any, ...]:
        return ()

    def codes(self) -> Tensor:
        """As training rounds them, real numbers."""
        return _rounded(self.values, self.reader)

    def clearance(self, by_a_hair: bool) -> float:
        """How far the values are from all middles, as a part of what is far enough."""
        return _clearance(self.values, self.reader)


_AnyReading: TypeAlias = _Reading | _ReadingOfPairs | _ReadingOfInputs


def _clearance(values: Tensor, reader: Any) -> float:
    grid = activation_codes(reader, "")
    if grid is None:
        return 1.0
    codes = values.double() / grid.scale.double()
    within = _within(codes + grid.zero_point, grid.low, grid.high)
    if not within.any():
        return 1.0
    needed = _OF_A_FUNCTION * codes[within].abs() + _ROUNDING * max(grid.zero_point, 1)
    return float((_distances(codes[within]) / needed).min())


def _rounded(values: Tensor, reader: Any) -> Tensor:
    grid = activation_codes(reader, "")
    if grid is None:
        return torch.empty(0)
    return torch.clamp(torch.round(values / grid.scale) + grid.zero_point, grid.low, grid.high)


def _numbers(grid: ActivationCodes) -> Tensor:
    return (torch.arange(grid.low, grid.high + 1) - grid.zero_point) * grid.scale


@torch.no_grad()
def keep_off_middles(network: fx.GraphModule, fitted: Iterable[str], given: Mapping[str, Iterable[Tensor]]) -> None:
    """Make grids a little coarser, so that no code that is read from grid to grid is in a middle, in place.

    A grid that was fitted at export gets up to 0.6 % coarser. One of training stays as it is, unless a code that it
    reads, a sum or product of two, or a pixel is so close to a middle that the last bits of float32 decide: its step
    changes by less than two parts of 100,000 then, mostly by one of a million, and to the side that training rounds to.

    Args:
        network: with quantizers, whose shapes are known.
        fitted: the names of those that may be changed by more, in the order of the network.
        given: batches of what the network is called with, by the names of its arguments.
    """
    values = {name: found for name, examples in given.items() if (found := _different(examples)) is not None}
    readings = list(_readings(network, values))
    ours: set[Any] = {network.get_submodule(target) for target in fitted}
    for quantizer in dict.fromkeys(_quantizer(node, network) for node in network.graph.nodes):
        is_fitted = quantizer in ours
        own = [one for one in readings if one.reader is quantizer or (is_fitted and quantizer in one.sources)]
        if own and _has_this_step(quantizer):
            (_make_coarser if is_fitted else _move_by_a_hair)(quantizer, own)


def _different(examples: Iterable[Tensor]) -> Tensor | None:
    """The numbers that examples are of, each once; None where there are too many for any to be frequent."""
    found = torch.empty(0)
    for one in examples:
        found = torch.cat([found, one.float().unique()]).unique()
        if len(found) > _VALUES:
            return None
    return found


def _has_this_step(quantizer: Any) -> bool:
    """Whether its ``scale`` is its step, and not a number of which a power of two is made, say."""
    return isinstance(quantizer, UniformQuantizer) and torch.equal(quantizer.scale, quantizer.step())


def _make_coarser(quantizer: Any, own: list[_AnyReading]) -> None:
    def clearance(step: Tensor) -> float:
        quantizer.scale.copy_(step)
        return min(one.clearance(by_a_hair=False) for one in own)

    quantizer.scale.copy_(coarser(quantizer.scale.clone(), clearance, 1.0))


def _move_by_a_hair(quantizer: Any, own: list[_AnyReading]) -> None:
    """To the nearest step that is far enough from all middles, if there is one.

    Of two that are as near it is the one that rounds more codes as training does.
    """
    step, codes = quantizer.scale.clone(), [one.codes() for one in own]
    for turn in range(_TRIED):
        tried: list[tuple[int, Tensor]] = []
        for sign in (1, -1):
            quantizer.scale.copy_(step * (1 + sign * _BY_A_HAIR * turn))
            if min(one.clearance(by_a_hair=True) for one in own) >= 1:
                others = sum(int((one.codes() != was).sum()) for one, was in zip(own, codes, strict=True))
                tried.append((others, quantizer.scale.clone()))
        if tried:
            quantizer.scale.copy_(min(tried, key=operator.itemgetter(0))[1])
            return
    quantizer.scale.copy_(step)


def _readings(network: fx.GraphModule, values: Mapping[str, Tensor]) -> Iterator[_AnyReading]:
    for node in network.graph.nodes:
        reader = _quantizer(node, network)
        if reader is None or isinstance(reader, ReAct):
            continue
        (behind,) = node.all_input_nodes
        end, between = _above(behind, network)
        found = _quantizer(end, network)
        if found is not None:
            yield _Reading(found, reader, between)
            continue
        if end.op == "placeholder" and str(end.target) in values:
            yield _ReadingOfInputs(between(values[str(end.target)]), reader)
        kind = getattr(operation(end, network), "kind", "")
        if kind not in _OF_PAIRS or len(end.all_input_nodes) != 2:
            continue
        (one, before_one), (other, before_other) = (_above(above, network) for above in end.all_input_nodes)
        sources = _quantizer(one, network), _quantizer(other, network)
        if sources[0] is not None and sources[1] is not None:
            before = before_one, before_other
            yield _ReadingOfPairs((sources[0], sources[1]), reader, before, *_OF_PAIRS[kind], between)


def _above(node: fx.Node, network: fx.GraphModule) -> tuple[fx.Node, Callable[[Tensor], Tensor]]:
    """What ``node`` computes each of its numbers of, and how; moves count for nothing."""
    path: list[fx.Node] = []
    while _quantizer(node, network) is None and len(node.all_input_nodes) == 1:
        kind = getattr(operation(node, network), "kind", "")
        if kind not in (*_OF_EACH_NUMBER, *MOVES):
            break
        if kind in _OF_EACH_NUMBER:
            path.insert(0, node)
        (node,) = node.all_input_nodes
    return node, _composed(path, network)


def _quantizer(node: fx.Node, network: fx.GraphModule) -> Quantizer | None:
    module = network.get_submodule(str(node.target)) if node.op == "call_module" else None
    return module if isinstance(module, Quantizer) else None


def _composed(path: list[fx.Node], network: fx.GraphModule) -> Callable[[Tensor], Tensor]:
    """What the nodes of ``path`` compute one after the other, of numbers of any shape."""

    def compute(x: Tensor) -> Tensor:
        interpreter = fx.Interpreter(network)
        for node in path:
            interpreter.env[node.all_input_nodes[0]] = x
            x = interpreter.run_node(node)
        return x

    return compute
