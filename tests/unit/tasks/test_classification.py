"""Classification as a task, against float64, scikit-learn and torchmetrics."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, log_loss
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from lqkd.errors import UsageError
from lqkd.tasks import Asked, Classification
from lqkd.tasks.labels import Samples
from lqkd.tasks.metrics import LargestClass

LOGITS = 3 * torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(-1, 5, (40,), generator=torch.Generator().manual_seed(1))
IMAGES = torch.zeros(40, 1, 2, 2)
KNOWN = LABELS >= 0


def measured(*batches: tuple[Tensor, Tensor]) -> dict[str, float]:
    task = Classification()
    metrics = task.metrics()
    for logits, labels in batches:
        task.update(metrics, logits, (IMAGES[: len(logits)], labels))
    return {name: float(value) for name, value in metrics.compute().items()}


def test_metrics_are_those_of_scikit_learn_over_the_labelled_samples() -> None:
    found = measured((LOGITS[:7], LABELS[:7]), (LOGITS[7:], LABELS[7:]))
    predicted = LOGITS[KNOWN].double().softmax(1).numpy()
    truth = LABELS[KNOWN].numpy()
    assert found["loss"] == pytest.approx(log_loss(truth, predicted, labels=range(5)), abs=1e-6)
    assert found["acc"] == pytest.approx(accuracy_score(truth, predicted.argmax(1)), abs=1e-7)


def test_the_accuracy_is_that_of_torchmetrics() -> None:
    expected = MulticlassAccuracy(5, average="micro", ignore_index=-1)(LOGITS, LABELS)
    assert measured((LOGITS, LABELS))["acc"] == pytest.approx(float(expected), abs=1e-7)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_that_of_float64(smoothing: float) -> None:
    task = Classification(smoothing)
    log_p = LOGITS[KNOWN].double().log_softmax(1)
    hard = -log_p.gather(1, LABELS[KNOWN, None]).mean()
    expected = (1 - smoothing) * hard - smoothing * log_p.mean()
    assert float(task.loss(LOGITS, (IMAGES, LABELS))) == pytest.approx(float(expected), abs=1e-6)


def test_probabilities_of_a_batch_are_what_the_loss_learns_from() -> None:
    targets = torch.rand(40, 5).softmax(1)
    expected = -(targets.double() * LOGITS.double().log_softmax(1)).sum(1).mean()
    assert float(Classification().loss(LOGITS, Samples(IMAGES, LABELS, targets))) == pytest.approx(float(expected))


def test_without_labels_nothing_is_measured() -> None:
    assert all(math.isnan(value) for value in measured((LOGITS, torch.full((40,), -1))).values())


def test_a_part_of_a_batch_is_a_batch() -> None:
    task, batch = Classification(), Samples(IMAGES, LABELS, LOGITS.softmax(1))
    part = task.part(batch, slice(3, 9))
    expected = task.loss(LOGITS[3:9], Samples(IMAGES[3:9], LABELS[3:9], LOGITS.softmax(1)[3:9]))
    assert torch.equal(task.loss(LOGITS[3:9], part), expected)


def test_the_largest_class_is_counted_over_all_batches() -> None:
    metric = LargestClass()
    metric.update(LOGITS[:4], torch.tensor([1, 1, 0, -1]))
    metric.update(LOGITS[:3], torch.tensor([0, 0, -1]))
    assert float(metric.compute()) == pytest.approx(3 / 5)


@pytest.mark.parametrize("returned", [torch.zeros(4, 5, 1), torch.zeros(3, 5), torch.zeros(())])
def test_what_is_no_logits_for_the_batch_is_refused(returned: Any) -> None:
    with pytest.raises(UsageError, match=r"the student returns a tensor of shape .* for 4 images"):
        Classification().outputs(returned, Asked("student", 4))


def test_networks_that_tell_other_numbers_of_classes_apart_are_refused() -> None:
    outputs = {"teacher": torch.zeros(1, 5), "student": torch.zeros(1, 4)}
    with pytest.raises(UsageError, match=r"\(teacher 5, student 4\)"):
        Classification().check(outputs, None)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_a_label_smoothing_out_of_range_is_refused(smoothing: float) -> None:
    with pytest.raises(UsageError, match="label_smoothing"):
        Classification(smoothing)


def test_classes_weigh_in_the_loss_and_not_in_what_is_measured() -> None:
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, -1, 1, 7])
    task = Classification(class_weights=[1.0, 2.0, 0.5], ignore_index=7)
    batch = (torch.zeros(6, 1), labels)
    kept = torch.tensor([0, 1, 2, 4])
    expected = F.cross_entropy(logits[kept], labels[kept], torch.tensor([1.0, 2.0, 0.5]))
    assert torch.allclose(task.loss(logits, batch), expected)
    metrics = task.metrics()
    task.update(metrics, logits, batch)
    assert float(metrics.compute()["loss"]) == pytest.approx(float(F.cross_entropy(logits[kept], labels[kept])))
    assert (task.rows(logits, batch).labels >= 0).tolist() == [True, True, True, False, True, False]


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [1.0, float("nan")], [-1.0, 1.0]])
def test_weights_that_weigh_nothing_are_refused(weights: list[float]) -> None:
    with pytest.raises(UsageError, match=r"class_weights=.* must be finite and >= 0, and one above 0"):
        Classification(class_weights=weights)


def test_there_is_a_weight_for_each_class() -> None:
    task = Classification(class_weights=[1.0, 2.0])
    with pytest.raises(UsageError, match="class_weights has 2 numbers, and the network 3 classes"):
        task.check_batch(torch.zeros(2, 3), (torch.zeros(2, 1), torch.tensor([0, 1])))
    with pytest.raises(UsageError, match=r"numbers of classes differ \(class_weights 2, student 3\)"):
        task.check({"student": torch.zeros(2, 3)}, None)
