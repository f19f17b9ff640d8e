"""Estimators that follow the training are driven by it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lqkd.errors import UsageError
from lqkd.modules import Constant, DistillModule
from lqkd.quantization import Recipe, quantizers
from tests.conftest import digits, distiller, parameters_of
from tests.recorder import Recorder

MakeTrainer = Callable[..., Trainer]
LAYER = "layer1.0.conv1.weight_quantizer"


def binary_distiller(**arguments: Any) -> DistillModule:
    recipe = Recipe(bits="w1a4", weight_quantizer="irnet", first_layer_bits=None, last_layer_bits=None)
    return distiller(quantization=recipe, **arguments)


def progress_of(module: DistillModule) -> float | None:
    return quantizers(module.student)[LAYER].progress


def test_the_error_decay_estimator_goes_from_the_start_to_the_end_of_training(make_trainer: MakeTrainer) -> None:
    recorder = Recorder(lambda t, m: progress_of(m))
    make_trainer(max_epochs=2, callbacks=[recorder]).fit(binary_distiller(), datamodule=digits(4))
    assert recorder.seen == [step / 8 for step in range(8)]


def test_progress_counts_steps_of_the_student_under_accumulation(make_trainer: MakeTrainer) -> None:
    recorder = Recorder(lambda t, m: progress_of(m))
    make_trainer(callbacks=[recorder]).fit(binary_distiller(accumulate_grad_batches=2), datamodule=digits(4))
    assert recorder.seen == [0, 0, 0.5, 0.5]


def test_progress_ends_with_max_steps(make_trainer: MakeTrainer) -> None:
    recorder = Recorder(lambda t, m: progress_of(m))
    trainer = make_trainer(max_epochs=-1, max_steps=5, callbacks=[recorder])
    trainer.fit(binary_distiller(), datamodule=digits(4))
    assert recorder.seen == [0, 0.2, 0.4, 0.6, 0.8]


def test_other_families_have_no_progress(make_trainer: MakeTrainer) -> None:
    recorder = Recorder(lambda t, m: progress_of(m))
    make_trainer(callbacks=[recorder]).fit(distiller(), datamodule=digits(2))
    assert recorder.seen == [None, None]


def test_a_resumed_training_follows_the_same_schedule_to_the_same_weights(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    def run(resume: Path | None = None) -> tuple[DistillModule, list[Any]]:
        module, recorder = binary_distiller(), Recorder(lambda t, m: progress_of(m))
        keeper = ModelCheckpoint(tmp_path / str(resume is None), "{step}", every_n_train_steps=3, save_top_k=-1)
        trainer = make_trainer(max_epochs=2, callbacks=[recorder, keeper], enable_checkpointing=True)
        trainer.fit(module, datamodule=digits(3), ckpt_path=resume)
        return module, recorder.seen

    whole, seen = run()
    resumed, rest = run(tmp_path / "True" / "step=3.ckpt")
    assert rest == seen[3:]
    assert torch.equal(parameters_of(whole), parameters_of(resumed))


def test_an_endless_training_is_refused(make_trainer: MakeTrainer) -> None:
    module = binary_distiller(student_schedule=Constant())
    with pytest.raises(UsageError, match="IRNet needs to know the end of training: set trainer"):
        make_trainer(max_epochs=-1).fit(module, datamodule=digits(2))
