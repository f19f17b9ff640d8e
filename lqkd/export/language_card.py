"""What is told of a file of a language model: rows of the table on the screen, and the card beside the file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lqkd.errors import ParityError
from lqkd.export.card import Summary, card_path
from lqkd.export.parity import Parity
from lqkd.tasks.values import shown
from lqkd.utils.escaping import markdown
from lqkd.utils.files import replace_folder, write_text

Rows = list[tuple[str, str]]


def keep_proven(unproven: Path, path: Path, parity: Parity) -> None:
    """Give a file, or a folder, its name once it is proven; what had that name is there until then.

    Args:
        unproven: where it was written.
        path: its name.
        parity: the proof.

    Raises:
        ParityError: when it has failed; the file stays where it was written.
    """
    if parity.problem is not None:
        raise ParityError(f"the file fails the comparison and is kept as {unproven}: {parity.problem}")
    if unproven.is_dir():
        replace_folder(unproven, path)
    else:
        os.replace(unproven, path)


def size_row(summary: Summary) -> tuple[str, str]:
    """The size of the file, and of the network in float."""
    return "file", f"{summary.file_bytes / 1000:.1f} kB (in float: {summary.float_bytes / 1000:.1f} kB)"


def measured_rows(parity: Parity) -> Rows:
    """What the file was judged on, and the metric as trained and of the file, where it was measured."""
    metric = parity.metric or ""
    measured = (("as trained", parity.trained), ("of the file", parity.exported))
    rows = [(f"{metric} {name}", shown(metric, value, 2)) for name, value in measured if value is not None]
    return [("judged on", f"{parity.samples} samples of the {parity.split} split"), *rows]


def write_language_card(path: Path, runtime: str, rows: Rows, about: Mapping[str, Any], more: Sequence[str]) -> None:
    """Write the card beside a file.

    Args:
        path: of the file.
        runtime: what runs it.
        rows: of the table on the screen.
        about: where it comes from: ``data`` and ``checkpoint``.
        more: lines at the end.
    """
    lines = [f"# {markdown(path.name)}", "", f"A low-bit language model for {runtime}, exported by lqkd.", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {markdown(value)} |" for name, value in rows), ""]
    lines += ["## Origin", "", f"data: {markdown(about.get('data'))}", ""]
    if about.get("checkpoint"):
        lines += [f"checkpoint: SHA-256 `{about['checkpoint']}`", ""]
    write_text(card_path(path), "\n".join([*lines, *more]) + "\n")
