"""A deployed network in PyTorch as ExecuTorch's XNNPACK delegate computes a program of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from lqkd.export.grids import ActivationGrid
from lqkd.export.litert_reference import XNNPack
from lqkd.export.nodes import Operation
from lqkd.export.reference import Codes, Reference, Unrounded

_IMAGE = 4


class Delegated(XNNPack):
    """What XNNPACK computes, of operators that the delegate gives to it.

    Codes come to another grid through real numbers. The mean of an image that keeps its axes is a sum of integers,
    another mean is one of real numbers.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lqkd import Recipe, quantize_model
        >>> from lqkd.export import deploy
        >>> from lqkd.export.executorch_reference import Delegated
        >>> from lqkd.quantization import initialize_quantizers
        >>> network, _ = quantize_model(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), Recipe(bits="w4a4"))
        >>> x = torch.randn(16, 4)
        >>> initialize_quantizers(network, x)
        >>> Delegated(deploy(network.eval(), x).network)(x).shape
        torch.Size([16, 3])
    """

    def added(self, a: Codes, b: Codes | None, grid: ActivationGrid) -> Tensor:
        return self.quantised(a.real(), grid) if b is None else super().added(a, b, grid)

    def _globalpool(self, node: fx.Node, found: Operation, x: Any) -> Unrounded | None:
        if not (found.settings["keepdim"] and isinstance(x, Codes) and x.values.ndim == _IMAGE):
            return None
        return Reference._globalpool(self, node, found, x)
