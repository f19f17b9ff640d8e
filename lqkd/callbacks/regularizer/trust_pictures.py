"""Pictures of what held-out rows say of the teachers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from lqkd.callbacks.regularizer.statistics import EpochStatistic, of_bin
from lqkd.utils import figures
from lqkd.utils.figures import End, canvas, name_ends, over_epochs

_LOSSES = {"loss": "target between", "loss_of_student": "student", "loss_of_teachers": "teachers,\nas believed"}
_MOST_NAMES = 30
"""Classes whose names are written below their bars."""


def trust_over_epochs(history: Sequence[EpochStatistic]) -> Figure:
    """How far teachers are believed against the student over the epochs, and what that is worth."""
    epochs, believed = of_bin(history, "believed")
    figure, (weight, losses) = canvas(
        f"Teachers are believed {believed[-1]:.2f} against the student",
        ["mean weight of the teachers", "cross-entropy on held-out rows, nats"],
    )
    weight.plot(epochs, believed, **figures.line(0))
    weight.set_ylim(0, 1)
    over_epochs(weight)
    ends = []
    for number, (name, label) in enumerate(_LOSSES.items()):
        epochs, values = of_bin(history, name)
        losses.plot(epochs, values, **figures.line(number))
        ends.append(End(label, epochs[-1], values[-1], figures.color(number)))
    over_epochs(losses)
    losses.set_ylim(bottom=0)
    name_ends(losses, ends)
    return figure


def trust_by_class(history: Sequence[EpochStatistic]) -> Figure:
    """How far teachers are believed when they answer with a class: first and last epoch."""
    last, palette = history[-1], figures.colors()
    values = dict(zip(last.bins, last.columns["value"], strict=True))
    known = {name: value for name, value in values.items() if math.isfinite(value)}
    least = min(known, key=known.__getitem__, default=None)
    told = "" if least is None else f": least with {least}, {known[least]:.2f}"
    first = f"; dash: epoch {history[0].epoch + 1}" if len(history) > 1 else ""
    drawn = f"believed when they answer so, epoch {last.epoch + 1}{first}"
    figure, (axes,) = canvas(f"Trust by the class that teachers answer with{told}", [drawn], fitted=True)
    places = range(len(last.bins))
    axes.bar(places, last.columns["value"], color=figures.color(0))
    if len(history) > 1:
        before = dict(zip(history[0].bins, history[0].columns["value"], strict=True))
        levels = [before.get(name, math.nan) for name in last.bins]
        axes.plot(places, levels, "_", color=palette.ink, markersize=10)
    if len(last.bins) <= _MOST_NAMES:
        axes.set_xticks(places, map(figures.plain, map(str, last.bins)), rotation=45, ha="right")
    axes.set(xlabel="class", ylim=(0, None))
    return figure


def reliability(history: Sequence[EpochStatistic]) -> Figure:
    """How often each speaker is right on held-out rows by how sure it is, and how many rows there are, at the end."""
    epoch = history[-1]
    speakers = dict.fromkeys(str(name).rpartition(" ")[0] for name in epoch.bins)
    columns = zip(*(epoch.columns[name] for name in ("value", "count", "confidence")), strict=True)
    rows = [(str(name).rpartition(" ")[0], *values) for name, values in zip(epoch.bins, columns, strict=True)]
    by_speaker = {s: [(sure, right, n) for of, right, n, sure in rows if of == s and n] for s in speakers}
    gaps = {s: _too_sure(own) for s, own in by_speaker.items() if own}
    worst = max(gaps, key=lambda s: abs(gaps[s]), default=None)
    told = "How often who is right" if worst is None else f"{worst} is {_by_points(gaps[worst])}"
    figure, (axes, counts) = canvas(told, ["share of right answers, held-out rows", "held-out rows"])
    axes.plot([0, 1], [0, 1], color=figures.colors().muted, linewidth=1)
    ends = []
    for number, (speaker, own) in enumerate(by_speaker.items()):
        style = figures.line(number)
        axes.plot([sure for sure, *_ in own], [right for _, right, _ in own], **style, label=speaker)
        counts.plot([sure for sure, *_ in own], [count for *_, count in own], **style)
        ends += [End(speaker, own[-1][0], own[-1][2], style["color"])] if own else []
    axes.set(xlabel="largest probability, mean of a tenth", xlim=(0, 1), ylim=(0, 1.02))
    counts.set(xlabel="largest probability", xlim=(0, 1), ylim=(0, None))
    name_ends(counts, ends)
    return figure


def _too_sure(rows: Sequence[tuple[float, float, float]]) -> float:
    """Mean confidence above the share of right answers."""
    return sum((sure - right) * count for sure, right, count in rows) / sum(count for *_, count in rows)


def _by_points(gap: float) -> str:
    return (
        f"{100 * abs(gap):.0f} points too {'sure' if gap > 0 else 'modest'}"
        if abs(gap) >= 0.005
        else "as sure as right"
    )


def matrices(maps: Mapping[str, Tensor]) -> Figure:
    """What each teacher's logits become: a class that has another's name is a bright cell beside the diagonal."""
    values = {name: np.asarray(matrix) for name, matrix in maps.items()}
    swapped = sum(int((matrix.argmax(1) != np.arange(len(matrix))).sum()) for matrix in values.values())
    finding = f"{swapped} of the teachers' classes have another's name" if swapped else "Every class has its own name"
    figure, panels = canvas(finding, [*values], height=5.0, fitted=True)
    largest = max(1e-6, *(float(np.abs(matrix).max()) for matrix in values.values()))
    for axes, matrix in zip(panels, values.values(), strict=True):
        drawn = axes.imshow(matrix, cmap="RdBu_r", vmin=-largest, vmax=largest, interpolation="nearest")
        axes.set(xlabel="class as the teacher calls it", ylabel="class that is meant")
        axes.grid(False)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
    figures.scale_beside(figure, panels, drawn, "what a logit becomes")
    return figure
