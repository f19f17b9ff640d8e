"""What a person sees while a training runs: a line per epoch, which stays, and below them a bar on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from torch import Tensor

_LOSSES = ("task", "distill")
_NARROW = 110
"""Columns of a terminal below which the bar has room for one number."""
_READS_PER_SECOND = 5
T = TypeVar("T")


class ProgressBar(RichProgressBar):
    """One printed line per epoch and, when standard output is a terminal, Lightning's rich bar below them.

    Shown are ``train/task`` and every distillation loss (``train/loss`` when the module logs none), and the metric,
    ``val/acc`` say, as far as they were logged. The bar has the last batch's values, on a narrow terminal the loss
    alone; the line has the epoch's means over this process's batches and the validation that ran in the epoch, marked
    where it is the best so far::

        epoch 3/30  task 0.412  distill 0.087  val acc 0.953 best  (4.2 s)

    Metrics are read from ``trainer.callback_metrics``: they need no ``prog_bar=True``, with which Lightning makes the
    host wait for the device in every batch.
    """

    def __init__(self) -> None:
        super().__init__()
        self._terminal = sys.stdout.isatty()
        self._shown: dict[str, Any] = {}
        self._next_read = 0.0
        self._started = time.monotonic()
        self._sums: dict[str, Tensor] = {}
        self._batches = 0
        self._measured: Tensor | None = None
        self._best: float | None = None

    @property
    def is_enabled(self) -> bool:
        return super().is_enabled and self._terminal

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Metrics shown beside the bar; read from the device a few times a second and at an epoch's end."""
        now = time.monotonic()
        if now >= self._next_read or trainer.is_last_batch:
            self._next_read = now + 1 / _READS_PER_SECOND
            metrics = trainer.callback_metrics
            names = (*_training_names(metrics, pl_module), _monitor(pl_module))
            if self._console is not None and self._console.width < _NARROW:
                names = ("train/loss",)
            self._shown = {name.removeprefix("train/"): float(metrics[name]) for name in names if name in metrics}
        return self._shown

    def _get_train_description(self, current_epoch: int) -> str:
        """The epoch as the lines count it, from 1."""
        last = self.trainer.max_epochs
        text = f"epoch {current_epoch + 1}" + (f"/{last}" if last is not None and last > 0 else "")
        return text.ljust(len(self.validation_description))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        best = getattr(trainer.checkpoint_callback, "best_model_score", None)  # of a training that goes on
        self._best = None if best is None else float(best)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        self._started = time.monotonic()
        self._sums, self._batches, self._measured = {}, 0, None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._prints:
            metrics = trainer.callback_metrics
            for name in _training_names(metrics, pl_module):
                self._sums[name] = self._sums.get(name, 0) + metrics[name]  # stays on the device
            self._batches += 1

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        self._measured = trainer.callback_metrics.get(_monitor(pl_module))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if self._prints:
            line = self._line(trainer, pl_module)
            if self.progress is not None:
                with self.progress.live._lock:  # else the thread that draws the bar may come between, over this line
                    self.progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
            else:
                print(line, flush=True)

    @property
    def _prints(self) -> bool:
        return self._enabled  # Lightning disables the bar on all processes but the first

    def _line(self, trainer: Trainer, module: LightningModule) -> str:
        last, monitor = trainer.max_epochs, _monitor(module)
        parts = [f"epoch {trainer.current_epoch + 1}" + (f"/{last}" if last is not None and last > 0 else "")]
        parts += [f"{name.split('/')[1]} {float(total) / self._batches:.3f}" for name, total in self._sums.items()]
        if self._measured is not None:
            value = float(self._measured)
            parts.append(f"{monitor.replace('/', ' ')} {value:.3f}{' best' * self._is_best(value, module)}")
        parts.append(f"({time.monotonic() - self._started:.1f} s)")
        return "  ".join(parts)

    def _is_best(self, value: float, module: LightningModule) -> bool:
        """Whether it is the best so far, which is noted."""
        largest = getattr(getattr(module, "task", None), "mode", "max") == "max"
        best = self._best is None or (value > self._best if largest else value < self._best)
        self._best = value if best else self._best
        return best


def below_the_bar(trainer: Trainer, items: Iterable[T], text: str, total: int) -> Iterator[T]:
    """The items, with a bar of their own while that of the training stands still.

    Args:
        trainer: of the training.
        items: what is dealt with between two batches.
        text: what is being done.
        total: number of items.
    """
    progress = getattr(trainer.progress_bar_callback, "progress", None)
    if progress is None:
        yield from items
        return
    bar = progress.add_task(text, total=total)
    try:
        for done, item in enumerate(items):
            progress.update(bar, completed=done)
            progress.refresh()
            yield item
    finally:
        progress.update(bar, visible=False)


def _monitor(module: LightningModule) -> str:
    """The metric that a module's task goes by."""
    return str(getattr(getattr(module, "task", None), "monitor", "val/acc"))


def _training_names(metrics: dict[str, Any], module: LightningModule) -> list[str]:
    """Of all losses that are balanced, or of their sum."""
    losses = getattr(getattr(module, "balance", None), "names", _LOSSES)
    found = [f"train/{name}" for name in losses if f"train/{name}" in metrics]
    return found or [name for name in ("train/loss",) if name in metrics]
