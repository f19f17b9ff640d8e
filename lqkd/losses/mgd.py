"""The teacher's features, generated from the student's with holes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.losses.base import DistillationLoss, MapKind
from lqkd.losses.hints import Hints
from lqkd.losses.matching import channels, check_comparable, only_pair
from lqkd.losses.precision import in_full_precision
from lqkd.losses.settings import check


class MGD(DistillationLoss):
    """Masked generative distillation, ``(f_T - G(g(f_S) * mask))**2``, averaged over all elements.

    Yang et al., arXiv 2205.01529. g matches sizes and channels as ``Hints`` does; the mask hides each position of each
    sample, in all channels, with the given probability; G is a 3x3 convolution, ReLU and a 3x3 convolution. The paper
    sums over the elements of a sample: its weight alpha corresponds to ``alpha * C * H * W`` here.

    A mask is drawn from torch's random numbers in every call of ``forward``, so that seeded runs repeat. :meth:`pair`,
    at which a regularizer looks, draws none: it gives the teacher's features and g(f_S).

    Args:
        masked: probability that a position is hidden, 0 <= masked < 1; 0.5 for classification in the paper.

    Raises:
        UsageError: when the probability is out of range, features are no feature maps (B, C, H, W), or :meth:`connect`
            has not been called.

    Examples:
        >>> loss = MGD(masked=0.5)
        >>> teacher, student = torch.ones(2, 16, 8, 8), torch.ones(2, 4, 8, 8)
        >>> loss.connect([teacher.shape], [student.shape])
        >>> loss(teacher, student).shape
        torch.Size([2, 16, 8, 8])
    """

    compares = "features"
    kind: MapKind = "features"

    def __init__(self, masked: float = 0.5) -> None:
        super().__init__()
        check("it must be >= 0 and < 1", lambda x: 0 <= x < 1, masked=masked)
        self.masked = float(masked)
        self.hints = Hints()
        self.generator: nn.Sequential | None = None

    def connect(self, teacher: Sequence[torch.Size], student: Sequence[torch.Size]) -> None:
        t, s = only_pair("MGD", teacher, student)
        check_comparable("MGD", t, s, allowed=(4,))
        self.hints.connect(teacher, student)
        out = channels(t)
        self.generator = nn.Sequential(nn.Conv2d(out, out, 3, padding=1), nn.ReLU(), nn.Conv2d(out, out, 3, padding=1))

    @in_full_precision
    def pair(self, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        """Teacher's features and the student's, connected, in one shape, nothing hidden."""
        check_comparable("MGD", teacher.shape, student.shape, allowed=(4,))
        return self.hints.pair(teacher, student)

    @in_full_precision
    def forward(self, teacher: Tensor, student: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.generator is None:
            raise UsageError("MGD has no generator yet: call connect with the shapes of the features first")
        teacher, student = self.pair(teacher, student)
        samples, _, height, width = student.shape
        shown = torch.rand(samples, 1, height, width, device=student.device) >= self.masked
        return (teacher - self.generator(student * shown)).square()

    def reduce(self, divergence: Tensor) -> Tensor:
        return divergence.mean()
