"""Where in what a network returns the tensor is that a loss compares."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lqkd.errors import UsageError

NAMES = ("out", "logits", "output")
"""What the main tensor is called among several: by torchvision, by transformers, and by others."""
_PLACE = "output_"
"""What names of the tensors of a tuple begin with, before their place."""


class Asked(NamedTuple):
    """Which network has answered what, for a message about it."""

    network: str
    """``teacher``, ``student``, ..."""
    samples: int
    """How many there were in the batch."""
    training: bool = False
    """Whether it ran in training mode."""


def everything(returned: Any, asked: Asked) -> Tensor:
    """Everything of a network's answer that counts, (B, K): its main tensor, or, of several without one, all of them.

    Args:
        returned: what the network returned.
        asked: for a message.

    Raises:
        UsageError: when there is no tensor.
    """
    tensors = [value for value in heads(returned, "").values() if isinstance(value, Tensor)]
    if isinstance(returned, Mapping) and len(tensors) > 1 and not set(NAMES) & returned.keys():
        return torch.cat([tensor.flatten(1) for tensor in tensors], dim=1)
    return main_tensor(returned, asked).flatten(1)


def main_tensor(returned: Any, asked: Asked) -> Tensor:
    """The tensor that matters of what a network returns.

    A tensor is its own; of a dict or dataclass, such as transformers' ``ModelOutput``, it is the one called ``out``,
    ``logits`` or ``output``, or the only one; of a tuple without such a name it is the first.

    Args:
        returned: what the network returned.
        asked: for a message.

    Raises:
        UsageError: when there is no such tensor.
    """
    if isinstance(returned, Tensor):
        return returned
    named = _named(returned)
    if named is None:
        raise UsageError(
            f"the {asked.network} returns a {type(returned).__name__}: a tensor is needed, or one in a tuple, a dict "
            "or a dataclass"
        )
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    found = next((tensors[name] for name in NAMES if name in tensors), None)
    if found is None and len(tensors) == 1:
        (found,) = tensors.values()
    if found is None and isinstance(returned, (tuple, list)) and tensors:
        found = next(iter(tensors.values()))
    if found is None:
        raise UsageError(
            f"the {asked.network} returns a {type(returned).__name__} with "
            f"{', '.join(map(repr, tensors)) or 'no tensor'}: one called {', '.join(map(repr, NAMES[:-1]))} or "
            f"{NAMES[-1]!r} is needed, or a task whose outputs() chooses"
        )
    return found


def heads(returned: Any, alone: str) -> dict[str, Any]:
    """Everything that a network returns, by name.

    Args:
        returned: a tensor, or several in a mapping, a named tuple, a dataclass, a tuple or a list; None in it is
            nothing.
        alone: the name of a tensor by itself; those of a tuple or list are ``output_0``, ``output_1``, ...

    Examples:
        >>> heads({"logits": 1, "hidden": 2, "aux": None}, "logits"), heads((1, 2), "logits"), heads(3, "logits")
        ({'logits': 1, 'hidden': 2}, {'output_0': 1, 'output_1': 2}, {'logits': 3})
    """
    named = _named(returned)
    if named is None:
        return {alone: returned}
    in_order = isinstance(returned, (tuple, list)) and not hasattr(returned, "_asdict")
    return {f"{_PLACE}{key}" if in_order else str(key): of for key, of in named.items() if of is not None}


def returned_by(found: Mapping[str, Any], alone: str) -> Any:
    """What a network would have returned whose :func:`heads` are ``found``: a tensor, a tuple or a dict.

    Examples:
        >>> returned_by({"output_0": 1, "output_1": 2}, "logits"), returned_by({"logits": 3}, "logits")
        ((1, 2), 3)
    """
    if list(found) == [alone]:
        return found[alone]
    return tuple(found.values()) if all(name.startswith(_PLACE) for name in found) else dict(found)


def _named(returned: Any) -> Mapping[str, Any] | None:
    if isinstance(returned, Mapping):
        return returned
    if hasattr(returned, "_asdict"):
        fields: Mapping[str, Any] = returned._asdict()
        return fields
    if isinstance(returned, (tuple, list)):
        return {str(index): value for index, value in enumerate(returned)}
    if dataclasses.is_dataclass(returned):
        return {field.name: getattr(returned, field.name) for field in dataclasses.fields(returned)}
    return None
