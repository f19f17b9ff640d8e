"""What is said of a training before its first step: what, from whom, how long, where."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer

from lqkd.balances import FixedBalance
from lqkd.balances.base import TASK
from lqkd.callbacks.folder import run_folder_of
from lqkd.modules import DistillModule
from lqkd.modules.base import TaskModule
from lqkd.utils.screen import tell


def print_header(trainer: Trainer, module: TaskModule, guessed: bool = False) -> None:
    """Print every choice, a line each.

    Args:
        trainer: of a training that is about to begin.
        module: what it trains.
        guessed: whether the task was told from the first batch.
    """
    for about, told in _lines(trainer, module, guessed):
        tell(f"{about:<12}{told}", indent=12)


def _lines(trainer: Trainer, module: TaskModule, guessed: bool) -> Iterator[tuple[str, str]]:
    told = ", told from the first batch" if guessed else ""
    yield "task", f"{type(module.task).__name__}{told}, {_kept(trainer, module)}"
    if isinstance(module, DistillModule):
        yield "student", f"{type(module.student).__name__}: {module.coverage.summary()}"
        yield "learns from", ", ".join(_losses(module))
    else:
        yield "network", type(module.trained()).__name__
    optimizers = map(_optimizer, trainer.optimizers)
    seed = os.environ.get("PL_GLOBAL_SEED")
    parts = [*_length(trainer, module), *optimizers, _device(trainer, module)]
    yield "training", ", ".join(parts if seed is None else [*parts, f"seed {seed}"])
    yield "run folder", str(run_folder_of(trainer))


def _kept(trainer: Trainer, module: TaskModule) -> str:
    """Which epoch is kept."""
    epochs, every = trainer.max_epochs or -1, trainer.check_val_every_n_epoch
    if not trainer.enable_validation or (every is not None and 0 < epochs < every):
        return "the last epoch is kept: there is no validation"
    return f"best by {module.task.monitor} ({module.task.mode})"


def _losses(module: DistillModule) -> Iterator[str]:
    balance, weights = module.balance, {}
    if isinstance(balance, FixedBalance):
        weights = dict(zip(balance.names, balance.constants.tolist(), strict=True))
    yield f"{weights[TASK]:g} of the task" if weights else "the task"
    for name, term in module.distillation.terms():
        share = f"{weights[name] * term.weight:g} of " if weights else ""
        asked = ", ".join(_teacher(module, teacher) for teacher in term.teachers)
        weighed = "" if term.regularizer is None else f" weighed by {type(term.regularizer).__name__}"
        yield f"{share}{type(term.losses[0]).__name__} from {asked}{weighed}"
    if not weights:
        yield f"all weighed by {type(balance).__name__}"


def _teacher(module: DistillModule, name: str) -> str:
    """Its class, and its name where there are several."""
    kind = type(module.named_teachers[name].network).__name__
    return kind if len(module.named_teachers) == 1 else f"{name} ({kind})"


def _length(trainer: Trainer, module: TaskModule) -> Iterator[str]:
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    of = "" if math.isinf(batches) else f" of {batches} batches"
    if epochs is not None and epochs > 0:
        yield f"{epochs} epoch{'s' if epochs != 1 else ''}{of}"
    else:
        yield f"epochs without end{of}"
    if trainer.max_steps > 0:
        yield f"at most {trainer.max_steps} steps"
    timer = next((one for one in trainer.callbacks if isinstance(one, Timer)), None)  # type: ignore[attr-defined]
    if timer is not None and (left := timer.time_remaining()) is not None:
        yield f"at most {left:.0f} s"
    if module.accumulated_batches() > 1:
        yield f"{module.accumulated_batches()} batches a step"


def _optimizer(optimizer: Any) -> str:
    group = optimizer.param_groups[0]
    rate = group.get("initial_lr", group["lr"])  # before a schedule
    return f"{type(optimizer).__name__.removeprefix('Lightning')} (lr {rate:g})"


def _device(trainer: Trainer, module: TaskModule) -> str:
    several = f"{trainer.world_size} x " if trainer.world_size > 1 else ""
    return f"on {several}{module.device.type}"
