"""Several frozen teachers at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.losses.ensembles import COMBINATIONS
from lqkd.models.calls import Inputs
from lqkd.models.outputs import Asked, main_tensor
from lqkd.teachers.frozen import FrozenTeacher, check_minimum_accuracy


class TeacherEnsemble(nn.Module):
    """Frozen teachers of any architectures, input sizes and normalisations that tell the same classes apart.

    Called, it gives the logarithm of their mean prediction, which is what its accuracy is measured by. What the student
    is compared with is decided by :attr:`combination`.

    Attributes:
        class_axis: the axis of their outputs that has a logit for each class: the task says it, of a text the last.

    Args:
        teachers: at least two.
        combination: how they speak: see :mod:`lqkd.losses.ensembles`; ``mean``, ``learned``, ``confidence``,
            ``separate``, ``trust`` or ``calibrated``.
        minimum_accuracy: accuracy of the ensemble below which training refuses to start; null as for one
            teacher.
        own: whether ``trust`` and ``calibrated`` also hear the float network that the student starts from; null for yes
            where there are ``student_weights``, unless it knows held-out rows by heart.

    Raises:
        UsageError: when there are fewer than two teachers, the combination is unknown, or the accuracy out of range.
    """

    def __init__(
        self,
        teachers: list[FrozenTeacher],
        combination: str = "mean",
        minimum_accuracy: float | None = None,
        own: bool | None = None,
    ) -> None:
        super().__init__()
        if len(teachers) < 2:
            raise UsageError(f"an ensemble of {len(teachers)} is not possible: give at least two teachers")
        if combination not in COMBINATIONS:
            raise UsageError(f"combination={combination!r} is unknown: use {', '.join(COMBINATIONS)}")
        check_minimum_accuracy(minimum_accuracy)
        self.teachers = nn.ModuleList(teachers)
        self.combination = combination
        self.minimum_accuracy = minimum_accuracy
        self.own = own
        self.class_axis = 1

    def members(self) -> list[FrozenTeacher]:
        """The teachers."""
        return [teacher for teacher in self.teachers if isinstance(teacher, FrozenTeacher)]

    def train(self, mode: bool = True) -> TeacherEnsemble:
        """Stay in eval mode."""
        super().train(False)
        return self

    def convert_from(self, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
        """Tell every teacher how images are normalised; see :meth:`FrozenTeacher.convert_from`."""
        for teacher in self.members():
            teacher.convert_from(mean, std)

    def check_classes(self, names: Sequence[str]) -> None:
        """Compare every teacher's class names with the data's; see :meth:`FrozenTeacher.check_classes`."""
        for teacher in self.members():
            teacher.check_classes(names)

    def answers(self, *args: Any, **keywords: Any) -> list[Any]:
        """What each teacher returns, logits (B, C) say."""
        return [teacher(*args, **keywords) for teacher in self.members()]

    @torch.no_grad()
    def forward(self, *args: Any, **keywords: Any) -> Tensor:
        """Logarithm of the mean prediction, (B, C), or (B, C, ...) or (B, ..., C) where networks return such."""
        asked = Asked("teacher", len(Inputs(args, keywords)))
        answers = [main_tensor(answer, asked) for answer in self.answers(*args, **keywords)]
        predictions = torch.stack([logits.float().softmax(dim=self.class_axis) for logits in answers])
        return predictions.mean(0).clamp_min(1e-30).log()
