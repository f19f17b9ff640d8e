"""What a step tells of itself: numbers to loggers, tensors to callbacks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lqkd.balances import Balance
from lqkd.balances.base import DISTILL
from lqkd.modules.distillation import Distillation
from lqkd.modules.losses import Losses
from lqkd.tasks import Task


def step_numbers(losses: Losses, distillation: Distillation, balance: Balance) -> dict[str, Tensor]:
    """What is logged of a batch, 0-dim each, detached."""
    numbers = {"train/loss": losses.loss}
    told = losses.by_name | losses.penalties | distillation.learned()
    numbers |= {f"train/{name}": value for name, value in told.items()}
    numbers |= {f"balance/{name}": value for name, value in (losses.balance | balance.learned()).items()}
    return {name: value.detach().clone() for name, value in numbers.items()}  # some are parameters


def step_report(
    losses: Losses, distillation: Distillation, task: Task, batch: Any, positions: bool = False
) -> dict[str, Any]:
    """What callbacks are given of a batch, detached; that of named terms is under ``terms``, by name.

    Args:
        losses: of the batch.
        distillation: its terms.
        task: what rows are.
        batch: as it came.
        positions: whether places of rows are told, too.
    """
    reports, labels = {}, losses.outputs.rows.labels
    places = task.positions(batch) if positions else None
    student = losses.outputs.rows.logits.detach()
    for name, term in distillation.terms():
        divergences, sees_rows = losses.divergences[name], term.sees_rows(task)
        reports[name] = {
            "divergence": _alone([each.divergence.detach() for each in divergences.maps]),
            "weights": _alone([each.weights.detach() for each in divergences.maps if each.weights is not None]),
            "teacher": divergences.teachers[0] if sees_rows else None,
            "student": student if sees_rows else None,
            "labels": labels if sees_rows else None,
            "positions": places if sees_rows else None,
            "independent": True if sees_rows and task.independent_logits else None,
        }
        reports[name] = {key: value for key, value in reports[name].items() if value is not None}
    report: dict[str, Any] = {"terms": reports} if distillation.named else dict(*reports.values())
    return report | {"loss": losses.loss.detach(), "balance": losses.balance}


def gradients_at_outputs(losses: Losses, distillation: Distillation) -> dict[str, Tensor]:
    """Gradients at the student's outputs of the task and of every term with and without modulation.

    Distillation by features does not pass the outputs and has none; nor has a task whose outputs are no tensor.
    """
    if not isinstance(losses.outputs.student.output, Tensor):
        return {}
    wanted = dict(losses.by_name)
    for name, term in distillation.terms():
        if term.interpolation is None:  # which moves the target, and leaves no weights to take away
            wanted[_plain(name)] = term.reduce(losses.divergences[name].maps, weighted=False)
    found = {
        name: torch.autograd.grad(loss, losses.outputs.student.output, retain_graph=True, allow_unused=True)[0]
        for name, loss in wanted.items()
    }
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def _plain(name: str) -> str:
    """What a term's loss without the regularizer's weights is called beside it."""
    return "plain" if name == DISTILL else f"{name} (plain)"


def _alone(tensors: list[Tensor]) -> list[Tensor] | Tensor | None:
    """The tensors, the only one, or None for none."""
    return (tensors[0] if len(tensors) == 1 else tensors) if tensors else None
