"""The forms of a trust map, from few to many parameters, and what minimises cross-entropy in each of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

GIVEN = "as given"
"""The form without parameters: the mean of the teachers' predictions."""
FORMS: dict[str, tuple[str, ...]] = {
    "temperature": ("scale",),
    "order": ("order", "scale"),
    "bias": ("scale", "bias"),
    "diagonal": ("scale", "bias", "diagonal"),
    "linear": ("scale", "bias", "diagonal", "linear"),
    "wrong labels": ("scale", "wrong"),
    "order, wrong labels": ("order", "scale", "wrong"),
    "linear, wrong labels": ("scale", "bias", "diagonal", "linear", "wrong"),
    "gate": ("scale", "gate"),
}
"""By name, what is fitted: a factor a teacher, which is its temperature and its share in one, which of a teacher's
classes is which, a bias a class, a factor a teacher and class, and what every class says about every other; and which
part of a class has labels of others, so that the map is not unsure where labels are. The last, of several teachers, is
a mixture of their predictions with shares that depend on the sample: of two specialists the one that is lost has little
to say there."""
BY_CLASS = ("order", "bias", "diagonal", "linear", "wrong")
"""What is fitted for each class by itself."""
FULL_CLASSES = 128
"""Above so many classes the linear form looks at the ``RANK`` directions in which teachers differ most."""
RANK = 32
MOST_CLASSES = 2**14
"""Above so many, as the tokens of a tokenizer are, nothing is fitted by class."""

_MOST_ITERATIONS = 500
_WRONG = 6.0
"""The part of a class whose labels are wrong is half the sigmoid of what starts at -6 and moves by 6 at a time."""

Parts = dict[str, Tensor]


@dataclass
class Problem:
    """Held-out rows, in units in which all parameters are alike: the teachers' logits have a root mean square of 1."""

    seen: Tensor
    """(K, N, C) float64: logits without their mean over classes, divided by ``unit``."""
    reduced: Tensor
    """(K, N, R): the same in the directions of the linear form."""
    told: Tensor
    """(N, F + 1) of each sample 1, and what :func:`telling` tells above ``mean``, divided by ``spread``."""
    labels: Tensor
    """(N,) int64."""
    unit: float
    mean: Tensor
    """(F,)."""
    spread: Tensor
    """(F,)."""

    @classmethod
    def of(cls, teachers: Tensor, labels: Tensor, basis: Tensor) -> Problem:
        """Of logits (K, N, C), labels (N,) and directions (C, R)."""
        centred = centred_logits(teachers.double())
        unit = float(centred.square().mean().sqrt().clamp_min(1e-12))
        seen, told = centred / unit, telling(teachers.double())
        mean, spread = told.mean(0), told.std(0, correction=0).clamp_min(1e-3)
        return cls(seen, seen @ basis.double(), with_one((told - mean) / spread), labels, unit, mean, spread)

    def rows(self, chosen: Tensor) -> Problem:
        """Some of the rows."""
        return replace(
            self,
            seen=self.seen[:, chosen],
            reduced=self.reduced[:, chosen],
            told=self.told[chosen],
            labels=self.labels[chosen],
        )

    def start(self, form: str) -> Parts:
        """No change to the mean of the teachers' log-probabilities, but for the order of classes in these rows."""
        teachers, _, classes = self.seen.shape
        shapes = {
            "scale": (teachers,),
            "bias": (classes,),
            "diagonal": (teachers, classes),
            "linear": (teachers, classes, self.reduced.shape[2]),
            "gate": (teachers, self.told.shape[1]),
            "wrong": (classes,),
        }
        zeros = {name: self.seen.new_zeros(shapes[name]) for name in FORMS[form] if name != "order"}
        return ({"order": self.order()} if "order" in FORMS[form] else {}) | zeros

    def order(self) -> Tensor:
        """(K, C) int64, which of a teacher's classes is class 0, 1, ...: the assignment of most of its predictions.

        A class keeps its own unless others have more by the standard error of its count, as of a class that a teacher
        has never seen.
        """
        classes = self.seen.shape[2]
        often = torch.bincount(self.labels, minlength=classes)
        found = []
        for seen in self.seen:
            called = torch.zeros(classes, classes, dtype=seen.dtype, device=seen.device)
            called.index_add_(0, self.labels, (self.unit * seen).softmax(-1))
            called += torch.diag_embed(often.to(seen).sqrt())
            found.append(torch.from_numpy(linear_sum_assignment(called.cpu().numpy(), maximize=True)[1]))
        return torch.stack(found).to(self.labels.device)

    def renames(self) -> bool:
        """Whether the order of any teacher's classes is another than its own."""
        order = self.order()
        return bool((order != torch.arange(order.shape[1], device=order.device)).any())

    def logits(self, parts: Parts) -> Tensor:
        """(N, C) of the map, whose ``parts`` are differences from the start."""
        seen = self.seen
        if "gate" in parts:
            factors = self.unit + parts["scale"].view(-1, 1, 1)
            return mixture(factors * seen, self.told @ parts["gate"].mT)
        if "order" in parts:
            seen = seen.gather(2, parts["order"].unsqueeze(1).expand_as(seen))
        factors = self.unit / len(self.seen) + parts["scale"].view(-1, 1, 1)
        if "diagonal" in parts:
            factors = factors + parts["diagonal"].unsqueeze(1)
        logits = (factors * seen).sum(0)
        if "linear" in parts:
            logits = logits + (self.reduced @ parts["linear"].mT).sum(0)
        return logits + parts["bias"] if "bias" in parts else logits

    def of_labels(self, parts: Parts) -> Tensor:
        """(N, C) the logits of labels, of which some may be wrong where the map has a part for that."""
        logits = self.logits(parts)
        return spoiled(logits.log_softmax(-1), wrong(parts["wrong"])) if "wrong" in parts else logits

    def minimise(self, parts: Parts, strength: float, accuracy: float = 1e-9) -> Parts:
        """What minimises ``sum CE + strength / 2 * |parts|^2`` from ``parts`` on; an order stays as it is.

        It is convex but for the gate and wrong labels.

        Args:
            parts: where to begin: of the same form.
            strength: > 0: the number of rows that a prior of unit variance is worth.
            accuracy: the largest gradient, of the mean over the rows, that is left.
        """
        order = {name: value for name, value in parts.items() if name == "order"}
        parts = {name: value for name, value in parts.items() if name != "order"}
        flat = torch.cat([value.flatten() for value in parts.values()]).requires_grad_()
        price = strength / (2 * len(self.labels))
        optimizer = torch.optim.LBFGS(
            [flat],
            max_iter=_MOST_ITERATIONS,
            tolerance_grad=accuracy,
            tolerance_change=1e-15,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        def named(values: Tensor) -> Parts:
            pieces = values.split([value.numel() for value in parts.values()])
            return {name: piece.view_as(parts[name]) for name, piece in zip(parts, pieces, strict=True)}

        def objective() -> Tensor:
            values = named(flat)
            loss = F.cross_entropy(self.of_labels(order | values), self.labels)
            (gradient,) = torch.autograd.grad(loss, flat)
            with torch.no_grad():  # the penalty's gradient is written out: its nodes would take a fifth of a small step
                flat.grad = gradient + 2 * price * flat
                return loss + price * sum((value.square().sum() for value in values.values()), loss.new_zeros(()))

        with torch.enable_grad():
            optimizer.step(objective)  # type: ignore[arg-type]
        return order | {name: value.clone() for name, value in named(flat.detach()).items()}


def centred_logits(teachers: Tensor) -> Tensor:
    """Logits (..., C) without their mean over classes, which no prediction depends on; -inf becomes finite."""
    finite = teachers.log_softmax(-1).clamp_min(-1000.0)
    return finite - finite.mean(-1, keepdim=True)


def telling(teachers: Tensor) -> Tensor:
    """What tells which of several teachers to listen to, (N, 2 K + 1), each between 0 and 1.

    For logits (K, N, C) these are entropy and margin of each teacher, and how much they disagree.
    """
    log_predictions = teachers.log_softmax(-1).clamp_min(-1000.0)
    predictions = log_predictions.exp()
    entropy = -(predictions * log_predictions).sum(-1) / math.log(teachers.shape[2])
    top = predictions.topk(2, -1).values
    apart = (predictions - predictions.mean(0)).abs().sum(-1).mean(0) / 2  # total variation from their mean
    return torch.cat([entropy, top[..., 0] - top[..., 1], apart[None]]).mT


def mixture(teachers: Tensor, scores: Tensor) -> Tensor:
    """Log-probabilities (N, C) of predictions mixed by the softmax of ``scores`` (N, K), for logits (K, N, C)."""
    shares = scores.log_softmax(-1).mT.unsqueeze(2)
    return (teachers.log_softmax(-1) + shares).logsumexp(0)


def wrong(part: Tensor) -> Tensor:
    """(C,) which part of every class has the label of another, from what is fitted: less than half, or it had its name.

    More than that would be a teacher who calls the class by another's.
    """
    return (_WRONG * (part - 1)).sigmoid() / 2


def spoiled(log_predictions: Tensor, rates: Tensor) -> Tensor:
    """Log-probabilities of labels (N, C) where a part of every class, ``rates`` (C,), has that of any other class.

    The forward correction of Patrini et al. (arXiv 1609.03683), whose matrix has one number a class, and is fitted
    together with the predictions.
    """
    predictions, others = log_predictions.exp(), log_predictions.shape[1] - 1
    lost = predictions * rates
    return (predictions - lost + (lost.sum(1, keepdim=True) - lost) / others).clamp_min(1e-30).log()


def with_one(told: Tensor) -> Tensor:
    """(N, F + 1) of (N, F), with 1 in front."""
    return torch.cat([torch.ones_like(told[:, :1]), told], 1)


def mean_prediction(teachers: Tensor) -> Tensor:
    """Log-probabilities (N, C) of the mean prediction of logits (K, N, C)."""
    predictions = teachers.log_softmax(-1).clamp_min(-1000.0)
    return (predictions.logsumexp(0) - torch.tensor(len(teachers), dtype=predictions.dtype).log()).log_softmax(-1)


def directions(teachers: Tensor) -> Tensor:
    """(C, R) orthonormal directions that the linear form looks at: all, or the first principal ones of (K, N, C).

    None, R = 0, where there are too many classes for it.
    """
    classes = teachers.shape[2]
    if classes > MOST_CLASSES:
        return torch.zeros(classes, 0, dtype=torch.float64, device=teachers.device)
    if classes <= FULL_CLASSES:
        return torch.eye(classes, dtype=torch.float64, device=teachers.device)
    centred = centred_logits(teachers.double()).flatten(0, 1)
    return torch.linalg.eigh(centred.mT @ centred).eigenvectors[:, -RANK:].flip(1)


def rank(classes: int) -> int:
    """R of :func:`directions`."""
    if classes > MOST_CLASSES:
        return 0
    return classes if classes <= FULL_CLASSES else RANK


def folds_of(labels: Tensor, folds: int, order: Tensor) -> Tensor:
    """(N,) the fold of every row: each class is shared out evenly, in the random ``order`` (N,)."""
    shuffled = order.argsort(stable=True)
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    found = torch.empty_like(labels)
    found[by_class] = torch.arange(len(labels), device=labels.device) % folds
    return found


def folds_of_groups(groups: Tensor, folds: int, order: Tensor) -> Tensor:
    """(N,) the fold of every row, where rows of one group (N,), of one image say, are alike and share a fold.

    Groups are shared out in the random ``order`` (G,), for as many groups as there are.
    """
    place = order.argsort(stable=True).argsort(stable=True) % folds
    return place[groups.unique(return_inverse=True)[1]]


def _standard_error(difference: Tensor, groups: Tensor | None) -> float:
    """Of the mean of (N,) differences, of which those of one group are not independent of each other."""
    if groups is None:
        return float(difference.std(correction=0)) / len(difference) ** 0.5
    inverse = groups.unique(return_inverse=True)[1]
    apart = torch.zeros(int(inverse.max()) + 1, dtype=difference.dtype, device=difference.device)
    return float(apart.index_add_(0, inverse, difference - difference.mean()).square().sum().sqrt()) / len(difference)


def is_better(loss: Tensor, than: Tensor, groups: Tensor | None = None) -> bool:
    """Whether (N,) losses by row are lower than others by more than one standard error of the mean difference."""
    difference = than - loss
    return float(difference.mean()) > _standard_error(difference, groups)


def simplest_of_the_best(losses: Sequence[Tensor], groups: Tensor | None = None) -> int:
    """The first of (N,) losses by row, given from simple to complex, that is within one standard error of the best.

    The standard error is that of the mean difference, row by row (the rule of Breiman et al., "Classification and
    Regression Trees", 1984, with paired differences). The first, which fits nothing, stays within two of them: it is
    compared with the best of many. Rows of one of the ``groups`` (N,) are alike: the error is then of their sums.
    """
    best = min(losses, key=lambda loss: float(loss.mean()))
    for index, loss in enumerate(losses):
        difference = loss - best
        margin = _standard_error(difference, groups)
        if float(difference.mean()) <= (1 if index else 2) * margin:
            return index
    raise AssertionError("the best is no worse than itself")
