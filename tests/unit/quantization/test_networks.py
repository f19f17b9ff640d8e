"""Networks that people bring, from torchvision and timm: each is converted, trained for a step, copied and restored.

They are made small (few layers, 64 pixels) and untrained. The error of a freshly initialised W8A8 network is the
relative L2 distance of its logits from those of the float network, on the batch that it was initialised on.

Two per cent would be wanted of all, and six networks stay below. In the others rounding alone costs more: uniform noise
of one step's width in the place of every quantizer, with no clipping and nothing else, moves the logits by 2.3 to 7 %.
What is held there is that lqkd adds nothing to it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.swin_transformer import SwinTransformer

from lqkd.quantization import Quantizer, Recipe, coverage, initialize_quantizers, quantize_model, quantizers
from lqkd.quantization.quantizers.uniform import UniformQuantizer

timm: Any = pytest.importorskip("timm")


def vision_transformer() -> nn.Module:
    model = torchvision.models.VisionTransformer(64, 16, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128)
    nn.init.normal_(model.heads.head.weight, std=0.02)  # torchvision starts with a head of zeros
    return model


def swin() -> nn.Module:
    return SwinTransformer([4, 4], embed_dim=48, depths=[1, 2], num_heads=[3, 6], window_size=[7, 7])


def convnext() -> nn.Module:
    return ConvNeXt([CNBlockConfig(48, 96, 1), CNBlockConfig(96, 192, 2), CNBlockConfig(192, None, 1)])


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": torchvision.models.resnet18,
    "mobilenet_v2": torchvision.models.mobilenet_v2,
    "mobilenet_v3_small": torchvision.models.mobilenet_v3_small,
    "shufflenet_v2_x1_0": torchvision.models.shufflenet_v2_x1_0,
    "efficientnet_b0": torchvision.models.efficientnet_b0,
    "regnet_y_400mf": torchvision.models.regnet_y_400mf,
    "convnext_tiny": convnext,
    "vit_b_16": vision_transformer,
    "swin_t": swin,
    "densenet121": lambda: torchvision.models.DenseNet(block_config=(2, 2, 2, 2)),
    "timm resnet18": lambda: timm.create_model("resnet18"),
    "timm mobilenetv3_small_100": lambda: timm.create_model("mobilenetv3_small_100"),
    "timm vit_tiny_patch16_224": lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4),
    "timm convnext_atto": lambda: timm.create_model("convnext_atto"),
    "timm efficientnet_lite0": lambda: timm.create_model("efficientnet_lite0"),
}

FLOAT_LAYERS = {"swin_t": "which does not call the layer"}
"""Network to why some of its layers that could be quantised are not; in all others every one is."""

each_network = pytest.mark.parametrize("name", NETWORKS)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small layers on several threads wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def images() -> Tensor:
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@functools.cache
def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return NETWORKS[name](), torch.get_rng_state()


def network(name: str) -> nn.Module:
    """A copy, which takes less time than to draw the weights, with random numbers as they are after that."""
    model, state = made(name)
    torch.set_rng_state(state)
    return copy.deepcopy(model)


@functools.cache
def converted(name: str) -> nn.Module:
    return quantize_model(network(name), Recipe(bits="w4a4"))[0]


def other(name: str) -> nn.Module:
    """A network like that of :func:`converted`, with other weights."""
    model = copy.deepcopy(converted(name))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    return model


@functools.cache
@torch.no_grad()
def initial_errors(name: str) -> tuple[float, float]:
    """Relative distance of the logits of a freshly initialised W8A8 network from those of the float one.

    The second number is what rounding alone costs: the same with uniform noise in the place of every quantizer.
    """
    model = network(name).eval()
    expected = model(images())
    model, _ = quantize_model(model, Recipe(bits="w8a8"))
    initialize_quantizers(model, images())
    error = float((model(images()) - expected).norm() / expected.norm())
    for path, quantizer in quantizers(model).items():
        parent, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(parent), attribute, RoundingNoise(quantizer))
    return error, float((model(images()) - expected).norm() / expected.norm())


class RoundingNoise(nn.Module):
    """Adds uniform noise of one step's width where a quantizer would round; zeros stay."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        assert isinstance(quantizer, UniformQuantizer)
        self.axis, self.channels, self.step = quantizer.channel_axis, quantizer.channels, quantizer.step()

    def forward(self, x: Tensor) -> Tensor:
        step = self.step
        if self.channels is not None:
            step = step.view([-1 if axis == self.axis else 1 for axis in range(x.ndim)])
        return torch.where(x == 0, x, x + (torch.rand(x.shape) - 0.5) * step)


@pytest.mark.slow
@each_network
def test_a_network_takes_a_training_step_that_reaches_every_parameter(name: str) -> None:
    model = copy.deepcopy(converted(name))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss = F.cross_entropy(model.train()(images()[:2]), torch.arange(2))
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    assert all(bool(quantizer.initialized) for quantizer in quantizers(model).values())
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.slow
@each_network
def test_a_network_survives_copies_and_checkpoints(name: str) -> None:
    x = images()[:2]
    model, fresh = copy.deepcopy(converted(name)), other(name)
    initialize_quantizers(model, x)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = model.eval()(x)
        assert expected.isfinite().all()
        assert torch.equal(fresh.eval()(x), expected)
        assert torch.equal(copy.deepcopy(model)(x), expected)


@each_network
def test_every_convolution_and_linear_layer_of_a_network_is_quantised_and_the_rest_listed(name: str) -> None:
    model, report = quantize_model(network(name), Recipe())
    in_float = [row for row in report.layers if row.is_float]
    other = [row for row in in_float if not row.note.startswith("floating point: no quantised layer of this kind")]
    assert all(name in FLOAT_LAYERS and FLOAT_LAYERS[name] in row.note for row in other)
    owners = {name for name, module in model.named_modules() if module._parameters and "quantizer" not in name}
    assert {row.name for row in report.layers} == owners
    assert report.untraceable is None
    assert coverage(model) == report


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["resnet18", "shufflenet_v2_x1_0", "regnet_y_400mf", "swin_t", "densenet121", "timm resnet18"]
)
def test_eight_bits_keep_the_output_within_two_per_cent(name: str) -> None:
    assert initial_errors(name)[0] < 0.02


@pytest.mark.slow
@each_network
def test_eight_bits_cost_no_more_than_rounding_must(name: str) -> None:
    error, rounding = initial_errors(name)
    assert error < 1.2 * rounding
