"""One pass of every network for a batch: of the teachers, live or from their cache, and of the student."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.losses.taps import Seen, Taps
from lqkd.modules.compilation import Compilation
from lqkd.modules.terms import teacher_label
from lqkd.tasks import Asked, Inputs, Rows, Task
from lqkd.tasks.trial import enough_samples
from lqkd.teachers import FrozenTeacher
from lqkd.teachers.cache import OpenCache, TeacherOutputs


@dataclass
class Outputs:
    """What the networks have made of a batch."""

    inputs: Inputs
    """What the student was called with."""
    student: Seen
    """What is seen of the student, differentiable in it."""
    rows: Rows
    """The student's rows: logits (N, C), differentiable, and the labels (N,)."""
    teachers: dict[str, Tensor]
    """Logits (N, C) of the same rows of every teacher, by its name."""
    features: dict[str, Mapping[str, Tensor]]
    """What the taps saw of every teacher, by its name."""


class Passes:
    """Calls the networks and looks at what the terms of the distillation compare.

    Attributes:
        cache: of the teachers' outputs, in a training with one.
        compilation: the networks that are compiled for training passes.
        taps_of_teachers: what is looked at inside of each teacher, by its name.

    Args:
        task: says what the networks are called with, and what of their outputs matters.
        teachers: by name.
        student: the network that is trained, its quantizers in place.
        taps_of_teachers: see the attribute.
        taps_of_student: what is looked at inside of the student; None for nothing.
        compilation: see the attribute.
    """

    def __init__(
        self,
        task: Task,
        teachers: dict[str, FrozenTeacher],
        student: nn.Module,
        taps_of_teachers: dict[str, Taps],
        taps_of_student: Taps | None,
        compilation: Compilation,
    ) -> None:
        self.cache: OpenCache | None = None
        self.compilation = compilation
        self.taps_of_teachers, self._taps_of_student = taps_of_teachers, taps_of_student
        self._task, self._teachers, self._student = task, teachers, student

    def run(self, batch: Any, inputs: Inputs, epoch: int, cached: bool = False) -> Outputs:
        """The outputs of all networks for a batch.

        Args:
            batch: what the task takes, on the device.
            inputs: what the student is called with for it.
            epoch: counted from 0, which the cache goes by.
            cached: whether teachers' outputs come from the cache where there is one.

        Raises:
            UsageError: when the task makes other rows of a teacher's outputs than of the student's.
        """
        self.compilation.begin_step()
        teachers = self._of_teachers(batch, inputs, epoch, cached)
        student = self.of_student(inputs)
        rows = self._task.rows(student.output, batch)
        outputs = Outputs(
            inputs,
            student,
            rows,
            {name: self._task.rows(teacher.output, batch).logits for name, teacher in teachers.items()},
            {name: teacher.features for name, teacher in teachers.items()},
        )
        for teacher in outputs.teachers.values():
            _check_rows(self._task, teacher.shape, rows.logits.shape)
        return outputs

    def teacher_inputs(self, batch: Any, inputs: Inputs) -> Inputs:
        """What teachers are called with for a batch of which the student is called with ``inputs``."""
        given = self._task.teacher_inputs(batch, inputs)
        return inputs if given is inputs else Inputs.of(given).fit(self._student)

    def _of_teachers(self, batch: Any, inputs: Inputs, epoch: int, cached: bool) -> TeacherOutputs:
        inputs = self.teacher_inputs(batch, inputs)
        alone = inputs.alone()
        if self.cache is None or not cached or alone is None:
            return self.ask_teachers(inputs, training=True)
        return self.cache.answers(alone, indices_of(batch), epoch, lambda: self.ask_teachers(inputs, training=True))

    def ask_teachers(
        self, inputs: Inputs, names: Collection[str] | None = None, training: bool = False
    ) -> TeacherOutputs:
        """What is seen of every teacher, or of those of some names, called with ``inputs``; of a batch to train on?"""
        asked = {name: one for name, one in self._teachers.items() if names is None or name in names}
        return {name: self._ask_teacher(name, teacher, inputs, training) for name, teacher in asked.items()}

    def _ask_teacher(self, name: str, teacher: FrozenTeacher, inputs: Inputs, training: bool) -> Seen:
        asked, taps = Asked(teacher_label(name, self._teachers), len(inputs)), self.taps_of_teachers.get(name)
        running = teacher.running(inputs)
        called = self.compilation.of(teacher) if training else teacher
        if taps is None:
            return Seen(self._task.outputs(inputs.call(called), asked), {})
        if teacher in self.compilation:
            taps.hold(running)
        with taps.recording(running) as features:
            output = self._task.outputs(inputs.call(called), asked)
        return Seen(output, {path: x.float().contiguous() for path, x in zip(taps.paths, features, strict=True)})

    def of_student(self, inputs: Inputs) -> Seen:
        """What is seen of the student, called with ``inputs``; it is compiled, if at all, while it trains."""
        student, taps = self._student, self._taps_of_student
        asked = Asked("student", len(inputs), student.training)
        trains = student.training and torch.is_grad_enabled()
        called = self.compilation.of(student) if trains else student
        with enough_samples("student", len(inputs)):
            if taps is None:
                return Seen(self._task.outputs(inputs.call(called), asked), {})
            if student in self.compilation:
                taps.hold()
            with taps.recording() as features:
                output = inputs.call(called)
        return Seen(self._task.outputs(output, asked), dict(zip(taps.paths, features, strict=True)))

    def release(self) -> None:
        """Leave no hook in a network that has been compiled."""
        for taps in (*self.taps_of_teachers.values(), self._taps_of_student):
            if taps is not None:
                taps.release()


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


def _check_rows(task: Task, of_teacher: Any, of_student: Any) -> None:
    if of_teacher != of_student:
        raise UsageError(
            f"numbers of classes differ (teacher {of_teacher[1]}, student {of_student[1]}): they must agree"
            if of_teacher[0] == of_student[0]
            else f"task {type(task).__name__} makes {of_teacher[0]} rows of the teacher's outputs and "
            f"{of_student[0]} of the student's: rows() must make the same of both"
        )
