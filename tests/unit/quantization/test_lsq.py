"""LSQ against an independent float64 reference of the paper's formulas."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.quantization import LSQ
from lqkd.quantization.quantizers import LSQPowerOfTwo

GRIDS = [(bits, signed) for bits in range(1, 9) for signed in (False, True) if not (bits == 1 and signed)]


def reference(x: Tensor, s: float, bits: int, signed: bool, upstream: Tensor) -> tuple[Tensor, Tensor, float]:
    """Value, input gradient and (unscaled) step gradient of arXiv 1902.08153, eq. 1-3, in float64, value by value."""
    qn, qp = (2 ** (bits - 1), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    values, grads, step_gradient = [], [], 0.0
    for v, g in zip(x.double().flatten().tolist(), upstream.double().flatten().tolist(), strict=True):
        ratio = v / s
        if ratio <= -qn:
            value, grad, slope = -qn * s, 0.0, float(-qn)
        elif ratio >= qp:
            value, grad, slope = qp * s, 0.0, float(qp)
        else:
            value, grad, slope = round(ratio) * s, g, round(ratio) - ratio
        values.append(value)
        grads.append(grad)
        step_gradient += g * slope
    return torch.tensor(values, dtype=torch.float64), torch.tensor(grads, dtype=torch.float64), step_gradient


def ready(bits: int, signed: bool, step: float = 0.375, **arguments: object) -> LSQ:
    quantizer = LSQ(bits, signed=signed, **arguments)
    quantizer.initialize(torch.ones(4))
    quantizer.scale.data.fill_(step)
    return quantizer


@pytest.mark.parametrize("bound_gradient", [False, True])
@pytest.mark.parametrize(("bits", "signed"), GRIDS)
def test_value_and_gradients_equal_the_papers_formula(bits: int, signed: bool, bound_gradient: bool) -> None:
    torch.manual_seed(bits)
    x = (torch.randn(400, dtype=torch.float64) * 0.37 * 2 ** (bits - 1)).requires_grad_()
    upstream = torch.randn(400, dtype=torch.float64)
    quantizer = ready(bits, signed, bound_gradient=bound_gradient).double()
    quantizer(x).backward(upstream)
    value, grad, step_gradient = reference(x.detach(), 0.375, bits, signed, upstream)
    qp = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    torch.testing.assert_close(quantizer(x).detach(), value)
    torch.testing.assert_close(x.grad, grad)
    factor = 1 / math.sqrt(400 * qp)
    if bound_gradient:
        factor = min(factor, 1 / qp**2)
    assert quantizer.scale.grad.item() == pytest.approx(step_gradient * factor, rel=1e-9)


@pytest.mark.parametrize(("bits", "signed"), GRIDS)
def test_forward_is_dequantized_codes_bit_for_bit(bits: int, signed: bool) -> None:
    quantizer = ready(bits, signed)
    x = torch.cat([torch.randn(1000), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30])])
    assert torch.equal(quantizer(x).view(torch.int32), quantizer.dequantize(quantizer.codes(x)).view(torch.int32))


@pytest.mark.parametrize(("bits", "signed"), GRIDS)
def test_output_takes_every_level_and_no_other(bits: int, signed: bool) -> None:
    quantizer = ready(bits, signed)
    found = quantizer(torch.linspace(-120, 120, 20001)).detach().unique()
    torch.testing.assert_close(found, quantizer.levels().detach(), rtol=0, atol=0)
    assert len(found) == 2**bits


def test_step_starts_where_no_other_step_has_a_smaller_error() -> None:
    x = torch.randn(1000)
    quantizer = LSQ(4, signed=True)
    quantizer.initialize(x)

    def error(step: float) -> float:
        return float(((x / step).clamp(-8, 7).round() * step - x).square().mean())

    assert error(quantizer.scale.item()) <= 1.01 * min(error(step) for step in torch.linspace(0.01, 1, 500).tolist())


def test_step_starts_at_twice_the_mean_magnitude_over_root_qp_where_asked() -> None:
    x = torch.randn(1000)
    quantizer = LSQ(4, signed=True, initial="mean")
    quantizer.initialize(x)
    assert quantizer.scale.item() == pytest.approx(2 * x.abs().mean().item() / math.sqrt(7), rel=1e-5)


def test_an_unknown_initial_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="initial='max' of quantizer LSQ is not possible: use mse or mean"):
        LSQ(4, initial="max")


def test_each_channel_has_its_own_step_and_element_count() -> None:
    weight = torch.randn(3, 2, 5, 5) * torch.tensor([0.01, 1.0, 100.0]).view(3, 1, 1, 1)
    together = LSQ(4, signed=True, channels=3)
    together(weight).square().sum().backward()
    for channel in range(3):
        alone = LSQ(4, signed=True)
        alone(weight[channel]).square().sum().backward()
        assert together.scale[channel].item() == pytest.approx(alone.scale.item(), rel=1e-5)
        assert together.scale.grad[channel].item() == pytest.approx(alone.scale.grad.item(), rel=1e-3)


def test_step_gradient_of_activations_counts_features_and_not_samples() -> None:
    x = torch.rand(1, 30)
    one, eight = ready(4, False, batched=True), ready(4, False, batched=True)
    one(x).mean().backward()
    eight(x.repeat(8, 1)).mean().backward()
    torch.testing.assert_close(one.scale.grad, eight.scale.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_output_has_the_inputs_dtype_and_float32_codes(dtype: torch.dtype) -> None:
    quantizer = ready(8, True, step=0.125)
    x = torch.randn(500).to(dtype)
    assert quantizer(x).dtype == dtype
    assert torch.equal(quantizer.codes(x), quantizer.codes(x.float()))


def test_sign_is_chosen_from_the_first_training_batch_and_survives_a_checkpoint() -> None:
    unsigned, signed = LSQ(4), LSQ(4)
    unsigned(torch.rand(50))
    signed(torch.randn(50))
    assert (unsigned.signed, signed.signed) == (False, True)
    fresh = LSQ(4)
    fresh.load_state_dict(signed.state_dict())
    x = torch.randn(20)
    assert fresh.signed is True
    assert torch.equal(fresh(x), signed(x))


def test_eval_mode_writes_nothing() -> None:
    quantizer = LSQ(4).eval()
    before = copy.deepcopy(quantizer.state_dict())
    x = torch.randn(10)
    with torch.inference_mode():
        assert torch.equal(quantizer(x), x)
    assert all(torch.equal(before[key], value) for key, value in quantizer.state_dict().items())


def test_an_all_zero_first_batch_is_not_taken_for_data() -> None:
    quantizer = LSQ(4)
    assert torch.equal(quantizer(torch.zeros(8)), torch.zeros(8))
    assert not quantizer.initialized
    x = torch.randn(100)
    assert (quantizer(x) - x).abs().mean() < x.abs().mean()


def test_a_dead_channel_gets_step_one_and_stays_zero() -> None:
    weight = torch.randn(2, 10)
    weight[1] = 0
    quantizer = LSQ(4, signed=True, channels=2)
    assert torch.equal(quantizer(weight)[1], torch.zeros(10))
    assert quantizer.scale[1] == 1


def test_step_stays_positive_and_finite_under_a_huge_learning_rate() -> None:
    quantizer = ready(4, True)
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=10.0)
    x = torch.randn(256)
    for _ in range(50):
        loss = (quantizer(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert torch.isfinite(loss)
        assert quantizer.step().item() > 0


@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_extreme_magnitudes_quantize_like_ordinary_ones(magnitude: float) -> None:
    x = torch.randn(200)
    ordinary, extreme = LSQ(4), LSQ(4)
    ordinary(x)
    extreme(x * magnitude)
    assert (ordinary.codes(x) - extreme.codes(x * magnitude)).abs().max() <= 1


def test_changing_bits_keeps_the_range_that_is_clipped_to() -> None:
    quantizer = ready(8, True)
    before = quantizer.levels().max().item()
    quantizer.set_bits(4)
    assert quantizer.bits == 4
    assert quantizer.levels().max().item() == pytest.approx(before, rel=1e-6)


@pytest.mark.parametrize("bits", [0, 9, -1, 2.5, True])
def test_impossible_bits_are_refused(bits: object) -> None:
    with pytest.raises(UsageError, match=r"bits=.* from 1 to 8"):
        LSQ(bits)  # type: ignore[arg-type]


def test_one_signed_bit_is_refused() -> None:
    with pytest.raises(UsageError, match="bits=1 is not possible for signed LSQ"):
        LSQ(1, signed=True)


def test_uninitialised_training_keeps_the_step_in_the_graph() -> None:
    quantizer = LSQ(4)
    x = torch.zeros(4, requires_grad=True)
    quantizer(x).sum().backward()
    assert quantizer.scale.grad is not None


@pytest.mark.parametrize(("bits", "signed"), [(2, True), (3, False), (4, True), (8, True)])
def test_a_power_of_two_starts_as_the_one_with_the_least_squared_error(bits: int, signed: bool) -> None:
    rows = torch.randn(4, 300, generator=torch.Generator().manual_seed(bits)) * torch.tensor([[0.03], [0.4], [1], [9]])
    rows = rows if signed else rows.abs()
    quantizer = LSQPowerOfTwo(bits, signed=signed, channels=4)
    quantizer.initialize(rows)
    qn, qp = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    for row, step in zip(rows.double(), quantizer.step().tolist(), strict=True):
        errors = {
            2.0**k: float(((row / 2.0**k).clamp(qn, qp).round() * 2.0**k - row).square().sum()) for k in range(-14, 6)
        }
        assert step == min(errors, key=errors.__getitem__)


def test_a_power_of_two_keeps_its_range_when_bits_change() -> None:
    quantizer = LSQPowerOfTwo(8, signed=True)
    quantizer.initialize(torch.randn(300, generator=torch.Generator().manual_seed(0)))
    step = quantizer.step().item()
    quantizer.set_bits(4)
    assert quantizer.step().item() == 16 * step
