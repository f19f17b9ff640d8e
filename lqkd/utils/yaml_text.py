"""Text in YAML, which may be a stranger's: a few lines of aliases of aliases can stand for more than any memory."""

from __future__ import annotations

import math
from typing import Any

import yaml

from lqkd.errors import UsageError

MOST_VALUES = 1_000_000
"""What a configuration may have once every alias is written out."""
DEEPEST = 200
"""How deeply one may nest."""
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def load_yaml(text: str, source: str) -> Any:
    """The plain values of ``text``.

    Args:
        text: what a file holds.
        source: the file, for messages.

    Raises:
        UsageError: see :func:`check_yaml`.
        yaml.YAMLError: when it is no YAML.
    """
    check_yaml(text, source)
    return yaml.load(text, Loader=_Loader)


def check_yaml(text: str, source: str) -> None:
    """Refuse a text that stands for too many values or nests too deeply; one that is no YAML is let pass.

    Raises:
        UsageError: then.
    """
    try:
        values = _values(yaml.compose(text, Loader=_Loader), {})
    except yaml.YAMLError:
        return
    except RecursionError:
        values = math.inf
    if values > MOST_VALUES:
        raise UsageError(
            f"{source!r} is not accepted: its aliases or nesting stand for more than {MOST_VALUES:,} values, which no "
            "configuration has"
        )


def _values(node: yaml.Node | None, known: dict[int, float], depth: int = 0) -> float:
    """How many nodes ``node`` is with all aliases written out; infinitely many where one stands for what it is in."""
    if depth > DEEPEST:
        return math.inf
    if id(node) not in known:
        known[id(node)] = math.inf
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        children = [child for pair in inner for child in pair] if isinstance(node, yaml.MappingNode) else inner
        known[id(node)] = 1 + sum(_values(child, known, depth + 1) for child in children)
    return known[id(node)]
