"""Decoupled distillation against its definition, computed with loops."""

from __future__ import annotations

import math

import pytest
import torch

from lqkd.errors import UsageError
from lqkd.losses import DKD, HintonKL


def batch(samples: int = 6, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    teacher, student = (3 * torch.randn(samples, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    return teacher, student, torch.randint(classes, (samples,), generator=generator)


def softmax(row: list[float]) -> list[float]:
    exponentials = [math.exp(value - max(row)) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def parts(t: list[float], s: list[float], label: int, temperature: float) -> tuple[float, float]:
    """TCKD and NCKD of one sample."""
    t, s = [v / temperature for v in t], [v / temperature for v in s]
    p, q = softmax(t), softmax(s)
    tckd = kl([p[label], 1 - p[label]], [q[label], 1 - q[label]])
    nckd = kl(softmax(t[:label] + t[label + 1 :]), softmax(s[:label] + s[label + 1 :]))
    return tckd, nckd


@pytest.mark.parametrize(("temperature", "alpha", "beta"), [(4.0, 1.0, 8.0), (1.0, 0.5, 0.0), (2.0, 0.0, 3.0)])
def test_dkd_is_the_weighted_sum_of_both_divergences(temperature: float, alpha: float, beta: float) -> None:
    teacher, student, labels = batch()
    expected = 0.0
    for t, s, label in zip(teacher.tolist(), student.tolist(), labels.tolist(), strict=True):
        tckd, nckd = parts(t, s, label, temperature)
        expected += temperature**2 * (alpha * tckd + beta * nckd) / len(labels)
    loss = DKD(temperature, alpha, beta)
    assert loss.reduce(loss(teacher, student, labels)).item() == pytest.approx(expected, rel=1e-9)


def test_the_map_of_dkd_holds_the_target_part_at_the_label() -> None:
    teacher, student, labels = batch()
    divergence = DKD(2.0, 1.0, 8.0)(teacher, student, labels)
    assert divergence.shape == teacher.shape
    assert (divergence >= 0).all()
    for row, t, s, label in zip(divergence, teacher.tolist(), student.tolist(), labels.tolist(), strict=True):
        tckd, nckd = parts(t, s, label, 2.0)
        assert row[label].item() == pytest.approx(4 * tckd, rel=1e-9)
        assert (row.sum() - row[label]).item() == pytest.approx(4 * 8 * nckd, rel=1e-9)


def test_dkd_with_the_teachers_doubt_as_beta_is_the_plain_kl() -> None:
    teacher, student, labels = batch(samples=1)
    doubt = 1 - (teacher / 4).softmax(1)[0, labels[0]].item()
    dkd, plain = DKD(4.0, 1.0, doubt), HintonKL(4.0)
    torch.testing.assert_close(dkd.reduce(dkd(teacher, student, labels)), plain.reduce(plain(teacher, student)))


def test_renaming_the_classes_does_not_change_dkd() -> None:
    teacher, student, labels = batch()
    order = torch.tensor([3, 0, 4, 1, 2])
    loss = DKD()
    renamed = loss(teacher[:, order], student[:, order], order.argsort()[labels])
    torch.testing.assert_close(renamed, loss(teacher, student, labels)[:, order])


def test_two_classes_have_no_other_class_to_tell_apart() -> None:
    teacher, student, labels = batch(classes=2)
    loss = DKD(alpha=0.0)
    assert loss.reduce(loss(teacher, student, labels)) == 0


def test_dkd_without_labels_is_refused() -> None:
    teacher, student, _ = batch()
    with pytest.raises(UsageError, match="labels=None is not possible with DKD"):
        DKD()(teacher, student)


def test_dkd_of_one_class_is_refused() -> None:
    with pytest.raises(UsageError, match="needs two or more"):
        DKD()(torch.zeros(3, 1), torch.zeros(3, 1), torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize("arguments", [{"temperature": -1.0}, {"alpha": -1.0}, {"beta": float("nan")}])
def test_impossible_arguments_of_dkd_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=rf"{next(iter(arguments))}=.* must be"):
        DKD(**arguments)


def test_dkd_without_any_weight_is_refused() -> None:
    with pytest.raises(UsageError, match="alpha and beta cannot all be 0"):
        DKD(alpha=0.0, beta=0.0)


def test_a_sample_without_a_label_is_compared_by_plain_kl() -> None:
    teacher, student, labels = batch()
    labels[:3] = torch.tensor([-1, -100, -1])
    found = DKD(temperature=2.0, alpha=1.0, beta=3.0)(teacher, student, labels)
    plain = 3.0 * HintonKL(temperature=2.0)(teacher, student)
    torch.testing.assert_close(found[:3], plain[:3])
    torch.testing.assert_close(found[3:], DKD(temperature=2.0, alpha=1.0, beta=3.0)(teacher, student, labels.abs())[3:])
