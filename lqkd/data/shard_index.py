"""The index of a set of tar shards: where each image lies and what it shows."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lqkd.errors import UsageError, first_line
from lqkd.utils.files import atomic_path

PARTS = ("train", "val")
"""The folders of a set of shards."""
INDEX = "index.npz"
"""Name of the file, beside the shards of each part."""


class ShardIndex(NamedTuple):
    """One entry per image, in the order in which images lie in the shards, and one per shard and class."""

    shard: np.ndarray
    """(N,) int32 position in ``shard_names``."""
    offset: np.ndarray
    """(N,) int64 where the encoded image begins in its shard, in bytes."""
    size: np.ndarray
    """(N,) int64 of the encoded image, in bytes."""
    label: np.ndarray
    """(N,) int64 position in ``class_names``."""
    shard_names: np.ndarray
    """(S,) text, file names."""
    shard_bytes: np.ndarray
    """(S,) int64 sizes of the files."""
    class_names: np.ndarray
    """(C,) text."""


def write_index(folder: Path, index: ShardIndex) -> None:
    """Write the index of the shards in ``folder``, whole or not at all."""
    with atomic_path(folder / INDEX) as temporary, open(temporary, "wb") as stream:
        np.savez(stream, **index._asdict())


def parse_index(content: bytes, name: str) -> ShardIndex:
    """Return the index that a file holds.

    Args:
        content: of the file.
        name: what messages call it.

    Raises:
        UsageError: when it is damaged, cut short or of another kind.
    """
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            # It is written without compression: what says to be more than the file would fill all memory.
            if sum(entry.file_size for entry in arrays.zip.infolist()) > len(content):
                raise ValueError("it unpacks to more than its size")
            index = ShardIndex(**{field: arrays[field] for field in ShardIndex._fields})
    except Exception as error:  # a damaged archive raises almost anything
        raise UsageError(f"{name} is damaged or no index of shards ({first_line(error)}): make it again.") from error
    if not (_is_typed(index) and _is_consistent(index)):
        raise UsageError(f"{name} contradicts itself: make it again with python -m lqkd make-shards.")
    return index


def _is_typed(index: ShardIndex) -> bool:
    """Whether every array is a row of whole numbers, or of texts."""
    return all(
        array.ndim == 1 and array.dtype.kind == ("U" if field.endswith("_names") else "i")
        for field, array in index._asdict().items()
    )


def _is_consistent(index: ShardIndex) -> bool:
    samples, shards = len(index.label), len(index.shard_names)
    return bool(
        samples == len(index.shard) == len(index.offset) == len(index.size)
        and shards == len(index.shard_bytes)
        and samples > 0
        and 0 <= index.label.min() <= index.label.max() < len(index.class_names)
        and 0 <= index.shard.min() <= index.shard.max() < shards
        and min(index.offset.min(), index.shard_bytes.min()) >= 0
        and index.size.min() >= 0
        and (index.size <= index.shard_bytes[index.shard] - index.offset).all()
        and all(re.fullmatch(r"[\w-]+\.tar", str(shard)) for shard in index.shard_names)
    )


def import_webdataset() -> Any:
    """Return the optional package that writes shards and opens URLs.

    Raises:
        UsageError: when it is not installed.
    """
    try:
        import webdataset
    except ImportError:
        raise UsageError("shards need webdataset: pip install 'lqkd[streaming]'") from None
    return webdataset
