"""Low-bit weights that oscillate are frozen one by one."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.hooks import RemovableHandle

from lqkd.callbacks.low_bit_weights import active, distill_module, low_bit_layers
from lqkd.errors import UsageError
from lqkd.modules import DistillModule
from lqkd.quantization.analysis.oscillation import Freezing
from lqkd.quantization.layers import QuantizedLayer


class OscillationFreezing(Callback):
    """Iterative weight freezing (Nagel et al., arXiv 2203.11086).

    After every step of the student each weight of the layers with at most 4 bits whose oscillation frequency is above
    a threshold is frozen at the rounded moving average of its integers, until the end of the training or until a
    bit-width schedule changes the bits of its layer. The threshold falls by half a cosine over the training. See
    :class:`lqkd.quantization.analysis.oscillation.Freezing`. The share of frozen weights is logged each epoch as
    ``oscillation/frozen``. A step costs about thirty passes over these weights, and memory and checkpoints 14 bytes
    for each.

    Frozen weights stay on their level of a step that goes on learning. When training ends nothing of the callback is
    needed any more.

    Args:
        initial_threshold: frequency above which a weight is frozen at the start, in (0, 1].
        final_threshold: likewise at the end, in (0, initial_threshold]. One turn raises the frequency by
            0.01: at the end the default freezes every weight that has just turned twice.

    Raises:
        UsageError: when a threshold is out of range, at construction; before the first batch when the training has no
            end, or the student has no such layer or one with another than a uniform grid.
    """

    def __init__(self, initial_threshold: float = 0.1, final_threshold: float = 0.01) -> None:
        if not 0 < initial_threshold <= 1:
            raise UsageError(f"initial_threshold={initial_threshold} is not possible: it must be above 0 and at most 1")
        if not 0 < final_threshold <= initial_threshold:
            raise UsageError(
                f"final_threshold={final_threshold} is not possible: it must be above 0 and at most initial_threshold"
            )
        self.initial_threshold = initial_threshold
        self.final_threshold = final_threshold
        self._layers: dict[str, QuantizedLayer] = {}
        self._states: dict[str, Freezing] = {}
        self._hooks: list[RemovableHandle] = []
        self._seen = 0  # global step of the last observation

    def state_dict(self) -> dict[str, Any]:
        return {"states": {name: state.state_dict() for name, state in self._states.items()}, "seen": self._seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, state in state_dict["states"].items():
            if name in self._states:  # a layer that was at most 4 bits and is no more has nothing to be frozen
                self._states[name].load_state_dict(state)
        self._seen = state_dict["seen"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            module = distill_module("OscillationFreezing", pl_module)
            self._layers = low_bit_layers("OscillationFreezing", module)
            self._states = {name: Freezing() for name in self._layers}
            self._seen = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, DistillModule)
        pl_module.progress("OscillationFreezing")  # refuses a training without end
        for name, layer in self._layers.items():
            assert layer.weight_quantizer is not None
            self._states[name].to(pl_module.device)
            self._hooks.append(layer.weight_quantizer.register_forward_hook(self._states[name]))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:
            self._observe(self.initial_threshold)  # the quantizers are fitted now

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, DistillModule)
        if trainer.global_step > self._seen:  # it stays the same while gradients are accumulated
            self._seen = trainer.global_step
            done = pl_module.progress("OscillationFreezing")
            fall = 0.5 * (1 + math.cos(math.pi * done))
            self._observe(self.final_threshold + (self.initial_threshold - self.final_threshold) * fall)

    def _observe(self, threshold: float) -> None:
        for name, layer in self._layers.items():
            if active(layer):
                state = self._states[name]
                state.hold(layer)  # the step has moved, and what was frozen with it
                if state.observe(layer) is not None:
                    state.freeze(threshold)
                    state.hold(layer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        frozen = [state.tensors["frozen"] for name, state in self._states.items() if active(self._layers[name])]
        if frozen:
            share = torch.stack([mask.sum() for mask in frozen]).sum() / sum(mask.numel() for mask in frozen)
            pl_module.log("oscillation/frozen", share, sync_dist=True)  # the same on all processes

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            for hook in self._hooks:
                hook.remove()
            self._hooks = []
