"""What whole runs share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lqkd.callbacks.regularizer import pictures


@pytest.fixture(autouse=True, scope="module")
def drawing() -> Iterator[Callable[..., Any]]:
    """Draw no pictures, which takes half of the time of a short run; the function that would draw them."""
    with pytest.MonkeyPatch.context() as patched:
        drawing = pictures.pictures
        patched.setattr(pictures, "pictures", lambda *history: iter(()))
        yield drawing
