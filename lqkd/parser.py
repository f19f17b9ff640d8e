"""An argument parser whose errors are one sentence."""

from __future__ import annotations

import re
import sys
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser


class OneLineParser(LightningArgumentParser):
    """Prints ``lqkd: error: ...`` in one line and exits with status 2, where jsonargparse prints what it tried.

    Every argument is given by its full name.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        print(f"lqkd: error: {condense(message)} (see python -m lqkd --help)", file=sys.stderr)
        sys.exit(2)


def condense(message: str) -> str:
    """The innermost complaint of a nested message of jsonargparse, with the path of the setting that it is about."""
    keys = [key for key in re.findall(r'Parser key "([^"]+)"', message) if key != "config"]
    # Rows that only say which types were tried are dropped; the most deeply indented of the others is the cause.
    rows = [
        (len(line) - len(line.lstrip(" -")), line.strip(" -"))
        for line in message.splitlines()
        if not re.match(r"[ -]*(Does not validate|Subtypes|Errors:|Given value|Problem with given|$)", line)
        and "NoneType'>" not in line
        and not re.fullmatch(r'[ -]*Parser key "[^"]+":', line)
    ]
    deepest = max((indent for indent, _ in rows), default=0)
    cause = next((text for indent, text in rows if indent == deepest), message.splitlines()[0])
    cause = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", re.sub(r'^Parser key "[^"]+": *', "", cause))
    if re.match(r"No module named '", cause):
        return f"{'.'.join(keys)}: {cause}: start lqkd in the folder of that file, or name the folder in PYTHONPATH"
    given = re.findall(r"Given value: (?!NestedArg|Namespace)(.+)", message)
    value = f"; got {given[-1]}" if given and "Got value" not in cause else ""
    return f"{'.'.join(keys)}: {cause}{value}" if keys else f"{cause}{value}"
