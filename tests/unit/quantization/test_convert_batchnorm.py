"""Batch norm of a quantised network: fresh statistics, and folding that changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from lqkd.errors import UsageError
from lqkd.models import CifarResNet
from lqkd.quantization import (
    Recipe,
    fold_batchnorm,
    initialize_quantizers,
    quantize_model,
    quantizers,
    reestimate_batchnorm,
)


def shaken(model: nn.Module) -> nn.Module:
    """Give every batch norm statistics and factors of a trained network, negative and zero ones among them."""
    generator = torch.Generator().manual_seed(1)
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.running_mean.normal_(generator=generator)
            norm.running_var.uniform_(0.5, 2.0, generator=generator)
            if norm.affine:
                norm.weight.data.normal_(0.5, 0.7, generator=generator)
                norm.weight.data[0] = 0.0
                norm.weight.data[1].abs_().neg_()
                norm.bias.data.normal_(generator=generator)
    return model


def quantised(model: nn.Module, bits: str, x: Tensor) -> nn.Module:
    model, _ = quantize_model(shaken(model), Recipe(bits=bits, first_layer_bits=None, last_layer_bits=None))
    initialize_quantizers(model, x)
    return model.eval()


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2), dtype=dtype)


@pytest.mark.parametrize("bits", ["w8a8", "w4a4", "w2a2", "w2a32", "w32a32"])
def test_a_folded_network_gives_the_logits_of_the_unfolded_one(bits: str) -> None:
    torch.manual_seed(0)
    x = images(torch.float64)
    network = CifarResNet(8, width=4).double()
    model = shaken(network).eval() if bits == "w32a32" else quantised(network, bits, x)
    expected = model(x)
    result = fold_batchnorm(model)
    assert result.kept == {}
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert (model(x) - expected).abs().max() < 1e-12 * max(1.0, expected.abs().max())


def test_folding_moves_no_weight_code_even_for_negative_and_zero_factors() -> None:
    torch.manual_seed(0)
    x = images()
    model = quantised(CifarResNet(8, width=4), "w2a2", x)
    layer = model.layer1[0].conv1
    before = layer.weight_quantizer.codes(layer.weight)
    fold_batchnorm(model)
    assert torch.equal(layer.weight_quantizer.codes(layer.weight), before)
    assert layer.output_scale[0] == 0
    assert layer.output_scale[1] < 0


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 6, 3, groups=3, bias=False),
        nn.ConvTranspose2d(3, 6, 3),
        nn.ConvTranspose2d(3, 6, 3, groups=3, bias=False),
    ],
)
@pytest.mark.parametrize("bits", ["w3a32", None])
def test_folding_finds_the_output_channels_of_every_kind_of_convolution(conv: nn.Module, bits: str | None) -> None:
    model: Any = nn.Sequential(conv, nn.BatchNorm2d(6), nn.ReLU()).double()
    x = images(torch.float64)
    model = shaken(model).eval() if bits is None else quantised(model, bits, x)
    expected = model(x)
    assert fold_batchnorm(model).folded == {"1": "0"}
    torch.testing.assert_close(model(x), expected)


def test_a_folded_grouped_transposed_convolution_scales_each_output_of_each_group() -> None:
    conv = nn.ConvTranspose2d(4, 6, 3, groups=2)
    model = quantised(nn.Sequential(conv, nn.BatchNorm2d(6)).double(), "w3a32", torch.randn(2, 4, 5, 5).double())
    x = torch.randn(2, 4, 5, 5).double()
    expected = model(x)
    fold_batchnorm(model)
    torch.testing.assert_close(model(x), expected)


def test_a_folded_network_loads_its_own_checkpoint() -> None:
    x = images()
    model, other = (quantised(CifarResNet(8, width=4), "w4a4", x) for _ in range(2))
    for network in (model, other):
        fold_batchnorm(network)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


class PreActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)
        self.twice, self.after = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.twice(self.conv(self.norm(x).relu()))
        return self.after(y) + y


def test_batch_norm_without_a_convolution_of_its_own_is_kept_and_listed() -> None:
    model = PreActivation().double().eval()
    x = images(torch.float64)
    expected = model(x)
    result = fold_batchnorm(model)
    assert result.folded == {}
    assert result.kept == dict.fromkeys(("norm", "after"), "no convolution of its own before it")
    assert torch.equal(model(x), expected)


def test_a_convolution_called_twice_is_not_folded() -> None:
    conv = nn.Conv2d(3, 3, 1)
    model = nn.Sequential(conv, nn.BatchNorm2d(3), conv, nn.BatchNorm2d(3)).eval()
    assert set(fold_batchnorm(model).kept) == {"1", "3"}


def test_batch_norm_without_running_statistics_is_kept() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False))
    assert fold_batchnorm(model).kept == {"1": "no running statistics"}


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) if x.mean() > 0 else x


def test_a_network_that_cannot_be_traced_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot be folded: its graph cannot be traced"):
        fold_batchnorm(DataDependent())


# --- fresh statistics -----------------------------------------------------------------------------------------------


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(5, 3, 4, 4, generator=generator) * scale for scale in (1.0, 2.0, 3.0)]


def test_fresh_statistics_are_the_average_over_the_batches() -> None:
    model = shaken(nn.Sequential(nn.BatchNorm2d(3, momentum=0.3), nn.Conv2d(3, 2, 1)))
    reestimate_batchnorm(model, batches())
    mean = torch.stack([b.mean((0, 2, 3)) for b in batches()]).mean(0)
    variance = torch.stack([b.transpose(0, 1).flatten(1).var(1) for b in batches()]).mean(0)
    torch.testing.assert_close(model[0].running_mean, mean)
    torch.testing.assert_close(model[0].running_var, variance)


def test_fresh_statistics_restore_modes_momentum_and_counters_and_touch_nothing_else() -> None:
    torch.manual_seed(0)
    model, _ = quantize_model(CifarResNet(8, width=4), Recipe())  # its quantizers are not fitted and must stay so
    model.train()
    model.layer1.eval()
    modes = [module.training for module in model.modules()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    reestimate_batchnorm(model, [images()])
    assert [module.training for module in model.modules()] == modes
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed
    assert all(k.endswith(("running_mean", "running_var")) for k in changed)
    assert model.bn1.momentum == 0.1
    assert not any(bool(q.initialized) for q in quantizers(model).values())


def test_batch_norm_that_no_batch_reaches_keeps_its_statistics() -> None:
    model = shaken(nn.Sequential(nn.BatchNorm2d(3)))
    model[0].unused = shaken(nn.BatchNorm1d(4))
    mean = model[0].unused.running_mean.clone()
    reestimate_batchnorm(model, batches())
    assert torch.equal(model[0].unused.running_mean, mean)


def test_no_batches_are_refused_and_statistics_stay() -> None:
    model = shaken(nn.Sequential(nn.BatchNorm2d(3)))
    mean = model[0].running_mean.clone()
    with pytest.raises(UsageError, match="from 0 batches: give at least 1"):
        reestimate_batchnorm(model, [])
    assert torch.equal(model[0].running_mean, mean)


def test_a_failing_batch_leaves_the_statistics_as_they_were() -> None:
    def broken() -> Iterator[Tensor]:
        yield batches()[0]
        raise OSError("disk")

    model = shaken(nn.Sequential(nn.BatchNorm2d(3)))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(OSError, match="disk"):
        reestimate_batchnorm(model, broken())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("quantised", [False, True])
def test_a_frozen_batch_norm_is_folded_and_leaves_what_the_network_says(quantised: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    frozen = FrozenBatchNorm2d(6)
    for name, buffer in frozen.named_buffers():
        drawn = torch.rand(buffer.shape, generator=draw)
        buffer.copy_(0.1 + drawn if name == "running_var" else 2 * drawn - 1)  # some factors are negative
    network = nn.Sequential(nn.Conv2d(3, 6, 3), frozen, nn.ReLU(), nn.Conv2d(6, 4, 3)).double()
    images = torch.rand(2, 3, 8, 8, generator=draw, dtype=torch.float64)
    if quantised:
        quantize_model(network, Recipe("w8a8"))
        network(images)
    network.eval()
    expected = network(images)
    assert fold_batchnorm(network).folded == {"1": "0"}
    torch.testing.assert_close(network(images), expected, rtol=1e-12, atol=1e-12)
