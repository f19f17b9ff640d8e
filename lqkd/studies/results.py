"""What the runs of a study have come to, read from their folders."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lqkd.errors import UsageError
from lqkd.runs.folder import METRICS, SUMMARY
from lqkd.runs.provenance import outdated_exports
from lqkd.runs.verdicts import SPOILED, verdicts
from lqkd.studies import job
from lqkd.studies.job import FINISHED
from lqkd.tasks.values import MODE, MONITOR
from lqkd.utils.files import is_own_file
from lqkd.utils.renames import current_keys
from lqkd.utils.schema import SUMMARY as SCHEMA
from lqkd.utils.schema import read_json


@dataclass
class Run:
    """One run.

    Attributes:
        variant: its variant.
        seed: its seed.
        status: ``finished``, ``failed``, ``diverged`` or ``stopped``.
        message: why it has not finished.
        folder: its run folder.
        summary: what ``summary.json`` says; empty without one.
        curves: mean of every metric in every epoch, as (epoch, value), epochs counted from 1.
        outdated: a sentence for every exported file that is of an earlier student than the best checkpoint.
    """

    variant: str
    seed: int | None
    status: str
    message: str
    folder: Path
    summary: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    outdated: tuple[str, ...] = ()

    @property
    def finished(self) -> bool:
        return self.status == FINISHED

    @property
    def verdict(self) -> str | None:
        """What became of the regularizer, where that was no good: ``collapsed``, for instance."""
        return next((told.verdict for told in verdicts(self.summary).values() if told.verdict in SPOILED), None)

    @property
    def sentence(self) -> str:
        """Of the regularizer whose verdict is no good; empty where there is none."""
        return next((told.sentence for told in verdicts(self.summary).values() if told.verdict in SPOILED), "")

    @property
    def ending(self) -> str:
        """The status, and the verdict on the regularizer where that was no good."""
        return self.status if self.verdict is None else f"{self.status}, regularizer {self.verdict}"

    @property
    def metric(self) -> str:
        """The metric that chose the checkpoint; earlier summaries, of accuracies, do not tell."""
        return self.summary.get("metric") or MONITOR

    @property
    def mode(self) -> str:
        """Whether the least or the largest of it is the best."""
        return self.summary.get("mode") or MODE

    @property
    def best(self) -> float | None:
        """Best value on the validation split, by which the checkpoint is chosen."""
        return self.summary.get("val")

    @property
    def last(self) -> float | None:
        """Value on the validation split after the last epoch."""
        values = self.curves.get(self.metric)
        return values[-1][1] if values else None

    @property
    def test(self) -> float | None:
        """Value on the test split of the checkpoint that was best on the validation split."""
        return self.summary.get("test")


def metric_of(runs: Iterable[Run]) -> tuple[str, str]:
    """The metric of a study and its mode: those of the first run that has a summary."""
    found = next((run for run in runs if run.summary), None)
    return (MONITOR, MODE) if found is None else (found.metric, found.mode)


def read_runs(tasks: Iterable[job.Task]) -> list[Run]:
    """Read the runs of a study, in order."""
    return [read(task.folder, task.variant, task.seed, *task.ended()) for task in tasks]


def read(folder: Path, variant: str, seed: int | None, status: str = FINISHED, message: str = "") -> Run:
    """Read one run folder, whatever is there of it.

    Raises:
        UsageError: when its summary or its table of metrics is damaged, or a link that leads elsewhere.
    """
    summary, curves = folder / SUMMARY, folder / METRICS
    return Run(
        variant,
        seed,
        status,
        message,
        folder,
        current_keys(read_json(summary, SCHEMA)) if is_own_file(summary, folder) else {},
        _curves(curves) if is_own_file(curves, folder) else {},
        tuple(outdated_exports(folder).values()),
    )


def _curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    try:
        return _means(path)
    except (ValueError, TypeError, KeyError, csv.Error) as error:
        raise UsageError(f"{str(path)!r} is damaged: it is not what a training writes") from error


def _means(path: Path) -> dict[str, list[tuple[int, float]]]:
    sums: dict[str, dict[int, tuple[float, int]]] = {}
    with open(path, newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            if not row["epoch"]:
                continue
            epoch = int(row["epoch"]) + 1
            for name, text in row.items():
                if name in ("epoch", "step") or not text or not math.isfinite(value := float(text)):
                    continue
                total, count = sums.setdefault(name, {}).get(epoch, (0.0, 0))
                sums[name][epoch] = (total + value, count + 1)
    return {name: [(e, total / count) for e, (total, count) in sorted(by.items())] for name, by in sums.items()}
