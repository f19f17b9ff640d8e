"""What of two networks' feature maps goes up and down together."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lqkd.losses.base import DistillationLoss, MapKind
from lqkd.losses.directions import deviation
from lqkd.losses.hints import Hints
from lqkd.losses.matching import check_comparable, only_pair
from lqkd.losses.precision import in_full_precision


class PKD(DistillationLoss):
    """Half of the squared residual of features that are standardised channel by channel.

    Cao et al., "PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient"
    (arXiv 2207.02039), equations 2 to 5: every channel of feature maps (B, C, H, W), over all samples and positions of
    the batch, gets the mean 0 and the (population) standard deviation 1; the loss ``(s - t)**2 / 2`` of what that gives
    is then ``1 - r`` with Pearson's correlation r of the channel in both networks, averaged over channels. What scales
    or shifts a channel does not count; a channel that is the same everywhere correlates with nothing and has a loss of
    at most 1. Sizes and channels are matched as ``Hints`` does. The map has the teacher's channels. The paper's weight
    beside the task loss is 6 for levels of a pyramid.

    The batch is that of one process.

    Raises:
        UsageError: when features are no feature maps, or differ in channels while :meth:`connect` has not been called.

    Examples:
        >>> loss = PKD()
        >>> teacher = torch.randn(2, 16, 8, 8)
        >>> loss.reduce(loss(teacher, 3 * teacher + 1)) < 1e-6, loss(teacher, teacher).shape
        (tensor(True), torch.Size([2, 16, 8, 8]))
    """

    compares = "features"
    kind: MapKind = "features"

    def __init__(self) -> None:
        super().__init__()
        self.hints = Hints()

    def connect(self, teacher: Sequence[torch.Size], student: Sequence[torch.Size]) -> None:
        check_comparable("PKD", *only_pair("PKD", teacher, student), allowed=(4,))
        self.hints.connect(teacher, student)

    @in_full_precision
    def pair(self, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        """Teacher's features and the student's, connected, in one shape, standardised."""
        check_comparable("PKD", teacher.shape, student.shape, allowed=(4,))
        of_teacher, of_student = self.hints.pair(teacher, student)
        return _standardized(of_teacher), _standardized(of_student)

    @in_full_precision
    def forward(self, teacher: Tensor, student: Tensor, labels: Tensor | None = None) -> Tensor:
        of_teacher, of_student = self.pair(teacher, student)
        return (of_teacher - of_student).square() / 2

    def reduce(self, divergence: Tensor) -> Tensor:
        return divergence.mean()


def _standardized(features: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 of each channel of (B, C, H, W); 0 where it is the same everywhere."""
    channels = features.transpose(0, 1)  # (C, B, H, W)
    return (deviation(channels.flatten(1), 1) * math.sqrt(channels[0].numel())).view(channels.shape).transpose(0, 1)
