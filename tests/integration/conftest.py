"""What whole runs share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def _no_pictures(drawing: object) -> None:
    """Whole runs draw none unless they ask for the function that does."""


@pytest.fixture(autouse=True, scope="module")
def _trust_is_found_once() -> Iterator[None]:
    from tests import found_once

    with found_once.trust():
        yield
