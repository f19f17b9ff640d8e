"""A target between teacher and student, by who of them is right on held-out rows."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lqkd.losses.settings import check

WeightOf = Literal["all", "class", "sample"]
FURTHER = 7
"""Features of a sample besides both log-probabilities."""


class Interpolation(nn.Module):
    """``Z = S + w (T - S)`` of log-probabilities, with w in (0, 1) that makes labels of held-out rows most likely.

    Where the student is as good as its teacher, w falls and distillation ends by itself: the residual that the student
    sees is ``w (T - S)``. It cannot gain from a small distillation loss, since :meth:`objective` does not contain one.

    Args:
        classes: how many.
        of: whether there is one w for ``all``, one a ``class``, or one a ``sample``, from a small network that looks at
            both log-probabilities, their entropies and margins, whether both answer the same, and how much teacher and
            student, and teachers among themselves, agree.
        start: w before training: believe the teacher, nearly.
        strength: of the pull of logit(w) towards its start.
        hidden: units of the small network.

    Raises:
        UsageError: when the start is not between 0 and 1 or the strength is negative or not finite.

    Examples:
        >>> both = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> target, weights = Interpolation(2, of="all")(*both)
        >>> weights.detach(), target.argmax().item()
        (tensor([[0.8800]]), 0)
    """

    def __init__(
        self, classes: int, of: WeightOf = "sample", start: float = 0.88, strength: float = 0.01, hidden: int = 16
    ) -> None:
        super().__init__()
        check_pull(start, strength)
        self.of, self.strength = of, strength
        self.start = math.log(start / (1 - start))
        self.moved: nn.Module | nn.Parameter
        if of == "sample":
            last = nn.Linear(hidden, 1)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.moved = nn.Sequential(nn.Linear(2 * classes + FURTHER, hidden), nn.Tanh(), last)
        else:
            self.moved = nn.Parameter(torch.zeros(1 if of == "all" else classes))

    def forward(self, teacher: Tensor, student: Tensor, teachers: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Log-probabilities Z (N, C) and weights w, (N, 1) or (N, C), float32, differentiable in phi alone.

        Args:
            teacher: (N, C) logits, those of a :class:`~lqkd.losses.trust.TrustMap` say.
            student: (N, C) logits.
            teachers: (K, N, C) logits of each teacher: whether several of them agree is looked at.
        """
        target, moved = self._between(seen(teacher, student, teachers))
        return target, (self.start + moved).sigmoid()

    def objective(self, teacher: Tensor, student: Tensor, labels: Tensor, teachers: Tensor | None = None) -> Tensor:
        """What phi minimises on held-out rows, 0-dim: ``CE(Z, y) + strength / 2 * mean (logit w - logit start)^2``.

        Args:
            teacher, student, teachers: see :meth:`forward`.
            labels: (N,) int64; rows with a negative one are left out, and where all are it is 0.
        """
        return self.objective_of(seen(teacher, student, teachers), labels)

    def objective_of(self, rows: Seen, labels: Tensor) -> Tensor:
        """The same of rows that are looked at once and learned from many times; see :func:`seen`."""
        target, moved = self._between(rows)
        known = (labels >= 0).to(target)
        losses = F.nll_loss(target, labels.clamp_min(0), reduction="none")
        price = moved.square().mean(1)
        return (known * (losses + self.strength / 2 * price)).sum() / known.sum().clamp_min(1.0)

    def _between(self, rows: Seen) -> tuple[Tensor, Tensor]:
        """Z (N, C), and how far logit(w) is from its start, (N, 1) or (N, C)."""
        t, s = rows.teacher, rows.student
        with torch.autocast(t.device.type, enabled=False):
            if isinstance(self.moved, nn.Parameter):
                moved: Tensor = self.moved.expand(len(t), -1)
            else:
                moved = self.moved(rows.features)
            return (s + (self.start + moved).sigmoid() * (t - s)).log_softmax(-1), moved


class Seen(NamedTuple):
    """What is looked at of samples."""

    teacher: Tensor
    """Log-probabilities (N, C), float32, without a gradient."""
    student: Tensor
    """Likewise."""
    features: Tensor
    """(N, 2 C + 7)."""


@torch.no_grad()
def seen(teacher: Tensor, student: Tensor, teachers: Tensor | None = None) -> Seen:
    """What is looked at of samples; for the arguments see :meth:`Interpolation.forward`."""
    with torch.autocast(teacher.device.type, enabled=False):
        t, s = log_probabilities(teacher), log_probabilities(student)
        return Seen(t, s, features(t, s, teachers))


def features(t: Tensor, s: Tensor, teachers: Tensor | None = None) -> Tensor:
    """What is looked at of a sample, (N, 2 C + 7): both log-probabilities, and what :func:`further` says."""
    both = (torch.cat([t, s], 1) / math.log(t.shape[1])).clamp_min(-10.0)
    return torch.cat([both, further(t, s, teachers)], 1)


def further(t: Tensor, s: Tensor, teachers: Tensor | None = None) -> Tensor:
    """Entropies, margins and agreement of a sample, (N, 7), each between 0 and 1.

    Args:
        t, s: log-probabilities (N, C) of the target and of the student.
        teachers: logits (K, N, C); None for one that is not told.
    """
    scale = math.log(t.shape[1])
    p, q = t.exp(), s.exp()
    top_t, top_s = p.topk(2, -1).values, q.topk(2, -1).values
    apart = t.new_zeros(len(t))
    if teachers is not None:
        each = teachers.float().softmax(-1)
        apart = (each - each.mean(0)).abs().sum(-1).mean(0) / 2  # total variation from their mean
    values = [
        -(p * t).sum(-1) / scale,
        -(q * s).sum(-1) / scale,
        top_t[:, 0] - top_t[:, 1],
        top_s[:, 0] - top_s[:, 1],
        (t.argmax(-1) == s.argmax(-1)).to(t),
        (p * q).sum(-1),
        apart,
    ]
    return torch.stack(values, 1)


def log_probabilities(logits: Tensor) -> Tensor:
    """Of logits (..., C), in float32; -1000 for a logit of -inf, so that differences are numbers."""
    found = logits.float().log_softmax(-1)
    return found.masked_fill(found == -torch.inf, -1000.0)


def check_pull(start: float, strength: float) -> None:
    """Refuse a weight before training that is no weight, and a pull towards it that is none.

    Raises:
        UsageError: then.
    """
    check("the weight of the teacher is between 0 and 1", lambda x: 0 < x < 1, start=start)
    check("it must be a finite number of at least 0", lambda x: 0 <= x < math.inf, strength=strength)
