"""What every modulator has in common, and what each looks at."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.losses.base import MapKind
from lqkd.regularizers import ConvModulator, ElementwiseMLP, LearnableTable, Regularizer, SampleWeight
from lqkd.regularizers.base import RowGroups

CASES: list[tuple[str, Callable[[], Regularizer], MapKind, tuple[int, ...], tuple[int, ...]]] = [
    ("elementwise", ElementwiseMLP, "classes", (6, 10), (6, 10)),
    ("elementwise with label", lambda: ElementwiseMLP(label=True), "classes", (6, 10), (6, 10)),
    ("table of classes", LearnableTable, "classes", (6, 10), (1, 10)),
    ("table of channels", LearnableTable, "features", (6, 8, 5, 5), (1, 8, 1, 1)),
    ("table of token channels", LearnableTable, "features", (6, 9, 8), (1, 1, 8)),
    ("positions", ConvModulator, "features", (6, 8, 5, 5), (6, 1, 5, 5)),
    ("channels", lambda: ConvModulator(per="channel"), "features", (6, 8, 5, 5), (6, 8, 1, 1)),
    ("samples", SampleWeight, "classes", (6, 10), (6,)),
]
each = pytest.mark.parametrize(("make", "kind", "shape", "expected"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])


def connected(make: Callable[[], Regularizer], kind: MapKind, shape: tuple[int, ...]) -> tuple[Regularizer, Tensor]:
    torch.manual_seed(0)
    regularizer = make()
    regularizer.connect(kind, shape[2] if len(shape) == 3 else shape[1])
    return regularizer, torch.randn(2, *shape)


@each
def test_every_weight_is_one_before_training(
    make: Callable[[], Regularizer], kind: MapKind, shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    regularizer, (teacher, student) = connected(make, kind, shape)
    weights = regularizer(teacher, student, torch.arange(6))
    torch.testing.assert_close(weights, torch.ones(expected))


@each
def test_every_parameter_learns_and_no_gradient_leaves(
    make: Callable[[], Regularizer], kind: MapKind, shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    regularizer, (teacher, student) = connected(make, kind, shape)
    student.requires_grad_()
    optimizer = torch.optim.Adam(regularizer.parameters(), lr=0.01)
    before = [parameter.detach().clone() for parameter in regularizer.parameters()]
    for _ in range(3):  # the first step moves only the last layer, which starts at zero
        weights = regularizer(teacher, student, torch.arange(6))
        weights = weights.view(-1, *[1] * (len(shape) - 1)) if weights.ndim == 1 else weights
        optimizer.zero_grad()
        regularizer.objective(weights, (teacher - student).square()).backward()
        optimizer.step()
    assert student.grad is None
    assert all(not torch.equal(a, b) for a, b in zip(before, regularizer.parameters(), strict=True))


@each
def test_weights_are_float32_under_autocast(
    make: Callable[[], Regularizer], kind: MapKind, shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    regularizer, (teacher, student) = connected(make, kind, shape)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert regularizer(teacher.bfloat16(), student.bfloat16(), torch.arange(6)).dtype == torch.float32


def test_the_label_tells_the_true_class_from_the_others() -> None:
    regularizer = ElementwiseMLP(label=True, max_weight=float("inf"))
    torch.nn.init.normal_(regularizer.network.layers[-1].weight)
    logits = torch.zeros(4, 10)
    weights = regularizer(logits, logits, torch.arange(4))
    true = F.one_hot(torch.arange(4), 10).bool()
    assert weights[true].std() < 1e-6
    assert weights[~true].std() < 1e-6
    assert (weights[true].mean() - weights[~true].mean()).abs() > 1e-3


def test_a_sample_weight_sees_how_unsure_the_teacher_is() -> None:
    torch.manual_seed(0)
    regularizer = SampleWeight()
    torch.nn.init.normal_(regularizer.network.layers[-1].weight)
    student = torch.zeros(2, 10)
    weights = regularizer(torch.stack([torch.zeros(10), 10 * F.one_hot(torch.tensor(3), 10)]), student)
    assert weights[0] != weights[1]


@pytest.mark.parametrize("extreme", [0.0, 1e4, -1e4])
def test_a_sample_weight_is_finite_for_extreme_logits(extreme: float) -> None:
    logits = torch.full((3, 10), extreme)
    logits[:, 0] = -extreme
    regularizer = SampleWeight()
    weights = regularizer(logits, -logits)
    weights.sum().backward()
    assert weights.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in regularizer.parameters())


@pytest.mark.parametrize("make", [ElementwiseMLP, SampleWeight])
def test_a_class_that_is_ruled_out_leaves_the_weights_of_all_others(make: Callable[[], Regularizer]) -> None:
    regularizer, logits = connected(make, "classes", (6, 10))
    torch.nn.init.normal_(regularizer.network.layers[-1].weight)
    for ruled_out in ([0], [1], [0, 1]):  # by the teacher, the student, both
        masked = logits.clone()
        masked[ruled_out, :, 9] = -torch.inf
        weights = regularizer(*masked)
        assert weights.isfinite().all()
        if weights.ndim == 2:
            assert torch.equal(weights[:, :9], regularizer(*logits)[:, :9])


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (
            ElementwiseMLP,
            "features",
            "ElementwiseMLP cannot weigh .* over features: it weighs classes",
        ),
        (ConvModulator, "classes", "ConvModulator cannot weigh a distillation loss over classes: it weighs features"),
        (LearnableTable, "samples", "LearnableTable cannot weigh .* over samples: it weighs classes or features"),
        (SampleWeight, "scalar", "SampleWeight cannot weigh .* over scalar: it weighs classes or features or samples"),
    ],
)
def test_a_map_that_it_cannot_weigh_is_refused(make: Callable[[], Regularizer], kind: MapKind, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make().connect(kind, 10)


def test_token_sequences_are_refused_by_convolutions() -> None:
    regularizer = ConvModulator()
    regularizer.connect("features", 8)
    with pytest.raises(UsageError, match="weighs feature maps"):
        regularizer(torch.randn(2, 9, 8), torch.randn(2, 9, 8))


def applied(how: str, weights: list[float], divergence: list[float]) -> list[float]:
    found = SampleWeight(applied=how).applied(  # type: ignore[arg-type]
        torch.tensor(weights).view(-1, 1).requires_grad_(), torch.tensor(divergence).view(-1, 1)
    )
    assert not found.requires_grad
    return found.flatten().tolist()


def test_a_study_can_give_the_student_the_same_weights_but_not_where_they_belong() -> None:
    weights, divergence = [1.0, 2.0, 6.0], [4.0, 1.0, 1.0]
    assert applied("own", weights, divergence) == weights
    assert applied("mean", weights, divergence) == [3.0] * 3
    assert applied("exchanged", weights, divergence) == [6.0, 1.0, 2.0]


def test_controls_that_are_unknown_or_would_be_looked_ahead_from_are_refused() -> None:
    with pytest.raises(UsageError, match=r"applied='shuffled' is unknown: use own, mean, exchanged"):
        SampleWeight(applied="shuffled")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="applied='mean' does not go with player LookAhead"):
        SampleWeight(applied="mean", guard="entropy", player="look_ahead")


def test_one_weight_a_sample_is_of_the_means_over_its_rows() -> None:
    """Against numbers computed in float64, with the same small network."""
    torch.manual_seed(0)
    regularizer = SampleWeight(guard="none")
    torch.nn.init.normal_(regularizer.network.layers[-1].weight)
    teacher, student = torch.randn(2, 7, 4, dtype=torch.float64)
    of_rows = torch.tensor([0, 2, 2, 0, 2, 0, 0])  # of the second sample there is none
    for independent in (False, True):
        regularizer.independent = independent
        weights = regularizer.of_samples(teacher, student, RowGroups(of_rows, 3))
        expected = regularizer.network(_means_over_rows(teacher, student, of_rows, 3, independent).float()).square()
        expected[1] = 1
        torch.testing.assert_close(weights, expected / (1 + (expected - 1) / 100).clamp_min(1))
    torch.testing.assert_close(regularizer(teacher, student)[0], regularizer(teacher[:1], student[:1])[0])


def _means_over_rows(teacher: Tensor, student: Tensor, of_rows: Tensor, count: int, independent: bool) -> Tensor:
    """(count, 5) what a sample is weighed by, a row at a time; zeros where it has none."""
    found = torch.zeros(count, 5, dtype=torch.float64)
    for sample in range(count):
        numbers, heavy = [], []
        for t, s in zip(teacher[of_rows == sample], student[of_rows == sample], strict=True):
            if independent:
                both = [torch.stack((of.sigmoid(), 1 - of.sigmoid()), dim=-1) for of in (t, s)]
                p, q, most = both[0][:, 0], both[1][:, 0], torch.log(torch.tensor(2.0))
            else:
                both = [of.softmax(0).unsqueeze(0) for of in (t, s)]
                p, q, most = both[0][0], both[1][0], torch.log(torch.tensor(4.0))
            entropies = [-(of * of.log()).sum(-1).mean() / most for of in both]
            difference = (both[0].log() - both[1].log()).square().mean().sqrt()
            numbers.append(torch.stack([*entropies, p.max(), q[p.argmax()], difference]))
            heavy.append(p.max() if independent else torch.ones((), dtype=torch.float64))
        if numbers:
            weights = torch.stack(heavy).unsqueeze(1)
            found[sample] = (torch.stack(numbers) * weights).sum(0) / weights.sum()
    return found


def test_logits_of_classes_that_are_there_or_not_do_not_weigh_on_each_other() -> None:
    """A softmax over one class alone says nothing of it."""
    regularizer = SampleWeight(guard="none")
    torch.nn.init.normal_(regularizer.network.layers[-1].weight)
    logits = torch.tensor([[-4.0], [4.0]])
    assert regularizer(logits, logits).std() == 0
    regularizer.independent = True
    assert regularizer(logits, logits).std() > 1e-3
