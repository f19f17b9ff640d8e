"""Features of the student as hints from the teacher's, place by place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.losses.base import DistillationLoss, MapKind
from lqkd.losses.matching import channels, check_comparable, connector, only_pair, to_common_size
from lqkd.losses.precision import in_full_precision


class Hints(DistillationLoss):
    """Squared residual of features, ``(f_T - g(f_S))**2``, averaged over all elements.

    FitNets, Romero et al., arXiv 1412.6550. It takes feature maps (B, C, H, W), token sequences (B, N, C) or vectors
    (B, C). Maps of different sizes are both averaged to the smaller height and width (adaptive average pooling). g is a
    trained 1x1 convolution, or linear layer, where the numbers of channels differ, and the identity where they agree.
    The map has the teacher's number of channels.

    Raises:
        UsageError: when the features are of different layouts or numbers of tokens, or differ in channels while
            :meth:`connect` has not been called.

    Examples:
        >>> loss = Hints()
        >>> teacher, student = torch.ones(2, 16, 8, 8), torch.ones(2, 4, 4, 4)
        >>> loss.connect([teacher.shape], [student.shape])  # makes the 1x1 convolution from 4 to 16 channels
        >>> loss(teacher, student).shape
        torch.Size([2, 16, 4, 4])
    """

    compares = "features"
    kind: MapKind = "features"
    place_by_place = True

    def __init__(self) -> None:
        super().__init__()
        self.connector: nn.Module | None = None

    def connect(self, teacher: Sequence[torch.Size], student: Sequence[torch.Size]) -> None:
        t, s = only_pair("Hints", teacher, student)
        check_comparable("Hints", t, s)
        self.connector = None if channels(t) == channels(s) else connector(s, channels(t))

    @in_full_precision
    def pair(self, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        """Teacher's features and the student's, connected, in one shape."""
        check_comparable("Hints", teacher.shape, student.shape)
        teacher, student = to_common_size(teacher, student)
        if self.connector is not None:
            return teacher, self.connector(student)
        if channels(teacher.shape) != channels(student.shape):
            raise UsageError(
                f"Hints has no connector yet from the student's {channels(student.shape)} channels to the teacher's "
                f"{channels(teacher.shape)}: call connect with the shapes first"
            )
        return teacher, student

    @in_full_precision
    def forward(self, teacher: Tensor, student: Tensor, labels: Tensor | None = None) -> Tensor:
        teacher, student = self.pair(teacher, student)
        return (teacher - student).square()

    def reduce(self, divergence: Tensor) -> Tensor:
        return divergence.mean()
