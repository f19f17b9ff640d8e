"""Weights that hooks or parametrizations compute: left in floating point, and no obstacle to copies and files."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from lqkd.errors import UsageError
from lqkd.export import to_onnx
from lqkd.quantization import Recipe, coverage, initialize_quantizers, measure_sensitivity, quantize_model
from lqkd.quantization.computed import copy_of
from lqkd.teachers.inference import inference_copy

COMPUTED: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "weight_norm": (weight_norm, "its weight is computed .* until torch.nn.utils.remove_weight_norm"),
    "spectral_norm": (spectral_norm, "its weight is computed .* until torch.nn.utils.remove_spectral_norm"),
    "pruned": (lambda m: prune.l1_unstructured(m, "weight", 0.3), "its weight .* torch.nn.utils.prune.remove"),
    "pruned bias": (lambda m: prune.l1_unstructured(m, "bias", 0.3), "its bias .* torch.nn.utils.prune.remove"),
    "parametrised": (parametrizations.weight_norm, "its weight .* torch.nn.utils.parametrize.remove_parametrizations"),
}

each = pytest.mark.parametrize("kind", COMPUTED)


@pytest.fixture(autouse=True)
def _deprecated() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # weight_norm
        yield


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    layer = COMPUTED[kind][0](nn.Conv2d(8, 8, 3))
    ends = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), layer, *ends)


def images() -> Tensor:
    return torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@each
def test_a_layer_with_a_computed_weight_stays_in_float_and_the_call_that_ends_it_is_named(kind: str) -> None:
    model, report = quantize_model(network(kind), Recipe(bits="w4a4"))
    row = next(row for row in report.layers if row.name == "2")
    assert row.is_float
    assert report.untraceable is None
    assert re.search(COMPUTED[kind][1], row.note)
    assert coverage(model) == report


@pytest.mark.parametrize("kind", [kind for kind in COMPUTED if kind != "parametrised"])
def test_a_trained_network_whose_weight_a_hook_computes_is_exported(kind: str) -> None:
    model, _ = quantize_model(network(kind), Recipe(bits="w4a4"))
    x = images()
    initialize_quantizers(model, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().mean().backward()
    optimizer.step()  # the weight that the last call has computed is no longer the layer's
    file = to_onnx(model.eval(), x, calibration=[x], test=[x])
    assert file.graph.node


def test_the_export_of_a_parametrised_layer_is_refused_with_the_call_that_makes_it_possible() -> None:
    model, _ = quantize_model(network("parametrised"), Recipe(bits="w4a4"))
    initialize_quantizers(model, images())
    with pytest.raises(UsageError, match=r"layer '2' cannot be exported yet: its weight .*remove_parametriz"):
        to_onnx(model.eval(), images(), calibration=[images()])
    torch.nn.utils.parametrize.remove_parametrizations(model[2], "weight")
    assert to_onnx(model, images(), calibration=[images()]).graph.node


@each
def test_a_teacher_with_a_computed_weight_answers_through_a_copy(kind: str) -> None:
    teacher = network(kind)
    teacher(images())
    teacher.eval()
    made, obstacle = inference_copy(teacher, images())
    assert obstacle is None
    torch.testing.assert_close(made(images()), teacher(images()), rtol=1e-3, atol=1e-4)


@each
def test_the_sensitivity_of_a_network_with_a_computed_weight_is_measured(kind: str) -> None:
    model, x = network(kind), images()
    model(x)
    report = measure_sensitivity(model, Recipe(bits="w4a4"), [(x, torch.zeros(4).long())], [x], bits=["w4a4"])
    assert [group[0].layers for group in report.groups] == [("0",), ("7",)]


def test_a_copy_of_a_network_that_keeps_what_it_computed_shares_nothing_with_it() -> None:
    model = network("weight_norm")
    model(images()).sum().backward()
    copied = copy_of(model)
    with torch.no_grad():
        copied[2].weight_g.mul_(2)
    assert not torch.equal(copied(images()), model(images()))
    copied[2].weight_g.data.div_(2)
    torch.testing.assert_close(copied(images()), model(images()))
