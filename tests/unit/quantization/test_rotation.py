"""A rotated Llama answers as it did, and its weights have no outlying columns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lqkd import Recipe, quantize_model
from lqkd.errors import UsageError
from lqkd.models import GPT
from lqkd.quantization import rotate
from lqkd.quantization.rotation import hadamard
from tests.hugging_face import llama

TOKENS = torch.arange(24).view(2, 12)


def scaled(folder: Path, **settings: bool) -> nn.Module:
    """A Llama whose norms have scales, one of them an outlier, and layers biases."""
    network = llama(folder, hidden_size=96, initializer_range=0.1, **settings)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        if "norm" in name or name.endswith("bias"):
            nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
        if "norm" in name:
            parameter.data[5] = 20.0
    return network


@pytest.mark.parametrize("block", [None, 4])
def test_answers_are_the_same(block: int | None, tmp_path: Path) -> None:
    network = scaled(tmp_path, attention_bias=True, mlp_bias=True)
    before = network(TOKENS).logits
    assert rotate(network, block) == (32 if block is None else 4)
    assert network.lm_head.weight is not network.model.embed_tokens.weight
    torch.testing.assert_close(network(TOKENS).logits, before, rtol=1e-5, atol=1e-5 * float(before.abs().max()))


def test_an_outlying_column_is_spread_over_its_block(tmp_path: Path) -> None:
    network = scaled(tmp_path)
    layer, scale = network.model.layers[0].self_attn.q_proj, network.model.layers[0].input_layernorm.weight.detach()
    before = (layer.weight * scale).detach()
    rotate(network)
    after = layer.weight.detach()
    ratios = [float(weight.abs().max() / weight.square().mean().sqrt()) for weight in (before, after)]
    assert ratios[1] < 0.5 * ratios[0]


def test_hadamard_matrices_are_orthogonal() -> None:
    torch.testing.assert_close(hadamard(8) @ hadamard(8).t(), torch.eye(8, dtype=torch.float64))


def test_what_cannot_be_rotated_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a GPT cannot be rotated: a LlamaForCausalLM"):
        rotate(GPT())
    with pytest.raises(UsageError, match="block=5 is not possible: it must divide the width, 64"):
        rotate(llama(tmp_path), 5)
    with pytest.raises(UsageError, match="size=3 is not possible"):
        rotate(llama(tmp_path, hidden_size=48, num_attention_heads=4), 3)
    quantised, _ = quantize_model(llama(tmp_path), Recipe("w4a32"))
    with pytest.raises(UsageError, match="rotate it before quantize_model"):
        rotate(quantised)
