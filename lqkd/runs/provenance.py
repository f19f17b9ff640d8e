"""Where a file came from: which checkpoint an export is of, and whether a run's code is the user's own."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import pkgutil
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from lqkd.errors import UsageError
from lqkd.runs.folder import BEST, CHECKPOINTS, CONFIG, PYTHON, SUMMARY
from lqkd.utils import renames
from lqkd.utils.yaml_text import load_yaml

REPORTS = "*.report.json"
"""What ``export`` leaves beside every file."""
FLOAT_ONNX = "float32 ONNX"
"""What the report of an exported file calls its network in floating point."""
TRUSTED = ("lqkd", "torch", "lightning", "torchvision", "timm")
"""Packages whose classes and functions a run folder may name."""


def fingerprint(checkpoint: Path) -> str:
    """The SHA-256 of a checkpoint file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(checkpoint, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def outdated(file: Path, said: dict[str, Any], run: Path | None = None) -> str | None:
    """One sentence when the run that ``file`` is of has another best checkpoint than ``file`` came from.

    Args:
        file: an exported file.
        said: what it, or the report beside it, says of itself: ``checkpoint``, a fingerprint.
        run: the folder of the run; None for that in which ``file`` lies.

    Returns:
        ``None`` when they are the same, or when either is not known, as of a file outside of a run folder.
    """
    checkpoint, recorded = (file.parent if run is None else run) / CHECKPOINTS / BEST, said.get("checkpoint")
    if not recorded or not checkpoint.is_file() or fingerprint(checkpoint) == recorded:
        return None
    return (
        f"{str(file)!r} is of an earlier student: {CHECKPOINTS}/{BEST} of its run has changed since; export it again "
        f"with --format {said.get('format', 'portable')} --overwrite"
    )


def outdated_exports(folder: Path) -> dict[Path, str]:
    """Every exported file in the run folder ``folder`` that is of an earlier student, with a sentence that says so."""
    found = {}
    for path in sorted(folder.glob(REPORTS)):
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            file = folder / str(said["file"])
            found[file] = outdated(file, said)
        except (ValueError, KeyError, TypeError, AttributeError):  # damaged: told by whoever reads all of it
            continue
    return {file: sentence for file, sentence in found.items() if sentence is not None}


# ---- the code that a configuration names


def foreign_code(settings: Any) -> set[str]:
    """Dotted names of what ``settings``, nested JSON values, would have imported from outside of :data:`TRUSTED`.

    That is every ``class_path``, and every other text that names something in a module which can be imported: a
    quantizer of one's own, say, or a function that a callback is to call.
    """
    return {text for text in _texts(renames.current(settings)) if _is_code(text) and not _is_trusted(text)}


def check_code(settings: Any, source: Path, allowed: bool, how: str = "give --allow-code") -> None:
    """Refuse settings that came with a file and name code which this user has never named in a training.

    Args:
        settings: nested JSON values.
        source: the file, to be named.
        allowed: whether any code may be imported.
        how: what allows it.

    Raises:
        UsageError: with the names.
    """
    unknown = set() if allowed else foreign_code(settings) - _named_before()
    if unknown:
        raise UsageError(
            f"{str(source)!r} names code that no training of yours has named, and that would be run: "
            f"{', '.join(sorted(unknown))}; if you trust it, {how}"
        )


def check_run_code(folder: Path, allowed: bool) -> None:
    """:func:`check_code` of the configuration of a run.

    Raises:
        UsageError: as there, and of a run that :func:`lqkd.distill` has made, which no configuration can repeat.
    """
    try:
        settings = load_yaml((folder / CONFIG).read_text(encoding="utf-8"), str(folder / CONFIG))
    except UsageError:
        raise
    except (OSError, ValueError, yaml.YAMLError):  # told by whoever reads it
        return
    if isinstance(settings, dict) and PYTHON in settings:
        raise UsageError(
            f"run {str(folder)!r} was made by lqkd.distill, out of networks and data that exist in Python only: use "
            "export() and report() of what that call returned, or call it again"
        )
    check_code(settings, folder, allowed)


def check_config_code(config: Path, allowed: bool) -> None:
    """:func:`check_run_code` where a configuration lies in a run folder; any other is the user's own.

    Raises:
        UsageError: as there.
    """
    if config.name == CONFIG and any((config.parent / name).exists() for name in (CHECKPOINTS, SUMMARY)):
        check_run_code(config.parent, allowed)


def remember_code(settings: Any) -> None:
    """Note the code that this user names in a training, so that the run can be read and resumed without being asked."""
    new = foreign_code(settings) - _named_before()
    if new:
        with suppress(OSError):  # without a home folder that can be written one is asked
            _notes().parent.mkdir(parents=True, exist_ok=True)
            with open(_notes(), "a", encoding="utf-8") as stream:
                stream.write("".join(f"{name}\n" for name in sorted(new)))


def _notes() -> Path:
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "lqkd" / "code.txt"


def _named_before() -> set[str]:
    try:
        return set(_notes().read_text(encoding="utf-8").split())
    except OSError:
        return set()


def _texts(settings: Any) -> Iterator[str]:
    if isinstance(settings, dict | list):
        for value in settings.values() if isinstance(settings, dict) else settings:
            yield from _texts(value)
    elif isinstance(settings, str):
        yield settings


def _is_code(text: str) -> bool:
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", text):  # a name without a dot is of what is there already
        return False
    try:
        return importlib.util.find_spec(text.partition(".")[0]) is not None
    except ValueError:  # of __main__, for instance
        return True


def _is_trusted(name: str) -> bool:
    """Whether a trusted package has it, and not merely imports it, as ``torch.os.system``."""
    if name.partition(".")[0] not in TRUSTED:
        return False
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError):  # there is nothing to run
        return True
    owner = getattr(found, "__module__", None) or getattr(found, "__name__", "")
    return str(owner).partition(".")[0] in TRUSTED
