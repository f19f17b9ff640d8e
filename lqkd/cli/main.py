"""The command line ``python -m lqkd``: which verb does what, and how mistakes are told.

What needs no PyTorch is told before it is loaded, which takes seconds.
"""

from __future__ import annotations

import gc
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lqkd.cli import arguments
from lqkd.cli.help import help_of
from lqkd.cli.overview import overview, unknown
from lqkd.cli.verbs import VERBS
from lqkd.errors import UsageError
from lqkd.runs.status import exit_status
from lqkd.utils.memory import keep_freed_memory
from lqkd.utils.progress import Stages

_TRAINING = "lqkd.runs.train"
_SLOW = ("numpy", "torch", "torchvision", "torchmetrics", "lightning.pytorch")
"""What takes seconds to load, in the order in which it can be loaded; PyTorch loading NumPy would swallow Ctrl-C."""
_SLOW_OF = {"lqkd.studies.report": (), "lqkd.export.predict": ("numpy", "torch")}
"""Of these, what a module needs that does not need all."""
_DESCRIBE = ("--config", "-c", "--model", "--help", "-h", "--print_config")
"""Beginnings of arguments without one of which nothing says what to do."""
_ALLOW = "--allow-code"
"""Of Lightning's verbs, which take settings only."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, or 2 after a user's mistake, told in one line."""
    return exit_status(lambda: _run(sys.argv[1:] if args is None else list(args)))


def _run(given: list[str]) -> int:
    if given[:1] in (["--help"], ["-h"]):
        print(overview())
        return 0
    keep_freed_memory()
    problem = unknown(given[0]) if given else "a verb is missing: fit, for instance"
    if problem is not None:
        raise UsageError(f"{problem} (see python -m lqkd --help)")
    verb, rest = given[0], given[1:]
    if verb in VERBS and (verb != "predict" or arguments.names_images(rest)):
        given = arguments.of(verb, rest)
        module, door = VERBS[verb]
        return door(_load(module), given)
    if verb == "resume":
        resumed, settings = arguments.of_resume(rest)
        _load(_TRAINING).resume(resumed.run, settings, resumed.allow_code, _callbacks())
        return 0
    if rest in (["--help"], ["-h"]):
        print(help_of(verb, lambda: _load(_TRAINING).run([verb, *rest])), end="")
        return 0
    allowed, rest = _ALLOW in rest, [text for text in rest if text != _ALLOW]
    configs = _check_described(verb, rest)
    _load(_TRAINING).run([verb, *rest], configs, allowed, _callbacks())
    return 0


def _callbacks() -> list[Any]:
    """What a training has from rooms above that of runs."""
    from lqkd.export.export_check import ExportCheck

    return [ExportCheck()]


def _check_described(verb: str, given: Sequence[str]) -> list[Path]:
    """Refuse a command without a configuration, and one whose file is not there; the files."""
    if not any(text.startswith(_DESCRIBE) or ".help" in text for text in given):
        other = ", or name a run and images without an option before them" if verb == "predict" else ""
        raise UsageError(f"{verb} needs a configuration: give --config FILE.yaml{other}")
    paths = []
    for option, value in zip(given, [*given[1:], ""], strict=True):
        name, equals, own = option.partition("=")
        path = Path(own if equals else value)
        if name not in ("--config", "-c"):
            continue
        if path.suffix in (".yaml", ".yml") and not path.exists():
            raise UsageError(f"--config {str(path)!r} does not exist: give a YAML file")
        paths.append(path)
    return paths


def _load(name: str) -> Any:
    """A module, and before it those that take seconds, with a bar unless they are there."""
    slow = [module for module in _SLOW_OF.get(name, _SLOW) if module not in sys.modules]
    if slow:
        collects = gc.isenabled()
        gc.disable()  # nothing of it is garbage, and to look for that takes a fifth of the time
        try:
            with Stages(len(slow) + 1) as stage:
                for module in (*slow, name):
                    stage("loading")
                    importlib.import_module(module)
        finally:
            if collects:
                gc.enable()
    return importlib.import_module(name)
