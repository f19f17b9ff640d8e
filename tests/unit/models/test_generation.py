"""A language model continues a text: greedily, drawn by its probabilities, with what it has read kept or read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.models import GPT, causal_lm
from lqkd.models.generation import generate_tokens
from tests.hugging_face import llama


class Constant(nn.Module):
    """Logits that no text changes."""

    vocabulary, context = 8, 4

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits.expand(*tokens.shape, -1)


def gpt() -> GPT:
    torch.manual_seed(0)
    network = GPT(vocabulary=64, context=8, width=16, depth=1, heads=2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(20)
    return network.eval()


def greedy(network: Any, prompt: list[int], most: int, context: int) -> list[int]:
    """As it is defined: the whole text is read for every token, as much as the network takes."""
    tokens = list(prompt)
    for _ in range(most):
        returned = network(torch.tensor([tokens[-context:]]))
        logits = returned if isinstance(returned, Tensor) else returned.logits
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_the_most_probable_tokens_are_those_of_a_network_that_reads_all_of_it_each_time(tmp_path: Path) -> None:
    llama(tmp_path, initializer_range=0.3)
    for network, context in ((causal_lm(str(tmp_path)), 32), (gpt(), 8)):
        expected = greedy(network, [5, 9, 2], 40, context)
        assert len(set(expected)) > 4
        assert generate_tokens(network, [5, 9, 2], 40) == expected


def test_a_network_of_transformers_reads_a_token_once(tmp_path: Path) -> None:
    llama(tmp_path)
    network, read = causal_lm(str(tmp_path)), []
    network.model.embed_tokens.register_forward_hook(lambda layer, given, found: read.append(given[0].shape[1]))
    generate_tokens(network, [5, 9, 2], 4)
    assert read == [3, 1, 1, 1]


def test_tokens_are_drawn_by_their_probabilities_at_a_temperature_among_the_first_few() -> None:
    logits = torch.tensor([0.0, 2.0, 1.0, -1.0, 1.5, 0.5, -3.0, 0.2])
    drawn = generate_tokens(Constant(logits), [0], 4000, temperature=0.7, top_k=3, seed=3)
    kept = np.exp(logits.double().numpy()[[1, 4, 2]] / 0.7)
    found = np.array([drawn.count(token) for token in (1, 4, 2)]) / 4000
    assert set(drawn) == {1, 4, 2}
    np.testing.assert_allclose(found, kept / kept.sum(), atol=0.025)  # three standard errors
    assert drawn == generate_tokens(Constant(logits), [0], 4000, temperature=0.7, top_k=3, seed=3)
    assert drawn != generate_tokens(Constant(logits), [0], 4000, temperature=0.7, top_k=3, seed=4)


def test_the_smallest_temperatures_draw_the_most_probable_token() -> None:
    assert generate_tokens(Constant(torch.arange(8.0)), [0], 2, temperature=1e-320) == [7, 7]


def test_tokens_that_no_text_has_are_left_out() -> None:
    assert generate_tokens(Constant(torch.arange(8.0)), [0], 2, known=6) == [5, 5]


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([1] * 9, {}, "the prompt has 9 tokens, and the network takes 8"),
        ([1, 64], {}, "the prompt has token 64, and the network knows those from 0 to 63"),
        ([1], {"temperature": -1.0}, "temperature=-1.0 is not possible"),
        ([1], {"temperature": float("nan")}, "temperature=nan is not possible"),
        ([1], {"top_k": 3}, "top_k=3 does nothing at temperature=0"),
        ([1], {"temperature": 1.0, "top_k": 0}, "top_k=0 is not possible"),
        ([1], {"temperature": 1.0, "seed": 2**64}, f"seed={2**64} is not possible"),
        ([1], {"most": 0}, "0 tokens are not possible"),
    ],
)
def test_what_is_not_possible_is_one_sentence(prompt: list[int], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        generate_tokens(gpt(), prompt, **{"most": 1} | settings)


def test_a_network_that_answers_nothing_finite_is_told() -> None:
    with pytest.raises(UsageError, match="logits that are not finite"):
        generate_tokens(Constant(torch.full((8,), torch.nan)), [0], 1)
