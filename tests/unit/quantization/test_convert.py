"""Converting networks: what is replaced, what stays, and what the report says."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
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


@pytest.mark.parametrize("batch_statistics", [False, True])
def test_fitting_quantizers_leaves_batch_norm_and_modes_alone(batch_statistics: bool) -> None:
    model, _ = quantize_model(network(), Recipe())
    model.train()
    model.layer2.eval()
    before = {key: value.clone() for key, value in model.state_dict().items() if "bn" in key}
    modes = [module.training for module in model.modules()]
    initialize_quantizers(model, images(), batch_statistics=batch_statistics)
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
        (Recipe(bits="Q4_0"), r"bits=.Q4_0. is not possible: write q4_0$"),
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


# --- sharing --------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """A language model in small: the head reads the table of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(x))


def test_layers_that_share_a_weight_share_its_quantizer() -> None:
    model, _ = quantize_model(Tied(), Recipe())
    assert model.head.weight is model.embedding.weight
    assert model.head.weight_quantizer is model.embedding.weight_quantizer
    initialize_quantizers(model, torch.tensor([1, 2]))
    model(torch.tensor([1, 2])).sum().backward()
    fresh, _ = quantize_model(Tied(), Recipe())
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(torch.tensor([3])), model.eval()(torch.tensor([3])))


def test_different_settings_for_one_shared_weight_are_refused_by_naming_both_layers() -> None:
    with pytest.raises(UsageError, match=r"'embedding' and 'head' share one weight .* weight_bits=8 and 4"):
        quantize_model(Tied(), Recipe(last_layer_bits=None))


def test_a_shared_weight_with_outputs_on_different_axes_is_refused_per_channel_only() -> None:
    def autoencoder() -> nn.Module:
        encoder, decoder = nn.Conv2d(4, 8, 3), nn.ConvTranspose2d(8, 4, 3)
        decoder.weight = encoder.weight
        return nn.Sequential(encoder, decoder)

    with pytest.raises(UsageError, match="different axes: give both per_channel=false"):
        quantize_model(autoencoder(), Recipe())
    model, _ = quantize_model(autoencoder(), Recipe(per_channel=False))
    assert model[0].weight_quantizer is model[1].weight_quantizer


def test_a_shared_layer_is_reported_once_with_all_its_names_and_calls() -> None:
    shared = nn.Linear(4, 4)
    _, report = quantize_model(nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(4, 2)), Recipe())
    assert [row.name for row in report.layers] == ["0", "3"]
    assert report.layers[0].note.endswith("; also 2; called 2 times")


def test_the_gradients_of_a_layer_called_twice_add_up() -> None:
    shared = nn.Linear(4, 4)
    model, _ = quantize_model(nn.Sequential(shared, shared), Recipe())
    x = torch.randn(3, 4)
    initialize_quantizers(model, x)
    model.eval()
    weight = shared.weight
    (both,) = torch.autograd.grad(model(x).sum(), [weight])
    hidden = model[0](x)
    leaf = hidden.detach().requires_grad_()
    second, upstream = torch.autograd.grad(model[0](leaf).sum(), [weight, leaf])
    (first,) = torch.autograd.grad(hidden, [weight], upstream)
    torch.testing.assert_close(both, first + second)


# --- repetition -----------------------------------------------------------------------------------------------------


def test_converting_twice_does_not_take_a_layer_in_float_for_the_first_one() -> None:
    recipe = Recipe(rules=[Rule("layer1.0.conv1", weight_bits=32, activation_bits=32)])
    model, _ = quantize_model(network(), recipe)
    model, report = quantize_model(model, recipe)
    assert type(model.layer1[0].conv1) is nn.Conv2d
    assert "were quantised already" in report.summary()


def test_the_first_report_does_not_speak_of_layers_quantised_before() -> None:
    _, report = quantize_model(network(), Recipe())
    assert report.already_quantised == 0
    assert "already" not in report.summary()


# --- what lies between layers ---------------------------------------------------------------------------------------


class Between(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.seen = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        width = x.shape[-1] + x.shape[0]  # sizes are no tensors
        self.seen = self.a(x)
        y = self.seen + self.b(x) + 3
        y += x
        y = torch.cat([y, y], dim=-1)
        return (y @ y.transpose(-1, -2)) * (width / width)


def test_the_report_lists_every_functional_operation_and_where_it_is() -> None:
    model, report = quantize_model(nn.Sequential(Between()), Recipe())
    assert [str(operation) for operation in report.operations] == [
        "functional add at 0 (2 times)",
        "functional cat at 0",
        "functional matmul at 0",
    ]
    assert "not quantised: functional cat at 0" in str(report)
    assert model[0].seen is None  # the trace ran on a copy


class DataDependent(Between):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) if x.sum() > 0 else self.b(x)


def test_the_report_says_why_a_network_could_not_be_traced() -> None:
    _, report = quantize_model(DataDependent(), Recipe())
    assert report.operations == ()
    assert report.untraceable is not None
    assert "other functional operations are not known: the graph could not be traced (TraceError" in str(report)


def test_a_transformer_layer_lists_its_residual_additions() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    _, report = quantize_model(encoder, Recipe())
    assert [str(operation) for operation in report.operations] == ["functional add at layers.0 (2 times)"]


def test_bit_operations_of_a_transposed_convolution_and_of_attention() -> None:
    recipe = Recipe(bits="w4a2", first_layer_bits=None, last_layer_bits=None)
    model, _ = quantize_model(nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2)), recipe)
    assert bit_operations(model, torch.zeros(1, 4, 5, 5)) == (4 * 5 * 5) * (3 * 9) * 4 * 2
    encoder, _ = quantize_model(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), recipe)
    assert bit_operations(encoder, torch.zeros(1, 5, 8)) == 5 * (4 * 8 * 8 + 2 * 8 * 16) * 4 * 2


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.a(x)) + self.b(x)
        return self.head(torch.cat([y, F.relu(y)], dim=1).mean((2, 3)))


def test_functions_of_one_tensor_end_on_the_grid_of_the_next_layer_and_those_of_two_are_listed() -> None:
    model, report = quantize_model(Functional(), Recipe())
    assert [str(operation) for operation in report.operations] == [
        "functional add at the top level",
        "functional cat at the top level",
    ]
    x = torch.randn(2, 3, 6, 6)
    initialize_quantizers(model, x)
    seen: list[torch.Tensor] = []
    model.head.input_quantizer.register_forward_hook(lambda module, arguments, output: seen.append(output))
    model.eval()(x)
    assert torch.isin(seen[0], model.head.input_quantizer.levels()).all()


def test_the_summary_names_the_first_and_last_layer_and_the_report_their_bits() -> None:
    _, report = quantize_model(network(), Recipe(bits="w2a2", first_layer_bits=8, last_layer_bits=32))
    bits = {row.name: (row.weight_bits, row.activation_bits) for row in report.layers}
    assert bits["conv1"] == (8, 8)
    assert bits["linear"] == (32, 32)
    assert "(first: conv1, last: layer3.0.conv2)" in report.summary()
    assert next(row for row in report.layers if row.name == "linear").note == "floating point: the recipe says so"


# --- recipes that do nothing, and layers that are never called --------------------------------------------------------


def test_rules_that_leave_nothing_to_quantise_are_refused_unless_the_bits_say_so() -> None:
    rules = [Rule("*", weight_bits=32, activation_bits=32)]
    with pytest.raises(UsageError, match=r"quantization.bits='w4a4' has no effect: the rules leave every layer"):
        quantize_model(network(), Recipe(bits="w4a4", rules=rules))
    _, report = quantize_model(network(), Recipe(bits="w32a32", first_layer_bits=None, last_layer_bits=None))
    assert report.summary().startswith("0 layers quantised")


def test_a_rule_may_match_one_layer_only() -> None:
    model, _ = quantize_model(network(), Recipe(rules=[Rule("layer1.0.conv1", weight_bits=3)]))
    bits = [name for name, q in quantizers(model).items() if q.bits == 3]
    assert bits == ["layer1.0.conv1.weight_quantizer"]


class Reader(nn.Module):
    """Cannot be traced, and computes with the weight of a layer that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.hidden, self.spare = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)
        return F.linear(y, self.hidden.weight, self.hidden.bias) if y.isfinite().all() else y


FLOAT_RULES = [Rule(name, weight_bits=32, activation_bits=32) for name in ("*.hidden", "*.spare")]


def test_a_quantised_layer_that_is_never_called_is_refused_with_the_rule_that_helps() -> None:
    model, report = quantize_model(nn.Sequential(Reader(), nn.Linear(4, 2)), Recipe())
    assert report.untraceable is not None
    modes = [module.training for module in model.modules()]
    with pytest.raises(
        UsageError, match=r"layer '0.hidden' \(and 1 more\) is quantised but never called, .*match='0.hidden'"
    ):
        initialize_quantizers(model, torch.randn(3, 4))
    assert [module.training for module in model.modules()] == modes
    model, _ = quantize_model(nn.Sequential(Reader(), nn.Linear(4, 2)), Recipe(rules=FLOAT_RULES))
    initialize_quantizers(model, torch.randn(3, 4))
    assert all(bool(q.initialized) for q in quantizers(model).values())


def test_quantizers_can_be_fitted_within_inference_mode_and_trained_afterwards() -> None:
    model, _ = quantize_model(network(), Recipe())
    with torch.inference_mode():
        initialize_quantizers(model, images())
    assert all(bool(q.initialized) for q in quantizers(model).values())
    model.train()(images()).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_layer_that_is_called_with_zeros_is_not_refused_and_tries_again() -> None:
    model, _ = quantize_model(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), Recipe())
    model[0].weight.data.zero_()
    model[0].bias.data.fill_(-1)
    initialize_quantizers(model, torch.randn(3, 4))
    assert not model[2].input_quantizer.initialized
    model[0].bias.data.fill_(1)
    initialize_quantizers(model, torch.randn(3, 4))
    assert model[2].input_quantizer.initialized
