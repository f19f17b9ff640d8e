"""What a regularizer is: a learned weight for every difference between teacher and student."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.regularizers.guards import GUARDS, Guard


class Regularizer(nn.Module, ABC):
    """The learnable module R_phi between teacher T and student S.

    With a divergence map D >= 0, in the published form the squared residual ``(T - S)**2``, distillation counts

        L_adaptive = mean(w * D),   w = R_phi(T, S)**2

    which for the squared residual is ``|| R_phi(T, S) * (T - S) ||**2`` of arXiv 2509.20854. ``forward`` returns
    the weights w. The student sees them detached; phi is trained by :meth:`objective`, whose graph touches nothing
    else. Both players can therefore share one backward pass.

    Args:
        guard: what keeps w from collapsing: a name from ``GUARDS`` or a :class:`Guard`.
        max_weight: upper bound of w, approached smoothly; infinity (``.inf`` in YAML) for none.

    Raises:
        UsageError: when the guard is unknown or the bound is not greater than 1, the weight at the start.
    """

    def __init__(self, guard: Guard | str = "barrier", max_weight: float = 100.0) -> None:
        super().__init__()
        if isinstance(guard, str):
            if guard not in GUARDS:
                raise UsageError(f"guard={guard!r} is unknown: use {', '.join(sorted(GUARDS))} or a Guard class")
            guard = GUARDS[guard]()
        if not max_weight > 1:
            raise UsageError(f"max_weight={max_weight!r} is not possible: it must be greater than 1, or .inf for none")
        self.guard = guard
        self.max_weight = max_weight

    @abstractmethod
    def response(self, teacher: Tensor, student: Tensor) -> Tensor:
        """R_phi >= 0, broadcastable to the divergence map; float32 in, float32 out; 1 before training."""

    def forward(self, teacher: Tensor, student: Tensor) -> Tensor:
        """Weights w >= 0 in float32, broadcastable to the divergence map.

        Args:
            teacher, student: outputs of the two networks, any floating dtype; no gradient flows into them.
        """
        with torch.autocast(teacher.device.type, enabled=False):
            weights = self.response(teacher.detach().float(), student.detach().float()).square()
            return weights / (1 + (weights - 1) / self.max_weight).clamp_min(1.0)

    def penalty(self, weights: Tensor) -> Tensor:
        """The guard's term, 0-dim."""
        return self.guard(weights)

    def objective(self, weights: Tensor, divergence: Tensor) -> Tensor:
        """What phi minimises: the modulated divergence plus the guard's term, 0-dim; only phi gets gradients."""
        return (weights * divergence.detach().float()).mean() + self.penalty(weights)

    @torch.no_grad()
    def summary(self, weights: Tensor) -> dict[str, float]:
        """Mean, spread (standard deviation), minimum and maximum of ``weights``."""
        return {
            "mean": weights.mean().item(),
            "spread": weights.std(correction=0).item(),
            "minimum": weights.min().item(),
            "maximum": weights.max().item(),
        }
