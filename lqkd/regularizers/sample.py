"""A small network that decides how much a sample's distillation counts."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.losses.probabilities import times_log
from lqkd.regularizers.applied import APPLIED, Applied
from lqkd.regularizers.base import Regularizer, RowGroups
from lqkd.regularizers.guards import Guard
from lqkd.regularizers.mlp import MLP
from lqkd.regularizers.players import Player
from lqkd.utils.pieces import rows_at_once

_CONFIDENCE = 2
"""Which of the numbers is the teacher's confidence."""
_LEAST = 1e-12
"""Of the sum of what rows count, below which nothing is divided by it."""


class SampleWeight(Regularizer):
    """R_phi as one weight per sample, from five numbers about the two predictions.

    They are: the entropy of the teacher's and of the student's prediction, each over log C; the teacher's confidence;
    the probability that the student gives to the teacher's class; and the root mean square of the difference of
    their log-probabilities, in which a class with a logit of -inf counts 0. It weighs any map, of logits or features,
    and does not depend on the number of classes. The logits are (B, C), the weights (B,); every weight is 1 at the
    start.

    Where each logit is a class that is there or not, the probabilities are sigmoids, the entropy is the mean over
    classes of that of each, over log 2, and the difference that of both log-probabilities. A map of features of samples
    with many rows (N, C), pixels or positions of a detector, is weighed by one weight a sample, and each pair of taps
    has its own: of the means of these numbers over the sample's rows, where classes are there or not each as heavy as
    the teacher is sure of one, so that positions without an object hardly count (Du et al., arXiv 2111.00674). A
    sample without rows has weight 1.

    What the weight of *each sample* does, and what any weights of that size would do, is told apart by what the student
    gets of it (``applied``); phi learns the same in all cases, and statistics are of what it learns.

    Args:
        hidden: width of the hidden layer, >= 1.
        guard, player, max_weight: see :class:`Regularizer`.
        applied: ``own`` weight of each sample; as controls for a study, the ``mean`` of the weights of a process's
            batch for all its samples, or weights ``exchanged`` among these.

    Raises:
        UsageError: when an argument is out of range or not known, or a player that looks ahead would look ahead from
            other weights than the student gets.

    Examples:
        >>> regularizer = SampleWeight()
        >>> regularizer(torch.randn(4, 10), torch.randn(4, 10)).shape  # logits, whatever the map is of
        torch.Size([4])
    """

    maps = frozenset({"classes", "features", "samples"})
    sees_logits = True
    sees_several_rows = True

    def __init__(
        self,
        hidden: int = 16,
        guard: Guard | str = "barrier",
        player: Player | str = "cooperative",
        max_weight: float = 100.0,
        applied: Applied = "own",
    ) -> None:
        super().__init__(guard, player, max_weight)
        if applied not in APPLIED:
            raise UsageError(f"applied={applied!r} is unknown: use {', '.join(APPLIED)}")
        if applied != "own" and self.player.needs_alignment:
            raise UsageError(
                f"applied={applied!r} does not go with player {type(self.player).__name__}, which looks ahead from the "
                "weights of samples: use applied own, or another player"
            )
        self._applied = APPLIED[applied]
        self.network = MLP(5, hidden)

    def applied(self, weights: Tensor, divergence: Tensor) -> Tensor:
        return self._applied(weights.detach(), divergence.detach())

    def response(self, teacher: Tensor, student: Tensor, labels: Tensor | None) -> Tensor:  # (B, C), (B, C) -> (B,)
        return self.network(self._numbers(teacher, student))

    def response_of_samples(self, teacher: Tensor, student: Tensor, samples: RowGroups) -> Tensor:
        numbers = self._numbers(teacher, student)
        heavy = numbers[:, _CONFIDENCE] if self.independent else torch.ones_like(numbers[:, _CONFIDENCE])
        sums = numbers.new_zeros(samples.number, numbers.shape[1])
        sums = sums.index_add(0, samples.of_rows, numbers * heavy.unsqueeze(1))
        total = heavy.new_zeros(samples.number).index_add(0, samples.of_rows, heavy)
        response = self.network(sums / total.clamp_min(_LEAST).unsqueeze(1))
        return torch.where(total > 0, response, torch.ones_like(response))

    def _numbers(self, teacher: Tensor, student: Tensor) -> Tensor:  # (N, C), (N, C) -> (N, 5)
        look = _independent if self.independent else _features
        step = rows_at_once(teacher)
        pieces = (slice(start, start + step) for start in range(0, max(1, len(teacher)), step))
        return torch.cat([look(teacher[here], student[here]) for here in pieces])


def _features(teacher: Tensor, student: Tensor) -> Tensor:
    """(n, 5) what is looked at of logits (n, C)."""
    log_t, log_s = F.log_softmax(teacher, dim=1), F.log_softmax(student, dim=1)
    t, s = log_t.exp(), log_s.exp()
    ruled_out = torch.minimum(log_t, log_s) == -torch.inf
    most = math.log(max(2, t.shape[1]))
    confidence, chosen = t.max(dim=1)
    features = (
        -times_log(t, log_t).sum(1) / most,
        -times_log(s, log_s).sum(1) / most,
        confidence,
        s.gather(1, chosen.unsqueeze(1)).squeeze(1),
        (log_t - log_s).masked_fill_(ruled_out, 0.0).square().mean(1).sqrt(),
    )
    return torch.stack(features, dim=-1)


def _independent(teacher: Tensor, student: Tensor) -> Tensor:
    """(n, 5) likewise of logits (n, C) that are a class each."""
    t, s = teacher.sigmoid(), student.sigmoid()
    log_t, log_s = (torch.stack((F.logsigmoid(of), F.logsigmoid(-of))) for of in (teacher, student))
    ruled_out = torch.minimum(log_t, log_s) == -torch.inf
    confidence, chosen = t.max(dim=1)
    features = (
        -_expected(t, log_t).mean(1) / math.log(2),
        -_expected(s, log_s).mean(1) / math.log(2),
        confidence,
        s.gather(1, chosen.unsqueeze(1)).squeeze(1),
        (log_t - log_s).masked_fill_(ruled_out, 0.0).square().mean((0, 2)).sqrt(),
    )
    return torch.stack(features, dim=-1)


def _expected(p: Tensor, logs: Tensor) -> Tensor:
    """(n, C) the expectation of the logarithms (2, n, C) of probabilities (n, C) and of their complements."""
    return times_log(p, logs[0]) + times_log(1 - p, logs[1])
