"""Guards and players: phi alone, trained against frozen divergences, ends where its closed form says."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.regularizers import (
    Adversarial,
    Barrier,
    BoundedBarrier,
    BoundedRange,
    Entropy,
    Guard,
    MeanOne,
    Player,
    Regularizer,
)

DIVERGENCE = torch.tensor([[0.05, 0.3, 1.0], [2.0, 4.0, 10.0]])


class Free(Regularizer):
    """A regularizer with a parameter of its own for every element: it can reach any optimum."""

    maps = frozenset({"classes"})

    def __init__(self, guard: Guard | str, player: Player | str = "cooperative", max_weight: float = 1e4) -> None:
        super().__init__(guard, player, max_weight)
        self.logarithms = nn.Parameter(torch.zeros_like(DIVERGENCE))

    def response(self, teacher: Tensor, student: Tensor, labels: Tensor | None) -> Tensor:
        return self.logarithms.exp()


def trained(regularizer: Regularizer, alignment: Tensor | None = None, steps: int = 300) -> Tensor:
    """The weights after training phi alone."""
    optimizer = torch.optim.Adam(regularizer.parameters(), lr=0.15)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        regularizer.objective(regularizer(DIVERGENCE, DIVERGENCE), DIVERGENCE, alignment).backward()
        optimizer.step()
        schedule.step()
    return regularizer(DIVERGENCE, DIVERGENCE).detach()


def simplex(scores: Tensor) -> Tensor:
    return scores.numel() * scores.flatten().softmax(0).view_as(scores)


def test_without_a_guard_every_weight_collapses() -> None:
    assert trained(Free("none")).max() < 0.01


def test_the_barrier_ends_at_one_over_the_divergence() -> None:
    torch.testing.assert_close(trained(Free("barrier")), 1 / DIVERGENCE, rtol=0.02, atol=0)


def test_the_bounded_barrier_ends_at_its_closed_form() -> None:
    expected = ((1 + 8 / DIVERGENCE).sqrt() - 1) / 4
    torch.testing.assert_close(trained(Free("bounded_barrier")), expected, rtol=0.02, atol=0)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_entropy_guard_ends_at_a_softmax_of_the_negative_divergence(temperature: float) -> None:
    expected = simplex(-DIVERGENCE / (temperature * DIVERGENCE.mean()))
    torch.testing.assert_close(trained(Free(Entropy(temperature)), steps=600), expected, rtol=0.02, atol=1e-3)


def test_an_adversary_with_the_entropy_guard_ends_at_a_softmax_of_the_divergence() -> None:
    player = Adversarial()
    player.progress = 1.0
    expected = simplex(DIVERGENCE / DIVERGENCE.mean())
    torch.testing.assert_close(trained(Free("entropy", player)), expected, rtol=0.02, atol=1e-3)


def test_an_adversary_half_way_up_its_ramp_is_half_as_strong() -> None:
    player = Adversarial(ramp=0.5)
    player.progress = 0.25
    expected = simplex(0.5 * DIVERGENCE / DIVERGENCE.mean())
    torch.testing.assert_close(trained(Free("entropy", player)), expected, rtol=0.02, atol=1e-3)


def test_looking_ahead_with_the_entropy_guard_ends_at_a_softmax_of_the_alignment() -> None:
    aligned = torch.tensor([[1.0, -1.0, 0.5], [0.0, 2.0, -0.5]])
    expected = simplex(aligned / aligned.square().mean().sqrt())
    torch.testing.assert_close(trained(Free("entropy", "look_ahead"), aligned), expected, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize(
    ("guard", "player"),
    [
        *((guard, "cooperative") for guard in ("none", "barrier", "bounded_barrier", "entropy", "bounded")),
        *((guard, "adversarial") for guard in ("entropy", "bounded")),
    ],
)
def test_a_free_regularizer_ends_at_the_optimum_that_its_guard_names(guard: str, player: str) -> None:
    regularizer = Free(guard, player)
    if isinstance(regularizer.player, Adversarial):
        regularizer.player.progress = 1.0
    price, scale = regularizer.player.price(DIVERGENCE, None)
    optimum = regularizer.guard.optimum(price, scale)
    assert optimum is not None
    assert optimum.shape == DIVERGENCE.shape
    torch.testing.assert_close(trained(regularizer, steps=800), optimum, rtol=0.05, atol=0.01)


def test_the_optimum_is_scaled_by_the_mean_divergence_unless_told_otherwise() -> None:
    guard = Entropy(2.0)
    torch.testing.assert_close(guard.optimum(DIVERGENCE), guard.optimum(DIVERGENCE, DIVERGENCE.mean()))
    assert not torch.allclose(guard.optimum(DIVERGENCE), guard.optimum(DIVERGENCE, torch.tensor(1.0)))


def test_the_optimum_at_a_divergence_of_zero_is_no_surprise() -> None:
    zero = torch.zeros(2)
    assert Barrier().optimum(zero).isinf().all()
    assert BoundedBarrier().optimum(zero).isinf().all()
    torch.testing.assert_close(Entropy().optimum(zero), torch.ones(2))
    torch.testing.assert_close(BoundedRange().optimum(zero), torch.ones(2))


def test_the_bounded_barriers_optimum_is_exact_at_large_and_small_divergences() -> None:
    divergence = torch.tensor([1e-20, 1e-4, 1e4, 1e8])
    double = divergence.double()
    expected = torch.cat((1 / (2 * double[:2]).sqrt(), 1 / double[2:]))
    torch.testing.assert_close(BoundedBarrier().optimum(divergence).double(), expected, rtol=0.01, atol=0)


def test_weights_of_mean_one_have_no_optimum_of_single_elements() -> None:
    assert MeanOne().optimum(DIVERGENCE) is None


def test_weights_of_mean_one_all_move_to_the_smallest_divergence() -> None:
    weights = trained(Free("mean_one"))
    assert weights[0, 0] > 0.95 * DIVERGENCE.numel()
    assert weights.mean().item() == pytest.approx(1)


@pytest.mark.parametrize(("player", "bound"), [("cooperative", 0.25), ("adversarial", 4.0)])
def test_bounded_weights_stay_within_their_range(player: str, bound: float) -> None:
    regularizer = Free(BoundedRange(0.25, 4.0), player, max_weight=math.inf)
    if isinstance(regularizer.player, Adversarial):
        regularizer.player.progress = 1.0
    weights = trained(regularizer, steps=600)
    assert weights.min() >= 0.25
    assert weights.max() <= 4
    torch.testing.assert_close(weights, torch.full_like(weights, bound), rtol=0.05, atol=0)


@pytest.mark.parametrize("guard", ["none", "barrier", "bounded_barrier", "mean_one", "entropy", "bounded"])
def test_every_guard_starts_at_a_weight_of_one(guard: str) -> None:
    torch.testing.assert_close(Free(guard)(DIVERGENCE, DIVERGENCE), torch.ones_like(DIVERGENCE), rtol=1e-4, atol=0)


@pytest.mark.parametrize("guard", ["none", "barrier", "bounded_barrier", "mean_one", "entropy", "bounded"])
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30])
def test_every_guard_has_finite_weights_and_gradients_at_extreme_responses(guard: str, value: float) -> None:
    weights = torch.full((4,), value, requires_grad=True)
    constrained = Free(guard).guard.constrain(weights)
    (constrained.mean() + Free(guard).guard(constrained, torch.tensor(1.0))).backward()
    assert constrained.isfinite().all()
    assert weights.grad is not None
    assert weights.grad.isfinite().all()


@pytest.mark.parametrize("player", ["adversarial", "look_ahead"])
@pytest.mark.parametrize("guard", ["none", "barrier", "bounded_barrier"])
def test_a_player_that_maximises_needs_a_guard_that_limits(player: str, guard: str) -> None:
    with pytest.raises(UsageError, match="use guard mean_one, entropy, bounded") as caught:
        Free(guard, player)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Entropy(0.0), "temperature=0.0 is not possible"),
        (lambda: Entropy(math.inf), "temperature=inf is not possible"),
        (lambda: BoundedRange(1.5, 5.0), "low=1.5, high=5.0 is not possible"),
        (lambda: BoundedRange(0.5, 1.0), "high=1.0 is not possible"),
        (lambda: Adversarial(ramp=2.0), "ramp=2.0 is not possible"),
        (lambda: Free("barier"), "guard='barier' is unknown: use barrier, "),
        (lambda: Free("barrier", "co"), "player='co' is unknown: use adversarial, "),
    ],
)
def test_an_impossible_argument_is_refused_in_one_sentence(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(UsageError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_only_phi_gets_gradients_from_its_objective() -> None:
    regularizer = Free("barrier")
    divergence = DIVERGENCE.clone().requires_grad_()
    regularizer.objective(regularizer(divergence, divergence), divergence).backward()
    assert divergence.grad is None
    assert regularizer.logarithms.grad is not None
