"""The values of the task's metric against which a student is judged, measured before its first step."""

from __future__ import annotations

import math
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torchmetrics import Metric, MetricCollection

from lqkd.errors import UsageError
from lqkd.modules.distilling import Distilling
from lqkd.modules.stages import in_stage
from lqkd.quantization import float_mode
from lqkd.quantization.modes import evaluating
from lqkd.tasks import Asked, Classification
from lqkd.utils.progress import track

REFERENCES = ("teacher_accuracy", "student_float_accuracy", "student_initial_quantized_accuracy")
"""Keys of what :func:`measure` returns; their values are those of the task's metric, whatever it is."""

_CONSTANT = "always the same answer"

UNCHECKED = "the teacher was not checked"


def measure(
    module: Distilling, known: dict[str, float | None], of_teacher: dict[str, float | None]
) -> dict[str, float | None]:
    """Check the teacher on the validation split, then measure teacher and student on the test split.

    The test split selects nothing: its numbers are only reported. A DataModule without one has its validation split
    stand in for it; without a DataModule nothing is measured and all values are None. What is not done is told in one
    line, which ``module.warnings`` keeps. Samples without a label (negative) are left out.

    A student without ``student_weights`` that is no better than chance before quantization has not been trained: there
    is no ``student_float_accuracy`` of it.

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
    for name in module.judged:
        on_validation = _of_teacher(module, name, "validation", validation, of_teacher)
        _check_teacher(module, name, *on_validation, batches_of(*validation))
    test = loader_of(data, "test_dataloader")
    has_test = test is not None
    split = (test, trainer.limit_test_batches) if has_test else validation
    measured = dict(known)
    split_name = "test" if has_test else "validation"
    by_name = {name: _of_teacher(module, name, split_name, split, of_teacher)[0] for name in module.judged}
    values = [value for value in by_name.values() if value is not None]
    measured["teacher_accuracy"] = (max if module.task.mode == "max" else min)(values, default=None)
    if len(by_name) > 1:
        told = ", ".join(f"{name} {module.task.shown(v)}" for name, v in by_name.items() if v is not None)
        rank_zero_info(f"{module.task.metric} of each on the {split_name} split: {told}")
    if known["student_initial_quantized_accuracy"] is None:
        with float_mode(module.student):
            found, _ = accuracy(module, module.student, *split)
        measured["student_float_accuracy"] = None if _is_chance(module, found) else found
        measured["student_initial_quantized_accuracy"], _ = accuracy(module, module.student, *split)
    return measured


def loader_of(data: Any, hook: str) -> Any:
    """What ``hook`` of a DataModule gives; None where the class has none of its own."""
    return getattr(data, hook)() if is_overridden(hook, data, LightningDataModule) else None


def batches_of(loader: Any, limit: float) -> int:
    """How many batches of a loader are meant by ``limit``: a number (int) or a part of them (float)."""
    if loader is None:
        return 0
    return limit if isinstance(limit, int) else int(len(loader) * limit)


def warn(module: Distilling, sentence: str) -> None:
    """Say ``sentence`` once, and keep it for the summary."""
    module.warnings.append(sentence)
    rank_zero_warn(sentence)


def _of_teacher(
    module: Distilling, teacher: str, split: str, batches: tuple[Any, float], known: dict[str, float | None]
) -> tuple[float | None, float | None]:
    """As :func:`accuracy` of a teacher, asked only when it is not known for as many batches of the split."""
    loader, limit = batches
    name = f"{split}, {evaluated(module, limit)}"
    if not isinstance(module.task, Classification):  # whose values are kept under the plain name
        name = f"{type(module.task).__name__} {module.task.monitor} of {name}"
    if len(module.judged) > 1:
        name = f"{[*module.judged].index(teacher)}: {name}"
    largest = f"largest class of {name}"
    if name not in known or largest not in known:
        known[name], known[largest] = accuracy(module, module.judged[teacher], loader, limit)
    return known[name], known[largest]


def _is_chance(module: Distilling, found: float | None) -> bool:
    """Whether a student that was given no weights answers like one that has not been trained."""
    chance = module.task.chance(module.trainer.datamodule)  # type: ignore[attr-defined]
    untrained = module.hparams.get("student_weights") is None  # unless its class brings weights of its own
    return found is not None and untrained and module.task.better(chance, found)


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


def _check_teacher(
    module: Distilling, name: str, measured: float | None, same_answer: float | None, batches: int
) -> None:
    if getattr(module.trainer, "fast_dev_run", False):
        rank_zero_info(f"{UNCHECKED}: trainer.fast_dev_run")
        return
    if measured is None:
        if batches > 0:
            raise UsageError(
                "no sample of the validation split has a label, so that nothing can be measured on it: give labels, or "
                "train without validation (trainer.limit_val_batches=0)"
            )
        warn(module, f"{UNCHECKED}: there is no validation data")
        return
    task, minimum = module.task, module.judged[name].minimum_accuracy
    floor = task.chance(module.trainer.datamodule) if minimum is None else minimum  # type: ignore[attr-defined]
    advice, does = "check its weights, normalisation (mean, std) and class order", task.described(measured)
    if task.better(floor, measured):
        raise UsageError(
            f"the {name} {does}, less than teacher.minimum_accuracy={floor:.3g}: {advice}, or lower the minimum"
            if task.mode == "max"
            else f"the {name} {does}, more than the {floor:.3g} of an untrained network: {advice}"
        )
    constant = task.constant()
    if minimum is None and constant is not None and same_answer is not None and not task.better(measured, same_answer):
        # of few images, or of uneven classes
        warn(
            module,
            f"the {name} {does}, no more than {constant.name} is ({task.shown(same_answer)}): {advice}",
        )


@torch.no_grad()
def accuracy(module: Distilling, network: nn.Module, loader: Any, limit: float) -> tuple[float | None, float | None]:
    """The task's metric of ``network``, and what always giving the same answer would reach, all ranks together.

    Args:
        module: the module, attached to a Trainer.
        network: the teacher, one of them, or the student.
        loader: yields batches.
        limit: number of batches (int) or part of them (float), as Trainer's limits; 0 gives None twice, and so does a
            split without a labelled sample. The second is None for a task that does not know.
    """
    batches = batches_of(loader, limit)
    if batches == 0:
        return None, None
    trainer, task = module.trainer, module.task
    constant = task.constant()
    counted: dict[str, Metric | MetricCollection] = {task.metric: task.metrics()[task.metric]}
    counted |= {} if constant is None else {_CONSTANT: constant}
    metrics = MetricCollection(counted, compute_groups=False).to(module.device)
    with evaluating(network), in_stage(trainer, RunningStage.TESTING), trainer.precision_plugin.forward_context():
        taken = islice(loader, batches)
        if trainer.is_global_zero:
            taken = track(taken, "measuring before the first step", batches)  # type: ignore[assignment]
        for of_loader in taken:
            batch = trainer.strategy.batch_to_device(of_loader, dataloader_idx=0)
            inputs = module.inputs(batch)
            given = inputs if network is module.student else module.teacher_inputs(batch, inputs)
            outputs = task.outputs(given.call(network), Asked("network", len(inputs)))
            task.check_batch(outputs, batch)
            task.update(metrics, outputs, batch)
    found = {name: float(value) for name, value in metrics.compute().items()}
    if math.isnan(found[task.metric]):
        return None, None
    return found[task.metric], found.get(_CONSTANT)
