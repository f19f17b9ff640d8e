"""Relational distillation against distances and angles computed with loops."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch

from lqkd.errors import UsageError
from lqkd.losses import RKD


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def huber(a: float, b: float) -> float:
    return (a - b) ** 2 / 2 if abs(a - b) <= 1 else abs(a - b) - 0.5


def distances(rows: list[list[float]]) -> dict[tuple[int, ...], float]:
    raw = {(i, j): math.dist(rows[i], rows[j]) for i, j in permutations(range(len(rows)), 2)}
    mean = sum(raw.values()) / len(raw)
    return {pair: value / mean for pair, value in raw.items()}


def angles(rows: list[list[float]]) -> dict[tuple[int, ...], float]:
    """Cosine at j for (i, j, k)."""
    cosines = {}
    for i, j, k in permutations(range(len(rows)), 3):
        a, b = ([p - q for p, q in zip(rows[end], rows[j], strict=True)] for end in (i, k))
        cosines[i, j, k] = sum(p * q for p, q in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))
    return cosines


def averaged(of: object, teacher: torch.Tensor, student: torch.Tensor) -> float:
    t, s = of(teacher.tolist()), of(student.tolist())
    return sum(huber(t[key], s[key]) for key in t) / len(t)


@pytest.mark.parametrize(("distance", "angle"), [(25.0, 50.0), (1.0, 0.0), (0.0, 1.0)])
def test_rkd_is_the_huber_loss_of_relative_distances_and_angles(distance: float, angle: float) -> None:
    teacher, student = features(5, 4), features(5, 3, seed=1) ** 3  # cubed: some Huber arguments exceed 1
    expected = distance * averaged(distances, teacher, student) + angle * averaged(angles, teacher, student)
    loss = RKD(distance, angle)
    divergence = loss(teacher, student)
    assert divergence.shape == (5,)
    assert loss.reduce(divergence).item() == pytest.approx(expected, rel=1e-9)


def test_an_element_of_the_map_is_what_its_sample_contributes() -> None:
    teacher, student = features(4, 3), features(4, 3, seed=1)
    d_t, d_s = distances(teacher.tolist()), distances(student.tolist())
    a_t, a_s = angles(teacher.tolist()), angles(student.tolist())
    for j, element in enumerate(RKD(2.0, 3.0)(teacher, student)):
        expected = 2 * sum(huber(d_t[i, m], d_s[i, m]) for i, m in d_t if i == j) / 3
        expected += 3 * sum(huber(a_t[key], a_s[key]) for key in a_t if key[1] == j) / 6
        assert element.item() == pytest.approx(expected)


def test_moving_rotating_and_scaling_all_features_changes_nothing() -> None:
    teacher, student = features(5, 4), features(5, 4, seed=1)
    rotation = torch.linalg.qr(features(4, 4, seed=2))[0]
    loss = RKD()
    torch.testing.assert_close(loss(teacher, 1e3 * student @ rotation + 7), loss(teacher, student))
    torch.testing.assert_close(loss(teacher, 1e200 * student), loss(teacher, student))


@pytest.mark.parametrize("shape", [(5, 4, 2, 3), (5, 6, 4)])
def test_maps_and_tokens_are_averaged(shape: tuple[int, ...]) -> None:
    teacher, student = features(*shape), features(5, 3, seed=1)
    mean = teacher.flatten(2).mean(2) if len(shape) == 4 else teacher.mean(1)
    torch.testing.assert_close(RKD()(teacher, student), RKD()(mean, student))


def test_samples_that_coincide_only_in_the_student_get_no_exploding_gradient() -> None:
    teacher, student = features(5, 4), features(5, 4, seed=1)
    student[1] = student[0]
    student.requires_grad_()
    loss = RKD()
    loss.reduce(loss(teacher, student)).backward()
    assert student.grad.isfinite().all()
    assert student.grad.abs().max() < 1e3


def test_where_samples_coincide_the_angle_at_them_has_cosine_zero() -> None:
    teacher, student = features(4, 3), features(4, 3, seed=1)
    student[1] = student[0]
    t, s = angles(teacher.tolist()), {}
    for i, j, k in permutations(range(4), 3):
        known = {i, j} != {0, 1} and {k, j} != {0, 1}
        a, b = student[i] - student[j], student[k] - student[j]
        s[i, j, k] = (a @ b / (a.norm() * b.norm())).item() if known else 0.0
    loss = RKD(0.0, 1.0)
    expected = sum(huber(t[key], s[key]) for key in t) / len(t)
    assert loss.reduce(loss(teacher, student)).item() == pytest.approx(expected)


def test_a_batch_of_two_has_distances_but_no_angles() -> None:
    teacher, student = features(2, 4), features(2, 4, seed=1)
    torch.testing.assert_close(RKD(1.0, 5.0)(teacher, student), torch.zeros(2, dtype=torch.float64))


def test_the_order_of_the_samples_does_not_count() -> None:
    teacher, student = features(5, 4), features(5, 4, seed=1)
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(RKD()(teacher[order], student[order]), RKD()(teacher, student)[order])


@pytest.mark.parametrize("arguments", [{"distance": -1.0}, {"angle": float("nan")}])
def test_impossible_weights_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=rf"{next(iter(arguments))}=.* must be 0 or a positive number"):
        RKD(**arguments)


def test_no_weight_at_all_is_refused() -> None:
    with pytest.raises(UsageError, match="distance and angle cannot all be 0"):
        RKD(0.0, 0.0)


def test_features_of_another_layout_are_refused() -> None:
    with pytest.raises(UsageError, match="RKD cannot compare features of shape"):
        RKD()(features(2, 3, 4, 4, 4), features(2, 3))
