"""Tables as CSV files."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lqkd.utils.escaping import csv_cell
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
