"""Finding out whether a layer of an unknown class may be quantised from outside: by running it once."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from lqkd.quantization.computed import copy_of

PRODUCTS = (
    F.linear,
    F.conv1d,
    F.conv2d,
    F.conv3d,
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
)
"""The functions whose first two arguments are an input and a weight."""


class _Operands(TorchFunctionMode):
    """Keeps the operands of every product that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in PRODUCTS:
            x, weight = (args[i] if i < len(args) else kwargs[key] for i, key in ((0, "input"), (1, "weight")))
            self.found.append((x, weight))
        return func(*args, **kwargs)


@torch.no_grad()
def refusal(layer: nn.Module) -> str | None:
    """Why a subclass of a convolution or of Linear cannot be quantised by exchanging its input and weight.

    A copy of the layer runs on a small input. ``None`` says that it computes one product whose operands are its
    weight and its input, the latter possibly padded with zeros or cut: whatever is on a grid before is on it there.
    """
    if not isinstance(layer, _ConvNd | nn.Linear):
        return "a subclass whose forward may differ"
    if layer._parameters.get("weight") is None:
        return "a subclass whose weight is computed from other parameters"
    operands = _Operands()
    try:
        trial = copy_of(layer).eval()
        x = _example(trial)
        with operands:
            cast(Any, type(trial)).forward(trial, x)
    except Exception as error:  # a foreign forward may raise anything
        return f"a subclass that could not be tried ({type(error).__name__})"
    return _misuse(operands.found, x, trial.weight)


def _misuse(products: list[tuple[Tensor, Tensor]], x: Tensor, weight: Tensor) -> str | None:
    if len(products) != 1:
        return f"a subclass that computes {len(products)} products instead of one"
    seen, used = products[0]
    if used.shape != weight.shape or not torch.equal(used, weight):
        return "a subclass that changes its weight before the product"
    if not torch.isin(seen, torch.cat([x.flatten(), x.new_zeros(1)])).all():
        return "a subclass that changes its input before the product"
    return None


def _example(layer: _ConvNd | nn.Linear) -> Tensor:
    """Distinct values in a shape that the layer accepts."""
    if isinstance(layer, nn.Linear):
        shape = [2, layer.in_features]
    else:
        spans = zip(layer.dilation, layer.kernel_size, strict=True)
        shape = [1, layer.in_channels, *(2 * (dilation * (kernel - 1) + 1) for dilation, kernel in spans)]
    weight = layer.weight
    return torch.linspace(0.5, 1.5, torch.Size(shape).numel(), device=weight.device, dtype=weight.dtype).view(shape)
