"""Anyone's own texts, and the one that comes with Python."""

from __future__ import annotations

import hashlib
import json
from codecs import BOM_UTF8
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lqkd.data.parts import looked_for
from lqkd.data.text import TextDataModule
from lqkd.data.tokenized import Tokenizer, tokenized
from lqkd.errors import UsageError
from lqkd.utils.escaping import terminal

_ENDINGS = (".txt", ".md", ".jsonl")
"""Of the files of a folder that are read."""


class TextFiles(TextDataModule):
    """Text files of one's own in UTF-8, read as bytes or by a tokenizer of Hugging Face.

    A folder stands for all its files that end with ``.txt``, ``.md`` or ``.jsonl``, in subfolders too, in the order of
    their names; others are named in a warning, hidden ones left out, and so are a text that is there twice and what
    ``val`` and ``test`` name. Of ``.jsonl`` every line is an object whose ``text`` is a text.

    Args:
        root: A file, or a folder.
        val: A file or folder for validation; null means that a part of ``root`` is held out.
        test: Likewise for testing.
        tokenizer: A folder, a ``.gguf`` file, or a name on Hugging Face's hub, as :func:`~lqkd.models.causal_lm` takes
            it for the network whose tokenizer it is; null for bytes. A text is tokenized once and kept in $LQKD_CACHE,
            else ~/.cache/lqkd. It adds no tokens of its own.
        kwargs: The settings of :class:`~lqkd.data.TextDataModule`.

    Raises:
        UsageError: when there is no such file, nothing in it, or it is no text in UTF-8, or no such tokenizer.
    """

    def __init__(
        self,
        *,
        root: str,
        val: str | None = None,
        test: str | None = None,
        tokenizer: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.root, self.val, self.test, self.tokenizer = root, val, test, tokenizer
        self._tokenizer: Tokenizer | None = None
        self._read_bytes = self._read_tokens = 0

    def setup(self, stage: str | None = None) -> None:
        if self.tokenizer is None or self._tokenizer is not None:
            super().setup(stage)
            return
        self._tokenizer, self.unit = Tokenizer(self.tokenizer), "tokens"
        self.num_classes = self._tokenizer.size
        super().setup(stage)
        rank_zero_info(
            f"tokenizer={self.tokenizer}: {self._read_tokens:,} tokens, of {self.num_classes:,} that there are, with "
            f"{self._read_bytes / self._read_tokens:.4g} bytes each (the task's bytes_per_token)"
        )

    def encode(self, texts: list[bytes]) -> Tensor:
        if self._tokenizer is None:
            return super().encode(texts)
        found = tokenized(texts, self._tokenizer)
        self._read_bytes, self._read_tokens = self._read_bytes + sum(map(len, texts)), self._read_tokens + len(found)
        return found

    def tokens_of(self, texts: list[bytes]) -> Tensor:
        """The tokens (N,) of texts, one after the other, int32, which are not kept."""
        if self._tokenizer is None:
            return torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8).int()
        return torch.from_numpy(np.concatenate([*self._tokenizer.numbers(texts)]))

    def held_out_texts(self) -> dict[str, list[bytes]]:
        """The texts of files for validation and testing, where there are any."""
        return {name: _read(name, Path(path)) for name, path in self._held_out().items()}

    def texts(self) -> dict[str, list[bytes]]:
        apart = [Path(path) for path in self._held_out().values()]
        return {"train": _read("root", Path(self.root), apart), **self.held_out_texts()}

    def _held_out(self) -> dict[str, str]:
        return {name: path for name, path in (("val", self.val), ("test", self.test)) if path is not None}


class PythonTopics(TextDataModule):
    """The help topics of the Python that runs, some 0.4 MB of English: a text without a download.

    Each paragraph, once, is for training, validation or testing as a hash of it says, a tenth each for the latter two:
    for every seed and version of Python the same, so that ``builtin:topics_gpt`` has seen none that is held out. The
    topics differ a little from one version to the next, and with them what comes of a training.

    Args:
        context: Bytes that the network sees at once, 2 or more.
        batch_size: Windows per process and training step.
        eval_batch_size: Windows per process and step in validation and test; null means batch_size.
        seed: Seed of the order; null means the run's seed (seed_everything), else 0.
        limit_train: Train on only this many windows, for quick studies; null means all.
        trust_fraction: Share of these that are in no training batch; see :class:`~lqkd.data.TextDataModule`.
    """

    def __init__(
        self,
        *,
        context: int = 128,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        seed: int | None = None,
        limit_train: int | None = None,
        trust_fraction: float = 0.0,
    ) -> None:
        super().__init__(
            context=context,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            seed=seed,
            limit_train=limit_train,
            trust_fraction=trust_fraction,
        )

    def texts(self) -> dict[str, list[bytes]]:
        from pydoc_data.topics import topics

        paragraphs = dict.fromkeys(part.strip("\n") for name in sorted(topics) for part in topics[name].split("\n\n"))
        found: dict[str, list[bytes]] = {"train": [], "val": [], "test": []}
        for paragraph in filter(None, paragraphs):
            tenth = hashlib.sha256(paragraph.encode()).digest()[0] % 10
            found["test" if tenth == 0 else "val" if tenth == 1 else "train"].append(paragraph.encode())
        return found


def files_of(name: str, path: Path, apart: Sequence[Path] = ()) -> list[Path]:
    """The files of a folder that are read, or a file, but for those that are ``apart``.

    Args:
        name: of the setting.
        path: its value.
        apart: files, and folders of files, that are read for something else.

    Raises:
        UsageError: when there is nothing at ``path``.
    """
    if path.is_dir():
        seen = [file for file in sorted(path.rglob("*")) if file.is_file() and not _hidden(file.relative_to(path))]
        files = [file for file in seen if file.suffix.lower() in _ENDINGS]
        left = [file for file in seen if file.suffix.lower() not in _ENDINGS]
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
    elsewhere = {place.resolve() for place in apart}
    own = [file for file in files if not elsewhere & {file.resolve(), *file.resolve().parents}]
    if len(own) < len(files):
        rank_zero_info(f"{name}={path}: files that val and test name are left out ({len(files) - len(own)})")
    return own


def _read(name: str, path: Path, apart: Sequence[Path] = ()) -> list[bytes]:
    """The texts of a file or of a folder, but for those that are ``apart``."""
    read = [text for file in files_of(name, path, apart) for text in _texts_of(file)]
    texts = [*dict.fromkeys(read)]
    if len(texts) < len(read):
        rank_zero_warn(f"{name}={path}: texts that are there already are left out ({len(read) - len(texts)})")
    if not any(text.strip() for text in texts):
        other = ", beside what val and test name" if apart else ""
        raise UsageError(
            f"{name}={path} has no text{other}: something in a file ending with {', '.join(_ENDINGS)} is needed"
        )
    return texts


def _hidden(file: Path) -> bool:
    return any(part.startswith(".") for part in file.parts)


def _texts_of(file: Path) -> list[bytes]:
    raw = file.read_bytes().removeprefix(BOM_UTF8)
    if b"\0" in raw:
        raise UsageError(f"{terminal(str(file))} has bytes of zero, as UTF-16 has: convert it to UTF-8, or take it out")
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{terminal(str(file))} is not in UTF-8: byte {error.start} is {raw[error.start]:#04x}; convert it or take "
            "it out"
        ) from None
    if file.suffix.lower() != ".jsonl":
        return [raw]
    return [text_of_line(file, number, line) for number, line in enumerate(raw.splitlines(), 1) if line.strip()]


def text_of_line(file: Path, number: int, line: bytes) -> bytes:
    """The text of a line of a ``.jsonl`` file.

    Raises:
        UsageError: when it is no object with one.
    """
    try:
        text: str = json.loads(line)["text"]
        return text.encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UsageError(
            f'{terminal(str(file))} line {number} is no object with a text: {{"text": "..."}} is needed'
        ) from None
