"""The QONNX dialect: Quant and BipolarQuant nodes of any number of bits, for FPGA tools and research.

Pappalardo et al., "QONNX: Representing Arbitrary-Precision Quantized Neural Networks" (arXiv 2206.07527). Values are
kept in floating point and there is no saving in size. The ``qonnx`` package executes it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, fx

from lqkd.export.deploy import Deployed
from lqkd.export.emitter import Emitter, Exported
from lqkd.export.grids import ActivationGrid, SignGrid
from lqkd.export.integer import IntegerLayer
from lqkd.export.packed import fit

DOMAIN = "qonnx.custom_op.general"


class Qonnx(Emitter):
    """Quantization as nodes of the QONNX domain."""

    opset = 16
    ir_version = 9
    domains = (DOMAIN,)

    def _grids(self) -> dict[str, str]:
        return {node.name: self.floats[node] for node in self.floats if self._is_grid(node)}

    def grid(self, node: fx.Node, source: fx.Node, grid: ActivationGrid) -> None:
        x, label = self.floating(source), self.label(node)
        if isinstance(grid, SignGrid):
            shifted = self.add("Add", [x, self.constant(grid.shift, f"{label}.shift")], f"{label}.shifted")
            one = self.constant(1.0, f"{label}.scale", np.float32)
            self.floats[node] = self.add("BipolarQuant", [shifted, one], label, DOMAIN)
            return
        signed = grid.low > 0 and grid.zero_point > 0
        zero = 0 if signed else grid.zero_point
        narrow = signed and grid.zero_point - grid.low == grid.high - grid.zero_point
        self.floats[node] = self._quant(x, grid.scale, zero, grid.bits, signed, label, narrow)

    def _quant(
        self, x: str, scale: Tensor, zero: float, bits: int, signed: bool, label: str, narrow: bool = False
    ) -> str:
        operands = [
            self.constant(value, f"{label}.{name}", np.float32)
            for value, name in ((scale, "scale"), (zero, "zero_point"), (bits, "bits"))
        ]
        attributes = {"signed": int(signed), "narrow": int(narrow), "rounding_mode": "ROUND"}
        return self.add("Quant", [x, *operands], label, DOMAIN, **attributes)

    def weight(self, layer: IntegerLayer, label: str) -> str:
        shape = (-1, *[1] * (layer.codes.ndim - 1))
        codes, scale = layer.codes.to(torch.int16), layer.scale.view(shape)
        name = f"{label}.weight"
        values = codes * scale
        if layer.bits == 1 and (codes.abs() == 1).all():
            return self.add(
                "BipolarQuant", [self.constant(values, f"{name}.values"), self._scale(scale, name)], name, DOMAIN
            )
        bits = layer.bits
        fitted = fit(codes, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        while fitted is None:  # a grid without a zero, or of sums of powers of two: part of a wider one
            bits += 1
            fitted = fit(codes, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        codes, signs = fitted
        weight = self._quant(self.constant(codes * scale, f"{name}.values"), scale, 0, bits, True, name)
        if signs is None:
            return weight
        return self.add("Mul", [weight, self.constant(signs, f"{label}.signs", np.float32)], f"{label}.signed")

    def _scale(self, scale: Tensor, name: str) -> str:
        return self.constant(scale, f"{name}.scale", np.float32)

    def bias(self, layer: IntegerLayer, label: str) -> str:
        bias = layer.float_bias()
        return "" if bias is None else self.constant(bias, f"{label}.bias")


def build(deployed: Deployed) -> Exported:
    """The model in the QONNX dialect."""
    return Qonnx(deployed).build()
