"""A callback that keeps what a test looks at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, Trainer

from lqkd.modules import DistillModule


class Recorder(Callback):
    """Keeps what ``look(trainer, module)`` returns after every training batch."""

    def __init__(self, look: Callable[[Trainer, DistillModule], Any]) -> None:
        self.look = look
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(self.look(trainer, pl_module))
