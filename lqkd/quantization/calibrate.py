"""Fitting the quantizers of a network to data, before or without training."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lqkd.errors import UsageError
from lqkd.quantization.layers import QuantizedLayer
from lqkd.quantization.modes import evaluating
from lqkd.quantization.quantizers import Quantizer
from lqkd.quantization.residual import join_quantizers


def quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """Every quantizer of ``model`` by its name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Quantizer)}


def initialize_quantizers(
    model: nn.Module,
    *inputs: Tensor,
    batch_statistics: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Fit every quantizer that has not been fitted yet, by one forward pass over ``inputs``.

    Dropout and everything else run in eval mode and keep their state. Layers are fitted in the order of the pass,
    each on what the quantised layers before it produce. Under ``torch.distributed`` all ranks call this together, each
    with its own inputs, and end with the same parameters. A quantizer that sees zeros only stays as it is and is fitted
    to the first training batch that says more.

    Args:
        model: a network with quantised layers.
        *inputs: its inputs.
        batch_statistics: whether batch norm normalises with the statistics of this batch, as training will, instead
            of its running ones, as inference does. The running ones are not changed. Some quantizers (IR-Net, APoT)
            put out weights on another scale than the float weights, of which running statistics know nothing.
        progress: called with the number of quantizers that are fitted and that of all.

    Raises:
        UsageError: when the pass does not reach a quantizer at all, whose layer would silently train in floating
            point: the network reads the layer's weight instead of calling it, or does not use the layer.
    """
    fresh = {name: q for name, q in quantizers(model).items() if not bool(q.initialized)}
    if not fresh:
        return
    with evaluating(model), _without_compiler(model), _calls_of(fresh.values(), progress) as reached:
        for quantizer in fresh.values():
            quantizer.train()
        statistics = _batch_statistics(model) if batch_statistics else nullcontext()
        with torch.inference_mode(False), torch.no_grad(), statistics:  # the first of them enables gradients
            model(*inputs)
    bypassed = list(dict.fromkeys(name.rpartition(".")[0] for name, q in fresh.items() if id(q) not in reached))
    if bypassed:
        more = f" (and {len(bypassed) - 1} more)" if len(bypassed) > 1 else ""
        raise UsageError(
            f"layer {bypassed[0]!r}{more} is quantised but never called, so that it would train in floating point (its "
            "weight is read by another module, or it is not used): add a rule with "
            f"match={bypassed[0]!r}, weight_bits=32 and activation_bits=32"
        )


def _without_compiler(model: nn.Module) -> AbstractContextManager[Any]:
    """Run parts of ``model`` that were compiled eagerly: fitting happens once and is done before it is compiled."""
    compiled = any(module._compiled_call_impl is not None for module in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


@contextmanager
def _calls_of(modules: Collection[nn.Module], progress: Callable[[int, int], None] | None) -> Iterator[set[int]]:
    """Collect the identities of those of ``modules`` that are called inside the block."""
    called: set[int] = set()

    def note(module: nn.Module, _: Any) -> None:
        if progress is not None:
            progress(len(called), len(modules))
        called.add(id(module))

    handles = [module.register_forward_pre_hook(note) for module in modules]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


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
