"""What a detector's teacher would say of the student's features."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.losses.base import DistillationLoss, MapKind
from lqkd.losses.hints import Hints
from lqkd.losses.matching import check_comparable, only_pair
from lqkd.losses.precision import in_full_precision
from lqkd.losses.settings import check
from lqkd.losses.teacher_head import TeacherHead


class CrossKD(DistillationLoss):
    """Cross-head distillation of a detector's classes, ``|p_T - p_c|**beta * BCE(p_c, p_T)``, averaged.

    Wang et al., "CrossKD: Cross-Head Knowledge Distillation for Dense Object Detection" (arXiv 2306.11369): the
    student's features at a tap go through the rest of the teacher's frozen head, which gives cross-head predictions
    ``p_c = sigmoid(z_c)``; they are compared with the teacher's own, ``p_T``, and not the student's, which are left to
    the boxes that people drew. The divergence is the quality focal loss of Li et al. (arXiv 2006.04388, equation 4),
    0 where both agree. Classes alone are compared, at all positions; the paper's loss of boxes needs to know which of
    them are of an object.

    A tap is a level of the pyramid (the whole head of the teacher follows), such as ``pyramid.outputs.0`` of
    :class:`lqkd.models.SmallFCOS`, or a norm of the head's tower for classes that is of this level alone
    (``head.class_tower.norms.0.1``: what is behind it follows), the same in both networks. Sizes and channels are
    matched as ``Hints`` does. The map (B, classes, H, W) is small, since most positions are background.

    Args:
        beta: how much less what is nearly right counts, 0 or >= 1: between them the gradient has no bound where both
            agree.

    Raises:
        UsageError: when beta is out of range, features are no feature maps, or the teacher is no such detector.

    Examples:
        >>> from lqkd.models import SmallFCOS
        >>> loss, teacher = CrossKD(), SmallFCOS(3, width=4).eval()
        >>> loss.bind_teacher(teacher, "pyramid.outputs.0")
        >>> features = torch.randn(2, 8, 4, 4)
        >>> loss(features, features).shape, bool(loss(features, features).any())
        (torch.Size([2, 3, 4, 4]), False)
    """

    compares = "features"
    kind: MapKind = "features"

    def __init__(self, beta: float = 1.0) -> None:
        super().__init__()
        check("it must be 0, or a number from 1 on", lambda x: x == 0 or 1 <= x < math.inf, "", beta=beta)
        self.beta = float(beta)
        self.hints = Hints()
        self.__dict__["_head"] = None

    def bind_teacher(self, teacher: nn.Module, tap: str) -> None:
        self.__dict__["_head"] = TeacherHead(teacher, tap, "CrossKD")  # past nn.Module's registration

    def connect(self, teacher: Sequence[torch.Size], student: Sequence[torch.Size]) -> None:
        check_comparable("CrossKD", *only_pair("CrossKD", teacher, student), allowed=(4,))
        self.hints.connect(teacher, student)

    @in_full_precision
    def pair(self, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the classes that the teacher's head finds in its own features and in the student's."""
        head: TeacherHead | None = self.__dict__["_head"]
        if head is None:
            raise UsageError("CrossKD has no head yet: call bind_teacher with the teacher's network first")
        check_comparable("CrossKD", teacher.shape, student.shape, allowed=(4,))
        of_teacher, of_student = self.hints.pair(teacher, student)
        with torch.no_grad():
            known = head(of_teacher)
        return known, head(of_student)

    @in_full_precision
    def forward(self, teacher: Tensor, student: Tensor, labels: Tensor | None = None) -> Tensor:
        known, crossed = self.pair(teacher, student)
        wanted = known.sigmoid()
        distance = (wanted - crossed.sigmoid()).abs()
        entropy = F.binary_cross_entropy_with_logits(crossed, wanted, reduction="none")
        return distance**self.beta * entropy

    def reduce(self, divergence: Tensor) -> Tensor:
        return divergence.mean()
