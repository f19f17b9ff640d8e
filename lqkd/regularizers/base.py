"""What a regularizer is: a learned weight for every difference between teacher and student."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.losses.base import MapKind
from lqkd.losses.settings import check
from lqkd.regularizers.guards import GUARDS, Guard
from lqkd.regularizers.players import PLAYERS, Player


class RowGroups(NamedTuple):
    """Of which sample of a batch each row is, where a sample has several: pixels, or positions of a detector."""

    of_rows: Tensor
    """(N,) int64, the number of each row's sample."""
    number: int
    """How many samples B there are; one may have no row."""


class Regularizer(nn.Module, ABC):
    """The learnable module R_phi between teacher T and student S.

    With a divergence map D >= 0, in the published form the squared residual ``(T - S)**2``, distillation counts

        L_adaptive = mean(w * D),   w = R_phi(T, S)**2

    which for the squared residual is ``|| R_phi(T, S) * (T - S) ||**2`` of arXiv 2509.20854. ``forward`` returns
    the weights w. The student sees them detached; phi is trained by :meth:`objective`, whose graph touches nothing
    else. Both players can therefore share one backward pass.

    Args:
        guard: what keeps w from collapsing: a name from ``GUARDS`` or a :class:`Guard`.
        player: what phi wants: a name from ``PLAYERS`` or a :class:`Player`.
        max_weight: upper bound of w, approached smoothly, before the guard; infinity (``.inf`` in YAML) for none.

    Raises:
        UsageError: when guard or player is unknown, they do not go together, or the bound is not greater than 1, the
            weight at the start.

    Examples:
        >>> class Halved(Regularizer):
        ...     maps = frozenset({"classes"})
        ...     def response(self, teacher, student, labels):
        ...         return torch.full_like(student, 0.5**0.5)
        >>> Halved()(torch.zeros(1, 3), torch.zeros(1, 3))
        tensor([[0.5000, 0.5000, 0.5000]])
    """

    maps: ClassVar[frozenset[MapKind]]
    """The kinds of divergence map that it can weigh."""
    sees_logits: ClassVar[bool] = False
    """Whether it looks at the logits of both networks even where the map is one of features."""
    sees_losses: ClassVar[bool] = False
    """Whether it looks at the distillation loss (B,) of each sample, which it is then given in place of both networks'
    outputs."""
    sees_several_rows: ClassVar[bool] = False
    """Whether it can look at the logits of all rows of a sample, of which there are many, for a weight of features."""
    independent: bool = False
    """Whether each logit is a class that is there or not, so that a sigmoid of it is what is predicted, and no softmax;
    the task says so."""
    bounded: ClassVar[bool] = False
    """Whether its weights are bounded from above without a guard."""
    learning_rate_factor: ClassVar[float] = 1.0
    """Multiplies the regularizer optimizer's learning rate for the parameters of this regularizer."""

    def __init__(
        self, guard: Guard | str = "barrier", player: Player | str = "cooperative", max_weight: float = 100.0
    ) -> None:
        super().__init__()
        check("it must be greater than 1, or .inf for none", lambda x: x > 1, max_weight=max_weight)
        self.guard = _named("guard", guard, GUARDS, Guard)  # type: ignore[type-abstract]
        self.player = _named("player", player, PLAYERS, Player)  # type: ignore[type-abstract]
        self.max_weight = max_weight
        if self.player.maximises and not (self.guard.limits_above or self.bounded):
            limiting = [name for name, kind in GUARDS.items() if kind.limits_above]
            raise UsageError(
                f"guard {type(self.guard).__name__} does not go with player {type(self.player).__name__}, which would "
                f"raise the weights without limit: use guard {', '.join(limiting)}"
            )

    def connect(self, kind: MapKind, channels: int) -> None:
        """Make what depends on the divergence map, once, before there is an optimizer.

        Args:
            kind: what the elements of the map are.
            channels: number of classes or channels of the map.

        Raises:
            UsageError: when it cannot weigh maps of this kind.
        """
        if kind not in self.maps:
            raise UsageError(
                f"regularizer {type(self).__name__} cannot weigh a distillation loss over {kind}: it weighs "
                f"{' or '.join(sorted(self.maps))}"
            )

    @abstractmethod
    def response(self, teacher: Tensor, student: Tensor, labels: Tensor | None) -> Tensor:
        """R_phi >= 0, broadcastable to the divergence map; float32 in, float32 out; 1 before training."""

    def response_of_samples(self, teacher: Tensor, student: Tensor, samples: RowGroups) -> Tensor:
        """R_phi (B,) likewise, a number a sample, of a regularizer that :attr:`sees_several_rows`.

        Args:
            teacher, student: logits (N, C) of all rows of the samples.
            samples: which of them each row is.
        """
        raise UsageError(f"regularizer {type(self).__name__} does not look at several rows of a sample")

    def forward(self, teacher: Tensor, student: Tensor, labels: Tensor | None = None) -> Tensor:
        """Weights w >= 0 in float32, broadcastable to the divergence map (from the left for weights of samples).

        Args:
            teacher, student: what the map compares, logits where it :attr:`sees_logits`, or losses where it
                :attr:`sees_losses`; any floating dtype; no gradient flows into them.
            labels: (B,) int64, negative where a sample has none; None when there are none at all.
        """
        with torch.autocast(teacher.device.type, enabled=False):
            return self._weights(self.response(teacher.detach().float(), student.detach().float(), labels))

    def of_samples(self, teacher: Tensor, student: Tensor, samples: RowGroups) -> Tensor:
        """Weights (B,) likewise, one a sample; see :meth:`response_of_samples`."""
        with torch.autocast(teacher.device.type, enabled=False):
            return self._weights(self.response_of_samples(teacher.detach().float(), student.detach().float(), samples))

    def _weights(self, response: Tensor) -> Tensor:
        weights = response.square()
        return self.guard.constrain(weights / (1 + (weights - 1) / self.max_weight).clamp_min(1.0))

    def applied(self, weights: Tensor, divergence: Tensor) -> Tensor:
        """The weights that the student sees, detached.

        Args:
            weights, divergence: as of :meth:`objective`.
        """
        return weights.detach()

    def objective(self, weights: Tensor, divergence: Tensor, alignment: Tensor | None = None) -> Tensor:
        """What phi minimises: the priced weights plus the guard's term, 0-dim; only phi gets gradients.

        Args:
            weights: what :meth:`forward` returned, viewed so that it broadcasts to the map.
            divergence: the map.
            alignment: of the map with the task, for a player that needs it.
        """
        price, scale = self.player.price(divergence.detach().float(), alignment)
        return (weights * price).mean() + self.guard(weights, scale)


_Part = TypeVar("_Part", Guard, Player)


def _named(what: str, part: _Part | str, known: dict[str, type[_Part]], kind: type[_Part]) -> _Part:
    if isinstance(part, kind):
        return part
    if not isinstance(part, str) or part not in known:
        raise UsageError(f"{what}={part!r} is unknown: use {', '.join(sorted(known))} or a {kind.__name__} class")
    return known[part]()
