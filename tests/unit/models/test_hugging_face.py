"""Language models of Hugging Face: read whole, or refused in a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.models import causal_lm
from lqkd.models.hugging_face import located
from lqkd.quantization import Recipe, initialize_quantizers, quantize_model
from tests.hugging_face import gpt2, llama

transformers = pytest.importorskip("transformers")


def tokens() -> Tensor:
    return torch.arange(24).view(2, 12)


def test_a_folder_gives_the_network_that_was_saved(tmp_path: Path) -> None:
    saved = llama(tmp_path)
    read = causal_lm(str(tmp_path))
    assert torch.equal(read(tokens()).logits, saved(tokens()).logits)
    assert list(read(tokens())) == ["logits"]


def test_an_embedding_that_is_the_head_is_one_tensor_on_one_grid_of_eight_bits(tmp_path: Path) -> None:
    llama(tmp_path)
    network, report = quantize_model(causal_lm(str(tmp_path)), Recipe("q4_0"))
    assert network.lm_head.weight is network.model.embed_tokens.weight
    assert network.lm_head.weight_quantizer is network.model.embed_tokens.weight_quantizer
    assert "14 W4A32, 2 W8A32; 5 in float" in report.summary()  # the five norms


def test_the_layers_of_gpt_2_compute_the_same_as_linear_ones_which_are_quantised(tmp_path: Path) -> None:
    saved = gpt2(tmp_path)
    network = causal_lm(str(tmp_path))
    torch.testing.assert_close(network(tokens()).logits, saved(tokens()).logits)
    _, report = quantize_model(network, Recipe("q4_0"))
    assert "8 W4A32, 3 W8A32" in report.summary()
    assert report.passed_over() == []
    initialize_quantizers(network, tokens())
    assert not torch.equal(network(tokens()).logits, saved(tokens()).logits)


def test_a_text_longer_than_the_network_knows_positions_for_is_refused(tmp_path: Path) -> None:
    llama(tmp_path)
    network = causal_lm(str(tmp_path))
    with pytest.raises(UsageError, match="texts of 33 tokens are longer than the 32"):
        network(torch.zeros(1, 33, dtype=torch.int64))


def test_a_network_without_a_table_of_positions_takes_texts_of_any_length(tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "n_layer": 1, "n_head": 2}
    transformers.BloomForCausalLM(transformers.BloomConfig(**sizes)).save_pretrained(tmp_path)
    assert causal_lm(str(tmp_path))(torch.zeros(1, 40, dtype=torch.int64)).logits.shape == (1, 40, 64)


def test_weights_that_are_not_there_are_not_made_up(tmp_path: Path) -> None:
    llama(tmp_path)
    transformers.LlamaModel.from_pretrained(tmp_path).save_pretrained(tmp_path / "headless")
    untied = transformers.LlamaConfig.from_pretrained(tmp_path, tie_word_embeddings=False)
    untied.save_pretrained(tmp_path / "headless")
    with pytest.raises(UsageError, match=r"lacks weights of a LlamaForCausalLM \(lm_head.weight\)"):
        causal_lm(str(tmp_path / "headless"))


@pytest.mark.parametrize(
    ("pretrained", "message"),
    [
        ("./missing", "does not exist: give a folder of Hugging Face's, a .gguf file, or a name on its hub"),
        ("missing.gguf", "does not exist"),
        ("package:no_such_package/file.gguf", "needs the package no_such_package, which is not installed"),
        ("package:lqkd", "has no causal language model that can be read"),
    ],
)
def test_what_is_no_model_is_said_in_a_sentence(pretrained: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        causal_lm(pretrained)


def test_a_file_of_a_package_is_found_without_importing_it() -> None:
    assert located("package:lqkd/models/gpt.py", "pretrained")["gguf_file"] == "gpt.py"
