"""The file that is written for TensorRT's explicit quantization, and the training that makes it possible."""

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
from lqkd.export import check, deploy, tensorrt, to_onnx
from lqkd.export.deploy import Deployed
from lqkd.export.runtimes import session
from lqkd.quantization import Recipe, Rule, quantizers
from lqkd.quantization.targets import TARGETS
from tests.unit.export.networks import Small, alter, images, quantised

TARGET = TARGETS["tensorrt"]


@pytest.fixture(scope="module")
def student() -> torch.nn.Module:
    network = quantised(bits="w4a8", target="tensorrt", residual_bits=8)
    assert isinstance(network, Small)
    with torch.no_grad():
        network.linear.bias -= network(images(256)).mean(0)  # or one class is always the first
    return network


@pytest.fixture(scope="module")
def deployed(student: torch.nn.Module) -> Deployed:
    return deploy(student, images(2), [images(32)], target=TARGET)


def test_a_student_that_was_trained_for_it_has_signed_grids_alone(student: torch.nn.Module) -> None:
    assert all(quantizer.signed for quantizer in quantizers(student).values())
    assert {q.code_range() for q in quantizers(student).values() if q.batched} == {(-128, 127)}


def test_its_file_agrees_and_keeps_all_rules(student: torch.nn.Module) -> None:
    model = to_onnx(student, images(8), format="tensorrt", calibration=[images(32)], test=[images(64)])
    assert tensorrt.broken_rule(model) is None
    assert {tensor.data_type for tensor in model.graph.initializer if "zero_point" in tensor.name} == {
        onnx.TensorProto.INT8
    }
    theirs = session(model, optimised=False).run(None, {"images": images(16, seed=3).numpy()})[0]
    ours = deploy(student, images(2), [images(32)], target=TARGET).network(images(16, seed=3)).numpy()
    np.testing.assert_allclose(theirs, ours, atol=1e-4 * np.abs(ours).max())


def test_grids_that_training_left_out_are_fitted_as_it_needs_them() -> None:
    network = quantised(bits="w8a8", target="tensorrt")
    with pytest.raises(UsageError, match="no calibration data"):
        to_onnx(network, images(8), format="tensorrt")
    to_onnx(network, images(8), format="tensorrt", calibration=[images(32)])


def test_a_student_that_was_not_trained_for_it_is_refused_with_the_setting() -> None:
    network = quantised(bits="w8a8", residual_bits=8)
    told = r"the grid of \w+.* TensorRT has signed codes .* train the student with quantization.target=tensorrt"
    with pytest.raises(UsageError, match=told):
        to_onnx(network, images(8), format="tensorrt", calibration=[images(32)])


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        ({"target": "tpu"}, "quantization.target='tpu' is unknown: use tensorrt, power_of_two, ncnn, or null"),
        ({"bits": "w4a4"}, "4 bits of the input of layer 'conv1' are not possible with target='tensorrt'"),
        ({"activation_quantizer": "lsq_plus"}, "quantizer LSQPlus of the input of layer .* zero is the middle"),
        ({"activation_quantizer": "pact"}, "quantizer PACT of the input of layer"),
        ({"activation_quantizer": {"name": "lsq", "signed": False}}, "signed=False of the input of layer"),
        ({"residual_bits": 4}, "4 bits of the .* are not possible with target='tensorrt'"),
    ],
)
def test_settings_that_it_does_not_have_are_refused_before_training(recipe: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        quantised(**{"bits": "w8a8", "target": "tensorrt", **recipe})


class Moving(nn.Module):
    """Everything that moves numbers, or takes the largest, in front of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pooled, self.padded = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3)
        self.wide = nn.Conv2d(8, 4, 1)
        self.token, self.turned = nn.Linear(36, 16), nn.Linear(4, 4)
        self.first, self.all = nn.Linear(4, 5), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.pooled(F.max_pool2d(F.relu(self.stem(x)), 2)))
        x = F.relu(self.padded(F.pad(x, (0, 1, 0, 1))))
        x = F.relu(self.wide(F.interpolate(x, scale_factor=3.0, mode="nearest")))
        x = F.relu(self.token(x.flatten(2)))
        x = F.relu(self.turned(x.transpose(1, 2)))
        return self.first(x[:, 0]) + self.all(x.flatten(1))


def test_what_moves_numbers_may_stand_between_a_grid_and_a_layer() -> None:
    network = quantised(Moving(), bits="w8a8", target="tensorrt", residual_bits=8)
    to_onnx(network, images(8), format="tensorrt", calibration=[images(32)], test=[images(64)])


def test_a_layer_may_stay_in_floating_point() -> None:
    rules = [Rule("linear", weight_bits=32, activation_bits=32)]
    network = quantised(bits="w8a8", target="tensorrt", residual_bits=8, rules=rules)
    model = to_onnx(network, images(8), format="tensorrt", calibration=[images(32)])
    assert tensorrt.broken_rule(model) is None


def test_a_recipe_without_a_target_decides_signs_from_data() -> None:
    assert Recipe().target is None
    assert not all(quantizer.signed for quantizer in quantizers(quantised(bits="w8a8")).values())


@pytest.mark.parametrize(
    ("name", "moved"),
    [
        ("conv2.weight_codes", 1),
        ("conv1.weight_scale", 1e-6),
        ("conv1.bias", 1e-6),
        ("grids.linear.input_quantizer.scale", 1e-6),
    ],
)
def test_a_file_with_one_other_number_fails(deployed: Deployed, name: str, moved: float) -> None:
    exported = tensorrt.build(deployed)
    alter(exported.model, name, moved)
    assert check(exported, deployed, images(32)).problem is not None


def broken(change: str) -> onnx.ModelProto:
    """A convolution between grids in which one thing is otherwise."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["codes"], "grid"),
        helper.make_node("DequantizeLinear", ["codes", "s", "z"], ["on_grid"], "back"),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["weight"], "weight", axis=0),
        helper.make_node("Conv", ["on_grid", "weight", "b"], ["y"], "conv"),
    ]
    held = {
        "s": np.float32(0.1),
        "z": np.int8(0),
        "w": np.ones((2, 3, 1, 1), np.int8),
        "ws": np.full(2, 0.1, np.float32),
        "wz": np.zeros(2, np.int8),
        "b": np.zeros(2, np.float32),
    }
    if change == "zero point":
        held["z"] = np.int8(1)
    elif change == "unsigned":
        held["z"] = np.uint8(0)
    elif change == "scale":
        held["ws"][1] = 0
    elif change == "bias":
        held["b"] = np.zeros(2, np.int32)
    elif change == "clip":
        nodes.insert(1, helper.make_node("Clip", ["codes", "z"], ["clipped"], "clip"))
        nodes[2].input[0] = "clipped"
    elif change == "float weight":
        held["f"] = np.ones((2, 3, 1, 1), np.float32)
        nodes[3].input[1] = "f"
    elif change == "unsigned weight":
        held["w"] = np.ones((2, 3, 1, 1), np.uint8)
    elif change == "channels":
        held["s"], held["z"] = np.full(3, 0.1, np.float32), np.zeros(3, np.int8)
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 3, 4, 4])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 2, 4, 4])
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in held.items()]
    return helper.make_model(helper.make_graph(nodes, "one", [x], [y], initializers))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("", None),
        ("zero point", "the zero point of grid is not 0 in int8"),
        ("unsigned", "the zero point of grid is not 0 in int8"),
        ("scale", "the scale of weight is no positive float32 constant"),
        ("bias", "the bias of conv is no float32 constant"),
        ("clip", "clip (Clip) reads codes"),
        ("unsigned weight", "weight reads neither codes of a QuantizeLinear nor a constant of int8"),
        ("float weight", "conv has one operand on a grid and one in floating point"),
        ("channels", "grid has a scale for each channel of an activation"),
    ],
)
def test_every_rule_is_looked_at(change: str, told: str | None) -> None:
    assert tensorrt.broken_rule(broken(change)) == told
