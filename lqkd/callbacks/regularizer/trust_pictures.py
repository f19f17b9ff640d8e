"""Pictures of what held-out rows say of the teachers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from lqkd.callbacks.regularizer.canvas import canvas, of_bin, over_epochs
from lqkd.callbacks.regularizer.statistics import EpochStatistic

_LOSSES = {"loss": "target between", "loss_of_student": "student", "loss_of_teachers": "teachers, as believed"}
_MOST_NAMES = 30
"""Classes whose names are written below their bars."""


def trust_over_epochs(history: Sequence[EpochStatistic]) -> Figure:
    """How far teachers are believed against the student over the epochs, and what that is worth."""
    figure, (weight, losses) = canvas("Trust in the teachers, against the student", 2)
    weight.plot(*of_bin(history, "believed"), "o-", markersize=3)
    weight.set_ylim(0, 1)
    over_epochs(weight, "mean weight of the teachers")
    for name, label in _LOSSES.items():
        losses.plot(*of_bin(history, name), "o-", markersize=3, label=label)
    over_epochs(losses, "cross-entropy, held-out rows")
    losses.set_ylim(bottom=0)
    losses.legend(fontsize="small")
    return figure


def trust_by_class(history: Sequence[EpochStatistic]) -> Figure:
    """How far teachers are believed when they answer with a class: first and last epoch."""
    figure, (axes,) = canvas("Trust by the class that teachers answer with", 1)
    last = history[-1]
    places = range(len(last.bins))
    axes.bar(places, last.columns["value"], color="tab:blue", label=f"epoch {last.epoch + 1}")
    if len(history) > 1:
        first = dict(zip(history[0].bins, history[0].columns["value"], strict=True))
        values = [first.get(name, math.nan) for name in last.bins]
        axes.plot(places, values, "_", color="black", markersize=10, label=f"epoch {history[0].epoch + 1}")
        axes.legend(fontsize="small")
    if len(last.bins) <= _MOST_NAMES:
        axes.set_xticks(places, last.bins, rotation=45, ha="right", fontsize="small")
    axes.set(xlabel="class", ylabel="believed", ylim=(0, None))
    return figure


def reliability(epoch: EpochStatistic) -> Figure:
    """How often each speaker is right on held-out rows by how sure it is, and how many rows there are."""
    figure, (axes, counts) = canvas("Reliability on held-out rows", 2)
    speakers = dict.fromkeys(str(name).rpartition(" ")[0] for name in epoch.bins)
    columns = zip(*(epoch.columns[name] for name in ("value", "count", "confidence")), strict=True)
    rows = [(str(name).rpartition(" ")[0], *values) for name, values in zip(epoch.bins, columns, strict=True)]
    axes.plot([0, 1], [0, 1], color="black", linewidth=0.6)
    for speaker in speakers:
        own = [(sure, right, count) for of, right, count, sure in rows if of == speaker and count]
        axes.plot([sure for sure, *_ in own], [right for _, right, _ in own], "o-", markersize=3, label=speaker)
        counts.plot([sure for sure, *_ in own], [count for *_, count in own], "o-", markersize=3)
    axes.set(
        xlabel="largest probability, mean of a tenth", ylabel="share of right answers", xlim=(0, 1), ylim=(0, 1.02)
    )
    counts.set(xlabel="largest probability", ylabel="rows", xlim=(0, 1), ylim=(0, None))
    axes.legend(fontsize="small")
    return figure


def matrices(maps: Mapping[str, Tensor]) -> Figure:
    """What each teacher's logits become: a class that has another's name is a bright cell beside the diagonal."""
    figure, panels = canvas("What the teachers' logits become", len(maps))
    figure.set_layout_engine("constrained")
    values = {name: np.asarray(matrix) for name, matrix in maps.items()}
    largest = max(1e-6, *(float(np.abs(matrix).max()) for matrix in values.values()))
    for axes, (name, matrix) in zip(panels, values.items(), strict=True):
        drawn = axes.imshow(matrix, cmap="RdBu_r", vmin=-largest, vmax=largest, interpolation="nearest")
        axes.set(title=name, xlabel="class as the teacher calls it", ylabel="class that is meant")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(drawn, ax=panels)
    return figure
