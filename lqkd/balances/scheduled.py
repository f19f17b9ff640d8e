"""A distillation weight that follows the training."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from lqkd.balances.base import Balance
from lqkd.balances.fixed import check_weights
from lqkd.balances.norms import LossGradients
from lqkd.errors import UsageError
from lqkd.losses.settings import check


class ScheduledBalance(Balance):
    """``L = task * L_task + lambda(t) * L_distill`` with lambda, of every distillation loss, from ``start`` to ``end``.

    Before ``begin`` it is ``start``, after ``finish`` it is ``end``; between, it follows a straight line or half a
    cosine. The default is a linear warm-up over the first tenth of the training.

    Args:
        start: lambda at first, >= 0.
        end: lambda at last, >= 0.
        task: weight of the task loss, >= 0.
        begin: part of the training at which lambda starts to move, 0 to 1.
        finish: part of the training at which it arrives, ``begin`` to 1.
        shape: ``linear`` or ``cosine``.
        **limits: ``minimum``, ``maximum``, ``teacher_share``, ``hold``, ``release`` and ``gradient_scale`` of
            :class:`Balance`.

    Raises:
        UsageError: when a weight is negative or not finite, nothing is left to train on at one end, a part is out of
            range, or the shape is unknown.

    Examples:
        >>> balance = ScheduledBalance(start=0.0, end=1.0, finish=0.1)
        >>> balance.progress = 0.05  # half of the warm-up
        >>> _, weights = balance({"task": torch.tensor(2.0), "distill": torch.tensor(1.0)})
        >>> weights
        {'task': tensor(1.), 'distill': tensor(0.5000)}
    """

    first: Tensor
    last: Tensor

    def __init__(
        self,
        start: float = 0.0,
        end: float = 1.0,
        task: float = 1.0,
        begin: float = 0.0,
        finish: float = 0.1,
        shape: Literal["linear", "cosine"] = "linear",
        **limits: Any,
    ) -> None:
        super().__init__(**limits)
        check_weights(start=start, end=end, task=task)
        if task == 0 and (start == 0 or end == 0):
            raise UsageError(
                f"balance task=0, start={start!r}, end={end!r} leaves nothing to train on at one end: one of task and "
                "lambda must be greater than 0"
            )
        ends = {"begin": begin, "finish": finish}
        check("0 <= begin <= finish <= 1 is needed", lambda a, b: 0 <= a <= b <= 1, "balance ", **ends)
        if shape not in ("linear", "cosine"):
            raise UsageError(f"balance shape={shape!r} is unknown: use linear or cosine")
        self.begin, self.finish, self.shape = float(begin), float(finish), shape
        self.progress = 0.0
        self.task, self.start, self.end = float(task), float(start), float(end)
        self._make(len(self.names))

    def _make(self, count: int) -> None:
        for name, value in (("first", self.start), ("last", self.end)):
            self.register_buffer(name, torch.tensor([self.task, *[value] * (count - 1)]), persistent=False)

    def propose(self, losses: Tensor, gradients: LossGradients | None) -> tuple[Tensor, None]:
        assert self.progress is not None
        if self.progress >= self.finish:
            return self.last, None
        way = max(0.0, self.progress - self.begin) / max(self.finish - self.begin, 1e-12)
        if self.shape == "cosine":
            way = 0.5 - 0.5 * math.cos(math.pi * way)
        return torch.lerp(self.first, self.last, way), None
