"""Balances over more than two losses, against computations of their own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lqkd.balances import (
    Balance,
    FixedBalance,
    LearnableRatioBalance,
    OutputGradientBalance,
    OutputGradNorm,
    ScheduledBalance,
    UncertaintyBalance,
)
from lqkd.errors import UsageError
from tests.unit.balances.test_balances import ALL

NAMES = ("task", "logits", "features", "relations")


def over_four(balance: Balance) -> Balance:
    balance.connect(NAMES)
    return balance


def losses_at(output: Tensor, sizes: tuple[float, ...] = (2.0, 1.0, 0.5, 8.0)) -> dict[str, Tensor]:
    """Losses of these values whose gradients at the logits ``output``, all ones, are in these ratios."""
    return {name: size * output.square().mean() for name, size in zip(NAMES, sizes, strict=True)}


@pytest.mark.parametrize("kind", ALL)
def test_the_student_gets_the_gradient_of_every_loss_times_its_weight(kind: type[Balance]) -> None:
    student = torch.tensor([1.5, -0.5, 2.0], requires_grad=True)
    output = student * torch.ones(4, 1)
    parts = dict(
        zip(NAMES, (output.square().mean(), output.exp().mean(), output.mean(), output.abs().mean()), strict=True)
    )
    gradients = [torch.autograd.grad(part, student, retain_graph=True)[0] for part in parts.values()]
    total, weights = over_four(kind(teacher_share=0.9))(parts, output)
    total.backward()
    assert tuple(weights) == NAMES
    expected = sum(weight * gradient for weight, gradient in zip(weights.values(), gradients, strict=True))
    torch.testing.assert_close(student.grad, expected)


@pytest.mark.parametrize("kind", ALL)
def test_teachers_lead_with_their_share_of_the_sum_and_keep_the_ratios_among_them(kind: type[Balance]) -> None:
    limits = {"start": 0.25, "end": 0.25} if kind is ScheduledBalance else {}
    output = torch.ones(4, 3, requires_grad=True)
    _, free = over_four(kind(**limits))(losses_at(output), output)
    _, led = over_four(kind(teacher_share=0.9, **limits))(losses_at(output), output)
    own, others = [[weights[name].item() for name in NAMES] for weights in (free, led)]
    assert sum(others) == pytest.approx(sum(own), rel=1e-5)
    assert sum(others[1:]) / sum(others) == pytest.approx(0.9, rel=1e-5)
    for k in (2, 3):
        assert others[k] / others[1] == pytest.approx(own[k] / own[1], rel=1e-5)


def test_every_loss_gets_an_equal_part_of_the_gradient_that_distillation_has_at_the_logits() -> None:
    balance = over_four(OutputGradientBalance(ratio=0.6, momentum=0.0))
    output = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    sizes = (2.0, 1.0, 0.5, 8.0)
    _, weights = balance(losses_at(output, sizes), output)
    parts = [weights[name].item() * size for name, size in zip(NAMES, sizes, strict=True)]
    assert sum(weight.item() for weight in weights.values()) == pytest.approx(1.0, rel=1e-5)
    for part in parts[1:]:
        assert part == pytest.approx(0.6 / 3 * parts[0], rel=1e-5)


def test_each_ratio_is_learned_from_the_angle_of_its_own_loss() -> None:
    balance = over_four(LearnableRatioBalance(ratio=1.0, span=2.0, momentum=0.0))
    output = torch.ones(4, 3, requires_grad=True)
    losses = losses_at(output)
    losses["features"] = -losses["features"] + 10  # opposes the task
    optimizer = torch.optim.SGD(balance.parameters(), lr=0.5)
    for _ in range(50):
        total, _ = balance(losses, output)
        total.backward(retain_graph=True)
        optimizer.step()
        optimizer.zero_grad()
    learned = balance.learned()
    assert learned["ratio/logits"].item() == pytest.approx(2.0, rel=1e-3)
    assert learned["ratio/features"].item() == pytest.approx(0.5, rel=1e-3)


def test_gradnorm_follows_its_formula_in_float64() -> None:
    balance = over_four(OutputGradNorm(alpha=1.5)).double()
    output = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    first, second = (2.0, 1.0, 0.5, 8.0), (1.0, 0.9, 0.1, 6.0)
    balance(losses_at(output, first), output)
    with torch.no_grad():
        balance.v.copy_(torch.tensor([0.1, -0.2, 0.3, -0.2], dtype=torch.float64))
    losses = losses_at(output, second)
    total, weights = balance(losses, output)
    w = 4 * torch.tensor([0.1, -0.2, 0.3, -0.2], dtype=torch.float64).softmax(0)
    norm_of_one = 2 / 3 * math.sqrt(3)  # of the mean square of three ones, for each sample
    norms = w * torch.tensor(second, dtype=torch.float64) * norm_of_one
    rates = torch.tensor(second, dtype=torch.float64) / torch.tensor(first, dtype=torch.float64)
    term = (norms - norms.mean() * (rates / rates.mean()) ** 1.5).abs().sum()
    plain = sum(weights[name] * losses[name] for name in NAMES)
    assert (total - plain).item() == pytest.approx(term.item(), rel=1e-5)


def test_the_scalars_of_uncertainty_find_one_over_twice_each_loss() -> None:
    balance = over_four(UncertaintyBalance())
    optimizer = torch.optim.Adam(balance.parameters(), lr=0.05)
    values = {name: torch.tensor(size) for name, size in zip(NAMES, (2.0, 1.0, 0.5, 8.0), strict=True)}
    for _ in range(2000):
        total, weights = balance(values)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    for name, value in values.items():
        assert weights[name].item() * value.item() == pytest.approx(0.5, rel=1e-2)


def test_fixed_weights_are_given_by_name_and_the_others_get_that_of_distillation() -> None:
    balance = over_four(FixedBalance(task=0.5, distill=2.0, terms={"features": 33.0}))
    _, weights = balance({name: torch.tensor(1.0) for name in NAMES})
    assert {name: weight.item() for name, weight in weights.items()} == {
        "task": 0.5,
        "logits": 2.0,
        "features": 33.0,
        "relations": 2.0,
    }


def test_a_fixed_weight_of_an_unknown_loss_is_refused_with_the_names_that_there_are() -> None:
    with pytest.raises(
        UsageError, match=r"terms\.feature is the weight of no .*: there are logits, features, relations"
    ):
        over_four(FixedBalance(terms={"feature": 1.0}))


def test_connecting_two_losses_keeps_the_parameters_that_an_optimizer_may_have() -> None:
    balance = UncertaintyBalance()
    before = balance.scalars
    balance.connect(("task", "logits"))
    assert balance.scalars is before
    _, weights = balance({"task": torch.tensor(1.0), "logits": torch.tensor(1.0)})
    assert tuple(weights) == ("task", "logits")
