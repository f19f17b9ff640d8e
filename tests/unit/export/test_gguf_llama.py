"""A Llama of Hugging Face as a GGUF file: read by transformers and run by llama.cpp, neither of which knows lqkd."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lqkd.errors import ParityError, UsageError
from lqkd.export import from_gguf, llama_cpp, to_gguf
from lqkd.export.gguf_file import _encoded, _write, check_gguf
from lqkd.models import causal_lm
from lqkd.quantization import Recipe, initialize_quantizers, quantize_model, quantizers
from tests.hugging_face import llama, save_tokenizer

gguf = pytest.importorskip("gguf")


def texts() -> Tensor:
    return torch.arange(64).view(4, 16) + 40


def quantised(folder: Path, **settings: object) -> nn.Module:
    """A fitted student whose steps are no longer those of the start, with logits that are worth comparing."""
    llama(folder, **{"vocab_size": 320, "initializer_range": 0.2, **settings})
    network = causal_lm(str(folder))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    quantize_model(network, Recipe("q4_0"))
    initialize_quantizers(network, texts())
    with torch.no_grad():
        for quantizer in quantizers(network).values():
            quantizer.scale *= torch.empty_like(quantizer.scale).uniform_(0.5, 1.5)
    return network.eval()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    return quantised(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def file(student: nn.Module, tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "student.gguf"
    to_gguf(student, path, tokenizer=tokenizer)
    return path


@pytest.mark.parametrize("settings", [{}, {"tie_word_embeddings": False, "attention_bias": True}, {"mlp_bias": True}])
def test_transformers_reads_the_students_logits_to_the_last_bit(settings: dict[str, bool], tmp_path: Path) -> None:
    student = quantised(tmp_path / "llama", **settings)
    kinds = to_gguf(student, tmp_path / "student.gguf")
    assert ("output.weight" in kinds) == ("tie_word_embeddings" in settings)
    assert (kinds["token_embd.weight"], kinds["blk.1.attn_k.weight"]) == ("Q8_0", "Q4_0")
    assert torch.equal(from_gguf(tmp_path / "student.gguf")(texts()).logits, student(texts()).logits)


@pytest.mark.parametrize(
    ("name", "message"),
    [("blk.0.attn_norm.bias", "has 1 biases, and a LlamaForCausalLM"), ("rope_freqs.weight", "scales")],
)
def test_tensors_that_transformers_would_drop_are_refused(name: str, message: str, tmp_path: Path) -> None:
    student = quantised(tmp_path / "llama")
    encoded, file = dict(_encoded(student)) | {name: ("F32", np.full(8, 2.0, np.float32))}, tmp_path / "more.gguf"
    _write(encoded, student, file, {}, None)
    with pytest.raises(UsageError, match=message):
        causal_lm(str(file))


def test_a_step_of_a_query_that_is_one_percent_off_fails_the_proof(
    student: nn.Module, file: Path, tmp_path: Path
) -> None:
    tensor = next(t for t in gguf.GGUFReader(file).tensors if t.name == "blk.0.attn_q.weight")
    content, place = bytearray(file.read_bytes()), int(tensor.data_offset) + len(tensor.data[0]) * 3
    (step,) = struct.unpack_from("<e", content, place)
    struct.pack_into("<e", content, place, 1.01 * step)
    (tmp_path / "damaged.gguf").write_bytes(content)
    with pytest.raises(ParityError, match=r"tensor blk.0.attn_q.weight of the file decodes to other numbers"):
        check_gguf(tmp_path / "damaged.gguf", student)


def test_llama_cpp_says_what_the_student_says_of_tokens_and_of_a_text(
    student: nn.Module, file: Path, tokenizer: str
) -> None:
    pytest.importorskip("xllamacpp")
    from transformers import AutoTokenizer

    found = llama_cpp.compare(file, student, texts(), most=24)
    assert found.divergence < 5e-3  # of activations in 8 bits
    assert found.same >= 22
    text = "the quick brown fox, Café:\n\n  jumps"
    read, given = llama_cpp.log_probabilities(file, [text, AutoTokenizer.from_pretrained(tokenizer)(text)["input_ids"]])
    torch.testing.assert_close(read, given, rtol=0, atol=0.02)


def test_a_network_that_was_read_from_a_file_is_trained_and_written_again(file: Path, tmp_path: Path) -> None:
    network = causal_lm(str(file)).float()
    quantize_model(network, Recipe("q4_0"))
    initialize_quantizers(network, texts())
    to_gguf(network.eval(), tmp_path / "again.gguf", tokenizer=str(file))
    assert torch.equal(from_gguf(tmp_path / "again.gguf")(texts()).logits, network(texts()).logits)


def test_a_tokenizer_is_copied_from_a_file(student: nn.Module, file: Path, tmp_path: Path) -> None:
    to_gguf(student, tmp_path / "again.gguf", tokenizer=str(file))
    told, again = (
        {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items() if key.startswith("tokenizer.")}
        for path in (file, tmp_path / "again.gguf")
    )
    assert told == again
    assert len(told["tokenizer.ggml.tokens"]) == 320


def test_a_tokenizer_with_fewer_tokens_than_the_network_is_copied_with_unused_ones(file: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    padded, said = quantised(tmp_path / "llama", vocab_size=340), llama_cpp.log_probabilities
    to_gguf(padded, tmp_path / "padded.gguf", tokenizer=str(file))
    assert llama_cpp.compare(tmp_path / "padded.gguf", padded, texts(), most=4).same == 4
    (of_text,), (before,) = (said(path, ["the dog"]) for path in (tmp_path / "padded.gguf", file))
    assert (len(of_text), len(before)) == (340, 320)


def test_llama_cpp_is_asked_of_a_vocabulary_without_capitals(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    own = Tokenizer(models.BPE({letter: number for number, letter in enumerate("Ġabcdefgh")}, []))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=own).save_pretrained(tmp_path)
    student = quantised(tmp_path / "llama")
    to_gguf(student, tmp_path / "student.gguf", tokenizer=str(tmp_path))
    assert llama_cpp.compare(tmp_path / "student.gguf", student, texts(), most=4).same == 4


def test_a_tokenizer_of_another_kind_is_refused(student: nn.Module, tokenizer: str, tmp_path: Path) -> None:
    from tokenizers.normalizers import Lowercase
    from transformers import AutoTokenizer

    for changed, setting, value in (("normalizer", None, Lowercase()), ("model", "ignore_merges", True)):
        other = AutoTokenizer.from_pretrained(tokenizer)
        if setting is None:
            setattr(other.backend_tokenizer, changed, value)
        else:
            setattr(getattr(other.backend_tokenizer, changed), setting, value)
        other.save_pretrained(tmp_path)
        with pytest.raises(UsageError, match="is of a kind that is not written into a GGUF file"):
            to_gguf(student, tmp_path / "student.gguf", tokenizer=str(tmp_path))


def test_a_tokenizer_of_another_network_is_refused(file: Path, tokenizer: str, tmp_path: Path) -> None:
    llama(tmp_path)
    small, _ = quantize_model(causal_lm(str(tmp_path)), Recipe("q4_0"))
    initialize_quantizers(small, texts() % 64)
    for source in (tokenizer, str(file)):
        with pytest.raises(UsageError, match=r"has \d+ tokens and the network 64: "):
            to_gguf(small, tmp_path / "student.gguf", tokenizer=source)


def test_what_llama_cpp_computes_otherwise_is_refused(tmp_path: Path) -> None:
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    for settings, message in (({"rope_parameters": scaled}, "type 'linear'"), ({"hidden_act": "gelu"}, "'gelu'")):
        with pytest.raises(UsageError, match=message):
            to_gguf(quantised(tmp_path, **settings), tmp_path / "student.gguf")
