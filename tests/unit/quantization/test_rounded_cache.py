"""Attention computes with keys and values in few bits."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.models import GPT, causal_lm
from lqkd.quantization import Recipe, initialize_quantizers, quantize_model
from lqkd.quantization.rounded_cache import RoundedCache
from tests.hugging_face import llama


def on_grid(x: Tensor, bits: int) -> Tensor:
    """Each vector of the last axis on ``2**bits`` values from its least to its largest, zero among them."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    step = (high - low) / (2**bits - 1)
    zero = (-low / step).round()
    return ((x / step).round() + zero).clamp(0, 2**bits - 1).sub(zero).mul(step)


def rotated(x: Tensor, theta: float) -> Tensor:
    """Rotary positions (Su et al., arXiv 2104.09864, eq. 15), the first half of a head turned with the second."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2]).double()[:, None] * theta ** (-torch.arange(half).double() / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)


@pytest.mark.parametrize("bits", [4, 8])
def test_keys_and_values_are_on_a_grid_of_each_head_and_token(bits: int, tmp_path: Path) -> None:
    llama(tmp_path, initializer_range=0.3, num_hidden_layers=1)
    network, tokens, seen = causal_lm(str(tmp_path)), torch.arange(10)[None], {}
    attention = network.model.layers[0].self_attn
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        getattr(attention, name).register_forward_hook(
            lambda layer, given, found, name=name: seen.update({name: given[0] if name == "o_proj" else found})
        )
    with torch.no_grad():
        RoundedCache(network, bits)(tokens)
    q, k, v = (seen[f"{part}_proj"][0].double().view(10, -1, 16).transpose(0, 1) for part in "qkv")
    theta = network.config.rope_parameters["rope_theta"]
    q, k, v = rotated(q, theta), on_grid(rotated(k, theta), bits), on_grid(v, bits)
    k, v = (part.repeat_interleave(2, dim=0) for part in (k, v))  # two heads of queries read one of keys
    scores = (q @ k.transpose(1, 2) / math.sqrt(16)).masked_fill(torch.ones(10, 10).triu(1).bool(), -math.inf)
    expected = (scores.softmax(dim=-1) @ v).transpose(0, 1).reshape(10, 64)
    torch.testing.assert_close(seen["o_proj"][0].double(), expected, rtol=0, atol=2e-3)


def test_a_student_that_is_quantised_is_measured_with_them_and_stays_as_it_was(tmp_path: Path) -> None:
    llama(tmp_path, initializer_range=0.3)
    student, tokens = causal_lm(str(tmp_path)), torch.arange(24).view(2, 12)
    quantize_model(student, Recipe("q4_0"))
    initialize_quantizers(student, tokens)
    with torch.no_grad():
        before = student.eval()(tokens).logits
        apart = [float((RoundedCache(student, bits)(tokens).logits - before).abs().max()) for bits in (2, 4, 8)]
        assert torch.equal(student(tokens).logits, before)
    assert apart[0] > apart[1] > apart[2] > 0


def test_a_network_that_keeps_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="keys and values of GPT cannot be rounded"):
        RoundedCache(GPT(context=8, width=8, depth=1, heads=2), 8)
