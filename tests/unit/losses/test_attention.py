"""Attention transfer against attention maps computed with loops."""

from __future__ import annotations

import math

import pytest
import torch

from lqkd.errors import UsageError
from lqkd.losses import AttentionTransfer


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attention(positions: list[list[float]], exponent: float) -> list[float]:
    """From the channels at each position of one sample."""
    strengths = [sum(abs(value) ** exponent for value in channels) / len(channels) for channels in positions]
    length = math.sqrt(sum(strength**2 for strength in strengths))
    return [strength / length for strength in strengths]


@pytest.mark.parametrize("exponent", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("tokens", [False, True])
def test_attention_transfer_is_the_squared_difference_of_unit_attention_maps(exponent: float, tokens: bool) -> None:
    teacher, student = features(2, 12, 5), features(2, 12, 3, seed=1)  # of tokens: (B, N, C)
    loss = AttentionTransfer(exponent)
    as_taps = [x if tokens else x.transpose(1, 2).unflatten(2, (3, 4)) for x in (teacher, student)]
    divergence = loss(*as_taps)
    assert divergence.shape == ((2, 12, 1) if tokens else (2, 1, 3, 4))
    expected = [
        [(a - b) ** 2 for a, b in zip(attention(t, exponent), attention(s, exponent), strict=True)]
        for t, s in zip(teacher.tolist(), student.tolist(), strict=True)
    ]
    torch.testing.assert_close(divergence.flatten(1), torch.tensor(expected, dtype=torch.float64))
    assert loss.reduce(divergence).item() == pytest.approx(sum(map(sum, expected)) / 24)


def test_the_scale_of_a_samples_features_does_not_count() -> None:
    teacher, student = features(2, 5, 3, 4), features(2, 3, 3, 4, seed=1)
    loss = AttentionTransfer()
    factors = torch.tensor([1e-20, 1e20], dtype=torch.float64).view(2, 1, 1, 1)
    torch.testing.assert_close(loss(teacher, factors * student), loss(teacher, student))


def test_the_gradient_is_that_of_the_plain_formula() -> None:
    teacher, student = features(2, 5, 3, 4), features(2, 3, 3, 4, seed=1)
    ours, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
    loss = AttentionTransfer()
    loss.reduce(loss(teacher, ours)).backward()
    a, b = (x.square().mean(1).flatten(1) for x in (teacher, theirs))
    (a / a.norm(dim=1, keepdim=True) - b / b.norm(dim=1, keepdim=True)).square().mean().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_the_pair_is_what_the_map_compares() -> None:
    teacher, student = features(2, 5, 3, 4), features(2, 3, 6, 8, seed=1)
    loss = AttentionTransfer()
    a, b = loss.pair(teacher, student)
    torch.testing.assert_close((a - b).square(), loss(teacher, student))
    torch.testing.assert_close(a.square().sum((1, 2, 3)), torch.ones(2, dtype=torch.float64))


def test_a_sample_without_any_activation_gets_no_gradient() -> None:
    student = torch.zeros(2, 3, 3, 4, requires_grad=True)
    loss = AttentionTransfer()
    loss.reduce(loss(features(2, 5, 3, 4), student)).backward()
    assert (student.grad == 0).all()


def test_vectors_have_no_positions_and_are_refused() -> None:
    with pytest.raises(UsageError, match="AttentionTransfer cannot compare features of shape"):
        AttentionTransfer().connect([torch.Size((2, 5))], [torch.Size((2, 5))])


@pytest.mark.parametrize("exponent", [0.5, 0.0, -2.0, float("nan")])
def test_an_impossible_exponent_is_refused(exponent: float) -> None:
    with pytest.raises(UsageError, match=r"exponent=.* must be"):
        AttentionTransfer(exponent)
