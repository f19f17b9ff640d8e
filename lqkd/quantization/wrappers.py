"""Modules around a network that only call it."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

_COMPILED = "_orig_mod"
"""The name that the wrapper of :func:`torch.compile` has for its network."""
_WRAPPERS = (DataParallel, DistributedDataParallel, AveragedModel)
"""Those that call it ``module``."""


def wrapper(module: nn.Module) -> str | None:
    """What to call ``module`` where it is such a wrapper; None where it is not."""
    if _COMPILED in module._modules:
        return "torch.compile"
    return type(module).__name__ if isinstance(module, _WRAPPERS) else None


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside of all wrappers around it."""
    while wrapper(model) is not None:
        model = model.get_submodule(_COMPILED if _COMPILED in model._modules else "module")
    return model
