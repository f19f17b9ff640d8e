"""The values of the task's metric against which a student is judged, measured before its first step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from itertools import islice
from types import SimpleNamespace
from typing import Any

import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torchmetrics import Metric, MetricCollection

from lqkd.data.reading import apart, first_batch, only_loader
from lqkd.errors import UsageError
from lqkd.modules.calibrated import calibrated
from lqkd.modules.distilling import Distilling
from lqkd.modules.stages import in_stage
from lqkd.quantization import float_mode
from lqkd.quantization.modes import evaluating
from lqkd.tasks import Asked, Classification, Task
from lqkd.utils.progress import track

REFERENCES = ("teacher", "student_float", "student_start", "student_gptq")
"""Keys of what :func:`measure` returns, values of the task's metric: the teacher, the student before it was quantised,
quantised before its first step, and with the codes of GPTQ where that is asked for."""

_CONSTANT = "always the same answer"

UNCHECKED = "the teacher was not checked"


def measure(
    module: Distilling, known: dict[str, float | None], of_teacher: dict[str, float | None]
) -> dict[str, float | None]:
    """Check the teacher on the validation split, then measure teacher and student on the test split.

    The test split selects nothing: its numbers are only reported. Where there is none, as with DataLoaders alone, the
    validation split stands in for it; without any of both all values are None. What is not done is told in one line,
    which ``module.warnings`` keeps. Samples without a label (negative) are left out.

    The quantised student is measured as the trained one will be, with what callbacks make of it before it is validated
    (:class:`~lqkd.callbacks.BatchNormReestimation`, say), and is then what it was.

    A student without ``student_weights`` that is no better than chance before quantization has not been trained: there
    is no ``student_float`` of it.

    Args:
        module: the module, attached to a Trainer, before its first step.
        known: what a checkpoint brought: the student is not measured again, the teacher always is.
        of_teacher: the teacher's values that a cache of its answers brought, which are not measured again; what is
            measured is added.

    Raises:
        UsageError: when the teacher is below its ``minimum_accuracy`` on the validation split, or no sample of that
            has a label.
    """
    trainer = module.trainer
    data = getattr(trainer, "datamodule", None)
    validation = (validation_of(module), trainer.limit_val_batches)
    if data is None and not batches_of(*validation):
        warn(module, f"{UNCHECKED}, and nothing was measured before the training: there is no validation data")
        return dict.fromkeys(REFERENCES)
    rank_zero_info("measuring teacher and student before the first step")
    for name in module.judged:
        on_validation = _of_teacher(module, name, "validation", validation, of_teacher)
        _check_teacher(module, name, *on_validation, batches_of(*validation))
    test = None if data is None else loader_of(data, "test_dataloader", "test")
    has_test = test is not None
    split = (test, trainer.limit_test_batches) if has_test else validation
    measured = dict(known)
    split_name = "test" if has_test else "validation"
    by_name = {name: _of_teacher(module, name, split_name, split, of_teacher)[0] for name in module.judged}
    values = [value for value in by_name.values() if value is not None]
    measured["teacher"] = (max if module.task.mode == "max" else min)(values, default=None)
    if len(by_name) > 1:
        told = ", ".join(f"{name} {module.task.shown(v)}" for name, v in by_name.items() if v is not None)
        rank_zero_info(f"{module.task.metric} of each on the {split_name} split: {told}")
    if known["student_start"] is None:
        with float_mode(module.student):
            found, _ = value_of(module, module.student, *split)
        measured["student_float"] = None if _is_chance(module, found) else found
        with module.finished() if batches_of(*split) else nullcontext():  # what is trained is measured so
            measured["student_start"], _ = value_of(module, module.student, *split)
        if module.gptq_batches and batches_of(*split):
            with calibrated(module), module.finished():
                measured["student_gptq"], _ = value_of(module, module.student, *split)
    return measured


def logged(references: Mapping[str, float | None], task: Task) -> dict[str, float]:
    """The values that are known, by the names under which they are logged."""
    known = {f"reference/{name}": value for name, value in references.items() if value is not None}
    teacher = references["teacher"]
    return known if teacher is None else known | {f"teacher/{task.metric}": teacher}


def in_a_line(references: Mapping[str, float | None], task: Task) -> str:
    """The values that are known, in a line; empty without any."""
    names = dict(zip(REFERENCES, ("teacher", "student in float", "quantised only", "calibrated only"), strict=True))
    known = [f"{name} {task.shown(v)}" for key, name in names.items() if (v := references.get(key)) is not None]
    return f"before training: {', '.join(known)}" if known else ""


def loader_of(data: Any, hook: str, split: str) -> Any:
    """The DataLoader that ``hook`` of a DataModule gives; None where the class has none of its own.

    Raises:
        UsageError: when it gives several.
    """
    return only_loader(getattr(data, hook)(), split) if is_overridden(hook, data, LightningDataModule) else None


def validation_of(module: Distilling) -> Any:
    """The validation DataLoader, of the DataModule or handed to the Trainer; None where there is none."""
    trainer: Any = module.trainer
    if trainer.datamodule is not None:
        return loader_of(trainer.datamodule, "val_dataloader", "validation")
    # on_fit_start has set them up
    return only_loader(trainer.val_dataloaders, "validation") if trainer.enable_validation else None


def batches_of(loader: Any, limit: float) -> float:
    """How many batches of a loader are meant by ``limit``: a number (int) or a part of them (float).

    Infinity for all of a loader without a length, of which Lightning takes no other part.
    """
    if loader is None or isinstance(limit, int) or limit == 0:
        return 0 if loader is None else limit
    length = sized_len(loader)
    return math.inf if length is None else int(length * limit)


def as_stop(batches: float) -> int | None:
    """The number of batches as :func:`itertools.islice` takes it: None for infinity."""
    return int(batches) if math.isfinite(batches) else None


def warn(module: Distilling, sentence: str) -> None:
    """Say ``sentence`` once, and keep it for the summary."""
    module.warnings.append(sentence)
    rank_zero_warn(sentence)


def _of_teacher(
    module: Distilling, teacher: str, split: str, batches: tuple[Any, float], known: dict[str, float | None]
) -> tuple[float | None, float | None]:
    """As :func:`value_of` of a teacher, asked only when it is not known for as many batches of the split."""
    loader, limit = batches
    name = f"{split}, {evaluated(module, limit)}"
    if not isinstance(module.task, Classification):  # whose values are kept under the plain name
        name = f"{type(module.task).__name__} {module.task.monitor} of {name}"
    if len(module.judged) > 1:
        name = f"{[*module.judged].index(teacher)}: {name}"
    largest = f"largest class of {name}"
    if name not in known or largest not in known:
        known[name], known[largest] = value_of(module, module.judged[teacher], loader, limit)
    return known[name], known[largest]


def _chance(module: Distilling) -> float:
    """What an untrained network may reach, of as many classes as the DataModule has, or else the teacher's rows."""
    data = module.trainer.datamodule  # type: ignore[attr-defined]
    unknown = module.task.predicts_classes and getattr(data, "class_names", None) is None
    loader = validation_of(module) if unknown and module.trainer.limit_val_batches else None
    if loader is not None and (batch := first_batch(loader, "validation")) is not None:
        batch = module.trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        given = module.passes.teacher_inputs(batch, module.inputs(batch))
        (seen, *_) = module.passes.ask_teachers(given).values()
        data = SimpleNamespace(class_names=range(module.task.rows(seen.output, batch).logits.shape[1]))
    return module.task.chance(data)


def _is_chance(module: Distilling, found: float | None) -> bool:
    """Whether a student that was given no weights answers like one that has not been trained."""
    untrained = module.hparams.get("student_weights") is None  # unless its class brings weights of its own
    return found is not None and untrained and module.task.better(_chance(module), found)


def evaluated(module: Distilling, limit: float) -> str:
    """What of a split is evaluated, and how its images are prepared.

    Args:
        module: the module, attached to a Trainer.
        limit: as of :func:`value_of`.
    """
    data = getattr(module.trainer, "datamodule", None)
    whole = isinstance(limit, float) and limit == 1.0  # in batches of whatever size
    size = "" if whole else f" of {getattr(data, 'eval_batch_size', None)} x {module.trainer.world_size}"
    return f"{limit!r} batches{size}, resize_size={getattr(data, 'resize_size', None)}"


def _check_teacher(
    module: Distilling, name: str, measured: float | None, same_answer: float | None, batches: float
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
    floor = _chance(module) if minimum is None else minimum
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
def value_of(module: Distilling, network: nn.Module, loader: Any, limit: float) -> tuple[float | None, float | None]:
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
    with (
        evaluating(network),
        in_stage(trainer, RunningStage.TESTING),
        trainer.precision_plugin.forward_context(),
        # A DataModule's loader may draw random numbers, as it always has.
        apart(loader) if trainer.datamodule is None else nullcontext(loader) as own,  # type: ignore[attr-defined]
    ):
        known = as_stop(batches)
        taken = islice(own, known)
        if trainer.is_global_zero:
            taken = track(taken, "measuring before the first step", known)  # type: ignore[assignment]
        for of_loader in taken:
            batch = trainer.strategy.batch_to_device(of_loader, dataloader_idx=0)
            inputs = module.inputs(batch)
            given = inputs if network is module.student else module.passes.teacher_inputs(batch, inputs)
            outputs = task.outputs(given.call(network), Asked("network", len(inputs)))
            task.check_batch(outputs, batch)
            task.update(metrics, outputs, batch)
    found = {name: float(value) for name, value in metrics.compute().items()}
    if math.isnan(found[task.metric]):
        return None, None
    return found[task.metric], found.get(_CONSTANT)
