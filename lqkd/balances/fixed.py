"""Constant weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lqkd.balances.base import Balance
from lqkd.balances.norms import LossGradients
from lqkd.errors import UsageError
from lqkd.losses.settings import check


class FixedBalance(Balance):
    """``L = task * L_task + distill * L_distill`` with constants; ``distill`` is the lambda of the method.

    Args:
        task: weight of the task loss, >= 0.
        distill: weight of every distillation loss that ``terms`` does not name, >= 0.
        terms: weights of distillation losses by name, >= 0; null for ``distill`` throughout.
        **limits: ``minimum``, ``maximum``, ``teacher_share``, ``hold``, ``release`` and ``gradient_scale`` of
            :class:`Balance`.

    Raises:
        UsageError: when a weight is negative or not finite, or all are zero; by :meth:`connect` when there is no loss
            of a name.

    Examples:
        >>> balance = FixedBalance(task=1.0, distill=0.5, terms={"features": 100.0})
        >>> balance.connect(["task", "logits", "features"])
        >>> losses = {"task": torch.tensor(2.0), "logits": torch.tensor(1.0), "features": torch.tensor(0.01)}
        >>> total, weights = balance(losses)
        >>> total, weights
        (tensor(3.5000), {'task': tensor(1.), 'logits': tensor(0.5000), 'features': tensor(100.)})
    """

    constants: Tensor

    def __init__(
        self, task: float = 1.0, distill: float = 1.0, terms: Mapping[str, float] | None = None, **limits: Any
    ) -> None:
        super().__init__(**limits)
        self.terms = dict(terms or {})
        check_weights(task=task, distill=distill, **{f"terms.{name}": value for name, value in self.terms.items()})
        self.task, self.distill = float(task), float(distill)
        if task == distill == sum(self.terms.values()) == 0:
            raise UsageError("balance task=0 and distill=0 leave nothing to train on: one must be greater than 0")
        self._fill()

    def connect(self, names: Sequence[str]) -> None:
        super().connect(names)
        unknown = [name for name in self.terms if name not in names[1:]]
        if unknown:
            raise UsageError(
                f"balance terms.{unknown[0]} is the weight of no distillation loss: there are {', '.join(names[1:])}"
            )
        self._fill()
        if not self.constants.any():
            raise UsageError(f"balance weights of {', '.join(names)} are all 0: one must be greater than 0")

    def _fill(self) -> None:
        weights = [self.task, *(self.terms.get(name, self.distill) for name in self.names[1:])]
        self.register_buffer("constants", torch.tensor(weights), persistent=False)

    def propose(self, losses: Tensor, gradients: LossGradients | None) -> tuple[Tensor, None]:
        return self.constants, None


def check_weights(**weights: float) -> None:
    """Raise :class:`UsageError` when a weight is no number, negative, or not finite."""
    for name, value in weights.items():
        check("a weight is a finite number >= 0", lambda x: 0 <= x < math.inf, "balance ", **{name: value})
