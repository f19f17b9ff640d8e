"""Scenarios x methods: the product, the tuned weight that is chosen on validation, and regrets."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from lqkd.studies.named import read_named, tasks_by_name
from lqkd.studies.panel import panel, panel_tables, write_panel
from lqkd.studies.results import Run
from lqkd.studies.settings import Study
from lqkd.utils.files import write_text

STUDY = Study(
    "s",
    "base.yaml",
    variants={"task": {}, "low": {"w": 1}, "high": {"w": 3}, "learned": {"r": "x"}},
    scenarios={"good": {"teacher": "g"}, "bad": {"teacher": "b"}},
    tuned=["task", "low", "high"],
)


def runs(values: dict[str, list[tuple[float, float]]], mode: str = "max") -> list[Run]:
    """By name, validation and test value of seeds 0, 1, ..."""
    return [
        Run(name, seed, "finished", "", Path(), {"val": val, "test": test, "metric": "val/acc", "mode": mode})
        for name, pairs in values.items()
        for seed, (val, test) in enumerate(pairs)
    ]


TABLE = {
    "good/task": [(0.80, 0.80), (0.82, 0.82)],
    "good/low": [(0.90, 0.81), (0.90, 0.83)],  # best on validation
    "good/high": [(0.85, 0.99), (0.85, 0.99)],  # best on test
    "good/learned": [(0.99, 0.82), (0.99, 0.82)],  # the best of all, and not tuned
    "bad/task": [(0.80, 0.80), (0.82, 0.82)],
    "bad/low": [(0.70, 0.70), (0.70, 0.70)],
    "bad/high": [(0.60, 0.60), (0.60, 0.60)],
    "bad/learned": [(0.70, 0.78), (0.70, 0.78)],
}


def test_regret_is_what_the_tuned_weight_chosen_on_validation_is_better_by_on_test() -> None:
    table = panel(STUDY, runs(TABLE))
    assert [key for key, cell in table.cells.items() if cell.chosen] == [("good", "low"), ("bad", "task")]
    means = {key: cell.regret.mean for key, cell in table.cells.items()}
    assert means["good", "learned"] == pytest.approx(((0.81 - 0.82) + (0.83 - 0.82)) / 2)
    assert means["good", "high"] == pytest.approx(((0.81 - 0.99) + (0.83 - 0.99)) / 2)
    assert means["bad", "learned"] == pytest.approx(((0.80 - 0.78) + (0.82 - 0.78)) / 2)
    difference = table.cells["bad", "learned"].test.difference
    assert difference is not None
    assert difference.mean == pytest.approx(-0.03)  # the baseline is that of the scenario


def test_regret_over_all_scenarios_has_their_mean_and_the_worst() -> None:
    overall = panel(STUDY, runs(TABLE)).overall["learned"]
    assert (overall.scenarios, overall.where) == (2, "bad")
    assert overall.mean.pairs == 2
    assert overall.mean.mean == pytest.approx((0.0 + 0.03) / 2)
    assert overall.worst == pytest.approx(0.03)


def test_scenarios_with_other_seeds_have_a_mean_regret_and_no_interval() -> None:
    overall = panel(STUDY, runs(TABLE | {"bad/learned": [(0.70, 0.78)]})).overall["learned"]  # 0.02 there
    assert overall.mean.mean == pytest.approx((0.0 + 0.02) / 2)
    assert overall.mean.low is None


def test_less_is_worse_only_of_a_metric_that_is_to_rise() -> None:
    table = panel(STUDY, runs(TABLE, mode="min"))
    assert table.cells["good", "task"].chosen  # the lowest on validation
    assert table.cells["good", "high"].regret.mean == pytest.approx(((0.99 - 0.80) + (0.99 - 0.82)) / 2)


def test_seeds_that_a_tuned_variant_lacks_do_not_choose() -> None:
    values = TABLE | {"good/task": [(0.80, 0.80), (0.99, 0.82)], "good/low": [(0.90, 0.81)]}
    table = panel(STUDY, runs(values))
    assert table.cells["good", "low"].chosen  # the first seed decides
    assert table.cells["good", "task"].regret.pairs == 1


def test_a_missing_run_is_shown_as_missing(tmp_path: Path) -> None:
    values = {name: pairs for name, pairs in TABLE.items() if name not in ("bad/learned", "good/high")}
    table = panel(STUDY, runs(values))
    (_, _, differences), (_, headings, regrets) = panel_tables(table, "task")
    assert headings == ["variant", "good", "bad", "mean regret", "worst"]
    assert differences[-1][2] == regrets[-1][2] == "n/a"
    assert regrets[-1][3].endswith("of 1")
    assert [row[1] for row in regrets[1:3]] == ["tuned best", "n/a"]  # of the tuned ones that have run
    write_panel(tmp_path, table)
    with open(tmp_path / "panel.csv", newline="") as stream:
        row = next(r for r in csv.DictReader(stream) if (r["scenario"], r["variant"]) == ("bad", "learned"))
    assert (row["seeds"], row["test_mean"], row["regret_mean"]) == ("0", "", "")


def test_every_variant_runs_in_every_scenario_and_its_own_settings_win() -> None:
    study = Study("s", "b", variants={"v": {"a.b": 1}, "w": {}}, scenarios={"x": {"a": {"b": 2, "c": 3}}, "y": {}})
    assert study.runs == {
        "x/v": {"a": {"b": 1, "c": 3}},
        "y/v": {"a": {"b": 1}},
        "x/w": {"a": {"b": 2, "c": 3}},
        "y/w": {},
    }


def test_what_has_the_same_configuration_in_two_scenarios_is_trained_once(tmp_path: Path) -> None:
    for name, text in (("x/v", "{a: 1, b: 2}"), ("y/v", "{b: 2, a: 1}"), ("x/w", "{a: 1}"), ("y/w", "{a: 2}")):
        write_text(tmp_path / "variants" / f"{name}.yaml", text)
    study = Study("s", "b", variants={"v": {}, "w": {}}, scenarios={"x": {}, "y": {}}, seeds=[4])
    named = tasks_by_name(tmp_path, study, list(study.runs))
    assert [(name, task.variant) for name, task in named] == [
        ("x/v", "x/v"), ("y/v", "x/v"), ("x/w", "x/w"), ("y/w", "y/w")
    ]  # fmt: skip
    assert [run.variant for run in read_named(named)] == list(study.runs)
