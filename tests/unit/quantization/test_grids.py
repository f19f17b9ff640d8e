"""Rounding and codes: one rule for every dtype and granularity, the whole range used, integers that compute alike."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lqkd.quantization import LSQ, QUANTIZERS, Recipe, Rule, initialize_quantizers, quantize_model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_midpoints_of_an_eight_bit_grid_round_to_even_in_every_dtype(dtype: torch.dtype) -> None:
    quantizer = LSQ(8, signed=True)
    quantizer.initialize(torch.ones(3))
    quantizer.scale.data.fill_(0.125)
    codes = torch.arange(-128, 127)
    midpoints = ((codes + 0.5) * 0.125).to(dtype)
    assert torch.equal(midpoints.double(), (codes + 0.5).double() * 0.125)  # even bfloat16 holds them
    expected = torch.where(codes % 2 == 0, codes, codes + 1)
    assert quantizer.codes(midpoints).tolist() == expected.tolist()
    assert torch.equal(quantizer(midpoints).double(), expected.double() * 0.125)


@pytest.mark.parametrize("offset_in_steps", [-2.6, -2.5, -2.4, -0.5])
def test_a_learned_zero_point_rounds_alike_per_tensor_and_per_channel(offset_in_steps: float) -> None:
    x = torch.randn(1, 400)
    results = []
    for channels in (None, 1):
        quantizer = QUANTIZERS["lsq_plus"](4, channels=channels)
        quantizer.initialize(x)
        quantizer.scale.data.fill_(0.25)
        quantizer.offset.data.fill_(offset_in_steps * 0.25)
        leaf = x.clone().requires_grad_()
        quantizer(leaf).backward(x.sin())
        gradients = [leaf.grad, *(p.grad.reshape(()) for p in quantizer.parameters())]
        results.append([quantizer(x).detach(), quantizer.codes(x), quantizer.zero_level().reshape(()), *gradients])
    for alone, per_channel in zip(*results, strict=True):
        assert torch.equal(alone, per_channel)
    assert results[0][2].item() == round(offset_in_steps)  # half to even, like the codes


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("name", ["lsq", "lsq_plus", "minmax", "mse"])
def test_eight_bits_use_all_256_codes_and_none_is_reserved(name: str, signed: bool) -> None:
    x = torch.linspace(-4 if signed else 0, 4, 5001)
    quantizer = QUANTIZERS[name](8, signed=signed, batched=True)
    quantizer.initialize(x)
    codes = quantizer.codes(torch.linspace(-100 if signed else 0, 100, 400001))
    assert torch.bincount(codes.flatten() - quantizer.code_range()[0]).gt(0).sum() == 256


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(4, 6, 3, groups=2, padding=1), (2, 4, 7, 7)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 5)),
        (nn.Linear(9, 5), (3, 9)),
    ],
)
@pytest.mark.parametrize("bits", ["w8a8", "w4a4", "w2a2"])
def test_a_layer_computes_what_integers_times_two_scales_do(
    layer: nn.Module, shape: tuple[int, ...], bits: str
) -> None:
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    model, _ = quantize_model(nn.Sequential(layer), Recipe(bits=bits, first_layer_bits=None, last_layer_bits=None))
    initialize_quantizers(model, x)
    quantised = model.eval()[0]
    inputs = quantised.input_quantizer.codes(x).double()
    weights = quantised.weight_quantizer.codes(quantised.weight).double()
    integers = _product(quantised, inputs, weights)
    assert torch.equal(integers, integers.round())
    scales = quantised.weight_quantizer.scale.double() * quantised.input_quantizer.scale.double()
    channels = (1, -1, *[1] * (integers.ndim - 2))
    expected = integers * scales.view(channels) + quantised.bias.double().view(channels)
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-5, atol=1e-5)


def _product(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(x, weight)
    if isinstance(layer, nn.ConvTranspose2d):
        return nn.functional.conv_transpose2d(x, weight, stride=layer.stride)
    return nn.functional.conv2d(x, weight, padding=layer.padding, groups=layer.groups)


def test_every_depthwise_channel_keeps_its_precision_whatever_the_range_of_the_others() -> None:
    ranges = torch.logspace(-3, 0, 16).view(16, 1, 1, 1)
    layer = nn.Conv2d(16, 16, 3, groups=16)
    generator = torch.Generator().manual_seed(0)
    layer.weight.data = torch.randn(16, 1, 3, 3, generator=generator).clamp(-2, 2) * ranges

    def ratio(rules: list[Rule]) -> Tensor:
        """Signal to quantization noise of each channel's weights in dB."""
        recipe = Recipe(bits="w8a8", weight_quantizer="mse", first_layer_bits=None, last_layer_bits=None, rules=rules)
        model, _ = quantize_model(nn.Sequential(layer), recipe)
        initialize_quantizers(model, torch.randn(2, 16, 6, 6, generator=generator))
        error = model[0].quantized_weight() - layer.weight
        power = [x.detach().square().sum((1, 2, 3)) for x in (layer.weight, error)]
        return 10 * torch.log10(power[0] / power[1])

    assert ratio([]).min() > 35
    assert ratio([Rule("*", per_channel=False)]).min() < 15  # what one grid for all channels would do
