"""A weight between teacher and student that labels of held-out rows decide."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from scipy.special import expit, log_softmax
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.losses.trust import FittedInterpolation, Interpolation
from lqkd.losses.trust.fitted import PULLS, WEIGHTS, _candidates, _Rows
from lqkd.losses.trust.interpolation import further
from tests.unit.losses.test_trust import noise, rows

OF = ("all", "class", "sample")


def learned(interpolation: Interpolation, teacher: Tensor, student: Tensor, labels: Tensor) -> Tensor:
    """The weights after phi has minimised its objective."""
    optimizer = torch.optim.LBFGS(interpolation.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = interpolation.objective(teacher, student, labels)
        loss.backward()
        return loss

    optimizer.step(objective)
    return interpolation(teacher, student)[1].detach()


@pytest.mark.parametrize("of", ["all", "class"])
def test_weights_are_what_scipy_finds_from_the_formula(of: str) -> None:
    teacher, labels = rows(200, 4)
    student = 0.5 * teacher + noise(200, 4)
    labels[:20] = -1
    found = learned(Interpolation(4, of=of, strength=0.1), teacher, student, labels)  # type: ignore[arg-type]
    t, s, y = log_softmax(teacher.numpy(), 1)[20:], log_softmax(student.numpy(), 1)[20:], labels.numpy()[20:]
    start = np.log(0.88 / 0.12)

    def objective(moved: np.ndarray) -> float:
        z = log_softmax(s + expit(start + moved) * (t - s), axis=1)
        return float(-z[np.arange(180), y].mean() + 0.1 / 2 * (moved**2).mean())

    expected = minimize(objective, np.zeros(1 if of == "all" else 4), options={"gtol": 1e-7}).x
    np.testing.assert_allclose(found[0].numpy(), expit(start + expected), atol=2e-3)


def test_of_two_teachers_of_which_one_is_right_with_a_known_probability_the_weight_makes_the_target_say_that() -> None:
    """One is right in 7 of 10 rows and says 99 %, the other says nothing, and so does the student."""
    classes, sure, right = 4, math.log(0.99 * 3 / 0.01), 0.7
    answers = torch.arange(200) % classes
    labels = torch.where(
        torch.arange(200) // classes % 10 < 7, answers, (answers + 1 + torch.arange(200) % 3) % classes
    )
    teachers = torch.stack([sure * torch.nn.functional.one_hot(answers, classes).float(), torch.zeros(200, classes)])
    interpolation = Interpolation(classes, of="all", strength=0.0)
    weights = learned(interpolation, teachers.mean(0), torch.zeros(200, classes), labels)
    expected = math.log(right * (classes - 1) / (1 - right)) / (sure / 2)  # softmax of w L / 2 is 0.7 at the answer
    assert float((answers == labels).double().mean()) == pytest.approx(right)
    torch.testing.assert_close(weights, torch.full_like(weights, expected), rtol=1e-3, atol=0)


def fitted_rows(teacher: Tensor, student: Tensor, labels: Tensor) -> _Rows:
    """What weights are fitted to: both, and what is seen of samples beside 1, of mean 0 and spread 1."""
    t, s = (x.float().log_softmax(-1) for x in (teacher, student))
    told = further(t, s).double()
    told = (told - told.mean(0)) / told.std(0, correction=0).clamp_min(1e-3)
    return _Rows.of(t.double(), s.double(), labels, torch.cat([torch.ones(len(t), 1), told], 1))


@pytest.mark.parametrize("form", WEIGHTS)
def test_what_is_fitted_at_once_is_what_scipy_finds_from_the_formula(form: str) -> None:
    """In float64, of all rows, with the smallest price of moves."""
    teacher, labels = rows(200, 4)
    fitted = fitted_rows(teacher, 0.5 * teacher + noise(200, 4), labels)
    s, apart, seen = fitted.student.numpy(), fitted.apart.numpy(), fitted.seen.numpy()
    found = [one for one in _candidates(fitted, 0.88, 0.1) if one.form == form][-1]
    level, start = float(found.level[-1]), 0.0 if form == "all" else np.zeros(found.moves.shape[1])

    def objective(at: np.ndarray) -> float:
        logits = level + (seen @ at[:, None] if form == "sample" else at[None])
        z = log_softmax(s + expit(logits) * apart, axis=1)
        loss = float(-z[np.arange(200), labels.numpy()].sum())
        if form == "all":
            return loss + 200 * 0.1 / 2 * float((expit(logits[0, 0]) - 0.88) ** 2)
        return loss + PULLS[-1] / 2 * float((at**2).sum())

    expected = minimize(objective, np.atleast_1d(start), options={"gtol": 1e-6}).x
    if form == "all":
        assert float(found.weights[-1]) == pytest.approx(float(expit(level + expected[0])), abs=1e-4)
    else:
        np.testing.assert_allclose(found.moves[-1].numpy(), expected, atol=1e-3)


def test_a_fit_at_once_finds_the_closed_form_leaves_a_perfect_teacher_and_drops_a_useless_one() -> None:
    classes, sure = 4, math.log(0.99 * 3 / 0.01)
    answers = torch.arange(200) % classes
    labels = torch.where(
        torch.arange(200) // classes % 10 < 7, answers, (answers + 1 + torch.arange(200) % 3) % classes
    )
    says = sure * torch.nn.functional.one_hot(answers, classes).float()
    known = FittedInterpolation(classes, strength=0.0)
    assert known.fit(says, torch.zeros(200, classes), labels) == "all"
    closed = math.log(0.7 * (classes - 1) / 0.3) / sure  # the softmax of w L is 0.7 at the answer
    torch.testing.assert_close(known.weights, torch.full((classes,), closed), rtol=1e-3, atol=0)
    right, labels = rows(200)
    for teacher, student in ((right, noise(200)), (noise(200), right)):
        found = FittedInterpolation(10)
        found.fit(teacher, student, labels)
        target = found(teacher, student)[0]
        assert float((target.exp() - right.softmax(-1)).abs().sum(1).mean()) / 2 < 0.01


@pytest.mark.parametrize("seed", range(2))
def test_which_form_is_fitted_is_chosen_and_never_worse_on_new_rows_than_the_better_of_both(seed: int) -> None:
    def both(kind: str, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        right, labels = rows(count, seed=seed)
        if kind == "alike":
            return right + 0.5 * noise(count, seed=seed), right + 0.5 * noise(count, seed=seed + 1), labels
        lost = torch.arange(count)[:, None] % 2 == 0
        return torch.where(lost, 0.1 * noise(count), 2 * right), 0.5 * right, labels

    for kind, form, gain in (("alike", "all", -0.01), ("lost on half", "sample", 0.05)):
        found, (teacher, student, labels) = FittedInterpolation(10), both(kind, 200, seed)
        assert found.fit(teacher, student, labels) == form
        candidates = _candidates(fitted_rows(teacher, student, labels), 0.88, 0.01)
        weights = [one.weights[-1].expand(200, 10).float() for one in candidates if one.form == form]
        assert any(torch.allclose(found(teacher, student)[1], one, atol=1e-4) for one in weights)
        teacher, student, labels = both(kind, 4000, 100 + seed)
        losses = [
            float(torch.nn.functional.cross_entropy(x.double(), labels))
            for x in (found(teacher, student)[0], teacher, student)
        ]
        assert losses[0] < min(losses[1:]) - gain, (kind, losses)


@pytest.mark.parametrize("of", OF)
def test_before_training_the_teacher_is_nearly_believed_and_phi_alone_has_gradients(of: str) -> None:
    teacher, labels = rows(50)
    student = noise(50).requires_grad_()
    interpolation = Interpolation(10, of=of)  # type: ignore[arg-type]
    target, weights = interpolation(teacher.requires_grad_(), student)
    torch.testing.assert_close(weights, torch.full_like(weights, 0.88))
    expected = (0.12 * student.log_softmax(-1) + 0.88 * teacher.log_softmax(-1)).log_softmax(-1)
    torch.testing.assert_close(target, expected.detach().float(), check_dtype=False)
    interpolation.objective(teacher, student, labels).backward()
    assert teacher.grad is None
    assert student.grad is None
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in interpolation.parameters())


@pytest.mark.parametrize("of", OF)
def test_a_student_that_is_right_ends_distillation_and_a_teacher_that_is_right_keeps_it(of: str) -> None:
    right, labels = rows(1000)
    for teacher, student, low, high in ((right, noise(1000), 0.88, 1.0), (noise(1000), right, 0.0, 0.2)):
        weights = learned(Interpolation(10, of=of), teacher, student, labels)  # type: ignore[arg-type]
        assert low < weights.mean() < high


def test_a_weight_a_sample_tells_where_the_teacher_is_lost() -> None:
    right, labels = rows(1000, sharp=6.0)
    flat, student = 0.1 * noise(1000), 0.5 * right
    teacher = torch.where(torch.arange(1000)[:, None] < 500, right, flat)
    torch.manual_seed(0)
    weights = learned(Interpolation(10), teacher, student, labels)
    assert weights[:500].mean() > weights[500:].mean() + 0.3


def test_without_a_label_the_objective_is_zero() -> None:
    teacher, labels = rows(5)
    assert Interpolation(10).objective(teacher, noise(5), torch.full_like(labels, -1)).item() == 0.0


@pytest.mark.parametrize("settings", [{"start": 1.0}, {"strength": -1.0}])
def test_impossible_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="is not possible"):
        Interpolation(10, **settings)


@pytest.mark.parametrize("of", ["sample", "class", "auto"])
def test_a_class_that_both_rule_out_is_as_if_it_were_not_there(of: str) -> None:
    labels = rows(200)[1] % 8
    teacher, student = (F.one_hot(labels, 8) + noise(200, seed=seed)[:, :8] for seed in (0, 1))
    padded = [F.pad(logits, (0, 2), value=-math.inf) for logits in (teacher, student)]
    found = []
    for t, s in ((teacher, student), padded):
        interpolation = FittedInterpolation(t.shape[1]) if of == "auto" else Interpolation(t.shape[1], of)
        if isinstance(interpolation, FittedInterpolation):
            interpolation.fit(t, s, labels)
        found.append(interpolation(t, s)[0][:, :8])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_rows_of_which_a_network_says_nothing_finite_are_left_out_of_a_fit() -> None:
    right, labels = rows(200)
    teacher, student = right + noise(200), right + noise(200, seed=1)
    expected, found, none = (FittedInterpolation(10) for _ in range(3))
    expected.fit(teacher[20:], student[20:], labels[20:])
    student[:10, 3], teacher[10:20, 0] = -math.inf, math.nan
    found.fit(teacher, student, labels)
    assert float(found.weights[0]) == pytest.approx(float(expected.weights[0]), abs=0.2)
    assert none.fit(teacher * math.nan, student, labels) == "all"
    assert torch.equal(none.weights, FittedInterpolation(10).weights)
