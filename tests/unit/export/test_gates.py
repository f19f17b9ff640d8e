"""Hard swish, SiLU and hard sigmoid between grids are integer sums, tables and products of a file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lqkd.export import Deployed, check, deploy, portable, to_onnx
from lqkd.export.emitter import Exported
from lqkd.export.gates import GateGrid
from lqkd.export.grids import ActivationGrid
from lqkd.export.portable import QuantizeDequantize
from lqkd.export.runtimes import kernels
from tests.unit.export.networks import alter, images, quantised

GATES: dict[str, Callable[[Tensor], Tensor]] = {"Sigmoid": torch.sigmoid, "HardSigmoid": F.hardsigmoid}


class Gated(nn.Module):
    """Squeeze and excitation between a hard swish and a SiLU."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 12, 1)
        self.squeeze, self.excite = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.linear = nn.Linear(12, 5)
        nn.init.normal_(self.first.weight, std=0.5)  # so that hard sigmoids reach both of their ends

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.first(x))
        x = x * F.hardsigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.linear(F.silu(self.second(x)).mean((2, 3)))


class Excited(nn.Module):
    """A product with a sigmoid of about what that of ``bias`` is."""

    def __init__(self, bias: float) -> None:
        super().__init__()
        self.first, self.excite, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)
        nn.init.constant_(self.excite.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        return self.last(x * torch.sigmoid(self.excite(x)))


class Late(nn.Module):
    """A SiLU that the network returns."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.first(x))


@pytest.fixture(scope="module")
def student() -> nn.Module:
    return quantised(Gated(), bits="w8a8", residual_bits=8)


@pytest.fixture(scope="module")
def deployed(student: nn.Module) -> Deployed:
    return deploy(student, images(2), [images(32)], gates=True)


@pytest.fixture(scope="module")
def halved() -> Deployed:
    """A hard sigmoid on a trained grid on which 0.5, that of zero, is 7.5 steps."""
    network: Any = nn.Sequential(*(nn.Conv2d(3, 8, 3), nn.Hardsigmoid(), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1)))
    network = quantised(network, bits="w4a4", residual_bits=8)
    network[2].input_quantizer.scale.data.fill_(1 / 15)
    deployed = deploy(network, images(2), [images(32)])
    source: Any = deployed.network.get_submodule("grids.calibrated._0")
    source.scale.fill_(0.051930834)  # with which a sum of integers rounds the other way
    return deployed


@pytest.fixture(scope="module")
def exported(deployed: Deployed) -> Exported:
    return portable.build(deployed)


def test_gates_and_their_products_run_on_integers_and_compute_what_pytorch_does(
    deployed: Deployed, exported: Exported
) -> None:
    found = kernels(exported.model)
    assert found.floats == ()
    assert found.integer["QLinearSigmoid"] == 1
    assert found.integer["QLinearMul"] == 3
    assert found.integer["QLinearAdd"] == 1  # the hard sigmoid of squeeze and excitation
    assert any(node.op_type == "Clip" for node in exported.model.graph.node)  # that of the hard swish
    parity = check(exported, deployed, images(8), [images(32)])
    assert parity.problem is None
    assert parity.exact  # the sigmoid's table, too
    assert parity.output_steps == max(row.steps for row in parity.end_to_end) == 0


def test_a_portable_file_has_its_gates_on_integers_unasked(student: nn.Module) -> None:
    assert kernels(to_onnx(student, images(2), calibration=[images(32)])).floats == ()


def test_another_step_in_front_of_a_hard_sigmoid_fails_the_proof(deployed: Deployed) -> None:
    exported = portable.build(deployed)
    name = next(t.name for t in exported.model.graph.initializer if t.name.endswith(".sixfold_scale"))
    alter(exported.model, name, 1e-7)
    assert check(exported, deployed, images(2)).problem == "a scale in the file differs from the student's"


@pytest.mark.parametrize(
    "build", [portable.build, lambda deployed: QuantizeDequantize(deployed).build()], ids=["sum", "float"]
)
def test_a_hard_sigmoid_half_way_between_two_levels_of_training_passes(
    build: Callable[[Deployed], Exported], halved: Deployed
) -> None:
    parity = check(build(halved), halved, images(8))
    assert parity.problem is None
    assert parity.output_steps == 0


@pytest.mark.parametrize("bias", [0.0, -5.0])
def test_gates_that_are_small_have_as_many_levels_as_others(bias: float) -> None:
    student: Any = quantised(Excited(bias), bits="w8a8")
    deployed = deploy(student, images(2), [images(32)], gates=True)
    (grid,) = [module for module in deployed.network.modules() if isinstance(module, GateGrid)]
    largest = torch.sigmoid(student.excite(F.relu(student.first(images(32))))).max()
    assert 250 < largest / grid.scale < 256
    assert check(portable.build(deployed), deployed, images(8)).output_steps == 0


def test_what_is_returned_is_computed_in_floating_point() -> None:
    network = deploy(quantised(Late(), bits="w8a8"), images(2), [images(32)], gates=True).network
    assert not any(isinstance(module, GateGrid) for module in network.modules())


@pytest.mark.parametrize(("gate", "activation"), [("Sigmoid", F.silu), ("HardSigmoid", F.hardswish)])
def test_a_product_is_the_activation_but_for_half_a_step_of_its_gate(
    gate: str, activation: Callable[[Tensor], Tensor]
) -> None:
    source, grid = ActivationGrid(torch.tensor(8 / 255), 60, 0, 255, bits=8), GateGrid()
    x = source.scale * (torch.arange(256) - source.zero_point)
    grid.settle(source, gate)
    expected = activation(x.double())
    apart = (x.double() * grid(GATES[gate](x)).double() - expected).abs()
    assert (apart <= x.double().abs() / 507).all()


@pytest.mark.parametrize("scale", [0.024, 0.05, 0.3])
def test_a_hard_swish_whose_gate_has_the_codes_of_its_value_is_exact(scale: float) -> None:
    source, grid = ActivationGrid(torch.tensor(scale), 128, 0, 255, bits=8), GateGrid()
    assert grid.share(source)
    assert abs(float(source.scale) / scale - 1) < 1 / 15
    x = source.scale * (torch.arange(256) - source.zero_point)
    codes = grid.codes(F.hardsigmoid(x))
    assert torch.equal(codes, torch.arange(256.0).clamp(grid.low, grid.high))
    expected = F.hardswish(x.double())
    assert ((x * grid(F.hardsigmoid(x))).double() - expected).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.parametrize(("scale", "zero_point"), [(0.02, 128), (0.05, 40), (1.0, 128)])
def test_a_value_that_does_not_reach_from_minus_three_on_keeps_its_step(scale: float, zero_point: int) -> None:
    source = ActivationGrid(torch.tensor(scale), zero_point, 0, 255, bits=8)
    assert not GateGrid().share(source)
    assert source.scale == torch.tensor(scale)


@pytest.mark.parametrize("gate", ["Sigmoid", "HardSigmoid"])
def test_no_code_of_a_gate_hangs_on_the_last_bits_of_what_computes_it(gate: str) -> None:
    source, grid = ActivationGrid(torch.tensor(8 / 255), 60, 0, 255, bits=8), GateGrid()
    values = GATES[gate](source.scale * (torch.arange(256) - source.zero_point))
    grid.settle(source, gate)  # the gate of zero is half way between two levels before
    for moved in (-1e-6, 1e-6):
        assert torch.equal(grid.codes(values + moved), grid.codes(values))
