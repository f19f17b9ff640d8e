"""How several teachers become one: pure torch, on their logits."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lqkd.losses.task import mean_of_labelled
from lqkd.losses.trust import TrustMap
from lqkd.losses.trust.map import Spread


class Combination(nn.Module, ABC):
    """``forward(teachers, labels)`` for logits (K, B, C) of K teachers: what the student is compared with.

    Labels are (B,) int64, negative where a sample has none. Returns a list of logits (B, C), of which each is compared
    by itself, and a 0-dim objective of the combination's own parameters, None when there are none. Teachers that
    disagree in scale are combined as predictions: combined logits are log-probabilities.

    Args:
        teachers: how many.
    """

    separate = False
    """Whether every teacher is compared with the student by itself."""
    trusted = False
    """Whether it is fitted to held-out rows before the training, and takes a single teacher too."""

    def __init__(self, teachers: int) -> None:
        super().__init__()
        self.count = teachers

    def connect(self, classes: int) -> None:
        """Make what depends on the number of classes, once."""

    @abstractmethod
    def forward(self, teachers: Tensor, labels: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """See the class."""


class MeanPrediction(Combination):
    """The mean of the teachers' predictions (You et al., "Learning from Multiple Teacher Networks", KDD 2017)."""

    def forward(self, teachers: Tensor, labels: Tensor) -> tuple[list[Tensor], Tensor | None]:
        return [_log(teachers.float().softmax(-1).mean(0))], None


class LearnedMixture(Combination):
    """A mixture of predictions with one learned share per teacher, ``softmax(v)``.

    v minimises the cross-entropy of the mixture with the labels (stacking; Breiman 1996), and not the distillation
    loss, which would choose the teacher that is easiest to imitate. Samples without a label teach it nothing.
    """

    def __init__(self, teachers: int) -> None:
        super().__init__(teachers)
        self.scores = nn.Parameter(torch.zeros(teachers))

    def forward(self, teachers: Tensor, labels: Tensor) -> tuple[list[Tensor], Tensor | None]:
        predictions = teachers.detach().float().softmax(-1)
        mixture = _log((self.scores.softmax(0).view(-1, 1, 1) * predictions).sum(0))
        loss = mean_of_labelled(lambda known: F.nll_loss(mixture, known), labels, mixture.shape[1])
        return [mixture.detach()], loss


class ConfidentTeachers(Combination):
    """Shares per sample by how right each teacher is: ``(1 - softmax_k(CE_k)) / (K - 1)``.

    Confidence-aware multi-teacher distillation (Zhang et al., arXiv 2201.00007): CE_k is the cross-entropy of teacher k
    with the label. For a sample without one all have the same share.
    """

    def forward(self, teachers: Tensor, labels: Tensor) -> tuple[list[Tensor], Tensor | None]:
        log_predictions = teachers.float().log_softmax(-1)  # (K, B, C)
        known = labels.clamp_min(0).expand(self.count, -1).unsqueeze(2)
        wrong = -log_predictions.gather(2, known).squeeze(2).masked_fill(labels < 0, 0.0)  # (K, B)
        shares = (1 - wrong.softmax(0)) / (self.count - 1)
        return [_log((shares.unsqueeze(2) * log_predictions.exp()).sum(0))], None


class SeparateTeachers(Combination):
    """Every teacher is compared with the student by itself, with a regularizer of its own; the losses are averaged."""

    separate = True

    def forward(self, teachers: Tensor, labels: Tensor) -> tuple[list[Tensor], Tensor | None]:
        return list(teachers), None


class TrustedTeachers(Combination):
    """What can be believed of the teachers: a :class:`~lqkd.losses.trust.TrustMap` of their logits.

    The map is fitted to held-out rows before the training; until then it gives the mean of predictions.
    """

    trusted = True
    spread: Spread = "keep"
    map: TrustMap | None

    def __init__(self, teachers: int) -> None:
        super().__init__(teachers)
        self.map = None

    def connect(self, classes: int) -> None:
        if self.map is None:
            self.map = TrustMap(self.count, classes, self.spread)

    def forward(self, teachers: Tensor, labels: Tensor) -> tuple[list[Tensor], Tensor | None]:
        self.connect(teachers.shape[2])
        assert self.map is not None
        return [self.map(teachers)], None


class CalibratedTeachers(TrustedTeachers):
    """The same, as sure as labels justify: see ``spread`` of :class:`~lqkd.losses.trust.TrustMap`."""

    spread = "fitted"


COMBINATIONS: dict[str, type[Combination]] = {
    "mean": MeanPrediction,
    "learned": LearnedMixture,
    "confidence": ConfidentTeachers,
    "separate": SeparateTeachers,
    "trust": TrustedTeachers,
    "calibrated": CalibratedTeachers,
}
"""Short names accepted where a combination is asked for."""


def _log(predictions: Tensor) -> Tensor:
    return predictions.clamp_min(1e-30).log()
