"""ncnn's files: what is in them, what ncnn computes of them, and what it cannot have."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.export import deploy, qonnx, to_ncnn
from lqkd.export.deploy import Deployed
from lqkd.export.ncnn import build, check_replaceable, kernels
from lqkd.export.ncnn_file import Layer, number, read, written
from lqkd.export.ncnn_proof import NcnnRunner, check_ncnn
from lqkd.export.ncnn_writer import Written
from lqkd.models.calls import Inputs
from lqkd.quantization import Rule, quantizers
from lqkd.quantization.targets import TARGETS
from lqkd.runs.student import student_file
from tests.unit.export.networks import images, quantised

pytest.importorskip("ncnn")
TARGET = TARGETS["ncnn"]


@pytest.fixture(scope="module", params=["w8a8", "w4a4"])
def student(request: pytest.FixtureRequest) -> nn.Module:
    return quantised(bits=request.param, target="ncnn", residual_bits=8)


@pytest.fixture(scope="module")
def deployed(student: nn.Module) -> Deployed:
    return deploy(student, images(2), [images(32)], target=TARGET)


@pytest.fixture(scope="module")
def files(deployed: Deployed) -> Written:
    return build(deployed)


def test_a_student_that_is_trained_for_it_has_no_code_below_minus_127(student: nn.Module) -> None:
    ranges = {q.code_range() for q in quantizers(student).values() if q.batched}
    assert (-127, 127) in ranges
    assert all(max(-low, high) <= 127 for low, high in ranges)


def test_not_one_code_differs_in_ncnn(files: Written, deployed: Deployed) -> None:
    parity = check_ncnn(files, deployed, images(32), [images(32, seed=2)])
    assert parity.problem is None
    assert len(parity.unoptimised) == 7
    assert {row.fraction for row in parity.unoptimised} == {0.0}
    assert parity.agreement == 1


def test_dense_layers_run_in_int8_and_convolutions_with_groups_do_not(files: Written) -> None:
    found = kernels(files)
    assert found.integer == {"Convolution": 2, "InnerProduct": 1}
    assert found.float_products == ("conv2",)


class Every(nn.Module):
    """Everything that lies between layers, strides and sides that differ, and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, (3, 5), stride=(2, 1), padding=(1, 2))
        self.left, self.right = nn.Conv2d(8, 8, 3, padding=2, dilation=2), nn.Conv2d(8, 8, 1)
        self.gate, self.last = nn.Conv2d(16, 16, 1), nn.Linear(19 * 2 * 5, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem(x))
        x = torch.cat([F.relu(self.left(x)), self.right(F.avg_pool2d(x, 3, 1, 1))], 1)
        x = x * F.relu6(self.gate(F.adaptive_avg_pool2d(x, 1)) + 3)
        x = F.max_pool2d(F.relu(x), 2, 2, ceil_mode=True)
        return self.last(torch.flatten(F.pad(x, (1, 0, 0, 1, 2, 1))[:, :, ::2], 1))


def test_what_lies_between_layers_is_computed() -> None:
    network = quantised(Every(), bits="w4a4", target="ncnn", residual_bits=8)
    to_ncnn(network, images(8), calibration=[images(32)], test=[images(32, seed=2)])


class Gated(nn.Module):
    """Blocks of MobileNetV3 and EfficientNet: activations in float32, and gates of a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 8, 3), *(nn.Conv2d(8, 8, 1) for _ in range(7))])

    def forward(self, x: Tensor) -> Tensor:
        for index, act in enumerate((F.hardswish, F.silu, torch.tanh, F.leaky_relu)):
            x = act(4 * self.layers[index](x))
            gate = torch.sigmoid if index % 2 else F.hardsigmoid
            x = x * gate(self.layers[4 + index](F.adaptive_avg_pool2d(x, 1)))
        return x.mean((2, 3))


@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
def test_activations_are_computed_in_float32(bits: str) -> None:
    deployed = deploy(quantised(Gated(), bits=bits, target="ncnn"), images(2), [images(32)], target=TARGET)
    parity = check_ncnn(build(deployed), deployed, images(64, seed=3), [images(32, seed=2)])
    assert parity.problem is None
    assert max(row.fraction for row in parity.unoptimised) < 2e-4


def test_no_level_of_another_grid_is_the_middle_between_two_of_a_grid_that_is_fitted_for_the_file() -> None:
    values = 0.013 * torch.arange(-84, 85)  # of which every 84th part of 127 is one, else
    grid: Any = TARGET.missing_grid()
    grid.initialize(values)
    places = values.double() / grid.step().double()
    assert float((places - places.floor() - 0.5).abs().min()) > 1e-5


def test_a_layer_may_stay_in_floating_point() -> None:
    rules = [Rule("linear", weight_bits=32, activation_bits=32), Rule("conv1", activation_bits=32)]
    network = quantised(bits="w4a4", target="ncnn", rules=rules)
    to_ncnn(network, images(8), calibration=[images(32)], test=[images(32, seed=2)])


def test_sums_of_int8_convolutions_are_exact() -> None:
    generator = np.random.default_rng(0)
    weight = generator.integers(-128, 128, (16, 16, 3, 3)).astype(np.int8)
    codes = generator.integers(-127, 128, (16, 12, 12)).astype(np.float32)
    ones = (np.ones(16, np.float32), np.ones(1, np.float32))
    parameters = {"0": "16", "1": "3", "4": "1", "6": str(weight.size), "8": "1"}
    layers = [
        Layer("Input", "x", (), ("x",), {"0": "12", "1": "12", "2": "16"}),
        Layer("Convolution", "conv", ("x",), ("y",), parameters, weight, scales=ones),
    ]
    network = Deployed(torch.fx.symbolic_trace(nn.Identity()), ("x",), ("y",))
    found = NcnnRunner(Written(*written(layers), {}, {}), network)(Inputs.of(torch.from_numpy(codes)[None]))["y"]
    expected = F.conv2d(torch.from_numpy(codes).double(), torch.from_numpy(weight).double(), padding=1)
    np.testing.assert_array_equal(found[0], expected.numpy())


@pytest.mark.parametrize("value", [0.1, 1 / 3, 2.0**-126, 3.4e38, 1.00000012, 7.7e-9])
def test_a_number_is_read_back_to_the_last_bit(value: float) -> None:
    wanted = np.float32(value)
    assert len(number(float(wanted))) < 16
    assert np.float32(float(number(float(wanted)))) == wanted


def test_a_blob_with_several_readers_is_split() -> None:
    layers = [Layer("Input", "x", (), ("x",), {}), Layer("BinaryOp", "sum", ("x", "x"), ("y",), {"0": "0"})]
    text, content = written(layers)
    assert text.splitlines()[1:4] == ["3 4", "Input x 0 1 x", "Split x.split 1 2 x x.1 x.2"]
    assert [layer.kind for layer in read(text, content)] == ["Input", "Split", "BinaryOp"]
    with pytest.raises(ValueError, match="4 bytes of weights are not the 0"):
        read(text, b"1234")


def test_a_student_that_was_not_trained_for_it_is_refused_with_the_setting() -> None:
    told = r"grid of the input of stem .* from -127 to 127; train the student with quantization.target=ncnn"
    with pytest.raises(UsageError, match=told):
        to_ncnn(quantised(bits="w4a4", residual_bits=8), images(8), calibration=[images(32)])


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        ({"activation_quantizer": "pact"}, "quantizer PACT of the input of layer 'stem' is not possible with target="),
        ({"activation_quantizer": {"name": "lsq", "narrow_range": False}}, "narrow_range=False of the input of layer"),
        ({"activation_quantizer": {"name": "lsq", "signed": False}}, "signed=False of the input of layer 'stem'"),
    ],
)
def test_settings_that_it_does_not_have_are_refused_before_training(recipe: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        quantised(**{"bits": "w8a8", "target": "ncnn", **recipe})


@pytest.mark.parametrize(("bits", "own"), [("w1a1", None), ("w4a4", "apot"), ("w4a4", "n2uq")])
def test_activations_without_a_zero_or_even_levels_are_refused_before_training(bits: str, own: str | None) -> None:
    told = rf"of {bits[-1]} bit for the input of layer 'conv1' is not possible with target='ncnn': .* choose one"
    with pytest.raises(UsageError, match=told):
        quantised(bits=bits, target="ncnn", rules=[Rule("conv?", activation_quantizer=own)])


class Twice(nn.Module):
    """A head for two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2)
        self.head = nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = F.relu(self.stem(x))
        return {"fine": self.head(x), "coarse": self.head(F.relu(self.down(x)))}


@pytest.mark.parametrize("per_level", [None, True, False])
def test_a_layer_that_is_called_twice_is_written_and_checked_twice(per_level: bool | None) -> None:
    network = quantised(Twice(), bits="w8a8", target="ncnn", per_level=per_level)
    deployed = deploy(network, images(2), [images(8)], target=TARGET)
    files = build(deployed)
    assert check_ncnn(files, deployed, images(8)).problem is None
    names = [layer.name for layer in read(files.param, files.content)]
    heads = [name for name in names if name.startswith("head")]
    assert (len(names), len(heads)) == (len(set(names)), 2)
    for name in heads:
        told = check_ncnn(altered(files, name, "weight", 1), deployed, images(8)).problem
        assert told == f"{name} in the file differs from the student's"


def test_qonnx_says_that_the_lowest_code_is_not_used(deployed: Deployed) -> None:
    nodes = [node for node in qonnx.build(deployed).model.graph.node if node.output[0].startswith("grids.stem.")]
    told = [attribute.i for node in nodes for attribute in node.attribute if attribute.name == "narrow"]
    assert told == [1]


class Turned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.conv(x).transpose(2, 3))


def test_an_operator_without_a_counterpart_is_one_sentence() -> None:
    with pytest.raises(UsageError, match=r"--format ncnn cannot express transpose in .*: replace it in the network"):
        to_ncnn(quantised(Turned(), bits="w4a4", target="ncnn"), images(8), calibration=[images(32)])


def altered(files: Written, name: str, part: str, moved: float) -> Written:
    """The files with one number otherwise."""
    layers = read(files.param, files.content)
    index = next(index for index, layer in enumerate(layers) if layer.name == name)
    layer = layers[index]
    if part == "2":
        layer = replace(layer, parameters=layer.parameters | {"2": number(float(layer.parameters["2"]) * (1 + moved))})
    elif part == "scales":
        assert layer.scales is not None
        layer = replace(layer, scales=(layer.scales[0] * np.float32(1 + moved), layer.scales[1]))
    else:
        array = getattr(layer, part).copy()
        array.flat[0] += moved
        layer = replace(layer, **{part: array})
    layers[index] = layer
    joined = [layer for layer in layers if layer.kind != "Split"]
    copies = {copy: one.inputs[0] for one in layers if one.kind == "Split" for copy in one.outputs}
    whole = [replace(one, inputs=tuple(copies.get(blob, blob) for blob in one.inputs)) for one in joined]
    return Written(*written(whole), files.grids, files.layers)


@pytest.mark.parametrize(
    ("name", "part", "moved"),
    [
        ("conv1", "weight", 1),
        ("conv2", "weight", 1e-6),
        ("linear", "bias", 1e-6),
        ("stem", "scales", 1e-6),
        ("grids.linear.input_quantizer.steps", "2", 1e-6),
        ("grids_norm1_output_quantizer.real", "2", 1e-6),
    ],
)
def test_files_with_one_other_number_fail(
    files: Written, deployed: Deployed, name: str, part: str, moved: float
) -> None:
    told = check_ncnn(altered(files, name, part, moved), deployed, images(8)).problem
    assert told == f"{name} in the file differs from the student's"


def test_the_folder_is_whole_and_replaces_only_its_own(student: nn.Module, tmp_path: Path) -> None:
    folder = tmp_path / "phone.ncnn"
    for _ in range(2):
        to_ncnn(student, images(8), folder, calibration=[images(32)], about={"class_names": ["a"]})
    assert sorted(path.name for path in folder.iterdir()) == ["student.bin", "student.json", "student.param"]
    told = json.loads((folder / "student.json").read_text(encoding="utf-8"))
    assert told["format"] == "ncnn"
    assert told["runtime"].startswith("ncnn ")
    for path in (folder, folder / "student.bin"):
        with pytest.raises(UsageError, match="is not a student for PyTorch alone: ncnn runs it"):
            student_file(path)
    (folder / "mine.txt").touch()
    with pytest.raises(UsageError, match=r"has 'mine.txt', which --format ncnn has not written"):
        check_replaceable(folder)
