"""Who gets the metrics of a distillation, and when."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer

from lqkd.callbacks import RegularizerMonitor
from lqkd.runs import RunLogger
from tests.conftest import digits, distiller
from tests.recorder import Recorder

MakeTrainer = Callable[..., Trainer]


def _rows(folder: Path, key: str) -> list[tuple[int, int, float]]:
    """Epoch, step and value of every row that has ``key``."""
    with open(folder / "metrics.csv", newline="") as stream:
        return [(int(r["epoch"]), int(r["step"]), float(r[key])) for r in csv.DictReader(stream) if r[key]]


def _loss() -> Recorder:
    return Recorder(lambda trainer, module: float(trainer.callback_metrics["train/loss"]))


def test_callbacks_see_the_metrics_of_every_batch_and_loggers_those_of_every_nth(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    losses = _loss()
    arguments = {"log_every_n_steps": 3, "max_epochs": 2, "limit_val_batches": 0}
    make_trainer(callbacks=[losses], logger=RunLogger(tmp_path), **arguments).fit(distiller(), datamodule=digits(4))
    assert len(set(losses.seen)) == 8
    assert _rows(tmp_path, "train/loss") == [(0, 2, losses.seen[2]), (1, 5, losses.seen[5])]


def test_the_batch_at_which_a_callback_stops_the_training_is_logged(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    class Stops(Callback):
        def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
            trainer.should_stop = trainer.global_step == 2

    losses = _loss()
    arguments = {"log_every_n_steps": 50, "limit_val_batches": 0, "logger": RunLogger(tmp_path)}
    make_trainer(callbacks=[losses, Stops()], **arguments).fit(distiller(), datamodule=digits(4))
    assert _rows(tmp_path, "train/loss") == [(0, 1, losses.seen[1])]


def test_neither_the_training_step_nor_the_monitor_logs_key_by_key(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # LightningModule.log takes as long for one key as the monitor for a batch that it measures.
    keys: list[str] = []
    monkeypatch.setattr(LightningModule, "log", lambda self, name, *rest, **options: keys.append(name))
    monitor = RegularizerMonitor()
    make_trainer(callbacks=[monitor], logger=RunLogger(tmp_path), limit_val_batches=0).fit(
        distiller(), datamodule=digits(2)
    )
    assert keys == []
    assert _rows(tmp_path, "regularizer/mean") == [(0, 1, monitor.history[0].mean)]
    assert len(_rows(tmp_path, "balance/distill")) == 2
