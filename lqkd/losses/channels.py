"""Where each channel of both networks looks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lqkd.losses.base import DistillationLoss, MapKind
from lqkd.losses.hints import Hints
from lqkd.losses.logits import divergence_of
from lqkd.losses.matching import check_comparable, only_pair
from lqkd.losses.precision import in_full_precision
from lqkd.losses.settings import positive


class CWD(DistillationLoss):
    """Channel-wise divergence, ``tau**2 * KL(p_T || p_S)``, averaged over samples and channels.

    Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction" (arXiv 2011.13256), equations 3 and 4: each
    channel of feature maps (B, C, H, W), or of a segmentation's map of logits, becomes a distribution over positions,
    ``p = softmax(f / tau)`` over H x W. Sizes and channels are matched as ``Hints`` does. The map of divergences, in
    the teacher's shape, holds ``p_T log(p_T / p_S) - p_T + p_S``, non-negative, whose last two terms cancel in the sum
    over positions. The paper's weight beside the task loss is 50 for features and 3 for logits.

    Args:
        temperature: tau > 0; 4 in the paper.

    Raises:
        UsageError: when the temperature is not a positive finite number, features are no feature maps, or differ in
            channels while :meth:`connect` has not been called.

    Examples:
        >>> loss = CWD()
        >>> features = torch.randn(2, 16, 8, 8)
        >>> divergence = loss(features, features)
        >>> divergence.shape, loss.reduce(divergence).abs().item() < 1e-6
        (torch.Size([2, 16, 8, 8]), True)
    """

    compares = "features"
    kind: MapKind = "features"

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        self.temperature = positive("temperature", temperature)
        self.hints = Hints()

    def connect(self, teacher: Sequence[torch.Size], student: Sequence[torch.Size]) -> None:
        check_comparable("CWD", *only_pair("CWD", teacher, student), allowed=(4,))
        self.hints.connect(teacher, student)

    @in_full_precision
    def pair(self, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        """Teacher's features and the student's, connected, in one shape."""
        check_comparable("CWD", teacher.shape, student.shape, allowed=(4,))
        return self.hints.pair(teacher, student)

    @in_full_precision
    def forward(self, teacher: Tensor, student: Tensor, labels: Tensor | None = None) -> Tensor:
        pair = self.pair(teacher, student)
        log_p, log_q = ((x.flatten(2) / self.temperature).log_softmax(dim=2) for x in pair)
        return (divergence_of(log_p, log_q) * self.temperature**2).view_as(pair[0])

    def reduce(self, divergence: Tensor) -> Tensor:
        return divergence.sum(dim=(2, 3)).mean()
