"""Values that functions read and write between layers: on grids of training wherever a file has one."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, cast

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.export.deploy import deployable_copy
from lqkd.export.formats import deployed_for
from lqkd.export.gates import GateGrid
from lqkd.export.grids import ActivationGrid
from lqkd.export.integer import IntegerLayer
from lqkd.export.placement import GridPlacement, place_grids
from lqkd.models import build_model
from lqkd.models.calls import Inputs
from lqkd.quantization import Recipe, coverage, quantize_model, quantizers
from lqkd.quantization.residual import quantizers_between
from tests.unit.export.networks import images, quantised
from tests.unit.quantization.test_biases import projected

BOTH: dict[str, Any] = {"bits": "w4a4", "residual_bits": 8, "function_bits": 8}


class Excite(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce, self.act = nn.Conv2d(channels, 4, 1), nn.ReLU()
        self.expand, self.gate = nn.Conv2d(4, channels, 1), nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.expand(self.act(self.reduce(x.mean((2, 3), keepdim=True)))))


class Block(nn.Module):
    """A hard swish between layers, one that squeeze and excitation reads, and a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.norm1, self.act1 = nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish()
        self.deep, self.norm2 = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16)
        self.act2, self.excite = nn.Hardswish(inplace=True), Excite(16)
        self.project, self.norm3 = nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act2(self.norm2(self.deep(self.act1(self.norm1(self.expand(x))))))
        return x + self.norm3(self.project(self.excite(y)))


def mobile() -> nn.Module:
    """Two blocks, the mean of an image and a classifier."""
    stem = (nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.Hardswish())
    return nn.Sequential(*stem, Block(), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def placed(student: nn.Module, x: Tensor) -> GridPlacement:
    return place_grids(deployable_copy(student), Inputs.of(x))[0]


def between(model: nn.Module) -> set[str]:
    """The names of the quantizers that belong to no layer."""
    own = {id(owner._modules[name]) for owner, name in quantizers_between(model)}
    return {name for name, quantizer in quantizers(model).items() if id(quantizer) in own}


def test_the_network_that_is_deployed_is_the_one_that_was_trained() -> None:
    student, x = projected(quantised(mobile(), **BOTH)), images(64, seed=5)
    deployed = deployed_for("openvino", student, images(2))  # nothing to fit, so no data
    assert (deployed.calibrated, deployed.rerouted) == ([], [])
    expected, found = student(x), deployed.network(x)
    assert ((found - expected).abs().amax(1) < 1e-5 * expected.abs().max()).double().mean() > 0.95


NETWORKS = ("timm/mobilenetv3_small_100", "timm/efficientnet_b0", "torchvision/mobilenet_v3_small")


@pytest.mark.parametrize("name", NETWORKS)
def test_the_export_has_no_grid_to_fit(name: str) -> None:
    student, report = quantize_model(build_model(name, num_classes=10).eval(), Recipe(**BOTH))
    found = placed(student, torch.randn(2, 3, 32, 32))
    assert (list(found.fresh.values()), found.rerouted) == ([], [])
    assert not report.operations


def test_the_gates_of_a_portable_file_are_not_of_training_but_the_grids_of_their_values_are() -> None:
    student = quantised(mobile(), **BOTH)
    trained: list[Any] = [
        quantizer.scale for name, quantizer in quantizers(student).items() if name in between(student)
    ]
    deployed = deployed_for("portable", student, images(2), [images(32)])
    held: list[Any] = [grid.scale for grid in deployed.network.modules() if isinstance(grid, ActivationGrid)]
    assert all(any(torch.equal(step, other) for other in held) for step in trained)
    assert sum(isinstance(grid, GateGrid) for grid in deployed.network.modules()) == 5  # those of the hard swishes
    assert deployed.calibrated == []


# --- where they are ---------------------------------------------------------------------------------------------------


def test_without_the_setting_what_functions_read_and_write_stays_in_floating_point() -> None:
    model, report = quantize_model(mobile(), Recipe("w4a4", residual_bits=8))
    joins = {f"{place}.output_quantizer" for place in ("2", "3", "3.norm3", "4.norm3")}
    assert between(model) == joins
    assert [str(x) for x in report.operations] == ["functional mul at 3.excite", "functional mul at 4.excite"]


def test_one_grid_is_before_all_that_read_a_value_and_in_front_of_none_that_a_layer_alone_reads() -> None:
    model, report = quantize_model(mobile(), Recipe(**BOTH))
    of_blocks = {
        f"{block}.{place}.output_quantizer"
        for block in (3, 4)
        for place in ("norm1", "norm2", "act2", "norm3", "excite.expand", "excite.gate")
    }
    assert between(model) == {*(f"{place}.output_quantizer" for place in (1, 2, 3, 4)), *of_blocks}
    met = {name for join in report.joins for name in join.quantizers}
    assert {f"{port.module}.output_quantizer" for port in report.functions} == between(model) - met
    assert len(met & between(model)) == 4
    assert not report.operations


def test_what_is_on_a_grid_is_told_of_a_network_without_its_recipe() -> None:
    model, report = quantize_model(mobile(), Recipe(**BOTH))
    assert coverage(model) == report


class Functional(nn.Module):
    """A hard swish whose result two functions of the same forward read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.conv(x))
        return self.last(x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True))))


def test_a_value_that_no_hook_reaches_is_left_to_the_export_and_its_readers_are_listed() -> None:
    student, report = quantize_model(Functional(), Recipe(**BOTH))
    assert between(student) == {"conv.output_quantizer", "gate.output_quantizer"}
    assert [str(x) for x in report.operations] == [
        "functional mul at the top level",
        "functional mean at the top level",
    ]
    assert list(placed(student, images(2)).fresh.values()) == [
        "hardswish in the network's forward",
        "sigmoid in the network's forward",
    ]


def test_a_clamp_is_in_front_of_its_grid_also_inside_of_timm_s_batch_norm() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 1), timm.layers.BatchNormAct2d(8), nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1)
    )
    model, _ = quantize_model(network, Recipe(**BOTH))
    assert between(model) == {"1.output_quantizer"}


def test_the_argument_of_the_activation_of_timm_s_batch_norm_is_on_a_grid() -> None:
    norm = timm.layers.BatchNormAct2d(8, act_layer=nn.SiLU)
    student: Any = quantised(nn.Sequential(nn.Conv2d(3, 8, 1), norm, nn.Conv2d(8, 4, 1)), **BOTH)
    assert between(student) == {"1.act.argument_quantizer"}
    seen: list[Tensor] = []
    student[1].act.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    student(images(4))
    assert torch.isin(seen[0], student[1].act.argument_quantizer.levels()).all()
    assert deployed_for("openvino", student, images(2)).calibrated == []


def test_a_bias_leads_to_no_sums_half_way_between_levels_of_what_the_activation_reads() -> None:
    few: dict[str, Any] = {"bits": "w4a4", "residual_bits": 4, "function_bits": 4, "first_layer_bits": None}
    norm = timm.layers.BatchNormAct2d(8, act_layer=nn.SiLU)
    network = quantised(nn.Sequential(nn.Conv2d(3, 8, 1), norm, nn.Conv2d(8, 4, 1)), **few)
    student: Any = projected(network)
    layer = cast(IntegerLayer, deployed_for("openvino", student, images(2)).network.get_submodule("0"))
    assert layer.bias_codes is not None
    assert layer.bias_scale is not None
    sums = int(layer.bias_codes[0]) + layer.multiplier * torch.arange(-5000, 5000)
    frequent = int(sums[sums > 50][0])
    student[1].act.argument_quantizer.scale.data.copy_(layer.bias_scale[0] * frequent / 2.5)
    moved = (cast(Any, projected(student))[1].bias - student[1].bias)[0] / layer.bias_scale[0]
    assert 0.9 < float(moved.detach().abs()) < 8.1


class Parts(nn.Module):
    """Half of a result goes through layers, all of it into a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.inner, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.conv(x).chunk(2, 1)
        return self.last(torch.cat([first, second, self.inner(second)], 1))


def test_a_result_of_which_parts_are_read_is_on_one_grid() -> None:
    student, report = quantize_model(Parts(), Recipe(**BOTH))
    assert between(student) == {"conv.output_quantizer", "inner.output_quantizer"}
    assert placed(student, images(2)).fresh == {}
    assert [join.bits for join in report.joins] == [(8, 8, 8)]


@pytest.mark.parametrize(("joins", "functions", "both"), [(8, 4, 8), (4, 8, 8)])
def test_what_an_addition_and_a_function_read_has_the_larger_number_of_bits(
    joins: int, functions: int, both: int
) -> None:
    recipe = Recipe("w4a4", residual_bits=joins, function_bits=functions)
    bits = {name: q.bits for name, q in quantizers(quantize_model(mobile(), recipe)[0]).items()}
    assert bits["3.norm3.output_quantizer"] == joins
    assert bits["3.norm1.output_quantizer"] == functions
    assert quantizers(quantize_model(Summed(), recipe)[0])["conv.output_quantizer"].bits == both


class Summed(nn.Module):
    """A result plus its SiLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.last = nn.Conv2d(3, 8, 1), nn.SiLU(), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.last(x + self.act(x))


def test_what_a_network_returns_is_on_no_grid_though_a_function_reads_it() -> None:
    class Returned(Summed):
        def forward(self, x: Tensor) -> Any:
            x = self.conv(x)
            return x, self.last(self.act(x))

    student, _ = quantize_model(Returned(), Recipe(**BOTH))
    assert between(student) == {"act.argument_quantizer"}
    assert placed(student, images(2)).fresh == {}


# --- networks with them -----------------------------------------------------------------------------------------------


def test_converting_twice_places_nothing_more_and_tells_the_same() -> None:
    for network in (mobile(), Functional(), Parts()):
        model, report = quantize_model(network, Recipe(**BOTH))
        names = list(model.state_dict())
        again, second = quantize_model(model, Recipe(**BOTH))
        assert list(again.state_dict()) == names
        assert second == report


def test_copies_pickles_checkpoints_and_synchronised_networks_keep_them() -> None:
    student = quantised(mobile(), **BOTH)
    fresh, _ = quantize_model(mobile(), Recipe(**BOTH))
    fresh.load_state_dict(student.state_dict())
    same = [copy.deepcopy(student), pickle.loads(pickle.dumps(student)), fresh.eval()]
    same.append(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(student)))
    assert all(torch.equal(other(images(4)), student(images(4))) for other in same)


def test_every_one_of_them_learns() -> None:
    student = quantised(mobile(), **BOTH)
    student.train()(images(16)).square().sum().backward()
    assert all(p.grad is not None for name in between(student) for p in student.get_submodule(name).parameters())


def test_the_start_of_a_training_tells_how_many_there_are() -> None:
    _, report = quantize_model(mobile(), Recipe(**BOTH))
    assert "; 12 values between layers with 8 bits" in report.summary()
    assert "quantised: output of 3.excite.gate with 8 bits" in str(report)


class Deciding(Functional):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "too many bits": (mobile, {"function_bits": 9}, "quantization.function_bits=9 is not possible: bits are 1 to 8"),
    "no number": (mobile, {"function_bits": "8"}, "quantization.function_bits='8' is not possible"),
    "floating additions": (mobile, {"residual_bits": None}, "function_bits=8 is not possible without residual_bits"),
    "no graph": (Deciding, {}, r"function_bits=8 has no effect: the graph .* if x.sum\(\) > 0"),
    "another quantizer": (mobile, {"residual_quantizer": "irnet"}, "residual_quantizer for the output of 1: "),
    "a target": (
        mobile,
        {"target": "tensorrt", "bits": "w8a8", "function_bits": 4},
        "4 bits of the .* are not possible with target='tensorrt'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_impossible_setting_is_refused_in_one_sentence(name: str) -> None:
    network, settings, message = REFUSED[name]
    with pytest.raises(UsageError, match=message):
        quantize_model(network(), Recipe(**{**BOTH, **settings}))
