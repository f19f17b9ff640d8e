"""Grids of four and three levels against the papers' formulas in float64: SEQ, absmean, and ggml's TQ2_0."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lqkd.quantization.quantizers import QUANTIZERS, SEQ, TQ2_0, Quantizer

ROWS, WIDTH = 4, 256


def weight(seed: int = 0) -> Tensor:
    """(ROWS, WIDTH) float64, of which groups of 32 differ in size a thousandfold."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-3, 0, ROWS * WIDTH // 32, dtype=torch.float64).repeat_interleave(32).view(ROWS, WIDTH)
    return torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64) * sizes


def built(name: str, group: int, **settings: object) -> Quantizer:
    groups = {"group_size": group} if group < WIDTH or name == "tq2_0" else {}
    quantizer = QUANTIZERS[name](2, signed=True, channels=ROWS * WIDTH // group, **groups, **settings)
    quantizer.initialize(weight())
    return quantizer.double()


def paretoq(x: Tensor, alpha: Tensor, levels: int, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """arXiv 2502.02631, section 4.2, and the gradients of LSQ, value by value; x is (groups, size)."""
    values, gradients, of_alpha = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(alpha)
    for group, row in enumerate(x.tolist()):
        a = float(alpha[group])
        for place, w in enumerate(row):
            ratio = min(max(w / a, -0.99), 0.99)
            shift = 0.5 if levels == 4 else 0.0
            level = (round(ratio * levels / 2 - shift) + shift) / levels * 2
            inside, up = abs(w / a) <= 0.99, float(upstream[group, place])
            values[group, place] = a * level
            gradients[group, place] = up if inside else 0.0
            of_alpha[group] += up * (level - w / a if inside else level)
    return values, gradients, of_alpha / math.sqrt(x.shape[1])


@pytest.mark.parametrize(("ternary", "group"), [(False, 32), (False, WIDTH), (True, 128)])
def test_seq_has_the_values_and_gradients_of_its_formula(ternary: bool, group: int) -> None:
    quantizer = built("seq", group, ternary=ternary)
    x, upstream = weight().requires_grad_(), weight(1)
    quantizer(x).backward(upstream)
    expected = paretoq(
        x.detach().view(-1, group), quantizer.scale.detach(), 3 if ternary else 4, upstream.view(-1, group)
    )
    found = quantizer(x).detach(), x.grad, quantizer.scale.grad
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.view(theirs.shape), theirs)
    assert 0 < (x.grad == 0).double().mean() < 0.3
    codes = quantizer.codes(x)
    assert torch.equal(quantizer.at_codes(codes, x), quantizer(x))


def test_the_range_of_seq_starts_at_the_least_error_or_at_the_largest_magnitude() -> None:
    x = weight().view(-1, 32)
    assert torch.equal(built("seq", 32, initial="max").scale.detach(), x.abs().amax(1).float().double())
    for ternary in (False, True):
        quantizer = built("seq", 32, ternary=ternary)
        error = (quantizer(weight()) - weight()).square().view(-1, 32).sum(1)
        for factor in (0.8, 1.25):
            other = built("seq", 32, ternary=ternary)
            other.scale.data *= factor
            assert (error <= (other(weight()) - weight()).square().view(-1, 32).sum(1)).double().mean() > 0.9


@pytest.mark.parametrize("group", [32, WIDTH])
def test_absmean_rounds_at_half_of_the_mean_magnitude(group: int) -> None:
    quantizer, x = built("absmean", group), weight().requires_grad_()
    rows = x.detach().view(-1, group)
    gamma = rows.abs().mean(1, keepdim=True)
    x_hat = quantizer(x)
    x_hat.backward(weight(1))
    torch.testing.assert_close(x_hat.detach().view(-1, group), gamma * (rows / gamma).round().clamp(-1, 1))
    assert torch.equal(x.grad, weight(1))


def test_tq2_0_trains_as_three_levels_of_seq_on_a_float16_step() -> None:
    quantizer, other = built("tq2_0", WIDTH), built("seq", WIDTH, ternary=True)
    assert isinstance(quantizer, TQ2_0)
    assert isinstance(other, SEQ)
    with torch.no_grad():
        quantizer.scale *= 0.9
        other.scale.copy_(1.5 * quantizer.step())
    gradients = []
    for each in (quantizer, other):
        x = weight().requires_grad_()
        each(x).backward(weight(1))
        gradients.append((each(x).detach(), x.grad, each.scale.grad))
    step = quantizer.step().detach()
    assert torch.equal(step, step.half().double())
    torch.testing.assert_close(gradients[0][0], gradients[1][0])
    assert torch.equal(gradients[0][1], gradients[1][1])
    torch.testing.assert_close(gradients[0][2] * quantizer.start, gradients[1][2] * 1.5)
