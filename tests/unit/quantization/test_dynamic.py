"""Activations on a grid for each token."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.export import to_onnx
from lqkd.models import GPT
from lqkd.quantization import QUANTIZERS, Quantizer, Recipe, Rule, initialize_quantizers, quantize_model


def tokens(seed: int = 0) -> Tensor:
    """(3, 5, 16) float64 that differ in size a thousandfold, with an outlier, a positive token and one of zeros."""
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x *= torch.logspace(-3, 3, 15, dtype=torch.float64).view(3, 5, 1)
    x[0, 1, 2] = 40.0
    x[1, 1] = x[1, 1].abs()
    x[2, 2] = 0.0
    return x


def fitted(bits: int, symmetric: bool) -> Quantizer:
    quantizer = QUANTIZERS["dynamic"](bits, batched=True, symmetric=symmetric)  # type: ignore[call-arg]
    quantizer(tokens())
    return quantizer


def by_formula(token: list[float], bits: int, symmetric: bool) -> list[float]:
    if symmetric:
        step = max(abs(value) for value in token) / (2 ** (bits - 1) - 1) or 1.0
        return [step * round(value / step) for value in token]
    low, high = min(*token, 0.0), max(*token, 0.0)
    step = (high - low) / (2**bits - 1) or 1.0
    zero = round(-low / step)
    return [(min(max(round(value / step) + zero, 0), 2**bits - 1) - zero) * step for value in token]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_each_token_has_the_grid_of_its_own_values_in_training_and_after(bits: int, symmetric: bool) -> None:
    quantizer, x = fitted(bits, symmetric), tokens(1).requires_grad_()
    x_hat = quantizer(x)
    x_hat.backward(tokens(2))
    expected = torch.tensor([[by_formula(token, bits, symmetric) for token in text] for text in x.tolist()])
    torch.testing.assert_close(x_hat.detach(), expected.double())
    assert torch.equal(x.grad, tokens(2))  # nothing clips
    state = copy.deepcopy(quantizer.state_dict())
    assert torch.equal(quantizer.eval()(x), x_hat)
    assert torch.equal(quantizer(x[1:2]), x_hat[1:2])  # whatever is beside it
    codes = quantizer.codes(x)
    lowest, highest = quantizer.code_range()
    assert lowest <= codes.min() < codes.max() <= highest
    assert torch.equal(quantizer.dequantize(codes), x_hat)
    assert all(torch.equal(value, state[name]) for name, value in quantizer.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_measured_in_float32_and_a_nan_stays_alone(dtype: torch.dtype) -> None:
    quantizer, x = fitted(8, True), tokens()[0].to(dtype)
    assert torch.equal(quantizer(x), quantizer(x.float()).to(dtype))
    x[3, 3] = float("nan")
    assert quantizer(x).isnan().nonzero().tolist() == [[3, 3]]


def test_a_language_model_takes_it_for_its_linear_layers() -> None:
    network = GPT(context=16, width=32, depth=1, heads=2)
    recipe = Recipe("w4a8", activation_quantizer={"name": "dynamic", "symmetric": False})
    model, report = quantize_model(network, recipe)
    text = torch.arange(32).view(2, 16)
    initialize_quantizers(model, text)
    assert model.blocks[0].expand.input_quantizer.bits == 8
    notes = {row.name: row.note for row in report.layers}
    assert notes["blocks.0.expand"] == "weight LSQ per channel, input Dynamic per token"
    torch.testing.assert_close(model(text)[1:], model(text[1:]), rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match=r"is measured for each token \(quantizer dynamic\), and an integer file has"):
        to_onnx(nn.Sequential(model.blocks[0].expand), torch.randn(1, 32))


@pytest.mark.parametrize(
    ("network", "settings", "message"),
    [
        (
            nn.Sequential(nn.Conv2d(3, 8, 3)),
            {"activation_quantizer": "dynamic"},
            "is not possible for a Conv2d: it has",
        ),
        (nn.Sequential(nn.Linear(8, 8)), {"weight_quantizer": "dynamic"}, "quantizer dynamic is for activations"),
        (
            nn.Sequential(nn.Linear(8, 8)),
            {"activation_quantizer": "dynamic", "rules": [Rule("0", activation_bits=1)]},
            "bits=1 is not possible for quantizer dynamic",
        ),
    ],
)
def test_what_it_is_not_for_is_refused(network: nn.Module, settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        quantize_model(network, Recipe("w4a8", **settings))
