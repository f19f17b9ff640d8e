"""What one batch gives: all of its losses, and what they come from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lqkd.modules.passes import Outputs
from lqkd.modules.term import Divergences


@dataclass
class Losses:
    """What one batch gives: everything that the step minimises and everything that is worth looking at."""

    loss: Tensor
    """0-dim, differentiable: the balanced losses of the student plus its penalties and the regularizer's objective."""
    by_name: dict[str, Tensor]
    """0-dim loss of the task and of every distillation term, modulated, by the names of the balance."""
    divergences: dict[str, Divergences]
    """By distillation term: divergence maps before modulation, the regularizer's weights, and the teachers' logits."""
    outputs: Outputs
    """What the networks have made of the batch: all losses come from it."""
    balance: dict[str, Tensor]
    """Weight of each loss in the student's gradient, 0-dim each."""
    penalties: dict[str, Tensor]
    """Each of the module's penalties, 0-dim."""
