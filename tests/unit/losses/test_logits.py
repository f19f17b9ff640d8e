"""Logit losses against independent float64 computations."""

from __future__ import annotations

import math

import pytest
import torch

from lqkd.errors import UsageError
from lqkd.losses import HintonKL, LogitResidual, SoftCrossEntropy


def logits(samples: int = 6, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return tuple(3 * torch.randn(samples, classes, generator=generator, dtype=torch.float64) for _ in range(2))


def softmax(row: list[float]) -> list[float]:
    exponentials = [math.exp(value - max(row)) for value in row]
    return [value / sum(exponentials) for value in exponentials]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_hinton_kl_is_the_kl_of_softened_predictions_times_tau_squared_per_sample(temperature: float) -> None:
    teacher, student = logits()
    expected = 0.0
    for t, s in zip(teacher.tolist(), student.tolist(), strict=True):
        p, q = (softmax([value / temperature for value in row]) for row in (t, s))
        expected += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) * temperature**2 / len(teacher)
    loss = HintonKL(temperature)
    assert loss.reduce(loss(teacher, student)).item() == pytest.approx(expected, rel=1e-10)


def test_hinton_kl_has_the_gradient_of_the_plain_kl() -> None:
    teacher, student = logits()
    ours, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
    loss = HintonKL(4.0)
    loss.reduce(loss(teacher, ours)).backward()
    plain = torch.nn.KLDivLoss(reduction="batchmean")
    (16 * plain((theirs / 4).log_softmax(1), (teacher / 4).softmax(1))).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_hinton_kl_map_has_no_negative_element() -> None:
    assert (HintonKL()(*logits(200, 10)) >= 0).all()


def test_rounding_near_agreement_leaves_no_negative_element() -> None:
    teacher = logits(500, 10)[0].float()
    assert (HintonKL()(teacher, teacher + 1e-4 * teacher.sin()) >= 0).all()


def test_hinton_kl_gradient_hardly_depends_on_a_high_temperature() -> None:
    teacher, student = logits()
    norms = []
    for temperature in (20.0, 40.0):
        s = student.clone().requires_grad_()
        loss = HintonKL(temperature)
        loss.reduce(loss(teacher, s)).backward()
        norms.append(s.grad.norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=0.15)


def test_the_residual_loss_is_the_mean_squared_logit_difference() -> None:
    teacher, student = logits()
    pairs = zip(teacher.flatten().tolist(), student.flatten().tolist(), strict=True)
    expected = sum((t - s) ** 2 for t, s in pairs) / teacher.numel()
    loss = LogitResidual()
    assert loss.reduce(loss(teacher, student)).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_soft_cross_entropy_is_that_of_softened_predictions_times_tau_squared(temperature: float) -> None:
    teacher, student = logits()
    expected = 0.0
    for t, s in zip(teacher.tolist(), student.tolist(), strict=True):
        p, q = (softmax([value / temperature for value in row]) for row in (t, s))
        expected -= sum(a * math.log(b) for a, b in zip(p, q, strict=True)) * temperature**2 / len(teacher)
    loss = SoftCrossEntropy(temperature)
    assert loss.reduce(loss(teacher, student)).item() == pytest.approx(expected, rel=1e-10)


def test_soft_cross_entropy_and_kl_have_the_same_gradient() -> None:
    teacher, student = logits()
    gradients = []
    for loss in (SoftCrossEntropy(4.0), HintonKL(4.0)):
        s = student.clone().requires_grad_()
        loss.reduce(loss(teacher, s)).backward()
        gradients.append(s.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("loss", [LogitResidual(), HintonKL(), SoftCrossEntropy()])
def test_repeating_the_batch_does_not_change_the_loss(loss: torch.nn.Module) -> None:
    teacher, student = logits()
    once = loss.reduce(loss(teacher, student))
    thrice = loss.reduce(loss(teacher.repeat(3, 1), student.repeat(3, 1)))
    torch.testing.assert_close(once, thrice)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("loss", [HintonKL, SoftCrossEntropy])
def test_an_impossible_temperature_is_refused(loss: type[torch.nn.Module], temperature: float) -> None:
    with pytest.raises(UsageError, match=r"temperature=.* must be a positive number"):
        loss(temperature)
