"""Old names of modules and classes, so that run folders, checkpoints and configurations made with them keep working."""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

MODULES = {
    "lqkd.callbacks.checkpoint": "lqkd.runs.checkpoint",
    "lqkd.callbacks.checkpoint_io": "lqkd.runs.checkpoint_io",
    "lqkd.callbacks.oscillation_dampening": "lqkd.callbacks.oscillation.dampening",
    "lqkd.callbacks.oscillation_freezing": "lqkd.callbacks.oscillation.freezing",
    "lqkd.callbacks.oscillation_monitor": "lqkd.callbacks.oscillation.monitor",
    "lqkd.callbacks.regularizer_monitor": "lqkd.callbacks.regularizer.monitor",
    "lqkd.callbacks.run_logger": "lqkd.runs.logger",
    "lqkd.callbacks.run_summary": "lqkd.runs.summary",
    "lqkd.ensemble": "lqkd.teachers.ensemble",
    "lqkd.regularizers.balances": "lqkd.balances",
    "lqkd.run_folder": "lqkd.runs.folder",
    "lqkd.student": "lqkd.runs.student",
    "lqkd.study": "lqkd.studies",
    "lqkd.teacher": "lqkd.teachers.frozen",
    "lqkd.teacher_cache": "lqkd.teachers.cache",
    "lqkd.wandb_report": "lqkd.studies.wandb_report",
}
"""Where the modules of former releases are now, with what is inside of them."""
CLASSES = {
    **{
        f"lqkd.regularizers.{name}": f"lqkd.balances.{name}"
        for name in (
            "Balance",
            "BoundedUncertaintyBalance",
            "DynamicWeightAverage",
            "FixedBalance",
            "GradNorm",
            "GradientBalance",
            "ImpartialBalance",
            "LearnableRatioBalance",
            "OutputGradNorm",
            "OutputGradientBalance",
            "RandomBalance",
            "ScheduledBalance",
            "UncertaintyBalance",
        )
    },
    "lqkd.ensemble.TeacherEnsemble": "lqkd.teachers.TeacherEnsemble",
    "lqkd.modules.base.ImageClassifier": "lqkd.modules.base.TaskModule",
    "lqkd.teacher.FrozenTeacher": "lqkd.teachers.FrozenTeacher",
    **{
        f"lqkd.callbacks.{name}": f"lqkd.runs.{name}"
        for name in ("AtomicCheckpointIO", "BestAndLast", "RunLogger", "RunSummary")
    },
}
"""Where the classes are that have left a module which is still there, or that have a shorter name than their module."""
KEYS = {
    "teacher_accuracy": "teacher",
    "student_float_accuracy": "student_float",
    "student_initial_quantized_accuracy": "student_start",
    "val_accuracy": "val",
    "test_accuracy": "test",
}
"""What ``summary.json`` and checkpoints called the values of the metric when it was always the accuracy."""
TERMS = {
    "distillation.losses.": "distillation.distill.losses.",
    "distillation.regularizers.": "distillation.distill.regularizers.",
    "combination.": "distillation.distill.combination.",
}
"""Beginnings of names in the state of a module whose distillation was one term without a name."""
_CLASS = re.compile(r"(?<![\w./-])lqkd(?:\.\w+)*\.[A-Z]\w*")


def current(value: Any) -> Any:
    """``value`` of a configuration, nested, with the names of today in the place of old ones.

    Examples:
        >>> current({"class_path": "lqkd.teacher.FrozenTeacher", "init_args": {"std": 0.5}})
        {'class_path': 'lqkd.teachers.FrozenTeacher', 'init_args': {'std': 0.5}}
    """
    if isinstance(value, dict):
        return {key: current(of) for key, of in value.items()}
    if isinstance(value, list):
        return [current(of) for of in value]
    return _now(value) if isinstance(value, str) and _CLASS.fullmatch(value) else value


def current_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with the keys of today in the place of old ones.

    Examples:
        >>> current_keys({"teacher_accuracy": 0.97, "epochs": 3})
        {'teacher': 0.97, 'epochs': 3}
    """
    return {KEYS.get(key, key): value for key, value in values.items()}


def current_terms(state: Mapping[str, Any]) -> dict[str, Any]:
    """A ``state_dict`` with today's names of what a distillation learned, when it had one term without a name.

    Examples:
        >>> [*current_terms({"distillation.losses.0.x": 1, "combination.scores": 2})]
        ['distillation.distill.losses.0.x', 'distillation.distill.combination.scores']
    """

    def now(key: str) -> str:
        return next((new + key.removeprefix(old) for old, new in TERMS.items() if key.startswith(old)), key)

    return _with_gates({now(key): value for key, value in state.items()})


def _with_gates(state: dict[str, Any]) -> dict[str, Any]:
    """With a gate that is shut in every trust map that is older than gates."""
    for key in [key for key in state if key.endswith(".combination.map.scale")]:
        scale, prefix = state[key], key.removesuffix("scale")
        state.setdefault(f"{prefix}gated", scale.new_zeros((), dtype=bool))
        state.setdefault(f"{prefix}gate", scale.new_zeros(len(scale), 2 * len(scale) + 2))
    return state


def renewed(text: str) -> tuple[str, dict[str, str]]:
    """``text``, of a configuration or a command, with the names of today, and those that were old, with what they are.

    Examples:
        >>> renewed("balance: lqkd.regularizers.FixedBalance")
        ('balance: lqkd.balances.FixedBalance', {'lqkd.regularizers.FixedBalance': 'lqkd.balances.FixedBalance'})
    """
    found = {name: _now(name) for name in _CLASS.findall(text)}
    return _CLASS.sub(lambda match: found[match[0]], text), {old: new for old, new in found.items() if old != new}


def _now(name: str) -> str:
    """The name of today of a module, or of something inside of one."""
    if name in CLASSES:
        return CLASSES[name]
    inside, rest = name, ""
    while inside and inside not in MODULES:
        inside, _, last = inside.rpartition(".")
        rest = f".{last}{rest}"
    return f"{MODULES[inside]}{rest}" if inside else name


def moved_from(package: str) -> Callable[[str], Any]:
    """``__getattr__`` of a package that classes have left (PEP 562)."""

    def find(name: str) -> Any:
        new = CLASSES.get(f"{package}.{name}")
        if new is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        _tell(f"{package}.{name}", new)
        module, _, now = new.rpartition(".")
        return getattr(importlib.import_module(module), now)

    return find


def install() -> None:
    """Let imports of old modules find the new ones, with a :class:`FutureWarning`."""
    if not any(isinstance(finder, _OldModules) for finder in sys.meta_path):
        sys.meta_path.append(_OldModules())


def moved_command(module: str, verb: str) -> NoReturn:
    """End ``python -m MODULE``, which is a verb of ``python -m lqkd`` now, with that in one line and status 2."""
    print(f"lqkd: error: python -m {module} is now python -m lqkd {verb}", file=sys.stderr)
    sys.exit(2)


class _OldModules(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if _now(fullname) != fullname else None

    def exec_module(self, module: ModuleType) -> None:
        new = _now(module.__name__)
        _tell(module.__name__, new)
        found = importlib.import_module(new)
        module.__getattr__ = lambda name: getattr(found, name)  # type: ignore[method-assign]
        module.__dir__ = lambda: dir(found)  # type: ignore[method-assign]


def _tell(old: str, new: str) -> None:
    warnings.warn(f"{old} is now {new}", FutureWarning, stacklevel=3)
