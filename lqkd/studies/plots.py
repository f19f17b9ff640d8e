"""Plots of a study as SVG, drawn without a display and without matplotlib's global state."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib as mpl
from matplotlib import colormaps
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lqkd.studies.results import Run
from lqkd.studies.statistics import Summary
from lqkd.studies.tables import scale
from lqkd.tasks.values import is_share, name_of

_STYLES = ("-", "--", ":", "-.")
_MARKERS = "osD^vP*X"


def svg(figure: Figure) -> str:
    """The figure as SVG, the same text each time."""
    stream = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "lqkd"}):
        FigureCanvasSVG(figure).print_svg(stream, metadata={"Date": None})
    return stream.getvalue()


def curves(runs: Sequence[Run], metric: str, label: str) -> Figure | None:
    """Mean of a metric over the seeds of each variant, epoch by epoch, within the range of the seeds."""
    drawn = {
        name: values
        for name in dict.fromkeys(run.variant for run in runs)
        if (values := _by_epoch([run for run in runs if run.variant == name], metric))
    }
    if not drawn:
        return None
    figure = Figure(figsize=(7, 4 + 0.06 * len(drawn)), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, values) in enumerate(drawn.items()):
        epochs = sorted(values)
        color, style = _color(number), _STYLES[number // 10 % len(_STYLES)]
        means = [sum(values[epoch]) / len(values[epoch]) for epoch in epochs]
        marker = "o" if len(epochs) == 1 else None
        axes.plot(epochs, means, style, color=color, label=_plain(name), marker=marker)
        axes.fill_between(
            epochs, [min(values[e]) for e in epochs], [max(values[e]) for e in epochs], color=color, alpha=0.15, lw=0
        )
    axes.set(xlabel="epoch", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if len(drawn) > 1:
        figure.legend(loc="outside lower center", ncols=min(3, len(drawn)), fontsize="small")
    return figure


def differences(
    summaries: Mapping[str, Mapping[str, Summary]], measure: str, baseline: str, metric: str
) -> Figure | None:
    """Paired difference of each variant to the baseline with its interval, in points where the metric is a share."""
    factor = scale(metric)
    points = [(n, d) for n, m in summaries.items() if (d := m[measure].difference) is not None and d.mean is not None]
    if not points:
        return None
    figure = Figure(figsize=(7, 1.2 + 0.32 * len(points)), layout="constrained")
    axes = figure.add_subplot()
    for row, (_, d) in enumerate(points):
        assert d.mean is not None
        if d.low is not None and d.high is not None:
            axes.plot([factor * d.low, factor * d.high], [row, row], "-", color=_color(0))
        axes.plot([factor * d.mean], [row], "o", color=_color(0))
    axes.axvline(0, color="black", lw=1)
    axes.set_yticks(range(len(points)), [_plain(name) for name, _ in points])
    axes.set_ylim(len(points) - 0.5, -0.5)
    unit = "percentage points" if is_share(metric) else name_of(metric)
    axes.set_xlabel(f"difference to {_plain(baseline)}, {unit}")
    axes.grid(axis="x", alpha=0.3)
    return figure


def pareto(points: Mapping[str, tuple[float, float]], cost: str, value: str, mode: str) -> Figure | None:
    """A value against a cost, a mark for each name; the line joins those that no other beats in both."""
    if not points:
        return None
    figure = Figure(figsize=(7, 4 + 0.06 * len(points)), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, (x, y)) in enumerate(points.items()):
        axes.plot([x], [y], _MARKERS[number % len(_MARKERS)], color=_color(number), label=_plain(name))
    front = [
        (x, y)
        for x, y in sorted(set(points.values()))
        if not any(a <= x and (b >= y if mode == "max" else b <= y) and (a, b) != (x, y) for a, b in points.values())
    ]
    axes.plot(*zip(*front, strict=True), "-", color="grey", lw=1, zorder=0)
    axes.set(xlabel=cost, ylabel=value)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=min(3, len(points)), fontsize="small")
    return figure


def _by_epoch(runs: Sequence[Run], metric: str) -> dict[int, list[float]]:
    values: dict[int, list[float]] = {}
    for run in runs:
        for epoch, value in run.curves.get(metric, ()):
            values.setdefault(epoch, []).append(value)
    return values


def _plain(name: str) -> str:
    """A name in which a dollar sign begins no formula."""
    return name.replace("$", r"\$")


def _color(number: int) -> tuple[float, float, float, float]:
    return colormaps["tab10"](number % 10)
