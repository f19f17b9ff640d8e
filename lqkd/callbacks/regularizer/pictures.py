"""Pictures of what the regularizer learned, drawn without a display and without matplotlib's global state."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, ScalarFormatter, StrMethodFormatter
from torch import Tensor

from lqkd.callbacks.regularizer import trust_pictures as trust
from lqkd.callbacks.regularizer.canvas import canvas, of_bin, over_epochs
from lqkd.callbacks.regularizer.moments import EpochWeights
from lqkd.callbacks.regularizer.statistics import TOTAL, EpochStatistic
from lqkd.utils.files import atomic_path

History = Sequence[EpochStatistic]

_LINES = 4
"""Epochs, at most, that are drawn over one another."""


def pictures(
    weights: Sequence[EpochWeights],
    statistics: Mapping[str, History],
    term: str = "",
    maps: Mapping[str, Tensor] | None = None,
) -> Iterable[tuple[str, Figure]]:
    """Name and figure of every picture that there is something for.

    Args:
        weights: the regularizer's, by epoch.
        statistics: by name.
        term: that they are of; if it has a name, it is in the heading.
        maps: by teacher, the matrix (C, C) that held-out rows have made of its logits.
    """
    for name, figure in _figures(weights, statistics, maps or {}):
        if term:
            figure.suptitle(f"{term}: {figure.get_suptitle()}")
        yield name, figure


def _figures(
    weights: Sequence[EpochWeights], statistics: Mapping[str, History], maps: Mapping[str, Tensor]
) -> Iterable[tuple[str, Figure]]:
    if weights:
        yield "weights", weights_over_epochs(weights)
    if "distribution" in statistics:
        yield "distribution", distribution(statistics["distribution"])
    if "label" in statistics or "output" in statistics:
        yield "classes", classes(statistics)
    if "confidence" in statistics:
        yield "confidence", confidence(statistics["confidence"])
    if "divergence" in statistics:
        yield "divergence", divergence(statistics["divergence"])
    if "agreement" in statistics:
        yield "agreement", agreement(statistics["agreement"])
    if "balance" in statistics:
        yield "balance", balance(statistics["balance"], statistics.get("share", ()))
    if "step_length" in statistics:
        yield "step_length", step_length(statistics["step_length"])
    if "trust" in statistics:
        yield "trust", trust.trust_over_epochs(statistics["trust"])
    if "believed" in statistics:
        yield "believed", trust.trust_by_class(statistics["believed"])
    if "reliability" in statistics:
        yield "reliability", trust.reliability(statistics["reliability"][-1])
    if maps:
        yield "map", trust.matrices(maps)


def pixels(figure: Figure) -> np.ndarray[Any, Any]:
    """The drawn figure, (height, width, 3) uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def write(target: Path, image: np.ndarray[Any, Any]) -> None:
    """Write :func:`pixels` as a PNG to ``target``, atomically."""
    from PIL import Image

    with atomic_path(target) as temporary:
        Image.fromarray(image).save(temporary, format="png")


def weights_over_epochs(history: Sequence[EpochWeights]) -> Figure:
    """Mean, spread, minimum and maximum of the weights over the epochs."""
    figure, (axes,) = canvas("Weights of the regularizer", 1)
    epochs = [epoch.epoch + 1 for epoch in history]
    mean = [epoch.mean for epoch in history]
    low = [max(epoch.mean - epoch.spread, epoch.minimum) for epoch in history]  # a logarithmic axis ends above zero
    high = [epoch.mean + epoch.spread for epoch in history]
    axes.set_yscale("log", nonpositive="clip")
    axes.fill_between(epochs, low, high, alpha=0.25, color="tab:blue", linewidth=0, label="mean ± spread")
    axes.plot(epochs, mean, color="tab:blue", marker="o", markersize=3, label="mean")
    for name, style in (("maximum", "--"), ("minimum", ":")):
        axes.plot(epochs, [getattr(epoch, name) for epoch in history], style, color="tab:gray", label=name)
    _fixed(axes)
    over_epochs(axes, "weight")
    axes.legend(fontsize="small")
    return figure


def distribution(history: History) -> Figure:
    """Heat map of the share of weights by size (upwards, logarithmic) and epoch (to the right)."""
    figure, (axes,) = canvas("Distribution of the weights", 1)
    edges = np.asarray(history[-1].bins)
    edges = np.concatenate((edges[1:2] * (edges[1] / edges[2]), edges[1:], edges[-1:] * (edges[2] / edges[1])))
    shares = np.array([epoch.columns["value"] for epoch in history]).T  # (bins, epochs)
    columns = np.append([epoch.epoch + 0.5 for epoch in history], history[-1].epoch + 1.5)
    shown = np.ma.masked_equal(shares, 0)
    mesh = axes.pcolormesh(columns, edges, shown, norm=LogNorm(1e-4, 1), cmap="viridis")
    filled = np.flatnonzero(shares.any(axis=1))
    axes.set_yscale("log")
    axes.set_ylim(min(edges[filled[0]], 0.5), max(edges[filled[-1] + 1], 2))
    axes.axhline(1, color="tab:red", linewidth=0.8)
    figure.colorbar(mesh, ax=axes, label="share of the weights")
    over_epochs(axes, "weight")
    return figure


def classes(statistics: Mapping[str, History]) -> Figure:
    """Mean weight by true label and, for maps over classes, by class of the map."""
    shown = [name for name in ("label", "output") if name in statistics]
    figure, panels = canvas("Weights by class", len(shown))
    figure.set_layout_engine("constrained")  # labels of two panels, as long as their numbers are
    for axes, name in zip(panels, shown, strict=True):
        for epoch, color in _chosen(statistics[name]):
            x, values = _filled(epoch, "value")
            axes.plot(x, values, "o-", color=color, markersize=3, linewidth=0.8, label=f"epoch {epoch.epoch + 1}")
        _fixed(axes)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel={"label": "true label", "output": "class of the map"}[name], ylabel="mean weight", yscale="log")
        _plain_ticks(axes)
    panels[0].legend(fontsize="small")
    return figure


def confidence(history: History) -> Figure:
    """Mean weight by the teacher's largest probability."""
    figure, (axes,) = canvas("Weights by confidence of the teacher", 1)
    edges = history[-1].bins
    for epoch, color in _chosen(history):
        x, values = _filled(epoch, "value")
        places = [edges.index(edge) for edge in x]
        axes.plot(places, values, "o-", color=color, markersize=4, label=f"epoch {epoch.epoch + 1}")
    _fixed(axes)
    axes.set_xticks(range(len(edges)), [f"{edge:g}" for edge in edges], rotation=45, fontsize="small")
    axes.set(xlabel="largest probability of the teacher, from", ylabel="mean weight", yscale="log")
    axes.legend(fontsize="small")
    return figure


def divergence(history: History) -> Figure:
    """Mean weight by size of the divergence, with the guard's closed form and where the divergences are."""
    figure, (axes,) = canvas("Weights by size of the divergence", 1)
    counts = axes.twinx()
    x, count = _filled(history[-1], "count")
    counts.fill_between(x, count, step="post", color="tab:gray", alpha=0.15, linewidth=0)
    counts.set(ylabel=f"elements in epoch {history[-1].epoch + 1} (grey)", ylim=(0, None))
    for epoch, color in _chosen(history):
        x, values = _filled(epoch, "value")
        axes.plot(x, values, "o-", color=color, markersize=3, label=f"epoch {epoch.epoch + 1}")
    if "optimum" in history[-1].columns:
        x, values = _filled(history[-1], "optimum")
        axes.plot(x, values, "--", color="tab:red", label="closed form of the guard")
    _fixed(axes)
    axes.set(xlabel="divergence", ylabel="mean weight")
    axes.set_xscale("log", nonpositive="mask")
    axes.set_yscale("log", nonpositive="mask")
    axes.legend(fontsize="small")
    return figure


def agreement(history: History) -> Figure:
    """Cosine between the gradients of distillation and task, with and without the weights."""
    figure, (axes,) = canvas("Agreement of distillation with the task, at the logits", 1)
    labels = {"distill": "with weights", "plain": "without weights"}
    for name in dict.fromkeys(name for epoch in history for name in epoch.bins):
        style = "s--" if name.endswith(("plain", "(plain)")) else "o-"
        axes.plot(*of_bin(history, name), style, markersize=3, label=labels.get(name, name))
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_ylim(-1.05, 1.05)
    over_epochs(axes, "cosine of the gradients")
    axes.legend(fontsize="small")
    return figure


def balance(weights: History, shares: History) -> Figure:
    """Weight of each loss over the epochs and its share of the student's gradient."""
    figure, panels = canvas("Balance of the losses", 2 if shares else 1)
    names = list(dict.fromkeys(name for epoch in weights for name in epoch.bins))
    labels = ("weight of the loss", "share of the gradient")
    for axes, history, label in zip(panels, (weights, shares), labels, strict=False):
        for name in names:
            axes.plot(*of_bin(history, name), "o-", markersize=3, label=name)
        over_epochs(axes, label)
        axes.set_ylim(bottom=0)
    panels[0].legend(fontsize="small")
    return figure


def step_length(history: History) -> Figure:
    """Norm of what each loss puts into the gradient of the student's parameters, and of the sum, over the epochs."""
    figure, (axes,) = canvas("Length of a step: gradients in the student's parameters", 1)
    for name in dict.fromkeys(name for epoch in history for name in epoch.bins):
        style, color = ("o--", "black") if name == TOTAL else ("o-", None)
        axes.plot(*of_bin(history, name), style, color=color, markersize=3, label=name)
    axes.set_yscale("log", nonpositive="mask")
    over_epochs(axes, "norm of the gradient")
    axes.legend(fontsize="small")
    return figure


def _fixed(axes: Any) -> None:
    axes.axhline(1, color="black", linewidth=0.6, label="fixed distillation")


def _plain_ticks(axes: Any) -> None:
    """Numbers without powers along a logarithmic y-axis, with as many digits as tell them apart."""
    low, high = axes.get_ylim()
    narrow = high < 10 * low
    axes.yaxis.set_major_locator(MaxNLocator(6) if narrow else LogLocator(subs=(1, 2, 5)))
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
    colors = colormaps["Blues"]
    return [(history[place], colors(1.0 - 0.6 * (1 - (i + 1) / len(places)))) for i, place in enumerate(places)]


def _filled(epoch: EpochStatistic, column: str) -> tuple[list[Any], list[float]]:
    """Bins in which something was counted and whose value is finite, with those values."""
    found = [
        (edge, value)
        for edge, value, count in zip(epoch.bins, epoch.columns[column], epoch.columns["count"], strict=True)
        if count and math.isfinite(value)
    ]
    return [edge for edge, _ in found], [value for _, value in found]
