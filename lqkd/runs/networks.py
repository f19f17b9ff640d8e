"""The networks of a run, from the teacher to the exported files, and what each is worth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lqkd.runs.provenance import REPORTS, outdated_exports
from lqkd.runs.verdicts import bits_of, measured_on
from lqkd.tasks.values import shown
from lqkd.utils.files import is_own_file
from lqkd.utils.schema import EXPORT_REPORT, read_json


class Network(NamedTuple):
    """One of them: its name, its value of the task's metric in words, and its size."""

    name: str
    value: str
    size: str


def networks_of(folder: Path, summary: Mapping[str, Any]) -> list[Network]:
    """Those of a run that something is known of.

    Args:
        folder: of the run.
        summary: content of its ``summary.json``.

    Raises:
        UsageError: when the report of an exported file is damaged.
    """
    return [*_measured(summary), *_exported(folder, summary)]


def _measured(summary: Mapping[str, Any]) -> Iterator[Network]:
    whole, packed = (_size(summary.get(key)) for key in ("float_bytes", "packed_bytes"))
    value, start = measured_on(summary)[0], summary.get("student_start")
    for name, known, size in (
        ("teacher", summary.get("teacher"), ""),
        ("student in float", summary.get("student_float"), whole),
        ("quantised only (PTQ)", start, packed),
        ("calibrated only (GPTQ)", summary.get("student_gptq"), packed),
        (f"trained, {bits_of(summary)}", value, packed),
    ):
        if known is not None:
            yield Network(name, _shown(summary, known), size)
        elif size == whole and name == "student in float" and start is not None:
            yield Network(name, "not trained", size)


def _exported(folder: Path, summary: Mapping[str, Any]) -> Iterator[Network]:
    old = outdated_exports(folder)
    for path in sorted(folder.glob(REPORTS)):
        if is_own_file(path, folder):
            said = read_json(path, EXPORT_REPORT)
            value = (said.get("measured") or {}).get("value")
            file = folder / str(said.get("file"))
            if file not in old and file.exists():
                told = "not measured" if value is None else _shown(summary, value)
                yield Network(file.name, told, _size(said.get("file_bytes")))


def _shown(summary: Mapping[str, Any], value: float) -> str:
    return shown(summary.get("metric") or "val/acc", value, 2)


def _size(known: float | None) -> str:
    return "" if known is None else f"{known / 1000:.1f} kB"
