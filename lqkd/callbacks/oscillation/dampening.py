"""A loss that keeps low-bit weights away from the borders where they oscillate."""

from __future__ import annotations

import math

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lqkd.callbacks.low_bit_weights import active, distill_module, low_bit_layers
from lqkd.errors import UsageError
from lqkd.modules import DistillModule
from lqkd.quantization.analysis.oscillation import dampening_loss
from lqkd.quantization.layers import QuantizedLayer

PENALTY = "dampening"


class OscillationDampening(Callback):
    """Adds the oscillation dampening loss (Nagel et al., arXiv 2203.11086) to what the student minimises.

    ``strength(t) * sum((q(w) - clip(w))**2)`` over the weights of all layers with at most 4 bits; see
    :func:`lqkd.quantization.analysis.oscillation.dampening_loss`. The strength rises from 0 by half a cosine over the
    training, so that weights find their bins before they are held there. The loss has a gradient for the weights only;
    it is logged as ``train/dampening``. Layers that a bit-width schedule still gives more bits wait until they have 4.

    Args:
        strength: lambda at the end of training.

    Raises:
        UsageError: when strength is not positive, at construction; before the first batch when the training has no
            end, or the student has no such layer or one with another than a uniform grid.
    """

    def __init__(self, strength: float = 0.1) -> None:
        if not 0 < strength < math.inf:
            raise UsageError(f"strength={strength} is not possible: it must be positive and finite")
        self.strength = strength
        self._layers: dict[str, QuantizedLayer] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            module = distill_module("OscillationDampening", pl_module)
            self._layers = low_bit_layers("OscillationDampening", module)
            module.penalties[PENALTY] = lambda: self._penalty(module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, DistillModule)
        pl_module.progress("OscillationDampening")  # refuses a training without end

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and isinstance(pl_module, DistillModule):
            pl_module.penalties.pop(PENALTY, None)

    def _penalty(self, module: DistillModule) -> Tensor:
        strength = self.strength * 0.5 * (1 - math.cos(math.pi * module.progress("OscillationDampening")))
        losses = [dampening_loss(layer) for layer in self._layers.values() if active(layer)]
        return strength * torch.stack(losses).sum() if losses else torch.zeros((), device=module.device)
