"""Checks of the numbers that losses, regularizers and balances are made with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, SupportsFloat

from lqkd.errors import UsageError


def check(accepted: str, fits: Callable[..., bool], of: str = "", **values: Any) -> None:
    """Refuse values that do not fit together, or of which one is no number, such as a text.

    Args:
        accepted: what would be, as the end of a sentence.
        fits: whether the numbers are accepted; not asked about what is none.
        of: what the settings are of, with a blank behind it; empty for a loss.
        values: settings by name.

    Raises:
        UsageError: then, with all settings and their values.
    """
    numbers = all(isinstance(value, SupportsFloat) and not isinstance(value, bool) for value in values.values())
    if not (numbers and fits(*values.values())):
        given = ", ".join(f"{name}={value!r}" for name, value in values.items())
        raise UsageError(f"{of}{given} is not possible: {accepted}")


def positive(name: str, value: float, of: str = "") -> float:
    """``value`` as a float; UsageError when it is not a positive finite number."""
    check("it must be a positive number", lambda x: math.isfinite(x) and x > 0, of, **{name: value})
    return float(value)


def not_negative(name: str, value: float) -> float:
    """``value`` as a float; UsageError when it is negative or not finite."""
    check("it must be 0 or a positive number", lambda x: math.isfinite(x) and x >= 0, "", **{name: value})
    return float(value)


def share(name: str, value: float, of: str = "") -> float:
    """``value`` as a float; UsageError when it is not from 0 to 1."""
    check("it must be >= 0 and <= 1", lambda x: 0 <= x <= 1, of, **{name: value})
    return float(value)


def weights(**values: float) -> tuple[float, ...]:
    """The values as floats; UsageError when one is negative or not finite, or all are 0."""
    checked = tuple(not_negative(name, value) for name, value in values.items())
    if not any(checked):
        raise UsageError(f"{' and '.join(values)} cannot all be 0: one of them must be a positive number")
    return checked
