"""Building blocks that break other tools: pre-activation, depthwise convolutions, batch norm without factors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lqkd.quantization import Recipe, fold_batchnorm, initialize_quantizers, quantize_model

UNIFORM = {"first_layer_bits": None, "last_layer_bits": None}


class PreActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(self.norm(x)))


@pytest.mark.parametrize("bits", ["w8a8", "w4a4", "w2a2"])
@pytest.mark.parametrize("folded", [False, True])
def test_batch_norm_before_the_convolution_is_applied_to_the_input_and_never_to_the_weight(
    bits: str, folded: bool
) -> None:
    torch.manual_seed(0)
    block = PreActivation()
    block.norm.running_mean.normal_()
    block.norm.running_var.uniform_(0.5, 2)
    block.norm.weight.data.normal_()
    weight, x = block.conv.weight.detach().clone(), torch.randn(5, 3, 7, 7)
    model, _ = quantize_model(block, Recipe(bits=bits, **UNIFORM))
    initialize_quantizers(model, x)
    model.eval()
    if folded:
        assert fold_batchnorm(model).folded == {}
    factor = model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt()
    shape = (1, 3, 1, 1)
    normed = (x - model.norm.running_mean.view(shape)) * factor.view(shape) + model.norm.bias.view(shape)
    s_x, s_w = model.conv.input_quantizer.scale, model.conv.weight_quantizer.scale.view(4, 1, 1, 1)
    b = int(bits[-1])
    codes_x = (normed.relu() / s_x).clamp(0, 2**b - 1).round()
    codes_w = (weight / s_w).clamp(-(2 ** (b - 1)), 2 ** (b - 1) - 1).round()
    expected = F.conv2d(codes_x * s_x, codes_w * s_w, model.conv.bias)
    # A sum in another order can move one activation across a rounding boundary.
    assert ((model(x) - expected).abs() > 1e-4).float().mean() < 0.01


class InvertedResidual(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        hidden = channels * 4
        self.body = nn.Sequential(
            *(nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            *(nn.BatchNorm2d(hidden), nn.ReLU6(), nn.Conv2d(hidden, out, 1, bias=False), nn.BatchNorm2d(out)),
        )
        self.residual = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


@pytest.mark.parametrize(("bits", "rate", "seed"), [("w4a4", 0.02, 0), ("w2a2", 0.005, 0), ("w2a2", 0.02, 1)])
def test_an_inverted_residual_network_trains_two_hundred_steps_and_learns(bits: str, rate: float, seed: int) -> None:
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        *(nn.BatchNorm2d(8), nn.ReLU6()),
        *(InvertedResidual(8, 8, 1), InvertedResidual(8, 12, 2), InvertedResidual(12, 12, 1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)),
    )
    labels = torch.arange(32) % 4
    x = torch.randn(32, 3, 8, 8) + torch.randn(4, 3, 1, 1)[labels]
    model, _ = quantize_model(network, Recipe(bits=bits))
    initialize_quantizers(model, x)
    optimizer = torch.optim.SGD(model.train().parameters(), lr=rate, momentum=0.9)
    losses = []
    for _ in range(200):
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert torch.tensor(losses).isfinite().all()
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])
    assert model.eval()(x).isfinite().all()


def test_batch_norm_without_factors_is_folded_into_its_own_convolution() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5)]
    for norm in (layers[1], layers[4]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    model, _ = quantize_model(nn.Sequential(*layers).double(), Recipe(**UNIFORM))
    x = torch.randn(2, 3, 6, 6).double()
    initialize_quantizers(model, x)
    expected = model.eval()(x)
    assert fold_batchnorm(model).folded == {"1": "0", "4": "3"}
    torch.testing.assert_close(model(x), expected)
