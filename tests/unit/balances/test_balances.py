"""What all balances share, and those that learn nothing, against computations of their own."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from lqkd.balances import (
    Balance,
    BoundedUncertaintyBalance,
    DynamicWeightAverage,
    FixedBalance,
    GradientBalance,
    GradNorm,
    ImpartialBalance,
    LearnableRatioBalance,
    OutputGradientBalance,
    OutputGradNorm,
    RandomBalance,
    ScheduledBalance,
    UncertaintyBalance,
)
from lqkd.errors import UsageError

ALL: list[type[Balance]] = [
    BoundedUncertaintyBalance,
    DynamicWeightAverage,
    FixedBalance,
    ImpartialBalance,
    LearnableRatioBalance,
    OutputGradNorm,
    OutputGradientBalance,
    RandomBalance,
    ScheduledBalance,
    UncertaintyBalance,
]


def losses(task: float, distill: float) -> dict[str, Tensor]:
    return {"task": torch.tensor(task), "distill": torch.tensor(distill)}


def losses_at(output: Tensor, task: float, distill: float) -> dict[str, Tensor]:
    """Losses of these values whose gradients at the logits ``output``, all ones, are as large as they are."""
    return {"task": task * output.square().mean(), "distill": distill * output.square().mean()}


def weights_of(balance: Balance, task: float = 2.0, distill: float = 1.0) -> tuple[float, float]:
    output = torch.ones(4, 3, requires_grad=True)
    _, weights = balance(losses_at(output, task, distill), output)
    return weights["task"].item(), weights["distill"].item()


# ---- all of them


@pytest.mark.parametrize("kind", ALL)
def test_the_student_gets_the_gradients_that_the_weights_say(kind: type[Balance]) -> None:
    student = torch.tensor([1.5, -0.5, 2.0], requires_grad=True)
    output = student * torch.ones(4, 1)
    parts = {"task": output.square().mean(), "distill": output.exp().mean()}
    task, distill = (torch.autograd.grad(part, student, retain_graph=True)[0] for part in parts.values())
    total, weights = kind(teacher_share=0.9)(parts, output)
    total.backward()
    assert student.grad is not None
    assert not any(weight.requires_grad for weight in weights.values())
    torch.testing.assert_close(student.grad, weights["task"] * task + weights["distill"] * distill)


@pytest.mark.parametrize("kind", ALL)
def test_each_balance_stays_finite_for_losses_that_vanish_or_explode(kind: type[Balance]) -> None:
    values = (0.0, 1e-30, 1.0, 1e30)
    for task in values:
        for distill in values:
            balance = kind()
            balance.progress = None if balance.progress is None else 0.5
            optimizer = torch.optim.Adam([*balance.parameters(), torch.nn.Parameter(torch.zeros(()))], lr=0.1)
            for _ in range(3):
                output = torch.ones(4, 3, requires_grad=True)
                total, weights = balance(losses_at(output, task, distill), output)
                total.backward()
                assert output.grad is not None
                optimizer.step()
                optimizer.zero_grad()
                balance.on_epoch_end()
                assert torch.stack([total, *weights.values()]).isfinite().all(), (task, distill)
                assert output.grad.isfinite().all(), (task, distill)
            assert all(value.isfinite().all() for value in balance.state_dict().values()), (task, distill)


@pytest.mark.parametrize("kind", ALL)
def test_the_teacher_leads_until_hold_and_the_balance_is_free_from_release_on(kind: type[Balance]) -> None:
    free = kind() if kind is not ScheduledBalance else ScheduledBalance(start=0.25, end=0.25)
    limits = {"teacher_share": 0.9, "hold": 0.2, "release": 0.6}
    led = kind(**limits) if kind is not ScheduledBalance else ScheduledBalance(start=0.25, end=0.25, **limits)
    task, distill = weights_of(free)
    own = distill / (task + distill)
    for progress, share in ((0.0, 0.9), (0.2, 0.9), (0.4, (0.9 + own) / 2), (0.6, own), (1.0, own)):
        led.load_state_dict(kind().state_dict())
        assert led.progress is not None, "training must know that this balance follows it"
        led.progress = progress
        weights = weights_of(led)
        assert weights[1] / sum(weights) == pytest.approx(share, rel=1e-5), progress
        assert sum(weights) == pytest.approx(task + distill, rel=1e-5), progress


def test_only_balances_that_depend_on_the_progress_ask_for_it() -> None:
    assert FixedBalance().progress is None
    assert FixedBalance(teacher_share=0.5).progress == 0
    assert ScheduledBalance().progress == 0


def test_release_at_hold_is_a_switch() -> None:
    balance = FixedBalance(teacher_share=1.0, hold=0.5, release=0.5)
    balance.progress = 0.499
    assert weights_of(balance) == (0.0, 2.0)
    balance.progress = 0.5
    assert weights_of(balance) == (1.0, 1.0)


@pytest.mark.parametrize("kind", ALL)
def test_bounds_have_the_last_word(kind: type[Balance]) -> None:
    balance = kind(minimum=0.8, maximum=1.5, teacher_share=1.0)
    weights = weights_of(balance)  # the teacher's share would leave no weight to the task
    assert weights[0] == pytest.approx(0.8)
    assert 0.8 <= weights[1] <= 1.5


def test_a_balance_that_needs_the_logits_asks_for_them() -> None:
    with pytest.raises(UsageError, match="OutputGradientBalance needs the student's logits"):
        OutputGradientBalance()(losses(1.0, 1.0))


@pytest.mark.parametrize("kind", ALL)
def test_a_balance_resumes_from_its_state_as_if_it_had_never_stopped(kind: type[Balance]) -> None:
    def run(balance: Balance, optimizer: torch.optim.Optimizer, steps: range) -> list[tuple[float, float]]:
        seen = []
        for step in steps:
            output = torch.ones(4, 3, requires_grad=True)
            values = losses_at(output, 3.0 / (1 + step), 1.0 + 0.3 * (step % 4))
            total, weights = balance(values, output)
            total.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % 3 == 2:
                balance.on_epoch_end()
            seen.append((weights["task"].item(), weights["distill"].item()))
        return seen

    def fresh() -> tuple[Balance, torch.optim.Optimizer]:
        balance = kind()
        return balance, torch.optim.Adam([*balance.parameters(), torch.nn.Parameter(torch.zeros(()))], lr=0.05)

    whole = run(*fresh(), range(14))
    first, optimizer = fresh()
    part = run(first, optimizer, range(7))  # within the third epoch
    second, second_optimizer = fresh()
    run(second, second_optimizer, range(2))  # what it did before does not matter
    second.load_state_dict(first.state_dict())
    second_optimizer.load_state_dict(optimizer.state_dict())
    assert part + run(second, second_optimizer, range(7, 14)) == whole


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (FixedBalance, {"task": -1.0}),
        (FixedBalance, {"distill": math.nan}),
        (FixedBalance, {"task": 0.0, "distill": 0.0}),
        (FixedBalance, {"minimum": -0.1}),
        (FixedBalance, {"minimum": 2.0, "maximum": 1.0}),
        (FixedBalance, {"maximum": math.nan}),
        (FixedBalance, {"teacher_share": 1.1}),
        (FixedBalance, {"teacher_share": math.nan}),
        (FixedBalance, {"teacher_share": 0.5, "hold": 0.5, "release": 0.4}),
        (FixedBalance, {"teacher_share": 0.5, "release": 1.5}),
        (ScheduledBalance, {"start": -1.0}),
        (ScheduledBalance, {"end": math.inf}),
        (ScheduledBalance, {"task": 0.0, "start": 0.0}),
        (ScheduledBalance, {"begin": 0.5, "finish": 0.4}),
        (ScheduledBalance, {"shape": "square"}),
        (UncertaintyBalance, {"minimum": 0.0}),
        (ImpartialBalance, {"maximum": math.inf}),
        (BoundedUncertaintyBalance, {"minimum": 1.0, "maximum": 1.0}),
        (OutputGradientBalance, {"ratio": 0.0}),
        (OutputGradientBalance, {"momentum": 1.0}),
        (LearnableRatioBalance, {"ratio": -1.0}),
        (LearnableRatioBalance, {"span": 1.0}),
        (LearnableRatioBalance, {"span": math.inf}),
        (GradientBalance, {"ratio": 0.0}),
        (GradientBalance, {"momentum": 1.0}),
        (GradNorm, {"alpha": -1.0}),
        (GradNorm, {"minimum": 1.0}),
        (OutputGradNorm, {"alpha": -1.0}),
        (OutputGradNorm, {"minimum": 1.0}),
        (OutputGradNorm, {"maximum": 0.9}),
        (DynamicWeightAverage, {"temperature": 0.0}),
        (RandomBalance, {"seed": 0.5}),
    ],
)
def test_impossible_arguments_are_refused_by_name(kind: type[Balance], arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(reversed(arguments)) + "="):
        kind(**arguments)


# ---- those that learn nothing


def test_fixed_balance_is_the_weighted_sum() -> None:
    total, weights = FixedBalance(task=0.5, distill=3.0)(losses(2.0, 1.0))
    assert total.item() == 4.0
    assert {name: weight.item() for name, weight in weights.items()} == {"task": 0.5, "distill": 3.0}


def test_fixed_balance_has_no_state() -> None:
    assert not FixedBalance(teacher_share=0.5).state_dict()


@pytest.mark.parametrize(
    ("shape", "expected"),
    [("linear", [2.0, 2.0, 3.0, 6.0, 6.0]), ("cosine", [2.0, 2.0, 2 + 2 - 2 * math.cos(math.pi / 4), 6.0, 6.0])],
)
def test_scheduled_lambda_moves_from_start_to_end_between_two_parts(shape: Any, expected: list[float]) -> None:
    balance = ScheduledBalance(start=2.0, end=6.0, task=0.5, begin=0.2, finish=0.6, shape=shape)
    seen = []
    for balance.progress in (0.0, 0.2, 0.3, 0.6, 1.0):
        task, distill = weights_of(balance)
        assert task == 0.5
        seen.append(distill)
    assert seen == pytest.approx(expected)


def test_dynamic_weight_average_is_its_formula_over_a_history() -> None:
    history = [[(4.0, 1.0), (2.0, 3.0)], [(1.0, 1.5)], [(0.5, 1.0), (0.7, 1.0), (0.3, 1.3)], [(0.4, 1.0)]]
    balance = DynamicWeightAverage(temperature=0.7)
    means: list[list[float]] = []
    for epoch in history:
        expected = [1.0, 1.0]
        if len(means) >= 2:
            exponents = [math.exp(means[-1][i] / means[-2][i] / 0.7) for i in range(2)]
            expected = [2 * exponent / sum(exponents) for exponent in exponents]
        for task, distill in epoch:
            assert weights_of(balance, task, distill) == pytest.approx(expected)
        balance.on_epoch_end()
        means.append([sum(pair[i] for pair in epoch) / len(epoch) for i in range(2)])


def test_dynamic_weight_average_learns_nothing_from_evaluation() -> None:
    balance = DynamicWeightAverage()
    state = {name: value.clone() for name, value in balance.state_dict().items()}
    balance.eval()
    weights_of(balance)
    balance.on_epoch_end()
    assert all(torch.equal(value, state[name]) for name, value in balance.state_dict().items())


def test_random_weights_sum_to_one_and_repeat_with_their_seed() -> None:
    first, second, other = RandomBalance(seed=3), RandomBalance(seed=3), RandomBalance(seed=4)
    draws = [weights_of(first) for _ in range(50)]
    assert all(sum(weights) == pytest.approx(1.0) for weights in draws)
    torch.manual_seed(5)
    random.seed(5)
    assert [weights_of(second) for _ in range(50)] == draws
    assert not {weights_of(other) for _ in range(50)} & set(draws)


def test_random_weights_are_the_softmax_of_normal_numbers() -> None:
    balance = RandomBalance()
    # The log-ratio of both weights is the difference of two standard normal numbers: mean 0, variance 2.
    ratios = torch.tensor([math.log(a / b) for a, b in (weights_of(balance) for _ in range(2000))])
    assert abs(ratios.mean().item()) < 4 * math.sqrt(2 / 2000)
    assert ratios.var().item() == pytest.approx(2.0, abs=4 * 2 * math.sqrt(2 / 2000))
    assert abs(torch.corrcoef(torch.stack([ratios[1:], ratios[:-1]]))[0, 1].item()) < 4 / math.sqrt(2000)
