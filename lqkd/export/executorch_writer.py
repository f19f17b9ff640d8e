"""Writing a deployed network as a program of PyTorch's operators between quantize and dequantize, for XNNPACK.

The partitioner of ExecuTorch's XNNPACK delegate takes an operator between dequantize and quantize for one on int8
codes, whose numbers are the student's here. Every reader of codes has a dequantize of its own, as the partitioner wants
it. Limits of fewer than 8 bits are a clamp from codes to codes behind the operator, which XNNPACK makes a part of it
when it loads the program. What has no form in integers is written as the network has it, on real numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from lqkd.errors import UsageError
from lqkd.export.deploy import OUTPUT, Deployed
from lqkd.export.executorch_reference import Delegated
from lqkd.export.grids import ActivationGrid
from lqkd.export.integer import IntegerConv, IntegerLayer
from lqkd.export.litert_values import BYTE, IMAGE, bias_of, real_bias_of, weight_of
from lqkd.export.nodes import Operation, place, shape_of
from lqkd.export.operations import operation
from lqkd.models.outputs import heads

EXECUTORCH = "executorch"
"""The format's name."""
_LEAST, _LARGEST = -128, 127


@dataclass(frozen=True)
class Codes:
    """A value on a grid.

    Attributes:
        node: of the program; int8.
        grid: the grid, whose codes are larger by :data:`~lqkd.export.litert_values.BYTE`.
    """

    node: fx.Node
    grid: ActivationGrid


@dataclass(frozen=True)
class Pending:
    """A value that nothing but grids reads, and that none has rounded yet.

    Attributes:
        write: adds the operator for a grid, and returns its real numbers.
        clamps: limits of them, the last of them first.
    """

    write: Callable[[ActivationGrid], fx.Node]
    clamps: tuple[tuple[float | None, float | None], ...] = ()


@dataclass(frozen=True)
class Product:
    """A layer as it is in the file.

    Attributes:
        name: its place.
        layer: whose numbers it has.
        source, result: the grids that it reads and writes; None for real numbers.
    """

    name: str
    layer: IntegerLayer
    source: ActivationGrid | None = None
    result: ActivationGrid | None = None

    def numbers(self) -> tuple[Any, ...]:
        """What the file has of it: bytes of weight and bias and of their scales, and both grids."""
        order = _order(self.layer)
        if self.source is None or self.result is None:
            weight = self.layer.float_weight().permute(order).contiguous().numpy()
            return weight.tobytes(), real_bias_of(self.layer).tobytes(), b"", b"", None, None
        codes, scale = weight_of(self.layer, order)
        bias, bias_scale = bias_of(self.layer, self.source)
        arrays = (codes, bias, scale, bias_scale)
        return *(array.tobytes() for array in arrays), on_grid(self.source), on_grid(self.result)


@dataclass(frozen=True)
class Program:
    """What is lowered to a file.

    Attributes:
        module: the program, of one sample.
        watched: the same, which returns the codes of all grids, too, int8.
        grids: the grids, by the names of their nodes in the deployed network, in the order in which they are returned.
        limits: the smallest and largest real number on those of them that int8 does not limit, by the same names.
        products: the layers.
    """

    module: fx.GraphModule
    watched: fx.GraphModule
    grids: dict[str, ActivationGrid]
    limits: dict[str, tuple[float, float]]
    products: list[Product]


def on_grid(grid: ActivationGrid) -> tuple[int, int]:
    """The bits of a grid's scale, and the int8 code of its zero."""
    return int(grid.scale.numpy().view(np.uint32)), grid.zero_point - BYTE


def _order(layer: IntegerLayer) -> tuple[int, ...]:
    """The axes of a layer's weight in the order of the file: channels last, a single channel first."""
    axes = tuple(range(layer.codes.ndim))
    if not isinstance(layer, IntegerConv):
        return axes
    return (1, *axes[2:], 0) if layer.codes.shape[1] == 1 else (0, *axes[2:], 1)


class Writer:
    """Turns the nodes of a deployed network into those of a program for one sample, in order.

    Args:
        deployed: the network.
    """

    def __init__(self, deployed: Deployed) -> None:
        self.network = deployed.network
        self.graph = fx.Graph()
        self.held: dict[str, Tensor] = {}
        self.names: dict[str, str] = {}
        self.values: dict[fx.Node, Any] = {}
        self.grids: dict[str, Codes] = {}
        self.limits: dict[str, tuple[float, float]] = {}
        self.products: list[Product] = []
        self.arithmetic = Delegated(deployed.network)
        self.example = shape_of(next(node for node in self.network.graph.nodes if node.op == "placeholder"))[0]

    def build(self) -> Program:
        """The program.

        Raises:
            UsageError: for the first operation that it cannot have.
        """
        result: Any = None
        for node in self.network.graph.nodes:
            if node.op == "output":
                result = node.args[0]
                continue
            found = operation(node, self.network)
            write = None if found is None else getattr(self, f"_{found.kind}", None)
            value = None if write is None else write(node, found)
            self.values[node] = self._copied(node) if value is None else value
        returned = [self.real(self.values[node]) for node in heads(result, OUTPUT).values()]
        watched = [*returned, *(codes.node for codes in self.grids.values())]
        grids = {name: codes.grid for name, codes in self.grids.items()}
        return Program(self._module(returned), self._module(watched), grids, self.limits, self.products)

    def _module(self, returned: list[fx.Node]) -> fx.GraphModule:
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        graph.graph_copy(self.graph, copies)
        graph.output(tuple(copies[node] for node in returned))
        called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
        module = fx.GraphModule({**self.held, **{name: self.network.get_submodule(name) for name in called}}, graph)
        module.graph.eliminate_dead_code()
        module.recompile()
        return module.eval()

    def _refuse(self, node: fx.Node, what: str) -> NoReturn:
        raise UsageError(
            f"--format {EXECUTORCH} cannot have {what} in {place(node)}: use portable, or replace it in the network"
        )

    # ---- nodes of the program

    def _call(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        return self.graph.call_function(function, args)

    def _held(self, name: str, values: Tensor) -> fx.Node:
        """A constant; layers that are called several times have theirs once."""
        attribute = self.names.setdefault(name, f"tensor_{len(self.names)}")
        self.held[attribute] = values.detach().clone().contiguous()
        return self.graph.get_attr(attribute)

    def _copied(self, node: fx.Node) -> fx.Node:
        """``node`` on real numbers, as the network has it."""
        return self.graph.node_copy(node, self._read)

    def _read(self, node: fx.Node) -> Any:
        value = self.values[node]
        if isinstance(value, Pending):  # whose size alone is asked for
            first, *shape = shape_of(node)
            return self._call(torch.zeros, [first // self.example, *shape])
        return self.real(value)

    def _constant(self, node: fx.Node, found: Operation) -> fx.Node:
        return self._held(node.name, found.settings["value"])

    def real(self, value: Any) -> Any:
        """The node of a value's real numbers."""
        if isinstance(value, tuple):
            return tuple(self.real(part) for part in value)
        if not isinstance(value, Codes):
            return value
        dequantize = _operators().dequantize_per_tensor.default
        return self._call(dequantize, value.node, *_parameters(value.grid))

    def _codes(self, x: fx.Node, grid: ActivationGrid) -> Codes:
        """Real numbers as codes, which int8 alone limits."""
        quantize = _operators().quantize_per_tensor.default
        return Codes(self._call(quantize, x, *_parameters(grid)), grid)

    # ---- grids

    def _input(self, node: fx.Node, found: Operation) -> fx.Node:
        return self.graph.placeholder(node.name)

    def _grid(self, node: fx.Node, found: Operation) -> Codes:
        grid, source = found.settings["module"], self.values[found.inputs[0]]
        if type(grid) is not ActivationGrid:
            self._refuse(node, f"activations of {grid.bits} bit")
        clamps = source.clamps if isinstance(source, Pending) else ()
        x = source.write(grid) if isinstance(source, Pending) else self.real(source)
        codes, (low, high) = self._codes(x, grid), grid.limits(clamps)
        if (low, high) != (0, 2 * BYTE - 1):
            least, most = (float((code - grid.zero_point) * grid.scale) for code in (low, high))
            codes = self._codes(self._call(torch.clamp, self.real(codes), least, most), grid)
            self.limits[node.name] = (least, most)
        self.grids[node.name] = codes
        return codes

    # ---- layers

    def _layer(self, node: fx.Node, found: Operation) -> Pending | fx.Node | None:
        layer, x = found.settings["module"], self.values[found.inputs[0]]
        if isinstance(layer, IntegerConv) and layer.codes.ndim > IMAGE:
            self._refuse(node, f"a convolution over {layer.codes.ndim - 2} axes")
        if not isinstance(layer, IntegerLayer):
            return None
        name = str(node.target)
        bias = torch.from_numpy(real_bias_of(layer))
        if not (isinstance(x, Codes) and self.arithmetic.is_rounded(node)):
            self.products.append(Product(name, layer))
            weight = self._held(f"{name}.weight", layer.float_weight())
            return self._product(layer, self.real(x), weight, self._held(f"{name}.bias", bias))

        def write(grid: ActivationGrid) -> fx.Node:
            self.products.append(Product(name, layer, x.grid, grid))
            codes, scale = (torch.from_numpy(array) for array in weight_of(layer, tuple(range(layer.codes.ndim))))
            tensors = {"codes": codes, "scale": scale, "zero": torch.zeros(len(scale), dtype=torch.int64)}
            weight = self._call(
                _operators().dequantize_per_channel.default,
                *(self._held(f"{name}.{key}", values) for key, values in tensors.items()),
                *(0, _LEAST, _LARGEST, torch.int8),
            )
            return self._product(layer, self.real(x), weight, self._held(f"{name}.bias", bias))

        return Pending(write)

    def _product(self, layer: IntegerLayer, x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> fx.Node:
        if not isinstance(layer, IntegerConv):
            return self._call(F.linear, x, weight, bias)
        return self._call(layer.function, x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)

    # ---- between grids

    def _add(self, node: fx.Node, found: Operation) -> Pending | None:
        operands = [self.values[x] for x in found.inputs]
        if len(operands) != 2 or not all(isinstance(x, Codes) for x in operands):
            return None
        return Pending(lambda grid: self._copied(node)) if self.arithmetic.is_rounded(node, 2) else None

    _mul = _add

    def _cat(self, node: fx.Node, found: Operation) -> Pending | None:
        """Parts are on the grid of the whole before they are joined, as XNNPACK asks for."""
        if not self.arithmetic.is_rounded(node, 2):
            return None

        def write(grid: ActivationGrid) -> fx.Node:
            parts = [self.real(self._on(self.values[x], grid)) for x in found.inputs]
            return self._call(torch.cat, parts, found.settings["axis"])

        return Pending(write)

    def _on(self, value: Any, grid: ActivationGrid) -> Codes:
        if isinstance(value, Codes) and on_grid(value.grid) == on_grid(grid):
            return value
        return self._codes(self.real(value), grid)

    def _globalpool(self, node: fx.Node, found: Operation) -> Pending | fx.Node | None:
        """XNNPACK takes the mean of an image where it keeps its axes."""
        source = found.inputs[0]
        if len(shape_of(source)) != IMAGE:
            return None
        axes, keeps, x = [2, 3], found.settings["keepdim"], self.values[source]
        if keeps and isinstance(x, Codes) and self.arithmetic.is_rounded(node):
            return Pending(lambda grid: self._call(torch.mean, self.real(x), axes, True))
        mean = self._call(torch.mean, self.real(x), axes, True)
        return mean if keeps else self._call(torch.flatten, mean, 1)

    # ---- limits

    def _relu(self, node: fx.Node, found: Operation) -> Pending | Codes | None:
        return self._limited(found, 0.0, None) or self._moved(node, found)

    def _clamp(self, node: fx.Node, found: Operation) -> Pending | None:
        return self._limited(found, found.settings["low"], found.settings["high"])

    def _limited(self, found: Operation, low: Any, high: Any) -> Pending | None:
        value = self.values[found.inputs[0]]
        return replace(value, clamps=((low, high), *value.clamps)) if isinstance(value, Pending) else None

    # ---- moves

    def _moved(self, node: fx.Node, found: Operation) -> Codes | None:
        value = self.values[found.inputs[0]]
        return self._codes(self._copied(node), value.grid) if isinstance(value, Codes) else None

    _maxpool = _reshape = _slice = _pad = _nearest = _moved

    def _transpose(self, node: fx.Node, found: Operation) -> Codes | None:
        if found.settings["order"][0] != 0:
            self._refuse(node, "samples on another axis than the first")
        return self._moved(node, found)

    def _chunks(self, node: fx.Node, found: Operation) -> tuple[Codes, ...] | None:
        value = self.values[found.inputs[0]]
        if not isinstance(value, Codes):
            return None
        axis, start, parts = found.settings["axis"], 0, []
        for meta in node.meta["tensor_meta"]:
            size = meta.shape[axis]
            parts.append(self._codes(self._call(torch.narrow, self.real(value), axis, start, size), value.grid))
            start += size
        return tuple(parts)

    def _unbound(self, node: fx.Node, found: Operation) -> tuple[Codes, ...] | None:
        value, axis = self.values[found.inputs[0]], found.settings["axis"]
        if not isinstance(value, Codes):
            return None
        count = len(node.meta["tensor_meta"])
        parts = (self._call(torch.select, self.real(value), axis, index) for index in range(count))
        return tuple(self._codes(part, value.grid) for part in parts)

    def _part(self, node: fx.Node, found: Operation) -> Codes | None:
        value = self.values[found.inputs[0]]
        return value[found.settings["index"]] if isinstance(value, tuple) else None


def _operators() -> Any:
    """Quantize and dequantize, which the import registers."""
    import torch.ao.quantization.fx._decomposed

    return torch.ops.quantized_decomposed


def _parameters(grid: ActivationGrid) -> tuple[Any, ...]:
    """What quantize and dequantize are told of a grid."""
    return float(grid.scale), grid.zero_point - BYTE, _LEAST, _LARGEST, torch.int8
