"""A target between teacher and student, with a weight that is fitted to held-out rows and whose form they choose."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lqkd.losses.trust import forms
from lqkd.losses.trust.interpolation import FURTHER, check_pull, further, log_probabilities
from lqkd.utils.counter_rng import STREAM_TRUST, random_bits

WEIGHTS = ("all", "class", "sample")
"""From simple to complex, what there may be one weight of."""
PULLS = (100.0, 10.0, 1.0)
"""Of weights of classes and samples towards the one of all, in rows, which cross-validation chooses from."""
_FOLDS = 5
_HALVINGS = 14
_STEPS = 15
_SMALL = 1e-4
"""Gradients, of sums over the rows, at which no further step is taken."""
_FARTHEST = 4.0
"""The logit of the one weight from which others move is no farther from 0, where they could not."""

_Derivatives = tuple[Tensor, Tensor, Tensor]


class FittedInterpolation(nn.Module):
    """``Z = S + w (T - S)`` of log-probabilities, as :class:`Interpolation`, with w that :meth:`fit` finds at once.

    Cross-entropy of Z is convex in one weight w in [0, 1] of ``all`` rows: it is found by halving, 0 and 1 included.
    Weights of a ``class``, or of a ``sample`` by entropies, margins and agreement of teacher and student, are moves of
    its logit with a squared price, found by damped Gauss-Newton steps. Which of them is taken, and the price, is chosen
    by cross-validation within these rows: the simplest within one standard error of the best, two of the one weight.
    All is computed in float64, and the same for the same rows. Rows of which a network says nothing finite are left
    out; of too few nothing is learned.

    Args:
        classes: how many.
        start: the weight before a fit, between 0 and 1, and what the one weight is pulled towards.
        strength: of that pull, ``strength / 2 * (w - start)^2`` beside the mean cross-entropy.

    Raises:
        UsageError: when the start is not between 0 and 1 or the strength is negative or not finite.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> labels = torch.randint(3, (300,))
        >>> right = 3.0 * torch.nn.functional.one_hot(labels, 3)
        >>> believed = FittedInterpolation(3)
        >>> believed.fit(teacher=torch.randn(300, 3), student=right, labels=labels)
        'all'
        >>> believed(torch.randn(1, 3), right[:1])[1].max().item() < 0.01
        True
    """

    weights: Tensor
    coefficients: Tensor
    form: Tensor

    def __init__(self, classes: int, start: float = 0.88, strength: float = 0.01) -> None:
        super().__init__()
        check_pull(start, strength)
        self.start, self.strength = start, strength
        self.register_buffer("weights", torch.full((classes,), start))
        self.register_buffer("coefficients", torch.zeros(FURTHER + 1))
        self.register_buffer("form", torch.tensor(0))

    @property
    def chosen(self) -> str:
        """Of what there is one weight, as :meth:`fit` has said last."""
        return WEIGHTS[int(self.form)]

    @torch.no_grad()
    def forward(self, teacher: Tensor, student: Tensor, teachers: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Log-probabilities Z and weights w in [0, 1], both (N, C) float32; arguments as of :class:`Interpolation`."""
        with torch.autocast(teacher.device.type, enabled=False):
            t, s = log_probabilities(teacher), log_probabilities(student)
            of_sample = (_with_one(further(t, s, teachers)) @ self.coefficients).sigmoid()[:, None]
            weights = torch.where(self.form == WEIGHTS.index("sample"), of_sample, self.weights.expand_as(t))
            return (s + weights * (t - s)).log_softmax(-1), weights

    @torch.no_grad()
    def fit(self, teacher: Tensor, student: Tensor, labels: Tensor, teachers: Tensor | None = None) -> str:
        """Find the weights that make labels of held-out rows most likely, and say of what there is one.

        Args:
            teacher: (N, C) logits, of a map that was not fitted to these rows.
            student: (N, C) logits.
            labels: (N,) int64, none negative.
            teachers: (K, N, C) logits of each teacher: whether several of them agree is looked at.
        """
        t, s = log_probabilities(teacher), log_probabilities(student)
        both_or_none = ((teacher == -torch.inf) == (student == -torch.inf)).all(1)  # of classes that are impossible
        fine = t.isfinite().all(1) & s.isfinite().all(1) & both_or_none
        if int(fine.sum()) < _FOLDS:
            return self.chosen
        t, s, labels = t[fine], s[fine], labels[fine]
        teachers = None if teachers is None else teachers[:, fine]
        looked = further(t, s, teachers).double()
        mean, spread = looked.mean(0), looked.std(0, correction=0).clamp_min(1e-3)
        rows = _Rows.of(t.double(), s.double(), labels, _with_one((looked - mean) / spread))
        found = _candidates(rows, self.start, self.strength)
        chosen = found[forms.simplest_of_the_best([rows.left_out(one.weights) for one in found])]
        self.form.fill_(WEIGHTS.index(chosen.form))
        if chosen.form == "sample":
            slopes = chosen.moves[-1, 1:] / spread
            level = chosen.level[-1] + chosen.moves[-1, 0] - slopes @ mean
            self.coefficients.copy_(torch.cat([level[None], slopes]))
        else:
            self.weights.copy_(chosen.weights[-1, 0].expand_as(self.weights))
        return self.chosen


class _Rows(NamedTuple):
    """Held-out rows, in blocks that are fitted beside each other: one without each of the folds, and one of all."""

    student: Tensor
    """(N, C) log-probabilities, float64."""
    apart: Tensor
    """(N, C) what those of the teacher are above them."""
    labels: Tensor
    """(N,) int64."""
    seen: Tensor
    """(N, F) what a weight of a sample depends on, the first of them 1."""
    folds: Tensor
    """(N,) int64."""
    kept: Tensor
    """(B, N) float64: 1 for the rows of a block, else 0."""

    @classmethod
    def of(cls, teacher: Tensor, student: Tensor, labels: Tensor, seen: Tensor) -> _Rows:
        order = random_bits(0, 0, torch.arange(len(labels)), STREAM_TRUST).to(labels.device)
        folds = forms.folds_of(labels, _FOLDS, order)
        blocks = torch.arange(_FOLDS + 1, device=labels.device)
        return cls(student, teacher - student, labels, seen, folds, (folds != blocks[:, None]).double())

    def at(self, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of Z for weights (B, N or 1, C or 1), losses (B, N), and their derivatives and probabilities (B, N, C)."""
        said = (self.student + weights * self.apart).log_softmax(-1)
        right = F.one_hot(self.labels, self.apart.shape[1])
        return -(said * right).sum(2), self.apart * (said.exp() - right), said.exp()

    def left_out(self, weights: Tensor) -> Tensor:
        """(N,) the loss of every row in the block without its fold."""
        return self.at(weights)[0].gather(0, self.folds[None])[0]


class _Candidate(NamedTuple):
    form: str
    level: Tensor
    """(B,) the logit that moves are from."""
    moves: Tensor
    """(B, D)."""
    weights: Tensor
    """(B, N or 1, C or 1)."""


def _candidates(rows: _Rows, start: float, strength: float) -> list[_Candidate]:
    """From simple to complex. Where a class has fewer than two rows there is no weight of a class."""
    one = _one_weight(rows, start, strength)
    level = one.logit().clamp(-_FARTHEST, _FARTHEST)
    found = [_Candidate("all", level, torch.zeros_like(level)[:, None], one.view(-1, 1, 1))]
    classes = rows.apart.shape[1]
    if int(torch.bincount(rows.labels, minlength=classes).min()) > 1:
        for moves in _minimised(rows, level.new_zeros(len(level), classes), lambda m: _of_class(rows, level, m)):
            found.append(_Candidate("class", level, moves, (level[:, None] + moves).sigmoid()[:, None]))
    size = rows.seen.shape[1]
    for moves in _minimised(rows, level.new_zeros(len(level), size), lambda m: _of_sample(rows, level, m)):
        weights = (level[:, None] + moves @ rows.seen.mT).sigmoid()[:, :, None]
        found.append(_Candidate("sample", level, moves, weights))
    return found


def _one_weight(rows: _Rows, start: float, strength: float) -> Tensor:
    """(B,) in [0, 1]: where the derivative of what is convex changes its sign."""
    low = rows.kept.new_zeros(len(rows.kept))
    high = low + 1
    for _ in range(_HALVINGS):
        weight = (low + high) / 2
        slopes = rows.at(weight.view(-1, 1, 1))[1].sum(2)
        slope = (rows.kept * slopes).sum(1) / rows.kept.sum(1) + strength * (weight - start)
        low, high = torch.where(slope < 0, weight, low), torch.where(slope < 0, high, weight)
    return torch.where(low == 0, low, torch.where(high == 1, high, (low + high) / 2))


def _of_class(rows: _Rows, level: Tensor, moves: Tensor) -> _Derivatives:
    """Sums of losses (B,) and their derivatives (B, D), (B, D, D), the second ones as of Gauss and Newton."""
    weights = (level[:, None] + moves).sigmoid()
    losses, slopes, said = rows.at(weights[:, None])
    by_logit = weights * (1 - weights)
    moved = said * rows.apart
    first = (rows.kept[:, :, None] * slopes).sum(1)
    own = (rows.kept[:, :, None] * moved * rows.apart).sum(1)
    second = torch.diag_embed(own) - (rows.kept[:, :, None] * moved).mT @ moved
    return (rows.kept * losses).sum(1), by_logit * first, by_logit[:, :, None] * second * by_logit[:, None]


def _of_sample(rows: _Rows, level: Tensor, moves: Tensor) -> _Derivatives:
    """The same of moves by what is seen of a sample."""
    weights = (level[:, None] + moves @ rows.seen.mT).sigmoid()
    losses, slopes, said = rows.at(weights[:, :, None])
    by_logit = weights * (1 - weights)
    variance = (said * rows.apart.square()).sum(2) - (said * rows.apart).sum(2).square()
    first = (rows.kept * by_logit * slopes.sum(2)) @ rows.seen
    second = rows.seen.mT @ ((rows.kept * by_logit.square() * variance)[:, :, None] * rows.seen)
    return (rows.kept * losses).sum(1), first, second


def _minimised(rows: _Rows, moves: Tensor, derivatives: Callable[[Tensor], _Derivatives]) -> list[Tensor]:
    """By pull, what minimises ``sum CE + pull / 2 * |moves|^2`` in every block, (B, D); each from the one before.

    Damped steps (Levenberg 1944, Marquardt 1963): a step that does not lower the objective is taken back.
    """
    found = []
    eye = torch.eye(moves.shape[1], dtype=moves.dtype, device=moves.device)
    for pull in PULLS:

        def priced(at: Tensor, pull: float = pull) -> _Derivatives:
            loss, first, second = derivatives(at)
            return loss + pull / 2 * at.square().sum(1), first + pull * at, second + pull * eye

        damping = moves.new_zeros(len(moves))
        loss, first, second = priced(moves)
        for _ in range(_STEPS):
            if bool((first.abs() < _SMALL).all()):
                break
            trial = moves - torch.linalg.solve(second + damping[:, None, None] * eye, first)
            of_trial = priced(trial)
            better = of_trial[0] < loss
            moves = torch.where(better[:, None], trial, moves)
            loss = torch.where(better, of_trial[0], loss)
            first = torch.where(better[:, None], of_trial[1], first)
            second = torch.where(better[:, None, None], of_trial[2], second)
            damping = torch.where(better, damping / 10, 10 * damping.clamp_min(0.1))
        found.append(moves)
    return found


def _with_one(seen: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(seen[:, :1]), seen], 1)
