"""A ReLU that is not computed until it is known whether the quantizer that reads its result needs it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

_RELUS: tuple[Any, ...] = (F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)


class DeferredReLU(Tensor):
    """What a layer returned, for the ReLU or ReLU6 behind it, and then what that returns.

    Whatever is called with it, but for that one function and a quantizer that clips at zero itself, gets the tensor
    that it stands for: then the ReLU is computed, once.

    Attributes:
        before: what the layer returned, in the graph of gradients.
        top: the largest value that the ReLU leaves as it is.

    Examples:
        >>> deferred = torch.relu(DeferredReLU.of(torch.tensor([-1.0, 2.0])))
        >>> type(deferred).__name__, deferred.before
        ('DeferredReLU', tensor([-1.,  2.]))
        >>> deferred + 1
        tensor([1., 3.])
    """

    before: Tensor
    top: float
    _relu: Callable[[Tensor], Tensor] | None
    _value: Tensor | None

    @classmethod
    def of(cls, before: Tensor, relu: Callable[[Tensor], Tensor] | None = None, top: float = math.inf) -> DeferredReLU:
        """What stands for ``before``, or for ``relu(before)``."""
        deferred = before.detach().as_subclass(cls)
        deferred.before, deferred.top, deferred._relu, deferred._value = before, top, relu, None
        return deferred

    def value(self) -> Tensor:
        """The tensor that this stands for, the same one in each call."""
        if self._value is None:
            self._value = self.before if self._relu is None else self._relu(self.before)
        return self._value

    @property
    def is_open(self) -> bool:
        """Whether a ReLU was asked for and nothing has read its result."""
        return self._relu is not None and self._value is None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keywords = kwargs or {}
        if args and isinstance(args[0], cls) and args[0]._relu is None:
            relu = _relu(func, keywords)
            if relu is not None:
                return cls.of(args[0].before, *relu)
        return func(*tree_map_only(cls, cls.value, args), **tree_map_only(cls, cls.value, keywords))


def _relu(func: Any, keywords: dict[str, Any]) -> tuple[Callable[[Tensor], Tensor], float] | None:
    """What ``func`` computes and the largest value that it leaves, where it is a ReLU; into new memory."""
    if func in _RELUS:
        return torch.relu, math.inf
    if func is F.relu6:
        return F.relu6, 6.0
    if func is F.hardtanh and keywords.get("min_val") == 0:  # what nn.ReLU6 calls
        top = float(keywords["max_val"])
        return partial(F.hardtanh, min_val=0.0, max_val=top), top
    return None
