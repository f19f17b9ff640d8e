"""Steps at which no code is in the middle between two levels of the grid that reads it.

There each runtime rounds in its own way: half up, half to even, or as the last bit of a product of scales has it, and
every value with that code becomes another one in the file. A grid that the export fits can be a little coarser instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lqkd.export.operations import operation
from lqkd.quantization import Quantizer
from lqkd.quantization.codes import activation_codes
from lqkd.quantization.placement import MOVES
from lqkd.quantization.quantizers import ReAct

_TRIED, _COARSER = 64, 1e-4
_LEAST = 1e-3
"""So far, in steps, every code shall be from the middle between two levels."""
_OF_EACH_NUMBER = ("activation", "relu", "clamp")
"""Kinds that compute each number of one other."""


def to_the_middle(codes: Tensor, low: int, high: int) -> float:
    """How far those of ``codes`` that are not cut off are from the middle between two whole numbers, at least.

    Args:
        codes: real numbers.
        low, high: beyond a step of which they are cut off.
    """
    within = codes[(codes > low - 1) & (codes < high + 1)]
    return float((within - within.floor() - 0.5).abs().min()) if len(within) else 0.5


def coarser(step: Tensor, apart: Callable[[Tensor], float]) -> Tensor:
    """The least step from ``step`` on that is far enough from all middles, or the farthest that was tried.

    Args:
        step: 0-dim.
        apart: how far a step is, in steps.
    """
    steps = [step * (1 + _COARSER * turn) for turn in range(_TRIED)]
    distances = []
    for tried in steps:
        distances.append(apart(tried))
        if distances[-1] >= _LEAST:
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

    def to_the_middle(self) -> float:
        source, reader = (activation_codes(one, "") for one in (self.source, self.reader))
        if source is None or reader is None:
            return 0.5
        numbers = (torch.arange(source.low, source.high + 1) - source.zero_point) * source.scale
        codes = self.between(numbers).double() / reader.scale.double() + reader.zero_point
        return to_the_middle(codes, reader.low, reader.high)


@torch.no_grad()
def keep_off_middles(network: fx.GraphModule, fitted: Iterable[str]) -> None:
    """Make grids that were fitted at export a little coarser, so that no code read from grid to grid is in a middle.

    Args:
        network: with quantizers, whose shapes are known.
        fitted: the names of those that may be changed, by at most 0.6 %, in the order of the network.
    """
    readings = list(_readings(network))
    for target in fitted:
        quantizer: Any = network.get_submodule(target)
        own = [one for one in readings if quantizer in (one.source, one.reader)]

        def apart(step: Tensor, quantizer: Any = quantizer, own: list[_Reading] = own) -> float:
            quantizer.scale.copy_(step)
            return min(one.to_the_middle() for one in own)

        if own:
            quantizer.scale.copy_(coarser(quantizer.scale.clone(), apart))


def _readings(network: fx.GraphModule) -> Iterator[_Reading]:
    for node in network.graph.nodes:
        reader = _quantizer(node, network)
        if reader is None or isinstance(reader, ReAct):
            continue
        path: list[fx.Node] = []
        (source,) = node.all_input_nodes
        while _quantizer(source, network) is None and len(source.all_input_nodes) == 1:
            kind = getattr(operation(source, network), "kind", "")
            if kind not in (*_OF_EACH_NUMBER, *MOVES):
                break
            if kind in _OF_EACH_NUMBER:
                path.insert(0, source)
            (source,) = source.all_input_nodes
        found = _quantizer(source, network)
        if found is not None:
            yield _Reading(found, reader, _composed(path, network))


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
