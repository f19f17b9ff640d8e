"""Layers with weights that stay in floating point although the recipe has bits for them: named, with their shares."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lqkd.quantization import Recipe, Rule, operation_shares, quantize_model


class Conv1D(nn.Module):
    """A linear layer with a transposed weight, as GPT-2 of Hugging Face has it."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs) * 0.1), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])


class Language(nn.Module):
    """One of each: known layers, layers of foreign classes, attention that is refused, parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(10, 16), nn.Linear(16, 10)
        self.blocks = nn.ModuleList([Conv1D(16, 16) for _ in range(4)])
        self.attention = nn.MultiheadAttention(16, 2, vdim=8, batch_first=True)
        self.recurrent = nn.GRU(16, 16, batch_first=True)
        self.positions = nn.Parameter(torch.zeros(1, 5, 16))
        self.layer_scale = nn.Parameter(torch.ones(16, 1, 1))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens) + self.positions
        for block in self.blocks:
            x = block(x)
        x, _ = self.recurrent(x)
        x, _ = self.attention(x, x, x[..., :8])
        return self.head(x.mean(1))


def test_every_layer_that_owns_a_weight_and_stays_in_float_is_named_with_its_share_of_the_parameters() -> None:
    model = Language()
    total = sum(p.numel() for p in model.parameters())
    _, report = quantize_model(model, Recipe(bits="w4a4"))
    told = report.passed_over()
    assert [sentence.split(" with ")[0] for sentence in told] == [
        "Language the network",
        "Conv1D blocks.0, blocks.1, blocks.2 and 1 more",
        "MultiheadAttention attention",
        "Linear attention.out_proj",
        "GRU recurrent",
    ]
    assert told[1].endswith(
        f"with {4 * 272 / total:.1%} of the parameters in floating point: no quantised layer of this kind"
    )
    assert all(f"not quantised: {sentence}" in str(report).splitlines() for sentence in told)


def test_shares_of_operations_are_told_where_they_were_counted() -> None:
    model, report = quantize_model(Language(), Recipe(bits="w4a4"))
    shares = operation_shares(model, torch.zeros(1, 5, dtype=torch.int64))
    blocks, head, recurrent = 4 * 5 * 16 * 16, 16 * 10, 5 * 6 * 16 * 16
    attention = 5 * 16 * (16 + 16 + 8 + 16) + 2 * 5 * 5 * 16
    total = blocks + head + recurrent + attention
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["head"] == pytest.approx(head / total)
    assert shares["attention"] == pytest.approx(attention / total)
    assert sum(shares[f"blocks.{i}"] for i in range(4)) == pytest.approx(blocks / total)
    told = report.with_operations(shares).passed_over()
    assert f" and {blocks / total:.1%} of the operations in floating point" in told[1]
    assert "operations" not in told[3]  # what attention does not call by itself


def test_what_the_recipe_leaves_in_float_is_not_told() -> None:
    layers = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2), nn.Linear(2, 2))
    _, report = quantize_model(layers, Recipe(rules=[Rule("2", weight_bits=32, activation_bits=32)]))
    assert report.passed_over() == []
    _, report = quantize_model(Language(), Recipe(bits="w32a32", first_layer_bits=None, last_layer_bits=None))
    assert report.passed_over() == []


def test_a_tied_weight_counts_once() -> None:
    model = nn.Sequential(nn.Embedding(10, 16), Conv1D(16, 16), nn.Linear(16, 10, bias=False))
    model[2].weight = model[0].weight
    _, report = quantize_model(model, Recipe())
    assert report.passed_over()[0].startswith(f"Conv1D 1 with {272 / (272 + 160):.1%} of the parameters")
