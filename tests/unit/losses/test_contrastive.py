"""Contrastive representation distillation within the batch, against loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lqkd.errors import UsageError
from lqkd.losses import ContrastiveRepresentation


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def connected(teacher: torch.Tensor, student: torch.Tensor, **arguments: float) -> ContrastiveRepresentation:
    loss = ContrastiveRepresentation(**arguments)
    loss.connect([teacher.shape], [student.shape])
    return loss.double()


def embedded(layer: nn.Linear, x: torch.Tensor) -> list[list[float]]:
    rows = (x @ layer.weight.t() + layer.bias).tolist()
    return [[value / math.hypot(*row) for value in row] for row in rows]


def test_each_sample_has_to_find_its_partner_in_the_batch_both_ways() -> None:
    teacher, student = features(5, 4), features(5, 3, seed=1)
    loss = connected(teacher, student, dimension=6, temperature=0.2)
    v, u = embedded(loss.embed_teacher, teacher), embedded(loss.embed_student, student)
    score = [[math.exp(sum(a * b for a, b in zip(u[i], v[j], strict=True)) / 0.2) for j in range(5)] for i in range(5)]
    expected = [
        -(math.log(score[i][i] / sum(score[i])) + math.log(score[i][i] / sum(score[j][i] for j in range(5)))) / 2
        for i in range(5)
    ]
    divergence = loss(teacher, student)
    torch.testing.assert_close(divergence, torch.tensor(expected, dtype=torch.float64))
    assert loss.reduce(divergence).item() == pytest.approx(sum(expected) / 5)


def test_training_finds_the_partners() -> None:
    teacher = features(16, 8)
    student = teacher @ features(8, 8, seed=1)
    loss = connected(teacher, student, dimension=8)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        value = loss.reduce(loss(teacher, student))
        value.backward()
        optimizer.step()
    assert value < 0.1 * math.log(16)


def test_a_batch_of_one_has_nobody_to_be_confused_with() -> None:
    teacher, student = features(1, 4), features(1, 3, seed=1)
    assert connected(teacher, student)(teacher, student).abs().item() == 0


@pytest.mark.parametrize("shape", [(5, 4, 2, 3), (5, 6, 4)])
def test_maps_and_tokens_are_averaged(shape: tuple[int, ...]) -> None:
    teacher, student = features(*shape), features(5, 3, seed=1)
    mean = teacher.flatten(2).mean(2) if len(shape) == 4 else teacher.mean(1)
    loss = connected(teacher, student)
    torch.testing.assert_close(loss(teacher, student), loss(mean, student))


def test_it_needs_connect() -> None:
    with pytest.raises(UsageError, match="ContrastiveRepresentation has no layers yet"):
        ContrastiveRepresentation()(features(5, 4), features(5, 4))


@pytest.mark.parametrize("arguments", [{"dimension": 0}, {"temperature": -0.1}])
def test_impossible_arguments_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=rf"{next(iter(arguments))}=.* is not possible"):
        ContrastiveRepresentation(**arguments)
