"""Texts as tokens of a tokenizer of Hugging Face, made once and kept as a file that is mapped into memory."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lqkd.models.hugging_face import located, reading, require
from lqkd.utils.files import atomic_path, default_cache_dir

_FORMAT = "1"  # part of the fingerprint: raise it when what is kept changes
_AT_ONCE = 256
"""Texts that are given to the tokenizer together."""


class Tokenizer:
    """A tokenizer of Hugging Face, by the setting ``tokenizer`` of a data module.

    No token is added at the beginning or the end of a text.

    Args:
        source: a folder, a ``.gguf`` file or a name, as :func:`~lqkd.models.causal_lm` takes it.

    Raises:
        UsageError: when transformers is not installed or there is no tokenizer.
    """

    def __init__(self, source: str) -> None:
        transformers = require(source, "tokenizer")
        with reading(source, "tokenizer", "tokenizer"):
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(**located(source, "tokenizer"))
        self.size = 1 + max(self._tokenizer.get_vocab().values())
        """The number after the largest token."""

    @property
    def end(self) -> int | None:
        """The token that ends a text, where there is one."""
        found = self._tokenizer.eos_token_id
        return found if isinstance(found, int) else None

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; of those that are no text, nothing."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def save(self, folder: Path) -> None:
        """Write its files into ``folder``, as transformers reads them."""
        self._tokenizer.save_pretrained(folder)

    def fingerprint(self) -> str:
        """Hash of all that decides what tokens a text has."""
        fast = getattr(self._tokenizer, "backend_tokenizer", None)
        told = self._files() if fast is None else fast.to_str()
        return hashlib.sha256(f"{type(self._tokenizer).__name__}{told}".encode()).hexdigest()

    def _files(self) -> list[tuple[str, str]]:
        """Names and hashes of all that a slow tokenizer is saved as: its vocabulary says nothing of its merges."""
        with tempfile.TemporaryDirectory() as folder:
            self._tokenizer.save_pretrained(folder)
            files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
            return [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]

    def numbers(self, texts: list[bytes]) -> Iterator[np.ndarray]:
        """The tokens of some texts in UTF-8 at a time, int32."""
        for start in range(0, len(texts), _AT_ONCE):
            some = [text.decode() for text in texts[start : start + _AT_ONCE]]
            for found in self._tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]:
                yield np.asarray(found, dtype=np.int32)


class Bytes:
    """The bytes of a text in UTF-8, as :class:`Tokenizer` has tokens.

    Examples:
        >>> Bytes().encode("é!"), Bytes().decode([195, 169, 33, 195])
        ([195, 169, 33], 'é!�')
    """

    size = 256
    end = None

    def encode(self, text: str) -> list[int]:
        """The bytes of a text."""
        return list(text.encode("utf-8", "surrogateescape"))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of bytes, with U+FFFD for what is no UTF-8, such as a part of a character at the end."""
        return bytes(tokens).decode("utf-8", "replace")


def tokenized(texts: list[bytes], tokenizer: Tokenizer) -> Tensor:
    """The tokens (N,) of texts, one after the other, int32.

    They are kept in ``tokens`` of the cache, $LQKD_CACHE or else ~/.cache/lqkd, by the hash of tokenizer and texts, and
    the file is mapped into memory. Where it cannot be written, a warning says so.
    """
    cache = default_cache_dir() / "tokens" / f"{_fingerprint(texts, tokenizer)}.npy"
    if (kept := _read(cache)) is not None:
        return kept
    found = np.concatenate([np.empty(0, np.int32), *tokenizer.numbers(texts)])
    try:
        with atomic_path(cache) as temporary, open(temporary, "wb") as stream:
            np.save(stream, found)
    except OSError as error:
        rank_zero_warn(f"{cache.parent} cannot be written, so texts are tokenized again in every run: {error}")
        return torch.from_numpy(found)
    kept = _read(cache)
    return torch.from_numpy(found) if kept is None else kept


def _fingerprint(texts: Iterable[bytes], tokenizer: Tokenizer) -> str:
    digest = hashlib.sha256(f"{_FORMAT} {tokenizer.fingerprint()}".encode())
    for text in texts:
        digest.update(f"{len(text)}\0".encode())
        digest.update(text)
    return digest.hexdigest()[:32]


def _read(cache: Path) -> Tensor | None:
    try:
        mapped = np.load(cache, mmap_mode="c", allow_pickle=False)  # a private map, which PyTorch takes for writable
    except (OSError, ValueError, EOFError):
        return None  # not there, or damaged: it is made again
    return torch.from_numpy(mapped) if mapped.dtype == np.int32 and mapped.ndim == 1 and mapped.size else None
