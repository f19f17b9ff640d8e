"""A language model as a GGUF file: what is in it, and that nothing else passes for it."""

from __future__ import annotations

import copy
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lqkd.data import PythonTopics
from lqkd.errors import ParityError, UsageError
from lqkd.export import from_gguf, llama_cpp, to_gguf
from lqkd.export.command import _test, export
from lqkd.export.gguf_command import as_served, prove, tokenizer_of, write_gguf
from lqkd.export.gguf_file import check_gguf, said_of
from lqkd.export.gguf_tokenizer import byte_tokens
from lqkd.models import GPT, load_weights
from lqkd.models.calls import Inputs
from lqkd.quantization import Recipe, Rule, initialize_quantizers, quantize_model, quantizers
from lqkd.tasks import CausalLM

gguf = pytest.importorskip("gguf")


def quantised(recipe: Recipe | None = None, tied: bool = False, **settings: str | int) -> GPT:
    """A fitted student whose steps are no longer those of the start."""
    torch.manual_seed(0)
    network = GPT(**{"context": 16, "width": 64, "depth": 2, "heads": 2, "gelu": "tanh", **settings})
    if tied:
        network.head.weight = network.token.weight
    quantize_model(network, recipe or Recipe("q4_0"))
    initialize_quantizers(network, texts())
    with torch.no_grad():
        for quantizer in quantizers(network).values():
            quantizer.scale *= torch.empty_like(quantizer.scale).uniform_(0.5, 1.5)
    return network.eval()


def texts() -> Tensor:
    return torch.arange(64).view(4, 16) + 40


@pytest.fixture(scope="module")
def student() -> GPT:
    return quantised()


@pytest.fixture
def file(student: GPT, tmp_path: Path) -> Path:
    to_gguf(student, tmp_path / "student.gguf", about={"data": "PythonTopics"})
    return tmp_path / "student.gguf"


def entry(file: Path, name: str) -> gguf.ReaderTensor:
    return next(tensor for tensor in gguf.GGUFReader(file).tensors if tensor.name == name)


def by_hand(packed: bytes, rows: int) -> Tensor:
    """Q4_0, byte by byte: a float16 step, then 16 bytes with the codes of the places j and j + 16."""
    values = []
    for start in range(0, len(packed), 18):
        (step,) = struct.unpack("<e", packed[start : start + 2])
        codes = packed[start + 2 : start + 18]
        values += [step * ((byte & 15) - 8) for byte in codes] + [step * ((byte >> 4) - 8) for byte in codes]
    return torch.tensor(values, dtype=torch.float64).view(rows, -1)


def test_a_file_holds_the_weights_that_were_trained(student: GPT, file: Path) -> None:
    layer = student.blocks[1].expand
    assert (layer.weight_quantizer.step() < 0).any()
    held = by_hand(entry(file, "blk.1.ffn_up.weight").data.tobytes(), 256)
    assert torch.equal(held, layer.quantized_weight().detach().double())


def test_a_file_alone_gives_the_students_logits_to_the_last_bit(student: GPT, file: Path) -> None:
    assert torch.equal(from_gguf(file)(texts()), student(texts()))
    assert said_of(file)["data"] == "PythonTopics"


@pytest.mark.parametrize("name", ["blk.0.attn_qkv.weight", "output.weight", "blk.1.attn_norm.weight"])
def test_a_number_that_is_one_percent_off_fails_the_proof(student: GPT, file: Path, name: str) -> None:
    tensor, kind = entry(file, name), "<f" if name.endswith("norm.weight") else "<e"
    place, content = int(tensor.data_offset), bytearray(file.read_bytes())
    if kind == "<e":
        place += len(tensor.data[0]) * 3  # the first step of the fourth row
    (number,) = struct.unpack_from(kind, content, place)
    struct.pack_into(kind, content, place, 1.01 * number)
    file.write_bytes(content)
    with pytest.raises(ParityError, match=f"tensor {name} of the file decodes to other numbers"):
        check_gguf(file, student)


def ternary_by_hand(packed: bytes, rows: int) -> Tensor:
    """TQ2_0, byte by byte: 64 bytes, each with the codes of four places 32 apart, then a float16 step."""
    values = []
    for start in range(0, len(packed), 66):
        (step,) = struct.unpack("<e", packed[start + 64 : start + 66])
        for half in (packed[start : start + 32], packed[start + 32 : start + 64]):
            values += [step * ((byte >> shift & 3) - 1) for shift in (0, 2, 4, 6) for byte in half]
    return torch.tensor(values, dtype=torch.float64).view(rows, -1)


def test_a_ternary_file_holds_the_weights_that_were_trained_and_a_step_one_percent_off_fails(tmp_path: Path) -> None:
    student, file = quantised(Recipe("tq2_0"), width=256, depth=1), tmp_path / "student.gguf"
    kinds = to_gguf(student, file)
    assert (kinds["blk.0.ffn_down.weight"], kinds["token_embd.weight"]) == ("TQ2_0", "Q8_0")
    tensor = entry(file, "blk.0.ffn_down.weight")
    held = ternary_by_hand(tensor.data.tobytes(), 256)
    assert torch.equal(held, student.blocks[0].contract.quantized_weight().detach().double())
    assert torch.equal(from_gguf(file)(texts()), student(texts()))
    place, content = int(tensor.data_offset) + 64, bytearray(file.read_bytes())
    struct.pack_into("<e", content, place, 1.01 * struct.unpack_from("<e", content, place)[0])
    file.write_bytes(content)
    with pytest.raises(ParityError, match=r"blk.0.ffn_down.weight of the file decodes to other numbers"):
        check_gguf(file, student)


def test_a_file_that_fails_is_not_written(student: GPT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = gguf.quants.dequantize
    monkeypatch.setattr(gguf.quants, "dequantize", lambda data, kind: np.float32(1.000001) * decode(data, kind))
    with pytest.raises(ParityError):
        to_gguf(student, tmp_path / "student.gguf")
    assert list(tmp_path.iterdir()) == []


def test_types_are_those_of_the_grids(student: GPT, tmp_path: Path) -> None:
    kinds = to_gguf(student, tmp_path / "student.gguf")
    assert kinds["token_embd.weight"] == kinds["output.weight"] == kinds["position_embd.weight"] == "Q8_0"
    assert {kinds[f"blk.0.{name}.weight"] for name in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")} == {"Q4_0"}
    assert {kind for name, kind in kinds.items() if "norm" in name or name.endswith("bias")} == {"F32"}


def test_an_embedding_that_is_the_head_is_one_tensor(tmp_path: Path) -> None:
    student = quantised(tied=True)
    assert student.head.weight_quantizer is student.token.weight_quantizer
    assert "output.weight" not in to_gguf(student, tmp_path / "student.gguf")
    held = from_gguf(tmp_path / "student.gguf")
    assert held.head.weight is held.token.weight
    assert torch.equal(held(texts()), student(texts()))


def test_what_stays_in_float_is_written_so(tmp_path: Path) -> None:
    student = quantised(Recipe("q4_0", rules=[Rule("head", weight_bits=32)]))
    assert to_gguf(student, tmp_path / "student.gguf")["output.weight"] == "F32"
    assert torch.equal(from_gguf(tmp_path / "student.gguf")(texts()), student(texts()))


def test_the_exact_gelu_is_told_apart_from_that_of_the_runtime(tmp_path: Path) -> None:
    student = quantised(gelu="exact")
    to_gguf(student, tmp_path / "student.gguf")
    parity = prove(tmp_path / "student.gguf", as_served(student), student, _inputs(), [texts()], CausalLM())
    assert parity.problem is None
    assert parity.exported == parity.deployed != parity.trained
    assert parity.exported == pytest.approx(parity.trained, rel=1e-3)


def _inputs() -> object:
    from lqkd.models.calls import Inputs

    return Inputs.of(texts())


def test_what_a_file_says_by_itself_is_not_said_otherwise(student: GPT, tmp_path: Path) -> None:
    for about, message in (({"sizes": 1}, "the file says version, sizes by itself"), ({"x": object()}, "JSON values")):
        with pytest.raises(UsageError, match=message):
            to_gguf(student, tmp_path / "student.gguf", about=about)


def not_finite(student: GPT) -> None:
    student.blocks[0].expand.weight.data[0, 0] = float("nan")


def without_a_start(student: GPT) -> None:
    student.head.weight_quantizer.start[0] = float("nan")


def unfitted(student: GPT) -> None:
    student.head.weight_quantizer.forget()


@pytest.mark.parametrize(
    ("damage", "message"),
    [(not_finite, "is not finite"), (without_a_start, "start of a step"), (unfitted, "has no grid")],
)
def test_a_failed_training_is_refused(
    student: GPT, tmp_path: Path, damage: Callable[[GPT], None], message: str
) -> None:
    student = copy.deepcopy(student)
    damage(student)
    with pytest.raises(UsageError, match=message):
        to_gguf(student, tmp_path / "student.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            Recipe("w4a32", group_size=32),
            "the weight of token is on the grid of LSQ, which a GGUF file has no type for",
        ),
        (
            Recipe("q4_0", rules=[Rule("head", activation_bits=8)]),
            "head.input_quantizer puts activations on a grid, which a GGUF file does not have",
        ),
        (
            Recipe("q4_0", attention_bits=8),
            "attention 'blocks.0.attention' multiplies on grids, which no file of a language model has",
        ),
    ],
)
def test_grids_without_a_type_are_refused(recipe: Recipe, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        to_gguf(quantised(recipe), tmp_path / "student.gguf")


def test_a_network_that_llama_cpp_does_not_know_is_refused(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Embedding(256, 64), nn.Linear(64, 256))
    with pytest.raises(UsageError, match="--format gguf is not possible for Sequential"):
        to_gguf(quantize_model(network, Recipe("q4_0"))[0], tmp_path / "student.gguf")


def test_what_is_no_file_of_ours_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("text")
    for name in ("text.gguf", "missing.gguf"):
        with pytest.raises(UsageError, match=f"{name}' is no GGUF file that can be read"):
            from_gguf(tmp_path / name)
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "gpt2")
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    with pytest.raises(UsageError, match="was not written by lqkd"):
        from_gguf(tmp_path / "other.gguf")


def test_a_time_is_not_measured(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--latency is not possible with --format gguf"):
        export(tmp_path, format="gguf", latency=True)


def test_a_run_that_was_tested_on_nothing_is_judged_on_the_validation_split(capsys: pytest.CaptureFixture[str]) -> None:
    data = PythonTopics(context=16)
    data.setup()
    split, batches = _test(SimpleNamespace(datamodule=data, trainer=Trainer(limit_test_batches=0, logger=False)))
    assert (split, len(next(batches).tokens)) == ("validation", 32)
    assert "trainer.limit_test_batches is 0, so" in capsys.readouterr().err


def test_a_runtime_that_was_not_asked_is_told(
    student: GPT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(llama_cpp, "available", lambda: False)
    write_gguf(student, tmp_path / "s.gguf", Inputs.of(texts()), [texts()], "test", CausalLM(), {})
    assert "not asked: pip install xllamacpp" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("vocabulary", "message"), [(256, "the file would say that its 256 tokens are bytes"), (64, "")]
)
def test_an_object_is_no_tokenizer_of_a_file(vocabulary: int, message: str, tmp_path: Path) -> None:
    data, network = SimpleNamespace(tokenizer=object()), quantised(vocabulary=vocabulary) if message else GPT(64, 16)
    with pytest.raises(UsageError, match="tokenizer of type object is not possible"):
        to_gguf(quantised(), tmp_path / "student.gguf", tokenizer=data.tokenizer)
    told = (
        pytest.raises(UsageError, match=message)
        if message
        else pytest.warns(UserWarning, match="the GGUF file has none")
    )
    with told:
        assert tokenizer_of(data, network) is None


def test_what_llama_cpp_raises_does_not_end_an_export(
    student: GPT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("xllamacpp")

    def fail(path: Path) -> Iterator[Tensor]:
        raise RuntimeError("no memory")

    monkeypatch.setattr(llama_cpp, "log_probabilities", lambda path, texts: fail(path))
    write_gguf(student, tmp_path / "s.gguf", Inputs.of(texts()), [texts()], "test", CausalLM(), {})
    assert "not asked: no memory" in capsys.readouterr().out
    assert (tmp_path / "s.gguf.md").exists()


def test_bytes_have_the_names_that_the_tokenizer_of_gpt_2_gives_them() -> None:
    names = byte_tokens()
    assert (names[32], names[10], names[65], names[0xE9], names[0xAD]) == ("Ġ", "Ċ", "A", "é", "Ń")
    assert len(set(names)) == 256


@pytest.mark.slow  # llama.cpp answers token by token
def test_llama_cpp_says_what_the_student_says(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    student = GPT(gelu="tanh")
    load_weights(student, "builtin:topics_gpt")
    data = PythonTopics()
    data.setup()
    tokens = next(iter(data.test_dataloader())).tokens[:8].long()
    quantize_model(student, Recipe("q4_0"))
    initialize_quantizers(student, tokens)
    to_gguf(student.eval(), tmp_path / "student.gguf")
    found = llama_cpp.compare(tmp_path / "student.gguf", student, tokens, most=48)
    assert found.tokens == 48
    assert found.divergence < 2e-3  # of activations in 8 bits
    assert found.same >= 46
    assert found.llama_cpp == pytest.approx(found.pytorch, abs=0.02)
    text = "Café:\n\n  the 'import'\tstatement"  # characters of two bytes, and what GPT-2's tokenizer splits at
    read, given = llama_cpp.log_probabilities(tmp_path / "student.gguf", [text, text.encode()])
    torch.testing.assert_close(read, given, rtol=0, atol=0.02)


@pytest.mark.slow
def test_llama_cpp_reads_three_values_as_they_were_trained(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    student = quantised(Recipe("tq2_0"), width=256, context=32)
    with torch.no_grad():
        for block in student.blocks:
            block.expand.weight_quantizer.scale *= 20.0  # whose product says something
    to_gguf(student, tmp_path / "student.gguf")
    found = llama_cpp.compare(tmp_path / "student.gguf", student, texts(), most=8)
    assert found.divergence < 2e-3
    assert found.llama_cpp == pytest.approx(found.pytorch, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("token", [0, 0xC3])
def test_llama_cpp_tells_of_an_answer_that_ends_the_text_or_is_half_a_character(token: int, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    student = quantised()
    with torch.no_grad():
        student.norm.bias.copy_(100 * student.head.weight[token])
    assert (student(texts()).argmax(dim=-1) == token).all()
    to_gguf(student, tmp_path / "student.gguf")
    assert llama_cpp.compare(tmp_path / "student.gguf", student, texts(), most=4).same == 4
