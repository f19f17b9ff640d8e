"""What layers cost in one forward pass."""

from __future__ import annotations

import torch
from torch import nn

from lqkd.quantization import Recipe, bit_operations, layer_costs, quantize_model


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False)
        self.pointwise = nn.Conv2d(4, 4, 1, groups=2)
        self.linear = nn.Linear(4, 5)
        self.idle = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.pointwise(self.pointwise(self.conv(x))).mean((2, 3)))


def test_multiplications_and_bits_of_each_layer_are_those_of_the_formula() -> None:
    network, _ = quantize_model(Reused(), Recipe(bits="w3a2", first_layer_bits=8, last_layer_bits=32))
    layers = {layer.name: layer for layer in layer_costs(network, torch.zeros(1, 2, 8, 8))}
    assert list(layers) == ["conv", "pointwise", "linear"]  # in the order of the calls, without what is never called
    conv, pointwise = layers["conv"], layers["pointwise"]
    assert (conv.weights, conv.multiplications, conv.packed_bytes) == (72, 16 * 72, 72)
    assert conv.bit_operations == 16 * 72 * 64
    assert (pointwise.weights, pointwise.packed_bytes) == (8, 3)
    assert pointwise.multiplications == 2 * 16 * 8  # it is called twice
    assert pointwise.bit_operations == 2 * 16 * 8 * 6
    assert (layers["linear"].weight_bits, layers["linear"].activation_bits) == (3, 2)


def test_bit_operations_of_a_network_are_those_of_its_layers() -> None:
    network, _ = quantize_model(Reused(), Recipe(bits="w4a4"))
    example = torch.zeros(1, 2, 8, 8)
    assert bit_operations(network, example) == sum(layer.bit_operations for layer in layer_costs(network, example)) > 0
    assert network.training


def test_attention_counts_its_projections() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x)[0]

    layers = layer_costs(Attends(), torch.zeros(1, 3, 8))
    assert sum(layer.multiplications for layer in layers) == 4 * 3 * 8 * 8
    assert max(layer.weights for layer in layers) >= 3 * 8 * 8
