"""Convolutions that pad as TensorFlow does, on one side more than on the other, as padding and a convolution."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch.nn.functional as F
from torch import fx

from lqkd.export.nodes import shape_of
from lqkd.quantization.layers import QuantConv2d, QuantizedSubclass


def take_padding_apart(network: fx.GraphModule) -> None:
    """Exchange quantised layers of timm's ``Conv2dSame``, whose padding depends on the size of the map, in place.

    Args:
        network: whose shapes are known; quantizers of inputs are nodes of it.
    """
    for node in list(network.graph.nodes):
        module: Any = network.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(module, QuantizedSubclass) or module.float_class.__name__ != "Conv2dSame":
            continue
        plain: Any = copy.copy(module)
        plain.__class__ = QuantConv2d
        plain.padding = (0, 0)
        target = f"{node.target}_same"
        network.add_submodule(target, plain)
        source: Any = node.args[0]
        axes = zip(shape_of(source)[2:], plain.kernel_size, plain.stride, plain.dilation, strict=True)
        rows, columns = (same(*axis) for axis in axes)
        with network.graph.inserting_before(node):
            padded = network.graph.call_function(F.pad, (source, [*columns, *rows]))
        node.args = (padded, *node.args[1:])
        node.target = target


def same(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """How many zeros TensorFlow puts before and behind an axis.

    Args:
        size: of the axis.
        kernel, stride, dilation: of the convolution along it.

    Examples:
        >>> same(8, kernel=3, stride=2, dilation=1)
        (0, 1)
    """
    total = max((math.ceil(size / stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2
