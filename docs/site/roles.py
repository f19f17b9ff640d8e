"""Shows the roles of docstrings (:class:`~lqkd.data.Batch`) as code, which Markdown does not know."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":[a-z]+:`(?P<short>~)?(?P<target>[^`]+)`")
_LITERAL = re.compile(r"``([^`]+)``")


class Roles(griffe.Extension):
    """Rewrites every docstring while griffe loads it."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = _ROLE.sub(_as_code, obj.docstring.value)
            obj.docstring.value = _LITERAL.sub(r"`\1`", text)


def _as_code(role: re.Match[str]) -> str:
    target = role["target"]
    return f"`{target.rpartition('.')[2] if role['short'] else target}`"
