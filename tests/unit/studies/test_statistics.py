"""Means, deviations and paired differences."""

from __future__ import annotations

from pathlib import Path

import pytest
from scipy.stats import ttest_rel

from lqkd.studies.results import Run
from lqkd.studies.statistics import paired_difference, summarize


def run(variant: str, seed: int, accuracy: float, status: str = "finished") -> Run:
    summary = {"val": accuracy, "test": accuracy - 0.1}
    return Run(variant, seed, status, "", Path(), summary, {"val/acc": [(1, accuracy), (2, accuracy - 0.01)]})


def test_the_interval_is_that_of_a_paired_t_test() -> None:
    first, second = [0.91, 0.925, 0.94, 0.9], [0.9, 0.92, 0.9, 0.91]
    expected = ttest_rel(first, second).confidence_interval(0.95)
    found = paired_difference(first, second)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_one_pair_has_a_difference_and_no_interval() -> None:
    found = paired_difference([0.9], [0.8])
    assert found.mean == pytest.approx(0.1)
    assert (found.pairs, found.low, found.high) == (1, None, None)


def test_without_a_pair_nothing_is_claimed() -> None:
    assert paired_difference([], []).mean is None


def test_only_seeds_that_both_have_finished_are_paired() -> None:
    runs = [run("a", 0, 0.5), run("a", 1, 0.6), run("b", 0, 0.7), run("b", 1, 0.0, status="diverged")]
    difference = summarize(runs, "a")["b"]["val_best"].difference
    assert difference is not None
    assert (difference.pairs, difference.mean) == (1, pytest.approx(0.2))


def test_pairs_are_matched_by_seed_and_not_by_order() -> None:
    runs = [run("a", 0, 0.5), run("a", 1, 0.6), run("b", 1, 0.7), run("b", 0, 0.6)]
    difference = summarize(runs, "a")["b"]["test"].difference
    assert difference is not None
    assert (difference.low, difference.high) == (pytest.approx(0.1), pytest.approx(0.1))


def test_best_last_and_test_accuracy_are_three_measures() -> None:
    measures = summarize([run("a", 0, 0.5), run("a", 1, 0.7)], None)["a"]
    assert {name: round(m.mean or 0, 6) for name, m in measures.items()} == {
        "val_best": 0.6, "val_last": 0.59, "test": 0.5
    }  # fmt: skip
    assert measures["test"].std == pytest.approx(0.2 / 2**0.5)


def test_a_variant_without_a_finished_run_keeps_its_row() -> None:
    measures = summarize([run("a", 0, 0.5), run("b", 0, 0.5, status="failed")], "a")["b"]
    assert (measures["test"].count, measures["test"].mean) == (0, None)


def test_the_value_after_the_last_epoch_is_the_tasks_metric() -> None:
    curves = {"val/acc": [(1, 0.9)], "val/miou": [(1, 0.4), (2, 0.5)]}
    assert Run("a", 0, "finished", "", Path(), {"metric": "val/miou"}, curves).last == 0.5
