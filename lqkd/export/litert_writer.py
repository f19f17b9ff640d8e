"""Writing a deployed network as a TFLite flatbuffer of its own codes, scales and biases.

TFLite has int8 codes, and no limits of them but its type's and, as a fused ReLU, the code of zero. So codes 0 to 15 are
written as 112 to 127: what is larger saturates, and ReLU does the rest. Where zero is in between, the codes are written
so that they saturate above, and then, by a Quantize to the same step, moved so that they saturate below.

Images are channels last. What a grid reads of an elementwise function or of a mean is computed in float32 between
Dequantize and Quantize: TFLite's own int8 kernels of these round twice, or have steps of their own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from lqkd.export.deploy import OUTPUT
from lqkd.export.grids import ActivationGrid
from lqkd.export.integer import IntegerConv, IntegerLayer
from lqkd.export.litert_moves import MoveWriter
from lqkd.export.litert_values import (
    BYTE,
    CHANNELS_LAST,
    DEPTHWISE,
    IMAGE,
    RELU,
    RELU6,
    VALID,
    Codes,
    Origin,
    Pending,
    Target,
    Written,
    bias_of,
    real_bias_of,
    weight_of,
)
from lqkd.export.nodes import Operation, shape_of
from lqkd.export.operations import operation
from lqkd.models.outputs import heads
from lqkd.quantization.placement import MOVES


class Writer(MoveWriter):
    """Turns the nodes of a deployed network into TFLite operators for one sample, in order."""

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

    # ---- grids

    def _input(self, node: fx.Node, found: Operation) -> Pending:
        shape = self.shape(node)
        shape = [shape[axis] for axis in CHANNELS_LAST] if len(shape) == IMAGE else shape
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
        full = (low, high) == (0, 2 * BYTE - 1)
        offset = BYTE if full else high - BYTE + 1
        relu = low == grid.zero_point and pending.fuses
        saturates = full or relu or low - offset == -BYTE
        written = Codes(
            pending.write(Target(label if saturates else f"{label}.above", grid, offset, relu)), grid, offset
        )
        if not saturates:
            written = Codes(self._moved_codes(written, label, low + BYTE), grid, low + BYTE)
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
        if isinstance(layer, IntegerConv) and axes != IMAGE:
            self.refuse(node, f"a convolution over {axes - 2} axes")
        if not isinstance(layer, IntegerConv) and axes == IMAGE:
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

    def _is_answer(self, node: fx.Node) -> bool:
        """Whether nothing but moves and limits is between ``node`` and the network's outputs."""
        return all(user.op == "output" or self._passes_on(user) for user in node.users)

    def _passes_on(self, node: fx.Node) -> bool:
        found = operation(node, self.network)
        return found is None or (found.kind in (*MOVES, "clamp") and self._is_answer(node))

    def _weight(self, node: fx.Node, layer: IntegerLayer, x: Codes, label: str) -> int:
        order = tuple(range(layer.codes.ndim))
        if isinstance(layer, IntegerConv):
            order = DEPTHWISE if self._is_depthwise(node, layer) else CHANNELS_LAST
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
        fused = RELU * relu
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
            shifted = add("ADD", [x, self.number(f"{label}.three", 3)], "AddOptions", fusedActivationFunction=RELU6)
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
        if rank == IMAGE and axes != [2, 3]:
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
        return self.quantized(node, self._pool("AVERAGE_POOL_2D", node, x, kernel, stride, VALID))


def _limited(value: Pending, low: float | None, high: float | None) -> Pending:
    return replace(value, clamps=((low, high), *value.clamps))
