"""Weights that follow how fast each loss falls from epoch to epoch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lqkd.balances.base import Balance
from lqkd.balances.norms import LossGradients
from lqkd.losses.settings import positive
from lqkd.utils.reduction import mean_over_processes


class DynamicWeightAverage(Balance):
    """DWA: ``w = n softmax(r / temperature)`` of n losses, ``r_i = L_i(t - 1) / L_i(t - 2)`` of means of past epochs.

    The loss that falls more slowly gets the larger weight. Liu et al., "End-to-End Multi-Task Learning with Attention"
    (arXiv 1803.10704). Weights are 1 until two epochs are done. Training calls :meth:`on_epoch_end`.

    Args:
        temperature: > 0; infinity would be equal weights.
        **limits: ``minimum``, ``maximum``, ``teacher_share``, ``hold``, ``release`` and ``gradient_scale`` of
            :class:`Balance`.

    Raises:
        UsageError: when the temperature is not a positive number.

    Examples:
        >>> balance = DynamicWeightAverage(temperature=2.0)
        >>> for task, distill in ((4.0, 4.0), (2.0, 4.0), (1.0, 4.0)):
        ...     _, weights = balance({"task": torch.tensor(task), "distill": torch.tensor(distill)})
        ...     balance.on_epoch_end()
        >>> weights  # of the third epoch: task had halved, distill had not
        {'task': tensor(0.8756), 'distill': tensor(1.1244)}
    """

    sums: Tensor
    batches: Tensor
    means: Tensor
    epochs: Tensor

    def __init__(self, temperature: float = 2.0, **limits: Any) -> None:
        super().__init__(**limits)
        self.temperature = positive("temperature", temperature, "balance ")
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.register_buffer("epochs", torch.zeros((), dtype=torch.int64))
        self._make(len(self.names))

    def _make(self, count: int) -> None:
        self.register_buffer("sums", torch.zeros(count))  # of this epoch's losses
        self.register_buffer("means", torch.ones(2, count))  # of the epochs t - 1 and t - 2

    def propose(self, losses: Tensor, gradients: LossGradients | None) -> tuple[Tensor, None]:
        if self.training:
            # Of all processes at every batch: a checkpoint within an epoch holds what one of them knows.
            self.sums.add_(mean_over_processes(losses).clamp(max=1e30))
            self.batches.add_(1)
        last, before = self.means
        falls = (last.clamp_min(1e-12) / before.clamp_min(1e-12)).clamp(max=1e6)
        weights = len(losses) * (falls / self.temperature).softmax(0)
        return torch.where(self.epochs < 2, torch.ones_like(weights), weights), None

    def on_epoch_end(self) -> None:
        if self.batches == 0:  # nothing was trained
            return
        self.means.copy_(torch.stack([self.sums / self.batches, self.means[0]]))
        self.epochs.add_(1)
        self.sums.zero_()
        self.batches.zero_()
