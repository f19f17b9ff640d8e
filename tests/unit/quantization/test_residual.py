"""Quantised additions and concatenations: found without rewriting the network, applied at where operands come from."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

from lqkd.errors import UsageError
from lqkd.models import CifarResNet
from lqkd.quantization import (
    CoverageReport,
    Quantizer,
    Recipe,
    coverage,
    float_mode,
    fold_batchnorm,
    initialize_quantizers,
    quantize_model,
    quantizers,
)

RECIPE = Recipe(bits="w8a8", residual_bits=8)


def images() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def resnet(recipe: Recipe = RECIPE) -> tuple[nn.Module, CoverageReport]:
    torch.manual_seed(0)
    model, report = quantize_model(CifarResNet(8, width=4), recipe)
    initialize_quantizers(model, images())
    return model.eval(), report


class Block(nn.Module):
    """Every kind of operand: a layer's output, the block's own argument, a functional result."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(x) + x, x], dim=1)


class InPlace(nn.Module):
    """Adds in place to what a quantised layer returns, as torchvision's residual networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.first(x)
        out += self.second(x)
        return out


def test_the_operands_of_every_residual_addition_are_on_a_grid_of_the_given_bits() -> None:
    model, report = resnet()
    assert [join.bits for join in report.joins] == [(8, 8)] * 3
    assert not report.operations
    seen: list[Tensor] = []
    model.get_submodule("layer1.0.bn2").register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(images())
    quantizer = model.get_submodule("layer1.0.bn2.output_quantizer")
    assert isinstance(quantizer, Quantizer)
    assert torch.isin(seen[0], quantizer.levels()).all()


def test_additions_stay_in_floating_point_and_are_listed_unless_the_recipe_says_otherwise() -> None:
    _, report = resnet(Recipe(bits="w8a8"))
    assert not report.joins
    assert [str(x) for x in report.operations] == [f"functional add at layer{i}.0" for i in (1, 2, 3)]


def test_the_first_argument_of_a_block_can_be_an_operand() -> None:
    model, report = quantize_model(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), Block()), RECIPE)
    assert "2.conv.output_quantizer" in quantizers(model)
    assert [x.kind for x in report.joins] == ["add"]
    assert "1.output_quantizer" in quantizers(model)


def test_a_join_with_an_operand_that_passes_no_module_is_listed_as_not_quantised() -> None:
    _, report = quantize_model(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), Block()), RECIPE)
    assert [str(x) for x in report.operations] == ["functional cat at 2"]


def test_an_argument_used_by_two_blocks_is_quantised_inside_each() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.block = nn.Conv2d(3, 4, 1), Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(torch.relu(self.conv(x)))

    model, _ = quantize_model(Net(), RECIPE)
    assert {"block.conv.output_quantizer", "block.argument_quantizer"} <= quantizers(model).keys()
    initialize_quantizers(model, images())
    argument = model.get_submodule("block.argument_quantizer")
    assert isinstance(argument, Quantizer)
    kept = model.eval()(images())[:, 4:]
    assert torch.isin(kept, argument.levels()).all()


def test_eight_bit_additions_move_the_output_by_less_than_two_per_cent() -> None:
    model, _ = resnet(Recipe(bits="w8a32", residual_bits=8))
    with float_mode(model):
        expected = model(images())
    without, _ = resnet(Recipe(bits="w8a32"))
    assert not torch.equal(model(images()), without(images()))
    assert (model(images()) - expected).norm() < 0.02 * expected.norm()


def test_float_mode_runs_without_the_quantizers_of_additions() -> None:
    torch.manual_seed(0)
    expected = CifarResNet(8, width=4).eval()(images())
    model, _ = resnet()
    with float_mode(model):
        torch.testing.assert_close(model(images()), expected, rtol=0, atol=0)
    assert not torch.equal(model(images()), expected)


def test_converting_twice_adds_no_second_quantizer() -> None:
    model, report = resnet()
    names = list(model.state_dict())
    again, second = quantize_model(model, RECIPE)
    assert list(again.state_dict()) == names
    assert second == report


def test_copies_pickles_and_checkpoints_keep_quantised_additions() -> None:
    model, _ = resnet()
    expected = model(images())
    fresh, _ = quantize_model(CifarResNet(8, width=4), RECIPE)
    fresh.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh.eval()):
        torch.testing.assert_close(other(images()), expected, rtol=0, atol=0)


def test_folding_batch_norm_keeps_the_quantizer_of_its_output() -> None:
    model, _ = resnet()
    expected = model(images())
    fold_batchnorm(model)
    assert "layer1.0.bn2.output_quantizer" in quantizers(model)
    assert coverage(model).joins
    torch.testing.assert_close(model(images()), expected, rtol=0.02, atol=0.02)


def test_every_quantizer_of_an_addition_learns() -> None:
    model, _ = resnet()
    model.train()(images()).square().sum().backward()
    assert all(p.grad is not None for q in quantizers(model).values() for p in q.parameters())


def test_a_quantised_result_may_be_added_to_in_place() -> None:
    model, report = quantize_model(InPlace(), RECIPE)
    model(images()).sum().backward()
    assert len(report.joins) == 1
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe(residual_bits=9), "quantization.residual_bits=9 is not possible: bits are 1 to 8"),
        (Recipe(residual_bits=8, residual_quantizer="lsqq"), "quantizer 'lsqq' is unknown"),
        (Recipe(residual_bits=8, residual_quantizer="irnet"), "residual_quantizer for the input of layer1.0"),
    ],
)
def test_an_impossible_setting_is_refused_in_one_sentence(recipe: Recipe, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        quantize_model(CifarResNet(8, width=4), recipe)


# --- modules that are exchanged ---------------------------------------------------------------------------------------


def synchronised(model: nn.Module) -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


CHANGES = {
    "synchronised": synchronised,
    "synchronised and copied": lambda model: copy.deepcopy(synchronised(model)),
    "copied and synchronised": lambda model: synchronised(copy.deepcopy(model)),
    "synchronised and pickled": lambda model: pickle.loads(pickle.dumps(synchronised(model))),
    "synchronised and compiled": lambda model: torch.compile(synchronised(model), backend="eager"),
    "inside of another network": lambda model: synchronised(nn.Sequential(nn.Identity(), model)),
}


@pytest.mark.parametrize(
    "change", [pytest.param(name, marks=[pytest.mark.slow] * name.endswith("compiled")) for name in CHANGES]
)
def test_a_batch_norm_that_is_exchanged_for_a_synchronised_one_still_quantises_its_output(change: str) -> None:
    model, _ = resnet()
    expected = model(images())
    changed = CHANGES[change](model)
    assert any(isinstance(module, nn.SyncBatchNorm) for module in changed.modules())
    assert torch.equal(changed(images()), expected)


def test_a_synchronised_network_is_fitted_and_folded_like_the_original() -> None:
    torch.manual_seed(0)
    model, _ = quantize_model(CifarResNet(8, width=4), RECIPE)
    model = synchronised(model)
    initialize_quantizers(model, images())
    expected, _ = resnet()
    for network in (model.eval(), expected):
        fold_batchnorm(network)
    assert torch.equal(model(images()), expected(images()))


# --- branches that start at zero --------------------------------------------------------------------------------------


def convnext() -> nn.Module:
    return ConvNeXt([CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 1)], layer_scale=0.0, num_classes=10)


ZERO_BRANCHES = {
    "resnet18": lambda: torchvision.models.resnet18(zero_init_residual=True, num_classes=10),
    "convnext": convnext,
}


@pytest.mark.parametrize("name", ZERO_BRANCHES)
def test_a_branch_of_zeros_gets_a_grid_as_wide_as_that_of_what_it_is_added_to(name: str) -> None:
    torch.manual_seed(0)
    model, report = quantize_model(ZERO_BRANCHES[name](), Recipe(bits="w4a4", residual_bits=8))
    x = torch.randn(4, 3, 32, 32)
    initialize_quantizers(model, x, batch_statistics=True)
    assert all(quantizer.is_ready for quantizer in quantizers(model).values())
    for join in coverage(model).joins:
        first, second = (model.get_submodule(str(path)).levels().abs().max() for path in join.quantizers)
        assert 0.5 < first / second < 2
    assert report.joins


def test_a_branch_of_zeros_that_grows_is_not_clipped() -> None:
    torch.manual_seed(0)
    model, _ = quantize_model(ZERO_BRANCHES["resnet18"](), Recipe(bits="w4a4", residual_bits=8))
    x, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    initialize_quantizers(model, x, batch_statistics=True)
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.05)
    seen: list[Tensor] = []
    branch = model.get_submodule("layer1.0.bn2.output_quantizer")
    branch.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0] - output).abs().max()))
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
    assert all(error <= branch.step() * 0.51 for error in seen)


def test_a_weight_of_zeros_gets_the_grid_of_a_fresh_layer() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    nn.init.zeros_(model[2].weight)
    model, _ = quantize_model(model, RECIPE)
    initialize_quantizers(model, torch.randn(16, 64))
    quantizer = model[2].weight_quantizer
    assert quantizer.is_ready
    assert quantizer.levels().amax(1).sub(32**-0.5).abs().max() < 0.25 * 32**-0.5
    assert not model[2].quantized_weight().any()


def test_a_weight_of_zeros_whose_scale_is_measured_in_every_step_waits_for_its_values() -> None:
    model, _ = quantize_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), Recipe("ternary", last_layer_bits=2))
    nn.init.zeros_(model[1].weight)
    initialize_quantizers(model, torch.randn(16, 8))
    assert not model[1].weight_quantizer.is_ready


def test_a_quantizer_that_has_no_grid_for_its_data_is_named() -> None:
    model, _ = quantize_model(CifarResNet(8, width=4), Recipe(first_layer_bits=None, activation_quantizer="pact"))
    with pytest.raises(UsageError, match=r"^conv1\.input_quantizer: quantizer pact is for values that are never neg"):
        initialize_quantizers(model, images())
