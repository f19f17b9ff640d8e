"""Guards: what keeps a learnable weight from collapsing.

Minimised over phi, ``w * D`` alone is smallest at w = 0 and distillation is switched off in silence. A guard adds a
term in w whose balance with ``w * D`` has a minimum elsewhere, or keeps the weights where they cannot all vanish.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from lqkd.losses.settings import check, positive
from lqkd.utils.reduction import mean_over_batch


class Guard(nn.Module, ABC):
    """A constraint on the weights and a term in them: ``constrain(weights)``, then ``forward(weights, scale)``.

    Examples:
        >>> class Spring(Guard):
        ...     def forward(self, weights, scale):
        ...         return scale * (weights - 1).square().mean()
        >>> Spring()(torch.tensor([1.0, 3.0]), scale=torch.tensor(0.5))
        tensor(1.)
    """

    limits_above: ClassVar[bool] = False
    """Whether the weights stay finite under a player that wants them large."""

    def constrain(self, weights: Tensor) -> Tensor:
        """The weights that are used, from unconstrained ones >= 0 of any shape; 1 stays 1."""
        return weights

    @abstractmethod
    def forward(self, weights: Tensor, scale: Tensor) -> Tensor:
        """The guard's term, 0-dim.

        Args:
            weights: >= 0, any shape, constrained.
            scale: 0-dim, the mean size of what the weights are multiplied by in this process; no gradient.
        """

    def optimum(self, divergence: Tensor, scale: Tensor | None = None) -> Tensor | None:
        """The weights at which ``mean(w * divergence)`` plus this guard's term is smallest, element by element.

        What a regularizer that could give every element any weight would arrive at, before its ``max_weight``.

        Args:
            divergence: any shape, no gradient; negative ones are those that a maximising player pays.
            scale: see :meth:`forward`; the mean of ``divergence`` when None.

        Returns:
            A tensor in the shape of ``divergence``; None where there is no closed form.
        """
        return None


class NoGuard(Guard):
    """No term: the literal formula, which collapses to zero weights. Offered so that this can be studied.

    Examples:
        >>> NoGuard()(torch.tensor([1.0, 3.0]), scale=torch.tensor(0.5))
        tensor(0.)
    """

    def forward(self, weights: Tensor, scale: Tensor) -> Tensor:
        return weights.new_zeros(())

    def optimum(self, divergence: Tensor, scale: Tensor | None = None) -> Tensor:
        return torch.zeros_like(divergence)


class Barrier(Guard):
    """The logarithmic barrier ``mean(-log w)``: phi minimises ``w * D - log w``, whose optimum is ``w = 1 / D``.

    With ``w = R**2`` and the squared residual this is the negative log-likelihood of a Gaussian residual whose
    variance ``1 / w`` is predicted per element (Kendall et al., arXiv 1705.07115, eq. 5, up to a factor 2).

    Examples:
        >>> guard = Barrier()
        >>> guard(torch.tensor([1.0, 0.5]), scale=torch.tensor(1.0))
        tensor(0.3466)
        >>> guard.optimum(torch.tensor([0.5, 4.0]))
        tensor([2.0000, 0.2500])
    """

    def forward(self, weights: Tensor, scale: Tensor) -> Tensor:
        return -_positive(weights).log().mean()

    def optimum(self, divergence: Tensor, scale: Tensor | None = None) -> Tensor:
        return 1 / divergence


class BoundedBarrier(Guard):
    """``mean(log(1 + 1 / (2 w)))``, a barrier that is never negative: with it ``w = (sqrt(1 + 8 / D) - 1) / 4``.

    The regularising term of Liebel & Koerner (arXiv 1805.06334, eq. 4), ``log(1 + c**2)``, in terms of the weight
    ``w = 1 / (2 c**2)``. For large D the weight is ``1 / D``, as with the barrier; for small ones ``1 / sqrt(2 D)``,
    which does not chase elements that match already.

    Examples:
        >>> guard = BoundedBarrier()
        >>> guard(torch.tensor([0.5, 0.5]), scale=torch.tensor(1.0))
        tensor(0.6931)
        >>> guard.optimum(torch.tensor([1.0, 8.0]))
        tensor([0.5000, 0.1036])
    """

    def forward(self, weights: Tensor, scale: Tensor) -> Tensor:
        weights = _positive(weights)
        return ((weights + 0.5).log() - weights.log()).mean()  # not log1p(1 / ...), whose gradient overflows

    def optimum(self, divergence: Tensor, scale: Tensor | None = None) -> Tensor:
        return 2 / (divergence + divergence.sqrt() * (divergence + 8).sqrt())  # not rounded to zero


class MeanOne(Guard):
    """Weights are divided by their mean over the batch, all processes together.

    Not enough on its own: minimising ``mean(w * D)`` over weights of mean one moves all of them to the smallest
    divergence, the element that matches already. Meant for players that do not minimise it.

    Examples:
        >>> MeanOne().constrain(torch.tensor([1.0, 3.0]))
        tensor([0.5000, 1.5000])
    """

    limits_above = True

    def constrain(self, weights: Tensor) -> Tensor:
        return weights / mean_over_batch(_positive(weights))

    def forward(self, weights: Tensor, scale: Tensor) -> Tensor:
        return weights.new_zeros(())


class Entropy(MeanOne):
    """Weights of mean one with an entropy term: the optimum is ``w = N softmax(-D / (temperature * mean(D)))``.

    The term is ``temperature * scale * mean(w log w)``. A player that maximises finds ``N softmax(+D / ...)``, the
    weights of distributionally robust optimisation within a Kullback-Leibler ball (Hu & Hong, 2013). The temperature
    is relative to the mean divergence, so that it means the same in every phase of training; infinity would be
    uniform weights.

    Args:
        temperature: > 0.

    Raises:
        UsageError: when the temperature is not a positive number.

    Examples:
        >>> guard = Entropy(temperature=1.0)
        >>> guard.constrain(torch.tensor([1.0, 3.0]))
        tensor([0.5000, 1.5000])
        >>> guard.optimum(torch.tensor([0.0, 2.0]))
        tensor([1.7616, 0.2384])
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = positive("temperature", temperature, "guard ")

    def forward(self, weights: Tensor, scale: Tensor) -> Tensor:
        return self.temperature * mean_over_batch(scale) * (weights * _positive(weights).log()).mean()

    def optimum(self, divergence: Tensor, scale: Tensor | None = None) -> Tensor:
        """As above; the softmax is over the elements of ``divergence`` alone, also where processes share a batch."""
        scale = divergence.mean() if scale is None else scale
        logits = -divergence / (self.temperature * scale).clamp_min(torch.finfo(divergence.dtype).tiny)
        return logits.flatten().softmax(dim=0).view_as(logits) * logits.numel()


class BoundedRange(Guard):
    """Weights between two bounds, approached smoothly: ``low + (high - low) * w / (w + (high - 1) / (1 - low))``.

    Nothing else: a player that minimises goes to the lower bound, which is then a fixed weight.

    Args:
        low: lower bound, >= 0 and < 1.
        high: upper bound, > 1.

    Raises:
        UsageError: when the bounds do not enclose 1, where every weight starts.

    Examples:
        >>> BoundedRange(low=0.2, high=5.0).constrain(torch.tensor([0.0, 1.0, 1e6]))
        tensor([0.2000, 1.0000, 5.0000])
    """

    limits_above = True

    def __init__(self, low: float = 0.2, high: float = 5.0) -> None:
        super().__init__()
        bounds = {"low": low, "high": high}
        check("0 <= low < 1 < high is needed", lambda low, high: 0 <= low < 1 < high < math.inf, "guard ", **bounds)
        self.low, self.high = float(low), float(high)

    def constrain(self, weights: Tensor) -> Tensor:
        middle = (self.high - 1) / (1 - self.low)
        # Written so that infinitely large weights stay finite.
        return self.high - (self.high - self.low) * middle / (weights + middle)

    def forward(self, weights: Tensor, scale: Tensor) -> Tensor:
        return weights.new_zeros(())

    def optimum(self, divergence: Tensor, scale: Tensor | None = None) -> Tensor:
        """The bounds; 1 where the divergence is zero and no weight is better than another."""
        return 1 + (self.low - 1) * (divergence > 0) + (self.high - 1) * (divergence < 0)


GUARDS: dict[str, type[Guard]] = {
    "none": NoGuard,
    "barrier": Barrier,
    "bounded_barrier": BoundedBarrier,
    "mean_one": MeanOne,
    "entropy": Entropy,
    "bounded": BoundedRange,
}
"""Short names accepted where a guard is asked for."""


def _positive(weights: Tensor) -> Tensor:
    """At least 1e-30: the smallest normal number has a reciprocal whose products overflow."""
    return weights.clamp_min(1e-30)
