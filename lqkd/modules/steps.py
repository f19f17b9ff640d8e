"""How long a training is, in optimizer steps and in epochs."""

from __future__ import annotations

from lightning.pytorch import Trainer


def total_steps(trainer: Trainer, accumulate_grad_batches: int = 1) -> int | None:
    """Optimizer steps of the whole training; None when neither epochs nor steps are limited.

    Counted from the training batches of an epoch, the last group of which may be shorter. Sets up the data.
    """
    limit = trainer.max_steps if trainer.max_steps > 0 else None
    epochs, in_epoch = trainer.max_epochs, _steps_of_epoch(trainer, accumulate_grad_batches)
    if epochs is None or epochs < 0 or in_epoch is None:
        return limit
    steps = in_epoch * epochs
    return steps if limit is None else min(steps, limit)


def total_epochs(trainer: Trainer, accumulate_grad_batches: int = 1) -> int | None:
    """Epochs of the whole training, the last of which may be cut short; None when their number is not known."""
    steps, in_epoch = total_steps(trainer, accumulate_grad_batches), _steps_of_epoch(trainer, accumulate_grad_batches)
    if steps is None or in_epoch is None:
        return trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs > 0 else None
    return -(-steps // max(1, in_epoch))


def _steps_of_epoch(trainer: Trainer, accumulate_grad_batches: int) -> int | None:
    """None for data without an end."""
    trainer.fit_loop.setup_data()
    batches = trainer.num_training_batches
    return None if batches == float("inf") else -(-int(batches) // accumulate_grad_batches)
