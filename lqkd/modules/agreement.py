"""How often student and teacher put the same class first, on the validation split of a training."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, cast

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lqkd.tasks import Asked, Inputs, Rows, Task

TOP1_AGREEMENT = "val/top1_agreement"
MOST = 1 << 24
"""Rows of which a training keeps what teachers put first: 64 MiB."""


class Top1Agreement(nn.Module):
    """The share of rows for which student and teacher put the same class first, of each teacher.

    Stanton et al., "Does Knowledge Distillation Really Work?" (arXiv 2106.05945), section 3. Rows without a label are
    left out. What a teacher puts first is asked once in a training for every batch, and kept on the CPU as a number a
    row, of the first :data:`MOST` rows: of more, or where batches are others each time, it is asked again.

    Args:
        task: what the networks are trained for; nothing is measured of one that does not ask for it.
        teachers: by name.
    """

    _task: Task

    def __init__(self, task: Task, teachers: Mapping[str, nn.Module]) -> None:
        named = teachers if task.top1_agreement else {}
        super().__init__()
        self.metrics = nn.ModuleList(MeanMetric() for _ in named)
        self.__dict__["_task"], self._teachers = task, dict(named)  # neither is a submodule
        self._first: dict[tuple[str, str], Tensor] = {}

    def logged_as(self) -> dict[str, MeanMetric]:
        """Every metric by its name: ``val/top1_agreement``, and with several teachers that of each behind it."""
        several = len(self.metrics) > 1
        named = zip(self._teachers, self.metrics, strict=True)
        return {TOP1_AGREEMENT + (f"/{name}" if several else ""): cast(MeanMetric, metric) for name, metric in named}

    def reset(self) -> None:
        """Forget what the student has answered, not what teachers have."""
        for metric in self.logged_as().values():
            metric.reset()

    def forget(self) -> None:
        """Forget what teachers have answered: before a training, in which they may be others."""
        self._first.clear()

    @torch.no_grad()
    def update(self, outputs: Any, batch: Any, of_teachers: Inputs) -> None:
        """Count a batch.

        Args:
            outputs: of the student, as the task takes them.
            batch: what the task takes.
            of_teachers: what teachers are called with for it.
        """
        rows = self._task.rows(outputs, batch)
        known = torch.ones(len(rows.logits)) if rows.labels is None else (rows.labels >= 0).float()
        seen = _key(batch)
        for (name, teacher), metric in zip(self._teachers.items(), self.logged_as().values(), strict=True):
            first = self._first.get((name, seen))
            if first is None:
                answers = of_teachers.call(teacher)
                of_teacher = self._task.rows(self._task.outputs(answers, Asked(name, len(of_teachers))), batch)
                first = _first(of_teacher).cpu()
                if sum(map(len, self._first.values())) + len(first) <= MOST:
                    self._first[name, seen] = first
            same = _first(rows) == first.to(rows.logits.device)
            metric.update(same.float(), known.to(rows.logits.device))


def _first(rows: Rows) -> Tensor:
    return rows.logits.argmax(dim=1).to(torch.int32)


def _key(batch: Any) -> str:
    """Hash of all tensors of a batch: labels too say which tokens are rows."""
    told = hashlib.sha256()

    def add(tensor: Tensor) -> None:
        told.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        told.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())

    apply_to_collection(batch, Tensor, add)
    return told.hexdigest()
