"""What the pictures of a training have in common, without a display and without matplotlib's global state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lqkd.callbacks.regularizer.statistics import EpochStatistic


def canvas(title: str, panels: int) -> tuple[Figure, list[Any]]:
    """A figure with so many panels beside each other."""
    figure = Figure(figsize=(6.4 if panels == 1 else 10.0, 4.0), dpi=100)
    # A layout engine would draw everything twice.
    margins = {"left": 0.14 if panels == 1 else 0.08, "right": 0.88, "bottom": 0.19, "top": 0.9, "wspace": 0.25}
    axes = figure.subplots(1, panels, squeeze=False, gridspec_kw=margins)[0]
    figure.suptitle(title)
    return figure, list(axes)


def over_epochs(axes: Any, label: str) -> None:
    """Epochs to the right, in whole numbers."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="epoch", ylabel=label)


def of_bin(history: Sequence[EpochStatistic], name: str) -> tuple[list[int], list[float]]:
    """Epochs, from 1, and the values of one bin, where it is there."""
    found = [(e.epoch + 1, e.columns["value"][e.bins.index(name)]) for e in history if name in e.bins]
    return [epoch for epoch, _ in found], [value for _, value in found]
