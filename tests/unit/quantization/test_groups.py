"""Grids of groups along the input axis, and those of GGUF's blocks, against float64 references."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.export import deploy
from lqkd.modules.step_length import measured_together
from lqkd.quantization import Recipe, Rule, initialize_quantizers, quantize_model, size
from lqkd.quantization.analysis.oscillation import dampening_loss
from lqkd.quantization.quantizers import QUANTIZERS, Quantizer
from lqkd.quantization.quantizers.blocks import BlockFormat

WIDTH, ROWS = 96, 4
RANGES = {"lsq": (-8, 7), "lsq_ewgs": (-8, 7), "q4_0": (-8, 7), "q8_0": (-127, 127)}
BITS = {"q8_0": 8}


def weight(seed: int = 0) -> Tensor:
    """(ROWS, WIDTH), of which groups differ in size a thousandfold."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-3, 0, ROWS * WIDTH // 32).repeat_interleave(32).view(ROWS, WIDTH)
    return torch.randn(ROWS, WIDTH, generator=generator) * sizes


def grouped(name: str, group: int = 32, x: Tensor | None = None) -> Quantizer:
    x = weight() if x is None else x
    quantizer = QUANTIZERS[name](BITS.get(name, 4), signed=True, channels=x.numel() // group, group_size=group)
    quantizer.initialize(x)
    return quantizer


def reference(x: Tensor, steps: Tensor, group: int, ends: tuple[int, int], upstream: Tensor) -> tuple[Any, Any, Any]:
    """Values, input gradients and step gradients of arXiv 1902.08153, eq. 1-3, value by value in float64."""
    low, high = ends
    values, gradients, of_steps = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(steps)
    for row in range(x.shape[0]):
        for column in range(x.shape[1]):
            place = row * (x.shape[1] // group) + column // group
            step, up = float(steps[place]), float(upstream[row, column])
            ratio = float(x[row, column]) / step
            inside = low < ratio < high
            code = round(min(max(ratio, low), high))
            values[row, column] = code * step
            gradients[row, column] = up if inside else 0.0
            of_steps[place] += up * (code - ratio if inside else code)
    largest = high
    return values, gradients, of_steps * min(1 / math.sqrt(group * largest), 1 / largest**2)


@pytest.mark.parametrize(("name", "group"), [("lsq", 32), ("lsq", 48), ("q4_0", 32), ("q8_0", 32)])
def test_values_and_gradients_are_those_of_one_grid_a_group(name: str, group: int) -> None:
    quantizer = grouped(name, group).double()
    x, upstream = weight().double().requires_grad_(), weight(1).double()
    with torch.no_grad():
        quantizer.scale *= 0.7  # so that some values clip
    quantizer(x).backward(upstream)
    steps = quantizer.step().detach()
    assert name != "q4_0" or 0 < (steps < 0).sum() < len(steps)
    values, gradients, of_steps = reference(x.detach(), steps, group, RANGES[name], upstream)
    torch.testing.assert_close(quantizer(x).detach(), values)
    torch.testing.assert_close(x.grad, gradients)
    if isinstance(quantizer, BlockFormat):
        of_steps = of_steps / quantizer.start  # so that SGD moves the step as LSQ does
    torch.testing.assert_close(quantizer.scale.grad, of_steps)


@pytest.mark.parametrize("name", ["lsq", "lsq_plus", "lsq_ewgs", "minmax", "mse", "q4_0", "q8_0"])
def test_every_method_takes_the_weight_as_it_is(name: str) -> None:
    quantizer, x = grouped(name), weight(2)
    x_hat, codes = quantizer(x), quantizer.codes(x)
    assert x_hat.shape == codes.shape == x.shape
    assert torch.equal(x_hat.view(torch.int32), quantizer.dequantize(codes).view(torch.int32))
    assert torch.equal(quantizer.at_codes(codes, x), x_hat)
    assert torch.isin(x_hat.view(-1, 32)[5], quantizer.levels()[5]).all()


@pytest.mark.parametrize("name", ["lsq", "mse"])
def test_a_group_as_wide_as_the_weight_is_a_channel(name: str) -> None:
    channels = QUANTIZERS[name](4, signed=True, channels=ROWS)
    channels.initialize(weight())
    assert torch.equal(channels(weight()), grouped(name, WIDTH)(weight()))


@pytest.mark.parametrize("name", ["q4_0", "q8_0"])
def test_a_block_starts_where_ggml_rounds(name: str) -> None:
    """Steps to the bit; codes but for those that the float16 step moves over half way, by one."""
    gguf = pytest.importorskip("gguf")
    x = weight()
    kind = gguf.GGMLQuantizationType[name.upper()]
    packed = gguf.quants.quantize(x.numpy(), kind).reshape(-1, gguf.GGML_QUANT_SIZES[kind][1])
    steps = np.ascontiguousarray(packed[:, :2]).view(np.float16).ravel().astype(np.float32)
    quantizer = grouped(name)
    assert np.array_equal(quantizer.step().detach().numpy(), steps)
    theirs = torch.from_numpy(gguf.quants.dequantize(packed, kind)).view(ROWS, WIDTH)
    apart = ((quantizer(x).detach() - theirs).view(-1, 32) / torch.from_numpy(steps).unsqueeze(1)).round().abs()
    assert apart.max() <= 1
    assert apart.mean() < 0.02


@pytest.mark.parametrize("name", ["q4_0", "q8_0"])
def test_a_step_is_a_float16_number_whatever_training_makes_of_it(name: str) -> None:
    quantizer = grouped(name)
    with torch.no_grad():
        quantizer.start.fill_(1.0)
        quantizer.scale.copy_(torch.tensor([0.0, -0.0, 1e-9, -1e-9, 1e9, -1e9, 0.1, -0.1, 6e-8, 3e-6, 1.0, -1.0]))
    step = quantizer.step().detach()
    assert torch.equal(step, step.half().float())
    assert (step != 0).all()
    assert quantizer(weight()).isfinite().all()


def test_the_grid_of_the_least_error_turns_to_the_longer_side() -> None:
    longer = torch.arange(-7, 9).repeat(2) / 8.0
    x = torch.stack([longer, -longer])
    for mse in (False, True):
        quantizer = QUANTIZERS["q4_0"](4, channels=2, group_size=32)
        quantizer.forget(mse)
        quantizer.initialize(x)
        assert quantizer.step().tolist() == [-0.125, 0.125]


def test_a_step_of_sgd_moves_the_step_of_a_block_as_that_of_lsq() -> None:
    moved = []
    for name in ("lsq", "q4_0"):
        quantizer = grouped(name)
        with torch.no_grad():
            (quantizer.start if name == "q4_0" else quantizer.scale).copy_(torch.linspace(0.1, 0.4, 12).half())
        optimizer = torch.optim.SGD(quantizer.parameters(), lr=1.0)
        (quantizer(torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))) * 0.05).sum().backward()
        before = quantizer.step().detach()
        optimizer.step()
        moved.append(quantizer.step().detach() - before)
    assert moved[0].abs().max() > 0.02
    torch.testing.assert_close(*moved, rtol=0, atol=2e-4)  # float16 numbers there


def test_a_step_of_adam_moves_the_step_of_a_block_by_a_share_of_it() -> None:
    quantizer = grouped("q8_0")
    before = quantizer.step().detach()
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.01)
    quantizer(weight(3)).square().sum().backward()
    optimizer.step()
    assert ((quantizer.step() / before - 1).abs() < 0.011).all()


def linears(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))


def test_a_recipe_gives_groups_to_every_linear_layer_and_rules_change_them() -> None:
    recipe = Recipe("w4a32", group_size=32, rules=[Rule("1", group_size=64)])
    model, report = quantize_model(linears(64, 64, 32), recipe)
    assert [row.note for row in report.layers] == [
        "weight LSQ in groups of 32, input LSQ per tensor",
        "weight LSQ in groups of 64, input LSQ per tensor",
    ]
    assert [layer.weight_quantizer.scale.shape for layer in model] == [(128,), (32,)]


@pytest.mark.parametrize(
    ("network", "settings", "message"),
    [
        (linears(48, 8), {"group_size": 32}, "layer '0': group_size=32 is not possible for inputs of width 48"),
        (linears(64, 8), {"group_size": 1}, "group_size=1 is not possible: it is a whole number from 2 on"),
        (linears(64, 8), {"group_size": 32, "per_channel": False}, "group_size=32 is not possible with per_channel"),
        (
            linears(64, 8),
            {"group_size": 32, "weight_quantizer": "apot"},
            "quantizer APoT, which has no groups: use absmean, lsq",
        ),
        (linears(64, 8), {"group_size": 64, "weight_quantizer": "q4_0"}, "'q4_0', whose blocks are of 32"),
        (linears(64, 8), {"weight_quantizer": {"name": "lsq", "group_size": 32}}, "argument group_size of quantizer"),
        (nn.Sequential(nn.Conv2d(32, 8, 3)), {"group_size": 32}, "group_size=32 is not possible for a Conv2d"),
        (nn.Sequential(nn.Conv2d(32, 8, 3)), {"bits": "q4_0"}, "'q8_0' is not possible for a Conv2d"),
        (linears(48, 8), {"bits": "q4_0"}, "'q8_0' is not possible for inputs of width 48"),
        (linears(64, 8), {"bits": "q4_0", "group_size": 64}, "group_size=64 is not possible with bits='q4_0'"),
        (linears(64, 8), {"bits": "q4_0", "weight_quantizer": "lsq"}, "weight_quantizer='lsq' is not possible with"),
        (linears(64, 8), {"bits": "q4_0", "rules": [Rule("0", weight_bits=3)]}, "weight_bits=3 of layer '0'"),
        (linears(64, 64, 64, 8), {"bits": "tq2_0"}, "'tq2_0' is not possible for inputs of width 64: groups of 256"),
        (linears(64, 8), {"weight_quantizer": "q4_0"}, "bits=8 is not possible: quantizer q4_0 has a grid for bits=4"),
        (linears(64, 8), {"activation_quantizer": "q8_0"}, "quantizer q8_0 is for weights"),
    ],
)
def test_groups_that_cannot_be_are_refused(network: nn.Module, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        quantize_model(network, Recipe(**{"bits": "w4a32", **settings}))


def test_layers_that_share_a_weight_are_refused_different_groups() -> None:
    model = nn.Sequential(nn.Embedding(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    with pytest.raises(UsageError, match="share one weight but the recipe gives them group_size="):
        quantize_model(model, Recipe("w4a32", rules=[Rule("Linear", group_size=32)]))
    quantize_model(model, Recipe("w4a32", group_size=32))
    assert model[0].weight_quantizer is model[1].weight_quantizer


def test_the_grid_of_a_file_is_for_weights_with_8_bits_at_the_ends() -> None:
    model = nn.Sequential(nn.Embedding(64, 64), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    model, _ = quantize_model(model, Recipe("q4_0"))
    kinds = [type(layer.weight_quantizer).__name__ for layer in model]
    assert kinds == ["Q8_0", "Q4_0", "Q4_0", "Q8_0"]
    assert all(layer.input_quantizer is None for layer in model)


def test_the_size_counts_every_step_and_two_bytes_of_those_in_a_file() -> None:
    for recipe, each in ((Recipe("w4a32", group_size=32), 4), (Recipe("q4_0"), 2)):
        recipe.first_layer_bits = recipe.last_layer_bits = None
        model, _ = quantize_model(nn.Sequential(nn.Linear(64, 32, bias=False)), recipe)
        assert size(model).packed_bytes == 64 * 32 // 2 + 64 * each


def test_a_weight_of_zeros_gets_the_grid_of_its_own_initialisation() -> None:
    starts = []
    for group in (None, 16):
        layer = nn.Linear(64, 8)
        nn.init.zeros_(layer.weight)
        model, _ = quantize_model(nn.Sequential(layer), Recipe("w8a32", group_size=group))
        initialize_quantizers(model, torch.randn(4, 64))
        starts.append(float(model[0].weight_quantizer.step().detach().mean()))
    assert starts[1] == pytest.approx(starts[0], rel=0.1)  # a group of 16 has a smaller largest one of all 64


def test_dampening_pulls_a_weight_within_a_negative_step_to_its_level() -> None:
    model, _ = quantize_model(linears(32, 4), Recipe("q4_0", first_layer_bits=None, last_layer_bits=None))
    initialize_quantizers(model, torch.randn(4, 32))
    layer, quantizer = model[0], model[0].weight_quantizer
    assert (quantizer.step() < 0).any()
    levels = quantizer.levels()  # one block a row
    clipped = torch.minimum(torch.maximum(layer.weight, levels[:, :1]), levels[:, -1:])
    torch.testing.assert_close(dampening_loss(layer), (quantizer(layer.weight) - clipped).square().sum())


def test_an_integer_file_of_groups_is_refused() -> None:
    model, _ = quantize_model(linears(64, 8), Recipe("w4a8", group_size=32))
    initialize_quantizers(model, torch.randn(4, 64))
    with pytest.raises(UsageError, match="the weight of 0 has a grid per 32 inputs, which an integer layer does not"):
        deploy(model, torch.randn(4, 64))


def test_the_step_of_a_group_does_not_depend_on_how_many_others_there_are() -> None:
    weight = torch.randn(4096, 256, generator=torch.Generator().manual_seed(0))  # so large that searches look at a part
    whole, alone = (grouped("lsq", x=rows) for rows in (weight, weight[:8]))
    torch.testing.assert_close(whole.step()[:64], alone.step())


def test_steps_of_blocks_which_are_learned_by_shares_are_in_no_norm_of_gradients() -> None:
    network, _ = quantize_model(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 4)), Recipe("q4_0"))
    initialize_quantizers(network, torch.randn(2, 32))
    together = {id(parameter) for parameter in measured_together(network, network.parameters())}
    apart = [name for name, parameter in network.named_parameters() if id(parameter) not in together]
    assert apart == ["0.weight_quantizer.scale", "1.weight_quantizer.scale"]
