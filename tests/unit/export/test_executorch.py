"""What ExecuTorch's runtime computes of the program that is written for XNNPACK."""

from __future__ import annotations

import operator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import fx, nn

from lqkd.errors import UsageError
from lqkd.export import deploy, executorch
from lqkd.export.deploy import Deployed
from lqkd.export.executorch import Written
from lqkd.export.executorch_writer import Writer
from lqkd.export.reference import Reference
from lqkd.quantization import Recipe, initialize_quantizers, quantize_model
from tests.unit.export.networks import Mobile, Residual, Sequence, images, quantised

pytest.importorskip("executorch")

from lqkd.export import to_executorch
from lqkd.export.executorch_file import read
from lqkd.export.executorch_proof import altered_number, check_executorch


@pytest.fixture(scope="module")
def deployed() -> Deployed:
    return deploy(quantised(bits="w4a4", residual_bits=8), images(2), [images(32)])


@pytest.fixture(scope="module")
def written(deployed: Deployed) -> Written:
    return executorch.build(deployed)


def test_every_code_is_what_the_arithmetic_says(deployed: Deployed, written: Written) -> None:
    x = images(64, seed=5)
    labels = Reference(deployed.network)(x).argmax(1)
    parity = check_executorch(written, deployed, x, [(x, labels)])
    assert (parity.problem, parity.differing, parity.exported) == (None, 0, 1.0)
    for rows in (parity.unoptimised, parity.end_to_end):
        assert [row.fraction for row in rows] == [0.0] * 7
    assert parity.outputs["logits"] < 1e-6


def test_layers_and_additions_run_on_codes_and_nothing_is_left_to_other_kernels(written: Written) -> None:
    found = executorch.kernels(written.content)
    assert found.integer == {"Conv2d": 2, "Add": 1, "DepthwiseConv2d": 1}
    assert found.floats == (("XNNPACK", "GlobalAvgPooling2d"), ("XNNPACK", "FullyConnected"))


def test_one_other_number_anywhere_is_found(written: Written) -> None:
    assert altered_number(written) is None
    numbers = [entry for product in written.program.products for entry in product.numbers()[:4] if entry]
    scales = [grid.scale.numpy().tobytes() for grid in written.program.grids.values()]
    limits = [np.float32(most).tobytes() for _, most in written.program.limits.values()]
    for number in (*numbers, *scales, *limits):
        assert altered_number(_altered(written, number)) is not None


def test_a_file_with_one_other_number_fails_the_proof(deployed: Deployed, written: Written) -> None:
    _, bias, *_ = written.program.products[1].numbers()
    parity = check_executorch(_altered(written, bias), deployed, images(2))
    assert parity.problem == "conv1 in the file differs from the student's"


def _altered(written: Written, number: bytes) -> Written:
    """The file with another first bit of ``number``."""
    assert written.content.count(number) > 0
    return replace(written, content=written.content.replace(number, bytes([number[0] ^ 1]) + number[1:]))


def test_an_operator_that_does_something_else_fails_at_its_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    call = Writer._copied

    def subtracted(self: Writer, node: fx.Node) -> fx.Node:
        copy = call(self, node)
        copy.target = operator.sub if copy.target is operator.add else copy.target
        return copy

    monkeypatch.setattr(Writer, "_copied", subtracted)
    deployed = deploy(quantised(Residual(), bits="w4a4", residual_bits=8), images(2), [images(32)])
    parity = check_executorch(executorch.build(deployed), deployed, images(8))
    assert "the first difference arises at grids.last.input_quantizer (in ExecuTorch)" in str(parity.problem)


@pytest.mark.slow
def test_sequences_and_attention_between_layers_pass() -> None:
    deployed = deploy(quantised(Sequence(), bits="w8a8", residual_bits=8), images(2), [images(32)])
    written = executorch.build(deployed)
    parity = check_executorch(written, deployed, images(32), [images(64, seed=5)])
    assert (parity.problem, parity.differing) == (None, 0)
    assert executorch.kernels(written.content).integer == {"Conv2d": 1, "FullyConnected": 4, "Add": 3}


@pytest.mark.slow
def test_a_mobile_network_passes_and_what_is_not_delegated_is_named() -> None:
    torch.manual_seed(0)
    network, _ = quantize_model(Mobile(), Recipe(bits="w4a4", residual_bits=8))
    initialize_quantizers(network, images(32))
    deployed = deploy(network.eval(), images(2), [images(32)])
    written = executorch.build(deployed)
    parity = check_executorch(written, deployed, images(32), [images(32, seed=5)])
    assert (parity.problem, parity.differing) == (None, 0)
    found = executorch.kernels(written.content)
    assert (found.integer["Conv2d"], found.integer["GlobalAvgPooling2d"], found.integer["FullyConnected"]) == (7, 1, 1)
    assert ("not delegated", "aten::native_layer_norm.out") in found.floats


def test_from_python_a_file_is_written_that_says_what_it_is(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 5))
    path = tmp_path / "student.pte"
    content = to_executorch(quantised(network, bits="w8a8"), images(8), path, test=[images(16)], about={"name": "mine"})
    assert path.read_bytes() == content
    told = read(content).about
    assert (told["format"], told["inputs"], told["outputs"]) == ("executorch", {"images": [3, 8, 8]}, {"logits": [5]})
    assert (told["parity"]["passed"], told["name"], told["batch"]) == (True, "mine", 1)


@pytest.mark.parametrize(
    ("network", "bits", "refused"),
    [
        (
            nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv3d(1, 2, 3), nn.Flatten(), nn.Linear(72, 5)),
            "w8a8",
            "a convolution over 3 axes in 1",
        ),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Linear(8, 8), nn.Linear(8, 5)),
            "w1a1",
            "activations of 1 bit in",
        ),
    ],
)
def test_what_the_format_has_not_is_refused_with_its_place(network: nn.Module, bits: str, refused: str) -> None:
    deployed = deploy(quantised(network, bits=bits), images(2), [images(32)])
    with pytest.raises(UsageError, match=f"--format executorch cannot have {refused}.*: use portable"):
        executorch.build(deployed)


def test_without_the_package_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executorch, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"needs executorch.*pip install 'lqkd\[executorch\]'"):
        executorch.require()
