"""The bits of every layer under a budget: the integer program against trying all, and the recipe that comes out."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lqkd.errors import UsageError
from lqkd.quantization import (
    Budget,
    Recipe,
    Rule,
    SensitivityReport,
    allocate,
    assign_bits,
    bit_operations,
    measure_sensitivity,
    quantize_model,
    size,
)

PROBLEMS = st.integers(1, 5).flatmap(
    lambda layers: st.tuples(
        st.lists(
            st.lists(
                st.tuples(
                    st.floats(-1, 10, allow_nan=False).map(lambda x: round(x, 4)),
                    st.integers(-(10**9), 10**9) | st.integers(-20, 20),
                ),
                min_size=1,
                max_size=4,
            ),
            min_size=layers,
            max_size=layers,
        ),
        st.floats(0, 1),
    )
)


def by_trying_all(losses: list[list[float]], costs: list[list[int]], budget: int) -> float:
    options = product(*(zip(*pair, strict=True) for pair in zip(losses, costs, strict=True)))
    return min(sum(loss for loss, _ in choice) for choice in options if sum(cost for _, cost in choice) <= budget)


@settings(max_examples=150, deadline=None)
@given(PROBLEMS)
def test_the_program_finds_what_trying_all_finds(problem: tuple[list[list[tuple[float, int]]], float]) -> None:
    layers, share = problem
    losses = [[loss for loss, _ in options] for options in layers]
    costs = [[cost for _, cost in options] for options in layers]
    smallest, largest = sum(map(min, costs)), sum(map(max, costs))
    budget = smallest + int(share * (largest - smallest))
    indices = allocate(losses, costs, budget)
    assert sum(row[i] for row, i in zip(costs, indices, strict=True)) <= budget
    found = sum(row[i] for row, i in zip(losses, indices, strict=True))
    assert found == pytest.approx(by_trying_all(losses, costs, budget), abs=1e-6)


def test_a_budget_is_never_exceeded_by_the_solvers_tolerance() -> None:
    costs = [[10**12 + 1, 0], [10**12, 0], [1, 0]]
    assert allocate([[0, 1], [0, 1.5], [0, 0.5]], costs, 2 * 10**12) == [1, 0, 0]


def test_a_budget_below_the_cheapest_options_is_refused() -> None:
    with pytest.raises(UsageError, match="budget=6 cannot be reached: the smallest possible is 7"):
        allocate([[0.0, 1.0], [0.0]], [[9, 3], [4]], 6)


class Tied(nn.Module):
    """Two linear layers that share a weight, and two that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.again = nn.Linear(6, 6)
        self.again.weight = self.first.weight
        self.wide = nn.Linear(6, 40)
        self.last = nn.Linear(40, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.wide(self.again(self.first(x).relu()).relu()).relu())


def data() -> tuple[list[tuple[torch.Tensor, torch.Tensor]], list[torch.Tensor]]:
    return [(torch.randn(32, 6), torch.randint(3, (32,))) for _ in range(2)], [torch.randn(32, 6) for _ in range(2)]


def report(*rules: Rule) -> tuple[nn.Module, SensitivityReport]:
    torch.manual_seed(0)
    network = Tied()
    return network, measure_sensitivity(
        network, Recipe(first_layer_bits=None, last_layer_bits=None, rules=list(rules)), *data()
    )


@pytest.mark.parametrize("budget", ["size=30%", "size=600B", "size=100%", "bops=2%", "bops=20k"])
def test_the_network_that_the_recipe_makes_costs_what_was_promised_and_is_within_the_budget(budget: str) -> None:
    network, found = report()
    chosen = assign_bits(found, Budget.parse(budget))
    quantised, _ = quantize_model(network, chosen.recipe)
    assert size(quantised).packed_bytes == chosen.packed_bytes
    assert bit_operations(quantised, torch.randn(1, 6)) == chosen.bit_operations
    assert (chosen.packed_bytes if "size" in budget else chosen.bit_operations) <= chosen.limit


def test_the_bits_of_the_report_arrive_in_the_coverage() -> None:
    network, found = report()
    chosen = assign_bits(found, Budget.parse("size=600B"))
    _, coverage = quantize_model(network, chosen.recipe)
    expected = {
        name: bits
        for c in chosen.chosen
        for name, *bits in zip(c.layers, c.weight_bits, c.activation_bits, strict=True)
    }
    assert {row.name: [row.weight_bits, row.activation_bits] for row in coverage.layers} == expected
    assert len(set(map(tuple, expected.values()))) > 1


def test_layers_that_share_a_weight_get_the_same_bits() -> None:
    _, found = report()
    assert [group[0].layers for group in found.groups] == [("first", "again"), ("wide",), ("last",)]
    for budget in ("size=30%", "size=600B", "bops=2%"):
        rules = {rule.match: rule for rule in assign_bits(found, Budget.parse(budget)).recipe.rules}
        assert rules["first"].weight_bits == rules["again"].weight_bits


def test_what_the_recipe_leaves_in_float_stays_so() -> None:
    network, found = report(Rule("wide", 32, 32), Rule("last", activation_bits=32))
    assert "wide" not in {name for group in found.groups for c in group for name in c.layers}
    _, coverage = quantize_model(network, assign_bits(found, Budget.parse("size=90%")).recipe)
    rows = {row.name: row for row in coverage.layers}
    assert rows["wide"].is_float
    assert (rows["last"].weight_bits < 32, rows["last"].activation_bits) == (True, 32)


def test_a_larger_budget_never_costs_more() -> None:
    _, found = report()
    sums = [assign_bits(found, Budget.parse(f"size={percent}%")).loss_increase for percent in range(30, 101, 2)]
    assert all(more <= less + 1e-9 for less, more in pairwise(sums))
    assert sums[-1] < sums[0]


def test_a_budget_out_of_reach_says_the_smallest_and_that_one_is_reachable() -> None:
    _, found = report()
    with pytest.raises(UsageError, match=r"budget='size=1%' cannot be reached .* the smallest is size=\S+ ") as caught:
        assign_bits(found, Budget.parse("size=1%"))
    smallest = str(caught.value).split("the smallest is ")[1].split(" ")[0]
    assert {c.bits for c in assign_bits(found, Budget.parse(smallest)).chosen} == {"W2A2"}
