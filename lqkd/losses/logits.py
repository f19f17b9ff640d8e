"""Distillation losses on logits."""

from __future__ import annotations

import math

from torch import Tensor

from lqkd.errors import UsageError
from lqkd.losses.base import DistillationLoss


class LogitResidual(DistillationLoss):
    """Squared residual of the logits, ``(T - S)**2``, averaged over samples and classes.

    The residual form of learnable-regularizer distillation (arXiv 2509.20854); unweighted it is logit matching
    (Ba & Caruana, arXiv 1312.6184, eq. 2; Kim et al., arXiv 2105.08919).
    """

    def forward(self, teacher: Tensor, student: Tensor, labels: Tensor | None = None) -> Tensor:
        return (teacher - student).square()

    def reduce(self, divergence: Tensor) -> Tensor:
        return divergence.mean()


class HintonKL(DistillationLoss):
    """Kullback-Leibler divergence of the softened predictions, ``tau**2 * KL(p_T || p_S)``.

    Hinton et al., "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531), section 2: with
    ``p = softmax(z / tau)``, summed over classes, averaged over samples, times ``tau**2`` so that the size of the
    gradient does not depend on the temperature. The map holds ``p_T log(p_T / p_S) - p_T + p_S``: each element is
    non-negative, as a weight on it needs, and the last two terms cancel in the sum over classes.

    Args:
        temperature: tau > 0.

    Raises:
        UsageError: when the temperature is not a positive finite number.
    """

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        if not (math.isfinite(temperature) and temperature > 0):
            raise UsageError(f"temperature={temperature!r} is not possible: it must be a positive number")
        self.temperature = float(temperature)

    def forward(self, teacher: Tensor, student: Tensor, labels: Tensor | None = None) -> Tensor:
        log_p_teacher = (teacher / self.temperature).log_softmax(dim=-1)
        log_p_student = (student / self.temperature).log_softmax(dim=-1)
        p_teacher, p_student = log_p_teacher.exp(), log_p_student.exp()
        divergence = p_teacher * (log_p_teacher - log_p_student) - p_teacher + p_student
        return divergence.clamp_min(0.0) * self.temperature**2  # rounding can leave -1e-9

    def reduce(self, divergence: Tensor) -> Tensor:
        return divergence.sum(dim=-1).mean()
