"""What is done to a network once training has moved it, before it is validated or saved."""

from __future__ import annotations

from abc import ABC, abstractmethod

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerStatus
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.modules.base import TaskModule


class Finisher(Callback, ABC):
    """Changes the network that is evaluated and kept: before every validation, and at the end of every epoch.

    Most epochs end with a validation, after whose finish no step is taken; an epoch without one, or that
    ``trainer.max_steps`` cuts short, is finished before its checkpoint is saved. What is saved within an epoch is
    finished for the file alone. Finishers take turns in the order of ``turn``, however they are listed, and work once
    after the same step.

    Raises:
        UsageError: before the first batch, when the module is none of lqkd's.
    """

    turn: int
    _finished: int | None = None  # global step: nothing has moved since, as long as it is the present one

    @abstractmethod
    def finish(self, trainer: Trainer, module: TaskModule) -> None:
        """Change ``module.product()``, between two batches; on all processes."""

    def finish_copy(self, trainer: Trainer, module: TaskModule) -> None:
        """Change ``module.product()`` for a file, while an epoch is being read; it gets its own tensors back."""
        self.finish(trainer, module)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, TaskModule):
            raise UsageError(f"{type(self).__name__} needs a module of lqkd: {type(pl_module).__name__} is none")
        self._finished = None
        if stage == "fit":
            pl_module.finish_saved(_Copies())

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if isinstance(pl_module, TaskModule):
            pl_module.finish_saved(None)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            _finish(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _finish(trainer, pl_module)


def _finish(trainer: Trainer, module: LightningModule) -> None:
    assert isinstance(module, TaskModule), "setup refuses others"
    for finisher in _due(trainer):
        finisher._finished = trainer.global_step
        finisher.finish(trainer, module)


def _due(trainer: Trainer) -> list[Finisher]:
    """Those that have not worked since the last step, in their turns."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    finishers = [c for c in callbacks if isinstance(c, Finisher) and c._finished != trainer.global_step]
    return sorted(finishers, key=lambda finisher: finisher.turn)


class _Copies:
    """What finishers make of a network for the files that are saved within an epoch."""

    def __init__(self) -> None:
        self._of: tuple[int, ...] = ()  # the step and the state of the network that was finished last
        self._changed: dict[str, Tensor] = {}

    def __call__(self, module: TaskModule, untrained: bool = False) -> dict[str, Tensor]:
        """Those tensors of ``module.product()`` that finishing changes, by name; the network itself stays as it is.

        All processes call this together. Several files of one step cost no more than one.

        Args:
            module: whose product it is.
            untrained: whether this is asked for before the first step too; a file of then has the network as it is.
        """
        trainer = module.trainer
        trains = trainer.state.fn == "fit" and trainer.state.status == TrainerStatus.RUNNING
        begun = trainer.global_step > 0 or untrained
        due = _due(trainer) if trains and begun and not trainer.sanity_checking else []
        if not due:
            return {}
        state = {key: value for key, value in module.product().state_dict().items() if isinstance(value, Tensor)}
        if not trainer.strategy.reduce_boolean_decision(self._of == _moment(trainer, state)):
            self._changed = self._finish(due, module, state)
            self._of = _moment(trainer, state)
        return self._changed

    def _finish(self, due: list[Finisher], module: TaskModule, state: dict[str, Tensor]) -> dict[str, Tensor]:
        before = {key: tensor.clone() for key, tensor in state.items()}
        try:
            for finisher in due:
                finisher.finish_copy(module.trainer, module)
            return {key: tensor.clone() for key, tensor in state.items() if not tensor.equal(before[key])}
        finally:
            for key, tensor in state.items():
                if not tensor.equal(before[key]):
                    tensor.copy_(before[key])


def _moment(trainer: Trainer, state: dict[str, Tensor]) -> tuple[int, ...]:
    """Tells a network from what it was before any of its tensors was written."""
    return (trainer.global_step, *(tensor._version for tensor in state.values()))
