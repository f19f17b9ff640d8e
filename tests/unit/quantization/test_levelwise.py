"""Steps of the input of a layer that is called several times in a pass."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lqkd.errors import UsageError
from lqkd.quantization import LSQ, Recipe, initialize_quantizers, quantize_model
from lqkd.quantization.quantizers import LevelwiseStep
from lqkd.quantization.quantizers.uniform import mse_step

_DRAW = torch.Generator().manual_seed(0)
LEVELS = [times * torch.rand(4, 6, side, side, generator=_DRAW) for times, side in ((1.0, 8), (5.0, 4), (30.0, 2))]


class Shared(nn.Module):
    """One convolution for three levels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(6, 6, 1)
        self.head = nn.Conv2d(6, 6, 3, padding=1)
        self.last = nn.Conv2d(6, 2, 1)

    def forward(self, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> list[torch.Tensor]:
        return [self.last(self.head(level).relu()) for level in (self.first(a).relu(), b, c)]


def fitted(shared: bool, bits: int = 4) -> LevelwiseStep:
    quantizer = LevelwiseStep(bits, calls=3, shared=shared, bound_gradient=False)
    for level in LEVELS:
        quantizer(level)
    return quantizer


def step_gradient(x: torch.Tensor, step: float, largest: int) -> float:
    """The sum of LSQ's equation 3 in float64."""
    ratio = x.double() / step
    inside = (ratio > 0) & (ratio < largest)
    return float(torch.where(inside, ratio.round() - ratio, ratio.clamp(0, largest).round()).sum())


def test_every_call_of_a_pass_is_quantised_as_lsq_would_quantise_it_alone() -> None:
    quantizer = fitted(shared=False)
    for _ in range(2):
        for level in LEVELS:
            alone = LSQ(4, batched=True)
            assert torch.equal(quantizer(level), alone(level))
    assert quantizer.step().shape == (3,)


def test_the_factor_of_a_step_counts_the_features_of_the_calls_that_it_serves() -> None:
    each, one = fitted(shared=False), fitted(shared=True)
    for quantizer in (each, one):
        sum(quantizer(level).sum() for level in LEVELS).backward()  # type: ignore[union-attr]
    features = [6 * 8 * 8, 6 * 4 * 4, 6 * 2 * 2]
    steps = each.scale.detach().double().tolist()
    by_call = [step_gradient(x, s, 15) / math.sqrt(n * 15) for x, s, n in zip(LEVELS, steps, features, strict=True)]
    assert each.scale.grad is not None
    assert each.scale.grad.tolist() == pytest.approx(by_call, rel=1e-4)
    total = sum(step_gradient(x, float(one.scale.detach()), 15) for x in LEVELS) / math.sqrt(sum(features) * 15)
    assert one.scale.grad is not None
    assert float(one.scale.grad) == pytest.approx(total, rel=1e-4)


def test_a_later_call_with_negative_values_makes_the_grid_of_all_signed() -> None:
    quantizer = LevelwiseStep(4, calls=2)
    quantizer(LEVELS[0])
    largest = float(quantizer.step()[0]) * 15
    quantizer(LEVELS[1] - 2)
    assert quantizer.signed is True
    assert float(quantizer.step()[0]) * 7 == pytest.approx(largest)


def test_a_pass_that_was_broken_off_does_not_move_the_levels_of_the_next() -> None:
    quantizer = fitted(shared=False)
    expected = [quantizer(level) for level in LEVELS]
    quantizer(LEVELS[0])  # and then an error
    quantizer.eval()
    assert all(torch.equal(quantizer(level), of) for level, of in zip(LEVELS, expected, strict=True))


def test_a_training_step_that_was_broken_off_does_not_move_the_levels_of_the_next() -> None:
    model, _ = quantize_model(Shared(), Recipe("w4a4", per_level=True))
    initialize_quantizers(model, *LEVELS)
    model.train()
    expected = model(*LEVELS)
    handle = model.last.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(*LEVELS)
    handle.remove()
    assert all(map(torch.equal, model(*LEVELS), expected))


def test_one_step_for_all_calls_is_fitted_to_the_values_of_all() -> None:
    together = torch.cat([level.flatten() for level in LEVELS]).view(1, -1)
    assert torch.equal(fitted(shared=True).scale.detach(), mse_step(together, 0, 15)[0])


def test_the_first_pass_ends_where_its_last_call_is_empty() -> None:
    quantizer = LevelwiseStep(4, calls=2)
    quantizer(LEVELS[0])
    quantizer(LEVELS[1][:0])
    assert quantizer.is_ready


def test_a_copy_with_its_state_goes_on_with_the_same_gradients() -> None:
    one, copied = fitted(shared=True), LevelwiseStep(4, calls=3, shared=True, bound_gradient=False)
    copied.load_state_dict(one.state_dict())
    for quantizer in (one, copied):
        quantizer(LEVELS[0]).sum().backward()
    assert one.scale.grad is not None
    assert copied.scale.grad is not None
    assert torch.equal(one.scale.grad, copied.scale.grad)


def test_a_recipe_chooses_a_step_for_each_level_or_one_for_all() -> None:
    kinds = {}
    for per_level in (None, True, False):
        model, _ = quantize_model(Shared(), Recipe("w4a4", per_level=per_level))
        initialize_quantizers(model, *LEVELS)
        kinds[per_level] = model.head.input_quantizer
    assert type(kinds[None]) is LSQ
    assert (kinds[True].step().shape, kinds[False].step().shape) == ((3,), ())
    with pytest.raises(
        UsageError, match=r"layer 'head': per_level=true is not possible with activation_quantizer='pact'"
    ):
        quantize_model(Shared(), Recipe("w4a4", per_level=True, activation_quantizer="pact"))


def test_the_lowest_code_stays_unused_in_every_call_and_with_the_state() -> None:
    model, plain = (quantize_model(Shared(), Recipe("w8a8", per_level=True, target=t))[0] for t in ("ncnn", None))
    initialize_quantizers(model, *(-level for level in LEVELS))
    plain.load_state_dict(model.state_dict())
    for quantizer in (model.head.input_quantizer, plain.head.input_quantizer):
        assert quantizer.code_range() == quantizer.at(1).code_range() == (-127, 127)


def test_steps_by_level_of_a_network_without_levels_are_refused() -> None:
    with pytest.raises(UsageError, match="per_level=true has no effect: a pass calls each layer once"):
        quantize_model(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), Recipe("w4a4", per_level=True))
