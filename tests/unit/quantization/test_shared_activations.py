"""Values that an integer kernel writes once and several grids read: one quantizer before all readers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.models import CifarResNet
from lqkd.modules.state import check_state
from lqkd.quantization import Quantizer, Recipe, Rule, initialize_quantizers, quantize_model, quantizers

RECIPE = Recipe(bits="w4a4", residual_bits=8)


def images() -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def of_results(network: nn.Module, recipe: Recipe = RECIPE) -> set[str]:
    """Names of the quantizers of ``network`` that belong to no layer, once it is quantised."""
    model, _ = quantize_model(network, recipe)
    return {name for name in quantizers(model) if name.endswith(("output_quantizer", "argument_quantizer"))}


class Fire(nn.Module):
    """One value that two convolutions read."""

    def __init__(self, act: nn.Module | None = None, pool: nn.Module | None = None) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.act = act
        self.pool = nn.Identity() if pool is None else pool
        self.left, self.right = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.squeeze(x))
        x = F.relu(x) if self.act is None else self.act(x)
        x = self.pool(x)
        return torch.cat([self.left(x), self.right(x)], dim=1)


def test_a_stem_that_a_layer_and_an_addition_read_is_quantised_before_both() -> None:
    model, report = quantize_model(CifarResNet(8, width=4), RECIPE)
    names = quantizers(model)
    assert "layer1.0.argument_quantizer" in names
    assert "layer1.0.shortcut.output_quantizer" not in names
    assert [join.bits for join in report.joins] == [(8, 8)] * 3
    initialize_quantizers(model, images())
    seen: list[Tensor] = []
    model.get_submodule("layer1.0.conv1").register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.eval()(images())
    quantizer = names["layer1.0.argument_quantizer"]
    assert quantizer.signed is False  # behind the ReLU
    assert torch.isin(seen[0], quantizer.levels()).all()


def test_an_addition_with_two_readers_is_computed_for_each() -> None:
    assert not of_results(CifarResNet(8, width=4)) & {"layer2.0.argument_quantizer", "layer1.0.output_quantizer"}


def test_two_layers_that_read_one_value_read_it_from_one_grid() -> None:
    assert of_results(Fire(nn.ReLU())) == {"pool.output_quantizer", "left.output_quantizer", "right.output_quantizer"}
    pooled = of_results(Fire(nn.ReLU(), nn.MaxPool2d(2)))
    assert {name for name in pooled if name.startswith(("act", "pool"))} == {"pool.output_quantizer"}


def test_nothing_is_placed_without_a_number_of_bits() -> None:
    assert not of_results(Fire(nn.ReLU()), Recipe(bits="w4a4"))


def test_a_value_that_a_layer_reads_in_floating_point_stays_so() -> None:
    rules = [Rule("left", activation_bits=32)]
    assert "pool.output_quantizer" not in of_results(Fire(nn.ReLU()), Recipe(bits="w4a4", residual_bits=8, rules=rules))


def test_the_input_of_a_network_is_written_by_no_kernel() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.left(x), self.right(x)], dim=1)

    assert of_results(nn.Sequential(nn.Identity(), Two())) == {"1.left.output_quantizer", "1.right.output_quantizer"}


def test_a_concatenation_that_several_layers_read_is_written_on_one_grid() -> None:
    found = of_results(nn.Sequential(Fire(nn.ReLU()), _Inception()))
    assert "0.output_quantizer" in found


class _Inception(nn.Module):
    """Two branches, one of them behind a pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(8, 4, 1)
        self.right = nn.Sequential(nn.MaxPool2d(3, 1, padding=1), nn.Conv2d(8, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(x)], dim=1)


def test_a_value_that_no_hook_reaches_before_all_readers_is_left_to_the_export() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.squeeze, self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.sigmoid(self.squeeze(x))
            return torch.cat([self.left(x), self.right(x)], dim=1)

    assert of_results(Net()) == {"left.output_quantizer", "right.output_quantizer"}


def test_converting_twice_places_nothing_more() -> None:
    for network in (CifarResNet(8, width=4), Fire(nn.ReLU()), nn.Sequential(Fire(nn.ReLU()), _Inception())):
        model, report = quantize_model(network, RECIPE)
        names = list(model.state_dict())
        again, second = quantize_model(model, RECIPE)
        assert list(again.state_dict()) == names
        assert second == report


def test_every_quantizer_of_a_value_learns() -> None:
    model, _ = quantize_model(Fire(nn.ReLU()), RECIPE)
    initialize_quantizers(model, images())
    model.train()(images()).square().sum().backward()
    quantizer = model.get_submodule("pool.output_quantizer")
    assert isinstance(quantizer, Quantizer)
    assert all(parameter.grad is not None for parameter in quantizer.parameters())


def test_a_checkpoint_with_grids_at_the_places_of_an_earlier_version_is_refused_by_name() -> None:
    model, _ = quantize_model(CifarResNet(8, width=4), RECIPE)
    old = {
        key.replace("layer1.0.argument_quantizer", "layer1.0.shortcut.output_quantizer"): value
        for key, value in model.state_dict().items()
    }
    with pytest.raises(UsageError, match=r"other places than this version .* none at 'layer1.0.argument_quantizer'"):
        check_state(model, old)
    plain, _ = quantize_model(CifarResNet(8, width=4), Recipe(bits="w4a4"))
    with pytest.raises(UsageError, match="another architecture"):
        check_state(model, plain.state_dict())
