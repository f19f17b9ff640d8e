"""One term of a distillation: from the outputs of its teachers and of the student to divergence maps and weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.losses import DistillationLoss
from lqkd.losses.ensembles import COMBINATIONS, Combination
from lqkd.losses.taps import Seen
from lqkd.modules.terms import Term
from lqkd.regularizers import ExplainedVariance, HeldOut, HeldOutInterpolation, LookAhead, Regularizer, alignment
from lqkd.regularizers.base import RowGroups
from lqkd.regularizers.one_step import one_step_alignment
from lqkd.tasks import Rows, Task

Shapes = list[tuple[int, ...]]


@dataclass
class DivergenceMap:
    """One divergence map with its weights."""

    divergence: Tensor
    """The map before modulation, differentiable in the student."""
    weights: Tensor | None
    """What the regularizer says, viewed so that it broadcasts to the map; None without a regularizer."""
    alignment: Tensor | None = None
    """How each element of the map agrees with the task; None where no player asks."""


@dataclass
class Divergences:
    """What one term gives for a batch."""

    maps: list[DivergenceMap]
    """One, or one a pair of taps, or one a teacher that is compared by itself."""
    teachers: list[Tensor]
    """Logits (N, C) of each teacher that is compared by itself: of one, or of several combined, a single entry."""
    loss: Tensor | None
    """What the combination of the teachers learns from, 0-dim; None where it learns nothing."""


class DistillationTerm(nn.Module):
    """The distillation loss of one pair of logits, or of every pair of taps, each with a regularizer of its own.

    Connectors and tables depend on shapes: :meth:`connect` makes them, before there is an optimizer.

    Args:
        term: its settings, with the names of its teachers; loss and regularizer are copied for every pair.

    Raises:
        UsageError: when loss, regularizer, teachers and taps do not go together.
    """

    def __init__(self, term: Term) -> None:
        super().__init__()
        loss, regularizer, taps = term.loss, term.regularizer, term.taps or ()
        name = type(loss).__name__
        several = len(term.teachers) > 1
        if several and loss.compares != "logits":
            raise UsageError(
                f"distillation_loss {name} compares features: several teachers are compared by logits only"
            )
        if loss.compares == "logits" and taps:
            raise UsageError(f"taps cannot be used: distillation_loss {name} compares logits")
        if loss.compares != "logits" and not taps:
            raise UsageError(f"distillation_loss {name} compares features: give at least one pair of taps")
        if regularizer is not None:
            _check_regularizer(regularizer, term)
        combines = several or term.trusted
        combination = COMBINATIONS[term.combination or "mean"]
        self.combination: Combination | None = combination(len(term.teachers)) if combines else None
        compared = len(term.teachers) if self.combination is not None and self.combination.separate else 1
        pairs = compared * (len(taps) if loss.compares == "features" else 1)
        self.losses = nn.ModuleList(_copies(loss, pairs))
        self.regularizers = nn.ModuleList(() if regularizer is None else _copies(regularizer, pairs))
        self.teachers = tuple(term.teachers)
        self.keeps_own = term.own is True  # by the user's word, whatever is found of it
        self.taps = tuple(taps)
        self.weight = term.weight
        self.compares = loss.compares
        self.shapes: tuple[Shapes, Shapes] | None = None

    @property
    def regularizer(self) -> Regularizer | None:
        """The regularizer, the first of them where every pair of taps or teacher has its own."""
        return cast(Regularizer, self.regularizers[0]) if self.regularizers else None

    @property
    def temperature(self) -> float | None:
        """What its loss softens predictions by; None where it compares no predictions."""
        loss = cast(DistillationLoss, self.losses[0])
        return loss.temperature if loss.compares_predictions else None

    @property
    def interpolation(self) -> HeldOutInterpolation | None:
        """The regularizer, where held-out rows teach it what lies between teachers and student."""
        return self.regularizer if isinstance(self.regularizer, HeldOutInterpolation) else None

    def bind(self, student: nn.Module, teacher: nn.Module) -> None:
        """Let the losses on features look at the student and at the teacher, before :meth:`connect`.

        Raises:
            UsageError: when a loss does not find there what it needs.
        """
        for module, tap in zip(self.losses, self.taps, strict=False):
            loss = cast(DistillationLoss, module)
            loss.bind(student, tap.student)
            loss.bind_teacher(teacher, tap.teacher)

    def connect(self, teacher: Shapes, student: Shapes) -> None:
        """Make what depends on shapes, once.

        Args:
            teacher, student: shapes of the logits, or of the tensors at every tap, batch axis included.

        Raises:
            UsageError: when these shapes cannot be compared.
        """
        if self.shapes is not None:
            return
        self.shapes = (teacher, student)
        if self.combination is not None:
            self.combination.connect(teacher[0][1])
        pairs = list(zip(teacher, student, strict=True))
        groups = [pairs] if self.compares == "pyramids" else [[pair] for pair in pairs]
        for index, (module, group) in enumerate(zip(self.losses, groups, strict=True)):
            loss = cast(DistillationLoss, module)
            loss.connect([torch.Size(t) for t, _ in group], [torch.Size(s) for _, s in group])
            if self.regularizers:
                regularizer = cast(Regularizer, self.regularizers[index])
                channels = 0
                (t, s), *_ = group
                if self.interpolation is not None:
                    channels = t[1]
                elif loss.kind != "samples" and 0 not in s:  # otherwise the number of classes is not known
                    with torch.no_grad():
                        matched = loss.pair(torch.zeros(t), torch.zeros(s))[1]
                    channels = matched.shape[2 if matched.ndim == 3 else 1]
                regularizer.connect(loss.kind, channels)

    def leave(self, teacher: str) -> None:
        """Do without one of the teachers that are combined; what is learned of the others begins anew."""
        assert self.combination is not None
        before = self.combination
        self.teachers = tuple(name for name in self.teachers if name != teacher)
        self.combination = type(before)(len(self.teachers))
        if self.shapes is not None:
            self.combination.connect(self.shapes[0][0][1])
            self.combination.to(next(before.buffers()).device)

    def compares_padding(self) -> bool:
        """Whether its losses compare features of tokens that do not count, too."""
        loss = cast(DistillationLoss, self.losses[0])
        return loss.compares != "logits" and not loss.place_by_place and not loss.sees_places

    def sees_rows(self, task: Task) -> bool:
        """Whether the elements of its maps belong to the rows of the task."""
        return task.one_row_a_sample or self.compares == "logits"

    @property
    def asks_for_samples(self) -> bool:
        """Whether a regularizer weighs features of samples by their logits."""
        return self.regularizer is not None and self.regularizer.sees_logits and self.compares != "logits"

    def seen(self, teacher: Seen, student: Seen, rows: tuple[Rows, Rows]) -> tuple[list[Tensor], list[Tensor]]:
        """What is compared of a teacher and of the student: one tensor a tap, or the rows' logits."""
        if self.compares == "logits":
            return [rows[0].logits], [rows[1].logits]
        of_teacher = [teacher.features[tap.teacher] for tap in self.taps]
        return of_teacher, [student.features[tap.student] for tap in self.taps]

    def compared(self, teacher: Seen, student: Seen) -> list[tuple[Tensor, Tensor]]:
        """What the losses of features make of every pair of taps, in one shape; see :meth:`DistillationLoss.pair`."""
        pairs = self._pairs([], student.output, (teacher.features, student.features))
        return [cast(DistillationLoss, loss).pair(*pair) for loss, pair in zip(self.losses, pairs, strict=True)]

    def forward(
        self,
        teachers: Sequence[Tensor],
        rows: Rows,
        features: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
        sees_labels: bool = True,
        places: Tensor | None = None,
        samples: RowGroups | None = None,
    ) -> Divergences:
        """The divergence maps of one batch.

        Args:
            teachers: logits (N, C) of each of the term's teachers.
            rows: the student's logits (N, C), and labels.
            features: what the taps saw, of the term's teacher and of the student, by name of the module.
            sees_labels: whether elements of the maps belong to the rows, so that losses may look at labels.
            places: (B, T) bool, at which tokens of sequences features are compared; None for all.
            samples: of which sample each row is, where a regularizer of features asks; see :meth:`asks_for_samples`.
        """
        divergences, each = Divergences([], [*teachers], None), None
        if self.combination is not None:
            assert rows.labels is not None, "check_term has seen to it"
            each = torch.stack(divergences.teachers)
            divergences.teachers, divergences.loss = self.combination(each, rows.labels)
        if not sees_labels:
            rows = rows._replace(labels=None)
        pairs = self._pairs(divergences.teachers, rows.logits, features)
        if places is not None and cast(DistillationLoss, self.losses[0]).place_by_place:
            pairs = [(_at(places, teacher), _at(places, student)) for teacher, student in pairs]
        for index, (module, (teacher, student)) in enumerate(zip(self.losses, pairs, strict=True)):
            compare, weights = cast(DistillationLoss, module), None
            if self.interpolation is not None:  # which moves the target, where others weigh the divergence
                target, trust = self.interpolation.between(teacher, student, each)
                divergence = compare(target, student, rows.labels)
                divergences.maps.append(DivergenceMap(divergence, _of_map(trust, divergence)))
                continue
            by_place = {"places": places} if compare.sees_places else {}
            divergence = compare(teacher, student, rows.labels, **by_place)
            if self.regularizers:
                regularizer = cast(Regularizer, self.regularizers[index])
                if regularizer.sees_losses:
                    pair = (compare.of_samples(divergence.detach()),) * 2
                elif regularizer.sees_logits:
                    pair = divergences.teachers[min(index, len(divergences.teachers) - 1)], rows.logits
                else:
                    pair = compare.pair(teacher, student)
                weights = regularizer(*pair, rows.labels) if samples is None else regularizer.of_samples(*pair, samples)
                if weights.ndim == 1:
                    weights = weights.view(-1, *[1] * (divergence.ndim - 1))
            divergences.maps.append(DivergenceMap(divergence, weights))
        return divergences

    def look_ahead(
        self,
        maps: list[DivergenceMap],
        teachers: list[Tensor],
        student: Tensor,
        labels: Tensor | None,
        task_gradient: Tensor,
    ) -> None:
        """Set every map's alignment from the gradient of each sample's task loss at the logits, (B, C)."""
        for module, each, teacher in zip(self.losses, maps, teachers, strict=True):

            def divergence(logits: Tensor, loss: nn.Module = module, teacher: Tensor = teacher) -> Tensor:
                return cast(Tensor, loss(teacher, logits, labels))

            each.alignment = alignment(divergence, student, task_gradient)

    def look_ahead_exactly(
        self,
        maps: list[DivergenceMap],
        network: nn.Module,
        teachers: list[Tensor],
        images: Tensor,
        labels: Tensor | None,
        task: Callable[[Tensor, slice], Tensor],
        others: tuple[Tensor, Callable[[Tensor], Tensor]] | None = None,
    ) -> None:
        """Set every map's alignment from the task loss after a step of distillation in the parameters.

        With a held out half, each half of the batch is looked at from the other. ``task`` is the task loss, 0-dim, of
        the logits (B', C) of a part of the batch; ``others`` are held-out images and the task loss of their logits,
        in the place of the batch's.
        """
        middle = len(images) // 2
        for module, regularizer, each, teacher in zip(self.losses, self.regularizers, maps, teachers, strict=True):
            player = cast(LookAhead, cast(Regularizer, regularizer).player)
            weights = cast(Tensor, each.weights).detach().expand_as(each.divergence)
            everything = slice(None)
            halves = [(slice(middle), slice(middle, None)), (slice(middle, None), slice(middle))]
            aligned = torch.zeros_like(weights)
            for here, there in halves if player.held_out and middle > 1 else [(everything, everything)]:
                loss = cast(DistillationLoss, module)

                def distill(
                    logits: Tensor, w: Tensor, here: slice = here, loss: Any = loss, t: Tensor = teacher
                ) -> Tensor:
                    known = None if labels is None else labels[here]
                    return cast(Tensor, loss.reduce(w * loss(t[here], logits, known)))

                def task_there(logits: Tensor, there: slice = there) -> Tensor:
                    return task(logits, there)

                aligned[here] = one_step_alignment(
                    network,
                    distill,
                    weights[here],
                    images[here],
                    others or (images[there], task_there),
                    player.step_size,
                )
            each.alignment = aligned

    def _pairs(
        self, teachers: list[Tensor], student: Tensor, features: tuple[Mapping[str, Tensor], Mapping[str, Tensor]]
    ) -> list[tuple[Tensor, Tensor]]:
        if self.compares == "logits":
            return [(teacher, student) for teacher in teachers]
        pairs = [(features[0][tap.teacher], features[1][tap.student]) for tap in self.taps]
        if self.compares == "pyramids":
            of_teacher, of_student = zip(*pairs, strict=True)
            return [(cast(Tensor, of_teacher), cast(Tensor, of_student))]
        return pairs

    def reduce(self, maps: list[DivergenceMap], weighted: bool = True) -> Tensor:
        """The distillation loss, 0-dim: the mean over the maps; the student sees the weights as constants."""
        losses = []
        for index, (compare, each) in enumerate(zip(self.losses, maps, strict=True)):
            seen = each.divergence
            if weighted and each.weights is not None and self.interpolation is None:
                seen = cast(Regularizer, self.regularizers[index]).applied(each.weights, seen) * seen
            losses.append(cast(DistillationLoss, compare).reduce(seen))
        loss = torch.stack(losses).mean()
        return loss if self.weight == 1 else self.weight * loss

    def objective(self, maps: list[DivergenceMap]) -> Tensor | None:
        """What phi minimises, 0-dim; None when there is nothing to learn."""
        losses = (
            [
                cast(Regularizer, regularizer).objective(each.weights, each.divergence, each.alignment)
                for regularizer, each in zip(self.regularizers, maps, strict=True)
                if each.weights is not None
            ]
            if self.regularizers and self.interpolation is None
            else []
        )
        return torch.stack(losses).mean() if losses else None


def _check_regularizer(regularizer: Regularizer, term: Term) -> None:
    loss = term.loss
    name = type(loss).__name__
    if isinstance(regularizer, HeldOutInterpolation) and not term.trusted:
        raise UsageError(
            f"regularizer HeldOutInterpolation is not possible with combination={term.combination!r}: it weighs what "
            "held-out rows say can be believed of the teachers, so take trust or calibrated"
        )
    of_held_out = isinstance(regularizer, HeldOutInterpolation | ExplainedVariance)
    if isinstance(regularizer.player, HeldOut) and not of_held_out:
        raise UsageError(
            f"player HeldOut is not possible with regularizer {type(regularizer).__name__}: it belongs to "
            "HeldOutInterpolation and ExplainedVariance, and nothing else is taught by held-out rows"
        )
    if loss.kind not in regularizer.maps:
        raise UsageError(
            f"regularizer {type(regularizer).__name__} cannot weigh distillation_loss {name}, which has a map "
            f"over {loss.kind}: it weighs {' or '.join(sorted(regularizer.maps))}"
        )
    if regularizer.player.needs_alignment and loss.compares != "logits":
        raise UsageError(
            f"player {type(regularizer.player).__name__} cannot look ahead from features: it needs a "
            "distillation_loss that compares logits"
        )


def _at(places: Tensor, features: Tensor) -> Tensor:
    """Features (N, C) of the tokens that count; those of anything else than the tokens (B, T) as they are."""
    if features.shape[:-1] != places.shape:
        return features
    found = features[places]
    return found if len(found) else 0 * features[:1, 0]  # in the graph, for processes that wait for each other


def _of_map(weights: Tensor, divergence: Tensor) -> Tensor:
    """Weights (N, 1) or (N, C) as they broadcast to a map over classes, samples, or nothing."""
    if divergence.ndim == 2:
        return weights
    return weights.mean(1) if divergence.ndim == 1 else weights.mean()


def _copies(module: nn.Module, count: int) -> list[nn.Module]:
    """``module`` and copies of it: all start the same, and the first is the user's own object."""
    return [module, *(copy.deepcopy(module) for _ in range(count - 1))]
