"""Held-out rows on which players that look ahead measure the task."""

from __future__ import annotations

from typing import Any, cast

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.modules.distillation import Distillation
from lqkd.modules.held_out import Learning, kept_batch, part_of
from lqkd.regularizers import LookAhead


class HeldOutTask:
    """The held-out rows of one term, of which every step sees others, over and over in one order.

    All processes see the same.

    Args:
        module: attached to a Trainer, before its first step.
        rows: at a step.
        batch: what the task takes, of all rows, on the device.

    Raises:
        UsageError: when the student is not called with one tensor alone.
    """

    def __init__(self, module: Learning, rows: int, batch: Any) -> None:
        self._module, self._rows, self._batch = module, rows, batch
        self._size = len(module.inputs(batch))
        if module.inputs(batch).alone() is None:
            raise UsageError("to look ahead with held-out rows needs networks that are called with one tensor alone")

    def at(self, step: int) -> tuple[Tensor, Any]:
        """What the student is called with, and the batch for the task, at a step, counted from 0."""
        rows = torch.arange(step * self._rows, (step + 1) * self._rows) % self._size
        batch = part_of(self._batch, rows, self._size)
        return cast(Tensor, self._module.inputs(batch).alone()), batch


def looking(distillation: Distillation) -> dict[str, int]:
    """By name of its term, how many held-out rows a player that looks ahead sees at a step."""
    found = {}
    for name, term in distillation.terms():
        player = None if term.regularizer is None else term.regularizer.player
        if isinstance(player, LookAhead) and player.rows:
            found[name] = player.rows
    return found


def kept_task(module: Learning) -> dict[str, HeldOutTask]:
    """The held-out rows of every such term, kept on the device of a module that is before its first step.

    Raises:
        UsageError: when samples of the batches cannot be told apart, or there are too few.
    """
    found = {}
    for name, rows in looking(module.distillation).items():
        with isolate_rng(), module.distillation.told(name):
            found[name] = HeldOutTask(module, rows, kept_batch(module, "to look ahead with"))
    return found
