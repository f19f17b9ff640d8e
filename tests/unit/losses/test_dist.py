"""DIST against Pearson's correlation computed with loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lqkd.errors import UsageError
from lqkd.losses import DIST


def logits(samples: int = 6, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return tuple(2 * torch.randn(samples, classes, generator=generator, dtype=torch.float64) for _ in range(2))


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1])


def number(loss: DIST, teacher: torch.Tensor, student: torch.Tensor) -> float:
    return loss.reduce(loss(teacher, student)).item()


@pytest.mark.parametrize(("temperature", "beta", "gamma"), [(1.0, 2.0, 2.0), (4.0, 1.0, 0.0), (2.0, 0.0, 3.0)])
def test_dist_is_one_minus_the_correlations_of_rows_and_columns(temperature: float, beta: float, gamma: float) -> None:
    teacher, student = logits()
    p, q = (np.exp(z.numpy() / temperature) for z in (teacher, student))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    inter = sum(1 - pearson(p[i], q[i]) for i in range(6)) / 6
    intra = sum(1 - pearson(p[:, c], q[:, c]) for c in range(5)) / 5
    expected = temperature**2 * (beta * inter + gamma * intra)
    assert number(DIST(temperature, beta, gamma), teacher, student) == pytest.approx(expected, rel=1e-9)


def test_the_map_of_dist_is_elementwise_and_not_negative() -> None:
    divergence = DIST()(*logits())
    assert divergence.shape == (6, 5)
    assert (divergence >= 0).all()
    assert (divergence > 0).any(dim=0).all()


def test_dist_does_not_see_a_positive_affine_map_of_the_probabilities() -> None:
    teacher, student = logits()
    flattened = (0.3 * student.softmax(1) + 0.7 / 5).log()  # probabilities again, so that softmax returns them
    assert number(DIST(), teacher, flattened) == pytest.approx(number(DIST(), teacher, student), rel=1e-9)
    assert number(DIST(), student, flattened) == pytest.approx(0.0, abs=1e-12)


def test_opposite_predictions_of_two_classes_are_at_the_largest_distance() -> None:
    teacher = torch.tensor([[2.0, -1.0], [0.5, 1.0]], dtype=torch.float64)
    assert number(DIST(1.0, 1.0, 0.0), teacher, -teacher) == pytest.approx(2.0)


def test_a_batch_of_one_has_only_the_part_between_classes() -> None:
    teacher, student = logits(samples=1)
    assert number(DIST(gamma=0.0), teacher, student) == pytest.approx(number(DIST(gamma=5.0), teacher, student))


def test_predictions_without_spread_get_no_exploding_gradient() -> None:
    teacher = logits()[0].float()
    student = torch.full((6, 5), 0.1, requires_grad=True)
    loss = DIST()
    loss.reduce(loss(teacher, student)).backward()
    assert student.grad.abs().max() < 1
    assert math.isfinite(student.grad.sum().item())


def test_renaming_the_classes_does_not_change_dist() -> None:
    teacher, student = logits()
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(DIST()(teacher[:, order], student[:, order]), DIST()(teacher, student)[:, order])


@pytest.mark.parametrize("arguments", [{"temperature": 0.0}, {"beta": -1.0}, {"gamma": float("inf")}])
def test_impossible_arguments_of_dist_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=rf"{next(iter(arguments))}=.* must be"):
        DIST(**arguments)
