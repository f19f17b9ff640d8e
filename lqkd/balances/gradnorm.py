"""GradNorm, with gradients measured in shared weights, as published, or at the student's logits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lqkd.balances.base import Balance
from lqkd.balances.equalized_at import AtLogits, AtWeights
from lqkd.balances.norms import LossGradients
from lqkd.errors import UsageError
from lqkd.losses.settings import check
from lqkd.utils.reduction import mean_over_processes

_SMALLEST_LOSS = 1e-12


class _NormBalance(Balance):
    """Weights ``w = L softmax(v)`` of L losses, with v trained on the mismatch of gradient norms only.

    ``L_grad = sum_i |G_i - mean(G) * r_i**alpha|`` (eq. 2) with ``G_i`` the norm of the gradient of ``w_i L_i`` and
    ``r_i = (L_i / L_i(0)) / mean_j(L_j / L_j(0))``, the target ``mean(G) * r_i**alpha`` (eq. 1) held: the loss that has
    fallen less is given the larger gradient. Chen et al., "GradNorm" (arXiv 1711.02257), whose weights are renormalised
    to a sum of L after each step (algorithm 1), which the softmax does here. ``L_i(0)`` is the loss of the first batch.
    """

    learning_rate_factor = 10.0
    v: nn.Parameter
    initial: Tensor
    steps: Tensor

    def __init__(
        self, equalized_at: AtLogits | AtWeights, alpha: float, minimum: float, maximum: float, **limits: Any
    ) -> None:
        super().__init__(minimum, maximum, **limits)
        self.equalized_at = equalized_at
        check("it must be a finite number >= 0", lambda x: 0 <= x < math.inf, "balance ", alpha=alpha)
        if not 0 < minimum < 1 < maximum:
            raise UsageError(
                f"balance minimum={minimum!r}, maximum={maximum!r} is not possible for weights of mean 1: "
                "0 < minimum < 1 < maximum is needed"
            )
        self.alpha = float(alpha)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._make(len(self.names))

    def _make(self, count: int) -> None:
        self.v = nn.Parameter(torch.zeros(count))
        smallest = max(self.minimum, 2 - self.maximum) if count == 2 else self.minimum
        self._range = 0.5 * math.log((count - smallest) / smallest)
        self.register_buffer("initial", torch.ones(count))

    def propose(self, losses: Tensor, gradients: LossGradients | None) -> tuple[Tensor, Tensor | None]:
        # Only differences count. Kept where the weights are within their bounds, they cannot run away.
        self.v.data.sub_(self.v.data.mean()).clamp_(-self._range, self._range)
        weights = len(losses) * self.v.softmax(0)
        if gradients is None:
            return weights.detach(), None
        values = mean_over_processes(losses).clamp(_SMALLEST_LOSS, 1e12)
        # A batch without labels has no task loss, and none of the first batch's is known then.
        self.initial.copy_(torch.where((self.steps == 0) | (self.initial <= _SMALLEST_LOSS), values, self.initial))
        self.steps.add_(1)
        norms = weights * gradients.norms
        rates = values / self.initial
        target = norms.detach().mean() * (rates / rates.mean()) ** self.alpha
        return weights.detach(), (norms - target).abs().sum()


class GradNorm(_NormBalance):
    """GradNorm: weights of mean 1, trained so that the loss that has fallen less gets the larger gradient.

    ``L_grad = sum_i |G_i - mean(G) * r_i**alpha|``, minimised over the weights alone, with ``G_i`` the norm of the
    gradient of ``w_i L_i`` in the weights of a layer that all losses reach
    (:func:`~lqkd.balances.norms.weight_gradients`) and ``r_i = (L_i / L_i(0)) / mean_j(L_j / L_j(0))``,
    the target ``mean(G) * r_i**alpha`` held. Chen et al., "GradNorm" (arXiv 1711.02257), eq. 1, 2 and algorithm 1.
    ``w = L softmax(v)`` keeps the sum, L for L losses. ``L_i(0)`` is the loss of the first batch.

    Of two losses every weight is at most 2: where distillation needs a weight of 100 beside the task's 1, as losses
    that average over the elements of features do, the task's falls to 0.02 and the student's step with it, by the sum.
    There a higher learning rate is needed, or :class:`GradientBalance`.

    Each batch costs a backward pass more for each loss, from it to the layer.

    Args:
        shared: name of the module of the student in whose weights gradients are measured, those of its quantizers left
            out; null for the last layer with weights that the logits and all tensors that are compared depend on: for
            features the last one before the shallowest tap, for logits the last of all.
        alpha: how strongly the target follows the training rates, >= 0.
        minimum: lower bound of each weight, > 0 and < 1.
        maximum: upper bound of each weight, > 1; the mean of all is 1.
        **limits: ``teacher_share``, ``hold``, ``release`` and ``gradient_scale`` of :class:`Balance`.

    Raises:
        UsageError: when alpha is negative, the bounds do not enclose 1, or not every loss reaches the module.

    Examples:
        >>> student = nn.Sequential(nn.Linear(2, 3))
        >>> balance = GradNorm(shared="0")
        >>> balance.equalized_at.bind(student)
        >>> output = student(torch.ones(4, 2))
        >>> _, weights = balance({"task": output.square().mean(), "distill": output.exp().mean()})
        >>> weights
        {'task': tensor(1.), 'distill': tensor(1.)}
    """

    def __init__(
        self,
        shared: str | None = None,
        alpha: float = 1.5,
        minimum: float = 1e-3,
        maximum: float = 2.0,
        **limits: Any,
    ) -> None:
        super().__init__(AtWeights(shared), alpha, minimum, maximum, **limits)


class OutputGradNorm(_NormBalance):
    """GradNorm at the logits: that of :class:`GradNorm`, with ``G_i`` the norm of the gradient at the logits.

    It (:func:`~lqkd.balances.norms.output_gradients`) costs no pass through the network and leaves out what the network
    does to both gradients.

    Args:
        alpha: how strongly the target follows the training rates, >= 0.
        minimum: lower bound of each weight, > 0 and < 1.
        maximum: upper bound of each weight, > 1; the mean of all is 1.
        **limits: ``teacher_share``, ``hold``, ``release`` and ``gradient_scale`` of :class:`Balance`.

    Raises:
        UsageError: when alpha is negative, the bounds do not enclose 1, or a loss does not depend on the logits.

    Examples:
        >>> balance = OutputGradNorm()
        >>> output = torch.ones(4, 3, requires_grad=True)
        >>> total, weights = balance({"task": output.square().mean(), "distill": output.exp().mean()}, output)
        >>> weights
        {'task': tensor(1.), 'distill': tensor(1.)}
    """

    def __init__(self, alpha: float = 1.5, minimum: float = 1e-3, maximum: float = 2.0, **limits: Any) -> None:
        super().__init__(AtLogits(), alpha, minimum, maximum, **limits)
