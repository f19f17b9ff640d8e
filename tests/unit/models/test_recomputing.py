"""Activations that are computed again are the same, and take less memory."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.qat_step import peak_memory
from lqkd import Recipe, quantize_model
from lqkd.errors import UsageError
from lqkd.losses.taps import Taps
from lqkd.models import GPT, causal_lm, recompute_activations
from lqkd.quantization import initialize_quantizers
from tests.hugging_face import gpt2, llama

TAPS = {
    "gpt": "blocks.1.attention.qkv",
    "llama": "model.layers.1.self_attn.q_proj",
    "gpt2": "transformer.h.1.attn.c_attn",
}


def network(kind: str, folder: Path) -> nn.Module:
    torch.manual_seed(0)
    if kind == "gpt":
        return GPT(vocabulary=64, context=32, width=16, depth=2, heads=2)
    {"llama": llama, "gpt2": gpt2}[kind](folder)
    return causal_lm(str(folder))


@pytest.mark.parametrize("kind", ["gpt", "llama", "gpt2"])
def test_gradients_of_a_quantised_network_are_the_same_to_the_last_bit(kind: str, tmp_path: Path) -> None:
    tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(1))
    found = []
    for again in (False, True):
        student, _ = quantize_model(network(kind, tmp_path), Recipe("w4a8"))
        initialize_quantizers(student.train(), tokens)
        if again:
            recompute_activations(student)

        torch.manual_seed(2)  # GPT-2 has dropout
        with Taps(student, [TAPS[kind]], "student").recording() as inside:
            returned = student(tokens)
        logits = returned if isinstance(returned, Tensor) else returned.logits
        (logits.square().mean() + inside[0].square().mean()).backward()
        found.append([logits, *(p.grad for p in student.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 20
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def step(network: nn.Module, tokens: Tensor) -> None:
    network(tokens).sum().backward()


def test_blocks_keep_what_they_are_given_alone() -> None:
    memory = []
    for again in (False, True):
        student, _ = quantize_model(GPT(vocabulary=8, context=64, width=32, depth=8), Recipe("w4a32"))
        tokens = torch.zeros(8, 64, dtype=torch.int64)
        initialize_quantizers(student.train(), tokens)
        if again:
            recompute_activations(student)
        student(tokens).sum().backward()  # which makes the gradients
        memory.append(peak_memory(partial(step, student, tokens)))
    assert memory[1] < 0.4 * memory[0]


def test_a_network_that_cannot_is_named() -> None:
    with pytest.raises(
        UsageError, match=r"gradient_checkpointing=True is not possible for a Linear: lqkd\.models\.GPT"
    ):
        recompute_activations(nn.Linear(2, 2))
