"""The arithmetic of integer kernels in PyTorch is ONNX Runtime's to the last bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from lqkd.export import check, deploy, reference
from lqkd.export.formats import BUILDERS
from lqkd.export.grids import ActivationGrid
from lqkd.export.integer import EXACT, IntegerLinear
from lqkd.export.reference import Codes, Reference
from lqkd.export.runtimes import Runner, kernels
from lqkd.quantization.codes import WeightCodes
from tests.unit.export.networks import images, quantised
from tests.unit.export.test_formats import Activations
from tests.unit.export.test_known_failures import chain


class Joined(nn.Module):
    """Concatenation, average pooling and a sum that two layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 8, 3, padding=1)
        self.right = nn.Conv2d(8, 8, 3, padding=1)
        self.wide = nn.Conv2d(16, 8, 1)
        self.one = nn.Conv2d(8, 8, 1)
        self.two = nn.Conv2d(8, 8, 3, padding=1)
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.left(x).relu()
        y = self.right(x).relu()
        x = nn.functional.avg_pool2d(self.wide(torch.cat([x, y], 1)).relu(), 2)
        x = (x + nn.functional.avg_pool2d(y, 2)).relu()
        return self.linear((self.one(x) * self.two(x)).mean((2, 3)))


class Clamped(nn.Module):
    """Limits within the next grid, and a ReLU of what is on a grid."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(nn.functional.hardtanh(self.first(x), -0.2, 0.3))
        return self.linear((x + x.relu()).mean((2, 3)))


@pytest.mark.parametrize("network", [None, Joined, chain])
@pytest.mark.parametrize(
    "settings",
    [
        {"bits": "w2a2"},
        {"bits": "w4a4", "residual_bits": 8},
        {"bits": "w4a4", "activation_quantizer": "lsq_plus"},
        {"bits": "w8a8"},
    ],
    ids=str,
)
def test_the_logits_of_integer_kernels_are_the_same_to_the_last_bit(network: Any, settings: dict[str, Any]) -> None:
    deployed = deploy(quantised(network and network(), **settings), images(2), [images(32)])
    exported = BUILDERS["portable"](deployed)
    assert kernels(exported.model).floats == ()
    ours, x = Reference(deployed.network), images(256, seed=2)
    assert np.array_equal(ours(x).numpy(), Runner(exported.model, optimised=True)(x.numpy())["logits"])
    assert ours.exact


@pytest.mark.parametrize("activation", [nn.Hardswish(), nn.Hardsigmoid()])
def test_hard_activations_are_the_same_to_the_last_bit(activation: nn.Module) -> None:
    network = quantised(nn.Sequential(nn.Flatten(), nn.Linear(192, 5), activation), bits="w8a8")
    deployed = deploy(network, images(2), [images(32)])
    ours, x = Reference(deployed.network), images(256, seed=2)
    theirs = Runner(BUILDERS["portable"](deployed).model, optimised=True)(x.numpy())["logits"]
    assert np.array_equal(ours(x).numpy(), theirs)
    assert ours.exact


def test_what_is_not_known_to_the_last_bit_is_said() -> None:
    deployed = deploy(quantised(Activations(), bits="w8a8"), images(2), [images(32)])
    parity = check(BUILDERS["portable"](deployed), deployed, images(32))
    assert parity.problem is None
    assert parity.output_steps == 0
    assert not parity.exact  # it has a sigmoid


def test_layers_in_floating_point_are_not_said_to_be_exact() -> None:
    deployed = deploy(quantised(bits="w4a32"), images(2), [images(32)])
    assert not check(BUILDERS["portable"](deployed), deployed, images(8)).exact


@pytest.mark.parametrize("activation_quantizer", ["lsq", "lsq_plus"])
def test_limits_of_activation_functions_are_limits_of_codes(activation_quantizer: str) -> None:
    network: Any = quantised(Clamped(), bits="w4a4", activation_quantizer=activation_quantizer)
    with torch.no_grad():
        network.second.input_quantizer.scale *= 3  # the grid is wider than the limits
    deployed = deploy(network, images(2), [images(32)])
    ours, x = Reference(deployed.network), images(64, seed=2)
    theirs = Runner(BUILDERS["portable"](deployed).model, optimised=True)(x.numpy())["logits"]
    assert np.array_equal(ours(x).numpy(), theirs)


def grid(seed: int, factor: float = 1.0) -> ActivationGrid:
    generator = torch.Generator().manual_seed(seed)
    scale = (torch.rand((), generator=generator) * 0.05 + 0.01) * factor
    return ActivationGrid(scale, int(torch.randint(0, 256, (), generator=generator)), 0, 255, 8)


def run(kind: str, codes: list[np.ndarray], grids: list[ActivationGrid], **attributes: Any) -> np.ndarray:
    """What ONNX Runtime's kernel ``kind`` makes of ``codes`` on ``grids``, the last of which is the result's."""
    inputs, held = [], []
    for index, each in enumerate(grids):
        parameters = (each.scale.numpy(), np.array(each.zero_point, np.uint8))
        held += [numpy_helper.from_array(value, f"{index}{n}") for n, value in enumerate(parameters)]
        inputs += [*([f"x{index}"] if index < len(codes) else []), f"{index}0", f"{index}1"]
    names = [f"x{index}" for index in range(len(codes))]
    infos = [helper.make_tensor_value_info(name, TensorProto.UINT8, None) for name in (*names, "y")]
    node = helper.make_node(kind, inputs, ["y"], domain="com.microsoft", **attributes)
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "g", infos[:-1], infos[-1:], held), opset_imports=imports)
    model.ir_version = 10
    session = onnxruntime.InferenceSession(onnx.ModelProto.SerializeToString(model))
    return np.asarray(session.run(None, dict(zip(names, codes, strict=True)))[0])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("kind", "formula", "factor"), [("QLinearAdd", reference.added, 1.0), ("QLinearMul", reference.multiplied, 4.0)]
)
def test_sums_and_products_of_all_pairs_of_codes_are_the_same(
    kind: str, formula: Any, factor: float, seed: int
) -> None:
    a, b = (codes.flatten().astype(np.uint8) for codes in np.meshgrid(np.arange(256), np.arange(256)))
    grids = [grid(10 * seed), grid(10 * seed + 1), grid(10 * seed + 2, factor)]
    theirs = run(kind, [a, b], grids)
    x, y = (Codes(torch.from_numpy(v).float() - g.zero_point, g) for v, g in ((a, grids[0]), (b, grids[1])))
    assert np.array_equal(formula(x, y, grids[2]).clamp(0, 255).numpy(), theirs)


def test_average_pooling_rounds_as_the_runtime_does() -> None:
    codes = np.random.default_rng(0).integers(0, 256, (1, 8, 32, 32), np.uint8)
    source = ActivationGrid(torch.tensor(0.1), 3, 0, 255, bits=8)
    target = ActivationGrid(torch.tensor(0.1), 8, 0, 255, bits=8)
    how = {"kernel_shape": [2, 2], "strides": [2, 2]}
    theirs = run("QLinearAveragePool", [codes], [source, target], **how)
    real = (torch.from_numpy(codes).float() - source.zero_point) * source.scale
    ours = reference.averaged(nn.functional.avg_pool2d(real, 2), target).clamp(0, 255)
    assert np.array_equal(ours.numpy(), theirs)


@pytest.mark.parametrize("seed", [0, 30])  # with 30 one code tells in which order the scales are divided
def test_means_of_images_are_the_same(seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (1, 20_000, 14, 14), np.uint8)
    shift = np.linspace(-120, 120, 20_000).reshape(1, -1, 1, 1)
    codes = np.clip(noise * 0.3 + 100 + shift, 0, 255).astype(np.uint8)
    source, target = grid(2 * seed), grid(2 * seed + 1, 0.2)
    theirs = run("QLinearGlobalAveragePool", [codes], [source, target])
    sums = torch.from_numpy(codes).float().sum((2, 3), keepdim=True) - 14 * 14 * source.zero_point
    ours = reference.rounded(sums, reference.mean_factor(source, target, 14 * 14), target).clamp(0, 255)
    assert np.array_equal(ours.numpy(), theirs)


def test_operands_of_a_sum_for_two_grids_come_in_the_order_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    deployed = deploy(quantised(Joined(), bits="w4a4"), images(2), [images(32)])
    model = BUILDERS["portable"](deployed).model
    scales = {node.output[0]: node.input[1] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    held = {tensor.name: float(numpy_helper.to_array(tensor)) for tensor in model.graph.initializer if not tensor.dims}
    written = [[held[scales[x]] for x in node.input] for node in model.graph.node if node.op_type == "Add"]
    summed = []

    def recorded(a: Codes, b: Codes | None, target: ActivationGrid) -> Tensor:
        summed.append([float(a.grid.scale), 1.0 if b is None else float(b.grid.scale)])  # one is that of nothing
        return added(a, b, target)

    added = reference.added
    monkeypatch.setattr(reference, "added", recorded)
    Reference(deployed.network)(images(2))
    assert summed == written
    assert any(pair != pair[::-1] in written for pair in written)


@pytest.mark.parametrize(
    ("inputs", "code", "how"), [(100, 7, "float32"), (6000, 7, "the sum in float32"), (20000, 100, "float64")]
)
def test_sums_of_any_size_are_those_of_whole_numbers(inputs: int, code: int, how: str) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(code - 5, code + 1, (4, inputs), generator=generator)
    levels = ActivationGrid(torch.tensor(0.1), 0, 0, 255, bits=8)
    layer = IntegerLinear(WeightCodes(codes, torch.rand(4) + 0.5, None, 8), None, torch.randn(4), levels, "linear")
    bound = 255 * layer.codes.long().sum(1).max()
    assert ("float32" in how) == (bound < EXACT)
    assert (how == "float32") == (bound * layer.multiplier < EXACT)
    x = torch.randint(0, 256, (3, inputs), generator=generator)
    assert layer.bias_codes is not None
    expected = (x @ layer.codes.long().t()) * layer.multiplier + layer.bias_codes
    assert torch.equal(layer.sums(x.float(), 255), expected.float())
    assert (expected > EXACT).any() == (how != "float32")
