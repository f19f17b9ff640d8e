"""What is told of a file of a language model: rows of the table on the screen, and the card beside the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lqkd.export import report
from lqkd.export.card import Summary, card_path
from lqkd.export.parity import Parity
from lqkd.models.calls import Inputs
from lqkd.tasks.values import shown
from lqkd.utils.escaping import markdown, terminal
from lqkd.utils.files import write_text
from lqkd.utils.tables import print_table

Rows = list[tuple[str, str]]


def size_row(summary: Summary) -> tuple[str, str]:
    """The size of the file, and of the network in float."""
    return "file", f"{summary.file_bytes / 1000:.1f} kB (in float: {summary.float_bytes / 1000:.1f} kB)"


def measured_rows(parity: Parity) -> Rows:
    """What the file was judged on, and the metric as trained and of the file, where it was measured."""
    metric = parity.metric or ""
    measured = (("as trained", parity.trained), ("of the file", parity.exported))
    rows = [(f"{metric} {name}", shown(metric, value, 2)) for name, value in measured if value is not None]
    return [("judged on", f"{parity.samples} samples of the {parity.split} split"), *rows]


def tell(
    summary: Summary,
    rows: Rows,
    student: nn.Module,
    inputs: Inputs,
    parity: Parity,
    about: Mapping[str, Any],
    *,
    format: str,
    runtime: str,
    more: Sequence[str] = (),
) -> None:
    """Print what a proven file is, and write its card and its report beside it.

    Args:
        summary: of the file.
        rows: of the table.
        student: as it was trained.
        inputs: texts.
        parity: the proof.
        about: where it comes from: ``data`` and ``checkpoint``.
        format: of the file.
        runtime: what runs it.
        more: lines at the end of the card.
    """
    print_table(f"export to {summary.path.name}", None, rows, left=2)
    print(terminal(f"written to {summary.path}"))
    write_language_card(summary.path, runtime, rows, about, more)
    described = {"format": format, "checkpoint": about.get("checkpoint"), "parity": parity.numbers()}
    report.tell(report.describe(student, inputs.part(slice(1)), summary, described), summary.path)


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
