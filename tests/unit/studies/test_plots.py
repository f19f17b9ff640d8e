"""What the plots of a study draw."""

from __future__ import annotations

from pathlib import Path

import pytest

from lqkd.studies import plots
from lqkd.studies.results import Run


def run(variant: str, seed: int, *values: float) -> Run:
    return Run(variant, seed, "finished", "", Path(), {}, {"val/acc": list(enumerate(values, 1))})


def test_a_curve_is_the_mean_over_the_seeds_that_have_come_that_far() -> None:
    figure = plots.curves([run("a", 0, 0.2, 0.4), run("a", 1, 0.4), run("b", 0, 0.9)], "val/acc", "accuracy")
    assert figure is not None
    first, second = figure.axes[0].lines
    assert list(first.get_xdata()) == [1, 2]
    assert list(first.get_ydata()) == pytest.approx([0.3, 0.4])
    assert (second.get_label(), list(second.get_ydata())) == ("b", [0.9])


def test_the_front_joins_what_nothing_else_beats_in_both() -> None:
    points = {"small": (1.0, 80.0), "beaten": (3.0, 79.0), "large": (4.0, 90.0), "no better": (5.0, 90.0)}
    figure = plots.pareto(points, "kB", "accuracy", "max")
    assert figure is not None
    front = figure.axes[0].lines[-1]
    assert list(zip(front.get_xdata(), front.get_ydata(), strict=True)) == [(1.0, 80.0), (4.0, 90.0)]


def test_nothing_to_draw_is_no_figure() -> None:
    assert plots.curves([run("a", 0)], "val/acc", "accuracy") is None
    assert plots.pareto({}, "kB", "accuracy", "max") is None


def test_the_same_figure_is_the_same_text() -> None:
    texts = {plots.svg(plots.pareto({"a": (1.0, 2.0)}, "kB", "accuracy", "max")) for _ in range(2)}  # type: ignore[arg-type]
    assert len(texts) == 1


def test_the_line_of_an_error_joins_the_smallest() -> None:
    figure = plots.pareto({"a": (1.0, 0.5), "b": (2.0, 0.3), "c": (3.0, 0.4)}, "kB", "mae", "min")
    assert figure is not None
    assert figure.axes[0].lines[-1].get_ydata().tolist() == [0.5, 0.3]  # type: ignore[union-attr]
