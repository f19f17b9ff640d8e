"""What a person at a terminal sees of work outside of a training: a progress bar, or a line while it goes on."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

_PATIENCE = 2.0
"""Seconds without a bar."""
T = TypeVar("T")


class Waiting:
    """A progress bar with the time left, on a terminal only and once the work has taken two seconds.

    It is drawn on standard error and leaves nothing behind.

    Args:
        text: what is being done.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self._started = time.monotonic()
        self._progress: Any = None

    def __enter__(self) -> Waiting:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def update(self, done: int, total: int) -> None:
        """So much is done."""
        if self._progress is None and sys.stderr.isatty() and time.monotonic() - self._started > _PATIENCE:
            self._progress = self._bar(total)
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=done)

    def _bar(self, total: int) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        progress = Progress(*columns, console=Console(stderr=True), transient=True)
        progress.add_task(self.text, total=total)
        progress.start()
        return progress


def waiting(items: Iterable[T], text: str, total: int) -> Iterator[T]:
    """The items, with a bar that says how many of ``total`` have been dealt with."""
    with Waiting(text) as bar:
        for done, item in enumerate(items):
            bar.update(done, total)
            yield item


@contextmanager
def telling(text: str) -> Iterator[None]:
    """Say what is being done where its steps cannot be counted, or counting them would disturb it.

    The line is on standard error, on a terminal only, and goes away when the work has ended.
    """
    shows = sys.stderr.isatty()
    if shows:
        print(f"{text} ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shows:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
