"""A setting of the wrong type, which only somebody who builds the part in Python can give."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lqkd import balances, losses, regularizers
from lqkd.errors import UsageError
from lqkd.regularizers.guards import GUARDS
from lqkd.regularizers.players import PLAYERS


def numbers() -> Iterator[Any]:
    """Every class of these rooms with the name of each of its settings that are numbers."""
    offered = [getattr(room, name) for room in (losses, regularizers, balances) for name in room.__all__]
    kinds = (losses.DistillationLoss, regularizers.Regularizer, balances.Balance)
    made = [cls for cls in offered if isinstance(cls, type) and issubclass(cls, kinds) and not inspect.isabstract(cls)]
    for cls in (*made, *GUARDS.values(), *PLAYERS.values()):
        for mro in cls.__mro__:
            for setting, parameter in inspect.signature(mro).parameters.items() if mro is not object else ():
                if str(parameter.annotation).removesuffix(" | None") in ("float", "int"):
                    yield pytest.param(cls, setting, id=f"{cls.__name__}-{setting}")
            if "limits" not in inspect.signature(mro).parameters:
                break


@pytest.mark.parametrize(("make", "setting"), numbers())
def test_a_number_that_is_a_text_is_refused_with_its_name_and_what_would_be_accepted(
    make: Callable[..., Any], setting: str
) -> None:
    with pytest.raises(UsageError, match=f"{setting}='0.5'.* is not possible.*: .*"):
        make(**{setting: "0.5"})
