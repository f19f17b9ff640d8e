"""Statistics of the regularizer as CSV files: a row for each epoch and bin."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lqkd.callbacks.regularizer.moments import EpochWeights
from lqkd.callbacks.regularizer.statistics import EpochStatistic
from lqkd.utils.files import atomic_path


def write_weights(target: Path, history: Sequence[EpochWeights]) -> None:
    """Write the moments of every epoch to ``target``, atomically."""
    _write(target, [asdict(epoch) for epoch in history])


def write_statistic(target: Path, history: Sequence[EpochStatistic]) -> None:
    """Write one statistic with the columns epoch, bin, value, count and what else it has to ``target``, atomically."""
    _write(target, [row for epoch in history for row in epoch.rows()])


def _write(target: Path, rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with atomic_path(target) as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=names)
        writer.writeheader()
        writer.writerows(rows)
