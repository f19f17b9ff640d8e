"""The command line of a verb that is none of Lightning's, made of a dataclass and the docstrings of its attributes."""

from __future__ import annotations

import argparse
import inspect
import shutil
import sys
from collections.abc import Sequence
from dataclasses import MISSING, Field, field, fields
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from docstring_parser import parse_from_object

from lqkd.utils.suggest import suggestion

T = TypeVar("T")


def argument(default: Any, *, metavar: str | None = None, shown: str | None = None) -> Any:
    """A field that is an option.

    Args:
        default: of the option.
        metavar: what help calls the value.
        shown: what help calls the default, where it is None.
    """
    return field(default=default, kw_only=True, metadata={"metavar": metavar, "shown": shown})


class VerbParser(argparse.ArgumentParser):
    """The parser of ``python -m lqkd VERB``, whose arguments are the fields of a dataclass.

    Its description is the dataclass's docstring, the help of an argument the docstring of its attribute. Fields that
    are keyword-only are options, ``--top-k`` for ``top_k``; others are given by their position. ``bool`` is a switch,
    ``tuple[X, ...]`` takes several values, or none by its position where it has a default.

    Args:
        verb: its name.
        kind: the dataclass.
    """

    def __init__(self, verb: str, kind: type) -> None:
        width = max(80, shutil.get_terminal_size((120, 24)).columns)
        super().__init__(
            f"python -m lqkd {verb}",
            description=" ".join(inspect.cleandoc(kind.__doc__ or "").split()),
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=width),
        )
        texts = {entry.arg_name: entry.description or "" for entry in parse_from_object(kind).params}
        types = get_type_hints(kind)
        for each in fields(kind):
            self._add(each, types[each.name], " ".join(texts[each.name].split()))

    def _add(self, each: Field[Any], annotation: Any, text: str) -> None:
        kind = next((member for member in get_args(annotation) if type(None) in get_args(annotation)), annotation)
        settings: dict[str, Any] = {"metavar": each.metadata.get("metavar"), "type": kind}
        if kind is bool:
            settings = {"action": "store_true"}
        elif get_origin(kind) is tuple:
            settings |= {"type": get_args(kind)[0], "nargs": "+" if each.kw_only or each.default is MISSING else "*"}
            settings |= {"action": "extend"} if each.kw_only else {}  # an option that is given twice gives both
        if not each.kw_only:
            settings["metavar"] = each.name.upper()
            if settings.get("nargs") == "*":  # or argparse calls it required
                settings["default"] = each.default
            self.add_argument(each.name, help=text.replace("%", "%%"), **settings)
            return
        if each.default is MISSING:
            settings["required"], default = True, "must be given"
        else:
            own = "false" if each.default is False else "none" if each.default == () else str(each.default)
            shown = each.metadata["shown"] or own
            own_default = [*each.default] if isinstance(each.default, tuple) else each.default  # which can be extended
            settings["default"], default = own_default, f"default: {shown}"
        name, told = f"--{each.name.replace('_', '-')}", f"{text} ({default})".replace("%", "%%")
        self.add_argument(name, dest=each.name, help=told, **settings)

    def error(self, message: str) -> NoReturn:
        several = [
            action.option_strings[0] for action in self._actions if action.option_strings and action.nargs == "+"
        ]
        if several and "are required: " in message and "are required: -" not in message:  # one by its position
            message += f" (before {' or '.join(several)}, which takes all that follows)"
        told = f"{message}{suggestion(message, self)}"
        print(f"lqkd: error: {told} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def read(verb: str, kind: type[T], args: Sequence[str]) -> T:
    """The arguments of a verb.

    Raises:
        SystemExit: with status 2 after a mistake, told in one line, and after ``--help``.
    """
    return _made(kind, VerbParser(verb, kind).parse_intermixed_args(args))


def read_known(verb: str, kind: type[T], args: Sequence[str]) -> tuple[T, list[str]]:
    """The same, and the arguments that are none of the verb's."""
    given, others = VerbParser(verb, kind).parse_known_args(args)
    return _made(kind, given), others


def _made(kind: type[T], given: argparse.Namespace) -> T:
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in vars(given).items()})
