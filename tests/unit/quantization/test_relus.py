"""ReLUs that training leaves to the quantizers behind them: the same bits, and computed wherever anything looks."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from lqkd.models import CifarResNet
from lqkd.quantization import LSQ, Recipe, initialize_quantizers, quantize_model, relus
from lqkd.quantization.deferred import DeferredReLU

RELUS = [nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.ReLU6(inplace=True)]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The results of ReLUs that were left out first and computed after all."""
    found: list[Tensor] = []
    value = DeferredReLU.value

    def noted(deferred: DeferredReLU) -> Tensor:
        found.append(value(deferred))
        return found[-1]

    monkeypatch.setattr(DeferredReLU, "value", noted)
    return found


@pytest.fixture
def left_out(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What quantizers have read in the place of a ReLU's result."""
    found: list[Tensor] = []
    quantize = LSQ._quantize

    def noted(quantizer: LSQ, x: Tensor) -> Tensor:
        if quantizer.signed is False and x.min() < 0:
            found.append(x)
        return quantize(quantizer, x)

    monkeypatch.setattr(LSQ, "_quantize", noted)
    return found


def quantised(network: nn.Module, x: Tensor, **recipe: Any) -> nn.Module:
    model, _ = quantize_model(network, Recipe(**{"bits": "w4a4", "first_layer_bits": None, **recipe}))
    initialize_quantizers(model, x)
    return model.train()


def chain(relu: nn.Module, x: Tensor, **recipe: Any) -> nn.Module:
    layers = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), relu, nn.Conv2d(8, 4, 3)
    return quantised(nn.Sequential(*layers), x, **recipe)


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    model, x = copy.deepcopy(model), x.clone().requires_grad_()
    output = model(x)
    (output * output.detach().sin()).sum().backward()
    return [output.detach(), x.grad, *(parameter.grad for parameter in model.parameters())]


def without(model: nn.Module) -> nn.Module:
    """The same, in which every ReLU is computed."""
    model = copy.deepcopy(model)
    model.__dict__[relus._PLACES] = []
    return model


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


NETWORKS: list[tuple[Callable[[], nn.Module], int]] = [
    (lambda: CifarResNet(8, width=4), 3),
    (lambda: torchvision.models.resnet18(num_classes=3), 8),
    (lambda: torchvision.models.mobilenet_v2(num_classes=3, dropout=0.0), 34),
]


@pytest.mark.usefixtures("compiled_kernels")
@pytest.mark.parametrize(("make", "places"), NETWORKS, ids=["CifarResNet", "resnet18", "mobilenet_v2"])
def test_a_training_step_without_relus_has_the_bits_of_one_with_them(
    left_out: list[Tensor], make: Callable[[], nn.Module], places: int
) -> None:
    x = torch.randn(2, 3, 32, 32)
    model = quantised(make(), x)
    ours = results(model, x)
    assert len(left_out) == places
    assert same(ours, results(without(model), x))
    assert len(left_out) == places


@pytest.mark.parametrize("relu", RELUS, ids=str)
@pytest.mark.parametrize("kind", ["float64", "channels_last", "bfloat16"])
def test_every_kind_of_relu_is_left_out_whatever_the_tensors_are(
    left_out: list[Tensor], relu: nn.Module, kind: str
) -> None:
    x = torch.randn(4, 3, 9, 9)
    model = chain(relu, x)
    if kind == "channels_last":
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    elif kind == "float64":
        model, x = model.double(), x.double()
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bfloat16"):
        ours = results(model, x)
        assert len(left_out) == 1
        assert same(ours, results(without(model), x))


@pytest.mark.parametrize("compiled", ["0", "1"])
@pytest.mark.parametrize("relu", RELUS, ids=str)
@pytest.mark.parametrize("scale", [6 / 15, 0.39999998, 0.40000004, 0.1, 1e-38])
def test_zeros_the_top_and_what_is_no_number_are_quantised_alike(
    monkeypatch: pytest.MonkeyPatch, compiled: str, relu: nn.Module, scale: float
) -> None:
    monkeypatch.setenv("LQKD_COMPILE", compiled)
    special = [0.0, -0.0, 1e-45, -1e-45, 6.0, 5.9999995, 6.0000005, float("inf"), -float("inf"), float("nan"), -2.0]
    quantizer = LSQ(4, signed=False, batched=True)
    quantizer.initialize(torch.rand(9))
    quantizer.scale.data.fill_(scale)
    pairs = []
    for given in (DeferredReLU.of, torch.clone):
        x = torch.tensor(special, requires_grad=True)
        x_hat = quantizer(relu(given(x + 0.0)))
        x_hat.backward(torch.arange(1.0, 12.0))
        pairs.append([x_hat.detach(), x.grad])
    assert all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(*pairs, strict=True))


def test_a_relu6_within_the_grid_is_computed(computed: list[Tensor], left_out: list[Tensor]) -> None:
    x = torch.randn(4, 3, 9, 9)
    model = chain(nn.ReLU6(), x)
    model[3].input_quantizer.scale.data.fill_(0.5)
    model[1].weight.data.fill_(9.0)
    ours = results(model, x)
    assert computed[-1].max() == 6
    assert same(ours, results(without(model), x))
    assert not left_out


@pytest.mark.parametrize("bits", [{"activation_quantizer": {"name": "lsq", "signed": True}}, {"bits": "w4a32"}])
def test_a_quantizer_that_does_not_clip_at_zero_leaves_the_relu(left_out: list[Tensor], bits: dict[str, Any]) -> None:
    x = torch.randn(4, 3, 9, 9)
    model = chain(nn.ReLU(), x, **{"first_layer_bits": 8, "last_layer_bits": None, **bits})
    del left_out[:]
    model[0].input_quantizer = None
    assert same(results(model, x), results(without(model), x))
    assert not left_out


class ReadTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        return self.second(x) + x


class ReadTwiceInTraining(ReadTwice):
    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        return self.second(x) + x if self.training else self.second(x)


class ReadTwiceLater(ReadTwice):
    twice = False

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        return self.second(x) + x if self.twice else self.second(x)


@pytest.mark.parametrize("kind", [ReadTwice, ReadTwiceInTraining])
def test_a_relu_with_a_second_reader_is_computed(kind: type[nn.Module], left_out: list[Tensor]) -> None:
    x = torch.rand(4, 3, 9, 9)
    model = quantised(kind(), x)
    assert same(results(model, x), results(without(model), x))
    assert not left_out


def test_a_reader_that_no_trace_has_seen_gets_the_relus_result(left_out: list[Tensor]) -> None:
    x = torch.rand(4, 3, 9, 9)
    model = quantised(ReadTwiceLater(), x)
    model.twice = True
    assert same(results(model, x), results(without(model), x))
    assert len(left_out) == 1


@pytest.mark.parametrize("name", ["1", "2", "3", "3.input_quantizer"])
def test_what_a_hook_sees_is_computed(name: str, left_out: list[Tensor]) -> None:
    x, seen = torch.rand(4, 3, 9, 9), []
    model = chain(nn.ReLU(), x)
    model(x)
    assert len(left_out) == 1
    model.get_submodule(name).register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    model(x)
    assert len(left_out) == 1
    assert all(type(tensor) is Tensor for tensor in seen[0])
    assert seen[0][name == "2"].min() == 0 if name != "1" else seen[0][1].min() < 0


def test_evaluation_computes_every_relu(left_out: list[Tensor]) -> None:
    x = torch.rand(4, 3, 9, 9)
    model = chain(nn.ReLU(), x)
    model(x)
    model.eval()(x)
    assert len(left_out) == 1


def test_copies_pickles_and_exchanged_modules_leave_relus_out(left_out: list[Tensor]) -> None:
    x = torch.rand(4, 3, 9, 9)
    model = chain(nn.ReLU(), x)
    model(x)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    exchanged = copy.deepcopy(model)
    exchanged[1] = nn.BatchNorm2d(8)  # without the hooks of the one before
    for one in (*copies, exchanged):
        del left_out[:]
        one(x)
        assert len(left_out) == 1
