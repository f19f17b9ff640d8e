"""Biases that an integer kernel can have: on the grid that the export uses."""

from __future__ import annotations

import copy
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from lqkd.export import deploy
from lqkd.export.integer import IntegerLayer
from lqkd.models import SmallFCOS
from lqkd.quantization import Recipe, Rule, fold_batchnorm, initialize_quantizers, quantize_model
from lqkd.quantization.batchnorm import foldable
from lqkd.quantization.biases import bias_owners, integer_biases
from tests.unit.export.networks import images, quantised


def projected(network: nn.Module) -> nn.Module:
    """A copy of ``network`` with the biases of an integer kernel."""
    network = copy.deepcopy(network)
    for name, value in integer_biases(network, foldable(network).folded).items():
        cast(Tensor, network.get_submodule(name).bias).data.copy_(value)
    return network


def off_grid(network: nn.Module) -> dict[str, float]:
    """For each layer with an integer bias, how many steps the student's folded bias is from the deployed one."""
    folded = copy.deepcopy(network)
    fold_batchnorm(folded)
    deployed = deploy(network, images(2), [images(32)]).network
    return {
        name: float(((folded.get_submodule(name).bias - layer.float_bias()) / layer.bias_scale).detach().abs().max())
        for name, layer in deployed.named_modules()
        if isinstance(layer, IntegerLayer) and layer.bias_codes is not None
    }


@pytest.mark.parametrize("bits", ["w8a8", "w4a4", "w2a2", "ternary"])
@pytest.mark.parametrize("residual_bits", [None, 8])
def test_the_student_has_the_biases_that_are_deployed(bits: str, residual_bits: int | None) -> None:
    network = quantised(bits=bits, residual_bits=residual_bits)
    with torch.no_grad():
        network.norm1.weight[:2] *= -1  # negative factors, and a channel that is constant
        network.norm1.weight[2] = 0.0
    before, after = off_grid(network), off_grid(projected(network))
    assert before.keys() == {"stem", "conv1", "conv2", "linear"}
    assert min(before.values()) > 0.1
    assert max(after.values()) < 0.01


def test_a_bias_moves_by_half_a_step_at_most_and_the_second_time_not_at_all() -> None:
    network = quantised(bits="w2a2")
    once = projected(network)
    twice = projected(once)
    assert max(off_grid(network).values()) <= 0.5 + 1e-3
    for (name, a), (_, b) in zip(once.named_parameters(), twice.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=name)


def test_nothing_but_biases_moves() -> None:
    network = quantised(bits="w4a4")
    after = projected(network).state_dict()
    moved = {key for key, value in network.state_dict().items() if not torch.equal(value, after[key])}
    assert moved == {"norm.bias", "norm1.bias", "norm2.bias", "linear.bias"}  # conv1's own goes into its norm's


@pytest.mark.parametrize(
    "rule",
    [
        Rule("conv1", weight_bits=32),
        Rule("conv1", activation_bits=32),
        Rule("conv1", weight_quantizer="ttq"),
        Rule("conv1", activation_quantizer="n2uq"),
    ],
)
def test_biases_that_stay_in_floating_point_are_left_alone(rule: Rule) -> None:
    network = quantised(bits="w2a2", rules=[rule])
    assert bias_owners(network, foldable(network).folded).keys() == {"stem", "conv2", "linear"}
    assert torch.equal(projected(network).norm1.bias, network.norm1.bias)


def test_a_bias_that_two_layers_share_is_left_alone() -> None:
    network = quantised(bits="w4a4")
    network.norm2.bias = network.norm1.bias
    assert bias_owners(network, foldable(network).folded).keys() == {"stem", "linear"}


def test_layers_that_were_never_fitted_are_left_out() -> None:
    network = quantised(bits="w4a4")
    network.conv1.input_quantizer.forget()
    assert "norm1" not in integer_biases(network, foldable(network).folded)


def test_a_bias_that_leads_to_sums_half_way_between_two_levels_is_avoided() -> None:
    layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(256, 5))
    network = projected(quantised(layers, bits="w4a4", first_layer_bits=None))
    layer = cast(IntegerLayer, deploy(network, images(2)).network.get_submodule("0"))
    assert layer.bias_codes is not None
    assert layer.bias_scale is not None
    sums = int(layer.bias_codes[0]) + layer.multiplier * torch.arange(-500, 500)
    frequent = int(sums[sums > 50][0])
    network[2].input_quantizer.scale.data.copy_(layer.bias_scale[0] * frequent / 2.5)
    after = projected(network)
    moved = ((after[0].bias - network[0].bias) / layer.bias_scale).detach()
    assert 0.9 < float(moved[0].abs()) < 8.1
    torch.testing.assert_close(moved[0], moved[0].round(), rtol=0, atol=1e-2)
    torch.testing.assert_close(projected(after)[0].bias, after[0].bias, rtol=1e-6, atol=1e-7)


def test_what_is_read_on_a_grid_for_each_call_or_token_is_no_obstacle() -> None:
    for residual_bits in (None, 8):
        network = SmallFCOS(3, width=4, depth=1)
        student, _ = quantize_model(network, Recipe("w4a4", per_level=True, residual_bits=residual_bits))
        initialize_quantizers(student, torch.randn(2, 3, 32, 32))
        owners = bias_owners(student, foldable(student).folded)
        assert owners
        assert not any(name.startswith("head.") for name in owners)
        assert integer_biases(student, foldable(student).folded).keys() == set(owners.values())
    rule = Rule("1", activation_quantizer="dynamic")
    chain, _ = quantize_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)), Recipe(rules=[rule]))
    initialize_quantizers(chain, torch.randn(8, 4))
    assert integer_biases(chain, {}).keys() == {"0", "2"}
