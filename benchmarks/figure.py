"""Draws README's figure, accuracy against bits, from the tables in results/.

    python -m benchmarks.figure [--results results] [--out results]

Two files, accuracy_by_bits.svg for light pages and accuracy_by_bits_dark.svg for dark ones.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from pathlib import Path
from typing import Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from lqkd.utils.files import atomic_path

FITTED = "fitted_only_cifar10_cpu_torch2.14.1.csv"
TRAINED = {4: "study_cifar10_w4a4_runs_cpu_torch2.14.1.csv", 2: "study_cifar10_w2a2_runs_cpu_torch2.14.1.csv"}
"""Bits to the runs of a study."""
FLOAT, PTQ = "in float", "fitted, not trained (PTQ)"
VARIANTS = {"hints": "features of its own float network", "kl": "KL from ResNet-56", "task_only": "labels alone (QAT)"}
"""Variants of the studies, by what the figure calls them, from the best to the worst."""
COLORS = {  # of Okabe and Ito, told apart by the colour-blind
    "hints": ("#0072B2", "#56B4E9"),
    "kl": ("#009E73", "#2FC79B"),
    "task_only": ("#D55E00", "#F0802B"),
    PTQ: ("#6E6E6E", "#A0A0A0"),
}
INK, PAPER = ("#1F2328", "#E6EDF3"), ("#FFFFFF", "#0D1117")
Accuracies = dict[str, dict[int, list[float]]]
"""Series -> bits -> test accuracy of every seed, in percent."""


def read(results: Path) -> tuple[float, Accuracies]:
    """Accuracy of the float network, and of every series."""
    series: Accuracies = defaultdict(lambda: defaultdict(list))
    in_float = 0.0
    for row in _rows(results / FITTED):
        if row["bits"] == "float":
            in_float = 100 * float(row["test"])
        else:
            series[PTQ][int(row["bits"][1])].append(100 * float(row["test"]))
    for bits, name in TRAINED.items():
        for row in _rows(results / name):
            if row["variant"] in VARIANTS:
                series[row["variant"]][bits].append(100 * float(row["test"]))
    return in_float, series


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def draw(in_float: float, series: Accuracies, dark: bool) -> Figure:
    """Accuracy over bits, a mark for every run, a line through the means, names beside the last of them."""
    ink, paper = INK[dark], PAPER[dark]
    figure = Figure(figsize=(8.2, 4.3), layout="constrained", facecolor=paper)
    axes = figure.add_subplot(facecolor=paper)
    places = {8: 0.0, 4: 1.0, 2: 2.0}
    axes.axhline(in_float, color=ink, lw=1, ls=(0, (4, 3)))
    axes.text(-0.12, in_float + 0.6, f"{FLOAT} {in_float:.1f} %", color=ink, fontsize=11, va="bottom")
    for name in (PTQ, *reversed(VARIANTS)):
        color = COLORS[name][dark]
        by_bits = dict(sorted(series[name].items(), reverse=True))
        axes.plot([places[b] for b in by_bits], [mean(v) for v in by_bits.values()], color=color, lw=2, zorder=2)
        for bits, values in by_bits.items():
            axes.plot([places[bits]] * len(values), values, "o", color=color, ms=5, mec=paper, mew=0.6, zorder=3)
        last = min(by_bits)
        label = f"{VARIANTS.get(name, name)}  {mean(by_bits[last]):.1f} %"
        axes.text(places[last] + 0.07, mean(by_bits[last]), label, color=color, fontsize=11, va="center")
    for row, name in enumerate((*VARIANTS, PTQ)):  # too close to each other to be told apart there
        told = f"{mean(series[name][4]):.1f} %"
        axes.text(places[4] - 0.04, 86.5 - 3.2 * row, told, color=COLORS[name][dark], fontsize=10, ha="right")
    axes.set_xticks([*places.values()], [f"W{bits}A{bits}" for bits in places])
    axes.set_xlim(-0.15, 3.6)
    axes.set_ylabel("top-1 on CIFAR-10's test images, %", color=ink, fontsize=11)
    lost, won = in_float - mean(series[PTQ][2]), mean(series["hints"][2]) - mean(series[PTQ][2])
    title = f"Two bits cost a ResNet-20 {lost:.0f} points untrained; 194 steps of distillation bring {won:.0f} back"
    axes.set_title(title, color=ink, fontsize=12, loc="left", pad=12)
    axes.tick_params(labelsize=11)
    style(axes, ink, "y")
    return figure


def style(axes: Axes, ink: str, across: Literal["x", "y"]) -> None:
    """Ticks, grid and the two spines that are left, in the colour of the text; lines of the grid cross one axis."""
    axes.tick_params(colors=ink)
    axes.grid(axis=across, color=ink, alpha=0.12)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(ink)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as SVG, the same to the byte each time."""
    with mpl.rc_context({"svg.hashsalt": "lqkd"}), atomic_path(path) as temporary:
        FigureCanvasSVG(figure).print_svg(temporary, metadata={"Date": None})
    print(path)


def _rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder with the tables")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the figures")
    options = parser.parse_args()
    in_float, series = read(options.results)
    for dark in (False, True):
        save(draw(in_float, series, dark), options.out / f"accuracy_by_bits{'_dark' if dark else ''}.svg")


if __name__ == "__main__":
    main()
