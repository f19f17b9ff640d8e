"""Checks of the numbers that losses are made with."""

from __future__ import annotations

import math

from lqkd.errors import UsageError


def positive(name: str, value: float) -> float:
    """``value`` as a float; UsageError when it is not a positive finite number."""
    if not (math.isfinite(value) and value > 0):
        raise UsageError(f"{name}={value!r} is not possible: it must be a positive number")
    return float(value)


def not_negative(name: str, value: float) -> float:
    """``value`` as a float; UsageError when it is negative or not finite."""
    if not (math.isfinite(value) and value >= 0):
        raise UsageError(f"{name}={value!r} is not possible: it must be 0 or a positive number")
    return float(value)


def weights(**values: float) -> tuple[float, ...]:
    """The values as floats; UsageError when one is negative or not finite, or all are 0."""
    checked = tuple(not_negative(name, value) for name, value in values.items())
    if not any(checked):
        raise UsageError(f"{' and '.join(values)} cannot all be 0: one of them must be a positive number")
    return checked
