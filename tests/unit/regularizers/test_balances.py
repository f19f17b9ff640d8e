"""Balances against their closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from lqkd.errors import UsageError
from lqkd.regularizers import BoundedUncertaintyBalance, FixedBalance


def losses(task: float, distill: float) -> dict[str, torch.Tensor]:
    return {"task": torch.tensor(task), "distill": torch.tensor(distill)}


def test_fixed_balance_is_the_weighted_sum() -> None:
    total, weights = FixedBalance(task=0.5, distill=3.0)(losses(2.0, 1.0))
    assert total.item() == 4.0
    assert {name: weight.item() for name, weight in weights.items()} == {"task": 0.5, "distill": 3.0}


def test_bounded_uncertainty_starts_with_weight_one_half_each() -> None:
    total, weights = BoundedUncertaintyBalance()(losses(2.0, 1.0))
    assert total.item() == pytest.approx(2.0 / 2 + 1.0 / 2 + 2 * math.log(2))
    assert [weight.item() for weight in weights.values()] == [0.5, 0.5]


@pytest.mark.parametrize(("loss", "weight"), [(0.3, 1.065), (1.0, 0.5), (3.0, 0.229), (30.0, 0.0314)])
def test_bounded_uncertainty_converges_to_its_closed_form(loss: float, weight: float) -> None:
    """``c**2 = (L + sqrt(L**2 + 8 L)) / 4``, so the weight is ``1 / (2 c**2)``: minimising L/(2c^2) + log(1 + c^2)."""
    assert 0.5 / ((loss + math.sqrt(loss**2 + 8 * loss)) / 4) == pytest.approx(weight, rel=1e-2)
    balance = BoundedUncertaintyBalance()
    optimizer = torch.optim.Adam(balance.parameters(), lr=0.1)
    for _ in range(400):
        optimizer.zero_grad()
        balance(losses(loss, 1.0))[0].backward()
        optimizer.step()
    assert balance(losses(loss, 1.0))[1]["task"].item() == pytest.approx(weight, rel=1e-2)


def test_bounded_uncertainty_stays_within_its_bounds_when_a_loss_vanishes() -> None:
    balance = BoundedUncertaintyBalance(maximum=5.0)
    with torch.no_grad():
        balance.distill.fill_(-100.0)
    assert balance.scalars()["distill"].item() == pytest.approx(1 / 5.0)


@pytest.mark.parametrize("arguments", [{"task": -1.0}, {"distill": float("nan")}, {"task": 0.0, "distill": 0.0}])
def test_impossible_weights_are_refused(arguments: dict) -> None:
    with pytest.raises(UsageError, match="balance"):
        FixedBalance(**arguments)
