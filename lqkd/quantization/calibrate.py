"""Fitting the quantizers of a network to data, before or without training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lqkd.quantization.layers import QuantizedLayer
from lqkd.quantization.modes import evaluating
from lqkd.quantization.quantizers import Quantizer


def quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """Every quantizer of ``model`` by its name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Quantizer)}


@torch.no_grad()
def initialize_quantizers(model: nn.Module, *inputs: Tensor) -> None:
    """Fit every quantizer that has not been fitted yet, by one forward pass over ``inputs``.

    Batch norm, dropout and everything else run in eval mode and keep their state. Layers are fitted in the order of
    the pass, each on what the quantised layers before it produce. Under ``torch.distributed`` all ranks call this
    together, each with its own inputs, and end with the same parameters.
    """
    fresh = [q for q in quantizers(model).values() if not bool(q.initialized)]
    if not fresh:
        return
    with evaluating(model):
        for quantizer in fresh:
            quantizer.train()
        model(*inputs)


@contextmanager
def float_mode(model: nn.Module) -> Iterator[None]:
    """Run ``model`` without any quantization inside the block: its float accuracy, with the same weights."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLayer)]
    kept = [(layer, layer.weight_quantizer, layer.input_quantizer) for layer in layers]
    for layer in layers:
        layer.weight_quantizer = layer.input_quantizer = None
    try:
        yield
    finally:
        for layer, weight, activation in kept:
            layer.weight_quantizer, layer.input_quantizer = weight, activation
