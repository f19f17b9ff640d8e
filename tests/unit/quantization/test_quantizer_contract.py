"""The contract of every registered quantizer in each of its roles.

At the fewest bits for which it has a grid, at the most, and at one number between, in one test; levels are counted at
every number of bits, and what hypothesis draws is drawn from all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.quantization.quantizers import Q4_0, QUANTIZERS, APoT, Quantizer


@dataclass(frozen=True, order=True)
class Case:
    """One quantizer in one of its roles."""

    name: str
    role: str
    bits: int

    def build(self, bits: int | None = None) -> Quantizer:
        arguments = {
            "weight": {"signed": True},
            "channels": {"signed": True, "channels": 4},
            "positive": {"batched": True},
            "signed": {"batched": True},
        }[self.role]
        return QUANTIZERS[self.name](bits or self.bits, **arguments)

    def data(self, seed: int = 0) -> Tensor:
        x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
        return x.relu() if self.role == "positive" else x

    def __str__(self) -> str:
        return f"{self.name}-{self.role}-{self.bits}"


def _possible(case: Case) -> bool:
    try:
        case.build().initialize(case.data())
    except UsageError:
        return False
    return True


ROLES = ("weight", "channels", "positive", "signed")
# "dynamic" has no grid but that of the tensor at hand: tests/unit/quantization/test_dynamic.py.
EVERY = [
    Case(name, role, bits) for name in sorted(QUANTIZERS.keys() - {"dynamic"}) for role in ROLES for bits in range(1, 9)
]
CASES = [case for case in EVERY if _possible(case)]
PAIRS = sorted({(case.name, case.role) for case in CASES})


def cases_of(pair: tuple[str, str]) -> list[Case]:
    return [case for case in CASES if (case.name, case.role) == pair]


def ends_and_middle(pair: tuple[str, str]) -> list[Case]:
    """At the fewest bits, at the most that are at most 4, and at the most."""
    cases = cases_of(pair)
    return list(dict.fromkeys([cases[0], usual(pair), cases[-1]]))


def usual(pair: tuple[str, str]) -> Case:
    return max([case for case in cases_of(pair) if case.bits <= 4], default=cases_of(pair)[0])


# x_hat is no fixed point where the scale or the threshold is measured on the tensor, where the grid is on another
# scale than the weight, where thresholds are learned apart from the values (n2uq), and for a sign whose shift was
# fitted to data that are never negative.
NOT_IDEMPOTENT = {
    (name, role) for name in ("absmean", "apot", "dorefa", "irnet", "n2uq", "ttq", "twn") for role in ROLES[:2]
}
NOT_IDEMPOTENT |= {("n2uq", "positive"), ("n2uq", "signed"), ("react", "positive")}

every_pair = pytest.mark.parametrize("pair", PAIRS, ids="-".join)


def at_each(
    choose: Callable[[tuple[str, str]], list[Case]],
) -> Callable[[Callable[[Case], None]], Callable[[tuple[str, str]], None]]:
    """Make one test a pair of a test of a case: for each of the cases that ``choose`` gives for the pair."""

    def for_each_pair(test: Callable[[Case], None]) -> Callable[[tuple[str, str]], None]:
        @pytest.mark.parametrize("pair", [pair for pair in PAIRS if choose(pair)], ids="-".join)
        def run(pair: tuple[str, str]) -> None:
            for case in choose(pair):
                test(case)

        return run

    return for_each_pair


every_case = at_each(ends_and_middle)
one_width = at_each(lambda pair: [usual(pair)])
every_grid_per_channel = at_each(lambda pair: ends_and_middle(pair) if pair[1] == "channels" else [])
every_grid_per_tensor = at_each(lambda pair: ends_and_middle(pair) if pair[1] != "channels" else [])


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def fitted(case: Case) -> Quantizer:
    quantizer = case.build()
    quantizer(case.data())
    assert quantizer.initialized
    return quantizer


def falling(quantizer: Quantizer) -> bool:
    """Whether codes fall where values rise, as where ggml's Q4_0 turns its longer side up."""
    return isinstance(quantizer, Q4_0) and bool((quantizer.step() < 0).all())


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.detach().view(torch.int32), b.detach().view(torch.int32))


def test_every_quantizer_has_a_role() -> None:
    assert {case.name for case in CASES} == QUANTIZERS.keys() - {"dynamic"}


@every_case
def test_output_is_dequantized_codes_within_range_and_levels(case: Case) -> None:
    quantizer = fitted(case)
    edges = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30]).repeat(50).view(4, 3, 5, 5)
    for x in (case.data(1), case.data(1) * 50, edges):
        x_hat, codes = quantizer(x), quantizer.codes(x)
        assert same_bits(x_hat, quantizer.dequantize(codes))
        assert codes.dtype == torch.int32
        assert codes.shape == x.shape == x_hat.shape
        low, high = quantizer.code_range()
        assert low <= codes.min() <= codes.max() <= high
        assert high - low < 2**case.bits
        levels = quantizer.levels().detach().reshape(-1, quantizer.levels().shape[-1])
        assert levels.shape[-1] == high - low + 1
        assert (levels.diff(dim=-1) > 0).all()
        for row, values in zip(levels.expand(4, -1), x_hat.detach(), strict=True):
            assert torch.isin(values, row).all()
    everything = torch.arange(low, high + 1)
    if quantizer.channels is None:
        values = quantizer.dequantize(everything)
        assert same_bits(values.flip(0) if falling(quantizer) else values, quantizer.levels().float())


@every_pair
@settings(max_examples=40, deadline=None)
@given(choice=st.data(), values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_any_finite_tensor_at_any_number_of_bits_keeps_the_contract(
    pair: tuple[str, str], choice: st.DataObject, values: list[float]
) -> None:
    quantizer = fitted(choice.draw(st.sampled_from(cases_of(pair)))).eval()
    x = torch.tensor(values).repeat(4, 1)
    x_hat, codes = quantizer(x), quantizer.codes(x)
    low, high = quantizer.code_range()
    assert x_hat.isfinite().all()
    assert same_bits(x_hat, quantizer.dequantize(codes))
    assert low <= codes.min() <= codes.max() <= high
    levels = quantizer.levels()
    assert levels.min() <= x_hat.min() <= x_hat.max() <= levels.max()
    if pair not in NOT_IDEMPOTENT:
        assert same_bits(quantizer(x_hat), x_hat)


@every_pair
@settings(max_examples=25, deadline=None)
@given(choice=st.data(), values=st.lists(st.floats(-8, 8, width=32), min_size=2))
def test_codes_never_fall_where_the_input_rises(
    pair: tuple[str, str], choice: st.DataObject, values: list[float]
) -> None:
    quantizer = fitted(choice.draw(st.sampled_from(cases_of(pair)))).eval()
    x = torch.tensor(sorted(values)).repeat(4, 1)
    rise = quantizer.codes(x).diff(dim=1)
    if isinstance(quantizer, Q4_0):
        rise = rise * quantizer.step().sign().expand(4).unsqueeze(1)
    assert (rise >= 0).all()


LEVELS = {"apot": lambda bits, signed: 2**bits - signed, "twn": lambda bits, signed: 3, "ttq": lambda bits, signed: 3}
LEVELS |= dict.fromkeys(("absmean", "tq2_0"), lambda bits, signed: 3)
LEVELS["q8_0"] = lambda bits, signed: 255


@at_each(cases_of)  # what is wrong at one number of bits alone is wrong in its levels
def test_a_grid_has_the_promised_number_of_levels_and_each_is_reached(case: Case) -> None:
    quantizer = fitted(case)
    if case.name == "react" and case.role in ("positive", "signed"):
        expected = 2
    else:
        signed = case.role != "positive"
        expected = LEVELS.get(case.name, lambda bits, signed: 2**bits)(case.bits, signed)
    assert quantizer.levels().shape[-1] == expected
    wide = (40 * torch.linspace(-1, 1, 80001) ** 5).repeat(4, 1)  # dense around zero, and beyond three deviations
    found = quantizer.codes(wide)
    assert len(found.unique()) == expected == quantizer.code_range()[1] - quantizer.code_range()[0] + 1


@every_grid_per_channel
def test_a_grid_per_channel_is_one_grid_for_each_channel_alone(case: Case) -> None:
    """Values, codes, input gradients and parameter gradients in float64."""
    x = case.data().double() * torch.tensor([1e-3, 0.1, 1.0, 30.0]).view(4, 1, 1, 1).double()
    upstream = case.data(7).double()
    together = case.build()
    together.initialize(x)
    leaf = x.clone().requires_grad_()
    together.double()(leaf).backward(upstream)
    for channel in range(4):
        alone = Case(case.name, "weight", case.bits).build()
        alone.initialize(x[channel])
        part = x[channel].clone().requires_grad_()
        alone.double()(part).backward(upstream[channel])
        torch.testing.assert_close(together(x)[channel], alone(x[channel]))
        torch.testing.assert_close(leaf.grad[channel], part.grad)
        for mine, own in zip(together.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(mine[channel], own)
            torch.testing.assert_close(mine.grad[channel], own.grad)


def squared_error(quantizer: Quantizer, x: Tensor) -> float:
    """Of the quantized values on the scale of what is rounded: APoT standardizes weights first."""
    if quantizer.channels is None and not quantizer.batched and isinstance(quantizer, APoT):
        x = (x - x.mean()) / x.std()
    return (quantizer(x).detach() - x).square().mean().item()


@every_grid_per_tensor
def test_a_refit_by_squared_error_is_no_worse_than_the_familys_own_rule(case: Case) -> None:
    quantizer = fitted(case)
    own = squared_error(quantizer, case.data())
    quantizer.forget(mse=True)
    quantizer(case.data())
    assert quantizer.initialized
    assert squared_error(quantizer, case.data()) <= own * 1.02  # the search has steps of five percent
    quantizer.forget()
    quantizer(case.data())
    assert squared_error(quantizer, case.data()) == pytest.approx(own)


@at_each(lambda pair: [] if pair in NOT_IDEMPOTENT else ends_and_middle(pair))
def test_quantizing_twice_changes_nothing(case: Case) -> None:
    quantizer = fitted(case).eval()
    once = quantizer(case.data()).detach()
    assert same_bits(quantizer(once), once)


@every_pair
def test_error_falls_with_bits(pair: tuple[str, str]) -> None:
    """Of weights that are put on another scale, up to the factor and offset that fit best."""
    other_scale = pair[0] in ("dorefa", "apot") and pair[1] in ("weight", "channels")
    errors = []
    for case in cases_of(pair):
        x = torch.randn(4, 500, generator=torch.Generator().manual_seed(5))
        x = x.relu() if case.role == "positive" else x
        x = x.clamp(max=1) if case.name == "dorefa" else x
        quantizer = case.build()
        x_hat = quantizer(x).detach()
        if other_scale:
            target = x.tanh() if case.name == "dorefa" else x
            errors.append(1 - torch.corrcoef(torch.stack([x_hat[0], target[0]]))[0, 1].item())
        else:
            errors.append((x_hat - x).square().mean().item())
    assert errors == sorted(errors, reverse=True)
    assert len(errors) == 1 or errors[-1] < errors[0]


@every_case
def test_zeros_then_data(case: Case) -> None:
    quantizer = case.build()
    zeros = torch.zeros(4, 3, 5, 5, requires_grad=True)
    out = quantizer(zeros)
    assert torch.equal(out, zeros)
    assert not quantizer.initialized
    out.sum().backward()
    assert all(p.grad is not None for p in quantizer.parameters())
    assert quantizer(torch.empty(0, 3, 5, 5)).shape == (0, 3, 5, 5)
    assert quantizer.signed == case.build().signed
    quantizer(case.data())
    assert quantizer.initialized


@every_case
def test_constant_and_extreme_tensors_give_finite_values_and_gradients(case: Case) -> None:
    for x in (tensor * value for value in (1e-30, 1e30, 0.7) for tensor in (torch.ones(4, 3, 5, 5), case.data())):
        quantizer = case.build()
        leaf = x.clone().requires_grad_()
        x_hat = quantizer(leaf)
        x_hat.backward(torch.ones_like(x) * 1e-3)
        assert quantizer.initialized
        assert x_hat.isfinite().all()
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in quantizer.parameters())
        assert same_bits(x_hat, quantizer.dequantize(quantizer.codes(x)))


@every_grid_per_channel
def test_a_dead_channel_stays_silent(case: Case) -> None:
    x = case.data()
    x[2] = 0
    quantizer = case.build()
    leaf = x.requires_grad_()
    x_hat = quantizer(leaf)
    x_hat.sum().backward()
    assert leaf.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in quantizer.parameters())
    if quantizer.levels()[2].eq(0).any():
        assert torch.equal(x_hat[2], torch.zeros(3, 5, 5))


@every_case
def test_nan_stays_at_its_element(case: Case) -> None:
    x = case.data()
    x[1, 2, 3, 4] = float("nan")
    quantizer = case.build()
    x_hat = quantizer(x)
    assert quantizer.initialized
    assert all(t.isfinite().all() for t in quantizer.state_dict().values())
    assert x_hat.isnan().nonzero().tolist() == [[1, 2, 3, 4]]
    reference = case.build()
    reference(torch.where(x.isnan(), 0.0, x))
    for key, value in reference.state_dict().items():
        torch.testing.assert_close(quantizer.state_dict()[key], value)


@at_each(lambda pair: ends_and_middle(pair) if pair[1] in ("positive", "signed") else [])
def test_an_empty_batch_passes_with_gradient(case: Case) -> None:
    quantizer = fitted(case)
    out = quantizer(torch.empty(0, 3, 5, 5, requires_grad=True))
    out.sum().backward()
    assert out.shape == (0, 3, 5, 5)
    assert all(p.grad is None or p.grad.isfinite().all() for p in quantizer.parameters())


@one_width
def test_eval_and_inference_write_nothing(case: Case) -> None:
    for quantizer in (case.build().eval(), fitted(case).eval()):
        before = copy.deepcopy(quantizer.state_dict())
        with torch.inference_mode():
            quantizer(case.data(3) * 3)
        quantizer(case.data(4) * 3)
        assert all(torch.equal(before[key], value) for key, value in quantizer.state_dict().items())
    for quantizer in (case.build().train(), fitted(case).train()):
        before = copy.deepcopy(quantizer.state_dict())
        with torch.inference_mode():
            quantizer(case.data(3) * 3)
        assert all(torch.equal(before[key], value) for key, value in quantizer.state_dict().items())


@one_width
def test_state_survives_checkpoint_and_copy(case: Case) -> None:
    fresh = case.build().state_dict()
    quantizer = fitted(case).eval()
    assert fresh.keys() == quantizer.state_dict().keys()
    restored = case.build().eval()
    restored.load_state_dict(quantizer.state_dict())
    x = case.data(2)
    for other in (restored, copy.deepcopy(quantizer)):
        assert (other.bits, other.signed) == (quantizer.bits, quantizer.signed)
        assert same_bits(other(x), quantizer(x))
        assert same_bits(other.levels(), quantizer.levels())


@one_width
def test_dtype_of_the_input_is_kept(case: Case) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        quantizer = fitted(case)
        x = case.data(1).to(dtype).requires_grad_()
        x_hat = quantizer(x)
        x_hat.sum().backward()
        assert x_hat.dtype == dtype
        assert x.grad.dtype == dtype
        torch.testing.assert_close(x_hat, quantizer.dequantize(quantizer.codes(x)).to(dtype))


@every_case
def test_changing_bits_refits(case: Case) -> None:
    for bits in (case.bits - 1, case.bits + 1):
        target = Case(case.name, case.role, bits)
        quantizer = fitted(case)
        parameters = list(quantizer.parameters())
        shapes = [p.shape for p in parameters]
        if target not in CASES:
            with pytest.raises(UsageError):
                quantizer.set_bits(bits)
            assert quantizer.bits == case.bits
            continue
        quantizer.set_bits(bits)
        x = case.data()
        x_hat = quantizer(x)
        assert quantizer.bits == bits == quantizer.format[0]
        assert same_bits(x_hat, quantizer.dequantize(quantizer.codes(x)))
        assert x_hat.isfinite().all()
        assert x_hat.unique().numel() > 1
        assert all(a is b for a, b in zip(parameters, quantizer.parameters(), strict=True))
        assert shapes == [p.shape for p in quantizer.parameters()]


@at_each(lambda pair: [usual(pair)] if list(usual(pair).build().parameters()) else [])
def test_training_with_a_huge_learning_rate_stays_finite(case: Case) -> None:
    quantizer = fitted(case)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=10.0)
    x = case.data()
    for _ in range(30):
        loss = (quantizer(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
        assert quantizer.levels().isfinite().all()


@pytest.mark.parametrize("name", sorted(QUANTIZERS))
def test_impossible_bits_are_refused(name: str) -> None:
    for bits in (0, 9, -1, 2.5, True, "4"):
        with pytest.raises(UsageError, match="bits="):
            QUANTIZERS[name](bits, batched=name == "dynamic")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["absmean", "irnet", "seq", "twn", "ttq"])
def test_weight_quantizers_refuse_activations(name: str) -> None:
    with pytest.raises(UsageError, match=f"quantizer {name} is for weights"):
        QUANTIZERS[name](1 if name == "irnet" else 2, batched=True)


@pytest.mark.parametrize("name", ["pact", "dorefa"])
def test_unsigned_quantizers_refuse_negative_activations(name: str) -> None:
    with pytest.raises(UsageError, match="this tensor is signed: use lsq or lsq_plus"):
        QUANTIZERS[name](4, batched=True)(torch.randn(10))


def test_lsq_plus_represents_zero_whatever_its_offset() -> None:
    quantizer = QUANTIZERS["lsq_plus"](4, batched=True)
    quantizer(torch.nn.functional.silu(torch.randn(500)))
    for offset in (-1e9, -0.31, -0.1, 0.0, 0.2, 1e9):
        quantizer.offset.data.fill_(offset)
        assert 0.0 in quantizer.levels().tolist()
        assert quantizer(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]


LOWER: list[Callable[[Quantizer], Quantizer]] = [
    lambda q: q.half(),
    lambda q: q.bfloat16(),
    lambda q: q.to("cpu", torch.float16),
    lambda q: q.type(torch.bfloat16),
    lambda q: q.double().half(),
]


@one_width
def test_a_grid_stays_in_float32_when_the_network_goes_to_half_precision(case: Case) -> None:
    for lower in LOWER:
        x = case.data(2) * (1.0 if case.name == "dorefa" else 1e-7)  # whose steps float16 does not hold
        quantizer = case.build()
        quantizer(x)
        quantizer.eval()
        before, expected = copy.deepcopy(quantizer.state_dict()), quantizer(x)
        lower(quantizer)
        assert all(value.dtype == before[key].dtype for key, value in quantizer.state_dict().items())
        assert all(torch.equal(value, before[key]) for key, value in quantizer.state_dict().items())
        assert same_bits(quantizer(x), expected)


@one_width
def test_codes_of_half_precision_data_are_those_of_the_same_data_in_float32(case: Case) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        quantizer = fitted(case).eval().to(dtype)
        x = case.data(1).to(dtype)
        assert torch.equal(quantizer.codes(x), quantizer.codes(x.float()))


@at_each(lambda pair: [case for case in cases_of(pair) if case.role == "signed" and case.bits > 2])
def test_negative_activations_keep_their_sign(case: Case) -> None:
    quantizer, x = fitted(case), case.data()
    assert (quantizer(x)[x < -1.5] < 0).all()
    assert (quantizer(x)[x > 1.5] > 0).all()


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 3), (8, 2)])
def test_changing_the_bits_of_signed_n2uq_keeps_zero_and_the_largest_value(before: int, after: int) -> None:
    quantizer = fitted(Case("n2uq", "signed", before))
    top, clips = quantizer.levels()[-1].clone(), quantizer.thresholds()[-1] + quantizer._lengths()[-1] / 2
    quantizer.set_bits(after)
    torch.testing.assert_close(quantizer.levels()[-1], top)
    torch.testing.assert_close(quantizer.thresholds()[-1] + quantizer._lengths()[-1] / 2, clips)
    assert quantizer(torch.zeros(3)).eq(0).all()
