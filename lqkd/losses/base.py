"""What a distillation loss is: a map of divergences and a rule that reduces it to a number."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class DistillationLoss(nn.Module, ABC):
    """Difference of teacher and student, element by element.

    ``forward(teacher, student)`` returns a divergence map with non-negative elements, of which a regularizer may
    weigh each one; ``reduce(map)`` returns the loss. Both are differentiable in ``student``.
    """

    @abstractmethod
    def forward(self, teacher: Tensor, student: Tensor) -> Tensor:
        """Divergence map (B, C) from logits (B, C), in the dtype of the student's."""

    @abstractmethod
    def reduce(self, divergence: Tensor) -> Tensor:
        """0-dim loss from a (weighted) divergence map."""
