"""The logger that owns a run folder: metrics as a CSV file that is always whole."""

from __future__ import annotations

import csv
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from lqkd.files import atomic_path

METRICS = "metrics.csv"
_SECONDS_BETWEEN_WRITES = 2.0


class RunLogger(Logger):
    """Keeps every logged metric and rewrites ``metrics.csv`` in the run folder, whole, at most every two seconds.

    A row for each step; columns ``step`` and ``epoch`` first, then the metrics by name. A file that the folder holds
    already, from a run that was interrupted, is continued: its rows from the first newly logged step on are replaced.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = Path(folder)
        self._rows: dict[int, dict[str, Any]] = {}
        self._continues = True
        self._written = 0.0

    @property
    def name(self) -> str:
        return self.folder.parent.name

    @property
    def version(self) -> str:
        return self.folder.name

    @property
    def save_dir(self) -> str:
        return str(self.folder)

    @property
    def log_dir(self) -> str:
        """The run folder."""
        return str(self.folder)

    @property
    @rank_zero_experiment
    def experiment(self) -> RunLogger:
        return self

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the run folder has a config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        step = 0 if step is None else int(step)
        if self._continues:
            self._continues = False
            self._rows = {kept: row for kept, row in self._read().items() if kept < step}
        self._rows.setdefault(step, {}).update(metrics)

    @rank_zero_only
    def save(self) -> None:
        if time.monotonic() - self._written >= _SECONDS_BETWEEN_WRITES:
            self._write()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self._write()

    def _read(self) -> dict[int, dict[str, Any]]:
        path = self.folder / METRICS
        if not path.is_file():
            return {}
        with open(path, newline="", encoding="utf-8") as stream:
            return {
                int(row["step"]): {k: v for k, v in row.items() if k != "step" and v != ""}
                for row in csv.DictReader(stream)
            }

    def _write(self) -> None:
        if not self._rows:
            return
        names = {name for row in self._rows.values() for name in row} - {"epoch"}
        with (
            atomic_path(self.folder / METRICS) as temporary,
            open(temporary, "w", newline="", encoding="utf-8") as stream,
        ):
            writer = csv.DictWriter(stream, ["step", "epoch", *sorted(names)])
            writer.writeheader()
            writer.writerows({"step": step, **self._rows[step]} for step in sorted(self._rows))
        self._written = time.monotonic()


def run_folder_of(trainer: Trainer) -> Path | None:
    """The run folder of ``trainer``'s first :class:`RunLogger`; None when it has none."""
    return next((logger.folder for logger in trainer.loggers if isinstance(logger, RunLogger)), None)
