"""A small network that looks at one pair of logits and weighs their difference."""

from __future__ import annotations

import torch
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.regularizers.base import Regularizer
from lqkd.regularizers.guards import Guard
from lqkd.regularizers.mlp import MLP
from lqkd.regularizers.players import Player


class ElementwiseMLP(Regularizer):
    """R_phi as a two-layer perceptron applied to every element: ``softplus(MLP(t, s, t - s))``.

    The same small network sees each class, so its size does not depend on their number and it cannot memorise
    single residuals. Its last layer starts at zero and its bias where the weight is exactly 1: training begins as
    plain distillation. It weighs logits (B, C), with weights (B, C). Where one of them is -inf it sees two zeros.

    Args:
        hidden: width of the hidden layer, >= 1.
        label: whether it also sees if the element belongs to the true class; of a sample without a label none does.
        guard, player, max_weight: see :class:`Regularizer`.

    Raises:
        UsageError: when an argument is out of range.

    Examples:
        >>> regularizer = ElementwiseMLP()
        >>> weights = regularizer(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 1.0]]))
        >>> weights.detach()  # before training
        tensor([[1., 1.]])
    """

    maps = frozenset({"classes"})

    def __init__(
        self,
        hidden: int = 32,
        label: bool = False,
        guard: Guard | str = "barrier",
        player: Player | str = "cooperative",
        max_weight: float = 100.0,
    ) -> None:
        super().__init__(guard, player, max_weight)
        self.label = label
        self.network = MLP(3 + label, hidden)

    def response(self, teacher: Tensor, student: Tensor, labels: Tensor | None) -> Tensor:  # (B, C), (B, C) -> (B, C)
        ruled_out = torch.minimum(teacher, student) == -torch.inf
        teacher, student = teacher.masked_fill(ruled_out, 0.0), student.masked_fill(ruled_out, 0.0)
        features = [teacher, student, teacher - student]
        if self.label:
            if labels is None:
                raise UsageError("label=true of ElementwiseMLP needs labels: this run has none")
            true_class = labels.unsqueeze(1) == torch.arange(teacher.shape[1], device=teacher.device)
            features.append(true_class.to(teacher.dtype))
        return self.network(torch.stack(features, dim=-1))
