"""Getting ready, before the first step, for the teacher's answers: from a fast teacher or from a cache."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.modules.distilling import Distilling
from lqkd.modules.references import evaluated
from lqkd.modules.steps import total_steps
from lqkd.modules.teacher_speed import accelerate
from lqkd.tasks import Inputs
from lqkd.teachers.cache import OpenCache
from lqkd.teachers.cache.codec import TensorShapes, shapes_of
from lqkd.teachers.cache.keys import data_key, input_dtype, teacher_key
from lqkd.utils.files import write_json


@dataclass
class KnownOfTeacher:
    """What has been found out about a teacher, kept beside its cached answers so that it need not run for it again."""

    bf16: list[bool] | None = None
    """Which teachers compute in bfloat16; None while that is not known."""
    values: dict[str, float | None] = field(default_factory=dict)
    """Of the task's metric, by what was evaluated."""
    path: Path | None = None
    """Where it is kept; None for nowhere, as on all ranks but the first."""

    def save(self) -> None:
        """Keep it."""
        if self.path is not None:
            try:
                write_json(self.path, {"bf16": self.bf16, "values": self.values})
            except OSError as error:
                rank_zero_warn(f"{self.path} cannot be written, so the teacher is measured in every run: {error}")


def prepare_teacher(module: Distilling) -> tuple[OpenCache | None, KnownOfTeacher]:
    """Open the cache that the module asks for and let its teacher run fast.

    Args:
        module: the module, attached to a Trainer, before its first step.

    Returns:
        The cache, None where none is asked for, and what is known about the teacher.

    Raises:
        UsageError: when the cache cannot be used.
    """
    opened = _open_cache(module)
    known = KnownOfTeacher()
    if opened is not None:
        known = module.trainer.strategy.broadcast(_load(opened.folder / "teacher.json"))
        known.path = opened.folder / "teacher.json" if module.trainer.is_global_zero else None
    known.bf16 = accelerate(module, known.bf16)
    known.save()
    return opened, known


def _load(path: Path) -> KnownOfTeacher:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return KnownOfTeacher(kept["bf16"], kept["values"] if "values" in kept else kept["accuracies"])
    except (OSError, ValueError, KeyError, TypeError):
        return KnownOfTeacher()


def _open_cache(module: Distilling) -> OpenCache | None:
    settings, trainer = module.teacher_cache, module.trainer
    if settings is None:
        return None
    data: Any = getattr(trainer, "datamodule", None)
    of_data = data_key(data)
    given = _teacher_input(module, data)
    asked = trainer.strategy.broadcast([teacher.wants_bf16(module.device) for teacher in module.teachers()])
    pairs = zip(module.teachers(), asked, strict=True)
    of_teachers = [teacher_key(*pair, data.image_shape, input_dtype(data)) for pair in pairs]
    taps = module.passes.taps_of_teachers
    key = {
        "teachers": trainer.strategy.broadcast(of_teachers),  # processors of several kinds may round otherwise
        "taps": [[*taps[name].paths] if name in taps else [] for name in module.named_teachers],
        "data": of_data,
    }
    if any(asked):  # the images that bfloat16 is checked with decide whether it is used
        checks = not getattr(trainer, "fast_dev_run", False)
        key["checked_with"] = evaluated(module, trainer.limit_val_batches) if checks else "nothing"

    @torch.no_grad()
    def shapes() -> TensorShapes:
        return shapes_of(module.passes.ask_teachers(given))

    names, axis = [*module.named_teachers], module.task.class_axis
    return settings.open(key, data.train_indices, _epochs(module), names, shapes, axis)


def _teacher_input(module: Distilling, data: Any) -> Inputs:
    """What teachers are called with for one sample.

    Raises:
        UsageError: when that is not one tensor, by which a sample is told, or what a teacher answers is no tensor.
    """
    example = module.task.example(data, module.device)
    given = None if example is None else module.passes.teacher_inputs(example, module.inputs(example))
    if given is None or given.alone() is None:
        raise UsageError(
            f"teacher_cache is not possible with task {type(module.task).__name__}: it keeps the answers of teachers "
            "that are called with one tensor, of which the task gives an example"
        )
    with torch.no_grad():
        outputs = module.passes.ask_teachers(given)
    if not all(isinstance(seen.output, Tensor) for seen in outputs.values()):
        raise UsageError(
            f"teacher_cache is not possible with task {type(module.task).__name__}, whose outputs are no tensors"
        )
    return given


def _epochs(module: Distilling) -> int:
    """Epochs of the training, the last of which may be cut short."""
    trainer = module.trainer
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        return trainer.max_epochs
    steps = total_steps(trainer, module.accumulate_grad_batches)
    if steps is None:
        raise UsageError("teacher_cache needs to know the end of training: set trainer.max_epochs or max_steps")
    return -(-steps * module.accumulate_grad_batches // int(trainer.num_training_batches))
