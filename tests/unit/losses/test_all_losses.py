"""What every loss owes to the contract."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lqkd.losses
from lqkd.losses import (
    CAKLD,
    CWD,
    DIST,
    DKD,
    MGD,
    PKD,
    RKD,
    VID,
    AttentionRelations,
    AttentionTransfer,
    BinaryKL,
    ContrastiveRepresentation,
    CorrelationCongruence,
    CosineDistance,
    CrossKD,
    CurriculumTemperature,
    DistillationLoss,
    ForegroundWeighted,
    ForwardKL,
    HintonKL,
    Hints,
    JensenShannon,
    LogitResidual,
    QuantizedFeatures,
    ReverseKL,
    ReviewKD,
    SimilarityPreserving,
    SoftCrossEntropy,
    Standardized,
    StitchedKL,
)


def curriculum() -> DistillationLoss:
    loss = CurriculumTemperature()
    loss.progress = 1.0  # before that its temperature gets no gradient
    return loss


MAKERS: dict[str, Callable[[], DistillationLoss]] = {
    "LogitResidual": LogitResidual,
    "HintonKL": HintonKL,
    "BinaryKL": BinaryKL,
    "SoftCrossEntropy": SoftCrossEntropy,
    "CurriculumTemperature": curriculum,
    "DKD": DKD,
    "DIST": DIST,
    "ForwardKL": ForwardKL,
    "ForwardKL, top_k": lambda: ForwardKL(top_k=1),
    "ReverseKL": ReverseKL,
    "JensenShannon": JensenShannon,
    "CAKLD": CAKLD,
    "Standardized": Standardized,
    "Hints": Hints,
    "AttentionTransfer": AttentionTransfer,
    "AttentionRelations": lambda: AttentionRelations(relation_heads=3),
    "CosineDistance": CosineDistance,
    "SimilarityPreserving": SimilarityPreserving,
    "VID": VID,
    "MGD": MGD,
    "CWD": CWD,
    "PKD": PKD,
    "CrossKD": CrossKD,
    "StitchedKL": StitchedKL,
    "ForegroundWeighted": lambda: ForegroundWeighted(Hints()),
    "QuantizedFeatures": QuantizedFeatures,
    "ReviewKD": ReviewKD,
    "RKD": RKD,
    "CorrelationCongruence": CorrelationCongruence,
    "CorrelationCongruence, bilinear": lambda: CorrelationCongruence("bilinear"),
    "ContrastiveRepresentation": ContrastiveRepresentation,
}
ZERO_AT_AGREEMENT = sorted(
    set(MAKERS) - {"SoftCrossEntropy", "VID", "MGD", "ReviewKD", "QuantizedFeatures", "ContrastiveRepresentation"}
)

every = pytest.mark.parametrize("name", list(MAKERS))


class Rounding(nn.Module):
    """A grid with a learned step, for the loss that asks for a quantizer."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Parameter(torch.tensor(0.25))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x / self.step).round() * self.step


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tap = nn.Identity()
        self.tap.output_quantizer = Rounding()


class Teacher(nn.Module):
    """A teacher, detector or not, whose head doubles its features."""

    def __init__(self) -> None:
        super().__init__()
        self.tap = nn.Identity()
        self.twice = nn.Parameter(torch.tensor(2.0), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.twice * self.tap(x)

    def class_logits_from(self, tap: str) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda features: self.twice * features


def inputs(
    loss: DistillationLoss, batch: int = 5, classes: int = 4, seed: int = 0, channels: tuple[int, int] = (6, 6)
) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape: int) -> torch.Tensor:
        return 2 * torch.randn(shape, generator=generator)

    if loss.compares == "logits":
        return tensor(batch, classes), tensor(batch, classes)
    t, s = channels
    if isinstance(loss, AttentionRelations):
        return (tensor(batch, 7, 3 * t),), (tensor(batch, 7, 3 * s),)
    if loss.compares == "features":
        return tensor(batch, t, 4, 4), tensor(batch, s, 4, 4)
    return (tensor(batch, t, 4, 4), tensor(batch, t, 2, 2)), (tensor(batch, s, 4, 4), tensor(batch, s, 2, 2))


def tensors(x: Any) -> tuple[torch.Tensor, ...]:
    return (x,) if isinstance(x, torch.Tensor) else x


def mapped(x: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return function(x) if isinstance(x, torch.Tensor) else tuple(function(each) for each in x)


def connected(name: str, **shape: Any) -> tuple[DistillationLoss, Any, Any]:
    torch.manual_seed(0)
    loss = MAKERS[name]()
    teacher, student = inputs(loss, **shape)
    if loss.compares != "logits":
        loss.bind(Student(), "tap")
        loss.bind_teacher(Teacher(), "tap")
        loss.connect([t.shape for t in tensors(teacher)], [s.shape for s in tensors(student)])
    return loss, teacher, student


def channels_for(name: str) -> tuple[int, int]:
    """Different ones for teacher and student, where the loss can compare those."""
    return (6, 6) if name == "QuantizedFeatures" else (6, 3)


def divergence(loss: DistillationLoss, teacher: Any, student: Any) -> torch.Tensor:
    torch.manual_seed(1)
    return loss(teacher, student, torch.arange(len(tensors(student)[0])) % 2)


def test_every_exported_loss_is_looked_at_here() -> None:
    exported = set(lqkd.losses.__all__) - {"DistillationLoss"}
    assert exported == {name.split(",")[0] for name in MAKERS}


@every
def test_the_map_is_not_negative_and_has_the_shape_of_its_kind(name: str) -> None:
    loss, teacher, student = connected(name)
    found = divergence(loss, teacher, student)
    assert (found >= 0).all()
    assert (found > 0).any()
    shapes = {"classes": (5, 4), "features": (5, 6, 4, 4), "samples": (5,), "scalar": ()}
    assert found.shape == ((5, 1, 4, 4) if name == "AttentionTransfer" else shapes[loss.kind])
    assert loss.reduce(found).shape == ()


@every
def test_the_pair_has_the_shape_of_a_map_of_classes_or_features(name: str) -> None:
    loss, teacher, student = connected(name)
    if loss.kind in ("classes", "features"):
        found = divergence(loss, teacher, student)
        assert [x.shape for x in loss.pair(teacher, student)] == [found.shape] * 2


@every
def test_the_student_gets_a_gradient_and_the_teacher_none(name: str) -> None:
    loss, teacher, student = connected(name)
    for x in (*tensors(teacher), *tensors(student)):
        x.requires_grad_()
    loss.reduce(divergence(loss, teacher, student)).backward()
    assert all(t.grad is None for t in tensors(teacher))
    assert all(s.grad.abs().sum() > 0 for s in tensors(student))


@every
def test_every_parameter_of_a_connected_loss_gets_a_gradient(name: str) -> None:
    loss, teacher, student = connected(name, channels=channels_for(name))
    loss.reduce(divergence(loss, teacher, mapped(student, torch.Tensor.requires_grad_))).backward()
    for parameter_name, parameter in loss.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name


def test_the_losses_with_layers_have_parameters_and_no_other_has() -> None:
    with_parameters = set()
    for name, make in MAKERS.items():
        if make().compares == "logits":
            continue
        loss, _, _ = connected(name, channels=channels_for(name))
        if list(loss.parameters()):
            with_parameters.add(name)
    assert with_parameters == {
        "Hints",
        "CosineDistance",
        "VID",
        "MGD",
        "CWD",
        "PKD",
        "CrossKD",
        "ForegroundWeighted",
        "StitchedKL",
        "ReviewKD",
        "ContrastiveRepresentation",
    }


@pytest.mark.parametrize("name", ZERO_AT_AGREEMENT)
@pytest.mark.parametrize("values", ["random", "zero", "one"])
def test_a_student_that_agrees_has_loss_zero_and_a_finite_gradient(name: str, values: str) -> None:
    loss, teacher, _ = connected(name)
    if values != "random":
        teacher = mapped(teacher, torch.zeros_like if values == "zero" else torch.ones_like)
    student = mapped(teacher, lambda t: t.clone().requires_grad_())
    found = loss.reduce(divergence(loss, teacher, student))
    found.backward()
    assert found.abs() < 1e-6
    assert all(s.grad.isfinite().all() and s.grad.abs().max() < 1e-4 for s in tensors(student))


@every
@pytest.mark.parametrize("values", [torch.zeros_like, torch.ones_like])
def test_a_constant_student_has_a_finite_gradient(name: str, values: Callable[[torch.Tensor], torch.Tensor]) -> None:
    loss, teacher, student = connected(name)
    student = mapped(student, lambda s: values(s).requires_grad_())
    loss.reduce(divergence(loss, teacher, student)).backward()
    largest = 1e6 if name == "ReviewKD" else 1e3  # its batch norm divides by sqrt(1e-5), twice
    assert all(s.grad.isfinite().all() and s.grad.abs().max() < largest for s in tensors(student))


@every
@pytest.mark.parametrize(("batch", "classes"), [(1, 4), (2, 2), (1, 2)])
def test_a_batch_of_one_and_two_classes_are_finite(name: str, batch: int, classes: int) -> None:
    loss, teacher, student = connected(name, batch=batch, classes=classes)
    student = mapped(student, torch.Tensor.requires_grad_)
    found = loss.reduce(divergence(loss, teacher, student))
    found.backward()
    assert found.isfinite()
    assert all(s.grad.isfinite().all() for s in tensors(student))


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    loss, teacher, student = connected(name)
    teacher, student = mapped(teacher, lambda x: x.to(dtype)), mapped(student, lambda x: x.to(dtype))
    student = mapped(student, torch.Tensor.requires_grad_)
    found = divergence(loss, teacher, student)
    assert found.dtype == torch.float32
    loss.reduce(found).backward()
    loss, _, _ = connected(name)  # batch norm has moved
    wide = mapped(student, lambda x: x.detach().float())
    torch.testing.assert_close(found, divergence(loss, mapped(teacher, torch.Tensor.float), wide))
    assert all(s.grad.dtype == dtype and s.grad.isfinite().all() for s in tensors(student))


@every
def test_autocast_around_a_loss_changes_nothing(name: str) -> None:
    loss, teacher, student = connected(name)
    expected = divergence(copy.deepcopy(loss), teacher, student)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = divergence(loss, teacher, student)
        assert all(x.dtype == torch.float32 for x in tensors(loss.pair(teacher, student)[0]))
    assert torch.equal(found, expected)


@every
@pytest.mark.parametrize("size", [6e4, 1e12])
def test_extreme_inputs_are_finite(name: str, size: float) -> None:
    loss, teacher, student = connected(name)
    teacher = mapped(teacher, lambda x: size * x.sign())
    student = mapped(student, lambda x: (size * x.sign()).requires_grad_())
    found = loss.reduce(divergence(loss, teacher, student))
    found.backward()
    assert found.isfinite()
    assert all(s.grad.isfinite().all() for s in tensors(student))


@pytest.mark.parametrize("name", sorted(set(MAKERS) - {"RKD", "ContrastiveRepresentation", "MGD"}))
def test_repeating_the_batch_does_not_change_the_loss(name: str) -> None:
    loss, teacher, student = connected(name)
    labels = torch.arange(5) % 2

    def twice(x: torch.Tensor) -> torch.Tensor:
        return torch.cat((x, x))

    once = loss.reduce(loss(teacher, student, labels))
    both = loss.reduce(loss(mapped(teacher, twice), mapped(student, twice), twice(labels)))
    # The rows of SP have length 1: with twice as many elements each counts half.
    torch.testing.assert_close(both, once / 2 if name == "SimilarityPreserving" else once)


@every
def test_a_connected_loss_can_be_saved_and_loaded(name: str) -> None:
    loss, teacher, student = connected(name, channels=channels_for(name))
    state = copy.deepcopy(loss.state_dict())
    expected = divergence(loss, teacher, student)
    torch.manual_seed(5)
    other, _, _ = connected(name, channels=channels_for(name))
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    other.load_state_dict(state)
    torch.testing.assert_close(divergence(other, teacher, student), expected)


@pytest.mark.parametrize("name", [name for name in MAKERS if MAKERS[name]().kind in ("classes", "samples")])
def test_the_loss_of_a_sample_is_that_of_a_batch_of_one(name: str) -> None:
    loss, teacher, student = connected(name)
    of_all = divergence(loss, teacher, student)
    alone = [loss.reduce(of_all[row : row + 1]) for row in range(5)]
    torch.testing.assert_close(loss.of_samples(of_all), torch.stack(alone))


@pytest.mark.parametrize("name", ["HintonKL", "SoftCrossEntropy", "DKD", "DIST"])
def test_the_gradient_hardly_depends_on_a_high_temperature(name: str) -> None:
    norms = []
    for temperature in (40.0, 80.0):
        loss = MAKERS[name]()
        loss.temperature = temperature
        teacher, student = inputs(loss)
        teacher = teacher - teacher.mean(1, keepdim=True)
        student = (student - student.mean(1, keepdim=True)).requires_grad_()
        # DIST is a correlation of order 1, times tau squared.
        scale = temperature**-2 if name == "DIST" else 1.0
        (scale * loss.reduce(divergence(loss, teacher, student))).backward()
        norms.append(student.grad.norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=0.15)
