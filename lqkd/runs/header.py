"""What is said of a training before its first step: what, from whom, how long, where."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Trainer

from lqkd.balances import FixedBalance
from lqkd.balances.base import TASK
from lqkd.callbacks.folder import run_folder_of
from lqkd.modules import DistillModule
from lqkd.modules.base import TaskModule


def print_header(trainer: Trainer, module: TaskModule, guessed: bool = False) -> None:
    """Print every choice, a line each.

    Args:
        trainer: of a training that is about to begin.
        module: what it trains.
        guessed: whether the task was told from the first batch.
    """
    for about, told in _lines(trainer, module, guessed):
        print(f"{about:<12}{told}", flush=True)


def _lines(trainer: Trainer, module: TaskModule, guessed: bool) -> Iterator[tuple[str, str]]:
    told = ", told from the first batch" if guessed else ""
    yield "task", f"{type(module.task).__name__}{told}, best by {module.task.monitor} ({module.task.mode})"
    if isinstance(module, DistillModule):
        yield "student", f"{type(module.student).__name__}: {module.coverage.summary()}"
        yield "learns from", ", ".join(_losses(module))
    else:
        yield "network", type(module.trained()).__name__
    yield (
        "training",
        f"{_length(trainer)}, {', '.join(map(_optimizer, trainer.optimizers))}, {_device(trainer, module)}",
    )
    yield "run folder", str(run_folder_of(trainer))


def _losses(module: DistillModule) -> Iterator[str]:
    balance, weights = module.balance, {}
    if isinstance(balance, FixedBalance):
        weights = dict(zip(balance.names, balance.constants.tolist(), strict=True))
    yield f"{weights[TASK]:g} of the task" if weights else f"the task, weighed by {type(balance).__name__}"
    for name, term in module.distillation.terms():
        share = f"{weights[name]:g} of " if weights else ""
        asked = ", ".join(type(module.named_teachers[teacher].network).__name__ for teacher in term.teachers)
        weighed = "" if term.regularizer is None else f", weighed by {type(term.regularizer).__name__}"
        yield f"{share}{type(term.losses[0]).__name__} from {asked}{weighed}"


def _length(trainer: Trainer) -> str:
    batches = trainer.num_training_batches
    if trainer.max_steps > 0:
        return f"at most {trainer.max_steps} steps, {batches} batches an epoch"
    epochs = trainer.max_epochs
    many = "epochs without end" if epochs is None or epochs < 0 else f"{epochs} epoch{'s' if epochs != 1 else ''}"
    return f"{many} of {batches} batches"


def _optimizer(optimizer: Any) -> str:
    group = optimizer.param_groups[0]
    rate = group.get("initial_lr", group["lr"])  # before a schedule
    return f"{type(optimizer).__name__.removeprefix('Lightning')} (lr {rate:g})"


def _device(trainer: Trainer, module: TaskModule) -> str:
    several = f"{trainer.world_size} x " if trainer.world_size > 1 else ""
    return f"on {several}{module.device.type}"
