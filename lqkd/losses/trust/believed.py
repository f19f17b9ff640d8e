"""What a weight between teachers and student has learned, in numbers and in a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lqkd.losses.trust.report import FEWEST, HARDLY, MOST_NAMED, MUCH_LESS


@dataclass
class Believed:
    """How far teachers are believed against the student, and what that is worth on rows that were not learned from."""

    believed: float
    """Mean weight of the teachers, at their answer, in (0, 1)."""
    by_class: list[float | None]
    """The same by what they answer; None for a class that they hardly ever answer with."""
    rows: int
    """Held-out rows that the losses are of."""
    loss: float
    """Cross-entropy of the target Z between teachers and student, in nats a row."""
    loss_of_student: float
    loss_of_teachers: float
    accuracy: float
    """The part of the same rows that Z answers rightly."""
    accuracy_of_student: float
    accuracy_of_teachers: float

    def sentence(self, classes: Sequence[str]) -> str:
        """In the user's terms.

        Examples:
            >>> Believed(0.9, [0.95, 0.3], 60, 0.4, 0.52, 0.43, 0.9, 0.88, 0.9).sentence(["cat", "dog"])
            'teachers are believed 0.90 against the student, class dog 0.30; worth +0.120 nats and +2.0 points over \
the student alone, +0.030 and +0.0 over the teachers alone, on 60 held-out rows that this was not learned from'
        """
        told = f"teachers are believed {self.believed:.2f} against the student"
        limit = MUCH_LESS * self.believed
        less = sorted((value, c) for c, value in enumerate(self.by_class) if value is not None and value < limit)
        if less and self.believed > HARDLY:
            named = ", ".join(f"{classes[c]} {value:.2f}" for value, c in less[:MOST_NAMED])
            told += f", {'classes' if len(less) > 1 else 'class'} {named}"
        nats = self.loss_of_student - self.loss, self.loss_of_teachers - self.loss
        points = [100 * (self.accuracy - other) for other in (self.accuracy_of_student, self.accuracy_of_teachers)]
        return (
            f"{told}; worth {nats[0]:+.3f} nats and {points[0]:+.1f} points over the student alone, {nats[1]:+.3f} and "
            f"{points[1]:+.1f} over the teachers alone, on {self.rows} held-out rows that this was not learned from"
        )

    def numbers(self) -> dict[str, float]:
        """What is logged."""
        return {name: value for name, value in vars(self).items() if isinstance(value, float)}

    def named(self, classes: Sequence[str]) -> dict[str, Any]:
        """All values by name, as JSON values, with the sentence."""
        by_class = dict(zip(classes, self.by_class, strict=True))
        return asdict(self) | {"by_class": by_class, "sentence": self.sentence(classes)}


def believed(
    teachers: Tensor, student: Tensor, target: Tensor, weights: Tensor, labels: Tensor, judged: Tensor
) -> Believed:
    """What can be said of weights on held-out rows.

    Args:
        teachers, student, target: (N, C) log-probabilities of what is believed of the teachers, of the student and of
            what is between.
        weights: (N, 1) or (N, C) of the teachers.
        labels: (N,) int64, none negative.
        judged: (N,) bool, of rows that weights were not learned from: the losses are of these.
    """
    answers = teachers.argmax(1)
    at_answer = weights.expand_as(teachers).gather(1, answers[:, None]).squeeze(1)
    count = torch.bincount(answers, minlength=teachers.shape[1])
    sums = torch.zeros_like(count, dtype=at_answer.dtype).index_add_(0, answers, at_answer)
    by_class = [float(s / n) if n >= FEWEST else None for s, n in zip(sums, count, strict=True)]
    losses = [float(F.nll_loss(x[judged], labels[judged])) for x in (target, student, teachers)]
    right = [float((x.argmax(1) == labels)[judged].double().mean()) for x in (target, student, teachers)]
    return Believed(float(at_answer.mean()), by_class, int(judged.sum()), *losses, *right)
