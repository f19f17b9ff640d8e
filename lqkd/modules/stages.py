"""Asking the data for batches of another stage than the running one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import RunningStage


@contextmanager
def in_stage(trainer: Trainer, stage: RunningStage) -> Iterator[None]:
    """Inside the block the data's hooks prepare batches as in ``stage``: augmented in training, and not in a test."""
    before = trainer.state.stage
    trainer.state.stage = stage
    try:
        yield
    finally:
        trainer.state.stage = before
