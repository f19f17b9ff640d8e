"""The optimizers of the two players: parameter groups, and settings that a checkpoint decides."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.optim import SGD, Optimizer, SparseAdam

from lqkd.balances import Balance
from lqkd.errors import UsageError, first_line
from lqkd.losses import CurriculumTemperature
from lqkd.modules.distillation import Distillation
from lqkd.quantization import quantizers

_PLAYERS = ("student_", "regularizer_", "")
_OF_SCHEDULE = ("class_path", "init_args.scheduler.class_path", "init_args.interval")
_TEMPERATURES = "temperatures"
SETTINGS_IN_CHECKPOINT = {f"model.{player}optimizer.class_path" for player in _PLAYERS} | {
    f"model.{player}schedule.{key}" for player in _PLAYERS for key in _OF_SCHEDULE
}
"""Settings whose state a checkpoint carries, and which a resumed run can therefore not change."""


def student_groups(student: nn.Module, losses: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups ``student``, ``student_quantizers`` and, of the losses, ``connectors`` and ``temperatures``.

    Quantizers and temperatures get no weight decay.
    """
    own = {id(p) for quantizer in quantizers(student).values() for p in quantizer.parameters()}
    learned = [m for m in losses.modules() if isinstance(m, CurriculumTemperature)]
    temperatures = {id(p): p for loss in learned for p in loss.parameters()}
    parameters = list(student.parameters())
    return _non_empty(
        _group("student", (p for p in parameters if id(p) not in own)),
        _group("student_quantizers", (p for p in parameters if id(p) in own), weight_decay=0.0),
        _group("connectors", (p for p in losses.parameters() if id(p) not in temperatures)),
        _group(_TEMPERATURES, temperatures.values(), weight_decay=0.0),
    )


def regularizer_groups(distillation: Distillation, balance: Balance) -> list[dict[str, Any]]:
    """Parameter groups ``regularizer`` of each term, ``balance`` and ``teachers``, only the first with weight decay."""
    return _non_empty(
        *(_group(_of_term(distillation, name), term.regularizers.parameters()) for name, term in distillation.terms()),
        _group("balance", balance.parameters(), weight_decay=0.0),
        _group("teachers", distillation.combinations.parameters(), weight_decay=0.0),
    )


def learning_rate_factors(distillation: Distillation, balance: Balance) -> dict[str, float]:
    """By group of :func:`student_groups` and :func:`regularizer_groups`, what the learning rate is multiplied by."""
    factors = {"balance": balance.learning_rate_factor, _TEMPERATURES: CurriculumTemperature.learning_rate_factor}
    for name, term in distillation.terms():
        if term.regularizer is not None:
            factors[_of_term(distillation, name)] = term.regularizer.learning_rate_factor
    return factors


def _of_term(distillation: Distillation, name: str) -> str:
    return f"regularizer {name}" if distillation.named else "regularizer"


def optimizer_of(make: Callable[[Any], Optimizer], setting: str, parameters: Any) -> Optimizer:
    """What ``make`` makes of parameters or groups of them; ``setting`` is what a mistake calls it.

    Raises:
        UsageError: when the optimizer refuses one of its arguments, or a number of them is NaN or infinite, which no
            optimizer of PyTorch's notices, or it is a fused SGD with momentum, which stops at the first parameter
            whose gradients begin later than those of others.
    """
    try:
        optimizer = make(parameters)
    except ValueError as error:
        raise UsageError(f"{setting} is not possible: {first_line(error)}") from error
    if isinstance(optimizer, SparseAdam):
        raise UsageError(f"{setting}=SparseAdam is not possible: gradients here are dense, use Adam")
    if isinstance(optimizer, SGD) and optimizer.defaults.get("fused") and optimizer.defaults["momentum"]:
        raise UsageError(
            f"{setting}: fused=True is not possible for SGD with momentum, since PyTorch's stops at a parameter whose "
            "first gradient comes after those of others: leave it out, or use Adam or AdamW, which go on"
        )
    for name, value in optimizer.defaults.items():
        numbers = value if isinstance(value, (tuple, list)) else (value,)
        if not all(math.isfinite(number) for number in numbers if isinstance(number, float)):
            raise UsageError(f"{setting}: {name}={value!r} is not possible: it must be finite")
    return optimizer


def _group(name: str, parameters: Iterable[nn.Parameter], **settings: Any) -> dict[str, Any]:
    return {"name": name, "params": [p for p in parameters if p.requires_grad], **settings}


def _non_empty(*groups: dict[str, Any]) -> list[dict[str, Any]]:
    return [group for group in groups if group["params"]]
