"""Attention relations against loops over texts, heads and tokens in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.losses import AttentionRelations, CosineDistance
from lqkd.utils import pieces

WHOLE = 2**22
"""Elements of a piece that takes all that there is here."""


def features(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relation(first: Tensor, second: Tensor, counts: Tensor, causal: bool) -> list[dict[int, float]]:
    """For each token (T, d) that counts, what it pays to each that it may look at."""
    rows = []
    for i in range(len(first)):
        seen = [j for j in range(len(first)) if counts[j] and (j <= i or not causal)]
        scores = {j: float(first[i] @ second[j]) / math.sqrt(first.shape[1]) for j in seen}
        total = sum(math.exp(score) for score in scores.values())
        rows.append({j: math.exp(score) / total for j, score in scores.items()})
    return rows


def reference(
    teacher: Sequence[Tensor], student: Sequence[Tensor], heads: int, relations: Any, causal: bool, places: Tensor
) -> list[float]:
    found = []
    for text, counts in enumerate(places):
        total = 0.0
        for name in relations:
            for head in range(heads):
                t, s = (
                    relation(
                        *(side["qkv".index(letter)][text].chunk(heads, 1)[head] for letter in name), counts, causal
                    )
                    for side in (teacher, student)
                )
                for i in counts.nonzero().flatten().tolist():
                    total += sum(p * math.log(p / s[i][j]) for j, p in t[i].items()) / (heads * int(counts.sum()))
        found.append(total)
    return found


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("relations", [("qq", "kk", "vv"), ("qk", "vv")])
@pytest.mark.parametrize("elements", [1, 50, WHOLE])  # of a piece: a row, some rows, several texts
def test_relations_are_those_of_the_papers(
    causal: bool, relations: tuple[str, ...], elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "_ELEMENTS", elements)
    teacher = [features(3, 5, 12, seed=n) for n in range(3)]
    student = [features(3, 5, 8, seed=n + 3).requires_grad_() for n in range(3)]
    places = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1]], dtype=torch.bool)
    loss = AttentionRelations(relation_heads=4, relations=relations, causal=causal)
    found = loss(teacher, student, places=places)
    assert found.tolist() == pytest.approx(reference(teacher, student, 4, relations, causal, places), rel=1e-9)
    if elements == WHOLE:
        assert torch.autograd.gradcheck(lambda *s: loss(teacher, s, places=places), student)
        return
    of_text = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    in_pieces = torch.autograd.grad(found @ of_text, student)
    monkeypatch.setattr(pieces, "_ELEMENTS", WHOLE)
    whole = torch.autograd.grad(loss(teacher, student, places=places) @ of_text, student)  # which is checked above
    torch.testing.assert_close(in_pieces, whole, rtol=1e-12, atol=1e-15)


def test_one_tap_of_all_three_is_cut_into_them() -> None:
    teacher, student = ([features(2, 4, width, seed=n + width) for n in range(3)] for width in (12, 6))
    loss = AttentionRelations(relation_heads=3)
    fused = loss((torch.cat(teacher, 2),), (torch.cat(student, 2),))
    assert torch.equal(fused, loss(teacher, student))


def test_memory_does_not_grow_with_the_square_of_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_ELEMENTS", 2 * 256 * 8)
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            made = function(*args, **(kwargs or {}))
            largest = max(largest, made.numel() if isinstance(made, Tensor) else 0)
            return made

    x = features(2, 256, 2 * 3).requires_grad_()
    with Watch():
        AttentionRelations(relation_heads=2)((features(2, 256, 6),), (x,)).sum().backward()
    assert largest <= 2 * 256 * 8  # 131,072 a head and text as a whole


@pytest.mark.parametrize(
    ("settings", "shapes", "message"),
    [
        ({"relation_heads": 0}, [], "relation_heads=0 is not possible"),
        ({"relation_heads": 2, "relations": ["qx"]}, [], r"relations=\['qx'\] is not possible: a list with some of qq"),
        ({"relation_heads": 2, "relations": ["qq", "qq"]}, [], "is not possible: qq is there twice"),
        ({"relation_heads": 5}, [(1, 3, 8)] * 3, "relation_heads=5 .* q of the teacher has 8 channels, of which"),
        ({"relation_heads": 2, "relations": ["qk"]}, [(1, 3, 8), (1, 3, 4), (1, 3, 4)], "share their keys"),
        ({"relation_heads": 2}, [(1, 3, 8)], "the teacher's tap gives 8 channels, which are not queries"),
        ({"relation_heads": 2}, [(1, 3, 8)] * 2, "cannot compare 2 pairs of taps: it takes three"),
        ({"relation_heads": 2}, [(1, 8, 3, 3)], r"its taps must give token sequences \(B, N, C\)"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(settings: Any, shapes: Any, message: str) -> None:
    sizes = [torch.Size(shape) for shape in shapes]
    with pytest.raises(UsageError, match=message):
        AttentionRelations(**settings).connect(sizes, sizes)


def test_a_cosine_distance_is_one_less_the_cosine_of_each_token() -> None:
    teacher, student = features(2, 3, 6), features(2, 3, 4, seed=1)
    loss = CosineDistance().double()
    loss.connect([teacher.shape], [student.shape])
    loss.double()
    found = loss(teacher, student).mean(dim=2)
    mapped = loss.hints.connector(student).detach()
    for text in range(2):
        for token in range(3):
            a, b = teacher[text, token], mapped[text, token]
            expected = 1 - float((a @ b) / (a @ a * (b @ b)).sqrt())
            assert found[text, token].item() == pytest.approx(expected, rel=1e-9)
