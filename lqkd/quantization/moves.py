"""Operations that leave values on the grid that they are on: they move, compare or drop them, or put zeros beside."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

RELUS: tuple[Any, ...] = (nn.ReLU, F.relu, torch.relu, "relu", "relu_")
IDENTITIES: tuple[Any, ...] = (
    nn.Identity, nn.Dropout, nn.Dropout2d, nn.Dropout3d, F.dropout, "contiguous", "detach", "clone",
)  # fmt: skip
"""Without effect in eval mode."""
RESHAPES: tuple[Any, ...] = (nn.Flatten, torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze, nn.Unflatten)
RESHAPE_METHODS = ("flatten", "view", "reshape", "squeeze", "unsqueeze", "unflatten")
SWAPS: tuple[Any, ...] = ("transpose", "swapaxes", torch.transpose, torch.swapaxes)
"""Transpositions of two axes."""
TRANSPOSITIONS: tuple[Any, ...] = ("permute", torch.permute, *SWAPS)
_MAX_POOLS: tuple[Any, ...] = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, F.max_pool1d, F.max_pool2d, F.max_pool3d)
_PARTS: tuple[Any, ...] = (operator.getitem, torch.chunk, "chunk", torch.split, "split", F.pad)
CLAMPS: tuple[Any, ...] = (*RELUS, nn.Hardtanh, nn.ReLU6, F.relu6, F.hardtanh, torch.clamp, "clamp", "clamp_")
"""What an integer kernel does as limits on the codes that it writes."""
_MOVES = (*RELUS, *IDENTITIES, *RESHAPES, *RESHAPE_METHODS, *TRANSPOSITIONS, *_MAX_POOLS, *_PARTS)


def moves(node: fx.Node, model: nn.Module) -> bool:
    """Whether the result of ``node`` has the values of its first argument, in another place or not, or zeros."""
    return _is(node, model, _MOVES)


def clamps(node: fx.Node, model: nn.Module) -> bool:
    """Whether ``node`` limits the values of its first argument."""
    return _is(node, model, CLAMPS)


def is_identity(target: Any) -> bool:
    """Whether a function or method has no effect in eval mode."""
    # torchvision's function is not imported for it: who has not imported torchvision has no network that calls it.
    return target in IDENTITIES or getattr(target, "__qualname__", "") == "stochastic_depth"


def _is(node: fx.Node, model: nn.Module, kinds: tuple[Any, ...]) -> bool:
    if node.op == "call_module":
        return type(model.get_submodule(str(node.target))) in kinds
    called = node.op in ("call_function", "call_method")
    return called and (node.target in kinds or (kinds is _MOVES and is_identity(node.target)))
