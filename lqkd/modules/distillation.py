"""From the outputs of teacher and student to divergence maps and their weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.losses import DistillationLoss
from lqkd.regularizers import LookAhead, Regularizer, alignment
from lqkd.regularizers.one_step import one_step_alignment

Shapes = list[tuple[int, ...]]


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
class Part:
    """One divergence map with its weights."""

    divergence: Tensor
    """The map before modulation, differentiable in the student."""
    weights: Tensor | None
    """What the regularizer says, viewed so that it broadcasts to the map; None without a regularizer."""
    alignment: Tensor | None = None
    """How each element of the map agrees with the task; None where no player asks."""


class Distillation(nn.Module):
    """The distillation loss of one pair of logits, or of every pair of taps, each with a regularizer of its own.

    Connectors and tables depend on shapes: :meth:`connect` makes them, before there is an optimizer.

    Args:
        loss: compares teacher and student; copied for every pair.
        regularizer: weighs the differences; copied for every pair. None for none.
        taps: pairs of modules, for a loss that compares features.
        teachers: number of teachers that are compared with the student one by one.
        ensemble: whether there is more than one teacher, combined or not.

    Raises:
        UsageError: when loss, regularizer and taps do not go together.
    """

    def __init__(
        self,
        loss: DistillationLoss,
        regularizer: Regularizer | None,
        taps: Sequence[Tap] = (),
        teachers: int = 1,
        ensemble: bool = False,
    ) -> None:
        super().__init__()
        name = type(loss).__name__
        if ensemble and loss.compares != "logits":
            raise UsageError(
                f"distillation_loss {name} compares features: several teachers are compared by logits only"
            )
        if loss.compares == "logits" and taps:
            raise UsageError(f"taps cannot be used: distillation_loss {name} compares logits")
        if loss.compares != "logits" and not taps:
            raise UsageError(f"distillation_loss {name} compares features: give at least one pair of taps")
        if regularizer is not None:
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
        pairs = teachers * (len(taps) if loss.compares == "features" else 1)
        self.losses = nn.ModuleList(_copies(loss, pairs))
        self.regularizers = nn.ModuleList(() if regularizer is None else _copies(regularizer, pairs))
        self.taps = tuple(taps)
        self.compares = loss.compares
        self.shapes: tuple[Shapes, Shapes] | None = None

    def bind(self, student: nn.Module) -> None:
        """Let the losses look at the student, before :meth:`connect`.

        Raises:
            UsageError: when a loss does not find there what it needs.
        """
        for loss, tap in zip(self.losses, self.taps, strict=False):
            cast(DistillationLoss, loss).bind(student, tap.student)

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
        pairs = list(zip(teacher, student, strict=True))
        groups = [pairs] if self.compares == "pyramids" else [[pair] for pair in pairs]
        for index, (module, group) in enumerate(zip(self.losses, groups, strict=True)):
            loss = cast(DistillationLoss, module)
            loss.connect([torch.Size(t) for t, _ in group], [torch.Size(s) for _, s in group])
            if self.regularizers:
                regularizer = cast(Regularizer, self.regularizers[index])
                channels = 0
                (t, s), *_ = group
                if loss.kind != "samples" and 0 not in s:  # otherwise the number of classes is not known
                    with torch.no_grad():
                        matched = loss.pair(torch.zeros(t), torch.zeros(s))[1]
                    channels = matched.shape[2 if matched.ndim == 3 else 1]
                regularizer.connect(loss.kind, channels)

    def forward(
        self,
        teachers: list[Tensor],
        student: Tensor,
        labels: Tensor | None,
        features: tuple[list[Tensor], list[Tensor]],
    ) -> list[Part]:
        """The divergence maps of one batch.

        Args:
            teachers: logits (B, C) of each teacher that is compared by itself.
            student: logits (B, C).
            labels: (B,) int64, negative where a sample has none; or None.
            features: what the taps saw, of the teacher and of the student; empty for logits.
        """
        parts = []
        for index, (module, (t, s)) in enumerate(
            zip(self.losses, self._pairs(teachers, student, features), strict=True)
        ):
            loss = cast(DistillationLoss, module)
            divergence = loss(t, s, labels)
            weights = None
            if self.regularizers:
                regularizer = cast(Regularizer, self.regularizers[index])
                logits = (teachers[min(index, len(teachers) - 1)], student)
                seen = logits if regularizer.sees_logits else loss.pair(t, s)
                weights = regularizer(*seen, labels)
                if weights.ndim == 1:
                    weights = weights.view(-1, *[1] * (divergence.ndim - 1))
            parts.append(Part(divergence, weights))
        return parts

    def look_ahead(
        self, parts: list[Part], teachers: list[Tensor], student: Tensor, labels: Tensor | None, task_gradient: Tensor
    ) -> None:
        """Set every part's alignment from the gradient of each sample's task loss at the logits, (B, C)."""
        for module, part, teacher in zip(self.losses, parts, teachers, strict=True):

            def divergence(logits: Tensor, loss: nn.Module = module, teacher: Tensor = teacher) -> Tensor:
                return cast(Tensor, loss(teacher, logits, labels))

            part.alignment = alignment(divergence, student, task_gradient)

    def look_ahead_exactly(
        self,
        parts: list[Part],
        network: nn.Module,
        teachers: list[Tensor],
        images: Tensor,
        labels: Tensor | None,
        task: Callable[[Tensor, slice], Tensor],
    ) -> None:
        """Set every part's alignment from the task loss after a step of distillation in the parameters.

        With a held out half, each half of the batch is looked at from the other. ``task`` is the task loss, 0-dim, of
        the logits (B', C) of a part of the batch.
        """
        middle = len(images) // 2
        for module, regularizer, part, teacher in zip(self.losses, self.regularizers, parts, teachers, strict=True):
            player = cast(LookAhead, cast(Regularizer, regularizer).player)
            weights = cast(Tensor, part.weights).detach().expand_as(part.divergence)
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
                    (images[there], task_there),
                    player.step_size,
                )
            part.alignment = aligned

    def _pairs(
        self, teachers: list[Tensor], student: Tensor, features: tuple[list[Tensor], list[Tensor]]
    ) -> list[tuple[Tensor, Tensor]]:
        if self.compares == "logits":
            return [(teacher, student) for teacher in teachers]
        if self.compares == "pyramids":
            return [(cast(Tensor, tuple(features[0])), cast(Tensor, tuple(features[1])))]
        return list(zip(*features, strict=True))

    def reduce(self, parts: list[Part], weighted: bool = True) -> Tensor:
        """The distillation loss, 0-dim: the mean over the maps; the student sees the weights as constants."""
        values = [
            cast(DistillationLoss, loss).reduce(
                part.weights.detach() * part.divergence if weighted and part.weights is not None else part.divergence
            )
            for loss, part in zip(self.losses, parts, strict=True)
        ]
        return torch.stack(values).mean()

    def objective(self, parts: list[Part]) -> Tensor | None:
        """What phi minimises, 0-dim; None when there is nothing to learn."""
        terms = (
            [
                cast(Regularizer, regularizer).objective(part.weights, part.divergence, part.alignment)
                for regularizer, part in zip(self.regularizers, parts, strict=True)
                if part.weights is not None
            ]
            if self.regularizers
            else []
        )
        return torch.stack(terms).mean() if terms else None


def _copies(module: nn.Module, count: int) -> list[nn.Module]:
    """``module`` and copies of it: all start the same, and the first is the user's own object."""
    return [module, *(copy.deepcopy(module) for _ in range(count - 1))]
