"""Trainer settings that cannot mean what they say, under manual optimization with two optimizers or at all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)

from lqkd.errors import UsageError

_INSTEAD: dict[type[Callback], str] = {
    LearningRateFinder: "set the learning rates of model.student_optimizer and model.regularizer_optimizer",
    BatchSizeFinder: "set the batch size of the data",
    GradientAccumulationScheduler: "use model.accumulate_grad_batches",
}
"""Callbacks of Lightning that run or change the training as only one automatic optimizer allows."""


def check_trainer_settings(settings: Any) -> None:
    """Refuse settings of the Trainer that DistillModule has to take over or cannot honour.

    Args:
        settings: the Trainer, or what it will be made of, with attributes of the same names.

    Raises:
        UsageError: naming the setting and what to use instead.
    """
    precision = settings.precision
    if str(precision).startswith(("16", "transformer-engine-float16")):
        raise UsageError(
            f"trainer.precision={precision!r} is not possible with two optimizers, whose gradient scaler would be "
            "updated twice a step: use bf16-mixed or 32-true"
        )
    if str(precision) not in ("None", "32", "32-true", "bf16", "bf16-mixed"):
        raise UsageError(f"trainer.precision={precision!r} is not possible: use bf16-mixed or 32-true")
    if settings.gradient_clip_val is not None:
        raise UsageError(
            f"trainer.gradient_clip_val={settings.gradient_clip_val!r} has no effect with two optimizers: "
            "use model.gradient_clip_val"
        )
    algorithm = settings.gradient_clip_algorithm
    if algorithm is not None:
        raise UsageError(
            f"trainer.gradient_clip_algorithm={getattr(algorithm, 'value', algorithm)!r} has no effect with two "
            "optimizers: use model.gradient_clip_val, which bounds the norm"
        )
    if settings.accumulate_grad_batches not in (None, 1):
        raise UsageError(
            f"trainer.accumulate_grad_batches={settings.accumulate_grad_batches!r} has no effect with two optimizers: "
            "use model.accumulate_grad_batches"
        )


def check_callbacks(callbacks: Iterable[Callback]) -> None:
    """Refuse callbacks of Lightning that cannot work with DistillModule.

    Raises:
        UsageError: naming the callback and what to do instead.
    """
    for callback in callbacks:
        name = type(callback).__name__
        for kind, instead in _INSTEAD.items():
            if isinstance(callback, kind):
                raise UsageError(
                    f"callback {name} is not possible with DistillModule, which steps its optimizers itself: {instead}"
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
