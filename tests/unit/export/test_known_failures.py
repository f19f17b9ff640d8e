"""Failures that users of other tools and of the runtimes have reported do not happen, or are told."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.export import check, deploy, to_onnx
from lqkd.export.formats import BUILDERS, check_format
from lqkd.export.grids import ActivationGrid
from lqkd.export.integer import IntegerLayer
from lqkd.export.runtimes import kernels, session
from lqkd.quantization import Recipe, initialize_quantizers, quantize_model
from lqkd.quantization.accumulator import LARGEST_BIAS
from lqkd.quantization.codes import WeightCodes
from tests.unit.export.networks import images, quantised


def chain(*, affine: bool = True, classes: int = 5) -> nn.Module:
    """Convolutions without an activation function: what reaches the second is signed."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=affine), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3),
        nn.Flatten(), nn.Linear(32, classes),
    )  # fmt: skip


def held(model: onnx.ModelProto, ending: str) -> list[np.ndarray]:
    return [numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor.name.endswith(ending)]


def test_the_file_has_quantize_nodes_and_none_of_their_arithmetic() -> None:
    model = to_onnx(quantised(bits="w4a4", residual_bits=8), images(8), calibration=[images(32)])
    kinds = {node.op_type for node in model.graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    assert not kinds & {"Round", "Mul", "Div", "Sub", "Floor", "Where"}


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("quantizer", ["lsq", "lsq_plus"])
def test_signed_activations_of_any_bits_run_on_integers(bits: int, quantizer: str) -> None:
    network = quantised(chain(), bits=f"w{bits}a{bits}", activation_quantizer=quantizer)
    deployed = deploy(network, images(2), [images(32)])
    exported = BUILDERS["portable"](deployed)
    assert check(exported, deployed, images(8)).problem is None
    assert any(point > 0 for point in held(exported.model, ".zero_point"))
    assert not any(point.any() for point in held(exported.model, ".weight_zero_point"))
    assert kernels(exported.model).floats == ()


@pytest.mark.parametrize(
    ("name", "opset", "bits"),
    [(name, 21, bits) for name in ("portable", "packed4") for bits in (2, 3, 4)]
    + [("portable", 21, bits) for bits in (5, 6, 8)]
    + [("packed2", 25, 2)],
)
def test_every_opset_is_valid_and_taken_by_the_runtime(name: str, opset: int, bits: int) -> None:
    deployed = deploy(quantised(bits=f"w{bits}a{bits}"), images(2), [images(32)])
    exported = BUILDERS[name](deployed)
    assert [entry.version for entry in exported.model.opset_import] == [opset]
    onnx.checker.check_model(exported.model, full_check=True)
    for optimised in (False, True):
        assert session(exported.model, optimised=optimised).run(None, {"images": images(3).numpy()})[0].shape == (3, 5)


def test_weights_of_two_and_more_bits_share_a_packed_file() -> None:
    from lqkd.quantization import Rule

    network = quantised(bits="w2a2", rules=[Rule(match="conv1", weight_bits=3), Rule(match="conv2", weight_bits=8)])
    deployed = deploy(network, images(2), [images(32)])
    exported = BUILDERS["packed2"](deployed)
    assert check(exported, deployed, images(8)).problem is None
    types = {t.name: t.data_type for t in exported.model.graph.initializer}
    assert types["conv1.weight_codes"] == onnx.TensorProto.INT4
    assert types["conv2.weight_codes"] == onnx.TensorProto.INT8


def test_a_runtime_that_is_too_old_for_the_file_is_told_in_one_sentence() -> None:
    model = to_onnx(quantised(bits="w4a4"), images(8), calibration=[images(32)])
    model.opset_import[0].version = 99
    with pytest.raises(UsageError, match=r"onnxruntime \d.* does not take the file .*: a newer one may") as caught:
        session(model, optimised=True)
    assert "\n" not in str(caught.value)


def test_another_target_is_refused_with_the_formats_there_are() -> None:
    with pytest.raises(UsageError, match="--format tensorflow is unknown: use one of portable, packed4"):
        check_format("tensorflow")
    with pytest.raises(UsageError, match="format='tensorflow' is not an ONNX format: use one of portable"):
        to_onnx(quantised(bits="w4a4"), images(8), format="tensorflow")


def test_a_wrong_bias_scale_does_not_pass() -> None:
    deployed = deploy(quantised(bits="w4a4"), images(2), [images(32)])
    exported = BUILDERS["portable"](deployed)
    tensor = next(t for t in exported.model.graph.initializer if t.name == "conv1.bias_scale")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(3), tensor.name))
    parity = check(exported, deployed, images(8))
    assert "the first difference arises at" in str(parity.problem)
    right = check(BUILDERS["portable"](deployed), deployed, images(8))
    assert right.problem is None
    assert replace(parity, problem=None) != replace(right, problem=None)


@pytest.mark.parametrize(("bits", "largest"), [("w8a8", 127), ("w4a8", 56), ("w4a4", 112), ("w2a2", 64)])
def test_the_largest_codes_together_do_not_saturate(bits: str, largest: int) -> None:
    recipe = Recipe(bits=bits, first_layer_bits=None, last_layer_bits=None)
    network, _ = quantize_model(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), recipe)
    with torch.no_grad():
        network[1].weight.fill_(1.0)
        network[1].bias.zero_()
    x = torch.full((4, 3, 8, 8), 1.0)
    initialize_quantizers(network, torch.cat([x, torch.zeros_like(x)]))
    deployed = deploy(network.eval(), x)
    model = BUILDERS["portable"](deployed).model
    assert held(model, "weight_codes")[0].max() == largest
    (logits,) = session(model, optimised=True).run(None, {"images": x.numpy()})
    with torch.no_grad():
        assert np.allclose(logits, network(x).numpy(), rtol=1e-5)


def test_the_largest_sum_of_a_long_layer_fits_into_32_bits() -> None:
    codes = WeightCodes(torch.ones(1, 200_000, dtype=torch.int64), torch.ones(1), None, bits=2)
    grid = ActivationGrid(torch.tensor(0.1), 0, 0, 255, bits=8)
    layer = IntegerLayer(codes, None, torch.zeros(1), grid, "linear")
    largest = 255 * int((layer.codes.long() * layer.multiplier).sum())
    assert largest + LARGEST_BIAS < 2**31
    assert torch.equal(layer.float_weight(), torch.ones(1, 200_000))


def test_binary_weights_are_two_integers_in_the_file() -> None:
    network = quantised(
        bits="w1a4", weight_quantizer="irnet", activation_quantizer="lsq", first_layer_bits=None, last_layer_bits=None
    )
    model = to_onnx(network, images(8), calibration=[images(32)])
    codes = held(model, "conv1.weight_codes")[0]
    assert codes.dtype == np.int8
    assert len(np.unique(codes)) == 2
    assert not [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and np.prod(t.dims) > 64]


def test_batch_norm_without_scale_and_shift_is_folded() -> None:
    network = quantised_without_affine()
    deployed = deploy(network, images(2), [images(32)])
    assert deployed.folded == 2
    assert check(BUILDERS["portable"](deployed), deployed, images(8)).problem is None
    with torch.no_grad():
        expected, found = network(images(16)), deployed.network(images(16))
    assert (expected - found).abs().max() < 0.05 * expected.abs().max()


def quantised_without_affine() -> nn.Module:
    network = chain(affine=False).train()
    with torch.no_grad():
        network(images(32))
    network, _ = quantize_model(network, Recipe(bits="w8a8"))
    initialize_quantizers(network, images(32))
    return network.eval()


class Branching(nn.Module):
    """Decides by its data which way to go."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).mean((2, 3))
        return self.linear(x if x.sum() > 0 else -x)


class Largest(nn.Module):
    """Asks for the type of what an operation returns, which is a tuple of values and places."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(3, 8, 3)
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).flatten(2).max(2)
        if self.kind is tuple:  # what a trace has in its place is none, and goes on as it is
            return self.linear(y[0] if isinstance(y, tuple) else y)
        return self.linear(y[0] if isinstance(y[0], Tensor) else -y[0])


REFUSED = {
    "branch": (
        Branching(),
        r"traced \(.*control flow, at `return self.linear\(x if x.sum\(\) > 0.*`, line \d+ of test_known",
    ),
    "type of a tuple": (Largest(tuple), "another way than a batch .*must not ask for the Python type of a value"),
    "type of a tensor": (Largest(Tensor), r"another way than a batch \(it computes something else\): the forward"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_network_that_cannot_be_traced_as_it_runs_is_told_why(case: str) -> None:
    network, message = REFUSED[case]
    network, _ = quantize_model(network, Recipe(bits="w4a4"))
    initialize_quantizers(network, images(8))
    with pytest.raises(UsageError, match=rf"^the network cannot be exported: [^\n]*{message}[^\n]*$"):
        deploy(network.eval(), images(2), [images(8)])


@pytest.mark.parametrize("example", [[0.0], {0.0}], ids=["list", "set"])
def test_an_example_that_is_no_tensor_is_refused_by_its_type(example: object) -> None:
    with pytest.raises(UsageError, match=f"example is a {type(example).__name__}: a tensor"):
        to_onnx(nn.Linear(4, 2), example)  # type: ignore[arg-type]
