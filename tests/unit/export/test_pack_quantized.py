"""A language model as a folder of compressed-tensors: loaded by transformers, and nothing else passes for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lqkd.errors import ParityError, UsageError
from lqkd.export import from_compressed_tensors, to_compressed_tensors
from lqkd.export.pack_quantized import _pack, check_compressed
from lqkd.models import GPT, causal_lm
from lqkd.quantization import Recipe, Rule, initialize_quantizers, quantize_model, quantizers
from tests.hugging_face import gpt2, llama, save_tokenizer


@pytest.fixture(autouse=True, scope="module")
def _compressed_tensors() -> None:
    """Not when tests are collected, which every worker does: it takes a second."""
    pytest.importorskip("compressed_tensors")


def texts() -> Tensor:
    return torch.arange(48).view(4, 12)


def quantised(network: nn.Module, recipe: Recipe) -> nn.Module:
    quantize_model(network, recipe)
    initialize_quantizers(network, texts())
    with torch.no_grad():
        for quantizer in quantizers(network).values():
            quantizer.scale *= torch.empty_like(quantizer.scale).uniform_(0.5, 1.5)
    return network.eval()


def a_llama(folder: Path, recipe: Recipe, **settings: Any) -> nn.Module:
    llama(folder, initializer_range=0.2, **settings)
    return quantised(causal_lm(str(folder)), recipe)


ROWS = Recipe("w4a32", last_layer_bits=None)
GROUPS = Recipe("w8a32", group_size=32, rules=[Rule("*down_proj", weight_bits=32), Rule("*head", activation_bits=32)])
MIXED = Recipe("q4_0", rules=[Rule("*o_proj", weight_bits=8)])
SEPARATE = {"tie_word_embeddings": False, "attention_bias": True}


@pytest.mark.parametrize(
    ("recipe", "settings", "layers"),
    [(Recipe("q4_0"), {}, {4: 14}), (ROWS, SEPARATE, {4: 15}), (GROUPS, SEPARATE, {8: 13}), (MIXED, {}, {4: 12, 8: 2})],
    ids=["q4_0", "rows", "groups", "two widths"],
)
def test_transformers_reads_the_students_logits_to_the_last_bit(
    recipe: Recipe, settings: dict[str, Any], layers: dict[int, int], tmp_path: Path
) -> None:
    student = a_llama(tmp_path / "llama", recipe, **settings)
    assert to_compressed_tensors(student, tmp_path / "held") == layers
    with torch.no_grad():
        ours, theirs = student(texts()).logits, from_compressed_tensors(tmp_path / "held")(texts()).logits
    assert torch.equal(ours, theirs)
    packed = load_file(tmp_path / "held" / "model.safetensors")["model.layers.0.self_attn.q_proj.weight_packed"]
    assert packed.shape == (64, 64 * min(layers) // 32)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight_scale", "model.norm.weight"])
def test_a_number_that_is_one_percent_off_fails_the_proof(name: str, tmp_path: Path) -> None:
    student = a_llama(tmp_path / "llama", Recipe("q4_0"))
    to_compressed_tensors(student, tmp_path / "held")
    file = tmp_path / "held" / "model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[3] *= 1.01
    save_file(tensors, file)
    with pytest.raises(ParityError, match=rf"{name.removesuffix('.weight_scale')}.* has other (steps|numbers)"):
        check_compressed(tmp_path / "held", student)


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_packed_as_the_package_packs_them(bits: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, 37), generator=torch.Generator().manual_seed(0))
    assert torch.equal(_pack(codes, bits), pack_to_int32(codes.to(torch.int8), bits))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            Recipe("w2a32", group_size=32, rules=[Rule("*head", activation_bits=32)]),
            "LSQ with 2 bits.*nbits has 2 bits of lsq",
        ),
        (Recipe("w2a32", weight_quantizer="absmean", first_layer_bits=None, last_layer_bits=None), "tq2_0"),
        (
            Recipe("w4a32", group_size=16, rules=[Rule("*head", activation_bits=32)]),
            "has groups of 16, and compressed-tensors those of 32",
        ),
        (Recipe("w4a8", group_size=32), "puts activations on a grid"),
    ],
)
def test_other_grids_are_refused(recipe: Recipe, message: str, tmp_path: Path) -> None:
    student = a_llama(tmp_path / "llama", recipe)
    with pytest.raises(UsageError, match=message):
        to_compressed_tensors(student, tmp_path / "held")
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_networks_that_transformers_would_not_build_are_refused(tmp_path: Path) -> None:
    own = quantised(GPT(context=16, width=64, depth=1, heads=2), Recipe("q4_0"))
    with pytest.raises(UsageError, match=r"GPT, which transformers has no architecture for: gguf and nbits"):
        to_compressed_tensors(own, tmp_path / "held")
    gpt2(tmp_path / "gpt2")
    with pytest.raises(UsageError, match="c_attn is no linear layer in transformers but a Conv1D"):
        to_compressed_tensors(quantised(causal_lm(str(tmp_path / "gpt2")), Recipe("q4_0")), tmp_path / "held")


def test_a_folder_has_its_tokenizer_and_replaces_its_like_alone(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = str(save_tokenizer(tmp_path / "tokenizer"))
    student = a_llama(tmp_path / "llama", Recipe("q4_0"))
    for name in ("first", "second"):
        to_compressed_tensors(student, tmp_path / "held", about={"data": name}, tokenizer=tokenizer)
    text = "the quick brown fox"
    assert AutoTokenizer.from_pretrained(tmp_path / "held")(text) == AutoTokenizer.from_pretrained(tokenizer)(text)
    assert json.loads((tmp_path / "held" / "config.json").read_text())["lqkd"]["data"] == "second"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["held", "llama", "tokenizer"]
    with pytest.raises(UsageError, match="exists and is no folder of --format compressed-tensors"):
        to_compressed_tensors(student, tmp_path / "llama")
    assert (tmp_path / "llama" / "model.safetensors").is_file()


def test_a_network_that_was_read_from_a_folder_is_trained_again(tmp_path: Path) -> None:
    student = a_llama(tmp_path / "llama", Recipe("q4_0"))
    to_compressed_tensors(student, tmp_path / "held")
    network = causal_lm(str(tmp_path / "held"))
    with torch.no_grad():
        assert torch.equal(network(texts()).logits, student(texts()).logits)
    quantize_model(network, Recipe("q4_0"))
    initialize_quantizers(network, texts())
    network(texts()).logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
