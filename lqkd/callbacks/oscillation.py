"""How many weights of a low-bit student flip between two grid points."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lqkd.errors import UsageError
from lqkd.modules.base import ImageClassifier
from lqkd.quantization import OscillationCounter


class OscillationMonitor(Callback):
    """Logs ``oscillation/crossings`` and ``oscillation/reversals``, counts over the last steps; changes nothing.

    A crossing is a weight that one optimizer step moved to another code, a reversal one that goes back where it came
    from; both count as often as they happen. Weights that keep flipping make batch norm statistics stale and validation
    swing (Nagel et al., arXiv 2203.11086); :class:`~lqkd.callbacks.BatchNormReestimation` helps. Every step quantizes
    the weights of the network once more. A resumed training starts to count anew.

    Args:
        every_n_steps: optimizer steps of the student from one logged count to the next.
        most_bits: layers with more weight bits are left out.

    Raises:
        UsageError: when every_n_steps is less than 1, or the module is none of lqkd.
    """

    def __init__(self, every_n_steps: int = 100, most_bits: int = 4) -> None:
        if every_n_steps < 1:
            raise UsageError(
                f"every_n_steps={every_n_steps} is not possible: crossings are counted over at least one step"
            )
        self.every_n_steps = every_n_steps
        self.most_bits = most_bits
        self._counter: OscillationCounter | None = None
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, ImageClassifier):
            raise UsageError(f"OscillationMonitor needs a module of lqkd: {type(pl_module).__name__} is none")
        self._counter = OscillationCounter(pl_module.product(), self.most_bits)
        self._counter.update()
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:  # gradients are being accumulated
            return
        self._step = trainer.global_step
        assert self._counter is not None, "training has started"
        self._counter.update()
        if self._step % self.every_n_steps == 0:
            crossings, reversals = self._counter.take()
            values = {"oscillation/crossings": float(crossings), "oscillation/reversals": float(reversals)}
            for logger in trainer.loggers:
                logger.log_metrics(values, step=self._step - 1)
