"""Reads back what W&B wrote offline."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def wandb_history(path: Path) -> list[dict[str, Any]]:
    """Rows of the history in a ``.wandb`` file."""
    histories = [record.history.item for record in _complete(path) if record.HasField("history")]
    return [{i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items} for items in histories]


def wandb_artifacts(path: Path) -> dict[str, set[str]]:
    """Names of the artifacts in a ``.wandb`` file, and of the files in each."""
    found = [record.request.log_artifact.artifact for record in _complete(path) if record.HasField("request")]
    found += [record.artifact for record in _complete(path) if record.HasField("artifact")]
    return {artifact.name: {entry.path for entry in artifact.manifest.contents} for artifact in found if artifact.name}


def _complete(path: Path, patience: float = 30.0) -> list[Any]:
    """Everything in a file, once it is complete: its writer may outlive ``wandb.finish``."""
    end = time.monotonic() + patience
    while True:
        records = list(_records(path.read_bytes()))
        if any(record.HasField("exit") for record in records):
            return records
        assert time.monotonic() < end, f"{path} has no end"
        time.sleep(0.1)


def _records(data: bytes) -> Iterator[Any]:
    """A header of 7 bytes, then LevelDB's log format in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    position, part = 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # no room for a record's header: the rest of the block is padding
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if position + 7 + length > len(data):  # still being written
            return
        part += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(part)
            part = b""
