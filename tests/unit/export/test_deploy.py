"""What the deployed network is, beside the student as it was trained."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.export import check, deploy, same_padding, to_onnx
from lqkd.export.contents import altered_integers
from lqkd.export.deploy import check_deployable
from lqkd.export.formats import BUILDERS
from lqkd.export.integer import IntegerLayer
from lqkd.export.runtimes import kernels
from lqkd.models import CifarResNet
from lqkd.quantization import Recipe, Rule, initialize_quantizers, quantize_model
from tests.unit.export.networks import Small, alter, images, quantised
from tests.unit.quantization.test_shared_activations import Fire


def test_a_plain_chain_needs_no_calibration_and_keeps_its_function() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU6(), nn.Flatten(),
        nn.Linear(128, 5),
    )  # fmt: skip
    network = quantised(plain, bits="w4a4")
    deployed = deploy(network, images(2))
    assert deployed.calibrated == deployed.rerouted == []
    with torch.no_grad():
        trained, exported = network(images(16)), deployed.network(images(16))
    assert (trained - exported).abs().max() < 0.01 * trained.abs().max()


def test_the_student_is_left_alone() -> None:
    network = quantised(bits="w4a4")
    before = {key: value.clone() for key, value in network.state_dict().items()}
    deploy(network, images(2), [images(32)])
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert isinstance(network.norm, nn.BatchNorm2d)


def test_additions_that_training_left_in_float_need_calibration_data() -> None:
    with pytest.raises(UsageError, match="no calibration data"):
        deploy(quantised(bits="w4a4"), images(2))
    deployed = deploy(quantised(bits="w4a4"), images(2), [images(32)])
    assert any("norm1" in place or "conv1" in place for place in deployed.calibrated)


@pytest.mark.parametrize(
    ("example", "calibration", "told"),
    [
        (torch.zeros(2, 1, 8, 8), [images(4)], "cannot take an example of shape (2, 1, 8, 8) and type torch.float32"),
        (images(2).long(), [images(4)], "cannot take an example of shape (2, 3, 8, 8) and type torch.int64"),
        (images(0), [images(4)], "an example of shape (0, 3, 8, 8) is empty"),
        (images(2), images(4), "calibration is a tensor: give a list of batches"),
        (images(2), [torch.zeros(4, 1, 8, 8)], "cannot take calibration data of shape (1, 1, 8, 8)"),
    ],
)
def test_data_that_the_network_does_not_take_are_told_in_one_sentence(
    example: Tensor, calibration: list[Tensor], told: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError) as caught:
        deploy(quantised(bits="w4a4"), example, calibration)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err


def test_a_network_in_floating_point_is_refused() -> None:
    with pytest.raises(UsageError, match="is in floating point: quantise it with"):
        to_onnx(CifarResNet(8, width=4), images(2))


def test_fitting_grids_tells_how_many_are_done() -> None:
    told: list[tuple[int, int]] = []
    deployed = deploy(quantised(bits="w4a4"), images(2), [images(32)], lambda *counts: told.append(counts))
    total = len(deployed.calibrated)
    assert told == [(done, total) for done in range(total)]
    assert total > 1


@pytest.mark.parametrize("calibration", [[], [images(0)], [torch.full((4, 3, 8, 8), float("nan"))]])
def test_calibration_without_usable_data_is_told_in_one_sentence(calibration: list[Tensor]) -> None:
    with pytest.raises(UsageError, match=r"calibration data|not finite|finite") as caught:
        deploy(quantised(bits="w4a4"), images(2), calibration)
    assert "\n" not in str(caught.value)


def test_layers_whose_input_stays_in_float_get_no_grid() -> None:
    deployed = deploy(quantised(bits="w4a32", rules=[]), images(2), [images(32)])
    assert not any("conv1" in place for place in deployed.calibrated)


def test_negative_and_zero_factors_of_batch_norm_are_exact() -> None:
    network = quantised(bits="w8a8")
    with torch.no_grad():
        network.norm.weight[:3] *= -1
        network.norm.weight[3] = 0.0
        network.norm1.weight[2] = 1e-30
    with torch.no_grad():
        expected = network(images(16))
    deployed = deploy(network, images(2), [images(32)])
    exported = BUILDERS["portable"](deployed)
    assert check(exported, deployed, images(16)).problem is None
    with torch.no_grad():
        assert (deployed.network(images(16)) - expected).abs().max() < 0.05 * expected.abs().max()
    stem = deployed.network.get_submodule("stem")
    assert isinstance(stem, IntegerLayer)
    assert (stem.scale > 0).all()
    assert not stem.codes[3].any()


def fitted(network: nn.Module, size: int) -> tuple[nn.Module, Tensor]:
    """``network`` at W4A4 with 8 bits for its results, and images that it was fitted to."""
    torch.manual_seed(0)
    network, _ = quantize_model(network, Recipe(bits="w4a4", residual_bits=8))
    given = torch.randn(4, 3, size, size)
    initialize_quantizers(network, given, batch_statistics=True)
    return network.eval(), given


@pytest.mark.parametrize("network", [lambda: CifarResNet(8, width=4), lambda: Fire(nn.ReLU(), nn.MaxPool2d(2))])
def test_no_layer_reads_another_grid_than_in_training(network: Callable[[], nn.Module]) -> None:
    student, given = fitted(network(), 16)
    deployed = deploy(student, given, [given])
    assert deployed.rerouted == []
    assert len(deployed.calibrated) <= 1  # in front of the last pooling


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2", "mobilenetv3_small_100", "googlenet"])
def test_no_layer_of_a_known_network_reads_another_grid_than_in_training(name: str) -> None:
    more = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    timm = pytest.importorskip("timm") if name.startswith("mobilenetv3") else None
    network = torchvision.models.get_model(name, num_classes=10, **more) if timm is None else timm.create_model(name)
    student, given = fitted(network, 64)
    assert deploy(student, given, [given]).rerouted == []


class Odd(nn.Module):
    """Computes something in a block that has no counterpart."""

    def __init__(self) -> None:
        super().__init__()
        self.block = _Block()
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.block(x).mean((2, 3)))


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.erfinv(self.conv(x))


def test_an_unsupported_operator_is_named_with_its_place() -> None:
    network, _ = quantize_model(Odd(), Recipe(bits="w4a4"))
    initialize_quantizers(network, images(8))
    with pytest.raises(UsageError, match="operator erfinv in block cannot be exported"):
        deploy(network, images(2), [images(8)])


def test_an_unsupported_layer_is_named_with_its_place() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 2, 2), nn.Flatten(), nn.Linear(98, 2))
    network, _ = quantize_model(network, Recipe(bits="w4a4"))
    initialize_quantizers(network, images(8))
    with pytest.raises(UsageError, match="operator QuantConvTranspose2d in 1 cannot be exported"):
        deploy(network, images(2), [images(8)])


def test_a_student_that_was_never_fitted_is_refused() -> None:
    network, _ = quantize_model(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), Recipe(bits="w4a4"))
    with pytest.raises(UsageError, match="has no grid, since it has seen no data or nothing but zeros"):
        deploy(network, images(2))


class Around(nn.Module):
    """Calls ``block`` between two layers, and takes the first of what it returns."""

    def __init__(self, block: nn.Module, arguments: int = 1) -> None:
        super().__init__()
        self.first, self.block, self.last = nn.Linear(8, 8), block, nn.Linear(8, 4)
        self.arguments = arguments

    def forward(self, x: Tensor) -> Tensor:
        found = self.block(*[self.first(x.flatten(2))] * self.arguments)
        return self.last(found if isinstance(self.block, nn.TransformerEncoderLayer) else found[0])


BLOCKS = {
    "MultiheadAttention": Around(nn.MultiheadAttention(8, 2, batch_first=True), arguments=3),
    "LSTM": Around(nn.LSTM(8, 8, batch_first=True)),
    "GRU": Around(nn.GRU(8, 8, batch_first=True)),
    "TransformerEncoderLayer": Around(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)),
}


@pytest.mark.parametrize("operator", BLOCKS)
def test_a_block_with_several_results_is_named_with_its_place(operator: str) -> None:
    in_float = [Rule("block*", weight_bits=32, activation_bits=32)]
    rules = in_float if operator in ("MultiheadAttention", "TransformerEncoderLayer") else []
    network, _ = quantize_model(copy.deepcopy(BLOCKS[operator]), Recipe(bits="w4a4", rules=rules))
    x = torch.randn(4, 5, 8)
    initialize_quantizers(network, x)
    with pytest.raises(UsageError, match=rf"^operator {operator} in block cannot be exported: replace it"):
        deploy(network, x, [x])
    with pytest.raises(UsageError, match=rf"^operator {operator} in block cannot be exported: replace it"):
        check_deployable(network, x)


WRAPPED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "double": lambda network: network.double(),
    "half": lambda network: network.half(),
    "torch.compile": torch.compile,
    "DataParallel": nn.DataParallel,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
}


@pytest.mark.parametrize("how", WRAPPED)
def test_a_network_in_a_wrapper_or_another_precision_is_exported_as_it_computes_in_float32(how: str) -> None:
    network = quantised(bits="w4a4", residual_bits=8)
    expected = deploy(network, images(2), [images(8)]).network(images(8))
    wrapped = WRAPPED[how](copy.deepcopy(network))
    example = images(8).to(next(wrapped.parameters()).dtype)
    found = deploy(wrapped, example, [example]).network(images(8))
    if how == "half":
        assert (found - expected).abs().max() < 0.1 * expected.abs().max()
    else:
        assert torch.equal(found, expected)
    assert next(wrapped.parameters()).dtype == example.dtype
    assert to_onnx(wrapped, images(8), calibration=[example], test=[example]).graph.node


@pytest.mark.parametrize("how", ["DataParallel", "AveragedModel"])
def test_a_network_in_a_wrapper_is_not_quantised(how: str) -> None:
    with pytest.raises(UsageError, match=f"the network was made by {how} and cannot be quantised: give the network"):
        quantize_model(WRAPPED[how](Small()), Recipe())
    with pytest.raises(UsageError, match=f"the part '1' was made by {how}"):
        quantize_model(nn.Sequential(nn.Identity(), WRAPPED[how](Small())), Recipe())


class Gated(nn.Module):
    """A residual branch that ends in a batch norm of zeros, in front of a gate (timm's residual networks begin so)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.gate, self.head = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        y = self.norm(self.branch(x))
        y = y * self.gate(y.mean((2, 3), keepdim=True)).sigmoid()
        return self.head((x + y).mean((2, 3)))


def test_a_branch_that_is_still_zero_is_exported_and_adds_nothing() -> None:
    network = Gated()
    nn.init.zeros_(network.norm.weight)
    nn.init.zeros_(network.norm.bias)
    student, _ = quantize_model(network, Recipe(bits="w8a8"))
    initialize_quantizers(student, images(32))
    assert not student.gate.input_quantizer.is_ready
    model = to_onnx(student.eval(), images(4), calibration=[images(32)])
    assert not student.gate.input_quantizer.is_ready  # the student is left alone
    with torch.no_grad():
        network.norm.running_mean.fill_(3.0)  # times zero, whatever it is
    assert to_onnx(student, images(4), calibration=[images(32)]).graph.node == model.graph.node


def test_a_quantizer_that_saw_zeros_in_training_and_values_here_is_refused() -> None:
    network = Gated()
    nn.init.zeros_(network.norm.weight)
    student, _ = quantize_model(network, Recipe(bits="w8a8"))
    initialize_quantizers(student, images(32))
    nn.init.ones_(student.norm.weight)
    with pytest.raises(UsageError, match=r"quantizer 'gate.input_quantizer' has no grid"):
        deploy(student.eval(), images(4), [images(32)])


class Preactivated(nn.Module):
    def __init__(self, activation: type[nn.Module]) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), timm.layers.BatchNormAct2d(8, act_layer=activation)
        self.conv, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.conv(self.norm(x))).mean((2, 3)))


@pytest.mark.parametrize("activation", [nn.SiLU, nn.ReLU, nn.ELU])
def test_what_a_batch_norm_of_timm_does_besides_is_in_the_file(activation: type[nn.Module]) -> None:
    student = quantised(Preactivated(activation), bits="w8a8", residual_bits=8)
    model = to_onnx(student, images(4), calibration=[images(32)])
    assert "BatchNormalization" in {node.op_type for node in model.graph.node}


class Louder(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_batch_norm_that_computes_something_else_is_refused_by_name() -> None:
    network = Preactivated(nn.ReLU)
    network.norm = Louder(8)
    student = quantised(network, bits="w8a8")
    with pytest.raises(UsageError, match="operator Louder in norm cannot be exported"):
        deploy(student, images(4), [images(32)])


class Same(nn.Module):
    """Convolutions of timm's ports from TensorFlow: an even and an odd side, a stride, and groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = (
            timm.layers.Conv2dSame(3, 8, 3, stride=2),
            timm.layers.Conv2dSame(8, 8, 5, stride=2, groups=8),
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(self.stem(x).relu()).mean((2, 3)))


@pytest.mark.parametrize("side", [8, 7])
def test_padding_as_tensorflow_does_it_is_in_the_file(side: int) -> None:
    student = quantised(Same(), bits="w8a8")
    x = images(8)[..., :side, :side]
    model = to_onnx(student, x, calibration=[x])
    assert kernels(model).integer == {"QLinearConv": 2, "QLinearGlobalAveragePool": 1, "QGemm": 1}


def test_a_graph_that_computes_something_else_than_the_student_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which no comparison of a file with its own graph would find."""
    monkeypatch.setattr(same_padding, "same", lambda *axis: (1, 0))
    student, x = quantised(Same(), bits="w8a8"), images(8)
    with pytest.raises(UsageError, match="written as the operations of a file it computes something else"):
        deploy(student, x, [x])


def test_a_graph_that_float32_cannot_tell_from_its_student_is_compared_in_float64() -> None:
    """As of a ResNet-152 with random weights; here the bias is lost in what the batch norm takes off again."""
    student = quantised(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 5)))
    nn.init.constant_(student[0].bias, 2.0**16)
    nn.init.constant_(student[1].running_mean, 2.0**16)
    deploy(student, images(4), [images(32)])


def test_layers_of_the_same_numbers_have_their_own_in_the_file() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    network[4].load_state_dict(network[2].state_dict())
    student = quantised(network, bits="w8a8")
    exported = BUILDERS["portable"](deploy(student, images(4), [images(32)]))
    names = {tensor.name for tensor in exported.model.graph.initializer}
    assert {"2.weight_codes", "4.weight_codes"} <= names


def test_a_layer_whose_numbers_cannot_be_found_fails() -> None:
    deployed = deploy(quantised(Same(), bits="w8a8"), images(4), [images(32)])
    exported = BUILDERS["portable"](deployed)
    assert altered_integers(exported.model, deployed) is None
    next(node for node in exported.model.graph.node if node.name == "head.weight").name = "another"
    assert altered_integers(exported.model, deployed) == "head.weight_codes"


def test_a_bias_or_weight_with_another_zero_is_found() -> None:
    deployed = deploy(quantised(bits="w4a4"), images(4), [images(32)])
    for part in ("weight", "bias"):
        exported = BUILDERS["portable"](deployed)
        alter(exported.model, f"conv1.{part}_zero_point", 1)
        assert altered_integers(exported.model, deployed) == f"conv1.{part}_zero_point"
