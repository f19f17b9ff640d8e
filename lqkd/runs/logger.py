"""The logger that owns a run's folder and keeps its metrics there as one CSV table."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.runs.folder import METRICS
from lqkd.utils.tables import write_csv

_PAUSE = 2.0
"""Seconds at least between two writings of the table ..."""
_SHARE = 0.01
"""... which take at most this share of the time, however long the table has become."""


def flush_table(trainer: Trainer) -> None:
    """Write what is new in the tables of the trainer's run folders."""
    for logger in trainer.loggers:
        if isinstance(logger, RunLogger):
            logger.flush()


class RunLogger(Logger):
    """Keeps all metrics of a run in ``metrics.csv`` of its folder, which is whole at any moment.

    The columns are ``epoch``, ``step``, then the metrics by name. A row is one step (a batch, as Lightning counts for
    loggers); metrics that arrive for the same step one after the other share a row. Values keep all their digits.

    A table that is there already is continued: its rows from the step on at which training goes on are dropped, since
    they are about to be logged again. Step 0 alone drops nothing unless it is a training metric (``train/...``):
    evaluations log there too. Exactly ``rows`` rows are kept where their number is known; what is logged again before
    training goes on then joins the row of its step.

    The table is written when logging ends, when a checkpoint has been saved, and otherwise at the next logging that
    is two seconds and a hundred times the last writing's duration later. Only the first process writes.

    Args:
        folder: the run's folder; made when missing.
        rows: number of rows of the table that is there to go on after; None when only the steps tell.

    Raises:
        UsageError: when the folder has a ``metrics.csv`` that is not such a table.
    """

    def __init__(self, folder: str | Path, rows: int | None = None) -> None:
        super().__init__()
        self.run_folder = Path(folder)
        self._before = _read(self.run_folder / METRICS)  # rows of an earlier process
        self._rows: list[dict[str, Any]] = []
        self._goes_on = self._repeats = rows is not None
        if rows is not None:
            self._rows, self._before = self._before[:rows], []
        self._unsaved = False
        self._next_write = 0.0

    @property
    def rows(self) -> int:
        """Length of the table, with what is not written yet."""
        return len(self._before) + len(self._rows)

    @property
    def name(self) -> str:
        """Empty: ``save_dir/name/version``, which Lightning builds for checkpoints, is the folder itself."""
        return ""

    @property
    def version(self) -> str:
        """Empty, see :attr:`name`."""
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.run_folder)

    @property
    def log_dir(self) -> str:
        return str(self.run_folder)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Add ``metrics`` (floats or one-element tensors) to the row of ``step``; None means the last row's step."""
        last: dict[str, Any] = self._rows[-1] if self._rows else {"step": 0}
        step = last["step"] if step is None else step
        if not self._goes_on and (step > 0 or any(name.startswith("train/") for name in metrics)):
            self._goes_on = True
            self._before = [row for row in self._before if row["step"] < step]
        if self._repeats and step < last["step"]:
            last = next((row for row in self._rows if row["step"] == step), last)
        else:
            self._repeats = False
        values = {name: value.item() if isinstance(value, Tensor) else value for name, value in metrics.items()}
        if self._rows and last["step"] == step:
            last.update(values | {"step": step})
        else:
            self._rows.append(values | {"step": step})
        self._unsaved = True

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run's ``config.yaml`` holds them."""

    @rank_zero_only
    def save(self) -> None:
        """Write what is new, unless it was written a moment ago: Lightning calls this after every logging."""
        if time.monotonic() >= self._next_write:
            self._write()

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Write what is new: a training that resumes from the checkpoint will not log it again."""
        self._write()

    def flush(self) -> None:
        """Write what is new, now."""
        self._write()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is new."""
        self._write()

    def _write(self) -> None:
        if not self._unsaved:
            return
        started = time.monotonic()
        rows = self._before + self._rows
        names = set().union(*rows) - {"epoch", "step"}
        write_csv(self.run_folder / METRICS, rows, ["epoch", "step", *sorted(names)], numbers=True)
        ended = time.monotonic()
        self._next_write = ended + max(_PAUSE, (ended - started) / _SHARE)
        self._unsaved = False


def _read(target: Path) -> list[dict[str, Any]]:
    if not target.exists():
        return []
    with open(target, newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    try:
        return [{name: value for name, value in row.items() if value} | {"step": int(row["step"])} for row in rows]
    except (KeyError, TypeError, ValueError):
        raise UsageError(f"{target} has no column of whole numbers 'step': it is no table of a run, move it") from None


class LogEveryEpoch(Callback):
    """Lets an epoch of few batches log its losses as well, where no interval was asked for."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        interval = min(trainer.log_every_n_steps, trainer.num_training_batches)  # type: ignore[attr-defined]
        trainer.log_every_n_steps = max(1, int(interval))  # type: ignore[attr-defined]
