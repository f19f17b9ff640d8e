"""The panel's table in results is that of its runs, and so is its figure."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import panel_figure
from benchmarks.panel_figure import METHODS, SCENARIOS, Runs

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs() -> Runs:
    return panel_figure.read(ROOT / "results")


def test_the_table_has_the_means_of_the_runs_and_their_differences(runs: Runs) -> None:
    text = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
    table = text.partition("### Five seeds")[2].partition("<picture>")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    told = [[float(x) for x in re.findall(r"[-+]?\d+\.\d+(?!\d*\])", row.partition(" | ")[2])] for row in rows]
    assert len(rows) == len(SCENARIOS)
    for scenario in SCENARIOS:
        means = {round(sum(runs[scenario, name].values()) / 5, 1) for name in ("task_only", "calibrated_a1")}
        found = panel_figure.over_task_only(runs, scenario, "calibrated_a1")
        assert found.pairs == 5
        assert any(means | {round(found.mean or 0.0, 2)} <= {*row} for row in told)


@pytest.mark.parametrize("dark", [False, True])
def test_every_scenario_has_a_row_and_every_method_a_mark_in_it(runs: Runs, dark: bool) -> None:
    axes = panel_figure.draw(runs, dark).axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == [*SCENARIOS.values()]
    marks = [line for line in axes.lines if line.get_marker() in ("o", "<") and len(line.get_xdata())]
    assert len(marks) == len(SCENARIOS) * len(METHODS)
    for name in ("panel.svg", "panel_dark.svg"):
        assert 10_000 < (ROOT / "results" / name).stat().st_size < 100_000
