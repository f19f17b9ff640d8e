"""What is done to a network once training has moved it, before it is validated or saved."""

from __future__ import annotations

from abc import ABC, abstractmethod

from lightning.pytorch import Callback, LightningModule, Trainer

from lqkd.modules.base import ImageClassifier


class Finisher(Callback, ABC):
    """Changes the network that is evaluated and kept: before every validation, and at the end of every epoch.

    Most epochs end with a validation, after whose finish no step is taken; an epoch without one, or that
    ``trainer.max_steps`` cuts short, is finished before its checkpoint is saved. Finishers take turns in the order of
    ``turn``, however they are listed, and work once after the same step.
    """

    turn: int
    _finished: int | None = None  # global step: nothing has moved since, as long as it is the present one

    @abstractmethod
    def finish(self, trainer: Trainer, module: ImageClassifier) -> None:
        """Change ``module.product()``, between two batches; on all processes."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._finished = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            _finish(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _finish(trainer, pl_module)


def _finish(trainer: Trainer, module: LightningModule) -> None:
    assert isinstance(module, ImageClassifier), "setup refuses others"
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    finishers = [c for c in callbacks if isinstance(c, Finisher)]
    for finisher in sorted(finishers, key=lambda f: f.turn):
        if finisher._finished != trainer.global_step:
            finisher._finished = trainer.global_step
            finisher.finish(trainer, module)
