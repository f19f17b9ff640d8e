"""Several labels a sample: each class is there, is not, or is not known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lqkd.errors import UsageError
from lqkd.losses import BinaryKL, DistillationLoss, HintonKL, LogitResidual, Standardized, StitchedKL
from lqkd.models.outputs import Asked
from lqkd.modules import ClassifierModule, Constant, DistillModule, Tap
from lqkd.quantization import Recipe
from lqkd.regularizers import ElementwiseMLP, SampleWeight
from lqkd.tasks import Classification, Detection, MultiLabel, Segmentation, Task
from lqkd.teachers import FrozenTeacher

LABELS = torch.tensor([[1, 0, 1], [0, -1, 1], [1, 1, 0], [0, 0, 9]])
LOGITS = torch.tensor([[2.0, -1.0, 0.5], [1.5, 3.0, -0.5], [0.3, 0.2, 0.1], [-1.0, -2.0, 4.0]])
BATCH = (torch.zeros(4, 5), LABELS)


def task(**settings: Any) -> MultiLabel:
    return MultiLabel(3, ignore_index=9, **settings)


def test_the_loss_is_the_binary_cross_entropy_of_the_labels_that_are_known() -> None:
    known = (LABELS >= 0) & (LABELS != 9)
    expected = nn.functional.binary_cross_entropy_with_logits(LOGITS[known], LABELS[known].float())
    assert torch.allclose(task().loss(LOGITS, BATCH), expected)
    weights = torch.tensor([2.0, 3.0, 4.0])
    weighted = nn.BCEWithLogitsLoss(pos_weight=weights.expand(4, 3)[known])(LOGITS[known], LABELS[known].float())
    assert torch.allclose(task(positive_weights=[2, 3, 4]).loss(LOGITS, BATCH), weighted)


def test_without_a_known_label_the_loss_is_zero_with_a_gradient() -> None:
    logits = LOGITS.clone().requires_grad_()
    task().loss(logits, (torch.zeros(4, 5), torch.full((4, 3), -1))).backward()
    assert torch.equal(logits.grad, torch.zeros(4, 3))  # type: ignore[arg-type]


def test_the_metric_is_the_mean_over_classes_of_the_average_precision_of_what_is_known() -> None:
    metrics = task().metrics()
    for part in (slice(2), slice(2, 4)):
        task().update(metrics, LOGITS[part], (BATCH[0][part], LABELS[part]))
    known = (LABELS >= 0) & (LABELS != 9)
    expected = [average_precision_score(LABELS[k, c], LOGITS[k, c]) for c in range(3) for k in [known[:, c]]]
    found = metrics.compute()
    assert float(found["map"]) == pytest.approx(sum(expected) / 3)
    assert float(found["loss"]) == pytest.approx(float(task().loss(LOGITS, BATCH)))


def test_chance_is_the_mean_prevalence() -> None:
    chance = task().constant()
    task().update(_collection(chance), LOGITS, BATCH)
    assert float(chance.compute()) == pytest.approx((2 / 4 + 1 / 3 + 2 / 3) / 3)


def _collection(chance: Any) -> Any:
    from torchmetrics import MetricCollection

    return MetricCollection({"chance": chance}, compute_groups=False)


def test_answers_agree_where_the_same_classes_are_there() -> None:
    assert task().agreement(LOGITS, LOGITS * torch.tensor([[1.0], [2.0], [-1.0], [0.5]])).tolist() == [1, 1, 0, 1]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (lambda: MultiLabel(0), "classes=0 is not possible"),
        (lambda: MultiLabel(2, [1.0]), "positive_weights has 1 numbers for 2 classes"),
        (lambda: MultiLabel(2, [1.0, -1.0]), r"positive_weights=\[1.0, -1.0\] are not possible"),
        (lambda: task().loss(LOGITS, (BATCH[0], LABELS[:, :2])), r"1, 0 or -1 of shape \(B, 3\) are needed"),
        (lambda: MultiLabel(3).check_batch(LOGITS, BATCH), "label 9 is neither 1"),
        (lambda: task().outputs(LOGITS[:, :2], Asked("student", 4)), r"logits of shape \(B, 3\) are needed"),
    ],
)
def test_what_is_no_batch_or_setting_is_refused(given: Callable[[], Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        given()


# ---- distillation


class Signs(LightningDataModule):
    """Which of the first three numbers are positive."""

    def train_dataloader(self) -> DataLoader:
        x = torch.randn(128, 5, generator=torch.Generator().manual_seed(0))
        return DataLoader(list(zip(x, (x[:, :3] > 0).long(), strict=True)), batch_size=32)

    val_dataloader = train_dataloader


def network(width: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 3))


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.02)


def test_a_student_of_several_labels_distils_class_by_class(make_trainer: Callable[..., Trainer]) -> None:
    teacher = network(32)
    make_trainer(max_epochs=15).fit(ClassifierModule(teacher, optimizer=adam, task=MultiLabel(3)), datamodule=Signs())
    module = DistillModule(
        FrozenTeacher(teacher),
        network(8),
        quantization=Recipe(bits="w4a4"),
        distillation_loss=BinaryKL(),
        regularizer=ElementwiseMLP(hidden=4),
        student_optimizer=adam,
        student_schedule=Constant(),
        task=MultiLabel(3),
    )
    trainer = make_trainer(max_epochs=10, limit_test_batches=1.0)
    trainer.fit(module, datamodule=Signs())
    assert float(trainer.callback_metrics["val/map"]) > 0.9
    assert module.references["teacher"] > 0.95  # type: ignore[operator]


@pytest.mark.parametrize(
    ("loss", "taps"),
    [(HintonKL(), None), (Standardized(HintonKL()), None), (StitchedKL(), [Tap("0", "0")])],
    ids=lambda given: type(given).__name__,
)
def test_a_loss_on_the_softmax_is_refused_for_several_labels(loss: DistillationLoss, taps: list[Tap] | None) -> None:
    told = f"{type(loss).__name__} compares the softmax of logits, which is no prediction of task MultiLabel"
    with pytest.raises(UsageError, match=told):
        DistillModule(FrozenTeacher(network(8)), network(8), distillation_loss=loss, taps=taps, task=MultiLabel(3))


def test_predictions_are_the_probability_of_each_class() -> None:
    found: Tensor = task().predictions(LOGITS, BATCH)
    assert torch.equal(found, LOGITS.sigmoid())


@pytest.mark.parametrize(
    ("task", "independent"),
    [(MultiLabel(3), True), (Detection(3), True), (Segmentation(3), False), (Classification(), False)],
)
def test_a_regularizer_is_told_whether_each_logit_is_a_class_by_itself(task: Task, independent: bool) -> None:
    module = DistillModule(
        FrozenTeacher(network(8)),
        network(8),
        distillation_loss=LogitResidual(),
        regularizer=SampleWeight(),
        task=task,
    )
    assert module.regularizer is not None
    assert module.regularizer.independent is independent
