"""Folders that a format writes, and whether one that is there may be replaced."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path

from lqkd.errors import UsageError


def check_own(folder: Path, names: Container[str], format: str) -> None:
    """Refuse to replace a folder with something else in it than ``names``, or a file.

    Raises:
        UsageError: then.
    """
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    foreign = [name for name in there if name not in names]
    if foreign or (folder.exists() and not folder.is_dir()):
        what = f"has {foreign[0]!r}" if foreign else "is a file"
        raise UsageError(f"{str(folder)!r} {what}, which --format {format} has not written: choose another folder")
