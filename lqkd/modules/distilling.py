"""What is asked of a distillation before its first step, by what gets it ready."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from lightning.pytorch import Trainer
from torch import nn

from lqkd.modules.passes import Passes
from lqkd.tasks import Inputs, Task
from lqkd.teachers.cache import TeacherCache
from lqkd.teachers.ensemble import TeacherEnsemble
from lqkd.teachers.frozen import FrozenTeacher


class Distilling(Protocol):
    """A module that distils, attached to a Trainer; :class:`lqkd.modules.DistillModule` is one."""

    task: Task
    passes: Passes
    named_teachers: dict[str, FrozenTeacher]
    teacher_cache: TeacherCache | None
    warnings: list[str]
    own: str | None
    own_joined: dict[str, str]
    gptq_batches: int

    @property
    def accumulate_grad_batches(self) -> int: ...
    @property
    def trainer(self) -> Trainer: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def hparams(self) -> Mapping[str, Any]: ...
    @property
    def student(self) -> nn.Module: ...
    @property
    def judged(self) -> Mapping[str, FrozenTeacher | TeacherEnsemble]: ...
    def teachers(self) -> list[FrozenTeacher]: ...
    def inputs(self, batch: Any) -> Inputs: ...
    def finished(self) -> AbstractContextManager[None]: ...
