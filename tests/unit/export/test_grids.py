"""Grids and codes are those of the quantizers, bit for bit."""

from __future__ import annotations

import pytest
import torch

from lqkd.errors import UsageError
from lqkd.export.grids import activation_grid
from lqkd.quantization import QUANTIZERS, Quantizer
from lqkd.quantization.codes import is_exactly_uniform, weight_codes

ACTIVATIONS = [
    (name, bits)
    for name in ("lsq", "lsq_ewgs", "lsq_plus", "pact", "dorefa", "minmax", "mse", "apot", "n2uq")
    for bits in (2, 3, 4, 5, 6, 8)
] + [("react", 1)]
WEIGHTS = [
    (name, bits)
    for name in ("lsq", "lsq_ewgs", "lsq_plus", "dorefa", "minmax", "mse", "apot", "n2uq")
    for bits in (2, 3, 4, 5, 6, 8)
] + [("irnet", 1), ("react", 1), ("dorefa", 1), ("ttq", 2), ("twn", 2), ("absmean", 2), ("seq", 2), ("seq", 8)]


def fitted(name: str, bits: int, x: torch.Tensor, *, batched: bool) -> Quantizer:
    channels = None if batched else x.shape[0]
    quantizer = QUANTIZERS[name](bits, batched=batched, channels=channels, signed=None if batched else True)
    quantizer.train()(x)
    assert quantizer.is_ready
    return quantizer.eval()


@pytest.mark.parametrize(("name", "bits"), ACTIVATIONS)
def test_an_activation_grid_gives_the_values_of_its_quantizer(name: str, bits: int) -> None:
    x = torch.randn(64, 50, generator=torch.Generator().manual_seed(bits))
    if name in ("pact", "dorefa", "n2uq", "apot"):
        x = x.abs()
    quantizer = fitted(name, bits, x, batched=True)
    probe = torch.cat([x.flatten() * 3, torch.linspace(-4, 4, 10_001)])
    assert torch.equal(activation_grid(quantizer, "layer")(probe), quantizer(probe))


@pytest.mark.parametrize("name", ["lsq", "lsq_plus"])
def test_a_grid_of_signed_data_does_too(name: str) -> None:
    x = torch.randn(64, 50, generator=torch.Generator().manual_seed(0))
    quantizer = fitted(name, 4, x - 0.3, batched=True)
    grid = activation_grid(quantizer, "layer")
    assert torch.equal(grid(x), quantizer(x))
    assert grid.high - grid.low == 15


@pytest.mark.parametrize(("name", "bits"), WEIGHTS)
def test_codes_give_the_values_of_a_weight_quantizer(name: str, bits: int) -> None:
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(bits))
    quantizer = fitted(name, bits, weight, batched=False)
    found = weight_codes(quantizer, weight, "layer")
    assert (found.scale is not None) == is_exactly_uniform(quantizer)
    if found.scale is None:
        assert found.levels is not None
        values = found.levels.expand(6, -1).gather(1, found.codes)
    else:
        values = found.codes * found.scale.expand(6).unsqueeze(1)
        assert found.codes.abs().max() <= 128
    if name in ("lsq", "lsq_ewgs", "lsq_plus", "minmax", "mse", "twn", "absmean", "seq", "irnet", "react"):
        assert torch.equal(values, quantizer(weight))
    else:
        assert torch.allclose(values, quantizer(weight), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("value", "message"),
    [(0.0, "a scale of conv is zero in channel 1"), (float("nan"), "a scale of conv is not finite")],
)
def test_a_scale_that_is_zero_or_nan_is_refused_in_one_sentence(value: float, message: str) -> None:
    weight = torch.randn(3, 9)
    quantizer = fitted("lsq", 4, weight, batched=False)
    with torch.no_grad():
        quantizer.scale[1] = value
    with pytest.raises(UsageError, match=message):
        weight_codes(quantizer, weight, "conv")


def test_a_quantizer_that_was_never_fitted_is_refused() -> None:
    with pytest.raises(UsageError, match="a quantizer of conv has no grid, since it has seen no data"):
        activation_grid(QUANTIZERS["lsq"](4, batched=True), "conv")
