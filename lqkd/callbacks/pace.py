"""Work that is done as often as it takes no more than a part of the time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Pace:
    """Says when the next piece of work is due, from how long the last one took.

    Args:
        part: of the time, > 0, that the work may take.
        seconds: what the first piece of work is expected to take.
    """

    def __init__(self, part: float, seconds: float = 0.0) -> None:
        self.part = part
        self.seconds = seconds
        self._next = 0.0
        self.start()

    def start(self) -> None:
        """Time counts from now on."""
        self._next = time.monotonic() + self.seconds / self.part

    def due(self) -> bool:
        return time.monotonic() >= self._next

    @contextmanager
    def work(self) -> Iterator[None]:
        """Around a piece of work."""
        started = time.monotonic()
        yield
        self.seconds = time.monotonic() - started
        self.start()
