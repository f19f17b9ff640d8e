"""Biases of integer kernels in the student that is validated and saved."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lqkd.callbacks.finishing import Finisher
from lqkd.errors import UsageError
from lqkd.modules.base import TaskModule
from lqkd.quantization.batchnorm import foldable
from lqkd.quantization.biases import bias_owners, integer_biases


class IntegerBiases(Finisher):
    """Moves every bias to the nearest one that an integer kernel can have, before each validation and epoch's end.

    The export folds batch norm into the layers and rounds their biases to the grid of the accumulator, the product of
    the scales of input and weight. At few bits that grid is coarse enough to change the class of some images. With
    this, the network that is validated, saved and tested has the biases that are deployed: each batch norm's, or the
    layer's own where it has none. Training goes on from them, and from its own after a file saved within an epoch.

    It comes after :class:`~lqkd.callbacks.BatchNormReestimation`, in whatever order the two are listed, since fresh
    statistics move the folded bias. Biases that stay in floating point are left alone: of layers whose weight or input
    is in floating point or on uneven levels. In a training on several devices, all take the first one's.

    Raises:
        UsageError: before the first batch, when the graph of the network cannot be traced or no layer has such a bias.
    """

    turn = 2

    def __init__(self) -> None:
        self._folded: dict[str, str] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        assert isinstance(pl_module, TaskModule), "setup of all finishers refuses others"
        try:
            self._folded = foldable(pl_module.product()).folded
        except UsageError as error:
            raise UsageError(f"IntegerBiases is not possible: {error}") from None
        if not bias_owners(pl_module.product(), self._folded):
            raise UsageError(
                "IntegerBiases has nothing to do: no layer has a bias, or a batch norm behind it, and both weight and "
                "input on even levels; leave it out, or use such quantizers (lsq)"
            )

    @torch.no_grad()
    def finish(self, trainer: Trainer, module: TaskModule) -> None:
        network = module.product()
        # Statistics of batch norm may differ between processes; the first one's are saved.
        values: dict[str, Any] = trainer.strategy.broadcast(integer_biases(network, self._folded))
        for name, value in values.items():
            bias = network.get_submodule(name).bias
            assert isinstance(bias, torch.Tensor)
            bias.copy_(value)
