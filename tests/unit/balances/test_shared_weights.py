"""Balances of gradients in weights that both losses reach, against gradients that are written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lqkd.balances import Balance, GradientBalance, GradNorm
from lqkd.balances.equalized_at import AtWeights
from lqkd.balances.norms import weight_gradients
from lqkd.errors import UsageError
from lqkd.quantization import Recipe, initialize_quantizers, quantize_model

SAMPLES, INPUTS, WIDTH, CLASSES = 6, 7, 4, 5
HEAVY = 0.02
"""The distillation loss has small gradients, as features have."""


class Student(nn.Module):
    """Two linear layers with a tap between them, registered in the order opposite to that in which they run."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.act, self.first = nn.Linear(WIDTH, CLASSES), nn.ReLU(), nn.Linear(INPUTS, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.first(x)
        return self.head(features), features


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of the student (B, I), features of a teacher (B, W), labels (B,)."""
    generator = torch.Generator().manual_seed(seed)
    inputs, teacher = (
        torch.randn(SAMPLES, INPUTS, generator=generator),
        torch.randn(SAMPLES, WIDTH, generator=generator),
    )
    return inputs, teacher, torch.randint(CLASSES, (SAMPLES,), generator=generator)


def losses_of(student: nn.Module, inputs: Tensor, teacher: Tensor, labels: Tensor) -> dict[str, Tensor]:
    logits, features = student(inputs)
    return {"task": F.cross_entropy(logits, labels), "distill": HEAVY * (teacher - features).square().mean()}


def gradients_by_hand(student: Student, inputs: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """In weight and bias of the first layer, float64, one vector each: of cross-entropy and of the mean square."""
    x, t = inputs.double(), teacher.double()
    first, head = student.first.weight.detach().double(), student.head.weight.detach().double()
    features = x @ first.T + student.first.bias.detach().double()
    logits = features @ head.T + student.head.bias.detach().double()
    of_task = (logits.softmax(1) - F.one_hot(labels, CLASSES)) @ head / SAMPLES
    of_distill = HEAVY * 2 * (features - t) / features.numel()
    return tuple(torch.cat([(d.T @ x).flatten(), d.sum(0)]) for d in (of_task, of_distill))  # type: ignore[return-value]


def norms_by_hand(student: Student, *of_batch: Tensor) -> Tensor:
    return torch.stack([gradient.norm() for gradient in gradients_by_hand(student, *of_batch)])


def bound(balance: Balance, student: nn.Module) -> Balance:
    assert isinstance(balance.equalized_at, AtWeights)
    balance.equalized_at.bind(student)
    return balance


def made() -> Student:
    torch.manual_seed(1)
    return Student()


@pytest.mark.parametrize("ratio", [1.0, 30.0])
def test_both_gradients_in_the_shared_weights_have_the_ratio_and_together_the_size_of_the_tasks(ratio: float) -> None:
    student, of_batch = made(), batch()
    task, distill = norms_by_hand(student, *of_batch)
    assert task > 10 * distill, "nothing to balance"
    _, weights = bound(GradientBalance("first", ratio), student)(losses_of(student, *of_batch))
    parts = weights["task"].item() * task, weights["distill"].item() * distill
    assert (parts[1] / parts[0]).item() == pytest.approx(ratio, rel=1e-4)
    assert sum(parts).item() == pytest.approx(task.item(), rel=1e-4)  # type: ignore[union-attr]


def test_the_cosine_is_that_of_both_vectors() -> None:
    student, of_batch = made(), batch()
    found = weight_gradients(losses_of(student, *of_batch), [*student.first.parameters()], "first")
    expected = torch.cosine_similarity(*gradients_by_hand(student, *of_batch), dim=0)
    assert found.cosines.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_gradnorm_gives_v_the_gradient_of_the_published_term(alpha: float) -> None:
    student = made()
    balance = bound(GradNorm("first", alpha), student)
    assert isinstance(balance, GradNorm)
    first = losses_of(student, *batch())
    balance(first)
    balance.v.data.copy_(torch.tensor([-0.3, 0.3]))
    of_batch = batch(7)
    losses = losses_of(student, *of_batch)
    total, weights = balance(losses)
    total.backward()

    v = torch.tensor([-0.3, 0.3], dtype=torch.float64, requires_grad=True)
    w = 2 * v.exp() / v.exp().sum()
    norms = w * norms_by_hand(student, *of_batch)
    fallen = torch.tensor([losses[name].item() / first[name].item() for name in losses], dtype=torch.float64)
    target = norms.detach().mean() * (fallen / fallen.mean()) ** alpha
    (norms - target).abs().sum().backward()
    assert balance.v.grad is not None
    torch.testing.assert_close(balance.v.grad.double(), v.grad, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(torch.stack([*weights.values()]).double(), w.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [GradNorm, GradientBalance])
def test_the_student_gets_the_gradients_that_the_weights_say_and_no_others(kind: type[Balance]) -> None:
    student, of_batch = made(), batch()
    total, weights = bound(kind(shared="first"), student)(losses_of(student, *of_batch))
    assert all(parameter.grad is None for parameter in student.parameters()), "measuring has accumulated"
    total.backward()
    task, distill = gradients_by_hand(student, *of_batch)
    assert student.first.weight.grad is not None
    assert student.first.bias.grad is not None
    gradient = torch.cat([student.first.weight.grad.flatten(), student.first.bias.grad]).double()
    expected = weights["task"].double() * task + weights["distill"].double() * distill
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", [GradNorm, GradientBalance])
def test_the_weights_stay_finite_for_losses_that_vanish_or_explode(kind: type[Balance]) -> None:
    student = made()
    for task in (0.0, 1e-30, 1e30):
        for distill in (0.0, 1e-30, 1e30):
            balance = bound(kind(shared="first"), student)
            losses = losses_of(student, *batch())
            total, weights = balance({"task": task * losses["task"], "distill": distill * losses["distill"]})
            total.backward()
            assert torch.stack([total, *weights.values()]).isfinite().all(), (task, distill)
            assert all(value.isfinite().all() for value in balance.state_dict().values()), (task, distill)


@pytest.mark.parametrize("shared", ["first", "first.weight_quantizer"])
def test_parameters_of_quantizers_are_left_out_unless_they_are_what_is_named(shared: str) -> None:
    student, _ = quantize_model(made(), Recipe(bits="w4a4", first_layer_bits=None, last_layer_bits=None))
    of_batch = batch()
    initialize_quantizers(student, of_batch[0])
    losses = losses_of(student, *of_batch)
    module = student.get_submodule(shared)
    own = [module.weight, module.bias] if shared == "first" else [*module.parameters()]
    task, distill = (
        math.sqrt(sum(g.double().square().sum().item() for g in torch.autograd.grad(loss, own, retain_graph=True)))  # type: ignore[arg-type]
        for loss in losses.values()
    )
    _, weights = bound(GradientBalance(shared), student)(losses)
    assert weights["distill"].item() == pytest.approx(task / distill / 2, rel=1e-4)


def test_a_layer_in_which_only_quantizers_are_trained_has_no_weights() -> None:
    student, _ = quantize_model(made(), Recipe(bits="w4a4", first_layer_bits=None, last_layer_bits=None))
    student.first.weight.requires_grad_(False)
    student.first.bias.requires_grad_(False)
    with pytest.raises(UsageError, match="shared='first' has no weights to train"):
        bound(GradNorm("first"), student)


def test_the_last_layer_that_all_depend_on_is_found_in_the_order_of_the_pass() -> None:
    student = made()
    for compares_features, expected in ((True, "first"), (False, "head")):
        place = AtWeights(None)
        place.bind(student)

        def run(features: bool = compares_features) -> tuple[Tensor, list[Tensor]]:
            logits, compared = student(torch.zeros(1, INPUTS))
            return logits, [compared if features else logits]

        with torch.no_grad():
            place.settle(run)
        assert place.layer == expected


@pytest.mark.parametrize(
    ("shared", "message"),
    [
        ("frist", "shared='frist' does not exist in the student: near names are first"),
        ("act", "shared='act' has no weights to train"),
        ("head", "shared='head' has not got weights that the distill loss depends on"),
    ],
)
@pytest.mark.parametrize("kind", [GradNorm, GradientBalance])
def test_a_module_that_cannot_be_shared_is_refused(kind: type[Balance], shared: str, message: str) -> None:
    student = made()
    with pytest.raises(UsageError, match=message) as caught:
        bound(kind(shared=shared), student)(losses_of(student, *batch()))
    assert "\n" not in str(caught.value)


def test_a_balance_that_was_shown_no_student_says_so() -> None:
    with pytest.raises(UsageError, match="needs to be shown the student"):
        GradNorm()(losses_of(made(), *batch()))
