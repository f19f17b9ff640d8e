"""Knowledge review: fusion from deep to shallow, and the hierarchical context loss."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lqkd.errors import UsageError
from lqkd.losses import ReviewKD
from lqkd.losses.review import hierarchical_context

Pyramid = tuple[torch.Tensor, ...]


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pyramids(batch: int = 2) -> tuple[Pyramid, Pyramid]:
    teacher = (features(batch, 4, 8, 8), features(batch, 6, 4, 4, seed=1), features(batch, 8, 2, 2, seed=2))
    student = (features(batch, 2, 8, 8, seed=3), features(batch, 3, 4, 4, seed=4), features(batch, 5, 2, 2, seed=5))
    return teacher, student


def connected(teacher: Pyramid, student: Pyramid) -> ReviewKD:
    loss = ReviewKD()
    loss.connect([t.shape for t in teacher], [s.shape for s in student])
    return loss.double()


def pool(x: torch.Tensor, size: int) -> torch.Tensor:
    """Averages over size x size fields of a (C, H, W) map whose sides are multiples of size."""
    side = x.shape[1] // size
    rows = [
        torch.stack([x[:, r * side : (r + 1) * side, c * side : (c + 1) * side].mean((1, 2)) for c in range(size)], 1)
        for r in range(size)
    ]
    return torch.stack(rows, 1)


@pytest.mark.parametrize(
    ("side", "grids"),
    [(8, {4: 0.5, 2: 0.25, 1: 0.125}), (4, {2: 0.5, 1: 0.25}), (2, {1: 0.5}), (1, {})],
)
def test_the_context_loss_weighs_the_full_map_and_coarser_grids(side: int, grids: dict[int, float]) -> None:
    teacher, student = features(3, 5, side, side), features(3, 5, side, side, seed=1)
    for t, s, ours in zip(teacher, student, hierarchical_context(teacher, student), strict=True):
        expected = ((t - s) ** 2).mean()
        for size, weight in grids.items():
            expected = expected + weight * ((pool(t, size) - pool(s, size)) ** 2).mean()
        torch.testing.assert_close(ours, expected / (1 + sum(grids.values())))


def repeated(x: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def normalised(x: torch.Tensor) -> torch.Tensor:
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, unbiased=False)
    return (x - mean) / (variance + 1e-5).sqrt()


def test_review_fuses_each_level_with_all_deeper_ones_and_sums_the_context_losses() -> None:
    teacher, student = pyramids()
    loss = connected(teacher, student)
    expected, deeper = 0.0, None
    for level in (2, 1, 0):
        fusion = loss.fusions[level]
        mixed = normalised(torch.einsum("oi,bihw->bohw", fusion.enter[0].weight.flatten(1), student[level]))
        if deeper is not None:
            deeper = repeated(deeper)
            both = torch.cat((mixed, deeper), 1)
            maps = torch.einsum("oi,bihw->bohw", fusion.attention.weight.flatten(1), both)
            maps = 1 / (1 + (-maps - fusion.attention.bias.view(1, 2, 1, 1)).exp())
            mixed = maps[:, 0:1] * mixed + maps[:, 1:2] * deeper
        deeper = mixed
        out = normalised(nn.functional.conv2d(mixed, fusion.leave[0].weight, padding=1))
        expected = expected + hierarchical_context(teacher[level], out)
    divergence = loss(teacher, student)
    assert divergence.shape == (2,)
    torch.testing.assert_close(divergence, expected)
    torch.testing.assert_close(loss.reduce(divergence), expected.mean())


def test_the_deepest_level_has_nothing_to_fuse_with() -> None:
    loss = connected(*pyramids())
    assert [fusion.attention is None for fusion in loss.fusions] == [False, False, True]


def test_a_deep_level_of_the_student_reaches_the_loss_of_a_shallow_one() -> None:
    teacher, student = pyramids()
    loss = connected(teacher, student)
    student[2].requires_grad_()
    fused, out = loss.fusions[2](student[2], None)
    fused, out = loss.fusions[1](student[1], fused)
    out.square().sum().backward()
    assert student[2].grad.abs().sum() > 0


def test_levels_of_different_sizes_are_compared_at_the_smaller_one() -> None:
    teacher, student = pyramids()
    teacher = (features(2, 4, 16, 16), *teacher[1:])
    averaged = nn.functional.avg_pool2d(teacher[0], 2)
    loss = connected(teacher, student)
    torch.testing.assert_close(loss(teacher, student), loss((averaged, *teacher[1:]), student))


def test_a_batch_of_one_with_a_level_of_one_position_is_finite() -> None:
    teacher, student = (features(1, 4, 2, 2), features(1, 4, 1, 1)), (features(1, 4, 2, 2), features(1, 4, 1, 1))
    loss = connected(teacher, student)
    loss.reduce(loss(teacher, student)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in loss.parameters())


def test_no_more_channels_are_fused_than_told() -> None:
    loss = ReviewKD(max_channels=3)
    teacher, student = pyramids()
    loss.connect([t.shape for t in teacher], [s.shape for s in student])
    assert {fusion.enter[0].out_channels for fusion in loss.fusions} == {3}


def test_review_needs_connect() -> None:
    with pytest.raises(UsageError, match="ReviewKD has no fusion layers yet"):
        ReviewKD()(*pyramids())


def test_levels_without_partner_are_refused() -> None:
    teacher, student = ([x.shape for x in pyramid] for pyramid in pyramids())
    with pytest.raises(UsageError, match="cannot compare 3 taps of the teacher with 2 of the student"):
        ReviewKD().connect(teacher, student[:2])
    with pytest.raises(UsageError, match="cannot compare 0 taps"):
        ReviewKD().connect([], [])


def test_other_levels_than_connected_are_refused() -> None:
    teacher, student = pyramids()
    with pytest.raises(UsageError, match="connected for 3 levels, not 2"):
        connected(teacher, student)(teacher[:2], student[:2])


def test_levels_that_are_no_maps_are_refused() -> None:
    with pytest.raises(UsageError, match=r"ReviewKD cannot compare .* must give feature maps"):
        ReviewKD().connect([torch.Size((2, 9, 5))], [torch.Size((2, 9, 5))])


def test_an_impossible_width_is_refused() -> None:
    with pytest.raises(UsageError, match="max_channels=0 is not possible"):
        ReviewKD(0)
