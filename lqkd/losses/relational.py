"""Distances and angles between the samples of a batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lqkd.losses.base import DistillationLoss, MapKind
from lqkd.losses.directions import rescaled, unit
from lqkd.losses.matching import pooled
from lqkd.losses.precision import in_full_precision
from lqkd.losses.settings import weights


class RKD(DistillationLoss):
    """Relational knowledge distillation: ``distance * L_D + angle * L_A``.

    Park et al., arXiv 1904.05068. With vectors x_i (features averaged over positions or tokens, or logits) and h the
    Huber loss of width 1, L_D is the mean of ``h(d_T(i, j), d_S(i, j))`` over ordered pairs of distinct samples, where
    ``d(i, j) = ||x_i - x_j||`` over its mean, and L_A that of ``h(c_T(i, j, k), c_S(i, j, k))`` over ordered triples of
    distinct samples, c the cosine of the angle at x_j between x_i and x_k.

    Element j of the map (B,) is what sample j contributes, as one end of the distances and as the vertex of the angles;
    the loss is the mean. Moving, rotating or scaling a network's features as a whole changes nothing, and the
    numbers of channels need not agree. L_D is 0 for a batch of one, L_A for one of two too. Memory grows with C * B**2
    and B**3.

    The batch is that of one process.

    Args:
        distance: weight of the distances, >= 0.
        angle: weight of the angles, >= 0.

    Raises:
        UsageError: when a weight is out of range, or features are no vectors, token sequences or feature maps.

    Examples:
        >>> loss = RKD()
        >>> teacher = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
        >>> loss(teacher, teacher.roll(1, dims=0)).shape
        torch.Size([3])
        >>> loss.reduce(loss(teacher, 2 * teacher + 1)) < 1e-6  # moved and scaled as a whole
        tensor(True)
    """

    compares = "features"
    kind: MapKind = "samples"

    def __init__(self, distance: float = 25.0, angle: float = 50.0) -> None:
        super().__init__()
        self.distance, self.angle = weights(distance=distance, angle=angle)

    @in_full_precision
    def forward(self, teacher: Tensor, student: Tensor, labels: Tensor | None = None) -> Tensor:
        batch = len(student)
        from_t, from_s = (_differences(pooled("RKD", x)) for x in (teacher, student))  # (B, B, C) each
        divergence = student.new_zeros(batch)
        if self.distance:
            difference = F.smooth_l1_loss(_relative_lengths(from_s), _relative_lengths(from_t), reduction="none")
            divergence = divergence + self.distance * difference.sum(1) / max(1, batch - 1)
        if self.angle:
            # Where two of the three are the same sample, both cosines are 0 or both are 1.
            difference = F.smooth_l1_loss(_cosines(from_s), _cosines(from_t), reduction="none")
            distinct = ~torch.eye(batch, dtype=torch.bool, device=student.device)  # i and k
            divergence = divergence + self.angle * (difference * distinct).sum((1, 2)) / max(
                1, (batch - 1) * (batch - 2)
            )
        return divergence

    def reduce(self, divergence: Tensor) -> Tensor:
        return divergence.mean()


def _differences(x: Tensor) -> Tensor:
    """``x_i - x_j`` at [j, i], in a scale that does not matter."""
    x = rescaled(x)
    return x.unsqueeze(0) - x.unsqueeze(1)


def _relative_lengths(differences: Tensor) -> Tensor:
    """Distances (B, B) over the mean of those between distinct samples; its gradient at distance 0 is 0."""
    batch = len(differences)
    lengths = torch.linalg.vector_norm(differences, dim=2)
    mean = lengths.sum() / max(1, batch * (batch - 1))
    return lengths / torch.where(mean > 0, mean, 1.0)


def _cosines(differences: Tensor) -> Tensor:
    """Cosine at [j, i, k] of the angle at sample j between i and k, 0 where one of them is j or lies where it lies."""
    directions = unit(differences, 2)
    return directions @ directions.transpose(1, 2)
