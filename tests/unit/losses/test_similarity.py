"""Similarity-preserving distillation against similarities computed with loops."""

from __future__ import annotations

import math

import pytest
import torch

from lqkd.losses import SimilarityPreserving


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def similarities(x: torch.Tensor) -> list[list[float]]:
    rows = x.flatten(1).tolist()
    gram = [[sum(a * b for a, b in zip(i, j, strict=True)) for j in rows] for i in rows]
    return [[value / math.sqrt(sum(v * v for v in row)) for value in row] for row in gram]


@pytest.mark.parametrize("student_shape", [(4, 6), (4, 5, 3), (4, 2, 3, 3)])
def test_it_is_the_squared_frobenius_distance_of_similarities_over_the_batch_squared(
    student_shape: tuple[int, ...],
) -> None:
    teacher, student = features(4, 3, 2, 2), features(*student_shape, seed=1)
    loss = SimilarityPreserving()
    rows = [
        sum((a - b) ** 2 for a, b in zip(t, s, strict=True)) / 4
        for t, s in zip(similarities(teacher), similarities(student), strict=True)
    ]
    torch.testing.assert_close(loss(teacher, student), torch.tensor(rows, dtype=torch.float64))
    assert loss.reduce(loss(teacher, student)).item() == pytest.approx(sum(rows) / 4)


def test_rotating_and_scaling_the_features_changes_nothing() -> None:
    teacher, student = features(5, 4), features(5, 4, seed=1)
    rotation = torch.linalg.qr(features(4, 4, seed=2))[0]
    loss = SimilarityPreserving()
    torch.testing.assert_close(loss(teacher, 1e20 * student @ rotation), loss(teacher, student))


def test_a_shift_of_all_features_does_change_it() -> None:
    teacher, student = features(5, 4), features(5, 4, seed=1)
    loss = SimilarityPreserving()
    assert not torch.allclose(loss(teacher, student + 3), loss(teacher, student), rtol=0.1)


def test_the_order_of_the_samples_does_not_count() -> None:
    teacher, student = features(5, 4), features(5, 4, seed=1)
    order = torch.tensor([3, 1, 4, 0, 2])
    loss = SimilarityPreserving()
    torch.testing.assert_close(loss(teacher[order], student[order]), loss(teacher, student)[order])
