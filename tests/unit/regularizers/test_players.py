"""What players price, against independent float64 computations."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lqkd.losses import HintonKL, LogitResidual
from lqkd.regularizers import LookAhead, alignment


def logits(seed: int) -> torch.Tensor:
    return torch.randn(5, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_alignment_is_the_product_of_each_elements_gradient_with_the_tasks() -> None:
    teacher, student, labels = logits(0), logits(1), torch.arange(5)
    task = student.softmax(1) - F.one_hot(labels, 7)
    for loss in (LogitResidual(), HintonKL(2.0)):
        found = alignment(lambda s, loss=loss: loss(teacher, s), student, task)
        jacobian = torch.autograd.functional.jacobian(lambda s, loss=loss: loss(teacher, s), student)
        torch.testing.assert_close(found, torch.einsum("icjd,jd->ic", jacobian, task))


def test_looking_ahead_prices_an_element_by_what_it_does_to_the_task_after_a_small_step() -> None:
    teacher, student, labels = logits(0), logits(1), torch.arange(5)
    task = student.softmax(1) - F.one_hot(labels, 7)
    aligned = alignment(lambda s: (teacher - s).square(), student, task)
    price, scale = LookAhead().price((teacher - student).square(), aligned)
    step = 1e-6
    for i, c in ((0, 1), (3, 3), (4, 0)):
        moved = student.clone()
        moved[i, c] += step * 2 * (teacher - student)[i, c]
        change = F.cross_entropy(moved, labels, reduction="sum") - F.cross_entropy(student, labels, reduction="sum")
        torch.testing.assert_close(price[i, c] * aligned.square().mean().sqrt(), change / step, rtol=1e-4, atol=1e-4)
    assert scale == 1
