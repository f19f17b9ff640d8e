"""Progress for people: a bar on a terminal, a line per epoch everywhere else."""

from __future__ import annotations

import sys
import time

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities import rank_zero_only

_SHOWN = {"train/loss": "loss", "train/task": "task", "train/distill": "distill", "val/acc": "val acc"}


class ProgressBar(RichProgressBar):
    """Lightning's rich bar on a terminal; elsewhere one line after each epoch, which a log file can hold."""

    def __init__(self) -> None:
        super().__init__()
        self._started = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if not sys.stdout.isatty():
            self.disable()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        self._started = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if not self.is_enabled:
            self._print_line(trainer)

    @rank_zero_only
    def _print_line(self, trainer: Trainer) -> None:
        metrics = trainer.callback_metrics
        shown = [f"{label} {float(metrics[key]):.4f}" for key, label in _SHOWN.items() if key in metrics]
        seconds = time.monotonic() - self._started
        epochs = f"/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
        print("  ".join([f"epoch {trainer.current_epoch + 1}{epochs}", *shown, f"({seconds:.1f} s)"]), flush=True)
