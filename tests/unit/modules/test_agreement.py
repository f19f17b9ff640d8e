from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lqkd.modules import agreement
from lqkd.modules.agreement import TOP1_AGREEMENT, Top1Agreement
from lqkd.tasks import CausalLM, Inputs

TOKENS = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]])


class Next(nn.Module):
    """Puts the next number first."""

    calls = 0

    def forward(self, tokens: Tensor) -> Tensor:
        self.calls += 1
        return nn.functional.one_hot((tokens + 1) % 4, 4).float()


def agreed(measured: Top1Agreement) -> float:
    return float(measured.logged_as()[TOP1_AGREEMENT].compute())


def test_tokens_without_a_label_do_not_count_nor_does_a_batch_of_none() -> None:
    measured = Top1Agreement(CausalLM(), {"teacher": Next()})
    right, labels = Next()(TOKENS), torch.full_like(TOKENS, -100)
    measured.update(right, (TOKENS, labels), Inputs.of(TOKENS))
    labels[0, 2] = 3
    other = right.clone()
    other[0, 1] = 1 - right[0, 1]  # what stands before the one token that has a label
    measured.update(other, (TOKENS, labels), Inputs.of(TOKENS))
    assert agreed(measured) == 0.0


@pytest.mark.parametrize(("most", "asked"), [(6, 1), (5, 2)])
def test_what_teachers_put_first_is_kept_of_so_many_rows_alone(
    most: int, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement, "MOST", most)  # of 6
    teacher = Next()
    measured = Top1Agreement(CausalLM(), {"teacher": teacher})
    for _ in range(2):
        measured.update(Next()(TOKENS), TOKENS, Inputs.of(TOKENS))
    assert (teacher.calls, agreed(measured)) == (asked, 1.0)
