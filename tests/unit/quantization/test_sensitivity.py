"""What each layer costs when it alone is quantised."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lqkd.errors import UsageError
from lqkd.models import CifarResNet, load_weights
from lqkd.quantization import (
    Budget,
    Recipe,
    Rule,
    SensitivityReport,
    initialize_quantizers,
    measure_sensitivity,
    quantize_model,
    reestimate_batchnorm,
)
from lqkd.quantization.quantizers import LevelwiseStep
from lqkd.quantization.recipe import exactly, resolve


def digits_network() -> nn.Module:
    network = CifarResNet(8, width=8, in_channels=1)
    load_weights(network, "builtin:digits_student")
    return network


@pytest.fixture(scope="module")
def data() -> tuple[list[tuple[torch.Tensor, torch.Tensor]], list[torch.Tensor]]:
    from lqkd.data import Digits

    digits = Digits(seed=0)
    digits.setup()
    validation = [digits.preprocess(batch, train=False, epoch=0) for batch in digits.val_dataloader()]
    training = [digits.preprocess(batch, train=False, epoch=0) for batch in digits.train_dataloader()]
    return [(batch.images, batch.labels) for batch in validation], [batch.images for batch in training[:4]]


@pytest.fixture(scope="module")
def found(data: tuple) -> SensitivityReport:
    return measure_sensitivity(digits_network(), Recipe(), *data)


def test_a_layers_cost_is_the_loss_of_the_network_in_which_it_alone_is_quantised(
    found: SensitivityReport, data: tuple
) -> None:
    validation, calibration = data
    recipe = Recipe(rules=[Rule("*", 32, 32), Rule("layer1.0.conv1", 2, 2)])
    network = quantize_model(digits_network(), recipe)[0].eval()
    initialize_quantizers(network, calibration[0], batch_statistics=True)
    reestimate_batchnorm(network, calibration)
    with torch.no_grad():
        logits = torch.cat([network(images) for images, _ in validation])
    labels = torch.cat([labels for _, labels in validation])
    (candidate,) = [c for g in found.groups for c in g if c.layers == ("layer1.0.conv1",) and c.bits == "W2A2"]
    assert found.loss + candidate.loss_increase == pytest.approx(float(F.cross_entropy(logits, labels)), abs=1e-4)
    right = float((logits.argmax(dim=1) == labels).float().mean())
    assert found.value + candidate.change == pytest.approx(right, abs=1e-6)


def test_every_quantised_layer_is_ranked_once_with_all_bits(found: SensitivityReport) -> None:
    names = [name for name, module in digits_network().named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert [group[0].layers for group in found.groups] == [(name,) for name in names]
    assert {tuple(candidate.bits for candidate in group) for group in found.groups} == {("W8A8", "W4A4", "W2A2")}
    worst = [max(candidate.loss_increase for candidate in group) for group in found.ranked()]
    assert worst == sorted(worst, reverse=True)


def test_fewer_bits_are_further_from_the_float_network_and_smaller(found: SensitivityReport) -> None:
    for group in found.groups:
        divergences = [candidate.distance for candidate in group]
        assert divergences == sorted(divergences)
        assert 0 < divergences[0] < 0.01
        assert group[0].packed_bytes > group[1].packed_bytes > group[2].packed_bytes
        assert group[0].bit_operations > group[1].bit_operations > group[2].bit_operations


def test_the_network_is_left_as_it_was(data: tuple) -> None:
    network = digits_network().train()
    before = copy.deepcopy(network.state_dict())
    measure_sensitivity(network, Recipe(), *data, bits=["w2a2"])
    assert network.training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert not [module for module in network.modules() if "Quant" in type(module).__name__]


def test_a_quantised_network_is_ranked_by_its_float_weights(found: SensitivityReport, data: tuple) -> None:
    network, _ = quantize_model(digits_network(), Recipe(bits="w2a2"))
    initialize_quantizers(network, data[1][0])
    assert measure_sensitivity(network, Recipe(), *data).groups == found.groups


def test_weights_on_another_scale_are_not_mistaken_for_a_loss(data: tuple) -> None:
    # IR-Net standardises weights: with the batch norm of the float network, the accuracy would be that of guessing.
    binary = measure_sensitivity(digits_network(), Recipe(bits="w1a8", last_layer_bits=None), *data, bits=["w1a8"])
    middle = [group[0] for group in binary.groups if group[0].layers[0].startswith("layer")]
    assert all(candidate.change > -0.3 for candidate in middle)


def test_additions_stay_in_float_whatever_the_recipe_says(found: SensitivityReport, data: tuple) -> None:
    assert measure_sensitivity(digits_network(), Recipe(residual_bits=2), *data).groups == found.groups


def test_progress_counts_every_measurement(data: tuple) -> None:
    seen: list[tuple[int, int]] = []
    recipe = Recipe(rules=[Rule("*", 32, 32), Rule("layer3*", 4, 4)])
    measure_sensitivity(digits_network(), recipe, *data, bits=["w4a4", "w2a8"], progress=lambda *x: seen.append(x))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("bits", ["w32a4", "ternary", "x", "w9a9", "w4"])
def test_impossible_bits_are_refused(data: tuple, bits: str) -> None:
    with pytest.raises(UsageError, match="are not possible for a ranking: write 1 to 8 each"):
        measure_sensitivity(digits_network(), Recipe(), *data, bits=[bits])


def test_mistakes_are_one_sentence(data: tuple) -> None:
    validation, calibration = data
    with pytest.raises(UsageError, match="name the same bits twice"):
        measure_sensitivity(digits_network(), Recipe(), validation, calibration, bits=["w4a4", "w4a4"])
    with pytest.raises(UsageError, match="at least one entry in validation"):
        measure_sensitivity(digits_network(), Recipe(), [], calibration)
    with pytest.raises(UsageError, match="quantises no layer"):
        measure_sensitivity(digits_network(), Recipe("w32a32", first_layer_bits=None, last_layer_bits=None), *data)
    broken = digits_network()
    nn.init.constant_(next(broken.parameters()), float("nan"))
    with pytest.raises(UsageError, match="the loss of the float network is nan"):
        measure_sensitivity(broken, Recipe(), *data)


@pytest.mark.parametrize("name", ["Linear", "a[0]", "a*", "layer1.0", "?"])
def test_an_exact_match_means_one_layer_whatever_its_name(name: str) -> None:
    layers = {name: "Conv2d", "other": "Linear", "a0": "Conv2d", "ab": "Conv2d", "x": "Conv2d"}
    resolved = resolve(Recipe(first_layer_bits=None, last_layer_bits=None, rules=[Rule(exactly(name), 2, 2)]), layers)
    assert [key for key, value in resolved.items() if value.weight_bits == 2] == [name]


def test_a_budget_out_of_reach_is_refused_before_anything_is_measured(data: tuple) -> None:
    seen: list[tuple[int, int]] = []
    with pytest.raises(UsageError, match=r"budget='bops=0\.1%' cannot be reached"):
        measure_sensitivity(
            digits_network(), Recipe(), *data, progress=lambda *x: seen.append(x), budget=Budget.parse("bops=0.1%")
        )
    assert seen == []


def test_a_layer_that_is_called_for_several_levels_is_measured_with_a_step_for_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class TwoLevels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            finer = self.body(x).relu()
            return self.head(finer) + self.head(100 * finer)

    kinds = set()
    steps = LevelwiseStep.forward
    monkeypatch.setattr(LevelwiseStep, "forward", lambda self, x: kinds.add(self.scale.shape) or steps(self, x))
    batch = (torch.randn(8, 4), torch.randint(3, (8,)))
    measure_sensitivity(TwoLevels(), Recipe(per_level=True), [batch], [batch[0]], bits=["w4a4"])
    assert kinds == {(2,)}
