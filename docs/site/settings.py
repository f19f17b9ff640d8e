"""The page of all settings, from the signatures and docstrings of what a config can name."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

from jsonargparse._parameter_resolvers import get_signature_parameters  # what LightningCLI itself builds settings from

KINDS: list[tuple[str, str, str, str]] = [
    ("Training: `model`", "lqkd.modules", "TaskModule", "lqkd.modules.base"),
    ("Teachers: `model.init_args.teacher`", "lqkd.teachers", "FrozenTeacher TeacherEnsemble", ""),
    ("Tasks: `task`", "lqkd.tasks", "Task", "lqkd.tasks"),
    ("Networks: `student`, `network`", "lqkd.models", "CifarResNet GPT build_model causal_lm", ""),
    ("Distillation losses: `distillation_loss`", "lqkd.losses", "DistillationLoss", "lqkd.losses"),
    ("Regularizers: `regularizer`", "lqkd.regularizers", "Regularizer", "lqkd.regularizers"),
    ("Guards: `guard`", "lqkd.regularizers", "Guard", "lqkd.regularizers"),
    ("Players: `player`", "lqkd.regularizers", "Player", "lqkd.regularizers"),
    ("Balances: `balance`", "lqkd.balances", "Balance", "lqkd.balances"),
    ("Schedules: `student_schedule`", "lqkd.modules", "Schedule", "lqkd.modules"),
    ("Quantizers: `weight_quantizer`, by `name`", "lqkd.quantization.quantizers", "Quantizer", "lqkd.quantization"),
    ("Data: `data`", "lqkd.data", "ImageDataModule", "lqkd.data"),
    ("Callbacks: `trainer.callbacks`", "lqkd.callbacks", "Callback", "lightning.pytorch"),
]
"""Heading, module whose ``__all__`` is listed, base class of what is listed and its module, or the names themselves."""
PLAIN = {
    "Quantization: `quantization`": "lqkd.quantization.Recipe",
    "Rules: `quantization.rules`": "lqkd.quantization.recipe.Rule",
    "Terms: `distillation`, by name": "lqkd.modules.Term",
    "Taps: `taps`": "lqkd.modules.Tap",
    "Stages of a schedule of bits: `stages`": "lqkd.callbacks.Stage",
    "The teacher's stored answers: `teacher_cache`": "lqkd.teachers.cache.cache.TeacherCache",
    "The run folder: `run`": "lqkd.runs.folder.RunSettings",
    "A study: the file of `compare`": "lqkd.studies.settings.Study",
    "Where a study runs: `launcher`": "lqkd.studies.settings.Launcher",
    "A sweep: `sweep`": "lqkd.studies.settings.Sweep",
}
"""Heading and class of what is written without ``class_path``."""
_INTERNAL = {"UniformQuantizer", "DecodingDataModule"}
_GIVEN_BY_THE_LAYER = {"bits", "signed", "channels", "channel_axis", "batched"}
_ROLE = re.compile(r":[a-z]+:`~?(?:[\w.]+\.)?([\w]+)`")


def page() -> str:
    """The page in Markdown."""
    lines = [
        "# Every setting",
        "",
        "Made from the code. A class is named by `class_path`, its settings stand under `init_args`:",
        "",
        "```yaml",
        "model:",
        "  class_path: lqkd.modules.DistillModule",
        "  init_args:",
        "    label_smoothing: 0.1",
        "```",
        "",
        "`python -m lqkd fit --config CONFIG --print_config` prints those of a run with their values; Lightning's own,",
        "under `trainer`, are in `python -m lqkd fit --help`.",
        "",
    ]
    for heading, module, base, home in KINDS:
        lines += [f"## {heading}", ""]
        for path, kind in _listed(module, base.split(), home):
            lines += _described(path, kind, "###")
    for heading, path in PLAIN.items():
        module, _, name = path.rpartition(".")
        lines += [f"## {heading}", "", *_described(path, getattr(importlib.import_module(module), name), "")]
    return "\n".join(lines)


def _listed(module: str, bases: list[str], home: str) -> Iterator[tuple[str, Any]]:
    offered = importlib.import_module(module)
    names = bases
    if home:
        base = getattr(importlib.import_module(home), bases[0])
        kinds = {name: getattr(offered, name) for name in offered.__all__ if name not in _INTERNAL}
        names = [n for n, k in kinds.items() if isinstance(k, type) and issubclass(k, base) and k is not base]
        if not names:
            raise LookupError(f"{module} offers no {bases[0]}: see KINDS in {__file__}")
    yield from ((f"{module}.{name}", getattr(offered, name)) for name in names)


def _described(path: str, kind: Any, heading: str) -> list[str]:
    lines = [f"{heading} `{path}`", ""] if heading else []
    lines += [_text(inspect.getdoc(kind) or "").partition(" Attributes:")[0].partition("\n")[0], ""]
    is_quantizer = path.startswith("lqkd.quantization.quantizers.")
    rows = [
        f"| `{p.name}` | {_type(p.annotation)} | {_default(p.default)} | {_text(p.doc or '')} |"
        for p in get_signature_parameters(kind, "__init__" if isinstance(kind, type) else None)
        if not (is_quantizer and p.name in _GIVEN_BY_THE_LAYER)
    ]
    if not rows:
        return [*lines, "No settings.", ""]
    return [*lines, "| setting | type | default | |", "|---|---|---|---|", *rows, ""]


def _text(doc: str) -> str:
    first = " ".join(doc.partition("\n\n")[0].split())
    return _ROLE.sub(r"`\1`", first).replace("``", "`").replace("|", "\\|")


def _type(annotation: Any) -> str:
    name = (
        annotation.__name__ if isinstance(annotation, type) and not hasattr(annotation, "__args__") else str(annotation)
    )
    name = re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", name.replace("NoneType", "null").replace("None", "null"))
    return f"`{name}`".replace("|", "\\|")


def _default(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return "must be given"
    if dataclasses.is_dataclass(value):
        return "its own defaults"
    if isinstance(value, dict) and "class_path" in value:
        arguments = ", ".join(f"{key}={argument}" for key, argument in value.get("init_args", {}).items())
        return f"`{value['class_path']}({arguments})`"
    if callable(value):
        return f"`{getattr(value, '__name__', value)}`"
    shown = {"None": "null", "True": "true", "False": "false"}.get(str(value), value)
    return f"`{shown}`".replace("|", "\\|")
