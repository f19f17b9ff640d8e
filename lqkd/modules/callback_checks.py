"""Lightning's callbacks that would fail in the middle of a training, or wait for a metric that never comes."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BatchSizeFinder,
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.utilities import rank_zero_warn

from lqkd.errors import UsageError
from lqkd.utils.suggest import nearest

_INSTEAD: dict[type[Callback], str] = {
    LearningRateFinder: "set the learning rates of model.student_optimizer and model.regularizer_optimizer",
    BatchSizeFinder: "set the batch size of the data",
    GradientAccumulationScheduler: "use model.accumulate_grad_batches",
    BaseFinetuning: "it adds what it unfreezes to both; use ClassifierModule for a network in floating point",
}
"""Callbacks of Lightning that run or change the training as only one automatic optimizer allows."""
_FAMILIES = ("regularizer/", "oscillation/")
"""What names of metrics that our callbacks log begin with."""
_OF_CHECKPOINTS = {"epoch", "step"}
"""What a ModelCheckpoint may also go by."""


def check_callbacks(trainer: Trainer, module: LightningModule) -> None:
    """Refuse callbacks that need one optimizer in a training with several, and those that need another module.

    Raises:
        UsageError: naming the callback and what to use instead.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        name = type(callback).__name__
        for kind, instead in _INSTEAD.items() if not module.automatic_optimization else ():
            if isinstance(callback, kind):
                raise UsageError(f"callback {name} is not possible with two optimizers: {instead}")
        _check_finders(callback, module)
        interval = getattr(callback, "_train_time_interval", None)
        if isinstance(callback, ModelCheckpoint) and interval is not None and not module.automatic_optimization:
            raise UsageError(
                f"train_time_interval={str(interval)!r} of {name} saves nothing with two optimizers: use "
                "every_n_train_steps, or run.save_every_n_steps"
            )
        if isinstance(callback, BackboneFinetuning) and not hasattr(module, "backbone"):
            raise UsageError(
                f"callback {name} is not possible: {type(module).__name__} has no attribute backbone; derive a "
                "callback from BaseFinetuning"
            )


def _check_finders(callback: Any, module: LightningModule) -> None:
    """Refuse what Lightning's finders cannot find, or find too late."""
    if isinstance(callback, LearningRateFinder):
        looked_for = [callback._attr_name] if callback._attr_name else ["lr", "learning_rate"]
        if not any(hasattr(module, name) for name in looked_for):
            raise UsageError(
                f"callback {type(callback).__name__} is not possible: {type(module).__name__} has no attribute "
                f"{' or '.join(looked_for)}; set the learning rate of model.optimizer"
            )
    if isinstance(callback, BatchSizeFinder) and not callback._early_exit:  # which a Tuner's has, that trains nothing
        raise UsageError(
            f"callback {type(callback).__name__} is not possible: schedules have the length of a training with the "
            "batch size before; find it with Tuner(trainer).scale_batch_size(module, datamodule=data) first"
        )


def check_averages(callbacks: Iterable[Callback]) -> None:
    """Refuse Lightning's averages of weights.

    They average the integers and flags among the buffers, leave statistics of batch norm that belong to other weights,
    give a test after the training the weights that were trained instead of the average that is in the file, and the
    stochastic one takes over one optimizer's schedule and trains one more epoch.

    Raises:
        UsageError: naming the callback and what to use instead.
    """
    for callback in callbacks:
        if isinstance(callback, (StochasticWeightAveraging, WeightAveraging)):
            raise UsageError(
                f"trainer.callbacks={type(callback).__name__} is not possible: what it saves is not what was measured, "
                "with quantizers and batch norm that do not fit its weights; use lqkd.callbacks.WeightEMA"
            )


def check_monitors(trainer: Trainer, module: LightningModule, logged: Collection[str]) -> None:
    """Refuse an EarlyStopping or ModelCheckpoint that goes by a metric which nothing logs.

    Where a class that is none of ours or Lightning's may log it, that is said instead.

    Args:
        trainer: whose data are set up.
        module: the module that is trained.
        logged: names of the metrics that it logs.

    Raises:
        UsageError: with the nearest name and those that there are.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    names = {name for name in logged if trainer.enable_validation or not name.startswith("val/")}
    others = [type(part).__name__ for part in (module, *callbacks) if _may_log(part)]
    for callback in callbacks:
        name = getattr(callback, "monitor", None)
        waits = isinstance(callback, ModelCheckpoint | EarlyStopping) and getattr(callback, "strict", True)
        ours = type(callback).__module__.startswith("lqkd.")
        known = names | _OF_CHECKPOINTS if isinstance(callback, ModelCheckpoint) else names
        if name is None or not waits or ours or name in known or name.startswith(_FAMILIES):
            continue
        told = f"monitor={name!r} of {type(callback).__name__}"
        if name in logged:
            raise UsageError(f"{told} is not possible: there is no validation that would measure it")
        if others:
            rank_zero_warn(f"{told} is none of {', '.join(sorted(names))}: {' or '.join(others)} must log it")
            continue
        raise UsageError(f"{told} is not possible{nearest(name, names)}; metrics are {', '.join(sorted(names))}")


def _may_log(part: Any) -> bool:
    return isinstance(part, LambdaCallback) or not type(part).__module__.startswith(("lqkd.", "lightning."))
