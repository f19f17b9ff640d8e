"""What LiteRT's interpreter computes of the TFLite file that is written for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.export import deploy, litert, to_litert
from lqkd.export.deploy import Deployed
from lqkd.export.litert_values import Written
from lqkd.export.reference import Reference
from lqkd.quantization import Recipe, initialize_quantizers, quantize_model
from tests.unit.export.networks import images, quantised

pytest.importorskip("ai_edge_litert")

from lqkd.export.litert_file import description, packed, schema, unpacked
from lqkd.export.litert_proof import altered_number, check_litert
from lqkd.export.litert_runner import Interpreted


class Mobile(nn.Module):
    """What mobile networks have: strides that meet an even side, gates, linear bottlenecks, parts and shuffles."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.expand = nn.Conv2d(8, 16, 1)
        self.depthwise = nn.Conv2d(16, 16, 5, 2, 2, groups=16)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.project = nn.Conv2d(16, 8, 1)
        self.branch = nn.Conv2d(4, 4, 3, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.inner, self.head = nn.Linear(48, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.stem(x)))
        x = F.hardswish(self.depthwise(F.silu(self.expand(x))))
        gate = F.hardsigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        x = self.project(F.relu(x * gate))
        left, right = x.chunk(2, 1)
        x = torch.cat((left, F.relu(self.branch(right))), 1)
        x = x.view(x.shape[0], 2, 4, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
        x = F.avg_pool2d(F.relu6(self.grouped(x)), 2)
        return self.head(F.relu(self.inner(x.flatten(1))))


def larger(count: int = 8, seed: int = 1) -> Tensor:
    """(count, 3, 32, 32) float32."""
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def deployed_mobile(bits: str) -> Deployed:
    torch.manual_seed(0)
    network, _ = quantize_model(Mobile(), Recipe(bits=bits, residual_bits=8))
    initialize_quantizers(network, larger(32))
    return deploy(network.eval(), larger(2), [larger(32)])


@pytest.fixture(scope="module")
def deployed() -> Deployed:
    return deploy(quantised(bits="w4a4", residual_bits=8), images(2), [images(32)])


@pytest.fixture(scope="module")
def written(deployed: Deployed) -> Written:
    return litert.build(deployed)


@pytest.mark.parametrize("bits", ["w8a8", "w4a4", "w2a2"])
def test_every_code_is_what_the_arithmetic_of_both_kinds_of_kernels_says(bits: str) -> None:
    deployed = deploy(quantised(bits=bits, residual_bits=8), images(2), [images(32)])
    x = images(64, seed=5)
    labels = Reference(deployed.network)(x).argmax(1)
    parity = check_litert(litert.build(deployed), deployed, x, [(x, labels)])
    assert (parity.problem, parity.differing, parity.exported) == (None, 0, 1.0)
    for rows in (parity.optimised, parity.unoptimised, parity.end_to_end):
        assert [row.fraction for row in rows] == [0.0] * 7
    assert parity.outputs["logits"] < 1e-6


@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
def test_a_mobile_network_passes(bits: str) -> None:
    deployed = deployed_mobile(bits)
    written = litert.build(deployed)
    parity = check_litert(written, deployed, larger(32), [larger(64, seed=5)])
    assert (parity.problem, parity.differing) == (None, 0)
    assert len(parity.optimised) == len(parity.unoptimised) == len(written.grids)
    assert max(row.fraction for row in (*parity.optimised, *parity.unoptimised)) < 1e-4
    floats = {kind for _, kind in litert.kernels(written.content).floats}
    assert floats == {"MEAN", "AVERAGE_POOL_2D", "HARD_SWISH", "LOGISTIC", "ADD", "MUL", "FULLY_CONNECTED"}


def test_what_is_on_no_grid_is_computed_in_floating_point_and_the_rest_in_integers(written: Written) -> None:
    found = litert.kernels(written.content)
    assert found.integer == {"CONV_2D": 2, "MAX_POOL_2D": 1, "ADD": 2, "DEPTHWISE_CONV_2D": 1}
    assert [kind for _, kind in found.floats] == ["MEAN", "FULLY_CONNECTED"]


def test_few_bits_are_codes_that_saturate_at_the_limits_of_a_byte(deployed: Deployed, written: Written) -> None:
    tensors = [name for name, _ in written.grids.values()]
    found = [
        Interpreted(written.content, tensors=tensors)([image.permute(1, 2, 0)[None].numpy()]) for image in images(64)
    ]
    behind_relu = np.concatenate([codes["grids.conv1.input_quantizer"] for codes in found])
    assert (behind_relu.min(), behind_relu.max()) == (112, 127)
    around_zero = np.concatenate([codes["grids.conv2.input_quantizer"] for codes in found])
    assert around_zero.min() >= -128
    assert around_zero.max() <= -113


def test_one_other_number_in_any_tensor_is_found(written: Written) -> None:
    assert altered_number(written) is None
    whole = unpacked(written.content)
    for index, tensor in enumerate(whole.subgraphs[0].tensors):
        name = tensor.name.decode()
        changes = [] if tensor.quantization is None else [_scale, _zero_point]
        if name in written.origins and written.origins[name].layer is not None:
            changes.append(_data)
        for change in changes:
            assert altered_number(_altered(written, index, change)) == name


@pytest.mark.parametrize(
    ("name", "alter"),
    [
        ("conv2.weight", "data"),
        ("conv1.bias", "data"),
        ("conv1.weight", "scale"),
        ("grids.linear.input_quantizer", "zero_point"),
    ],
)
def test_a_file_with_one_other_number_fails_the_proof(
    deployed: Deployed, written: Written, name: str, alter: str
) -> None:
    tensors = [tensor.name.decode() for tensor in unpacked(written.content).subgraphs[0].tensors]
    change = {"data": _data, "scale": _scale, "zero_point": _zero_point}[alter]
    parity = check_litert(_altered(written, tensors.index(name), change), deployed, images(8))
    assert parity.problem == f"{name} in the file differs from the student's"


def test_an_operator_that_does_something_else_fails_at_its_grid(deployed: Deployed, written: Written) -> None:
    model = unpacked(written.content)
    graph = model.subgraphs[0]
    total = next(i for i, x in enumerate(graph.tensors) if x.name == b"grids.conv2.input_quantizer.above")
    addition = next(operator for operator in graph.operators if operator.outputs[0] == total)
    addition.builtinOptions.fusedActivationFunction = schema().ActivationFunctionType.RELU
    parity = check_litert(replace(written, content=packed(model)), deployed, images(8))
    assert "the first difference arises at grids.conv2.input_quantizer" in str(parity.problem)


def _altered(written: Written, index: int, change: Callable[[Any, Any], None]) -> Written:
    model = unpacked(written.content)
    change(model, model.subgraphs[0].tensors[index])
    return replace(written, content=packed(model))


def _scale(model: Any, tensor: Any) -> None:
    scales = np.array(tensor.quantization.scale, np.float32)
    scales[-1] = np.nextafter(scales[-1], np.float32(np.inf))
    tensor.quantization.scale = scales


def _zero_point(model: Any, tensor: Any) -> None:
    points = np.array(tensor.quantization.zeroPoint)
    points[-1] += 1
    tensor.quantization.zeroPoint = points


def _data(model: Any, tensor: Any) -> None:
    held = np.array(model.buffers[tensor.buffer].data, np.uint8)
    held[0] ^= 1
    model.buffers.append(schema().BufferT(data=held))
    tensor.buffer = len(model.buffers) - 1


class Maps(nn.Module):
    """Two inputs, a map and a vector as outputs, and a layer with the name of an output."""

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.reduce, self.vector = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 1), nn.Linear(4, 2)

    def forward(self, image: Tensor, row: Tensor) -> dict[str, Tensor]:
        x = F.relu(self.scores(image))
        return {"maps": self.reduce(x), "scores": self.vector(row).clamp(-0.25, 0.25)}


def test_maps_are_channels_last_and_several_inputs_and_outputs_have_their_names() -> None:
    torch.manual_seed(0)
    given = {"image": images(16), "row": torch.randn(16, 4)}
    network, _ = quantize_model(Maps(), Recipe(bits="w4a4"))
    initialize_quantizers(network, keywords=given)
    deployed = deploy(network.eval(), given)
    written = litert.build(deployed)
    parity = check_litert(written, deployed, given)
    assert (parity.problem, set(parity.outputs)) == (None, {"maps", "scores"})
    found = Interpreted(written.content)([given["image"][:1].permute(0, 2, 3, 1).numpy(), given["row"][:1].numpy()])
    assert {name: array.shape for name, array in found.items()} == {"maps": (1, 6, 6, 6), "scores": (1, 2)}


def test_from_python_a_file_is_written_that_says_what_it_is(tmp_path: Any) -> None:
    student = quantised(bits="w4a4", residual_bits=8)
    path = tmp_path / "student.tflite"
    content = to_litert(
        student, images(8), path, calibration=[images(32)], test=[images(16)], about={"class_names": ["a"]}
    )
    assert path.read_bytes() == content
    told = description(content)
    assert (told["format"], told["inputs"], told["outputs"]) == ("litert", {"images": [8, 8, 3]}, {"logits": [5]})
    assert (told["parity"]["passed"], told["class_names"]) == (True, ["a"])


@pytest.mark.parametrize(
    ("network", "refused"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm([4, 6, 6]), nn.Flatten(), nn.Linear(144, 5)), "LayerNorm in 1"),
        (
            nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(248, 5)),
            "over 1 axes in 1",
        ),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ELU(0.5), nn.Flatten(), nn.Linear(144, 5)), "an ELU with alpha 0.5 in 1"),
    ],
)
def test_what_the_format_has_not_is_refused_with_its_place(network: nn.Module, refused: str) -> None:
    deployed = deploy(quantised(network, bits="w8a8"), images(2), [images(32)])
    with pytest.raises(UsageError, match=f"--format litert cannot have .*{refused}: .* use portable"):
        litert.build(deployed)


def test_without_the_package_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(litert, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"needs ai-edge-litert.*pip install 'lqkd\[litert\]'"):
        litert.require()


def test_linear_layers_on_three_axes_round_as_others_do() -> None:
    tokens = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(2), nn.Linear(36, 32), nn.ReLU(), nn.Linear(32, 16)
    )
    student = quantised(nn.Sequential(*tokens, nn.ReLU(), nn.Linear(16, 4), nn.Flatten()), bits="w4a4")
    to_litert(student, images(32), calibration=[images(32)])


class Turned(nn.Module):
    """Takes samples for something else."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x[:, 0].transpose(0, 1)))).transpose(0, 1)


def test_samples_on_another_axis_are_refused() -> None:
    with pytest.raises(UsageError, match="cannot have samples on another axis than the first"):
        to_litert(quantised(Turned(), bits="w8a8"), images(8), calibration=[images(32)])


def test_the_code_of_a_constant_beside_an_image_is_looked_at() -> None:
    written = litert.build(deployed_mobile("w8a8"))
    model = unpacked(written.content)
    tensor = next(tensor for tensor in model.subgraphs[0].tensors if tensor.name.endswith(b".padded.value"))
    model.buffers[tensor.buffer].data = np.array([5], np.int8).view(np.uint8)
    assert altered_number(replace(written, content=packed(model))) == tensor.name.decode()
