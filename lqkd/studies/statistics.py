"""Means over seeds and paired differences, with the number of seeds and an interval that says what they are worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

from lqkd.studies.results import Run

CONFIDENCE = 0.95
MEASURES: dict[str, Callable[[Run], float | None]] = {
    "val_best": lambda run: run.best,
    "val_last": lambda run: run.last,
    "test": lambda run: run.test,
}
"""Values of the metric of a run by name. Nothing is ever chosen by ``test``."""


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences and its interval of confidence.

    Attributes:
        pairs: number of seeds that both variants have finished.
        mean: of the differences; None without a pair.
        low: lower end of the 95 % interval of Student's t, None with fewer than two pairs.
        high: upper end.
    """

    pairs: int
    mean: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Summary:
    """One measure of one variant over its finished runs.

    Attributes:
        count: number of seeds.
        mean: None without any.
        std: with n - 1 in the denominator; None with fewer than two seeds.
        difference: to the baseline, seed by seed; None for the baseline itself.
    """

    count: int
    mean: float | None
    std: float | None
    difference: Difference | None


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Mean of ``first - second`` with the interval ``mean +- t(0.975, n - 1) * s / sqrt(n)``.

    The interval takes the differences for normally distributed and the seeds for a random sample; see e.g. Cohen,
    "Empirical Methods for Artificial Intelligence" (1995), section 4.4. With equal differences it has width zero.
    """
    values = [a - b for a, b in zip(first, second, strict=True)]
    if not values:
        return Difference(0, None, None, None)
    mean, std = moments(values)
    if std is None:
        return Difference(1, mean, None, None)
    half = float(stdtrit(len(values) - 1, 0.5 + CONFIDENCE / 2)) * std / math.sqrt(len(values))
    return Difference(len(values), mean, mean - half, mean + half)


def summarize(runs: Sequence[Run], baseline: str | None) -> dict[str, dict[str, Summary]]:
    """Each measure of each variant, variants in the order of their first run.

    Args:
        runs: all runs; those that have not finished count for nothing.
        baseline: name of the variant that the others are compared with, each within its own scenario, if any.
    """
    result: dict[str, dict[str, Summary]] = {run.variant: {} for run in runs}
    for measure, of in MEASURES.items():
        values: dict[str, dict[int | None, float]] = {variant: {} for variant in result}
        for run in runs:
            if run.finished and (value := of(run)) is not None:
                values[run.variant][run.seed] = value
        for variant, by_seed in values.items():
            difference = None
            if baseline is not None and not is_baseline(variant, baseline):
                theirs = values.get(_beside(variant, baseline), {})
                seeds = [seed for seed in by_seed if seed in theirs]
                difference = paired_difference([by_seed[s] for s in seeds], [theirs[s] for s in seeds])
            mean, std = moments(list(by_seed.values())) if by_seed else (None, None)
            result[variant][measure] = Summary(len(by_seed), mean, std, difference)
    return result


def is_baseline(name: str, baseline: str | None) -> bool:
    """Whether a variant, or a variant in a scenario, ``scenario/variant``, is what others are compared with."""
    return baseline is not None and name == _beside(name, baseline)


def _beside(name: str, variant: str) -> str:
    """Another variant in the scenario of ``name``."""
    scenario, slash, _ = name.rpartition("/")
    return f"{scenario}{slash}{variant}"


def moments(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean of at least one value, and the standard deviation with n - 1 in the denominator, None of a single one."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
