"""Scenarios x methods: what one setting of a method costs, in each scenario, against a weight that was tuned for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from pathlib import Path
from typing import Any

from lqkd.studies.results import Run, metric_of
from lqkd.studies.settings import Study
from lqkd.studies.statistics import Difference, Summary, moments, paired_difference, summarize
from lqkd.studies.tables import NONE, difference, number
from lqkd.utils.tables import write_csv

PANEL = "panel.csv"


@dataclass(frozen=True)
class Cell:
    """A method in a scenario.

    Attributes:
        test: over the seeds, with the paired difference to the baseline of the scenario.
        regret: by how much the weight that was tuned for this scenario is better, on test, paired by seed; positive is
            worse whether the metric is to rise or to fall.
        chosen: whether this is that weight.
    """

    test: Summary
    regret: Difference
    chosen: bool


@dataclass(frozen=True)
class Overall:
    """A method over all scenarios.

    Attributes:
        scenarios: number of those with a regret.
        mean: of their mean regrets; with an interval over the seeds where all have the same ones.
        worst: the largest mean regret of a scenario; None without any.
        where: the scenario of ``worst``.
    """

    scenarios: int
    mean: Difference
    worst: float | None
    where: str | None


@dataclass(frozen=True)
class Panel:
    """What a study with scenarios has come to.

    Attributes:
        metric: of the runs.
        scenarios, variants: their names, in order.
        cells: by scenario and variant.
        overall: by variant.
    """

    metric: str
    scenarios: tuple[str, ...]
    variants: tuple[str, ...]
    cells: Mapping[tuple[str, str], Cell]
    overall: Mapping[str, Overall]


def panel(study: Study, runs: Sequence[Run]) -> Panel:
    """Compare the methods of a study with the best of ``study.tuned`` in each scenario.

    Which one that is, is decided by the mean of the best values on the validation split over those seeds that all
    variants of ``tuned`` with finished runs have finished; the regret is then stated on the test split.

    Args:
        study: with scenarios.
        runs: its runs, named ``scenario/variant``; those that have not finished count for nothing.
    """
    metric, mode = metric_of(runs)
    summaries = summarize(runs, study.compared_with)
    cells: dict[tuple[str, str], Cell] = {}
    regrets: dict[str, dict[str, dict[int | None, float]]] = {variant: {} for variant in study.variants}
    for scenario in study.scenarios:
        of = {variant: [r for r in runs if r.variant == f"{scenario}/{variant}"] for variant in study.variants}
        best = _best(of, study.tuned, mode)
        for variant, ours in of.items():
            lost = {} if best is None else _lost(_tests(of[best]), _tests(ours), mode)
            values = list(lost.values())
            summary = summaries.get(f"{scenario}/{variant}", {}).get("test", Summary(0, None, None, None))
            cells[scenario, variant] = Cell(summary, _over_zero(values), variant == best)
            if lost:
                regrets[variant][scenario] = lost
    overall = {variant: _overall(by_scenario) for variant, by_scenario in regrets.items()}
    return Panel(metric, tuple(study.scenarios), tuple(study.variants), cells, overall)


def _best(of: Mapping[str, Sequence[Run]], tuned: Sequence[str], mode: str) -> str | None:
    """The best on validation; the first of several that are equal."""
    values = {
        variant: {run.seed: run.best for run in of[variant] if run.finished and run.best is not None}
        for variant in tuned
    }
    values = {variant: by_seed for variant, by_seed in values.items() if by_seed}
    shared = set.intersection(*map(set, values.values())) if values else set()
    if not shared:
        return None
    means = {variant: fsum(by_seed[seed] for seed in shared) for variant, by_seed in values.items()}
    return (max if mode == "max" else min)(means, key=lambda variant: means[variant])


def _tests(runs: Iterable[Run]) -> dict[int | None, float]:
    return {run.seed: run.test for run in runs if run.finished and run.test is not None}


def _lost(best: Mapping[int | None, float], ours: Mapping[int | None, float], mode: str) -> dict[int | None, float]:
    sign = 1 if mode == "max" else -1
    return {seed: sign * (best[seed] - value) for seed, value in ours.items() if seed in best}


def _over_zero(values: Sequence[float]) -> Difference:
    return paired_difference(values, [0.0] * len(values))


def _overall(by_scenario: Mapping[str, Mapping[int | None, float]]) -> Overall:
    means = {scenario: moments([*lost.values()])[0] for scenario, lost in by_scenario.items()}
    where = max(means, key=lambda scenario: means[scenario], default=None)
    if where is None:
        return Overall(0, _over_zero([]), None, None)
    seeds = set.union(*map(set, by_scenario.values()))
    if all(lost.keys() == seeds for lost in by_scenario.values()):
        mean = _over_zero([moments([lost[seed] for lost in by_scenario.values()])[0] for seed in seeds])
    else:
        mean = Difference(0, moments([*means.values()])[0], None, None)
    return Overall(len(means), mean, means[where], where)


def write_panel(folder: Path, table: Panel) -> None:
    """Write ``panel.csv``, a row for each scenario and variant, to ``folder``, atomically."""
    write_csv(folder / PANEL, [_row(*key, cell) for key, cell in table.cells.items()])


def _row(scenario: str, variant: str, cell: Cell) -> dict[str, Any]:
    row: dict[str, Any] = {"scenario": scenario, "variant": variant, "seeds": cell.test.count}
    row |= {"test_mean": cell.test.mean, "test_std": cell.test.std, "tuned_best": int(cell.chosen)}
    for name, d in (("difference", cell.test.difference), ("regret", cell.regret)):
        row |= {f"{name}_{key}": None if d is None else getattr(d, key) for key in ("pairs", "mean", "low", "high")}
    return row


def panel_tables(table: Panel, baseline: str | None) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, headings and rows of the two tables that people read: values and differences, and regrets.

    A row a variant, a column a scenario; a missing run is ``n/a``.
    """
    values = [[v, *(_value(table, s, v, baseline) for s in table.scenarios)] for v in table.variants]
    regrets = [[v, *(_regret(table, s, v) for s in table.scenarios), *_overall_cells(table, v)] for v in table.variants]
    return [
        (f"test value, and the paired difference to {baseline}", ["variant", *table.scenarios], values),
        (
            "regret: the best tuned variant of the scenario minus the variant, on test (less is better)",
            ["variant", *table.scenarios, "mean regret", "worst"],
            regrets,
        ),
    ]


def _value(table: Panel, scenario: str, variant: str, baseline: str | None) -> str:
    summary = table.cells[scenario, variant].test
    if summary.mean is None:
        return NONE
    told = number(table.metric, summary.mean)
    return told if variant == baseline else f"{told}, {difference(summary, table.metric)}"


def _regret(table: Panel, scenario: str, variant: str) -> str:
    cell = table.cells[scenario, variant]
    return "tuned best" if cell.chosen else _with_interval(cell.regret, table.metric)


def _overall_cells(table: Panel, variant: str) -> list[str]:
    overall = table.overall[variant]
    if overall.worst is None:
        return [NONE, NONE]
    part = "" if overall.scenarios == len(table.scenarios) else f", of {overall.scenarios}"
    return [
        _with_interval(overall.mean, table.metric) + part,
        f"{number(table.metric, overall.worst, '+')} ({overall.where})",
    ]


def _with_interval(d: Difference, metric: str) -> str:
    return difference(Summary(d.pairs, None, None, d), metric)
