"""Optimizers that can share one backward pass: those whose step needs the gradients that are there, and no others."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import LBFGS, Optimizer

from lqkd.errors import UsageError

_ADVICE = (
    "both players share one backward pass, so that a step gets its gradients once: use one that needs no second pass, "
    "such as SGD, Adam or AdamW"
)


def check_optimizer(optimizer: Optimizer, setting: str, groups: Sequence[dict[str, Any]]) -> None:
    """Refuse an optimizer that cannot work here, and give groups that it has built anew their names again.

    Args:
        optimizer: made of ``groups``.
        setting: what a mistake calls it.
        groups: parameter groups, each with a ``name``.

    Raises:
        UsageError: when it searches along lines, its step takes no closure, or it mixes parameters of several groups.
    """
    kind = type(optimizer).__name__
    if isinstance(optimizer, LBFGS):
        raise UsageError(f"{setting}={kind} is not possible, since it computes the loss again within a step: {_ADVICE}")
    try:
        inspect.signature(optimizer.step).bind(closure=None)
    except TypeError:
        raise UsageError(
            f"{setting}={kind} is not possible: its step() takes no closure, which optimizers of PyTorch do"
        ) from None
    names = {id(parameter): group["name"] for group in groups for parameter in group["params"]}
    for group in optimizer.param_groups:
        found = {names.get(id(parameter)) for parameter in group["params"]} - {None}
        if "name" not in group and len(found) > 1:
            raise UsageError(
                f"{setting}={kind} is not possible: it puts the parameters of {' and '.join(sorted(map(str, found)))} "
                "into one group, which have settings of their own"
            )
        group.setdefault("name", *found)


class GradientsAreThere:
    """The closure of a step whose gradients have been computed: calling it before anything else does nothing.

    Args:
        setting: what a mistake calls the optimizer.
        optimizer: the optimizer.
        parameters: its parameters that have gradients, in whatever order.

    Raises:
        UsageError: when it is called after the step has changed parameters or gradients, or twice: the optimizer then
            wants gradients at another place, as sharpness-aware minimisation does.
    """

    def __init__(self, setting: str, optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> None:
        self.setting, self.optimizer = setting, optimizer
        self.watched = parameters[0] if parameters else None  # one tells: a step changes all of them
        self.before = self._state()
        self.calls = 0

    def __call__(self) -> None:
        self.calls += 1
        if self.calls > 1 or self._state() != self.before:
            raise UsageError(
                f"{self.setting}={type(self.optimizer).__name__} is not possible, since its step asks for gradients a "
                f"second time: {_ADVICE}"
            )

    def _state(self) -> tuple[int, ...]:
        if self.watched is None:
            return ()
        gradient = self.watched.grad
        return (self.watched._version, *(() if gradient is None else (id(gradient), gradient._version)))
