"""Fitting the quantizers of a network to data, before or without training."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lqkd.errors import UsageError
from lqkd.quantization.graph import survey
from lqkd.quantization.layers import QuantizedLayer
from lqkd.quantization.modes import evaluating
from lqkd.quantization.products import AttentionProducts
from lqkd.quantization.quantizers import Quantizer
from lqkd.quantization.quantizers.statistic import StatisticQuantizer
from lqkd.quantization.residual import quantizers_between


def quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """Every quantizer of ``model`` by its name.

    Args:
        model: any network.

    Examples:
        >>> from lqkd.quantization import Recipe, quantize_model
        >>> list(quantizers(quantize_model(nn.Sequential(nn.Linear(4, 2)), Recipe())[0]))
        ['0.weight_quantizer', '0.input_quantizer']
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, Quantizer)}


def initialize_quantizers(
    model: nn.Module,
    *inputs: Tensor,
    keywords: Mapping[str, Any] | None = None,
    batch_statistics: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Fit every quantizer that has not been fitted yet, by one forward pass over ``inputs``.

    Dropout and everything else run in eval mode and keep their state. Layers are fitted in the order of the pass,
    each on what the quantised layers before it produce. Under ``torch.distributed`` all ranks call this together, each
    with its own inputs, and end with the same parameters.

    What is still zero everywhere gets the grid that its values will need, not one that fits the first of them, which
    are as small as a step of the optimizer and would hold it there: a weight that of PyTorch's own initialisation, and
    an operand of an addition or concatenation (a branch that ends in a batch norm or a layer scale of zeros) that of
    the other operand, with both signs. Other quantizers that see zeros only stay as they are and are fitted to the
    first training batch that says more.

    Args:
        model: a network with quantised layers.
        *inputs: its inputs.
        keywords: those that it takes by name.
        batch_statistics: whether batch norm normalises with the statistics of this batch, as training will, instead
            of its running ones, as inference does. The running ones are not changed. Some quantizers (IR-Net, APoT)
            put out weights on another scale than the float weights, of which running statistics know nothing.
        progress: called with the number of quantizers that are fitted and that of all.

    Raises:
        UsageError: when the pass does not reach a quantizer at all, whose layer would silently train in floating
            point: the network reads the layer's weight instead of calling it, or does not use the layer; and when a
            quantizer has no grid for the data that it sees.

    Examples:
        >>> from lqkd.quantization import Recipe, quantize_model
        >>> model, _ = quantize_model(nn.Sequential(nn.Linear(4, 2)), Recipe())
        >>> initialize_quantizers(model, torch.randn(16, 4))
        >>> all(quantizer.is_ready for quantizer in quantizers(model).values())
        True
    """
    fresh = {name: q for name, q in quantizers(model).items() if not bool(q.initialized)}
    if not fresh:
        return
    with evaluating(model), without_compiler(model), _calls_of(fresh.values(), progress) as reached:
        for quantizer in fresh.values():
            quantizer.train()
        statistics = _batch_statistics(model) if batch_statistics else nullcontext()
        with torch.inference_mode(False), torch.no_grad(), statistics:  # the first of them enables gradients
            _run(model, inputs, keywords or {}, fresh, reached)
    bypassed = list(dict.fromkeys(name.rpartition(".")[0] for name, q in fresh.items() if id(q) not in reached))
    if bypassed:
        more = f" (and {len(bypassed) - 1} more)" if len(bypassed) > 1 else ""
        if isinstance(model.get_submodule(bypassed[0]), AttentionProducts):
            name = bypassed[0].rpartition(".")[0]
            raise UsageError(
                f"attention {name!r}{more} has attention_bits but does not call scaled_dot_product_attention, so that "
                f"its products would train in floating point: add a rule with match={name!r} and attention_bits=32"
            )
        raise UsageError(
            f"layer {bypassed[0]!r}{more} is quantised but never called, so that it would train in floating point (its "
            "weight is read by another module, or it is not used): add a rule with "
            f"match={bypassed[0]!r}, weight_bits=32 and activation_bits=32"
        )
    if not all(quantizer.is_ready for quantizer in fresh.values()):
        with torch.inference_mode(False):
            _fit_without_values(model)


def _run(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    keywords: Mapping[str, Any],
    fresh: dict[str, Quantizer],
    reached: dict[int, None],
) -> None:
    """Call ``model``, and name the quantizer that has no grid for what it sees."""
    try:
        model(*inputs, **keywords)
    except UsageError as error:
        last = next(reversed(reached), None)
        at_work = [name for name, quantizer in fresh.items() if id(quantizer) == last and not quantizer.is_ready]
        if not at_work:
            raise
        raise UsageError(f"{at_work[0]}: {error}") from None


@torch.no_grad()
def _fit_without_values(model: nn.Module) -> None:
    """Fit the quantizers that have seen zeros only, where it is known what they will see."""
    for layer in (module for module in model.modules() if isinstance(module, QuantizedLayer)):
        quantizer = layer.weight_quantizer
        if quantizer is None or quantizer.is_ready or isinstance(quantizer, StatisticQuantizer):
            continue  # a scale that is measured anew in every step needs no first one
        if not layer.weight.any():
            channels = quantizer.channels if quantizer.group_size is None else None
            bound = math.sqrt((channels or len(layer.weight)) / layer.weight.numel())  # 1 / sqrt(fan in)
            drawn = torch.empty(layer.weight.shape).uniform_(-bound, bound, generator=torch.Generator().manual_seed(0))
            quantizer.initialize(drawn.to(layer.weight.device))
    if all(cast(Quantizer, owner._modules[name]).is_ready for owner, name in quantizers_between(model)):
        return
    for join in survey(model).joins:
        operands = [cast(Quantizer, model.get_submodule(name)) for name in join.quantizers if name is not None]
        levels = [quantizer.levels().flatten() for quantizer in operands if quantizer.is_ready]
        for quantizer in operands if levels else ():
            if not quantizer.is_ready:
                with suppress(UsageError):  # a family without negative values: its own data will decide
                    quantizer.initialize(torch.cat([*levels, *(-values for values in levels)]))


def without_compiler(model: nn.Module) -> AbstractContextManager[Any]:
    """Run parts of ``model`` that were compiled eagerly: fitting happens once and is done before it is compiled."""
    compiled = any(module._compiled_call_impl is not None for module in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


@contextmanager
def _calls_of(modules: Collection[nn.Module], progress: Callable[[int, int], None] | None) -> Iterator[dict[int, None]]:
    """Collect the identities of those of ``modules`` that are called inside the block, in the order of the calls."""
    called: dict[int, None] = {}

    def note(module: nn.Module, _: Any) -> None:
        if progress is not None:
            progress(len(called), len(modules))
        called.pop(id(module), None)
        called[id(module)] = None

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
    """Run ``model`` without any quantization inside the block: its float accuracy, with the same weights.

    Args:
        model: a network with quantised layers; one without stays as it is.

    Examples:
        >>> from lqkd.quantization import Recipe, quantize_model
        >>> linear, x = nn.Linear(4, 2), torch.randn(16, 4)
        >>> model, _ = quantize_model(nn.Sequential(linear), Recipe())
        >>> with float_mode(model):
        ...     torch.equal(model(x), nn.functional.linear(x, linear.weight, linear.bias))
        True
    """
    layers = [module for module in model.modules() if isinstance(module, QuantizedLayer)]
    kept = [(layer, layer.weight_quantizer, layer.input_quantizer) for layer in layers]
    joins = [(owner, name, owner._modules[name]) for owner, name in quantizers_between(model)]
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
