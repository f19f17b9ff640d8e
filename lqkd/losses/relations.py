"""How the tokens of a text attend to each other: relations between queries, keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.losses.base import DistillationLoss, MapKind
from lqkd.losses.matching import check_comparable
from lqkd.losses.precision import in_full_precision
from lqkd.utils.pieces import at_once

_PARTS = "qkv"


class AttentionRelations(DistillationLoss):
    """KL divergence of the attention that queries, keys and values of a layer pay to each other, as in MiniLM.

    With A and B two of queries, keys and values (B, T, C), cut into ``relation_heads`` of d = C / heads channels, the
    relation of a head is ``softmax(A B^T / sqrt(d))``, a distribution over tokens for each token. The divergence of a
    text is the sum over relations of ``KL(R_T || R_S)``, averaged over heads and over the text's tokens; the loss is
    the mean over texts. Widths of teacher and student need not agree, nor their own numbers of heads.

    ``[qq, kk, vv]`` is MiniLMv2 (Wang et al., arXiv 2012.15828, section 3.1), where the number of relation heads
    is best larger than that of attention heads; ``[qk, vv]`` is MiniLM (arXiv 2002.10957, equations 4 to 6), whose
    distributions of attention they are if heads are the networks' own. Both compare one layer: the last of the student
    with the last of the teacher, or in version 2 with one in the upper half of a large one. What a linear layer gives
    is compared: where positions are rotary (Llama), queries and keys are those before the rotation.

    It takes three pairs of taps, of queries, keys and values in this order, or one pair of taps that give all three one
    after the other in equal parts (``attention.qkv`` of :class:`lqkd.models.GPT`, ``attn.c_attn`` of GPT-2). Tokens
    that an attention mask leaves out are neither looked from nor at. The map is (B,). Rows of relations are taken a few
    at a time, together with the student's gradient: memory does not grow with T * T.

    Args:
        relation_heads: into how many heads queries, keys and values of both networks are cut.
        relations: two letters of q, k and v each.
        causal: whether a token is related only to itself and to those before it, as in a decoder.

    Raises:
        UsageError: when an argument is not possible, or features are no token sequences that can be cut so.

    Examples:
        >>> loss = AttentionRelations(relation_heads=4)
        >>> teacher, student = torch.randn(2, 16, 3 * 32), torch.randn(2, 16, 3 * 8)  # queries, keys and values
        >>> loss((teacher,), (student,)).shape
        torch.Size([2])
    """

    compares = "pyramids"
    kind: MapKind = "samples"
    sees_places = True

    def __init__(self, relation_heads: int, relations: Sequence[str] = ("qq", "kk", "vv"), causal: bool = True) -> None:
        super().__init__()
        if isinstance(relation_heads, bool) or not isinstance(relation_heads, int) or relation_heads < 1:
            raise UsageError(f"relation_heads={relation_heads!r} is not possible: it must be a whole number from 1 on")
        names = [first + second for first in _PARTS for second in _PARTS]
        if not relations or isinstance(relations, str) or not set(relations) <= set(names):
            raise UsageError(f"relations={relations!r} is not possible: a list with some of {', '.join(names)}")
        if twice := next((name for name in relations if list(relations).count(name) > 1), None):
            raise UsageError(f"relations={relations!r} is not possible: {twice} is there twice")
        self.relation_heads, self.relations, self.causal = relation_heads, tuple(relations), causal

    def connect(self, teacher: Sequence[torch.Size], student: Sequence[torch.Size]) -> None:
        for t, s in zip(teacher, student, strict=True):
            check_comparable("AttentionRelations", t, s, allowed=(3,))
        for of, shapes in (("teacher", teacher), ("student", student)):
            self._widths(of, shapes)

    def _widths(self, of: str, shapes: Sequence[Sequence[int]]) -> None:
        """Refuse features that cannot be cut into queries, keys and values, and those into heads."""
        if len(shapes) not in (1, 3):
            raise UsageError(
                f"AttentionRelations cannot compare {len(shapes)} pairs of taps: it takes three, of queries, keys and "
                "values in this order, or one whose modules give all of them"
            )
        if len(shapes) == 1 and shapes[0][2] % 3:
            raise UsageError(
                f"the {of}'s tap gives {shapes[0][2]} channels, which are not queries, keys and values in equal parts: "
                "give a tap for each of them"
            )
        widths = [shapes[0][2] // 3] * 3 if len(shapes) == 1 else [shape[2] for shape in shapes]
        used = dict(zip(_PARTS, widths, strict=True))
        for first, second in map(tuple, self.relations):
            if used[first] != used[second]:
                raise UsageError(
                    f"relations={[*self.relations]} is not possible: {first} of the {of} has {used[first]} channels "
                    f"and {second} {used[second]}, as where several heads share their keys; take qq, kk and vv"
                )
            if used[first] % self.relation_heads:
                raise UsageError(
                    f"relation_heads={self.relation_heads} is not possible: {first} of the {of} has {used[first]} "
                    "channels, of which it must be a divisor"
                )

    @in_full_precision
    def forward(  # type: ignore[override]  # pyramids: tuples of tensors
        self,
        teacher: Sequence[Tensor],
        student: Sequence[Tensor],
        labels: Tensor | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        self.connect([t.shape for t in teacher], [s.shape for s in student])
        if places is None:
            places = torch.ones(student[0].shape[:2], dtype=torch.bool, device=student[0].device)
        of_teacher, of_student = _parts(teacher), _parts(student if torch.is_grad_enabled() else _detached(student))
        divergence = student[0].new_zeros(len(student[0]))
        for first, second in map(tuple, self.relations):
            theirs = _Side(*(self._heads(of_teacher[name]) for name in (first, second)))
            ours = _Side(*(self._heads(of_student[name]) for name in (first, second)))
            divergence = divergence + _InPieces.apply(theirs, *ours, places, self.causal)
        return divergence

    def _heads(self, x: Tensor) -> Tensor:
        """(B, T, C) as (B, heads, T, C / heads)."""
        return x.unflatten(2, (self.relation_heads, -1)).transpose(1, 2)

    def reduce(self, divergence: Tensor) -> Tensor:
        return divergence.mean()


class _Side(NamedTuple):
    """The two factors of a relation, (B, heads, T, d) each, of one network."""

    first: Tensor
    second: Tensor


def _detached(features: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(x.detach() for x in features)


def _parts(features: Sequence[Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values (B, T, C) by their letters."""
    return dict(zip(_PARTS, features[0].chunk(3, dim=2) if len(features) == 1 else features, strict=True))


class _InPieces(torch.autograd.Function):
    """The divergence (B,) of a relation and, where the student is trained, its gradient at the student's factors."""

    @staticmethod
    def forward(ctx: Any, teacher: _Side, first: Tensor, second: Tensor, places: Tensor, causal: bool) -> Tensor:
        trained = any(ctx.needs_input_grad)
        kept = torch.zeros_like(first), torch.zeros_like(second)
        heads, tokens = first.shape[1:3]
        counts = places.sum(dim=1).clamp_min(1)
        found = first.new_zeros(len(first))
        rows = min(tokens, at_once(heads * tokens))  # of the relations of one text
        texts = at_once(heads * rows * tokens)
        for text in (slice(at, at + texts) for at in range(0, len(first), texts)):
            for row in (slice(at, at + rows) for at in range(0, tokens, rows)):
                those = _Side(teacher.first[text, :, row], teacher.second[text])
                theirs = _log_relation(those, places[text], row, causal)
                factors = _Side(*(x.detach().requires_grad_(trained) for x in (first[text, :, row], second[text])))
                with torch.set_grad_enabled(trained):
                    ours = _log_relation(factors, places[text], row, causal)
                    each = (theirs.exp() * (theirs - ours)).sum(dim=3).mean(dim=1)  # (texts, rows)
                    value = (each * places[text, row]).sum(dim=1) / counts[text]
                    total = value.sum()
                found[text] += value.detach()
                if trained:
                    of_rows, of_all = torch.autograd.grad(total, factors)
                    kept[0][text, :, row] += of_rows
                    kept[1][text] += of_all
        ctx.save_for_backward(*kept)
        return found.clamp_min(0.0)  # rounding can leave -1e-9

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, Tensor, None, None]:
        weight = gradients[0].view(-1, 1, 1, 1)
        first, second = ctx.saved_tensors
        return None, weight * first, weight * second, None, None


def _log_relation(side: _Side, places: Tensor, rows: slice, causal: bool) -> Tensor:
    """Logarithms (B, heads, rows, T) of what some tokens pay to all of their text; 0 where they may not look.

    A token that does not count looks at itself, which says nothing, and leaves no row without a distribution.
    """
    tokens = torch.arange(places.shape[1], device=places.device)
    from_here = tokens[rows, None]
    seen = places[:, None, None, :]
    if causal:
        seen = seen & (tokens <= from_here)
    hidden = ~(seen | (tokens == from_here))
    scores = side.first @ side.second.transpose(2, 3) / side.first.shape[3] ** 0.5
    return scores.masked_fill(hidden, -torch.inf).log_softmax(dim=3).masked_fill(hidden, 0.0)
