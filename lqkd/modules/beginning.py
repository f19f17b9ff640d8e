"""Where an optimizer and its schedule begin, and where they are after so many steps of the schedule."""

from __future__ import annotations

import warnings
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, CosineAnnealingLR, LRScheduler

from lqkd.errors import UsageError, first_line


@dataclass(frozen=True)
class Beginning:
    """An optimizer's settings and its scheduler's state as the configuration makes them, before the first step.

    A checkpoint carries those of the run that wrote it, which would silently win over the configuration. From the
    beginning, a resumed run finds the place that a run with its own configuration would have reached: with another
    learning rate, other milestones, or more steps than the run that it goes on with.
    """

    groups: list[dict[str, Any]]
    """The settings of every parameter group, without its parameters."""
    scheduler: dict[str, Any]

    @classmethod
    def of(cls, optimizer: Optimizer, scheduler: LRScheduler) -> Beginning:
        """Of an optimizer and a scheduler that have just been made."""
        groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        return cls(deepcopy(groups), deepcopy(scheduler.state_dict()))

    def advance(self, optimizer: Optimizer, scheduler: LRScheduler, steps: int) -> None:
        """Set both back to the beginning, whatever they are now, and then ``steps`` steps of the schedule on."""
        for group, settings in zip(optimizer.param_groups, self.groups, strict=True):
            group.update(deepcopy(settings))
        scheduler.load_state_dict(deepcopy(self.scheduler))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*lr_scheduler.step")  # before any step of the optimizer
            for _ in range(steps):
                scheduler.step()

    def check_lasts(
        self, optimizer: Optimizer, scheduler: LRScheduler, steps: int, interval: str, setting: str
    ) -> None:
        """See that the schedule has as many steps as the training takes of it, and leave both at the beginning.

        Args:
            optimizer: the one that it began with.
            scheduler: likewise.
            steps: how often the training steps the schedule.
            interval: after what it does so, ``step`` or ``epoch``.
            setting: what the schedule is called in a message.

        Raises:
            UsageError: when it ends before.
        """
        name = type(scheduler).__name__
        try:
            self.advance(optimizer, scheduler, steps)
        except Exception as error:  # a scheduler of the user's own may raise any type
            raise UsageError(
                f"{setting} is not possible: {name} ends before the {steps} {interval}s of the training are done "
                f"({first_line(error)}): let its arguments say at least as many"
            ) from error
        self.advance(optimizer, scheduler, 0)
        if isinstance(scheduler, CosineAnnealingLR) and scheduler.T_max < steps:
            rank_zero_warn(
                f"{setting}: the learning rate of {name} climbs again after T_max={scheduler.T_max} of the {steps} "
                f"{interval}s of the training"
            )


def steps_taken(scheduler: LRScheduler) -> int:
    """How many steps a scheduler has taken."""
    return steps_taken(scheduler._schedulers[0]) if isinstance(scheduler, ChainedScheduler) else scheduler.last_epoch
