"""A trainable scalar for each loss: weights that follow the size of the losses."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lqkd.balances.base import Balance
from lqkd.balances.norms import LossGradients
from lqkd.errors import UsageError
from lqkd.utils.reduction import mean_over_processes

_LARGEST_WEIGHTED_LOSS = 10.0  # that a scalar learns from


class _ScalarBalance(Balance):
    """Minimises ``sum_i w_i L_i + penalty(s_i)`` over a scalar s_i for each loss, held, with ``log w_i`` linear in s_i.

    Before each use the scalars are moved back to where the weights are within their bounds, as projected gradient
    descent does. Bounds on the weights alone would let a scalar run away beyond them, and it would take as long to
    come back.

    At the optimum ``w_i L_i`` is at most 1. A scalar learns from at most 10 of it, or one exploding batch would fill
    the second moment of Adam and stop it for thousands of steps. What it learns from is the mean loss of all
    processes.
    """

    learning_rate_factor = 10.0  # scalars on a log scale: Adam moves each by about one learning rate a step
    scalars: nn.Parameter
    slope: ClassVar[float]
    """Change of log w with s."""
    at_zero: ClassVar[float]
    """log w where s is 0, the start."""

    def __init__(self, minimum: float = 1e-3, maximum: float = 100.0, **limits: Any) -> None:
        super().__init__(minimum, maximum, **limits)
        if not (minimum > 0 and math.isfinite(maximum)):
            raise UsageError(
                f"balance minimum={minimum!r}, maximum={maximum!r} is not possible for {type(self).__name__}, whose "
                "scalars are on a log scale: 0 < minimum < maximum < inf is needed"
            )
        self._make(len(self.names))
        ends = [(math.log(bound) - self.at_zero) / self.slope for bound in (minimum, maximum)]
        self._range = min(ends), max(ends)

    def _make(self, count: int) -> None:
        self.scalars = nn.Parameter(torch.zeros(count))

    @abstractmethod
    def penalty(self, scalars: Tensor) -> Tensor:
        """What keeps each weight from vanishing, in the shape of the scalars."""

    def propose(self, losses: Tensor, gradients: LossGradients | None) -> tuple[Tensor, Tensor]:
        self.scalars.data.clamp_(*self._range)
        weights = (self.at_zero + self.slope * self.scalars).exp()
        constant = weights.detach()
        seen = mean_over_processes(losses).minimum(_LARGEST_WEIGHTED_LOSS / constant)
        # The difference is 0 and has the gradient of w * L: the student's own sum has that value already.
        return constant, ((weights - constant) * seen + self.penalty(self.scalars)).sum()


class UncertaintyBalance(_ScalarBalance):
    """Uncertainty weighting: ``L = sum_i L_i / (2 sigma_i**2) + log sigma_i``, learned as ``s_i = log sigma_i**2``.

    Kendall et al., "Multi-Task Learning Using Uncertainty to Weigh Losses" (arXiv 1705.07115), in the form for
    regression; with s it is ``L_i exp(-s_i) / 2 + s_i / 2``. All scalars start at 0, weights 1/2. For a constant loss
    the weight becomes ``1 / (2 L)``. The term ``s / 2`` may be negative, and the total loss with it.

    Args:
        minimum: lower bound of each weight, > 0.
        maximum: upper bound of each weight, finite.
        **limits: ``teacher_share``, ``hold``, ``release`` and ``gradient_scale`` of :class:`Balance`.

    Raises:
        UsageError: when the bounds are not possible.

    Examples:
        >>> balance = UncertaintyBalance()
        >>> total, weights = balance({"task": torch.tensor(2.0), "distill": torch.tensor(1.0)})
        >>> total.detach(), weights
        (tensor(1.5000), {'task': tensor(0.5000), 'distill': tensor(0.5000)})
    """

    slope = -1.0
    at_zero = -math.log(2)

    def penalty(self, scalars: Tensor) -> Tensor:
        return scalars / 2


class ImpartialBalance(_ScalarBalance):
    """IMTL-L: ``L = sum_i exp(s_i) L_i - s_i``, which makes every weighted loss equal to 1.

    Liu et al., "Towards Impartial Multi-task Learning" (ICLR 2021), the balance of losses. All scalars start at 0,
    weights 1. For a constant loss the weight becomes ``1 / L``. The term ``-s`` may be negative, and the total loss
    with it.

    Args:
        minimum: lower bound of each weight, > 0.
        maximum: upper bound of each weight, finite.
        **limits: ``teacher_share``, ``hold``, ``release`` and ``gradient_scale`` of :class:`Balance`.

    Raises:
        UsageError: when the bounds are not possible.

    Examples:
        >>> balance = ImpartialBalance()
        >>> total, weights = balance({"task": torch.tensor(2.0), "distill": torch.tensor(1.0)})
        >>> total.detach(), weights
        (tensor(3.), {'task': tensor(1.), 'distill': tensor(1.)})
    """

    slope = 1.0
    at_zero = 0.0

    def penalty(self, scalars: Tensor) -> Tensor:
        return -scalars


class BoundedUncertaintyBalance(_ScalarBalance):
    """Trainable scalars: ``L = sum_i L_i / (2 c_i**2) + log(1 + c_i**2)``, for two losses our reading of GoR.

    The form is that of Liebel & Koerner, "Auxiliary Tasks in Multi-task Learning" (arXiv 1805.06334, eq. 4), a
    variant of uncertainty weighting (Kendall et al., arXiv 1705.07115) whose second term cannot become negative. The
    published description of GoR (arXiv 2509.20854) has two trainable scalars between task and distillation loss but
    its formula was not available, so this is not claimed to be it. Learned as ``s = log c``; every c starts at 1,
    weights 1/2. For a constant loss ``c**2`` becomes ``(L + sqrt(L**2 + 8 L)) / 4``.

    Args:
        minimum: lower bound of each weight ``1 / (2 c**2)``, > 0.
        maximum: upper bound of each weight, finite.
        **limits: ``teacher_share``, ``hold``, ``release`` and ``gradient_scale`` of :class:`Balance`.

    Raises:
        UsageError: when the bounds are not possible.

    Examples:
        >>> balance = BoundedUncertaintyBalance()
        >>> _, weights = balance({"task": torch.tensor(2.0), "distill": torch.tensor(1.0)})
        >>> weights
        {'task': tensor(0.5000), 'distill': tensor(0.5000)}
    """

    slope = -2.0
    at_zero = -math.log(2)

    def penalty(self, scalars: Tensor) -> Tensor:
        return F.softplus(2 * scalars)
