"""What a run's folder and the screen say of a training before its first step."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only

from lqkd.callbacks.folder import run_folder_of
from lqkd.modules import DistillModule
from lqkd.modules.base import TaskModule
from lqkd.runs.checkpoint_io import AtomicCheckpointIO
from lqkd.runs.folder import LAYERS
from lqkd.runs.header import print_header
from lqkd.utils.files import write_text


class Description(Callback):
    """Makes checkpoints atomic, keeps the list of layers in the run's folder, and prints every choice.

    Args:
        guessed: whether the task was told from the first batch.
    """

    def __init__(self, guessed: bool = False) -> None:
        self.guessed = guessed

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if stage == "fit" and type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # a user's own stays
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.describe(trainer, pl_module)

    @rank_zero_only
    def describe(self, trainer: Trainer, module: Any) -> None:
        """Keep and print it, on the first process."""
        folder = run_folder_of(trainer)
        assert folder is not None
        if isinstance(module, DistillModule):
            write_text(folder / LAYERS, f"{module.coverage}\n")
        if isinstance(module, TaskModule):
            print_header(trainer, module, self.guessed)
