"""Divergences of large vocabularies, a few rows at a time, against SciPy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.losses import CAKLD, ForwardKL, HintonKL, JensenShannon, ReverseKL
from lqkd.losses.token_rows import RowDivergence
from lqkd.regularizers import SampleWeight, alignment
from lqkd.utils import pieces

LABELS = torch.tensor([3, 0, -1, 11, 7])


def logits(dtype: torch.dtype = torch.float64, rows: int = 5, classes: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(3 * torch.randn(rows, classes, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))


def forward_kl(p: Any, q: Any, gamma: Any) -> Any:
    return entropy(p, q, axis=1)


def reverse_kl(p: Any, q: Any, gamma: Any) -> Any:
    return entropy(q, p, axis=1)


def jensen_shannon(p: Any, q: Any, gamma: Any) -> Any:
    m = 0.3 * p + 0.7 * q
    return 0.3 * entropy(p, m, axis=1) + 0.7 * entropy(q, m, axis=1)


def cakld(p: Any, q: Any, gamma: Any) -> Any:
    return gamma * entropy(q, p, axis=1) + (1 - gamma) * entropy(p, q, axis=1)


every = pytest.mark.parametrize(
    ("kind", "arguments", "reference"),
    [
        (ForwardKL, {}, forward_kl),
        (ReverseKL, {}, reverse_kl),
        (JensenShannon, {"beta": 0.3}, jensen_shannon),
        (CAKLD, {}, cakld),
    ],
)


@every
@pytest.mark.parametrize("top_k", [None, 4])
def test_values_are_those_of_the_formula(
    kind: type[RowDivergence], arguments: dict[str, Any], reference: Any, top_k: int | None
) -> None:
    teacher, student = logits()
    found = kind(temperature=2.0, top_k=top_k, **arguments)(teacher, student, LABELS)
    p, q = (softmax(x.numpy() / 2, axis=1) for x in (teacher, student))
    known = LABELS.numpy()
    gamma = np.where(known < 0, p.max(axis=1), p[np.arange(len(p)), known])
    if top_k is not None:
        order = np.argsort(-p, axis=1)
        p, q = (np.take_along_axis(x, order, axis=1) for x in (p, q))
        p, q = (np.hstack([x[:, :top_k], x[:, top_k:].sum(axis=1, keepdims=True)]) for x in (p, q))
    np.testing.assert_allclose(found.numpy(), 4 * reference(p, q, gamma), rtol=1e-10)


@every
@pytest.mark.parametrize("top_k", [None, 4])
def test_the_gradient_is_that_of_finite_differences(
    kind: type[RowDivergence], arguments: dict[str, Any], reference: Any, top_k: int | None
) -> None:
    teacher, student = logits()
    loss = kind(temperature=2.0, top_k=top_k, **arguments)
    assert torch.autograd.gradcheck(lambda s: loss(teacher, s, LABELS), student.requires_grad_())


@every
def test_the_size_of_a_piece_changes_neither_value_nor_gradient(
    kind: type[RowDivergence], arguments: dict[str, Any], reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, student = logits(torch.float32)
    found = []
    for elements in (2**22, 24):  # all rows at once, and two at a time
        monkeypatch.setattr(pieces, "_ELEMENTS", elements)
        point = student.clone().requires_grad_()
        values = kind(**arguments)(teacher, point, LABELS)
        (values * torch.arange(5)).sum().backward()
        found.append((values.detach(), point.grad))
    torch.testing.assert_close(found[0], found[1])


def test_the_forward_divergence_has_the_numbers_of_the_map_of_classes() -> None:
    teacher, student = logits()
    whole = HintonKL(temperature=4.0)
    expected = whole(teacher, student).sum(dim=1)
    torch.testing.assert_close(ForwardKL(temperature=4.0)(teacher, student), expected)
    gradient = torch.randn(5, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    along = alignment(lambda s: whole(teacher, s), student, gradient).sum(dim=1)
    torch.testing.assert_close(alignment(lambda s: ForwardKL(4.0)(teacher, s), student, gradient), along)


def test_weights_of_samples_are_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    regularizer = SampleWeight()
    torch.nn.init.normal_(next(regularizer.parameters()))
    teacher, student = logits(torch.float32)
    whole = regularizer(teacher, student)
    monkeypatch.setattr(pieces, "_ELEMENTS", 24)
    torch.testing.assert_close(regularizer(teacher, student), whole)


def test_no_gradient_is_computed_where_none_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(torch.autograd, "grad", refused)
    teacher, student = logits()
    student.requires_grad_()
    with torch.no_grad():
        assert not ForwardKL()(teacher, student).requires_grad
    assert ForwardKL()(teacher, student.detach()).grad_fn is None


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: ForwardKL(temperature=0.0), "temperature=0.0"),
        (lambda: ReverseKL(top_k=0), "top_k=0"),
        (lambda: JensenShannon(beta=1.0), "beta=1.0"),
        (lambda: CAKLD(confidence=1.5), "confidence=1.5"),
        (lambda: ForwardKL()(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)), r"logits of shape \(2, 3, 4\)"),
        (lambda: ForwardKL(top_k=12)(*logits()), "top_k=12 is not possible with 12 classes"),
        (lambda: CAKLD()(*logits()), "labels=None is not possible with CAKLD"),
    ],
)
def test_what_is_not_possible_is_told(make: Any, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        make()


@every
def test_what_both_think_impossible_counts_nothing(
    kind: type[RowDivergence], arguments: dict[str, Any], reference: Any
) -> None:
    found = []
    for padding in (0, 3):
        teacher, student = (torch.nn.functional.pad(x, (0, padding), value=-torch.inf) for x in logits())
        student.requires_grad_()
        values = kind(**arguments)(teacher, student, LABELS)
        values.sum().backward()
        found.append((values.detach(), student.grad[:, :12]))
    torch.testing.assert_close(found[0], found[1])


def test_the_forward_divergence_takes_what_the_teacher_alone_thinks_impossible() -> None:
    teacher, student = logits()
    teacher[:, 5] = -torch.inf
    p, q = (softmax(x.numpy(), axis=1) for x in (teacher, student))
    np.testing.assert_allclose(ForwardKL()(teacher, student).numpy(), entropy(p, q, axis=1), rtol=1e-10)
