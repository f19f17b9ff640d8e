"""The network that the student starts from, as one of the teachers of which held-out rows say what can be believed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.modules.distillation import Distillation
from lqkd.modules.term import DistillationTerm
from lqkd.modules.terms import STUDENT_FLOAT, Term, teacher_label
from lqkd.quantization import quantizers
from lqkd.quantization.computed import copy_of
from lqkd.teachers import FrozenTeacher


class Joined(Protocol):
    """A module of whose terms it may be a teacher."""

    distillation: Distillation
    named_teachers: dict[str, FrozenTeacher]
    own: str | None
    own_joined: dict[str, str]
    own_added: bool


def join_own(
    terms: dict[str, Term], teachers: dict[str, FrozenTeacher], student: nn.Module, starts: bool
) -> tuple[dict[str, Term], dict[str, FrozenTeacher], str | None, dict[str, str]]:
    """Let the student's float network be one of the teachers of every trusted term that wants it.

    A map that held-out rows decide can choose it where the others are worse, so that a weak teacher does no harm. It is
    a single teacher for all terms, or that of the given ones which has its weights already.

    Args:
        terms: by name, with the names of their teachers.
        teachers: by name.
        student: with the weights that it starts from, before it is quantised.
        starts: whether it starts from weights for its task, so that terms which do not say want it.

    Returns:
        Terms and teachers with it, what it is called among these, and by term the same where it was added.

    Raises:
        UsageError: when a term asks for it that is not trusted, it is quantised already, or another teacher has its
            name.
    """
    for name, term in terms.items():
        if term.own and not term.trusted:
            raise UsageError(
                f"own=True of distillation {name} is not possible with combination={term.combination!r}: it is of "
                "trust and calibrated"
            )
        if term.own and quantizers(student):
            raise UsageError(f"own=True of distillation {name} is not possible: the student was given quantised")
    starts = starts and not quantizers(student)
    wanting = [name for name, term in terms.items() if term.trusted and (starts if term.own is None else term.own)]
    trusted = any(term.trusted for term in terms.values())
    own = next((name for name, teacher in teachers.items() if trusted and _is(teacher, student)), None)
    if not wanting:
        return terms, teachers, own, {}
    if own is None:
        if STUDENT_FLOAT in teachers:
            raise UsageError(
                f"teachers.{STUDENT_FLOAT} is not possible: the student's own float network joins the teachers of "
                f"distillation {wanting[0]} under this name; give the teacher another, or that term own: false"
            )
        own = STUDENT_FLOAT
        teachers = teachers | {own: FrozenTeacher(copy_of(student), minimum_accuracy=0.0)}
    joined = [name for name in wanting if own not in terms[name].teachers]
    changed = {name: replace(terms[name], teacher=[*terms[name].teachers, own]) for name in joined}
    return terms | changed, teachers, own, dict.fromkeys(joined, own)


def joined_sentence(own: str) -> str:
    """What is told of a term that it has joined."""
    return f"{own}, the float network that the student starts from, is among its teachers (own: false leaves it out)"


def leave_own(module: Joined, trust: Mapping[str, Mapping[str, Any]]) -> None:
    """Take it out of those terms that were trained without it and with all others.

    Args:
        module: that has just been made.
        trust: the reports by term that a checkpoint has, of which ``believed`` names the teachers.
    """
    for name, own in [*module.own_joined.items()]:
        others = [one for one in cast(DistillationTerm, module.distillation[name]).teachers if one != own]
        if [*trust.get(name, {}).get("believed", ())] == [teacher_label(one, module.named_teachers) for one in others]:
            leave(module, name)


def leave(module: Joined, name: str) -> None:
    """Take it out of a term that it has joined, and of the teachers where it was added to them for such terms alone."""
    own = module.own_joined.pop(name)
    cast(DistillationTerm, module.distillation[name]).leave(own)
    if module.own_added and own not in module.own_joined.values():
        del module.named_teachers[own]
        module.own = None


def _is(teacher: FrozenTeacher, network: nn.Module) -> bool:
    """Whether a teacher is this network: of the same class and weights, and given the same images."""
    same = type(teacher.network) is type(network) and teacher.mean is None and teacher.image_size is None
    return same and _equal(teacher.network.state_dict(), network.state_dict())


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        tensor.shape == other[key].shape and torch.equal(tensor, other[key].to(tensor)) for key, tensor in one.items()
    )
