"""Swin's attention calls its layers, to the same bits as torchvision, and so is quantised and exported."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

from lqkd.export import to_onnx
from lqkd.export.runtimes import kernels
from lqkd.quantization import Recipe, initialize_quantizers, quantize_model
from lqkd.quantization.windows import call_window_layers


def swin(version: int) -> nn.Module:
    torch.manual_seed(0)
    second = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2} if version == 2 else {}
    network = SwinTransformer([4, 4], 8, [2, 1], [2, 4], [4, 4], num_classes=5, stochastic_depth_prob=0.0, **second)  # type: ignore[arg-type]
    for parameter in network.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    return network


@pytest.mark.parametrize("version", [1, 2])
def test_the_results_and_gradients_are_torchvisions_to_the_last_bit(version: int) -> None:
    theirs = swin(version)
    ours = copy.deepcopy(theirs)
    call_window_layers(ours)
    for side in (16, 32, 40):  # one window a map, shifted windows, padded maps
        x = torch.randn(2, 3, side, side)
        expected, found = theirs(x), ours(x)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        given = torch.autograd.grad(expected.square().sum(), [theirs.head.weight, theirs.features[0][0].weight])
        had = torch.autograd.grad(found.square().sum(), [ours.head.weight, ours.features[0][0].weight])
        for one, other in zip(given, had, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_keys_of_the_second_version_keep_no_bias() -> None:
    network = swin(2)
    call_window_layers(network)
    attention = network.features[1][0].attn
    with torch.no_grad():
        attention.qkv.bias.fill_(1.0)
    network.eval()(torch.randn(1, 3, 16, 16))
    assert attention.qkv.bias.chunk(3)[1].abs().max() == 0
    assert attention.qkv.bias.chunk(3)[0].min() == 1


@pytest.mark.parametrize("version", [1, 2])
def test_every_layer_is_quantised_and_exported(version: int) -> None:
    network, report = quantize_model(swin(version), Recipe(bits="w8a8"))
    assert not [row.name for row in report.layers if row.is_float and row.kind in ("Linear", "Conv2d")]
    x = torch.randn(4, 3, 40, 40)
    initialize_quantizers(network, x)
    model = to_onnx(network.eval(), x[:2], calibration=[x])
    found = kernels(model).integer
    layers = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    fixed = [name for name in layers if "cpb_mlp" in name]  # a function of positions alone: a constant of the file
    assert found["QGemm"] + found["QLinearConv"] == len(layers) - len(fixed)
