"""Quantised layers: the float layer's function on operands that lie on a grid, whatever the layer's settings."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.quantization import Recipe, Rule, coverage, initialize_quantizers, quantize_model, quantizers
from lqkd.quantization.layers import QuantConv2d, QuantizedLayer, QuantLinear, QuantMultiheadAttention

UNIFORM = {"first_layer_bits": None, "last_layer_bits": None}

LAYERS = [
    (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    (nn.Conv2d(4, 6, 3, stride=2, groups=2, padding="valid", bias=False), (2, 4, 9, 9)),
    (nn.Conv2d(4, 4, 3, groups=4, padding="same", padding_mode="reflect"), (2, 4, 9, 9)),
    (nn.Conv2d(4, 6, 3, padding=(2, 1), dilation=(2, 1), padding_mode="circular"), (2, 4, 9, 9)),
    (nn.Conv3d(2, 3, 3, padding=1), (2, 2, 5, 5, 5)),
    (nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 5)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (2, 4, 5, 5)),
    (nn.ConvTranspose2d(4, 8, 3, groups=4), (2, 4, 5, 5)),
    (nn.ConvTranspose3d(2, 3, 3), (2, 2, 4, 4, 4)),
    (nn.Linear(6, 3), (2, 5, 6)),
]


def quantised(layer: nn.Module, *inputs: Any, bits: str = "w4a4") -> Any:
    """A fitted quantised copy of ``layer`` in eval mode."""
    model, _ = quantize_model(copy.deepcopy(layer), Recipe(bits=bits, **UNIFORM))
    initialize_quantizers(model, *inputs)
    return model.eval()


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=[str(layer) for layer, _ in LAYERS])
def test_a_quantised_layer_is_the_float_layer_on_quantised_operands(layer: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    model = quantised(layer, x)
    reference = copy.deepcopy(layer)
    with torch.no_grad():
        reference.weight.copy_(model.weight_quantizer(layer.weight))
    assert not torch.equal(reference.weight, layer.weight)
    assert model.weight_quantizer.channels == layer.weight.shape[model.weight_axis(layer)]
    torch.testing.assert_close(model(x), reference(model.input_quantizer(x)), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("layer", "axis"),
    [
        (nn.ConvTranspose2d(3, 8, 3), 1),
        (nn.ConvTranspose2d(4, 8, 3, groups=2), 1),
        (nn.ConvTranspose2d(4, 8, 3, groups=4), 0),
    ],
)
def test_every_output_of_a_transposed_convolution_sums_over_one_grid(layer: nn.ConvTranspose2d, axis: int) -> None:
    x = torch.randn(1, layer.in_channels, 4, 4)
    model = quantised(layer, x)
    assert model.weight_quantizer.channel_axis == axis
    # One scale per output channel: the outputs of codes and of values differ by one factor in each channel.
    scale = model.weight_quantizer.scale
    codes = F.conv_transpose2d(x, model.weight_quantizer.codes(layer.weight).float(), groups=layer.groups)
    values = F.conv_transpose2d(x, model.quantized_weight(), groups=layer.groups)
    factor = values.abs().amax((0, 2, 3)) / codes.abs().amax((0, 2, 3))
    torch.testing.assert_close(values, codes * factor.view(-1, 1, 1))
    assert all(torch.isclose(scale, value).any() for value in factor)


def test_a_transposed_convolution_accepts_an_output_size() -> None:
    layer = nn.ConvTranspose2d(3, 4, 3, stride=2)
    assert quantised(layer, torch.randn(1, 3, 4, 4))(torch.randn(1, 3, 4, 4), output_size=[10, 10]).shape[-1] == 10


def test_an_embedding_looks_up_rows_that_each_have_a_grid() -> None:
    layer = nn.Embedding(5, 16, padding_idx=0)
    indices = torch.tensor([[1, 4], [0, 1]])
    model = quantised(layer, indices, bits="w2a2")
    assert model.input_quantizer is None
    assert torch.equal(model(indices), model.weight_quantizer(layer.weight)[indices])
    assert all(len(row.unique()) <= 4 for row in model(indices).flatten(0, 1))


def test_padding_rows_of_a_quantised_embedding_get_no_gradient() -> None:
    model = quantised(nn.Embedding(5, 16, padding_idx=0), torch.tensor([0, 1]))
    model(torch.tensor([0, 1])).sum().backward()
    assert model.weight.grad[0].abs().sum() == 0 < model.weight.grad[1].abs().sum()


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"sparse": True}])
def test_an_embedding_whose_table_changes_in_place_stays_in_float(options: dict[str, Any]) -> None:
    model, report = quantize_model(nn.Sequential(nn.Embedding(5, 4, **options), nn.Linear(4, 4)), Recipe())
    assert type(model[0]) is nn.Embedding
    assert "max_norm or sparse" in report.layers[0].note


def test_hooks_and_their_handles_survive() -> None:
    layer, seen = nn.Linear(3, 3), []
    handle = layer.register_forward_hook(lambda *_: seen.append(1))
    model, _ = quantize_model(nn.Sequential(layer), Recipe())
    model(torch.ones(1, 3))
    handle.remove()
    model(torch.ones(1, 3))
    assert seen == [1]


def test_converting_leaves_the_float_layer_itself_as_it_was() -> None:
    layer = nn.Linear(3, 3)
    quantize_model(nn.Sequential(layer), Recipe())
    assert [name for name, _ in layer.named_modules()] == [""]
    assert list(layer._buffers) == []


# --- subclasses -----------------------------------------------------------------------------------------------------


class SamePadded(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean()) / self.weight.std()
        return F.conv2d(x, weight, self.bias)


class InputScaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input * 0.3, self.weight, self.bias)


class Twice(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + F.linear(input, self.weight)


class Broken(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        raise RuntimeError("needs something else")


def test_a_subclass_that_only_pads_is_quantised_and_keeps_its_forward() -> None:
    x = torch.randn(2, 3, 6, 6)
    layer = SamePadded(3, 4, 3)
    model = quantised(layer, x)
    assert isinstance(model, QuantizedLayer)
    assert isinstance(model, SamePadded)
    expected = F.conv2d(model.input_quantizer(x), model.weight_quantizer(layer.weight), layer.bias, padding=1)
    torch.testing.assert_close(model(x), expected)
    assert [name for name, _ in model.named_parameters()][:2] == ["weight", "bias"]


def test_the_weight_of_a_quantised_subclass_is_trained_and_copied_and_pickled() -> None:
    x = torch.randn(2, 3, 6, 6)
    model = quantised(SamePadded(3, 4, 3), x)
    model(x).sum().backward()
    assert model.weight.grad is not None
    assert model.weight.grad.abs().sum() > 0
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (copy.deepcopy(model), loaded):
        assert type(other) is type(model)
        assert torch.equal(other(x), model(x))
        assert other.weight is not model.weight


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Standardised(3, 4, 3), "changes its weight"),
        (InputScaled(3, 4), "changes its input"),
        (Twice(3, 4), "computes 2 products"),
        (Broken(3, 4), r"could not be tried \(RuntimeError\)"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), "computed from other parameters"),
    ],
)
def test_a_subclass_that_does_something_else_stays_in_float_with_the_reason(layer: nn.Module, reason: str) -> None:
    model, report = quantize_model(nn.Sequential(layer, nn.Conv2d(1, 1, 1)), Recipe())
    assert model[0] is layer
    row = next(row for row in report.layers if row.name == "0")
    assert row.is_float
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(row.note)


def test_a_layer_that_can_not_be_quantised_alone_is_refused_with_the_reason() -> None:
    with pytest.raises(UsageError, match=r"nothing to quantise .*changes its weight"):
        quantize_model(nn.Sequential(Standardised(3, 4, 3)), Recipe())


# --- attention ------------------------------------------------------------------------------------------------------


def attention_inputs(batch_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 8, generator=generator) for n in (5, 4, 4))
    return (q, k, v) if batch_first else (q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1))


@pytest.mark.parametrize(
    ("settings", "call"),
    [
        ({"batch_first": True}, {}),
        ({"batch_first": False, "bias": False}, {"average_attn_weights": False}),
        ({"batch_first": True, "add_bias_kv": True, "add_zero_attn": True}, {"need_weights": False}),
        (
            {"batch_first": True, "add_bias_kv": True, "add_zero_attn": True},
            {"key_padding_mask": "bool", "attn_mask": "bool"},
        ),
        ({"batch_first": False}, {"key_padding_mask": "bool", "need_weights": False}),
        ({"batch_first": True}, {"attn_mask": "heads", "need_weights": False}),
        ({"batch_first": True}, {"attn_mask": "float", "is_causal": False}),
    ],
)
def test_attention_without_quantizers_is_the_attention_of_torch(settings: dict[str, Any], call: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, **settings).eval()
    masks = {
        "key_padding_mask": {"bool": torch.tensor([[False, False, True, False], [False, True, False, False]])},
        "attn_mask": {
            "bool": torch.ones(5, 4).triu(1).bool(),
            "heads": torch.randn(4, 5, 4),
            "float": torch.randn(5, 4),
        },
    }
    call = {key: masks[key][value] if isinstance(value, str) else value for key, value in call.items()}
    inputs = attention_inputs(settings["batch_first"])
    expected, expected_weights = layer(*inputs, **call)
    model = QuantMultiheadAttention.from_float(layer, None, None)
    output, weights = model(*inputs, **call)
    torch.testing.assert_close(output, expected)
    assert (weights is None) == (expected_weights is None)
    if weights is not None:
        torch.testing.assert_close(weights, expected_weights)


def test_attention_takes_a_single_unbatched_sequence() -> None:
    layer = nn.MultiheadAttention(8, 2).eval()
    x, padding = torch.randn(5, 8), torch.tensor([False, False, False, True, True])
    expected, expected_weights = layer(x, x, x, key_padding_mask=padding)
    output, weights = QuantMultiheadAttention.from_float(layer, None, None)(x, x, x, key_padding_mask=padding)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(weights, expected_weights)


def test_both_projections_of_attention_are_quantised() -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    model, report = quantize_model(copy.deepcopy(layer), Recipe(bits="w2a4", **UNIFORM))
    initialize_quantizers(model, x, x, x)
    model.eval()
    assert [row.weight_bits for row in report.layers] == [2, 2]
    reference = copy.deepcopy(layer)
    with torch.no_grad():
        reference.in_proj_weight.copy_(model.weight_quantizer(layer.in_proj_weight))
        reference.out_proj.weight.copy_(torch.eye(8))
        reference.out_proj.bias.zero_()
        attended = reference(*[model.input_quantizer(x)] * 3)[0]
        expected = F.linear(
            model.out_proj.input_quantizer(attended),
            model.out_proj.weight_quantizer(layer.out_proj.weight),
            layer.out_proj.bias,
        )
    torch.testing.assert_close(model(x, x, x)[0], expected)


def test_the_fused_inference_path_of_an_encoder_does_not_bypass_quantization() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2)
    model, _ = quantize_model(encoder, Recipe(bits="w2a2", **UNIFORM))
    x = torch.randn(2, 5, 8)
    initialize_quantizers(model, x)
    model.eval()
    with torch.no_grad():
        fused = model(x)
    torch.testing.assert_close(fused, model(x))  # with gradients the fused path is never taken
    assert all(bool(quantizer.initialized) for quantizer in quantizers(model).values())


def test_a_projection_in_float_beside_a_quantised_one_is_possible_both_ways() -> None:
    x = torch.randn(2, 5, 8)
    for rule in (Rule("out_proj", weight_bits=32, activation_bits=32), Rule("MultiheadAttention", 32, 32)):
        model, report = quantize_model(nn.MultiheadAttention(8, 2), Recipe(rules=[rule], **UNIFORM))
        initialize_quantizers(model, x, x, x)
        assert sorted(row.weight_bits for row in report.layers) == [4, 32]
        assert model(x, x, x)[0].isfinite().all()
        assert all(bool(quantizer.initialized) for quantizer in quantizers(model).values())


def test_attention_of_different_widths_stays_in_float_as_a_whole() -> None:
    network = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, kdim=4), "head": nn.Linear(8, 2)})
    model, report = quantize_model(network, Recipe())
    notes = {row.name: row.note for row in report.layers}
    assert "another width" in notes["attn"]
    assert "part of attention that is not quantised" in notes["attn.out_proj"]
    assert not isinstance(model["attn"].out_proj, QuantLinear)


def test_an_is_causal_hint_without_its_mask_is_refused() -> None:
    x = torch.randn(1, 3, 8)
    model, _ = quantize_model(nn.MultiheadAttention(8, 2), Recipe())
    with pytest.raises(ValueError, match="needs attn_mask"):
        model(x, x, x, is_causal=True)


def test_a_weight_that_is_read_without_calling_the_layer_is_not_claimed_to_be_quantised() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.hidden.weight, self.hidden.bias)

    model, report = quantize_model(nn.Sequential(Reader(), nn.Conv2d(1, 1, 1)), Recipe())
    assert type(model[0].hidden) is nn.Linear
    assert report.layers[0].note == "floating point: its weight is read by 0, which does not call the layer"
    assert isinstance(model[1], QuantConv2d)
    assert coverage(model) == report
