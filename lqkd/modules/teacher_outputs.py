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
    untouched = [] if module.taps is None else module.taps[0].paths
    known.bf16 = accelerate(module, untouched, known.bf16)
    known.save()
    return opened, known


def indices_of(batch: Any) -> Tensor:
    """The indices (B,) of the samples of a batch.

    Raises:
        UsageError: when the batch does not tell.
    """
    indices = getattr(batch, "indices", None)
    if not isinstance(indices, Tensor):
        raise UsageError(
            "teacher_cache needs to know the samples of a batch: the DataModule must yield lqkd.data.Batch"
        )
    return indices


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
    one = _teacher_input(module, data)
    asked = trainer.strategy.broadcast([teacher.wants_bf16(module.device) for teacher in module.teachers()])
    pairs = zip(module.teachers(), asked, strict=True)
    of_teachers = [teacher_key(*pair, data.image_shape, input_dtype(data)) for pair in pairs]
    key = {
        "teachers": trainer.strategy.broadcast(of_teachers),  # processors of several kinds may round otherwise
        "taps": [] if module.taps is None else list(module.taps[0].paths),
        "data": of_data,
    }
    if any(asked):  # the images that bfloat16 is checked with decide whether it is used
        checks = not getattr(trainer, "fast_dev_run", False)
        key["checked_with"] = evaluated(module, trainer.limit_val_batches) if checks else "nothing"

    @torch.no_grad()
    def shapes() -> tuple[int, int, list[Any]]:
        logits, features = module.ask_teacher(Inputs((one,)))
        return len(logits), logits[0].shape[1], [tuple(feature.shape[1:]) for feature in features]

    return settings.open(key, data.train_indices, _epochs(module), shapes)


@torch.no_grad()
def _teacher_input(module: Distilling, data: Any) -> Tensor:
    """The one tensor that teachers are called with for one sample.

    Raises:
        UsageError: when there are more, or what a teacher answers is no row of numbers.
    """
    example = module.task.example(data, module.device)
    given = None if example is None else module.teacher_inputs(example, module.inputs(example))
    image = None if given is None else given.alone()
    if given is None or image is None:
        raise UsageError(
            f"teacher_cache is not possible with task {type(module.task).__name__}: it keeps the answers of teachers "
            "that are called with one tensor, of which the task gives an example"
        )
    answers, _ = module.ask_teacher(given)
    if not isinstance(answers[0], Tensor) or answers[0].ndim != 2:
        raise UsageError(
            f"teacher_cache is not possible with task {type(module.task).__name__}: it keeps outputs of shape (B, C)"
        )
    return image


def _epochs(module: Distilling) -> int:
    """Epochs of the training, the last of which may be cut short."""
    trainer = module.trainer
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        return trainer.max_epochs
    steps = total_steps(trainer, module.accumulate_grad_batches)
    if steps is None:
        raise UsageError("teacher_cache needs to know the end of training: set trainer.max_epochs or max_steps")
    return -(-steps * module.accumulate_grad_batches // int(trainer.num_training_batches))
