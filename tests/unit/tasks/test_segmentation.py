"""Segmentation as a task, against float64 and scikit-learn."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, jaccard_score, log_loss
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.tasks import Asked, Segmentation

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = 3 * torch.randn(2, 4, 6, 8, generator=GENERATOR)
MASKS = torch.randint(0, 4, (2, 6, 8), generator=GENERATOR)
MASKS[0, :2] = 255
IMAGES = torch.zeros(2, 3, 6, 8)
KNOWN = MASKS != 255
ALL_IGNORED = torch.full_like(MASKS, 255)


def test_rows_are_the_pixels_that_are_not_ignored() -> None:
    rows = Segmentation(4).rows(LOGITS, (IMAGES, MASKS))
    assert torch.equal(rows.labels, MASKS[KNOWN])
    assert torch.equal(rows.logits, LOGITS.permute(0, 2, 3, 1)[KNOWN])


@pytest.mark.parametrize("batch", [(IMAGES, MASKS), (IMAGES, ALL_IGNORED), IMAGES], ids=["masks", "ignored", "images"])
def test_every_row_knows_its_image(batch: Any) -> None:
    """Marked by logits that are the number of the image."""
    task, marked = Segmentation(4), torch.arange(2.0).view(2, 1, 1, 1).expand_as(LOGITS)
    rows = task.rows(marked, batch)
    samples = task.samples_of_rows(rows, batch)
    assert samples.number == 2
    assert torch.equal(samples.of_rows.float(), rows.logits[:, 0])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_mean_over_the_pixels_that_are_not_ignored(smoothing: float) -> None:
    task = Segmentation(4, label_smoothing=smoothing)
    logits = LOGITS.permute(0, 2, 3, 1)[KNOWN].double()
    expected = F.cross_entropy(logits, MASKS[KNOWN], label_smoothing=smoothing)
    assert float(task.loss(LOGITS, (IMAGES, MASKS))) == pytest.approx(float(expected), abs=1e-6)


def test_metrics_are_those_of_scikit_learn() -> None:
    task = Segmentation(4)
    metrics = task.metrics()
    for image in range(2):
        part = slice(image, image + 1)
        task.update(metrics, LOGITS[part], (IMAGES[part], MASKS[part]))
    found = {name: float(value) for name, value in metrics.compute().items()}
    truth, predicted = MASKS[KNOWN].numpy(), LOGITS.permute(0, 2, 3, 1)[KNOWN].double().softmax(1).numpy()
    assert found["miou"] == pytest.approx(jaccard_score(truth, predicted.argmax(1), average="macro"), abs=1e-6)
    assert found["acc"] == pytest.approx(accuracy_score(truth, predicted.argmax(1)), abs=1e-6)
    assert found["loss"] == pytest.approx(log_loss(truth, predicted, labels=range(4)), abs=1e-5)


def test_outputs_of_another_size_are_interpolated_to_the_masks() -> None:
    small = LOGITS[:, :, ::2, ::2].contiguous()
    large = F.interpolate(small, (6, 8), mode="bilinear", align_corners=False)
    task, batch = Segmentation(4), (IMAGES, MASKS)
    assert torch.equal(task.rows(small, batch).logits, task.rows(large, batch).logits)
    assert torch.equal(task.loss(small, batch), task.loss(large, batch))
    assert task.predictions(small, batch).shape == (2, 6, 8)


def test_a_batch_of_ignored_pixels_teaches_nothing() -> None:
    logits = LOGITS.clone().requires_grad_()
    task, batch = Segmentation(4), (IMAGES, ALL_IGNORED)
    loss = task.loss(logits, batch) + task.rows(logits, batch).logits.square().mean()
    assert float(loss.detach()) == 0.0
    assert not torch.autograd.grad(loss, logits)[0].any()
    assert task.unlabelled(batch)


def test_torchvisions_dict_is_read() -> None:
    outputs = Segmentation(4).outputs({"out": LOGITS, "aux": LOGITS + 1}, Asked("student", 2))
    assert torch.equal(outputs, LOGITS)


@pytest.mark.parametrize(
    ("masks", "message"),
    [(MASKS.float(), "whole numbers"), (MASKS[:, 0], "whole numbers"), (MASKS.clamp_max(4) + 1, "out of range")],
)
def test_masks_that_are_none_are_told(masks: Tensor, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Segmentation(4).check_batch(LOGITS, (IMAGES, masks))


@pytest.mark.parametrize("settings", [{"classes": 1}, {"classes": 4, "ignore_index": 3}])
def test_settings_that_are_not_possible_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="is not possible"):
        Segmentation(**settings)


def test_a_network_with_other_classes_is_refused() -> None:
    with pytest.raises(UsageError, match=r"numbers of classes differ \(task 5, student 4\)"):
        Segmentation(5).check({"student": LOGITS}, None)


def test_data_with_other_classes_are_refused() -> None:
    with pytest.raises(UsageError, match=r"numbers of classes differ \(task 4, data 3\)"):
        Segmentation(4).check({}, SimpleNamespace(class_names=("sky", "road", "car")))


def test_answers_agree_by_the_share_of_pixels_of_each_image() -> None:
    ours = F.one_hot(torch.tensor([[[0, 1], [2, 2]], [[0, 0], [0, 0]]]), 3).movedim(-1, 1).float()
    theirs = F.one_hot(torch.tensor([[[0, 1], [2, 0]], [[0, 0], [0, 0]]]), 3).movedim(-1, 1).float()
    assert Segmentation(3).agreement(ours, theirs).tolist() == [0.75, 1.0]
