"""The nearest known name for a setting, class or verb that is mistyped."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches

_UNKNOWN = re.compile(
    r"unrecognized arguments: --(?P<argument>[\w.]+)"
    r"|Option '(?P<option>[\w.]+)' is not accepted"
    r"|Group '(?P<group>[\w.]+)' does not accept option '(?P<member>[\w.]+)'"
    r"|does not accept option '(?P<setting>[\w.]+)'"
)
_CLASS = re.compile(r"class_path(?: |=)'(?P<path>[\w.]+)'")
_ATTRIBUTE = re.compile(r"module '(?P<module>[\w.]+)' has no attribute '(?P<name>\w+)'")


def nearest(name: str, known: Iterable[str]) -> str:
    """``: did you mean ...?``, or nothing when no name is near; of a dotted one the first part may be the wrong one."""
    names = sorted(known)
    found = get_close_matches(name, names, 1)
    if not found and "." in name:
        first, _, rest = name.partition(".")
        found = [f"{match}.{rest}" for match in get_close_matches(first, names, 1)]
    return f": did you mean {found[0]}?" if found else ""


def suggestion(message: str, parser: argparse.ArgumentParser | None) -> str:
    """What follows a complaint of jsonargparse's about a name that is not known."""
    if attribute := _ATTRIBUTE.search(message):
        return nearest(attribute["name"], dir(importlib.import_module(attribute["module"])))
    unknown = _UNKNOWN.search(message)
    if unknown is None:
        return ""
    name = next(text for key, text in unknown.groupdict().items() if text is not None and key != "group")
    classes = _CLASS.findall(message)
    if not classes:
        return nearest(name, _options(parser)) if parser is not None else ""
    if unknown["group"] is not None:
        return nearest(name, _members(classes[-1], unknown["group"]))
    return nearest(name, _settings(classes[-1]))


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from (text[2:] for text in action.option_strings if text.startswith("--") and text[-1] != "+")
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                yield from _options(verb)


def _settings(path: str) -> list[str]:
    from jsonargparse import ArgumentParser
    from jsonargparse._parameter_resolvers import get_signature_parameters

    module, _, name = path.rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    parser = ArgumentParser(exit_on_error=False)
    if isinstance(kind, type):
        parser.add_class_arguments(kind, fail_untyped=False)
    else:
        parser.add_function_arguments(kind, fail_untyped=False)
    return [
        parameter.name for parameter in get_signature_parameters(kind, "__init__" if isinstance(kind, type) else None)
    ] + [option for option in _options(parser) if "." in option]


def _members(path: str, group: str) -> list[str]:
    return [name.removeprefix(f"{group}.") for name in _settings(path) if name.startswith(f"{group}.")]
