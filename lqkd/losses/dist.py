"""Distillation of correlations of the predictions, between classes and within them."""

from __future__ import annotations

import torch
from torch import Tensor

from lqkd.losses.base import DistillationLoss
from lqkd.losses.directions import deviation
from lqkd.losses.precision import in_full_precision
from lqkd.losses.settings import positive, weights


class DIST(DistillationLoss):
    """``tau**2 * (beta * mean_i(1 - r(p_T[i, :], p_S[i, :])) + gamma * mean_c(1 - r(p_T[:, c], p_S[:, c])))``.

    Huang et al., "Knowledge Distillation from A Stronger Teacher", arXiv 2205.10536: ``p = softmax(z / tau)``, r is
    Pearson's correlation, over the classes of a sample i (inter-class) and over the samples of a class c (intra-class).
    The factor ``tau**2`` is that of the published code. A correlation does not shrink with the temperature as a
    divergence does: here the gradient grows with ``tau**2``.

    Since ``1 - r`` is half the squared distance of the two vectors once they are centred and scaled to length 1, there
    is an elementwise map (B, C) of non-negative numbers with this loss as its reduction, the sum over classes and the
    mean over samples. A row or column without spread (a batch of one sample) correlates with nothing: its vector is
    zero, and no gradient flows from it. A class whose logits are -inf in both networks is left out of the sample's
    correlation, and of the mean over classes where that is so in all samples; in the correlation of a class over
    samples such a one has the mean probability of its other classes.

    Args:
        temperature: tau > 0.
        beta: weight of the inter-class part, >= 0.
        gamma: weight of the intra-class part, >= 0.

    Raises:
        UsageError: when an argument is out of range.

    Examples:
        >>> import torch
        >>> loss = DIST()
        >>> teacher = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0]])
        >>> divergence = loss(teacher, teacher.flip(0))  # every sample gets the other one's prediction
        >>> divergence.shape, loss.reduce(divergence)
        (torch.Size([2, 3]), tensor(7.5260))
    """

    compares_predictions = True

    def __init__(self, temperature: float = 1.0, beta: float = 2.0, gamma: float = 2.0) -> None:
        super().__init__()
        self.temperature = positive("temperature", temperature)
        self.beta, self.gamma = weights(beta=beta, gamma=gamma)

    @in_full_precision
    def forward(self, teacher: Tensor, student: Tensor, labels: Tensor | None = None) -> Tensor:
        out = (teacher == -torch.inf) & (student == -torch.inf)
        mean = 1 / (~out).sum(1, keepdim=True).clamp_min(1).to(student.dtype)  # from which it does not deviate
        p_teacher, p_student = (
            torch.where(out, mean, (z / self.temperature).softmax(dim=1)) for z in (teacher, student)
        )
        samples, classes = student.shape
        inter = (deviation(p_teacher, 1) - deviation(p_student, 1)).square()
        intra = (deviation(p_teacher, 0) - deviation(p_student, 0)).square()
        intra = intra * (classes / (~out).any(0).sum().clamp_min(1))  # 1 where no class is out in all samples
        # The reduction divides by samples; the intra-class part is a mean over classes.
        return self.temperature**2 / 2 * (self.beta * inter + self.gamma * samples / classes * intra)

    def reduce(self, divergence: Tensor) -> Tensor:
        return divergence.sum(dim=-1).mean()
