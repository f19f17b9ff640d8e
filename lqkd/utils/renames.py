"""Old names of modules and classes, so that run folders, checkpoints and configurations made with them keep working."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODULES = {
    "lqkd.ensemble": "lqkd.teachers",
    "lqkd.student": "lqkd.runs.student",
    "lqkd.teacher": "lqkd.teachers",
    "lqkd.teacher_cache": "lqkd.teachers.cache",
}
"""Where the modules of former releases are now."""
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
    **{
        f"lqkd.callbacks.{name}": f"lqkd.runs.{name}"
        for name in ("AtomicCheckpointIO", "BestAndLast", "RunLogger", "RunSummary")
    },
}
"""Where the classes are that have left a module which is still there."""


def current(value: Any) -> Any:
    """``value`` of a configuration, nested, with the names of today in the place of old ones."""
    if isinstance(value, dict):
        return {key: current(of) for key, of in value.items()}
    if isinstance(value, list):
        return [current(of) for of in value]
    if not isinstance(value, str) or not value.startswith("lqkd."):
        return value
    module, _, name = value.rpartition(".")
    return CLASSES.get(value) or (f"{MODULES[module]}.{name}" if module in MODULES else value)


def moved_from(package: str) -> Callable[[str], Any]:
    """``__getattr__`` of a package that classes have left (PEP 562)."""

    def find(name: str) -> Any:
        new = CLASSES.get(f"{package}.{name}")
        if new is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        _tell(f"{package}.{name}", new)
        return getattr(importlib.import_module(new.rpartition(".")[0]), name)

    return find


def install() -> None:
    """Let imports of old modules find the new ones, with a :class:`FutureWarning`."""
    if not any(isinstance(finder, _OldModules) for finder in sys.meta_path):
        sys.meta_path.append(_OldModules())


class _OldModules(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MODULES else None

    def exec_module(self, module: ModuleType) -> None:
        new = MODULES[module.__name__]
        _tell(module.__name__, new)
        found = importlib.import_module(new)
        module.__getattr__ = lambda name: getattr(found, name)  # type: ignore[method-assign]
        module.__dir__ = lambda: dir(found)  # type: ignore[method-assign]


def _tell(old: str, new: str) -> None:
    warnings.warn(f"{old} is now {new}", FutureWarning, stacklevel=3)
