"""Crossings and reversals of weights that are moved by hand."""

from __future__ import annotations

import torch
from torch import nn

from lqkd.quantization import OscillationCounter, Recipe, initialize_quantizers, quantize_model

UNIFORM = {"first_layer_bits": None, "last_layer_bits": None}


def network(bits: str = "w4a32") -> nn.Module:
    model, _ = quantize_model(nn.Sequential(nn.Linear(3, 1)), Recipe(bits=bits, per_channel=False, **UNIFORM))
    initialize_quantizers(model, torch.ones(1, 3))
    model[0].weight_quantizer.scale.data.fill_(1.0)
    return model


def counted(model: nn.Module, *weights: list[float]) -> tuple[int, int]:
    counter = OscillationCounter(model)
    for values in weights:
        model[0].weight.data.copy_(torch.tensor([values]))
        counter.update()
    assert counter.weights == 3
    return counter.take()


def test_a_weight_that_flips_back_and_forth_reverses_at_every_crossing_but_its_first() -> None:
    flipping = [[0.4, 2.0, -3.1], [0.6, 2.0, -3.2], [0.4, 2.0, -3.3], [0.6, 2.0, -3.4]]
    assert counted(network(), *flipping) == (3, 2)


def test_a_weight_that_walks_in_one_direction_crosses_and_never_reverses_even_with_a_pause() -> None:
    assert counted(network(), [0.0, 0, 0], [1.0, 0, 0], [1.2, 0, 0], [2.0, 0, 0], [3.0, 0, 0]) == (3, 0)
    assert counted(network(), [0.0, 0, 0], [1.0, 0, 0], [1.2, 0, 0], [0.0, 0, 0]) == (2, 1)  # the pause is no excuse


def test_a_change_of_bits_is_no_crossing_and_counts_are_taken_once() -> None:
    model = network()
    model[0].weight.data.copy_(torch.tensor([[1.0, 2.0, -3.0]]))
    counter = OscillationCounter(model)
    counter.update()
    model[0].weight_quantizer.set_bits(2)
    counter.update()
    assert counter.take() == (0, 0)
    model[0].weight.data.mul_(-10)
    counter.update()
    assert counter.take()[0] > 0
    assert counter.take() == (0, 0)


def test_layers_with_more_bits_or_without_a_grid_are_left_out() -> None:
    model = network("w8a32")
    counter = OscillationCounter(model, most_bits=4)
    counter.update()
    model[0].weight.data.add_(5)
    counter.update()
    assert (counter.weights, counter.crossings) == (0, 0)
    fresh, _ = quantize_model(nn.Sequential(nn.Linear(3, 1)), Recipe(bits="w4a4", **UNIFORM))
    counter = OscillationCounter(fresh)
    counter.update()
    assert counter.weights == 0
