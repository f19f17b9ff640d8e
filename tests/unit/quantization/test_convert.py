"""Converting networks: what is replaced, what stays, and what the report says."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lqkd.errors import UsageError
from lqkd.models import CifarResNet
from lqkd.quantization import (
    QuantConv2d,
    QuantLinear,
    Recipe,
    Rule,
    bit_operations,
    coverage,
    float_mode,
    initialize_quantizers,
    quantize_model,
    quantizers,
    size,
)


def network() -> CifarResNet:
    torch.manual_seed(0)
    return CifarResNet(8, width=4)


def images() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_first_and_last_layer_keep_eight_bits() -> None:
    model, _ = quantize_model(network(), Recipe(bits="w2a2"))
    bits = {name: quantizer.bits for name, quantizer in quantizers(model).items()}
    ends = {bits[f"{layer}.{q}_quantizer"] for layer in ("conv1", "linear") for q in ("weight", "input")}
    assert ends == {8}
    assert bits["layer1.0.conv1.weight_quantizer"] == 2


def test_a_quantised_layer_keeps_every_setting_and_parameter_of_the_float_one() -> None:
    conv = nn.Conv2d(4, 8, (3, 5), stride=2, padding=(1, 2), dilation=1, groups=2, bias=True)
    weight = conv.weight
    model, _ = quantize_model(nn.Sequential(conv), Recipe(first_layer_bits=None, last_layer_bits=None))
    quantised = model[0]
    assert isinstance(quantised, QuantConv2d)
    assert quantised.weight is weight
    assert (quantised.stride, quantised.padding, quantised.groups) == (conv.stride, conv.padding, conv.groups)


def test_a_quantised_layer_computes_the_float_layer_on_quantised_operands() -> None:
    layer = nn.Linear(6, 4)
    model, _ = quantize_model(nn.Sequential(layer), Recipe(first_layer_bits=None, last_layer_bits=None))
    x = torch.randn(5, 6)
    initialize_quantizers(model, x)
    quantised = model[0]
    assert isinstance(quantised, QuantLinear)
    expected = quantised.input_quantizer(x) @ quantised.weight_quantizer(layer.weight).T + layer.bias
    torch.testing.assert_close(model(x), expected)


def test_a_float_checkpoint_loads_after_conversion_with_only_quantizers_missing() -> None:
    state = network().state_dict()
    model, _ = quantize_model(network(), Recipe())
    result = model.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert all("quantizer" in key for key in result.missing_keys)


def test_converting_twice_changes_nothing() -> None:
    model, first = quantize_model(network(), Recipe())
    modules = [id(module) for module in model.modules()]
    model, second = quantize_model(model, Recipe())
    assert [id(module) for module in model.modules()] == modules
    assert first == second


def test_a_shared_layer_stays_shared() -> None:
    shared = nn.Linear(4, 4)
    model, _ = quantize_model(nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(4, 2)), Recipe())
    assert model[0] is model[2]
    assert isinstance(model[0], QuantLinear)


def test_a_converted_network_survives_deepcopy_and_a_state_dict_round_trip() -> None:
    model, _ = quantize_model(network(), Recipe())
    initialize_quantizers(model, images())
    model.eval()
    fresh, _ = quantize_model(network(), Recipe())
    fresh.load_state_dict(model.state_dict())
    expected = model(images())
    assert torch.equal(copy.deepcopy(model)(images()), expected)
    assert torch.equal(fresh.eval()(images()), expected)


def test_fitting_quantizers_leaves_batch_norm_and_modes_alone() -> None:
    model, _ = quantize_model(network(), Recipe())
    model.train()
    model.layer2.eval()
    before = {key: value.clone() for key, value in model.state_dict().items() if "running" in key}
    modes = [module.training for module in model.modules()]
    initialize_quantizers(model, images())
    assert all(bool(quantizer.initialized) for quantizer in quantizers(model).values())
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert [module.training for module in model.modules()] == modes


def test_float_mode_runs_the_float_network_and_ends() -> None:
    model, _ = quantize_model(network(), Recipe(bits="w2a2"))
    initialize_quantizers(model, images())
    model.eval()
    quantised = model(images())
    with float_mode(model):
        torch.testing.assert_close(model(images()), network().eval()(images()))
    assert torch.equal(model(images()), quantised)


def test_a_later_rule_wins_over_an_earlier_one_field_by_field() -> None:
    rules = [Rule("layer2.*", weight_bits=8, activation_bits=8), Rule("layer2.0.conv1", weight_bits=3)]
    model, _ = quantize_model(network(), Recipe(bits="w4a4", rules=rules))
    layer = model.layer2[0]
    assert (layer.conv1.weight_quantizer.bits, layer.conv1.input_quantizer.bits) == (3, 8)
    assert layer.conv2.weight_quantizer.bits == 8
    assert model.layer1[0].conv1.weight_quantizer.bits == 4


def test_a_rule_can_name_a_class_and_leave_it_in_floating_point() -> None:
    model, report = quantize_model(network(), Recipe(rules=[Rule("Linear", weight_bits=32, activation_bits=32)]))
    assert type(model.linear) is nn.Linear
    assert "linear" in str(report)
    assert next(row for row in report.layers if row.name == "linear").note == "floating point: the recipe says so"


def test_weights_only_quantization_has_no_input_quantizer() -> None:
    model, _ = quantize_model(network(), Recipe(bits="w2a32"))
    assert model.layer1[0].conv1.input_quantizer is None


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe(bits="w0a4"), r"quantization.bits='w0a4' is not possible: bits are 1 to 8"),
        (Recipe(bits="w4a9"), r"bits are 1 to 8"),
        (Recipe(bits="4"), r"is not understood: write weight and activation bits like w4a4, or ternary"),
        (Recipe(weight_quantizer="lsqq"), r"quantizer 'lsqq' is unknown: use .*lsq"),
        (Recipe(rules=[Rule("layer9.*", weight_bits=8)]), r"match='layer9.\*' matches no layer: the layers are conv1"),
        (Recipe(rules=[Rule("linear", weight_bits=12)]), r"weight_bits=12 is not possible"),
        (Recipe(first_layer_bits=0), r"first_layer_bits=0 is not possible"),
    ],
)
def test_an_impossible_recipe_is_refused_in_one_sentence(recipe: Recipe, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        quantize_model(network(), recipe)
    assert "\n" not in str(caught.value)


def test_a_network_without_layers_to_quantise_is_refused() -> None:
    with pytest.raises(UsageError, match="has nothing to quantise"):
        quantize_model(nn.Sequential(nn.ReLU()), Recipe())


def test_the_report_lists_every_layer_with_parameters() -> None:
    model, report = quantize_model(network(), Recipe(bits="w2a2"))
    listed = {row.name for row in report.layers}
    assert listed == {name for name, module in model.named_modules() if module._parameters and "quantizer" not in name}
    assert coverage(model) == report


def test_packed_size_is_bits_of_the_weights_plus_floats_of_the_rest() -> None:
    layer = nn.Linear(10, 4)
    recipe = Recipe(bits="w2a2", first_layer_bits=None, last_layer_bits=None)
    model, _ = quantize_model(nn.Sequential(layer), recipe)
    measured = size(model)
    assert measured.parameters == 44
    assert measured.float_bytes == 44 * 4
    assert measured.packed_bytes == 40 * 2 // 8 + 4 * 4 + 4 * 4 + 4  # weight, bias, weight steps, input step


def test_bit_operations_are_macs_times_both_bits() -> None:
    layer = nn.Conv2d(2, 3, 3, padding=1)
    recipe = Recipe(bits="w4a2", first_layer_bits=None, last_layer_bits=None)
    model, _ = quantize_model(nn.Sequential(layer), recipe)
    assert bit_operations(model, torch.zeros(1, 2, 8, 8)) == 3 * 8 * 8 * (2 * 9) * 4 * 2
