"""Small quantised networks for the tests of export."""

from __future__ import annotations

from typing import Any

import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

from lqkd.quantization import Recipe, initialize_quantizers, quantize_model


class Small(nn.Module):
    """A stem with max pooling, a residual block, a depthwise convolution with relu6, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(2)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.relu6 = nn.ReLU6()
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.norm(self.stem(x))))
        x = x + self.norm1(self.conv1(x))
        x = self.relu6(self.norm2(self.conv2(x)))
        return self.linear(x.mean((2, 3)))


class Residual(nn.Module):
    """A linear layer beside nothing, and linear layers around both."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(192, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x.flatten(1)))
        return self.last(F.relu(self.second(x) + x))


class Mobile(nn.Module):
    """Gates, means that keep their axes, parts, shuffles, a sum of a number, and a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.expand = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 16, 1)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.project, self.branch = nn.Conv2d(16, 8, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.grouped, self.norm = nn.Conv2d(8, 12, 3, padding=1, groups=2), nn.LayerNorm(48)
        self.inner, self.head = nn.Linear(48, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.expand(F.relu(self.stem(x)))) + 0.5
        gate = F.hardsigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        left, right = self.project(F.relu(x * gate)).chunk(2, 1)
        x = torch.cat((left, F.relu(self.branch(right))), 1)
        x = x.view(x.shape[0], 2, 4, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
        x = F.avg_pool2d(F.relu6(self.grouped(x)), 2).flatten(1)
        return self.head(F.relu(self.inner(self.norm(x))))


class Sequence(nn.Module):
    """A convolution over one axis, attention and a mean over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = nn.Conv1d(3, 8, 3), nn.MultiheadAttention(8, 2, batch_first=True)
        self.inner, self.outer, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.embed(x.flatten(2))).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.outer(F.gelu(self.inner(x)))
        return self.head(x.mean(1))


def images(count: int = 8, seed: int = 1) -> Tensor:
    """(count, 3, 8, 8) float32."""
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def quantised(network: nn.Module | None = None, **recipe: Any) -> nn.Module:
    """A network with batch norm statistics and fitted quantizers, in eval mode."""
    torch.manual_seed(0)
    network = Small() if network is None else network
    network.train()
    with torch.no_grad():
        for _ in range(3):
            network(images(32))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    network, _ = quantize_model(network, Recipe(**recipe))
    initialize_quantizers(network, images(32))
    return network.eval()


def alter(model: onnx.ModelProto, name: str, moved: float) -> None:
    """Add ``moved`` to the first number of a constant, in place."""
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    array = numpy_helper.to_array(tensor).copy()
    array.flat[0] += moved
    tensor.CopyFrom(numpy_helper.from_array(array, name))
