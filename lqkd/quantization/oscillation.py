"""Counting weights that flip between two grid points."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lqkd.quantization.layers import QuantizedLayer


class OscillationCounter:
    """Counts crossings of rounding boundaries from call to call of :meth:`update`.

    A crossing is a weight whose code differs from the one before; a reversal is a crossing in the direction opposite
    to the weight's last one: an oscillation in the sense of Nagel et al., "Overcoming Oscillations in
    Quantization-Aware Training" (arXiv 2203.11086). A layer whose bits change starts anew.

    Args:
        model: a network with quantised layers.
        most_bits: layers with more weight bits are left out.
    """

    def __init__(self, model: nn.Module, most_bits: int = 8) -> None:
        self.model = model
        self.most_bits = most_bits
        self.crossings = 0
        self.reversals = 0
        self.weights = 0
        """Number of weights that the last update looked at."""
        self._last: dict[str, tuple[int, Tensor, Tensor]] = {}

    @torch.no_grad()
    def update(self) -> None:
        """Compare the codes of all weights with those of the last call; takes about as long as quantizing them."""
        self.weights = 0
        for name, layer in self.model.named_modules():
            quantizer = layer.weight_quantizer if isinstance(layer, QuantizedLayer) else None
            if quantizer is None or quantizer.bits > self.most_bits or not quantizer.initialized:
                continue
            assert isinstance(layer, QuantizedLayer)
            codes = quantizer.codes(layer.weight)
            self.weights += codes.numel()
            bits, before, direction = self._last.get(name, (quantizer.bits, codes, torch.zeros_like(codes)))
            if bits != quantizer.bits:
                before, direction = codes, torch.zeros_like(codes)
            moved = (codes - before).sign()
            self.crossings += int((moved != 0).sum())
            self.reversals += int((moved * direction < 0).sum())
            self._last[name] = quantizer.bits, codes, torch.where(moved == 0, direction, moved)

    def take(self) -> tuple[int, int]:
        """The crossings and reversals since the last call of this method."""
        taken = self.crossings, self.reversals
        self.crossings = self.reversals = 0
        return taken
