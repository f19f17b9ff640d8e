"""What a person sees while a study runs: a line for each run that ends, and every minute where the others are."""

from __future__ import annotations

import time
from collections.abc import Sequence

from lqkd.studies.job import FINISHED, Task
from lqkd.studies.results import read
from lqkd.tasks.values import shown

_EVERY = 60.0
"""Seconds from one line to the next while no run ends."""


class StudyProgress:
    """Prints lines with an estimate of the time left, from how long the runs took that ended in this process.

    Args:
        total: number of runs of the study.
        left: number of those that are still to do.
        parallel: runs at the same time.
    """

    def __init__(self, total: int, left: int, parallel: int) -> None:
        self.total, self.left, self.parallel = total, left, parallel
        self._started = self._printed = time.monotonic()
        self._ended = 0

    def ended(self, task: Task) -> None:
        """A run has ended, in whatever way."""
        self.left -= 1
        self._ended += 1
        status, message = task.ended()
        run = read(task.folder, task.variant, task.seed, status, message)
        told = f"{status}: {message}"
        if status == FINISHED:
            told = FINISHED if run.best is None else f"val best {shown(run.metric, run.best, 2)}"
            told += "" if run.last is None else f", last {shown(run.metric, run.last, 2)}"
            told += "" if run.verdict is None else f"; regularizer {run.verdict}"
        self._print(f"[{self.total - self.left}/{self.total}] {task}: {told}{self._time_left()}")

    def waiting(self, tasks: Sequence[Task]) -> None:
        """Called again and again with the runs that go on."""
        if time.monotonic() - self._printed < _EVERY or not tasks:
            return
        where = []
        for task in tasks[:8]:
            losses = read(task.folder, task.variant, task.seed).curves.get("train/loss")
            where.append(f"{task} " + (f"in epoch {losses[-1][0]}" if losses else "is starting"))
        more = f" and {len(tasks) - 8} more" if len(tasks) > 8 else ""
        self._print(f"[{self.total - self.left}/{self.total}] {', '.join(where)}{more}{self._time_left()}")

    def _time_left(self) -> str:
        if not self.left or not self._ended:
            return ""
        minutes = (time.monotonic() - self._started) / self._ended * self.left / 60
        return f"; about {minutes:.0f} min left" if minutes >= 1.5 else f"; about {60 * minutes:.0f} s left"

    def _print(self, text: str) -> None:
        self._printed = time.monotonic()
        print(text, flush=True)
