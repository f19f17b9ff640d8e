"""What is told of files of language models, and that one of another network does not get its name."""

from __future__ import annotations

import copy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from lqkd.errors import ParityError
from lqkd.export import gguf_command, nbits_command
from lqkd.export.language_card import measured_rows
from lqkd.export.language_proof import compared
from lqkd.export.parity import Parity
from lqkd.models import GPT
from lqkd.models.calls import Inputs
from lqkd.quantization import Recipe, initialize_quantizers, quantize_model
from lqkd.tasks import CausalLM


def student(seed: int) -> GPT:
    torch.manual_seed(seed)
    network = GPT(width=64, depth=1, heads=2, context=32, gelu="tanh")
    quantize_model(network, Recipe("q4_0"))
    initialize_quantizers(network, texts())
    return network.eval()


def texts() -> torch.Tensor:
    return torch.arange(64).view(2, 32)


def test_what_is_measured_as_trained_and_of_the_file_are_told_apart() -> None:
    parity = Parity(scales_identical=True, metric="perplexity", samples=3, split="test", trained=2.0, exported=4.0)
    assert [name for name, _ in measured_rows(parity)] == [
        "judged on",
        "perplexity as trained",
        "perplexity of the file",
    ]
    told, trained, exported = (value for _, value in measured_rows(parity))
    assert told == "3 samples of the test split"
    assert (trained[:1], exported[:1]) == ("2", "4")


@pytest.mark.parametrize(("module", "name"), [(nbits_command, "nbits"), (gguf_command, "gguf")])
def test_a_file_of_another_network_is_kept_beside_the_one_that_is_there(
    module: ModuleType, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_file = getattr(module, f"to_{name}")

    def of_another(network: Any, path: Path, **settings: Any) -> Any:
        return to_file(student(1), path, **settings)

    monkeypatch.setattr(module, f"to_{name}", of_another)
    write = getattr(module, f"write_{name}")
    (tmp_path / f"s.{name}").write_text("of the user")
    with pytest.raises(ParityError, match=rf"the file fails the comparison and is kept as .*s\.rejected\.{name}"):
        write(student(0), tmp_path / f"s.{name}", Inputs.of(texts()), [texts()], "test", CausalLM(), {})
    assert (tmp_path / f"s.{name}").read_text() == "of the user"
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"s.{name}", f"s.rejected.{name}"]


def test_logits_that_differ_in_the_last_bit_fail_where_all_bits_must_be_the_same() -> None:
    tokens = Inputs.of(torch.randint(8, (2, 5)))
    table = torch.nn.Embedding(8, 8)
    other = copy.deepcopy(table)
    assert compared(other, table, table, tokens, task=CausalLM()).problem is None
    with torch.no_grad():
        other.weight.mul_(1 + 1e-6)
    assert "differ by" in str(compared(other, table, table, tokens, task=CausalLM()).problem)
    assert compared(other, table, table, tokens, task=CausalLM(), tolerance=1e-4).problem is None
