"""Tables that have every row as soon as it exists, and that a second visit goes on with."""

from __future__ import annotations

import csv
import platform
import time
from pathlib import Path
from typing import Any

import torch

from lqkd.utils.files import atomic_path

FAILED = "failed: "
"""What the note of a row begins with where something went wrong."""


class Table:
    """A CSV file, written anew (beside, then renamed) with each row.

    Args:
        path: the file; rows that are there are kept.
        key: the columns that tell rows apart.
    """

    def __init__(self, path: Path, *key: str) -> None:
        self.path = path
        self.key = key
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            with open(path, newline="", encoding="utf-8") as stream:
                self.rows = list(csv.DictReader(stream))

    def has(self, *values: Any) -> bool:
        """Whether there is a row with these values of the key, and not of a failure, which is tried again."""
        return any(self._key(row) == tuple(map(str, values)) and not is_failure(row) for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Add a row, in the place of one with the same key."""
        self.rows = [kept for kept in self.rows if self._key(kept) != self._key(row)] + [row]
        columns = list(dict.fromkeys(name for kept in self.rows for name in kept))
        with atomic_path(self.path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, columns, restval="")
            writer.writeheader()
            writer.writerows(self.rows)
        print(", ".join(f"{name} {value}" for name, value in row.items() if value != ""), flush=True)

    def _key(self, row: dict[str, Any]) -> tuple[str, ...]:
        return tuple(str(row.get(name, "")) for name in self.key)


def is_failure(row: dict[str, Any]) -> bool:
    """Whether a row says that something went wrong."""
    return str(row.get("note", "")).startswith(FAILED)


class Clock:
    """The time that a stage has left.

    Args:
        seconds: all of it.
    """

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine() -> dict[str, str]:
    """The columns that every table ends with."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {"device": name, "torch": torch.__version__}


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def why(error: BaseException) -> str:
    """One line about a failure."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
