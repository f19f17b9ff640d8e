"""Draws what ways of weighing a teacher are worth in each scenario of the panel, from a table of runs in results/.

    python -m benchmarks.panel_figure [--results results] [--out results]

Two files, panel.svg for light pages and panel_dark.svg for dark ones. A mark is the mean difference to the task alone,
paired by seed, and its line the 95 % interval.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.figure import COLORS, INK, PAPER, save, style
from lqkd.studies.statistics import Difference, paired_difference

RUNS = "panel_fashion_mnist_w2a2_five_seeds_runs_cpu_torch2.14.1.csv"
BASE = "task_only"
METHODS = {
    "mean_a1": "the teachers given, at a fixed weight",
    "own_t1_a1": "the student's own float network, at a fixed weight",
    "calibrated_a1": "what held-out rows say of both (calibrated)",
}
"""Variants of the study, by what the figure calls them."""
_COLOR = {"mean_a1": "task_only", "own_t1_a1": "kl", "calibrated_a1": "hints"}
SCENARIOS = {
    "good": "good teacher",
    "memorised": "knows its training rows by heart",
    "normalisation": "another normalisation",
    "scale_100": "distillation loss x 100",
    "scale_001": "distillation loss x 1/100",
    "under_confident": "logits x 0.1",
    "over_confident": "logits x 10",
    "good_and_weak": "a good and a weak one",
    "weak": "trained on 250 images",
    "specialists": "two specialists",
    "renamed": "three classes renamed",
    "random": "random outputs",
    "wrong_labels": "good; 40 % of labels wrong",
    "few_labels": "good; 1,000 labels",
    "half_right": "five classes renamed, others' labels wrong",
}
"""Scenarios of the study, from the top down."""
LEFT = -3.0
"""Points at which what is worse is cut off."""
Runs = dict[tuple[str, str], dict[int, float]]
"""Scenario and variant -> seed -> test accuracy in percent."""


def read(results: Path) -> Runs:
    """All runs of the table."""
    runs: Runs = defaultdict(dict)
    with open(results / RUNS, newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            runs[row["scenario"], row["variant"]][int(row["seed"])] = 100 * float(row["test"])
    return runs


def over_task_only(runs: Runs, scenario: str, variant: str) -> Difference:
    """Of the seeds that both have."""
    ours, base = runs[scenario, variant], runs[scenario, BASE]
    seeds = sorted(ours.keys() & base.keys())
    return paired_difference([ours[seed] for seed in seeds], [base[seed] for seed in seeds])


def draw(runs: Runs, dark: bool) -> Figure:
    """A row for each scenario, a mark for each method."""
    ink, paper = INK[dark], PAPER[dark]
    figure = Figure(figsize=(8.2, 6.6), layout="constrained", facecolor=paper)
    axes = figure.add_subplot(facecolor=paper)
    axes.axvline(0, color=ink, lw=1, ls=(0, (4, 3)))
    for index, (variant, label) in enumerate(METHODS.items()):
        color = COLORS[_COLOR[variant]][dark]
        for row, scenario in enumerate(SCENARIOS):
            found, height = over_task_only(runs, scenario, variant), row + 0.24 * (index - 1)
            if found.mean is None:
                continue
            if found.mean < LEFT:
                axes.plot([LEFT], [height], "<", color=color, ms=6)
                axes.text(LEFT + 0.08, height, f"{found.mean:.0f}", color=color, fontsize=9, va="center")
                continue
            if found.low is not None and found.high is not None:
                axes.plot([found.low, found.high], [height, height], color=color, lw=1.6)
            axes.plot([found.mean], [height], "o", color=color, ms=5, mec=paper, mew=0.6, zorder=3)
        axes.plot([], [], "o", color=color, ms=5, label=label)
    axes.set_yticks(range(len(SCENARIOS)), [*SCENARIOS.values()])
    axes.set_ylim(len(SCENARIOS) - 0.4, -0.6)
    axes.set_xlim(LEFT - 0.1, None)
    axes.set_xlabel("points of top-1 on Fashion-MNIST's test images over the task alone", color=ink, fontsize=11)
    figure.legend(loc="outside upper left", frameon=False, labelcolor=ink, fontsize=10)
    axes.tick_params(labelsize=10)
    style(axes, ink, "x")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder with the table")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the figures")
    options = parser.parse_args()
    runs = read(options.results)
    for dark in (False, True):
        save(draw(runs, dark), options.out / f"panel{'_dark' if dark else ''}.svg")


if __name__ == "__main__":
    main()
