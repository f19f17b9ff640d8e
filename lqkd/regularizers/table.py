"""One learned number for each class or channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.losses.base import MapKind
from lqkd.regularizers.base import Regularizer
from lqkd.regularizers.guards import Guard
from lqkd.regularizers.players import Player


class LearnableTable(Regularizer):
    """R_phi as a table: ``exp(p_c)`` for class or channel c, whatever teacher and student say.

    With the barrier and the squared residual of features this is the variance per channel of variational information
    distillation (Ahn et al., arXiv 1904.05835, eq. 5). The entries are logarithms, which Adam moves by its learning
    rate a step whatever the gradient: at a rate made for an MLP, 0.001, no weight could double within 300 steps. They
    learn 30 times as fast, so that weights can follow divergences of another order of magnitude within a short
    training and still stay within some percent of their optimum.

    Args:
        guard, player, max_weight: see :class:`Regularizer`.

    Raises:
        UsageError: when an argument is out of range.

    Examples:
        >>> regularizer = LearnableTable()
        >>> regularizer.connect("features", channels=16)
        >>> regularizer(torch.randn(2, 16, 8, 8), torch.randn(2, 16, 8, 8)).shape
        torch.Size([1, 16, 1, 1])
    """

    maps = frozenset({"classes", "features"})
    learning_rate_factor = 30.0

    def __init__(
        self, guard: Guard | str = "barrier", player: Player | str = "cooperative", max_weight: float = 100.0
    ) -> None:
        super().__init__(guard, player, max_weight)
        self.logarithms: nn.Parameter | None = None

    def connect(self, kind: MapKind, channels: int) -> None:
        super().connect(kind, channels)
        if channels < 1:
            raise UsageError("LearnableTable needs the number of classes: use a DataModule that tells its image_shape")
        self.logarithms = nn.Parameter(torch.zeros(channels))

    def response(self, teacher: Tensor, student: Tensor, labels: Tensor | None) -> Tensor:
        if self.logarithms is None:
            raise UsageError("LearnableTable has no entries yet: call connect with the number of classes first")
        # (1, C), (1, C, 1, 1) for feature maps, (1, 1, C) for sequences of tokens
        shape = [1] * student.ndim
        shape[channel_axis(student)] = -1
        return self.logarithms.exp().view(shape)


def channel_axis(x: Tensor) -> int:
    """Where the channels of logits (B, C), feature maps (B, C, H, W) or token sequences (B, N, C) are."""
    return 2 if x.ndim == 3 else 1
