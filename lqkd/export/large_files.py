"""ONNX models above two gigabytes, which a single file cannot hold: their numbers lie in a second one beside it."""

from __future__ import annotations

import mmap
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx

from lqkd.utils.files import atomic_path

LIMIT = onnx.checker.MAXIMUM_PROTOBUF
"""Bytes of the largest file: protobuf counts them in 31 bits."""
_SMALL = 1024
"""Bytes of a constant that stays in the file, such as a shape, which runtimes want to see before they read others."""
_AROUND, _REST = 8, 2**16
"""Bytes around each part of a model, and at most of all that is small: names, inputs and outputs."""


def is_large(model: onnx.ModelProto) -> bool:
    """Whether the model does not go into one file."""
    parts = (*model.graph.initializer, *model.graph.node, *model.metadata_props)  # of the whole protobuf cannot tell
    return sum(part.ByteSize() + _AROUND for part in parts) + _REST >= LIMIT


def copy_of(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy, constant by constant: protobuf copies by way of bytes, of which it takes no more than a file has."""
    copied = onnx.ModelProto()
    _take(copied, model)
    return copied


def save(model: onnx.ModelProto, path: Path) -> None:
    """Write a model, with its numbers in a second file in the same folder where one cannot hold it.

    The second file has a name that no other has, so that a model which is replaced keeps its own until it is gone:
    its name is in the model.

    Args:
        model: left alone.
        path: temporary, of :func:`lqkd.utils.files.atomic_path`.
    """
    if not is_large(model):
        path.write_bytes(model.SerializeToString())
        return
    name = f"{path.name.removeprefix('.').removesuffix('.tmp')}.data"
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{name}.", suffix=".tmp") as folder:
        _save_both(model, Path(folder) / path.name, name)
        with atomic_path(path.with_name(name)) as temporary:
            (Path(folder) / name).replace(temporary)
        (Path(folder) / path.name).replace(path)


@contextmanager
def atomic_model(target: str | Path) -> Iterator[Path]:
    """As :func:`lqkd.utils.files.atomic_path` for what :func:`save` writes: with what belongs to it, or not at all.

    Afterwards the second file of a model that was replaced is gone, unless another file of the folder names it, such as
    that model under a new name.
    """
    target = Path(target)
    before = _second_files(target)
    try:
        with atomic_path(target) as temporary:
            yield temporary
    except BaseException:
        _remove(_second_files(target) - before)
        raise
    _remove({path for path in before if not any(_names(file, path) for file in target.parent.iterdir())})


def all_files(path: Path) -> list[Path]:
    """A model's file, and the second one that it has."""
    return [path, *sorted(second for second in _second_files(path) if _names(path, second))]


@contextmanager
def readable(model: onnx.ModelProto) -> Iterator[bytes | str]:
    """What runtimes take within the block: the bytes of a model, or the name of a file where these are too many."""
    if not is_large(model):
        yield model.SerializeToString()
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # which a runtime may still hold open
        _save_both(model, Path(folder) / "model.onnx", "model.data")
        yield str(Path(folder) / "model.onnx")


def check_model(model: onnx.ModelProto) -> None:
    """ONNX's own check, shapes included, of a model of any size."""
    if not is_large(model):
        onnx.checker.check_model(model, full_check=True)
        return
    with readable(model) as path:
        onnx.checker.check_model(path, full_check=True)


def _save_both(model: onnx.ModelProto, path: Path, name: str) -> None:
    copied = copy_of(model)  # which saving leaves without its numbers
    onnx.save(copied, path, save_as_external_data=True, location=name, size_threshold=_SMALL)


def _take(target: Any, source: Any) -> None:
    for field, value in source.ListFields():
        if field.name == "graph":
            _take(target.graph, value)
        elif hasattr(value, "extend"):  # repeated
            getattr(target, field.name).extend(value)
        elif hasattr(value, "CopyFrom"):  # a message
            getattr(target, field.name).CopyFrom(value)
        else:
            setattr(target, field.name, value)


def _second_files(target: Path) -> set[Path]:
    own = re.compile(rf"{re.escape(target.stem)}\.[0-9a-f]{{8}}{re.escape(target.suffix)}\.data")
    return {path for path in target.parent.glob("*.data") if own.fullmatch(path.name)}


def _names(file: Path, second: Path) -> bool:
    """Whether ``file`` is a model whose numbers are in ``second``."""
    if file.suffix == ".data" or not file.is_file() or file.stat().st_size == 0:
        return False
    with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(second.name.encode()) >= 0


def _remove(paths: set[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
