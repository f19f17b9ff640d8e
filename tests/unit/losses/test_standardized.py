"""Standardised logits against z-scores computed with numpy."""

from __future__ import annotations

import pytest
import torch

from lqkd.errors import UsageError
from lqkd.losses import DIST, DKD, HintonKL, Hints, LogitResidual, Standardized


def logits(samples: int = 6, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    return tuple(2 + 3 * torch.randn(samples, classes, generator=generator, dtype=torch.float64) for _ in range(2))


def z_scores(logits: torch.Tensor) -> torch.Tensor:
    rows = logits.numpy()
    return torch.from_numpy((rows - rows.mean(1, keepdims=True)) / rows.std(1, keepdims=True))


@pytest.mark.parametrize("inner", [HintonKL(2.0), LogitResidual(), DIST(), DKD()])
def test_the_inner_loss_is_taken_of_the_z_scores(inner: torch.nn.Module) -> None:
    teacher, student = logits()
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    outer = Standardized(inner)
    expected = inner(z_scores(teacher), z_scores(student), labels)
    torch.testing.assert_close(outer(teacher, student, labels), expected)
    torch.testing.assert_close(outer.reduce(expected), inner.reduce(expected))
    for ours, theirs in zip(outer.pair(teacher, student), (teacher, student), strict=True):
        torch.testing.assert_close(ours, z_scores(theirs))


def test_the_default_is_the_kl_at_temperature_two() -> None:
    teacher, student = logits()
    torch.testing.assert_close(Standardized()(teacher, student), HintonKL(2.0)(z_scores(teacher), z_scores(student)))


def test_mean_and_scale_of_the_logits_do_not_count() -> None:
    teacher, student = logits()
    factors = torch.linspace(0.1, 10, 6, dtype=torch.float64).unsqueeze(1)
    torch.testing.assert_close(Standardized()(teacher, factors * student + 3), Standardized()(teacher, student))


def test_equal_logits_get_no_gradient_instead_of_a_nan() -> None:
    student = torch.zeros(6, 5, requires_grad=True)
    loss = Standardized()
    loss.reduce(loss(logits()[0], student)).backward()
    assert (student.grad == 0).all()


def test_kind_and_need_of_labels_are_those_of_the_inner_loss() -> None:
    assert Standardized(DKD()).needs_labels
    assert not Standardized().needs_labels
    assert Standardized().kind == "classes"


def test_a_loss_of_features_cannot_be_standardised() -> None:
    with pytest.raises(UsageError, match="loss=Hints is not possible in Standardized: it compares features"):
        Standardized(Hints())
