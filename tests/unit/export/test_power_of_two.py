"""The file for fixed-point hardware, and the training that makes it possible."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import helper, numpy_helper
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.export import check, deploy, power_of_two, to_onnx
from lqkd.export.deploy import Deployed
from lqkd.export.runtimes import Runner
from lqkd.quantization import Recipe, Rule, quantize_model, quantizers
from lqkd.quantization.targets import TARGETS
from tests.unit.export.networks import Small, alter, images, quantised

TARGET = TARGETS["power_of_two"]


@pytest.fixture(scope="module", params=["w8a8", "w4a4"])
def student(request: pytest.FixtureRequest) -> nn.Module:
    return quantised(bits=request.param, target="power_of_two", residual_bits=8)


@pytest.fixture(scope="module")
def deployed(student: nn.Module) -> Deployed:
    return deploy(student, images(2), [images(32)], target=TARGET)


def test_a_student_that_is_trained_for_it_has_one_power_of_two_for_each_tensor(student: nn.Module) -> None:
    steps = [quantizer.step() for quantizer in quantizers(student).values()]
    assert all(step.shape == () and torch.frexp(step).mantissa == 0.5 for step in steps)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in student.modules())


def test_its_file_keeps_the_rule_and_computes_what_was_trained(student: nn.Module) -> None:
    model = to_onnx(student, images(8), format="power_of_two", calibration=[images(32)], test=[images(64)])
    assert power_of_two.broken_rule(model) is None
    types = {
        tensor.data_type for tensor in model.graph.initializer if tensor.name.endswith("input_quantizer.zero_point")
    }
    assert types == {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}  # images have both signs


def test_not_one_code_differs_in_the_runtime(deployed: Deployed) -> None:
    parity = check(power_of_two.build(deployed), deployed, images(32))
    assert parity.problem is None
    assert parity.exact
    assert parity.output_steps == 0
    assert {row.fraction for row in (*parity.unoptimised, *parity.optimised, *parity.end_to_end)} == {0.0}


def test_from_grid_to_grid_is_a_shift_of_whole_numbers() -> None:
    network = quantised(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)),
        bits="w8a8",
        target="power_of_two",
    )
    exported = power_of_two.build(deploy(network, images(2), target=TARGET))
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in exported.model.graph.initializer}
    first, second = exported.grids.values()
    found = Runner(exported.model, optimised=True, tensors=[first, second])(images(16).numpy())
    sums = F.conv2d(torch.tensor(found[first]).double(), torch.tensor(held["0.weight_codes"]).double()).long()
    sums += torch.tensor(held["0.bias_codes"]).view(-1, 1, 1)
    exponents = [int(np.log2(held[name])) for name in ("0.bias_scale", "grids.3.input_quantizer.scale")]
    shift = exponents[1] - exponents[0]
    assert shift > 0
    whole, rest, half = sums >> shift, sums & (2**shift - 1), 2 ** (shift - 1)
    rounded = whole + ((rest > half) | ((rest == half) & (whole % 2 == 1)))
    np.testing.assert_array_equal(found[second], rounded.clamp(0, 255).numpy())


def test_grids_that_training_left_out_are_powers_of_two_as_well() -> None:
    network = quantised(bits="w8a8", target="power_of_two")
    to_onnx(network, images(8), format="power_of_two", calibration=[images(32)])


NAMES = dict.fromkeys(("weight_quantizer", "activation_quantizer", "residual_quantizer"), "lsq_power_of_two")
BY_HAND = NAMES | {"bits": "w8a8", "residual_bits": 8, "fold_batch_norm": True, "per_channel": False}
"""What the target asks for, without it."""
FLOAT = Rule("2", weight_bits=32, activation_bits=32)
SIGNS = Rule("conv1", activation_bits=1, activation_quantizer="react")


class NormFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.norm(F.relu(self.conv(x)))))


@pytest.mark.parametrize(
    ("network", "recipe", "told"),
    [
        (Small, {"bits": "w8a8", "residual_bits": 8}, "the weight of stem: its channels have scales of their own"),
        (Small, {"per_channel": True}, "the weight of stem: its channels have scales of their own"),
        (Small, {"fold_batch_norm": False}, "the weight of stem: its channels have scales of their own"),
        (Small, {"weight_quantizer": "lsq"}, "the weight of stem: its scale is no power of two"),
        (Small, {"activation_quantizer": "lsq"}, "the grid of .*stem.*: its scale is no power of two"),
        (Small, {"activation_quantizer": "lsq_plus"}, "the grid of .*stem.*: its zero point is not zero"),
        (Small, {"rules": [SIGNS]}, "the grid of .*conv1.*: it has signs and no zero"),
        (Small, {"rules": [Rule("linear", activation_bits=32)]}, "the bias of linear: its input is in floating point"),
        (NormFirst, {"fold_batch_norm": False}, "the batch norm norm: it multiplies each channel"),
    ],
)
def test_a_student_that_was_not_trained_for_it_is_refused_with_the_setting(
    network: type[nn.Module], recipe: dict[str, Any], told: str
) -> None:
    student = quantised(network(), **(recipe if "bits" in recipe else BY_HAND | recipe))
    with pytest.raises(UsageError, match=f"cannot express {told}.*; train the student with .*target=power_of_two"):
        to_onnx(student, images(8), format="power_of_two", calibration=[images(32)])


class Times(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 0.3


@pytest.mark.parametrize(
    ("between", "recipe", "told"),
    [
        (nn.Hardswish(), {}, "HardSwish in .*in floating point: build the network with ReLU"),
        (nn.Sigmoid(), {}, "Sigmoid in .*in floating point: build the network with ReLU"),
        (nn.Softmax(1), {}, "Softmax in .*in floating point: build the network without it"),
        (Times(), {}, "the number 0.3 in .*in floating point: take one of at most 8 bits"),
        (
            nn.ReLU(),
            {"rules": [FLOAT]},
            "the layer 2, which is computed in floating point: give its weight",
        ),
        (nn.ReLU(), {"first_layer_bits": 32}, "the layer 0, which is computed in floating point: give its weight"),
    ],
)
def test_what_a_file_would_have_in_floating_point_is_refused_with_what_helps(
    between: nn.Module, recipe: dict[str, Any], told: str
) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), between, nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(8, 4, 1))
    student = quantised(network, bits="w8a8", residual_bits=8, target="power_of_two", **recipe)
    with pytest.raises(UsageError, match=f"--format power_of_two cannot express {told}"):
        power_of_two.build(deploy(student, images(2), [images(32)], target=TARGET))


def test_a_student_with_the_same_settings_by_hand_is_taken() -> None:
    to_onnx(quantised(**BY_HAND), images(8), format="power_of_two", calibration=[images(32)])


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        ({"weight_quantizer": "lsq"}, "quantizer LSQ of the weight of layer 'stem' is not possible with target='power"),
        ({"activation_quantizer": "minmax"}, "quantizer MinMax of the input of layer 'stem' .* use lsq_power_of_two"),
        ({"residual_quantizer": "lsq"}, "quantizer LSQ of the .* is not possible with target='power_of_two'"),
        ({"per_channel": True}, "per_channel=True of layer 'stem' is not possible with target='power_of_two'"),
        ({"bits": "w4a32"}, "a weight of 4 bits beside an input in floating point, of layer 'conv1', is not possible"),
        ({"fold_batch_norm": False}, "quantization.fold_batch_norm=False is not possible with target='power_of_two'"),
    ],
)
def test_settings_that_it_does_not_have_are_refused_before_training(recipe: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        quantised(**{"bits": "w8a8", "target": "power_of_two", "residual_bits": 8, **recipe})


def test_one_scale_for_a_weight_is_one_in_the_file_when_batch_norm_was_folded_before() -> None:
    network = quantised(bits="w8a8", residual_bits=8, per_channel=False, fold_batch_norm=True)
    model = to_onnx(network, images(8), calibration=[images(32)], test=[images(64)])
    scales = [numpy_helper.to_array(t) for t in model.graph.initializer if t.name.endswith("weight_scale")]
    assert len(scales) == 4
    assert all((scale == scale[0]).all() for scale in scales)


def test_folding_before_training_leaves_the_float_network_as_it_was() -> None:
    torch.manual_seed(0)
    network = Small().train()
    network(images(32))
    expected = network.eval()(images())
    folded, _ = quantize_model(network, Recipe("w8a8", fold_batch_norm=True))  # not fitted: it computes in float
    torch.testing.assert_close(folded(images()), expected, atol=1e-5, rtol=1e-5)


def test_a_batch_norm_that_would_stay_is_refused_before_training() -> None:
    with pytest.raises(UsageError, match=r"batch norm 'norm' cannot be folded before .*: no convolution"):
        quantize_model(NormFirst(), Recipe("w8a8", target="power_of_two"))


def test_a_trained_state_fits_a_network_that_is_built_anew(student: nn.Module) -> None:
    bits = "w8a8" if student.conv1.weight_quantizer.bits == 8 else "w4a4"  # type: ignore[union-attr, operator]
    fresh, _ = quantize_model(Small(), Recipe(bits, target="power_of_two", residual_bits=8))
    fresh.load_state_dict(student.state_dict())
    assert torch.equal(fresh.eval()(images()), student(images()))


def test_gradients_reach_every_step() -> None:
    network = quantised(bits="w4a4", target="power_of_two", residual_bits=8).train()
    network(images(32)).square().sum().backward()
    assert all(quantizer.scale.grad.abs() > 0 for quantizer in quantizers(network).values())


@pytest.mark.parametrize(
    ("name", "moved"),
    [
        ("conv2.weight_codes", 1),
        ("conv1.weight_scale", 1e-6),
        ("conv1.bias_codes", 1),
        ("linear.bias_scale", 1e-6),
        ("grids.linear.input_quantizer.scale", 1e-6),
    ],
)
def test_a_file_with_one_other_number_fails(deployed: Deployed, name: str, moved: float) -> None:
    exported = power_of_two.build(deployed)
    alter(exported.model, name, moved)
    assert check(exported, deployed, images(32)).problem is not None


def test_a_file_that_breaks_the_rule_fails_by_it(deployed: Deployed) -> None:
    exported = power_of_two.build(deployed)
    node = next(node for node in exported.model.graph.node if node.op_type == "QuantizeLinear")
    alter(exported.model, node.input[2], 1)
    assert check(exported, deployed, images(2)).problem == f"the zero point of {node.name} is not 0"


@pytest.mark.parametrize(
    ("scale", "zero", "told"),
    [
        (np.float32(0.125), np.int8(0), None),
        (np.float32(3), np.int8(0), "the scale of grid is no power of two, for a whole tensor, in float32"),
        (np.float32(0), np.int8(0), "the scale of grid is no power of two, for a whole tensor, in float32"),
        (np.full(3, 0.5, np.float32), np.zeros(3, np.int8), "the scale of grid is no power of two, for a whole"),
        (np.float32(0.5), np.uint8(128), "the zero point of grid is not 0"),
    ],
)
def test_every_rule_is_looked_at(scale: Any, zero: Any, told: str | None) -> None:
    node = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"], "grid")
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 3])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.INT8, [1, 3])
    held = [numpy_helper.from_array(np.asarray(value), name) for name, value in (("s", scale), ("z", zero))]
    broken = power_of_two.broken_rule(helper.make_model(helper.make_graph([node], "one", [x], [y], held)))
    assert broken == told if told is None else broken is not None and broken.startswith(told)
