"""Fitting the quantizers of a network to data, before or without training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lqkd.quantization.layers import QuantizedLayer
from lqkd.quantization.modes import evaluating
from lqkd.quantization.quantizers import Quantizer
from lqkd.quantization.residual import join_quantizers


def quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """Every quantizer of ``model`` by its name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Quantizer)}


@torch.no_grad()
def initialize_quantizers(model: nn.Module, *inputs: Tensor, batch_statistics: bool = False) -> None:
    """Fit every quantizer that has not been fitted yet, by one forward pass over ``inputs``.

    Dropout and everything else run in eval mode and keep their state. Layers are fitted in the order of the pass,
    each on what the quantised layers before it produce. Under ``torch.distributed`` all ranks call this together, each
    with its own inputs, and end with the same parameters.

    Args:
        model: a network with quantised layers.
        *inputs: its inputs.
        batch_statistics: whether batch norm normalises with the statistics of this batch, as training will, instead
            of its running ones, as inference does. The running ones are not changed. Some quantizers (IR-Net, APoT)
            put out weights on another scale than the float weights, of which running statistics know nothing.
    """
    fresh = [q for q in quantizers(model).values() if not bool(q.initialized)]
    if not fresh:
        return
    with evaluating(model):
        for quantizer in fresh:
            quantizer.train()
        with _batch_statistics(model) if batch_statistics else nullcontext():
            model(*inputs)


@contextmanager
def _batch_statistics(model: nn.Module) -> Iterator[None]:
    """Let batch norm use and not keep the statistics of each batch inside the block."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    kept = [(norm, norm.training, norm.track_running_stats) for norm in norms]
    for norm in norms:
        # Without tracking, a batch norm in training mode leaves its running statistics and its counter alone.
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        for norm, training, tracks in kept:
            norm.training, norm.track_running_stats = training, tracks


@contextmanager
def float_mode(model: nn.Module) -> Iterator[None]:
    """Run ``model`` without any quantization inside the block: its float accuracy, with the same weights."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLayer)]
    kept = [(layer, layer.weight_quantizer, layer.input_quantizer) for layer in layers]
    joins = [(owner, name, owner._modules[name]) for owner, name in join_quantizers(model)]
    for layer in layers:
        layer.weight_quantizer = layer.input_quantizer = None
    for owner, name, _ in joins:
        owner._modules[name] = None
    try:
        yield
    finally:
        for owner, name, quantizer in joins:
            owner._modules[name] = quantizer
        for layer, weight, activation in kept:
            layer.weight_quantizer, layer.input_quantizer = weight, activation
