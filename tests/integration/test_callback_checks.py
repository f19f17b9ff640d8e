"""Lightning's own callbacks beside ours: which go with a training here, and how the others are told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch.callbacks as of_lightning
import pytest
from lightning.pytorch import Callback, LightningModule, Trainer

from lqkd.callbacks import BitWidthScheduler, OscillationDampening
from lqkd.callbacks.bit_width import Stage
from lqkd.errors import UsageError
from lqkd.modules import ClassifierModule
from tests.conftest import digits, distiller, network


class NoBatch(Callback):
    """Fails when a training begins."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        raise AssertionError("a batch has been trained on")


def fit(module: LightningModule, *callbacks: Callback, folder: Path | None = None, **settings: Any) -> Trainer:
    defaults = {"max_epochs": 1, "limit_val_batches": 1, "num_sanity_val_steps": 0, "accelerator": "cpu"}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    kept = {"enable_checkpointing": folder is not None, "default_root_dir": folder}
    trainer = Trainer(**defaults | quiet | kept | settings, callbacks=[*callbacks])
    trainer.fit(module, datamodule=digits(batches=2))
    return trainer


def classifier() -> ClassifierModule:
    return ClassifierModule(network())


MODULES = pytest.mark.parametrize("make", [distiller, classifier])


@MODULES
@pytest.mark.parametrize("kind", [of_lightning.EarlyStopping, of_lightning.ModelCheckpoint])
def test_a_misspelt_monitor_is_told_with_the_nearest_name_before_the_first_batch(
    make: Callable[[], LightningModule], kind: Any, tmp_path: Path
) -> None:
    message = f"monitor='val_loss' of {kind.__name__} is not possible: did you mean val/loss.; metrics are .*val/acc"
    with pytest.raises(UsageError, match=message):
        fit(make(), kind(monitor="val_loss"), folder=tmp_path)


@MODULES
@pytest.mark.parametrize("monitor", ["val/loss", "val/acc", "train/loss"])
def test_every_metric_that_is_logged_can_be_gone_by(make: Callable[[], LightningModule], monitor: str) -> None:
    assert fit(make(), of_lightning.EarlyStopping(monitor=monitor)).global_step == 2


@pytest.mark.parametrize("monitor", ["train/distill", "balance/distill", "train/dampening"])
def test_so_can_those_of_a_distillation_and_of_its_penalties(monitor: str) -> None:
    callbacks = [OscillationDampening(), of_lightning.EarlyStopping(monitor=monitor)]
    assert fit(distiller(), *callbacks).global_step == 2


def test_what_a_module_names_is_what_it_logs() -> None:
    for module in (distiller(), classifier()):
        trainer = fit(module)
        assert set(trainer.callback_metrics) == module.metric_names()


@pytest.mark.parametrize("kind", [of_lightning.EarlyStopping, of_lightning.ModelCheckpoint])
def test_a_metric_of_the_validation_is_refused_where_there_is_none(kind: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"monitor='val/loss' of {kind.__name__} is not possible: there is no val"):
        fit(distiller(), kind(monitor="val/loss"), folder=tmp_path, limit_val_batches=0)


def test_a_name_that_a_callback_of_the_users_may_log_is_accepted_and_told() -> None:
    class Own(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            pl_module.log("mine", 1.0)

    with pytest.warns(UserWarning, match="monitor='mine' of EarlyStopping is none of .*: Own must log it"):
        fit(distiller(), Own(), of_lightning.EarlyStopping(monitor="mine"))


def test_a_stage_that_waits_for_validations_is_refused_where_there_is_none() -> None:
    scheduler = BitWidthScheduler([Stage("w8a8", patience=2)])
    with pytest.raises(UsageError, match="stage 'w8a8' has patience=2, but there is no validation"):
        fit(distiller(), scheduler, NoBatch(), limit_val_batches=0)


class Thaws(of_lightning.BaseFinetuning):
    def freeze_before_training(self, pl_module: LightningModule) -> None:
        pass

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (of_lightning.GradientAccumulationScheduler({0: 2}), "use model.accumulate_grad_batches"),
        (Thaws(), "callback Thaws is not possible with two optimizers"),
        (of_lightning.BackboneFinetuning(), "callback BackboneFinetuning is not possible with two optimizers"),
    ],
)
def test_a_callback_that_knows_one_optimizer_only_is_refused_in_a_distillation(
    callback: Callback, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        fit(distiller(), callback, NoBatch())


def test_in_a_training_of_one_network_it_is_accepted_unless_it_needs_another_module() -> None:
    assert fit(classifier(), Thaws()).global_step == 2
    with pytest.raises(UsageError, match="ClassifierModule has no attribute backbone"):
        fit(classifier(), of_lightning.BackboneFinetuning(), NoBatch())


@MODULES
@pytest.mark.parametrize(
    "callback",
    [
        of_lightning.SpikeDetection,
        lambda: of_lightning.Timer("00:00:10:00"),
        lambda: of_lightning.ThroughputMonitor(batch_size_fn=lambda batch: len(batch.labels)),
        lambda: of_lightning.ModelPruning("l1_unstructured", amount=0.1),
    ],
    ids=["SpikeDetection", "Timer", "ThroughputMonitor", "ModelPruning"],
)
def test_the_others_go_with_a_training(make: Callable[[], LightningModule], callback: Callable[[], Callback]) -> None:
    assert fit(make(), callback()).global_step == 2
