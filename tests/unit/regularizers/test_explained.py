"""Weights of channels by what held-out rows let the student predict, against numpy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.regularizers import ExplainedVariance


def learned(teacher: Tensor, student: Tensor) -> Tensor:
    """The weights after one time that the networks were asked about all rows."""
    regularizer = ExplainedVariance()
    regularizer.connect("features", teacher.shape[2 if teacher.ndim == 3 else 1])
    regularizer.take(regularizer.counted(teacher, student, torch.arange(len(teacher)) % 2))
    return regularizer(teacher, student).flatten()


@pytest.mark.parametrize("layout", [(5,), (5, 3, 4), (7, 5)])
def test_weights_are_those_of_a_ridge_regression_from_each_half_to_the_other(layout: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    student = 1 + torch.randn(60, *layout, generator=generator)
    teacher = 2 + 2 * student + torch.randn(60, *layout, generator=generator)
    ours = learned(teacher, student)

    def of_half(x: Tensor, half: int) -> np.ndarray:
        rows = x.double().numpy()[half::2]
        channels_last = rows if len(layout) < 3 else np.moveaxis(rows, 1, -1)
        return channels_last.reshape(-1, 5)

    wrong, total = np.zeros(5), np.zeros(5)
    for fitted, judged in ((0, 1), (1, 0)):
        s, t = of_half(student, fitted), of_half(teacher, fitted)
        mean, spread = s.mean(0), s.std(0)
        z = (s - mean) / spread
        slopes = np.linalg.solve(z.T @ z + 5 * np.eye(5), z.T @ (t - t.mean(0)))
        said = (of_half(student, judged) - mean) / spread @ slopes + t.mean(0)
        wrong += ((of_half(teacher, judged) - said) ** 2).sum(0)
        total += ((of_half(teacher, judged) - of_half(teacher, judged).mean(0)) ** 2).sum(0)
    np.testing.assert_allclose(ours.numpy(), (1 - wrong / total).clip(0, 1), atol=1e-4)
    assert float(ours.min()) > 0


def test_noise_and_what_is_dead_get_nothing_even_with_few_rows_and_many_channels() -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(128, 32, generator=generator)
    mixed = student @ torch.randn(32, 32, generator=generator)
    teacher = torch.where(torch.arange(32) < 16, mixed, 50 * torch.randn(128, 32, generator=generator))
    teacher[:, 30:] = torch.tensor([3.0, 0.0])
    weights = learned(teacher, student)
    assert float(weights[:16].min()) > 0.5
    assert float(weights[16:].max()) < 0.05
    assert weights[30:].tolist() == [0, 0]


def test_a_student_that_becomes_able_to_predict_a_channel_gets_it_within_a_few_times() -> None:
    regularizer = ExplainedVariance()
    regularizer.connect("features", 2)
    generator = torch.Generator().manual_seed(0)
    found = []
    for able in (0.0, *[1.0] * 6):
        teacher, noise = torch.randn(2, 64, 2, generator=generator)
        student = able * teacher + (1 - able) * noise
        regularizer.take(regularizer.counted(teacher, student, torch.arange(64) % 2))
        found.append(float(regularizer(teacher, student).mean()))
    assert found[0] < 0.05
    assert found == sorted(found)
    assert found[-1] > 0.85


@pytest.mark.parametrize("settings", [{"rows": 0}, {"every": 1.5}])
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="of ExplainedVariance is not possible: it must be a whole number"):
        ExplainedVariance(**settings)


@pytest.mark.parametrize("side", [8, 32, 64, 100])
def test_positions_that_are_looked_at_are_spread_over_both_sides_of_a_map(side: int) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(64, 2, side, side), torch.randn(64, 2, side, side)
    teacher[:, 0, :, 0] = student[:, 0, :, 0]  # the edge alone, and all but the edge
    teacher[:, 1, :, 1:] = student[:, 1, :, 1:]
    regularizer = ExplainedVariance()
    regularizer.connect("features", channels=2)
    regularizer.take(regularizer.counted(teacher, student, torch.arange(64) % 2))
    edge, inside = regularizer.explained.tolist()
    assert edge < 0.2
    assert inside > 0.6


def test_sums_are_the_same_under_autocast_and_far_from_zero() -> None:
    torch.manual_seed(0)
    student, halves = torch.randn(400, 2), torch.arange(400) % 2
    teacher = torch.stack([student.sum(1) + torch.randn(400), torch.randn(400)], 1) + 1000
    regularizer = ExplainedVariance()
    regularizer.connect("features", channels=2)
    sums = regularizer.counted(teacher, student, halves)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(regularizer.counted(teacher, student, halves), sums)
    regularizer.take(sums)
    assert 0.5 < float(regularizer.explained[0]) < 0.75
    assert float(regularizer.explained[1]) < 0.1
    before = regularizer.explained.clone()
    regularizer.take(sums * float("nan"))  # a batch that is not finite is none
    assert torch.equal(regularizer.explained, before)
    assert regularizer.counts.isfinite().all()
