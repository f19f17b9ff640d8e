"""Masked generative distillation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lqkd.errors import UsageError
from lqkd.losses import MGD


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def connected(teacher: torch.Tensor, student: torch.Tensor, masked: float = 0.5) -> MGD:
    loss = MGD(masked)
    loss.connect([teacher.shape], [student.shape])
    return loss.double()


def convolved(x: torch.Tensor, layer: nn.Conv2d) -> torch.Tensor:
    """A 3x3 convolution with one ring of zeros around, by loops."""
    batch, _, height, width = x.shape
    out = layer.bias.detach().view(1, -1, 1, 1).repeat(batch, 1, height, width)
    for y in range(height):
        for x_ in range(width):
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    if 0 <= y + dy < height and 0 <= x_ + dx < width:
                        weight = layer.weight.detach()[:, :, dy + 1, dx + 1]
                        out[:, :, y, x_] += x[:, :, y + dy, x_ + dx] @ weight.t()
    return out


def test_mgd_compares_what_is_generated_from_the_shown_positions() -> None:
    teacher, student = features(2, 4, 3, 5), features(2, 3, 3, 5, seed=1)
    loss = connected(teacher, student, masked=0.6)
    torch.manual_seed(1)
    divergence = loss(teacher, student)
    torch.manual_seed(1)
    shown = (torch.rand(2, 1, 3, 5) >= 0.6).double()
    aligned = torch.einsum("oi,bihw->bohw", loss.hints.connector.weight.flatten(1), student)
    aligned = aligned + loss.hints.connector.bias.view(1, -1, 1, 1)
    first, _, second = loss.generator
    generated = convolved(convolved((aligned * shown).detach(), first).clamp_min(0), second)
    torch.testing.assert_close(divergence, (teacher - generated) ** 2)
    torch.testing.assert_close(loss.reduce(divergence), divergence.sum() / (2 * 4 * 3 * 5))


def test_seeded_runs_repeat_and_each_call_draws_another_mask() -> None:
    teacher, student = features(2, 3, 6, 6), features(2, 3, 6, 6, seed=1)
    loss = connected(teacher, student)
    torch.manual_seed(1)
    first, second = loss(teacher, student), loss(teacher, student)
    torch.manual_seed(1)
    assert torch.equal(loss(teacher, student), first)
    assert not torch.equal(first, second)


def test_hidden_positions_pass_no_gradient_to_the_student_and_their_share_is_as_told() -> None:
    teacher, student = features(8, 3, 16, 16), features(8, 3, 16, 16, seed=1).requires_grad_()
    loss = connected(teacher, student, masked=0.75)
    loss.reduce(loss(teacher, student)).backward()
    hidden = (student.grad == 0).all(dim=1).double().mean().item()
    assert hidden == pytest.approx(0.75, abs=0.03)


def test_nothing_is_hidden_at_zero() -> None:
    teacher, student = features(2, 3, 6, 6), features(2, 3, 6, 6, seed=1)
    loss = connected(teacher, student, masked=0.0)
    torch.testing.assert_close(loss(teacher, student), (teacher - loss.generator(student)).square())


def test_the_pair_draws_no_random_numbers() -> None:
    teacher, student = features(2, 3, 6, 6), features(2, 3, 6, 6, seed=1)
    loss = connected(teacher, student)
    state = torch.get_rng_state()
    assert torch.equal(loss.pair(teacher, student)[1], student)
    assert torch.equal(torch.get_rng_state(), state)


def test_mgd_needs_connect() -> None:
    with pytest.raises(UsageError, match="MGD has no generator yet"):
        MGD()(features(2, 3, 6, 6), features(2, 3, 6, 6))


def test_token_sequences_are_refused() -> None:
    with pytest.raises(UsageError, match=r"MGD cannot compare .* must give feature maps"):
        MGD().connect([torch.Size((2, 9, 5))], [torch.Size((2, 9, 5))])


@pytest.mark.parametrize("masked", [-0.1, 1.0, float("nan")])
def test_an_impossible_share_is_refused(masked: float) -> None:
    with pytest.raises(UsageError, match=r"masked=.* must be >= 0 and < 1"):
        MGD(masked)
