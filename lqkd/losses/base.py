"""What a distillation loss is: a map of divergences and a rule that reduces it to a number."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

MapKind = Literal["classes", "features", "samples", "scalar"]
"""What the elements of a divergence map are: (B, C) classes, (B, C, H, W) positions of feature maps or (B, N, C) of
token sequences, (B,) samples, or () where a loss compares whole batches and has no map."""


class DistillationLoss(nn.Module, ABC):
    """Difference of teacher and student, element by element. Tensor in, tensor out.

    ``forward(teacher, student, labels)`` returns a divergence map with non-negative elements, of which a regularizer
    may weigh each one; ``reduce(map)`` returns the loss. Both are differentiable in ``student``.

    Examples:
        >>> class Absolute(DistillationLoss):
        ...     def forward(self, teacher, student, labels=None):
        ...         return (teacher.detach() - student).abs().float()
        ...     def reduce(self, divergence):
        ...         return divergence.mean()
        >>> loss = Absolute()
        >>> loss.reduce(loss(torch.ones(2, 3), torch.zeros(2, 3)))
        tensor(1.)
    """

    compares: Literal["logits", "features", "pyramids"] = "logits"
    """What it is given: logits (B, C); the features of one pair of taps; or tuples with those of all pairs, from the
    shallowest to the deepest."""
    kind: MapKind = "classes"
    """What the elements of its map are."""
    compares_predictions: bool = False
    """Whether it is the softmax of rows that it compares, which must then be a prediction of one class of several."""
    needs_labels: bool = False
    """Whether it cannot do without labels."""
    place_by_place: bool = False
    """Whether its map has an element for each place of token sequences, of nothing but what is there, so that those
    which do not count, as padding, are left out before it sees them: vectors (N, C) remain."""
    sees_places: bool = False
    """Whether its ``forward`` takes ``places`` (B, T), bool: which tokens of sequences count; None for all."""
    temperature: float = 1.0
    """What it divides logits by before it compares them; of one that learns it, before training."""

    def connect(self, teacher: Sequence[torch.Size], student: Sequence[torch.Size]) -> None:
        """Make what matches the student's features to the teacher's, once, before there is an optimizer.

        Args:
            teacher, student: shapes of the tensors that will be compared, batch axis included: one for each pair of
                taps where it compares pyramids, else a single one.

        Raises:
            UsageError: when tensors of these shapes cannot be compared.
        """

    def bind(self, student: nn.Module, tap: str) -> None:
        """Look at the student whose features will be compared, once, before :meth:`connect`.

        Most losses do not look. One that does keeps no parameter of the student as its own.

        Args:
            student: the network that is trained, its quantizers in place.
            tap: name of the submodule whose output is compared.

        Raises:
            UsageError: when the student has not got what the loss needs.
        """

    def bind_teacher(self, teacher: nn.Module, tap: str) -> None:
        """Likewise at the frozen teacher, of which the loss keeps no parameter either.

        Args:
            teacher: the teacher's network.
            tap: name of its submodule whose output is compared.

        Raises:
            UsageError: when the loss needs what the teacher has not got.
        """

    @abstractmethod
    def forward(self, teacher: Tensor, student: Tensor, labels: Tensor | None = None) -> Tensor:
        """Divergence map >= 0, of the :attr:`kind` of this loss, in float32, or float64 where the student's is.

        Args:
            teacher, student: what it :attr:`compares`; no gradient flows into the teacher's.
            labels: (B,) int64, negative where a sample has none; None when there are none at all.
        """

    def pair(self, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        """What the map compares element by element, in one shape: for a regularizer to look at.

        A loss that matches shapes or transforms its inputs returns the matched or transformed ones.
        """
        return teacher, student

    @abstractmethod
    def reduce(self, divergence: Tensor) -> Tensor:
        """0-dim loss from a (weighted) divergence map."""

    def of_samples(self, divergence: Tensor) -> Tensor:
        """What it is of every sample by itself, (B,), from a map with samples."""
        return torch.vmap(lambda one: self.reduce(one.unsqueeze(0)))(divergence)

    def learned(self) -> dict[str, Tensor]:
        """Numbers that it has learned, 0-dim and detached, by the name under which they are logged."""
        return {}
