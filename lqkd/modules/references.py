"""The accuracies against which a student is judged, measured before its first step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torchmetrics import MeanMetric

from lqkd.errors import UsageError
from lqkd.quantization import float_mode
from lqkd.quantization.modes import evaluating

if TYPE_CHECKING:
    from lqkd.modules.distill import DistillModule

REFERENCES = ("teacher_accuracy", "student_float_accuracy", "student_initial_quantized_accuracy")
"""Keys of what :func:`measure` returns."""


def measure(module: DistillModule) -> dict[str, float | None]:
    """Check the teacher on the validation split, then measure teacher and student on the test split.

    The test split selects nothing: its numbers are only reported. Without one the validation split stands in for it;
    without a DataModule nothing is measured and all values are None.

    Raises:
        UsageError: when the teacher is at or below its ``minimum_accuracy`` on the validation split.
    """
    data = getattr(module.trainer, "datamodule", None)
    if data is None:
        return dict.fromkeys(REFERENCES)
    _check_teacher(module, data.val_dataloader())
    loader = data.test_dataloader()
    rank_zero_info("measuring teacher and student before the first step")
    teacher = accuracy(module, module.teacher, loader)
    with float_mode(module.student):
        student_float = accuracy(module, module.student, loader)
    return {
        "teacher_accuracy": teacher,
        "student_float_accuracy": student_float,
        "student_initial_quantized_accuracy": accuracy(module, module.student, loader),
    }


def _check_teacher(module: DistillModule, loader: Any) -> None:
    measured = accuracy(module, module.teacher, loader)
    chance = 1.0 / len(module.trainer.datamodule.class_names)  # type: ignore[attr-defined]
    minimum = module.teacher.minimum_accuracy
    floor = 1.5 * chance if minimum is None else minimum
    if measured < floor and not getattr(module.trainer, "fast_dev_run", False):
        raise UsageError(
            f"the teacher is right on {measured:.1%} of the validation images and chance is {chance:.1%}: check its "
            "weights, normalisation (teacher mean and std) and class order, or set teacher.minimum_accuracy=0"
        )


@contextmanager
def _testing(trainer: Trainer) -> Iterator[None]:
    """Let the data's hooks prepare batches as in a test: at this point of a fit they would augment them."""
    stage = trainer.state.stage
    trainer.testing = True
    try:
        yield
    finally:
        trainer.state.stage = stage


@torch.no_grad()
def accuracy(module: DistillModule, network: nn.Module, loader: Any) -> float:
    """Top-1 accuracy of ``network`` over ``loader``, all ranks together, within the Trainer's test limits."""
    trainer = module.trainer
    limit = trainer.limit_test_batches
    batches = limit if isinstance(limit, int) else int(len(loader) * limit)
    metric = MeanMetric().to(module.device)
    with evaluating(network), _testing(trainer), trainer.precision_plugin.forward_context():
        for batch in islice(loader, max(1, batches)):
            images, labels = trainer.strategy.batch_to_device(batch, dataloader_idx=0)[:2]
            metric.update((network(images).argmax(dim=1) == labels).float())
    return float(metric.compute())
