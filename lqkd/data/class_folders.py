"""Folders of images, one per class."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lqkd.errors import UsageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's ImageFolder
_SILENT = {"thumbs.db", "desktop.ini"}  # what Windows leaves; what macOS and others leave starts with a dot


def list_class_folders(folder: Path) -> dict[str, list[str]]:
    """Return class name -> the paths of its images, both sorted as in torchvision's ``ImageFolder``.

    Images may lie in folders within a class folder. Hidden files and folders are left out; so are files that have no
    image's suffix and images outside of any class folder, with a warning.

    Args:
        folder: holds one folder per class.

    Raises:
        UsageError: when there is no class folder, one holds no image, or a name is no Unicode text.
    """
    names = _folders(folder)
    if not names:
        raise UsageError(f"{folder} has no class folder: it must hold one folder of images per class.")
    classes = {}
    left_out = [f"{folder}/{entry.name}" for entry in os.scandir(folder) if entry.is_file() and _is_shown(entry.name)]
    for name in names:
        if name != name.encode("utf-8", "replace").decode("utf-8"):
            raise UsageError(
                f"{folder / name!r} is not named in UTF-8: a class folder's name is the name of the class."
            )
        files = list(shown_files(f"{folder}/{name}"))  # strings, because 60,000 Path objects take a second
        classes[name] = sorted(path for path in files if path.lower().endswith(SUFFIXES))
        left_out += [path for path in files if not path.lower().endswith(SUFFIXES)]
        if not classes[name]:
            raise UsageError(f"{folder / name} holds no image: every class folder needs one ({', '.join(SUFFIXES)}).")
    if left_out:
        what = f"{left_out[0]!r}" + (f" and {len(left_out) - 1} more" if len(left_out) > 1 else "")
        rank_zero_warn(f"left out {what}: no image of a known kind ({', '.join(SUFFIXES)}) in a class folder")
    if all(name.isdecimal() for name in names) and names != sorted(names, key=int):
        rank_zero_warn(f"the class folders of {folder} are sorted as text, not as numbers: label 2 is {names[2]!r}")
    return classes


def paths_and_labels(classes: Mapping[str, Sequence[str]]) -> tuple[list[str], Tensor]:
    """The paths of all classes one after the other, and the label (N,) int64 of each: the position of its class."""
    counts = torch.tensor([len(paths) for paths in classes.values()])
    return list(chain.from_iterable(classes.values())), torch.arange(len(classes)).repeat_interleave(counts)


def check_same_classes(first: Path, names: Sequence[str], second: Path, others: Sequence[str]) -> None:
    """Refuse two folders whose classes are not the same.

    Raises:
        UsageError: naming the classes that only one of them has.
    """
    if list(names) != list(others):
        differing = ", ".join(sorted(set(names) ^ set(others)))
        raise UsageError(f"{first} and {second} must hold the same class folders, but only one has: {differing}.")


def has_folders(folder: Path) -> bool:
    """Whether ``folder`` exists and a folder that is not hidden lies in it."""
    return folder.is_dir() and bool(_folders(folder))


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and _is_shown(entry.name))


def shown_files(folder: str) -> Iterator[str]:
    """All files in a folder and the folders within it, but for hidden ones."""
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if _is_shown(name)]
        yield from (f"{parent}/{name}" for name in files if _is_shown(name))


def _is_shown(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in _SILENT
