"""The accuracies against which a student is judged, measured before its first step."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lqkd.errors import UsageError
from lqkd.modules.batches import check_range
from lqkd.modules.distilling import Distilling
from lqkd.modules.stages import in_stage
from lqkd.quantization import float_mode
from lqkd.quantization.modes import evaluating
from lqkd.utils.progress import track

REFERENCES = ("teacher_accuracy", "student_float_accuracy", "student_initial_quantized_accuracy")
"""Keys of what :func:`measure` returns."""

UNCHECKED = "the teacher was not checked"


def measure(
    module: Distilling, known: dict[str, float | None], of_teacher: dict[str, float | None]
) -> dict[str, float | None]:
    """Check the teacher on the validation split, then measure teacher and student on the test split.

    The test split selects nothing: its numbers are only reported. A DataModule without one has its validation split
    stand in for it; without a DataModule nothing is measured and all values are None. What is not done is told in one
    line, which ``module.warnings`` keeps. Samples without a label (negative) are left out.

    A student without ``student_weights`` whose accuracy before quantization is that of chance has not been trained:
    there is no ``student_float_accuracy`` of it.

    Args:
        module: the module, attached to a Trainer, before its first step.
        known: what a checkpoint brought: the student is not measured again, the teacher always is.
        of_teacher: the teacher's accuracies that a cache of its answers brought, which are not measured again; what
            is measured is added.

    Raises:
        UsageError: when the teacher is below its ``minimum_accuracy`` on the validation split, or no sample of that
            has a label.
    """
    trainer = module.trainer
    data = getattr(trainer, "datamodule", None)
    if data is None:
        warn(module, f"{UNCHECKED}, and no accuracy before the training was measured: there is no DataModule")
        return dict.fromkeys(REFERENCES)
    rank_zero_info("measuring teacher and student before the first step")
    validation = (loader_of(data, "val_dataloader"), trainer.limit_val_batches)
    _check_teacher(module, *_of_teacher(module, "validation", validation, of_teacher), _count(*validation))
    test = loader_of(data, "test_dataloader")
    has_test = test is not None
    split = (test, trainer.limit_test_batches) if has_test else validation
    measured = dict(known)
    name = "test" if has_test else "validation"
    measured["teacher_accuracy"], _ = _of_teacher(module, name, split, of_teacher)
    if known["student_initial_quantized_accuracy"] is None:
        with float_mode(module.student):
            found, _ = accuracy(module, module.student, *split)
        measured["student_float_accuracy"] = None if _is_chance(module, found) else found
        measured["student_initial_quantized_accuracy"], _ = accuracy(module, module.student, *split)
    return measured


def loader_of(data: Any, hook: str) -> Any:
    """What ``hook`` of a DataModule gives; None where the class has none of its own."""
    return getattr(data, hook)() if is_overridden(hook, data, LightningDataModule) else None


def _count(loader: Any, limit: float) -> int:
    """How many batches of a loader are meant by ``limit``: a number (int) or a part of them (float)."""
    if loader is None:
        return 0
    return limit if isinstance(limit, int) else int(len(loader) * limit)


def warn(module: Distilling, sentence: str) -> None:
    """Say ``sentence`` once, and keep it for the summary."""
    module.warnings.append(sentence)
    rank_zero_warn(sentence)


def _of_teacher(
    module: Distilling, split: str, batches: tuple[Any, float], known: dict[str, float | None]
) -> tuple[float | None, float | None]:
    """As :func:`accuracy` of the teacher, asked only when it is not known for as many batches of the split."""
    loader, limit = batches
    name = f"{split}, {evaluated(module, limit)}"
    largest = f"largest class of {name}"
    if name not in known or largest not in known:
        known[name], known[largest] = accuracy(module, module.teacher, loader, limit)
    return known[name], known[largest]


def _is_chance(module: Distilling, found: float | None) -> bool:
    """Whether a student that was given no weights answers like one that has not been trained."""
    classes = getattr(module.trainer.datamodule, "class_names", ())  # type: ignore[attr-defined]
    untrained = module.hparams.get("student_weights") is None  # unless its class brings weights of its own
    return found is not None and untrained and found < lowest_accuracy(len(classes))


def evaluated(module: Distilling, limit: float) -> str:
    """What of a split is evaluated, and how its images are prepared.

    Args:
        module: the module, attached to a Trainer.
        limit: as of :func:`accuracy`.
    """
    data = getattr(module.trainer, "datamodule", None)
    whole = isinstance(limit, float) and limit == 1.0  # in batches of whatever size
    size = "" if whole else f" of {getattr(data, 'eval_batch_size', None)} x {module.trainer.world_size}"
    return f"{limit!r} batches{size}, resize_size={getattr(data, 'resize_size', None)}"


def _check_teacher(module: Distilling, measured: float | None, largest_class: float | None, batches: int) -> None:
    if getattr(module.trainer, "fast_dev_run", False):
        rank_zero_info(f"{UNCHECKED}: trainer.fast_dev_run")
        return
    if measured is None or largest_class is None:
        if batches > 0:
            raise UsageError(
                "no sample of the validation split has a label, so that nothing can be measured on it: give labels, or "
                "train without validation (trainer.limit_val_batches=0)"
            )
        warn(module, f"{UNCHECKED}: there is no validation data")
        return
    classes = getattr(module.trainer.datamodule, "class_names", None)  # type: ignore[attr-defined]
    minimum = module.teacher.minimum_accuracy
    floor = lowest_accuracy(0 if classes is None else len(classes)) if minimum is None else minimum
    if measured < floor:
        raise UsageError(
            f"the teacher is right on {measured:.1%} of the validation images, less than teacher.minimum_accuracy="
            f"{floor:.3g}: check its weights, normalisation (mean, std) and class order, or lower the minimum"
        )
    if minimum is None and measured <= largest_class:  # of few images, or of uneven classes
        warn(
            module,
            f"the teacher is right on {measured:.1%} of the validation images, no more than always naming the largest "
            f"class is ({largest_class:.1%}): check its weights, normalisation (mean, std) and class order",
        )


def lowest_accuracy(classes: int) -> float:
    """Below it a teacher is hardly better than chance: 1.5 times that, or 10 points more where that is less.

    Args:
        classes: their number; 0 where it is not known, which accepts any teacher.
    """
    chance = 1.0 / classes if classes else 0.0
    return min(1.5 * chance, chance + 0.1)


@torch.no_grad()
def accuracy(module: Distilling, network: nn.Module, loader: Any, limit: float) -> tuple[float | None, float | None]:
    """Top-1 accuracy of ``network``, and what always naming the largest class would reach, all ranks together.

    Args:
        module: the module, attached to a Trainer.
        network: from images to logits.
        loader: yields batches (images, labels, ...).
        limit: number of batches (int) or part of them (float), as Trainer's limits; 0 gives None twice, and so does a
            split without a labelled sample.
    """
    batches = _count(loader, limit)
    if batches == 0:
        return None, None
    trainer = module.trainer
    of_classes: Tensor | None = None  # images of each class
    metric = MeanMetric().to(module.device)
    with evaluating(network), in_stage(trainer, RunningStage.TESTING), trainer.precision_plugin.forward_context():
        taken = islice(loader, batches)
        if trainer.is_global_zero:
            taken = track(taken, "measuring before the first step", batches)  # type: ignore[assignment]
        for batch in taken:
            images, labels, _ = module.samples(trainer.strategy.batch_to_device(batch, dataloader_idx=0))
            logits = network(images)
            check_range(labels, logits.shape[1])
            labelled = (labels >= 0).float()
            metric.update((logits.argmax(dim=1) == labels).float(), labelled)
            counts = torch.zeros(logits.shape[1], device=module.device).index_add_(0, labels.clamp_min(0), labelled)
            of_classes = counts if of_classes is None else of_classes + counts
    of_classes = trainer.strategy.reduce(of_classes, reduce_op="sum")
    assert of_classes is not None, "there was a batch"
    if not of_classes.any():
        return None, None
    return float(metric.compute()), float(of_classes.max() / of_classes.sum())
