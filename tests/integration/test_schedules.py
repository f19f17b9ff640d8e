"""Learning rates of trainings that are resumed with other settings, and schedules that do not fit the training."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import SGD, Optimizer
from torch.optim import lr_scheduler as torch_schedulers

from lqkd.errors import UsageError
from lqkd.modules import ClassifierModule, Constant, Cosine, Schedule, TorchSchedule
from tests.conftest import digits, distiller, network

MakeTrainer = Callable[..., Trainer]


class Settings(Callback):
    """Those of the first optimizer's first group, before each step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        group = trainer.optimizers[0].param_groups[0]
        self.seen.append({key: group[key] for key in ("lr", "momentum", "weight_decay")})


def classifier(schedule: Schedule, **settings: Any) -> ClassifierModule:
    torch.manual_seed(0)
    return ClassifierModule(
        network(), optimizer=partial(SGD, **({"lr": 0.1, "momentum": 0.9} | settings)), schedule=schedule
    )


def train(
    make: MakeTrainer, module: LightningModule, epochs: int, checkpoint: Path | None = None
) -> list[dict[str, float]]:
    """The settings of every step of epochs of three batches; from the checkpoint, where there is one, or into it."""
    settings = Settings()
    trainer = make(callbacks=[settings], max_epochs=epochs, limit_val_batches=0, limit_test_batches=0)
    goes_on = checkpoint is not None and checkpoint.exists()
    trainer.fit(module, datamodule=digits(3), ckpt_path=checkpoint if goes_on else None, weights_only=False)
    if checkpoint is not None and not goes_on:
        trainer.save_checkpoint(checkpoint)
    return settings.seen


def chained(optimizer: Optimizer, gamma: float) -> torch_schedulers.LRScheduler:
    parts = [torch_schedulers.ConstantLR(optimizer, 0.5, 5), torch_schedulers.ExponentialLR(optimizer, gamma)]
    return torch_schedulers.ChainedScheduler(parts)


def one_after_another(optimizer: Optimizer, milestone: int) -> torch_schedulers.LRScheduler:
    parts = [
        torch_schedulers.LinearLR(optimizer, 0.1, total_iters=4),
        torch_schedulers.CosineAnnealingLR(optimizer, 12),
    ]
    return torch_schedulers.SequentialLR(optimizer, parts, [milestone])


def schedule(scheduler: Callable[..., Any], interval: Any = "step", **arguments: Any) -> TorchSchedule:
    return TorchSchedule(partial(scheduler, **arguments), interval)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Cosine(), Cosine(warmup_fraction=0.2)),
        (Cosine(), schedule(torch_schedulers.StepLR, step_size=4)),
        *(
            (schedule(scheduler, interval, **{name: a}), schedule(scheduler, interval, **{name: b}))
            for scheduler, name, a, b, interval in (
                (torch_schedulers.CosineAnnealingLR, "T_max", 6, 12, "step"),
                (torch_schedulers.MultiStepLR, "milestones", [2, 4], [5, 8], "step"),
                (partial(torch_schedulers.StepLR, step_size=1), "gamma", 0.1, 0.5, "epoch"),
                (partial(torch_schedulers.OneCycleLR, max_lr=0.3), "total_steps", 6, 12, "step"),
                (chained, "gamma", 0.1, 0.9, "step"),
                (one_after_another, "milestone", 3, 6, "step"),
            )
        ),
    ],
)
def test_a_resumed_training_has_the_rates_of_one_with_its_schedule_from_the_start(
    make_trainer: MakeTrainer, tmp_path: Path, before: Schedule, after: Schedule
) -> None:
    whole = train(make_trainer, classifier(after), 4)
    assert train(make_trainer, classifier(before), 2, tmp_path / "last.ckpt") != whole[:6]
    assert train(make_trainer, classifier(after), 4, tmp_path / "last.ckpt") == whole[6:]


def test_both_players_schedules_follow_their_arguments(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    def rates(steps: int) -> tuple[list[dict[str, float]], list[float]]:
        one_cycle = schedule(torch_schedulers.OneCycleLR, max_lr=0.1, total_steps=steps)
        module = distiller(student_schedule=one_cycle, regularizer_schedule=one_cycle)
        seen = train(make_trainer, module, steps // 3, tmp_path / "last.ckpt")
        return seen, [group["lr"] for optimizer in module.trainer.optimizers for group in optimizer.param_groups]

    rates(6)
    seen, last = rates(12)
    (tmp_path / "last.ckpt").unlink()
    whole, last_of_whole = rates(12)
    assert seen == whole[6:]
    assert last == last_of_whole


def test_a_float_training_goes_on_with_the_settings_that_it_is_given(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    train(make_trainer, classifier(Constant()), 1, tmp_path / "last.ckpt")
    other = classifier(Constant(), lr=0.001, momentum=0.5, weight_decay=0.1)
    wanted = {"lr": 0.001, "momentum": 0.5, "weight_decay": 0.1}
    assert train(make_trainer, other, 2, tmp_path / "last.ckpt") == [wanted] * 3


def test_a_float_training_that_had_ended_goes_on_at_the_rate_of_a_longer_one(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    train(make_trainer, classifier(Cosine()), 1, tmp_path / "last.ckpt")
    seen = train(make_trainer, classifier(Cosine()), 2, tmp_path / "last.ckpt")
    assert [each["lr"] for each in seen] == [0.1 * Cosine().factor(step, 6) for step in range(3, 6)]


@pytest.mark.parametrize(
    ("arguments", "interval", "message"),
    [
        ({"total_steps": 5}, "step", "OneCycleLR ends before the 6 steps of the training"),
        ({"total_steps": 1}, "epoch", "OneCycleLR ends before the 2 epochs of the training"),
        ({}, "step", "scheduler is not possible: You must define either total_steps"),
    ],
)
@pytest.mark.parametrize("make_module", [classifier, lambda schedule: distiller(student_schedule=schedule)])
def test_a_schedule_that_ends_before_the_training_is_refused_before_the_first_batch(
    make_trainer: MakeTrainer,
    arguments: dict[str, int],
    interval: Any,
    message: str,
    make_module: Callable[[Schedule], LightningModule],
) -> None:
    one_cycle = schedule(torch_schedulers.OneCycleLR, interval, max_lr=0.1, **arguments)
    with pytest.raises(UsageError, match=message):
        train(make_trainer, make_module(one_cycle), 2)


def test_a_cosine_that_climbs_again_within_the_training_is_told(make_trainer: MakeTrainer) -> None:
    cosine = schedule(torch_schedulers.CosineAnnealingLR, T_max=4)
    with pytest.warns(UserWarning, match="schedule: the learning rate of CosineAnnealingLR climbs again after T_max=4"):
        train(make_trainer, classifier(cosine), 2)


def test_a_schedule_that_would_never_step_is_refused() -> None:
    with pytest.raises(UsageError, match="interval='epochs' is not possible"):
        schedule(torch_schedulers.StepLR, "epochs", step_size=1)
