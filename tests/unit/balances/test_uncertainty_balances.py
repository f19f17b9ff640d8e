"""Two trainable scalars against the closed forms of their optimum."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lqkd.balances import Balance, BoundedUncertaintyBalance, ImpartialBalance, UncertaintyBalance

KINDS = [BoundedUncertaintyBalance, ImpartialBalance, UncertaintyBalance]
OPTIMA: dict[type[Balance], Callable[[float], float]] = {
    UncertaintyBalance: lambda loss: 1 / (2 * loss),
    ImpartialBalance: lambda loss: 1 / loss,
    BoundedUncertaintyBalance: lambda loss: 0.5 / ((loss + math.sqrt(loss**2 + 8 * loss)) / 4),
}


def losses(task: float, distill: float) -> dict[str, Tensor]:
    return {"task": torch.tensor(task), "distill": torch.tensor(distill)}


def trained(balance: Balance, task: float, distill: float, steps: int = 400) -> tuple[float, float]:
    """The weights after training the scalars alone on constant losses."""
    optimizer = torch.optim.Adam(balance.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        balance(losses(task, distill))[0].backward()
        optimizer.step()
    weights = balance(losses(task, distill))[1]
    return weights["task"].item(), weights["distill"].item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("task", "distill"), [(0.3, 30.0), (1.0, 3.0), (5.0, 0.02)])
def test_the_scalars_converge_to_their_closed_form(kind: type[Balance], task: float, distill: float) -> None:
    weights = trained(kind(), task, distill)
    assert weights == pytest.approx((OPTIMA[kind](task), OPTIMA[kind](distill)), rel=1e-2)


@pytest.mark.parametrize(
    ("kind", "start", "constant"),
    [
        (UncertaintyBalance, 0.5, 0.0),
        (ImpartialBalance, 1.0, 0.0),
        (BoundedUncertaintyBalance, 0.5, 2 * math.log(2)),
    ],
)
def test_the_total_at_the_start_is_the_published_loss(kind: type[Balance], start: float, constant: float) -> None:
    total, weights = kind()(losses(2.0, 1.0))
    assert [weight.item() for weight in weights.values()] == [start, start]
    assert total.item() == pytest.approx(start * 2.0 + start * 1.0 + constant)


@pytest.mark.parametrize(
    ("kind", "published"),
    [
        (UncertaintyBalance, lambda s, loss: loss * torch.exp(-s) / 2 + s / 2),
        (ImpartialBalance, lambda s, loss: loss * torch.exp(s) - s),
        (BoundedUncertaintyBalance, lambda s, loss: loss / (2 * torch.exp(2 * s)) + torch.log(1 + torch.exp(2 * s))),
    ],
)
def test_value_and_gradient_are_those_of_the_published_loss(kind: type[Balance], published: Callable) -> None:
    balance = kind()
    scalars = torch.tensor([0.7, -0.4])
    with torch.no_grad():
        balance.scalars.copy_(scalars)
    total, _ = balance(losses(1.7, 0.2))
    total.backward()
    exact = scalars.double().requires_grad_()
    expected = published(exact, torch.tensor([1.7, 0.2], dtype=torch.float64)).sum()
    expected.backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(balance.scalars.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_stay_within_their_bounds_at_losses_that_vanish_or_explode(kind: type[Balance]) -> None:
    balance = kind(minimum=0.05, maximum=4.0)
    weights = trained(balance, 1e-12, 1e12)
    assert weights == pytest.approx((4.0, 0.05), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_scalar_comes_back_from_its_bound_as_soon_as_the_loss_does(kind: type[Balance]) -> None:
    balance = kind(minimum=0.05, maximum=4.0)
    optimizer = torch.optim.Adam(balance.parameters(), lr=0.1)
    for step in range(1030):
        loss = 1e-12 if step < 1000 else 1.0
        optimizer.zero_grad()
        balance(losses(loss, loss))[0].backward()
        optimizer.step()
    assert balance(losses(1.0, 1.0))[1]["task"].item() < 3.0


@pytest.mark.parametrize("kind", KINDS)
def test_the_scalars_learn_while_the_teacher_leads(kind: type[Balance]) -> None:
    balance = kind(teacher_share=0.9, hold=0.5, release=0.8)
    held = trained(balance, 2.0, 8.0)
    assert held[1] / sum(held) == pytest.approx(0.9)
    balance.progress = 1.0
    free = balance(losses(2.0, 8.0))[1]
    assert free["distill"].item() == pytest.approx(OPTIMA[kind](8.0), rel=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_one_exploding_loss_does_not_stop_a_scalar(kind: type[Balance]) -> None:
    balance = kind()
    optimizer = torch.optim.Adam(balance.parameters(), lr=0.01)
    for step in range(1500):
        optimizer.zero_grad()
        balance(losses(1e30 if step == 5 else 0.2, 1.0))[0].backward()
        optimizer.step()
    assert balance(losses(0.2, 1.0))[1]["task"].item() == pytest.approx(OPTIMA[kind](0.2), rel=2e-2)
