"""What a run's summary comes to, in words: of its student, and of its regularizers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from lqkd.tasks.values import is_share, name_of, shown

SPOILED = ("collapsed", "dominant", "saturated", "diverged")
"""Verdicts on a regularizer of which a training warns."""


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


def bits_of(summary: Mapping[str, Any]) -> str:
    """Bits of weights and activations in most layers.

    Examples:
        >>> bits_of({"weight_bits": "2 (8 in 2 layers)", "activation_bits": "4 (8 in 2 layers)"}), bits_of({})
        ('W2 A4', 'float')
    """
    both = (str(summary.get(key) or "").partition(" ")[0] for key in ("weight_bits", "activation_bits"))
    weights, activations = both
    return f"W{weights} A{activations}" if weights and activations else "float"


def measured_on(summary: Mapping[str, Any]) -> tuple[float | None, str]:
    """The value of what was trained, and the split that it is of."""
    if summary.get("test") is not None:
        return summary["test"], "test split"
    return summary.get("val"), "validation split, which chose the checkpoint"


def in_a_sentence(summary: Mapping[str, Any]) -> str:
    """How good the trained network is, against its float network and against what was only quantised, and its size.

    Args:
        summary: content of ``summary.json``.

    Examples:
        >>> bits = {"weight_bits": "2", "activation_bits": "2", "packed_bytes": 10, "float_bytes": 100}
        >>> in_a_sentence(bits | {"test": 0.96, "student_float": 0.98})
        'W2 A2: accuracy 96.00%, 2.00 points worse than in float (98.00%), packed weights 10 times smaller.'
        >>> measured = {"metric": "val/loss", "mode": "min", "test": 1.2, "student_start": 1.1}
        >>> in_a_sentence(measured)
        'float: loss 1.2; quantised only: 1.1. Training has not paid: quantised only is as good or better.'
        >>> in_a_sentence(measured | {"student_gptq": 1.0}).partition(". ")[2]
        'Training has not paid: quantised only and calibrated only (GPTQ) are as good or better.'
    """
    metric, (value, split) = summary.get("metric") or "val/acc", measured_on(summary)
    if value is None:
        return f"{bits_of(summary)}: nothing was measured, for there are neither validation nor test data."
    told = f"{bits_of(summary)}: {name_of(metric)} {shown(metric, value, 2)}"
    told += "" if split.startswith("test") else f" on the {split}"
    reference, mode = summary.get("student_float"), summary.get("mode")
    if reference is not None:
        told += f", {_against(metric, mode, value, reference)} in float ({shown(metric, reference, 2)})"
    whole, packed = summary.get("float_bytes"), summary.get("packed_bytes")
    if whole and packed and whole != packed:
        told += f", packed weights {whole / packed:.3g} times smaller"
    untrained = {name: found for key, name in _UNTRAINED.items() if (found := summary.get(key)) is not None}
    told += "".join(f"; {name}: {shown(metric, found, 2)}" for name, found in untrained.items())
    reached = [name for name, found in untrained.items() if not _better(mode, value, found)]
    if reached and summary.get("test") is not None:  # which these are values of, too
        told += (
            f". Training has not paid: {' and '.join(reached)} {'is' if len(reached) == 1 else 'are'} as good or better"
        )
    return f"{told}."


_UNTRAINED = {"student_start": "quantised only", "student_gptq": "calibrated only (GPTQ)"}
"""What a trained student must be better than, by its key."""


def _better(mode: str | None, value: float, other: float) -> bool:
    return value < other if mode == "min" else value > other


def _against(metric: str, mode: str | None, value: float, reference: float) -> str:
    change = value - reference
    size = f"{100 * abs(change):.2f} points" if is_share(metric) else f"{abs(change):.3g}"
    if size.startswith("0.00 ") or not change:
        return "as good as"
    return f"{size} {'better' if _better(mode, value, reference) else 'worse'} than"


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
