"""What a person at a terminal sees of work outside of a training: progress bars with the time left.

Bars are drawn on standard error, on a terminal only, and leave nothing behind; work within work has a bar below that of
the whole. They are drawn by who does the work, and by no thread beside it that would disturb what is timed.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

_PATIENCE = 2.0
"""Seconds without a bar."""
_BETWEEN = 0.1
"""Seconds from one drawing to the next."""
T = TypeVar("T")


class _Display:
    """The bars of all that goes on."""

    def __init__(self) -> None:
        self._progress: Any = None
        self._drawn = 0.0

    def add(self, text: str, total: int | None) -> Any:
        """A new bar, and what names it."""
        if self._progress is None:
            self._progress = _progress()
            self._progress.start()
        return self._progress.add_task(text, total=total)

    def update(self, bar: Any, text: str, done: int) -> None:
        self._progress.update(bar, description=text, completed=done)
        if time.monotonic() - self._drawn > _BETWEEN:
            self._progress.refresh()
            self._drawn = time.monotonic()

    def remove(self, bar: Any) -> None:
        self._progress.remove_task(bar)
        if not self._progress.task_ids:
            self._progress.stop()
            self._progress, self._drawn = None, 0.0


_display = _Display()


class Progress:
    """A bar for work whose steps are counted, once it has taken two seconds.

    Args:
        text: what is being done.
    """

    _patience = _PATIENCE

    def __init__(self, text: str) -> None:
        self.text = text
        self._started = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            _display.remove(self._bar)
            self._bar = None

    def update(self, done: int, total: int | None) -> None:
        """So much is done."""
        if self._bar is None and _is_looked_at() and time.monotonic() - self._started > self._patience:
            self._bar = _display.add(self.text, total)
        if self._bar is not None:
            _display.update(self._bar, self.text, done)


class Stages(Progress):
    """A bar for work of several stages, which names the one that goes on; it is there at once.

    Args:
        total: number of stages.
    """

    _patience = -1.0

    def __init__(self, total: int) -> None:
        super().__init__("")
        self.total, self._begun = total, 0

    def __enter__(self) -> Stages:
        return self

    def __call__(self, text: str) -> None:
        """The next stage begins."""
        self.text = text
        self.update(self._begun, self.total)
        self._begun += 1


def track(items: Iterable[T], text: str, total: int | None) -> Iterator[T]:
    """The items, with a bar that says how many of ``total``, None where that is not known, have been dealt with."""
    with Progress(text) as bar:
        for done, item in enumerate(items):
            bar.update(done, total)
            yield item


def _is_looked_at() -> bool:
    """Whether a person sees standard error, and this is not one of several processes that share it but the first."""
    return sys.stderr.isatty() and os.environ.get("LOCAL_RANK", "0") == "0"


def _progress() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        auto_refresh=False,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # what is printed meanwhile goes above the bars, but not out of a file
    )
