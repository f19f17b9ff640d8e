"""What whole runs share."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from lqkd.losses.trust.forms import Parts

_FITTED: dict[bytes, Parts] = {}


@pytest.fixture(autouse=True, scope="module")
def _no_pictures(drawing: object) -> None:
    """Whole runs draw none unless they ask for the function that does."""


@pytest.fixture(autouse=True, scope="module")
def _the_same_trust_is_found_once() -> Iterator[None]:
    """What was fitted to the same bits, which takes longer than these trainings and depends on nothing else."""
    from lqkd.losses.trust.forms import Problem

    minimise = Problem.minimise

    def once(problem: Problem, parts: Parts, strength: float, accuracy: float = 1e-9) -> Parts:
        asked = [problem.seen, problem.reduced, problem.told, problem.labels, *parts.values()]
        shapes = [value.shape for value in asked]
        key = sha256(repr((shapes, [*parts], strength, accuracy, problem.unit)).encode())
        for value in asked:
            key.update(value.contiguous().numpy())
        if key.digest() not in _FITTED:
            _FITTED[key.digest()] = minimise(problem, parts, strength, accuracy)
        return {name: value.clone() for name, value in _FITTED[key.digest()].items()}

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Problem, "minimise", once)
        yield
