"""The settings in which the variants of a study differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from lqkd.studies.material import STUDY_KIND, Material, Table
from lqkd.studies.settings import STUDY
from lqkd.utils.yaml_text import load_yaml

_ABSENT = "-"
_CLASS = ".class_path"
_LONGEST = 80
"""Letters of a value."""


def settings_table(material: Material) -> Table | None:
    """A row for each setting in which variants differ, and a column for each of them; None where there is none.

    Raises:
        UsageError: when a configuration is damaged.
    """
    if material.kind != STUDY_KIND:
        return None
    texts = {name: text for name, text in material.configs.items() if name != STUDY and text}
    flat = {name: dict(_flat(load_yaml(text, f"{name}.yaml"))) for name, text in texts.items()}
    rows = []
    for key in dict.fromkeys(key for settings in flat.values() for key in settings):
        cells = [settings.get(key, _ABSENT) for settings in flat.values()]
        if len(set(cells)) > 1:
            rows.append([key, *cells])
    return Table("Settings in which the variants differ", ("setting", *flat), rows) if rows else None


def _flat(settings: Any, within: str = "") -> Iterator[tuple[str, str]]:
    """Every value by its dotted key, without ``init_args``; the name of a class by the key of its object."""
    if isinstance(settings, Mapping) and settings:
        for key, value in settings.items():
            yield from _flat(value, within if key == "init_args" else f"{within}.{key}" if within else str(key))
        return
    text = settings if isinstance(settings, str) else json.dumps(settings, default=str)
    if within.endswith(_CLASS):
        within, text = within.removesuffix(_CLASS), text.rpartition(".")[2]
    yield within, text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
