"""A temperature that plays against the student, held against the formula in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lqkd.errors import UsageError
from lqkd.losses import CurriculumTemperature, HintonKL
from lqkd.modules.optimizers import student_groups


def logits(seed: int) -> torch.Tensor:
    """Sure of one of five classes each, the teacher of another than the student."""
    drawn = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return 6 * torch.eye(5, dtype=torch.float64)[(torch.arange(6) + seed) % 5] + drawn


def loss_at(tau: float) -> float:
    """tau^2 KL(p_T || p_S), eq. 1, by its definition."""
    p, q = (x.div(tau).exp() / x.div(tau).exp().sum(1, keepdim=True) for x in (logits(0), logits(1)))
    return float(tau**2 * (p * (p / q).log()).sum(1).mean())


@pytest.mark.parametrize(("progress", "strength"), [(0.0, 0.0), (0.05, 0.5), (0.1, 1.0), (0.7, 1.0)])
def test_the_temperature_ascends_what_the_student_descends_by_a_strength_that_grows_as_a_cosine(
    progress: float, strength: float
) -> None:
    loss = CurriculumTemperature(start=4.0, ramp=0.1)
    loss.progress = progress
    student = logits(1).requires_grad_()
    value = loss.reduce(loss(logits(0), student))
    value.backward()
    assert value.item() == pytest.approx(loss_at(4.0), rel=1e-5)

    theta, step = math.log(3 / 17), 1e-5
    of = [loss_at(1 + 20 / (1 + math.exp(-theta - sign * step))) for sign in (1, -1)]
    assert float(loss.theta.grad) == pytest.approx(-strength * (of[0] - of[1]) / (2 * step), rel=1e-3, abs=1e-9)

    other = logits(1).requires_grad_()
    fixed = HintonKL(temperature=4.0)
    fixed.reduce(fixed(logits(0), other)).backward()
    torch.testing.assert_close(student.grad, other.grad, rtol=1e-5, atol=1e-7)


def test_against_the_student_it_comes_to_the_temperature_with_the_largest_loss_within_its_bounds() -> None:
    loss = CurriculumTemperature(start=4.0, ramp=0.0)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        loss.reduce(loss(logits(0), logits(1))).backward()
        optimizer.step()
    found = float(loss.learned()["temperature"])
    best = max((1.0 + 0.05 * n for n in range(401)), key=loss_at)
    assert 1.5 < best < 10  # it is no bound
    assert found == pytest.approx(best, rel=0.05)


def test_it_learns_by_the_students_optimizer_in_a_group_of_its_own() -> None:
    loss, student = CurriculumTemperature(), nn.Linear(2, 2)
    groups = {group["name"]: group for group in student_groups(student, nn.ModuleList([loss]))}
    assert groups.keys() == {"student", "temperatures"}
    assert groups["temperatures"]["params"] == [loss.theta]
    assert groups["temperatures"]["weight_decay"] == 0.0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"start": 21.0}, r"start=21.0 is not possible: it must be between 1.0 and 21.0"),
        ({"lowest": 0.0}, r"lowest=0.0 is not possible"),
        ({"ramp": 1.5}, r"ramp=1.5 is not possible: it must be >= 0 and <= 1"),
    ],
)
def test_bounds_that_cannot_be_are_refused(arguments: dict[str, float], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        CurriculumTemperature(**arguments)
