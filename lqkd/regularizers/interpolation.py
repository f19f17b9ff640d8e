"""A regularizer that labels of held-out rows teach: how far is the teacher believed, against the student?"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.losses.base import MapKind
from lqkd.losses.trust.fitted import FittedInterpolation
from lqkd.losses.trust.interpolation import Interpolation, WeightOf, check_pull
from lqkd.regularizers.base import Regularizer
from lqkd.regularizers.players import HeldOut

Of = Literal[WeightOf, "auto"]

_HIDDEN = 16


class HeldOutInterpolation(Regularizer):
    """R_phi as the place between student S and what is believed of the teachers, T': ``Z = S + R_phi (T' - S)``.

    S and T' are log-probabilities. Any loss on logits then compares the student with Z in place of T', shifted by the
    logarithm of the student's normaliser, for losses that see a shift: the residual that the student sees is
    ``R_phi (T' - S)``, and none where R_phi is 0. phi makes labels of held-out rows likely under Z and has no part in
    the distillation loss, so that it cannot collapse: where the student is as good as its teachers, R_phi falls and
    distillation ends by itself. T' is what a term with ``combination: trust`` or ``calibrated`` hears; see
    :class:`~lqkd.losses.trust.Interpolation` for the weight.

    Teachers answer the held-out rows once. The student answers ``rows`` of them every ``every`` batches, in eval mode
    and without a gradient; between, phi learns from the last 512 of these answers. At the first time 512 are asked for,
    which count until there were four more times; from then on only the last four times count, since earlier answers
    are those of another student. With ``of="auto"`` nothing is learned between: each time that the student has answered
    it is chosen anew, by the same answers, whether there is one weight for all, one a class or one a sample, and these
    are fitted at once (:class:`~lqkd.losses.trust.FittedInterpolation`), for which few rows and few steps are enough.
    A fifth of the rows is never learned from: the student answers these anew at the end of every epoch, for what is
    told of Z. Tasks with several rows a sample, such as pixels, cannot have it.

    Args:
        of: whether there is one weight for ``all``, one a ``class`` or one a ``sample``; ``auto`` for what
            cross-validation within the held-out rows chooses of these.
        start: the weight before training, between 0 and 1.
        strength: of the pull towards the start, >= 0: of logit(R_phi), or with ``auto`` of R_phi itself.
        hidden: width of the hidden layer of a weight a sample, >= 1; of no other.
        rows: held-out rows that the student is asked about at a time, over all processes, >= 1.
        every: batches from one time to the next, >= 1.

    Raises:
        UsageError: when an argument is out of range.

    Examples:
        >>> regularizer = HeldOutInterpolation(of="all")
        >>> regularizer.connect("classes", channels=2)
        >>> regularizer(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])).detach()
        tensor([[0.8800]])
    """

    maps = frozenset({"classes", "samples", "scalar"})
    sees_logits = True
    learning_rate_factor = 10.0

    def __init__(
        self,
        of: Of = "sample",
        start: float = 0.88,
        strength: float = 0.01,
        hidden: int = _HIDDEN,
        rows: int = 64,
        every: int = 16,
    ) -> None:
        super().__init__(guard="none", player=HeldOut())
        for name, value in (("hidden", hidden), ("rows", rows), ("every", every)):
            if not isinstance(value, int) or value < 1:
                raise UsageError(
                    f"{name}={value!r} of HeldOutInterpolation is not possible: it must be a whole number of at least 1"
                )
        if of not in get_args(Of):
            raise UsageError(f"of={of!r} of HeldOutInterpolation is unknown: use {', '.join(get_args(Of))}")
        if hidden != _HIDDEN and of != "sample":
            raise UsageError(
                f"hidden={hidden} of HeldOutInterpolation is not possible with of={of!r}, which has no hidden layer: "
                "it is of sample"
            )
        check_pull(start, strength)
        self.of, self.start, self.strength, self.hidden = of, start, strength, hidden
        self.rows, self.every = rows, every
        self.interpolation: Interpolation | FittedInterpolation | None = None
        self.told: str | None = None
        """What it has learned, in a sentence; None while that is not known."""

    def connect(self, kind: MapKind, channels: int) -> None:
        super().connect(kind, channels)
        if self.interpolation is not None:
            return
        if self.of == "auto":
            self.interpolation = FittedInterpolation(channels, self.start, self.strength)
        else:
            self.interpolation = Interpolation(channels, self.of, self.start, self.strength, self.hidden)

    def response(self, teacher: Tensor, student: Tensor, labels: Tensor | None) -> Tensor:
        return self.between(teacher, student)[1]

    def forward(self, teacher: Tensor, student: Tensor, labels: Tensor | None = None) -> Tensor:
        """R_phi itself, (B, 1) or (B, C) float32: it is no factor of a divergence that would be a square."""
        return self.response(teacher, student, labels)

    @torch.no_grad()
    def between(self, teacher: Tensor, student: Tensor, teachers: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Z + log sum exp S (B, C), S the student's logits, and R_phi, (B, 1) or (B, C), float32, without a gradient.

        Args:
            teacher: (B, C) what is believed of the teachers.
            student: (B, C) logits.
            teachers: (K, B, C) logits of each teacher: whether several agree is looked at.
        """
        assert self.interpolation is not None, "connect() makes it"
        target, weights = self.interpolation(teacher, student, teachers)
        return target + student.float().logsumexp(-1, keepdim=True), weights
