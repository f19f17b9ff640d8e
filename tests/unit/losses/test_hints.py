"""FitNet hints against a squared error computed with loops."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lqkd.errors import UsageError
from lqkd.losses import Hints


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def connected(teacher: torch.Tensor, student: torch.Tensor) -> Hints:
    loss = Hints().double()
    loss.connect([teacher.shape], [student.shape])
    return loss.double()


@pytest.mark.parametrize("shape", [(3, 4), (3, 5, 4), (3, 4, 2, 6)])
def test_equal_shapes_are_compared_element_by_element_without_a_connector(shape: tuple[int, ...]) -> None:
    teacher, student = features(*shape), features(*shape, seed=1)
    loss = connected(teacher, student)
    pairs = zip(teacher.flatten().tolist(), student.flatten().tolist(), strict=True)
    expected = sum((t - s) ** 2 for t, s in pairs) / teacher.numel()
    assert loss.reduce(loss(teacher, student)).item() == pytest.approx(expected, rel=1e-12)
    assert loss(teacher, student).shape == shape
    assert not list(loss.parameters())


def test_a_convolution_connects_maps_of_different_channels() -> None:
    teacher, student = features(2, 5, 3, 4), features(2, 3, 3, 4, seed=1)
    loss = connected(teacher, student)
    weight, bias = loss.connector.weight.flatten(1).tolist(), loss.connector.bias.tolist()
    divergence = loss(teacher, student)
    assert divergence.shape == teacher.shape
    for b in range(2):
        for c in range(5):
            for y in range(3):
                for x in range(4):
                    mapped = bias[c] + sum(weight[c][k] * student[b, k, y, x].item() for k in range(3))
                    expected = (teacher[b, c, y, x].item() - mapped) ** 2
                    assert divergence[b, c, y, x].item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("layout", [(2, -1), (2, 6, -1)])
def test_a_linear_layer_connects_vectors_and_tokens_of_different_channels(layout: tuple[int, ...]) -> None:
    teacher, student = (features(*layout[:-1], channels) for channels in (5, 3))
    loss = connected(teacher, student)
    assert isinstance(loss.connector, nn.Linear)
    expected = (teacher - (student @ loss.connector.weight.t() + loss.connector.bias)) ** 2
    torch.testing.assert_close(loss(teacher, student), expected)


@pytest.mark.parametrize(("teacher_size", "student_size"), [((4, 4), (2, 2)), ((2, 2), (4, 4)), ((2, 4), (4, 2))])
def test_maps_of_different_sizes_are_averaged_to_the_smaller_height_and_width(
    teacher_size: tuple[int, int], student_size: tuple[int, int]
) -> None:
    teacher, student = features(2, 3, *teacher_size), features(2, 3, *student_size, seed=1)

    def halved(x: torch.Tensor) -> torch.Tensor:
        if x.shape[2] == 4:
            x = (x[:, :, 0::2] + x[:, :, 1::2]) / 2
        if x.shape[3] == 4:
            x = (x[..., 0::2] + x[..., 1::2]) / 2
        return x

    loss = connected(teacher, student)
    torch.testing.assert_close(loss(teacher, student), (halved(teacher) - halved(student)) ** 2)
    for ours, expected in zip(loss.pair(teacher, student), (halved(teacher), halved(student)), strict=True):
        torch.testing.assert_close(ours, expected)


def test_the_connector_is_made_before_training_and_never_in_forward() -> None:
    teacher, student = features(2, 5, 3, 4), features(2, 3, 3, 4)
    loss = connected(teacher, student)
    before = {name: id(p) for name, p in loss.named_parameters()}
    loss(teacher, student)
    assert before
    assert before == {name: id(p) for name, p in loss.named_parameters()}


def test_different_channels_need_connect() -> None:
    with pytest.raises(UsageError, match="no connector yet from the student's 3 channels to the teacher's 5"):
        Hints()(features(2, 5, 3, 4), features(2, 3, 3, 4))


@pytest.mark.parametrize(
    ("teacher", "student", "message"),
    [
        ((2, 5, 3, 3), (2, 9, 5), r"\(2, 5, 3, 3\) with the student's \(2, 9, 5\): both taps must give"),
        ((2, 5), (2, 9, 5), "both taps must give"),
        ((2, 8, 5), (2, 9, 5), "must have the same number of tokens"),
        ((2, 5, 3), (2, 3, 5), "must have the same number of tokens"),
        ((2, 1, 5, 3, 3), (2, 1, 5, 3, 3), r"its taps must give vectors \(B, C\) or"),
    ],
)
def test_features_that_cannot_be_compared_are_refused(
    teacher: tuple[int, ...], student: tuple[int, ...], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        Hints().connect([torch.Size(teacher)], [torch.Size(student)])


def test_several_pairs_of_taps_are_refused() -> None:
    with pytest.raises(UsageError, match="cannot compare 2 pairs of taps: it takes one pair"):
        Hints().connect([torch.Size((2, 5))] * 2, [torch.Size((2, 5))] * 2)
