"""The same network in floating point, as what the speed of an exported file is compared with."""

from __future__ import annotations

import numpy as np
from torch import fx

from lqkd.export.deploy import Deployed
from lqkd.export.emitter import Emitter, Exported
from lqkd.export.integer import IntegerLayer
from lqkd.export.nodes import Operation


class Floating(Emitter):
    """Weights and activations in float32: the layers of a deployed network, batch norm folded, without its grids."""

    def _write_grid(self, node: fx.Node, found: Operation) -> None:
        self.deferred[node] = (found.inputs[0], None, None)

    def _clamped(self, x: str, low: float | None, high: float | None, label: str) -> str:
        return x if low is None and high is None else super()._clamped(x, low, high, label)

    def _again(self, node: fx.Node) -> None:
        """Nothing is computed twice: there are no grids to fuse with."""

    def _grids(self) -> dict[str, str]:
        return {}

    def weight(self, layer: IntegerLayer, label: str) -> str:
        return self.constant(layer.float_weight(), f"{label}.weight", np.float32)

    def bias(self, layer: IntegerLayer, label: str) -> str:
        bias = layer.float_bias()
        return "" if bias is None else self.constant(bias, f"{label}.bias", np.float32)


def build(deployed: Deployed) -> Exported:
    """The float32 ONNX model of the same layers and weights, opset 21.

    Raises:
        UsageError: when an operator has no counterpart.
    """
    return Floating(deployed).build()
