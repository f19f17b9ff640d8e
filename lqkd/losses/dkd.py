"""Distillation of the target class and of all others, decoupled."""

from __future__ import annotations

import torch
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.losses.base import DistillationLoss
from lqkd.losses.logits import divergence_of
from lqkd.losses.precision import in_full_precision
from lqkd.losses.probabilities import log_sum_exp
from lqkd.losses.settings import positive, weights


class DKD(DistillationLoss):
    """Decoupled knowledge distillation, ``tau**2 * (alpha * TCKD + beta * NCKD)``, averaged over samples.

    Zhao et al., arXiv 2203.08679. With ``p = softmax(z / tau)`` and t the true class, TCKD is the divergence of
    ``(p_t, 1 - p_t)`` and NCKD that of the predictions among the other classes, ``softmax`` over all but t.

    The map (B, C) is non-negative: its element of the true class holds the whole of TCKD, the others hold the elements
    ``q_T log(q_T / q_S) - q_T + q_S`` of NCKD, each times its weight and ``tau**2``. With two classes NCKD is 0.
    The warm-up of the published recipe is a schedule of the loss' weight, not part of the loss.

    A sample without a label (negative) has no true class: all of its classes are others, and what is left is the plain
    Kullback-Leibler divergence times beta.

    Args:
        temperature: tau > 0.
        alpha: weight of the target class, >= 0; 1 in the paper.
        beta: weight of the other classes, >= 0; 8 for most pairs of networks in the paper.

    Raises:
        UsageError: when an argument is out of range; in training when there are no labels or fewer than two classes.

    Examples:
        >>> loss = DKD(temperature=4.0, alpha=1.0, beta=8.0)
        >>> teacher, labels = torch.tensor([[4.0, 2.0, 0.0]]), torch.tensor([0])
        >>> divergence = loss(teacher, torch.zeros(1, 3), labels)
        >>> divergence.shape, loss.reduce(divergence)
        (torch.Size([1, 3]), tensor(4.8939))
    """

    compares_predictions = True

    needs_labels = True

    def __init__(self, temperature: float = 4.0, alpha: float = 1.0, beta: float = 8.0) -> None:
        super().__init__()
        self.temperature = positive("temperature", temperature)
        self.alpha, self.beta = weights(alpha=alpha, beta=beta)

    @in_full_precision
    def forward(self, teacher: Tensor, student: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            raise UsageError("labels=None is not possible with DKD, which tells the true class from the others")
        if student.shape[-1] < 2:
            raise UsageError(f"logits with {student.shape[-1]} class are not possible with DKD: it needs two or more")
        target = labels.unsqueeze(1) == torch.arange(student.shape[1], device=student.device)  # (B, C)
        binary_teacher, others_teacher = self._decoupled(teacher, target)
        binary_student, others_student = self._decoupled(student, target)
        tckd = divergence_of(binary_teacher, binary_student).sum(dim=1, keepdim=True)  # (B, 1)
        nckd = divergence_of(others_teacher, others_student)  # (B, C), where it is of the true class meaningless
        nckd = nckd.masked_fill(binary_teacher[:, 1:] == -torch.inf, 0.0)  # the teacher knows of no others
        return torch.where(target, self.alpha * tckd, self.beta * nckd) * self.temperature**2

    def _decoupled(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithms of (p_t, 1 - p_t), (B, 2), and of the prediction among the other classes, (B, C), 0 at t."""
        log_p = (logits / self.temperature).log_softmax(dim=1)
        others = log_p.masked_fill(target, -torch.inf)
        log_rest = log_sum_exp(others, dim=1)
        log_target = log_p.masked_fill(~target, 0.0).sum(dim=1, keepdim=True)
        among_others = log_p - log_rest.clamp_min(torch.finfo(log_p.dtype).min)
        return torch.cat((log_target, log_rest), dim=1), among_others.masked_fill(target, 0.0)

    def reduce(self, divergence: Tensor) -> Tensor:
        return divergence.sum(dim=-1).mean()
