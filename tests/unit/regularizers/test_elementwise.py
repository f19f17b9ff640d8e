"""The elementwise regularizer and its guards."""

from __future__ import annotations

import pytest
import torch

from lqkd.errors import UsageError
from lqkd.regularizers import ElementwiseMLP


def pair(samples: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(samples, 10, generator=generator)
    return teacher, teacher + torch.randn(samples, 10, generator=generator)


def train(regularizer: ElementwiseMLP, teacher: torch.Tensor, student: torch.Tensor, steps: int) -> torch.Tensor:
    """Let phi alone descend its objective against a frozen student and return the final weights."""
    optimizer = torch.optim.Adam(regularizer.parameters(), lr=1e-2)
    divergence = (teacher - student).square()
    for _ in range(steps):
        optimizer.zero_grad()
        regularizer.objective(regularizer(teacher, student), divergence).backward()
        optimizer.step()
    return regularizer(teacher, student).detach()


def test_every_weight_is_one_before_training() -> None:
    torch.testing.assert_close(ElementwiseMLP()(*pair()), torch.ones(64, 10))


def test_weights_are_the_square_of_the_papers_response() -> None:
    regularizer = ElementwiseMLP(max_weight=float("inf"))
    torch.nn.init.normal_(regularizer.network.layers[-1].weight)
    teacher, student = pair()
    weights = regularizer(teacher, student)
    literal = (regularizer.response(teacher, student, None) * (teacher - student)).square()
    torch.testing.assert_close(weights * (teacher - student).square(), literal)


def test_no_gradient_reaches_teacher_or_student() -> None:
    teacher, student = (tensor.requires_grad_() for tensor in pair())
    regularizer = ElementwiseMLP()
    regularizer.objective(regularizer(teacher, student), (teacher - student).square()).backward()
    assert teacher.grad is None
    assert student.grad is None
    assert all(parameter.grad is not None for parameter in regularizer.parameters())


def test_weights_are_computed_in_float32_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ElementwiseMLP()(*(tensor.bfloat16() for tensor in pair())).dtype == torch.float32


@pytest.mark.parametrize("bound", [2.0, 100.0])
def test_weights_approach_their_bound_and_never_pass_it(bound: float) -> None:
    regularizer = ElementwiseMLP(max_weight=bound)
    regularizer.network.layers[-1].bias.data.fill_(1e4)
    weights = regularizer(*pair())
    assert weights.max() <= bound
    assert weights.min() > 0.99 * bound


def test_without_a_guard_the_weights_collapse() -> None:
    weights = train(ElementwiseMLP(guard="none"), *pair(), steps=400)
    assert weights.mean() < 0.05


def test_with_the_barrier_the_weights_reach_one_over_the_divergence() -> None:
    # Two residual sizes, which the small network can tell apart: the closed form is one weight for each.
    teacher = torch.zeros(64, 10)
    student = torch.cat([torch.full((32, 10), 0.5), torch.full((32, 10), 2.0)])
    weights = train(ElementwiseMLP(guard="barrier"), teacher, student, steps=1500)
    torch.testing.assert_close(weights, 1 / (teacher - student).square(), rtol=0.03, atol=0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guard": "barier"}, r"guard='barier' is unknown: use barrier, "),
        ({"max_weight": 0.5}, r"max_weight=0.5 is not possible"),
        ({"hidden": 0}, r"hidden=0 is not possible"),
    ],
)
def test_impossible_settings_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ElementwiseMLP(**arguments)


def test_of_a_sample_without_a_label_no_element_is_of_the_true_class() -> None:
    torch.manual_seed(0)
    regularizer = ElementwiseMLP(hidden=4, label=True)
    for parameter in regularizer.parameters():
        torch.nn.init.normal_(parameter)
    teacher, student = torch.randn(2, 3), torch.randn(2, 3)
    found = regularizer(teacher, student, torch.tensor([-1, 2]))
    other = regularizer(teacher, student, torch.tensor([0, 2]))
    assert torch.equal(found[1], other[1])
    assert torch.equal(found[0, 1:], other[0, 1:])
    assert not torch.equal(found[0, 0], other[0, 0])
