"""Figures of a study, and of a run: the title of each says what it shows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from lqkd.studies.results import Run
from lqkd.studies.statistics import Summary, moments
from lqkd.studies.tables import UNTRAINED, difference, endings, number, of_variant, scale, value
from lqkd.tasks.values import is_share, name_of, shown
from lqkd.utils import figures
from lqkd.utils.figures import HEIGHT, End, name_ends, name_points, over_epochs

_ROW = 0.36
"""Inches of a figure's height for a row of it."""
_BITS = re.compile(r"[-_]?[wW]\d+[aA]\d+")


class Row(NamedTuple):
    """What is drawn of one network: its name, what it is, values of single runs, their mean, and a text beside them."""

    name: str
    kind: str
    values: Sequence[float]
    mean: float | None
    text: str


GIVEN, TRAINED, QUANTISED = "given", "trained", "quantised"
"""Networks that were there before, those that the runs have trained, and those that are quantised and no more."""


def values(rows: Sequence[Row], metric: str, mode: str, split: str) -> Figure | None:
    """A row for each network with a dot for each run and a mark for their mean.

    What is only quantised may lie far off: it is an arrow then, with its value.

    Args:
        rows: from the top.
        metric: of the values.
        mode: which end of it is the better.
        split: on which it was measured.
    """
    known = {row.name: row.mean for row in rows if row.mean is not None and row.kind == TRAINED}
    if not known:
        return None
    best = (max if mode == "max" else min)(known, key=known.__getitem__)
    told = f"{best} reaches {shown(metric, known[best], 2)}"
    figure, axes = _canvas(
        _beside_float(told, rows, metric), f"{name_of(metric)} on the {split}{_unit(metric)}", _height(rows)
    )
    factor, palette = scale(metric), figures.colors()
    colors = {GIVEN: palette.ink, TRAINED: figures.color(0), QUANTISED: figures.color(1)}
    near = [v for row in rows if row.kind != QUANTISED for v in (*row.values, row.mean) if v is not None]
    low, high = _room([factor * v for v in near])
    for height, row in enumerate(rows):
        color = colors[row.kind]
        if row.mean is not None and not low <= factor * row.mean <= high:
            axes.plot([low], [height], "<", color=color, markersize=8, clip_on=False)
        elif row.mean is not None:
            axes.plot([factor * v for v in row.values], [height] * len(row.values), "o", color=color, alpha=0.35)
            axes.plot([factor * row.mean], [height], "D", color=color, markersize=7)
        _beside(axes, height, row.text, palette.muted if row.mean is None else color)
    axes.set_xlim(low, high)
    _rows(axes, [row.name for row in rows])
    return figure


def _beside_float(told: str, rows: Sequence[Row], metric: str) -> str:
    given = [f"{row.name} {shown(metric, row.mean, 2)}" for row in rows if row.kind == GIVEN and row.mean is not None]
    return f"{told}; {', '.join(given[-1:])}" if given else told


def _room(known: Sequence[float]) -> tuple[float, float]:
    """From where to where an axis goes."""
    low, high = min(known), max(known)
    margin = 0.25 * max(high - low, 0.02 * abs(high), 1e-9)
    return low - margin, high + margin


def _beside(axes: Any, row: int, text: str, color: Any) -> None:
    axes.annotate(
        figures.plain(text), (1.02, row), xycoords=axes.get_yaxis_transform(), va="center", fontsize=figures.SMALL,
        color=color, annotation_clip=False,
    )  # fmt: skip


def differences(
    summaries: Mapping[str, Mapping[str, Summary]], measure: str, baseline: str, metric: str, label: str = ""
) -> Figure | None:
    """Paired difference of each variant to the baseline with its interval, in points where the metric is a share."""
    factor, palette = scale(metric), figures.colors()
    points = [(n, d) for n, m in summaries.items() if (d := m[measure].difference) is not None and d.mean is not None]
    if not points:
        return None
    sure = {n: d for n, d in points if d.low is not None and d.high is not None and not d.low <= 0 <= d.high}
    told = ", ".join(f"{n} {number(metric, d.mean or 0.0, '+')}" for n, d in [*sure.items()][:2])
    more = f" and {len(sure) - 2} more" if len(sure) > 2 else ""
    finding = f"None differs from {baseline} by more than chance may make"
    if sure:
        finding = f"Different from {baseline} beyond chance: {told}{more}"
    unit = "percentage points" if is_share(metric) else name_of(metric)
    rows = [name for name, _ in points]
    figure, axes = _canvas(finding, f"{label} against {baseline}, {unit}, 95 % interval", _height(rows))
    for row, (name, d) in enumerate(points):
        assert d.mean is not None
        color = figures.color(0) if name in sure else palette.muted
        if d.low is not None and d.high is not None:
            axes.plot([factor * d.low, factor * d.high], [row, row], "-", color=color, linewidth=2)
        axes.plot([factor * d.mean], [row], "D" if name in sure else "o", color=color, markersize=7)
        _beside(axes, row, difference(summaries[name][measure], metric).partition(" ")[0], color)
    axes.axvline(0, color=palette.ink, linewidth=1)
    _rows(axes, rows)
    return figure


def bits(runs: Sequence[Run], references: Mapping[str, float], metric: str, of: str, split: str) -> Figure | None:
    """The metric by number of bits: mean and spread of each method over its seeds, and what was only quantised.

    Variants are one method where their names differ by nothing but bits, ``kl_w2a2`` and ``kl_w4a4``. None where all
    have the same bits.

    Args:
        runs: of all variants.
        references: name and value of what has no such bits, drawn as lines.
        metric: of the values.
        of: attribute of a run with its value.
        split: on which it was measured.
    """
    means = {name: {w: moments(found) for w, found in by.items()} for name, by in _by_bits(runs, metric, of).items()}
    widths = sorted({width for by in means.values() for width in by})
    if len(widths) < 2:
        return None
    trained = {name: by for name, by in means.items() if name != UNTRAINED} or means
    levels = {name: scale(metric) * level for name, level in references.items()}
    figure, axes = _canvas(
        _finding_of_bits(trained, widths[0], widths[-1], metric),
        f"{name_of(metric)} on the {split}{_unit(metric)}: mean and standard deviation over seeds",
        HEIGHT + 0.08 * len(means),
    )
    near = [mean + side * (std or 0.0) for by in trained.values() for mean, std in by.values() for side in (-1, 1)]
    low, high = _room([*near, *levels.values()])
    axes.set_ylim(low, high)
    axes.set_xlim(-0.4, len(widths) - 0.5)
    for name, level in levels.items():
        figures.fixed_line(axes, level, name)
    ends = []
    for index, (name, by) in enumerate(means.items()):
        at = [widths.index(width) for width in sorted(by)]
        middle, spread = ([by[width][which] or 0.0 for width in sorted(by)] for which in (0, 1))
        axes.errorbar(at, middle, yerr=spread, capsize=4, **figures.line(index))
        ends.append(End(name, at[-1], middle[-1], figures.color(index)))
        for place, mean in zip(at, middle, strict=True):
            if mean < low:  # far off
                axes.plot([place], [low], "v", color=figures.color(index), markersize=9, clip_on=False)
                ends.append(End(f"{name}: {mean:.4g}", place, low, figures.color(index)))
    axes.set_xticks(range(len(widths)), [_named(width) for width in widths])
    axes.set_xlabel("bits of weights and activations")
    name_points(axes, [end for end in ends if end.y >= low])
    return figure


def _by_bits(runs: Sequence[Run], metric: str, of: str) -> dict[str, dict[tuple[int, int], list[float]]]:
    """Values by method and bits, those of what was only quantised last."""
    series: dict[str, dict[tuple[int, int], list[float]]] = {}
    untrained: dict[tuple[int, int], list[float]] = {}
    for run in runs:
        width, result, start = _width(run), getattr(run, of), run.summary.get("student_start")
        if width is None or not run.finished:
            continue
        method = _BITS.sub("", run.variant) or run.variant
        if result is not None:
            series.setdefault(method, {}).setdefault(width, []).append(scale(metric) * result)
        if start is not None and of == "test":
            untrained.setdefault(width, []).append(scale(metric) * start)
    return series | ({UNTRAINED: untrained} if untrained else {})


def _finding_of_bits(
    means: Mapping[str, Mapping[tuple[int, int], tuple[float, float | None]]],
    few: tuple[int, int],
    many: tuple[int, int],
    metric: str,
) -> str:
    """The best at the fewest bits and at the most."""
    found = []
    for width in (few, many):
        known = {name: by[width][0] for name, by in means.items() if width in by}
        if known:
            best = max(known, key=known.__getitem__) if is_share(metric) else next(iter(known))
            found.append(f"{_named(width)}: {best} {known[best]:.4g}{' %' if is_share(metric) else ''}")
    return "; ".join(found)


def _width(run: Run) -> tuple[int, int] | None:
    """Bits of weights and activations in most layers."""
    found = [re.match(r"\d+", str(run.summary.get(key) or "")) for key in ("weight_bits", "activation_bits")]
    weights, activations = (None if one is None else int(one[0]) for one in found)
    return None if weights is None or activations is None else (weights, activations)


def _named(width: tuple[int, int]) -> str:
    return "W{} A{}".format(*width)


def curves(runs: Sequence[Run], metric: str, label: str, mode: str | None = None) -> Figure | None:
    """Mean of a metric over the seeds of each variant, epoch by epoch, within the range of the seeds.

    Args:
        runs: of all variants.
        metric: as in their tables.
        label: what it is.
        mode: which end of it is the better; None where values of two variants are no more than their own.
    """
    drawn = {
        name: values
        for name in dict.fromkeys(run.variant for run in runs)
        if (values := _by_epoch(of_variant(runs, name), metric))
    }
    if not drawn:
        return None
    factor = scale(metric)
    figure, axes = _canvas(
        _finding_of_curves(drawn, metric, label, mode), f"{label}{_unit(metric)}", HEIGHT + 0.06 * len(drawn)
    )
    ends = []
    for index, (name, by) in enumerate(drawn.items()):
        epochs = sorted(by)
        middle = [factor * sum(by[epoch]) / len(by[epoch]) for epoch in epochs]
        low, high = ([factor * end(by[epoch]) for epoch in epochs] for end in (min, max))
        style = figures.line(index) | ({} if len(epochs) < 20 else {"marker": None})
        axes.plot(epochs, middle, **style, label=figures.plain(name))
        axes.fill_between(epochs, low, high, color=figures.color(index), alpha=0.12, linewidth=0)
        ends.append(End(name if len(drawn) > 1 else "", epochs[-1], middle[-1], figures.color(index)))
    over_epochs(axes)
    name_ends(axes, ends)
    return figure


def _finding_of_curves(
    drawn: Mapping[str, Mapping[int, Sequence[float]]], metric: str, label: str, mode: str | None
) -> str:
    first, last = ({name: moments(by[at(by)])[0] for name, by in drawn.items()} for at in (min, max))
    told = {name: f"{100 * mean:.1f} %" if is_share(metric) else f"{mean:.3g}" for name, mean in last.items()}
    if len(drawn) == 1:
        ((name, mean),) = first.items()
        began = f"{100 * mean:.1f} %" if is_share(metric) else f"{mean:.3g}"
        return f"{label}: from {began} to {told[name]}"
    if mode is None:
        fell = sum(last[name] < first[name] for name in drawn)
        return f"{label} falls in {fell} of {len(drawn)} variants"
    most, least = (end(last, key=last.__getitem__) for end in (max, min))
    best, worst = (most, least) if mode == "max" else (least, most)
    return f"{best} ends {'highest' if mode == 'max' else 'lowest'}, at {told[best]}; {worst} at {told[worst]}"


def pareto(points: Mapping[str, tuple[float, float]], cost: str, value: str, mode: str) -> Figure | None:
    """A value against a cost, a mark for each name; the line joins those that no other beats in both.

    None where nothing is to be traded: where one of the points is the best in both.
    """
    front = [
        (x, y)
        for x, y in sorted(set(points.values()))
        if not any(a <= x and (b >= y if mode == "max" else b <= y) and (a, b) != (x, y) for a, b in points.values())
    ]
    if len(front) < 2:
        return None
    figure, axes = _canvas(_finding_of_front(points, front, cost), value)
    ends = []
    for index, (name, (x, y)) in enumerate(points.items()):
        axes.plot([x], [y], figures.marker(index), color=figures.color(index), markersize=8)
        ends.append(End(name, x, y, figures.color(index)))
    axes.plot(*zip(*front, strict=True), "-", color=figures.colors().muted, lw=1.2, zorder=0)
    axes.set_xlabel(cost)
    axes.margins(0.12)
    name_points(axes, ends)
    return figure


def _finding_of_front(
    points: Mapping[str, tuple[float, float]], front: Sequence[tuple[float, float]], cost: str
) -> str:
    """What the best network costs against the cheapest of those that nothing beats."""
    names = {place: name for name, place in reversed([*points.items()])}
    (least, low), (most, high) = front[0], front[-1]
    times = f"{most / least:.3g} times the" if least else f"{most:.3g} of"
    return f"{names[most, high]}: {high:.4g} at {times} {cost.partition(',')[0]} of {names[least, low]}, {low:.4g}"


def _canvas(finding: str, drawn: str, height: float = HEIGHT) -> tuple[Figure, Any]:
    """A figure with one panel and room for names of any length."""
    figure, (axes,) = figures.canvas(finding, [drawn], height, fitted=True)
    return figure, axes


def _by_epoch(runs: Sequence[Run], metric: str) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for run in runs:
        for epoch, measured in run.curves.get(metric, ()):
            found.setdefault(epoch, []).append(measured)
    return found


def rows_of(runs: Sequence[Run], summaries: Mapping[str, Mapping[str, Summary]], of: str, measure: str) -> list[Row]:
    """A row for each variant, with its runs' values and how they ended where that was no good."""
    found = []
    for name, measures in summaries.items():
        own = of_variant(runs, name)
        known = [result for run in own if run.finished and (result := getattr(run, of)) is not None]
        summary = measures[measure]
        metric = own[0].metric
        good = all(run.finished and run.verdict is None for run in own)
        text = "" if summary.mean is None else value(summary, metric)
        how = "" if good else endings(own) if summary.mean is None else f"({_spoiled(own)})"
        found.append(Row(name, TRAINED, known, summary.mean, f"{text} {how}".strip()))
    return found


def _spoiled(runs: Sequence[Run]) -> str:
    told = [run.verdict for run in runs if run.finished and run.verdict] or ["not all finished"]
    return ", ".join(dict.fromkeys(told))


def _unit(metric: str) -> str:
    return ", %" if is_share(metric) else ""


def _height(*rows: Sequence[object]) -> float:
    return 1.3 + _ROW * max(2, sum(map(len, rows)))


def _rows(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [figures.plain(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
