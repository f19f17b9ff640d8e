"""How long a training is, in optimizer steps."""

from __future__ import annotations

from lightning.pytorch import Trainer


def total_steps(trainer: Trainer, accumulate_grad_batches: int = 1) -> int | None:
    """Optimizer steps of the whole training; None when neither epochs nor steps are limited.

    Counted from the training batches of an epoch, the last group of which may be shorter. Sets up the data.
    """
    trainer.fit_loop.setup_data()
    limit = trainer.max_steps if trainer.max_steps > 0 else None
    epochs, batches = trainer.max_epochs, trainer.num_training_batches
    if epochs is None or epochs < 0 or batches == float("inf"):
        return limit
    steps = -(-int(batches) // accumulate_grad_batches) * epochs
    return steps if limit is None else min(steps, limit)
