"""Weights that give the gradients of the losses a ratio, at the student's logits or in shared weights."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from lqkd.balances.base import Balance
from lqkd.balances.equalized_at import AtLogits, AtWeights
from lqkd.balances.norms import SMALLEST_NORM, LossGradients
from lqkd.losses.settings import check


class _RatioBalance(Balance):
    """``sum_k w_k * G_k = ratio * w_task * G_task``, each of K distillation losses with an equal part of it.

    G is a geometric running mean over the steps.
    """

    log_norms: Tensor
    steps: Tensor

    def __init__(self, equalized_at: AtLogits | AtWeights, ratio: float, momentum: float, **limits: Any) -> None:
        super().__init__(**limits)
        check("it must be a finite number greater than 0", lambda x: 0 < x < math.inf, "balance ", ratio=ratio)
        check("it must be >= 0 and < 1", lambda x: 0 <= x < 1, "balance ", momentum=momentum)
        self.equalized_at = equalized_at
        self.ratio, self.momentum = float(ratio), float(momentum)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._make(len(self.names))

    def _make(self, count: int) -> None:
        self.register_buffer("log_norms", torch.zeros(count))  # running means that start at 0, corrected where used

    def propose(self, losses: Tensor, gradients: LossGradients | None) -> tuple[Tensor, Tensor | None]:
        if gradients is not None:
            counts = gradients.norms[0] > SMALLEST_NORM  # a batch without labels has no task, and says nothing of both
            updated = self.log_norms.lerp(gradients.norms.log(), 1 - self.momentum)
            self.log_norms.copy_(torch.where(counts, updated, self.log_norms))
            self.steps.add_(counts)
        seen = 1 - self.momentum ** self.steps.clamp_min(1)
        means = self.log_norms / seen
        return self._weights(means[0] - means[1:]), None

    @abstractmethod
    def _weights(self, quotients: Tensor) -> Tensor:
        """All weights, (1 + K,), from ``log(G_task / G_k)`` of the K distillation losses, (K,)."""


class GradientBalance(_RatioBalance):
    """Gradients of a ratio in shared weights: ``w_distill * G_distill = ratio * w_task * G_task``.

    G is the norm of a loss's gradient in the weights of a layer that all losses reach
    (:func:`~lqkd.balances.norms.weight_gradients`), as a geometric running mean over the steps, which no
    single batch can dominate. All norms add up to the task's, ``w_task * G_task + w_distill * G_distill = G_task``, so
    that the student's learning rate means what it means for the task alone: ``w_task = 1 / (1 + ratio)``, and
    ``w_distill`` is whatever size of the distillation loss asks for; of several distillation losses each has an equal
    part of the norm. The form is our own, not a published one.

    Each batch costs a backward pass more for each loss, from it to the layer.

    Args:
        shared: name of the module of the student in whose weights gradients are measured; null for the layer that
            :class:`~lqkd.balances.GradNorm` finds.
        ratio: gradient of the distillation loss relative to that of the task loss, > 0.
        momentum: of the running mean, >= 0 and < 1: it looks back on about ``1 / (1 - momentum)`` batches.
        maximum: upper bound of each weight, > ``minimum``: that of a distillation loss that vanishes.
        **limits: ``minimum``, ``teacher_share``, ``hold``, ``release`` and ``gradient_scale`` of :class:`Balance`.

    Raises:
        UsageError: when ratio or momentum is out of range, or not every loss reaches the module.

    Examples:
        >>> student = nn.Sequential(nn.Linear(2, 3))
        >>> balance = GradientBalance(shared="0", ratio=1.0)
        >>> balance.equalized_at.bind(student)
        >>> output = student(torch.ones(4, 2))
        >>> _, weights = balance({"task": output.sum(), "distill": 10 * output.sum()})
        >>> weights
        {'task': tensor(0.5000), 'distill': tensor(0.0500)}
    """

    def __init__(
        self,
        shared: str | None = None,
        ratio: float = 1.0,
        momentum: float = 0.99,
        maximum: float = 1e5,
        **limits: Any,
    ) -> None:
        super().__init__(AtWeights(shared), ratio, momentum, maximum=maximum, **limits)

    def _weights(self, quotients: Tensor) -> Tensor:
        share = self.ratio / (1 + self.ratio)
        return torch.cat([torch.full_like(quotients[:1], 1 - share), share / len(quotients) * quotients.exp()])


class OutputGradientBalance(_RatioBalance):
    """Equal gradients at the logits: ``w_distill * G_distill = ratio * w_task * G_task``, with weights of sum 1.

    G is the root mean square over the samples of the norm of a loss's gradient at their logits
    (:func:`~lqkd.balances.norms.output_gradients`), as a geometric running mean over the steps, which no single batch
    can dominate. With a sum of 1 the student's learning rate means what it means with fixed weights of that sum: twice
    the sum is twice the rate, which at 2 bits can cost more than any balance gains. It costs a backward pass through
    each loss alone, none through the network. Of several distillation losses each has an equal part of the ratio. The
    weights say nothing about how large the losses are: a student far from its teacher keeps hearing it.

    The form is our own, not a published one.

    Args:
        ratio: gradient of the distillation loss relative to that of the task loss, > 0.
        momentum: of the running mean, >= 0 and < 1: it looks back on about ``1 / (1 - momentum)`` batches.
        **limits: ``minimum``, ``maximum``, ``teacher_share``, ``hold``, ``release`` and ``gradient_scale`` of
            :class:`Balance`.

    Raises:
        UsageError: when ratio or momentum is out of range, or a loss does not depend on the logits.

    Examples:
        >>> output = torch.zeros(4, 3, requires_grad=True)
        >>> losses = {"task": output.sum(), "distill": 3 * output.sum()}
        >>> _, weights = OutputGradientBalance(ratio=1.0)(losses, output)
        >>> weights
        {'task': tensor(0.7500), 'distill': tensor(0.2500)}
    """

    def __init__(self, ratio: float = 1.0, momentum: float = 0.99, **limits: Any) -> None:
        super().__init__(AtLogits(), ratio, momentum, **limits)

    def _weights(self, quotients: Tensor) -> Tensor:
        odds = self._log_ratio() + quotients - math.log(len(quotients))  # of each against the task
        share = odds.logsumexp(0).sigmoid()
        return torch.cat([(1 - share).unsqueeze(0), share * odds.softmax(0)])

    def _log_ratio(self) -> Tensor | float:
        """Of the target, detached; one for all distillation losses or (K,)."""
        return math.log(self.ratio)


class LearnableRatioBalance(OutputGradientBalance):
    """The same with a target ratio that is learned: more of the teacher while its gradient agrees with the task's.

    ``rho``, the logarithm of the target, minimises ``(rho - log ratio)**2 / 2 - a * log(span) * rho``, with ``a`` the
    cosine of the angle between both gradients at the logits, of all samples of all processes, held. For a constant a
    the target becomes ``ratio * span**a``.

    Each of several distillation losses has a target of its own. The second term is the price of
    :class:`~lqkd.regularizers.LookAhead`, for the loss as a whole: a step along the distillation gradient at the logits
    lowers the task loss by ``<grad task, grad distill>`` times its size, to first order; divided by both norms, it does
    not change with the scale of either loss. The first term is needed. Without it the sign of a would decide, and rho
    would go to a bound. Nor would it do to minimise the task loss after the whole step: of the same samples the task's
    own gradient lowers it the most, and rho would always go to its lower bound.

    So a ratio is learned that lies between ``ratio / span`` and ``ratio * span``, where rho is also moved back to
    before each use. It does not know which ratio generalises best. The form is our own, not a published one.

    Args:
        ratio: of the gradients where they are orthogonal, > 0, and at first.
        span: the factor by which full agreement raises and full opposition lowers it, > 1.
        momentum: of the running mean of the norms, >= 0 and < 1.
        **limits: ``minimum``, ``maximum``, ``teacher_share``, ``hold``, ``release`` and ``gradient_scale`` of
            :class:`Balance`.

    Raises:
        UsageError: when ratio, span or momentum is out of range, or a loss does not depend on the logits.

    Examples:
        >>> balance = LearnableRatioBalance(ratio=1.0, span=2.0)
        >>> output = torch.zeros(4, 3, requires_grad=True)
        >>> _, weights = balance({"task": output.sum(), "distill": 3 * output.sum()}, output)
        >>> weights, balance.learned()
        ({'task': tensor(0.7500), 'distill': tensor(0.2500)}, {'ratio': tensor(1.)})
    """

    learning_rate_factor = 10.0
    rho: nn.Parameter

    def __init__(self, ratio: float = 1.0, span: float = 2.0, momentum: float = 0.99, **limits: Any) -> None:
        super().__init__(ratio, momentum, **limits)
        check("it must be a finite number greater than 1", lambda x: 1 < x < math.inf, "balance ", span=span)
        self.span = float(span)

    def _make(self, count: int) -> None:
        super()._make(count)
        shape = () if count == 2 else (count - 1,)
        self.rho = nn.Parameter(torch.full(shape, math.log(self.ratio)))

    def propose(self, losses: Tensor, gradients: LossGradients | None) -> tuple[Tensor, Tensor | None]:
        start, reach = math.log(self.ratio), math.log(self.span)
        self.rho.data.copy_(self._log_ratio())
        weights, _ = super().propose(losses, gradients)
        if gradients is None:
            return weights, None
        # The two terms of the docstring, up to a constant: never negative, and 0 where there is nothing to learn.
        return weights, (self.rho - start - reach * gradients.cosines).square().sum() / 2

    def learned(self) -> dict[str, Tensor]:
        """``ratio``, the target; ``ratio/NAME`` where there are several distillation losses."""
        ratios = self._log_ratio().exp()
        if ratios.ndim == 0:
            return {"ratio": ratios}
        return {f"ratio/{name}": ratio for name, ratio in zip(self.names[1:], ratios.unbind(), strict=True)}

    def _log_ratio(self) -> Tensor:
        start, reach = math.log(self.ratio), math.log(self.span)
        return self.rho.detach().clamp(start - reach, start + reach)
