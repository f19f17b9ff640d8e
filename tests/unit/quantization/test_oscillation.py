"""Oscillation, dampening and freezing against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lqkd.quantization import LSQ, QuantLinear
from lqkd.quantization.analysis.oscillation import Freezing, Oscillation, dampening_loss, refusal
from lqkd.quantization.quantizers import QUANTIZERS


def layer_of(*weights: float, step: float = 1.0, bits: int = 3) -> QuantLinear:
    """One output channel with these weights on the grid -4 ... 3 times ``step``."""
    linear = nn.Linear(len(weights), 1, bias=False)
    quantizer = LSQ(bits, signed=True)
    layer = QuantLinear.from_float(linear, quantizer, None)
    assert isinstance(layer, QuantLinear)
    put(layer, *weights)
    quantizer.initialize(layer.weight)
    with torch.no_grad():
        quantizer.scale.fill_(step)
    return layer


def put(layer: QuantLinear, *weights: float) -> None:
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([weights]))


def test_a_weight_oscillates_when_it_turns_back_and_only_then() -> None:
    layer, state = layer_of(0.4, 0.4, 0.4), Oscillation()
    assert state.observe(layer) is None
    seen = []
    # The first goes to 1 and back to 0; the second climbs; the third rests for a step between up and down.
    for weights in ((0.6, 0.6, 0.6), (0.4, 1.6, 0.6), (0.4, 2.6, 0.4)):
        put(layer, *weights)
        flipped = state.observe(layer)
        assert flipped is not None
        seen.append((flipped[0].tolist(), state.tensors["frequency"][0].tolist()))
    assert seen[0] == ([True, True, True], [0, 0, 0])
    assert seen[1] == ([True, True, False], pytest.approx([0.01, 0, 0]))
    assert seen[2] == ([False, True, True], pytest.approx([0.0099, 0, 0.01]))
    assert state.oscillating(0.0099)[0].tolist() == [False, False, True]
    assert state.tensors["average"][0].tolist() == pytest.approx([0.009801, 0.059601, 0.019701], rel=1e-4)


def test_counting_starts_anew_at_a_change_of_bits() -> None:
    layer, state = layer_of(0.4), Oscillation()
    for weight in (0.4, 0.6, 0.4):
        put(layer, weight)
        state.observe(layer)
    assert state.tensors["frequency"].item() > 0
    layer.weight_quantizer.set_bits(2)
    assert state.observe(layer) is None
    assert state.tensors["frequency"].item() == 0
    assert state.bits == 2


def test_the_state_goes_on_from_what_was_saved() -> None:
    layer, whole, first = layer_of(0.4, 0.4), Oscillation(), Oscillation()
    for weight in (0.4, 0.6, 0.4):
        put(layer, weight, 0.4)
        whole.observe(layer)
        first.observe(layer)
    second = Oscillation()
    second.load_state_dict(first.state_dict())
    put(layer, 0.6, 0.6)
    whole.observe(layer)
    second.observe(layer)
    assert whole.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(whole.tensors[name], second.tensors[name]) for name in whole.tensors)


def test_dampening_pulls_to_the_level_within_the_range_and_trains_nothing_else() -> None:
    layer = layer_of(0.15, -0.3, 9.0, step=0.5)
    loss = dampening_loss(layer)
    # Levels 0, -0.5 and 1.5; the last weight is clipped to 1.5 and costs nothing.
    assert loss.item() == pytest.approx(0.15**2 + 0.2**2)
    loss.backward()
    assert layer.weight.grad[0].tolist() == pytest.approx([0.3, 0.4, 0.0])
    assert layer.weight_quantizer.scale.grad is None


def frozen_layer() -> tuple[QuantLinear, Freezing]:
    """Weights near 0, -1 and 2 at step 1, of which the first turned back and is frozen at 0."""
    layer, state = layer_of(0.4, -1.2, 2.3), Freezing()
    state.observe(layer)
    for weight in (0.6, 0.4):
        put(layer, weight, -1.2, 2.3)
        state.observe(layer)
    state.freeze(0.005)
    state.hold(layer)
    layer.weight_quantizer.register_forward_hook(state)
    return layer, state


def test_only_what_oscillates_is_frozen_and_at_its_average_integer() -> None:
    layer, state = frozen_layer()
    assert state.tensors["frozen"][0].tolist() == [True, False, False]
    assert layer.weight[0].tolist() == pytest.approx([0.0, -1.2, 2.3])
    put(layer, 2.9, -1.2, 2.3)
    state.hold(layer)
    assert layer.weight[0, 0].item() == 0


def test_a_frozen_weight_stays_frozen_when_it_has_come_to_rest() -> None:
    layer, state = frozen_layer()
    for _ in range(300):
        state.observe(layer)
    state.freeze(0.005)
    assert state.tensors["frequency"].max() < 0.005
    assert state.tensors["frozen"][0].tolist() == [True, False, False]


def test_a_frozen_weight_moves_with_the_step() -> None:
    layer, state = frozen_layer()
    state.tensors["integer"][0, 0] = -3
    with torch.no_grad():
        layer.weight_quantizer.scale.fill_(0.7)
    state.hold(layer)
    assert layer.weight[0, 0].item() == pytest.approx(-2.1)
    assert layer.weight_quantizer.codes(layer.weight)[0, 0] == -3


@pytest.mark.parametrize("integer", [-4, -1, 2, 3])
def test_frozen_weights_have_no_gradient_and_give_the_step_that_of_a_fixed_integer(integer: int) -> None:
    layer, state = frozen_layer()
    state.tensors["integer"][0, 0] = integer
    state.hold(layer)
    values = layer.quantized_weight()
    assert values[0, 0].item() == integer
    values[0, 0].backward()
    assert layer.weight.grad[0].tolist() == [0, 0, 0]
    assert layer.weight_quantizer.scale.grad.item() == pytest.approx(integer / 3**2)  # at most 1 / Q_P**2


def test_the_values_of_a_frozen_layer_are_those_of_its_codes_bit_for_bit() -> None:
    layer, state = frozen_layer()
    with torch.no_grad():
        layer.weight_quantizer.scale.fill_(0.1234567)
    state.hold(layer)
    codes = layer.weight_quantizer.codes(layer.weight)
    assert codes[0, 0] == 0
    assert torch.equal(layer.quantized_weight(), layer.weight_quantizer.dequantize(codes))


def test_a_change_of_bits_releases_what_was_frozen() -> None:
    layer, state = frozen_layer()
    layer.weight_quantizer.set_bits(2)
    put(layer, 2.9, -1.2, 2.3)
    state.hold(layer)
    assert layer.weight[0, 0].item() == pytest.approx(2.9)
    assert layer.quantized_weight()[0, 0].item() == pytest.approx(3.0)  # the largest level of two bits
    state.observe(layer)
    assert not state.tensors["frozen"].any()


def test_families_whose_levels_follow_the_weights_are_refused() -> None:
    fitting = {n for n, family in QUANTIZERS.items() if not refusal(family.__new__(family))}
    stepped = {"lsq", "lsq_ewgs", "lsq_plus", "lsq_power_of_two", "minmax", "mse", "pact", "seq"}
    assert fitting == stepped | {"q4_0", "q8_0", "tq2_0"}
