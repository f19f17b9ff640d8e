"""Tables: as CSV files, on the terminal, and as plain text."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lqkd.utils.escaping import csv_cell, terminal
from lqkd.utils.files import atomic_path


def write_csv(
    target: Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str] | None = None, numbers: bool = False
) -> None:
    """Write a table with a line of headings, in UTF-8, whole or not at all.

    Args:
        target: the file.
        rows: by column; a column that a row lacks is empty there. Texts are escaped, see
            :func:`~lqkd.utils.escaping.csv_cell`.
        columns: in this order; None for those of the rows as they come up.
        numbers: whether all values are numbers, some as they were read back: none is escaped then.
    """
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row)) if columns is None else list(columns)
    with atomic_path(target) as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows if numbers else ({n: csv_cell(value) for n, value in row.items()} for row in rows))


def print_table(
    title: str, columns: Sequence[str] | None, rows: Iterable[Sequence[Any]], left: int = 1, width: int | None = None
) -> None:
    """Print a table with a frame, its texts as they are, in one line each, whatever a terminal would make of them.

    Args:
        title: above it.
        columns: headings; None for none.
        rows: a text for each column.
        left: how many columns, from the first, have their texts on the left; those of the others are on the right.
        width: of the terminal; None for what it says itself.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = [[Text(terminal(cell)) for cell in row] for row in rows]
    console, heading = Console(width=width), Text(terminal(title))
    table = Table(title=heading, show_header=columns is not None, min_width=min(heading.cell_len, console.width))
    for index, name in enumerate(columns or [""] * max(map(len, shown), default=0)):
        table.add_column(Text(name), justify="left" if index < left else "right")
    for row in shown:
        table.add_row(*row)
    console.print(table)


def text_table(rows: Sequence[Sequence[str]], left: int) -> str:
    """Rows as lines of plain text, the columns under each other; ``left`` as of :func:`print_table`.

    Examples:
        >>> print(text_table([("layer", "bits"), ("conv1", "8")], left=1))
        layer  bits
        conv1     8
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
