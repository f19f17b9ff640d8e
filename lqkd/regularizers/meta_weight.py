"""A small network from a sample's loss to its weight, which held-out rows teach by looking one step ahead."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.regularizers.base import Regularizer
from lqkd.regularizers.mlp import check_hidden
from lqkd.regularizers.players import LookAhead


class MetaWeightNet(Regularizer):
    """R_phi as one weight per sample in (0, 1), from nothing but the sample's loss.

    Shu et al., "Meta-Weight-Net: Learning an Explicit Mapping For Sample Weighting" (NeurIPS 2019, arXiv 1902.07379),
    on the samples of a distillation loss. ``V(L_i; phi)`` has one hidden layer of ReLUs and a sigmoid. phi descends
    the task loss on held-out rows after one step of the student, along the weighted loss (eq. 3 and 4):

        phi <- phi - b d/dphi 1/m sum_j L_task_j(theta - a d/dtheta 1/n sum_i V(L_i; phi) L_i)

    by its own optimizer, there too Adam at 0.001. Its gradient is divided by the root mean square over the batch of
    that by the weights, which Adam hardly sees. Two things differ: the task loss keeps its own weight and takes no
    part in the step that is looked ahead, and the student makes its step with the weights that phi had before, in the
    same backward pass. The held-out rows are ``data.init_args.trust_fraction`` of the training rows. It costs two more
    forward and backward passes. Losses and weights are (B,); every weight is 1/2 at the start.

    Args:
        hidden: width of the hidden layer, >= 1.
        rows: held-out rows on which the task is measured at each step, >= 1.
        step_size: a, the learning rate of the step that is looked ahead.

    Raises:
        UsageError: when an argument is out of range.

    Examples:
        >>> losses = torch.tensor([0.1, 2.0])
        >>> MetaWeightNet()(losses, losses).detach()
        tensor([0.5000, 0.5000])
    """

    maps = frozenset({"classes", "samples"})
    sees_losses = True
    bounded = True
    told: ClassVar[str | None] = None
    """What it has learned, in a sentence: nothing but its weights."""

    def __init__(self, hidden: int = 100, rows: int = 128, step_size: float = 0.01) -> None:
        if rows == 0:
            raise UsageError("rows=0 of MetaWeightNet is not possible: it learns from one a step at least")
        super().__init__("none", LookAhead(exact=True, step_size=step_size, rows=rows))
        last = nn.Linear(check_hidden(hidden), 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.network = nn.Sequential(nn.Linear(1, hidden), nn.ReLU(), last, nn.Sigmoid())

    def response(self, teacher: Tensor, student: Tensor, labels: Tensor | None) -> Tensor:  # (B,), (B,) -> (B,)
        weights: Tensor = self.network(student.unsqueeze(-1)).squeeze(-1)
        return weights

    def forward(self, teacher: Tensor, student: Tensor, labels: Tensor | None = None) -> Tensor:
        """The weights V (B,) of losses (B,), float32; no square, since they are positive."""
        with torch.autocast(student.device.type, enabled=False):
            return self.response(teacher.detach().float(), student.detach().float(), labels)
