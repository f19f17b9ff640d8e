"""Writing a deployed network as a TFLite flatbuffer of its own codes, scales and biases.

TFLite has int8 codes, and no limits of them but its type's and, as a fused ReLU, the code of zero. So codes 0 to 15 are
written as 112 to 127: what is larger saturates, and ReLU does the rest. Where zero is in between, the codes are written
so that they saturate above, and then, by a Quantize to the same step, moved so that they saturate below.

Images are channels last. What a grid reads of an elementwise function or of a mean is computed in float32 between
Dequantize and Quantize: TFLite's own int8 kernels of these round twice, or have steps of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np
import torch
from torch import fx

from lqkd.errors import UsageError
from lqkd.export.deploy import OUTPUT, Deployed
from lqkd.export.grids import ActivationGrid
from lqkd.export.integer import IntegerConv, IntegerLayer
from lqkd.export.litert_file import Builder
from lqkd.export.nodes import Operation, place, shape_of
from lqkd.export.operations import MOVES, operation
from lqkd.models.outputs import heads

CHANNELS_LAST = (0, 2, 3, 1)
"""The axes of an image in PyTorch, in the order of the file."""
_DEPTHWISE = (1, 2, 3, 0)
"""Likewise of the weight of a depthwise convolution."""
_BYTE = 128
"""What lies between codes of 0 to 255 and those of int8."""
_SAME, _VALID = 0, 1
_RELU, _RELU6 = 1, 3
_RELUS: dict[tuple[float | None, float | None], str] = {(0.0, None): "RELU", (0.0, 6.0): "RELU6"}
_IMAGE = 4
"""Axes of an image with its batch."""


@dataclass(frozen=True)
class Codes:
    """A value on a grid.

    Attributes:
        tensor: its position; int8.
        grid: the grid.
        offset: what its codes are larger by in the grid than in the file.
    """

    tensor: int
    grid: ActivationGrid
    offset: int


@dataclass(frozen=True)
class Target:
    """Where codes are to be written.

    Attributes:
        name: of the tensor.
        grid, offset: as of :class:`Codes`.
        relu: whether nothing below zero is wanted.
    """

    name: str
    grid: ActivationGrid
    offset: int
    relu: bool = False


@dataclass(frozen=True)
class Pending:
    """A value that nothing has rounded yet.

    Attributes:
        write: adds the operators that write it as codes, and returns their tensor.
        real: adds those that write it in float32; None where the file has none.
        clamps: limits of the real numbers, the last of them first.
        fuses: whether ``write`` can leave out what is below zero.
    """

    write: Callable[[Target], int]
    real: Callable[[], int] | None = None
    clamps: tuple[tuple[float | None, float | None], ...] = ()
    fuses: bool = True


@dataclass(frozen=True)
class Origin:
    """Whose numbers a tensor has.

    Attributes:
        grid: the grid of its codes, or of the input of the layer that it is of.
        offset: as of :class:`Codes`.
        layer: whose weight or bias it is; None for activations.
        order: of the axes of a weight in the file; None for a bias.
        code: of a constant beside activations.
    """

    grid: ActivationGrid
    offset: int = 0
    layer: IntegerLayer | None = None
    order: tuple[int, ...] | None = None
    code: int | None = None


@dataclass(frozen=True)
class Written:
    """A file and where the numbers of the network are in it.

    Attributes:
        content: the file.
        grids: name of each grid's node to the tensor of its codes, and the offset of :class:`Codes`.
        origins: name of each tensor that has codes, weights or biases to whose they are.
    """

    content: bytes
    grids: dict[str, tuple[str, int]]
    origins: dict[str, Origin]


def weight_of(layer: IntegerLayer, order: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The int8 codes of a layer's weight, their axes in ``order``, and their scales (channels,)."""
    codes = (layer.codes.to(torch.int16) * layer.multiplier).to(torch.int8).permute(order)
    return np.ascontiguousarray(codes.numpy()), (layer.scale / layer.multiplier).numpy()


def bias_of(layer: IntegerLayer, grid: ActivationGrid) -> tuple[np.ndarray, np.ndarray]:
    """The int32 codes of a layer's bias, zeros where it has none, and their scales; ``grid`` is that of its input."""
    held = layer.bias_codes
    codes = np.zeros(len(layer.codes), np.int32) if held is None else held.numpy()
    return codes, (grid.scale * (layer.scale / layer.multiplier)).numpy()


def real_bias_of(layer: IntegerLayer) -> np.ndarray:
    """The bias of a layer in floating point, (channels,), zeros where it has none."""
    held = layer.float_bias()
    return np.zeros(len(layer.codes), np.float32) if held is None else held.numpy()


class Writer:
    """Turns the nodes of a deployed network into TFLite operators for one sample, in order."""

    def __init__(self, deployed: Deployed) -> None:
        self.network = deployed.network
        self.file = Builder(taken=set(deployed.outputs))
        self.values: dict[fx.Node, Any] = {}
        self.grids: dict[str, tuple[str, int]] = {}
        self.origins: dict[int, Origin] = {}
        self.named: set[int] = set()
        nodes = list(self.network.graph.nodes)
        self.inputs = dict(zip((node for node in nodes if node.op == "placeholder"), deployed.inputs, strict=True))
        self.example = shape_of(next(iter(self.inputs)))[0]

    def build(self) -> Written:
        """The file.

        Raises:
            UsageError: for the first operation that it cannot have.
        """
        result: Any = None
        for node in self.network.graph.nodes:
            if node.op == "output":
                result = node.args[0]
                continue
            found = operation(node, self.network)
            if found is not None:
                write = getattr(self, f"_{found.kind}", None)
                if write is None:
                    self.refuse(node, self._called(node))
                self.values[node] = write(node, found)
        taken = [self.values[node].real() for node in self.inputs]
        self.named = set(taken)
        returned = [self._returned(name, node) for name, node in heads(result, OUTPUT).items()]
        content = self.file.finish(taken, returned)
        names = {self.file.tensors[tensor].name.decode(): origin for tensor, origin in self.origins.items()}
        return Written(content, self.grids, names)

    def refuse(self, node: fx.Node, what: str) -> NoReturn:
        raise UsageError(
            f"--format litert cannot have {what} in {place(node)}: it takes networks whose layers are integers between "
            "grids; use portable, which has more operators, or replace it in the network"
        )

    def _called(self, node: fx.Node) -> str:
        """What ``node`` calls: a class of modules or a function."""
        if node.op == "call_module":
            return type(self.network.get_submodule(str(node.target))).__name__
        return getattr(node.target, "__name__", str(node.target))

    # ---- shapes, names and tensors

    def shape(self, node: fx.Node) -> list[int]:
        """The shape of a node's value in PyTorch, of one sample."""
        return self.of_one(shape_of(node))

    def of_one(self, shape: Sequence[int]) -> list[int]:
        """``shape`` with one sample in place of the example's."""
        return [shape[0] // self.example, *shape[1:]]

    def label(self, node: fx.Node) -> str:
        """A name that says where ``node`` comes from."""
        if node.op == "call_module":
            return str(node.target)
        where = str(next(reversed(node.meta.get("nn_module_stack") or {}), ""))
        return f"{where}.{node.name}" if where else node.name

    def floats(self, name: str, shape: Sequence[int]) -> int:
        """A new float32 tensor; ``shape`` is the file's."""
        return self.file.tensor(name, shape, "float32")

    def codes(self, target: Target, shape: Sequence[int]) -> int:
        """A new tensor for codes; ``shape`` is the file's."""
        zero_point = target.grid.zero_point - target.offset
        made = self.file.tensor(target.name, shape, "int8", target.grid.scale.numpy(), zero_point)
        self.origins[made] = Origin(target.grid, target.offset)
        return made

    def like(self, tensor: int, name: str, shape: Sequence[int]) -> int:
        """A new tensor with the type and grid of another."""
        made = self.file.tensor(name, shape, "int8")
        self.file.tensors[made].type = self.file.tensors[tensor].type
        self.file.tensors[made].quantization = self.file.tensors[tensor].quantization
        if tensor in self.origins:
            self.origins[made] = self.origins[tensor]
        return made

    def constant_codes(self, tensor: int, code: int, name: str) -> int:
        """A constant code on the grid of a tensor."""
        made = self.like(tensor, name, [1])
        self.file.tensors[made].buffer = self.file.buffer(np.array([code], np.int8))
        self.origins[made] = replace(self.origins[made], code=code)
        return made

    def shape_in_file(self, tensor: int) -> list[int]:
        """The shape of a tensor."""
        return list(self.file.tensors[tensor].shape)

    def integers(self, name: str, values: Any) -> int:
        """A constant of whole numbers that an operator is told by."""
        array = np.asarray(values, np.int32)
        return self.file.tensor(name, array.shape, "int32", data=array)

    def number(self, name: str, value: float) -> int:
        """A constant real number."""
        return self.file.tensor(name, [1], "float32", data=np.array([value], np.float32))

    # ---- values

    def real(self, node: fx.Node) -> int:
        """The tensor of a node's real numbers."""
        value = self.values[node]
        if isinstance(value, Codes):
            made = self.floats(f"{self.label(node)}.float", self.shape_in_file(value.tensor))
            return self.file.operator("DEQUANTIZE", [value.tensor], made, "DequantizeOptions", 2)
        if not isinstance(value, Pending) or value.real is None:
            self.refuse(node, "a result that no grid rounds")
        tensor = value.real()
        for limits in reversed(value.clamps):
            tensor = self._clamped(tensor, limits, self.label(node))
        return tensor

    def _clamped(self, x: int, limits: tuple[float | None, float | None], label: str) -> int:
        """Real numbers within limits."""
        if limits in _RELUS:
            made = self.floats(f"{label}.clamped", self.shape_in_file(x))
            return self.file.operator(_RELUS[limits], [x], made)
        for kind, bound in zip(("MAXIMUM", "MINIMUM"), limits, strict=True):
            if bound is not None:
                made = self.floats(f"{label}.clamped", self.shape_in_file(x))
                limit = self.number(f"{label}.limit", bound)
                x = self.file.operator(kind, [x, limit], made, "MaximumMinimumOptions")
        return x

    def _returned(self, name: str, node: fx.Node) -> int:
        """The output ``name``: real numbers in a tensor of that name."""
        tensor = self.real(node)
        if tensor in self.named:
            self.refuse(node, "an input that is returned, or a result that is returned twice,")
        self.named.add(tensor)
        self.file.tensors[tensor].name = name.encode()
        return tensor

    def quantized(self, node: fx.Node, tensor: int) -> Pending:
        """Real numbers in a tensor, for a grid to round."""

        def write(target: Target) -> int:
            made = self.codes(target, self.shape_in_file(tensor))
            return self.file.operator("QUANTIZE", [tensor], made, "QuantizeOptions")

        return Pending(write, lambda: tensor, fuses=False)

    def requantized(self, codes: Codes) -> Pending:
        """Codes for another grid: an addition of nothing rounds more precisely than Quantize."""

        def write(target: Target) -> int:
            nothing = self.constant_codes(codes.tensor, codes.grid.zero_point - codes.offset, f"{target.name}.nothing")
            made = self.codes(target, self.shape_in_file(codes.tensor))
            return self._pair("ADD", [codes.tensor, nothing], made, target)

        return Pending(write)

    def _pair(self, kind: str, operands: list[int], made: int, target: Target) -> int:
        options = f"{kind.title()}Options"
        return self.file.operator(kind, operands, made, options, 2, fusedActivationFunction=_RELU * target.relu)

    # ---- grids

    def _input(self, node: fx.Node, found: Operation) -> Pending:
        shape = self.shape(node)
        shape = [shape[axis] for axis in CHANNELS_LAST] if len(shape) == _IMAGE else shape
        return self.quantized(node, self.floats(self.inputs[node], shape))

    def _grid(self, node: fx.Node, found: Operation) -> Codes:
        grid, source = found.settings["module"], self.values[found.inputs[0]]
        if type(grid) is not ActivationGrid:
            self.refuse(node, f"activations of {grid.bits} bit")
        pending = self.requantized(source) if isinstance(source, Codes) else source
        low, high = grid.limits(pending.clamps)
        if not low <= grid.zero_point <= high:
            self.refuse(node, "limits that leave zero out")
        label = str(node.target)
        full = (low, high) == (0, 2 * _BYTE - 1)
        offset = _BYTE if full else high - _BYTE + 1
        relu = low == grid.zero_point and pending.fuses
        saturates = full or relu or low - offset == -_BYTE
        written = Codes(
            pending.write(Target(label if saturates else f"{label}.above", grid, offset, relu)), grid, offset
        )
        if not saturates:
            written = Codes(self._moved_codes(written, label, low + _BYTE), grid, low + _BYTE)
        name = self.file.tensors[written.tensor].name.decode()
        self.grids[node.name] = (name, written.offset)
        return written

    def _moved_codes(self, codes: Codes, name: str, offset: int) -> int:
        """The same codes with another offset: those that int8 does not reach saturate."""
        made = self.codes(Target(name, codes.grid, offset), self.shape_in_file(codes.tensor))
        return self.file.operator("QUANTIZE", [codes.tensor], made, "QuantizeOptions", 2)

    # ---- layers

    def _layer(self, node: fx.Node, found: Operation) -> Pending:
        layer, x = found.settings["module"], self.values[found.inputs[0]]
        if not isinstance(layer, IntegerLayer) or layer.levels is not None or not isinstance(x, Codes):
            self.refuse(node, "a layer in floating point")
        axes = len(shape_of(found.inputs[0]))
        if isinstance(layer, IntegerConv) and axes != _IMAGE:
            self.refuse(node, f"a convolution over {axes - 2} axes")
        if not isinstance(layer, IntegerConv) and axes == _IMAGE:
            self.refuse(node, "a linear layer on four axes")
        label = self.label(node)

        def write(target: Target) -> int:
            made = self.codes(target, self._shape_of_result(node))
            bias = self._bias(layer, x, label)
            weight = self._weight(node, layer, x, label)
            return self._product(node, layer, x.tensor, weight, bias, made, target.relu)

        def real() -> int:
            if not self._is_answer(node):
                self.refuse(node, "a layer whose result no grid rounds")
            codes = self._weight(node, layer, x, label)
            weight = self.floats(f"{label}.float_weight", self.shape_in_file(codes))
            self.file.operator("DEQUANTIZE", [codes], weight, "DequantizeOptions", 5)
            numbers = real_bias_of(layer)
            bias = self.file.tensor(f"{label}.float_bias", numbers.shape, "float32", data=numbers)
            self.origins[bias] = Origin(x.grid, 0, layer)
            made = self.floats(label, self._shape_of_result(node))
            return self._product(node, layer, self.real(found.inputs[0]), weight, bias, made, False)

        return Pending(write, real)

    def _shape_of_result(self, node: fx.Node) -> list[int]:
        shape = self.shape(node)
        return [shape[axis] for axis in CHANNELS_LAST] if len(shape) == _IMAGE else shape

    def _is_answer(self, node: fx.Node) -> bool:
        """Whether nothing but moves and limits is between ``node`` and the network's outputs."""
        return all(user.op == "output" or self._passes_on(user) for user in node.users)

    def _passes_on(self, node: fx.Node) -> bool:
        found = operation(node, self.network)
        return found is None or (found.kind in (*MOVES, "clamp") and self._is_answer(node))

    def _weight(self, node: fx.Node, layer: IntegerLayer, x: Codes, label: str) -> int:
        order = tuple(range(layer.codes.ndim))
        if isinstance(layer, IntegerConv):
            order = _DEPTHWISE if self._is_depthwise(node, layer) else CHANNELS_LAST
        codes, scale = weight_of(layer, order)
        made = self.file.tensor(f"{label}.weight", codes.shape, "int8", scale, 0, codes, order.index(0))
        self.origins[made] = Origin(x.grid, 0, layer, order)
        return made

    def _bias(self, layer: IntegerLayer, x: Codes, label: str) -> int:
        codes, scale = bias_of(layer, x.grid)
        made = self.file.tensor(f"{label}.bias", codes.shape, "int32", scale, 0, codes)
        self.origins[made] = Origin(x.grid, 0, layer)
        return made

    def _is_depthwise(self, node: fx.Node, layer: IntegerConv) -> bool:
        return layer.groups > 1 and layer.groups == shape_of(node.all_input_nodes[0])[1]

    def _product(
        self, node: fx.Node, layer: IntegerLayer, x: int, weight: int, bias: int, made: int, relu: bool
    ) -> int:
        integer = self.file.tensors[x].quantization is not None
        fused = _RELU * relu
        if not isinstance(layer, IntegerConv):
            settings = {"keepNumDims": len(self.shape_in_file(x)) > 2, "fusedActivationFunction": fused}
            version = 12 if integer else 5 if settings["keepNumDims"] else 1
            return self.file.operator(
                "FULLY_CONNECTED", [x, weight, bias], made, "FullyConnectedOptions", version, **settings
            )
        kernel = tuple(layer.codes.shape[2:])
        x, padding = self._padded(node, x, kernel, layer.stride, layer.padding, layer.dilation)
        settings = {
            "padding": padding,
            "strideH": layer.stride[0],
            "strideW": layer.stride[1],
            "dilationHFactor": layer.dilation[0],
            "dilationWFactor": layer.dilation[1],
            "fusedActivationFunction": fused,
        }
        if self._is_depthwise(node, layer):
            settings["depthMultiplier"] = len(layer.codes) // layer.groups
            version = 3 if integer else 2
            options, kind = "DepthwiseConv2DOptions", "DEPTHWISE_CONV_2D"
        else:
            version = 6 if layer.groups > 1 else 3 if integer else 2
            options, kind = "Conv2DOptions", "CONV_2D"
        return self.file.operator(kind, [x, weight, bias], made, options, version, **settings)

    def _padded(
        self,
        node: fx.Node,
        x: int,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        value: int | None = None,
    ) -> tuple[int, int]:
        """The tensor that a window slides over, with zeros beside it where TFLite's own padding puts others.

        Args:
            value: the code that is put beside instead; None for that of zero.
        """
        before, after, same = [], [], True
        for axis in (0, 1):
            inside, outside = self.shape_in_file(x)[1 + axis], shape_of(node)[2 + axis]
            reach = dilation[axis] * (kernel[axis] - 1) + 1
            missing = max((outside - 1) * stride[axis] + reach - inside, 0)
            same = same and outside == -(-inside // stride[axis]) and missing // 2 == padding[axis]
            before.append(padding[axis])
            after.append(max(missing - padding[axis], 0))
        if not any((*before, *after)):
            return x, _VALID
        if same:
            return x, _SAME
        return self._beside(x, [0, *before, 0], [0, *after, 0], f"{self.label(node)}.padded", value), _VALID

    def _beside(self, x: int, before: Sequence[int], after: Sequence[int], name: str, value: int | None = None) -> int:
        shape = [b + size + a for b, size, a in zip(before, self.shape_in_file(x), after, strict=True)]
        made = self.like(x, name, shape)
        pads = self.integers(f"{name}.sizes", list(zip(before, after, strict=True)))
        if value is None:
            return self.file.operator("PAD", [x, pads], made, "PadOptions", 2)
        beside = self.constant_codes(x, value, f"{name}.value")
        return self.file.operator("PADV2", [x, pads, beside], made, "PadV2Options", 2)

    # ---- additions, products, concatenations

    def _add(self, node: fx.Node, found: Operation) -> Pending:
        operands = [self.values[x] for x in found.inputs]
        ranks = {len(shape_of(x)) for x in found.inputs}
        if len(operands) != 2 or len(ranks) > 1 or not all(isinstance(x, Codes) for x in operands):
            self.refuse(node, f"{'an addition' if found.kind == 'add' else 'a product'} of other than two grids")

        def write(target: Target) -> int:
            made = self.codes(target, self._shape_of_result(node))
            return self._pair(found.kind.upper(), [x.tensor for x in operands], made, target)

        return Pending(write)

    _mul = _add

    def _cat(self, node: fx.Node, found: Operation) -> Pending:
        axis = self._axis(found.settings["axis"], len(shape_of(node)))

        def write(target: Target) -> int:
            parts = []
            for index, source in enumerate(found.inputs):
                value = self.values[source]
                part = replace(target, name=f"{target.name}.{index}", relu=False)
                parts.append(self._on(value, part) if isinstance(value, Codes) else value.write(part))
            made = self.codes(target, self._shape_of_result(node))
            return self.file.operator("CONCATENATION", parts, made, "ConcatenationOptions", 2, axis=axis)

        if any(isinstance(value := self.values[x], Pending) and value.clamps for x in found.inputs):
            self.refuse(node, "a concatenation of results that no grid rounds")
        return Pending(write, fuses=False)

    def _on(self, codes: Codes, target: Target) -> int:
        """The codes on another grid, or as they are where it is their own."""
        same = codes.offset == target.offset and codes.grid.zero_point == target.grid.zero_point
        if same and torch.equal(codes.grid.scale, target.grid.scale):
            return codes.tensor
        return self.requantized(codes).write(target)

    def _axis(self, axis: int, rank: int) -> int:
        """The file's axis for one of PyTorch."""
        axis %= rank
        return CHANNELS_LAST.index(axis) if rank == _IMAGE else axis

    # ---- limits

    def _relu(self, node: fx.Node, found: Operation) -> Codes | Pending:
        value = self.values[found.inputs[0]]
        if isinstance(value, Codes):
            made = self.like(value.tensor, self.label(node), self.shape_in_file(value.tensor))
            return replace(value, tensor=self.file.operator("RELU", [value.tensor], made, version=2))
        return _limited(value, 0.0, None)

    def _clamp(self, node: fx.Node, found: Operation) -> Pending:
        low, high = (found.settings[key] for key in ("low", "high"))
        if any(isinstance(bound, fx.Node) for bound in (low, high)):
            self.refuse(node, "limits that are computed")
        value = self.values[found.inputs[0]]
        return _limited(self.requantized(value) if isinstance(value, Codes) else value, low, high)

    # ---- in float32 between two grids

    def _activation(self, node: fx.Node, found: Operation) -> Pending:
        settings, label = dict(found.settings), self.label(node)
        name, x = settings.pop("name"), self.real(found.inputs[0])

        def add(kind: str, operands: list[int], options: str = "", **given: Any) -> int:
            made = self.floats(label, self.shape_in_file(x))
            return self.file.operator(kind, operands, made, options, **given)

        if name == "HardSigmoid":
            shifted = add("ADD", [x, self.number(f"{label}.three", 3)], "AddOptions", fusedActivationFunction=_RELU6)
            result = add("MUL", [shifted, self.number(f"{label}.sixth", 1 / 6)], "MulOptions")
        elif name == "SiLU":
            result = add("MUL", [x, add("LOGISTIC", [x])], "MulOptions")
        elif name == "LeakyRelu":
            result = add("LEAKY_RELU", [x], "LeakyReluOptions", alpha=settings["alpha"])
        elif name == "Gelu":
            result = add("GELU", [x], "GeluOptions", approximate=settings["approximate"] == "tanh")
        elif name == "HardSwish":
            result = add("HARD_SWISH", [x], "HardSwishOptions")
        elif name == "Elu" and settings["alpha"] != 1:
            self.refuse(node, f"an ELU with alpha {settings['alpha']}")
        else:
            result = add({"Sigmoid": "LOGISTIC", "Tanh": "TANH", "Elu": "ELU"}[name], [x])
        return self.quantized(node, result)

    def _globalpool(self, node: fx.Node, found: Operation) -> Pending:
        rank = len(shape_of(found.inputs[0]))
        return self._averaged(node, found, list(range(2, rank)))

    def _mean(self, node: fx.Node, found: Operation) -> Pending:
        return self._averaged(node, found, found.settings["axes"])

    def _averaged(self, node: fx.Node, found: Operation, axes: list[int]) -> Pending:
        source, keeps, label = found.inputs[0], found.settings["keepdim"], self.label(node)
        rank = len(shape_of(source))
        if rank == _IMAGE and axes != [2, 3]:
            self.refuse(node, f"a mean over the axes {axes}")
        over = self.integers(f"{label}.axes", [self._axis(axis, rank) for axis in axes])
        made = self.floats(label, self._shape_of_result(node))
        mean = self.file.operator("MEAN", [self.real(source), over], made, "ReducerOptions", keepDims=keeps)
        return self.quantized(node, mean)

    def _avgpool(self, node: fx.Node, found: Operation) -> Pending:
        settings = found.settings
        kernel, stride, padding = (settings[key] for key in ("kernel", "stride", "padding"))
        x = self.real(found.inputs[0])
        inside, outside = self.shape_in_file(x)[1:3], shape_of(node)[2:]
        overhangs = any(
            (o - 1) * s + k > i + 2 * p for i, o, s, k, p in zip(inside, outside, stride, kernel, padding, strict=True)
        )
        if settings.get("divisor_override") or overhangs or (any(padding) and not settings.get("count_include_pad")):
            self.refuse(node, "an average over windows that do not lie within the image")
        if any(padding):
            x = self._beside(x, [0, *padding, 0], [0, *padding, 0], f"{self.label(node)}.padded")
        return self.quantized(node, self._pool("AVERAGE_POOL_2D", node, x, kernel, stride, _VALID))

    # ---- what keeps a grid

    def _pool(self, kind: str, node: fx.Node, x: int, kernel: Any, stride: Any, padding: int) -> int:
        made = self.like(x, self.label(node), self._shape_of_result(node))
        settings = {"filterHeight": kernel[0], "filterWidth": kernel[1], "strideH": stride[0], "strideW": stride[1]}
        version = 1 if self.file.tensors[x].quantization is None else 2
        return self.file.operator(kind, [x], made, "Pool2DOptions", version, padding=padding, **settings)

    def _moved(self, node: fx.Node, found: Operation) -> Codes | Pending:
        value = self.values[found.inputs[0]]
        move = getattr(self, f"_moved_by_{found.kind}")
        if isinstance(value, Codes):
            return replace(value, tensor=move(node, found, value.tensor))
        return self.quantized(node, move(node, found, self.real(found.inputs[0])))

    _maxpool = _reshape = _transpose = _slice = _pad = _nearest = _moved

    def _moved_by_maxpool(self, node: fx.Node, found: Operation, x: int) -> int:
        settings, value = found.settings, self.values[found.inputs[0]]
        if tuple(settings["dilation"]) != (1, 1) or not isinstance(value, Codes):
            self.refuse(node, "max pooling with dilation, or of what is on no grid")
        kernel, stride = settings["kernel"], settings["stride"]
        x, padding = self._padded(node, x, kernel, stride, settings["padding"], (1, 1), -_BYTE)
        return self._pool("MAX_POOL_2D", node, x, kernel, stride, padding)

    def _moved_by_pad(self, node: fx.Node, found: Operation, x: int) -> int:
        pads = found.settings["pads"]
        rank = len(pads) // 2
        order = CHANNELS_LAST if rank == _IMAGE else tuple(range(rank))
        before, after = ([side[axis] for axis in order] for side in (pads[:rank], pads[rank:]))
        return self._beside(x, before, after, self.label(node))

    def _moved_by_nearest(self, node: fx.Node, found: Operation, x: int) -> int:
        made = self.like(x, self.label(node), self._shape_of_result(node))
        size = self.integers(f"{self.label(node)}.size", shape_of(node)[2:])
        version = 1 if self.file.tensors[x].quantization is None else 2
        return self.file.operator("RESIZE_NEAREST_NEIGHBOR", [x, size], made, "ResizeNearestNeighborOptions", version)

    def _moved_by_transpose(self, node: fx.Node, found: Operation, x: int) -> int:
        order = found.settings["order"]
        if order[0] != 0:
            self.refuse(node, "samples on another axis than the first")
        own = CHANNELS_LAST if len(order) == _IMAGE else tuple(range(len(order)))
        return self._permuted(x, [own.index(order[axis]) for axis in own], self.label(node))

    def _permuted(self, x: int, order: Sequence[int], name: str) -> int:
        """The tensor with its axes in another order."""
        shape = self.shape_in_file(x)
        made = self.like(x, name, [shape[axis] for axis in order])
        axes = self.integers(f"{name}.order", order)
        version = 1 if self.file.tensors[x].quantization is None else 2
        return self.file.operator("TRANSPOSE", [x, axes], made, "TransposeOptions", version)

    def _moved_by_reshape(self, node: fx.Node, found: Operation, x: int) -> int:
        return self._reshaped(x, self.shape(found.inputs[0]), self.shape(node), self.label(node))

    def _reshaped(self, x: int, before: list[int], after: list[int], name: str) -> int:
        """The tensor in another shape, in PyTorch's order of values; the shapes are PyTorch's."""
        if before == after:
            return x
        if len(before) == _IMAGE and before[2:] != [1, 1]:
            x = self._permuted(x, np.argsort(CHANNELS_LAST).tolist(), f"{name}.channels_first")
        image = len(after) == _IMAGE
        last = [after[axis] for axis in CHANNELS_LAST] if image and after[2:] == [1, 1] else after
        made = self.like(x, name, last)
        shape = self.integers(f"{name}.shape", last)
        self.file.operator("RESHAPE", [x, shape], made, "ReshapeOptions", newShape=last)
        if image and after[2:] != [1, 1]:
            return self._permuted(made, CHANNELS_LAST, f"{name}.channels_last")
        return made

    def _moved_by_slice(self, node: fx.Node, found: Operation, x: int) -> int:
        whole = self.shape(found.inputs[0])
        part = list(whole)
        for axis, start, end, step in found.settings["slices"]:
            part[axis] = len(range(start, end, step))
        x = self._sliced(x, whole, found.settings["slices"], part, self.label(node))
        return self._reshaped(x, part, self.shape(node), self.label(node)) if found.settings["dropped"] else x

    def _sliced(self, x: int, whole: list[int], slices: Any, part: list[int], name: str) -> int:
        """The part of a tensor; shapes and axes are PyTorch's."""
        rank = len(whole)
        order = CHANNELS_LAST if rank == _IMAGE else tuple(range(rank))
        begin, end, stride = [0] * rank, list(whole), [1] * rank
        for axis, start, stop, step in slices:
            begin[axis], end[axis], stride[axis] = start, stop, step
        made = self.like(x, name, [part[axis] for axis in order])
        told = [
            self.integers(f"{name}.{kind}", [values[axis] for axis in order])
            for kind, values in (("begin", begin), ("end", end), ("step", stride))
        ]
        return self.file.operator("STRIDED_SLICE", [x, *told], made, "StridedSliceOptions", 2)

    def _chunks(self, node: fx.Node, found: Operation) -> tuple[Codes, ...]:
        axis, source = found.settings["axis"], found.inputs[0]
        value, whole = self.values[source], self.shape(source)
        if not isinstance(value, Codes):
            self.refuse(node, "parts of what is on no grid")
        axis %= len(whole)
        kept = [self.of_one(meta.shape) for meta in node.meta["tensor_meta"]]
        sizes = [shape[axis] for shape in kept] if found.kind == "chunks" else [1] * len(kept)
        parts, start = [], 0
        for index, (size, shape) in enumerate(zip(sizes, kept, strict=True)):
            part, name = [*whole[:axis], size, *whole[axis + 1 :]], f"{self.label(node)}.{index}"
            tensor = self._sliced(value.tensor, whole, [(axis, start, start + size, 1)], part, name)
            parts.append(replace(value, tensor=self._reshaped(tensor, part, shape, name)))
            start += size
        return tuple(parts)

    _unbound = _chunks

    def _part(self, node: fx.Node, found: Operation) -> Codes:
        part: Codes = self.values[found.inputs[0]][found.settings["index"]]
        return part


def _limited(value: Pending, low: float | None, high: float | None) -> Pending:
    return replace(value, clamps=((low, high), *value.clamps))
