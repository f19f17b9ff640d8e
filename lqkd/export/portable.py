"""The default format: 8-bit codes with Q, integer Clip and DQ, which integer kernels of runtimes take as they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from lqkd.export.aligned import aligned
from lqkd.export.deploy import Deployed
from lqkd.export.emitter import Emitter, Exported
from lqkd.export.gates import SIX, SIXFOLD, THREE, GateGrid, is_gate
from lqkd.export.grids import ActivationGrid, SignGrid
from lqkd.export.integer import IntegerLayer
from lqkd.export.nodes import Operation
from lqkd.export.operations import operation
from lqkd.quantization.codes import CODES


class QuantizeDequantize(Emitter):
    """Activations as QuantizeLinear, integer Clip and DequantizeLinear; weights as constants with DequantizeLinear."""

    integer = plain = True

    def __init__(self, deployed: Deployed) -> None:
        super().__init__(deployed)
        self.sixfold: set[fx.Node] = set()

    def dequantize(self, codes: str, grid: ActivationGrid, label: str) -> str:
        return self.add("DequantizeLinear", [codes, *self._parameters(grid, label)], f"{label}.float")

    def grid(self, node: fx.Node, source: fx.Node, grid: ActivationGrid) -> None:
        label = self.label(node)
        if isinstance(grid, SignGrid):
            self.codes[node] = (self._sign(self.floating(source), grid, label), grid)
            return
        clamps: list[tuple[float | None, float | None]] = []
        while source in self.deferred:
            source, least, most = self.deferred[source]
            clamps.append((least, most))
        parameters = self._parameters(grid, label)
        if source in self.sixfold:
            clamps.append((0.0, 1.0))
            parameters[0] = self.constant(grid.scale * SIX, f"{label}.{SIXFOLD}", np.float32)
        low, high = grid.limits(clamps)
        flat = source in self.pooled
        x = self.pooled[source] if flat else self.floating(source)
        if source in self.codes:
            x = self._requantized(x, label, self.code_of_zero(self.codes[source][1]).dtype)
        codes = self.add("QuantizeLinear", [x, *parameters], f"{label}.codes")
        if (low, high) != (0, CODES - 1):
            codes = self._cut_off(codes, low, high, grid, label)
        if flat:
            codes = self.add("Flatten", [codes], f"{label}.flat", axis=1)
        self.codes[node] = (codes, grid)

    def _cut_off(self, codes: str, low: int, high: int, grid: ActivationGrid, label: str) -> str:
        zero = self.code_of_zero(grid)
        limits = [
            self.constant(value - grid.zero_point + int(zero), f"{label}.{name}", zero.dtype)
            for value, name in ((low, "min"), (high, "max"))
        ]
        return self.add("Clip", [codes, *limits], f"{label}.clipped")

    def _requantized(self, x: str, label: str, dtype: Any) -> str:
        """Add an integer zero: the runtime then goes from grid to grid in one integer kernel, an addition."""
        return self.add("Add", [x, self._number(0, 1.0, f"{label}.nothing", dtype)], f"{label}.requantized")

    def _number(self, code: int, scale: float, label: str, dtype: Any = np.uint8) -> str:
        """A number as a code with a scale."""
        codes = self.constant(code, f"{label}_codes", dtype)
        step = self.constant(scale, f"{label}_scale", np.float32)
        return self.add("DequantizeLinear", [codes, step, self.constant(0, f"{label}_zero", dtype)], label)

    def _sign(self, x: str, grid: SignGrid, label: str) -> str:
        shifted = self.add("Add", [x, self.constant(grid.shift, f"{label}.shift")], f"{label}.shifted")
        zero = self.constant(0.0, f"{label}.zero", np.float32)
        positive = self.add("GreaterOrEqual", [shifted, zero], f"{label}.positive")
        codes = [self.constant(v, f"{label}.{n}", np.uint8) for v, n in ((grid.high, "plus"), (grid.low, "minus"))]
        return self.add("Where", [positive, *codes], f"{label}.codes")

    def _parameters(self, grid: ActivationGrid, label: str) -> list[str]:
        names = [f"{label}.scale", f"{label}.zero_point"]
        if names[0] not in self.initializers:
            self.constant(grid.scale, names[0], np.float32)
            self.constant(self.code_of_zero(grid), names[1])
        return names

    def weight(self, layer: IntegerLayer, label: str) -> str:
        codes = layer.codes.to(torch.int16) * layer.multiplier
        return self.real(codes.to(torch.int8).numpy(), layer.scale / layer.multiplier, f"{label}.weight")

    def real(self, codes: np.ndarray, scale: Tensor, name: str) -> str:
        """DequantizeLinear of constant ``codes``, along the first axis where ``scale`` is of channels."""
        operands = [
            self.constant(codes, f"{name}_codes"),
            self.constant(scale, f"{name}_scale", np.float32),
            self.constant(np.zeros(scale.shape, codes.dtype), f"{name}_zero_point"),
        ]
        attributes: dict[str, Any] = {"axis": 0} if scale.ndim else {}
        return self.add("DequantizeLinear", operands, name, **attributes)

    def bias(self, layer: IntegerLayer, label: str) -> str:
        if layer.bias_codes is None or layer.bias_scale is None:
            return "" if layer.bias is None else self.constant(layer.bias, f"{label}.bias")
        return self.real(layer.bias_codes.numpy(), layer.bias_scale, f"{label}.bias")


class Portable(QuantizeDequantize):
    """For ONNX Runtime, which computes sums on integers and a hard sigmoid in floating point."""

    def __init__(self, deployed: Deployed) -> None:
        super().__init__(deployed)
        self.shared: dict[fx.Node, str] = {}

    def _write_activation(self, node: fx.Node, found: Operation) -> None:
        (source,) = found.inputs
        on_grid = found.settings["name"] == "HardSigmoid" and source in self.codes
        if not on_grid or not is_gate(node, lambda user: operation(user, self.network), self.codes[source][1]):
            super()._write_activation(node, found)
            return
        label = self.label(node)
        grid = next(self.network.get_submodule(str(user.target)) for user in node.users if self._is_grid(user))
        if isinstance(grid, GateGrid) and grid.shared:
            self.shared[node] = self.codes[source][0]
            return
        self.floats[node] = self.add("Add", [self.floating(source), self._number(1, THREE, f"{label}.three")], label)
        self.sixfold.add(node)

    def grid(self, node: fx.Node, source: fx.Node, grid: ActivationGrid) -> None:
        if source not in self.shared:
            super().grid(node, source, grid)
            return
        self.codes[node] = (self._cut_off(self.shared[source], grid.low, grid.high, grid, self.label(node)), grid)


def build(deployed: Deployed) -> Exported:
    """The model in the portable format: opset 21, int8 weight codes, uint8 activations, int32 biases.

    Channels are filled up with zeros to the numbers that kernels are made for.

    Raises:
        UsageError: when an operator has no counterpart.
    """
    wide, channels = aligned(deployed)
    return replace(Portable(wide).build(), channels=channels)
