"""The optimizers of the two players: parameter groups, and settings that outlive a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lqkd.errors import UsageError, first_line
from lqkd.quantization import quantizers
from lqkd.regularizers import Balance

SETTINGS_IN_CHECKPOINT = {
    f"model.{player}_{what}.{key}"
    for player in ("student", "regularizer")
    for what, keys in (("optimizer", ("class_path",)), ("schedule", ("class_path", "init_args.scheduler.class_path")))
    for key in keys
}
"""Settings whose state a checkpoint carries, and which a resumed run can therefore not change."""


def student_groups(student: nn.Module, losses: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups ``student``, ``student_quantizers``, without weight decay, and ``connectors`` of the losses."""
    own = {id(p) for quantizer in quantizers(student).values() for p in quantizer.parameters()}
    parameters = list(student.parameters())
    return _non_empty(
        _group("student", (p for p in parameters if id(p) not in own)),
        _group("student_quantizers", (p for p in parameters if id(p) in own), weight_decay=0.0),
        _group("connectors", losses.parameters()),
    )


def regularizer_groups(
    regularizers: nn.Module, balance: Balance, combination: nn.Module | None
) -> list[dict[str, Any]]:
    """Parameter groups ``regularizer``, ``balance`` and ``teachers``, only the first with weight decay."""
    return _non_empty(
        _group("regularizer", regularizers.parameters()),
        _group("balance", balance.parameters(), weight_decay=0.0),
        _group("teachers", () if combination is None else combination.parameters(), weight_decay=0.0),
    )


def optimizer_of(make: Callable[[Any], Optimizer], setting: str, parameters: Any) -> Optimizer:
    """What ``make`` makes of parameters or groups of them; ``setting`` is what a mistake calls it.

    Raises:
        UsageError: when the optimizer refuses one of its arguments, or a number of them is NaN or infinite, which no
            optimizer of PyTorch's notices.
    """
    try:
        optimizer = make(parameters)
    except ValueError as error:
        raise UsageError(f"{setting} is not possible: {first_line(error)}") from error
    for name, value in optimizer.defaults.items():
        numbers = value if isinstance(value, (tuple, list)) else (value,)
        if not all(math.isfinite(number) for number in numbers if isinstance(number, float)):
            raise UsageError(f"{setting}: {name}={value!r} is not possible: it must be finite")
    return optimizer


def settings_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The settings of every group, without its parameters."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def restore_settings(optimizer: Optimizer, scheduler: Any, settings: list[dict[str, Any]]) -> None:
    """Give an optimizer that was restored from a checkpoint the ``settings`` of the configuration again.

    A checkpoint carries the settings of the run that wrote it, which would silently win over the configuration. The
    learning rate keeps the place in its schedule that the checkpoint says: where that is a function of the step, it
    becomes what a run with this configuration would have there, e.g. when the training is now longer.
    """
    for index, (group, wanted) in enumerate(zip(optimizer.param_groups, settings, strict=True)):
        base, configured = group.get("initial_lr"), wanted.get("initial_lr")
        if base and configured and base != configured and hasattr(scheduler, "base_lrs"):
            group["lr"] *= configured / base
            group["initial_lr"] = configured
            scheduler.base_lrs[index] = configured
            scheduler._last_lr[index] = group["lr"]
        if isinstance(scheduler, LambdaLR):
            group["lr"] = scheduler.base_lrs[index] * scheduler.lr_lambdas[index](scheduler.last_epoch)
            scheduler._last_lr[index] = group["lr"]
        group.update({key: value for key, value in wanted.items() if key not in ("lr", "initial_lr")})


def _group(name: str, parameters: Iterable[nn.Parameter], **settings: Any) -> dict[str, Any]:
    return {"name": name, "params": [p for p in parameters if p.requires_grad], **settings}


def _non_empty(*groups: dict[str, Any]) -> list[dict[str, Any]]:
    return [group for group in groups if group["params"]]
