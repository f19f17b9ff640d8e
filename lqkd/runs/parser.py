"""Argument parsers whose errors are one sentence and whose help has a line for each option."""

from __future__ import annotations

import argparse
import inspect
import re
import shutil
import sys
import textwrap
import warnings
from collections.abc import Iterator
from enum import Enum
from inspect import Parameter
from pathlib import Path
from traceback import walk_tb
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lqkd.errors import UsageError, first_line
from lqkd.utils import renames
from lqkd.utils.escaping import terminal
from lqkd.utils.suggest import suggestion
from lqkd.utils.yaml_text import check_yaml

_NAMES = 44
"""Columns for the name of an option."""
_LONGEST_VALUE = 300
"""Characters of a value that a complaint repeats; one with more says nothing."""
_GROUPS = {"trainer": "trainer (Lightning's)", "run": "run (its folder)", "ckpt_path": "checkpoint"}
_TEXTS = {
    "config": "YAML file with settings; may be given several times, later ones win.",
    "print_config": "Print the whole configuration and exit.",
    "seed_everything": "Seed of weights, order and augmentation.",
    "model": "Class of the model; its settings are --model.SETTING, see below.",
    "data": "Class of the data; its settings are --data.SETTING, see below.",
    "ckpt_path": "Checkpoint to start from; test, validate and predict take the best one beside the config.",
    "weights_only": "Whether nothing but tensors is read from the checkpoint.",
    "trainer.default_root_dir": "Not used: see run.root.",
}
"""Where the docstring that jsonargparse finds says too little."""


_OF_SETTINGS = (
    ValueError, TypeError, ArithmeticError, RuntimeError, AssertionError, OSError, MisconfigurationException
)  # fmt: skip
"""What constructors raise about their arguments."""
_NO_NETWORK = (
    ": if it wants to download weights, leave those out and give a file with them, .safetensors or one of torch.save, "
    "as student_weights, the teacher's weights or ClassifierModule's weights"
)


yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, value: dumper.represent_data(value.value))
"""So that a default that is an Enum, as Lightning's Timer has one, can be kept in a configuration."""


_UNWRITABLE = "Unable to serialize instance"
"""What jsonargparse writes in the place of a value that it cannot write."""


class OneLineParser(LightningArgumentParser):
    """Prints ``lqkd: error: ...`` in one line and exits with status 2, where jsonargparse prints what it tried.

    Every argument is given by its full name. Old names of classes become those of today, which is told.
    """

    verb: str | None = None
    """Whose arguments are parsed, where it is known."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def dump(self, *args: Any, **kwargs: Any) -> str:
        """The settings as text, without defaults of classes that no file can hold, such as a function with arguments.

        A class has them without being told; a run whose file named them could not be read again.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=rf"\s*{_UNWRITABLE}")
            text: str = super().dump(*args, **kwargs)
        return yaml.safe_dump(_writable(yaml.safe_load(text)), sort_keys=False) if _UNWRITABLE in text else text

    def parse_args(self, args: Any = None, *rest: Any, **kwargs: Any) -> Any:
        # The parser of a class within a class gets one setting, already read, as "--SETTING=VALUE": null has become the
        # word None, which is a text to it.
        if not self.exit_on_error and isinstance(args, list) and len(args) == 1:
            args = [re.sub(r"^(--[\w.]+)=None$", r"\1=null", args[0])]
        if isinstance(args, list):
            args = [_renewed(text) if isinstance(text, str) else text for text in args]
        return super().parse_args(args, *rest, **kwargs)

    def parse_string(self, content: str, path: Any = "", *rest: Any, **kwargs: Any) -> Any:
        check_yaml(content, str(Path(path).resolve()) if path else "the configuration")  # its folder is the current one
        return super().parse_string(_renewed(content), path, *rest, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        verb = self.verb or (self.prog.split()[-1] if " " in self.prog else "VERB")
        print(f"lqkd: error: {terminal(condense(message, self))} (see python -m lqkd {verb} --help)", file=sys.stderr)
        sys.exit(2)

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Groups of options, one line each: name, what its docstring says first, default."""
        width = max(100, shutil.get_terminal_size((120, 24)).columns)
        verb = self.prog.split()[-1] if " " in self.prog else ""
        lines = [f"usage: python -m lqkd {verb or 'VERB'} --config CONFIG [--config CONFIG] [--SETTING VALUE ...]", ""]
        lines += textwrap.wrap(self.description or "", width)
        for title, actions in _groups(self):
            lines += ["", f"{title}:", *(_line(action, width) for action in actions)]
        if self.epilog:
            lines += ["", *textwrap.wrap(self.epilog, width)]
        return "\n".join([*lines, ""])


def _renewed(text: str) -> str:
    text, names = renames.renewed(text)
    for old, new in names.items():
        _tell_renamed(old, new)
    return text


@rank_zero_only
def _tell_renamed(old: str, new: str) -> None:
    """Once, in one line: there is no line of Python to show."""
    warnings.warn_explicit(f"{old} is now {new}", FutureWarning, "lqkd", 0, registry=_TOLD)


_TOLD: dict[Any, Any] = {}
"""Where :mod:`warnings` notes what was told."""


def condense(message: str, parser: argparse.ArgumentParser | None = None) -> str:
    """The innermost complaint of a nested message of jsonargparse, with the path of the setting that it is about."""
    keys = [key for key in re.findall(r'Parser key "([^"]+)"', message) if key != "config"]
    # Rows that only say which types were tried are dropped; the most deeply indented of the others is the cause.
    rows = [
        (len(line) - len(line.lstrip(" -")), line.strip(" -"))
        for line in message.splitlines()
        if not re.match(r"[ -]*(Does not validate|Subtypes|Errors:|Given value|Problem with given|$)", line)
        and not re.match(r"[ -]*(Subclass types expect|a class path \(str\)|a dict with)", line)
        and "NoneType'>" not in line
        and not re.fullmatch(r'[ -]*Parser key "[^"]+":', line)
    ]
    deepest = max((indent for indent, _ in rows), default=0)
    cause = next((text for indent, text in rows if indent == deepest), message.splitlines()[0])
    cause = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", re.sub(r'^Parser key "[^"]+": *', "", cause))
    cause = re.sub(r"^Type .* callable class: (Option '.*' is not accepted).*", r"\1", cause)
    if re.match(r"No module named '", cause):
        return f"{'.'.join(keys)}: {cause}: start lqkd in the folder of that file, or name the folder in PYTHONPATH"
    cause = re.sub(r" To accept subclasses use set_parsing_settings.*", "", cause)
    keys += _entry_without(cause, message)
    near = suggestion(message, parser)
    given = [
        value
        for value in re.findall(r"Given value: (.+)", message)
        if not re.search(r"\b(NestedArg|Namespace)\(", value) and len(value) <= _LONGEST_VALUE
    ]
    value = f"; got {given[-1]}" if given and "Got value" not in cause and not near else ""
    return f"{'.'.join(keys)}: {cause}{near}{value}" if keys else f"{cause}{near}{value}"


def _entry_without(cause: str, message: str) -> list[str]:
    """The name of the entry of a mapping that lacks what ``cause`` says is required; empty elsewhere."""
    required = re.match(r"the following arguments are required: (\w+)", cause)
    if required is None:
        return []
    return re.findall(
        rf"'([^']+)': Namespace\(class_path='[^']+', init_args=Namespace\([^()]*\b{required[1]}=None", message
    )[:1]


def of_constructor(error: BaseException) -> str | None:
    """Whose constructor, called by jsonargparse, raised ``error``, with its settings and the error itself in one line.

    None for a :class:`UsageError`, which says all that itself, and for what is no matter of settings, such as a
    misspelt name in the constructor's own code.
    """
    made = _calls(error)
    while not made and error.__cause__ is not None:  # jsonargparse wraps it once for each level of the configuration
        error = error.__cause__
        made = _calls(error)
    if not made or isinstance(error, UsageError) or not isinstance(error, _OF_SETTINGS):
        return None
    kind, settings = made[-1]["class_type"], made[-1].get("kwargs", {})
    defaults = {name: parameter.default for name, parameter in inspect.signature(kind).parameters.items()}
    given = {
        k: v.name if isinstance(v, Enum) else v for k, v in settings.items() if v != defaults.get(k, Parameter.empty)
    }
    shown = ", ".join(f"{k}={v!r}" for k, v in given.items() if isinstance(v, str | int | float | tuple | list))
    told = f"{kind.__module__}.{kind.__qualname__} cannot be made with {shown or 'its defaults'}"
    remote = isinstance(error, OSError) and error.errno is None
    advice = _NO_NETWORK if remote else ""
    return f"{told} ({type(error).__name__}: {first_line(error)}){advice}"


def _calls(error: BaseException) -> list[dict[str, Any]]:
    """The local names of jsonargparse's and Lightning's calls of constructors that ``error`` came through."""
    return [frame.f_locals for frame, _ in walk_tb(error.__traceback__) if "class_type" in frame.f_locals]


def _groups(parser: argparse.ArgumentParser) -> Iterator[tuple[str, list[argparse.Action]]]:
    """Title and options of each group, without those that only explain others."""
    for group in parser._action_groups:
        actions = [
            action
            for action in group._group_actions
            if action.option_strings
            and action.help != argparse.SUPPRESS
            and not action.option_strings[0].endswith(".help")
        ]
        members = [action for action in actions if "." in action.dest]
        shown = members or actions
        if shown:
            parents = {action.dest.rpartition(".")[0] for action in members}
            prefix = min(parents, key=len) if members else shown[0].dest
            is_class = group.title not in ("options", "optional arguments", "positional arguments")
            yield (_GROUPS.get(prefix, prefix) if is_class else "options"), shown


def _line(action: argparse.Action, width: int) -> str:
    name = f"  {action.option_strings[-1 if len(action.option_strings[0]) == 2 else 0]}"
    text = " ".join((_TEXTS.get(action.dest) or action.help or "").split()).replace("%%", "%")
    text = re.split(r"(?<=[^.]{2}\.) (?=[A-Z])|\s*Defaults?:? ", text.replace("``", ""), maxsplit=1)[0]
    default = _default(action)
    room = width - max(len(name), _NAMES) - 2 - len(default)
    return f"{name.ljust(_NAMES)} {textwrap.shorten(text, max(room, 20), placeholder=' ...')}{default}"


def _default(action: argparse.Action) -> str:
    value: Any = action.default
    if value == argparse.SUPPRESS or action.dest in ("help", "config", "print_config"):
        return ""
    if action.required:
        return " (must be given)"
    if isinstance(value, Namespace):
        value = value.as_dict()
    if isinstance(value, dict) and "class_path" in value:
        value = value["class_path"]
    shown = {"None": "null", "True": "true", "False": "false"}.get(str(value), value)
    return f" (default: {shown})"


def _writable(settings: Any) -> Any:
    if isinstance(settings, list):
        return [_writable(one) for one in settings]
    if not isinstance(settings, dict):
        return settings
    unwritable = {key for key, one in settings.items() if isinstance(one, str) and one.startswith(_UNWRITABLE)}
    return {key: _writable(one) for key, one in settings.items() if key not in unwritable}
