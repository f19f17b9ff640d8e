"""Variational information distillation against a Gaussian likelihood."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lqkd.errors import UsageError
from lqkd.losses import VID


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def connected(teacher: torch.Tensor, student: torch.Tensor, **arguments: float) -> VID:
    loss = VID(**arguments)
    loss.connect([teacher.shape], [student.shape])
    return loss.double()


def test_vid_is_the_gaussian_log_likelihood_counted_from_its_bound() -> None:
    teacher, student = features(3, 4, 2, 2), features(3, 2, 2, 2, seed=1)
    loss = connected(teacher, student)
    nn.init.normal_(loss.raw_variance)
    predicted = loss.mean(student)
    divergence = loss(teacher, student)
    for b in range(3):
        for c in range(4):
            variance = math.log(1 + math.exp(loss.raw_variance[c].item())) + 1e-5
            gaussian = torch.distributions.Normal(predicted[b, c], math.sqrt(variance))
            bound = 0.5 * math.log(2 * math.pi * 1e-5)
            torch.testing.assert_close(divergence[b, c], -gaussian.log_prob(teacher[b, c]) - bound)
    torch.testing.assert_close(loss.reduce(divergence), divergence.sum() / 48)


def test_a_variance_below_one_does_not_make_the_map_negative() -> None:
    teacher, student = features(3, 4, 2, 2), features(3, 2, 2, 2, seed=1)
    loss = connected(teacher, student)
    for raw in (-100.0, -5.0, 100.0):
        nn.init.constant_(loss.raw_variance, raw)
        assert (loss(loss.mean(student), student) >= 0).all()


def test_the_variance_starts_as_told() -> None:
    loss = connected(features(3, 4), features(3, 2), initial_variance=0.25)
    torch.testing.assert_close(loss.variance(), torch.full((4,), 0.25, dtype=torch.float64), rtol=1e-6, atol=0)


def test_the_variance_is_learned_to_be_the_mean_squared_residual_of_each_channel() -> None:
    teacher, student = features(64, 4) * torch.tensor([0.5, 1.0, 2.0, 3.0]), features(64, 2, seed=1)
    loss = connected(teacher, student, initial_variance=1.0)
    optimizer = torch.optim.Adam([loss.raw_variance], lr=0.3)
    for _ in range(500):
        optimizer.zero_grad()
        loss.reduce(loss(teacher, student)).backward()
        optimizer.step()
    residual = (teacher - loss.mean(student)).square().mean(0)
    torch.testing.assert_close(loss.variance(), residual, rtol=1e-2, atol=0)


@pytest.mark.parametrize(("teacher", "student"), [((3, 6, 4), (3, 6, 2)), ((3, 4, 2, 2), (3, 2, 4, 4))])
def test_the_map_has_the_shape_of_the_pair(teacher: tuple[int, ...], student: tuple[int, ...]) -> None:
    t, s = features(*teacher), features(*student, seed=1)
    loss = connected(t, s)
    assert loss(t, s).shape == loss.pair(t, s)[0].shape == loss.pair(t, s)[1].shape == teacher


def test_vid_needs_connect() -> None:
    with pytest.raises(UsageError, match="VID has no layers yet"):
        VID()(features(3, 4), features(3, 4))


@pytest.mark.parametrize(
    "arguments", [{"initial_variance": 0.0}, {"minimum_variance": -1.0}, {"initial_variance": 1e-6}]
)
def test_impossible_variances_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=rf"{next(iter(arguments))}=.* must be"):
        VID(**arguments)
