"""What the pure rooms offer is documented: what it takes, what it refuses, and an example that is true."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOMS = ("quantization", "losses", "regularizers", "balances", "models", "utils")
OFFERS = ("quantization", "quantization.quantizers", "losses", "regularizers", "balances", "models")
"""Those whose ``__all__`` says what is public."""
ABOVE = ("data", "teachers", "modules", "callbacks", "runs", "export")
REFERENCE = Path(__file__).parents[2] / "docs" / "site" / "reference"


def modules(room: str) -> Iterator[ModuleType]:
    package = importlib.import_module(f"lqkd.{room}")
    yield package
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        yield importlib.import_module(found.name)


def examples(room: str) -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    return [test for module in modules(room) for test in finder.find(module) if test.examples]


def offered(room: str) -> Iterator[tuple[str, Any]]:
    """Name and value of every class and function that a room offers."""
    package = importlib.import_module(f"lqkd.{room}")
    for name in package.__all__:
        value = getattr(package, name)
        if inspect.isclass(value) or inspect.isroutine(value):
            yield name, value


def constructors(kind: type) -> list[Any]:
    """The constructors of a class and of what it inherits from, as far as they are written here."""
    own = [base for base in kind.__mro__ if base.__module__.startswith("lqkd.") and "__init__" in vars(base)]
    return [base.__init__ for base in own if not dataclasses.is_dataclass(base)]


def arguments(value: Any) -> set[str]:
    """What a class of ours or a function is called with; nothing for a class that has its constructor from PyTorch."""
    if inspect.isclass(value) and not dataclasses.is_dataclass(value) and not constructors(value):
        return set()
    return set(inspect.signature(value).parameters)


def documented(value: Any) -> set[str]:
    """The names that the sections of arguments and attributes of a docstring explain."""
    sections = re.findall(r"^(?:Args|Attributes):\n((?:    .*\n?|\n)+)", inspect.getdoc(value) or "", re.MULTILINE)
    entries = re.findall(r"^    ([\w*]+(?:, [\w*]+)*):", "\n".join(sections), re.MULTILINE)
    return {name.strip("* ") for entry in entries for name in entry.split(",")}


def refuses(value: Any) -> bool:
    """Whether the source of a function, or of the constructors of a class, raises a UsageError itself."""
    sources = constructors(value) if inspect.isclass(value) else [inspect.unwrap(value)]
    return any("raise UsageError" in inspect.getsource(source) for source in sources)


@pytest.mark.parametrize("room", ROOMS)
def test_the_examples_of_a_room_are_true(room: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LQKD_COMPILE", "0")
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    failures: list[str] = []
    with torch.random.fork_rng(devices=[]):
        for test in examples(room):
            torch.manual_seed(0)
            runner.run(test, out=failures.append)
    assert not failures, "".join(failures)


@pytest.mark.parametrize("room", OFFERS)
def test_everything_that_a_room_offers_has_an_example(room: str) -> None:
    shown = {test.name for test in examples(room)}
    assert not [name for name, value in offered(room) if f"{value.__module__}.{name}" not in shown]


@pytest.mark.parametrize("room", OFFERS)
def test_every_argument_of_what_a_room_offers_is_explained(room: str) -> None:
    unexplained = {name: arguments(value) - documented(value) for name, value in offered(room)}
    assert not {name: missing for name, missing in unexplained.items() if missing}


@pytest.mark.parametrize("room", OFFERS)
def test_what_refuses_a_setting_says_so(room: str) -> None:
    silent = [name for name, value in offered(room) if refuses(value) and "UsageError:" not in (value.__doc__ or "")]
    assert not silent


def referenced() -> list[str]:
    """The module, class or function of every entry of the reference pages; each listed member of a module by itself."""
    found = []
    for page in sorted(REFERENCE.glob("*.md")):
        for name, members in re.findall(
            r"^::: ([\w.]+)(?:\n    options: \{members: \[(.*?)\]\})?$", page.read_text(encoding="utf-8"), re.MULTILINE
        ):
            found += [f"{name}.{member}" for member in members.split(", ")] if members else [name]
    return found


def test_no_entry_of_the_reference_pages_is_doubled() -> None:
    entries = referenced()
    assert sorted(set(entries)) == sorted(entries)


@pytest.mark.parametrize("room", [*OFFERS, *ABOVE])
def test_everything_that_a_room_offers_is_on_a_reference_page(room: str) -> None:
    entries = set(referenced())
    assert not [n for n, v in offered(room) if not {v.__module__, f"{v.__module__}.{n}"} & entries]
