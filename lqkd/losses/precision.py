"""Differences of low-precision tensors, taken in high precision."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

_Method = TypeVar("_Method", bound=Callable[..., Any])


def in_full_precision(method: _Method) -> _Method:
    """Let a method ``(self, teacher, student, ...)`` of a loss compute in float32 or wider, whatever surrounds it.

    Autocast is off within; half-precision tensors arrive as float32, in which squares and sums of theirs do not
    overflow; the teacher's arrive detached. Tuples of tensors are treated element by element.
    """

    @wraps(method)
    def wrapped(self: Any, teacher: Any, student: Any, *args: Any, **kwargs: Any) -> Any:
        first = student if isinstance(student, Tensor) else student[0]
        with torch.autocast(first.device.type, enabled=False):
            return method(self, _widened(teacher, detach=True), _widened(student), *args, **kwargs)

    return cast(_Method, wrapped)


def _widened(x: Any, detach: bool = False) -> Any:
    if not isinstance(x, Tensor):
        return tuple(_widened(each, detach) for each in x)
    x = x.detach() if detach else x
    return x if x.dtype == torch.float64 else x.float()
