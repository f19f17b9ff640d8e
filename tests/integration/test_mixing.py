"""Trainings on mixed and otherwise augmented digits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer

from lqkd.data import Digits
from lqkd.losses import DKD
from lqkd.modules import ClassifierModule, DistillModule
from lqkd.regularizers import ElementwiseMLP, LookAhead
from lqkd.tasks.labels import Samples
from lqkd.teachers import FrozenTeacher
from tests.conftest import distiller, network
from tests.recorder import Recorder

MakeTrainer = Callable[..., Trainer]


def mixed_digits(**arguments: Any) -> Digits:
    return Digits(
        batch_size=16,
        limit_train=7 * 16,
        eval_batch_size=256,
        rand_augment=2,
        random_erasing=0.3,
        **{"mixup": 0.8, "cutmix": 1.0, **arguments},
    )


class Batches(Recorder):
    """Keeps batches and what the step returned for them."""

    def __init__(self) -> None:
        self.seen = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append((batch, outputs, trainer.callback_metrics["train/loss"].clone()))


def test_the_task_takes_probabilities_and_the_teacher_sees_the_mixed_images(make_trainer: MakeTrainer) -> None:
    teacher = FrozenTeacher(network(14), minimum_accuracy=0.0, precision="fp32")
    module, batches = distiller(teacher=teacher, label_smoothing=0.1), Batches()
    trainer = make_trainer(callbacks=[batches])
    trainer.fit(module, datamodule=mixed_digits())
    assert len(batches.seen) == 7
    for batch, outputs, _ in batches.seen:
        assert batch.targets.shape == (16, 10)
        assert 0 < batch.targets.amax(dim=1).min() < 1
        assert torch.equal(outputs["labels"], batch.labels)
        torch.testing.assert_close(outputs["teacher"], module.teacher(batch.images).float())
    batch, outputs, _ = batches.seen[-1]
    expected = F.cross_entropy(outputs["student"], batch.targets, label_smoothing=0.1)
    torch.testing.assert_close(trainer.callback_metrics["train/task"], expected)
    assert 0 <= trainer.callback_metrics["val/acc"] <= 1


@pytest.mark.parametrize("exact", [False, True])
def test_what_needs_hard_labels_and_what_looks_ahead_take_mixed_batches(make_trainer: MakeTrainer, exact: bool) -> None:
    regularizer = ElementwiseMLP(hidden=8, label=True, guard="mean_one", player=LookAhead(exact=exact))
    module, batches = distiller(distillation_loss=DKD(), regularizer=regularizer), Batches()
    make_trainer(callbacks=[batches]).fit(module, datamodule=mixed_digits())
    assert all(torch.isfinite(loss) for _, _, loss in batches.seen)


def test_looking_ahead_heeds_the_probabilities() -> None:
    module = distiller(regularizer=ElementwiseMLP(hidden=8, guard="mean_one", player=LookAhead(exact=True)))
    data = mixed_digits()
    data.setup("fit")
    batch = data.preprocess(next(iter(data.train_dataloader())), train=True, epoch=0)
    found = [look_ahead(module, batch.images, batch.labels, targets) for targets in (batch.targets, None)]
    assert not torch.allclose(*found)


def look_ahead(
    module: DistillModule, images: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor | None
) -> torch.Tensor:
    module._connect_unseen()
    alignment = module.losses(Samples(images, labels, targets)).divergences["distill"].maps[0].alignment
    assert alignment is not None
    return alignment


def test_a_classifier_learns_from_probabilities(make_trainer: MakeTrainer) -> None:
    module = ClassifierModule(network(), optimizer=lambda p: torch.optim.SGD(p, lr=0.0), label_smoothing=0.1)
    batches = Batches()
    make_trainer(callbacks=[batches]).fit(module, datamodule=mixed_digits())
    module.train()
    for batch, _, loss in batches.seen:
        torch.testing.assert_close(loss, F.cross_entropy(module(batch.images), batch.targets, label_smoothing=0.1))


def test_an_epoch_of_a_mixed_training_repeats_bit_by_bit(make_trainer: MakeTrainer) -> None:
    runs = []
    for _ in range(2):
        batches = Batches()
        make_trainer(callbacks=[batches]).fit(distiller(), datamodule=mixed_digits())
        runs.append(torch.stack([loss for _, _, loss in batches.seen]))
    assert torch.equal(*runs)
