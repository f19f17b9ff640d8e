"""Stopping a training from outside so that it can be resumed: Ctrl-C, SIGTERM, and a cluster that asks to requeue."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from lqkd.callbacks.folder import run_folder_of
from lqkd.errors import Stopped
from lqkd.runs.checkpoint import BestAndLast
from lqkd.runs.folder import resume_command
from lqkd.runs.resume_state import between_steps

_ASK_EVERY = 10
"""Batches from one agreement between several processes to the next: each makes them wait for each other."""
_LOST = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket Timeout", "recvValue failed"),
    "Timed out waiting",
)
"""What gloo and the store of a process group say when another process is no longer there, or does not go on."""


def how_to_resume(folder: Path | None) -> str:
    """The command that goes on with the run in ``folder``, None for what has none, such as a test."""
    return f"go on with: {resume_command(folder)}" if folder is not None else "the same command starts again"


_OWN = ("ncclInvalidUsage", "ncclInvalidArgument", "ncclUnhandledCudaError")
"""What NCCL says of a mistake or a failing device of this process, with the same class of error."""


def lost_a_process(error: Exception) -> bool:
    """Whether ``error`` is that of a collective operation in which another process no longer takes part.

    The store and NCCL, whose watchdog's errors reach a process that waits, raise a class of their own; gloo does not.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    if isinstance(error, torch.distributed.DistError):
        return not any(text in str(error) for text in _OWN)
    return any(text in str(error) for text in _LOST)


class StopOnSignal(Callback):
    """After Ctrl-C or SIGTERM the training finishes its step, saves ``last.ckpt`` and stops.

    A second Ctrl-C stops at once, without saving. With several processes, any of which may get the signal, all stop
    before the same batch, within ten batches. A validation is never cut short. Under SLURM the signal that announces
    the end of the time (``#SBATCH --signal=SIGUSR1@90``) does the same and puts the job back into the queue.

    Raises:
        Stopped: out of ``fit``.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._previous: dict[int, Any] = {}
        self._requeue: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._signal = signal.SIGTERM if trainer.received_sigterm else None
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self._requeue = int(environment.requeue_signal or signal.SIGUSR1)
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM, self._requeue):
            if number is not None:
                self._previous[int(number)] = signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal is not None:
            raise KeyboardInterrupt
        self._signal = number

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not between_steps(trainer, pl_module, batch_idx) or not self._agreed(trainer, batch_idx):
            return
        keepers = [c for c in trainer.checkpoint_callbacks if isinstance(c, BestAndLast)]
        if trainer.global_step > 0:  # before the first step there is nothing to keep: a resumed run starts anew
            for keeper in keepers:
                keeper.save_soon(trainer)
        saved = "" if keepers else ", but nothing is saved since trainer.enable_checkpointing is false"
        raise self._stopped(trainer, f"before step {trainer.global_step}{saved}")

    def _stopped(self, trainer: Trainer, when: str) -> Stopped:
        number = self._signal if self._signal is not None else int(signal.SIGTERM)
        if number == self._requeue:
            _requeue()
        name = signal.Signals(number).name
        return Stopped(number, f"stopped by {name} {when}; {how_to_resume(run_folder_of(trainer))}")

    def _agreed(self, trainer: Trainer, batch_idx: int) -> bool:
        if trainer.world_size == 1:
            return self._signal is not None
        if batch_idx % _ASK_EVERY:
            return False
        return trainer.strategy.reduce_boolean_decision(self._signal is not None, all=False)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning has put the handlers back; a signal that came while the last checkpoint was saved counts now."""
        self._previous = {}
        if trainer.strategy.reduce_boolean_decision(self._signal is not None, all=False):
            raise self._stopped(trainer, "after the last step")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


@rank_zero_only
def _requeue() -> None:
    """Put this SLURM job back into the queue; its next run finds the run folder that is named after it."""
    job, array = os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_ARRAY_JOB_ID")
    if array is not None:
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        rank_zero_warn(f"SLURM did not take job {job} back into its queue ({error}): submit it again")
