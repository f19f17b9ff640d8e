"""Large tensors, a few rows at a time."""

from __future__ import annotations

from torch import Tensor

_ELEMENTS = 2**22
"""Of a piece, 16 MB in float32: some such tensors fit into the cache of a processor, and keep a GPU busy."""


def rows_at_once(rows: Tensor) -> int:
    """How many rows of (N, ...) make a piece, at least 1.

    Examples:
        >>> import torch
        >>> rows_at_once(torch.empty(1024, 49152)), rows_at_once(torch.empty(128, 10))
        (85, 419430)
    """
    return at_once(rows[:1].numel())


def at_once(elements: int) -> int:
    """How many things with so many elements each make a piece, at least 1."""
    return max(1, _ELEMENTS // max(1, elements))
