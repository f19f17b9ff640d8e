"""Small networks that look at a pair of feature maps and weigh their difference."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.losses.base import MapKind
from lqkd.regularizers.base import Regularizer
from lqkd.regularizers.guards import Guard
from lqkd.regularizers.mlp import check_hidden, start_at_one
from lqkd.regularizers.players import Player


class ConvModulator(Regularizer):
    """R_phi as two 1x1 convolutions on ``(t, s, t - s)``: a weight for every position, or for every channel.

    It weighs feature maps (B, C, H, W). The last convolution starts where every weight is exactly 1.

    Args:
        hidden: channels between the two convolutions, >= 1.
        per: ``position``: one weight for each place of the map, all channels alike, (B, 1, H, W); ``channel``: one
            for each channel, from the averages over the map, (B, C, 1, 1).
        guard, player, max_weight: see :class:`Regularizer`.

    Raises:
        UsageError: when an argument is out of range.

    Examples:
        >>> regularizer = ConvModulator(per="position")
        >>> regularizer.connect("features", channels=16)
        >>> regularizer(torch.randn(2, 16, 8, 8), torch.randn(2, 16, 8, 8)).shape
        torch.Size([2, 1, 8, 8])
    """

    maps = frozenset({"features"})

    def __init__(
        self,
        hidden: int = 16,
        per: Literal["position", "channel"] = "position",
        guard: Guard | str = "barrier",
        player: Player | str = "cooperative",
        max_weight: float = 100.0,
    ) -> None:
        super().__init__(guard, player, max_weight)
        if per not in ("position", "channel"):
            raise UsageError(f"per={per!r} of ConvModulator is not possible: use position or channel")
        self.hidden, self.per = check_hidden(hidden), per
        self.network: nn.Sequential | None = None

    def connect(self, kind: MapKind, channels: int) -> None:
        super().connect(kind, channels)
        last = nn.Conv2d(self.hidden, 1 if self.per == "position" else channels, 1)
        start_at_one(last)
        self.network = nn.Sequential(nn.Conv2d(3 * channels, self.hidden, 1), nn.GELU(), last)

    def response(self, teacher: Tensor, student: Tensor, labels: Tensor | None) -> Tensor:
        if self.network is None:
            raise UsageError("ConvModulator has no convolutions yet: call connect with the number of channels first")
        if student.ndim != 4:
            raise UsageError(
                f"ConvModulator weighs feature maps (B, C, H, W): a tap gives a tensor with {student.ndim} axes; use "
                "LearnableTable or SampleWeight"
            )
        if self.per == "channel":
            teacher, student = teacher.mean((2, 3), keepdim=True), student.mean((2, 3), keepdim=True)
        return F.softplus(self.network(torch.cat((teacher, student, teacher - student), dim=1)))
