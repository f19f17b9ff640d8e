"""What the teacher would say of the student's features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.losses.base import DistillationLoss, MapKind
from lqkd.losses.hints import Hints
from lqkd.losses.logits import HintonKL
from lqkd.losses.rest import Rest


class StitchedKL(DistillationLoss):
    """KL between the teacher's answer and what its own rest makes of the student's features.

    With r the frozen layers of the teacher behind a tap, ``tau**2 * KL(p(r(f_T)) || p(r(g(f_S))))`` where
    ``p(z) = softmax(z / tau)``: the student's layers before the tap are stitched to the teacher's behind it. Features
    count as far as they change the answer, in the unit of the other losses on predictions, where :class:`Hints` asks
    for all of them alike. A network whose quantised front is followed by its own floating-point layers is the
    intermediate model of block replacement (Yu et al., arXiv 2412.15846); at the last features it is the term of
    softmax regression representation learning (Yang et al., "Knowledge distillation via softmax regression
    representation learning", ICLR 2021) with KL in place of squared residuals. :class:`CrossKD` is its relative for
    detectors.

    Everything must flow through the tap: the teacher's network is traced with ``torch.fx``, and what goes around the
    tap is refused. Its answer is its main output, logits (B, C), or (B, C, H, W) and (B, T, C) of which every position
    counts alike. g is that of :class:`Hints`. The map holds one number a sample, (B,). Each tap costs two forward
    passes and a backward pass of the rest.

    Args:
        temperature: tau > 0.

    Raises:
        UsageError: when the temperature is not a positive finite number, the teacher cannot be traced or goes on with
            more than what the tap gives, or features cannot be matched.

    Examples:
        >>> teacher = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        >>> loss, images = StitchedKL(), torch.randn(2, 4)
        >>> loss.bind_teacher(teacher, "0")
        >>> features = teacher[0](images)
        >>> loss(features, features).detach(), loss(features, torch.zeros(2, 8)).shape
        (tensor([0., 0.]), torch.Size([2]))
    """

    compares = "features"
    kind: MapKind = "samples"
    compares_predictions = True

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.kl = HintonKL(temperature)
        self.temperature = self.kl.temperature
        self.hints = Hints()
        self.__dict__["_rest"] = None

    def bind_teacher(self, teacher: nn.Module, tap: str) -> None:
        self.__dict__["_rest"] = Rest(teacher, tap, "StitchedKL")  # past nn.Module's registration

    def connect(self, teacher: Sequence[torch.Size], student: Sequence[torch.Size]) -> None:
        self.hints.connect(teacher, student)

    def pair(self, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        """Logits that the rest of the teacher makes of its own features and of the student's, classes last."""
        rest: Rest | None = self.__dict__["_rest"]
        if rest is None:
            raise UsageError("StitchedKL has no teacher yet: call bind_teacher with the teacher's network first")
        _, matched = self.hints.pair(teacher, student)
        with torch.no_grad():
            known = rest(teacher.to(matched.dtype))  # which a cache may have kept in fewer bits
        stitched = rest(matched)
        return (known.movedim(1, -1), stitched.movedim(1, -1)) if known.ndim == 4 else (known, stitched)

    def forward(self, teacher: Tensor, student: Tensor, labels: Tensor | None = None) -> Tensor:
        divergence: Tensor = self.kl(*self.pair(teacher, student))
        return divergence.sum(dim=-1).flatten(1).mean(dim=1) if divergence.ndim > 2 else divergence.sum(dim=-1)

    def reduce(self, divergence: Tensor) -> Tensor:
        return divergence.mean()
