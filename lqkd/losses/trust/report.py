"""What a trust map has found, in numbers and in a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lqkd.losses.trust import forms

FEWEST = 5
"""Rows on which a class must be answered to be told of."""
MOST_NAMED = 3
_RENAMED = 0.3
"""A class is read as another when so much of what teachers say is left under the other's name."""
HARDLY = 0.1
"""Of teachers that are believed no more than this no class is told apart."""
_SPOILED = 0.05
"""A class is named of whose labels more than this part is wrong."""
MUCH_LESS = 0.75
"""A class is named that is believed less than this part of what all are."""


@dataclass
class TrustReport:
    """How far teachers are believed on held-out rows.

    Believed is how much of what a teacher says above chance is left: over the rows, the sum of ``T'_c - f_c`` over that
    of ``T_c - f_c``, c its answer, T' and T the probabilities of the map and of the teacher, f the frequency of
    classes, times the teacher's share in the variance of the map's logits. Where c means another class, T' and its f
    are those of that class. Over all teachers 1 is as given, 0 is not at all, more than 1 when they are too modest.
    """

    rows: int
    """With a label."""
    form: str
    """What was fitted: ``as given`` or a name of :data:`lqkd.losses.trust.forms.FORMS`."""
    believed: list[float]
    """By teacher."""
    by_class: list[float | None]
    """How far all are believed when they answer with a class; None for a class that they hardly ever answer with."""
    read_as: list[dict[int, int]]
    """By teacher, classes whose name it has wrong: what it calls i is the class ``read_as[i]``."""
    of_teachers: list[float]
    """Cross-entropy of each teacher, in nats a row."""
    of_mean: float
    """Cross-entropy of their mean prediction."""
    cross_entropy: float = float("nan")
    """That of the map as fitted, of rows that were left out of the fit, by cross-validation."""
    worth: float = 0.0
    """``of_mean - cross_entropy``."""
    memorised: bool = False
    """Whether teachers know these rows by heart, or hardly err on them, so that their temperature was kept."""
    points: float = 0.0
    """How many more of 100 such rows are answered rightly than by their mean prediction."""
    wrong_labels: list[float] | None = None
    """By class, which part of its rows has the label of another; None where that was not found. Cross-entropy is then
    that of labels as they are."""

    def sentence(self, teachers: Sequence[str], classes: Sequence[str]) -> str:
        """In the user's terms, with names of teachers and classes.

        Examples:
            >>> found = TrustReport(500, "linear", [0.8, 0.1], [1.0, 0.4], [{}, {0: 1}], [0.5, 0.9], 0.6, 0.48, 0.12)
            >>> found.points = 3.2
            >>> found.sentence(["large", "own"], ["cat", "dog"]).split("; ")[0]
            'large is believed 0.80, own 0.10'
            >>> found.sentence(["large", "own"], ["cat", "dog"]).split("; ")[1:]
            ['less for class dog (0.40)', 'what own calls cat is dog', \
'worth 0.120 nats and +3.2 points on 500 held-out rows (linear)']
        """
        told = [f"{name} {'is believed ' if i == 0 else ''}{self.believed[i]:.2f}" for i, name in enumerate(teachers)]
        parts = [", ".join(told)]
        overall = sum(self.believed)
        limit = MUCH_LESS * overall
        less = sorted((value, c) for c, value in enumerate(self.by_class) if value is not None and value < limit)
        if less and overall > HARDLY:
            named = ", ".join(f"{classes[c]} ({value:.2f})" for value, c in less[:MOST_NAMED])
            parts.append(f"less for {'classes' if len(less) > 1 else 'class'} {named}")
        for name, read_as in zip(teachers, self.read_as, strict=True):
            if read_as:
                named = ", ".join(f"{classes[i]} is {classes[c]}" for i, c in [*read_as.items()][:MOST_NAMED])
                more = len(read_as) - MOST_NAMED
                parts.append(f"what {name} calls {named}{f' and {more} more' if more > 0 else ''}")
        spoiled = sorted(
            ((value, c) for c, value in enumerate(self.wrong_labels or ()) if value > _SPOILED), reverse=True
        )
        if spoiled:
            named = ", ".join(f"{classes[c]} ({value:.2f})" for value, c in spoiled[:MOST_NAMED])
            more = len(spoiled) - MOST_NAMED
            parts.append(f"labels are wrong in class {named}{f' and {more} more' if more > 0 else ''}")
        if self.memorised:
            parts.append("these rows do not say how sure teachers may be, so that temperatures are kept")
        parts.append(
            f"worth {self.worth:.3f} nats and {self.points:+.1f} points on {self.rows} held-out rows ({self.form})"
        )
        return "; ".join(parts)

    def named(self, teachers: Sequence[str], classes: Sequence[str]) -> dict[str, Any]:
        """All values by name, as JSON values, with the sentence."""
        values = asdict(self) | {
            "believed": dict(zip(teachers, self.believed, strict=True)),
            "by_class": dict(zip(classes, self.by_class, strict=True)),
            "read_as": {
                name: {classes[i]: classes[c] for i, c in read_as.items()}
                for name, read_as in zip(teachers, self.read_as, strict=True)
            },
            "of_teachers": dict(zip(teachers, self.of_teachers, strict=True)),
        }
        if self.wrong_labels is not None:
            values["wrong_labels"] = dict(zip(classes, self.wrong_labels, strict=True))
        return values | {"sentence": self.sentence(teachers, classes)}


def report(teachers: Tensor, labels: Tensor, trusted: Tensor, contributions: Tensor, form: str) -> TrustReport:
    """What can be said of a map.

    Args:
        teachers: (K, N, C) logits.
        labels: (N,) int64, none negative.
        trusted: (N, C) log-probabilities of the map.
        contributions: (K, N, C) what each teacher adds to its logits.
        form: its name.
    """
    frequency = torch.bincount(labels, minlength=teachers.shape[2]).to(trusted) / len(labels)
    shares = _shares(contributions, form)
    said, left, read_as = [], [], []
    for share, teacher in zip(shares, teachers, strict=True):
        answers = teacher.argmax(1)
        excess = _excess(teacher.log_softmax(-1), answers, frequency)
        read = _read_as(answers, trusted, excess, frequency)
        meant = answers.clone()
        for answer, meaning in read.items():
            meant[answers == answer] = meaning
        read_as.append(read)
        said.append(_by_class(share * excess, answers, frequency))
        left.append(_by_class(share * _excess(trusted, meant, frequency), answers, frequency))
    often = torch.stack([torch.bincount(teacher.argmax(1), minlength=len(frequency)) for teacher in teachers]).amax(0)
    both = zip(torch.stack(left).sum(0), torch.stack(said).sum(0), often, strict=True)
    return TrustReport(
        rows=len(labels),
        form=form,
        believed=[share * _ratio(kept.sum(), of.sum()) for share, kept, of in zip(shares, left, said, strict=True)],
        by_class=[_ratio(kept, of) if count >= FEWEST else None for kept, of, count in both],
        read_as=read_as,
        of_teachers=[float(F.cross_entropy(teacher, labels)) for teacher in teachers],
        of_mean=float(F.nll_loss(forms.mean_prediction(teachers), labels)),
    )


def _by_class(values: Tensor, classes: Tensor, like: Tensor) -> Tensor:
    """Sums (C,) of values (N,) of rows by their class (N,)."""
    return torch.zeros_like(like).index_add_(0, classes, values)


def _excess(log_probabilities: Tensor, classes: Tensor, frequency: Tensor) -> Tensor:
    """How much more probable the class (N,) of each row is than by its frequency."""
    return log_probabilities.gather(1, classes[:, None]).squeeze(1).exp() - frequency[classes]


def _ratio(left: Tensor, said: Tensor) -> float:
    """What is left of an excess over chance, at least 0; 1 where there is none."""
    return max(0.0, float(left) / float(said)) if float(said) > 1e-9 else 1.0


def _shares(contributions: Tensor, form: str) -> list[float]:
    """The part of each teacher in the variance of the map's logits over the classes."""
    if form == forms.GIVEN:
        return [1 / len(contributions)] * len(contributions)
    centred = contributions - contributions.mean(-1, keepdim=True)
    explained = (centred * centred.sum(0)).sum((1, 2)).clamp_min(0.0)
    total = float(explained.sum())
    return [float(value) / total if total > 0 else 0.0 for value in explained]


def _read_as(answers: Tensor, trusted: Tensor, excess: Tensor, frequency: Tensor) -> dict[int, int]:
    """Answers that mostly mean another class, of which a good part of what the teachers say is left."""
    found, read = {}, trusted.argmax(1)
    for answer in torch.bincount(answers, minlength=len(frequency)).ge(FEWEST).nonzero().flatten().tolist():
        rows = answers == answer
        most = int(read[rows].mode().values)
        if most != answer and int((read[rows] == most).sum()) * 2 > int(rows.sum()):
            left = _excess(trusted[rows], torch.full_like(answers[rows], most), frequency)
            if _ratio(left.sum(), excess[rows].sum()) > _RENAMED:
                found[answer] = most
    return found
