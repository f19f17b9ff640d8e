"""What whole runs share."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="module")
def _no_pictures(drawing: object) -> None:
    """Whole runs draw none unless they ask for the function that does."""
