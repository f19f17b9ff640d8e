"""Which epoch is kept as the best one."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from lqkd.errors import Stopped
from lqkd.runs import BestAndLast
from lqkd.runs.stopping import StopOnSignal

MakeTrainer = Callable[..., Trainer]


class Scripted(LightningModule):
    """Reaches the given validation accuracies, epoch by epoch; its only weight is the number of the epoch."""

    def __init__(self, accuracies: Sequence[float]) -> None:
        super().__init__()
        self.accuracies = accuracies
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.weight.data.fill_(self.current_epoch)
        return self.weight.square()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val/acc", self.accuracies[self.current_epoch])


class StopBefore(Callback):
    """An end without warning before the epoch, whose first batch would have saved ``last.ckpt``."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.current_epoch == self.epoch:
            raise InterruptedError


def train(
    make: MakeTrainer,
    folder: Path,
    accuracies: Sequence[float],
    resume: Path | None = None,
    callbacks: Sequence[Callback] = (),
    **settings: int,
) -> int:
    """Train and return the epoch whose weights are in ``best.ckpt``."""
    callbacks = [*callbacks, BestAndLast(folder, settings.get("limit_val_batches") != 0)]
    trainer = make(callbacks=callbacks, enable_checkpointing=True, max_epochs=len(accuracies), **settings)
    trainer.fit(Scripted(accuracies), DataLoader(torch.zeros(1)), DataLoader(torch.zeros(1)), ckpt_path=resume)
    return int(torch.load(folder / "best.ckpt", weights_only=True)["state_dict"]["weight"])


def test_the_best_epoch_is_kept(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    assert train(make_trainer, tmp_path, [0.1, 0.9, 0.5]) == 1


def test_of_equally_good_epochs_the_later_is_kept(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    assert train(make_trainer, tmp_path, [0.1, 0.9, 0.9, 0.5]) == 2


def test_an_epoch_without_validation_is_never_the_best(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    assert train(make_trainer, tmp_path, [0.1, 0.9, 0.5], check_val_every_n_epoch=2) == 1


def test_a_training_that_ends_before_any_validation_has_a_best_checkpoint(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    trainer = make_trainer(callbacks=[BestAndLast(tmp_path)], enable_checkpointing=True, max_steps=1)
    trainer.fit(Scripted([0.1]), DataLoader(torch.zeros(3)), DataLoader(torch.zeros(1)))
    assert trainer.global_step == 1
    assert trainer.checkpoint_callback is not None
    assert trainer.checkpoint_callback.best_model_path == str(tmp_path / "best.ckpt")
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["global_step"] == 1
    assert train(make_trainer, tmp_path, [0.0, 0.9], resume=tmp_path / "last.ckpt") == 1  # whatever was best before


def test_a_resumed_run_takes_the_best_checkpoint_along(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    train(make_trainer, tmp_path / "a", [0.1, 0.9])
    assert train(make_trainer, tmp_path / "b", [0.1, 0.9, 0.5], resume=tmp_path / "a" / "last.ckpt") == 1


def test_a_resumed_run_says_when_the_best_checkpoint_is_gone(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    train(make_trainer, tmp_path / "a", [0.1, 0.9])
    (tmp_path / "a" / "best.ckpt").unlink()
    with pytest.warns(UserWarning, match="is gone: the best of this run counts from here on"):
        assert train(make_trainer, tmp_path / "b", [0.1, 0.9, 0.5], resume=tmp_path / "a" / "last.ckpt") == 2


def best_score(path: Path) -> float | None:
    """What a checkpoint says of the best one."""
    (state,) = [s for key, s in torch.load(path, weights_only=True)["callbacks"].items() if "BestAndLast" in key]
    return None if state["best_model_score"] is None else float(state["best_model_score"])


def test_the_score_to_beat_is_that_of_the_file_also_after_a_death_before_the_last_checkpoint(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """The epoch that is done again, with other settings, is between the best that the last checkpoint knows and it."""
    with pytest.raises(InterruptedError):
        train(make_trainer, tmp_path, [0.5, 0.9, 0.0], callbacks=[StopBefore(2)])
    assert best_score(tmp_path / "last.ckpt") == pytest.approx(0.5)
    assert train(make_trainer, tmp_path, [0.5, 0.6, 0.7], resume=tmp_path / "last.ckpt") == 1
    assert best_score(tmp_path / "last.ckpt") == pytest.approx(0.9)
    assert best_score(tmp_path / "best.ckpt") == pytest.approx(0.9)


def test_a_new_run_does_not_take_a_best_checkpoint_that_is_later_than_where_it_starts(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    with pytest.raises(InterruptedError):
        train(make_trainer, tmp_path / "a", [0.5, 0.9, 0.0], callbacks=[StopBefore(2)])
    with pytest.warns(UserWarning, match="is of later: the best of this run counts from here on"):
        assert train(make_trainer, tmp_path / "b", [0.5, 0.6, 0.7], resume=tmp_path / "a" / "last.ckpt") == 2


def test_a_best_checkpoint_that_is_gone_from_its_own_folder_does_not_count(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    train(make_trainer, tmp_path, [0.1, 0.9])
    (tmp_path / "best.ckpt").unlink()
    with pytest.warns(UserWarning, match="is gone: the best of this run counts from here on"):
        assert train(make_trainer, tmp_path, [0.1, 0.9, 0.5], resume=tmp_path / "last.ckpt") == 2


def test_a_moved_run_without_validation_goes_on_with_its_own_best_checkpoint(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """And not with that of the folder that it was copied from."""
    train(make_trainer, tmp_path / "a", [0.1, 0.2], limit_val_batches=0)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    trainer = make_trainer(callbacks=[BestAndLast(tmp_path / "b", False)], enable_checkpointing=True, max_epochs=2)
    loader = DataLoader(torch.zeros(1))
    trainer.fit(Scripted([0.1, 0.2]), loader, ckpt_path=tmp_path / "b" / "last.ckpt")
    assert trainer.checkpoint_callback is not None
    assert trainer.checkpoint_callback.best_model_path == str(tmp_path / "b" / "best.ckpt")


def test_a_signal_while_the_last_checkpoint_is_saved_waits_for_it(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    class Signals(Callback):
        def on_train_end(self, *args: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer = make_trainer(callbacks=[Signals(), StopOnSignal(), BestAndLast(tmp_path)], enable_checkpointing=True)
    with pytest.raises(Stopped, match=str(128 + signal.SIGTERM)) as stopped:
        trainer.fit(Scripted([0.1]), DataLoader(torch.zeros(1)), DataLoader(torch.zeros(1)))
    assert stopped.value.message.startswith("stopped by SIGTERM after the last step; ")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["resume"]["finished"]
