"""Features of several depths, the shallow ones reviewed with the deep ones at hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.losses.base import DistillationLoss, MapKind
from lqkd.losses.matching import check_comparable, to_common_size
from lqkd.losses.precision import in_full_precision
from lqkd.losses.settings import check

PYRAMID = (4, 2, 1)
"""Heights and widths to which the hierarchical context loss averages feature maps."""


class ReviewKD(DistillationLoss):
    """Knowledge review: the student's levels, fused from deep to shallow, against the teacher's.

    Chen et al., arXiv 2104.09044. Teacher and student are tuples of feature maps (B, C, H, W), the shallowest first.
    From the deepest level on, attention-based fusion (ABF) mixes a level (through a 1x1 convolution) with the fused
    deeper ones (repeated to its size) by two learned attention maps; a 3x3 convolution makes the teacher's channels of
    it. Each of these two convolutions is followed by batch norm.

    The hierarchical context loss (HCL) of a level is ``sum_k w_k MSE_k / sum_k w_k``: of the full maps with w = 1, and
    of their averages on those grids of 4x4, 2x2 and 1x1 fields that are coarser than the maps, in this order with
    w = 1/2, 1/4 and so on. The map (B,) is the sum over levels for each sample, the loss its mean.
    Levels of different sizes are both averaged to the smaller height and width. The warm-up of the published recipe is
    a schedule of the loss' weight, not part of the loss.

    Args:
        max_channels: the most channels within the fusion, >= 1; it has the deepest level's, if fewer.

    Raises:
        UsageError: when the number of channels is not possible, there is no level or a level without partner, one is no
            feature map, or :meth:`connect` has not been called.

    Examples:
        >>> loss = ReviewKD()
        >>> teacher = torch.ones(2, 16, 8, 8), torch.ones(2, 32, 4, 4)
        >>> student = torch.ones(2, 4, 8, 8), torch.ones(2, 8, 4, 4)
        >>> loss.connect([x.shape for x in teacher], [x.shape for x in student])
        >>> loss(teacher, student).shape
        torch.Size([2])
    """

    compares = "pyramids"
    kind: MapKind = "samples"

    def __init__(self, max_channels: int = 512) -> None:
        super().__init__()
        check("it must be 1 or greater", lambda x: x >= 1, max_channels=max_channels)
        self.max_channels = max_channels
        self.fusions: nn.ModuleList | None = None

    def connect(self, teacher: Sequence[torch.Size], student: Sequence[torch.Size]) -> None:
        self._check(teacher, student)
        width = min(self.max_channels, student[-1][1])
        deepest = len(student) - 1
        self.fusions = nn.ModuleList(
            _Fusion(s[1], width, t[1], fuses=level < deepest)
            for level, (t, s) in enumerate(zip(teacher, student, strict=True))
        )

    def _check(self, teacher: Sequence[torch.Size], student: Sequence[torch.Size]) -> None:
        if len(teacher) != len(student) or not student:
            raise UsageError(
                f"ReviewKD cannot compare {len(teacher)} taps of the teacher with {len(student)} of the student: it "
                "needs pairs, one or more"
            )
        for t, s in zip(teacher, student, strict=True):
            check_comparable("ReviewKD", t, s, allowed=(4,))

    @in_full_precision
    def forward(  # type: ignore[override]  # pyramids: tuples of tensors
        self, teacher: Sequence[Tensor], student: Sequence[Tensor], labels: Tensor | None = None
    ) -> Tensor:
        if self.fusions is None:
            raise UsageError("ReviewKD has no fusion layers yet: call connect with the shapes of all levels first")
        self._check([t.shape for t in teacher], [s.shape for s in student])
        if len(student) != len(self.fusions):
            raise UsageError(f"ReviewKD was connected for {len(self.fusions)} levels, not {len(student)}: give as many")
        fused: Tensor | None = None
        divergence = student[0].new_zeros(len(student[0]))
        for fusion, t, s in reversed(list(zip(self.fusions, teacher, student, strict=True))):
            fused, out = fusion(s, fused)
            divergence = divergence + hierarchical_context(*to_common_size(t, out))
        return divergence

    def reduce(self, divergence: Tensor) -> Tensor:
        return divergence.mean()


def hierarchical_context(teacher: Tensor, student: Tensor) -> Tensor:
    """HCL of one level for each sample, (B,), from feature maps (B, C, H, W) of one shape."""
    squared = (teacher - student).square().mean((1, 2, 3))
    weight = total = 1.0
    for size in PYRAMID:
        if size >= min(teacher.shape[2:]):
            continue
        weight /= 2
        coarse = F.adaptive_avg_pool2d(teacher - student, size)  # averages are linear
        squared = squared + weight * coarse.square().mean((1, 2, 3))
        total += weight
    return squared / total


class _Fusion(nn.Module):
    """ABF of one level: from its features and the fused deeper ones, the fused ones and their image for the teacher."""

    def __init__(self, channels: int, width: int, out: int, fuses: bool) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), _BatchNorm(width))
        self.attention = nn.Conv2d(2 * width, 2, 1) if fuses else None
        self.leave = nn.Sequential(nn.Conv2d(width, out, 3, padding=1, bias=False), _BatchNorm(out))

    def forward(self, level: Tensor, deeper: Tensor | None) -> tuple[Tensor, Tensor]:
        fused = self.enter(level)
        if self.attention is not None and deeper is not None:
            deeper = F.interpolate(deeper, fused.shape[2:], mode="nearest")
            ours, theirs = self.attention(torch.cat((fused, deeper), dim=1)).sigmoid().split(1, dim=1)  # (B, 1, H, W)
            fused = ours * fused + theirs * deeper
        return fused, self.leave(fused)


class _BatchNorm(nn.BatchNorm2d):
    """Batch norm that passes the running statistics to a batch of one value per channel, which has no variance."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training and input.numel() == input.shape[1]:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(input)
