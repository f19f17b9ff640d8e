"""What the student's features tell of the teacher's, by a Gaussian with a learned variance."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.losses.base import DistillationLoss, MapKind
from lqkd.losses.matching import channel_axis, channels, check_comparable, connector, only_pair, to_common_size
from lqkd.losses.precision import in_full_precision
from lqkd.losses.settings import positive


class VID(DistillationLoss):
    """Variational information distillation: mean over elements of ``(t - mu(s))**2 / (2 v_c) + log(v_c / v_min) / 2``.

    Ahn et al., arXiv 1904.05835, eq. 5: the negative log-likelihood of the teacher's features under a Gaussian around
    mu(s), three 1x1 convolutions (or linear layers) with ReLU between, with a learned variance
    ``v_c = softplus(a_c) + v_min`` for each channel c of the teacher.

    The likelihood of a density has no upper bound at 1, so that the plain form can be negative; here it is counted
    from ``log(v_min) / 2``, which is constant, hence without influence on any gradient, and below which it cannot be.
    The map is non-negative, but not zero where teacher and student agree. Layouts and sizes are those of ``Hints``.

    Args:
        initial_variance: v_c at the start, > minimum_variance.
        minimum_variance: v_min > 0.

    Raises:
        UsageError: when an argument is out of range, features are of different layouts or numbers of tokens, or
            :meth:`connect` has not been called.

    Examples:
        >>> loss = VID()
        >>> teacher, student = torch.ones(2, 16, 8, 8), torch.ones(2, 4, 8, 8)
        >>> loss.connect([teacher.shape], [student.shape])
        >>> divergence = loss(teacher, student)
        >>> divergence.shape, bool((divergence >= 0).all())
        (torch.Size([2, 16, 8, 8]), True)
    """

    compares = "features"
    kind: MapKind = "features"
    place_by_place = True

    def __init__(self, initial_variance: float = 5.0, minimum_variance: float = 1e-5) -> None:
        super().__init__()
        self.initial_variance = positive("initial_variance", initial_variance)
        self.minimum_variance = positive("minimum_variance", minimum_variance)
        if not initial_variance > minimum_variance:
            raise UsageError(
                f"initial_variance={initial_variance!r} is not possible: it must be greater than minimum_variance, "
                f"{minimum_variance!r}"
            )
        self.mean: nn.Sequential | None = None
        self.raw_variance: nn.Parameter | None = None

    def connect(self, teacher: Sequence[torch.Size], student: Sequence[torch.Size]) -> None:
        t, s = only_pair("VID", teacher, student)
        check_comparable("VID", t, s)
        out = channels(t)
        self.mean = nn.Sequential(connector(s, out), nn.ReLU(), connector(t, out), nn.ReLU(), connector(t, out))
        excess = self.initial_variance - self.minimum_variance
        inverse_softplus = excess + math.log(-math.expm1(-excess))
        self.raw_variance = nn.Parameter(torch.full((out,), inverse_softplus))

    @in_full_precision
    def pair(self, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's features and what the student's predict of them, in one shape."""
        if self.mean is None:
            raise UsageError("VID has no layers yet: call connect with the shapes of the features first")
        check_comparable("VID", teacher.shape, student.shape)
        teacher, student = to_common_size(teacher, student)
        return teacher, self.mean(student)

    def variance(self) -> Tensor:
        """The variance of each of the teacher's channels, (C,)."""
        if self.raw_variance is None:
            raise UsageError("VID has no variances yet: call connect with the shapes of the features first")
        return F.softplus(self.raw_variance) + self.minimum_variance

    @in_full_precision
    def forward(self, teacher: Tensor, student: Tensor, labels: Tensor | None = None) -> Tensor:
        teacher, mean = self.pair(teacher, student)
        shape = [1] * teacher.ndim
        shape[channel_axis(teacher.ndim)] = -1
        variance = self.variance().view(shape)
        floor = (variance / self.minimum_variance).log().clamp_min(0.0)  # rounding can leave -1e-8
        return ((teacher - mean).square() / variance + floor) / 2

    def reduce(self, divergence: Tensor) -> Tensor:
        return divergence.mean()
