"""Balances of gradients at the student's logits, against gradients that are written out."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lqkd.balances import Balance, LearnableRatioBalance, OutputGradientBalance, OutputGradNorm
from lqkd.errors import UsageError

SAMPLES, CLASSES = 6, 5


def batch(seed: int = 0, teacher_scale: float = 20.0) -> tuple[Tensor, Tensor, Tensor]:
    """Features of the student (B, 4), logits of a teacher (B, C), labels (B,)."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(SAMPLES, 4, generator=generator)
    teacher = teacher_scale * torch.randn(SAMPLES, CLASSES, generator=generator)
    return features, teacher, torch.randint(CLASSES, (SAMPLES,), generator=generator)


def losses_of(output: Tensor, teacher: Tensor, labels: Tensor) -> dict[str, Tensor]:
    return {"task": F.cross_entropy(output, labels), "distill": (teacher - output).square().mean()}


def gradients_by_hand(output: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """In float64: of cross-entropy ``p - y``, of the mean squared residual ``2 (S - T) / C``, for each sample."""
    output, teacher = output.detach().double(), teacher.double()
    return output.softmax(1) - F.one_hot(labels, CLASSES), 2 * (output - teacher) / CLASSES


def norms_by_hand(output: Tensor, teacher: Tensor, labels: Tensor) -> tuple[float, float]:
    task, distill = (g.square().sum(1).mean().item() for g in gradients_by_hand(output, teacher, labels))
    return math.sqrt(task), math.sqrt(distill)


def cosine_by_hand(output: Tensor, teacher: Tensor, labels: Tensor) -> float:
    task, distill = gradients_by_hand(output, teacher, labels)
    return (task * distill).sum().item() / math.sqrt(task.square().sum().item() * distill.square().sum().item())


def student() -> torch.nn.Linear:
    torch.manual_seed(1)
    return torch.nn.Linear(4, CLASSES)


@pytest.mark.parametrize("ratio", [1.0, 3.0])
def test_the_gradients_at_the_logits_have_the_ratio_that_was_asked_for(ratio: float) -> None:
    features, teacher, labels = batch()
    output = student()(features)
    losses = losses_of(output, teacher, labels)
    total, weights = OutputGradientBalance(ratio=ratio)(losses, output)
    task, distill = (torch.autograd.grad(loss, output, retain_graph=True)[0] for loss in losses.values())
    assert distill.norm() > 10 * task.norm(), "nothing to balance"
    assert (weights["distill"] * distill).norm() / (weights["task"] * task).norm() == pytest.approx(ratio, rel=1e-4)
    assert sum(weight.item() for weight in weights.values()) == pytest.approx(1.0)
    torch.testing.assert_close(
        torch.autograd.grad(total, output)[0], weights["task"] * task + weights["distill"] * distill
    )


def test_the_norms_are_a_geometric_running_mean_over_the_steps() -> None:
    balance = OutputGradientBalance(momentum=0.8)
    network = student()
    logs: list[tuple[float, float]] = []
    for step in range(5):
        features, teacher, labels = batch(step, teacher_scale=4.0**step)
        output = network(features)
        of_task, of_distill = norms_by_hand(output, teacher, labels)
        logs.append((math.log(of_task), math.log(of_distill)))
        _, weights = balance(losses_of(output, teacher, labels), output)
        ages = [0.8 ** (step - i) for i in range(step + 1)]
        task, distill = (sum(a * log[i] for a, log in zip(ages, logs, strict=True)) / sum(ages) for i in range(2))
        assert weights["task"].item() / weights["distill"].item() == pytest.approx(math.exp(distill - task), rel=1e-4)


@pytest.mark.parametrize("kind", [OutputGradNorm, OutputGradientBalance, LearnableRatioBalance])
def test_nothing_is_measured_in_evaluation(kind: type[Balance]) -> None:
    features, teacher, labels = batch()
    balance = kind()
    before = {name: value.clone() for name, value in balance.state_dict().items()}
    balance.eval()
    with torch.no_grad():
        output = student()(features)
        _, weights = balance(losses_of(output, teacher, labels), output)
    assert len({weight.item() for weight in weights.values()}) == 1
    assert all(torch.equal(value, before[name]) for name, value in balance.state_dict().items())


@pytest.mark.parametrize("kind", [OutputGradNorm, OutputGradientBalance, LearnableRatioBalance])
def test_a_loss_that_does_not_reach_the_logits_is_refused(kind: type[Balance]) -> None:
    features, _, labels = batch()
    features.requires_grad_()
    output = student()(features)
    losses = {"task": F.cross_entropy(output, labels), "distill": features.square().mean()}
    with pytest.raises(UsageError, match="distill loss does not depend on the student's logits"):
        kind()(losses, output)


def learn(balance: LearnableRatioBalance, output: Tensor, losses: dict[str, Tensor], steps: int = 60) -> float:
    """The target after so many steps of plain gradient descent on one batch."""
    for _ in range(steps):
        balance.rho.grad = None
        balance(losses, output)[0].backward(retain_graph=True)
        assert balance.rho.grad is not None
        with torch.no_grad():
            balance.rho.sub_(0.3 * balance.rho.grad)
    return balance.learned()["ratio"].item()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_learned_ratio_becomes_span_to_the_power_of_the_cosine(sign: float) -> None:
    """With a teacher that knows the labels, or their opposite."""
    features, _, labels = batch()
    output = student()(features)
    teacher = sign * 3.0 * F.one_hot(labels, CLASSES).float()
    cosine = cosine_by_hand(output, teacher, labels)
    assert sign * cosine > 0.4, "nothing to learn from"
    balance, losses = LearnableRatioBalance(ratio=0.7, span=3.0), losses_of(output, teacher, labels)
    expected = 0.7 * 3.0**cosine
    assert learn(balance, output, losses) == pytest.approx(expected, rel=1e-4)
    _, weights = balance(losses, output)
    task, distill = norms_by_hand(output, teacher, labels)
    measured = weights["distill"].item() * distill / (weights["task"].item() * task)
    assert measured == pytest.approx(expected, rel=1e-3)


def test_the_learned_ratio_does_not_depend_on_the_scale_of_the_losses() -> None:
    features, teacher, labels = batch(teacher_scale=2.0)
    output = student()(features)
    losses = losses_of(output, teacher, labels)
    scaled = {"task": 1e-3 * losses["task"], "distill": 1e3 * losses["distill"]}
    ratios = [learn(LearnableRatioBalance(), output, by, steps=7) for by in (losses, scaled)]
    assert ratios[0] != pytest.approx(1.0, rel=0.02)
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-4)


def test_a_ratio_that_was_thrown_out_of_its_range_is_back_before_it_is_used() -> None:
    features, teacher, labels = batch()
    output = student()(features)
    balance = LearnableRatioBalance(ratio=2.0, span=4.0)
    for thrown, expected in ((9.0, 8.0), (-9.0, 0.5)):
        balance.rho.data.fill_(thrown)
        assert balance.learned()["ratio"].item() == pytest.approx(expected)
        balance(losses_of(output, teacher, labels), output)
        assert balance.rho.item() == pytest.approx(math.log(expected))


@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_gradnorm_gives_v_the_gradient_of_the_published_term(alpha: float) -> None:
    network, balance = student(), OutputGradNorm(alpha=alpha)
    features, teacher, labels = batch()
    output = network(features)
    first = losses_of(output, teacher, labels)
    balance(first, output)
    with torch.no_grad():
        balance.v.copy_(torch.tensor([0.3, -0.3]))
    features, teacher, labels = batch(seed=7, teacher_scale=15.0)
    output = network(features)
    losses = losses_of(output, teacher, labels)
    total, weights = balance(losses, output)
    total.backward()

    v = torch.tensor([0.3, -0.3], dtype=torch.float64, requires_grad=True)
    w = 2 * v.exp() / v.exp().sum()
    norms = w * torch.tensor(norms_by_hand(output, teacher, labels), dtype=torch.float64)
    fallen = torch.tensor([losses[name].item() / first[name].item() for name in losses], dtype=torch.float64)
    target = norms.detach().mean() * (fallen / fallen.mean()) ** alpha
    mismatch = (norms - target).abs().sum()
    mismatch.backward()
    assert balance.v.grad is not None
    torch.testing.assert_close(balance.v.grad.double(), v.grad, rtol=1e-4, atol=1e-6)
    expected = (w * torch.tensor([loss.item() for loss in losses.values()])).sum() + mismatch
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(torch.stack([*weights.values()]).double(), w.detach(), rtol=1e-5, atol=1e-6)


def test_gradnorm_equalises_the_norms_when_both_losses_fall_alike() -> None:
    features, teacher, labels = batch()
    network, balance = student(), OutputGradNorm()
    # Plain gradient descent with a falling step, as the term has a kink at its minimum.
    for step in range(300):
        output = network(features)
        total, weights = balance(losses_of(output, teacher, labels), output)
        balance.v.grad = None
        total.backward()
        with torch.no_grad():
            balance.v.sub_(balance.v.grad.sign() * 0.3 / (1 + 0.3 * step))
    task, distill = norms_by_hand(output, teacher, labels)
    assert weights["task"].item() * task == pytest.approx(weights["distill"].item() * distill, rel=0.05)


def test_gradnorm_weights_stay_within_their_bounds_and_v_does_not_run_away() -> None:
    features, teacher, labels = batch(teacher_scale=1e4)
    network, balance = student(), OutputGradNorm(minimum=0.2, maximum=1.9)
    optimizer = torch.optim.Adam(balance.parameters(), lr=0.1)
    for _ in range(200):
        output = network(features)
        total, weights = balance(losses_of(output, teacher, labels), output)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert weights["distill"].item() == pytest.approx(0.2)
    assert balance.v.abs().max().item() < math.log(1.8 / 0.2)


@pytest.mark.parametrize("balance", [OutputGradientBalance(momentum=0.5), LearnableRatioBalance(momentum=0.5)])
def test_a_batch_without_labels_leaves_the_ratio_as_it_was(balance: Balance) -> None:
    features, teacher, labels = batch()
    output = (features @ torch.randn(4, CLASSES, generator=torch.Generator().manual_seed(1))).requires_grad_()
    _, before = balance(losses_of(output, teacher, labels), output)
    _, after = balance({**losses_of(output, teacher, labels), "task": 0.0 * output.sum()}, output)
    assert torch.equal(before["distill"], after["distill"])


def test_gradnorm_measures_the_first_task_loss_in_the_first_batch_with_labels() -> None:
    features, teacher, labels = batch()
    output = (features @ torch.randn(4, CLASSES, generator=torch.Generator().manual_seed(1))).requires_grad_()
    balance, losses = OutputGradNorm(), losses_of(output, teacher, labels)
    balance({**losses, "task": 0.0 * output.sum()}, output)
    balance(losses, output)
    torch.testing.assert_close(balance.initial, torch.stack([*losses.values()]).detach())
