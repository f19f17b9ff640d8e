"""An ONNX file for TensorRT's explicit quantization: signed 8-bit codes around zero, and nothing between Q and DQ.

NVIDIA's documentation ("Working with Quantized Types", "Explicit Quantization") asks for what :func:`broken_rule` looks
for. No GPU is needed to write or to verify such a file, and TensorRT itself has not run one here: the comparison runs
it in ONNX Runtime, which computes the same formulas.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from torch import fx

from lqkd.errors import UsageError
from lqkd.export.deploy import Deployed
from lqkd.export.emitter import Exported
from lqkd.export.grids import ActivationGrid
from lqkd.export.integer import IntegerLayer
from lqkd.export.portable import QuantizeDequantize
from lqkd.quantization.codes import CODES, MIDDLE

TENSORRT = "tensorrt"
"""The format's name, and the target's that it is trained for."""
LOADER_NOTE = "build it with strong typing: trtexec --onnx=FILE --stronglyTyped"
"""What a user of such a file must know."""
_PRODUCTS = ("Conv", "Gemm", "MatMul", "ConvTranspose")
_MOVES = ("Reshape", "Flatten", "Transpose", "Squeeze", "Slice", "Pad", "Resize", "MaxPool")
"""What :data:`lqkd.quantization.placement.KEEPS_GRID` becomes in a file, but for a ReLU."""


def check(deployed: Deployed) -> None:
    """Refuse a network whose activations are on other grids than TensorRT has.

    Raises:
        UsageError: for the first of them, with the setting under which a student is trained for it.
    """
    for node in deployed.network.graph.nodes:
        grid = deployed.network.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(grid, ActivationGrid) and (grid.zero_point, grid.low, grid.high) != (MIDDLE, 0, CODES - 1):
            where = node.meta.get("lqkd_place", node.target)
            raise UsageError(
                f"--format {TENSORRT} cannot express the grid of {where} ({grid.extra_repr()}): TensorRT has signed "
                f"codes of 8 bits with zero in the middle; train the student with quantization.target={TENSORRT}"
            )


class Explicit(QuantizeDequantize):
    """Each grid as QuantizeLinear and DequantizeLinear with nothing between them; biases in floating point."""

    opset = 19
    ir_version = 9
    integer = False

    def __init__(self, deployed: Deployed) -> None:
        super().__init__(deployed)
        self.on_grids: dict[str, str] = {}

    def _grids(self) -> dict[str, str]:
        return self.on_grids

    def grid(self, node: fx.Node, source: fx.Node, grid: ActivationGrid) -> None:
        x, label = self.floating(source), self.label(node)
        codes = self.add("QuantizeLinear", [x, *self._parameters(grid, label)], f"{label}.codes")
        self.on_grids[node.name], self.floats[node] = codes, self.dequantize(codes, grid, label)

    def code_of_zero(self, grid: ActivationGrid) -> Any:
        return np.int8(0)

    def bias(self, layer: IntegerLayer, label: str) -> str:
        bias = layer.float_bias()
        return "" if bias is None else self.constant(bias, f"{label}.bias")


def build(deployed: Deployed) -> Exported:
    """The model: opset 19, int8 weights and activations, biases in floating point.

    Raises:
        UsageError: when an operator has no counterpart, or a grid none in TensorRT.
    """
    check(deployed)
    exported = Explicit(deployed).build()
    broken = broken_rule(exported.model)
    if broken is not None:
        raise UsageError(f"--format {TENSORRT} cannot express the network: {broken}")
    return exported


def broken_rule(model: onnx.ModelProto) -> str | None:
    """The first rule of TensorRT's explicit quantization that a model breaks, in a sentence; None for none.

    * Zero points are zeros of int8, scales float32 constants above zero; a scale is of the tensor, or of each row of a
      constant.
    * What QuantizeLinear writes is read by DequantizeLinear alone, which reads nothing but that, or a constant.
    * A convolution or matrix product has both operands from a DequantizeLinear, or neither, and a float32 bias. What
      only moves numbers, or takes the largest, may be between: TensorRT lets Q and DQ change places with it.

    Args:
        model: any.
    """
    return next(_broken_rules(model), None)


def _broken_rules(model: onnx.ModelProto) -> Iterator[str]:
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output}

    def kind_of(name: str) -> str:
        return "" if name not in producers else producers[name].op_type

    def moved_from(name: str) -> str:
        while kind_of(name) in _MOVES:
            name = producers[name].input[0]
        return name

    returned = {entry.name for entry in model.graph.output}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            yield from _broken_parameters(node, held)
        if node.op_type == "DequantizeLinear" and kind_of(node.input[0]) != "QuantizeLinear":
            values = held.get(node.input[0])
            if values is None or values.dtype != np.int8:
                yield f"{node.name} reads neither codes of a QuantizeLinear nor a constant of int8"
        if node.op_type != "DequantizeLinear" and any(kind_of(name) == "QuantizeLinear" for name in node.input):
            yield f"{node.name} ({node.op_type}) reads codes"
        if node.op_type == "QuantizeLinear" and returned & {*node.output}:
            yield f"{node.name} is an output, in codes"
        if node.op_type in _PRODUCTS:
            on_grids = [kind_of(moved_from(name)) == "DequantizeLinear" for name in node.input[:2]]
            if any(on_grids) and not all(on_grids):
                yield f"{node.name} has one operand on a grid and one in floating point"
            if len(node.input) > 2 and node.input[2] and getattr(held.get(node.input[2]), "dtype", None) != np.float32:
                yield f"the bias of {node.name} is no float32 constant"
    if any(entry.type.tensor_type.elem_type != TensorProto.FLOAT for entry in model.graph.input):
        yield "an input is not of float32"


def _broken_parameters(node: onnx.NodeProto, held: dict[str, np.ndarray]) -> Iterator[str]:
    scale, zero = held.get(node.input[1]), held.get(node.input[2]) if len(node.input) > 2 else None
    if scale is None or scale.dtype != np.float32 or not (np.isfinite(scale) & (scale > 0)).all():
        yield f"the scale of {node.name} is no positive float32 constant"
    if zero is None or zero.dtype != np.int8 or zero.any():
        yield f"the zero point of {node.name} is not 0 in int8"
    if scale is not None and scale.ndim and node.input[0] not in held:
        yield f"{node.name} has a scale for each channel of an activation"
