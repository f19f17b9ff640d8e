"""Where both networks look."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.losses.base import DistillationLoss, MapKind
from lqkd.losses.directions import rescaled, unit
from lqkd.losses.matching import channel_axis, check_comparable, only_pair, to_common_size
from lqkd.losses.precision import in_full_precision
from lqkd.losses.settings import positive


class AttentionTransfer(DistillationLoss):
    """Squared difference of attention maps, ``(a_T - a_S)**2``, averaged over samples and positions.

    Zagoruyko & Komodakis, arXiv 1612.03928, activation-based: ``a = A / ||A||`` over the positions of a sample with
    ``A = mean_c |f_c|**p``. Feature maps (B, C, H, W) or token sequences (B, N, C), of any numbers of channels. Maps of
    different sizes are both averaged to the smaller height and width first. The map of divergences has one channel,
    (B, 1, H, W) or (B, N, 1), and :meth:`pair` gives the attention maps in that shape. Neither network's scale counts.
    The published weight of this mean is 1000 beside the task loss.

    Args:
        exponent: p >= 1.

    Raises:
        UsageError: when the exponent is not possible, or features are of different layouts or numbers of tokens.

    Examples:
        >>> loss = AttentionTransfer()
        >>> divergence = loss(torch.ones(2, 16, 8, 8), 3 * torch.ones(2, 4, 4, 4))
        >>> divergence.shape, loss.reduce(divergence)
        (torch.Size([2, 1, 4, 4]), tensor(0.))
    """

    compares = "features"
    kind: MapKind = "features"

    def __init__(self, exponent: float = 2.0) -> None:
        super().__init__()
        self.exponent = positive("exponent", exponent)
        if self.exponent < 1:
            raise UsageError(f"exponent={exponent!r} is not possible: it must be 1 or greater")

    def connect(self, teacher: Sequence[torch.Size], student: Sequence[torch.Size]) -> None:
        check_comparable("AttentionTransfer", *only_pair("AttentionTransfer", teacher, student), allowed=(3, 4))

    @in_full_precision
    def pair(self, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        """Attention maps of both, (B, 1, H, W) or (B, N, 1), of norm 1 for each sample."""
        check_comparable("AttentionTransfer", teacher.shape, student.shape, allowed=(3, 4))
        teacher, student = to_common_size(teacher, student)
        return self._attention(teacher), self._attention(student)

    def _attention(self, features: Tensor) -> Tensor:
        channel = channel_axis(features.ndim)
        positions = tuple(axis for axis in range(1, features.ndim) if axis != channel)
        amplitude = rescaled(features, tuple(range(1, features.ndim))).abs()
        return unit(amplitude.pow(self.exponent).mean(channel, keepdim=True), positions)

    @in_full_precision
    def forward(self, teacher: Tensor, student: Tensor, labels: Tensor | None = None) -> Tensor:
        teacher, student = self.pair(teacher, student)
        return (teacher - student).square()

    def reduce(self, divergence: Tensor) -> Tensor:
        return divergence.mean()
