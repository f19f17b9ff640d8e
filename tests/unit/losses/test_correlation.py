"""Correlation congruence against kernels computed with loops."""

from __future__ import annotations

import math

import pytest
import torch

from lqkd.errors import UsageError
from lqkd.losses import CorrelationCongruence


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def directions(x: torch.Tensor) -> list[list[float]]:
    return [[value / math.hypot(*row) for value in row] for row in x.tolist()]


def gaussian(a: list[float], b: list[float]) -> float:
    return math.exp(-0.7 * math.dist(a, b) ** 2)


def bilinear(a: list[float], b: list[float]) -> float:
    return sum(p * q for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("kernel", [gaussian, bilinear])
def test_it_is_the_squared_frobenius_distance_of_kernels_over_the_batch_squared(kernel: object) -> None:
    teacher, student = features(5, 4), features(5, 3, seed=1)
    t, s = directions(teacher), directions(student)
    rows = [sum((kernel(t[i], t[j]) - kernel(s[i], s[j])) ** 2 for j in range(5)) / 5 for i in range(5)]
    loss = CorrelationCongruence(kernel.__name__, gamma=0.7)
    divergence = loss(teacher, student)
    torch.testing.assert_close(divergence, torch.tensor(rows, dtype=torch.float64))
    assert loss.reduce(divergence).item() == pytest.approx(sum(rows) / 5)


@pytest.mark.parametrize("kernel", ["gaussian", "bilinear"])
def test_rotating_all_and_scaling_each_vector_changes_nothing(kernel: str) -> None:
    teacher, student = features(5, 4), features(5, 4, seed=1)
    rotation = torch.linalg.qr(features(4, 4, seed=2))[0]
    factors = torch.tensor([[1e-20], [0.1], [1.0], [10.0], [1e20]], dtype=torch.float64)
    loss = CorrelationCongruence(kernel)
    torch.testing.assert_close(loss(teacher, factors * student @ rotation), loss(teacher, student))


def test_a_shift_of_all_vectors_does_change_it() -> None:
    teacher, student = features(5, 4), features(5, 4, seed=1)
    loss = CorrelationCongruence()
    assert not torch.allclose(loss(teacher, student + 3), loss(teacher, student), rtol=0.1)


@pytest.mark.parametrize("shape", [(5, 4, 2, 3), (5, 6, 4)])
def test_maps_and_tokens_are_averaged(shape: tuple[int, ...]) -> None:
    teacher, student = features(*shape), features(5, 3, seed=1)
    mean = teacher.flatten(2).mean(2) if len(shape) == 4 else teacher.mean(1)
    loss = CorrelationCongruence()
    torch.testing.assert_close(loss(teacher, student), loss(mean, student))


def test_an_unknown_kernel_is_refused() -> None:
    with pytest.raises(UsageError, match="kernel='laplace' is not possible: use gaussian or bilinear"):
        CorrelationCongruence("laplace")


def test_an_impossible_gamma_is_refused() -> None:
    with pytest.raises(UsageError, match=r"gamma=-1.0 is not possible: it must be a positive number"):
        CorrelationCongruence(gamma=-1.0)
