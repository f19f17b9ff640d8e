"""How values of a metric are written."""

from __future__ import annotations

from typing import Literal

MONITOR = "val/acc"
"""The metric that chooses the best checkpoint unless a task says otherwise, as it always did in earlier versions."""
MODE: Literal["min", "max"] = "max"
"""Whether the least or the largest of it is the best."""


def is_share(metric: str) -> bool:
    """Whether values of the metric, with ``val/`` or without, are written in percent: accuracies are."""
    return metric.rpartition("/")[2] == "acc"


def name_of(metric: str) -> str:
    """What a metric is called in a heading.

    Examples:
        >>> name_of("val/acc"), name_of("val/miou")
        ('accuracy', 'miou')
    """
    return "accuracy" if is_share(metric) else metric.rpartition("/")[2]


def shown(metric: str, value: float, decimals: int = 1) -> str:
    """A value of the metric for people, with so many decimals where it is in percent, else with four digits.

    Examples:
        >>> shown("val/acc", 0.915), shown("miou", 0.4321987)
        ('91.5%', '0.4322')
    """
    return f"{value:.{decimals}%}" if is_share(metric) else f"{value:.4g}"


def change_shown(metric: str, change: float) -> str:
    """A difference between two values, likewise.

    Examples:
        >>> change_shown("val/acc", -0.0123), change_shown("miou", 0.004)
        ('-1.23 points', '+0.004')
    """
    return f"{100 * change:+.2f} points" if is_share(metric) else f"{change:+.4g}"
