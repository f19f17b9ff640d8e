"""Every format computes what the student computes, on integer kernels where it promises them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.export import check, deploy, to_onnx, torch_program
from lqkd.export.deploy import grid_of
from lqkd.export.formats import BUILDERS, check_expressible
from lqkd.export.grids import ActivationGrid
from lqkd.export.integer import IntegerLayer
from lqkd.export.program import check_program
from lqkd.export.runtimes import kernels
from lqkd.models import build_model
from lqkd.quantization import Recipe, fold_batchnorm, initialize_quantizers, quantize_model, reestimate_batchnorm
from tests.unit.export.networks import Small, images, quantised

UNIFORM: list[dict[str, Any]] = [
    *({"bits": f"w{bits}a{bits}"} for bits in (2, 3, 4, 5, 6, 8)),
    {"bits": "w4a4", "residual_bits": 8},
    {"bits": "w8a8", "residual_bits": 8},
    {"bits": "w4a32"},
    {"bits": "w4a4", "activation_quantizer": "lsq_plus"},
    {"bits": "w3a3", "weight_quantizer": "apot"},
    {"bits": "w4a4", "weight_quantizer": "dorefa"},
    {"bits": "w2a4", "weight_quantizer": "twn"},
    {"bits": "w1a1", "weight_quantizer": "irnet", "activation_quantizer": "react"},
    {"bits": "w4a4", "weight_quantizer": "n2uq"},
]


def student(**settings: Any) -> nn.Module:
    """The small network; first and last layer at 8 bits with quantizers that have them."""
    plain = {"weight_quantizer": "lsq", "activation_quantizer": "lsq", "weight_bits": 8, "activation_bits": 8}
    rules = [{"match": name, **plain} for name in ("stem", "linear")]
    return quantised(**settings, rules=_rules(rules))


def _rules(rules: list[dict[str, Any]]) -> Any:
    from lqkd.quantization import Rule

    return [Rule(**rule) for rule in rules]


@pytest.mark.parametrize(
    ("settings", "format_name"),
    [(s, "portable") for s in UNIFORM]
    + [(s, "qonnx") for s in UNIFORM if "weight_quantizer" in s or s["bits"] == "w3a3"]
    + [({"bits": "w4a4", "activation_quantizer": "lsq_plus"}, "qonnx")],
    ids=str,
)
def test_uniform_ternary_and_binary_students_pass_the_comparison(settings: dict[str, Any], format_name: str) -> None:
    if format_name == "qonnx":
        pytest.importorskip("qonnx")
    network = student(**settings)
    deployed = deploy(network, images(2), [images(32)])
    x = images(8, seed=2)
    parity = check(BUILDERS[format_name](deployed), deployed, x, [x], network)
    assert parity.problem is None
    assert parity.batches == (1, 7, 32)
    assert parity.scales_identical
    assert parity.samples == 8


@pytest.mark.parametrize("bits", ["w2a2", "w3a3", "w4a4", "w5a5", "w6a6", "w8a8"])
@pytest.mark.parametrize("residual_bits", [None, 8])
def test_a_portable_file_runs_on_integer_kernels_from_input_to_output(bits: str, residual_bits: int | None) -> None:
    network = quantised(bits=bits, residual_bits=residual_bits)
    found = kernels(BUILDERS["portable"](deploy(network, images(2), [images(32)])).model)
    assert found.floats == ()
    assert found.integer["QLinearConv"] == 3
    assert found.integer["QGemm"] == 1


@pytest.mark.parametrize(("format_name", "bits"), [("packed4", "w4a4"), ("packed4", "w3a3"), ("packed2", "w2a2")])
def test_packed_weights_take_their_bits_and_compute_the_same(format_name: str, bits: str) -> None:
    deployed = deploy(quantised(bits=bits), images(2), [images(32)])
    exported = BUILDERS[format_name](deployed)
    assert check(exported, deployed, images(8)).problem is None
    packed = next(t for t in exported.model.graph.initializer if t.name == "conv1.weight_codes")
    assert packed.data_type == (onnx.TensorProto.INT2 if format_name == "packed2" else onnx.TensorProto.INT4)
    assert len(packed.raw_data) == 8 * 8 * 9 * (2 if format_name == "packed2" else 4) // 8
    codes = deployed.network.get_submodule("conv1").codes
    assert np.array_equal(numpy_helper.to_array(packed).astype(np.int8), codes.numpy())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "place"),
    [
        ({"bits": "w2a4", "weight_quantizer": "ttq"}, "conv1"),
        ({"bits": "w8a8", "weight_quantizer": "apot"}, "conv1"),
        ({"bits": "w4a4", "activation_quantizer": "n2uq"}, "conv1"),
        ({"bits": "w4a4", "activation_quantizer": "apot"}, "conv1"),
    ],
    ids=str,
)
def test_levels_that_are_not_evenly_spaced_are_refused_but_in_a_torch_program(
    settings: dict[str, Any], place: str
) -> None:
    network = student(**settings)
    deployed = deploy(network, images(2), [images(32)])
    for name in BUILDERS:
        with pytest.raises(UsageError, match=rf"--format {name} cannot express .*{place}.* that can are torch"):
            check_expressible(deployed, name)
    check_expressible(deployed, "torch")
    program = torch_program.build(deployed, images(2))
    parity = check_program(program, deployed, images(7), [images(7)], network)
    assert parity.problem is None
    assert parity.batches == (1, 7, 32)


def test_a_torch_program_has_integer_weights_and_passes() -> None:
    deployed = deploy(quantised(bits="w4a4"), images(2), [images(32)])
    program = torch_program.build(deployed, images(2))
    assert check_program(program, deployed, images(7)).problem is None
    assert {value.dtype for key, value in program.state_dict.items() if key.endswith(".codes")} == {torch.int8}


def test_packing_nothing_is_refused() -> None:
    deployed = deploy(quantised(bits="w8a8"), images(2), [images(32)])
    with pytest.raises(UsageError, match="packed4 has nothing to pack"):
        check_expressible(deployed, "packed4")


def test_a_file_written_from_python_loads_with_what_it_says_about_itself(tmp_path: Path) -> None:
    path = tmp_path / "student.onnx"
    to_onnx(quantised(bits="w4a4"), images(8), path, calibration=[images(32)], about={"class_names": ["a", "b"]})
    session = onnxruntime.InferenceSession(str(path))
    assert session.run(None, {"images": images(5).numpy()})[0].shape == (5, 5)
    props = session.get_modelmeta().custom_metadata_map
    assert props["lqkd.class_names"] == '["a", "b"]'
    assert '"conv1": "W4A4"' in props["lqkd.bits"]
    assert '"passed": true' in props["lqkd.parity"]
    assert props["lqkd.runtime"].startswith('"onnxruntime ')


@pytest.mark.parametrize("bits", ["w2a2", "w2a8", "w4a4", "w4a8", "w6a6"])
def test_low_bit_weights_leave_room_in_sixteen_bit_sums(bits: str) -> None:
    # Without VNNI a runtime adds two products of an unsigned and a signed byte in 16 bits, saturating.
    deployed = deploy(quantised(bits=bits), images(2), [images(32)])
    held = {t.name: numpy_helper.to_array(t) for t in BUILDERS["portable"](deployed).model.graph.initializer}
    for node in deployed.network.graph.nodes:
        if str(node.target) not in ("conv1", "conv2"):
            continue
        grid = grid_of(node.all_input_nodes[0], deployed.network)
        assert isinstance(grid, ActivationGrid)
        largest = np.abs(held[f"{node.target}.weight_codes"].astype(int)).max()
        assert 2 * grid.high * largest < 2**15
        assert largest > 32  # the bits that are left are used


@pytest.mark.parametrize("bits", ["w2a2", "w4a4", "w4a8", "w8a8"])
def test_multiplied_codes_are_the_same_weights_to_the_last_bit(bits: str) -> None:
    deployed = deploy(quantised(bits=bits), images(2), [images(32)])
    held = {t.name: numpy_helper.to_array(t) for t in BUILDERS["portable"](deployed).model.graph.initializer}
    for name in ("stem", "conv1", "conv2", "linear"):
        layer: Any = deployed.network.get_submodule(name)
        codes, scale = held[f"{name}.weight_codes"], held[f"{name}.weight_scale"]
        weight = codes.astype(np.float32) * scale.reshape(-1, *[1] * (codes.ndim - 1))
        own = weight[:, : layer.codes.shape[1]]  # without the fourth colour of the stem
        assert own.tobytes() == layer.float_weight().numpy().tobytes()


def test_the_grid_of_a_bias_is_as_fine_as_the_codes_of_the_weight_allow() -> None:
    network = quantised(bits="w4a4")
    deployed = deploy(network, images(2), [images(32)])
    fold_batchnorm(network)
    layer: Any = deployed.network.get_submodule("conv1")
    grid: Any = grid_of(next(n for n in deployed.network.graph.nodes if n.target == "conv1").args[0], deployed.network)
    unit = grid.scale * layer.scale  # of sums of products of the 4-bit codes
    assert ((network.conv1.bias - layer.float_bias()).abs() <= 1.01 * unit / layer.multiplier / 2).all()
    assert layer.multiplier >= 8


def test_a_grid_per_channel_of_the_input_is_refused() -> None:
    network = quantised(bits="w4a4")
    network.conv1.input_quantizer.channels = 8
    with pytest.raises(UsageError, match="the input of conv1 has a grid per channel"):
        deploy(network, images(2), [images(32)])


class Activations(nn.Module):
    """Squeeze and excitation with hard activations, concatenation and a split."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.gate = nn.Conv2d(8, 8, 1)
        self.left = nn.Conv2d(4, 4, 1)
        self.last = nn.Conv2d(8, 6, 3)
        self.linear = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.hardswish(self.conv(x))
        x = x * nn.functional.hardsigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        left, right = x.chunk(2, dim=1)
        x = torch.cat([nn.functional.silu(self.left(left)), right], dim=1)
        x = nn.functional.avg_pool2d(nn.functional.leaky_relu(self.last(x)), 2)
        return self.linear(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


def test_activations_gates_and_concatenations_pass_with_every_convolution_on_integers() -> None:
    network = quantised(Activations(), bits="w8a8")
    deployed = deploy(network, images(2), [images(32)])
    exported = BUILDERS["portable"](deployed)
    assert check(exported, deployed, images(8)).problem is None
    found = kernels(exported.model)
    assert found.float_products == ()
    assert found.integer["QLinearConv"] == 4
    assert any(kind == "HardSigmoid" for _, kind in found.floats)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"bits": "w4a4", "residual_bits": 8}, {"bits": "w8a8"}], ids=str)
@pytest.mark.parametrize(
    ("name", "convolutions"),
    [("torchvision/resnet18", 20), ("torchvision/mobilenet_v2", 52), ("timm/mobilenetv3_small_100", 53)],
)
def test_a_known_network_runs_on_integers_and_computes_what_pytorch_does_from_end_to_end(
    name: str, convolutions: int, settings: dict[str, Any]
) -> None:
    if name.startswith("timm"):
        pytest.importorskip("timm")
    torch.manual_seed(0)
    network, x = build_model(name, num_classes=10).eval(), torch.randn(2, 3, 224, 224)
    reestimate_batchnorm(network, [x])  # without, nothing but zeros would leave the deep ones
    network, _ = quantize_model(network, Recipe(**settings))
    initialize_quantizers(network, x)
    deployed = deploy(network.eval(), x, [x], gates=True)
    with torch.no_grad():
        assert deployed.network(x).abs().max() > 0.05
    exported = BUILDERS["portable"](deployed)
    parity = check(exported, deployed, x, [torch.randn(4, 3, 224, 224)])
    assert parity.problem is None
    assert max(row.steps for row in parity.optimised) <= 1
    assert parity.output_steps == max(row.steps for row in parity.end_to_end) == 0
    assert parity.differing == 0
    assert parity.exact
    found = kernels(exported.model)
    assert found.float_products == ()
    assert found.integer["QLinearConv"] == convolutions
    assert found.floats == ()


def test_the_deployed_network_keeps_the_scales_of_training() -> None:
    network = quantised(bits="w4a4", residual_bits=8)
    deployed = deploy(network, images(2), [images(32)])
    layer = deployed.network.get_submodule("linear")
    assert isinstance(layer, IntegerLayer)
    assert torch.equal(layer.scale, network.linear.weight_quantizer.step().detach())
    assert isinstance(network, Small)
    grid = deployed.network.get_submodule("grids.linear.input_quantizer")
    assert torch.equal(grid.scale, network.linear.input_quantizer.step().detach())


def test_a_step_that_the_runtime_cannot_reach_from_the_one_before_is_told_in_a_sentence() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1))
    student, _ = quantize_model(network, Recipe("w8a8"))
    x = torch.rand(4, 3, 8, 8)
    initialize_quantizers(student, x)
    with torch.no_grad():
        network[3].input_quantizer.scale.fill_(1e12)
    with pytest.raises(
        UsageError, match=r"does not run the file \(.*computation range.*a network that was not trained"
    ):
        to_onnx(student, x, calibration=[x])
