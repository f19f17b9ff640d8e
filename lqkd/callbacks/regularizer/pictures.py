"""Pictures of what the regularizer learned: the title of each says what it shows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, ScalarFormatter, StrMethodFormatter
from torch import Tensor

from lqkd.callbacks.regularizer import trust_pictures as trust
from lqkd.callbacks.regularizer.moments import EpochWeights
from lqkd.callbacks.regularizer.photograph_pictures import over_photographs
from lqkd.callbacks.regularizer.photographs import Photographs
from lqkd.callbacks.regularizer.statistics import GRID, TOTAL, EpochStatistic, of_bin
from lqkd.utils import figures
from lqkd.utils.figures import End, canvas, name_ends, over_epochs

History = Sequence[EpochStatistic]

_LINES = 4
"""Epochs, at most, that are drawn over one another."""
_CLASSES = 4096
"""Of more classes a line has no points that can be told apart."""
_SAME = 0.05
"""Part of a value by which another may differ that is told as the same."""
_FIXED = "fixed distillation"


def pictures(
    weights: Sequence[EpochWeights],
    statistics: Mapping[str, History],
    term: str = "",
    maps: Mapping[str, Tensor] | None = None,
    photographs: Photographs | None = None,
) -> Iterable[tuple[str, Figure]]:
    """Name and figure of every picture that there is something for.

    Args:
        weights: the regularizer's, by epoch.
        statistics: by name.
        term: that they are of; if it has a name, it is in the heading.
        maps: by teacher, the matrix (C, C) that held-out rows have made of its logits.
        photographs: of the last batch that was measured, with their weights.
    """
    for name, figure in _figures(weights, statistics, maps or {}, photographs):
        if term:
            figures.title(figure, f"{term}: {figures.finding_of(figure)}")
        yield name, figure


def _figures(
    weights: Sequence[EpochWeights],
    statistics: Mapping[str, History],
    maps: Mapping[str, Tensor],
    photographs: Photographs | None,
) -> Iterable[tuple[str, Figure]]:
    if weights:
        yield "weights", weights_over_epochs(weights)
    if "distribution" in statistics:
        yield "distribution", distribution(statistics["distribution"])
    by_class = [statistics[name][-1] for name in ("label", "output") if name in statistics]
    if by_class and len(by_class[0].bins) <= _CLASSES:
        yield "classes", classes(statistics)
    if "balance" in statistics:
        yield "balance", balance(statistics["balance"], statistics.get("share", ()))
    for name, of, draw in (
        ("frequency", "frequency", frequency),
        ("position", "position", position),
        ("confidence", "confidence", confidence),
        ("divergence", "divergence", divergence),
        ("places", "place", places),
        ("agreement", "agreement", agreement),
        ("step_length", "step_length", step_length),
        ("trust", "trust", trust.trust_over_epochs),
        ("believed", "believed", trust.trust_by_class),
        ("reliability", "reliability", trust.reliability),
    ):
        if of in statistics:
            yield name, draw(statistics[of])
    if maps:
        yield "map", trust.matrices(maps)
    if photographs is not None:
        yield "photographs", over_photographs(photographs)


def weights_over_epochs(history: Sequence[EpochWeights]) -> Figure:
    """Mean, spread, minimum and maximum of the weights over the epochs."""
    first, last = history[0].mean, history[-1].mean
    told = f"{'rose' if last > first else 'fell'} from {first:.2g} to {last:.2g}"
    if abs(last - first) <= _SAME * abs(first):
        told = f"stayed at {last:.2g}"
    figure, (axes,) = canvas(f"The mean weight {told}", [f"weight of an element; dashed: {_FIXED}"])
    epochs = [epoch.epoch + 1 for epoch in history]
    mean = [epoch.mean for epoch in history]
    low = [max(epoch.mean - epoch.spread, epoch.minimum) for epoch in history]  # a logarithmic axis ends above zero
    high = [epoch.mean + epoch.spread for epoch in history]
    palette = figures.colors()
    axes.set_yscale("log", nonpositive="clip")
    axes.fill_between(epochs, low, high, alpha=0.2, color=figures.color(0), linewidth=0)
    axes.plot(epochs, mean, **figures.line(0))
    ends = [End("mean ± spread", epochs[-1], mean[-1], figures.color(0))]
    for name, dashes in (("maximum", "--"), ("minimum", ":")):
        values = [getattr(epoch, name) for epoch in history]
        axes.plot(epochs, values, dashes, color=palette.muted)
        ends.append(End(name, epochs[-1], values[-1], palette.muted))
    figures.fixed_line(axes, 1, "")
    _plain_ticks(axes)
    over_epochs(axes)
    name_ends(axes, ends)
    return figure


def distribution(history: History) -> Figure:
    """Heat map of the share of weights by size (upwards, logarithmic) and epoch (to the right)."""
    edges = np.asarray(history[-1].bins)
    edges = np.concatenate((edges[1:2] * (edges[1] / edges[2]), edges[1:], edges[-1:] * (edges[2] / edges[1])))
    shares = np.array([epoch.columns["value"] for epoch in history]).T  # (bins, epochs)
    low, high = (edges[at] for at in _middle(shares[:, -1]))
    figure, (axes,) = canvas(
        f"In the last epoch most weights are between {low:.2g} and {high:.2g}", [f"weight; dashed: {_FIXED}"]
    )
    columns = np.append([epoch.epoch + 0.5 for epoch in history], history[-1].epoch + 1.5)
    mesh = axes.pcolormesh(
        columns, edges, np.ma.masked_equal(shares, 0), norm=LogNorm(1e-3, 1), cmap="viridis", rasterized=True
    )
    filled = np.flatnonzero(shares.any(axis=1))
    axes.set_yscale("log")
    axes.set_ylim(min(edges[filled[0]], 0.5), max(edges[filled[-1] + 1], 2))
    axes.grid(False)
    figures.fixed_line(axes, 1, "")
    _plain_ticks(axes)
    over_epochs(axes)
    figures.scale_beside(figure, axes, mesh, "share of the weights")
    return figure


def _middle(shares: np.ndarray[Any, Any]) -> tuple[int, int]:
    """The edges between which nine tenths of the weights are."""
    below = np.cumsum(shares) / max(shares.sum(), 1e-30)
    low, high = (int(np.searchsorted(below, part)) for part in (0.05, 0.95))
    return low, min(high, len(shares) - 1) + 1


def classes(statistics: Mapping[str, History]) -> Figure:
    """Mean weight by true label and, for maps over classes, by class of the map."""
    shown = [name for name in ("label", "output") if name in statistics]
    names = {"label": "true label", "output": "class of the map"}
    found = dict(zip(*_filled(statistics[shown[0]][-1], "value"), strict=True))
    most, least = max(found, key=found.__getitem__, default=""), min(found, key=found.__getitem__, default="")
    told = f"Class {most} counts most, {found[most]:.2g}, and class {least} least, {found[least]:.2g}" if found else ""
    figure, panels = canvas(told or "Weights by class", [f"mean weight by {names[name]}" for name in shown])
    for axes, name in zip(panels, shown, strict=True):
        ends = []
        for number, (epoch, color) in enumerate(_chosen(statistics[name])):
            x, values = _filled(epoch, "value")
            axes.plot(x, values, color=color, marker=figures.marker(number), markersize=4.5, linewidth=1.2)
            ends += _end(f"epoch {epoch.epoch + 1}", x, values, color)
        _fixed(axes)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel=names[name], yscale="log")
        _plain_ticks(axes)
        name_ends(axes, ends)
    return figure


def confidence(history: History) -> Figure:
    """Mean weight by the teacher's largest probability."""
    finding = f"Where the teacher is surest a sample counts {_from_to(history[-1])}"
    return _by_bin(history, finding, "largest probability of the teacher, from")


def frequency(history: History) -> Figure:
    """Mean weight by how often the label of a sample came."""
    finding = f"Where its label is most frequent a sample counts {_from_to(history[-1])}"
    return _by_bin(history, finding, "times that the label came in what was measured of the epoch, from")


def position(history: History) -> Figure:
    """Mean weight by the place in a sequence."""
    return _by_bin(history, f"Late in a text a token counts {_from_to(history[-1])}", "tokens before it, from")


def _by_bin(history: History, finding: str, what: str) -> Figure:
    """Mean weight by bin, up to the last that anything is in, evenly spaced."""
    filled = max(max((i for i, n in enumerate(epoch.columns["count"]) if n), default=0) for epoch in history)
    edges = history[-1].bins[: filled + 1]
    figure, (axes,) = canvas(finding, [f"mean weight (1: {_FIXED})"])
    ends = []
    for number, (epoch, color) in enumerate(_chosen(history)):
        x, values = _filled(epoch, "value")
        places = [edges.index(edge) for edge in x]
        axes.plot(places, values, color=color, marker=figures.marker(number), markersize=4.5, linewidth=1.5)
        ends += _end(f"epoch {epoch.epoch + 1}", places, values, color)
    _fixed(axes)
    axes.set_xticks(range(len(edges)), [f"{edge:g}" for edge in edges], rotation=45, fontsize=figures.SMALL)
    figure.subplots_adjust(bottom=0.22)
    axes.set(xlabel=what, yscale="log")
    _plain_ticks(axes)
    name_ends(axes, ends)
    return figure


def divergence(history: History) -> Figure:
    """Mean weight by size of the divergence, with the guard's closed form and where the divergences are."""
    figure, (axes,) = canvas(
        f"Where teacher and student differ most an element counts {_from_to(history[-1])}",
        [f"mean weight; grey: elements in epoch {history[-1].epoch + 1}, of {max(history[-1].columns['count']):.3g}"],
    )
    palette, ends = figures.colors(), []
    x, count = _filled(history[-1], "count")
    counts = axes.twinx()
    counts.fill_between(x, count, step="post", color=palette.muted, alpha=0.2, linewidth=0)
    counts.set(ylim=(0, None), yticks=[])
    counts.spines[:].set_visible(False)
    counts.set_facecolor(palette.paper)
    axes.set_zorder(counts.get_zorder() + 1)
    axes.patch.set_visible(False)
    for number, (epoch, color) in enumerate(_chosen(history)):
        x, values = _filled(epoch, "value")
        axes.plot(
            x, values, color=color, marker=figures.marker(number), markersize=4.5, label=f"epoch {epoch.epoch + 1}"
        )
        ends += _end(f"epoch {epoch.epoch + 1}", x, values, color)
    if "optimum" in history[-1].columns:
        x, values = _filled(history[-1], "optimum")
        axes.plot(x, values, "--", color=figures.color(1), label="closed form of the guard")
        ends += _end("closed form", x, values, figures.color(1))
    _fixed(axes)
    axes.set_xlabel("divergence of an element")
    axes.set_xscale("log", nonpositive="mask")
    axes.set_yscale("log", nonpositive="mask")
    axes.minorticks_off()
    name_ends(axes, ends)
    return figure


def places(history: History) -> Figure:
    """Mean weight and mean divergence by place in a feature map in the last epoch, beside each other."""
    epoch = history[-1]
    weights, divergences = (np.reshape(epoch.columns[key], (GRID, GRID)) for key in ("value", "divergence"))
    inner = weights[GRID // 4 : -GRID // 4, GRID // 4 : -GRID // 4].mean()
    outer = (weights.sum() - inner * (GRID // 2) ** 2) / (GRID**2 - (GRID // 2) ** 2)
    told = f"counts {'more' if inner > outer else 'less'} than its edge: {inner:.2g}, not {outer:.2g}"
    if not abs(inner - outer) > _SAME * abs(outer):
        told = f"counts as much as its edge: {inner:.2g}"
    drawn = [f"mean weight by place, epoch {epoch.epoch + 1}", "mean divergence by place"]
    figure, panels = canvas(f"The middle of the map {told}", drawn, height=4.8, fitted=True)
    for axes, values, name in zip(panels, (weights, divergences), ("weight", "divergence"), strict=True):
        mesh = axes.imshow(values, cmap="viridis", interpolation="nearest")
        axes.set(xticks=[], yticks=[], xlabel="left to right", ylabel="bottom to top")
        axes.grid(False)
        figures.scale_beside(figure, axes, mesh, name)
    return figure


def agreement(history: History) -> Figure:
    """Cosine between the gradients of distillation and task, with and without the weights."""
    labels = {"distill": "with weights", "plain": "without weights"}
    names = list(dict.fromkeys(name for epoch in history for name in epoch.bins))
    lines = {name: of_bin(history, name) for name in names}
    weighed = [values[-1] for name, (_, values) in lines.items() if not _is_plain(name)]
    mean = sum(weighed) / max(1, len(weighed))
    how = "neither with the task nor against it"
    if mean > 0.3 or mean < -0.1:
        how = f"{'with' if mean > 0 else 'against'} the task"
    figure, (axes,) = canvas(f"Distillation pulls {how}: cosine {mean:.2f}", ["cosine of the gradients at the logits"])
    ends = []
    for number, (name, (epochs, values)) in enumerate(lines.items()):
        style = figures.line(number) | ({"linestyle": "--"} if _is_plain(name) else {})
        axes.plot(epochs, values, **style, label=labels.get(name, name))
        ends += _end(labels.get(name, name), epochs, values, figures.color(number))
    figures.fixed_line(axes, 0, "nothing in common")
    axes.set_ylim(-1.05, 1.05)
    over_epochs(axes)
    name_ends(axes, ends)
    return figure


def _is_plain(name: str) -> bool:
    return name.endswith(("plain", "(plain)"))


def balance(weights: History, shares: History) -> Figure:
    """Weight of each loss over the epochs and its share of the student's gradient."""
    told = _last(shares or weights)
    most = max(told, key=told.__getitem__)
    what = f"{told[most]:.0%} of the student's gradient" if shares else f"the largest weight, {told[most]:.3g}"
    drawn = ["weight of the loss", "share of the gradient at the logits"]
    figure, panels = canvas(f"{most} has {what}", drawn[: 2 if shares else 1])
    names = list(dict.fromkeys(name for epoch in weights for name in epoch.bins))
    for axes, history in zip(panels, (weights, shares), strict=False):
        _lines(axes, {name: of_bin(history, name) for name in names})
        axes.set_ylim(bottom=0)
        _named(axes, {name: of_bin(history, name) for name in names})
    return figure


def step_length(history: History) -> Figure:
    """Norm of what each loss puts into the gradient of the student's parameters, and of the sum, over the epochs."""
    told = _last(history)
    longer = told[TOTAL] / told["task"] if TOTAL in told and told.get("task") else math.nan
    finding = "Length of a step by loss"
    if math.isfinite(longer):
        times = "as long as" if abs(longer - 1) < _SAME else f"{longer:.2g} times as long as"
        finding = f"A step is {times} that of the task alone"
    figure, (axes,) = canvas(finding, ["norm of the gradient in the student's parameters"])
    names = list(dict.fromkeys(name for epoch in history for name in epoch.bins))
    lines = {name: of_bin(history, name) for name in names}
    _lines(axes, lines)
    axes.set_yscale("log", nonpositive="mask")
    _plain_ticks(axes)
    _named(axes, lines)
    return figure


def _lines(axes: Any, lines: Mapping[str, tuple[list[int], list[float]]]) -> None:
    for number, (name, (epochs, values)) in enumerate(lines.items()):
        axes.plot(epochs, values, **_style(number, name), label=name)
    over_epochs(axes)


def _style(number: int, name: str) -> dict[str, Any]:
    whole = {"color": figures.colors().ink, "linestyle": "--"} if name == TOTAL else {}
    return figures.line(number) | whole


def _named(axes: Any, lines: Mapping[str, tuple[list[int], list[float]]]) -> None:
    ends = []
    for number, (name, (epochs, values)) in enumerate(lines.items()):
        ends += _end(name, epochs, values, _style(number, name)["color"])
    name_ends(axes, ends)


def _last(history: History) -> dict[Any, float]:
    return dict(zip(history[-1].bins, history[-1].columns["value"], strict=True))


def _end(name: str, x: Sequence[float], y: Sequence[float], color: Any) -> list[End]:
    return [End(name, x[-1], y[-1], color)] if x else []


def _from_to(epoch: EpochStatistic) -> str:
    """How the last bin stands against the first, of those with a hundredth of all: ``less: 0.2, not 3.1``."""
    enough = 0.01 * sum(epoch.columns["count"])
    columns = zip(epoch.columns["value"], epoch.columns["count"], strict=True)
    values = [value for value, count in columns if count >= max(enough, 1) and math.isfinite(value)]
    if not values or abs(values[-1] - values[0]) <= _SAME * abs(values[0]):
        return "as much as elsewhere"
    return f"{'more' if values[-1] > values[0] else 'less'}: {values[-1]:.2g}, elsewhere {values[0]:.2g}"


def _fixed(axes: Any) -> None:
    figures.fixed_line(axes, 1, _FIXED)


def _plain_ticks(axes: Any) -> None:
    """Numbers without powers along a logarithmic y-axis, with as many digits as tell them apart."""
    low, high = axes.get_ylim()
    narrow = high < 10 * low
    wide = high > 500 * low
    axes.yaxis.set_major_locator(MaxNLocator(6) if narrow else LogLocator(subs=(1,) if wide else (1, 2, 5), numticks=9))
    axes.yaxis.set_minor_locator(NullLocator())
    plain = ScalarFormatter(useOffset=False)
    plain.set_scientific(False)
    axes.yaxis.set_major_formatter(plain if narrow else StrMethodFormatter("{x:g}"))


def _chosen(history: History) -> list[tuple[EpochStatistic, Any]]:
    """First, last and evenly spaced epochs, the last one dark."""
    number = min(_LINES, len(history))
    places = sorted({round(i * (len(history) - 1) / max(1, number - 1)) for i in range(number)})
    if number == 1:
        places = [len(history) - 1]
    return [(history[place], shade) for place, shade in zip(places, figures.shades(len(places)), strict=True)]


def _filled(epoch: EpochStatistic, column: str) -> tuple[list[Any], list[float]]:
    """Bins in which something was counted and whose value is finite, with those values."""
    found = [
        (edge, value)
        for edge, value, count in zip(epoch.bins, epoch.columns[column], epoch.columns["count"], strict=True)
        if count and math.isfinite(value)
    ]
    return [edge for edge, _ in found], [value for _, value in found]
