"""Whether a teacher knows rows by heart, on which it then looks better than it is."""

from __future__ import annotations

from typing import NamedTuple

_PART = 0.5
_STANDARD_ERRORS = 2.0
_SELDOM = 0.01


class Answers(NamedTuple):
    """How many rows a teacher has answered, and how many rightly."""

    right: float
    rows: int

    @property
    def accuracy(self) -> float:
        """The part that is right."""
        return self.right / max(1, self.rows)


def memorised(held_out: Answers, unseen: Answers) -> bool:
    """Whether a teacher was trained on held-out rows and knows them by heart.

    It does where it is wrong on fewer than half as many of them as of rows that it has never seen, by two standard
    errors. One that has not learned them by heart is wrong on both about as often, even if it was trained on them.

    Args:
        held_out: on rows that it may have been trained on, augmented as in training.
        unseen: on rows that it was not trained on, of the validation split say.

    Examples:
        >>> memorised(Answers(1986, 2000), Answers(1892, 2000)), memorised(Answers(1858, 2000), Answers(1834, 2000))
        (True, False)
    """
    (known, of_known), (new, of_new) = (_wrong(answers) for answers in (held_out, unseen))
    difference = _PART * new - known
    return difference > _STANDARD_ERRORS * (_PART**2 * of_new + of_known) ** 0.5


def seldom_wrong(held_out: Answers) -> bool:
    """Whether a teacher errs on fewer than one of a hundred held-out rows.

    How sure it may be is not learned from so few errors. And where it was trained on the rows of validation as well, as
    public networks were, nothing else tells that it knows both by heart.

    Examples:
        >>> seldom_wrong(Answers(1598, 1600)), seldom_wrong(Answers(1400, 1600))
        (True, False)
    """
    return held_out.rows - held_out.right < _SELDOM * held_out.rows


def seldom_wrong_sentence(name: str, held_out: Answers) -> str:
    """What is told of such a teacher."""
    return (
        f"{name} is right on {held_out.accuracy:.1%} of held-out rows, which cannot say how sure it may be: its "
        "temperature is kept. If it was trained on them, and on those of validation, they say nothing of other rows: "
        "combination mean takes teachers as they are"
    )


def memorised_sentence(name: str, held_out: Answers, unseen: Answers) -> str:
    """What is told of such a teacher."""
    return (
        f"{_knows(name, held_out, unseen)}: how sure it is of them says nothing of others, so that its temperature is "
        "kept, and only shares, bias and order of classes are learned"
    )


def left_out_sentence(name: str, held_out: Answers, unseen: Answers) -> str:
    """What is told of one that nobody asked for, and that is therefore not among the teachers."""
    return (
        f"{_knows(name, held_out, unseen)}, on which it would look better than its teachers: it is left out (own: true "
        "keeps it)"
    )


def _knows(name: str, held_out: Answers, unseen: Answers) -> str:
    return (
        f"{name} knows its training rows by heart (right on {held_out.accuracy:.1%} of held-out rows, on "
        f"{unseen.accuracy:.1%} of validation)"
    )


def _wrong(answers: Answers) -> tuple[float, float]:
    """The part that is wrong, and the variance of that, as if two rows more were known, one of them wrong."""
    part = (answers.rows - answers.right + 1) / (answers.rows + 2)
    return part, part * (1 - part) / (answers.rows + 2)
