"""Correlations between the samples of a batch."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from lqkd.errors import UsageError
from lqkd.losses.base import DistillationLoss, MapKind
from lqkd.losses.directions import unit
from lqkd.losses.matching import pooled
from lqkd.losses.precision import in_full_precision
from lqkd.losses.settings import positive


class CorrelationCongruence(DistillationLoss):
    """``||K_T - K_S||_F**2 / B**2`` with the kernel ``K_ij = k(u_i, u_j)`` between the samples of a batch.

    Peng et al., arXiv 1904.01802. u is the direction of a sample's vector: of its features, averaged over positions or
    tokens, or of its logits. The Gaussian kernel is ``exp(-gamma * ||u_i - u_j||**2)``, here in full, where the paper
    takes the first terms of its Taylor series; the bilinear one is ``u_i . u_j``. Element i of the map (B,) is the mean
    of row i; the loss is the mean of the map. Rotating all vectors of a network, or scaling each, changes nothing.

    The batch is that of one process.

    Args:
        kernel: ``gaussian`` or ``bilinear``.
        gamma: gamma > 0 of the Gaussian kernel.

    Raises:
        UsageError: when an argument is not possible, or features are no vectors, token sequences or feature maps.

    Examples:
        >>> import torch
        >>> loss = CorrelationCongruence(kernel="bilinear")
        >>> divergence = loss(torch.eye(3), torch.ones(3, 8))  # no two samples alike, against all of them alike
        >>> divergence, loss.reduce(divergence)
        (tensor([0.6667, 0.6667, 0.6667]), tensor(0.6667))
    """

    compares = "features"
    kind: MapKind = "samples"

    def __init__(self, kernel: Literal["gaussian", "bilinear"] = "gaussian", gamma: float = 0.4) -> None:
        super().__init__()
        if kernel not in ("gaussian", "bilinear"):
            raise UsageError(f"kernel={kernel!r} is not possible: use gaussian or bilinear")
        self.kernel = kernel
        self.gamma = positive("gamma", gamma)

    @in_full_precision
    def forward(self, teacher: Tensor, student: Tensor, labels: Tensor | None = None) -> Tensor:
        return (self._congruence(teacher) - self._congruence(student)).square().mean(dim=1)

    def _congruence(self, features: Tensor) -> Tensor:
        directions = unit(pooled("CorrelationCongruence", features), 1)
        products = directions @ directions.t()  # (B, B)
        if self.kernel == "bilinear":
            return products
        squares = directions.square().sum(1)
        distances = squares.unsqueeze(0) + squares.unsqueeze(1) - 2 * products
        return (-self.gamma * distances).exp()

    def reduce(self, divergence: Tensor) -> Tensor:
        return divergence.mean()
