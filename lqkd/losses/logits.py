"""Distillation losses on logits, class by class.

All losses of this package but the decoupled one do without labels. "Label-free distillation" is therefore no loss but a
configuration: one of these with a balance in which the task loss has weight 0.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lqkd.losses.base import DistillationLoss
from lqkd.losses.precision import in_full_precision
from lqkd.losses.probabilities import times_log
from lqkd.losses.settings import positive


class LogitResidual(DistillationLoss):
    """Squared residual of the logits, ``(T - S)**2``, averaged over samples and classes.

    The residual form of learnable-regularizer distillation (arXiv 2509.20854); unweighted it is logit matching
    (Ba & Caruana, arXiv 1312.6184, eq. 2; Kim et al., arXiv 2105.08919). Logits and map are (B, C). Where the teacher
    alone rules a class out by a logit of -inf it is infinite: use :class:`HintonKL` there.

    Examples:
        >>> import torch
        >>> loss = LogitResidual()
        >>> divergence = loss(torch.tensor([[4.0, 0.0, 1.0]]), torch.tensor([[3.0, 0.0, -1.0]]))
        >>> divergence, loss.reduce(divergence)
        (tensor([[1., 0., 4.]]), tensor(1.6667))
    """

    @in_full_precision
    def forward(self, teacher: Tensor, student: Tensor, labels: Tensor | None = None) -> Tensor:
        return (teacher - student).masked_fill_(teacher == student, 0.0).square()  # of -inf and -inf too

    def reduce(self, divergence: Tensor) -> Tensor:
        return divergence.mean()


class HintonKL(DistillationLoss):
    """Kullback-Leibler divergence of the softened predictions, ``tau**2 * KL(p_T || p_S)``.

    Hinton et al., "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531), section 2: with
    ``p = softmax(z / tau)``, summed over classes, averaged over samples, times ``tau**2`` so that the size of the
    gradient does not depend on the temperature. The map holds ``p_T log(p_T / p_S) - p_T + p_S``: each element is
    non-negative, as a weight on it needs, and the last two terms cancel in the sum over classes. Logits and
    map are (B, C).

    Args:
        temperature: tau > 0.

    Raises:
        UsageError: when the temperature is not a positive finite number.

    Examples:
        >>> import torch
        >>> loss = HintonKL(temperature=4.0)
        >>> divergence = loss(torch.tensor([[4.0, 0.0, 0.0]]), torch.zeros(1, 3))
        >>> divergence.shape, loss.reduce(divergence)
        (torch.Size([1, 3]), tensor(1.9726))
    """

    compares_predictions = True

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        self.temperature = positive("temperature", temperature)

    @in_full_precision
    def forward(self, teacher: Tensor, student: Tensor, labels: Tensor | None = None) -> Tensor:
        log_p_teacher = (teacher / self.temperature).log_softmax(dim=-1)
        log_p_student = (student / self.temperature).log_softmax(dim=-1)
        return divergence_of(log_p_teacher, log_p_student) * self.temperature**2

    def reduce(self, divergence: Tensor) -> Tensor:
        return divergence.sum(dim=-1).mean()


class SoftCrossEntropy(DistillationLoss):
    """Cross-entropy with the teacher's softened prediction as the target, ``-tau**2 * sum_c p_T log p_S``.

    Hinton et al. (arXiv 1503.02531), section 2. It has the student's gradient of :class:`HintonKL` but ends at the
    entropy of the teacher, not at 0, when both agree. A regularizer can tell the two apart: this map (B, C) is large
    wherever the teacher puts probability, the other one only where the student deviates.

    Args:
        temperature: tau > 0.

    Raises:
        UsageError: when the temperature is not a positive finite number.

    Examples:
        >>> import torch
        >>> loss = SoftCrossEntropy()
        >>> teacher = torch.tensor([[4.0, 0.0, 0.0]])
        >>> loss.reduce(loss(teacher, teacher))  # the teacher's entropy
        tensor(0.1773)
    """

    compares_predictions = True

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = positive("temperature", temperature)

    @in_full_precision
    def forward(self, teacher: Tensor, student: Tensor, labels: Tensor | None = None) -> Tensor:
        p_teacher = (teacher / self.temperature).softmax(dim=-1)
        log_p_student = (student / self.temperature).log_softmax(dim=-1)
        return -times_log(p_teacher, log_p_student) * self.temperature**2

    def reduce(self, divergence: Tensor) -> Tensor:
        return divergence.sum(dim=-1).mean()


class BinaryKL(DistillationLoss):
    """Kullback-Leibler divergence of each class by itself, ``tau**2 * KL(sigmoid(T / tau) || sigmoid(S / tau))``.

    The form of :class:`HintonKL` (arXiv 1503.02531) for several labels a sample, where every class is there or not
    whatever the others are; e.g. Yang et al., "Multi-Label Knowledge Distillation" (arXiv 2308.06453). Summed
    over classes, averaged over samples. Logits and map are (B, C); every element is non-negative.

    Args:
        temperature: tau > 0.

    Raises:
        UsageError: when the temperature is not a positive finite number.

    Examples:
        >>> import torch
        >>> loss = BinaryKL()
        >>> loss(torch.tensor([[2.0, 0.0]]), torch.zeros(1, 2))
        tensor([[0.3278, 0.0000]])
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = positive("temperature", temperature)

    @in_full_precision
    def forward(self, teacher: Tensor, student: Tensor, labels: Tensor | None = None) -> Tensor:
        t, s = teacher / self.temperature, student / self.temperature
        there = divergence_of(F.logsigmoid(t), F.logsigmoid(s))
        return (there + divergence_of(F.logsigmoid(-t), F.logsigmoid(-s))) * self.temperature**2

    def reduce(self, divergence: Tensor) -> Tensor:
        return divergence.sum(dim=-1).mean()


def divergence_of(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``p log(p / q) - p + q``, element by element: non-negative, and in the sum KL(p || q) where p and q sum to 1.

    It is q where p is 0, even if q is, and infinite where q alone is.
    """
    p, q = log_p.exp(), log_q.exp()
    apart = (log_p - log_q).masked_fill_(p == 0, 0.0)  # as times_log, in place
    return (p * apart).sub_(p).add_(q).clamp_min(0.0)  # rounding can leave -1e-9
