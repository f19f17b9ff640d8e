"""The ML Program that is written for Core ML: its numbers, read back, and what its operators compute by definition."""

from __future__ import annotations

import operator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lqkd.errors import UsageError
from lqkd.export import coreml, coreml_writer, deploy
from lqkd.export.coreml import Written
from lqkd.export.deploy import Deployed
from tests.unit.export.networks import Mobile, Residual, Sequence, images, quantised

pytest.importorskip("coremltools")

from lqkd.export import to_coreml
from lqkd.export.coreml_file import about_of, read
from lqkd.export.coreml_proof import altered_number, check_coreml


@pytest.fixture(scope="module")
def deployed() -> Deployed:
    return deploy(quantised(bits="w4a4", residual_bits=8), images(2), [images(32)])


@pytest.fixture(scope="module")
def written(deployed: Deployed) -> Written:
    return coreml.build(deployed)


def test_every_code_is_what_pytorch_computes(deployed: Deployed, written: Written) -> None:
    x = images(64, seed=5)
    with torch.no_grad():
        labels = deployed.network(x).argmax(1)
    parity = check_coreml(written, deployed, x, [(x, labels)])
    assert (parity.problem, parity.differing, parity.exported) == (None, 0, 1.0)
    assert [row.fraction for row in parity.unoptimised] == [0.0] * 7
    assert parity.outputs["logits"] < 1e-6


def test_weights_are_codes_and_a_grid_with_zero_in_the_middle_is_signed(written: Written) -> None:
    operations = read(written.files).operations
    weights = [op for op in operations if op.op_type == "constexpr_blockwise_shift_scale"]
    assert [op.data.val.dtype for op in weights] == [np.int8] * 4
    types = [op.output_dtype.val for op in operations if op.op_type == "quantize"]
    wanted = ["int8" if grid.zero_point == 128 else "uint8" for grid in written.program.grids.values()]
    assert types == wanted
    assert set(types) == {"int8", "uint8"}


def test_one_other_number_anywhere_is_found(written: Written) -> None:
    assert altered_number(written) is None
    layers = [layer for _, layer in written.program.layers]
    numbers = [tensor for layer in layers for tensor in (layer.codes, layer.scale, layer.float_bias())]
    numbers += [grid.scale for grid in written.program.grids.values()]
    limits = [coreml_writer.limits_of(grid) for grid in written.program.grids.values()]
    numbers += [torch.tensor(most) for _, most in filter(None, limits)]
    for number in numbers:
        assert number is None or altered_number(_altered(written, number)) is not None


def test_a_file_with_one_other_number_fails_the_proof(deployed: Deployed, written: Written) -> None:
    bias = written.program.layers[1][1].float_bias()
    assert bias is not None
    parity = check_coreml(_altered(written, bias), deployed, images(2))
    assert parity.problem == "conv1 in the file differs from the student's"


def _altered(written: Written, number: Tensor) -> Written:
    """The files with another first bit of ``number``; codes of 4 bits are two in a byte."""
    content = number.numpy().tobytes()
    if number.dtype == torch.int8 and not any(content in held for held in written.files.values()):
        low, high = number.flatten()[0::2], number.flatten()[1::2]
        content = ((low & 15) | (high << 4)).numpy().tobytes()
    files = {name: held.replace(content, bytes([content[0] ^ 1]) + content[1:]) for name, held in written.files.items()}
    assert files != written.files
    return replace(written, files=files)


def test_another_zero_point_is_found_at_its_grid(monkeypatch: pytest.MonkeyPatch, deployed: Deployed) -> None:
    monkeypatch.setattr(coreml_writer, "zero_of", lambda grid: (1, torch.uint8))
    found = altered_number(coreml.build(deployed))
    assert found == next(node.name for node in deployed.network.graph.nodes if "grids" in str(node.target))


def test_an_operator_that_does_something_else_fails_at_its_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    call = fx.Graph.node_copy

    def subtracted(*args: object) -> fx.Node:
        copy = call(*args)  # type: ignore[arg-type]
        copy.target = operator.sub if copy.target is operator.add else copy.target
        return copy

    deployed = deploy(quantised(Residual(), bits="w4a4", residual_bits=8), images(2), [images(32)])
    with monkeypatch.context() as patched:
        patched.setattr(fx.Graph, "node_copy", subtracted)
        written = coreml.build(deployed)
    parity = check_coreml(written, deployed, images(8))
    assert "the first difference arises at grids.last.input_quantizer (in the written" in str(parity.problem)


class Curved(nn.Module):
    """Functions between layers, nearest neighbours, and a matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 4, 3, padding=1), *(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))])
        self.inner, self.head = nn.Linear(16, 16), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer, function in zip(self.layers, (torch.tanh, F.leaky_relu, F.elu, F.hardswish), strict=True):
            x = function(layer(x))
        x = F.interpolate(F.max_pool2d(F.pad(x, (0, 1, 0, 1)), 4, 4), scale_factor=2.0, mode="nearest").flatten(2)
        weights = (x.transpose(1, 2) @ x).softmax(2)
        return self.head((self.inner(x) @ weights)[:, :, ::2].flatten(1))


@pytest.mark.slow
@pytest.mark.parametrize(("network", "bits"), [(Mobile, "w4a4"), (Sequence, "w8a8"), (Curved, "w8a8")])
def test_mobile_networks_functions_and_attention_pass(network: type[nn.Module], bits: str) -> None:
    deployed = deploy(quantised(network(), bits=bits, residual_bits=8), images(2), [images(32)])
    parity = check_coreml(coreml.build(deployed), deployed, images(32), [images(64, seed=5)])
    assert (parity.problem, parity.differing) == (None, 0)


def test_from_python_a_folder_is_written_that_says_what_it_is(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 5))
    path = tmp_path / "student.mlpackage"
    for _ in range(2):  # the second replaces the first
        files = to_coreml(quantised(network, bits="w8a8"), images(8), path, test=[images(16)], about={"name": "mine"})
    found = {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    assert found == files
    told = about_of(found)
    assert (told["format"], told["inputs"], told["outputs"]) == ("coreml", {"images": [3, 8, 8]}, {"logits": [5]})
    assert (told["parity"]["passed"], told["name"], told["batch"]) == (True, "mine", 1)
    function = read(found)
    assert ([*function.inputs], [value.name for value in function.outputs]) == (["images"], ["logits"])


def test_a_folder_of_somebody_else_and_another_ending_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "mine.mlpackage"
    folder.mkdir()
    (folder / "letter.txt").touch()
    with pytest.raises(UsageError, match=r"has 'letter.txt', which --format coreml has not written"):
        to_coreml(nn.Flatten(), images(2), folder)
    with pytest.raises(UsageError, match=r"another ending than Core ML asks for: use mine.mlpackage"):
        to_coreml(nn.Flatten(), images(2), tmp_path / "mine.coreml")


def test_an_operator_that_cannot_be_verified_is_refused_with_its_name() -> None:
    scaled = nn.Upsample(scale_factor=2, mode="bilinear")
    network = nn.Sequential(scaled, nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(1568, 5))
    deployed = deploy(quantised(network, bits="w8a8"), images(2), [images(32)])
    with pytest.raises(UsageError, match="cannot verify operator upsample_bilinear of Core ML: use portable"):
        check_coreml(coreml.build(deployed), deployed, images(2))


def test_activations_of_one_bit_are_refused_with_their_place() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Linear(8, 8), nn.Linear(8, 5))
    deployed = deploy(quantised(network, bits="w1a1"), images(2), [images(32)])
    with pytest.raises(UsageError, match=r"--format coreml cannot have activations of 1 bit in .*: use portable"):
        coreml.build(deployed)


def test_without_the_package_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coreml, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"needs coremltools.*pip install 'lqkd\[coreml\]'"):
        coreml.require()
