"""A change that is not meant to change results leaves the first losses of the main configurations alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.golden.losses import GOLDEN, KEYS, STEPS, VARIANTS, first_losses

KEPT = json.loads(GOLDEN.read_text(encoding="utf-8"))
TOLERANCE = 1e-3
"""Relative. On one processor eager and compiled kernels and one and two threads agree to the five digits that are kept;
another processor sums in another order, which may round a few of the students' codes otherwise."""
FAST = ("quickstart",)


def variants() -> list[object]:
    return [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in VARIANTS]


@pytest.mark.parametrize("variant", variants())
def test_the_first_losses_are_the_golden_ones(variant: str, tmp_path: Path) -> None:
    found = first_losses(variant, tmp_path)
    assert {len(found[key]) for key in KEYS} == {STEPS}
    for key in KEYS:
        assert found[key] == pytest.approx(KEPT[variant][key], rel=TOLERANCE, abs=1e-5), key


def test_every_variant_has_golden_losses() -> None:
    assert set(KEPT) == set(VARIANTS)
