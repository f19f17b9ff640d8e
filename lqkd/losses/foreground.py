"""A loss on features of a detector that counts where the teacher sees an object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.losses.base import DistillationLoss, MapKind
from lqkd.losses.matching import to_size
from lqkd.losses.precision import in_full_precision
from lqkd.losses.teacher_head import TeacherHead

_LEAST = 1e-12
"""Of the mean richness, below which nothing is divided by it."""


class ForegroundWeighted(DistillationLoss):
    """A loss on features, each position multiplied by how sure the teacher is that an object is there.

    Du et al., "Distilling Object Detectors with Feature Richness" (arXiv 2111.00674): the richness of a position is
    the largest probability that the teacher's head gives to a class there, and the loss is divided by its sum. Here it
    is divided by its mean over the batch, one process's, so that a loss with the same divergence at all positions
    stays what it is.

    A tap is a level of the pyramid, or a norm of the teacher's tower for classes, as of :class:`lqkd.losses.CrossKD`.

    Args:
        loss: on features, with a map of them: ``Hints``, ``PKD``, ``CWD``, ``MGD``, ...

    Raises:
        UsageError: when the loss has no map of features, or the teacher is no such detector.

    Examples:
        >>> from lqkd.losses import Hints
        >>> from lqkd.models import SmallFCOS
        >>> loss, teacher = ForegroundWeighted(Hints()), SmallFCOS(3, width=4).eval()
        >>> loss.bind_teacher(teacher, "pyramid.outputs.0")
        >>> round(float(loss(torch.zeros(2, 8, 4, 4), torch.ones(2, 8, 4, 4)).mean()), 4)
        1.0
    """

    compares = "features"
    kind: MapKind = "features"

    def __init__(self, loss: DistillationLoss) -> None:
        super().__init__()
        if loss.compares != "features" or loss.kind != "features":
            raise UsageError(
                f"ForegroundWeighted is not possible around {type(loss).__name__}: it weighs positions of feature "
                "maps, as those of Hints, PKD, CWD or MGD"
            )
        self.loss = loss
        self.__dict__["_head"] = None

    def bind(self, student: nn.Module, tap: str) -> None:
        self.loss.bind(student, tap)

    def bind_teacher(self, teacher: nn.Module, tap: str) -> None:
        self.loss.bind_teacher(teacher, tap)
        self.__dict__["_head"] = TeacherHead(teacher, tap, "ForegroundWeighted")  # past nn.Module's registration

    def connect(self, teacher: Sequence[torch.Size], student: Sequence[torch.Size]) -> None:
        self.loss.connect(teacher, student)

    def pair(self, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        return self.loss.pair(teacher, student)

    @in_full_precision
    def forward(self, teacher: Tensor, student: Tensor, labels: Tensor | None = None) -> Tensor:
        head: TeacherHead | None = self.__dict__["_head"]
        if head is None:
            raise UsageError("ForegroundWeighted has no head yet: call bind_teacher with the teacher's network first")
        divergence = cast(Tensor, self.loss(teacher, student, labels))
        with torch.no_grad():
            richness = head(teacher).sigmoid().amax(1, keepdim=True)  # (B, 1, H, W)
            richness = to_size(richness, (divergence.shape[2], divergence.shape[3])).to(divergence)
            weight = richness / richness.mean().clamp_min(_LEAST)
        return divergence * weight

    def reduce(self, divergence: Tensor) -> Tensor:
        return self.loss.reduce(divergence)
