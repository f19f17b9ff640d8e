"""Budgets as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lqkd.errors import UsageError
from lqkd.quantization import Budget


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("size=120kB", 120_000),
        ("size=0.25MB", 250_000),
        ("size=1.5KiB", 1536),
        ("size=77B", 77),
        ("size=12%", 120_000),
        ("size=12.34567%", 123_456),
        ("bops=2.5G", 2_500_000_000),
        ("bops=300", 300),
        ("bops=3%", 30_000),
    ],
)
def test_a_budget_is_understood(text: str, limit: int) -> None:
    assert Budget.parse(text).limit(1_000_000) == limit


@pytest.mark.parametrize(
    "text", ["12%", "size=12", "size=-1kB", "size=1kb", "bops=2kB", "latency=3ms", "size=", "bops=x"]
)
def test_any_other_text_is_refused_with_examples(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not understood: write it like size=120kB, size=12%, bops=2.5G"):
        Budget.parse(text)


@given(st.sampled_from(["size", "bops"]), st.integers(0, 10**15))
def test_a_described_cost_is_enough_as_a_budget_and_hardly_too_much(quantity: str, cost: int) -> None:
    described = Budget.parse(f"{quantity}={Budget.parse(f'{quantity}=1%').describe(cost)}").limit(0)
    assert cost <= described <= cost * 1.001 + 1
