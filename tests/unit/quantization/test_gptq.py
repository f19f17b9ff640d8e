"""Weights that are rounded one column after another, each error made up for by what is left."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.models import GPT
from lqkd.quantization import (
    QUANTIZERS,
    Quantizer,
    Recipe,
    gptq,
    gptq_weight,
    initialize_quantizers,
    quantize_model,
)


def inputs(width: int, seed: int = 0) -> Tensor:
    """(4 * width, width) float64 whose columns depend on each other; the third is always zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * width, width, generator=generator, dtype=torch.float64)
    x = x + x @ torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    x[:, 2] = 0.0
    return x


def removed_one_by_one(weight: Tensor, hessian: Tensor, quantizer: Quantizer) -> Tensor:
    """The same without a factor and without blocks: the inverse of what is left after each column, in float64."""
    h, group = hessian.clone(), quantizer.group_size
    energy = h.diagonal().tolist()
    of_group = [sum(energy[i // (group or 1) * (group or 1) :][: group or 1]) for i in range(len(energy))]
    order = sorted(range(len(energy)), key=lambda i: (-of_group[i], -energy[i]))
    w = weight.double()[:, order]
    h[2, 2] = h.diagonal().sum() / (len(h) - 1)
    h = h[order][:, order]
    h += 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    inverse, grid = torch.linalg.inv(h), quantizer
    for i in range(w.shape[1]):
        if group is not None and i % group == 0:
            more = {"ternary": True} if getattr(quantizer, "ternary", False) else {}
            grid = type(quantizer)(quantizer.bits, signed=True, channels=len(w), **more)
            grid.forget(mse=True)
            grid.initialize(w[:, i : i + group].float())
        value = grid(w[:, i : i + 1].float()).double().detach()
        error = (w[:, i : i + 1] - value) / inverse[i, i]
        w[:, i + 1 :] -= error * inverse[i, i + 1 :]
        w[:, i : i + 1] = value
        inverse = inverse - inverse[:, i : i + 1] * inverse[i : i + 1] / inverse[i, i]
    return w[:, torch.tensor(order).argsort()]


@pytest.mark.parametrize(
    ("name", "bits", "width", "group"),
    [("lsq", 3, 160, None), ("q4_0", 4, 160, 32), ("seq", 2, 192, 48), ("tq2_0", 2, 256, 256)],
)
def test_codes_are_those_of_columns_that_are_removed_one_by_one(
    name: str, bits: int, width: int, group: int | None
) -> None:
    weight = torch.randn(6, width, generator=torch.Generator().manual_seed(1))
    x = inputs(width)
    hessian = x.T @ x / len(x)
    size = {} if group is None else {"group_size": group}
    quantizer = QUANTIZERS[name](bits, signed=True, channels=weight.numel() // (group or width), **size)
    quantizer.initialize(weight)
    before = quantizer(weight).detach()
    expected = removed_one_by_one(weight, hessian, quantizer)
    found = gptq_weight(weight, hessian, quantizer)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(quantizer(found).detach(), found, rtol=1e-6, atol=0)
    errors = [(x @ (each - weight).double().T).square().mean() for each in (found, before)]
    assert errors[0] < 0.75 * errors[1]


def test_a_factor_on_the_hessian_changes_nothing_where_an_input_is_always_zero() -> None:
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    hessian = inputs(32).T @ inputs(32)
    quantizer = QUANTIZERS["lsq"](2, signed=True, channels=6)
    quantizer.initialize(weight)
    found = [gptq_weight(weight, hessian * factor, quantizer) for factor in (1.0, 2.0**-24)]
    assert torch.equal(*found)


def test_what_has_no_inverse_is_told_with_the_layer_and_the_damping() -> None:
    recipe = Recipe("w2a32", first_layer_bits=None, last_layer_bits=None)
    model, _ = quantize_model(nn.Sequential(nn.Linear(8, 8)), recipe)
    same = torch.ones(4, 8)
    initialize_quantizers(model, same)
    with pytest.raises(UsageError, match=r"layer '0': GPTQ with damping=0.0 is not possible: too many inputs"):
        gptq(model, [same], damping=0.0)
    for damping in (-1.0, float("nan")):
        with pytest.raises(UsageError, match=f"damping={damping} of GPTQ is not possible: it must be 0 or a positive"):
            gptq(model, [same], damping=damping)


def test_a_language_model_is_nearer_to_the_float_one_and_each_layer_sees_the_codes_before_it() -> None:
    torch.manual_seed(0)
    network, texts = GPT(context=32, width=32, depth=2, heads=2), torch.randint(256, (16, 32))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(3.0)  # logits that say something
    wanted = network(texts)
    model, _ = quantize_model(network, Recipe("w2a32", weight_quantizer="seq", group_size=16))
    initialize_quantizers(model, texts)
    first = model.blocks[0].attention.qkv.weight
    untouched, embedding = first.detach().clone(), model.token.weight.detach().clone()
    rounded = (model(texts) - wanted).square().mean()
    names = gptq(model, [texts[:8], texts[8:]])
    assert names[:2] == ["blocks.0.attention.qkv", "blocks.0.attention.out"]
    assert (len(names), names[-1]) == (9, "head")
    assert not torch.equal(first, untouched)
    assert torch.equal(model.token.weight, embedding)
    assert (model(texts) - wanted).square().mean() < 0.7 * rounded
    block = model.blocks[0]
    codes = block.expand.weight.detach().clone()
    with torch.no_grad():  # of other inputs come other codes
        block.norm2.weight.mul_(torch.linspace(0.1, 2, 32))
    gptq(model, [texts])
    assert not torch.equal(codes, block.expand.weight)


@pytest.mark.parametrize(
    ("network", "settings", "message"),
    [
        (nn.Sequential(nn.Linear(8, 8)), {"weight_quantizer": "absmean"}, "GPTQ is not possible for AbsMean, whose"),
        (nn.Sequential(nn.Conv2d(3, 8, 3)), {}, "GPTQ is not possible for Sequential: it has no linear layer"),
    ],
)
def test_what_it_cannot_calibrate_is_refused(network: nn.Module, settings: dict[str, str], message: str) -> None:
    recipe = Recipe("w2a32", first_layer_bits=None, last_layer_bits=None, **settings)
    with pytest.raises(UsageError, match=message):
        gptq(quantize_model(network, recipe)[0], [torch.randn(2, 8)])


def test_a_layer_whose_input_has_a_step_for_each_call_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.linear(x))

    x = torch.randn(16, 8)
    model, _ = quantize_model(Twice(), Recipe("w4a4", per_level=True))
    initialize_quantizers(model, x)
    with pytest.raises(UsageError, match="layer 'linear', whose input has a step for each call"):
        gptq(model.eval(), [x])


def test_a_layer_that_is_called_by_keyword_is_calibrated_as_any() -> None:
    class ByKeyword(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            return self[1](input=self[0](input=input))

    x, codes = torch.randn(32, 8), []
    for kind in (nn.Sequential, ByKeyword):
        torch.manual_seed(0)
        model, _ = quantize_model(kind(nn.Linear(8, 8), nn.Linear(8, 3)), Recipe("w2a8"))
        initialize_quantizers(model, x)
        gptq(model.eval(), [x])
        codes.append([parameter.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*codes, strict=True))
