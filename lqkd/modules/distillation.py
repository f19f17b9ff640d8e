"""All terms of a distillation by name, each one loss between one or several teachers and the student."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.losses import DistillationLoss
from lqkd.losses.taps import Taps
from lqkd.modules.passes import Outputs
from lqkd.modules.tasks import check_term
from lqkd.modules.term import DistillationTerm, Divergences, Shapes
from lqkd.modules.terms import Tap, Term, teacher_label
from lqkd.regularizers import LookAhead, Regularizer
from lqkd.tasks import Task
from lqkd.teachers import FrozenTeacher

__all__ = ["Distillation", "Tap"]


class Distillation(nn.ModuleDict):
    """The terms of a distillation in their order; a single one without a name is ``distill``.

    Attributes:
        named: whether they were given names, by which everything is then told.

    Args:
        terms: settings by name; see :func:`lqkd.modules.terms.named_terms`.
        named: see the attribute.

    Raises:
        UsageError: when loss, regularizer, teachers and taps of a term do not go together.
    """

    def __init__(self, terms: Mapping[str, Term], named: bool) -> None:
        super().__init__()
        self.named = named
        for name, term in terms.items():
            if hasattr(self, name):
                raise UsageError(f"distillation.{name} is not possible: Python has {name!r} for something else here")
            with self.told(name):
                self[name] = DistillationTerm(term)

    @contextmanager
    def told(self, name: str) -> Iterator[None]:
        """A block whose :class:`UsageError` says which term it is about."""
        try:
            yield
        except UsageError as error:
            if not self.named:
                raise
            raise UsageError(f"distillation.{name}: {error}") from error

    def terms(self) -> Iterator[tuple[str, DistillationTerm]]:
        """Name and term, in order."""
        for name, term in self.items():
            yield name, cast(DistillationTerm, term)

    @property
    def losses(self) -> nn.ModuleList:
        """The losses of all terms and pairs."""
        return nn.ModuleList(loss for _, term in self.terms() for loss in term.losses)

    @property
    def regularizers(self) -> nn.ModuleList:
        """The regularizers of all terms and pairs."""
        return nn.ModuleList(regularizer for _, term in self.terms() for regularizer in term.regularizers)

    @property
    def combinations(self) -> nn.ModuleList:
        """How teachers are combined, of all terms with several."""
        return nn.ModuleList(term.combination for _, term in self.terms() if term.combination is not None)

    def serve(self, task: Task, terms: Mapping[str, Term]) -> None:
        """Tell the regularizers what logits of the task are.

        Raises:
            UsageError: when a term needs more of the task than it has.
        """
        for name, term in terms.items():
            with self.told(name):
                check_term(task, term)
        for regularizer in self.regularizers:
            cast(Regularizer, regularizer).independent = task.independent_logits

    def bind(self, student: nn.Module, teachers: Mapping[str, FrozenTeacher]) -> None:
        """Let the losses look at the student and at the teacher of their term, before :meth:`connect`.

        Raises:
            UsageError: when a loss does not find there what it needs.
        """
        for name, term in self.terms():
            with self.told(name):
                term.bind(student, teachers[term.teachers[0]].network)

    def forward(
        self,
        outputs: Outputs,
        loss: Tensor,
        batch: Any,
        task: Task,
        student: nn.Module,
        held_out: Mapping[str, tuple[Tensor, Any]] | None = None,
    ) -> dict[str, Divergences]:
        """What every term gives for a batch, by its name.

        Args:
            outputs: of the networks.
            loss: the task's, 0-dim and differentiable, for players that look ahead.
            batch: what the task takes.
            task: what the networks are trained for.
            student: the network that is trained.
            held_out: by term whose player looks ahead to held-out rows, their images and what the task takes of them.
        """
        divergences, places = {}, task.places(batch)
        for name, term in self.terms():
            teachers = [outputs.teachers[teacher] for teacher in term.teachers]
            features = outputs.features[term.teachers[0]], outputs.student.features
            samples = task.samples_of_rows(outputs.rows, batch) if term.asks_for_samples else None
            divergences[name] = term(teachers, outputs.rows, features, term.sees_rows(task), places, samples)
            look_ahead(term, divergences[name], outputs, loss, batch, task, student, (held_out or {}).get(name))
        return divergences

    def reduce(self, divergences: Mapping[str, Divergences]) -> dict[str, Tensor]:
        """The loss of every term, 0-dim, modulated."""
        return {name: term.reduce(divergences[name].maps) for name, term in self.terms()}

    def objectives(self, divergences: Mapping[str, Divergences]) -> list[Tensor]:
        """What the regularizers and combinations minimise, 0-dim each."""
        losses = [
            loss
            for name, term in self.terms()
            for loss in (term.objective(divergences[name].maps), divergences[name].loss)
        ]
        return [loss for loss in losses if loss is not None]

    def taps_of_teachers(self, teachers: Mapping[str, FrozenTeacher]) -> dict[str, Taps]:
        """What has to be looked at in each teacher that a term compares features of, by its name.

        Raises:
            UsageError: when a teacher has no such module.
        """
        paths: dict[str, list[str]] = {}
        for _, term in self.terms():
            if term.taps:
                paths.setdefault(term.teachers[0], []).extend(tap.teacher for tap in term.taps)
        return {
            name: Taps(teachers[name].network, _unique(of_teacher), teacher_label(name, teachers))
            for name, of_teacher in paths.items()
        }

    def taps_of_student(self, student: nn.Module) -> Taps | None:
        """What has to be looked at in the student; None for nothing.

        Raises:
            UsageError: when it has no such module.
        """
        paths = _unique(tap.student for _, term in self.terms() for tap in term.taps)
        return Taps(student, paths, "student") if paths else None

    @property
    def shapes(self) -> dict[str, tuple[Shapes, Shapes]] | None:
        """Shapes by term that connectors were made for, as :meth:`connect` takes them; None before that."""
        made = {name: term.shapes for name, term in self.terms() if term.shapes is not None}
        return made if len(made) == len(self) else None

    def learned(self) -> dict[str, Tensor]:
        """Numbers that the losses have learned, detached, by what they are logged as after ``train/``."""
        found: dict[str, Tensor] = {}
        for name, term in self.terms():
            numbers = cast(DistillationLoss, term.losses[0]).learned()
            found |= {f"{name}/{key}" if self.named else key: value for key, value in numbers.items()}
        return found

    def connect(self, shapes: Mapping[str, tuple[Shapes, Shapes]]) -> None:
        """Make what depends on shapes, once; by name of the term, see :meth:`DistillationTerm.connect`."""
        for name, term in self.terms():
            with self.told(name):
                term.connect(*shapes[name])


def look_ahead(
    term: DistillationTerm,
    divergences: Divergences,
    outputs: Outputs,
    loss: Tensor,
    batch: Any,
    task: Task,
    student: nn.Module,
    held_out: tuple[Tensor, Any] | None = None,
) -> None:
    """Tell the maps of a term how they agree with the task, where its player asks; see :meth:`Distillation.forward`."""
    player = None if term.regularizer is None else term.regularizer.player
    if not isinstance(player, LookAhead):
        return
    rows = outputs.rows
    if not player.exact:
        (gradient,) = torch.autograd.grad(loss, rows.logits, retain_graph=True)
        counted = task.counted(rows, batch)
        term.look_ahead(divergences.maps, divergences.teachers, rows.logits, rows.labels, gradient * counted)
        return
    alone = outputs.inputs.alone()
    if alone is None:
        raise UsageError("player LookAhead(exact=True) needs networks that are called with one tensor alone")

    def loss_of(logits: Tensor, part: slice) -> Tensor:
        return task.loss(logits, task.part(batch, part))

    others = None
    if held_out is not None:
        images, other = held_out
        others = images, lambda logits: task.loss(logits, other)
    term.look_ahead_exactly(divergences.maps, student, divergences.teachers, alone, rows.labels, loss_of, others)


def _unique(paths: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(paths))
