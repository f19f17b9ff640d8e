"""Statistics of the regularizer as CSV files: a row for each epoch and bin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lqkd.callbacks.regularizer.moments import EpochWeights
from lqkd.callbacks.regularizer.statistics import EpochStatistic
from lqkd.utils.tables import write_csv


def write_weights(target: Path, history: Sequence[EpochWeights]) -> None:
    """Write the moments of every epoch to ``target``, atomically."""
    write_csv(target, [asdict(epoch) for epoch in history])


def write_statistic(target: Path, history: Sequence[EpochStatistic]) -> None:
    """Write one statistic with the columns epoch, bin, value, count and what else it has to ``target``, atomically."""
    write_csv(target, [row for epoch in history for row in epoch.rows()])
