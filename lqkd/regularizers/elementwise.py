"""A small network that looks at one pair of logits and weighs their difference."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.regularizers.base import Regularizer
from lqkd.regularizers.guards import Guard


class ElementwiseMLP(Regularizer):
    """R_phi as a two-layer perceptron applied to every element: ``softplus(MLP(t, s, t - s))``.

    The same small network sees each class, so its size does not depend on their number and it cannot memorise
    single residuals. Its last layer starts at zero and its bias where the weight is exactly 1: training begins as
    plain distillation.

    Args:
        hidden: width of the hidden layer.
        guard: what keeps the weights from collapsing: ``barrier``, ``none`` or a Guard class.
        max_weight: upper bound of the weights; infinity for none.

    Raises:
        UsageError: when an argument is out of range.
    """

    def __init__(self, hidden: int = 32, guard: Guard | str = "barrier", max_weight: float = 100.0) -> None:
        super().__init__(guard, max_weight)
        if hidden < 1:
            raise UsageError(f"hidden={hidden!r} is not possible: the hidden layer needs at least one unit")
        self.network = nn.Sequential(nn.Linear(3, hidden), nn.GELU(), nn.Linear(hidden, 1))
        last = self.network[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, math.log(math.e - 1))  # softplus of this is 1

    def response(self, teacher: Tensor, student: Tensor) -> Tensor:  # (B, C), (B, C) -> (B, C)
        features = torch.stack((teacher, student, teacher - student), dim=-1)
        return nn.functional.softplus(self.network(features).squeeze(-1))
