"""Anyone's own texts, and the one that comes with Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lqkd.data.parts import looked_for
from lqkd.data.text import TextDataModule
from lqkd.errors import UsageError
from lqkd.utils.escaping import terminal

_ENDINGS = (".txt", ".md", ".jsonl")
"""Of the files of a folder that are read."""


class TextFiles(TextDataModule):
    """Text files of one's own, read as bytes of UTF-8.

    A folder stands for all its files that end with ``.txt``, ``.md`` or ``.jsonl``, in subfolders too, in the order of
    their names; others are named in a warning. Of ``.jsonl`` every line is an object whose ``text`` is a text.

    Args:
        root: A file, or a folder.
        val: A file or folder for validation; null means that a part of ``root`` is held out.
        test: Likewise for testing.
        kwargs: The settings of :class:`~lqkd.data.TextDataModule`.

    Raises:
        UsageError: when there is no such file, nothing in it, or it is no text in UTF-8.
    """

    def __init__(self, *, root: str, val: str | None = None, test: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root, self.val, self.test = root, val, test

    def texts(self) -> dict[str, list[bytes]]:
        given = {"train": ("root", self.root), "val": ("val", self.val), "test": ("test", self.test)}
        return {split: _read(name, Path(path)) for split, (name, path) in given.items() if path is not None}


class PythonTopics(TextDataModule):
    """The help topics of the Python that runs, about 0.4 MB of English: a text without a download.

    They differ a little from one version of Python to the next, and with them what comes of a training.

    Args:
        kwargs: The settings of :class:`~lqkd.data.TextDataModule`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def texts(self) -> dict[str, list[bytes]]:
        from pydoc_data.topics import topics

        return {"train": [topics[name].strip().encode() for name in sorted(topics)]}


def _read(name: str, path: Path) -> list[bytes]:
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.is_file() and not file.name.startswith(".")]
        left = [file for file in files if file.suffix not in _ENDINGS]
        files = [file for file in files if file.suffix in _ENDINGS]
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            rank_zero_warn(
                f"left out {terminal(str(left[0]))}{more} of {name}={path}: read are files that end with "
                f"{', '.join(_ENDINGS)}"
            )
    elif path.is_file():
        files = [path]
    else:
        raise UsageError(f"{name}={path} does not exist{looked_for(path)}: give a text file, or a folder with some")
    texts = [text for file in files for text in _texts_of(file)]
    if not any(text.strip() for text in texts):
        raise UsageError(
            f"{name}={path} has no text: a file that ends with {', '.join(_ENDINGS)} with something in it is needed"
        )
    return texts


def _texts_of(file: Path) -> list[bytes]:
    raw = file.read_bytes()
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{terminal(str(file))} is not in UTF-8: byte {error.start} is {raw[error.start]:#04x}; convert it or take "
            "it out"
        ) from None
    if file.suffix != ".jsonl":
        return [raw]
    found = []
    for number, line in enumerate(raw.splitlines(), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
            found.append(text.encode())
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UsageError(
                f'{terminal(str(file))} line {number} is no object with a text: {{"text": "..."}} is needed'
            ) from None
    return found
