"""How many weights flip and oscillate during a training."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lqkd.callbacks.folder import run_folder_of
from lqkd.callbacks.low_bit_weights import distill_module
from lqkd.errors import UsageError
from lqkd.quantization.analysis.oscillation import Oscillation, weight_layers
from lqkd.quantization.layers import QuantizedLayer
from lqkd.utils.tables import write_csv

TABLE = Path("oscillation") / "layers.csv"
"""Where the table is in a run's folder."""

OSCILLATES_ABOVE = 0.005
"""Frequency above which the paper's tables count a weight as oscillating."""


@dataclass(frozen=True)
class LayerOscillation:
    """One layer in one epoch.

    Attributes:
        epoch: number of the epoch, from 0.
        layer: name in the student.
        bits: of its weights.
        weights: their number.
        flipping: share of weights whose code changed from one observation to the next, averaged over the epoch.
        oscillating: share of weights whose frequency is above 0.005 when the epoch ends.
    """

    epoch: int
    layer: str
    bits: int
    weights: int
    flipping: float
    oscillating: float


class OscillationMonitor(Callback):
    """Counts the weights whose integer codes flip and oscillate (Nagel et al., arXiv 2203.11086).

    Every epoch it logs ``oscillation/flipping`` and ``oscillation/oscillating``, shares of all quantised weights, and
    in a run folder it keeps ``oscillation/layers.csv``, a row per layer and epoch (see :class:`LayerOscillation`).
    When a bit-width schedule changes a layer's bits, its counting starts anew.

    An observation computes the codes of all weights and compares them, about twenty passes over the weights that wait
    for nothing; the state is 11 bytes per weight, in memory and in checkpoints.

    Args:
        every_n_steps: steps of the student from one observation to the next. With more than 1 it is cheaper, but a
            weight that leaves and returns between two observations is seen as still, and frequencies are those
            among the observed steps.

    Raises:
        UsageError: when every_n_steps is less than 1, at construction, or the module is no DistillModule.
    """

    def __init__(self, every_n_steps: int = 1) -> None:
        if every_n_steps < 1:
            raise UsageError(f"every_n_steps={every_n_steps} is not possible: it must be at least 1")
        self.every_n_steps = every_n_steps
        self.history: list[LayerOscillation] = []
        self._layers: dict[str, QuantizedLayer] = {}
        self._states: dict[str, Oscillation] = {}
        self._flips: dict[str, Tensor] = {}  # 0-dim: sum of the shares of flipping weights in this epoch
        self._observations: dict[str, int] = {}  # of this epoch that had something to compare with
        self._seen = 0  # global step of the last observation

    def state_dict(self) -> dict[str, Any]:
        return {
            "history": [asdict(row) for row in self.history],
            "states": {name: state.state_dict() for name, state in self._states.items()},
            "flips": {name: flips.clone() for name, flips in self._flips.items()},
            "observations": dict(self._observations),
            "seen": self._seen,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = [LayerOscillation(**row) for row in state_dict["history"]]
        self._states = {}
        for name, state in state_dict["states"].items():
            self._states[name] = Oscillation()
            self._states[name].load_state_dict(state)
        self._flips, self._observations = dict(state_dict["flips"]), dict(state_dict["observations"])
        self._seen = state_dict["seen"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            module = distill_module("OscillationMonitor", pl_module)
            self._layers = weight_layers(module.student)
            self._states, self._flips, self._observations, self._seen = {}, {}, {}, 0  # before a checkpoint is loaded

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for state in self._states.values():
            state.to(pl_module.device)
        self._flips = {name: flips.to(pl_module.device) for name, flips in self._flips.items()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:
            self._observe()  # the quantizers are fitted now: the first step is compared with the start

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step  # stays the same while gradients are accumulated
        if step > self._seen and step % self.every_n_steps == 0:
            self._seen = step
            self._observe()

    def _observe(self) -> None:
        for name, layer in self._layers.items():
            state = self._states.setdefault(name, Oscillation())
            bits = state.bits
            flipped = state.observe(layer)
            if state.bits != bits:
                self._flips.pop(name, None)
                self._observations.pop(name, None)
            if flipped is not None:
                share = flipped.float().mean()
                self._flips[name] = self._flips[name] + share if name in self._flips else share
                self._observations[name] = self._observations.get(name, 0) + 1

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        names = list(self._flips)
        if not names:
            return
        flipping = torch.stack([self._flips[name] / self._observations[name] for name in names])
        oscillating = torch.stack([self._states[name].oscillating(OSCILLATES_ABOVE).float().mean() for name in names])
        shares = zip(names, flipping.tolist(), oscillating.tolist(), strict=True)
        rows = [
            LayerOscillation(
                trainer.current_epoch, name, self._states[name].bits, self._layers[name].weight.numel(), *two
            )
            for name, *two in shares
        ]
        self._flips, self._observations = {}, {}
        self.history += rows
        total = sum(row.weights for row in rows)
        pl_module.log_dict(
            {
                f"oscillation/{key}": sum(getattr(row, key) * row.weights for row in rows) / total
                for key in ("flipping", "oscillating")
            },
            sync_dist=True,  # the same on all processes; said so that Lightning does not warn
        )
        folder = run_folder_of(trainer)
        if trainer.is_global_zero and folder is not None:
            write_csv(folder / TABLE, [asdict(row) for row in self.history])
