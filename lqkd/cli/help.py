"""Help of Lightning's verbs at once: it is kept from the first time, since to make it takes all of Lightning."""

from __future__ import annotations

import contextlib
import hashlib
import io
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import lqkd
from lqkd.utils.files import default_cache_dir, write_text

_PARTS = ("lqkd", "lightning", "torch", "jsonargparse")
"""Packages whose versions the text depends on."""


def help_of(verb: str, make: Callable[[], None]) -> str:
    """The help of ``verb``, kept for these versions, this width of the terminal and these files of lqkd.

    Args:
        verb: one of Lightning's.
        make: prints the text, and may end with SystemExit.
    """
    kept = default_cache_dir() / "help" / f"{verb}-{_key()}.txt"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return kept.read_text(encoding="utf-8")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        make()
    with contextlib.suppress(OSError):  # a home that cannot be written has no kept help
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_text(kept, printed.getvalue())
    return printed.getvalue()


def _key() -> str:
    files = sorted(Path(lqkd.__file__).parent.rglob("*.py"))
    parts = [f"{name} {metadata.version(name)}" for name in _PARTS]
    parts += [
        str(shutil.get_terminal_size((120, 24)).columns),
        *(f"{path} {path.stat().st_mtime_ns}" for path in files),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
