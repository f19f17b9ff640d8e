"""Whether the numbers of a network are numbers."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor


def not_finite(state: Mapping[str, Tensor], parameters: Collection[str]) -> str | None:
    """The first tensor with a value that no training leaves: NaN or, in a parameter, infinity.

    Args:
        state: name to tensor, of any shape and dtype.
        parameters: names of the parameters; masks and ranges, which are buffers, may be infinite.

    Returns:
        ``'conv1.weight' is not finite``, or None when all is well.
    """
    for name, value in state.items():
        if not value.is_floating_point():
            continue
        numbers = value.float() if value.itemsize == 1 else value  # of 8 bits, which have no such operations
        if (numbers.isfinite() if name in parameters else ~numbers.isnan()).logical_not().any():
            return f"{name!r} is not finite"
    return None
