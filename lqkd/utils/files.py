"""Files that are either whole or absent: written beside their final name, then renamed."""

from __future__ import annotations

import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

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


@contextmanager
def atomic_folder(target: str | Path) -> Iterator[Path]:
    """Yield a new folder beside ``target`` that replaces it when the block ends without an exception.

    An exception removes the new one and leaves ``target`` as it was.

    Args:
        target: the final folder; that above it is made when missing.

    Raises:
        OSError: when the folder above is not writable or the disk is full.
    """
    target = Path(target)
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
    temporary.mkdir(parents=True)
    try:
        yield temporary
        replace_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(source: Path, target: Path) -> None:
    """Rename ``source`` to ``target``, which it replaces.

    The old one is renamed first and removed last: a process that is killed between leaves it whole, under a name with a
    dot.

    Raises:
        OSError: when the folder above is not writable.
    """
    old = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.old"
    if target.exists():
        os.rename(target, old)
    os.rename(source, target)
    shutil.rmtree(old, ignore_errors=True)


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


def finite(value: Any, lost: list[str] | None = None, name: str = "") -> Any:
    """A copy of dicts, lists and values with None for every number that is NaN or infinite, which JSON does not know.

    Args:
        value: what is to be written.
        lost: gets the names of those numbers, such as ``balance.task``.
        name: of ``value`` itself.
    """
    if isinstance(value, dict):
        return {key: finite(entry, lost, f"{name}.{key}".lstrip(".")) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry, lost, f"{name}.{index}") for index, entry in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        if lost is not None:
            lost.append(name)
        return None
    return value


def write_safetensors(
    target: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write ``tensors`` and texts about them to ``target`` atomically.

    The bytes depend on nothing but these, so that a checksum can prove two files equal: the library orders the texts
    at random, anew in every process, where here they are sorted.
    """
    from safetensors.torch import save

    # Cloned, since a shared layer has several names and the file format wants a tensor for each.
    data = save({key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}, metadata)
    start = 8 + int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8:start])
    texts = header.pop("__metadata__", None)
    if texts is not None:
        header = {"__metadata__": dict(sorted(texts.items())), **header}
    described = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    described += b" " * (-len(described) % 8)  # the tensors that follow are aligned
    with atomic_path(target) as temporary:
        temporary.write_bytes(len(described).to_bytes(8, "little") + described + data[start:])


def default_cache_dir() -> Path:
    """The folder for what can be made again: the environment variable ``LQKD_CACHE``, else ``~/.cache/lqkd``."""
    return Path(os.environ.get("LQKD_CACHE") or Path.home() / ".cache" / "lqkd")
