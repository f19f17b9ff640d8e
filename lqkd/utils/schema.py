"""What files say about themselves, checked before anything is done with it.

A file may be damaged, or a stranger's: a size may be negative or gigantic, a name may be a number. There is one table
for each kind of file and one function that holds a file against it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from lqkd.errors import UsageError, first_line
from lqkd.utils.renames import KEYS

MOST_PIXELS = 16_384
"""Height or width of what a network sees."""
MOST_CLASSES = 1_000_000
_MOST_ELEMENTS = 2**31 - 1
_MOST = 2**63 - 1
_SHOWN = 60
"""Characters of a wrong value that a message quotes."""


@dataclass(frozen=True)
class Kind:
    """What a value must be: in words, and as a test."""

    needed: str
    holds: Callable[[Any], bool]


Table: TypeAlias = "Mapping[str, Kind | Table]"
"""Key to the kind of its value, or to the table of the mapping that it holds; other keys are not looked at."""


def check(said: Any, table: Table, source: str, within: str = "") -> None:
    """Refuse what is of another kind than ``table`` wants; a key that is missing says nothing, which is no mistake.

    Args:
        said: the values, by key.
        table: what they must be.
        source: the file, for the message.
        within: the keys that lead to ``said``, each followed by a dot.

    Raises:
        UsageError: naming the file, the key, its value and what is needed.
    """
    if not isinstance(said, Mapping):
        raise UsageError(f"{source!r} is damaged: {within.rstrip('.') or 'it'} must be a mapping, not {_short(said)}")
    for key, kind in table.items():
        if key not in said:
            continue
        value = said[key]
        if not isinstance(kind, Kind):
            if value is not None:
                check(value, kind, source, f"{within}{key}.")
        elif not kind.holds(value):
            raise UsageError(f"{source!r} is damaged: {within}{key}={_short(value)} where it must be {kind.needed}")


def read_json(path: Path, table: Table) -> dict[str, Any]:
    """The object in a JSON file, whose values are of the kinds that ``table`` wants.

    Raises:
        UsageError: when the file is damaged.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{str(path)!r} is damaged, it is no JSON file: {first_line(error)}") from error
    check(value, table, str(path))
    return dict(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _is_whole(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < _MOST  # not NaN, either


def _whole(low: int, high: int) -> Kind:
    return Kind(f"a whole number from {low} to {high}", lambda value: _is_whole(value, low, high))


def _or_null(kind: Kind) -> Kind:
    return Kind(f"{kind.needed}, or null", lambda value: value is None or kind.holds(value))


def _list(needed: str, holds: Callable[[Any], bool], most: int) -> Kind:
    def is_list(value: Any) -> bool:
        return isinstance(value, list) and len(value) <= most and all(map(holds, value))

    return Kind(f"a list of {needed}", is_list)


def _mapping(needed: str, holds: Callable[[Any], bool]) -> Kind:
    def is_mapping(value: Any) -> bool:
        return isinstance(value, Mapping) and all(holds(held) for held in value.values())

    return Kind(f"a mapping to {needed}", is_mapping)


_TEXT = _or_null(Kind("a text", lambda value: isinstance(value, str)))
_NUMBER = _or_null(Kind("a finite number", _is_number))
_COUNT = _or_null(_whole(0, _MOST))
_SETTINGS = _or_null(_mapping("settings", lambda _: True))
_NAMES = _or_null(
    _list("texts or whole numbers", lambda v: isinstance(v, str) or _is_whole(v, -_MOST, _MOST), MOST_CLASSES)
)
_MEANS = _or_null(_list("finite numbers", _is_number, _MOST_ELEMENTS))
_DEVIATIONS = _or_null(_list("numbers above 0", lambda v: _is_number(v) and v > 0, _MOST_ELEMENTS))
_SHAPE = _or_null(_list("whole numbers above 0", lambda v: _is_whole(v, 1, _MOST_ELEMENTS), 8))
_PIXELS = _whole(1, MOST_PIXELS)

PREPROCESSING: Table = {
    "channels": _or_null(_whole(1, _MOST_ELEMENTS)),
    "size": _or_null(_list(f"whole numbers from 1 to {MOST_PIXELS}", _PIXELS.holds, 8)),
    "mean": _MEANS,
    "std": _DEVIATIONS,
    "resize_size": _or_null(_PIXELS),
    "whole": _or_null(Kind("true or false", lambda value: isinstance(value, bool))),
}
"""How images are prepared for a network that classifies them."""
NETWORK_FILE: Table = {
    "lqkd": _TEXT,
    "class_names": _NAMES,
    "mean": _MEANS,
    "std": _DEVIATIONS,
    "image_shape": _SHAPE,
    "resize_size": _or_null(_PIXELS),
    "whole": _or_null(Kind("true or false", lambda value: isinstance(value, bool))),
    "student": _SETTINGS,
    "network": _SETTINGS,
    "quantization": _SETTINGS,
    "task": _SETTINGS,
    "tokenizer": _TEXT,
}
"""The metadata of ``student.safetensors`` and ``network.safetensors``."""
EXPORTED_FILE: Table = {
    "version": _TEXT,
    "format": _TEXT,
    "checkpoint": _TEXT,
    "class_names": _NAMES,
    "preprocessing": PREPROCESSING,
    "task": _SETTINGS,
    "tokenizer": _TEXT,
    "vocabulary": _COUNT,
    "context": _COUNT,
}
"""The metadata of what ``export`` writes, ``.onnx`` and ``.pt2``."""
_BITS = _or_null(Kind("a text or a whole number", lambda value: isinstance(value, str) or _is_whole(value, 0, 64)))
SUMMARY: Table = {
    "seed": _COUNT,
    "versions": _mapping("texts", lambda value: isinstance(value, str)),
    "machine": _TEXT,
    "metric": _TEXT,
    "mode": _or_null(Kind("min or max", lambda value: value in ("min", "max"))),
    **dict.fromkeys((*KEYS, *KEYS.values()), _NUMBER),
    "weight_bits": _BITS,
    "activation_bits": _BITS,
    **dict.fromkeys(("parameters", "epochs", "steps"), _COUNT),
    **dict.fromkeys(("packed_bytes", "float_bytes", "bit_operations", "images_per_second"), _NUMBER),
    **dict.fromkeys(("train_seconds", "compile_seconds"), _NUMBER),
    "regularizer": {"sentence": _TEXT},
    "balance": _SETTINGS,
    "warnings": _or_null(_list("texts", lambda value: isinstance(value, str), MOST_CLASSES)),
}
"""``summary.json`` of a run."""
_LAYER: Mapping[str, Callable[[Any], bool]] = {
    "name": lambda value: isinstance(value, str),
    **dict.fromkeys(("weight_bits", "activation_bits"), lambda value: _is_whole(value, 0, 64)),
    **dict.fromkeys(("weights", "packed_bytes", "multiplications", "bit_operations", "share"), _is_number),
}
EXPORT_REPORT: Table = {
    "file": _TEXT,
    **dict.fromkeys(
        ("file_bytes", "packed_bytes", "float_bytes", "multiplications", "bit_operations", "float_bit_operations"),
        Kind("a finite number", _is_number),
    ),
    "layers": _list(
        "layers, each with its name, bits and counts",
        lambda value: (
            isinstance(value, dict) and all(key in value and holds(value[key]) for key, holds in _LAYER.items())
        ),
        MOST_CLASSES,
    ),
    "latency": {
        "milliseconds": _mapping("finite numbers", _is_number),
        "peak_bytes": _mapping("finite numbers", _is_number),
    },
    "measured": {"value": _or_null(Kind("a finite number", _is_number))},
}
"""What ``export`` writes beside a file: its cost."""
