"""What the plots of a study draw."""

from __future__ import annotations

from pathlib import Path

import pytest

from lqkd.studies import plots
from lqkd.studies.results import Run
from lqkd.studies.statistics import summarize
from lqkd.utils.figures import finding_of, svg


def run(variant: str, seed: int, *values: float) -> Run:
    return Run(variant, seed, "finished", "", Path(), {}, {"val/acc": list(enumerate(values, 1))})


def test_a_curve_is_the_mean_over_the_seeds_that_have_come_that_far() -> None:
    figure = plots.curves([run("a", 0, 0.2, 0.4), run("a", 1, 0.4), run("b", 0, 0.9)], "val/acc", "accuracy")
    assert figure is not None
    first, second = figure.axes[0].lines
    assert list(first.get_xdata()) == [1, 2]
    assert list(first.get_ydata()) == pytest.approx([30, 40])  # percent
    assert (second.get_label(), list(second.get_ydata())) == ("b", [90])


def test_the_front_joins_what_nothing_else_beats_in_both() -> None:
    points = {"small": (1.0, 80.0), "beaten": (3.0, 79.0), "large": (4.0, 90.0), "no better": (5.0, 90.0)}
    figure = plots.pareto(points, "kB", "accuracy", "max")
    assert figure is not None
    front = figure.axes[0].lines[-1]
    assert list(zip(front.get_xdata(), front.get_ydata(), strict=True)) == [(1.0, 80.0), (4.0, 90.0)]


def test_nothing_to_draw_is_no_figure() -> None:
    assert plots.curves([run("a", 0)], "val/acc", "accuracy") is None
    assert plots.pareto({}, "kB", "accuracy", "max") is None


def test_where_one_is_the_best_in_both_there_is_nothing_to_trade() -> None:
    assert plots.pareto({"best": (1.0, 90.0), "beaten": (2.0, 80.0)}, "kB", "accuracy", "max") is None


def test_the_same_figure_is_the_same_text() -> None:
    points = {"a": (1.0, 2.0), "b": (2.0, 3.0)}
    texts = {svg(plots.pareto(points, "kB", "accuracy", "max")) for _ in range(2)}  # type: ignore[arg-type]
    assert len(texts) == 1


def test_the_line_of_an_error_joins_the_smallest() -> None:
    figure = plots.pareto({"a": (1.0, 0.5), "b": (2.0, 0.3), "c": (3.0, 0.4)}, "kB", "mae", "min")
    assert figure is not None
    assert figure.axes[0].lines[-1].get_ydata().tolist() == [0.5, 0.3]  # type: ignore[union-attr]


def measured(variant: str, seed: int, test: float, bits: str = "2", start: float = 0.1) -> Run:
    summary = {"test": test, "val": test, "student_start": start, "weight_bits": bits, "activation_bits": bits}
    return Run(variant, seed, "finished", "", Path(), summary)


def test_titles_say_what_is_better_than_chance_and_what_is_not() -> None:
    runs = [measured(name, seed, 0.9 + by + 0.001 * seed * odd) for seed in range(3) for name, by, odd in VARIANTS]
    for of, told in ((runs, "Different from base beyond chance: good +5.00"), (runs[::3] + runs[2::3], "None differs")):
        figure = plots.differences(summarize(of, "base"), "test", "base", "val/acc")
        assert figure is not None
        assert finding_of(figure).startswith(told)


VARIANTS = (("base", 0.0, 1), ("good", 0.05, 1), ("noisy", 0.001, -3))


def test_what_is_far_off_is_named_and_does_not_squeeze_the_rest() -> None:
    runs = [measured(f"kl_w{b}a{b}", 0, 0.9 + 0.01 * b, str(b), 0.1 * b) for b in (2, 4)]
    figure = plots.bits(runs, {"the student in float": 0.95}, "val/acc", "test", "test split")
    assert figure is not None
    (axes,) = figure.axes
    assert axes.get_ylim()[0] > 90
    names = {text.get_text() for text in axes.texts}
    assert {"kl", "the student in float", "quantised only (PTQ): 20", "quantised only (PTQ): 40"} <= names
    assert finding_of(figure) == "W2 A2: kl 92 %; W4 A4: kl 94 %"
    assert plots.bits(runs[:1], {}, "val/acc", "test", "test split") is None
