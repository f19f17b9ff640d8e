"""The two checkpoints of a run: the best on the validation split, and the last, from which it can be resumed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor

from lqkd.errors import DivergenceError, UsageError
from lqkd.modules.base import TaskModule
from lqkd.runs import resume_state
from lqkd.runs.checkpoint_io import read_checkpoint
from lqkd.runs.folder import BEST, LAST
from lqkd.runs.logger import RunLogger, flush_table
from lqkd.utils.files import atomic_path


class BestAndLast(ModelCheckpoint):
    """Keeps ``best.ckpt``, saved after an epoch's validation, and ``last.ckpt``, from which a training resumes exactly.

    Best is the best value of ``monitor``, or the end of a training that ends before its first validation. Of equally
    good epochs the later one is kept: a small validation split has many ties, and the later network has trained longer,
    at a lower learning rate.

    Last is saved when everything of the batches before has been counted and logged: before the first batch of every
    epoch but the first, before every ``every_n_steps``-th step, and when training ends. On the CPU a training that goes
    on from there ends with the same weights and metrics, bit for bit, as one that was never stopped.

    Args:
        folder: where the checkpoints go.
        validates: whether there is a validation; without one, best is the last epoch.
        every_n_steps: steps of the optimizer from one saving of last to the next within an epoch; None for none.
        monitor, mode: the task's metric, and whether the least (``min``) or the largest of it is the best.

    Raises:
        UsageError: when every_n_steps is less than 1.
    """

    def __init__(
        self,
        folder: Path,
        validates: bool = True,
        every_n_steps: int | None = None,
        monitor: str = "val/acc",
        mode: Literal["min", "max"] = "max",
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise UsageError(f"run.save_every_n_steps={every_n_steps} is not possible: it must be at least 1, or null")
        super().__init__(
            dirpath=folder,
            filename=Path(BEST).stem,
            monitor=monitor if validates else None,
            mode=mode,
            save_on_train_epoch_end=True,
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )
        self.every_n_steps = every_n_steps
        self._validated = False
        self._saving_last = False
        self._finished = False
        self._resumed: dict[str, Any] | None = None
        self._from_step = 0
        self._from_elsewhere = False

    # ---- last

    def save_resumable(self, trainer: Trainer) -> None:
        """Save ``last.ckpt``; between two batches, on all processes.

        Raises:
            DivergenceError: when a parameter is NaN or infinite; the file stays as it was.
            OSError: when it cannot be written; the file stays as it was.
        """
        module = trainer.lightning_module
        if not resume_state.all_finite(module):
            name = next(name for name, parameter in module.named_parameters() if not parameter.isfinite().all())
            raise DivergenceError(
                f"training diverged before step {trainer.global_step}: {name} is no longer finite, though the loss was;"
                f" last good checkpoint: {self.last_model_path or 'none yet'}"
            )
        flush_table(trainer)  # first, so that the table is never behind the checkpoint
        previous, self.last_model_path = self.last_model_path, str(Path(str(self.dirpath)) / LAST)
        self._saving_last = True
        try:
            trainer.save_checkpoint(self.last_model_path, weights_only=False)
        except BaseException:
            self.last_model_path = previous
            raise
        finally:
            self._saving_last = False
        for logger in trainer.loggers:
            logger.after_save_checkpoint(self)

    def save_soon(self, trainer: Trainer) -> None:
        """Likewise where this process may be killed any moment: first the network as it is, then as files have it."""
        module = trainer.lightning_module
        if isinstance(module, TaskModule) and module.finishes_saved:
            with module.saved_at_once():
                self.save_resumable(trainer)
        self.save_resumable(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        checkpoint[resume_state.SPLIT] = resume_state.split(trainer)
        if self._saving_last:
            rows = next((logger.rows for logger in trainer.loggers if isinstance(logger, RunLogger)), 0)
            resume_state.collect(trainer, checkpoint, rows=rows, finished=self._finished)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        self._resumed = resume_state.claim_own(trainer, checkpoint)
        self._from_step = checkpoint["global_step"]
        self._from_elsewhere = Path(str(trainer.ckpt_path)).resolve().parent != Path(str(self.dirpath)).resolve()
        if trainer.state.fn == TrainerFn.FITTING:
            resume_state.check_goes_on(trainer, checkpoint)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._finished = False
        if self._resumed is not None:
            resume_state.fast_forward(trainer, self._resumed["batches"])

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._resumed is not None:
            resume_state.restore(trainer, self._resumed)
            self._resumed = None
            return
        steps = trainer.global_step
        due = batch_idx == 0 or (self.every_n_steps is not None and steps % self.every_n_steps == 0)
        if due and steps > 0 and resume_state.between_steps(trainer, pl_module, batch_idx):
            self.save_resumable(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self._finished = True
        self.save_resumable(trainer)
        if not self.best_model_path:  # trainer.max_steps ended it before the first validation
            self.best_model_path = str(Path(str(self.dirpath)) / BEST)
            trainer.save_checkpoint(self.best_model_path, weights_only=False)

    # ---- best

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
        self.kth_value = torch.tensor(float("-inf" if self.mode == "max" else "inf"))

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"validated": self._validated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the best checkpoint of the run that is resumed, of which this run's folder gets a copy.

        Its score is that which it holds itself: it may be of a process that was killed after it had saved this file
        and before it saved the one that is resumed.
        """
        self._validated = state_dict.get("validated", False)
        target = Path(str(self.dirpath)) / BEST
        best = target if target.is_file() else Path(state_dict["best_model_path"])
        if not state_dict["best_model_path"]:  # none yet, or none that would be comparable
            return
        if not best.is_file():
            rank_zero_warn(f"the best checkpoint so far, {best}, is gone: the best of this run counts from here on")
            return
        saved = read_checkpoint(best)
        if self._from_elsewhere and saved["global_step"] > self._from_step:
            rank_zero_warn(f"the best checkpoint so far, {best}, is of later: the best of this run counts from here on")
            return
        if best != target:
            _copy(best, target)
        self.best_model_path = str(target)
        score = saved["callbacks"].get(self.state_key, {}).get("best_model_score")
        if score is not None:
            self.best_model_score = self.kth_value = score
            self.kth_best_model_path = str(target)
            self.best_k_models = {str(target): score}


@rank_zero_only
def _copy(source: Path, target: Path) -> None:
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)
