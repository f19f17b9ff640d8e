"""What a TFLite file is written from: values on grids, values that nothing has rounded, and whose numbers are where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from lqkd.export.grids import ActivationGrid
from lqkd.export.integer import IntegerLayer

CHANNELS_LAST = (0, 2, 3, 1)
"""The axes of an image in PyTorch, in the order of the file."""
DEPTHWISE = (1, 2, 3, 0)
"""Likewise of the weight of a depthwise convolution."""
BYTE = 128
"""What lies between codes of 0 to 255 and those of int8."""
SAME, VALID = 0, 1
"""How TFLite pads: as much as keeps the size over the stride, or not at all."""
RELU, RELU6 = 1, 3
"""Functions that TFLite fuses, by its numbers."""
RELUS: dict[tuple[float | None, float | None], str] = {(0.0, None): "RELU", (0.0, 6.0): "RELU6"}
"""Limits that are an operator of TFLite."""
IMAGE = 4
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
