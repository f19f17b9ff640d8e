"""Balances: how much the task loss and the distillation loss count against each other."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from lqkd.errors import UsageError


class Balance(nn.Module, ABC):
    """``forward(losses) -> (total, weights)`` for 0-dim losses ``{"task": ..., "distill": ...}``.

    ``total`` is what is minimised, gradients of the balance's own parameters included; ``weights`` are the detached
    factors with which each loss enters the student's gradient, for the log.
    """

    learning_rate_factor = 1.0
    """Multiplies the regularizer optimizer's learning rate for the parameters of this balance."""

    @abstractmethod
    def forward(self, losses: dict[str, Tensor], output: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Total loss, 0-dim, and the weight of each loss, 0-dim and detached."""


class FixedBalance(Balance):
    """``L = task * L_task + distill * L_distill`` with constants; ``distill`` is the lambda of the method.

    Args:
        task: weight of the task loss, >= 0.
        distill: weight of the distillation loss, >= 0.

    Raises:
        UsageError: when a weight is negative or not finite, or both are zero.
    """

    def __init__(self, task: float = 1.0, distill: float = 1.0) -> None:
        super().__init__()
        for name, value in (("task", task), ("distill", distill)):
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(f"balance {name}={value!r} is not possible: a weight is a finite number >= 0")
        if task == distill == 0:
            raise UsageError("balance task=0 and distill=0 leave nothing to train on: one must be greater than 0")
        self.weights = {"task": float(task), "distill": float(distill)}

    def forward(self, losses: dict[str, Tensor], output: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        total = torch.stack([self.weights[name] * loss for name, loss in losses.items()]).sum()
        return total, {name: loss.new_tensor(self.weights[name]) for name, loss in losses.items()}


class BoundedUncertaintyBalance(Balance):
    """Two trainable scalars: ``L = sum_i L_i / (2 c_i**2) + log(1 + c_i**2)``, our reading of GoR.

    The form is that of Liebel & Koerner, "Auxiliary Tasks in Multi-task Learning" (arXiv 1805.06334, eq. 4), a
    variant of uncertainty weighting (Kendall et al., arXiv 1705.07115) whose second term cannot become negative. The
    published description of GoR (arXiv 2509.20854) has two trainable scalars between task and distillation loss but
    its formula was not available, so this is not claimed to be it. Both scalars start at 1, weights 1/2. They are
    learned as ``log c = B tanh(p / B)``, which keeps each c within ``[1 / maximum, maximum]`` with a finite gradient.

    Args:
        maximum: bound of both scalars, > 1.

    Raises:
        UsageError: when the bound is not greater than 1.
    """

    learning_rate_factor = 10.0  # two scalars on a log scale: Adam moves each by about one learning rate a step

    def __init__(self, maximum: float = 20.0) -> None:
        super().__init__()
        if not (math.isfinite(maximum) and maximum > 1):
            raise UsageError(f"balance maximum={maximum!r} is not possible: it must be a finite number greater than 1")
        self.bound = math.log(maximum)
        self.task = nn.Parameter(torch.zeros(()))
        self.distill = nn.Parameter(torch.zeros(()))

    def scalars(self) -> dict[str, Tensor]:
        """The scalars c, 0-dim each, differentiable."""
        raw = {"task": self.task, "distill": self.distill}
        return {name: (self.bound * (p / self.bound).tanh()).exp() for name, p in raw.items()}

    def forward(self, losses: dict[str, Tensor], output: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        scalars = self.scalars()
        weights = {name: 0.5 / scalars[name].square() for name in losses}
        terms = [weights[name] * loss + scalars[name].square().log1p() for name, loss in losses.items()]
        return torch.stack(terms).sum(), {name: weight.detach() for name, weight in weights.items()}
