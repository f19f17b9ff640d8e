"""A small network that decides how much a sample's distillation counts."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.losses.probabilities import times_log
from lqkd.regularizers.applied import APPLIED, Applied
from lqkd.regularizers.base import Regularizer
from lqkd.regularizers.guards import Guard
from lqkd.regularizers.mlp import MLP
from lqkd.regularizers.players import Player
from lqkd.utils.pieces import rows_at_once


class SampleWeight(Regularizer):
    """R_phi as one weight per sample, from five numbers about the two predictions.

    They are: the entropy of the teacher's and of the student's prediction, each over log C; the teacher's confidence;
    the probability that the student gives to the teacher's class; and the root mean square of the difference of
    their log-probabilities, in which a class with a logit of -inf counts 0. It weighs any map, of logits or features,
    and does not depend on the number of classes. The logits are (B, C), the weights (B,); every weight is 1 at the
    start.

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
        step = rows_at_once(teacher)
        pieces = (slice(start, start + step) for start in range(0, max(1, len(teacher)), step))
        return self.network(torch.cat([_features(teacher[here], student[here]) for here in pieces]))


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
