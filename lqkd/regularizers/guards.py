"""Guards: the term that keeps a learnable weight from collapsing.

Minimised over phi, ``w * D`` alone is smallest at w = 0 and distillation is switched off in silence. A guard adds a
term in w whose balance with ``w * D`` has a minimum elsewhere.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Guard(nn.Module, ABC):
    """A term in the weights only, averaged over them: ``forward(weights) -> 0-dim tensor``."""

    @abstractmethod
    def forward(self, weights: Tensor) -> Tensor:
        """The guard's term for ``weights`` >= 0 of any shape."""


class NoGuard(Guard):
    """No term: the literal formula, which collapses to zero weights. Offered so that this can be studied."""

    def forward(self, weights: Tensor) -> Tensor:
        return weights.new_zeros(())


class Barrier(Guard):
    """The logarithmic barrier ``mean(-log w)``: phi minimises ``w * D - log w``, whose optimum is ``w = 1 / D``.

    With ``w = R**2`` and the squared residual this is the negative log-likelihood of a Gaussian residual whose
    variance ``1 / w`` is predicted per element (Kendall et al., arXiv 1705.07115, eq. 5, up to a factor 2).
    """

    def forward(self, weights: Tensor) -> Tensor:
        return -weights.clamp_min(torch.finfo(weights.dtype).tiny).log().mean()


GUARDS: dict[str, type[Guard]] = {"none": NoGuard, "barrier": Barrier}
"""Short names accepted where a guard is asked for."""
