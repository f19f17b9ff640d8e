"""Overrides of a configuration: dotted keys or nested mappings, merged into a base."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

CLASS = "class_path"


def nested(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings for dotted keys: ``{"a.b": 1, "a": {"c": 2}}`` becomes ``{"a": {"b": 1, "c": 2}}``."""
    result: dict[str, Any] = {}
    for key, value in overrides.items():
        inner = nested(value) if isinstance(value, Mapping) else copy.deepcopy(value)
        for part in reversed(str(key).split(".")):
            inner = {part: inner}
        result = merge(result, inner)
    return result


def merge(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A new mapping in which ``overrides`` win, key by key.

    Lists and null replace what was there; so does a mapping that names another class, whose arguments the old class's
    are not. Both arguments have nested mappings only; see :func:`nested`.
    """
    result = copy.deepcopy(dict(base))
    for key, value in overrides.items():
        old: Any = result.get(key)
        if (
            isinstance(old, Mapping)
            and isinstance(value, Mapping)
            and value.get(CLASS, old.get(CLASS)) == old.get(CLASS)
        ):
            result[key] = merge(old, value)
        else:
            result[key] = copy.deepcopy(value)
    return result
