"""Where callbacks leave files."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer


def run_folder_of(trainer: Trainer) -> Path | None:
    """The ``run_folder`` of the trainer's first logger that has one, as :class:`lqkd.runs.RunLogger` has; else None."""
    return next((logger.run_folder for logger in trainer.loggers if hasattr(logger, "run_folder")), None)
