"""Batch norm after training: fresh statistics for a quantised network, and folding into the layer before."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from lqkd.errors import UsageError
from lqkd.quantization.computed import computed
from lqkd.quantization.graph import obstacle, trace
from lqkd.quantization.layers import QUANTIZED_LAYERS, QuantizedLayer
from lqkd.quantization.modes import evaluating
from lqkd.quantization.norms import is_batch_norm, is_frozen_norm
from lqkd.quantization.residual import move_output_quantizer


@torch.no_grad()
def reestimate_batchnorm(
    model: nn.Module, batches: Iterable[Any], call: Callable[[nn.Module, Any], Any] | None = None
) -> None:
    """Replace the running statistics of every batch norm by their average over ``batches``.

    Nagel et al., "Overcoming Oscillations in Quantization-Aware Training" (arXiv 2203.11086), section 4.1: rounding
    that flips between steps makes the exponential averages of training stale. Only batch norms run in training mode;
    quantizers, dropout and the rest are in eval mode. Each batch counts the same. Every module gets its own mode and
    momentum back, and a batch norm that no batch reaches keeps its statistics. When a forward pass fails, all keep
    theirs.

    Args:
        model: any network; without batch norm nothing happens.
        batches: inputs of the network, (B, C, H, W) each, on its device.
        call: how the network is called with one of them; None for ``model(batch)``.

    Raises:
        UsageError: when there is no batch.

    Examples:
        >>> network = nn.Sequential(nn.BatchNorm2d(3))
        >>> reestimate_batchnorm(network, [torch.full((4, 3, 8, 8), 2.0), torch.full((4, 3, 8, 8), 4.0)])
        >>> network[0].running_mean
        tensor([3., 3., 3.])
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    before = [(n, n.momentum, {key: cast(Tensor, value).clone() for key, value in n._buffers.items()}) for n in norms]
    done = False
    with evaluating(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative average: that of momentum 1 over all batches
            norm.training = True
        try:
            count = 0
            for count, batch in enumerate(batches, start=1):  # noqa: B007
                model(batch) if call is None else call(model, batch)
            if count == 0:
                raise UsageError("batch norm cannot be re-estimated from 0 batches: give at least 1")
            done = True
        finally:
            for norm, momentum, buffers in before:
                norm.momentum = momentum
                reached = bool(cast(Tensor, norm.num_batches_tracked) > 0)
                for key, value in buffers.items():
                    if not (done and reached) or key == "num_batches_tracked":
                        cast(Tensor, norm._buffers[key]).copy_(value)


@dataclass(frozen=True)
class Folding:
    """What :func:`fold_batchnorm` did.

    Attributes:
        folded: name of each batch norm that is gone to the name of the layer that took it over.
        kept: name of each batch norm that stays to the reason.

    Examples:
        >>> folding = fold_batchnorm(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval())
        >>> folding.folded, list(folding.kept)
        ({'2': '1'}, ['0'])
    """

    folded: dict[str, str]
    kept: dict[str, str]


@torch.no_grad()
def fold_batchnorm(model: nn.Module, untouched: Collection[str] = (), graph: fx.Graph | None = None) -> Folding:
    """Fold batch norms into the convolutions before them, in place: the eval function stays the same at any bits.

    The results differ by the rounding of floating point only, which can move an activation that lies on a rounding
    boundary of the next quantizer to the other side.

    With ``f = gamma / sqrt(var + eps)`` a convolution followed by batch norm is ``f * (W * x) + f * (b - mean) +
    beta``. A float layer gets the weight ``f W``. A quantised one keeps its weight, quantizer and codes and gets ``f``
    as its ``output_scale``, so that its effective step is ``f s``: f may be negative or zero, and scaling the weight
    itself by it would flip codes on a grid that is not symmetric (-8 ... 7) and move others across a rounding
    boundary. Its effective bits do not change. In place of a batch norm stays what else it did: nothing, or the
    activation of timm's ``BatchNormAct2d``.

    Frozen batch norms, such as torchvision's ``FrozenBatchNorm2d``, are folded likewise.

    A batch norm is kept where there is no convolution of its own before it (pre-activation networks, DenseNet), where
    the convolution's result is used twice, where either is called twice, and where it has no running statistics.

    Args:
        model: the network.
        untouched: names of modules, layers or not, that must stay with the results that they have: no batch norm
            outside of one is folded into a convolution inside of it.
        graph: of the network, where one is at hand; ``None`` traces it.

    Returns:
        Which batch norms were folded and which were kept, and why.

    Raises:
        UsageError: when the graph of the network cannot be traced, so that nothing is known about the order of layers.

    Examples:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> fold_batchnorm(network).folded
        {'1': '0'}
        >>> network[1]
        Identity()
    """
    found = foldable(model, untouched, graph)
    for name, source in found.folded.items():
        norm, layer = cast(_BatchNorm, model.get_submodule(name)), cast(Any, model.get_submodule(source))
        _fold(layer, norm)
        parent, _, child = name.rpartition(".")
        remainder = _remainder(norm)
        move_output_quantizer(norm, remainder[-1] if isinstance(remainder, nn.Sequential) else remainder)
        model.get_submodule(parent)._modules[child] = remainder
    return found


def foldable(model: nn.Module, untouched: Collection[str] = (), graph: fx.Graph | None = None) -> Folding:
    """What :func:`fold_batchnorm` would do, which see; nothing is changed."""
    try:
        graph = trace(model) if graph is None else graph
    except Exception as error:
        raise UsageError(
            f"batch norm of {type(model).__name__} cannot be folded: its graph cannot be traced ({obstacle(error)})"
        ) from None
    modules = dict(model.named_modules())
    calls = [node for node in graph.nodes if node.op == "call_module"]
    folded, kept = {}, {}
    for name, norm in modules.items():
        if not is_batch_norm(norm):
            continue
        nodes = [node for node in calls if node.target == name]
        source = _source(nodes, calls)
        layer = modules.get(source) if source is not None else None
        reason = _obstacle(cast(_BatchNorm, norm), layer, nodes) or _guarded(source, name, untouched)
        if reason is None:
            assert source is not None
            folded[name] = source
        else:
            kept[name] = reason
    return Folding(folded, kept)


def fold_all(model: nn.Module) -> None:
    """Fold every batch norm of a float network into the convolution before it, in place, to train it without.

    Raises:
        UsageError: when the graph of the network cannot be traced, or one would stay.

    Examples:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> fold_all(network)
        >>> [type(module).__name__ for module in network]
        ['Conv2d', 'Identity']
    """
    if not any(is_batch_norm(module) for module in model.modules()):
        return  # which may be a network that cannot be traced
    for name, reason in foldable(model).kept.items():
        raise UsageError(
            f"batch norm {name!r} cannot be folded before training, as quantization.fold_batch_norm or target ask for: "
            f"{reason}"
        )
    fold_batchnorm(model)


def folded_into(model: nn.Module, layers: Collection[str]) -> dict[str, str]:
    """Of ``layers``, those that :func:`fold_all` would fold a batch norm into, with its name.

    Raises:
        UsageError: when the graph of the network cannot be traced.

    Examples:
        >>> folded_into(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), ["0", "2"])
        {'0': '1'}
    """
    if not layers or not any(is_batch_norm(module) for module in model.modules()):
        return {}
    return {layer: norm for norm, layer in foldable(model).folded.items() if layer in layers}


def has_fresh_statistics(model: nn.Module) -> bool:
    """Whether a batch norm of ``model`` has the mean 0 and variance 1 of one that has never seen data.

    Examples:
        >>> has_fresh_statistics(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
        True
    """
    norms = [norm for norm in model.modules() if isinstance(norm, _BatchNorm)]
    known = [(norm.running_mean, norm.running_var) for norm in norms]
    return any(
        mean is not None
        and variance is not None
        and not mean.any()
        and torch.equal(variance, torch.ones_like(variance))
        for mean, variance in known
    )


def folded_parameters(layer: Any, norm: _BatchNorm | None) -> tuple[Tensor | None, Tensor | None]:
    """The factor of the output of ``layer`` and the bias after it, (channels,) each, with ``norm`` folded into it."""
    if norm is None:
        return getattr(layer, "output_scale", None), layer.bias
    mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    factor = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight
    bias = -mean if layer.bias is None else layer.bias - mean
    bias = bias * factor if norm.bias is None else bias * factor + norm.bias
    earlier = getattr(layer, "output_scale", None)
    return factor if earlier is None else earlier * factor, bias


def _source(nodes: list[fx.Node], calls: list[fx.Node]) -> str | None:
    """The layer whose result only this batch norm uses."""
    if len(nodes) != 1:
        return None
    before = nodes[0].all_input_nodes[0]
    unique = before.op == "call_module" and len(before.users) == 1
    return str(before.target) if unique and sum(node.target == before.target for node in calls) == 1 else None


def _guarded(source: str | None, norm: str, untouched: Collection[str]) -> str | None:
    for name in untouched:
        if f"{source}.".startswith(f"{name}.") and not norm.startswith(f"{name}."):
            return f"{name} is to keep its result"
        if name.startswith(f"{norm}."):
            return f"{name} is to stay"
    return None


def _obstacle(norm: _BatchNorm, layer: nn.Module | None, nodes: list[fx.Node]) -> str | None:
    if norm.running_mean is None:
        return "no running statistics"
    if len(nodes) != 1:
        return f"called {len(nodes)} times"
    if not isinstance(layer, _ConvNd):
        return "no convolution of its own before it"
    changed = computed(layer)
    if not isinstance(layer, QuantizedLayer) and (changed or type(layer) not in QUANTIZED_LAYERS):
        return f"follows a {type(layer).__name__}, {changed or 'whose forward may differ'}"
    plain = is_frozen_norm(norm) or type(norm).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
    if not plain and not is_activated(norm):
        return f"a {type(norm).__name__}, whose forward may differ"
    return None


def is_activated(norm: nn.Module | None) -> bool:
    """Whether ``norm`` is timm's batch norm with dropout and activation behind it."""
    if norm is None or not is_batch_norm(norm):
        return False
    return type(norm).__module__.startswith("timm.") and {"drop", "act"} <= norm._modules.keys()


def take_activations_apart(model: nn.Module) -> None:
    """Exchange batch norms that also activate (timm's ``BatchNormAct2d``) for a plain one and what else they do.

    Args:
        model: changed in place; what it computes stays the same.
    """
    for name, norm in list(model.named_modules()):
        if not isinstance(norm, _BatchNorm) or not is_activated(norm):
            continue
        plain = nn.BatchNorm2d(norm.num_features, norm.eps, affine=norm.affine, device="meta").train(norm.training)
        plain._parameters, plain._buffers = dict(norm._parameters), dict(norm._buffers)
        remainder = cast(nn.Sequential, _remainder(norm))
        move_output_quantizer(norm, remainder[-1])
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent)._modules[child] = nn.Sequential(plain, remainder)


def _remainder(norm: nn.Module) -> nn.Module:
    if not is_activated(norm):
        return nn.Identity()
    return nn.Sequential(*(norm.get_submodule(key) for key in ("drop", "act"))).train(norm.training)


def _fold(layer: Any, norm: _BatchNorm) -> None:
    factor, bias = cast(tuple[Tensor, Tensor], folded_parameters(layer, norm))
    # New parameters, since another layer may share the old ones.
    layer.bias = nn.Parameter(bias, requires_grad=layer.weight.requires_grad)
    if isinstance(layer, QuantizedLayer):
        layer.output_scale = factor
    else:
        weight = layer.weight * QUANTIZED_LAYERS[type(layer)].broadcast_output(layer, factor)
        layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
