"""Channel-wise divergence."""

from __future__ import annotations

import pytest
import torch

from lqkd.errors import UsageError
from lqkd.losses import CWD


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_cwd_is_the_divergence_of_where_channels_look(temperature: float) -> None:
    teacher, student = features(2, 3, 4, 5), features(2, 3, 4, 5, seed=1)
    loss = CWD(temperature)
    expected = 0.0
    for t, s in zip(teacher.flatten(0, 1).flatten(1), student.flatten(0, 1).flatten(1), strict=True):
        p, q = (x.div(temperature).exp() / x.div(temperature).exp().sum() for x in (t, s))
        expected += float((p * (p / q).log()).sum()) * temperature**2 / (2 * 3)
    divergence = loss(teacher, student)
    assert divergence.shape == teacher.shape
    assert (divergence >= 0).all()
    assert float(loss.reduce(divergence)) == pytest.approx(expected, rel=1e-10)


def test_what_is_added_to_a_whole_channel_does_not_count() -> None:
    teacher, student = features(2, 3, 4, 5), features(2, 3, 4, 5, seed=1)
    loss = CWD()
    torch.testing.assert_close(loss(teacher, student + torch.arange(3.0).view(3, 1, 1)), loss(teacher, student))


def test_cwd_takes_feature_maps_only() -> None:
    with pytest.raises(UsageError, match="CWD cannot compare features of shape"):
        CWD().connect([torch.Size((2, 7, 3))], [torch.Size((2, 7, 3))])
