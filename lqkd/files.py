"""Files that are either whole or absent: written beside their final name, then renamed."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lqkd.errors import UsageError


@contextmanager
def atomic_path(target: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``target`` that replaces it when the block ends without an exception.

    A reader, or a process killed at any moment, sees the old file or the new one and never a part. The temporary
    name starts with a dot and ends in ``.tmp``; an exception removes it and leaves ``target`` as it was.

    Args:
        target: the final file name; its folder is made when missing.

    Raises:
        OSError: when the folder is not writable or the disk is full.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.stem}.{uuid.uuid4().hex[:8]}{target.suffix}.tmp"
    try:
        yield temporary
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def is_own_file(path: Path, folder: Path) -> bool:
    """Whether ``path`` is a file of ``folder``, whose other files may be a stranger's.

    A page that is made of a folder, and given away, must hold nothing else of its reader's disk.

    Raises:
        UsageError: when it is a link, or lies below one, that leads out of ``folder``.
    """
    if not path.is_file():
        return False
    check_inside(path, folder)
    return True


def check_inside(path: Path, folder: Path) -> None:
    """Refuse a ``path`` in ``folder`` that is a link, or lies below one, out of it.

    Raises:
        UsageError: then.
    """
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UsageError(
            f"{str(path)!r} is a link that leads out of {str(folder)!r}: only files in the folder are read"
        )


def write_text(target: str | Path, text: str) -> None:
    """Write ``text`` (UTF-8) to ``target`` atomically."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(target: str | Path, value: Any) -> None:
    """Write ``value`` to ``target`` atomically as indented JSON; NaN and infinities are refused by :mod:`json`."""
    write_text(target, json.dumps(value, indent=2, allow_nan=False) + "\n")
