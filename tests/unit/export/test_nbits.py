"""A language model as ONNX for MatMulNBits: run by ONNX Runtime, and nothing else passes for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from lqkd.errors import ParityError, UsageError
from lqkd.export.nbits import Runtime, check_nbits, check_nbits_grids, of_nbits, to_nbits
from lqkd.export.nbits_graph import pack, unpack
from lqkd.models import GPT, causal_lm
from lqkd.quantization import Recipe, Rule, initialize_quantizers, quantize_model, quantizers
from tests.hugging_face import llama


def texts() -> Tensor:
    return torch.arange(48).view(4, 12)


def fitted(network: nn.Module, recipe: Recipe) -> nn.Module:
    quantize_model(network, recipe)
    initialize_quantizers(network, texts())
    with torch.no_grad():
        for quantizer in quantizers(network).values():
            quantizer.scale *= torch.empty_like(quantizer.scale).uniform_(0.5, 1.5)
    return network.eval()


def gpt(recipe: Recipe, **settings: str) -> nn.Module:
    torch.manual_seed(0)
    network = GPT(context=16, width=64, depth=2, heads=2, **settings)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(4)
    return fitted(network, recipe)


def a_llama(folder: Path, recipe: Recipe, **settings: object) -> nn.Module:
    llama(folder, initializer_range=0.2, **settings)
    return fitted(causal_lm(str(folder)), recipe)


def logits(network: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        found = network(tokens)
    return found if isinstance(found, Tensor) else found.logits


LOW = Recipe("w2a32", group_size=32, first_layer_bits=None, rules=[Rule("*head", weight_bits=8, activation_bits=32)])
HALVES = Recipe("w2a32", group_size=32, weight_quantizer="seq", first_layer_bits=None, last_layer_bits=None)
SCALED = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}
UNEVEN = Recipe("q4_0", rules=[Rule("*head", weight_bits=32), Rule("*down_proj", weight_bits=32)])


@pytest.mark.parametrize(
    ("kind", "recipe", "settings"),
    [
        ("gpt", Recipe("q4_0"), {}),
        ("gpt", LOW, {"gelu": "tanh"}),
        ("gpt", HALVES, {"gelu": "tanh"}),
        ("llama", Recipe("q4_0"), SCALED),
        ("llama", UNEVEN, {"tie_word_embeddings": False, "attention_bias": True}),
    ],
    ids=["gpt", "two bits", "half steps", "llama", "partly in float"],
)
def test_onnx_runtime_says_what_the_student_says(
    kind: str, recipe: Recipe, settings: dict[str, object], tmp_path: Path
) -> None:
    network = gpt(recipe, **settings) if kind == "gpt" else a_llama(tmp_path / "llama", recipe, **settings)
    to_nbits(network, tmp_path / "student.onnx")
    runtime = Runtime(tmp_path / "student.onnx")
    for tokens in (texts(), texts()[:1, :5]):
        ours = logits(network, tokens)
        torch.testing.assert_close(runtime(tokens), ours, rtol=0, atol=2e-5 * float(ours.abs().max()))


def test_a_head_that_is_the_embedding_is_held_once_in_codes_of_eight_bits(tmp_path: Path) -> None:
    assert to_nbits(a_llama(tmp_path / "llama", Recipe("q4_0")), tmp_path / "student.onnx") == {8: 2, 4: 14}
    held = onnx.load(tmp_path / "student.onnx")
    assert not any(tensor.name.startswith("lm_head") for tensor in held.graph.initializer)
    product = next(node for node in held.graph.node if "model.embed_tokens.codes" in node.input[1:])
    assert product.op_type == "MatMulNBits"


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("model.layers.1.mlp.up_proj.scales", Recipe("q4_0")),
        ("model.layers.1.mlp.up_proj.zero", HALVES),
        ("model.norm.weight", Recipe("q4_0")),
    ],
)
def test_a_number_that_is_one_percent_off_fails_the_proof(name: str, recipe: Recipe, tmp_path: Path) -> None:
    student = a_llama(tmp_path / "llama", recipe)
    to_nbits(student, tmp_path / "student.onnx")
    held = onnx.load(tmp_path / "student.onnx")
    tensor = next(tensor for tensor in held.graph.initializer if tensor.name == name)
    values = numpy_helper.to_array(tensor).copy()
    values.flat[values.size // 2] *= 1.01
    tensor.CopyFrom(numpy_helper.from_array(values, name))
    onnx.save(held, tmp_path / "student.onnx")
    with pytest.raises(ParityError, match=f"tensor {name.rpartition('.')[0]}.* decodes to other numbers"):
        check_nbits(tmp_path / "student.onnx", student)


def test_a_graph_that_computes_something_else_is_not_kept(tmp_path: Path) -> None:
    student = gpt(Recipe("q4_0"))
    for block in student.blocks:
        block.expand.register_forward_hook(lambda layer, given, found: found + 0.1)  # of which a graph knows nothing
    with pytest.raises(ParityError, match="ONNX Runtime computes something else from the file"):
        to_nbits(student, tmp_path / "student.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_are_packed_from_the_lowest_bits_on(bits: int) -> None:
    codes = np.random.default_rng(0).integers(0, 2**bits, (3, 2, 32)).astype(np.uint8)
    assert np.array_equal(unpack(pack(codes, bits), bits), codes)
    first = pack(codes, bits)[0, 0, 0]
    assert first == sum(int(code) << bits * place for place, code in enumerate(codes[0, 0, : 8 // bits]))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            Recipe("w4a32", last_layer_bits=None),
            "the weight of token is on the grid of LSQ without groups, which MatMulNBits does not have",
        ),
        (Recipe("w4a8", group_size=32), "the input of .* is on a grid"),
        (Recipe("w2a32", group_size=32), "head is on a grid, .* give it activation_bits: 32 in a rule, or"),
    ],
)
def test_other_grids_are_refused(recipe: Recipe, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        to_nbits(gpt(recipe), tmp_path / "student.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_runtime_that_is_too_old_for_a_zero_between_codes_is_told_what_has_it(tmp_path: Path) -> None:
    to_nbits(gpt(HALVES), tmp_path / "student.onnx")
    held = onnx.load(tmp_path / "student.onnx")
    held.opset_import[0].version = 99
    onnx.save(held, tmp_path / "student.onnx")
    with pytest.raises(UsageError, match=r"does not take the file .*: it needs 1\.27 or newer$"):
        Runtime(tmp_path / "student.onnx")


def test_a_look_ahead_knows_whose_weights_have_groups() -> None:
    assert of_nbits(gpt(Recipe("w4a32", group_size=32)))
    assert not of_nbits(gpt(Recipe("w4a32")))
    with pytest.raises(UsageError, match="is on a grid"):
        check_nbits_grids(gpt(Recipe("w4a8", group_size=32)))


def test_other_networks_are_refused(tmp_path: Path) -> None:
    turned = a_llama(tmp_path / "llama", Recipe("q4_0"), hidden_act="gelu")
    with pytest.raises(UsageError, match="--format nbits is not possible for hidden_act='gelu'"):
        to_nbits(turned, tmp_path / "student.onnx")
    network = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 64))
    with pytest.raises(UsageError, match="--format nbits is not possible for Sequential"):
        to_nbits(fitted(network, Recipe("q4_0")), tmp_path / "student.onnx")
