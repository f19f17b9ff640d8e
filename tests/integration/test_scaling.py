"""The benchmark of how a step's cost grows: every axis is measured, and a slope is an exponent."""

from __future__ import annotations

import pytest

from benchmarks.scaling import SIZES, measure, slope


@pytest.mark.parametrize("axis", SIZES)
def test_a_step_of_every_axis_is_measured(axis: str) -> None:
    first, second = measure(axis, SIZES[axis][:2], rounds=1)
    assert (first["size"], second["size"]) == SIZES[axis][:2]
    assert first["step_milliseconds"] > 0
    assert second["fit_milliseconds"] > 0
    assert first["step_slope"] == ""


def test_a_slope_is_the_exponent_over_what_grows() -> None:
    assert slope("depth", {10: 1.0, 20: 4.0}, 10, 20) == pytest.approx(2.0)
    assert slope("width", {10: 1.0, 20: 4.0}, 10, 20) == pytest.approx(1.0)  # operations grow with its square
