"""An exponential moving average of the weights: the network that is validated, saved and deployed."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import get_ema_multi_avg_fn

from lqkd.callbacks.batchnorm import BatchNormReestimation, refuse_validation_within_epochs
from lqkd.callbacks.finishing import Finisher
from lqkd.errors import UsageError
from lqkd.modules.base import AVERAGED, TaskModule
from lqkd.quantization import quantizers

_KEY = "weight_ema"
"""Where a checkpoint keeps what the average goes on from, beside its weights."""


class WeightEMA(Finisher):
    """Keeps an exponential moving average of the network's weights, which is validated, saved, tested and exported.

    After step ``n`` of the student the average moves by ``1 - min(decay, (1 + n) / (10 + n))`` of the way to the
    weights, steps of quantizers included, so that a short training is not left at its start. Training itself never
    sees it. Tensors that are no parameters are never averaged: they are the student's own, but for the statistics of
    batch norm, which are re-estimated over training batches for the average, as by
    :class:`~lqkd.callbacks.BatchNormReestimation`, whether or not that is listed, whose number of batches counts. The
    average begins anew whenever a quantizer is fitted or changes its bits, since that of two grids means nothing.

    Checkpoints hold the average under the network's names and the weights that training goes on from beside it; when
    training ends, the network itself has the average's. One more copy of the network is kept in memory.

    Args:
        decay: part of the average that stays in each step, 0 <= decay < 1.

    Raises:
        UsageError: when decay is out of range, at construction; before the first batch, when the module is none of
            lqkd's, or has batch norm and validation runs within an epoch.
    """

    turn = 0

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise UsageError(f"decay={decay} is not possible: it must be at least 0 and less than 1")
        self.decay = decay
        self._average: nn.Module | None = None
        self._statistics: BatchNormReestimation | None = None  # where none is listed
        self._updates = 0
        self._step = 0  # global step of the last update
        self._grids: list[tuple[int, bool]] = []  # bits of each quantizer, and whether it was fitted, at that time

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        assert isinstance(pl_module, TaskModule), "setup of all finishers refuses others"
        pl_module.keep_average(None)
        self._average = deepcopy(pl_module.trained()).eval().requires_grad_(False)
        self._updates = self._step = 0
        self._statistics = None
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        listed = any(isinstance(callback, BatchNormReestimation) for callback in callbacks)
        if not listed and any(isinstance(module, _BatchNorm) for module in self._average.modules()):
            refuse_validation_within_epochs(trainer, type(self).__name__)
            self._statistics = BatchNormReestimation()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._average is not None
        self._average.to(pl_module.device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._update(trainer, pl_module)  # only now: every callback is done with the step before

    def finish(self, trainer: Trainer, module: TaskModule) -> None:
        self._update(trainer, module)
        if self._statistics is not None:
            self._statistics.finish(trainer, module)

    def finish_copy(self, trainer: Trainer, module: TaskModule) -> None:
        if self._statistics is not None:
            self._statistics.finish_copy(trainer, module)

    @torch.no_grad()
    def _update(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.global_step == self._step:
            return
        assert isinstance(module, TaskModule)
        assert self._average is not None
        network, average = module.trained(), self._average
        grids = [(quantizer.bits, quantizer.is_ready) for quantizer in quantizers(network).values()]
        if self._updates == 0 or grids != self._grids:
            average.load_state_dict(network.state_dict())  # which tells quantizers their bits
            module.keep_average(average)
            self._updates = 0
        else:
            decay = min(self.decay, (1 + self._updates) / (10 + self._updates))
            get_ema_multi_avg_fn(decay)(list(average.parameters()), list(network.parameters()), self._updates)
            for ours, theirs in zip(average.buffers(), network.buffers(), strict=True):
                ours.copy_(theirs)
        self._updates, self._step, self._grids = self._updates + 1, trainer.global_step, grids

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, TaskModule)
        pl_module.trained().load_state_dict(pl_module.product().state_dict())
        pl_module.keep_average(None)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[_KEY] = {"updates": self._updates, "step": self._step, "grids": self._grids}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if AVERAGED not in checkpoint:  # a test, or a training that has not kept an average until now
            return
        assert isinstance(pl_module, TaskModule)
        assert self._average is not None
        self._average.load_state_dict(checkpoint[AVERAGED])
        pl_module.keep_average(self._average)
        self._updates, self._step, self._grids = (checkpoint[_KEY][key] for key in ("updates", "step", "grids"))
