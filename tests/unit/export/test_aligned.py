"""Files have as many channels as integer kernels take at a time, and compute what they did."""

from __future__ import annotations

import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

from lqkd.export import Deployed, deploy, portable
from lqkd.export.contents import altered_integers
from lqkd.export.emitter import Exported
from lqkd.export.parity import check
from lqkd.export.runtimes import kernels
from lqkd.quantization import Recipe, initialize_quantizers, quantize_model
from tests.unit.export.networks import images, quantised


class Inverted(nn.Module):
    """A depthwise convolution of 24 channels between two others, with squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.expand = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 1)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.squeeze, self.excite = nn.Conv2d(24, 8, 1), nn.Conv2d(8, 24, 1)
        self.project, self.linear = nn.Conv2d(24, 6, 1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.depthwise(F.relu(self.expand(F.relu(self.stem(x))))))
        x = x * F.hardsigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.linear(self.project(x).mean((2, 3)))


@pytest.fixture(scope="module")
def deployed() -> Deployed:
    return deploy(quantised(Inverted(), bits="w4a4", residual_bits=8), images(2), [images(32)])


@pytest.fixture(scope="module")
def exported(deployed: Deployed) -> Exported:
    return portable.build(deployed)


def shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    ending = ".weight_codes"
    return {t.name.removesuffix(ending): (*t.dims,) for t in model.graph.initializer if t.name.endswith(ending)}


def test_what_is_around_a_depthwise_convolution_has_a_multiple_of_sixteen_channels(exported: Exported) -> None:
    assert shapes(exported.model) == {
        "stem": (16, 4, 3, 3),  # with a fourth colour
        "expand": (32, 16, 1, 1),
        "depthwise": (32, 1, 3, 3),
        "squeeze": (8, 32, 1, 1),
        "excite": (32, 8, 1, 1),
        "project": (6, 32, 1, 1),
        "linear": (5, 6),
    }


def test_more_channels_give_the_same_numbers(deployed: Deployed, exported: Exported) -> None:
    assert kernels(exported.model).float_products == ()
    parity = check(exported, deployed, images(8), [images(32)])
    assert parity.problem is None
    assert parity.exact
    assert parity.output_steps == 0
    assert max(row.steps for row in parity.end_to_end) == 0


def test_a_weight_of_a_channel_that_the_network_does_not_have_fails_the_proof(
    deployed: Deployed, exported: Exported
) -> None:
    assert altered_integers(exported.model, deployed) is None
    model = onnx.ModelProto()
    model.CopyFrom(exported.model)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "depthwise.weight_codes")
    codes = numpy_helper.to_array(tensor).copy()
    codes[-1, 0, 0, 0] = 1
    for wrong in (codes, codes.flatten()):
        tensor.CopyFrom(numpy_helper.from_array(wrong, tensor.name))
        assert altered_integers(model, deployed) == "depthwise.weight_codes"


class Residual(nn.Module):
    """As a block of EfficientNet-B3: what is projected has the channels of what is read, and is added to it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.project = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 24, 1)
        self.depthwise, self.linear = nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = x + self.project(F.relu(self.depthwise(x)))
        return self.linear(x.mean((2, 3)))


def test_a_layer_between_values_of_the_same_channels_reads_and_writes_more_of_them() -> None:
    deployed = deploy(quantised(Residual(), bits="w8a8", residual_bits=8), images(2), [images(32)])
    exported = portable.build(deployed)
    assert shapes(exported.model)["project"] == (32, 32, 1, 1)
    parity = check(exported, deployed, images(8), [images(32)])
    assert parity.problem is None
    assert parity.exact


class OverPlaces(nn.Module):
    """A linear layer over the places of a depthwise convolution's channels, behind it or before."""

    def __init__(self, behind: bool) -> None:
        super().__init__()
        self.first, self.depthwise = nn.Conv1d(4, 24, 1), nn.Conv1d(24, 24, 3, padding=1, groups=24)
        self.places, self.last, self.behind = nn.Linear(12, 12), nn.Conv1d(24, 5, 1), behind

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.places(self.depthwise(x)) if self.behind else self.depthwise(self.places(x)))


@pytest.mark.parametrize("behind", [True, False])
def test_a_linear_layer_over_places_keeps_the_channels_of_what_is_around_it(behind: bool) -> None:
    x = torch.randn(8, 4, 12, generator=torch.Generator().manual_seed(0))
    network, _ = quantize_model(OverPlaces(behind), Recipe(bits="w8a8"))
    initialize_quantizers(network, x)
    deployed = deploy(network.eval(), x, [x])
    exported = portable.build(deployed)
    assert shapes(exported.model)["depthwise"] == (24, 1, 3)
    assert check(exported, deployed, x).problem is None


def test_channels_that_are_returned_stay_as_many_as_they_are() -> None:
    network = nn.Sequential(nn.Conv2d(8, 24, 1), nn.Conv2d(24, 24, 3, groups=24))
    x = torch.randn(8, 8, 6, 6, generator=torch.Generator().manual_seed(0))
    network, _ = quantize_model(network, Recipe(bits="w8a8"))
    initialize_quantizers(network, x)
    exported = portable.build(deploy(network.eval(), x, [x]))
    assert shapes(exported.model) == {"0": (24, 8, 1, 1), "1": (24, 1, 3, 3)}
