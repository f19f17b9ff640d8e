"""A bound for networks that a file describes."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.nn.modules import module as registration

from lqkd.errors import UsageError

_FACTOR = 4
"""So many times what a file holds may be made on the way to its network: parts are replaced, weights are shared."""
_MODULES = 16
"""Modules for each tensor."""
_ELEMENTS, _TENSORS = 1_000_000, 1_000
"""What may be made in any case."""


@contextmanager
def no_larger_than(shapes: Mapping[str, Any]) -> Iterator[None]:
    """Stop a network that is built within the block once it has much more than a file of these tensors can hold.

    A file says which network it is of, and with which arguments. A depth of millions would take all time and memory
    before its tensors could be compared with those of the file.

    Args:
        shapes: of the tensors in the file, by name.

    Raises:
        UsageError: from within the constructor, as soon as there are too many modules, parameters or elements.
    """
    held = sum(_product(shape) for shape in shapes.values())
    room = {
        "elements": _FACTOR * held + _ELEMENTS,
        "parameters": _FACTOR * len(shapes) + _TENSORS,
        "modules": _MODULES * (len(shapes) + _TENSORS),
    }
    builder = threading.get_ident()

    def take(kind: str, number: int) -> None:
        room[kind] -= number if threading.get_ident() == builder else 0
        if room[kind] < 0:
            raise UsageError(f"its arguments make a network far larger than the {len(shapes)} tensors of the file")

    def parameter(owner: nn.Module, name: str, value: Any) -> None:
        take("parameters", 1)
        take("elements", 0 if value is None else value.numel())

    def module(owner: nn.Module, name: str, value: Any) -> None:
        take("modules", 1)

    with ExitStack() as stack:
        stack.enter_context(registration.register_module_parameter_registration_hook(parameter))
        stack.enter_context(registration.register_module_module_registration_hook(module))
        yield


def _product(shape: Any) -> int:
    number = 1
    for side in shape:
        number *= side
    return number
