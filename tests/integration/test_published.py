"""Published ways of learning a weight or a temperature, in a training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lqkd.callbacks import RegularizerMonitor
from lqkd.errors import UsageError
from lqkd.losses import CurriculumTemperature, HintonKL
from lqkd.models import CifarResNet
from lqkd.modules import DistillModule, Term
from lqkd.quantization import Recipe
from lqkd.regularizers import MetaWeightNet
from lqkd.runs import BestAndLast, RunLogger
from lqkd.runs.summary import RunSummary
from tests.conftest import digits, parameters_of
from tests.integration.test_exact_resume import StopAt
from tests.integration.test_trust import STUDENT, Marked, held_out, trained_teacher

MakeTrainer = Callable[..., Trainer]


def distilling() -> DistillModule:
    """One term whose temperature is learned, and one that weighs samples by their loss."""
    torch.manual_seed(0)
    return DistillModule(
        student=CifarResNet(8, num_classes=10, width=8, in_channels=1),
        student_weights=STUDENT,
        quantization=Recipe(bits="w4a4"),
        teachers={"large": trained_teacher()},
        distillation={
            "curriculum": Term(CurriculumTemperature(start=4.0), "large"),
            "weighted": Term(HintonKL(), "large", regularizer=MetaWeightNet(hidden=8, rows=16)),
        },
        student_optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    )


def test_a_training_that_is_cut_and_resumed_learns_the_same_temperature_and_weights(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    def run(folder: Path, stop: tuple[int, int] | None = None) -> tuple[DistillModule, float]:
        module = distilling()
        last = folder / "last.ckpt"
        callbacks: list[Any] = [BestAndLast(folder, every_n_steps=1)] + ([StopAt(*stop)] if stop else [])
        trainer = make_trainer(
            max_epochs=2,
            limit_train_batches=3,
            callbacks=callbacks,
            enable_checkpointing=True,
            logger=RunLogger(folder),
        )
        trainer.fit(module, datamodule=held_out(), ckpt_path=last if last.exists() else None, weights_only=True)
        return module, float(trainer.callback_metrics["train/curriculum/temperature"])

    whole, temperature = run(tmp_path / "whole")
    assert abs(temperature - 4.0) > 0.01
    regularizer = whole.distillation["weighted"].regularizer
    assert isinstance(regularizer, MetaWeightNet)
    assert regularizer.network[2].weight.detach().abs().max() > 0  # which began at 0
    with pytest.raises(InterruptedError):
        run(tmp_path / "cut", (1, 1))
    resumed, again = run(tmp_path / "cut")
    assert again == temperature
    assert torch.equal(parameters_of(resumed), parameters_of(whole))


def test_each_step_looks_ahead_to_other_held_out_rows_and_trains_on_none(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    module = distilling()
    looked: list[Tensor] = []

    def look(student: Any, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        if student.training:
            looked.append(arguments[0].flatten(1))

    module.student.register_forward_hook(look)
    callbacks = [RegularizerMonitor(), RunSummary()]
    trainer = make_trainer(limit_train_batches=2, callbacks=callbacks, logger=RunLogger(tmp_path))
    trainer.fit(module, datamodule=held_out(Marked))
    white = torch.cat(looked)[:, 0].max()
    assert not any(0 < int((images[:, 0] == white).sum()) < len(images) for images in looked)
    first, second = (images for images in looked if bool((images[:, 0] == white).all()))
    assert len(first) == len(second) == 16
    assert not (first[:, None] == second).all(2).any()  # no row is looked at twice
    told = json.loads((tmp_path / "summary.json").read_text())["regularizer"]["weighted"]
    assert told["verdict"] == "believed"  # not turned down from 1: it begins at 1/2
    assert told["sentence"] == "weighted: teachers are believed 0.50 against the student in epoch 1."


def test_without_held_out_rows_it_is_refused(make_trainer: MakeTrainer) -> None:
    with pytest.raises(UsageError, match=r"distillation.weighted: regularizer \w+ needs .*trust_fraction"):
        make_trainer().fit(distilling(), datamodule=digits())
    with pytest.raises(UsageError, match=r"\d held-out rows are too few to look ahead with: at least 20 are needed"):
        make_trainer().fit(distilling(), datamodule=held_out(trust_fraction=0.003))
