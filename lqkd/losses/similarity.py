"""Which samples of a batch look alike."""

from __future__ import annotations

from torch import Tensor

from lqkd.losses.base import DistillationLoss, MapKind
from lqkd.losses.directions import rescaled, unit
from lqkd.losses.precision import in_full_precision


class SimilarityPreserving(DistillationLoss):
    """``||G_T - G_S||_F**2 / B**2`` with the similarities ``G = F F^T`` of a batch, each row scaled to length 1.

    Tung & Mori, arXiv 1907.09682. F is (B, everything else): features of any two shapes can be compared, and each
    network's may be scaled or rotated. Element i of the map (B,) is the mean of ``(G_T - G_S)**2`` over row i, what the
    similarities of sample i contribute; the loss is its mean. Since rows have length 1, the loss falls as 1 / B with
    the size of the batch. The published weight is 3000 beside the task loss.

    The batch is that of one process.

    Examples:
        >>> import torch
        >>> loss = SimilarityPreserving()
        >>> divergence = loss(torch.eye(3), torch.ones(3, 8, 4, 4))  # no two samples alike, against all of them alike
        >>> divergence.shape, loss.reduce(divergence)
        (torch.Size([3]), tensor(0.2818))
    """

    compares = "features"
    kind: MapKind = "samples"

    @in_full_precision
    def forward(self, teacher: Tensor, student: Tensor, labels: Tensor | None = None) -> Tensor:
        return (_similarities(teacher) - _similarities(student)).square().mean(dim=1)

    def reduce(self, divergence: Tensor) -> Tensor:
        return divergence.mean()


def _similarities(features: Tensor) -> Tensor:
    flat = rescaled(features.flatten(1))
    return unit(flat @ flat.t(), 1)  # (B, B)
