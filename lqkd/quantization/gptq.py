"""GPTQ: the best codes that weights can have without training, for the inputs that they meet."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.quantization.calibrate import without_compiler
from lqkd.quantization.layers import QuantizedLayer
from lqkd.quantization.modes import evaluating
from lqkd.quantization.quantizers import SEQ, LevelwiseStep, Quantizer, UniformQuantizer
from lqkd.quantization.quantizers.base import mean_over_ranks

BLOCK = 128
"""Columns after which their errors reach those beyond, as in the paper: nothing but the time depends on it."""


@torch.no_grad()
def gptq_weight(weight: Tensor, hessian: Tensor, quantizer: Quantizer, damping: float = 0.01) -> Tensor:
    """Weights on the grid of ``quantizer`` for the least squared error of the layer's outputs, column by column.

    Frantar et al., "GPTQ" (arXiv 2210.17323), algorithm 1: columns are rounded one after another, and the error of each
    is made up for by those that are left, along the rows of the Cholesky factor of the inverse Hessian. Inputs with the
    most energy come first, as ``--act-order`` of the authors' code has them; with groups so do groups, and columns
    within each. There the grid of a group is fitted anew, for the least squared error, to what its columns have become
    when its turn comes; a grid of a row or of the whole weight stays as it was fitted.

    Args:
        weight: (O, I).
        hessian: (I, I) of the mean over inputs x of ``x x^T``; a factor changes nothing. The weights of an input that
            is always zero are rounded alone.
        quantizer: fitted to ``weight``, with levels that do not move with it; grids of groups are changed.
        damping: what is added to the diagonal, 0 or more, in parts of the mean over inputs that are not always zero.

    Returns:
        (O, I) in the dtype of ``weight``; the quantizer leaves each of them as it is.

    Raises:
        UsageError: when the quantizer measures its levels on the weight, is not fitted, the damping is no such number,
            or the Hessian is not finite or has no inverse with it.

    Examples:
        >>> from lqkd.quantization import QUANTIZERS
        >>> quantizer = QUANTIZERS["minmax"](2, signed=True)
        >>> quantizer.initialize(torch.tensor([-1.0, 1.0]))
        >>> gptq_weight(torch.tensor([[0.4, 0.4]]), torch.ones(2, 2), quantizer)  # of two inputs that are the same
        tensor([[0., 1.]])
    """
    _check(quantizer)
    _check_damping(damping)
    group = quantizer.group_size
    order = _order(hessian.diagonal(), group)
    work = weight.detach().double()[:, order]
    inverse = _inverse_factor(hessian.double()[order][:, order], damping)
    result, columns = torch.empty_like(work), work.shape[1]
    grid = quantizer
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        errors = work.new_zeros(len(work), end - start)
        for column in range(start, end):
            if group is not None and column % group == 0:
                # What earlier columns of this block owe to the group's own columns beyond it is not there yet.
                ahead = work[:, column : column + group].clone()
                ahead[:, max(0, end - column) :] -= errors @ inverse[start:end, end : column + group]
                grid = _fit_group(quantizer, int(order[column]) // group, ahead.to(weight.dtype))
            rounded = grid.dequantize(grid.codes(work[:, column : column + 1].to(weight.dtype))).squeeze(1).double()
            result[:, column] = rounded
            error = (work[:, column] - rounded) / inverse[column, column]
            errors[:, column - start] = error
            work[:, column + 1 : end] -= error.unsqueeze(1) * inverse[column, column + 1 : end]
        work[:, end:] -= errors @ inverse[start:end, end:]
    return result[:, order.argsort()].to(weight.dtype)


def _order(energy: Tensor, group: int | None) -> Tensor:
    """The columns by falling energy of their inputs, those of a group one after another: (I,) int64."""
    if group is None:
        return energy.argsort(descending=True, stable=True)
    by_group = energy.view(-1, group)
    within = by_group.argsort(dim=1, descending=True, stable=True)
    groups = by_group.sum(1).argsort(descending=True, stable=True)
    return (within + group * torch.arange(len(by_group), device=energy.device).unsqueeze(1))[groups].flatten()


def _check(quantizer: Quantizer) -> None:
    if not isinstance(quantizer, UniformQuantizer | SEQ):
        raise UsageError(
            f"GPTQ is not possible for {type(quantizer).__name__}, whose levels move with the weights: it takes lsq, "
            "lsq_plus, lsq_ewgs, seq, minmax, mse and the grids of GGUF files"
        )
    if not quantizer.is_ready:
        raise UsageError("GPTQ needs a grid: call initialize_quantizers before")


def _check_damping(damping: float) -> None:
    if not 0 <= damping < float("inf"):
        raise UsageError(f"damping={damping!r} of GPTQ is not possible: it must be 0 or a positive number")


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped Hessian."""
    if not hessian.isfinite().all():
        raise UsageError("GPTQ is not possible: an input of the layer is not finite")
    damped = hessian.clone()
    diagonal = damped.diagonal()
    dead = diagonal == 0  # an input that is always zero
    if dead.any():
        diagonal[dead] = 1.0 if dead.all() else diagonal[~dead].mean()
    diagonal += damping * diagonal.mean()
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        return torch.linalg.cholesky(inverse, upper=True)
    except torch.linalg.LinAlgError as error:
        raise UsageError(
            f"GPTQ with damping={damping} is not possible: too many inputs of the layer follow from others; raise it, "
            "to 0.1 for instance, or take more batches"
        ) from error


def _fit_group(quantizer: Quantizer, index: int, columns: Tensor) -> Quantizer:
    """Fit the grids of one group of every row to ``columns`` (O, group size); they are returned as a grid a row."""
    rows = len(columns)
    grid = copy.deepcopy(quantizer)
    grid.group_size, grid.channels, grid.channel_axis = None, rows, 0
    tensors = {**grid._parameters, **grid._buffers}
    a_group = {
        name: tensor
        for name, tensor in tensors.items()
        if tensor is not None and tensor.is_floating_point() and tensor.shape == (quantizer.channels,)
    }
    for tensor in a_group.values():
        tensor.data = tensor.data.view(rows, -1)[:, index].clone()
    if columns.any():
        grid.forget(mse=True)
        grid.initialize(columns)
    for name, tensor in a_group.items():
        cast(Tensor, getattr(quantizer, name)).data.view(rows, -1)[:, index] = tensor.data
    return grid


@torch.no_grad()
def gptq(
    model: nn.Module,
    batches: Sequence[Any],
    call: Callable[[nn.Module, Any], Any] | None = None,
    damping: float = 0.01,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Give every quantised linear layer the codes of :func:`gptq_weight`, in place and without training.

    Layers take turns in the order in which a pass calls them, and each sees the inputs that the layers before it give
    it on their new codes: so the network runs over the batches once for each layer. Embeddings, convolutions,
    attention's own projections, and weights that two modules share stay as rounding leaves them.

    Args:
        model: a network with fitted quantizers, whose latent weights become what their grids say; its grids of groups
            are fitted anew.
        batches: inputs of the network, on its device; some thousand rows of each layer are enough.
        call: how the network is called with one of them; None for ``model(batch)``.
        damping: see :func:`gptq_weight`.
        progress: called with the number of layers that are done and that of all.

    Returns:
        The names of the layers that were changed.

    Raises:
        UsageError: when there is no such layer or no batch, a quantizer has levels that move with the weights, or
            :func:`gptq_weight` cannot calibrate a layer, which is named.

    Examples:
        >>> from lqkd.quantization import Recipe, initialize_quantizers, quantize_model
        >>> _ = torch.manual_seed(0)
        >>> network, x = nn.Sequential(nn.Linear(16, 8)), torch.randn(64, 16) @ torch.randn(16, 16)
        >>> wanted = network(x)
        >>> recipe = Recipe("w2a32", first_layer_bits=None, last_layer_bits=None)
        >>> model, _ = quantize_model(network, recipe)
        >>> initialize_quantizers(model, x)
        >>> rounded = (model(x) - wanted).square().mean()
        >>> gptq(model, [x])
        ['0']
        >>> bool((model(x) - wanted).square().mean() < rounded)
        True
    """
    if not batches:
        raise UsageError("GPTQ needs at least one batch to calibrate on")
    _check_damping(damping)
    layers = _linear_layers(model)
    for name, layer in layers.items():
        _check(cast(Quantizer, layer.weight_quantizer))
        if isinstance(layer.input_quantizer, LevelwiseStep):
            raise UsageError(
                f"GPTQ is not possible for layer {name!r}, whose input has a step for each call: it takes one for all, "
                "per_level null"
            )
    with evaluating(model), without_compiler(model):
        run = _Calibration(model, batches, call)
        names = [name for name in run.order(layers) if name in layers]
        for done, name in enumerate(names):
            if progress is not None:
                progress(done, len(names))
            layer = layers[name]
            quantizer = cast(Quantizer, layer.weight_quantizer)
            weight = layer.weight
            try:
                weight.copy_(gptq_weight(weight, run.hessian(layer), quantizer, damping))
            except UsageError as error:
                raise UsageError(f"layer {name!r}: {error}") from error
    return names


def _linear_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Those that :func:`gptq` changes, by name.

    Raises:
        UsageError: when there is none.
    """
    shared = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    found = {
        name: cast(QuantizedLayer, module)
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLayer)
        and isinstance(module, nn.Linear)
        and module.weight_quantizer is not None
        and shared[id(module.weight)] == 1
    }
    if not found:
        raise UsageError(
            f"GPTQ is not possible for {type(model).__name__}: it has no linear layer with low-bit weights"
        )
    return found


class _Calibration:
    """Passes of a network over batches, and what its layers see."""

    def __init__(self, model: nn.Module, batches: Sequence[Any], call: Callable[[nn.Module, Any], Any] | None) -> None:
        self.model, self.batches, self.call = model, batches, call

    def _run(self, batch: Any) -> None:
        self.model(batch) if self.call is None else self.call(self.model, batch)

    def order(self, layers: dict[str, QuantizedLayer]) -> list[str]:
        """Names of the layers that a pass calls, in the order of the last call of each."""
        names, called = {id(layer): name for name, layer in layers.items()}, dict[str, None]()

        def note(layer: nn.Module, _: Any) -> None:
            called.pop(names[id(layer)], None)
            called[names[id(layer)]] = None

        handles = [layer.register_forward_pre_hook(note) for layer in layers.values()]
        try:
            self._run(self.batches[0])
        finally:
            for handle in handles:
                handle.remove()
        return list(called)

    def hessian(self, layer: QuantizedLayer) -> Tensor:
        """The mean of ``x x^T`` over the rows of the layer's quantised inputs, (I, I) float64, over all ranks."""
        width = layer.weight.shape[1]
        total = torch.zeros(width, width, dtype=torch.float64, device=layer.weight.device)
        rows = 0

        def add(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            nonlocal rows
            (given,) = (*inputs, *named.values())
            x = layer.quantized_input(given).reshape(-1, width).double()  # which no autocast rounds
            total.add_(x.T @ x)
            rows += len(x)

        handle = layer.register_forward_pre_hook(add, with_kwargs=True)
        try:
            for batch in self.batches:
                self._run(batch)
        finally:
            handle.remove()
        return mean_over_ranks(total / max(rows, 1))
