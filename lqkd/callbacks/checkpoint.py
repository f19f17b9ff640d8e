"""The two checkpoints of a run: the best on the validation split, and the last."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

BEST = "best.ckpt"
LAST = "last.ckpt"


class BestAndLast(ModelCheckpoint):
    """Keeps ``best.ckpt`` and ``last.ckpt``, saved after an epoch's validation, once its schedules have stepped.

    Best is the highest ``val/acc``. Of equally good epochs the later one is kept: a small validation split has many
    ties, and the later network has trained longer, at a lower learning rate.

    Args:
        folder: where the checkpoints go.
        validates: whether there is a validation; without one, best is the last epoch.
    """

    def __init__(self, folder: Path, validates: bool = True) -> None:
        super().__init__(
            dirpath=folder,
            filename=Path(BEST).stem,
            monitor="val/acc" if validates else None,
            mode="max",
            save_last=True,
            save_on_train_epoch_end=True,
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        tied = current is not None and self.best_model_score is not None and bool(current == self.best_model_score)
        return trainer.strategy.reduce_boolean_decision(tied) or super().check_monitor_top_k(trainer, current)
