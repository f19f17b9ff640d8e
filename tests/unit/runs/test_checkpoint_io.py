"""A checkpoint file is the old one or the new one, never a part."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from lqkd.runs.checkpoint_io import AtomicCheckpointIO
from tests.unit.callbacks.dummy import Dummy

OLD, NEW = {"weight": torch.zeros(300_000)}, {"weight": torch.ones(300_000)}
HALF = 600_000
"""Bytes after which the file system refuses to go on, half-way through a checkpoint."""


def _die_in_the_middle_of_writing() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the kernel kills a process that writes past the limit
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (HALF, HALF))


def _die_before_the_rename() -> None:
    os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]


@pytest.mark.parametrize("die", [_die_in_the_middle_of_writing, _die_before_the_rename])
def test_a_process_killed_while_saving_leaves_the_old_checkpoint(die: Callable[[], None], tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(OLD, path)
    child = os.fork()
    if child == 0:
        try:
            die()
            AtomicCheckpointIO().save_checkpoint(NEW, path)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert torch.equal(torch.load(path)["weight"], OLD["weight"])


def test_a_process_killed_while_saving_the_first_checkpoint_leaves_none(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        try:
            _die_in_the_middle_of_writing()
            AtomicCheckpointIO().save_checkpoint(NEW, tmp_path / "last.ckpt")
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert not list(tmp_path.glob("*.ckpt"))


@contextmanager
def _full_disk() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (HALF, hard))  # Python ignores the signal: writing fails with EFBIG
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_raises_an_oserror_and_leaves_the_old_checkpoint_alone(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(OLD, path)
    with _full_disk(), pytest.raises(OSError, match=r"last\.ckpt"):
        AtomicCheckpointIO().save_checkpoint(NEW, path)
    assert torch.equal(torch.load(path)["weight"], OLD["weight"])
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_folder_that_cannot_be_made_raises_an_oserror(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where a folder should be")
    with pytest.raises(OSError, match="checkpoints"):
        AtomicCheckpointIO().save_checkpoint(NEW, tmp_path / "checkpoints" / "last.ckpt")


def test_storage_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="storage_options"):
        AtomicCheckpointIO().save_checkpoint(NEW, tmp_path / "last.ckpt", storage_options={"a": 1})


def test_a_trainer_resumes_from_what_it_saved(make_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    def train(epochs: int, **arguments: Any) -> Trainer:
        trainer = make_trainer(max_epochs=epochs, plugins=[AtomicCheckpointIO()], logger=False)
        trainer.fit(Dummy(), **arguments)
        return trainer

    train(1).save_checkpoint(tmp_path / "last.ckpt")
    assert train(2, ckpt_path=tmp_path / "last.ckpt").global_step == 8
