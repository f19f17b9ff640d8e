"""Learning-rate schedules that know how long training lasts."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, Literal

from lightning.pytorch.cli import LRSchedulerCallable
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from lqkd.errors import UsageError, first_line


class Schedule(ABC):
    """Makes Lightning's scheduler configuration for an optimizer once the number of steps is known."""

    @abstractmethod
    def configure(self, optimizer: Optimizer, total_steps: int | None) -> dict[str, Any]:
        """``{"scheduler": ..., "interval": "step" | "epoch"}`` for so many optimizer steps (None: no end)."""


class Cosine(Schedule):
    """Linear warm-up, then half a cosine from the optimizer's learning rate down, ending with the last step.

    Args:
        warmup_fraction: part of the training that warms up, 0 <= f < 1.
        final_fraction: learning rate at the end as a part of that at the start, 0 <= f <= 1.

    Raises:
        UsageError: when a fraction is out of range.
    """

    def __init__(self, warmup_fraction: float = 0.0, final_fraction: float = 0.0) -> None:
        if not 0 <= warmup_fraction < 1:
            raise UsageError(f"warmup_fraction={warmup_fraction!r} is not possible: it must be >= 0 and < 1")
        if not 0 <= final_fraction <= 1:
            raise UsageError(f"final_fraction={final_fraction!r} is not possible: it must be from 0 to 1")
        self.warmup_fraction = warmup_fraction
        self.final_fraction = final_fraction

    def configure(self, optimizer: Optimizer, total_steps: int | None) -> dict[str, Any]:
        if total_steps is None:
            raise UsageError(
                "Cosine needs to know the end of training: set trainer.max_epochs or max_steps, or use Constant"
            )
        return {"scheduler": LambdaLR(optimizer, lambda step: self.factor(step, total_steps)), "interval": "step"}

    def factor(self, step: int, total_steps: int) -> float:
        """The learning rate of optimizer step ``step`` (from 0) of ``total_steps``, relative to the base rate."""
        warmup = round(self.warmup_fraction * total_steps)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        return self.final_fraction + (1 - self.final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))


class Constant(Schedule):
    """The optimizer's own learning rate throughout."""

    def configure(self, optimizer: Optimizer, total_steps: int | None) -> dict[str, Any]:
        return {"scheduler": LambdaLR(optimizer, lambda step: 1.0), "interval": "step"}


class TorchSchedule(Schedule):
    """Any scheduler of :mod:`torch.optim.lr_scheduler`, with the length that its own arguments say.

    Args:
        scheduler: the scheduler's class and arguments, without the optimizer.
        interval: whether it steps after each optimizer step or after each epoch.

    Raises:
        UsageError: when interval is neither; before the first batch, when the scheduler refuses one of its arguments,
            or ends before the training does.
    """

    def __init__(self, scheduler: LRSchedulerCallable, interval: Literal["step", "epoch"] = "epoch") -> None:
        if interval not in ("step", "epoch"):
            raise UsageError(f"interval={interval!r} is not possible: a schedule steps each step or epoch")
        self.scheduler = scheduler
        self.interval = interval

    def configure(self, optimizer: Optimizer, total_steps: int | None) -> dict[str, Any]:
        try:
            scheduler = self.scheduler(optimizer)
        except (TypeError, ValueError) as error:
            raise UsageError(f"scheduler is not possible: {first_line(error)}") from error
        if isinstance(scheduler, ReduceLROnPlateau):
            raise UsageError("scheduler=ReduceLROnPlateau is not possible here: use one that follows steps or epochs")
        return {"scheduler": scheduler, "interval": self.interval}
