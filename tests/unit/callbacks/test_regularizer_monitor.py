"""What is measured of the regularizer's weights, where it goes, and what is said about it."""

from __future__ import annotations

import csv
import math
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor

from lqkd.callbacks.regularizer.monitor import RegularizerMonitor, verdict
from lqkd.errors import Stopped
from lqkd.runs.logger import RunLogger

from .dummy import BATCHES, Dummy, Play
from .wandb_records import wandb_history

MakeTrainer = Callable[..., Trainer]


def _draws(low: float = 0.5, high: float = 3.0, shape: tuple[int, ...] = (2, 3)) -> Play:
    """Numbers that differ for every epoch and batch and stay the same for every call."""

    def draw(epoch: int, batch: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * epoch + batch)
        return low + (high - low) * torch.rand(shape, generator=generator)

    return draw


def _constant(*per_epoch: float) -> Play:
    return lambda epoch, batch: torch.full((2, 3), per_epoch[epoch])


def _all(play: Play, epoch: int = 0) -> Tensor:
    return torch.stack([play(epoch, batch) for batch in range(BATCHES)]).double()


def _table(folder: Path) -> list[dict[str, float]]:
    with open(folder / "regularizer" / "weights.csv", newline="") as stream:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(stream)]


def _fit(make_trainer: MakeTrainer, module: Dummy, **arguments: Any) -> tuple[RegularizerMonitor, Trainer]:
    monitor = RegularizerMonitor()
    trainer = make_trainer(**({"callbacks": [monitor], "logger": False} | arguments))
    trainer.fit(module)
    return monitor, trainer


# ---- numbers


def test_statistics_are_those_of_all_elements_of_the_epoch(make_trainer: MakeTrainer) -> None:
    weights, divergence = _draws(), _draws(0.0, 5.0)
    monitor, _ = _fit(make_trainer, Dummy(weights, divergence), max_epochs=2)
    for epoch, measured in enumerate(monitor.history):
        w, d = _all(weights, epoch), _all(divergence, epoch)
        expected = {
            "mean": w.mean(),
            "spread": w.std(correction=0),
            "minimum": w.min(),
            "maximum": w.max(),
            "effective": (w * d).sum() / d.sum(),
        }
        for name, value in expected.items():
            assert getattr(measured, name) == pytest.approx(value.item(), rel=1e-6), name


def test_the_spread_of_nearly_equal_weights_is_exact(make_trainer: MakeTrainer) -> None:
    weights = _draws(1000.0, 1000.1)  # a difference of squares in single precision would leave nothing of it
    monitor, _ = _fit(make_trainer, Dummy(weights))
    assert monitor.history[0].spread == pytest.approx(_all(weights).std(correction=0).item(), rel=1e-3)


def test_a_weight_per_class_counts_once_for_every_sample(make_trainer: MakeTrainer) -> None:
    def weights(epoch: int, batch: int) -> Tensor:
        return torch.full((1, 3), 2.0 if batch == 0 else 1.0)

    def divergence(epoch: int, batch: int) -> Tensor:
        return torch.ones(9 if batch == 0 else 1, 3)

    monitor, _ = _fit(make_trainer, Dummy(weights, divergence))
    assert monitor.history[0].mean == pytest.approx((9 * 2 + 3 * 1) / 12)


def test_at_maximum_is_the_share_of_weights_near_the_bound(make_trainer: MakeTrainer) -> None:
    def weights(epoch: int, batch: int) -> Tensor:
        return torch.tensor([[9.81, 9.79, 10.0, 1.0]])

    monitor, _ = _fit(make_trainer, Dummy(weights, lambda e, b: torch.ones(1, 4), max_weight=10.0))
    assert monitor.history[0].at_maximum == 0.5


def test_weights_without_a_bound_have_no_share_at_it(make_trainer: MakeTrainer) -> None:
    monitor, trainer = _fit(make_trainer, Dummy(_draws(), max_weight=math.inf))
    assert monitor.history[0].at_maximum is None
    assert "regularizer/at_maximum" not in trainer.callback_metrics


def test_no_divergence_leaves_the_effective_weight_undefined(make_trainer: MakeTrainer) -> None:
    monitor, _ = _fit(make_trainer, Dummy(_draws(), lambda e, b: torch.zeros(2, 3)))
    assert monitor.history[0].effective != monitor.history[0].effective
    assert monitor.summary()["effective"] is None


@pytest.mark.own_process
def test_two_processes_report_the_weights_of_both(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    weights, divergence = _draws(), _draws(0.0, 5.0)
    logger = RunLogger(tmp_path)
    _fit(make_trainer, Dummy(weights, divergence), strategy="ddp_fork", devices=2, logger=logger)
    w, d = _all(weights), _all(divergence)
    row = _table(tmp_path)[0]
    assert row["mean"] == pytest.approx(w.mean().item(), rel=1e-6)
    assert row["spread"] == pytest.approx(w.std(correction=0).item(), rel=1e-6)
    assert (row["minimum"], row["maximum"]) == (w.min().item(), w.max().item())
    assert row["effective"] == pytest.approx(((w * d).sum() / d.sum()).item(), rel=1e-6)


# ---- where they go


def test_the_numbers_are_logged_at_the_epochs_end(make_trainer: MakeTrainer) -> None:
    monitor, trainer = _fit(make_trainer, Dummy(_draws()))
    for name in ("mean", "spread", "minimum", "maximum", "effective", "at_maximum"):
        logged = trainer.callback_metrics[f"regularizer/{name}"].item()
        assert logged == pytest.approx(getattr(monitor.history[0], name)), name


def test_the_run_folder_gets_a_row_for_every_epoch(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    _fit(make_trainer, Dummy(_constant(1.0, 2.0, 3.0)), max_epochs=3, logger=RunLogger(tmp_path))
    assert [(row["epoch"], row["mean"]) for row in _table(tmp_path)] == [(0, 1), (1, 2), (2, 3)]


def test_the_run_folder_gets_a_picture_when_training_ends(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    _fit(make_trainer, Dummy(_draws()), max_epochs=2, logger=RunLogger(tmp_path))
    picture = (tmp_path / "regularizer" / "weights.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert picture.endswith(b"IEND\xaeB`\x82")


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_ctrl_c_leaves_pictures_of_what_there_is(
    number: signal.Signals, expected: bool, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    monitor, trainer = _fit(make_trainer, Dummy(_draws(), _draws()), logger=RunLogger(tmp_path))
    picture = tmp_path / "regularizer" / "weights.png"
    picture.unlink()
    monitor.on_exception(trainer, trainer.lightning_module, Stopped(number, "stopped"))
    assert picture.is_file() == expected


def test_no_picture_is_begun_once_ctrl_c_has_kept_someone_waiting(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monitor, trainer = _fit(make_trainer, Dummy(_draws(), _draws()), logger=RunLogger(tmp_path))
    drawn = []
    monkeypatch.setattr("lqkd.utils.figures.pixels", lambda figure: drawn.append(figure) or 0)
    monkeypatch.setattr("lqkd.utils.figures.write_image", lambda target, image: time.sleep(0.02))
    monkeypatch.setattr("lqkd.callbacks.regularizer.monitor._LAST_SECONDS", 0.01)
    monkeypatch.setattr("lqkd.callbacks.regularizer.pictures.pictures", lambda *history: iter([("a", 1), ("b", 2)]))
    monitor.on_exception(trainer, trainer.lightning_module, Stopped(signal.SIGINT, "stopped"))
    assert drawn == [1]


def test_the_picture_is_drawn_every_n_epochs(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    class Looks(RegularizerMonitor):
        def on_train_epoch_end(self, *arguments: Any) -> None:
            super().on_train_epoch_end(*arguments)
            picture = tmp_path / "regularizer" / "weights.png"
            drawn.append(picture.exists())
            picture.unlink(missing_ok=True)

    drawn: list[bool] = []
    callbacks = [Looks(picture_every_n_epochs=2)]
    make_trainer(max_epochs=5, logger=RunLogger(tmp_path), callbacks=callbacks).fit(Dummy(_draws()))
    assert drawn == [False, True, False, True, False]


def test_a_picture_of_weights_that_reach_zero_can_be_drawn(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", message="The regularizer's mean weight")
        _fit(make_trainer, Dummy(_constant(1.0, 0.0)), max_epochs=2, logger=RunLogger(tmp_path))
    assert (tmp_path / "regularizer" / "weights.png").exists()


def test_without_a_run_folder_nothing_is_written(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _fit(make_trainer, Dummy(_draws()))
    assert not list(tmp_path.rglob("weights.*"))


def test_without_a_regularizer_nothing_is_written_logged_or_summarised(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    monitor, trainer = _fit(make_trainer, Dummy(None), logger=RunLogger(tmp_path))
    assert not (tmp_path / "regularizer").exists()
    assert not any(name.startswith("regularizer") for name in trainer.callback_metrics)
    assert monitor.summary() is None


def test_tensorboard_gets_a_histogram_of_the_last_batch(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    weights = _draws()
    logger = TensorBoardLogger(tmp_path, name="", version="")
    _fit(make_trainer, Dummy(weights), max_epochs=2, logger=logger)
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0})
    events.Reload()
    histograms = events.Histograms("regularizer/weights")
    means = events.Scalars("regularizer/mean")
    assert [event.step for event in histograms] == [event.step for event in means] == [3, 7]
    assert histograms[1].histogram_value.sum == pytest.approx(weights(1, BATCHES - 1).sum().item(), rel=1e-5)


def test_wandb_gets_a_histogram_of_the_last_batch(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(project="lqkd-test", save_dir=tmp_path)
    try:
        _fit(make_trainer, Dummy(_draws()), max_epochs=2, logger=logger)
    finally:
        wandb.finish()
    history = wandb_history(next(tmp_path.rglob("*.wandb")))
    histograms = [row for row in history if "regularizer/weights/values" in row]
    means = [row for row in history if "regularizer/mean" in row]
    assert [row["trainer/global_step"] for row in histograms] == [3, 7]
    assert [row["trainer/global_step"] for row in means] == [3, 7]
    assert all(sum(row["regularizer/weights/values"]) == 6 for row in histograms)


def test_weights_that_are_not_finite_do_not_stop_the_histogram(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    def weights(epoch: int, batch: int) -> Tensor:
        return torch.tensor([[torch.nan, torch.inf, 1.0]])

    logger = WandbLogger(save_dir=tmp_path, mode="disabled")
    monitor, _ = _fit(make_trainer, Dummy(weights, lambda e, b: torch.ones(1, 3)), logger=logger)
    assert monitor.summary()["verdict"] == "diverged"


# ---- resuming


def test_a_resumed_training_continues_the_table(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    module = Dummy(_constant(1.0, 2.0, 3.0))
    saver = ModelCheckpoint(dirpath=tmp_path, filename="last", save_on_train_epoch_end=True)
    _fit(
        make_trainer,
        module,
        max_epochs=2,
        logger=RunLogger(tmp_path),
        callbacks=[RegularizerMonitor(), saver],
        enable_checkpointing=True,
    )
    trainer = make_trainer(max_epochs=3, logger=RunLogger(tmp_path / "resumed"), callbacks=[RegularizerMonitor()])
    trainer.fit(module, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert [row["mean"] for row in _table(tmp_path / "resumed")] == [1, 2, 3]


def test_a_checkpoint_costs_as_much_late_in_a_training_as_early(make_trainer: MakeTrainer) -> None:
    monitor, _ = _fit(make_trainer, Dummy(_draws()), max_epochs=2)
    early = monitor.state_dict()["statistics"]["distribution"]
    monitor.statistics["distribution"].append(monitor.statistics["distribution"][-1])
    late = monitor.state_dict()["statistics"]["distribution"]
    assert len(late) == len(early) + 1 == 3
    assert all(before is after for before, after in zip(early, late, strict=False))  # nothing was made again


def test_a_resumed_training_does_not_warn_again(make_trainer: MakeTrainer) -> None:
    monitor, _ = _fit(make_trainer, Dummy(_constant(0.01)))
    resumed = RegularizerMonitor()
    resumed.load_state_dict(monitor.state_dict())
    with warnings.catch_warnings(record=True) as caught:
        _fit(make_trainer, Dummy(_constant(0.01)), callbacks=[resumed])
    assert not [w for w in caught if "mean weight" in str(w.message)]
    assert resumed.warnings == monitor.warnings


# ---- verdicts


def test_a_collapse_is_warned_of_once_and_kept(make_trainer: MakeTrainer) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monitor, _ = _fit(make_trainer, Dummy(_constant(1.0, 0.09, 0.01)), max_epochs=3)
    messages = [str(w.message) for w in caught if "mean weight" in str(w.message)]
    assert len(messages) == 1
    assert monitor.warnings == messages
    assert "0.09" in messages[0]
    assert "guard" in messages[0]


def test_the_summary_describes_the_last_epoch(make_trainer: MakeTrainer) -> None:
    monitor, _ = _fit(make_trainer, Dummy(_constant(1.0, 0.01)), max_epochs=2)
    summary = monitor.summary()
    assert summary["mean"] == pytest.approx(0.01)
    assert summary["verdict"] == "collapsed"
    assert summary["sentence"] == verdict(monitor.history).sentence
