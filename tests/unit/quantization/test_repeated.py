"""Passes of which only what has changed is computed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lqkd.models import GPT
from lqkd.quantization import Recipe, initialize_quantizers, quantize_model
from lqkd.quantization.layers import QuantizedLayer
from lqkd.quantization.repeated import RepeatedPasses


class Twice(nn.Module):
    """Calls a layer and a block twice, adds in place to what a layer gives, and ends in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.between, self.more, self.last = (nn.Linear(8, 8) for _ in range(5))
        self.block = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.first(x)
        y += x
        once = self.block(self.again(self.between(self.again(y))))
        return {"output": self.last(self.more(self.block(once) + 2 * once).relu_())}


def gpt() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    texts = torch.randint(256, (6, 16))
    return GPT(context=16, width=16, depth=3, heads=2), [texts[:4], texts[4:]]


def twice() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    return Twice(), [torch.randn(4, 8), torch.randn(3, 8)]


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: module for name, module in linear.items() if isinstance(module, QuantizedLayer)}


def of_whole_passes(model: nn.Module, batches: list[Tensor], layer: nn.Module) -> list[Tensor]:
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    for batch in batches:
        model(batch)
    handle.remove()
    return seen


@torch.no_grad()
@pytest.mark.parametrize("made", [gpt, twice])
def test_a_layer_sees_what_it_sees_in_a_whole_pass_while_those_before_it_change(
    made: Callable[[], tuple[nn.Module, list[Tensor]]],
) -> None:
    network, batches = made()
    model, _ = quantize_model(network, Recipe("w3a8", first_layer_bits=3, last_layer_bits=3))
    initialize_quantizers(model, batches[0])
    model.eval()
    passes = RepeatedPasses(model, batches, nn.Module.__call__, layers := linear_layers(model))
    assert sorted(passes.order) == sorted(layers)
    for name in passes.order:
        found, wanted = list(passes.inputs(name)), of_whole_passes(model, batches, layers[name])
        assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True)), name
        layers[name].weight.mul_(torch.linspace(0.2, 1.5, layers[name].weight.shape[1]))
    assert all("forward" not in vars(module) for module in model.modules())


@torch.no_grad()
def test_of_blocks_that_have_had_their_turn_none_is_computed_again_nor_one_that_comes_later() -> None:
    network, batches = gpt()
    model, _ = quantize_model(network, Recipe("w3a32"))
    initialize_quantizers(model, batches[0])
    model.eval()
    passes = RepeatedPasses(model, batches, nn.Module.__call__, linear_layers(model))
    calls = [0, 0, 0]

    def count(place: int) -> None:
        calls[place] += 1

    for place in range(3):
        model.get_submodule(f"blocks.{place}.norm1").register_forward_hook(lambda *_, place=place: count(place))
    for name in passes.order:
        list(passes.inputs(name))
    # Two batches, four layers a block, and once more for what the block gives at last.
    assert calls == [10, 10, 10]
