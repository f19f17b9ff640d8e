"""An ONNX file for fixed-point hardware: every scale a power of two of a whole tensor, every zero point zero.

Whole numbers go from one grid to the next by a shift of bits: the scale of the accumulator over that of the next grid
is a power of two. The shift rounds half to even, as ONNX's QuantizeLinear does. Sums below 2**24 steps are exact in
float32, so that whatever runs the file, in whichever order it adds, gives the same codes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.export.deploy import Deployed, grid_of
from lqkd.export.emitter import Exported
from lqkd.export.grids import ActivationGrid, SignGrid
from lqkd.export.integer import IntegerLayer
from lqkd.export.islands import KIND as ISLAND
from lqkd.export.nodes import place
from lqkd.export.operations import operation
from lqkd.export.portable import QuantizeDequantize
from lqkd.quantization.codes import MIDDLE

POWER_OF_TWO = "power_of_two"
"""The format's name, and the target's that it is trained for."""
_BITS = 8
"""Of a number with which a network adds or multiplies."""
LOADER_NOTE = "scales are powers of two: going from grid to grid is a shift of bits that rounds half to even"
"""What a user of such a file must know."""


def check(deployed: Deployed) -> None:
    """Refuse a network that does not go from grid to grid by shifts alone.

    Raises:
        UsageError: for the first place, with the setting under which a student is trained for it.
    """
    for what, why in _obstacles(deployed):
        raise UsageError(
            f"--format {POWER_OF_TWO} cannot express {what}: {why}; train the student with "
            f"quantization.target={POWER_OF_TWO}"
        )
    for what, remedy in _in_floating_point(deployed):
        raise UsageError(
            f"--format {POWER_OF_TWO} cannot express {what}, which is computed in floating point: {remedy}"
        )


def _obstacles(deployed: Deployed) -> Iterator[tuple[str, str]]:
    for name in deployed.kept:
        yield f"the batch norm {name}", "it multiplies each channel by a factor of its own"
    for name, module in deployed.network.named_modules():
        if isinstance(module, ActivationGrid):
            where = f"the grid of {name} ({module.extra_repr()})"
            if isinstance(module, SignGrid):
                yield where, "it has signs and no zero"
            elif module.zero_point not in (0, MIDDLE):
                yield where, "its zero point is not zero"
            if not _is_power_of_two(module.scale.numpy()):
                yield where, "its scale is no power of two"
        if isinstance(module, IntegerLayer):
            if (module.scale != module.scale[0]).any():
                yield f"the weight of {name}", "its channels have scales of their own"
            if not _is_power_of_two(module.scale.numpy()):
                yield f"the weight of {name}", "its scale is no power of two"
            if module.bias is not None:
                yield f"the bias of {name}", "its input is in floating point"


def _in_floating_point(deployed: Deployed) -> Iterator[tuple[str, str]]:
    """What would be in floating point between the grids, but for means and interpolations, and what to do about it."""
    network = deployed.network
    for node in network.graph.nodes:
        found = operation(node, network)
        if found is None:
            continue
        where = place(node) if node.op != "call_module" else str(node.target)
        if found.kind == "layer":
            if not isinstance(found.settings["module"], IntegerLayer):
                yield f"the layer {where}", "give its weight 2 to 8 bits (rules, first_layer_bits, last_layer_bits)"
            elif grid_of(found.inputs[0], network) is None:
                yield f"the layer {where}", "give its input 1 to 8 bits"
        if found.kind in ("activation", ISLAND):
            remedy = "with ReLU, or ReLU6, in its place" if found.kind == "activation" else "without it"
            yield f"{found.settings['name']} in {where}", f"build the network {remedy}"
        if "number" in found.settings and not _is_short(found.settings["number"]):
            number = found.settings["number"]
            yield f"the number {number:g} in {where}", f"take one of at most {_BITS} bits, such as a power of two"


class PowerOfTwo(QuantizeDequantize):
    """Signed codes have zero at zero, not in the middle, and one scale is written for all channels."""

    def code_of_zero(self, grid: ActivationGrid) -> Any:
        return np.int8(0) if grid.zero_point == MIDDLE else np.uint8(0)

    def real(self, codes: np.ndarray, scale: Tensor, name: str) -> str:
        return super().real(codes, scale[0], name)


def build(deployed: Deployed) -> Exported:
    """The model: opset 21, int8 weights, int8 or uint8 activations, int32 biases, scales powers of two.

    Raises:
        UsageError: when an operator has no counterpart, or the network was not trained for it.
    """
    check(deployed)
    return replace(PowerOfTwo(deployed).build(), broken_rule=broken_rule)


def broken_rule(model: onnx.ModelProto) -> str | None:
    """The first scale of a model that is no power of two or not of a whole tensor, or zero point that is not zero.

    Args:
        model: any.

    Returns:
        A sentence; None where all are.
    """
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        scale, zero = (held.get(name) for name in node.input[1:3])
        if scale is None or scale.ndim or scale.dtype != np.float32 or not _is_power_of_two(scale):
            return f"the scale of {node.name} is no power of two, for a whole tensor, in float32"
        if zero is None or zero.any():
            return f"the zero point of {node.name} is not 0"
    return None


def _is_short(number: float) -> bool:
    """Whether it is a whole number of few bits times a power of two, with which sums and products are exact."""
    return bool(math.ldexp(math.frexp(number)[0], _BITS).is_integer())


def _is_power_of_two(scale: np.ndarray) -> bool:
    """Whether each is one, exactly: in [0.5, 1) there is only 0.5."""
    return bool((np.isfinite(scale) & (np.frexp(scale)[0] == 0.5)).all())
