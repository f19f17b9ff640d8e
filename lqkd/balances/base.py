"""What a balance is: a weight for every loss, the bounds they keep, and a beginning in which the teachers lead."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from lqkd.balances.equalized_at import AtLogits, AtWeights
from lqkd.balances.norms import LossGradients
from lqkd.errors import UsageError
from lqkd.losses.settings import check

TASK = "task"
"""The name of the first loss of every balance."""
DISTILL = "distill"
"""The name of a distillation loss that is given without one."""
GradientScale = Literal["sum", "task", "unit"]
"""How long the student's gradient is made."""
LOSSES = (TASK, DISTILL)
"""The losses that are balanced where nothing else is said: the order of every vector in a balance."""


class Balance(nn.Module, ABC):
    """``L = sum_i w_i L_i`` over the task's loss and K distillation losses, with weights that each balance chooses.

    Every vector has one entry a loss, in the order of :attr:`names`, the task's first: ``task`` and ``distill`` until
    :meth:`connect` says otherwise.

    What a balance wants passes two steps that are the same for all of them:

    - *The teacher leads.* With ``teacher_share``, distillation first has this share of the sum of all weights,
      whatever the balance wants; from ``hold`` to ``release`` the share moves in a straight line to what it wants.
      The sum of all weights and the ratios between those of distillation stay the balance's. A balance that learns
      does so from the beginning. Weights that follow ``1 / loss`` would otherwise turn the teacher down while the
      student is far from it, which is when it is needed most.
    - *Bounds.* Each weight is kept within ``minimum`` and ``maximum``, which have the last word.

    The student sees the weights as constants. What a balance learns it learns from a term of its own, whose graph
    touches nothing else, so that both share one backward pass. State that outlives a step is in the ``state_dict``.

    Args:
        minimum: lower bound of each weight, >= 0.
        maximum: upper bound of each weight, > ``minimum``; infinity (``.inf`` in YAML) for none.
        teacher_share: share of distillation in the sum of all weights at first, 0 to 1; None for what the balance
            wants throughout.
        hold: part of the training until which the share is fixed, 0 to 1.
        release: part of the training from which on the balance is free, ``hold`` to 1.
        gradient_scale: length of the student's gradient: ``sum``, as it is; ``task``, that of the gradient that the
            task's loss alone would have, which costs another backward pass; ``unit``, 1, whatever the losses. Direction
            and weights stay: it tells what a mixture of losses does from what a longer step does. Optimizers that
            divide by the size of gradients, such as Adam, hardly notice.

    Attributes:
        progress: the part of the training that is done, 0 to 1, for a balance that depends on it, to be set before
            each step; None for others.
        equalized_at: where it measures the gradients of the losses; None for a balance that does not.
        names: of the losses, the task's first.

    Raises:
        UsageError: when bounds, share or parts are out of range.

    Examples:
        >>> class Half(Balance):
        ...     def propose(self, losses, gradients):
        ...         return torch.full_like(losses, 0.5), None
        >>> total, weights = Half()({"task": torch.tensor(2.0), "distill": torch.tensor(1.0)})
        >>> total, weights
        (tensor(1.5000), {'task': tensor(0.5000), 'distill': tensor(0.5000)})
    """

    learning_rate_factor: ClassVar[float] = 1.0
    """Multiplies the regularizer optimizer's learning rate for the parameters of this balance."""

    def __init__(
        self,
        minimum: float = 0.0,
        maximum: float = math.inf,
        teacher_share: float | None = None,
        hold: float = 0.2,
        release: float = 0.5,
        gradient_scale: GradientScale = "sum",
    ) -> None:
        super().__init__()
        if gradient_scale not in get_args(GradientScale):
            raise UsageError(
                f"balance gradient_scale={gradient_scale!r} is unknown: use {', '.join(get_args(GradientScale))}"
            )
        self.gradient_scale: GradientScale = gradient_scale
        bounds, times = {"minimum": minimum, "maximum": maximum}, {"hold": hold, "release": release}
        check("0 <= minimum < maximum is needed", lambda low, high: 0 <= low < high, "balance ", **bounds)
        if teacher_share is not None:
            within = "it must be >= 0 and <= 1, or null"
            check(within, lambda x: 0 <= x <= 1, "balance ", teacher_share=teacher_share)
        check("0 <= hold <= release <= 1 is needed", lambda a, b: 0 <= a <= b <= 1, "balance ", **times)
        self.minimum, self.maximum = float(minimum), float(maximum)
        self.teacher_share = teacher_share
        self.hold, self.release = float(hold), float(release)
        self.progress: float | None = None if teacher_share is None else 0.0
        self.equalized_at: AtLogits | AtWeights | None = None
        self.names: tuple[str, ...] = LOSSES

    def connect(self, names: Sequence[str]) -> None:
        """Make what has one entry a loss, before there is an optimizer.

        Args:
            names: of the losses: ``task``, then every distillation loss.

        Raises:
            UsageError: when a setting of the balance names another loss.
        """
        assert names[0] == TASK and len(names) == len(set(names)) > 1, names  # noqa: PT018
        changed = len(names) != len(self.names)
        self.names = tuple(names)
        if changed:
            self._make(len(names))

    def _make(self, count: int) -> None:
        """Register the parameters and buffers that have one entry for each of ``count`` losses."""

    @property
    def needs_output(self) -> bool:
        """Whether it measures gradients at the student's logits."""
        return isinstance(self.equalized_at, AtLogits)

    @abstractmethod
    def propose(self, losses: Tensor, gradients: LossGradients | None) -> tuple[Tensor, Tensor | None]:
        """What this balance wants: the weights (L,), detached, and the term that it learns from, 0-dim, if it learns.

        Args:
            losses: (L,) in the order of :attr:`names`, of this process, detached.
            gradients: of all losses where it measures them, of all processes; only in training and where it does.
        """

    def forward(self, losses: dict[str, Tensor], output: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The total loss, 0-dim, and the weight of each loss in the student's gradient, 0-dim and detached.

        Args:
            losses: by :attr:`names`, 0-dim each.
            output: the student's logits (B, C) with their graph, for a balance that :attr:`needs_output`.

        Raises:
            UsageError: when the logits are needed and missing, or a loss does not depend on what a balance measures at.
        """
        if self.needs_output and output is None:
            raise UsageError(f"balance {type(self).__name__} needs the student's logits: pass output=")
        losses = {name: losses[name] for name in self.names}
        gradients = None
        if self.equalized_at is not None and self.training and torch.is_grad_enabled():
            gradients = self.equalized_at.measure(losses, output)
        values = torch.stack([*losses.values()])
        wanted, term = self.propose(values.detach(), gradients)
        weights = self._bounded(self._led(self._bounded(wanted)))
        loss = (weights * values).sum()
        if term is not None:
            loss = loss + term
        return loss, dict(zip(self.names, weights.unbind(), strict=True))

    def learned(self) -> dict[str, Tensor]:
        """What it has learned that the weights do not say, by name, 0-dim and detached, to be logged."""
        return {}

    def on_epoch_end(self) -> None:
        """Called after every epoch of training, on all processes."""

    def _led(self, wanted: Tensor) -> Tensor:
        """The weights (L,) with the share of distillation that this moment of the training asks for."""
        if self.teacher_share is None:
            return wanted
        assert self.progress is not None
        if self.progress >= self.release:
            return wanted
        total = wanted.sum()
        free = max(0.0, self.progress - self.hold) / max(self.release - self.hold, 1e-12)
        terms = wanted[1:]
        own = terms.sum()
        distill = (1 - free) * self.teacher_share * total + free * own
        shares = torch.where(own > 0, terms / own, torch.full_like(terms, 1 / len(terms)))
        return torch.cat([(total - distill).unsqueeze(0), distill * shares])

    def _bounded(self, weights: Tensor) -> Tensor:
        if self.minimum == 0 and self.maximum == math.inf:  # what is wanted is never negative
            return weights
        return weights.clamp(self.minimum, self.maximum)
