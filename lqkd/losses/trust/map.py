"""A map from what teachers say to what can be believed of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.losses.trust import forms
from lqkd.losses.trust.forms import BY_CLASS, FORMS, FULL_CLASSES, GIVEN, MOST_CLASSES, Parts, Problem
from lqkd.losses.trust.report import TrustReport, report
from lqkd.utils.counter_rng import STREAM_TRUST, random_bits

Spread = Literal["keep", "fitted"]

STRENGTHS = (1000.0, 100.0, 10.0, 1.0, 0.1)
"""Of the pull towards the start that cross-validation chooses from, in rows."""
_BY_SURENESS = ("diagonal", "gate")
"""What is not fitted to rows that teachers know by heart."""
_WRONG_LABELS = "wrong labels"
"""Only where this form is better than a temperature are other forms with wrong labels tried, which take long."""
FEWEST_ROWS = 20
"""Held-out rows with a label that a fit needs."""


class TrustMap(nn.Module):
    """Log-probabilities ``log softmax(sum_k A_k L_k + b)`` of the logits L_k of K teachers, that labels agree with.

    A and b minimise cross-entropy on held-out rows (stacking; Wolpert 1992; for one teacher and a scalar A temperature
    scaling, Guo et al., arXiv 1706.04599), with a squared penalty on the distance from the mean of the teachers. Which
    of the forms of :data:`~lqkd.losses.trust.forms.FORMS` is fitted, and how strong the penalty is, is chosen by
    cross-validation within these rows: the simplest within one standard error of the best. Where none is better than
    the mean of the teachers' predictions, it stays at that, as before a fit. That labels are wrong, and not the
    teachers, is considered where the network that the student starts from is one of these.

    Args:
        teachers: how many.
        classes: how many.
        spread: ``fitted`` gives predictions as sure as labels justify; ``keep`` stretches their logits by one number,
            since labels say what is believed, and the loss with its temperature how it is compared. The number is by
            how much the network that the student starts from is surer than labels justify, so that what is believed is
            said in logits of the student's size. Where it does not start from one, the logits get the standard
            deviation of the teachers' as far as each is believed. In both cases it is at least 1, and no more than the
            temperature that the loss divides by.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> labels = torch.randint(3, (600,))
        >>> right = 4.0 * torch.nn.functional.one_hot(labels, 3)
        >>> swapped = right[:, [1, 0, 2]] + torch.randn(600, 3)
        >>> trusted = TrustMap(1, 3)
        >>> report = trusted.fit(swapped[None], labels)
        >>> report.form, report.read_as
        ('order', [{0: 1, 1: 0}])
        >>> trusted(torch.tensor([[[4.0, 0.0, 0.0]]])).argmax().item()
        1
    """

    given: Tensor
    scale: Tensor
    diagonal: Tensor
    linear: Tensor
    basis: Tensor
    bias: Tensor
    gated: Tensor
    gate: Tensor
    stretch: Tensor

    def __init__(self, teachers: int, classes: int, spread: Spread = "keep") -> None:
        super().__init__()
        self.spread = spread
        rank = forms.rank(classes)
        self._chosen = (GIVEN, 0.0)
        self._wrong: Tensor | None = None
        self._read: tuple[int, int] | None = None
        self._gate_is_open = False
        self.register_buffer("given", torch.tensor(True))
        self.register_buffer("scale", torch.full((teachers,), 1 / max(1, teachers)))
        self.register_buffer("diagonal", torch.zeros(teachers, classes))
        self.register_buffer("linear", torch.zeros(teachers, classes, rank))
        self.register_buffer("basis", torch.zeros(classes, rank))
        self.register_buffer("bias", torch.zeros(classes))
        self.register_buffer("gated", torch.tensor(False))
        self.register_buffer("gate", torch.zeros(teachers, 2 * teachers + 2))
        self.register_buffer("stretch", torch.tensor(1.0))

    def forward(self, teachers: Tensor) -> Tensor:
        """Log-probabilities (N, C) in float32 of the teachers' logits (K, N, C); no gradient reaches the teachers."""
        with torch.autocast(teachers.device.type, enabled=False):
            teachers = teachers.detach().float()
            if self._is_gated():
                mapped = self.stretch * self._mixture(teachers)
            else:
                mapped = self.stretch * (self.contributions(teachers).sum(0) + self.bias)
            return torch.where(self.given, forms.mean_prediction(teachers), mapped.log_softmax(-1))

    def contributions(self, teachers: Tensor) -> Tensor:
        """What each teacher adds to the logits of the map, (K, N, C), in the dtype of its logits.

        Of a ``gate``, which is a mixture of predictions, its logits times its share.
        """
        seen = forms.centred_logits(teachers)
        if self._is_gated():
            seen = self._scores(teachers).softmax(-1).mT.unsqueeze(2) * seen
        factors = (self.scale.view(-1, 1, 1) + self.diagonal.unsqueeze(1)).to(seen)
        return factors * seen + (seen @ self.basis.to(seen)) @ self.linear.to(seen).mT

    def _is_gated(self) -> bool:
        """What ``gated`` says, without waiting for the device unless it was written or moved."""
        state = (id(self.gated), self.gated._version)
        if state != self._read:
            self._read, self._gate_is_open = state, bool(self.gated)
        return self._gate_is_open

    def _mixture(self, teachers: Tensor) -> Tensor:
        scale = self.scale.view(-1, 1, 1).to(teachers)
        return forms.mixture(scale * forms.centred_logits(teachers), self._scores(teachers))

    def _scores(self, teachers: Tensor) -> Tensor:
        """(N, K): the softmax is the share of each teacher."""
        return forms.with_one(forms.telling(teachers)) @ self.gate.to(teachers).mT

    def matrices(self) -> Tensor | None:
        """(K, C, C) what a teacher's logit of class j adds to the map's of class i; None for a mean of predictions, and
        of more than 16,384 classes."""
        if bool(self.given) or self._is_gated() or len(self.bias) > MOST_CLASSES:
            return None
        factors = torch.diag_embed(self.scale.view(-1, 1) + self.diagonal)
        return self.stretch * (factors + self.linear @ self.basis.mT)

    @torch.no_grad()
    def fit(
        self,
        teachers: Tensor,
        labels: Tensor,
        folds: int = 5,
        seed: int = 0,
        memorised: bool = False,
        groups: Tensor | None = None,
        own: int | None = None,
        temperature: float | None = None,
    ) -> TrustReport:
        """Fit to held-out rows, in float64 and the same for the same arguments.

        Args:
            teachers: (K, N, C) logits of any floating dtype.
            labels: (N,) int64; rows with a negative one are left out. Where a class has no row, or fewer than two,
                nothing is fitted by class, since nothing is known of it: only a factor a teacher. So it is of more than
                16,384 classes.
            folds: of the cross-validation, >= 2; stratified by class.
            seed: of the folds.
            memorised: that teachers know these rows by heart, or hardly err on them. How sure they are of these says
                nothing of others: their spread is kept, but for what is above that of ``own``, and factors a class are
                not fitted.
            groups: (N,) int64, the sample that each row is of where one has several, such as the pixels of an image:
                they are left out together, and one counts as a sample. None where every row is one.
            own: which of the teachers the student starts from, if one of them.
            temperature: of a loss that compares predictions; None of one that compares logits as they are.

        Raises:
            UsageError: when fewer than 20 rows, or samples with groups, have a label.
        """
        known = labels >= 0
        teachers, labels = teachers[:, known].double(), labels[known]
        groups = None if groups is None else groups[known]
        count, what = (len(labels), "rows") if groups is None else (len(groups.unique()), "samples")
        if count < FEWEST_ROWS:
            raise UsageError(
                f"{count} held-out {what} with a label are too few to learn from how far teachers can be believed: "
                f"at least {FEWEST_ROWS} are needed"
            )
        basis = forms.directions(teachers)
        problem = Problem.of(teachers, labels, basis)
        fold_of, often = _folds(labels, folds, seed, groups), _frequency(labels, groups, teachers.shape[2])
        forms_of = self._forms(often, memorised, own is not None)
        judged = _cross_validated(problem, teachers, fold_of, forms_of)
        form, strength = _chosen_of(judged, groups)
        self._chosen = (form, strength)
        self._take(problem, form, strength, basis)
        self.stretch.fill_(1.0)
        trusted = self._exactly(teachers)
        found = report(teachers, labels, trusted, self.contributions(teachers), form)
        (before, right_before), (loss, right) = judged[GIVEN, 0.0], judged[form, strength]
        found.worth, found.points = float((before - loss).mean()), 100 * float((right - right_before).mean())
        found.cross_entropy, found.memorised = float(loss.mean()), memorised
        found.wrong_labels = None if self._wrong is None else self._wrong.tolist()
        if form != GIVEN:
            spreads = [_spread(teacher) / max(_spread(trusted), 1e-6) for teacher in teachers]
            wanted = sum(part * spread for part, spread in zip(found.believed, spreads, strict=True))
            if memorised:
                self.stretch.fill_(wanted if own is None else min(wanted, spreads[own]))
            elif self.spread == "keep":
                if own is not None:
                    wanted = _temperature_of(
                        teachers[own], labels, "temperature" if self._wrong is None else "wrong labels"
                    )
                most = temperature or (1.0 if own is None else spreads[own])
                self.stretch.fill_(max(1.0, min(wanted, most)))
        return found

    @torch.no_grad()
    def left_out(
        self, teachers: Tensor, labels: Tensor, folds: int = 5, seed: int = 0, groups: Tensor | None = None
    ) -> Tensor:
        """What the map would say of each row had it been fitted to the others, log-probabilities (N, C) float32.

        What is learned further of these rows must not see a map that has been fitted to their labels: it would believe
        it too much.

        Args:
            teachers, labels, folds, seed, groups: as :meth:`fit` was called with, no label negative.
        """
        teachers, (form, strength) = teachers.double(), self._chosen
        if form == GIVEN:
            return forms.mean_prediction(teachers).float()
        problem = Problem.of(teachers, labels, forms.directions(teachers))
        fold_of = _folds(labels, folds, seed, groups)
        said = torch.empty_like(teachers[0])
        for fold in fold_of.unique():
            inside, outside = problem.rows(fold_of != fold), problem.rows(fold_of == fold)
            said[fold_of == fold] = outside.logits(inside.minimise(inside.start(form), strength))
        return (self.stretch.double() * said).log_softmax(-1).float()

    @torch.no_grad()
    def doubted(self, teachers: Tensor, labels: Tensor) -> Tensor:
        """(N,) whether the label of a row is more likely one of the wrong ones that the last fit has found than right.

        Args:
            teachers: (K, N, C) logits.
            labels: (N,) int64, none negative.
        """
        if self._wrong is None:
            return torch.zeros_like(labels, dtype=torch.bool)
        said, rates = self._exactly(teachers.double()), self._wrong.to(teachers.device)
        labelled = forms.spoiled(said, rates).gather(1, labels[:, None]).squeeze(1)
        right = said.gather(1, labels[:, None]).squeeze(1) + (1 - rates).log()[labels]
        return right - labelled < math.log(0.5)

    def _forms(self, counts: Tensor, memorised: bool, own: bool) -> dict[str, tuple[str, ...]]:
        """Those that can be fitted, from simple to complex, where classes have so many rows (C,)."""
        found = {}
        for form, parts in FORMS.items():
            by_class = any(part in BY_CLASS for part in parts)
            unknown = int(counts.min()) < 2 or len(counts) > MOST_CLASSES
            if (by_class and unknown) or (memorised and form in _BY_SURENESS):
                continue
            if "order" in parts and len(counts) > FULL_CLASSES:
                continue
            if ("gate" in parts and len(self.scale) == 1) or ("wrong" in parts and (memorised or not own)):
                continue
            found[form] = parts
        return found

    def _take(self, problem: Problem, form: str, strength: float, basis: Tensor) -> None:
        """Fit to all rows and keep what is found, in units of the teachers' logits."""
        self.given.fill_(form == GIVEN)
        parts = {} if form == GIVEN else problem.minimise(problem.start(form), strength)
        self._wrong = forms.wrong(parts["wrong"]) if "wrong" in parts else None
        self.scale.fill_(1.0 if "gate" in parts else 1 / len(self.scale))
        self.basis.copy_(basis)
        for name in ("scale", "diagonal", "linear", "bias"):
            kept = cast(Tensor, getattr(self, name))
            if name != "scale":
                kept.zero_()
            if name in parts:
                kept.add_(parts[name] / (1.0 if name == "bias" else problem.unit))
        if "order" in parts:
            self.linear.copy_(self.scale.view(-1, 1, 1) * F.one_hot(parts["order"], len(self.bias)))
            self.scale.zero_()
        self.gated.fill_("gate" in parts)
        self.gate.zero_()
        if "gate" in parts:
            slopes = parts["gate"][:, 1:] / problem.spread
            self.gate.copy_(torch.cat([parts["gate"][:, :1] - (slopes @ problem.mean)[:, None], slopes], 1))

    def _exactly(self, teachers: Tensor) -> Tensor:
        """As :meth:`forward`, in float64 and as fitted."""
        if bool(self.given):
            return forms.mean_prediction(teachers)
        if self._is_gated():
            return self._mixture(teachers)
        return (self.contributions(teachers).sum(0) + self.bias).log_softmax(-1)


def _cross_validated(
    problem: Problem, teachers: Tensor, folds: Tensor, tried: Iterable[str]
) -> dict[tuple[str, float], Tensor]:
    """By form and strength, from simple to complex, how every row fares when it was left out of the fit.

    That is (2, N): its loss, and 1 where the answer is right.
    """
    candidates = {(GIVEN, 0.0): _judged(forms.mean_prediction(teachers), problem.labels)}
    for form in tried:
        if "order" in FORMS[form] and not problem.renames():
            continue  # it is the form without
        if (
            "wrong" in FORMS[form]
            and form != _WRONG_LABELS
            and not forms.is_better(*(_best_of(candidates, one)[0] for one in (_WRONG_LABELS, "temperature")))
        ):
            continue
        of_form = {strength: torch.empty_like(candidates[GIVEN, 0.0]) for strength in STRENGTHS}
        for fold in folds.unique():
            inside, outside = problem.rows(folds != fold), problem.rows(folds == fold)
            fitted: Parts = inside.start(form)
            for strength in STRENGTHS:  # from the start on, each from the one before
                fitted = inside.minimise(fitted, strength, accuracy=1e-6)
                judged = _judged(outside.of_labels(fitted), outside.labels, outside.logits(fitted))
                of_form[strength][:, folds == fold] = judged
        candidates |= {(form, strength): rows for strength, rows in of_form.items()}
    return candidates


def _best_of(judged: Mapping[tuple[str, float], Tensor], form: str) -> Tensor:
    """Of the strengths of a form the one with the least loss."""
    return min((rows for (name, _), rows in judged.items() if name == form), key=lambda rows: float(rows[0].mean()))


def _chosen_of(judged: Mapping[tuple[str, float], Tensor], groups: Tensor | None) -> tuple[str, float]:
    """The simplest of the best; a gate is none of them, but is taken where it is better than that beyond its error.

    Where labels are wrong none is: teachers that seem to know nothing of some samples are then as good a reading.
    """
    losses = {candidate: of_rows[0] for candidate, of_rows in judged.items()}
    plain = {candidate: loss for candidate, loss in losses.items() if candidate[0] != "gate"}
    found = [*plain][forms.simplest_of_the_best([*plain.values()], groups)]
    gates = {candidate: loss for candidate, loss in losses.items() if candidate[0] == "gate"}
    if gates and "wrong" not in FORMS.get(found[0], ()):
        best = min(gates, key=lambda candidate: float(gates[candidate].mean()))
        if forms.is_better(gates[best], losses[found], groups):
            return best
    return found


def _temperature_of(logits: Tensor, labels: Tensor, form: str) -> float:
    """By what logits (N, C) have to be divided to be as sure as labels justify; infinite where they say nothing.

    The form is ``temperature``, or ``wrong labels``, of which as many may be wrong as makes the rest likely.
    """
    problem = Problem.of(logits[None], labels, forms.directions(logits[None]))
    factor = 1 + float(problem.minimise(problem.start(form), min(STRENGTHS))["scale"]) / problem.unit
    return 1 / factor if factor > 0 else math.inf


def _judged(of_labels: Tensor, labels: Tensor, answers: Tensor | None = None) -> Tensor:
    """(2, N) loss of every row, and 1 where the answer is right, for logits (N, C), of others where they are given."""
    loss = F.cross_entropy(of_labels, labels, reduction="none")
    return torch.stack([loss, ((of_labels if answers is None else answers).argmax(1) == labels).to(loss)])


def _folds(labels: Tensor, folds: int, seed: int, groups: Tensor | None) -> Tensor:
    """(N,) the fold of every row."""
    if groups is not None:
        order = random_bits(seed, 0, torch.arange(len(groups.unique())), STREAM_TRUST).to(labels.device)
        return forms.folds_of_groups(groups, folds, order)
    order = random_bits(seed, 0, torch.arange(len(labels)), STREAM_TRUST).to(labels.device)
    return forms.folds_of(labels, folds, order)


def _frequency(labels: Tensor, groups: Tensor | None, classes: int) -> Tensor:
    """(C,) in how many rows, or groups of them, each class occurs."""
    if groups is not None:
        labels = torch.stack([groups, labels]).unique(dim=1)[1]
    return torch.bincount(labels, minlength=classes)


def _spread(logits: Tensor) -> float:
    """Standard deviation of logits over the classes, as the root of the mean variance of the rows; -inf is -1000."""
    return float(logits.clamp_min(-1000.0).var(-1, correction=0).mean().sqrt())
