"""Weights that hooks compute before each call, as the older ``weight_norm``, ``spectral_norm`` and pruning do."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypeVar, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

_ENDS: dict[type, str] = {
    WeightNorm: "torch.nn.utils.remove_weight_norm(layer)",
    SpectralNorm: "torch.nn.utils.remove_spectral_norm(layer)",
    BasePruningMethod: "torch.nn.utils.prune.remove(layer, name)",
}
"""Class of a hook to the call that puts a parameter in its place."""
_PARAMETRIZED = "torch.nn.utils.parametrize.remove_parametrizations(layer, name)"
_NAMES = ("weight", "bias", "in_proj_weight", "in_proj_bias")
Module = TypeVar("Module", bound=nn.Module)


def computed(layer: nn.Module) -> str | None:
    """Which parameter of ``layer`` is computed from others, and the call that ends it; None where none is."""
    if parametrize.is_parametrized(layer):
        names, end = [*cast(nn.ModuleDict, layer.parametrizations)], _PARAMETRIZED
        return f"its {names[0]} is computed from other parameters until {end}"
    name = next((name for name in _NAMES if isinstance(layer.__dict__.get(name), Tensor)), None)
    if name is None:
        return None
    hooks = layer._forward_pre_hooks.values()
    calls = [end for kind, end in _ENDS.items() if any(isinstance(hook, kind) for hook in hooks)]
    return f"its {name} is computed from other parameters" + (f" until {calls[0]}" if calls else "")


def copy_of(model: Module, shared: Mapping[int, Tensor | nn.Module] | None = None) -> Module:
    """A deep copy of ``model``, also where modules keep tensors with a history, such as computed weights.

    :func:`copy.deepcopy` refuses those; in the copy they have none, and are computed anew by its first call.

    Args:
        model: any network.
        shared: what the copy shall hold in place of tensors and modules, by the ids of these: themselves to share them.
    """
    held = (value for module in model.modules() for value in module.__dict__.values() if isinstance(value, Tensor))
    detached = {id(tensor): tensor.detach().clone() for tensor in held if not tensor.is_leaf}
    return copy.deepcopy(model, {**detached, **(shared or {})})
