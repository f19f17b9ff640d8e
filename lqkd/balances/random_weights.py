"""Random weights: the baseline that a learned balance has to beat."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from lqkd.balances.base import Balance
from lqkd.balances.norms import LossGradients
from lqkd.errors import UsageError


class RandomBalance(Balance):
    """RLW: ``w = softmax(z)`` with z drawn anew from a standard normal distribution for each batch.

    Lin et al., "Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning" (arXiv
    2111.10603). The weights sum to 1. They depend on the seed and the number of batches so far and on nothing else: a
    resumed run draws what the whole one would, and all processes draw the same.

    Args:
        seed: any whole number.
        **limits: ``minimum``, ``maximum``, ``teacher_share``, ``hold``, ``release`` and ``gradient_scale`` of
            :class:`Balance`.

    Raises:
        UsageError: when the seed is not a whole number.

    Examples:
        >>> _, weights = RandomBalance(seed=0)({"task": torch.tensor(2.0), "distill": torch.tensor(1.0)})
        >>> round(float(sum(weights.values())), 4)
        1.0
    """

    steps: Tensor

    def __init__(self, seed: int = 0, **limits: Any) -> None:
        super().__init__(**limits)
        if not isinstance(seed, int):
            raise UsageError(f"balance seed={seed!r} is not possible: it must be a whole number")
        self.seed = seed
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._steps: int | None = None  # the same number, known without asking the device
        self.register_load_state_dict_post_hook(_forget_steps)

    def propose(self, losses: Tensor, gradients: LossGradients | None) -> tuple[Tensor, None]:
        if self._steps is None:
            self._steps = int(self.steps)
        # A text is hashed as a whole: neighbouring seeds and steps have nothing in common.
        generator = random.Random(f"{self.seed} {self._steps}")
        if self.training:
            self._steps += 1
            self.steps.add_(1)
        drawn = torch.tensor([generator.gauss(0.0, 1.0) for _ in losses])
        return drawn.softmax(0).to(losses.device, non_blocking=True), None


def _forget_steps(module: RandomBalance, incompatible: Any) -> None:
    module._steps = None
