"""What OpenVINO computes of the file that is written for it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from lqkd.errors import UsageError
from lqkd.export import check, deploy, openvino, portable
from lqkd.export.deploy import Deployed
from lqkd.export.openvino import OpenVINORunner
from lqkd.export.reference import Reference
from tests.unit.export.networks import Small, alter, images, quantised

pytest.importorskip("openvino")


@pytest.fixture(scope="module")
def deployed() -> Deployed:
    network = quantised(bits="w4a4", residual_bits=8)
    assert isinstance(network, Small)
    with torch.no_grad():
        network.linear.bias -= network(images(256)).mean(0)  # or one class is always the first
    return deploy(network, images(2), [images(32)])


def share_of_equal_logits(model: onnx.ModelProto, deployed: Deployed, x: torch.Tensor) -> float:
    """Of images whose logits are those of integer kernels but for float32's rounding."""
    ours = Reference(deployed.network)(x).numpy()
    theirs = OpenVINORunner(model, optimised=True)(x.numpy())["logits"]
    return float((np.abs(ours - theirs).max(1) < 1e-5 * np.abs(ours).max()).mean())


def test_an_operand_of_an_addition_keeps_its_rounding_which_openvino_drops_in_the_portable_file(
    deployed: Deployed,
) -> None:
    x = images(256, seed=5)
    assert share_of_equal_logits(portable.build(deployed).model, deployed, x) < 0.5
    assert share_of_equal_logits(openvino.build(deployed).model, deployed, x) > 0.99


@pytest.fixture(scope="module")
def swished() -> onnx.ModelProto:
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Hardswish(), nn.Conv2d(8, 4, 3))
    return openvino.build(deploy(quantised(layers, bits="w8a8"), images(2), [images(32)])).model


def test_what_a_hard_swish_reads_is_rounded_by_an_operator_of_its_own(swished: onnx.ModelProto) -> None:
    producers = {node.output[0]: node for node in swished.graph.node}
    node = next(node for node in swished.graph.node if node.op_type == "HardSwish")
    before = []
    while node.input[0] in producers:
        node = producers[node.input[0]]
        before.append(node.op_type)
    assert before[:5] == ["DequantizeLinear", "QuantizeLinear", "Round", "Div", "Conv"]


def test_signed_codes_have_a_zero_of_zero(swished: onnx.ModelProto) -> None:
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in swished.graph.initializer}
    zeros = {name: array for name, array in held.items() if name.startswith("grids.") and name.endswith("zero_point")}
    assert [array.dtype for name, array in zeros.items() if "calibrated" in name] == [np.int8]
    assert not any(array.any() for array in zeros.values() if array.dtype == np.int8)


def test_an_untouched_file_passes_and_says_on_how_many_images_it_agrees(deployed: Deployed) -> None:
    labels = Reference(deployed.network)(images(64)).argmax(1)
    parity = check(openvino.build(deployed), deployed, images(8), [(images(64), labels)], runner=OpenVINORunner)
    assert (parity.problem, parity.differing, parity.exported) == (None, 0, 1.0)
    assert not parity.exact
    assert len(parity.optimised) == len(parity.unoptimised) == len(parity.end_to_end)


@pytest.mark.parametrize(
    ("name", "moved"),
    [
        ("conv2.weight_codes", 1),
        ("conv1.weight_scale", 1e-9),
        ("conv1.bias_codes", 1),
        ("grids.linear.input_quantizer.scale", 1e-6),
    ],
)
def test_a_file_with_one_other_number_fails(deployed: Deployed, name: str, moved: float) -> None:
    exported = openvino.build(deployed)
    alter(exported.model, name, moved)
    assert check(exported, deployed, images(32), runner=OpenVINORunner).problem is not None


def test_what_openvino_would_compute_wrong_is_refused_by_whole_answers(deployed: Deployed) -> None:
    x = images(2048, seed=5)
    first, second = Reference(deployed.network)(x).topk(2).values.T
    undecided = x[(first - second).argsort()[:128]]
    parity = check(portable.build(deployed), deployed, images(8), [undecided], runner=OpenVINORunner)
    assert "the first class differs on" in str(parity.problem)


def test_accuracy_further_away_than_a_sample_is_refused(deployed: Deployed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OpenVINORunner, "disagreement", 1.0)
    monkeypatch.setattr(OpenVINORunner, "__call__", _negated(OpenVINORunner.__call__))
    monkeypatch.setattr("lqkd.export.parity._compare", lambda *_, **__: ([], {}))
    labels = Reference(deployed.network)(images(64)).argmax(1)
    parity = check(openvino.build(deployed), deployed, images(8), [(images(64), labels)], runner=OpenVINORunner)
    assert parity.problem == "acc of the file is 0.0000 and in PyTorch 1.0000"


def _negated(call):  # type: ignore[no-untyped-def]
    return lambda self, x: {name: -value if value.ndim == 2 else value for name, value in call(self, x).items()}


def test_all_products_are_in_integers(deployed: Deployed) -> None:
    found = openvino.kernels(openvino.build(deployed).model)
    assert found.float_products == ()
    assert found.integer["Convolution"] == 3


def test_without_the_package_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'lqkd\[openvino\]'"):
        openvino.require()
