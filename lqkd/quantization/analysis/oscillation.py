"""Weights that oscillate between two levels: measuring, dampening and freezing them.

Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", arXiv 2203.11086. Under a straight-through
estimator a weight near the border of two levels is pushed over it and back, step after step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lqkd.quantization.layers import QuantizedLayer
from lqkd.quantization.quantizers import SEQ, Quantizer, UniformQuantizer

MOMENTUM = 0.01
"""m of the moving averages of the oscillations and of the integers, as in the paper's code."""

MOST_BITS = 4
"""Weights with more bits are neither dampened nor frozen: their levels are too close together to matter."""


def weight_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Every layer of ``model`` with quantised weights, by its name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLayer) and module.weight_quantizer is not None
    }


class Oscillation:
    """How often the integer code of each weight of a layer turns back, as the paper counts oscillations.

    Each :meth:`observe` compares the codes with those of the observation before. A weight *flips* when its code
    changed. It *oscillates* (``o = 1``) when the change is opposite in sign to its last one (whenever that was), and
    its frequency is ``f = m * o + (1 - m) * f``, from 0 (the paper's frequency; m is ``MOMENTUM``).

    What is kept takes 11 bytes per weight. It belongs to one number of bits: the observation after a change of bits
    starts anew.

    Attributes:
        bits: of the quantizer when it was last observed; 0 before the first observation.
        tensors: by name, each in the shape of the weight: ``previous`` (int16 codes), ``direction`` (int8: sign of the
            last change, 0 before the first), ``frequency`` (float32, 0 to 1) and ``average`` (float32: moving average
            of the codes with momentum m).
    """

    def __init__(self) -> None:
        self.bits = 0
        self.tensors: dict[str, Tensor] = {}

    @torch.no_grad()
    def observe(self, layer: QuantizedLayer) -> Tensor | None:
        """Look at the codes of the layer's weights; which of them flipped (bool, shape of the weight).

        None when there is nothing to compare with: at the first observation, after a change of bits and while the
        quantizer is not initialised. Nothing here waits for the device.
        """
        quantizer = layer.weight_quantizer
        assert quantizer is not None
        if not quantizer.is_ready:
            return None
        codes = quantizer.codes(layer.weight).to(torch.int16)
        if quantizer.bits != self.bits:
            self._start(codes, quantizer.bits)
            return None
        state = self.tensors
        change = (codes - state["previous"]).sign().to(torch.int8)
        turned_back = change * state["direction"] < 0
        flipped = change != 0
        state["frequency"].lerp_(turned_back.float(), MOMENTUM)
        state["average"].lerp_(codes.float(), MOMENTUM)
        state["direction"] = torch.where(flipped, change, state["direction"])
        state["previous"] = codes
        return flipped

    def _start(self, codes: Tensor, bits: int) -> None:
        self.bits = bits
        self.tensors = {
            "previous": codes,
            "direction": torch.zeros_like(codes, dtype=torch.int8),
            "frequency": torch.zeros_like(codes, dtype=torch.float32),
            "average": codes.float(),
        }

    def oscillating(self, threshold: float) -> Tensor:
        """Which weights have a frequency above ``threshold``: bool, shape of the weight."""
        return self.tensors["frequency"] > threshold

    def state_dict(self) -> dict[str, Any]:
        return {"bits": self.bits, "tensors": {name: tensor.clone() for name, tensor in self.tensors.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.bits, self.tensors = state["bits"], dict(state["tensors"])

    def to(self, device: torch.device) -> None:
        """Move what is kept to ``device``."""
        self.tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}


class Freezing(Oscillation):
    """Fixes weights that oscillate too often at the integer where they mostly are (iterative weight freezing).

    As a forward hook of the layer's weight quantizer it puts the frozen integers in the place of the codes of frozen
    weights. These receive no gradient; the step receives the gradient of ``s * q`` with the fixed integer q, scaled
    as its family scales gradients. :meth:`hold` after each optimizer step puts the weights themselves on the grid, so
    that ``codes(weight)`` are the frozen integers and evaluation, export and checkpoints need to know nothing.

    Attributes:
        tensors: those of :class:`Oscillation`, ``frozen`` (bool) and ``integer`` (int16).
    """

    def _start(self, codes: Tensor, bits: int) -> None:
        super()._start(codes, bits)
        self.tensors["frozen"] = torch.zeros_like(codes, dtype=torch.bool)
        self.tensors["integer"] = codes.clone()

    @torch.no_grad()
    def freeze(self, threshold: float) -> None:
        """Freeze every weight with a frequency above ``threshold`` at the rounded average of its codes."""
        new = self.oscillating(threshold)
        average = self.tensors["average"].round().to(torch.int16)
        self.tensors["integer"] = torch.where(new, average, self.tensors["integer"])
        self.tensors["frozen"] |= new

    @torch.no_grad()
    def hold(self, layer: QuantizedLayer) -> None:
        """Put the frozen weights of ``layer`` on their levels, which move with the step; new bits free them."""
        quantizer = layer.weight_quantizer
        assert quantizer is not None
        if quantizer.bits == self.bits and quantizer.is_ready:
            levels = quantizer.dequantize(self.tensors["integer"]).to(layer.weight.dtype)
            layer.weight.copy_(torch.where(self.tensors["frozen"], levels, layer.weight))

    def __call__(self, quantizer: UniformQuantizer | SEQ, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """The forward hook: ``output`` with fixed integers for frozen weights."""
        if quantizer.bits != self.bits or not quantizer.training:
            return output
        fixed = quantizer.at_codes(self.tensors["integer"], inputs[0]).to(output.dtype)
        return torch.where(self.tensors["frozen"], fixed, output)


def dampening_loss(layer: QuantizedLayer) -> Tensor:
    """``sum((sg[q(w)] - clip(w, s * qmin, s * qmax))**2)`` over the weights of ``layer``, summed as in the paper.

    It pulls each weight to the middle of its bin and away from the borders where it oscillates. Only the weights have
    a gradient, those beyond the range none: the loss shall not train the range.

    Args:
        layer: with an initialised uniform weight quantizer.

    Returns:
        0-dim, float32.
    """
    quantizer, weight = layer.weight_quantizer, layer.weight
    assert quantizer is not None
    with torch.no_grad():
        codes = quantizer.codes(weight)
        nearest = quantizer.dequantize(codes)
        ends = [quantizer.dequantize(torch.full_like(codes, end)) for end in quantizer.code_range()]
        lowest, highest = torch.minimum(*ends), torch.maximum(*ends)  # a step of q4_0 may be negative
    return (nearest - weight.float().clamp(lowest, highest)).square().sum()


def refusal(quantizer: Quantizer) -> str | None:
    """Why the weights of ``quantizer`` can be neither dampened nor frozen; None when they can.

    Both move a weight to a level, which only means something where levels are on the scale of the weights and stay
    when the weights move.
    """
    if isinstance(quantizer, UniformQuantizer | SEQ):
        return None
    return f"{type(quantizer).__name__} measures or normalises the weights anew in every step"
