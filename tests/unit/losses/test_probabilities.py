"""Classes with logits of -inf, which are impossible: words that are masked, padding, what a teacher rules out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lqkd.losses import DKD, DistillationLoss, ForwardKL, HintonKL, SoftCrossEntropy
from tests.unit.losses.test_all_losses import MAKERS

POSSIBLE = [0, 2, 3]
LABELS = torch.tensor([0, 2, 3, 2, -1])
LOSSES = MAKERS | {"ForwardKL, top_k beyond what is possible": lambda: ForwardKL(top_k=4)}


def logits() -> tuple[torch.Tensor, torch.Tensor]:
    """Of teacher and student, (5, 6) float64."""
    generator = torch.Generator().manual_seed(0)
    teacher, student = 2 * torch.randn(2, 5, 6, generator=generator, dtype=torch.float64)
    return teacher, student


def masked(x: torch.Tensor) -> torch.Tensor:
    impossible = torch.ones(x.shape[1], dtype=torch.bool)
    impossible[POSSIBLE] = False
    return x.masked_fill(impossible, -torch.inf)


@pytest.mark.parametrize("name", [name for name in LOSSES if LOSSES[name]().compares == "logits"])
def test_what_both_think_impossible_is_as_if_it_were_not_there(name: str) -> None:
    def learned(loss: DistillationLoss, of_teacher: torch.Tensor, of_student: torch.Tensor, labels: torch.Tensor):
        of_student = of_student.requires_grad_()
        value = loss.reduce(loss(of_teacher, of_student, labels))
        if name == "LogitResidual":
            value = value * of_student.shape[1]  # a mean over classes
        value.backward()
        return value, of_student.grad, [parameter.grad for parameter in loss.parameters()]

    teacher, student = logits()
    without = MAKERS["ForwardKL" if "beyond" in name else name]()
    relabelled = torch.where(LABELS > 0, LABELS - 1, LABELS)
    value, gradient, of_loss = learned(without, teacher[:, POSSIBLE], student[:, POSSIBLE], relabelled)
    expected = torch.zeros_like(student)
    expected[:, POSSIBLE] = gradient
    found = learned(LOSSES[name](), masked(teacher), masked(student), LABELS)
    torch.testing.assert_close(found, (value, expected, of_loss))


@pytest.mark.parametrize("make", [lambda: HintonKL(1.0), MAKERS["CurriculumTemperature"], ForwardKL, SoftCrossEntropy])
def test_what_the_teacher_alone_rules_out_costs_what_the_student_gives_to_it(
    make: Callable[[], DistillationLoss],
) -> None:
    loss = make()
    teacher, student = logits()
    tau = float(loss.learned().get("temperature", 1.0))
    p, q = (masked(teacher) / tau).softmax(1), (student / tau).softmax(1)
    entropy = -(p[:, POSSIBLE] * p[:, POSSIBLE].log()).sum(1)
    crossed = -(p[:, POSSIBLE] * q[:, POSSIBLE].log()).sum(1)
    expected = tau**2 * (crossed - (0 if isinstance(loss, SoftCrossEntropy) else entropy)).mean()
    found = loss.reduce(loss(masked(teacher), student.requires_grad_(), LABELS))
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(student.grad, tau * (q - p) / len(p), rtol=1e-6, atol=1e-9)


def test_a_teacher_that_rules_out_all_other_classes_says_nothing_of_them() -> None:
    _, student = logits()
    labels = torch.arange(5)
    sure = torch.full_like(student, -torch.inf).scatter(1, labels[:, None], 0.0)
    divergence = DKD(temperature=1.0, alpha=1.0, beta=8.0)(sure, student.requires_grad_(), labels)
    expected = torch.zeros_like(student).scatter(1, labels[:, None], -student.log_softmax(1).gather(1, labels[:, None]))
    torch.testing.assert_close(divergence, expected)
    divergence.sum().backward()
    torch.testing.assert_close(student.grad, student.softmax(1) - sure.softmax(1))
