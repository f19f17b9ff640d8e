"""What a run's summary says of its regularizers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Told(NamedTuple):
    """Of the regularizer of one term."""

    verdict: str | None
    """``healthy``, ``collapsed``, ...; None where the summary has none."""
    sentence: str
    """With a number and a remedy; empty where the summary has none."""


def verdicts(summary: Mapping[str, Any]) -> dict[str, Told]:
    """By name of the distillation term, which is empty for the only one; empty where there was no regularizer.

    Args:
        summary: content of ``summary.json``.

    Examples:
        >>> verdicts({"regularizer": {"verdict": "healthy", "sentence": "fine"}})
        {'': Told(verdict='healthy', sentence='fine')}
        >>> verdicts({"regularizer": {"verdict": {"verdict": "healthy", "sentence": "of a term with that name"}}})
        {'verdict': Told(verdict='healthy', sentence='of a term with that name')}
    """
    found = summary.get("regularizer") or {}
    only = any(key in found and not isinstance(found[key], Mapping) for key in ("verdict", "sentence"))
    terms = {"": found} if only else found
    return {
        name: Told(_text(of_term.get("verdict")), _text(of_term.get("sentence")) or "")
        for name, of_term in terms.items()
        if isinstance(of_term, Mapping)
    }


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
