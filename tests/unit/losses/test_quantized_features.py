"""Teacher's features on the student's grid."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lqkd.errors import UsageError
from lqkd.losses import QuantizedFeatures
from lqkd.quantization import Recipe, quantize_model


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2


def student_network(**recipe: object) -> nn.Module:
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 1))
    student, _ = quantize_model(net, Recipe(bits="w2a2", **recipe))
    student.train()(torch.randn(4, 1, 10, 10))  # fits the quantizers
    return student


QUANTIZER = "2.input_quantizer"


def bound(student: nn.Module) -> QuantizedFeatures:
    loss = QuantizedFeatures(QUANTIZER)
    loss.bind(student, "1")
    return loss


def test_the_student_is_compared_with_the_nearest_level_of_its_own_grid() -> None:
    student = student_network()
    levels = student.get_submodule(QUANTIZER).levels().tolist()
    teacher, ours = features(2, 3, 4, 4), features(2, 3, 4, 4, seed=1)
    divergence = bound(student)(teacher, ours)
    pairs = zip(teacher.flatten().tolist(), ours.flatten().tolist(), strict=True)
    expected = [(min(levels, key=lambda level: abs(level - t)) - s) ** 2 for t, s in pairs]
    torch.testing.assert_close(divergence.flatten(), torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_a_student_on_its_grid_can_reach_the_teacher() -> None:
    student = student_network()
    teacher = features(2, 3, 4, 4)
    on_grid = student.get_submodule(QUANTIZER)(teacher).detach()
    loss = bound(student)
    assert loss.reduce(loss(teacher, on_grid)) == 0


def test_the_quantizer_learns_nothing_from_the_teacher_and_keeps_its_mode() -> None:
    student = student_network()
    student.zero_grad()
    before = copy.deepcopy(student.state_dict())
    ours = features(2, 3, 4, 4, seed=1).requires_grad_()
    loss = bound(student)
    loss.reduce(loss(features(2, 3, 4, 4), ours)).backward()
    assert ours.grad.abs().sum() > 0
    assert all(p.grad is None for p in student.parameters())
    assert student.get_submodule(QUANTIZER).training
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_a_quantizer_that_the_student_has_not_fitted_is_not_fitted_to_the_teacher() -> None:
    student, _ = quantize_model(nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3)), Recipe(bits="w2a2"))
    loss = QuantizedFeatures("0.input_quantizer")
    student.train()
    quantizer = student.get_submodule("0.input_quantizer")
    loss.bind(student, "0")
    teacher = features(2, 3, 4, 4)
    assert torch.equal(loss.pair(teacher, teacher)[0], teacher)
    assert not quantizer.is_ready


def test_the_quantizer_stays_the_students() -> None:
    loss = bound(student_network())
    assert not list(loss.parameters())
    assert not loss.state_dict()
    assert not list(loss.children())


def test_copies_of_both_stay_together() -> None:
    student = student_network()
    pair = nn.ModuleList([student, bound(student)])
    student_copy, loss_copy = copy.deepcopy(pair)
    assert loss_copy._bound is student_copy.get_submodule(QUANTIZER)


def test_the_output_quantizer_of_the_tap_is_found_without_being_named() -> None:
    student = student_network()
    student[1].output_quantizer = student.get_submodule(QUANTIZER)
    loss = QuantizedFeatures()
    loss.bind(student, "1")
    teacher, ours = features(2, 3, 4, 4), features(2, 3, 4, 4, seed=1)
    assert torch.equal(loss(teacher, ours), bound(student)(teacher, ours))


def test_the_teachers_maps_are_averaged_to_the_students_size_before_they_are_quantised() -> None:
    student = student_network()
    teacher, ours = features(2, 3, 8, 8), features(2, 3, 4, 4, seed=1)
    averaged = teacher.unflatten(3, (4, 2)).unflatten(2, (4, 2)).mean((3, 5))
    torch.testing.assert_close(bound(student).pair(teacher, ours)[0], student.get_submodule(QUANTIZER)(averaged))


def test_a_quantizer_that_is_not_there_is_refused() -> None:
    with pytest.raises(UsageError, match=r"quantizer=None .* has no '1.output_quantizer'; give the name"):
        QuantizedFeatures().bind(student_network(), "1")
    with pytest.raises(UsageError, match=r"has no 'absent\.quantizer'"):
        QuantizedFeatures("absent.quantizer").bind(student_network(), "1")


def test_it_needs_a_student() -> None:
    with pytest.raises(UsageError, match="QuantizedFeatures has no quantizer yet: call bind"):
        QuantizedFeatures()(features(2, 3, 4, 4), features(2, 3, 4, 4))


def test_different_channels_are_refused() -> None:
    with pytest.raises(UsageError, match="the teacher's 5 channels with the student's 3: they must agree"):
        QuantizedFeatures().connect([torch.Size((2, 5, 4, 4))], [torch.Size((2, 3, 4, 4))])
