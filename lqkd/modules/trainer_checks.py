"""Trainer settings that cannot mean what they say: numbers out of range, and what two optimizers cannot follow."""

from __future__ import annotations

import math
from typing import Any

from lqkd.errors import UsageError

_LEAST = {
    "check_val_every_n_epoch": 1,
    "accumulate_grad_batches": 1,
    "log_every_n_steps": 0,
    "gradient_clip_val": 0,
    "num_sanity_val_steps": -1,
}
"""Settings of the Trainer that Lightning takes unseen, and the least number that means something; null is always
accepted."""

_SHARDED = ("fsdp", "model_parallel", "modelparallel", "deepspeed")
"""What names of Lightning's strategies begin with, and those of their classes, that cut weights over processes."""


def check_trainer_numbers(settings: Any) -> None:
    """Refuse numbers that Lightning ignores, or fails at in the middle of a training.

    Args:
        settings: a Trainer, or the settings for one, which have the same names.

    Raises:
        UsageError: naming the setting and what is accepted.
    """
    for name, least in _LEAST.items():
        value = getattr(settings, name, None)
        if value is not None and not least <= value < math.inf:
            raise UsageError(f"trainer.{name}={value!r} is not possible: it must be at least {least}, or null")
    if settings.val_check_interval == 0:
        raise UsageError("trainer.val_check_interval=0 is not possible: it must be above 0, or null")
    if settings.limit_train_batches == 0:
        raise UsageError("trainer.limit_train_batches=0 leaves nothing to train on: it must be above 0, or null")


def check_trainer_settings(settings: Any) -> None:
    """Refuse settings of the Trainer that DistillModule has to take over or cannot honour.

    Args:
        settings: the Trainer, or what it will be made of, with attributes of the same names.

    Raises:
        UsageError: naming the setting and what to use instead.
    """
    _check_strategy(getattr(settings, "strategy", None))
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


def _check_strategy(strategy: Any) -> None:
    """Refuse strategies that cut weights over processes: a grid is fitted to a whole tensor, and exported from it.

    Raises:
        UsageError: then.
    """
    given = getattr(strategy, "class_path", strategy)  # of a configuration, a name, or one that is made
    given = given.rpartition(".")[2] if isinstance(given, str) else type(given).__name__
    if given.lower().startswith(_SHARDED):
        raise UsageError(
            f"trainer.strategy={given} is not possible: it cuts weights over processes, and quantizers are fitted to "
            "whole ones; use ddp, with model.gradient_checkpointing and an optimizer such as torchao.optim.AdamW8bit "
            "where memory is short"
        )
