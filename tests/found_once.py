"""What is fitted to the same bits is fitted once: it takes longer than a short training and depends on nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256

import pytest

from lqkd.losses.trust.forms import Parts, Problem

_FOUND: dict[bytes, Parts] = {}


@contextmanager
def trust() -> Iterator[None]:
    """Within it :meth:`Problem.minimise` looks up what it has found before in this process."""
    minimise = Problem.minimise

    def once(problem: Problem, parts: Parts, strength: float, accuracy: float = 1e-9) -> Parts:
        asked = [problem.seen, problem.reduced, problem.told, problem.labels, *parts.values()]
        shapes = [value.shape for value in asked]
        key = sha256(repr((shapes, [*parts], strength, accuracy, problem.unit)).encode())
        for value in asked:
            key.update(value.contiguous().numpy())
        if key.digest() not in _FOUND:
            _FOUND[key.digest()] = minimise(problem, parts, strength, accuracy)
        return {name: value.clone() for name, value in _FOUND[key.digest()].items()}

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Problem, "minimise", once)
        yield


def forget() -> None:
    """The next fits are made, whatever they are to."""
    _FOUND.clear()
