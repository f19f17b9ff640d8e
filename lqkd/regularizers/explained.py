"""A regularizer of features that held-out rows teach: how much of a channel can be predicted from the student?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.losses.base import MapKind
from lqkd.regularizers.base import Regularizer
from lqkd.regularizers.players import HeldOut
from lqkd.regularizers.table import channel_axis

_KEPT = 0.75
"""The part of what was counted before that still counts when the networks were asked again: of about four times."""
_POSITIONS = 64
_SIDE = 8
"""Of so many positions of a sample, evenly spread, at most."""
_LITTLE = 0.1


@dataclass
class Asked:
    """How far a training has come with its held-out rows."""

    rows: int = 0
    """That the networks were asked about, over and over in their order."""
    batches: int = 0
    """Of the training."""


class ExplainedVariance(Regularizer):
    """R_phi as the share of a channel's variance that can be predicted from the student, on held-out rows.

    The weight of channel c of the teacher's features t is its coefficient of determination (Wright 1921)

        w_c = clip(1 - E[(t_c - g_c(s))^2] / Var t_c, 0, 1)

    for the student's features s as the loss compares them, through its connector where it has one, and g the linear map
    of all their channels, the same at every position, that fits best: ridge regression with as many rows of prior as
    there are channels. g is fitted to one half of the held-out rows and judged on the other, and the other way round,
    so that a channel of noise gets 0 and not what chance has explained; one that does not vary gets 0, too. The best g
    and not the connector as it is, since a connector without weight would never be trained.

    Both networks are asked about ``rows`` of these rows every ``every`` batches, in eval mode and without a gradient,
    the first time about 512. What is counted fades by a quarter each time, so that weights are of about the last four.
    They are not scaled to a mean of one: where there is less to learn, the loss is smaller. Needs no labels.

    Beside it ``1/E[D]``, what :class:`LearnableTable` with the barrier comes to, is of training rows and of the
    connector as it is, has the scale of the channel in it, and is large where a channel is nearly constant.

    Args:
        rows: held-out rows that the networks are asked about at a time, over all processes, >= 1.
        every: batches from one time to the next, >= 1.

    Raises:
        UsageError: when an argument is out of range.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> student, halves = torch.randn(400, 2), torch.arange(400) % 2
        >>> teacher = torch.stack([student.sum(1), torch.randn(400)], 1)
        >>> regularizer = ExplainedVariance()
        >>> regularizer.connect("features", channels=2)
        >>> regularizer.take(regularizer.counted(teacher, student, halves))
        >>> [round(weight, 1) for weight in regularizer(teacher, student)[0].tolist()]
        [1.0, 0.0]
    """

    maps = frozenset({"features"})
    counts: Tensor
    """What has been counted, float64. No buffer: all processes have the same, and it is too large to send in a step."""
    explained: Tensor

    def __init__(self, rows: int = 64, every: int = 16) -> None:
        super().__init__(guard="none", player=HeldOut())
        for name, value in (("rows", rows), ("every", every)):
            if not isinstance(value, int) or value < 1:
                raise UsageError(
                    f"{name}={value!r} of ExplainedVariance is not possible: it must be a whole number of at least 1"
                )
        self.rows, self.every = rows, every
        self.channels: int | None = None
        self.asked = Asked()

    def connect(self, kind: MapKind, channels: int) -> None:
        super().connect(kind, channels)
        if self.channels is None:
            self.channels = channels
            self.counts = torch.zeros(2, channels + 2, 2 * channels + 1, dtype=torch.float64)
            self.register_buffer("explained", torch.ones(channels))

    def response(self, teacher: Tensor, student: Tensor, labels: Tensor | None) -> Tensor:
        shape = [1] * student.ndim
        shape[channel_axis(student)] = -1
        return self.explained.view(shape)

    def forward(self, teacher: Tensor, student: Tensor, labels: Tensor | None = None) -> Tensor:
        """The weights (1, C), (1, C, 1, 1) or (1, 1, C) in [0, 1], float32; no square, since they are a share."""
        return self.response(teacher, student, labels)

    @torch.no_grad()
    def counted(self, teacher: Tensor, student: Tensor, halves: Tensor) -> Tensor:
        """Sums over rows and positions that weights are made of, (2, C + 2, 2 C + 1), which may be added up.

        Args:
            teacher, student: (N, C), (N, C, H, W) or (N, L, C), as the loss compares them.
            halves: (N,) int64, 0 or 1: the half that each row belongs to, whenever it is asked about.
        """
        sums = torch.zeros(self.counts.shape, dtype=torch.float64, device=teacher.device)
        t, s = (_by_position(x.detach()).double() for x in (teacher, student))  # which autocast leaves alone
        for half in range(2):
            own = (halves == half).to(t.device)
            of_t, of_s = t[own].flatten(0, 1), s[own].flatten(0, 1)
            seen = torch.cat([torch.ones_like(of_s[:, :1]), of_s], 1)
            sums[half, :-1] = seen.mT @ torch.cat([seen, of_t], 1)
            sums[half, -1, seen.shape[1] :] = of_t.square().sum(0)
        return sums

    @torch.no_grad()
    def take(self, sums: Tensor) -> None:
        """Count what :meth:`counted` has given, of all processes, and set the weights; nothing that is not finite."""
        if not bool(sums.isfinite().all()):
            return
        self.counts = self.counts.to(sums.device) * _KEPT + sums
        self.explained.copy_(explained_variance(self.counts).clamp(0, 1))

    @property
    def told(self) -> str:
        """What it has learned, in a sentence without its full stop."""
        few = int((self.explained < _LITTLE).sum())
        return (
            f"{float(self.explained.mean()):.2f} of the variance of the teacher's channels can be predicted from the "
            f"student on held-out rows, of {few} of {len(self.explained)} less than {_LITTLE}"
        )


def explained_variance(sums: Tensor) -> Tensor:
    """(C,) float64 shares of variance, at most 1, of sums (2, C + 2, 2 C + 1): see :class:`ExplainedVariance`.

    0 for a channel that does not vary.
    """
    channels = sums.shape[2] // 2
    wrong, total = sums.new_zeros(2, channels, dtype=torch.float64)
    halves = sums.double()
    for fitted, judged in (halves, halves.flip(0)):
        seen, both = fitted[:-1, : channels + 1], fitted[:-1, channels + 1 :]
        count = seen[0, 0].clamp_min(1)
        variance = (seen.diagonal() / count - (seen[0] / count).square()).clamp_min(0)
        price = channels * variance + 1e-9 * (1 + seen.diagonal())  # of channels that do not vary too
        slopes = torch.linalg.solve(seen + torch.diag(price), both)
        seen, both, squares = judged[:-1, : channels + 1], judged[:-1, channels + 1 :], judged[-1, channels + 1 :]
        wrong = wrong + squares - 2 * (slopes * both).sum(0) + (slopes * (seen @ slopes)).sum(0)
        total = total + squares - both[0].square() / seen[0, 0].clamp_min(1)
    varies = total > 1e-6 * halves[:, -1, channels + 1 :].sum(0)  # beyond the rounding of the sums
    return torch.where(varies, 1 - wrong / total.clamp_min(1e-30), torch.zeros_like(total))


def _by_position(features: Tensor) -> Tensor:
    """(N, P, C) of features in one of their layouts, at some of their positions, evenly spread."""
    if features.ndim == 2:
        return features[:, None]
    if channel_axis(features) != 1:
        return features[:, _spread(features.shape[1], _POSITIONS)]
    height, width = features.shape[2:4] if features.ndim > 3 else (1, features.shape[2])
    rows = _spread(height, max(_SIDE, _POSITIONS // width)).to(features.device)
    columns = _spread(width, max(_SIDE, _POSITIONS // height)).to(features.device)
    found = features.reshape(*features.shape[:2], height, width, -1)[:, :, rows][:, :, :, columns]
    return found.flatten(2).mT


def _spread(size: int, most: int) -> Tensor:
    """At most so many of ``size`` positions, each in the middle of its part."""
    count = min(size, most)
    return (2 * torch.arange(count) + 1) * size // (2 * count)
