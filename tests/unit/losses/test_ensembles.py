"""How several teachers become one."""

from __future__ import annotations

import pytest
import torch

from lqkd.losses.ensembles import COMBINATIONS, ConfidentTeachers, LearnedMixture, MeanPrediction


def answers(teachers: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(teachers, 6, 5, generator=generator), torch.arange(6) % 5


def test_the_mean_of_predictions_is_a_distribution() -> None:
    logits, labels = answers()
    (combined,), objective = MeanPrediction(3)(logits, labels)
    torch.testing.assert_close(combined.exp(), logits.softmax(-1).mean(0))
    assert objective is None


def test_equal_teachers_combine_to_the_same_prediction_in_every_way() -> None:
    logits, labels = answers(1)
    for kind in COMBINATIONS.values():
        for combined in kind(2)(logits.repeat(2, 1, 1), labels)[0]:
            torch.testing.assert_close(combined.softmax(-1), logits[0].softmax(-1))


def test_learned_shares_go_to_the_teacher_that_is_right() -> None:
    labels = torch.arange(6) % 5
    right = torch.nn.functional.one_hot(labels, 5) * 4.0
    mixture = LearnedMixture(2)
    optimizer = torch.optim.Adam(mixture.parameters(), lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        objective = mixture(torch.stack([torch.zeros(6, 5), right]), labels)[1]
        assert objective is not None
        objective.backward()
        optimizer.step()
    assert mixture.scores.softmax(0)[1] > 0.95


def test_the_students_target_has_no_gradient_to_learned_shares() -> None:
    (combined,), _ = LearnedMixture(3)(*answers())
    assert not combined.requires_grad


def test_confidence_follows_the_published_formula_for_every_sample() -> None:
    logits, labels = answers()
    (combined,), _ = ConfidentTeachers(3)(logits, labels)
    for sample in range(6):
        wrong = [-logits[k, sample].double().log_softmax(0)[labels[sample]] for k in range(3)]
        total = sum(value.exp() for value in wrong)
        shares = [(1 - value.exp() / total) / 2 for value in wrong]
        expected = sum(w * logits[k, sample].double().softmax(0) for k, w in enumerate(shares))
        torch.testing.assert_close(combined[sample].double().exp(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_extreme_logits_stay_finite(name: str) -> None:
    logits, labels = answers()
    for combined in COMBINATIONS[name](3)(1e4 * logits, labels)[0]:
        assert combined.isfinite().all()


def test_samples_without_a_label_teach_the_learned_shares_nothing() -> None:
    logits, labels = answers()
    labels[::2] = -1
    objective = LearnedMixture(3)(logits, labels)[1]
    assert objective is not None
    expected = LearnedMixture(3)(logits[:, 1::2], labels[1::2])[1]
    torch.testing.assert_close(objective, expected)
    nothing = LearnedMixture(3)(logits, torch.full_like(labels, -1))[1]
    assert nothing is not None
    assert nothing.item() == 0.0


def test_without_a_label_every_teacher_is_as_confident() -> None:
    logits, labels = answers()
    (combined,), _ = ConfidentTeachers(3)(logits, torch.full_like(labels, -1))
    torch.testing.assert_close(combined.exp(), logits.softmax(-1).mean(0))
