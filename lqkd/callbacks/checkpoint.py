"""The two checkpoints of a run: the best on the validation split, and the last."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor

from lqkd.files import atomic_path

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

        self._validated = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        self._validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        self._validated = False

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        if not self._validated:  # the metric is still that of an earlier epoch
            return False
        tied = current is not None and self.best_model_score is not None and bool(current == self.best_model_score)
        return trainer.strategy.reduce_boolean_decision(tied) or super().check_monitor_top_k(trainer, current)

    def forget_best(self) -> None:
        """Let the next validated epoch be the best: what was measured before is not comparable any more."""
        self.best_k_models = {}
        self.best_model_path = self.kth_best_model_path = ""
        self.best_model_score = None
        self.kth_value = torch.tensor(float("-inf"))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the best checkpoint of the run that is resumed, of which this run's folder gets a copy."""
        previous, target = Path(state_dict["best_model_path"]), Path(str(self.dirpath)) / BEST
        score = state_dict["best_model_score"]
        if score is None or previous == target:
            super().load_state_dict(state_dict)
        elif not previous.is_file():
            rank_zero_warn(f"the best checkpoint so far, {previous}, is gone: the best of this run counts from here on")
        else:
            _copy(previous, target)
            self.best_model_path = self.kth_best_model_path = str(target)
            self.best_model_score = self.kth_value = score
            self.best_k_models = {str(target): score}


@rank_zero_only
def _copy(source: Path, target: Path) -> None:
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)
