"""How features of two networks come to have one shape."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lqkd.errors import UsageError

LAYOUTS = {2: "vectors (B, C)", 3: "token sequences (B, N, C)", 4: "feature maps (B, C, H, W)"}
"""What the features of a tap may be, by number of axes."""


def channel_axis(axes: int) -> int:
    """Where the channels of a tensor with that many axes are."""
    return 2 if axes == 3 else 1


def channels(shape: Sequence[int]) -> int:
    """The number of channels of features of this shape."""
    return shape[channel_axis(len(shape))]


def check_layout(loss: str, shape: Sequence[int], allowed: Sequence[int] = tuple(LAYOUTS)) -> None:
    """UsageError when ``loss`` cannot compare features of this ``shape``, whose number of axes is not ``allowed``."""
    if len(shape) not in allowed:
        accepted = " or ".join(LAYOUTS[axes] for axes in allowed)
        raise UsageError(f"{loss} cannot compare features of shape {tuple(shape)}: its taps must give {accepted}")


def check_comparable(
    loss: str, teacher: Sequence[int], student: Sequence[int], allowed: Sequence[int] = tuple(LAYOUTS)
) -> None:
    """UsageError when features of these shapes cannot be compared place by place."""
    for shape in (teacher, student):
        check_layout(loss, shape, allowed)
    shapes = f"{loss} cannot compare the teacher's {tuple(teacher)} with the student's {tuple(student)}"
    if len(teacher) != len(student):
        raise UsageError(f"{shapes}: both taps must give {' or both '.join(LAYOUTS[axes] for axes in allowed)}")
    if len(teacher) == 3 and teacher[1] != student[1]:
        raise UsageError(f"{shapes}: sequences must have the same number of tokens")


def only_pair(loss: str, teacher: Sequence[torch.Size], student: Sequence[torch.Size]) -> tuple[torch.Size, torch.Size]:
    """The two shapes of a loss that compares one pair of taps; UsageError when there are more."""
    if len(teacher) != 1 or len(student) != 1:
        raise UsageError(f"{loss} cannot compare {len(teacher)} pairs of taps: it takes one pair")
    return teacher[0], student[0]


def connector(student: Sequence[int], out: int) -> nn.Module:
    """A trained linear map from the student's channels to ``out``, the same at every place: a 1x1 convolution."""
    return nn.Conv2d(channels(student), out, 1) if len(student) == 4 else nn.Linear(channels(student), out)


def to_size(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Feature maps (B, C, H, W) averaged to ``size``, where they are smaller repeated; itself when it has that size."""
    return x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size)


def to_common_size(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """Both feature maps averaged to the smaller height and the smaller width of the two; other layouts unchanged."""
    if teacher.ndim != 4:
        return teacher, student
    size = (min(teacher.shape[2], student.shape[2]), min(teacher.shape[3], student.shape[3]))
    return to_size(teacher, size), to_size(student, size)


def pooled(loss: str, x: Tensor) -> Tensor:
    """One vector (B, C) per sample: the average over the places of a map or the tokens of a sequence."""
    check_layout(loss, x.shape)
    return x if x.ndim == 2 else x.mean((2, 3) if x.ndim == 4 else 1)
