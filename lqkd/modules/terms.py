"""What a distillation is made of, as settings: named teachers and named terms, or the short form of one term."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lqkd.balances.base import DISTILL, TASK
from lqkd.errors import UsageError
from lqkd.losses import DistillationLoss, LogitResidual
from lqkd.losses.ensembles import COMBINATIONS
from lqkd.regularizers import Regularizer
from lqkd.teachers import FrozenTeacher, TeacherEnsemble

TEACHER = "teacher"
"""The name of a teacher that is given without one."""
STUDENT_FLOAT = "student_float"
"""The name of the student's own float network among the teachers."""
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_TAKEN = (TASK, "loss", "total", "dampening")
"""Names under which something else is logged, beside the losses of the terms."""


@dataclass
class Tap:
    """A pair of modules whose outputs are compared.

    Attributes:
        teacher: name of a module of the teacher's network.
        student: name of a module of the student.
    """

    teacher: str
    student: str


@dataclass
class Term:
    """One distillation loss: what of which teacher is compared how, and how much each difference matters.

    Attributes:
        loss: divergence between teacher and student: of outputs, or of the features at ``taps``.
        teacher: name of a teacher, or of several whose outputs are combined; null for the only one, or all of an
            ensemble.
        combination: how several teachers speak: ``mean``, ``learned``, ``confidence`` or ``separate``; or, of one
            teacher too, what held-out rows say can be believed: ``trust`` or, as sure as these justify, ``calibrated``;
            see :mod:`lqkd.losses.ensembles`. Null for what the ensemble says, or ``mean``.
        taps: pairs of modules whose outputs a loss on features compares, each pair with a connector and a regularizer
            of its own.
        weight: multiplies the loss before it is balanced, > 0.
        regularizer: weighs the elements of the divergence; null for the plain loss.
        own: whether the float network that the student starts from is among the teachers of ``trust`` and
            ``calibrated``; null for yes where there are ``student_weights``, with their last layer, unless it knows
            held-out rows by heart. True is for yes in any case, of a student whose class brings weights say.
    """

    loss: DistillationLoss
    teacher: str | list[str] | None = None
    combination: str | None = None
    taps: list[Tap] | None = None
    weight: float = 1.0
    regularizer: Regularizer | None = None
    own: bool | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise UsageError(f"weight={self.weight!r} of a distillation term is not possible: a finite number > 0")
        if self.combination is not None and self.combination not in COMBINATIONS:
            raise UsageError(f"combination={self.combination!r} is unknown: use {', '.join(COMBINATIONS)}")
        if self.trusted and self.loss.compares != "logits":
            raise UsageError(
                f"combination={self.combination!r} is not possible with distillation_loss {type(self.loss).__name__}, "
                "which compares features: what can be believed is learned of logits"
            )

    @property
    def trusted(self) -> bool:
        """Whether held-out rows say what can be believed of its teachers."""
        return COMBINATIONS[self.combination or "mean"].trusted

    @property
    def teachers(self) -> list[str]:
        """Names of its teachers, once :func:`named_terms` has filled them in."""
        return [self.teacher] if isinstance(self.teacher, str) else list(self.teacher or ())


def named_teachers(
    teacher: FrozenTeacher | TeacherEnsemble | None, teachers: Mapping[str, FrozenTeacher] | None
) -> dict[str, FrozenTeacher]:
    """All teachers by name: one that is given without a name is ``teacher``, those of an ensemble are 1, 2, ...

    Raises:
        UsageError: when there is none, both forms are used, or a name is not possible.
    """
    if (teacher is None) == (not teachers):
        raise UsageError(
            "there is no teacher: give teacher, or several by name as teachers"
            if teacher is None
            else "teacher and teachers cannot both be given: name all of them in teachers"
        )
    if isinstance(teacher, TeacherEnsemble):
        return {str(number): member for number, member in enumerate(teacher.members(), 1)}
    if teacher is not None:
        return {TEACHER: teacher}
    assert teachers is not None
    for name in teachers:
        _check_name("teachers", name)
    return dict(teachers)


def named_terms(
    terms: Mapping[str, Term] | None,
    teacher: FrozenTeacher | TeacherEnsemble | None,
    teachers: Sequence[str],
    short: Mapping[str, Any],
) -> dict[str, Term]:
    """All terms by name, each with the names of its teachers; without ``terms`` a single one called ``distill``.

    Args:
        terms: as they are given; None for the short form.
        teacher: that without a name, or the ensemble, which says how it is combined.
        teachers: names of all teachers.
        short: the settings ``distillation_loss``, ``taps`` and ``regularizer`` of the short form.

    Raises:
        UsageError: when both forms are used, a term names no teacher of these, or a teacher serves no term.
    """
    ensemble = isinstance(teacher, TeacherEnsemble)
    combination = teacher.combination if isinstance(teacher, TeacherEnsemble) else "mean"
    if terms is None:
        if teacher is None:
            raise UsageError(
                f"teachers ({', '.join(teachers)}) need terms that say what is compared with each: give distillation"
            )
        loss = short["distillation_loss"] or LogitResidual()
        named = list(teachers) if ensemble else teachers[0]
        term = Term(loss, named, combination, short["taps"], 1.0, short["regularizer"])
        return _with_own({DISTILL: term}, teacher)
    beside = [name for name, value in short.items() if value is not None]
    if beside:
        raise UsageError(f"{beside[0]} is not possible beside distillation: give it to one of its terms")
    if not terms:
        raise UsageError("distillation names no term: give at least one, or leave it out")
    everyone = list(teachers)
    found = {}
    for name, term in terms.items():
        _check_name("distillation", name)
        asked = term.teachers or (everyone if ensemble else everyone[:1])
        if not term.teachers and teacher is None and len(everyone) > 1:
            raise UsageError(f"distillation.{name} has no teacher: name one of {', '.join(everyone)}")
        unknown = [one for one in asked if one not in everyone]
        if unknown:
            raise UsageError(
                f"distillation.{name}.teacher={unknown[0]!r} is not among the teachers: there are {', '.join(everyone)}"
            )
        if len(set(asked)) < len(asked):
            raise UsageError(f"distillation.{name}.teacher={asked} names a teacher twice")
        several = len(asked) > 1
        if not several and term.combination is not None and not term.trusted:
            raise UsageError(
                f"distillation.{name}.combination={term.combination!r} is of several teachers: it has {asked[0]} alone"
            )
        spoken = term.combination or (combination if several else "mean")
        found[name] = replace(term, teacher=asked if several else asked[0], combination=spoken)
    idle = [one for one in everyone if not any(one in term.teachers for term in found.values())]
    if idle:
        raise UsageError(f"teachers.{idle[0]} serves no term of distillation: name it in one, or leave it out")
    return _separate(_with_own(found, teacher))


def _with_own(terms: dict[str, Term], teacher: FrozenTeacher | TeacherEnsemble | None) -> dict[str, Term]:
    """With what an ensemble says of the student's own float network, for terms that it concerns and that do not say.

    Raises:
        UsageError: when it asks for it and concerns none.
    """
    if not isinstance(teacher, TeacherEnsemble):
        return terms
    trusted = {name: term for name, term in terms.items() if term.trusted}
    if teacher.own and not trusted:
        spoken = " or ".join(sorted({repr(term.combination) for term in terms.values()}))
        raise UsageError(
            f"own=True of the ensemble is not possible with combination={spoken}: it is of trust and calibrated"
        )
    return terms | {name: replace(term, own=teacher.own) for name, term in trusted.items() if term.own is None}


def _check_name(setting: str, name: str) -> None:
    if not _NAME.fullmatch(str(name)) or name in _TAKEN:  # YAML may have a number
        raise UsageError(
            f"{setting}.{name} is not possible: a name is made of letters, digits, - and _, begins with a letter, and "
            f"is none of {', '.join(_TAKEN)}"
        )


def _separate(terms: dict[str, Term]) -> dict[str, Term]:
    """With copies of modules that two terms have in common: each term has its own loss and regularizer."""
    seen: set[int] = set()
    for name, term in terms.items():
        own = {
            field: copy.deepcopy(module) if id(module) in seen else module
            for field, module in (("loss", term.loss), ("regularizer", term.regularizer))
        }
        terms[name] = replace(term, **own)  # type: ignore[arg-type]
        seen |= {id(term.loss), id(term.regularizer)} - {id(None)}
    return terms


def teacher_label(name: str, teachers: Mapping[str, object]) -> str:
    """What messages call a teacher: ``teacher``, or with its name where there are several."""
    if name == STUDENT_FLOAT:
        return name
    alone = not teachers.keys() - {TEACHER, STUDENT_FLOAT}
    return TEACHER if name == TEACHER and alone else f"{TEACHER} {name}"
