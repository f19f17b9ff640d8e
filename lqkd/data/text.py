"""Texts as bytes or tokens, in windows of one length."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from lqkd.data.fingerprint import content_hash
from lqkd.data.loader import TensorBatches
from lqkd.errors import UsageError
from lqkd.utils.counter_rng import STREAM_HELD_OUT, random_bits

BYTES = 256
"""Tokens of a text that is read as bytes."""
SEPARATOR = b"\n\n"
"""What ends a text."""
_PARTS = 50
"""A text that is longer than this part of all is cut, at ends of lines, so that it can be in more than one split."""


class Tokens(NamedTuple):
    """A batch of texts of one length, of which every token is predicted from those before it."""

    tokens: Tensor
    """(B, T): uint8 bytes or int32 tokens from the loader, int64 once the data module has preprocessed them."""
    labels: None
    """None: no token is left out; see :class:`~lqkd.tasks.CausalLM`."""
    indices: Tensor
    """(B,) int64 places in the training text, or in that of the split."""


class TokenBatches(TensorBatches):
    """:class:`TensorBatches` of windows (N, T), as :class:`Tokens`."""

    def __iter__(self) -> Any:
        return (Tokens(batch.images, None, batch.indices) for batch in super().__iter__())


class TextDataModule(LightningDataModule, ABC):
    """Texts, held in memory as bytes, for the task :class:`~lqkd.tasks.CausalLM` with ``bytes_per_token: 1``.

    A subclass may make other tokens of them (:meth:`encode`).

    A subclass says what the texts are (:meth:`texts`). Where it has none for testing or validation, long ones are cut,
    at ends of lines, else between words, into pieces of at most a fiftieth of all; pieces are held out for testing, the
    same ones in every run, and for validation, as the seed says. The rest is trained on. What a split has is put
    together in its order and cut into windows of ``context`` tokens, each beginning anew; what is left at the end is
    too short for one and left out. The order of windows is a pure function of (seed, epoch).

    Args:
        context: Bytes, or tokens, that the network sees at once, 2 or more.
        batch_size: Windows per process and training step.
        eval_batch_size: Windows per process and step in validation and test; null means batch_size.
        validation_fraction: Share of the training text held out for validation, in (0, 1).
        test_fraction: Share of the text held out for testing, in (0, 1).
        seed: Seed of the split and the order; null means the run's seed (seed_everything), else 0.
        limit_train: Train on only this many windows, for quick studies; null means all.
        trust_fraction: Share of these training windows, chosen by the seed, that are in no training batch: what follows
            in them says how far teachers can be believed (``combination: trust`` of a distillation); in [0, 1), 0 means
            none.

    Raises:
        UsageError: when a setting is out of range, here, or there is too little text, in ``setup``.
    """

    num_classes = BYTES
    """Tokens."""
    unit = "bytes"
    """What messages call them."""
    input_dtype = torch.int64
    run_seed: int
    """The seed in use, after ``setup``."""
    train_indices: Tensor
    """Sorted int64 places of the training windows; known after ``setup``."""
    val_indices: Tensor
    """Those of the validation windows, in the text for validation."""
    trust_indices: Tensor
    """Sorted int64 places of the windows of :meth:`trust_batches`, in the training text; known after ``setup``."""

    def __init__(
        self,
        *,
        context: int = 128,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.1,
        seed: int | None = None,
        limit_train: int | None = None,
        trust_fraction: float = 0.0,
    ) -> None:
        super().__init__()
        self.context, self.batch_size = context, batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.validation_fraction, self.test_fraction = validation_fraction, test_fraction
        self.seed, self.limit_train, self.trust_fraction = seed, limit_train, trust_fraction
        self._windows: dict[str, Tensor] = {}
        self._fingerprint: str | None = None
        for name, least in (("context", 2), ("batch_size", 1), ("eval_batch_size", 1), ("limit_train", 1)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise UsageError(f"{name}={value} is not accepted: it must be a whole number from {least} on.")
        for name in ("validation_fraction", "test_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} is not accepted: it must lie between 0 and 1.")
        if not 0 <= trust_fraction < 1:
            raise UsageError(f"trust_fraction={trust_fraction} is not accepted: it must be in [0, 1).")

    @abstractmethod
    def texts(self) -> dict[str, list[bytes]]:
        """Read all texts, once, on every process: under ``train``, and under ``val`` and ``test`` those that are held
        out already."""

    def encode(self, texts: list[bytes]) -> Tensor:
        """The tokens (N,) of texts, one after the other: their bytes, uint8."""
        return torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8)

    def setup(self, stage: str | None = None) -> None:
        """Read the texts, hold out what no training sees, and cut windows; once for all stages."""
        if self._windows:
            return
        self.run_seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if self.seed is None else self.seed
        parts: dict[str, list[bytes]] = {"val": [], "test": []}
        parts |= {split: [text + SEPARATOR for text in texts] for split, texts in self.texts().items()}
        pieces = _pieces(parts["train"])
        for split, share, seed in (("test", self.test_fraction, 0), ("val", self.validation_fraction, self.run_seed)):
            if not parts[split]:
                parts[split], pieces = _held_out(pieces, share, f"{split} {seed}")
        self._windows = {split: self._cut(split, of) for split, of in {**parts, "train": pieces}.items()}
        count = len(self._windows["train"])
        if self.limit_train is not None and self.limit_train > count:
            raise UsageError(f"limit_train={self.limit_train} is not accepted: there are {count} windows to train on.")
        self.val_indices = torch.arange(len(self._windows["val"]))
        self._hold_out(torch.arange(count if self.limit_train is None else self.limit_train))

    def _hold_out(self, windows: Tensor) -> None:
        """Share training windows out: those that are trained on, and those of ``trust_fraction``."""
        held_out = round(self.trust_fraction * len(windows))
        if self.trust_fraction and not 0 < held_out < len(windows):
            raise UsageError(
                f"trust_fraction={self.trust_fraction} holds out {held_out} of {len(windows)} training windows: at"
                " least one must be held out and one left."
            )
        order = windows[random_bits(self.run_seed, 0, windows, STREAM_HELD_OUT).argsort(stable=True)]
        self.trust_indices, self.train_indices = order[:held_out].sort().values, order[held_out:].sort().values

    @property
    def image_shape(self) -> tuple[int]:
        """(T,) of an input; the name is that of all data modules."""
        return (self.context,)

    def train_dataloader(self) -> TokenBatches:
        """This process's share of the training windows, in a new order in each epoch."""
        return self._batches(
            "train",
            self.train_indices,
            batch_size=self.batch_size,
            shuffle=not getattr(self.trainer, "overfit_batches", 0),
            seed=self.run_seed,
            drop_last=len(self.train_indices) >= self.batch_size * self._place()[1],
        )

    def trust_batches(self, device: torch.device) -> Iterator[Tokens]:
        """All windows of ``trust_fraction``, on every process, in the same order each time."""
        assert self._windows, "call setup() first"
        if not len(self.trust_indices):
            return
        windows, held_out = self._windows["train"], self.trust_indices
        loader = TokenBatches(windows, _places(windows), held_out, batch_size=self.eval_batch_size, shuffle=False)
        for batch in loader:
            on_device = batch._replace(tokens=batch.tokens.to(device), indices=batch.indices.to(device))
            yield self.preprocess(on_device, train=True, epoch=0)

    def val_dataloader(self) -> TokenBatches:
        """This process's share of the validation windows."""
        return self._evaluation("val")

    def test_dataloader(self) -> TokenBatches:
        """This process's share of the test windows."""
        return self._evaluation("test")

    def predict_dataloader(self) -> TokenBatches:
        """Those of the test, as ``test_dataloader`` gives them."""
        return self.test_dataloader()

    def preprocess(self, batch: Tokens, *, train: bool, epoch: int) -> Tokens:
        """The same with int64 tokens, on the device that it is on."""
        return batch._replace(tokens=batch.tokens.to(torch.int64))

    def on_after_batch_transfer(self, batch: Tokens, dataloader_idx: int) -> Tokens:
        assert self.trainer is not None
        return self.preprocess(batch, train=self.trainer.training, epoch=self.trainer.current_epoch)

    def augmentation_key(self) -> dict[str, Any]:
        """Nothing: a window is the same in every epoch."""
        return {}

    def fingerprint(self) -> str:
        """Hash of all windows of all splits; needs ``setup``."""
        if self._fingerprint is None:
            self._fingerprint = content_hash(self._windows[split] for split in ("train", "val", "test"))
        return self._fingerprint

    def _evaluation(self, split: str) -> TokenBatches:
        everything = torch.arange(len(self._windows[split]))
        return self._batches(split, everything, batch_size=self.eval_batch_size, shuffle=False)

    def _batches(self, split: str, indices: Tensor, **settings: Any) -> TokenBatches:
        assert self._windows, "call setup() first"
        windows, (rank, world_size) = self._windows[split], self._place()
        return TokenBatches(windows, _places(windows), indices, rank=rank, world_size=world_size, **settings)

    def _place(self) -> tuple[int, int]:
        """This process's rank and the number of processes."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _cut(self, split: str, texts: list[bytes]) -> Tensor:
        """(N, context) whole numbers."""
        whole = self.encode(texts) if texts else torch.empty(0, dtype=torch.uint8)
        count = len(whole) // self.context
        if not count:
            named = {"train": "training", "val": "validation", "test": "testing"}[split]
            raise UsageError(
                f"context={self.context} is not possible: the text for {named} has {len(whole)} {self.unit}, too few "
                "for one window"
            )
        return whole[: count * self.context].view(count, self.context)


def _places(windows: Tensor) -> Tensor:
    """In the place of labels (N,), which windows have none of."""
    return torch.arange(len(windows))


def _pieces(texts: list[bytes]) -> list[bytes]:
    """Texts of which none is longer than a fiftieth of all."""
    longest = max(1, sum(map(len, texts)) // _PARTS)
    pieces: list[bytes] = []
    for text in texts:
        begin = 0
        while len(text) - begin > longest:
            end = _end(text, begin, begin + longest)
            pieces.append(text[begin:end])
            begin = end
        pieces.append(text[begin:])
    return pieces


def _end(text: bytes, begin: int, latest: int) -> int:
    """Where a piece from ``begin`` on ends: behind a line, or a word, or a character, and at ``latest``."""
    for separator in (b"\n", b"\r", b" "):
        if found := text.rfind(separator, begin, latest) + 1:
            return found
    end = latest
    while end > begin + 1 and text[end] & 0xC0 == 0x80:  # within a character of UTF-8
        end -= 1
    return end


def _held_out(pieces: list[bytes], share: float, salt: str) -> tuple[list[bytes], list[bytes]]:
    """Pieces, chosen by their content, that are at least so large a share of all, and the others; both in order."""
    by_chance = sorted(range(len(pieces)), key=lambda place: hashlib.sha256(salt.encode() + pieces[place]).digest())
    left, chosen = share * sum(map(len, pieces)), set[int]()
    for place in by_chance:
        if left <= 0:
            break
        chosen.add(place)
        left -= len(pieces[place])
    others = [piece for place, piece in enumerate(pieces) if place not in chosen]
    return [pieces[place] for place in sorted(chosen)], others


def tokenizer_said(data: Any) -> dict[str, str | None]:
    """What a file says of the way in which a text becomes tokens for its network, under ``tokenizer``.

    It is the setting of that name, None for bytes; nothing is said of data that are no :class:`TextDataModule`, or make
    tokens otherwise.
    """
    found = getattr(data, "tokenizer", None)
    named = isinstance(found, str) or (found is None and getattr(data, "num_classes", None) == BYTES)
    return {"tokenizer": found} if named and isinstance(data, TextDataModule) else {}
