"""Lightning's own features work with both kinds of training, or are refused at once: what docs/lightning.md says."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch.callbacks as of_lightning
import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.tuner import Tuner

from lqkd.errors import UsageError
from lqkd.modules import ClassifierModule
from tests.conftest import digits, distiller, network
from tests.recorder import Recorder

MakeTrainer = Callable[..., Trainer]
Make = Callable[[], LightningModule]
ROOT = Path(__file__).parents[2]


def classifier() -> ClassifierModule:
    return ClassifierModule(network())


BOTH = pytest.mark.parametrize("make", [distiller, classifier])
HELD_BY = {
    "`LearningRateFinder`, `Tuner.lr_find`": "test_a_finder_is_refused",
    "`Tuner.scale_batch_size`": "test_the_tuner_finds_a_batch_size",
    "`BatchSizeFinder` as a callback": "test_a_finder_is_refused",
    "`StochasticWeightAveraging`, `WeightAveraging`, `EMAWeightAveraging`": "test_weight_ema.py::"
    "test_lightnings_averages_are_refused_with_a_word_on_what_works",
    "`profiler`": "test_a_profiler_sees_every_step",
    "`overfit_batches`": "test_the_same_images_are_seen_in_every_epoch",
    "`fast_dev_run`": "test_a_setting_means_what_it_says",
    "`limit_train_batches`, `limit_val_batches`, `limit_test_batches`, `limit_predict_batches`": "test_a_schedule_"
    "ends_with_the_last_step_of_limited_epochs",
    "`max_steps`, `min_steps`": "test_a_setting_means_what_it_says",
    "`max_time`, `Timer`": "test_time_that_is_up_ends_the_training",
    "`accumulate_grad_batches`, `GradientAccumulationScheduler`": "test_distill_module.py::"
    "test_trainer_settings_that_two_optimizers_cannot_honour_are_refused",
    "`gradient_clip_val`, `gradient_clip_algorithm`": "test_distill_module.py::"
    "test_trainer_settings_that_two_optimizers_cannot_honour_are_refused",
    "`val_check_interval`, `check_val_every_n_epoch`": "test_validations_within_an_epoch_come_when_they_are_due",
    "`trainer.predict`, `predict --config`": "test_predictions_are_those_of_limited_batches",
    "`ModelCheckpoint(every_n_train_steps=N)`": "test_a_checkpoint_comes_every_so_many_steps",
    "`ModelCheckpoint(train_time_interval=...)`": "test_a_checkpoint_by_the_clock_is_saved_or_refused",
    "`EarlyStopping`": "test_callback_checks.py::test_every_metric_that_is_logged_can_be_gone_by",
    "`LearningRateMonitor`, `ThroughputMonitor`, `SpikeDetection`, `ModelPruning`": "test_callback_"
    "checks.py::test_the_others_go_with_a_training",
    "`BaseFinetuning`, `BackboneFinetuning`": "test_callback_checks.py::"
    "test_in_a_training_of_one_network_it_is_accepted_unless_it_needs_another_module",
    "`precision: 16-mixed`, `16-true`, `bf16-true`, `64-true`": "test_precision.py::"
    "test_a_precision_that_two_optimizers_cannot_train_in_is_refused",
    "`detect_anomaly`, `barebones`, `reload_dataloaders_every_n_epochs`, `deterministic`": "test_a_setting_means_"
    "what_it_says",
}
"""Feature, as the page calls it, and the test that holds it: of this file, or FILE::TEST."""


def test_every_row_of_the_page_is_held_by_a_test() -> None:
    page = (ROOT / "docs" / "lightning.md").read_text(encoding="utf-8")
    rows = [line.split(" | ")[0].removeprefix("| ") for line in page.splitlines() if line.startswith("| `")]
    assert rows == list(HELD_BY)
    for test in HELD_BY.values():
        file, _, name = test.rpartition("::")
        text = Path(__file__).with_name(file or Path(__file__).name).read_text(encoding="utf-8")
        assert f"def {name}(" in text, test


class Slow(Callback):
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *given: Any) -> None:
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (distiller, of_lightning.LearningRateFinder, "set the learning rates of model.student_optimizer and"),
        (classifier, of_lightning.LearningRateFinder, "ClassifierModule has no attribute lr or learning_rate; set the"),
        (distiller, of_lightning.BatchSizeFinder, "set the batch size of the data"),
        (classifier, of_lightning.BatchSizeFinder, r"find it with Tuner\(trainer\).scale_batch_size"),
    ],
)
def test_a_finder_is_refused(make: Make, kind: Any, message: str, make_trainer: MakeTrainer) -> None:
    with pytest.raises(UsageError, match=f"callback {kind.__name__} is not possible.*{message}"):
        make_trainer(callbacks=[kind()]).fit(make(), datamodule=digits(2))


def test_the_tuner_finds_a_batch_size(make_trainer: MakeTrainer) -> None:
    few: dict[str, Any] = {"max_trials": 1, "steps_per_trial": 1, "init_val": 4}
    validated: dict[str, Any] = {"method": "validate", "batch_arg_name": "eval_batch_size"}
    for make, how in ((classifier, {}), (distiller, validated)):
        assert Tuner(make_trainer()).scale_batch_size(make(), datamodule=digits(2), **few, **how) == 4
    with pytest.raises(UsageError, match="BatchSizeFinder is not possible with two optimizers"):
        Tuner(make_trainer()).scale_batch_size(distiller(), datamodule=digits(2), **few)


@BOTH
def test_a_profiler_sees_every_step(make: Make, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(profiler="simple", limit_val_batches=0)
    trainer.fit(make(), datamodule=digits(3))
    told: Any = trainer.profiler
    counts = {name.rpartition(".")[2]: len(times) for name, times in told.recorded_durations.items()}
    assert counts["training_step"] == counts["optimizer_step"] == 3


@BOTH
def test_the_same_images_are_seen_in_every_epoch(make: Make, make_trainer: MakeTrainer) -> None:
    class Watch(Callback):
        seen: tuple[list[Any], list[Any]] = ([], [])

        def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
            self.seen[trainer.current_epoch].append(batch.indices.tolist())

    watch = Watch()
    watch.seen = ([], [])
    make_trainer(overfit_batches=2, max_epochs=2, callbacks=[watch]).fit(make(), datamodule=digits(4))
    assert len(watch.seen[0]) == 2
    assert watch.seen[0] == watch.seen[1]


@BOTH
@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"fast_dev_run": 2}, 2),
        ({"max_steps": 2, "max_epochs": -1, "min_steps": 1}, 2),
        (
            {"detect_anomaly": True, "reload_dataloaders_every_n_epochs": 1, "deterministic": True, "max_epochs": 2},
            6,
        ),
        ({"barebones": True, "logger": None, "log_every_n_steps": None, "num_sanity_val_steps": None}, 3),
    ],
)
def test_a_setting_means_what_it_says(make: Make, settings: Any, steps: int, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(**settings)
    trainer.fit(make(), datamodule=digits(3))
    assert trainer.global_step == steps


@BOTH
def test_a_schedule_ends_with_the_last_step_of_limited_epochs(make: Make, make_trainer: MakeTrainer) -> None:
    rates = Recorder(lambda trainer, module: trainer.optimizers[0].param_groups[0]["lr"])
    trainer = make_trainer(limit_train_batches=0.5, limit_val_batches=1, max_epochs=2, callbacks=[rates])
    trainer.fit(make(), datamodule=digits(8))
    assert len(rates.seen) == 8
    assert rates.seen[-1] == pytest.approx(0.0, abs=1e-9)
    assert rates.seen[3] == pytest.approx(rates.seen[0] / 2, rel=0.1)


@BOTH
@pytest.mark.parametrize("by", ["max_time", "Timer"])
def test_time_that_is_up_ends_the_training(make: Make, by: str, make_trainer: MakeTrainer) -> None:
    limit = timedelta(seconds=0.2)
    settings: Any = {"max_time": limit} if by == "max_time" else {}
    callbacks = [Slow(), *([] if settings else [of_lightning.Timer(limit)])]
    trainer = make_trainer(max_epochs=50, limit_val_batches=0, callbacks=callbacks, **settings)
    trainer.fit(make(), datamodule=digits(3))
    assert 1 <= trainer.global_step <= 6


@BOTH
def test_validations_within_an_epoch_come_when_they_are_due(make: Make, make_trainer: MakeTrainer) -> None:
    class Watch(Callback):
        def __init__(self) -> None:
            self.steps: list[int] = []

        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.steps.append(trainer.global_step)

    within, over = Watch(), Watch()
    make_trainer(val_check_interval=3, callbacks=[within]).fit(make(), datamodule=digits(7))
    every = make_trainer(check_val_every_n_epoch=None, val_check_interval=3, max_epochs=2, callbacks=[over])
    every.fit(make(), datamodule=digits(4))
    assert (within.steps, over.steps) == ([3, 6], [3, 6])


@BOTH
def test_predictions_are_those_of_limited_batches(make: Make, make_trainer: MakeTrainer) -> None:
    predicted: Any = make_trainer(limit_predict_batches=1).predict(make(), datamodule=digits(2))
    assert [tuple(of_batch.shape) for of_batch in predicted] == [(180, 10)]  # half of the test split


def saved(make: Make, make_trainer: MakeTrainer, folder: Path, **settings: Any) -> list[str]:
    saver = of_lightning.ModelCheckpoint(folder, "{step}", save_top_k=-1, **settings)
    make_trainer(enable_checkpointing=True, callbacks=[saver, Slow()]).fit(make(), datamodule=digits(7))
    return sorted(path.stem for path in folder.glob("*.ckpt"))


@BOTH
def test_a_checkpoint_comes_every_so_many_steps(make: Make, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    assert saved(make, make_trainer, tmp_path, every_n_train_steps=3) == ["step=3", "step=6"]


def test_a_checkpoint_by_the_clock_is_saved_or_refused(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    often = {"train_time_interval": timedelta(seconds=0.05)}
    assert len(saved(classifier, make_trainer, tmp_path / "float", **often)) > 1
    message = re.escape("train_time_interval='0:00:00.050000' of ModelCheckpoint saves nothing with two optimizers")
    with pytest.raises(UsageError, match=f"{message}.*every_n_train_steps"):
        saved(distiller, make_trainer, tmp_path / "low", **often)
