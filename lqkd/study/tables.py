"""The tables of a study as CSV and Markdown. They hold no times, so that they are the same however a study was run."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lqkd.files import atomic_path
from lqkd.study.results import Run
from lqkd.study.statistics import Summary
from lqkd.utils import escaping

TABLE = "table.csv"
RUNS = "runs.csv"
NOTE = (
    "Accuracies in %, mean and standard deviation over seeds. Differences to the baseline are paired by seed, with a "
    "95 % t interval. Validation accuracy: best epoch, and last epoch. The test accuracy is that of the checkpoint "
    "that was best on the validation split; nothing was selected on test data."
)
_FROM_SUMMARY = ("weight_bits", "activation_bits", "packed_bytes", "float_bytes", "bit_operations", "epochs", "steps")


def write_tables(folder: Path, runs: Sequence[Run], summaries: Mapping[str, Mapping[str, Summary]]) -> None:
    """Write ``table.csv`` (a row a variant) and ``runs.csv`` (a row a run) to ``folder``, atomically."""
    _write(folder / TABLE, [_variant_row(name, measures) for name, measures in summaries.items()])
    _write(folder / RUNS, [_run_row(run) for run in runs])


def _variant_row(name: str, measures: Mapping[str, Summary]) -> dict[str, Any]:
    row: dict[str, Any] = {"variant": name}
    for measure, summary in measures.items():
        row |= {f"{measure}_seeds": summary.count, f"{measure}_mean": summary.mean, f"{measure}_std": summary.std}
        d = summary.difference
        for key in ("pairs", "mean", "low", "high"):
            row[f"{measure}_difference_{key}"] = None if d is None else getattr(d, key)
    return row


def _run_row(run: Run) -> dict[str, Any]:
    row: dict[str, Any] = {"variant": run.variant, "seed": run.seed, "status": run.status, "message": run.message}
    row |= {"val_best": run.best, "val_last": run.last, "test": run.test}
    return row | {key: run.summary.get(key) for key in _FROM_SUMMARY}


def _write(target: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with atomic_path(target) as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: escaping.csv_cell(value) for key, value in row.items()} for row in rows)


NONE = "n/a"
HEADINGS = (
    "variant", "seeds", "val best", "difference", "val last", "difference", "test", "difference"
)  # fmt: skip


def cells(name: str, measures: Mapping[str, Summary], baseline: str | None) -> list[str]:
    """The texts of one variant's row under :data:`HEADINGS`."""
    row = [name, str(measures["val_best"].count)]
    for summary in measures.values():
        row += [accuracy(summary), "baseline" if name == baseline else difference(summary)]
    return row


def accuracy(summary: Summary) -> str:
    """For example ``91.24 ± 0.31``."""
    if summary.mean is None:
        return NONE
    return f"{100 * summary.mean:.2f}" + ("" if summary.std is None else f" ± {100 * summary.std:.2f}")


def difference(summary: Summary) -> str:
    """For example ``+0.41 [+0.12, +0.70]``."""
    d = summary.difference
    if d is None or d.mean is None:
        return NONE
    interval = "" if d.low is None or d.high is None else f" [{100 * d.low:+.2f}, {100 * d.high:+.2f}]"
    return f"{100 * d.mean:+.2f}{interval}"


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up."""
    escaped = [[escaping.markdown(cell) for cell in row] for row in (headings, *rows)]
    widths = [max(len(row[column]) for row in escaped) for column in range(len(headings))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in escaped]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines) + "\n"
