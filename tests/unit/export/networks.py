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
