"""The folders of a data set's parts: training, validation and testing."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from lqkd.errors import UsageError
from lqkd.utils.escaping import terminal

_VALIDATION_NAMES = ("val", "valid", "validation")


def folders_of_parts(root: Path, content: str) -> dict[str, Path]:
    """The folders of the parts ``train``, ``val`` and ``test``, of which ``root`` has the first and another one.

    Other folders are left out with a warning.

    Args:
        root: has a folder ``train``.
        content: what such a folder holds, for messages.

    Raises:
        UsageError: when there is nothing but ``train``, or more than one folder for validation.
    """
    given = {path.name: path for path in sorted(root.iterdir()) if path.is_dir() and path.name[0] != "."}
    folders = {"train": given.pop("train")}
    validation = [name for name in _VALIDATION_NAMES if name in given]
    if len(validation) > 1:
        raise UsageError(f"root={root} has {' and '.join(validation)}: only one can be for validation.")
    if validation:
        folders["val"] = given.pop(validation[0])
    if "test" in given:
        folders["test"] = given.pop("test")
    if len(folders) == 1:
        raise UsageError(
            f"root={root} has train but neither val nor test: add one, or put {content} into root"
            " itself, so that images are held out for testing."
        )
    if given:
        rank_zero_warn(f"left out {terminal(', '.join(given))} of root={root}: read are {', '.join(folders)}")
    return folders


def looked_for(root: Path) -> str:
    """Where a relative path was looked for."""
    return "" if root.is_absolute() else f" in {Path.cwd()}"
