"""Where hidden states point to, whatever their length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lqkd.losses.base import DistillationLoss, MapKind
from lqkd.losses.directions import unit
from lqkd.losses.hints import Hints
from lqkd.losses.matching import channel_axis, channels
from lqkd.losses.precision import in_full_precision


class CosineDistance(DistillationLoss):
    """``1 - cos(f_T, g(f_S))`` of the features of every place, averaged over places.

    The loss of hidden states of DistilBERT, Sanh et al., arXiv 1910.01108, section 2. It takes what
    :class:`lqkd.losses.Hints` takes, and matches sizes and channels as that does: g is a trained linear layer where
    widths differ. With C channels and vectors u of length 1 an element of the map is ``C * (u_T - u_S)**2 / 2``, whose
    mean over channels is the distance. A place whose features are all 0 has a distance of 1/2 to any other.

    Raises:
        UsageError: when the features are of different layouts or numbers of tokens, or differ in channels while
            :meth:`connect` has not been called.

    Examples:
        >>> loss = CosineDistance()
        >>> teacher = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
        >>> student = torch.tensor([[[5.0, 0.0], [0.0, 1.0]]])
        >>> loss(teacher, student).mean(dim=2).round(decimals=4)
        tensor([[0., 1.]])
    """

    compares = "features"
    kind: MapKind = "features"
    place_by_place = True

    def __init__(self) -> None:
        super().__init__()
        self.hints = Hints()

    def connect(self, teacher: Sequence[torch.Size], student: Sequence[torch.Size]) -> None:
        self.hints.connect(teacher, student)

    @in_full_precision
    def pair(self, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        """Teacher's features and the student's, connected, in one shape, each place of length sqrt(C)."""
        of_teacher, of_student = self.hints.pair(teacher, student)
        axis, length = channel_axis(of_teacher.ndim), channels(of_teacher.shape) ** 0.5
        return length * unit(of_teacher, axis), length * unit(of_student, axis)

    @in_full_precision
    def forward(self, teacher: Tensor, student: Tensor, labels: Tensor | None = None) -> Tensor:
        of_teacher, of_student = self.pair(teacher, student)
        return (of_teacher - of_student).square() / 2

    def reduce(self, divergence: Tensor) -> Tensor:
        return divergence.mean()
