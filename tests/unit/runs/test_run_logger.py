"""The run's table of metrics."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lqkd.callbacks.folder import run_folder_of
from lqkd.errors import UsageError
from lqkd.runs import logger as run_logger
from lqkd.runs.logger import RunLogger
from lqkd.utils import tables
from tests.unit.callbacks.dummy import Dummy


def _rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as stream:
        return list(csv.DictReader(stream))


def _steps(folder: Path) -> list[int]:
    return [int(row["step"]) for row in _rows(folder)]


def _logged(folder: Path, steps: range, **metrics: float) -> None:
    logger = RunLogger(folder)
    for step in steps:
        logger.log_metrics({"train/loss": float(step), **metrics}, step)
    logger.finalize("success")


def test_columns_are_epoch_and_step_and_then_the_metrics_by_name(tmp_path: Path) -> None:
    logger = RunLogger(tmp_path)
    logger.log_metrics({"val/acc": 0.5, "epoch": 0}, step=3)
    logger.log_metrics({"train/loss": 2.0, "epoch": 1}, step=4)
    logger.finalize("success")
    assert (tmp_path / "metrics.csv").read_text().splitlines() == [
        "epoch,step,train/loss,val/acc",
        "0,3,,0.5",
        "1,4,2.0,",
    ]


def test_metrics_of_the_same_step_share_a_row(make_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    make_trainer(logger=RunLogger(tmp_path)).fit(Dummy())
    last = _rows(tmp_path)[-1]
    assert (last["step"], last["train/task"], last["val/acc"]) == ("3", "3.0", "0.75")
    assert _steps(tmp_path) == [0, 1, 2, 3]


def test_values_keep_all_their_digits(tmp_path: Path) -> None:
    logger = RunLogger(tmp_path)
    logger.log_metrics({"a": 1 / 3, "b": torch.tensor(1 / 3, dtype=torch.float64)}, step=1)  # type: ignore[dict-item]
    logger.finalize("success")
    assert {float(_rows(tmp_path)[0][name]) for name in "ab"} == {1 / 3}


def test_without_a_step_metrics_join_the_last_row(tmp_path: Path) -> None:
    logger = RunLogger(tmp_path)
    logger.log_metrics({"a": 1.0}, step=7)
    logger.log_metrics({"b": 2.0})
    logger.finalize("success")
    assert _steps(tmp_path) == [7]


def test_a_resumed_training_continues_the_table_and_replaces_what_it_repeats(tmp_path: Path) -> None:
    _logged(tmp_path, range(10), old=1.0)
    _logged(tmp_path, range(6, 12))
    assert _steps(tmp_path) == list(range(12))
    assert [row["old"] for row in _rows(tmp_path)] == ["1.0"] * 6 + [""] * 6


def test_a_training_from_the_start_replaces_the_whole_table(tmp_path: Path) -> None:
    _logged(tmp_path, range(10))
    _logged(tmp_path, range(2))
    assert _steps(tmp_path) == [0, 1]


def test_an_evaluation_in_a_later_process_drops_nothing(make_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    _logged(tmp_path, range(5))
    make_trainer(logger=RunLogger(tmp_path), limit_test_batches=1.0).test(Dummy(), verbose=False)
    assert _steps(tmp_path) == [0, 1, 2, 3, 4, 0]
    assert _rows(tmp_path)[-1]["test/acc"] == "0.5"


def test_what_is_logged_at_step_0_before_a_resumed_training_drops_nothing(tmp_path: Path) -> None:
    _logged(tmp_path, range(5))
    logger = RunLogger(tmp_path)
    logger.log_metrics({"teacher/acc": 0.9}, step=0)
    logger.log_metrics({"train/loss": 1.0}, step=4)
    logger.finalize("success")
    assert _steps(tmp_path) == [0, 1, 2, 3, 0, 4]


def test_a_long_run_writes_the_table_seldom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    real = tables.atomic_path

    def counting(path: Path) -> AbstractContextManager[Path]:
        opened.append(path)
        return real(path)

    monkeypatch.setattr(tables, "atomic_path", counting)
    logger = RunLogger(tmp_path)
    started = time.monotonic()
    for step in range(2000):
        logger.log_metrics({"train/loss": 0.0}, step)
        logger.save()
    assert len(opened) <= 1 + (time.monotonic() - started) / 2


def test_a_table_that_takes_long_to_write_is_written_more_seldom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    real = tables.atomic_path

    def slow_disk(path: Path) -> AbstractContextManager[Path]:
        nonlocal now
        now += 1.0
        return real(path)

    monkeypatch.setattr(tables, "atomic_path", slow_disk)
    monkeypatch.setattr(run_logger.time, "monotonic", lambda: now)
    logger = RunLogger(tmp_path)
    written = []
    for step, now in enumerate((0.0, 90.0, 102.0)):  # noqa: B007
        logger.log_metrics({"train/loss": 1.0}, step)
        logger.save()
        written.append(len(_steps(tmp_path)))
    assert written == [1, 1, 3]  # a writing of one second is followed by a pause of a hundred


def test_a_checkpoint_is_never_ahead_of_the_table(make_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    class Looks(ModelCheckpoint):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: Dummy) -> None:  # type: ignore[override]
            super().on_train_epoch_end(trainer, pl_module)
            accuracies.append([row["val/acc"] for row in _rows(tmp_path) if row["val/acc"]])

    accuracies: list[list[str]] = []
    saver = Looks(monitor="val/acc", save_top_k=-1)
    make_trainer(logger=RunLogger(tmp_path), max_epochs=2, enable_checkpointing=True, callbacks=[saver]).fit(Dummy())
    assert accuracies == [["0.75"], ["0.75", "0.75"]]


def test_checkpoints_without_a_folder_of_their_own_go_into_the_run_folder(
    make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    make_trainer(logger=RunLogger(tmp_path), enable_checkpointing=True, default_root_dir=tmp_path / "else").fit(Dummy())
    assert list((tmp_path / "checkpoints").glob("*.ckpt"))


def test_a_foreign_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("name,value\na,1\n")
    with pytest.raises(UsageError, match="step"):
        RunLogger(tmp_path)


def test_other_processes_than_the_first_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_logger.rank_zero_only, "rank", 1)
    _logged(tmp_path, range(3))
    assert not list(tmp_path.iterdir())


def test_the_run_folder_is_that_of_the_first_run_logger(make_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    loggers = [CSVLogger(tmp_path), RunLogger(tmp_path / "a"), RunLogger(tmp_path / "b")]
    assert run_folder_of(make_trainer(logger=loggers)) == tmp_path / "a"


def test_a_trainer_without_a_run_logger_has_no_run_folder(make_trainer: Callable[..., Trainer]) -> None:
    assert run_folder_of(make_trainer(logger=False)) is None
