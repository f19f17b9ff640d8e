"""Writing a deployed network as a program of PyTorch's operators, of which an ML Program of Core ML is made.

Each grid is quantize and dequantize, with a clamp of the real numbers in front where a grid has fewer codes than 8
bits; each weight its codes and a scale for each channel. All else is written as the network has it, on real numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from lqkd.errors import UsageError
from lqkd.export.deploy import OUTPUT, Deployed
from lqkd.export.grids import ActivationGrid
from lqkd.export.integer import IntegerConv, IntegerLayer
from lqkd.export.litert_values import real_bias_of
from lqkd.export.nodes import place
from lqkd.models.outputs import heads
from lqkd.quantization.codes import CODES, MIDDLE

COREML = "coreml"
"""The format's name."""
_LEAST, _LARGEST = -MIDDLE, MIDDLE - 1


@dataclass(frozen=True)
class Program:
    """What an ML Program is made of.

    Attributes:
        module: the program, of one sample.
        grids: the grids by the names of their nodes in the deployed network, in the order of the program.
        layers: the layers by their places, likewise; one that is called several times stands several times.
    """

    module: fx.GraphModule
    grids: dict[str, ActivationGrid]
    layers: list[tuple[str, IntegerLayer]]


def zero_of(grid: ActivationGrid) -> tuple[int, torch.dtype]:
    """The code of zero in the file and the type of codes: those with zero in the middle are signed."""
    return (0, torch.int8) if grid.zero_point == MIDDLE else (grid.zero_point, torch.uint8)


def limits_of(grid: ActivationGrid) -> tuple[float, float] | None:
    """The smallest and largest real number of a grid of fewer codes than 8 bits have; None for others."""
    if (grid.low, grid.high) == (0, CODES - 1):
        return None
    least, most = (float((code - grid.zero_point) * grid.scale) for code in (grid.low, grid.high))
    return least, most


class Writer:
    """Turns the nodes of a deployed network into those of a program for one sample, in order.

    Args:
        deployed: the network.
    """

    def __init__(self, deployed: Deployed) -> None:
        self.deployed = deployed
        self.network = deployed.network
        self.graph = fx.Graph()
        self.held: dict[str, Tensor] = {}
        self.values: dict[fx.Node, fx.Node] = {}
        self.grids: dict[str, ActivationGrid] = {}
        self.layers: list[tuple[str, IntegerLayer]] = []

    def build(self) -> Program:
        """The program.

        Raises:
            UsageError: for the first grid that it cannot have.
        """
        names = iter(self.deployed.inputs)
        for node in self.network.graph.nodes:
            if node.op == "output":
                self.graph.output(tuple(self.values[x] for x in heads(node.args[0], OUTPUT).values()))
                continue
            module = self.network.get_submodule(str(node.target)) if node.op == "call_module" else None
            if node.op == "placeholder":
                self.values[node] = self.graph.placeholder(next(names))
            elif isinstance(module, ActivationGrid):
                self.values[node] = self._grid(node, module)
            elif isinstance(module, IntegerLayer):
                self.values[node] = self._layer(node, module)
            else:
                self.values[node] = self.graph.node_copy(node, self.values.__getitem__)
        return Program(self._module(), self.grids, self.layers)

    def _module(self) -> fx.GraphModule:
        found = [str(node.target) for node in self.graph.nodes if node.op in ("call_module", "get_attr")]
        own = {name: _found(self.network, name) for name in found if name not in self.held}
        return fx.GraphModule({**self.held, **own}, self.graph).eval()

    def _call(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        return self.graph.call_function(function, args)

    def _held(self, values: Tensor) -> fx.Node:
        name = f"tensor_{len(self.held)}"
        self.held[name] = values.detach().clone().contiguous()
        return self.graph.get_attr(name)

    def _grid(self, node: fx.Node, grid: ActivationGrid) -> fx.Node:
        if type(grid) is not ActivationGrid:
            raise UsageError(
                f"--format {COREML} cannot have activations of {grid.bits} bit in {place(node)}: use portable, or "
                "replace it in the network"
            )
        x, limits, (zero, dtype) = self.values[node.all_input_nodes[0]], limits_of(grid), zero_of(grid)
        if limits is not None:
            x = self._call(torch.clamp, x, *limits)
        information = torch.iinfo(dtype)
        parameters = (float(grid.scale), zero, information.min, information.max, dtype)
        self.grids[node.name] = grid
        codes = self._call(_operators().quantize_per_tensor.default, x, *parameters)
        return self._call(_operators().dequantize_per_tensor.default, codes, *parameters)

    def _layer(self, node: fx.Node, layer: IntegerLayer) -> fx.Node:
        self.layers.append((str(node.target), layer))
        weight = self._call(
            _operators().dequantize_per_channel.default,
            *(self._held(values) for values in (layer.codes, layer.scale, torch.zeros_like(layer.scale).long())),
            *(0, _LEAST, _LARGEST, torch.int8),
        )
        x, bias = self.values[node.all_input_nodes[0]], self._held(torch.from_numpy(real_bias_of(layer)))
        if not isinstance(layer, IntegerConv):
            return self._call(F.linear, x, weight, bias)
        return self._call(layer.function, x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def _found(network: fx.GraphModule, name: str) -> Any:
    parent, _, last = name.rpartition(".")
    return getattr(network.get_submodule(parent), last)


def _operators() -> Any:
    """Quantize and dequantize, which the import registers."""
    import torch.ao.quantization.fx._decomposed

    return torch.ops.quantized_decomposed
