"""Grids that the export fits are kept off steps at which runtimes round in their own ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lqkd.export import Deployed, deploy
from lqkd.export.formats import deployed_for
from lqkd.export.grids import ActivationGrid
from lqkd.export.middles import _OF_PAIRS, _Reading, _ReadingOfPairs, to_the_middle
from lqkd.export.reference import Reference
from lqkd.models.calls import Inputs
from lqkd.quantization import LSQ
from tests.unit.export.networks import images, quantised


class Excited(nn.Module):
    """A product with a hard sigmoid that reaches 1, so that its grid has 255 steps there and 0.5 is half way."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.excite, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 4, 1)
        nn.init.normal_(self.excite.weight, std=2.0)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        return self.last(x * F.hardsigmoid(self.excite(x.mean((2, 3), keepdim=True))))


FITTED, READER = "grids.calibrated.relu", "grids.conv1.input_quantizer"


@pytest.fixture(scope="module")
def tied() -> nn.Module:
    """A student whose first block reads every second level of a grid that is fitted half way between its own."""
    network: Any = quantised(bits="w4a4")
    step = deploy(network, images(2), [images(32)]).network.get_submodule(FITTED).scale
    network.conv1.input_quantizer.scale.data.copy_(2 * step)
    return network


def grids(deployed: Deployed) -> list[ActivationGrid]:
    return [deployed.network.get_submodule(name) for name in (FITTED, READER)]  # type: ignore[misc]


def apart(deployed: Deployed) -> float:
    source, reader = grids(deployed)
    codes = torch.arange(source.high + 1) * source.scale.double() / reader.scale.double()
    return to_the_middle(codes, reader.low, reader.high)


def test_no_code_of_a_fitted_grid_is_half_way_between_two_levels_of_its_reader(tied: nn.Module) -> None:
    assert apart(deploy(tied, images(2), [images(32)])) == 0
    assert apart(deploy(tied, images(2), [images(32)], off_middles=True)) >= 1e-3


def test_a_fitted_grid_gets_less_than_a_hundredth_coarser_and_a_trained_one_stays(tied: nn.Module) -> None:
    (fitted, trained), (moved, same) = (
        grids(deploy(tied, images(2), [images(32)], off_middles=off)) for off in (False, True)
    )
    assert 1 < float(moved.scale / fitted.scale) < 1.01
    assert torch.equal(trained.scale, same.scale)


@pytest.mark.parametrize("activation", [nn.Hardswish(), nn.Sigmoid()])
def test_codes_behind_a_function_of_each_are_off_the_middles_too(activation: nn.Module) -> None:
    network: Any = quantised(nn.Sequential(nn.Conv2d(3, 8, 3), activation, nn.Conv2d(8, 4, 3)), bits="w8a8")

    def made(off_middles: bool) -> tuple[Tensor, float]:
        """What the codes that are read mean, and how far they are from the middle between two of the reader's."""
        deployed = deploy(network, images(2), [images(32)], off_middles=off_middles)
        names = ("grids.calibrated._0", "grids.2.input_quantizer")
        source, reader = (deployed.network.get_submodule(name) for name in names)
        assert isinstance(source, ActivationGrid)
        assert isinstance(reader, ActivationGrid)
        numbers = activation((torch.arange(source.low, source.high + 1) - source.zero_point) * source.scale)
        codes = numbers.double() / reader.scale.double() + reader.zero_point
        return numbers, to_the_middle(codes, reader.low, reader.high)

    numbers, _ = made(off_middles=False)
    network[2].input_quantizer.scale.data.copy_(numbers[200] / 50.5)  # of the code 200 it is half way
    assert made(off_middles=False)[1] < 1e-4
    assert made(off_middles=True)[1] >= 1e-3


class Added(nn.Module):
    """The sum of two convolutions, each of which is on a grid, read by a third one."""

    def __init__(self, combine: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.other, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
        self.combine = combine

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.combine(self.one(x), self.other(x))))


def pairs_to_the_middle(deployed: Deployed, combine: Callable[[Tensor, Tensor], Tensor]) -> float:
    """How far the nearest result of two codes is from a middle, as a part of the size of what is combined."""
    names = ("one.output_quantizer", "other.output_quantizer", "last.input_quantizer")
    ours, theirs, reader = (grid_of(deployed, name) for name in names)
    one, other = (
        (torch.arange(grid.low, grid.high + 1) - grid.zero_point) * grid.scale.double() for grid in (ours, theirs)
    )
    size = combine(one[:, None].abs(), other[None].abs()) / reader.scale
    codes = F.relu(combine(one[:, None], other[None])) / reader.scale.double()
    inside = codes < reader.high + 1
    return float(((codes - codes.floor() - 0.5).abs() / size.clamp(min=1))[inside].min())


def grid_of(deployed: Deployed, name: str) -> ActivationGrid:
    return next(m for n, m in deployed.network.named_modules() if n.endswith(name) and isinstance(m, ActivationGrid))


@pytest.mark.parametrize("bits", ["w4a4", "w8a8"])
def test_a_sum_of_two_trained_grids_is_moved_off_a_middle_by_a_hair(bits: str) -> None:
    network: Any = quantised(Added(torch.add), bits=bits, residual_bits=8)
    for layer in (network.one, network.other):
        layer.output_quantizer.scale.data.fill_(1 / 8)
    network.last.input_quantizer.scale.data.fill_(3.0)  # a sum of 12 codes is half of it
    tied, apart = (deploy(network, images(2), [images(32)], off_middles=off) for off in (False, True))
    assert pairs_to_the_middle(tied, torch.add) == 0
    assert pairs_to_the_middle(apart, torch.add) >= 2.0**-25
    before, after = (grid_of(deployed, "last.input_quantizer").scale for deployed in (tied, apart))
    assert 0 < abs(float(after / before) - 1) < 2e-5


def test_trained_grids_without_a_tie_stay_to_the_last_bit() -> None:
    network: Any = quantised(Added(torch.add), bits="w4a4", residual_bits=8)
    for layer in (network.one, network.other):
        layer.output_quantizer.scale.data.fill_(0.1)
    network.last.input_quantizer.scale.data.fill_(0.33)
    tied, apart = (deploy(network, images(2), [images(32)], off_middles=off) for off in (False, True))
    for name, module in tied.network.named_modules():
        if isinstance(module, ActivationGrid):
            assert torch.equal(module.scale, grid_of(apart, name).scale)


def test_a_trained_grid_that_reads_a_gate_of_one_half_in_a_middle_is_moved_off_it_by_a_hair() -> None:
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Hardsigmoid(), nn.Conv2d(8, 4, 3))
    network: Any = quantised(layers, bits="w8a8", residual_bits=8, function_bits=8)
    network[2].input_quantizer.scale.data.fill_(1 / 255)
    tied, apart = (deploy(network, images(2), [images(32)], off_middles=off) for off in (False, True))
    assert tied.calibrated == []
    before, after = (grid_of(deployed, "2.input_quantizer").scale for deployed in (tied, apart))
    tie, off = (float(abs(0.5 / scale.double() - 127.5)) for scale in (before, after))
    assert tie < 1e-5 < off
    assert 0 < abs(float(after / before) - 1) < 2e-5


@pytest.mark.parametrize("code", [100.5, 101.5])
def test_a_pixel_in_a_middle_of_the_first_grid_is_moved_off_it_by_a_hair_to_the_side_of_training(code: float) -> None:
    network: Any = quantised(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), bits="w8a8")
    network[0].input_quantizer.scale.data.fill_(1 / 16)
    pixels = torch.linspace(-2, 2, 256).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    pixels[0, 0, 0, 0] = code / 16
    tied, apart = (deploy(network, pixels, [pixels], off_middles=off) for off in (False, True))
    before, after = (grid_of(deployed, "0.input_quantizer").scale for deployed in (tied, apart))
    tie, off = (float(pixels[0, 0, 0, 0].double() / scale.double()) for scale in (before, after))
    assert tie == code
    assert abs(off - code) > 4e-7 * code
    assert round(off) == round(tie)
    assert 0 < abs(float(after / before) - 1) < 2e-5


@pytest.mark.parametrize("signed", [False, True])
def test_a_zero_point_that_is_added_before_rounding_takes_last_bits_of_a_product(signed: bool) -> None:
    """XNNPACK and ONNX Runtime round 0.500004 + 128, which is 128.5 in float32."""
    one, other, reader = (LSQ(8, signed=signed) for _ in range(3))
    for quantizer, step in ((one, 1.0), (other, (1 + 8e-6) / 116), (reader, 1.0)):
        quantizer(torch.randn(16) if signed else torch.rand(16))
        quantizer.scale.data.fill_(step)
    pairs = _ReadingOfPairs((one, other), reader, (torch.clone, torch.clone), *_OF_PAIRS["mul"], torch.clone)
    assert (pairs.clearance(by_a_hair=True) < 1) == signed


def test_numbers_on_both_sides_of_zero_are_read() -> None:
    source, reader = LSQ(8, signed=True), LSQ(8, signed=True)
    for quantizer in (source, reader):
        quantizer(torch.randn(16))
    source.scale.data.fill_(0.5)
    reader.scale.data.fill_(1.0)
    one = _Reading(source, reader, lambda x: torch.where(x == -1.5, x, torch.zeros_like(x)))
    assert one.to_the_middle() == 0


def share_of_equal_logits(deployed: Deployed, x: Tensor) -> float:
    """Of images whose logits in LiteRT are those of integer kernels, but for float32's rounding."""
    pytest.importorskip("ai_edge_litert")
    from lqkd.export import litert
    from lqkd.export.litert_proof import LiteRTRunner

    ours = Reference(deployed.network)(x)
    theirs = torch.from_numpy(LiteRTRunner(litert.build(deployed), deployed)(Inputs.of(x))["logits"])
    return float(((ours - theirs).abs().amax(1) < 1e-5 * ours.abs().max()).double().mean())


def test_litert_rounds_halves_up_and_has_the_student_s_codes_where_there_are_none(tied: nn.Module) -> None:
    x = images(64, seed=5)
    assert share_of_equal_logits(deploy(tied, images(2), [images(32)]), x) < 0.6
    assert share_of_equal_logits(deployed_for("litert", tied, images(2), [images(32)]), x) > 0.95


def share_of_other_gates(deployed: Deployed) -> float:
    """Of the codes of a gate in OpenVINO, on the file's own input of it."""
    pytest.importorskip("openvino")
    from lqkd.export import check, openvino

    parity = check(openvino.build(deployed), deployed, images(32), runner=openvino.OpenVINORunner)
    return next(row.fraction for row in parity.optimised if row.name == "grids.calibrated.hardsigmoid")


def test_a_gate_of_one_half_is_not_half_way_between_two_levels_in_openvino() -> None:
    network = quantised(Excited(), bits="w8a8", residual_bits=8)
    network.excite.bias.data.zero_()
    network.excite.weight.data[::2] = 0  # gates of one half
    tied, apart = deploy(network, images(2), [images(32)]), deployed_for("openvino", network, images(2), [images(32)])
    assert share_of_other_gates(tied) > 0.1
    assert share_of_other_gates(apart) == 0
