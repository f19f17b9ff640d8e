"""A temperature that is learned against the student, more and more as the training goes on."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from lqkd.losses.base import DistillationLoss
from lqkd.losses.logits import divergence_of
from lqkd.losses.precision import in_full_precision
from lqkd.losses.settings import check, positive, share


class CurriculumTemperature(DistillationLoss):
    """``tau**2 * KL(p_T || p_S)`` as :class:`HintonKL`, with a tau that is learned to make it large.

    Li et al., "Curriculum Temperature for Knowledge Distillation" (AAAI 2023, arXiv 2211.16231), with one temperature
    for all samples. The student minimises the loss while its temperature maximises it, ``theta <- theta + mu d(lambda
    L) / d theta`` (eq. 8), by a gradient that is reversed on its way to theta; lambda rises from 0 to 1 along half a
    cosine (eq. 11). theta is kept within bounds by ``tau = lowest + (highest - lowest) * sigmoid(theta)``. Without
    the adversary it would go to the upper bound. Logits and map are (B, C).

    It learns by the student's optimizer, as there, without weight decay and ten times as fast: the published
    schedule has half a million steps. An optimizer that divides by the size of the gradient, such as Adam, sees
    little more of lambda than its sign.

    Args:
        start: tau before training; there theta begins at 1.
        lowest, highest: bounds of tau, 0 < lowest < start < highest.
        ramp: the part of the training in which lambda rises, 0 to 1; there 10 of 240 epochs.

    Raises:
        UsageError: when an argument is out of range.

    Examples:
        >>> loss = CurriculumTemperature(start=4.0)
        >>> divergence = loss(torch.tensor([[4.0, 0.0, 0.0]]), torch.zeros(1, 3))
        >>> round(float(loss.reduce(divergence)), 4), loss.learned()
        (1.9726, {'temperature': tensor(4.)})
    """

    compares_predictions = True
    learning_rate_factor: ClassVar[float] = 10.0
    """Multiplies the student optimizer's learning rate for the temperature."""

    def __init__(self, start: float = 15.6, lowest: float = 1.0, highest: float = 21.0, ramp: float = 10 / 240) -> None:
        super().__init__()
        self.lowest, self.highest = positive("lowest", lowest), positive("highest", highest)
        check(f"it must be between {lowest} and {highest}", lambda x: self.lowest < x < self.highest, start=start)
        self.temperature = float(start)  # for what is made before the first step
        self.ramp, self.progress = share("ramp", ramp), 0.0
        part = (start - self.lowest) / (self.highest - self.lowest)
        self.theta = nn.Parameter(torch.tensor(math.log(part / (1 - part))))

    @property
    def strength(self) -> float:
        """lambda: 0 at the beginning, 1 once the ramp is over."""
        if self.progress >= self.ramp:
            return 1.0
        return 0.5 - 0.5 * math.cos(math.pi * self.progress / self.ramp)

    @in_full_precision
    def forward(self, teacher: Tensor, student: Tensor, labels: Tensor | None = None) -> Tensor:
        still = self.theta.detach()
        tau = self._of(still - self.strength * (self.theta - still)).to(student.dtype)  # theta, its gradient reversed
        log_p_teacher, log_p_student = _over(teacher, tau).log_softmax(-1), _over(student, tau).log_softmax(-1)
        return divergence_of(log_p_teacher, log_p_student) * tau**2

    def reduce(self, divergence: Tensor) -> Tensor:
        return divergence.sum(dim=-1).mean()

    def learned(self) -> dict[str, Tensor]:
        return {"temperature": self._of(self.theta.detach())}

    def _of(self, theta: Tensor) -> Tensor:
        return self.lowest + (self.highest - self.lowest) * theta.sigmoid()


def _over(logits: Tensor, tau: Tensor) -> Tensor:
    """``logits / tau``; of those that are -inf tau gets no gradient, which would be NaN."""
    impossible = logits == -torch.inf
    return (logits.masked_fill(impossible, 0.0) / tau).masked_fill(impossible, -torch.inf)
